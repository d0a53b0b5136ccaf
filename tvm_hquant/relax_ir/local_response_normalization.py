"""Finds local response normalization (AlexNet, Inception v1) in a channels-last ``main``.

TVM has no operator for it. After ``canonicalize`` and ``convert_layout`` it is this chain, in which multiplications by 1
and additions of 0 are missing::

    lv = R.multiply(x, x)
    lv1 = R.reshape(lv, (N, H, W, C, 1))
    lv2 = R.nn.avg_pool3d(lv1, pool_size=[1, 1, size], count_include_pad=True, layout="NDHWC", ...)
    lv3 = R.reshape(lv2, (N, H, W, C))
    lv4 = R.multiply(lv3, alpha)
    lv5 = R.add(lv4, bias)
    lv6 = R.power(lv5, beta)
    lv7 = R.divide(x, lv6)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tvm import relax

from tvm_hquant.layers import constant_array, is_constant
from tvm_hquant.operators import LocalResponseNormalization
from tvm_hquant.relax_ir.describe import is_float32, operator_name, shape_of
from tvm_hquant.relax_ir.main_function import variables


@dataclass(frozen=True, eq=False)
class FoundNormalization:
    """One chain: the positions of its bindings in ascending order, the tensor that flows in, and what it computes."""

    indices: tuple[int, ...]
    data: Any
    operator: LocalResponseNormalization


def find_local_response_normalizations(bindings: Sequence[tuple[Any, Any]]) -> list[FoundNormalization]:
    """All chains among the (variable, value) pairs of ``main`` whose tensors in between nothing else reads."""
    return [found for index in range(len(bindings)) if (found := _ending_at(index, bindings)) is not None]


def _ending_at(index: int, bindings: Sequence[tuple[Any, Any]]) -> FoundNormalization | None:
    position = {var: i for i, (var, _) in enumerate(bindings)}
    chain: list[int] = [index]

    def step(tensor: Any, operator: str) -> Any | None:
        """The call of this operator that made a tensor, noted as part of the chain."""
        at = position.get(tensor) if isinstance(tensor, relax.Var) else None
        if at is None or operator_name(bindings[at][1]) != operator:
            return None
        chain.append(at)
        return bindings[at][1]

    def number(tensor: Any, operator: str, neutral: float) -> tuple[Any, float]:
        """The other operand of an operator with a number, and the number; the tensor itself where there is none."""
        at = position.get(tensor) if isinstance(tensor, relax.Var) else None
        call: Any = bindings[at][1] if at is not None else None
        if operator_name(call) != operator or _number(call.args[1]) is None:
            return tensor, neutral
        chain.append(position[tensor])
        return call.args[0], float(_number(call.args[1]) or 0.0)

    divide = bindings[index][1]
    if operator_name(divide) != "relax.divide" or not is_float32(divide) or len(shape_of(divide)) != 4:
        return None
    data, scale = divide.args
    base, beta = number(scale, "relax.power", 1.0)
    base, bias = number(base, "relax.add", 0.0)
    base, alpha = number(base, "relax.multiply", 1.0)
    if (squeezed := step(base, "relax.reshape")) is None or shape_of(squeezed) != shape_of(data):
        return None
    if (pool := step(squeezed.args[0], "relax.nn.avg_pool3d")) is None or not _pools_channels(pool, shape_of(data)):
        return None
    if (expanded := step(pool.args[0], "relax.reshape")) is None:
        return None
    square = step(expanded.args[0], "relax.multiply")
    if square is None or not all(a.same_as(data) for a in square.args) or not _is_private(chain, bindings):
        return None
    size = int(pool.attrs.pool_size[2])
    return FoundNormalization(
        tuple(sorted(chain)), data, LocalResponseNormalization(shape_of(data), size, alpha, beta, bias)
    )


def _number(expression: Any) -> float | None:
    if not is_constant(expression) or constant_array(expression).size != 1:
        return None
    return float(constant_array(expression).reshape(()))


def _pools_channels(pool: Any, shape: tuple[int, ...]) -> bool:
    """Whether a pool averages over neighbouring channels, zeros counted beyond the first and the last one."""
    size = int(pool.attrs.pool_size[2])
    before, after = (size - 1) // 2, size - 1 - (size - 1) // 2
    return (
        str(pool.attrs.layout) == "NDHWC"
        and [int(v) for v in pool.attrs.pool_size] == [1, 1, size]
        and [int(v) for v in pool.attrs.strides] == [1, 1, 1]
        and [int(v) for v in pool.attrs.padding] == [0, 0, before, 0, 0, after]
        and bool(pool.attrs.count_include_pad)
        and shape_of(pool) == shape_of(pool.args[0]) == (*shape, 1)
    )


def _is_private(chain: Sequence[int], bindings: Sequence[tuple[Any, Any]]) -> bool:
    """Whether only the chain itself reads what its members but the last compute."""
    inner = {bindings[i][0] for i in chain[1:]}
    readers = [i for i, (_, value) in enumerate(bindings) if any(v in inner for v in variables(value))]
    return set(readers) <= set(chain)
