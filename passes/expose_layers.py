"""After stage 7: every layer can be called in the compiled library by itself.

Before::

    @R.function(private=True)
    def conv1(x: uint8):
        return R.call_tir(cls.avx512_vnni_conv2d_14x2_…, (x, packed_weights, start, multiplier, …))

    @R.function
    def main(x): ... cls.conv1(lv) ...

After, beside them::

    @R.function
    def layer_conv1(x: uint8):
        return R.call_tir(cls.avx512_vnni_conv2d_14x2_…, (x, packed_weights, start, multiplier, …))

The build inlines private functions into ``main``, so that memory is planned over the whole graph; the copies stay. They hold
the same constants, which the library stores once. ``hquant verify`` calls them, and so sees the constants that were
compiled, layer by layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import tvm
from tvm import IRModule, relax

from tvm_hquant.layers import LAYER_ATTRIBUTE
from tvm_hquant.relax_ir.kernel_calls import KERNEL_ATTRIBUTE

SYMBOL_ATTRIBUTE = "global_symbol"


def expose_layers() -> Any:
    """The pass. Views have no kernel and get no function; operators that TVM legalizes have a public one already."""

    def transform(mod: IRModule, _context: Any) -> IRModule:
        exposed = mod.clone()
        taken = {g.name_hint for g in mod.get_global_vars()}
        for variable, function in mod.functions_items():
            if not isinstance(function, relax.Function) or KERNEL_ATTRIBUTE not in (function.attrs or {}):
                continue
            symbol = f"layer_{variable.name_hint}"
            while symbol in taken:
                symbol += "_"
            taken.add(symbol)
            copied = relax.utils.copy_with_new_vars(function)
            exposed[symbol] = copied.with_attr(SYMBOL_ATTRIBUTE, symbol)
        return exposed

    return tvm.transform.module_pass(transform, opt_level=0, name="hquant.expose_layers")


def exposed_functions(mod: IRModule) -> Mapping[str, str]:
    """For every layer that can be called by itself, the name of its function in the compiled library."""
    return {
        str(function.attrs[LAYER_ATTRIBUTE]): str(function.attrs[SYMBOL_ATTRIBUTE])
        for _, function in mod.functions_items()
        if isinstance(function, relax.Function)
        and function.attrs
        and LAYER_ATTRIBUTE in function.attrs
        and SYMBOL_ATTRIBUTE in function.attrs
    }
