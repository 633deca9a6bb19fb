"""Whole regions made for every level that has kernels of its own, and libraries of several levels."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_equal

from spa_compiler.kernels.vector import ISAS
from spa_compiler.runtime import link
from spa_compiler.targets import host
from tests.image_harness import NETWORKS, network
from tests.kernel_harness import LEVELS, X86
from tests.region_harness import CASES, assert_parity, case, run, session
from tests.window_harness import CONVOLUTIONS


@pytest.fixture(scope="module", params=LEVELS)
def library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("levels") / "kernels.so"
    regions = [case(name).spec for name in CASES] + [c.region for c in CONVOLUTIONS.values()]
    regions += [network(name).spec for name in NETWORKS]
    link.link(regions, (request.param,), path)
    return path


def test_this_machine_runs_a_level_that_has_kernels() -> None:
    assert set(LEVELS) == {level for level in ISAS if host().runs(level)} >= {"x86-64"}


@pytest.mark.parametrize("name", CASES)
def test_regions(library: Path, name: str) -> None:
    c = case(name)
    sizes = [(1, 1), (1, 3), (1, 7), (1, 16), (3, 33), (1, 128)]
    for threads in (1, 2):
        s = session(c.model(("n", "h", "w")[: len(sizes[0])]), threads, library)
        for dims in sizes:
            feeds = c.feeds(dims)
            assert_parity(run(s, feeds), c.expected(feeds))


@pytest.mark.parametrize("name", NETWORKS)
def test_images(library: Path, name: str) -> None:
    n = network(name)
    for size in ((37, 20), (90, 112)):
        feeds = n.feeds(2, size[2 - n.made_by.axes :])
        assert_parity(run(session(n.model(), 2, library), feeds), n.expected(feeds))


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_windows(library: Path, name: str) -> None:
    c = CONVOLUTIONS[name]
    feeds = c.image(2, *(37, 20)[2 - c.window.axes :])
    assert_parity(run(session(c.model(), 2, library), feeds), c.expected(feeds))


def test_a_library_of_several_levels_takes_the_highest_that_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    c = case("mlp")
    feeds = c.feeds((1, 70))

    def outputs(levels: tuple[str, ...], allowed: str) -> list[np.ndarray]:
        path = tmp_path / f"{'+'.join(levels)} up to {allowed}.so"  # a library keeps what it chose
        monkeypatch.setenv("SPA_ISA_LEVEL", allowed)
        link.link([c.spec], levels, path)
        return run(session(c.model(), 1, path), feeds)

    alone = {level: outputs((level,), "") for level in LEVELS}
    high = alone[LEVELS[0]]
    for allowed in ("", "4", "9", "none"):
        assert_equal(outputs(X86, allowed), high)
    for allowed, level in (("3", "x86-64-v3"), ("2", "x86-64"), ("1", "x86-64")):
        assert_equal(outputs(X86, allowed), alone[level if level in alone else LEVELS[0]])
    assert_equal(outputs(("x86-64-v3", "x86-64"), "4"), alone[next(v for v in LEVELS if v != "x86-64-v4")])
    assert_equal(outputs(("x86-64",), "4"), alone["x86-64"])
    for one, other in itertools.pairwise(LEVELS):
        same = all((a == b).all() for a, b in zip(alone[one], alone[other], strict=True))
        assert not same, "divisions, estimates and multiply-adds round differently"


@pytest.mark.parametrize("level", ISAS)
def test_accumulators_and_factors_fit_the_registers(level: str) -> None:
    isa = ISAS[level]
    for rows in (1, 4, 8):
        for lanes in (16, 32, 48, 64):
            width, vectors, passes = isa.passes(rows, lanes)
            assert width * vectors * passes == lanes
            assert rows * vectors + min(rows, vectors) + 1 < isa.registers
    assert isa.passes(4, 8) == (min(8, isa.width), max(1, 8 // isa.width), 1)
    assert isa.passes(4, 4) == (4, 1, 1)


def test_every_level_uses_the_registers_that_it_has() -> None:
    cut = {level: isa.passes(4, 64) for level, isa in ISAS.items()}
    assert cut == {"x86-64-v4": (16, 4, 1), "x86-64-v3": (8, 2, 4), "x86-64": (4, 2, 8), "aarch64": (4, 4, 4)}
