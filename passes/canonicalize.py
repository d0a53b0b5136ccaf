"""Stage 1: one spelling per operator, everything that depends on weights alone computed.

Before (as TVM's ONNX importer leaves it)::

    def main(x, conv1_weight, bn1_weight, bn1_bias, bn1_running_mean, bn1_running_var, zero, six):
        R.func_attr({"num_input": 1, "params": [...]})
        lv = R.nn.conv2d(x, conv1_weight, ...)
        lv1 = R.nn.batch_norm(lv, bn1_weight, bn1_bias, bn1_running_mean, bn1_running_var, ...)
        lv2 = lv1[0]
        lv3 = R.isnan(zero)
        lv4 = R.where(lv3, R.const("-inf"), zero)
        lv5 = R.call_tir(maximum, (lv2, lv4), ...)
        ...
        gv = R.call_tir(minimum, (lv5, lv7), ...)

After::

    def main(x, conv1_weight, conv1_weight_bias):
        R.func_attr({"num_input": 1, "params": [...]})
        lv = R.nn.conv2d(x, conv1_weight, ...)
        lv1 = R.add(lv, conv1_weight_bias)
        gv = R.clip(lv1, 0, 6)

What each operator looks like afterwards, in NCHW:

- convolution: ``R.nn.conv2d(x, W)``, then ``R.add(…, bias of shape (1, C, 1, 1))``; padding is explicit;
- convolutions and pools of sequences [N, C, W]: those of maps [N, C, 1, W], reshaped before and behind them;
- transposed convolution: ``R.nn.conv2d``, whose channels are laid out as pixels by reshape, permute_dims, reshape and, where
  pixels are cut off, ``R.strided_slice``; scales, shifts and clamps of these pixels stand before that;
- dense layer: ``R.matmul(x, W [in, out])``, then ``R.add(…, bias [out])``; several constant matrices, or one on the left:
  ``R.nn.conv2d`` of maps with one row, in as many groups as there are matrices;
- batch norm and per-channel constants: folded into the layer before, else a depthwise 1×1 convolution with bias (on
  tensors of other than four axes ``R.multiply`` and ``R.add``);
- slopes per channel (PReLU): x + (slope − 1) · min(x, 0), ``R.clip``, a depthwise 1×1 convolution, ``R.add``;
- clamps: ``R.nn.relu`` or ``R.clip``, in front of a concat if layers absorb them there, none of what lies within their
  bounds already; x · sigmoid(x): ``R.nn.silu``;
- mean over rows and columns: ``R.mean(x, axis=[2, 3], keepdims=True)``, and a reshape where the axes are dropped;
- products of two activations: ``R.matmul(a, b)``, a number that scales either behind it, by ``R.multiply``;
- pools: explicit padding and ``ceil_mode=False``, but for average pools that count their padding and read beyond it;
- flatten, squeeze, expand_dims: ``R.reshape``; channel shuffle: ``R.take(x, indices, axis=1)``; split and
  Gather of one index: slices;
- layer, instance and group normalization, also where they are chains of operators: ``R.nn.layer_norm`` over trailing axes, or
  ``R.nn.group_norm(x, gamma, beta, num_groups, channel_axis=1, axes=[2, …])``; gamma and beta hold scales and shifts behind it;
- resizing to nearest neighbours: ``R.take`` of rows, then of columns;
- ONNX Sum, Max, Min, Mean of several tensors: chains of ``R.add``, ``R.maximum``, ``R.minimum``;
- local response normalization: x / (bias + alpha · m)^beta with m the mean of x · x over the channels' window, written as
  reshape to [N, 1, C, H, W], ``R.nn.avg_pool3d``, reshape back, ``R.multiply``, ``R.add``, ``R.power``, ``R.divide``.

Weights stay trailing parameters of ``main`` with their values in the attribute ``params``. A folded weight keeps the name
of the layer's own weight, a bias that the model did not have is called ``<weight>.bias``; names are unique and do not
depend on anything but the model, so later passes name layers by them. Weights that nothing reads are gone.
"""

from __future__ import annotations

from typing import Any

import tvm
from tvm import IRModule

from tvm_hquant.relax_ir.canonical_rules import (
    affine,
    clamps,
    constant_matrices,
    elementwise,
    movement,
    normalization,
    sequences,
    slopes,
    upsampling,
    windows,
)
from tvm_hquant.relax_ir.graph_rewriting import rewrite

RULES = (
    elementwise.drop_identity,
    elementwise.recover_imported_function,
    elementwise.spell_limits_as_clip,
    elementwise.merge_clips,
    clamps.drop_kept_clamp,
    clamps.move_clamp_before_concat,
    elementwise.spell_reduced_stack_as_chain,
    sequences.spell_convolution_of_sequences,
    sequences.spell_pool_of_sequences,
    sequences.move_sequence_behind_operator,
    upsampling.spell_transposed_convolution_of_sequences,
    upsampling.spell_transposed_convolution,
    upsampling.move_operator_before_pixels,
    movement.spell_channel_shuffle,
    movement.spell_reshape,
    movement.merge_permutations,
    movement.spell_split_as_slices,
    movement.merge_slices,
    movement.drop_empty_pad,
    movement.spell_static_shape,
    movement.spell_nearest_resize,
    movement.spell_single_take,
    windows.merge_pad_into_window,
    windows.resolve_ceil_mode,
    windows.drop_uncounted_padding_flag,
    windows.spell_global_mean,
    normalization.spell_normalization,
    normalization.spell_instance_norm,
    normalization.spell_group_norm,
    normalization.fold_scale_and_shift,
    affine.fold_batch_norm,
    affine.fold_scale_and_shift,
    affine.fold_scale_before_dense,
    affine.move_factor_behind_matmul,
    constant_matrices.spell_product_with_constants,
    elementwise.spell_silu,
    slopes.spell_slopes,
)


def canonicalize() -> Any:
    """The pass. Its module needs a ``main`` with static shapes, as :mod:`tvm_hquant.frontend` gives it.

    Raises (when run):
        ModelError: ``main`` is missing or branches, a batch normalization is in training mode or has no positive variance.
    """

    def transform(mod: IRModule, _context: Any) -> IRModule:
        return rewrite(mod, RULES)

    return tvm.transform.module_pass(transform, opt_level=0, name="hquant.canonicalize")
