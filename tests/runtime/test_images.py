"""Regions of convolutions inside ONNX Runtime, against its own operators: sizes, bands, batches, wrong inputs."""

from __future__ import annotations

import dataclasses
import re
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spa_compiler.kernels import rx1
from spa_compiler.kernels.window import Window
from spa_compiler.runtime.image_spec import MAX_IMAGES, CombineSpec, DepthwiseSpec
from spa_compiler.runtime.images import ImageBuilder
from spa_compiler.runtime.region import LinearSpec
from tests.image_harness import NETWORKS, SAME, Recorder, library, network, opened
from tests.region_harness import assert_parity, linked, run, session


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_it_is_what_onnx_runtime_computes_at_every_size(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(list(NETWORKS)), "name")
    n, threads = network(name), data.draw(st.sampled_from([1, 2]), "threads")
    inputs = 2 if name == "two" else 1  # sizes of their own; other networks add or join what they read
    axes = n.made_by.axes
    sizes = [tuple(data.draw(st.integers(4, 40), "size") for _ in range(axes)) for _ in range(inputs)]
    feeds = n.feeds(data.draw(st.integers(0, 3), "images"), *sizes, seed=sum(sizes[0]))
    assert_parity(run(opened(name, threads), feeds), n.expected(feeds))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("size", [(112, 112), (97, 101), (64, 64), (60, 240)])
@pytest.mark.parametrize("name", ["inverted", "bottleneck", "basic", "windowed", "direct"])
def test_images_that_leave_the_cache_are_computed_in_bands(name: str, size: tuple[int, int], threads: int) -> None:
    n = network(name)
    feeds = n.feeds(2, size)
    assert_parity(run(opened(name, threads), feeds), n.expected(feeds))


@pytest.mark.parametrize("size", [(3, 3000), (2, 70_001), (3000, 3)])
def test_long_rows_and_many_rows(size: tuple[int, int]) -> None:
    for name in ("direct", "bottleneck"):
        n = network(name)
        feeds = n.feeds(1, size)
        assert_parity(run(opened(name), feeds), n.expected(feeds))


@pytest.mark.parametrize("pixels", [(7, 7), (1, 1), (14, 14), (32, 32), (196,), (2, 3, 11), (0, 4)])
@pytest.mark.parametrize("batch", [0, 1, 3])
def test_without_windows_images_have_any_number_of_axes(pixels: tuple[int, ...], batch: int) -> None:
    n = network("pointwise")
    feeds = n.feeds(batch, pixels)
    s = session(n.model(("n", *(f"p{i}" for i in range(len(pixels))))), 2, library())
    flat = {name: x.reshape(*x.shape[:2], int(np.prod(pixels)), 1) for name, x in feeds.items()}
    want = n.expected(flat) if np.prod(pixels) else [np.zeros((batch, c, 0)) for c in n.spec.output_features]
    assert_parity(run(s, feeds), [y.reshape(batch, y.shape[1], *pixels) for y in want])


def test_bits_do_not_depend_on_threads_and_nan_stays_where_it_is_seen() -> None:
    feeds = network("inverted").feeds(1, (90, 112))
    (clean,) = run(opened("inverted"), feeds)
    (again,) = run(opened("inverted", 2), feeds)
    assert (clean == again).all()
    feeds["x0"][0, :, 40, 50] = np.nan  # seen 3 x 3 wide, and then by every second output through 5 x 5
    (marked,) = run(opened("inverted"), feeds)
    seen = np.isnan(marked).any(axis=(0, 1))
    assert np.argwhere(seen).min(axis=0).tolist() == [19, 24]
    assert np.argwhere(seen).max(axis=0).tolist() == [21, 26]
    assert (marked[:, :, ~seen] == clean[:, :, ~seen]).all()


def test_threads_share_a_session() -> None:
    n, sizes = network("inverted"), [(9 + 5 * i, 40 - 3 * i) for i in range(8)]
    work = [n.feeds(1 + i % 2, size, seed=i) for i, size in enumerate(sizes)]
    want = [n.expected(feeds) for feeds in work]

    def often(i: int) -> None:
        for _ in range(10):
            assert_parity(run(opened("inverted", 2), work[i]), want[i])

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(often, range(8)))


