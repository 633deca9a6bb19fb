"""Images combined pixel by pixel, against numpy."""

from __future__ import annotations

import numpy as np
import pytest

from spa_compiler.kernels import activation, combine
from tests.kernel_harness import assert_untouched, call, guarded, output

pytestmark = pytest.mark.usefixtures("level")

ACTS = ("none", "relu", "clip", "silu", "hard_sigmoid")
NAMES = tuple(combine.name(op, act) for op in combine.OPS for act in ACTS)


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("op", combine.OPS)
def test_what_it_computes(op: str, act: str) -> None:
    rng = np.random.default_rng(0)
    for registers in (1, 2, 7):
        a, b = rng.standard_normal((2, 16 * registers)).astype(np.float32)
        b = b[:1] if op == "scale" else b
        out, canaries = output((16 * registers,))
        call(NAMES, combine.name(op, act), guarded(a), guarded(b), out, registers, 0.25, 0.5)
        assert_untouched(canaries)
        np.testing.assert_allclose(out, combine.reference(op, a, b, act, 0.25, 0.5), rtol=1e-6, atol=1e-6)


def test_other_ways_are_refused() -> None:
    with pytest.raises(ValueError, match="combined by 'div'"):
        combine.kernel("div", "none")
    assert set(ACTS) <= set(activation.NAMES)
