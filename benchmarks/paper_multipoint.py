"""Loss and operations against the number of weight terms, as in "Flexible continuous modification" (Zharikov and Sedova).

    python -m benchmarks.paper_multipoint [--networks …] [--samples 256] [--activations 8]

Every layer's weights are a sum of 2-, 3- or 4-bit tensors; the mean number of terms over the output channels grows until the
loss is float's within the noise. Computed by the kernels of deployment. Operations are bit operations of one inference,
multiply-accumulates × activation bits × bits of the terms that a channel really has, over those of a8w8.
"""

from __future__ import annotations

import argparse
import os

import numpy as np

from benchmarks.float64_network import cross_entropy
from benchmarks.zoo import ZooModel
from tvm_hquant import api
from tvm_hquant.precision import parse_precision
from tvm_hquant.statistics import bootstrap_interval

TERMS = (1, 1.25, 1.5, 1.75, 2, 2.5, 3, 4, 6, 8)
NETWORKS = ("cifar10_resnet8_mlperftiny.onnx", "cifar10_resnet20.onnx")


def main() -> None:
    """Prints a table for each network."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS))
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--activations", type=int, default=8, choices=(8, 16))
    arguments = parser.parse_args()
    os.environ.setdefault("TVM_NUM_THREADS", "1")
    for name in arguments.networks:
        model = ZooModel(name)
        source = model.source("eval")
        session = api.open_session(str(model.path), "host")
        session.calibrate(model.source("calib"), 64)
        bits = arguments.activations
        names = [f"a{bits}w8", *(f"a{bits}w{b}x{t:g}" for b in (2, 3, 4) for t in TERMS)]
        programs = [session.float_program, *(session.program(session.uniform(parse_precision(n))) for n in names)]
        session.engine.compile(programs)
        rows = []
        for sample in source.subset(range(min(arguments.samples, source.count))):
            outputs = session.engine.run(sample.inputs, programs)
            logits = np.concatenate([o[0].reshape(1, -1) for o in outputs]).astype(np.float64)
            rows.append(cross_entropy(logits, [sample.label or 0] * len(programs)))
        losses = np.array(rows)
        print(f"\n{name}, {len(losses)} samples, float loss {losses[:, 0].mean():.4f}\n")
        print("| weights | operations | loss added (95 %) | float's? |\n|---|---|---|---|")
        for number, precision in enumerate(names, 1):
            parsed = parse_precision(precision)
            width = parsed.point_bits * parsed.terms if parsed.is_multipoint else parsed.weight_bits
            pairs = losses[:, [0, number]]
            interval = bootstrap_interval(pairs, lambda scores: float(np.mean(scores[:, 1] - scores[:, 0])))
            inside = "yes" if interval.low <= 0 <= interval.high else ""
            spread = f"{interval.estimate:+.4f} ({interval.low:+.4f} … {interval.high:+.4f})"
            print(f"| {precision} | {width / 8:.2f} | {spread} | {inside} |", flush=True)


if __name__ == "__main__":
    main()
