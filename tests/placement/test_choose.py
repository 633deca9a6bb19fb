"""Times decide, dense wins ties; here they are made up, so that the decision alone is tested."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest

from spa_compiler.kernels.rx1 import Blocks
from spa_compiler.kernels.sliced import Slices
from spa_compiler.placement import contests, timer
from spa_compiler.placement.candidates import DENSE, LOW_RANK, SiteClass, chain_classes, classes, stored_forms
from spa_compiler.placement.chains import find_chains
from spa_compiler.placement.choose import ChainChoice, Choice, choose, choose_chains, explain
from spa_compiler.placement.contests import Referee
from spa_compiler.placement.measure import Timing
from spa_compiler.placement.records import Records
from spa_compiler.placement.regions import single
from spa_compiler.placement.sites import Site, find_sites, held
from spa_compiler.placement.trial import pick
from tests.networks import F32, model_of, weight

RNG = np.random.default_rng(0)
TEXT = "g (float[N,64] x) => (float[N,64] y) { h = MatMul(x, w) r = Relu(h) y = MatMul(r, v) }"


def sites_of(w: F32, v: F32 | None = None) -> list[Site]:
    return find_sites(model_of(TEXT, w=w, v=w if v is None else v))[0]


def classes_of(sites: list[Site], *tokens: int) -> list[SiteClass]:
    return classes(sites, [{s.source.name: (t, 64) for s in sites} for t in tokens or (16,)])


class Timed:
    """Stands in for `interleave`: `ratios` are over dense, which takes 100 us for all sites of a trial."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *ratios: Mapping[str, float]) -> None:
        self.asked: list[set[str]] = []
        self._ratios = ratios
        monkeypatch.setattr(timer, "interleave", self)
        monkeypatch.setattr(contests, "link", lambda regions, mcpu, path: path.touch())
        monkeypatch.setattr(timer, "open_session", lambda *_, **__: self)

    def run(self, names: None, feeds: dict[str, F32]) -> None:
        """A session that computes nothing."""

    def __call__(self, calls: Mapping[str, Callable[[], object]], *_: float) -> dict[str, Timing]:
        for call in calls.values():
            call()
        ratios = self._ratios[len(self.asked) % len(self._ratios)]
        self.asked.append(set(calls))
        times = {name: 100.0 / (1.0 if name == DENSE else ratios.get(name, 0.1)) for name in calls}
        return {name: Timing(t, 0.9 * t, 1.1 * t, 7) for name, t in times.items()}


def referee(book: Records, work: Path) -> Referee:
    return Referee("x86-64-v4", 1, book, work, lambda *_: None, np.random.default_rng(0))


def decide(folder: Path, found: list[SiteClass], records: str = "records.sqlite") -> list[Choice]:
    book = Records(folder / records, {"cpu": "this one"})
    work = folder / "work"
    work.mkdir(exist_ok=True)
    choices = choose(found, referee(book, work))
    assert list(work.iterdir()) == []
    return choices


def test_forms_that_leave_nothing_out_are_none() -> None:
    dense, block, scattered = weight(RNG, 64, 64), weight(RNG, 64, 64, 0.2), weight(RNG, 64, 64, 0.2, rows=1)
    assert stored_forms(sites_of(dense)[0]) == ()
    assert [s.name for s in stored_forms(sites_of(block)[0])] == [
        "unstructured",
        "block:4x1",
        "block:8x1",
        "unstructured interleaved",
    ]
    assert stored_forms(sites_of(block)[0])[1].share == pytest.approx(0.2, abs=0.05)
    assert [round(s.share, 1) for s in stored_forms(sites_of(scattered)[0])] == [0.2, 0.2]


def test_groups_are_tried_with_all_of_their_values_too() -> None:
    text = "g (float[1,8,6,6] x) => (float[1,8,6,6] y) { y = Conv <group = 2, pads = [1, 1, 1, 1]> (x, w) }"
    (site,) = find_sites(model_of(text, w=np.ones((8, 4, 3, 3), np.float32)))[0]
    found_forms = {s.name: s.share for s in stored_forms(site)}
    assert found_forms.items() >= {"unstructured": 1.0, "block:4x1": 1.0}.items()
    assert "block:8x1" not in found_forms, "those of two groups are one"
    (found,) = classes([site], [{"x": (1, 8, 6, 6)}])
    assert found.question((1, 8, 6, 6), 1)["groups"] == 2


