"""Tiles: which there are, what ranks them, and that what is taken was timed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spa_compiler.errors import EnvironmentFault
from spa_compiler.graph.model import Model
from spa_compiler.graph.save import to_proto
from spa_compiler.graph.session import open_session, run
from spa_compiler.kernels.rx1 import MAX_CHUNK, Blocks
from spa_compiler.placement import contests, timer, variants
from spa_compiler.placement.candidates import DENSE, SiteClass, Stored, classes
from spa_compiler.placement.choose import Choice, choose
from spa_compiler.placement.contests import Referee
from spa_compiler.placement.heads import Shapes
from spa_compiler.placement.measure import CLOSE, Timing
from spa_compiler.placement.nodes import Packer, insert
from spa_compiler.placement.records import Records
from spa_compiler.placement.regions import Group, single
from spa_compiler.placement.sites import find_sites, held
from spa_compiler.placement.sums import join_sums
from spa_compiler.placement.variants import Winner, cost, ranked, shipped, tiles, winners
from spa_compiler.runtime.link import link
from spa_compiler.runtime.region import LinearSpec
from tests.networks import model_of, weight
from tests.region_harness import MCPU

RNG = np.random.default_rng(0)
V4 = "x86-64-v4"
WON = Winner(
    isa=V4, layout="rows", form="unstructured", n=256, k=256, tokens=1, threads=1, share=0.1, chunk=32, k_block=0
)


def site_class(*tokens: int, n: int = 256, k: int = 256, density: float = 0.1) -> SiteClass:
    text = f"g (float[N,{k}] x) => (float[N,{n}] y) {{ y = MatMul(x, w) }}"
    sites = find_sites(model_of(text, w=weight(RNG, k, n, density)))[0]
    (found,) = classes(sites, [{"x": (t, k)} for t in tokens])
    found.stored = tuple(Stored(Blocks(rows), share) for rows, share in ((1, 0.1), (4, 0.2), (8, 0.4)))
    return found


@given(st.integers(1, 115).map(lambda sixths: 6 * sixths), st.integers(1, 3000), st.sampled_from([1, 2, 4, 6, 8, 16]))
def test_every_tile_can_be_run(n: int, k: int, rows: int) -> None:
    found = tiles(Stored(Blocks(rows), 0.5), n, k)
    assert bool(found) == (n >= variants.FEWEST_ROWS)
    assert len({s.name for s in found}) == len(found)
    for s in found:
        LinearSpec(n, k, s.form)  # refuses chunks that the C side cannot hold
        assert s.share == 0.5
        assert s.form.chunk is not None
        assert s.form.k_block is not None
        assert s.form.chunk <= min(MAX_CHUNK, n + 31)
        assert s.form.k_block <= k
    assert not found or max(s.form.k_block or 0 for s in found) == k


def test_few_tokens_want_long_blocks_and_many_want_short_ones() -> None:
    """Unstructured, 768 -> 3072 at 90 % zeros: measured, one token gains 1.3 to 1.4x from a single block of all of k."""
    found = tiles(Stored(Blocks(1), 0.1), 3072, 768)
    best = {t: min(found, key=lambda s: cost(s, 3072, 768, t, 1)).form.k_block for t in (1, 512)}
    assert best == {1: 768, 512: 128}


def test_more_threads_want_more_chunks() -> None:
    found = tiles(Stored(Blocks(4), 0.1), 512, 512)
    chunks = [min(found, key=lambda s: cost(s, 512, 512, 16, t)).form.chunk or 0 for t in (1, 8)]
    assert chunks[1] * 8 <= 512 < chunks[0] * 8


def test_forms_take_turns() -> None:
    each = site_class(128)
    names = [s.form.pattern for s in ranked(each, V4, 1, [])][:6]
    assert sorted(names[:3]) == ["block:4x1", "block:8x1", "unstructured"]
    assert names[3:] == names[:3]


@pytest.mark.parametrize(
    ("winner", "first"),
    [
        (WON, "unstructured in 32x256"),
        (msgspec.structs.replace(WON, chunk=128, k_block=64), "unstructured in 128x64"),
        (msgspec.structs.replace(WON, n=300, k=512, k_block=0), "unstructured in 32x256"),
        (msgspec.structs.replace(WON, n=300, k=512, k_block=256), "unstructured in 32x256"),
        (msgspec.structs.replace(WON, threads=2), "unstructured in 32x256"),
        (msgspec.structs.replace(WON, isa="x86-64-v3"), None),
        (msgspec.structs.replace(WON, form="block:2x1"), None),
        (msgspec.structs.replace(WON, layout="planes"), None),
        (msgspec.structs.replace(WON, tokens=512), None),
        (msgspec.structs.replace(WON, n=8192), None),
        (msgspec.structs.replace(WON, chunk=0, k_block=0), None),
    ],
)
def test_what_won_at_a_like_question_comes_first(winner: Winner, first: str | None) -> None:
    each = site_class(1)
    plain = [s.name for s in ranked(each, V4, 1, [])]
    names = [s.name for s in ranked(each, V4, 1, [[winner]])]
    mine = [name for name in names if name.startswith("unstructured")]
    usual = next(name for name in plain if name.startswith("unstructured"))
    assert usual not in ("unstructured in 32x256", "unstructured in 128x64")
    assert mine[0] == (first or usual)
    assert sorted(names) == sorted(plain)


def test_the_nearest_winner_and_the_first_source_count() -> None:
    each = site_class(1)
    far = msgspec.structs.replace(WON, n=128, chunk=256, k_block=64)
    other = msgspec.structs.replace(WON, chunk=128, k_block=64)

    def first(*known: Sequence[Winner]) -> str:
        return next(s.name for s in ranked(each, V4, 1, known) if s.name.startswith("unstructured"))

    assert first([far, WON]) == first([WON, far]) == "unstructured in 32x256"
    assert first([other], [WON]) == "unstructured in 128x64"
    assert first([], [WON]) == "unstructured in 32x256"


class Times:
    """Stands in for the clock; candidates by the speed over dense that the test says, all others 2.0."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, speeds: Mapping[str, float]) -> None:
        self.asked: list[list[str]] = []
        self._speeds = speeds
        monkeypatch.setattr(timer, "interleave", self)
        monkeypatch.setattr(contests, "link", lambda regions, levels, path: path.touch())
        monkeypatch.setattr(timer, "open_session", lambda *_, **__: self)

    def run(self, *_: object) -> None:
        """A session that computes nothing."""

    def __call__(self, calls: Mapping[str, Callable[[], object]], *_: object) -> dict[str, Timing]:
        self.asked.append([name for name in calls if name != DENSE])
        times = {name: 100.0 / (1.0 if name == DENSE else self._speeds.get(name, 2.0)) for name in calls}
        return {name: Timing(t, 0.9 * t, 1.1 * t, 7) for name, t in times.items()}


