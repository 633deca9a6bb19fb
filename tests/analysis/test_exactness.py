"""Cutting units and masking them compute the same: in every net, for random units of every group at once."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence

import msgspec
import numpy as np
import onnx
import pytest

from spa_compiler.analysis import Analysis, schema
from spa_compiler.analysis.choose import random_units
from spa_compiler.analysis.cut import cut, removed_slabs
from spa_compiler.graph.model import Model
from tests.analysis import exactness, nets
from tests.analysis.cutting import removal
from tests.analysis.exactness import RATIOS, check_each_unit, check_exact
from tests.analysis.told import analysis_of, weighted


@pytest.mark.parametrize("name", nets.ALL)
def test_cut_equals_masked(name: str) -> None:
    assert check_exact(weighted(nets.ALL[name]), name=name), "there is something to remove in each net"


RANDOM: dict[str, Callable[[int], onnx.ModelProto]] = {
    "convolutional": lambda seed: weighted(nets.random_convolutional(seed), seed=seed),
    "movement": nets.random_movement,
    "transformer": nets.random_transformer,
}


@pytest.mark.parametrize("block", range(5))
@pytest.mark.parametrize("kind", RANDOM)
def test_cut_equals_masked_in_random_nets(kind: str, block: int) -> None:
    for seed in range(10 * block, 10 * block + 10):
        ratios = [RATIOS[seed % len(RATIOS)]]
        count = check_exact(RANDOM[kind](seed), seeds=[seed], ratios=ratios, sizes={"N": 2}, name=f"{kind} {seed}")
        assert count or kind == "movement"


@pytest.mark.slow
@pytest.mark.parametrize("kind", RANDOM)
def test_cut_equals_masked_in_new_random_nets(kind: str) -> None:
    """Other nets in every run; a failure tells the seed."""
    first = secrets.randbelow(1 << 30)
    print(f"seeds from {first}")
    for seed in range(first, first + 100):
        check_exact(RANDOM[kind](seed), seeds=[seed], every_group=bool(seed % 2), sizes={"N": 2}, name=f"{kind} {seed}")


@pytest.mark.parametrize("name", nets.ALL)
def test_every_single_unit_counts(name: str) -> None:
    """One unit at a time: its parameters hold what its activations are made of, so no unit may be without either."""
    assert check_each_unit(weighted(nets.ALL[name]), name=name)


@pytest.mark.parametrize("name", nets.ALL)
def test_the_json_says_what_is_removed(name: str) -> None:
    """What an outsider reads from the JSON is what the cut goes by."""
    analysis = analysis_of(nets.ALL[name])
    document = msgspec.json.decode(analysis.to_json(), type=schema.Document)
    removed = random_units(analysis, 0.5, np.random.default_rng(0))
    for told, gone in zip(removal(document, removed), removed_slabs(analysis, removed), strict=True):
        assert {place: sorted(indices) for place, indices in told.items()} == {
            place: sorted(np.asarray(indices).tolist()) for place, indices in gone.items() if len(indices)
        }


def test_a_wrong_cut_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The message names the net, the seed, the ratio, and the group that fails alone."""

    def wrong(model: Model, analysis: Analysis, removed: Mapping[int, Sequence[int]]) -> Model:
        small = cut(model, analysis, removed)
        if 1 in removed:
            weight = small.graph.tensors()["w3"]
            weight.values = weight.values * np.float32(1.001)
        return small

    monkeypatch.setattr(exactness, "cut", wrong)
    message = r"mlp, seed 3, ratio 0.3: output y differs by .*\n  alone fails group 1 \(7 x channel: .*\n.*its unit \d"
    with pytest.raises(AssertionError, match=message):
        check_exact(weighted(nets.MLP), seeds=[3], ratios=[0.3], name="mlp")