def test_a_block_is_no_higher_than_the_weight() -> None:
    model = model_of("g (float[N,64] x) => (float[N,2] y) { y = MatMul(x, w) }", w=weight(RNG, 64, 2, 0.2, rows=1))
    assert [s.form.rows for s in stored_forms(find_sites(model)[0][0])] == [1]


def test_like_sites_are_one_class() -> None:
    w = weight(RNG, 64, 64, 0.2)
    text = "g (float[N,64] x) => (float[N,64] y) { a = MatMul(x, w) t = Tanh(a) b = MatMul(t, w) s = Tanh(b) c = MatMul(s, v) y = Relu(c) }"
    sites = find_sites(model_of(text, w=w, v=w))[0]
    found = classes(sites, [{s.source.name: (16, 64) for s in sites}])
    assert [[s.name for s in c.sites] for c in found] == [["a", "b"], ["c"]]


def test_a_bias_makes_another_class() -> None:
    w = weight(RNG, 64, 64, 0.2)
    text = "g (float[N,64] x) => (float[N,64] y) { a = MatMul(x, w) t = Tanh(a) c = MatMul(t, v) y = Add(c, b) }"
    sites = find_sites(model_of(text, w=w, v=w, b=np.ones(64, np.float32)))[0]
    found = classes(sites, [{s.source.name: (16, 64) for s in sites}])
    assert [[s.name for s in c.sites] for c in found] == [["a"], ["c"]]
    assert found[0].question((16, 64), 1) != found[1].question((16, 64), 1)


def test_times_are_of_one_site_of_those_that_are_timed_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Timed(monkeypatch, {"block:4x1": 2.0})
    w = weight(RNG, 64, 64, 0.2)
    sites = find_sites(model_of(TEXT.replace("Relu", "Tanh"), w=w, v=w))[0]
    (found,) = classes_of(sites)
    choices = decide(tmp_path, [found])
    assert len(choices) == 2
    times = choices[0].timings[0]
    assert {n: (t.p10_us, t.median_us, t.p90_us, t.runs) for n, t in times.items() if n in (DENSE, "block:4x1")} == {
        DENSE: (pytest.approx(45), pytest.approx(50), pytest.approx(55), 7),
        "block:4x1": (pytest.approx(22.5), pytest.approx(25), pytest.approx(27.5), 7),
    }


@pytest.mark.parametrize(("count", "size", "kept"), [(4, 64, 4), (9, 64, 6), (4, 3072, 2), (4, 6144, 1)])
def test_a_trial_holds_a_few_sites_of_bounded_size(count: int, size: int, kept: int) -> None:
    """Weights of 3072 x 3072 are 36 MiB, of 6144 x 6144 more than all that a trial may hold."""
    text = f"g (float[N,{size}] x) => (float[N,{size}] y) {{ y = MatMul(x, w) }}"
    (site,) = find_sites(model_of(text, w=np.broadcast_to(np.float32(1), (size, size))))[0]
    groups = single([site] * count)
    assert pick(groups) == groups[:kept]


def test_the_fastest_form_is_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timed = Timed(monkeypatch, {"unstructured": 1.5, "block:4x1": 4.0, "block:8x1": 2.0})
    choices = decide(tmp_path, classes_of(sites_of(weight(RNG, 64, 64, 0.2))))
    assert [c.form for c in choices] == [Blocks(4), Blocks(4)]
    assert choices[0].reason == "4.00x over dense as block:4x1"
    assert choices[0].tokens == (16,)
    assert timed.asked[0] == {DENSE, "unstructured", "unstructured interleaved", "block:4x1", "block:8x1"}
    assert choices[0].timings[0][DENSE].median_us == pytest.approx(100)


