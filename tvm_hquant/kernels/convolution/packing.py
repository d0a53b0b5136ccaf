"""The order in which the tiles of a convolution read its constants."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from tvm_hquant.kernels.convolution.geometry import AnchorGeometry
from tvm_hquant.kernels.convolution.lane_order import channel_at_place
from tvm_hquant.kernels.convolution.patches import weights_of_patches
from tvm_hquant.kernels.convolution.step_groups import group_steps

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class AnchorPacking:
    """Packs weights and values per channel for the tiles of a geometry (a
    :class:`tvm_hquant.kernels.anchor_constants.ChannelPacking`)."""

    geometry: AnchorGeometry

    @property
    def planes(self) -> int:
        return self.geometry.planes

    @property
    def points(self) -> int:
        return self.geometry.points

    @cached_property
    def channel_rows(self) -> npt.NDArray[np.int64]:
        """Output channel of every packed lane, [groups · blocks · block]; −1 where there is none."""
        geometry, rows = self.geometry, []
        order = np.array(geometry.lane_channels(geometry.tile.vectors)).reshape(-1)
        for group in range(geometry.groups):
            for block in range(geometry.blocks):
                within = min(block * geometry.block, geometry.group_outputs - geometry.block_channels) + order
                channels = group * geometry.group_outputs + self._channel(within)
                rows.append(np.where(within < geometry.group_outputs, channels, -1))
        return np.concatenate(rows)

    def _channel(self, place: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The channel of a group, as the operator counts them, at a place in memory."""
        geometry = self.geometry
        channel: npt.NDArray[np.int64] = channel_at_place(place, geometry.group_outputs, geometry.dot.groups)
        return channel

    def pack_channels(self, values: Array, fill: float = 0) -> Array:
        """An array [..., out_channels] in the order of the tiles: [..., groups · blocks · block]."""
        padded = np.concatenate([values, np.full((*values.shape[:-1], 1), fill, values.dtype)], axis=-1)
        return np.ascontiguousarray(padded[..., self.channel_rows])

    def pack_weights(self, weights: Array) -> Array:
        """Weights [points, out, in / groups, kh, kw] in the order in which the steps read them, flat."""
        return np.ascontiguousarray(self._steps_of_tiles(weights).reshape(-1))

    def group_steps(self, packed: Array) -> tuple[Array, Array]:
        """Packed weights with their steps in an order of groups, where ``groups_steps``, and what the kernel knows of it.

        That is int32 [tiles over channels · (2 + steps)]: the numbers of groups of ``group`` and of pairs, and for each step
        in its new place how many elements after the start of a pixel's window its activations begin.
        """
        geometry, starts = self.geometry, self._step_starts()
        ordered, rows = [], []
        for tile in packed.reshape(-1, geometry.all_steps, geometry.block, geometry.dot.products):
            order, counts = group_steps(tile, geometry.group)
            ordered.append(tile[order])
            rows.append([*counts, *starts[order]])
        return np.stack(ordered).reshape(-1), np.array(rows, np.int32).reshape(-1)

    def _step_starts(self) -> Array:
        """int64 [steps], in the order of the window."""
        geometry, dot = self.geometry, self.geometry.dot
        kernel_height = geometry.conv.window.kernel[0]
        row_step, column_step = geometry.conv.window.dilation
        pixel = geometry.pixel_elements
        within = np.minimum(np.arange(geometry.steps) * dot.products, geometry.run_inputs - dot.products)
        within = within * dot.groups
        columns = np.arange(geometry.runs) * column_step * pixel
        rows = np.arange(kernel_height) * row_step * geometry.padded_size[1] * pixel
        return (rows[:, None, None] + columns[:, None] + within).reshape(-1)

    def _steps_of_tiles(self, weights: Array) -> Array:
        """Weights [points · tiles over channels, steps, vector, lane, product], in the order of the window."""
        geometry = self.geometry
        if geometry.patches is not None:
            weights = weights_of_patches(weights)
        points, inputs, height = weights.shape[0], *weights.shape[2:4]
        pads = ((0, 0), (0, 1), (0, geometry.padded_inputs - inputs), (0, 0), (0, 0))
        rows = np.moveaxis(np.pad(weights, pads)[:, self.channel_rows], 2, -1)
        lanes, products = geometry.dot.lanes, geometry.dot.products
        elements = rows.reshape(points, -1, geometry.tile.vectors, lanes, height, geometry.runs, geometry.run_inputs)
        full = geometry.full_steps * products
        if full < geometry.run_inputs:
            # The last step repeats elements, with weights of zero.
            last = elements[..., geometry.run_inputs - products :].copy()
            last[..., : products - (geometry.run_inputs - full)] = 0
            elements = np.concatenate([elements[..., :full], last], axis=-1)
        split = elements.reshape(*elements.shape[:-1], geometry.steps, products)
        if geometry.dot.reverses_products:
            split = split[..., ::-1]
        # tile, kernel row, run, step, vector, lane, product
        ordered = split.transpose(0, 1, 4, 5, 6, 2, 3, 7)
        packed = ordered.reshape(-1, geometry.all_steps, geometry.tile.vectors, lanes, products)
        return packed.astype(geometry.dot.weight_dtype)
