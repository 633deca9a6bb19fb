"""pack and unpack: exact both ways, whole tiles and tails, without a touch of what is not theirs."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spa_compiler.kernels import panel
from tests.kernel_harness import assert_untouched, call, guarded, output

pytestmark = pytest.mark.usefixtures("level")

NAMES = tuple(f"spa_{way}_rows_{lanes}" for way in ("pack", "unpack") for lanes in panel.LANE_COUNTS)


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(panel.LANE_COUNTS),
    st.integers(1, 70),
    st.integers(0, 20),
    st.integers(0, 3),
    st.data(),
)
def test_pack_and_unpack_are_exact(lanes: int, features: int, more: int, slack: int, data: st.DataObject) -> None:
    tokens = data.draw(st.one_of(st.just(lanes), st.integers(1, lanes)), "tokens")
    rng = np.random.default_rng(features)
    length = features + more  # the tensor outside has more features than the tile
    whole = rng.standard_normal((tokens, length)).astype(np.float32)
    source = guarded(whole, slack)[:, more:]  # ends where memory ends
    tile, canaries = output((features, lanes), slack)
    call(NAMES, f"spa_pack_rows_{lanes}", source, tile, tokens, features, length)
    assert (tile == panel.pack_reference(source, lanes)).all()
    assert_untouched(canaries)

    back, canaries = output(whole.shape, slack)
    before = back.copy()
    call(NAMES, f"spa_unpack_rows_{lanes}", guarded(tile, slack), back[:, more:], tokens, features, length)
    assert (back[:, more:] == source).all()
    assert (back[:, :more] == before[:, :more]).all(), "unpack wrote outside of its features or tokens"
    assert_untouched(canaries)


@pytest.mark.parametrize("lanes", panel.LANE_COUNTS)
def test_special_values_travel_bit_by_bit(lanes: int) -> None:
    values = np.array([np.nan, np.inf, -np.inf, -0.0, 1e-45, -3.4e38, 0.0, 1.0], np.float32)
    x = np.resize(values, (lanes, 37))
    tile, _ = output((37, lanes))
    call(NAMES, f"spa_pack_rows_{lanes}", guarded(x), tile, lanes, 37, 37)
    back, _ = output((lanes, 37))
    call(NAMES, f"spa_unpack_rows_{lanes}", tile, back, lanes, 37, 37)
    assert (back.view(np.uint32) == x.view(np.uint32)).all()


def test_pack_reference_repeats_the_last_token() -> None:
    x = np.array([[1, 2, 3], [4, 5, 6]], np.float32)
    assert panel.pack_reference(x, 4).tolist() == [[1, 4, 4, 4], [2, 5, 5, 5], [3, 6, 6, 6]]


@given(st.integers(0, 3000))
def test_lanes_for_holds_all_tokens_in_the_fewest_tiles(tokens: int) -> None:
    lanes = panel.lanes_for(tokens)
    tiles = max(1, -(-tokens // lanes))
    assert lanes in panel.LANE_COUNTS
    assert tiles == max(1, -(-tokens // panel.MAX_LANES)), "a narrower tile must not cost another one"
    if lanes > 1:
        narrower = panel.LANE_COUNTS[panel.LANE_COUNTS.index(lanes) - 1]
        assert tiles * narrower < tokens, "a narrower tile would do"
