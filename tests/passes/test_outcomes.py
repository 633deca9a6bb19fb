"""What layer-wise solving came to: when users are told that their samples are few."""

from __future__ import annotations

import numpy as np
import pytest

from spa_compiler.graph.operators import weighted_ops
from spa_compiler.passes.layerwise import Outcome, Result
from spa_compiler.passes.outcomes import scarce
from tests.passes.factorized import factorize
from tests.passes.tiny import HIDDEN, WIDTH, calibration, context, feed_forward, sparsify


def warned(*positions: int) -> tuple[str, ...]:
    """For the layers of one block, which have 12 and 16 inputs."""
    ops = weighted_ops(feed_forward().graph)
    result = Result(np.zeros(0), 0.0)
    return scarce(ops, [Outcome(result, None, None, 0.0, each) for each in positions])


@pytest.mark.parametrize("positions", [(0, 0), (WIDTH, HIDDEN), (1000, 1000)], ids=str)
def test_enough_or_no_samples_are_no_warning(positions: tuple[int, int]) -> None:
    assert warned(*positions) == ()


def test_the_layer_that_saw_least_is_named_and_what_would_do() -> None:
    (first,), (second,) = warned(WIDTH - 1, HIDDEN), warned(WIDTH - 1, 5)
    assert first.startswith("1 of 2 layers saw fewer positions than they have inputs ('a0': 11 for 12)")
    assert first.endswith("give 3 times as many samples")
    assert second.startswith("2 of 2 layers saw fewer positions than they have inputs ('b0': 5 for 16)")
    assert second.endswith("give 7 times as many samples")


def test_passes_hand_it_on() -> None:
    few = context(calibration(batch=3))
    for change in (sparsify(feed_forward(), few, sparsity=0.5), factorize(feed_forward(), few, params=0.6)):
        assert any("2 of 2 layers saw fewer positions" in warning for warning in change.warnings)