@pytest.mark.parametrize("ratio,form", [(0.5, None), (1.0, None), (1.03, None), (1.05, Blocks(4))])
def test_dense_wins_ties(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ratio: float, form: Blocks | None) -> None:
    Timed(monkeypatch, {"block:4x1": ratio})
    choices = decide(tmp_path, classes_of(sites_of(weight(RNG, 64, 64, 0.2))))
    assert {c.form for c in choices} == {form}
    if form is None:
        assert "dense is faster or as fast: block:4x1 reaches" in choices[0].reason
        assert "zeros in 4x1 blocks would gain" in choices[0].would_help


def test_shapes_are_weighed_by_their_geometric_mean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = classes_of(sites_of(weight(RNG, 64, 64, 0.2)), 1, 64)
    Timed(monkeypatch, {"block:4x1": 0.5, "block:8x1": 1.2}, {"block:4x1": 8.0, "block:8x1": 1.2})
    choice = decide(tmp_path, found)[0]
    assert (choice.form, choice.reason) == (Blocks(4), "2.00x over dense as block:4x1")
    assert choice.tokens == (1, 64)
    assert len(choice.timings) == 2


def test_without_zeros_nothing_is_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timed = Timed(monkeypatch, {})
    choices = decide(tmp_path, classes_of(sites_of(weight(RNG, 64, 64))))
    assert timed.asked == []
    assert {(c.form, c.reason) for c in choices} == {(None, "it has no zeros")}
    assert "sparsity=0.8,pattern=block:4x1,targets=h" in choices[0].would_help


def test_too_few_zeros_say_how_many_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Timed(monkeypatch, {})
    choices = decide(tmp_path, classes_of(sites_of(weight(RNG, 64, 64, 0.98, rows=1))))
    assert choices[0].form is None
    assert "its zeros (2%) leave no block out" in choices[0].reason


def test_a_second_run_times_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = classes_of(sites_of(weight(RNG, 64, 64, 0.2)))
    timed = Timed(monkeypatch, {"block:4x1": 2.0})
    first = decide(tmp_path, found)
    assert len(timed.asked) == len(found) == 2
    monkeypatch.setattr(contests, "link", lambda *_: pytest.fail("there is nothing to link"))
    again = decide(tmp_path, found)
    assert len(timed.asked) == 2
    assert [(c.form, c.reason, c.timings) for c in again] == [(c.form, c.reason, c.timings) for c in first]


def test_real_times(tmp_path: Path) -> None:
    """No decision is asked for here, only that real sessions run and give sensible times."""
    (choice, _) = decide(tmp_path, classes_of(sites_of(weight(RNG, 64, 64, 0.1))))
    assert all(0 < t.p10_us <= t.median_us <= t.p90_us < 1e6 for t in choice.timings[0].values())


LAYER = "g (float[N,64] x) => (float[N,48] y) { s = MatMul(x, w) z = MatMul(x, d) m = MatMul(z, u) a = Add(s, m) y = Relu(a) }"
PLAIN = "g (float[N,64] x) => (float[N,48] y) { z = MatMul(x, d) m = MatMul(z, u) y = Relu(m) }"
FACTORS = {"d": weight(RNG, 64, 8), "u": weight(RNG, 8, 48)}


def decide_layer(
    folder: Path, sparse: bool = True, *tokens: int, **factors: F32
) -> tuple[list[Choice], list[ChainChoice]]:
    """The choices of the sites by themselves, and of the layer."""
    weights = FACTORS | factors | ({"w": weight(RNG, 64, 48, 0.2)} if sparse else {})
    model = model_of(LAYER if sparse else PLAIN, **weights)
    known = [{t: (n, f) for t, f in (("x", 64), ("z", 8), ("s", 48), ("m", 48))} for n in tokens or (16,)]
    alone = decide(folder, classes(find_sites(model)[0], known))
    sites = find_sites(model)[0]
    chains = find_chains(sites, {s.name for s in sites if stored_forms(s)}, held(model.graph), known)
    work = folder / "work"
    book = Records(folder / "records.sqlite", {"cpu": "this one"})
    own = {c.site.name: c.form for c in alone if c.form is not None}
    found = choose_chains(chain_classes(chains, own, known), referee(book, work))
    assert list(work.iterdir()) == []
    return alone, found


