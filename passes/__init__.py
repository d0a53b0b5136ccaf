"""The Relax passes, one file each. Import them as ``tvm_hquant.passes``."""

import tvm_ffi

from tvm_hquant import errors

if not __name__.startswith("tvm_hquant."):
    raise ImportError("import the passes as tvm_hquant.passes: a second copy under another name would not be the same")

# What a pass raises goes through TVM's C++ pass manager, which keeps the class only of errors that it knows.
for _error in (errors.HQuantError, *errors.HQuantError.__subclasses__()):
    tvm_ffi.register_error(_error)
