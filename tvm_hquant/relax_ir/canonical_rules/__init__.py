"""Rewrite rules that bring what importers write to one spelling per operator (NCHW, as imported).

Every rule has the form that :mod:`tvm_hquant.relax_ir.graph_rewriting` applies: ``rule(call, graph) -> expression | None``.
"""
