import numpy as np
import pytest

from spa_compiler.graph.difference import difference

F = np.float32


def test_it_is_relative_to_the_largest() -> None:
    assert difference(np.array([1, 100], F), np.array([2, 100], F)) == pytest.approx(0.01)


def test_zeros_are_compared_absolutely() -> None:
    assert difference(np.zeros(3, F), np.full(3, 1e-7, F)) == pytest.approx(1e-7)
    assert difference(np.zeros((0, 3), F), np.zeros((0, 3), F)) == 0


@pytest.mark.parametrize(
    "want, got",
    [
        (np.zeros(2, F), np.zeros(3, F)),
        (np.zeros(2, F), np.zeros(2)),
        (np.array([1, np.nan], F), np.array([np.nan, 1], F)),
        (np.array([1, np.nan], F), np.array([1, np.inf], F)),
        (np.array([1, np.inf], F), np.array([1, -np.inf], F)),
        (np.array([1, 2], F), np.array([1, np.nan], F)),
    ],
)
def test_what_cannot_be_compared(want: np.ndarray, got: np.ndarray) -> None:
    assert difference(want, got) is None


def test_integers_strings_and_booleans() -> None:
    for a, b in ((1, 2), ("a", "b"), (True, False)):
        want, got = np.array([a, a]), np.array([a, b])
        assert difference(want, want) == 0
        assert difference(want, got) == 1
        assert difference(want, got, np.array([True, False])) == 0


def test_the_largest_integers_do_not_wrap() -> None:
    assert difference(np.array([2**63 - 1]), np.array([-(2**63)])) == 1


def test_complex() -> None:
    assert difference(np.array([2j]), np.array([2j + 1])) == pytest.approx(0.5)