# ---- shapes ----


def test_shapes_are_inferred() -> None:
    def shapes(name: str, dims: tuple[int | str, ...]) -> list[list[int | str]]:
        return [y.shape for y in session(network(name).model(dims), path=library()).get_outputs()]

    assert shapes("inverted", ("n", 17, 30)) == [["n", 40, 9, 15]]
    assert shapes("pointwise", ("n", "h", "w")) == [["n", c, "h", "w"] for c in (24, 10, 144)]
    assert shapes("line", (2, 31)) == [[2, 16, 16]]
    ((images, channels, *sizes),) = shapes("bottleneck", ("n", "h", "w"))
    assert (images, channels) == ("n", 64)
    assert not {"h", "w"} & set(sizes), "a size that changes is not called by its old name"


# ---- what does not fit ----


@pytest.mark.parametrize(
    "name, shapes, words",
    [
        ("inverted", [(1, 24, 81)], "input 0 must have 4 dimensions, its shape is [1,24,81]"),
        ("pointwise", [(2, 24)], "input 0 must have 3 to 8 dimensions, it has 2"),
        ("inverted", [(1, 24, 0, 9)], "smaller than the window, its shape is [1,24,0,9]"),
        ("two", [(1, 8, 9, 9), (2, 6, 9, 9)], "inputs 0 and 1 must hold the same number of images"),
        ("sum", [(1, 48, 9, 9), (1, 61, 9, 8)], "a residual of 1 x 72 pixels is added to 1 x 81"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(name: str, shapes: list[tuple[int, ...]], words: str) -> None:
    n = network(name)
    dims = tuple("abcdefgh"[: len(shapes[0]) - 1])
    s = session(n.model(None if len(shapes) > 1 else dims), path=library())
    feeds = {f"x{i}": np.zeros(shape, np.float32) for i, shape in enumerate(shapes)}
    with pytest.raises(Exception, match=re.escape(words)) as raised:
        run(s, feeds)
    assert "at site 'features/block'" in str(raised.value)


@pytest.mark.parametrize(
    "which, wrong, words",
    [
        (-2, np.zeros((96, 24), np.float32), "depthwise 1: taps must be [96,25], not [96,24]"),
        (-1, np.zeros(95, np.float32), "depthwise 1: bias must have 96 elements, not 95"),
        (-2, np.zeros(96 * 25, np.float32), "taps must have 2 dimensions, it has 1"),
    ],
)
def test_malformed_taps_are_refused(which: int, wrong: np.ndarray, words: str) -> None:
    n = network("inverted")
    name = list(n.arrays)[which]
    with pytest.raises(Exception, match=re.escape(words)):
        session(n.model(replace={name: wrong}), path=library())


# ---- the builder ----


def form(n: int, k: int) -> LinearSpec:
    return LinearSpec(n, k, rx1.pack(np.ones((n, k), np.float32), None, 4).form)


def test_chains_end_where_images_grow_and_before_a_second_window() -> None:
    assert network("inverted").spec.chains == ((1, 3), (4, 6))
    assert network("windowed").spec.chains == ((1, 3),)
    assert network("basic").spec.chains == ()
    assert network("pointwise").spec.chains == ()  # an output is needed as a whole
    assert network("direct").spec.chains == ()


def test_a_chain_is_one_loop() -> None:
    lines = network("inverted").spec.lines
    assert [line.split("(")[0].strip() for line in lines] == [
        "TRY",
        *["for", "TRY", "TRY", "TRY", "}"] * 2,
    ]
    assert "spa_image_band(r, 1, n)" in lines[6]


def touched(call: str) -> list[int]:
    """The images that a step reads and makes."""
    found = re.match(r"TRY\(spa_image_(\w+)\(r, ([-\d, ]+)\)\);", call)
    assert found
    values = [int(v) for v in found[2].split(",")]
    if found[1] in ("in", "out"):
        return values[:1]
    if found[1] in ("mean", "repeat", "unfold", "every"):
        return values
    if found[1] == "combine":
        return [i for i in values[1:] if i >= 0]
    if found[1] == "linear":
        _, source, second, second_source, residual, made = values
        return [i for i in (source, second_source if second >= 0 else -1, residual, made) if i >= 0]
    return [i for i in values[1:] if i >= 0]


def residual_alone(line: str) -> int:
    """The residual of a step, where it reads that image as nothing else; else -1."""
    found = re.search(r"spa_image_(linear|window)\(r, ([-\d, ]+)\)", line)
    values = [int(v) for v in found[2].split(", ")] if found else [-1, -1]
    return values[-2] if values[-2] not in touched(line)[:-2] else -1


@pytest.mark.parametrize("name", NETWORKS)
def test_images_that_live_at_the_same_time_have_slots_of_their_own(name: str) -> None:
    spec = network(name).spec

    def at_home(images: list[int]) -> list[int]:
        return [spec.images[i].home for i in images]

    together: list[list[int]] = []  # the images of a step, or of all steps of a loop
    over = {at_home(touched(line)[-1:])[0]: residual_alone(line) for line in spec.lines if line.startswith("TRY")}
    looping = False
    for line in spec.lines:
        if line.startswith("TRY"):
            if looping and together[-1] is not None:
                together[-1] += at_home(touched(line))
            else:
                together.append(at_home(touched(line)))
        elif line.startswith("for"):
            looping = True
            together.append([])
        else:
            looping = False
    homes = {i.home for i in spec.images}
    alive = {image: [at for at, images in enumerate(together) if image in images] for image in homes}
    shared = 0
    for a, b in combinations(alive, 2):
        if spec.images[a].slot == spec.images[b].slot >= 0:
            shared += 1
            # but a sum may be written over its residual
            replaced = over.get(b) == a and spec.images[a].channels == spec.images[b].channels
            assert alive[a][-1] < alive[b][0] + replaced or alive[b][-1] < alive[a][0], (a, b)
    assert shared or name != "inverted"


@pytest.mark.parametrize(("read_later", "its_own_source"), [(False, False), (True, False), (False, True)])
def test_a_sum_is_written_over_a_residual_that_nothing_else_reads(read_later: bool, its_own_source: bool) -> None:
    r = Recorder()
    x = r.linear(r.input(8), 8, 4)
    seen = r.linear(x, 4, 4, window=Window(8, (3, 3), pads=SAME))
    y = r.linear(x if its_own_source else seen, 8, 4, residual=x)
    r.output(r.linear(r.concat(y, r.linear(x, 8, 4)) if read_later else y, 9, 4))
    n = r.finish()
    slots = [n.spec.images[i.home].slot for i in n.spec.images if i.kind == "LINEAR" and i.channels == 8]
    assert (slots[0] == slots[1]) == (not read_later and not its_own_source)
    feeds = n.feeds(2, (5, 7))
    assert_parity(run(session(n.model(), path=linked(n.spec)), feeds), n.expected(feeds))


def test_pixels_that_a_stride_leaves_out_are_left_out_before_the_product() -> None:
    def kinds(window: Window) -> list[str]:
        r = Recorder()
        r.output(r.linear(r.linear(r.input(8), 8, 4), 8, 4, window=window))
        return [i.kind for i in r.finish().spec.images[2:]]

    assert kinds(Window(8, (1, 1), (2, 3))) == ["EVERY", "LINEAR"]
    assert kinds(Window(8, (1, 1), (2, 2), pads=(1, 0, 0, 0))) == ["WINDOW"]
    assert kinds(Window(8, (1, 2), (2, 2))) == ["WINDOW"]


def test_what_is_put_together_is_written_to_its_place() -> None:
    images, lines = network("split").spec.images, network("split").spec.lines
    whole = {i: [j for j, image in enumerate(images) if image.home == i != j] for i in range(len(images))}
    assert [len(p) for p in whole.values() if p] == [5, 4]  # y with its halves, z and a part of it; four pools
    assert not any("combine(r, 1" in line for line in lines), "nothing is copied"
    outputs = [i for i in network("together").spec.images if i.slot == -3]
    assert [(i.kind, i.first) for i in outputs] == [("LINEAR", 0), ("WINDOW", 6), ("VIEW", 0)]
    assert network("dense").spec.combines == ()
    assert len({i.home for i in network("dense").spec.images if i.channels in (9, 4, 13, 17, 21)}) == 4
    copies = [c for c in network("together").spec.combines if c == CombineSpec("copy")]
    assert len(copies) == 4  # an input, a part of an image, and an image twice


def test_images_of_other_sizes_are_not_put_together() -> None:
    r = Recorder()
    a, b = r.input(4), r.input(4)
    r.output(r.linear(r.concat(r.linear(a, 4, 4), r.linear(b, 4, 4)), 8, 4))
    n = r.finish()
    s = session(n.model(), path=linked(n.spec))
    with pytest.raises(Exception, match="channels of 1 x 30 and 1 x 25 pixels are put together"):
        run(s, n.feeds(1, (5, 5), (5, 6)))


def test_images_of_other_sizes_are_not_combined() -> None:
    r = Recorder()
    a, b, c = r.input(4), r.input(4), r.input(4)
    r.output(r.linear(r.combine("add", a, b), 8, 4))
    r.output(r.combine("scale", a, c))
    n = r.finish()
    s = session(n.model(), path=linked(n.spec))
    assert_parity(run(s, feeds := n.feeds(1, (5, 5), (5, 5), (1, 1))), n.expected(feeds))
    with pytest.raises(Exception, match="1 x 25 pixels are combined with 1 x 30"):
        run(s, n.feeds(1, (5, 5), (5, 6), (1, 1)))
    with pytest.raises(Exception, match="1 x 25 pixels are combined with 1 x 25"):
        run(s, n.feeds(1, (5, 5), (5, 5), (5, 5)))


def test_equal_regions_are_one_op_and_any_difference_another() -> None:
    one = network("inverted").spec
    assert re.fullmatch(r"Region_[0-9a-f]{10}", one.op_type)
    assert one.op_type == NETWORKS["inverted"]().spec.op_type
    changed = dataclasses.replace(one, depthwise=(one.depthwise[0], dataclasses.replace(one.depthwise[1], high=1.0)))
    assert len({one.op_type, changed.op_type, *(network(name).spec.op_type for name in NETWORKS)}) == len(NETWORKS) + 1


def test_what_does_not_fit_together_is_refused() -> None:
    b = ImageBuilder()
    x = b.input(8)
    with pytest.raises(ValueError, match="8 channels"):
        b.linear(x, form(4, 9))
    with pytest.raises(ValueError, match="72 columns"):
        b.window(x, Window(8, (3, 3)), form(4, 71))
    with pytest.raises(ValueError, match="reads 8 channels"):
        b.depthwise(x, DepthwiseSpec(Window(9, (3, 3))))
    with pytest.raises(ValueError, match="sees more than the buffer"):
        DepthwiseSpec(Window(8, (63, 63), dilation=(4, 4)))
    with pytest.raises(ValueError, match="reads 8 channels"):
        b.largest(x, Window(9, (3, 3)))
    with pytest.raises(ValueError, match="sees more than the buffer"):
        b.largest(x, Window(8, (63, 63), dilation=(4, 4)))
    with pytest.raises(ValueError, match="of 8 and no channels"):
        b.combine(x, CombineSpec("add"))
    with pytest.raises(ValueError, match="of 8 and 3 channels"):
        b.combine(x, CombineSpec("mul"), b.part(x, 0, 3))
    with pytest.raises(ValueError, match=r"channels 6 \.\. 9 of 8"):
        b.part(x, 6, 3)
    with pytest.raises(ValueError, match="8 channels are not those of 3 x 1 pixels"):
        b.unfold(x, (3, 1))
    b.depthwise(b.depthwise(x, DepthwiseSpec(Window(8, (3, 3)))), DepthwiseSpec(Window(8, (1, 3), axes=1)))
    with pytest.raises(ValueError, match="one and of two axes"):
        b.finish()


def test_a_region_has_a_bound_on_its_images() -> None:
    r = Recorder()
    y = r.input(4)
    for _ in range(MAX_IMAGES):
        y = r.depthwise(y, Window(4, (3, 3), pads=SAME))
    with pytest.raises(ValueError, match=f"more than {MAX_IMAGES} images"):
        r.finish()
