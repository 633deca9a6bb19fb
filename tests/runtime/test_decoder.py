"""Attention cores of decoders inside ONNX Runtime: numbers, shapes, and inputs that must be refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests import decoder_harness as harness
from tests.decoder_harness import DEPTH, HEADS, KEY_HEADS
from tests.region_harness import assert_parity, linked, run, session


def library() -> Path:
    return linked(harness.core(False), harness.core(True))


@pytest.mark.parametrize("threads", [1, 2])
def test_without_a_cache(threads: int) -> None:
    s = session(harness.model(False), threads, library())
    for batch, tokens in ((1, 1), (1, 3), (2, 7), (1, 16), (3, 33), (1, 64), (1, 65), (2, 200)):
        for mask in (None, (1, HEADS, tokens), (1, 1, tokens), (batch, 1, 1), (1, 1, 1)):
            given = harness.inputs(False, batch, tokens, mask=mask, tables=batch, seed=tokens)
            assert_parity(run(s, harness.feeds(given)), harness.expected(given))


@pytest.mark.parametrize("threads", [1, 2])
def test_behind_a_cache(threads: int) -> None:
    s = session(harness.model(True), threads, library())
    for batch, tokens, past in (
        (1, 1, 0),
        (1, 1, 1),
        (2, 1, 127),
        (1, 1, 128),
        (1, 1, 300),
        (2, 3, 5),
        (1, 5, 126),
        (1, 70, 60),
        (2, 17, 0),
    ):
        for mask in (None, (1, HEADS, tokens), (1, 1, 1), (batch, HEADS, 1)):
            given = harness.inputs(True, batch, tokens, past, mask, seed=past)
            assert_parity(run(s, harness.feeds(given)), harness.expected(given))


def test_without_new_tokens_or_sequences_the_cache_stays() -> None:
    s = session(harness.model(True), 1, library())
    for batch, tokens, past in ((2, 0, 5), (0, 1, 5), (1, 0, 0)):
        given = harness.inputs(True, batch, 1, past)
        given[:3] = [np.zeros((batch, tokens, x.shape[2]), np.float32) for x in given[:3]]
        given[4:6] = [np.zeros((1, 1, tokens, DEPTH), np.float32)] * 2
        y, key, value = run(s, harness.feeds(given))
        assert y.shape == (batch, tokens, HEADS * DEPTH)
        assert key.shape == value.shape == (batch, KEY_HEADS, past + tokens, DEPTH)
        if tokens == 0:
            np.testing.assert_array_equal(key, given[6])
            np.testing.assert_array_equal(value, given[7])


@pytest.mark.parametrize("cached", [False, True])
def test_leading_ones_may_be_left_out(cached: bool) -> None:
    s = session(harness.model(cached), 1, library())
    given = harness.inputs(cached, 2, 9, 4 * cached, mask=(1, 1, 9))
    want = run(s, harness.feeds(given))
    for axes in ((0,), (0, 1)):
        fewer = [x.squeeze(axes) if i in (3, 4, 5) else x for i, x in enumerate(given)]
        for one, other in zip(want, run(s, harness.feeds(fewer)), strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("cached", [False, True])
def test_a_token_that_sees_no_key_gets_the_mean_of_all(cached: bool) -> None:
    """Key tiles that nobody sees are left out; here somebody sees none at all."""
    given = harness.inputs(cached, 1, 130, 10 * cached)
    given[3][0, 0, 5] = given[3][0, 0, 70] = np.finfo(np.float32).min
    want = harness.expected(given)
    assert_parity(run(session(harness.model(cached), 1, library()), harness.feeds(given)), want)
    values = want[2] if cached else given[2].reshape(1, 130, KEY_HEADS, DEPTH).transpose(0, 2, 1, 3)
    np.testing.assert_allclose(want[0][0, 70, :DEPTH], values[0, 0].mean(axis=0), atol=1e-5)


def test_the_same_bits_at_any_number_of_threads() -> None:
    given = harness.feeds(harness.inputs(True, 2, 5, 200))
    first = run(session(harness.model(True), 1, library()), given)
    for one, other in zip(first, run(session(harness.model(True), 3, library()), given), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_caches_new_shape_is_known_where_both_parts_are() -> None:
    def shapes(batch: int | str, tokens: int | str, past: int | str) -> list[list[int | str]]:
        rows = [[batch, tokens, h * DEPTH] for h in (HEADS, KEY_HEADS, KEY_HEADS)]
        return [*rows, [1, 1, 1, "keys"], *[[tokens, DEPTH]] * 2, *[[batch, KEY_HEADS, past, DEPTH]] * 2]

    def outputs(*sizes: int | str) -> list[list[int | str | None]]:
        return [o.shape for o in session(harness.model(True, shapes(*sizes)), 1, library()).get_outputs()]

    assert outputs(2, 1, 7) == [[2, 1, HEADS * DEPTH], [2, KEY_HEADS, 8, DEPTH], [2, KEY_HEADS, 8, DEPTH]]
    y, key, value = outputs("b", 1, "past")
    assert y == ["b", 1, HEADS * DEPTH]
    for shape in (key, value):
        assert (shape[0], *shape[1::2]) == ("b", KEY_HEADS, DEPTH)
        assert shape[2] not in ("past", 1)


def zeros(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float32)


@pytest.mark.parametrize(
    "index, value, words",
    [
        (0, zeros(5, HEADS * DEPTH), "input 0 must be [batch, tokens, features], it has 2 dimensions"),
        (2, zeros(2, 4, KEY_HEADS * DEPTH), "inputs 0 and 2 must agree"),
        (3, zeros(2, 1, 5, 11), "mask 0 must be [2 or 1,6 or 1,5 or 1,12], its shape is [2,1,5,11]"),
        (3, zeros(2, 1, 5, 13), "mask 0 must be [2 or 1,6 or 1,5 or 1,12], its shape is [2,1,5,13]"),
        (3, zeros(3, 1, 5, 12), "mask 0 must be"),
        (3, zeros(2, 2, 5, 12), "mask 0 must be"),
        (3, zeros(4, 12), "mask 0 must be [2 or 1,6 or 1,5 or 1,12], its shape is [1,1,4,12]"),
        (3, zeros(12), "mask 0 must have 2 to 4 dimensions, its shape is [12]"),
        (3, zeros(1, 1, 1, 5, 12), "mask 0 must have 2 to 4 dimensions"),
        (4, zeros(1, 1, 4, DEPTH), "table 0 must be [2 or 1,1,5,8], its shape is [1,1,4,8]"),
        (5, zeros(1, 1, 5, DEPTH // 2), "table 1 must be"),
        (5, zeros(3, 1, 5, DEPTH), "table 1 must be"),
        (4, zeros(1, 2, 5, DEPTH), "table 0 must be"),
        (4, zeros(2, 5, DEPTH), "table 0 must be"),
        (4, zeros(1, 1, 1, 5, DEPTH), "table 0 must have 2 to 4 dimensions"),
        (6, zeros(2, KEY_HEADS + 1, 7, DEPTH), "cache 0 must be [2,2,past,8], its shape is [2,3,7,8]"),
        (6, zeros(1, KEY_HEADS, 7, DEPTH), "cache 0 must be"),
        (7, zeros(2, KEY_HEADS, 7, DEPTH + 4), "cache 1 must be"),
        (7, zeros(2, KEY_HEADS, 7 * DEPTH), "cache 1 must be"),
        (7, zeros(2, KEY_HEADS, 6, DEPTH), "caches 0 and 1 must have the same tokens, not 7 and 6"),
        (6, zeros(2, KEY_HEADS, 0, DEPTH), "caches 0 and 1 must have the same tokens, not 0 and 7"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(index: int, value: np.ndarray, words: str) -> None:
    s = session(harness.model(True), 1, library())
    good = harness.inputs(True, 2, 5, 7)
    with pytest.raises(Exception) as raised:
        run(s, harness.feeds([value if i == index else x for i, x in enumerate(good)]))
    assert words in str(raised.value)
    assert "at site 'decoder/attention'" in str(raised.value)
    assert_parity(run(s, harness.feeds(good)), harness.expected(good))  # the session still works


def test_a_cache_too_long_for_offsets_is_refused() -> None:
    given = harness.inputs(True, 1, 1, 3)
    long = np.lib.stride_tricks.as_strided(np.zeros(1, np.float32), (0, KEY_HEADS, 1 << 30, DEPTH), (0, 0, 0, 0))
    given = [x[:0] if i < 3 else x for i, x in enumerate(given)]
    given[6] = given[7] = np.empty(long.shape, np.float32)  # of no sequences, so of no bytes
    with pytest.raises(Exception, match="past tokens are too many for 32-bit offsets"):
        run(session(harness.model(True), 1, library()), harness.feeds(given))
