"""Forms for machines that nothing can be timed on: the formula, its margins, and that every choice says so."""

from __future__ import annotations

import numpy as np
import pytest

from spa_compiler.kernels.rx1 import Blocks
from spa_compiler.placement.choose import Choice
from spa_compiler.placement.sites import find_sites
from spa_compiler.placement.unmeasured import MARGIN, MARGIN_OF_PLANES, choose_unmeasured, estimate, why
from spa_compiler.targets import Target, host, parse
from tests.networks import model_of, weight

ARM = parse("cpu:aarch64")
ROWS = "g (float[N,64] x) => (float[N,64] y) { y = MatMul(x, w) }"
PLANES = "g (float[1,64,7,7] x) => (float[1,64,7,7] y) { y = Conv(x, w) }"


def choice(density: float, rows: int = 4, text: str = ROWS, target: Target = ARM) -> Choice:
    w = weight(np.random.default_rng(0), 64, 64, density, rows)
    model = model_of(text, w=np.ascontiguousarray(w.T).reshape(64, 64, 1, 1) if text == PLANES else w)
    (found,) = choose_unmeasured(find_sites(model)[0], target)
    return found


def test_a_kernel_does_what_is_stored_at_its_part_of_the_peak() -> None:
    assert estimate(Blocks(4), 0.1) == pytest.approx(8.5)
    assert estimate(Blocks(8), 0.1) == estimate(Blocks(4), 0.1)
    assert estimate(Blocks(1), 0.1) == pytest.approx(4.5)
    assert estimate(Blocks(1), 0.0) > 100, "a weight of zeros"


def test_blocks_of_zeros_become_the_form_that_should_be_fastest() -> None:
    found = choice(0.1)
    assert found.form == Blocks(4)
    assert found.kind == "sparse"
    assert found.gain == found.expected == pytest.approx(8.5, rel=0.3)
    assert (found.timings, found.would_help) == ((), "")


def test_single_zeros_fill_no_blocks() -> None:
    found = choice(0.1, rows=1)
    assert found.form == Blocks(1)
    assert found.gain == pytest.approx(4.5, rel=0.2)


@pytest.mark.parametrize(
    "rows, text, limit",
    [(4, ROWS, 0.85 / MARGIN), (1, ROWS, 0.45 / MARGIN), (4, PLANES, 0.85 / MARGIN_OF_PLANES)],
    ids=["blocks", "unstructured", "between convolutions"],
)
def test_what_should_gain_little_stays_dense(rows: int, text: str, limit: float) -> None:
    assert choice(limit - 0.06, rows, text).form is not None
    beyond = choice(limit + 0.06, rows, text)
    assert beyond.form is None
    assert beyond.gain == 1
    assert "is asked for" in beyond.reason


def test_without_zeros_there_is_nothing_to_choose() -> None:
    found = choice(1.0)
    assert found.form is None
    assert found.reason == "not measured, this machine does not run aarch64: it has no zeros"


@pytest.mark.parametrize("density", [0.05, 0.3, 0.95, 1.0])
def test_every_choice_says_that_it_was_not_measured(density: float) -> None:
    assert choice(density).reason.startswith("not measured, this machine does not run aarch64: ")


def test_what_this_machine_runs_is_measured() -> None:
    assert why(parse("cpu")) == ""
    assert host().runs("x86-64")
    assert why(parse("cpu:x86-64,avx512")) == ""
