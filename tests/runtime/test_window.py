"""Convolutions with a window inside ONNX Runtime, against its own Conv: sizes that fit nothing, bands, wrong inputs."""

from __future__ import annotations

import functools
import resource
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.region_harness import assert_parity, linked, run, session
from tests.window_harness import CONVOLUTIONS


def library() -> Path:
    return linked(*(c.region for c in CONVOLUTIONS.values()))


@functools.cache
def opened(name: str, threads: int = 1) -> ort.InferenceSession:
    return session(CONVOLUTIONS[name].model(), threads, library())


@settings(max_examples=120, deadline=None)
@given(st.data())
def test_it_is_onnx_runtimes_conv_at_every_size(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from([n for n in CONVOLUTIONS if n != "large"]), "name")
    c, threads = CONVOLUTIONS[name], data.draw(st.sampled_from([1, 2]), "threads")
    w = c.window
    least = [max(1, (w.size[i] - 1) * w.dilation[i] + 1 - w.pads[i] - w.pads[i + 2]) for i in range(2)]
    size = [data.draw(st.integers(smallest, smallest + 70), "size") for smallest in least][2 - w.axes :]
    feeds = c.image(data.draw(st.integers(0, 3), "images"), *size, seed=sum(size))
    assert_parity(run(opened(name, threads), feeds), c.expected(feeds))


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("size", [(56, 56), (7, 7), (41, 50), (90, 13)])
def test_many_bands_chunks_and_blocks_of_columns(size: tuple[int, int], threads: int) -> None:
    c = CONVOLUTIONS["large"]
    assert c.packed.chunk < c.n
    feeds = c.image(2, *size)
    assert_parity(run(opened("large", threads), feeds), c.expected(feeds))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    "name, size",
    [("line", (70_001,)), ("line", (26_240,)), ("large", (3, 5000)), ("large", (1, 2048)), ("odd", (2, 40_000))],
)
def test_rows_that_are_too_long_for_a_band_are_cut(name: str, size: tuple[int, ...], threads: int) -> None:
    c = CONVOLUTIONS[name]
    feeds = c.image(2, *size)
    assert_parity(run(opened(name, threads), feeds), c.expected(feeds))


def test_scratch_does_not_grow_with_the_length_of_a_row() -> None:
    s = opened("line")
    run(s, CONVOLUTIONS["line"].image(1, 200_000))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    feeds = CONVOLUTIONS["line"].image(1, 1_000_000)  # 40 MB in, 66 MB out; all planes would take 60 MB
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run(s, feeds)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert after - max(before, own) < 90_000


def test_bits_do_not_depend_on_threads_and_infinity_stays_where_it_is_seen() -> None:
    feeds = CONVOLUTIONS["large"].image(1, 56, 56)
    (clean,) = run(opened("large"), feeds)
    (again,) = run(opened("large", 3), feeds)
    assert (clean == again).all()
    feeds["x"][0, :, 20, 30] = np.nan
    (marked,) = run(opened("large"), feeds)
    seen = np.isnan(marked).any(axis=(0, 1))
    assert np.argwhere(seen).min(axis=0).tolist() == [19, 29]
    assert np.argwhere(seen).max(axis=0).tolist() == [21, 31]
    assert (marked[:, :, ~seen] == clean[:, :, ~seen]).all()


def test_threads_share_a_session() -> None:
    c, sizes = CONVOLUTIONS["halved"], [(9 + 5 * i, 40 - 3 * i) for i in range(8)]
    work = [c.image(1 + i % 2, *size, seed=i) for i, size in enumerate(sizes)]
    want = [c.expected(feeds) for feeds in work]

    def often(i: int) -> None:
        for _ in range(20):
            assert_parity(run(opened("halved", 2), work[i]), want[i])

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(often, range(8)))


@pytest.mark.parametrize(
    "name, shape, expected",
    [
        ("same", ["n", 5, "h", 17], ["n", 37, "h", 17]),
        ("halved", ["n", 8, 17, 30], ["n", 70, 9, 15]),
        ("line", [2, 10, 31], [2, 33, 16]),
    ],
)
def test_shapes_are_inferred(name: str, shape: list[int | str], expected: list[int | str]) -> None:
    s = session(CONVOLUTIONS[name].model(shape), path=library())
    assert s.get_outputs()[0].shape == expected


def test_a_size_that_changes_is_not_called_by_its_old_name() -> None:
    s = session(CONVOLUTIONS["halved"].model(["n", 8, "h", "w"]), path=library())
    images, channels, *sizes = s.get_outputs()[0].shape
    assert (images, channels) == ("n", 70)
    assert not {"h", "w"} & set(sizes)


@pytest.mark.parametrize(
    "name, shape, words",
    [
        ("valid", (1, 6, 2, 9), "smaller than the window"),
        ("valid", (1, 6, 9, 0), "smaller than the window"),
        ("same", (1, 4, 9, 9), "5 features"),
        ("line", (1, 10, 0), "smaller than the window"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(name: str, shape: tuple[int, ...], words: str) -> None:
    model = CONVOLUTIONS[name].model(["a", "b", *("c", "d")[: len(shape) - 2]])
    with pytest.raises(Exception, match=words):
        run(session(model, path=library()), {"x": np.zeros(shape, np.float32)})


def test_the_wrong_number_of_axes_is_refused() -> None:
    model = CONVOLUTIONS["line"].model(["n", 10, "h", "w"])
    with pytest.raises(Exception, match="must have 3 dimensions"):
        run(session(model, path=library()), {"x": np.zeros((1, 10, 5, 5), np.float32)})
