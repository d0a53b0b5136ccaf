"""Arguments that several commands share, and what their texts mean."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tvm_hquant.errors import DataError, ModelError

if TYPE_CHECKING:
    import numpy.typing as npt

Model = Annotated[Path, typer.Argument(help="The float model: an ONNX file.", show_default=False)]
Target = Annotated[str, typer.Option("--target", help="Name of a target spec, a TOML file, or 'host'.")]
InputShapes = Annotated[
    str | None,
    typer.Option(
        "--input-shapes", help='Fixes dynamic dimensions: "input:[1,3,224,224]", several with spaces between.'
    ),
]
Calibration = Annotated[
    Path | None,
    typer.Option(
        "--calibration",
        help="Calibration data: .npz with one array per model input, samples first, optionally labels; .npy for one input; "
        "or a directory of them.",
    ),
]
Evaluation = Annotated[
    Path | None,
    typer.Option("--evaluation", help="Data to search and measure with; a part of the calibration data if not given."),
]
MetricName = Annotated[
    str | None,
    typer.Option(
        "--metric",
        help="What the budget counts: top1 or agreement (a fraction), kl or mse (an absolute bound), sqnr (dB below 150). "
        "By default top1 with labels, kl without.",
    ),
]
MaxDrop = Annotated[
    float, typer.Option("--max-drop", help="The loss budget, in the unit of --metric; 0.01 of top1 is a point.")
]
Strategy = Annotated[
    str | None,
    typer.Option(
        "--strategy",
        help="How to search: ilp (the default), one-shot, hierarchical, gradient, monotone, after-storage, hawq-v2, greedy, "
        "lazy-greedy or multipoint.",
        show_default=False,
    ),
]
SuffixPrecision = Annotated[
    str | None,
    typer.Option(
        "--suffix-precision",
        help="What layers behind a measured one compute in while layers are measured one by one; by default the fastest "
        "16-bit precision that the search may choose, or float32.",
    ),
]
Objective = Annotated[str, typer.Option("--objective", help="What to minimize beside the loss: latency, size or macs.")]
Workers = Annotated[
    int | None, typer.Option("--workers", min=1, help="Processes for large evaluations; one for each core.")
]
Seed = Annotated[int, typer.Option("--seed", help="Seed of the splits of the data.")]
Observer = Annotated[str, typer.Option("--observer", help="min-max, percentile, mean-squared-error or power-of-two.")]
Rounding = Annotated[str, typer.Option("--rounding", help="Of weights: output-error, nearest, floor or power-of-two.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show every layer, not only the summary.")]

_SHAPE = re.compile(r"\s*([^\s:]+(?:::[^\s:]+)*)\s*:\s*\[([\d,\s]*)\]")


def parse_input_shapes(text: str | None) -> dict[str, tuple[int, ...]] | None:
    """``"a:[1,3] b:[1,2]"`` as a dict.

    Raises:
        ModelError: the text has another form.
    """
    if text is None:
        return None
    shapes: dict[str, tuple[int, ...]] = {}
    position = 0
    while position < len(text.rstrip()):
        match = _SHAPE.match(text, position)
        if match is None:
            raise ModelError(f'--input-shapes {text!r} has the wrong form: write "input:[1,3,224,224]"')
        shapes[match[1]] = tuple(int(d) for d in match[2].split(",") if d.strip())
        position = match.end()
    return shapes


def read_inputs(path: Path, names: list[str]) -> dict[str, npt.NDArray[Any]]:
    """Arrays of an ``.npz`` file by name, or of an ``.npy`` file for the only input.

    Raises:
        DataError: the file cannot be read.
    """
    from tvm_hquant.calibration.array_files import open_npy, open_npz

    if path.suffix == ".npy":
        if len(names) != 1:
            raise DataError(
                f"{path} holds one array, but the model has the inputs {', '.join(names)}: give a .npz file"
            )
        return {names[0]: open_npy(path).whole()}
    return {key: array.whole() for key, array in open_npz(path).items() if key != "labels" or key in names}
