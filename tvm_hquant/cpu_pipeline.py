"""The passes between kernels and LLVM's code: TVM's own (tvm/s_tir/pipeline.py) without those that CPUs have no use for.

Kernels allocate what they use, and have no threads of a GPU, no shared memory and no software pipelines. So some twenty of
TVM's passes walk over their long unrolled bodies and change nothing; they took a quarter of the time in which a network is
compiled. Left out are ``CompactBufferAllocation``, which shrinks buffers to what is touched of them, and those for threads and
memory of GPUs. The code that LLVM is given is the same.
"""

from __future__ import annotations

from typing import Any

import tvm
from tvm import s_tir, tirx
from tvm.tirx.compilation_pipeline import register_tir_pipeline

CPU_PIPELINE = "hquant_cpu"


def cpu_pipeline() -> tuple[Any, Any, Any]:
    """The passes for whole modules, and those that finish host and device functions, as ``tvm.tirx.build`` wants them."""
    first, then = s_tir.transform, tirx.transform
    passes = tvm.ir.transform.Sequential(
        [
            first.CanonicalizeLoop(),
            first.LowerInitBlock(),
            first.PlanAndUpdateBufferAllocationLocation(),
            first.ConvertBlocksToOpaque(),
            first.LowerMatchBuffer(),
            first.StmtSimplify(),
            first.AnnotateIrregularLoop(),
            first.LowerOpaqueBlock(),
            then.FlattenBuffer(),
            then.BF16ComputeLegalize(),
            then.NarrowDataType(32),
            first.LoopPartition(),
            then.VectorizeLoop(True),
            then.StorageRewrite(),
            first.HoistIfThenElse(),
            then.UnrollLoop(),
            first.RenormalizeSplitPattern(),
            then.StmtSimplify(),
            then.RemoveNoOp(),
            first.RewriteUnsafeSelect(),
            then.CommonSubexprElim(),
            then.FP8ComputeLegalize(),
            then.VerifyMemory(),
            then.AnnotateEntryFunc(),
            then.SplitHostDevice(),
            then.MakePackedAPI(),
            then.FP8StorageLegalize(),
            then.BF16StorageLegalize(),
        ],
        name="hquant.cpu",
    )
    return passes, s_tir.pipeline.finalize_host_passes, s_tir.pipeline.finalize_device_passes


register_tir_pipeline(CPU_PIPELINE, cpu_pipeline)
