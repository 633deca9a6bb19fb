"""What every form promises: a name, an exact packing, and a size that is known without it."""

from __future__ import annotations

import numpy as np
import pytest

from spa_compiler.kernels import rx1
from spa_compiler.kernels.forms import FULL, forms_of
from tests.kernel_harness import sparse


@pytest.mark.parametrize("n", [1, 5, 64, 70])
def test_every_form_says_what_it_stores_and_decides_its_sizes(n: int) -> None:
    weight = sparse(np.random.default_rng(n), n, 300, 1, 0.2)
    forms = list(forms_of(weight))
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
