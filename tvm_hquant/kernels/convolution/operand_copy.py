"""The copy of a band of activations in the form in which the steps of a convolution read them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from tvm.tirx.script import builder as T

from tvm_hquant.kernels.convolution.activation_copy import ActivationCopy
from tvm_hquant.kernels.convolution.geometry import AnchorGeometry
from tvm_hquant.kernels.convolution.interleaved_groups import InterleavedGroups
from tvm_hquant.kernels.convolution.map_bands import MapBands
from tvm_hquant.kernels.convolution.patches import PatchCopy, padded_elements
from tvm_hquant.kernels.interface import Placement
from tvm_hquant.kernels.kernel_function import Buffer
from tvm_hquant.kernels.primitives import Expression
from tvm_hquant.kernels.processor import Processor
from tvm_hquant.operators import Conv2D


@dataclass(frozen=True)
class OperandCopy:
    """Writes the loops that copy a band.

    Attributes:
        geometry: of the convolution.
        bands: of its map.
        storage: of the activations.
        source, target: activations and their copy, flat.
        place: of the channels in the source.
        zero_points: of the layer's tensors, where it has codes.
    """

    geometry: AnchorGeometry
    bands: MapBands
    storage: str
    source: Buffer
    target: Buffer
    place: Placement
    zero_points: Buffer | None

    def emit(self, band: Expression) -> Expression:
        """Copies that band.

        Returns:
            Where its first pixel is in the map with the padding that copies have, in pixels of all images.
        """
        geometry, conv, bands = self.geometry, self.geometry.conv, self.bands
        if geometry.patches is not None:
            self._copy_patches(geometry.patches, band)
            return band * conv.input_shape[2]
        if bands.is_single_row:
            width = conv.input_shape[2]
            first = T.bind(T.min(band * bands.pixels, width - bands.pixels) if bands.count > 1 else T.int32(0))
            self._copy_pixels(first, bands.pixels)
            return first
        (height, width), top = geometry.padded_size, conv.window.padding[0] - geometry.copied_padding[0]
        image = T.bind(band // bands.per_image)
        last = bands.image_units - bands.units
        row = T.min(band % bands.per_image * bands.units, last) * conv.window.strides[0] - top
        row = T.bind(T.max(0, T.min(row, height - bands.input_rows)))
        first = T.bind((image * height + row) * width)
        if any(geometry.copied_padding):
            replace(self._copy_of(conv), plane_rows=bands.input_rows).emit_rows(image, row, bands.input_rows)
        else:
            self._copy_pixels(first, bands.input_rows * width)
        return first

    def _copy_pixels(self, first: Expression, count: int) -> None:
        """Pixels without padding, which are neighbours in memory."""
        geometry, conv = self.geometry, self.geometry.conv
        if geometry.dot.groups > 1:
            copy = InterleavedGroups(conv, geometry.dot, self.storage, self.source, self.target, self._processor)
            copy.emit(first, count)
            return
        pixels = replace(conv, input_shape=(1, 1, count, conv.in_channels))
        start = T.bind(first * self.place.channels + self.place.offset)
        replace(self._copy_of(pixels), source_start=start).emit()

    def _copy_of(self, conv: Conv2D) -> ActivationCopy:
        geometry = self.geometry
        padded = replace(conv, window=replace(conv.window, padding=geometry.copied_padding))
        fills = tuple(self._fill(plane) for plane in range(geometry.planes))
        return ActivationCopy(
            padded,
            geometry.padded_inputs,
            geometry.dot.operand_dtype,
            self.storage,
            self.source,
            self.target,
            fills,
            geometry.copy_offset,
            self._processor,
            self.place.offset,
            self.place.channels,
        )

    @property
    def _processor(self) -> Processor:
        """That copies a band: all of it, or one core where threads share the bands."""
        processor = self.geometry.processor
        return replace(processor, cores=1) if self.bands.shares_bands else processor

    def _fill(self, plane: int) -> Expression:
        dtype = self.geometry.dot.operand_dtype
        if self.zero_points is None:
            return T.Cast(dtype, T.int32(0))
        return T.Cast(dtype, self.zero_points[2 + plane] + self.geometry.copy_offset)

    def _copy_patches(self, patches: Conv2D, row: Expression) -> None:
        """The patches of a row of their map, which are those of some rows of outputs."""
        geometry, width, padded = self.geometry, patches.output_shape[2], padded_elements(patches)
        assert self.zero_points is not None
        copy = PatchCopy(
            patches,
            geometry.padded_inputs,
            geometry.dot.operand_dtype,
            self.source,
            self.target,
            T.alloc_buffer((padded,), "uint8") if padded else None,
            T.Cast("uint8", self.zero_points[2]),
            geometry.copy_offset,
        )
        rows = geometry.conv.input_shape[2] // width
        with T.serial(rows) as part:
            copy.emit(row * rows + part, T.bind(part * (width * geometry.padded_inputs)))
