"""`factorize`: options, files and models that it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spa_compiler.errors import ModelError, UsageError
from spa_compiler.graph.operators import weighted_ops
from spa_compiler.passes.factorize import Factorize, FactorizeOptions
from spa_compiler.passes.factorize_options import multiple_of
from spa_compiler.targets import parse
from tests.passes.factorized import (
    factorize,
)
from tests.passes.tiny import HIDDEN, WIDTH, bits, feed_forward


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_nan_and_infinity_name_the_node(value: str) -> None:
    model = feed_forward()
    op = weighted_ops(model.graph)[1]
    rows = op.rows().copy()
    rows[3, 2] = float(value)
    op.replace(rows)
    with pytest.raises(ModelError, match=rf"node 'b0': weight 'B0' of MatMul has {value} at output 3, input 2"):
        factorize(model, params=0.5)


@pytest.mark.parametrize(
    "options, where, message",
    [
        ({}, None, "it is missing how much should stay.*params=0.5"),
        ({"params": 0.5, "error": 0.1}, None, "params and error contradict each other"),
        ({"params": 0.5, "method": "svd", "scores": "s.npz"}, "scores", "method=svd has no scores.*fwsvd"),
        ({"energy": 0.9, "allocate": "uniform"}, "allocate", "divides a budget, but energy is of each layer"),
        ({"error": 0.1, "allocate": "error"}, "allocate", "divides a budget, but error is of each layer"),
        ({"macs": 0.5, "allocate": "welore"}, "allocate", "one rank of each weight, and parameters alone"),
        ({"params": 0.5, "allocate": "welore", "method": "tucker"}, "allocate", "one rank of each weight"),
        ({"params": 0.5, "joint": True, "method": "tucker"}, "joint", "method=tucker shares no factor"),
        ({"params": 0.5, "joint": True, "method": "sparse-low-rank"}, "joint", "sparse-low-rank shares no factor"),
        ({"params": 0.5, "rank": 0.1}, "rank", "method=auto has no sparse part"),
        ({"params": 0.5, "method": "svd", "pattern": "2:4"}, "pattern", "method=svd has no sparse part"),
        ({"macs": 0.5, "method": "sparse-low-rank"}, "macs", "needs params, not macs"),
        ({"energy": 0.5, "method": "sparse-low-rank"}, "energy", "needs params, not energy"),
        (
            {"params": 0.6, "method": "sparse-low-rank", "pattern": "2:4", "rank": 0.1},
            "pattern",
            "the pattern 2:4 says itself what it leaves",
        ),
        (
            {"params": 0.6, "method": "sparse-low-rank", "pattern": "2:4", "allocate": "error"},
            "pattern",
            "the pattern 2:4 says itself what it leaves",
        ),
        ({"params": 0.5, "method": "sparse-low-rank", "pattern": "2:4"}, "params", "2:4 alone keeps 50.0%"),
        ({"params": 1.0}, "FactorizeOptions", "params"),
        ({"params": 0.0}, "FactorizeOptions", "params"),
        ({"params": 0.5, "method": "pca"}, "FactorizeOptions", "method"),
        ({"params": 0.5, "multiple": -1}, "FactorizeOptions", "multiple"),
        ({"params": 0.5, "rank": 1.0, "method": "sparse-low-rank"}, "FactorizeOptions", "rank"),
        ({"params": 0.5, "pattern": "2:0", "method": "sparse-low-rank"}, None, "2:0"),
    ],
)
def test_options_that_contradict_each_other(options: dict[str, Any], where: str | None, message: str) -> None:
    with pytest.raises(UsageError, match=f"(?s){message}") as caught:
        Factorize(FactorizeOptions(**options))
    assert caught.value.where == where


@pytest.mark.parametrize(
    "options, where",
    [({"method": "whitened"}, "method"), ({"method": "fwsvd"}, "method"), ({"allocate": "error"}, "allocate")],
)
def test_what_needs_samples_says_so(options: dict[str, Any], where: str) -> None:
    model = feed_forward()
    before = bits(model)
    with pytest.raises(UsageError, match=r"samples.*--calib") as caught:
        factorize(model, params=0.5, **options)
    assert caught.value.where == where
    assert bits(model) == before


@pytest.mark.parametrize(
    "arrays, message",
    [
        ({"A0": np.ones((WIDTH, HIDDEN))}, "no scores for 'B0'"),
        ({"A0": np.ones((WIDTH, HIDDEN)), "B0": -np.ones((HIDDEN, WIDTH))}, "'B0' has negative scores"),
        ({"A0": np.ones((HIDDEN, WIDTH))}, r"'A0' has shape \[16, 12\], \[12, 16\] is expected"),
        ({"a0": np.ones((WIDTH, HIDDEN))}, "no weight that this pass takes is named 'a0'"),
        ({"A0": np.full((WIDTH, HIDDEN), np.nan)}, "'A0' has a NaN"),
    ],
)
def test_scores_that_do_not_fit(arrays: dict[str, Any], message: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "s.npz", **arrays)
    with pytest.raises(UsageError, match=message) as caught:
        factorize(feed_forward(), params=0.5, scores=str(tmp_path / "s.npz"))
    assert caught.value.where == str(tmp_path / "s.npz")
    with pytest.raises(UsageError, match="the scores cannot be read"):
        factorize(feed_forward(), params=0.5, scores=str(tmp_path / "none.npz"))


def test_macs_that_hang_on_unknown_sizes() -> None:
    with pytest.raises(UsageError, match=r"multiply-accumulates of 'a0' hang on sizes.*--shape") as caught:
        factorize(feed_forward(), macs=0.5)
    assert caught.value.where == "macs"


@pytest.mark.parametrize("target, asked, multiple", [("cpu", 0, 8), ("cuda:sm_90", 0, 16), ("cuda:sm_90", 5, 5)])
def test_ranks_are_multiples_of_what_the_target_likes(target: str, asked: int, multiple: int) -> None:
    options = FactorizeOptions(params=0.5, multiple=asked)
    assert multiple_of(options, parse(target)) == multiple
