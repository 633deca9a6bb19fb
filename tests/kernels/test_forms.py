"""What every form promises: a name, an exact packing, and a size that is known without it."""

from __future__ import annotations

import numpy as np
import pytest

from spa_compiler.kernels import grouped, rx1, rxc
from spa_compiler.kernels.forms import FULL, block_of, forms_of
from tests.kernel_harness import n_of_m, sparse


@pytest.mark.parametrize("n", [1, 5, 64, 70])
def test_every_form_says_what_it_stores_and_decides_its_sizes(n: int) -> None:
    weight = sparse(np.random.default_rng(n), n, 300, 1, 0.2)
    forms = list(forms_of(weight, 1))
    assert [f for f in forms if f.name != "unstructured permuted"] == list(forms_of(weight, 2))
    assert len({f.name for f in forms}) == len(set(forms)) == len(forms) > 0
    for form in forms:
        packed = form.pack(weight)
        assert packed.form.rows == form.rows <= n
        assert packed.form.chunk
        assert packed.form.k_block
        assert form.stored(weight) == packed.arrays["values"].size
        assert packed.form.pack(weight).form == packed.form
        bias = np.arange(n, dtype=np.float32)
        assert (packed.with_bias(bias).arrays["bias"][:n] == bias).all()
        assert not packed.with_bias(None).arrays["bias"].any()


def test_names_are_those_of_patterns_and_say_what_is_unusual() -> None:
    assert [rx1.Blocks(1).name, rx1.Blocks(4).name] == ["unstructured", "block:4x1"]
    assert rx1.Blocks(4, 128, 64).name == "block:4x1 in 128x64"
    assert rx1.Blocks(1, k_block=64).name == "unstructured in x64"
    assert rx1.Blocks(4, 128, 64).pattern == FULL.pattern == "block:4x1"


@pytest.mark.parametrize(
    "rows, cols, found",
    [
        (4, 4, (4, 4)),
        (8, 4, (8, 4)),
        (16, 16, (8, 4)),
        (1, 4, (1, 4)),
        (2, 4, (2, 4)),
        (6, 2, (2, 2)),
        (3, 4, (1, 4)),
        (4, 3, (4, 1)),
        (4, 1, (4, 1)),
        (1, 1, (1, 1)),
        (3, 3, (1, 1)),
        (2, 1, (2, 1)),
        (6, 1, (6, 1)),
        (12, 1, (4, 1)),
        (10, 1, (2, 1)),
    ],
)
@pytest.mark.parametrize("density", [0.02, 0.5])
def test_the_blocks_that_a_weight_was_pruned_in_are_found(
    rows: int, cols: int, found: tuple[int, int], density: float
) -> None:
    weight = sparse(np.random.default_rng(0), 192, 384, rows, density, cols)
    assert block_of(weight) == found
    forms = [f for f in forms_of(weight, 2) if isinstance(f, rxc.Rectangles)]
    assert forms == ([rxc.Rectangles(*found)] if found[1] > 1 else [])
    tried = [f.rows for f in forms_of(weight, 2) if isinstance(f, rx1.Blocks)]
    assert tried == [1, 4, 8, 16, *([found[0]] if found in ((2, 1), (6, 1)) else [])]


def test_blocks_that_are_zero_here_and_there_are_blocks_still() -> None:
    rng = np.random.default_rng(0)
    weight = sparse(rng, 256, 256, 4, 0.2, 4)
    assert block_of(weight * (rng.random(weight.shape) < 0.98)) == (4, 4)
    assert block_of(weight * (rng.random(weight.shape) < 0.8)) == (1, 1)


@pytest.mark.parametrize("n, found", [(192, 6), (194, 2), (6, 6), (5, 1), (7, 1)])
def test_groups_of_six_rows_end_with_the_weight(n: int, found: int) -> None:
    """A panel has room for whole groups of up to 16 rows; what lies behind the last six may not."""
    assert block_of(sparse(np.random.default_rng(2), n, 400, 6, 0.3)) == (found, 1)


@pytest.mark.parametrize("n, k, found", [(1, 64, (1, 4)), (70, 64, (4, 4)), (64, 66, (4, 2)), (64, 65, (4, 1))])
def test_blocks_fit_the_weight(n: int, k: int, found: tuple[int, int]) -> None:
    """Rows are padded where that costs next to nothing, columns never."""
    weight = sparse(np.random.default_rng(1), n, k, 4, 0.3, 4)
    assert block_of(weight) == found
    assert block_of(np.zeros_like(weight)) in [(r, found[1]) for r in (1, 2, 4, 8)]


def test_names_of_blocks_are_those_of_patterns() -> None:
    assert rxc.Rectangles(4, 2).name == rxc.Rectangles(4, 2).pattern == "block:4x2"
    assert rxc.Rectangles(4, 2, 128).name == "block:4x2 in 128x"


@pytest.mark.parametrize(
    "kept, of, found",
    [
        (2, 4, ["2:4"]),
        (1, 2, ["2:4"]),
        (4, 8, ["4:8"]),
        (8, 16, ["8:16"]),
        (1, 4, ["1:4"]),
        (2, 8, ["2:8"]),
        (4, 16, ["4:16"]),
        (3, 4, []),
        (1, 8, []),
        (16, 32, []),
    ],
)
def test_n_of_m_is_found(kept: int, of: int, found: list[str]) -> None:
    weight = n_of_m(np.random.default_rng(0), 64, 256, kept, of)
    assert [f.name for f in forms_of(weight, 2) if isinstance(f, grouped.Groups)] == found
    weight[0, :64] = 1
    assert not [f for f in forms_of(weight, 2) if isinstance(f, grouped.Groups)], "too many in a group"


def test_n_of_m_is_for_weights_that_fill_it() -> None:
    weight = n_of_m(np.random.default_rng(0), 64, 256, 2, 4)
    assert grouped.Groups(2, 4).takes(weight * (np.arange(256) != 7))
    assert not grouped.Groups(2, 4).takes(weight * (np.arange(256) < 200)), "a fifth of the places are empty"
    assert not grouped.Groups(2, 4).takes(weight[:, :240]), "32 inputs are a step"
    assert not grouped.Groups(2, 4).takes(sparse(np.random.default_rng(0), 64, 256, 1, 0.5))
