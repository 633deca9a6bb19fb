"""Blocks, by hand."""

from __future__ import annotations

import numpy as np

from spa_compiler.patterns import Block


def test_a_column_block_is_consecutive_outputs_of_one_input() -> None:
    weight = np.array([[1, 0, 0], [2, 0, 0], [0, 3, 0], [0, 4, 0], [0, 0, 5]], np.float32)
    block = Block(2)
    assert block.fits(weight)
    assert block.fill(weight) == 1.0
    assert not block.fits(np.roll(weight, 1, axis=0))
    np.testing.assert_array_equal(block.sizes(5, 3), [[2] * 3, [2] * 3, [1] * 3])
    np.testing.assert_allclose(block.scores(weight), [[1.5, 0.0, 0.0], [0.0, 3.5, 0.0], [0.0, 0.0, 5.0]])
    keep = np.array([[True, False, False], [False, True, False], [False, False, True]])
    np.testing.assert_array_equal(block.mask(keep, 5, 3), weight != 0)


def test_a_block_of_both_sides_is_short_at_both_borders() -> None:
    weight = np.array([[1, 2, 0], [3, 4, 0], [0, 0, 5]], np.float32)
    block = Block(2, 2)
    np.testing.assert_array_equal(block.sizes(3, 3), [[4, 2], [2, 1]])
    np.testing.assert_allclose(block.scores(weight), [[2.5, 0.0], [0.0, 5.0]])
    np.testing.assert_array_equal(block.mask(np.array([[True, False], [False, True]]), 3, 3), weight != 0)
    assert block.fits(weight)
    assert not block.fits(weight[:, ::-1])
    assert block.fill(weight[:, ::-1]) == 5 / 8


def test_short_blocks_compete_by_harm_per_element() -> None:
    importance = np.array([[1, 1, 3], [1, 1, 1], [2, 2, 9]], float)
    # Means: [[1, 2], [2, 9]]; sums would send the lower left block (4) and keep the upper left one (4) by place alone.
    np.testing.assert_array_equal(
        Block(2, 2).choose(importance, 4 / 9), [[False, False, True], [False, False, True], [True, True, True]]
    )
    np.testing.assert_array_equal(
        Block(2, 2).choose(importance, 6 / 9), [[False, False, False], [False, False, False], [True, True, True]]
    )


def test_fill_is_nonzeros_over_stored() -> None:
    weight = np.zeros((8, 3), np.float32)
    weight[0, 0] = weight[4:, 1] = 1
    assert Block(4).fill(weight) == 5 / 8
    assert Block(8).fill(weight) == 5 / 16
    assert Block(4, 2).fill(weight) == 5 / 16
    assert Block(8, 8).fill(weight) == 5 / 24
    assert Block(4).fill(np.zeros((4, 4))) == 1.0


def test_blocks_larger_than_the_weight_are_one_unit() -> None:
    importance = np.arange(6.0).reshape(2, 3)
    np.testing.assert_allclose(Block(64, 64).scores(importance), [[2.5]])
    assert Block(64, 64).choose(importance, 0.99).all()
