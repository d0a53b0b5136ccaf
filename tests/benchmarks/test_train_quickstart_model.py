"""The training script's backward step and its reproducibility, on a few images."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "train_quickstart_model.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("train_quickstart_model", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture
def images():
    return np.random.default_rng(1).random((12, 8, 8, 1), dtype=np.float32)


LABELS = np.arange(12) % 10


def test_gradients_agree_with_finite_differences(script, images):
    """Protects the hand-written backward step: along random directions the loss changes as the gradients say."""
    random = np.random.default_rng(2)
    parameters = {n: v.astype(np.float64) for n, v in script.initial_parameters(random).items()}
    images = images.astype(np.float64)
    _, gradients, _ = script.loss_gradients(parameters, images, LABELS)
    for name in ("stem.weight", "block1.depthwise.weight", "block2.depthwise.weight", "block3.project.scale",
                 "block1.expand.shift", "head.weight", "classifier.weight", "classifier.bias"):  # fmt: skip
        direction = random.normal(size=parameters[name].shape)
        step = 1e-6
        above, below = (
            script.loss_gradients(parameters | {name: parameters[name] + sign * step * direction}, images, LABELS)[0]
            for sign in (1, -1)
        )
        assert (above - below) / (2 * step) == pytest.approx((gradients[name] * direction).sum(), rel=1e-3, abs=1e-6)


def test_training_twice_gives_the_same_file(script, images):
    """Protects reproducibility: nothing is drawn outside of the seed."""
    images = np.tile(images, (6, 1, 1, 1))
    labels = np.tile(LABELS, 6)
    first, second = (
        script.export(script.train(images, labels, 1, np.random.default_rng(3))).SerializeToString() for _ in range(2)
    )
    assert first == second
