"""The product of two panels against float64, with every tail."""

from __future__ import annotations

import numpy as np
import pytest

from spa_compiler.kernels import gate
from tests.kernel_harness import call, guarded

pytestmark = pytest.mark.usefixtures("level")


@pytest.mark.parametrize("slack", [0, 1])
@pytest.mark.parametrize("count", [0, 1, 3, 15, 16, 17, 63, 64, 65, 200, 1024])
def test_it_multiplies_every_element_and_no_other(count: int, slack: int) -> None:
    rng = np.random.default_rng(count)
    x, factor = rng.standard_normal((2, count + 1)).astype(np.float32)
    there = guarded(x[:count] if slack == 0 else x, slack)
    call((gate.NAME,), gate.NAME, there, guarded(factor[:count], slack), count)
    np.testing.assert_array_equal(there[:count], gate.reference(x[:count], factor[:count]))
    assert slack == 0 or there[count] == x[count]
