"""The Relax passes, one file each. Import them as ``tvm_hquant.passes``."""

if not __name__.startswith("tvm_hquant."):
    raise ImportError("import the passes as tvm_hquant.passes: a second copy under another name would not be the same")
