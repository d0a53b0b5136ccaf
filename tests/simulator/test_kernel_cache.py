"""Kernels from the disk: protects that they are those that would be compiled, and that no state of the file is in the way."""

from __future__ import annotations

import sqlite3
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tvm

from tests.planned_models import host_spec, named_plan, one_sample, partitioned, random_samples, shared_session
from tvm_hquant.calibration.data import open_data
from tvm_hquant.kernels.registry import families_for_target, select_kernel
from tvm_hquant.relax_ir.kernel_calls import is_view
from tvm_hquant.simulator import engine as engine_module
from tvm_hquant.simulator import runner as runner_module
from tvm_hquant.simulator.engine import SimulationEngine
from tvm_hquant.simulator.evaluator import ProgramEvaluator
from tvm_hquant.simulator.kernel_cache import VARIABLE, KernelCache, default_kernel_cache, kernel_key
from tvm_hquant.simulator.kernel_library import Library
from tvm_hquant.simulator.metrics import METRICS
from tvm_hquant.simulator.program import Program


def mixed_program() -> Program:
    session, plan = shared_session("branches"), named_plan("branches", "mixed")
    return session.builder.program(plan.precisions(), plan.scales, plan.layer_weights)


def new_engine(cache: KernelCache | None) -> SimulationEngine:
    """An engine that has compiled nothing yet."""
    spec = host_spec()
    return SimulationEngine(
        partitioned("branches"), families_for_target(spec.instruction_sets), spec.tvm_target(), cache
    )


def outputs(engine: SimulationEngine, program: Program) -> list[np.ndarray[tuple[int, ...], np.dtype[np.float32]]]:
    engine.compile([program])
    return [np.array(output) for output in engine.run(one_sample(shared_session("branches")), [program])[0]]


def refuse(*_arguments: object) -> None:
    raise AssertionError("something is compiled that the cache has")


def library(name: str, size: int = 100) -> Library:
    """Bytes that stand for a library of one kernel; these tests load none of it."""
    return Library(name.encode().ljust(size, b"."), (name,))


def test_kernels_of_the_cache_give_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second engine compiles no kernel, and computes what one without a cache computes."""
    program, cache = mixed_program(), KernelCache(tmp_path / "kernels.sqlite")
    expected = outputs(new_engine(None), program)
    first = outputs(new_engine(cache), program)
    monkeypatch.setattr(engine_module, "built_kernels", refuse)
    second = outputs(new_engine(cache), program)
    for a, b, c in zip(expected, first, second, strict=True):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(a, c)


def test_workers_share_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What workers compile is kept, and what is kept they do not compile, one program more or less."""
    session, cache = shared_session("branches"), KernelCache(tmp_path / "kernels.sqlite")
    source = open_data(random_samples(session, 2), session.signature)

    def losses() -> list[float]:
        evaluator = ProgramEvaluator(new_engine(cache), session.float_program)
        with ThreadPoolExecutor(1) as executor:
            evaluator.use_executor(executor, 1)
            found = evaluator.scores([mixed_program()], source, [METRICS["mse"]], "")
        return [score.loss for scores in found for score in scores]

    first = losses()
    monkeypatch.setattr(runner_module, "compile_library", refuse)
    assert losses() == first


def test_key_follows_from_kernel_and_target() -> None:
    """Another kernel, or the same one for another target, is found under another key; the same one under the same."""
    families = families_for_target(host_spec().instruction_sets)
    steps = [s.request for s in mixed_program().steps if s.request is not None and not is_view(s.request)]
    requests = list(dict.fromkeys(steps))
    targets = [tvm.target.Target({"kind": "llvm", "mcpu": cpu}) for cpu in ("znver3", "znver4")]
    keys = [kernel_key(select_kernel(families, request), target) for request in requests for target in targets]
    assert len(set(keys)) == len(keys) == 2 * len(requests)
    assert keys[0] == kernel_key(select_kernel(families, requests[0]), targets[0])


def test_wanted_kernels_alone_are_given(tmp_path: Path) -> None:
    """A library may hold kernels whose code has changed since: their symbols are not given."""
    cache = KernelCache(tmp_path / "kernels.sqlite")
    assert cache.find({"key of a": "a"}) == ()
    both = Library(b"two kernels", ("a", "b"))
    cache.add(both, {"a": "key of a", "b": "key of b"})
    assert cache.find({"key of a": "a", "new key of b": "b"}) == (Library(b"two kernels", ("a",)),)
    assert cache.find({"key of a": "a", "key of b": "b"}) == (both,)


def test_what_was_not_used_for_longest_makes_room(tmp_path: Path) -> None:
    """The limit holds, and a library that was used since stays."""
    cache = KernelCache(tmp_path / "kernels.sqlite", limit=250)
    for name in ("a", "b"):
        cache.add(library(name), {name: name})
    assert cache.find({"a": "a"})
    cache.add(library("c"), {"c": "c"})
    assert [bool(cache.find({name: name})) for name in "abc"] == [True, False, True]
    cache.add(library("d", 251), {"d": "d"})
    assert [bool(cache.find({name: name})) for name in "acd"] == [True, True, False]


def test_damaged_library_is_not_given(tmp_path: Path) -> None:
    """Content that is not what was kept is compiled anew, and then found again."""
    cache = KernelCache(tmp_path / "kernels.sqlite")
    cache.add(library("a"), {"a": "a"})
    with sqlite3.connect(cache.path) as database:
        database.execute("UPDATE libraries SET content = ?", (b"something else",))
    database.close()
    assert cache.find({"a": "a"}) == ()
    cache.add(library("a"), {"a": "a"})
    assert cache.find({"a": "a"}) == (library("a"),)


def test_something_else_is_no_cache(tmp_path: Path) -> None:
    """Any other file stays as it is; the user is told, and kernels are compiled."""
    path = tmp_path / "kernels.sqlite"
    path.write_text("notes, kept for years; " * 100)
    cache = KernelCache(path)
    with pytest.warns(UserWarning, match="cannot be used as a cache of compiled kernels"):
        assert cache.find({"a": "a"}) == ()
    with pytest.warns(UserWarning, match=VARIABLE):
        cache.add(library("a"), {"a": "a"})
    assert path.read_text().startswith("notes, kept for years")


def test_several_write_at_once(tmp_path: Path) -> None:
    """Nobody's library is lost, and nobody fails."""
    cache = KernelCache(tmp_path / "folder" / "kernels.sqlite")

    def add(number: int) -> None:
        for i in range(5):
            name = f"{number}.{i}"
            cache.add(library(name), {name: name})
            assert cache.find({name: name}) == (library(name),)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with ThreadPoolExecutor(4) as threads:
            list(threads.map(add, range(4)))
    names = [f"{number}.{i}" for number in range(4) for i in range(5)]
    assert len(cache.find(dict(zip(names, names, strict=True)))) == 20


def test_variable_names_the_folder_or_turns_it_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The user decides where compiled code lies, or that none does."""
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    named = default_kernel_cache()
    assert named is not None
    assert named.path.parent == tmp_path
    monkeypatch.setenv(VARIABLE, "off")
    assert default_kernel_cache() is None
    monkeypatch.delenv(VARIABLE)
    usual = default_kernel_cache()
    assert usual is not None
    assert usual.path.parent.name == "tvm_hquant"
