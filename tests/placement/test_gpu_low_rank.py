"""placement/gpu_low_rank.py: two products as one node, where there are few tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest

from spa_compiler.artifact import verify_gpu
from spa_compiler.errors import SpaError
from spa_compiler.graph import shapes
from spa_compiler.graph.model import Model
from spa_compiler.graph.operators import weighted_ops
from spa_compiler.graph.precision import convert
from spa_compiler.graph.rounding import outputs
from spa_compiler.graph.session import Feeds
from spa_compiler.kernels.cuda.form import DTYPES, Dtype
from spa_compiler.kernels.cuda.lowrank import LowRank
from spa_compiler.passes.chains import Beside, write
from spa_compiler.placement import gpu_choose, gpu_low_rank
from spa_compiler.placement.candidates import DENSE
from spa_compiler.placement.gpu_check import expanded
from spa_compiler.placement.gpu_choose import GpuChoice
from spa_compiler.placement.gpu_low_rank import candidate
from spa_compiler.placement.gpu_sites import Pair, find_gpu_sites, find_pairs
from spa_compiler.placement.place import PORTABLE, SINGLE, SOURCE
from spa_compiler.placement.sites import held
from spa_compiler.solvers.svd import Factors
from spa_compiler.targets.cuda import architecture
from tests.networks import model_of, network, weight
from tests.placement.gpu_forms import Rows
from tests.placement.gpu_placing import WIDTH, Clock, chosen, placed

SM90 = architecture("sm_90")
RNG = np.random.default_rng(0)
N, K, RANK = 72, 64, 20

LAYER = """layer (float["b",3,64] x, float["b",3,72] other) => (float["b",3,72] y) {
    z = MatMul(x, v)  m = MatMul(z, u)  a = Add(m, b)  r = Add(other, a)  y = Relu(r) }"""
SQUEEZE = """squeeze (float["b",64,"h","w"] x) => (float["b",72,1,1] y) {
    p = GlobalAveragePool(x)  z = Conv(p, v)  m = Conv(z, u, b)  y = Sigmoid(m) }"""
BESIDE = """beside (float["b",3,64] x) => (float["b",3,72] y) {
    s = MatMul(x, w)  z = MatMul(x, v)  m = MatMul(z, u)  t = Add(s, m)  a = Add(t, b)  y = Relu(a) }"""


def factors(rank: int = RANK, planes: bool = False) -> dict[str, np.ndarray]:
    v, u, b = weight(RNG, K, rank), weight(RNG, rank, N), RNG.standard_normal(N).astype(np.float32)
    return {"v": v.T[:, :, None, None], "u": u.T[:, :, None, None], "b": b} if planes else {"v": v, "u": u, "b": b}


def layer(rank: int = RANK) -> tuple[Model, Feeds]:
    feed = {n: RNG.standard_normal((2, 3, size), np.float32) for n, size in (("x", K), ("other", N))}
    return model_of(LAYER, **factors(rank)), feed


def squeeze() -> tuple[Model, Feeds]:
    return model_of(SQUEEZE, **factors(planes=True)), {"x": RNG.standard_normal((3, K, 4, 5), np.float32)}


def pairs_of(model: Model, feed: Feeds) -> list[Pair]:
    sites, _ = find_gpu_sites(model, {}, shapes.fixed_at(model, [feed]))
    return find_pairs(sites, held(model.graph))


def ours(model: Model) -> list[str]:
    return [node.name for node in model.graph.nodes if node.domain == "ai.spa"]


# ---- pairs ----


def test_two_products_with_nothing_in_between_are_a_layer() -> None:
    for model, feed in (layer(), squeeze()):
        (pair,) = pairs_of(model, feed)
        assert (pair.down.name, pair.up.name, pair.rank, pair.n, pair.k) == ("z", "m", RANK, N, K)


@pytest.mark.parametrize(
    "was, now",
    [
        ("y = Relu(r)", "q = Relu(r)  y = Add(q, m)"),  # the second product is read twice: still one layer
        ("m = MatMul(z, u)", "m = MatMul(z, u)  o = Abs(z)  p = MatMul(o, u)"),  # so is what is between
        ("m = MatMul(z, u)", "h = Relu(z)  m = MatMul(h, u)"),
        ("m = MatMul(z, u)", "h = Add(z, c)  m = MatMul(h, u)"),
        ("z = MatMul(x, v)", "z = Gemm(x, v, c)"),
        ("=> (float", '=> (float["b",3,20] z, float'),
    ],
)
def test_what_is_read_or_changed_in_between_is_none(was: str, now: str) -> None:
    text = LAYER.replace(was, now)
    if "Gemm" in now:
        text = text.replace('["b",3,', '["b",')
    if "p = " in now:
        text = text.replace("r = Add(other, a)", "i = Add(a, p)  r = Add(other, i)")
    weights = factors() | ({"c": np.ones(RANK, np.float32)} if ", c)" in text else {})
    feed = {
        n: np.ones((2, size) if "Gemm" in now else (2, 3, size), np.float32) for n, size in (("x", K), ("other", N))
    }
    assert len(pairs_of(model_of(text, **weights), feed)) == ("q = " in now)


def test_factors_that_save_no_work_are_none() -> None:
    assert pairs_of(*layer(33))
    assert not pairs_of(*layer(34))  # 34 x (72 + 64) > 72 x 64


def test_ranks_tokens_and_images_that_have_no_kernel_are_no_candidates() -> None:
    def there(model: Model, feed: Feeds, tokens: Sequence[int]) -> bool:
        (pair,) = pairs_of(model, feed)
        return candidate(pair, [SM90], "fp16", [(t, 1) for t in tokens]) is not None

    wide = {"v": weight(RNG, 512, 65), "u": weight(RNG, 65, 512)}
    text = 'wide (float["b",512] x) => (float["b",512] y) { z = MatMul(x, v)  y = MatMul(z, u) }'
    feed = {"x": np.ones((2, 512), np.float32)}
    assert not there(model_of(text, **wide), feed, [2])
    assert there(model_of(text, v=wide["v"][:, :64], u=wide["u"][:64]), feed, [2])
    assert there(*layer(), [1, 16])
    assert not there(*layer(), [1, 17])
    image = SQUEEZE.replace("GlobalAveragePool", "Relu").replace("1,1]", '"h","w"]')
    assert not there(model_of(image, **factors(planes=True)), squeeze()[1], [1])


# ---- nodes ----


def test_a_layer_becomes_one_node_with_both_factors() -> None:
    own, choices = chosen(*layer())
    (node,) = (n for n in own.graph.nodes if n.domain == "ai.spa")
    assert {n.op for n in own.graph.nodes} == {node.op, "Cast"}
    assert (node.name, node.attrs) == ("ai.spa/m", {"site": "z+m", "n": N, "k": K})
    assert [t.name for t in node.inputs] == ["x_fp16", "other_fp16", "y.v", "y.u", "y.bias"]
    told = own.metadata.props_of(node)
    assert (told["spa.source"], told["spa.form"], told["spa.density"]) == ("z+m", "low rank 32", "1.0000, 1.0000")
    first, second = choices
    assert [(c.site.name, c.kind, c.candidate, c.arrays is None) for c in choices] == [
        ("z", "low rank", "low rank 32", True),
        ("m", "low rank", "low rank 32", False),
    ]
    assert first.reason == second.reason
    assert first.reason.startswith("not measured: by the model z, m together as low rank 32 take 3.")
    assert second.form is not None
    assert second.form.pattern == DENSE
    assert [most for most, _ in second.form.variants] == [8, None]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("make", [layer, squeeze])
def test_nodes_compute_what_they_replace(make: object, dtype: Dtype) -> None:
    model, feed = layer() if make is layer else squeeze()
    own, choices = chosen(model, feed, dtype)
    # bfloat16 has no kernel for this opset's convolutions
    assert ours(own) == ([] if dtype == "bf16" and make is squeeze else ["ai.spa/m"])
    (want,) = outputs(convert(model, None if dtype == "fp32" else dtype).model, [feed])
    (got,) = outputs(expanded(own, choices), [feed])
    error = np.abs(got["y"] - want["y"]).max() / np.abs(want["y"]).max()
    assert error <= {"fp32": 1e-6, "fp16": 2e-3, "bf16": 2e-2}[dtype]
    for choice in choices:
        gpu_choose.check_packed(choice)


@pytest.mark.parametrize("name", ["u", "v"])
def test_a_factor_that_is_packed_wrong_is_seen(name: str) -> None:
    _, (_, choice) = chosen(*layer())
    assert choice.arrays is not None
    choice.arrays[name][0, 0, 0] ^= 0x8000
    with pytest.raises(SpaError, match="low rank 32 does not hold the weight of m"):
        gpu_choose.check_packed(choice)


def test_a_rank_that_is_padded_with_something_is_seen() -> None:
    _, (_, choice) = chosen(*layer())
    assert choice.arrays is not None
    assert choice.pair is not None
    u, v = choice.pair.up.weight, choice.pair.down.weight
    more = LowRank(32).pack_factors(np.pad(u, ((0, 0), (0, 1))), np.pad(v, ((0, 1), (0, 0)), constant_values=1), "fp16")
    choice.arrays.update(more)
    with pytest.raises(SpaError, match="does not hold"):
        gpu_choose.check_packed(choice)


# ---- choosing ----


def test_one_node_must_beat_two_by_the_margin(monkeypatch: pytest.MonkeyPatch) -> None:
    own, choices = chosen(*layer())
    assert ours(own)
    assert choices[0].gain == choices[1].gain > gpu_choose.MARGIN
    monkeypatch.setattr(gpu_low_rank, "MARGIN", choices[0].gain * 1.01)
    own, choices = chosen(*layer())
    assert not ours(own)
    assert all("is asked for" in c.reason and c.form is None and c.pair is None for c in choices)


@pytest.mark.parametrize(
    "n, k, rank, tokens, faster",
    [(768, 768, 32, 1, True), (768, 768, 64, 1, False), (512, 512, 32, 16, True), (256, 4096, 64, 1, False)],
)
def test_small_factors_gain(n: int, k: int, rank: int, tokens: int, faster: bool) -> None:
    text = f'g (float["b",{k}] x) => (float["b",{n}] y) {{ z = MatMul(x, v)  y = MatMul(z, u) }}'
    model = model_of(text, v=weight(RNG, k, rank), u=weight(RNG, rank, n))
    own, _ = chosen(model, {"x": np.ones((tokens, k), np.float32)})
    assert (ours(own) == ["ai.spa/y"]) == faster


@pytest.mark.parametrize("us, nodes", [(0.1, ["ai.spa/z", "ai.spa/m"]), (2.5, ["ai.spa/m"])])
def test_products_that_have_forms_of_their_own_are_compared(
    monkeypatch: pytest.MonkeyPatch, us: float, nodes: list[str]
) -> None:
    monkeypatch.setattr(gpu_choose, "FORMS", (Rows(us=us),))
    weights = factors() | {"v": weight(RNG, K, RANK, 0.3), "u": weight(RNG, RANK, N, 0.3)}
    own, choices = chosen(model_of(LAYER, **weights), layer()[1])
    assert sorted(ours(own)) == sorted(nodes)
    assert all(f", by themselves {2 * us:.1f} us: " in c.reason for c in choices)
    assert {c.kind for c in choices} == {"sparse" if len(nodes) == 2 else "low rank"}


def test_without_a_kernel_both_are_what_they_were_by_themselves() -> None:
    model, _ = layer()
    own, choices = chosen(model, {n: np.ones((1, 17, size), np.float32) for n, size in (("x", K), ("other", N))})
    assert not ours(own)
    assert [c.reason for c in choices] == ["not measured: it has no zeros"] * 2


# ---- sparse + low rank ----


@pytest.mark.parametrize("swapped", [False, True])
def test_a_sparse_weight_beside_a_layer_adds_it_up(monkeypatch: pytest.MonkeyPatch, swapped: bool) -> None:
    monkeypatch.setattr(gpu_choose, "FORMS", (Rows(),))
    text = BESIDE.replace("s = MatMul(x, w)  ", "").replace("t = Add(s, m)", "s = MatMul(x, w)  t = Add(m, s)")
    model = model_of(text if swapped else BESIDE, **factors(), w=weight(RNG, K, N, 0.3))
    feed = {"x": RNG.standard_normal((2, 3, K), np.float32)}
    own, choices = chosen(model, feed)
    assert {c.site.name: (c.kind, c.site.residual is not None) for c in choices} == {
        "s": ("sparse", True),
        "z": ("low rank", False),
        "m": ("low rank", False),
    }
    nodes = {node.name: node for node in own.graph.nodes}
    assert set(ours(own)) == {"ai.spa/s", "ai.spa/m"}
    assert nodes["ai.spa/s"].inputs[1] is nodes["ai.spa/m"].outputs[0]
    assert not {"MatMul", "Add", "Relu"} & {node.op for node in own.graph.nodes}
    (want,), (got,) = outputs(convert(model, "fp16").model, [feed]), outputs(expanded(own, choices), [feed])
    assert np.abs(got["y"] - want["y"]).max() <= 2e-3 * np.abs(want["y"]).max()


@pytest.mark.parametrize("swapped", [False, True])
def test_beside_a_sparse_weight_that_stays_dense_the_layer_takes_the_sum(
    monkeypatch: pytest.MonkeyPatch, swapped: bool
) -> None:
    monkeypatch.setattr(gpu_choose, "FORMS", (Rows(us=100.0),))
    text = BESIDE.replace("Add(s, m)", "Add(m, s)") if swapped else BESIDE
    model = model_of(text, **factors(), w=weight(RNG, K, N, 0.3))
    feed = {"x": RNG.standard_normal((2, 3, K), np.float32)}
    own, choices = chosen(model, feed)
    assert {c.site.name: c.kind for c in choices} == {"s": "dense", "z": "low rank", "m": "low rank"}
    (pair,) = {c.pair for c in choices if c.pair is not None}
    assert (pair.up.act, pair.up.output.name) == ("relu", "y")
    (node,) = (node for node in own.graph.nodes if node.domain == "ai.spa")
    assert node.inputs[1].inputs[0].name == "s"
    assert sorted(n.op for n in own.graph.nodes if n.domain != "ai.spa" and n.op != "Cast") == ["MatMul"]
    (want,), (got,) = outputs(convert(model, "fp16").model, [feed]), outputs(expanded(own, choices), [feed])
    assert np.abs(got["y"] - want["y"]).max() <= 2e-3 * np.abs(want["y"]).max()
    for choice in choices:
        gpu_choose.check_packed(choice)


def test_a_dense_sum_of_what_is_no_node_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_choose, "FORMS", (Rows(us=100.0),))
    model = model_of(BESIDE, **factors(), w=weight(RNG, K, N, 0.3))
    own, choices = chosen(model, {"x": np.ones((6, 3, K), np.float32)})  # too many tokens for one node
    assert not ours(own)
    assert [c.site.name for c in choices if c.site.residual is not None] == ["s"]


@pytest.mark.parametrize("text", ["y = Gemm(x, w, b)", "a = MatMul(x, w)  y = Add(a, b)"])
def test_what_factorize_writes_is_two_nodes(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(gpu_choose, "FORMS", (Rows(),))
    whole = f'whole (float["b",64] x) => (float["b",72] y) {{ {text} }}'
    model = model_of(whole, w=weight(RNG, K, N), b=np.ones(N, np.float32))
    (op,) = weighted_ops(model.graph)
    found = factors()
    form = Beside(weight(RNG, K, N, 0.3).T.astype(np.float64), Factors(found["u"].T, found["v"].T))
    write(model, [op], [form])
    shapes.infer(model)
    own, choices = chosen(model, {"x": np.ones((2, K), np.float32)})
    assert sorted(c.kind for c in choices) == ["low rank", "low rank", "sparse"]
    assert len(ours(own)) == 2
    assert {node.op for node in own.graph.nodes if node.domain != "ai.spa"} == {"Cast"}


def test_of_two_full_weights_the_first_takes_the_sum() -> None:
    text = 'two (float["b",64] x) => (float["b",72] y) { s = MatMul(x, w)  m = MatMul(x, v)  y = Add(s, m) }'
    model = model_of(text, w=weight(RNG, K, N), v=weight(RNG, K, N))
    sites, _ = find_gpu_sites(model, {}, shapes.fixed_at(model, [{"x": np.ones((2, K), np.float32)}]))
    assert [site.residual is not None for site in sites] == [True, False]


# ---- whole models ----


def proto(density: float = 1.0) -> onnx.ModelProto:
    text = 'm (float["b","t",64] x) => (float["b","t",64] y) { z = MatMul(x, v)  m = MatMul(z, u)  y = Relu(m) }'
    return network(text, v=weight(RNG, WIDTH, RANK, density), u=weight(RNG, RANK, WIDTH))


def test_without_a_gpu_a_layer_is_placed_and_checked(tmp_path: Path) -> None:
    result = placed(tmp_path, proto())
    assert (result.plan.name, result.gaining) == (SINGLE, ["z", "m"])
    assert result.plan.nodes == {"z": "ai.spa/m", "m": "ai.spa/m"}
    (operator,) = result.plan.operators
    assert [v.kernel.name for v in operator.variants] == [f"spa_low_rank_fp16_32_{t}_relu" for t in (8, 16)]
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "model.onnx").write_bytes(result.plan.file.read_bytes())
    (folder / "portable.onnx").write_bytes((result.plan.folder.parent / "portable" / "model.onnx").read_bytes())
    choices = [c for c in result.choices if isinstance(c, GpuChoice)]
    checks = verify_gpu.compare(folder, choices, "fp16", [{"x": RNG.standard_normal((2, 3, WIDTH), np.float32)}])
    assert all(check.passed for check in checks)


@pytest.mark.parametrize("one, apart, nodes", [(3.0, 4.0, {"ai.spa/m"}), (4.0, 3.0, {"ai.spa/z"})])
def test_with_a_gpu_a_layer_is_timed_in_one_and_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one: float, apart: float, nodes: set[str]
) -> None:
    monkeypatch.setattr(gpu_choose, "FORMS", (Rows(),))
    model = proto(0.3)
    clock = Clock(9.0, 3.0, {"low rank 32": one, "apart": apart})
    result = placed(tmp_path, model, clock)
    # of the full factor there is nothing to time by itself
    assert clock.asked == [
        [DENSE, "unstructured rows"],
        [DENSE, "low rank 32", "apart"],
        [SOURCE, PORTABLE, SINGLE],
    ]
    assert set(result.plan.nodes.values()) == nodes
    told = (
        "3.00x over dense as low rank 32, z, m together" if one < apart else "z, m together as low rank 32 reach 2.25x"
    )
    assert told in result.choices[1].reason
    again = placed(tmp_path, model, clock)
    assert clock.asked[3:] == [[SOURCE, PORTABLE, SINGLE]]  # layers are in the records
    assert again.gaining == result.gaining


def test_with_a_gpu_two_dense_products_stay_where_they_are_as_fast(tmp_path: Path) -> None:
    result = placed(tmp_path, proto(), Clock(9.0, 9.0))
    assert result.plan.name == PORTABLE
    assert all("dense is faster or as fast: z, m together as low rank 32" in c.reason for c in result.choices)
