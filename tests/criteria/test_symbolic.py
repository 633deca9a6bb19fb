"""Expressions: known metrics exactly, Python's precedence, and nothing but arithmetic."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from spa_compiler.criteria import magnitude, wanda
from spa_compiler.criteria.symbolic import MAX_DEPTH, MAX_LENGTH, MAX_NODES, Statistics, parse
from spa_compiler.errors import UsageError

RNG = np.random.default_rng(0)
W, G = RNG.normal(size=(5, 8)), RNG.normal(size=(5, 8))
X, M, V, Y = RNG.uniform(0.1, 2, 8), RNG.normal(size=8), RNG.uniform(0.1, 2, 8), RNG.uniform(0.1, 2, 5)
KNOWN = Statistics(W, X, M, V, Y, G)


def value(text: str, statistics: Statistics = KNOWN) -> np.ndarray:
    return parse(text).evaluate(statistics)


def test_known_metrics_exactly() -> None:
    np.testing.assert_array_equal(value("sq(W)"), magnitude(W))
    np.testing.assert_array_equal(value("abs(W)*X"), np.abs(W) * X)
    np.testing.assert_array_equal(value("sq(A * X)"), wanda(np.abs(W), X))
    np.testing.assert_array_equal(value("W**2*mms(G)"), W**2 * ((G - G.min()) / (G.max() - G.min())))
    np.testing.assert_array_equal(value("A*Y**0.5"), np.abs(W) * Y[:, None] ** 0.5)
    assert parse("W**2*mms(G)").variables == {"W", "G"}


@pytest.mark.parametrize(
    "text, expected",
    [
        ("A-1-2+9", np.abs(W) - 1 - 2 + 9),
        ("A/2/4", np.abs(W) / 2 / 4),
        ("-A**2+20", -(np.abs(W) ** 2) + 20),
        ("A**2**0.5", np.abs(W) ** (2**0.5)),
        ("A**-1", np.abs(W) ** -1.0),
        ("(A+1)*2", (np.abs(W) + 1) * 2),
        ("A+1*2", np.abs(W) + 2),
        (" 1e-3 + .5*A+2. ", 1e-3 + 0.5 * np.abs(W) + 2),
        ("exp(W)", np.exp(W)),
        ("sqrt(A)+V", np.sqrt(np.abs(W)) + V),
        ("abs(M)", np.abs(np.broadcast_to(M, W.shape))),
        ("2*--A", 2 * np.abs(W)),
    ],
)
def test_precedence_and_functions(text: str, expected: np.ndarray) -> None:
    np.testing.assert_allclose(value(text), expected, rtol=1e-15)


@pytest.mark.parametrize("text", ["W", "neg(A)", "log(A)", "zsn(W)", "W*M"])
def test_values_below_zero_are_shifted_in_order(text: str) -> None:
    plain = {"W": W, "neg(A)": -np.abs(W), "log(A)": np.log(np.abs(W)), "zsn(W)": W - W.mean(), "W*M": W * M}[text]
    scores = value(text)
    assert scores.min() == 0
    assert scores.shape == W.shape
    np.testing.assert_array_equal(np.argsort(scores, axis=None), np.argsort(plain, axis=None))


def test_scales() -> None:
    np.testing.assert_allclose([value("mms(W)").min(), value("mms(W)").max()], [0, 1])
    np.testing.assert_allclose(value("zsn(W)").std(), 1)
    flat = Statistics(np.ones((2, 3)), np.ones(3), np.ones(3), np.ones(3))
    np.testing.assert_array_equal(value("mms(W)+zsn(W)+A", flat), np.ones((2, 3)))


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "1+2",
        "W+",
        "(W",
        "W)",
        "W W",
        "2W",
        "W,W",
        "W.T",
        "w",
        "B",
        "abs",
        "abs W",
        "abs()",
        "abs(W, W)",
        "+W",
        "W // 2",
        "W % 2",
        "W @ W",
        "W ^ 2",
        "W == W",
        "W if W else W",
        "lambda: W",
        "lambda W: W",
        "__import__('os')",
        "__import__('os').system('true')",
        "().__class__",
        "W.__class__",
        "W[0]",
        "[W for W in W]",
        "'W'",
        "W; W",
        "W\x00",
        "W#",
        "1_0*W",
        "0x10*W",
        "1j*W",
        "eval(W)",
        "\uff37",
        "W" * (MAX_LENGTH + 1),
        "(" * 10000 + "W" + ")" * 10000,
        "(" * 900 + "W" + ")" * 900,
        "-" * 1900 + "W",
        "abs(" * 300 + "W" + ")" * 300,
        "W" + "**2" * 400,
        "W" + "+1" * 400,
    ],
)
def test_anything_else_is_refused_at_once(text: str) -> None:
    start = time.process_time()
    with pytest.raises(UsageError) as error:
        parse(text)
    assert time.process_time() - start < 1
    assert len(str(error.value)) < 400


@given(st.text(max_size=60) | st.text("WAXG()+-*/. 0123456789eabsqmnlog", max_size=60))
@example("W**" * 30 + "W")
def test_no_text_does_anything_else(text: str) -> None:
    try:
        scores = value(text)
    except UsageError:
        return
    assert scores.shape == W.shape
    assert np.isfinite(scores).all()
    assert scores.min() >= 0


@pytest.mark.parametrize(
    "text, part",
    [
        ("A*9**9**9", "'9\\*\\*9\\*\\*9' is inf"),
        ("W + log(W)", "'log\\(W\\)' is nan"),
        ("sqrt(W)", "'sqrt\\(W\\)' is nan"),
        ("A / (X - X)", "'A / \\(X - X\\)' is inf"),
        ("W**0.5", "'W\\*\\*0.5' is nan"),
        ("exp(9999*A)", "'exp\\(9999\\*A\\)' is inf"),
        ("1e999*W", "'1e999' is inf"),
    ],
)
def test_what_is_not_finite_is_named(text: str, part: str) -> None:
    with pytest.raises(UsageError, match=part):
        value(text)


def test_scores_that_hold_nan_are_named() -> None:
    scores = G.copy()
    scores[1, 2] = np.nan
    with pytest.raises(UsageError, match="'G' is nan at \\[1, 2\\]"):
        value("A*G", Statistics(W, X, M, V, None, scores))


@pytest.mark.parametrize("text, what", [("A*G", "G, given scores"), ("A*Y", "Y, the norms")])
def test_what_is_not_known_is_said(text: str, what: str) -> None:
    with pytest.raises(UsageError, match=what):
        value(text, Statistics(W, X, M, V))


def test_values_too_far_apart() -> None:
    with pytest.raises(UsageError, match="too far apart"):
        value("W", Statistics(np.array([[1.5e308, -1.5e308]]), X[:2], M[:2], V[:2]))


def test_limits_are_reached_before_they_are_passed() -> None:
    deep = "abs(" * MAX_DEPTH + "W" + ")" * MAX_DEPTH
    np.testing.assert_array_equal(value(deep), np.abs(W))
    with pytest.raises(UsageError, match="deep"):
        parse(f"abs({deep})")
    chain = "+".join("A" * (MAX_DEPTH + 1))
    np.testing.assert_allclose(value(chain), (MAX_DEPTH + 1) * np.abs(W))
    with pytest.raises(UsageError, match="deep"):
        parse(f"{chain}+A")
    wide = "+".join(["(A+A+A+A+A+A+A+A+A)"] * 11)
    assert 2 * wide.count("A") - 1 <= MAX_NODES
    np.testing.assert_allclose(value(wide), 99 * np.abs(W))
    with pytest.raises(UsageError, match="large"):
        parse(wide + "+A*A")