def test_a_sparse_and_low_rank_layer_is_timed_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timed = Timed(monkeypatch, {"block:4x1": 2.0}, {"block:4x1 + low rank": 1.5, "block:8x1 + low rank": 1.2})
    alone, (layer,) = decide_layer(tmp_path)
    assert timed.asked[1] == {DENSE, *(f"{f.name} + low rank" for f in (Blocks(1), Blocks(4), Blocks(8), Slices()))}
    assert (layer.wins, layer.gain, layer.forms) == (True, pytest.approx(1.5), dict.fromkeys("szm", Blocks(4)))
    choices = {c.site.name: c for c in explain(alone, [layer], layer.forms)}
    assert {n: (c.kind, c.form, c.candidate) for n, c in choices.items()} == dict.fromkeys(
        ("s", "z", "m"), ("sparse + low rank", Blocks(4), "block:4x1 + low rank")
    )
    assert choices["m"].reason == "1.50x over dense as block:4x1 + low rank, z, s, m together"
    assert choices["m"].timings[0].keys() == timed.asked[1]
    assert choices["m"].tokens == (16,)


@pytest.mark.parametrize(("ratio", "wins"), [(0.9, False), (1.02, False), (1.05, True)])
def test_dense_factors_win_ties(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ratio: float, wins: bool) -> None:
    Timed(monkeypatch, {LOW_RANK: ratio})
    alone, (layer,) = decide_layer(tmp_path, False)
    assert layer.wins == wins
    choices = explain(alone, [layer], layer.forms if wins else {})
    assert {(c.kind, c.form) for c in choices} == {(LOW_RANK, Blocks(4)) if wins else (DENSE, None)}
    if not wins:
        assert {c.reason for c in choices} == {
            f"dense is faster or as fast: z, m together as low rank reach {ratio:.2f}x"
        }


def test_a_layer_that_gains_with_its_neighbours_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Timed(monkeypatch, {LOW_RANK: 0.9})
    alone, (layer,) = decide_layer(tmp_path, False)
    choices = explain(alone, [layer], layer.forms)
    assert {(c.kind, c.form) for c in choices} == {(LOW_RANK, Blocks(4))}
    assert all("0.90x over dense" in c.reason and "with its neighbours" in c.reason for c in choices)


def test_a_sparse_weight_keeps_its_own_form_where_the_layer_loses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Timed(monkeypatch, {"block:8x1": 2.0}, {"block:4x1 + low rank": 0.9})
    alone, chains = decide_layer(tmp_path)
    choices = {c.site.name: c for c in explain(alone, chains, {"s": Blocks(8)})}
    assert (choices["s"].kind, choices["s"].form, choices["s"].candidate) == ("sparse", Blocks(8), "block:8x1")
    assert (choices["z"].kind, choices["z"].form) == (DENSE, None)
    assert "z, s, m together as block:4x1 + low rank reach 0.90x" in choices["z"].reason


def test_factors_that_gain_by_themselves_are_no_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`down` has zeros and is a kernel by itself; the layer as one node loses, and is not in the plan that won."""
    Timed(monkeypatch, {"block:4x1": 2.0}, {LOW_RANK: 0.9})
    alone, chains = decide_layer(tmp_path, False, d=weight(RNG, 64, 8, 0.2))
    choices = {c.site.name: c for c in explain(alone, chains, {"z": Blocks(4)})}
    assert (choices["z"].kind, choices["z"].form, choices["z"].candidate) == ("sparse", Blocks(4), "block:4x1")
    assert choices["z"].reason == "2.00x over dense as block:4x1"
    assert (choices["m"].kind, choices["m"].form) == (DENSE, None)


def test_layers_are_timed_once_and_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timed = Timed(monkeypatch, {LOW_RANK: 2.0})
    _, first = decide_layer(tmp_path, False, 1, 64)
    assert len(timed.asked) == 2
    _, again = decide_layer(tmp_path, False, 1, 64)
    assert len(timed.asked) == 2
    assert again[0].timings == first[0].timings


def test_real_times_of_a_layer(tmp_path: Path) -> None:
    _, (layer,) = decide_layer(tmp_path)
    assert all(0 < t.p10_us <= t.median_us <= t.p90_us < 1e6 for t in layer.timings[0].values())