def decide(folder: Path, each: SiteClass, trials: int, records: str = "records.sqlite") -> Choice:
    work = folder / "work"
    work.mkdir(exist_ok=True)
    book = Records(folder / records, {"cpu": "this one", "isa": V4})
    referee = Referee(V4, 1, book, work, lambda *_: None, np.random.default_rng(0), trials=trials)
    choice = choose([each], referee)[0]
    book.close()
    return choice


BASE = ["unstructured", "block:4x1", "block:8x1"]


@pytest.mark.parametrize("trials", [0, 1, 6, 1000])
def test_so_many_tiles_are_tried(trials: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    times, each = Times(monkeypatch, {}), site_class(1)
    decide(tmp_path, each, trials)
    assert times.asked[0] == BASE
    assert len(times.asked) == (2 if trials else 1)
    for tried in times.asked[1:]:
        assert tried[:3] == BASE
        all_tiles = sum(len(tiles(s, 256, 256)) for s in each.stored)
        assert len(set(tried)) == len(tried) == 3 + min(trials, all_tiles)


def test_forms_far_behind_are_tried_in_no_other_tile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    times, each = Times(monkeypatch, {"block:4x1": 4.0, "unstructured": 3.2}), site_class(1, 128)
    choice = decide(tmp_path, each, 6)
    assert times.asked[:2] == [BASE, BASE]  # both shapes
    for tried in times.asked[2:]:
        assert tried[:2] == BASE[:2]
        assert len(tried) == 2 + 6
        assert {name.partition(" in ")[0] for name in tried} == set(BASE[:2])
    assert choice.form == Blocks(4)
    assert all("block:8x1" in timings for timings in choice.timings)  # timed once, and reported


@pytest.mark.parametrize(
    ("gain", "form"), [(2 * (1 + CLOSE) + 0.01, "tile"), (2 * (1 + CLOSE) - 0.01, "usual"), (1.5, "usual")]
)
def test_the_usual_tile_wins_ties(gain: float, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    each = site_class(1)
    first = ranked(each, V4, 1, [shipped()])[0]
    Times(monkeypatch, {first.name: gain, "block:8x1": 1.9})
    choice = decide(tmp_path, each, 6)
    assert choice.form is not None
    if form == "tile":
        assert (choice.form, choice.candidate) == (first.form, first.name)
        assert choice.reason == f"{gain:.2f}x over dense as {first.name}"
        assert choice.gain == pytest.approx(gain)
    else:
        assert choice.form in (Blocks(1), Blocks(4))
        assert choice.gain == pytest.approx(2.0)


def test_a_second_time_nothing_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though the first one's records now rank otherwise."""
    each = site_class(1, 16)
    last = ranked(each, V4, 1, [shipped()])[5]
    times = Times(monkeypatch, {last.name: 5.0})
    first = decide(tmp_path, each, 6)
    assert first.form == last.form
    assert len(times.asked) == 4  # two shapes in two turns
    again = decide(tmp_path, each, 6)
    assert len(times.asked) == 4
    assert (again.form, again.timings, again.reason) == (first.form, first.timings, first.reason)
    decide(tmp_path, each, 5)
    assert len(times.asked) == 8


def test_own_records_are_tried_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    each, other = site_class(1), site_class(1, n=320)
    best = next(s for s in reversed(ranked(each, V4, 1, [shipped()])) if s.form.pattern == "unstructured")
    times = Times(monkeypatch, {best.name: 5.0})
    decide(tmp_path, each, 1000)
    decide(tmp_path, other, 6)
    assert best.name in times.asked[3]
    decide(tmp_path, other, 6, records="empty.sqlite")
    assert best.name not in times.asked[5]


def test_another_shape_is_tried_in_the_same_tiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    times = Times(monkeypatch, {})
    decide(tmp_path, site_class(512), 6)
    decide(tmp_path, site_class(1, 512), 6)
    assert len(times.asked) == 4
    assert times.asked[2] == BASE
    assert sorted(times.asked[3]) == sorted(times.asked[1])


def test_winners_of_records() -> None:
    question = {"isa": f"{V4},x86-64-v3", "layout": "rows", "n": 64, "k": 256, "tokens": 16, "threads": 2}
    question |= {"stored": {"unstructured": 0.1, "block:4x1": 0.2, "block:8x1": 0.4}}
    times = {DENSE: 1, "unstructured": 9, "unstructured in 32x256": 5, "unstructured in 64x64": 7}
    times |= {"block:4x1": 3, "block:4x1 in 32x64": 4, "block:8x1": 2}
    timings = {name: Timing(us, us, us, 7) for name, us in times.items()}
    records = [
        (question, timings),
        ({"race": {}}, timings),
        ({"chain": [1]}, {}),
        (question | {"isa": "other"}, timings),
    ]
    found = winners(V4, records)
    assert [(w.form, w.chunk, w.k_block, w.share) for w in found] == [
        ("unstructured", 32, 0, 0.1),  # all of k
        ("block:4x1", 0, 0, 0.2),  # the usual tile; of 8x1 no others were tried
    ]
    assert {(w.isa, w.n, w.k, w.tokens, w.threads) for w in found} == {(V4, 64, 256, 16, 2)}


def test_what_ships_can_be_read_and_is_of_use() -> None:
    found = shipped()
    assert {w.isa for w in found} == {"x86-64-v3", V4}
    assert any(w.chunk for w in found)
    for w in found:
        each = site_class(w.tokens, n=w.n, k=w.k)
        site = each.sites[0]
        site.layout = w.layout
        name = f"{w.form} in {w.chunk}x{w.k_block or w.k}"
        if w.chunk and w.layout == "rows" and w.form in ("unstructured", "block:4x1"):
            names = [s.name for s in ranked(each, w.isa, w.threads, [[w]]) if s.name.startswith(w.form)]
            assert names[0] == name


@pytest.mark.parametrize("content", [b"", b"{}", b'[{"isa": 5}]'])
def test_a_damaged_package_says_so(content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / variants.SHIPPED).write_bytes(content)
    monkeypatch.setattr(variants.resources, "files", lambda package: tmp_path)
    shipped.cache_clear()
    try:
        with pytest.raises(EnvironmentFault, match="the package is damaged"):
            shipped()
        (tmp_path / variants.SHIPPED).unlink()
        with pytest.raises(EnvironmentFault, match="the package is damaged"):
            shipped()
    finally:
        shipped.cache_clear()


@pytest.mark.parametrize("tile", [(32, 64), (64, 256), (256, 100)])
def test_tiles_compute_the_same(tile: tuple[int, int], tmp_path: Path) -> None:
    w, b = weight(RNG, 256, 100, 0.1), RNG.standard_normal(100).astype(np.float32)
    model = model_of("g (float[N,256] x) => (float[N,100] y) { m = MatMul(x, w) y = Add(m, b) }", w=w, b=b)
    sites = find_sites(model)[0]
    assert _error(model, single(sites), {s.name: Blocks(4, *tile) for s in sites}, tmp_path) < 1e-5


@pytest.mark.parametrize(
    "forms",
    [
        (Blocks(4, 32, 256), Blocks(4)),
        (Blocks(4, 32, 64), Blocks(1, 32, 256)),
        (Blocks(1, 64, 64), Blocks(8, 128, 256)),
        (Blocks(6), Blocks(4)),
        (Blocks(16), Blocks(6, 48, 64)),
        (Blocks(2, 32), Blocks(6)),
    ],
)
def test_products_that_are_added_are_cut_alike(forms: tuple[Blocks, Blocks], tmp_path: Path) -> None:
    """Or both in the usual tiles, whatever each is fastest in by itself."""
    text = "g (float[N,256] x, float[N,256] z) => (float[N,150] y) { a = MatMul(x, w) b = MatMul(z, v) y = Add(a, b) }"
    model = model_of(text, w=weight(RNG, 256, 150, 0.1), v=weight(RNG, 256, 150, 0.1))
    known: Shapes = [dict.fromkeys(("x", "z"), (5, 256)) | dict.fromkeys("aby", (5, 150))]
    sums = join_sums(find_sites(model)[0], held(model.graph), known)
    assert len(sums) == 1
    assert _error(model, single(sums), dict(zip("ab", forms, strict=True)), tmp_path) < 1e-5


def _error(model: Model, groups: list[Group], forms: Mapping[str, Blocks], folder: Path) -> float:
    """Of the model with nodes of these forms, relative to its largest output."""
    feeds = {v.name: RNG.standard_normal((5, 256)).astype(np.float32) for v in model.graph.inputs}
    want = run(open_session(to_proto(model).SerializeToString()), feeds)["y"]
    specs = insert(model, groups, forms, Packer())
    link(specs, (MCPU,), folder / "kernels.so")
    got = run(open_session(to_proto(model).SerializeToString(), library=folder / "kernels.so"), feeds)["y"]
    return float(np.abs(got - want).max() / np.abs(want).max())
