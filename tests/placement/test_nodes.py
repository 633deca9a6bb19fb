"""Groups become `ai.spa` nodes that compute the same: stated as text, and run through ONNX Runtime."""

from __future__ import annotations

import functools
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx.printer
import pytest

from spa_compiler.graph import shapes as graph_shapes
from spa_compiler.graph.load import load
from spa_compiler.graph.model import Model
from spa_compiler.graph.save import to_proto
from spa_compiler.graph.session import Feeds, open_session, run
from spa_compiler.kernels import rx1
from spa_compiler.placement.attention import find_attention
from spa_compiler.placement.between import find_between
from spa_compiler.placement.depthwise import find_depthwise
from spa_compiler.placement.nodes import DOMAIN, Packer, insert
from spa_compiler.placement.norms import find_norms
from spa_compiler.placement.regions import join, single
from spa_compiler.placement.sites import find_sites
from spa_compiler.runtime.link import link
from spa_compiler.runtime.region import RegionSpec
from tests.networks import F32, network, weight
from tests.region_harness import MCPU

RNG = np.random.default_rng(1)


def sparse(k: int, n: int, rows: int = 4) -> F32:
    return weight(RNG, k, n, 0.3, rows)


def vector(n: int) -> F32:
    return RNG.standard_normal(n).astype(np.float32)


def pointwise(n: int, k: int) -> F32:
    return np.ascontiguousarray(sparse(k, n).T).reshape(n, k, 1, 1)


def rms(x: str, number: str) -> str:
    q, m, e, r, d = (f"{name}{number}" for name in "qmerd")
    return f"""{q} = Pow({x}, {{2.0}}) {m} = ReduceMean <axes = [-1]> ({q}) {e} = Add({m}, {{1e-6}}) {r} = Sqrt({e})
               {d} = Div({x}, {r}) n{number} = Mul({d}, gamma)"""


GELU = "d = Div(a, {1.4142135381698608}) e = Erf(d) f = Add(e, {1.0}) t = Mul(a, f) h = Mul(t, {0.5})"

CASES: dict[str, onnx.ModelProto] = {
    "mlp": network(
        'g (float["b","s",32] x) => (float["b","s",20] y) { a = MatMul(x, w) c = Add(a, p) h = Relu(c) '
        "m = MatMul(h, v) y = Add(q, m) }",
        w=sparse(32, 48),
        p=vector(48),
        v=sparse(48, 20),
        q=vector(20),
    ),
    "residual and norm": network(
        f"""g (float["b","s",32] x) => (float["b","s",32] y) {{
          l = MatMul(x, w) a = Add(l, p) {GELU} m = MatMul(h, v) o = Add(m, q) r = Add(o, x)
          y = LayerNormalization <epsilon = 0.001> (r, gamma, beta) }}""",
        w=sparse(32, 64),
        p=vector(64),
        v=sparse(64, 32),
        q=vector(32),
        gamma=vector(32),
        beta=vector(32),
    ),
    "norms between, a residual across": network(
        """g (float["b","s",24] x) => (float["b","s",24] y, float["b","s",24] n) {
          m = MatMul(x, w) r = Add(x, m) n = LayerNormalization(r, gamma, beta) k = MatMul(n, v) c = Clip(k, {-1}, {1})
          o = MatMul(c, u) y = Add(o, n) }""",
        w=sparse(24, 24),
        v=sparse(24, 40),
        u=sparse(40, 24),
        gamma=vector(24),
        beta=vector(24),
    ),
    "a block with RMS norms and gates": network(
        f"""g (float["b","s",24] x) => (float["b","s",24] y) {{
          {rms("x", "1")} g0 = MatMul(n1, w) s = Sigmoid(g0) g = Mul(g0, s) u = MatMul(n1, v) h = Mul(g, u)
          k = MatMul(h, d) z = Add(x, k) {rms("z", "2")} o = MatMul(n2, e) y = Add(o, z) }}""",
        '<ir_version: 8, opset_import: ["" : 17]>\n',
        w=sparse(24, 70),
        v=sparse(24, 70, 1),
        d=sparse(70, 24),
        e=sparse(24, 24),
        gamma=vector(24),
    ),
    "siblings": network(
        """g (float["b","s",32] x) => (float["b","s",32] q, float["b","s",32] k, float["b","s",32] v) {
          q0 = MatMul(x, wq) q = Add(q0, bq) k = MatMul(x, wk) v = MatMul(x, wv) }""",
        wq=sparse(32, 32),
        bq=vector(32),
        wk=sparse(32, 32, 8),
        wv=sparse(32, 32, 1),
    ),
    "gemm": network(
        """g (float["b",33] x) => (float["b",10] y) { h0 = Gemm <transB = 1> (x, w, p) h = Relu(h0) y = Gemm(h, v, q) }""",
        w=np.ascontiguousarray(sparse(33, 17).T),
        p=vector(17),
        v=sparse(17, 10),
        q=vector(10),
    ),
    "a vector": network(
        "g (float[32] x) => (float[16] y) { m = MatMul(x, w) y = Add(m, p) }", w=sparse(32, 16), p=vector(16)
    ),
    "convolutions": network(
        """g (float["b",16,"h","v"] x) => (float["b",16,"h","v"] y) {
          a = Conv(x, w, p) r = Clip(a, {0}, {6}) c = Conv(r, v) y = Add(c, x) }""",
        w=pointwise(40, 16),
        p=vector(40),
        v=pointwise(16, 40),
    ),
    "a shortcut": network(
        """g (float["b",16,"h","v"] x) => (float["b",24,"h","v"] y) {
          a = Conv(x, w, p) r = Relu(a) c = Conv(r, v) s = Conv(x, u, q) t = Add(c, s) y = Relu(t) }""",
        w=pointwise(40, 16),
        p=vector(40),
        v=pointwise(24, 40),
        u=pointwise(24, 16),
        q=vector(24),
    ),
    "an activation behind a residual": network(
        """g (float["b",16,"h","v"] x) => (float["b",16,"h","v"] y) {
          a = Conv(x, w, p) r = Relu(a) c = Conv(r, v) t = Add(x, c) s = Relu(t) d = Conv(s, u) y = Add(d, s) }""",
        w=pointwise(40, 16),
        p=vector(40),
        v=pointwise(16, 40),
        u=pointwise(16, 16),
    ),
    "windows": network(
        """g (float["b",8,"h","v"] x) => (float["b",24,"i","j"] y) {
          a = Conv <pads = [1, 1, 1, 1]> (x, w, p) r = Relu(a)
          c = Conv <strides = [2, 2], pads = [1, 1, 1, 1]> (r, v) s = Conv <strides = [2, 2]> (x, u, q)
          t = Add(c, s) m = Relu(t) y = Conv(m, z) }""",
        w=sparse(72, 16).T.reshape(16, 8, 3, 3),
        p=vector(16),
        v=sparse(144, 24).T.reshape(24, 16, 3, 3),
        u=pointwise(24, 8),
        q=vector(24),
        z=pointwise(24, 24),
    ),
    "a window on a signal": network(
        """g (float["b",16,"t"] x) => (float["b",8,"u"] y) {
          a = Conv <strides = [3], pads = [2, 2], dilations = [2]> (x, w, p) y = Sigmoid(a) }""",
        w=sparse(48, 8).T.reshape(8, 16, 3),
        p=vector(8),
    ),
    "signal": network(
        'g (float["b",16,"t"] x) => (float["b",8,"t"] y) { a = Conv(x, w, p) y = Relu(a) }',
        w=pointwise(8, 16)[..., 0],
        p=vector(8),
    ),
    "a site within other ops": network(
        'g (float["b","s",32] x) => (float["b","s",32] y) { t = Tanh(x) m = MatMul(t, w) z = Softmax(m) y = Mul(z, t) }',
        w=sparse(32, 32),
    ),
    "a weight of zeros": network(
        'g (float["b","s",16] x) => (float["b","s",16] y) { m = MatMul(x, w) y = Add(m, p) }',
        w=np.zeros((16, 16), np.float32),
        p=vector(16),
    ),
}


CASES |= {
    "inverted residual": network(
        """g (float["b",16,"s","h"] x) => (float["b",24,"u","v"] y) {
          a = Conv(x, w, p) r = Clip(a, zero, six)
          d = Conv <group = 32, pads = [1, 1, 1, 1]> (r, e, p) c = Clip(d, zero, six) m = Conv(c, v) o = Add(m, x)
          n = Conv(o, u) f = Conv <group = 32, strides = [2, 2], pads = [1, 1, 1, 1]> (n, e, p) y = Conv(f, t) }""",
        w=pointwise(32, 16),
        p=vector(32),
        zero=np.float32(0),
        six=np.float32(2),
        e=vector(32 * 9).reshape(32, 1, 3, 3),
        v=pointwise(16, 32),
        u=pointwise(32, 16),
        t=pointwise(24, 32),
    ),
    "bottleneck": network(
        """g (float["b",16,"s","h"] x) => (float["b",32,"u","v"] y, float["b",8,"s","h"] z) {
          a = Conv(x, w) z = Relu(a) c = Conv <pads = [1, 1, 1, 1], strides = [2, 2]> (z, e) d = Relu(c)
          m = Conv(d, v, p) i = Conv <strides = [2, 2]> (x, u) o = Add(i, m) y = Relu(o) }""",
        w=pointwise(8, 16),
        e=np.ascontiguousarray(sparse(8 * 9, 8).T).reshape(8, 8, 3, 3),
        v=pointwise(32, 8),
        p=vector(32),
        u=pointwise(32, 16),
    ),
}


CASES |= {
    "split, put together, pooled": network(
        """g (float["b",16,"s","h"] x) => (float["b",24,"s","h"] y, float["b",8,"s","h"] l) {
          a = Conv(x, w, p) s = Sigmoid(a) m = Mul(a, s) l, k = Split <axis = 1, num_outputs = 2> (m)
          c = Conv <pads = [1, 1, 1, 1]> (k, e) t = Sigmoid(c) o = Mul(c, t) q = Add(k, o) z = Concat <axis = 1> (l, k, q)
          d = Conv(z, v) f = HardSwish(d) i = MaxPool <kernel_shape = [5, 5], pads = [2, 2, 2, 2]> (f)
          j = MaxPool <kernel_shape = [5, 5], pads = [2, 2, 2, 2]> (i) u = Concat <axis = 1> (f, i, j) y = Conv(u, n) }""",
        w=pointwise(16, 16),
        p=vector(16),
        e=np.ascontiguousarray(sparse(8 * 9, 8).T).reshape(8, 8, 3, 3),
        v=pointwise(8, 24),
        n=pointwise(24, 24),
    ),
    "squeeze and excitation": network(
        """g (float["b",16,"s","h"] x) => (float["b",16,"s","h"] y, float["b",16,1,1] z) {
          a = Conv(x, w, p) r = HardSwish(a) m = GlobalAveragePool(r) c = Conv(m, v) d = Relu(c) e = Conv(d, u)
          g = HardSigmoid <alpha = 0.16666667> (e) k = Mul(g, r) y = Conv(k, t) f = BatchNormalization(y, q, o, o, n)
          i = LeakyRelu <alpha = 0.1> (f) z = ReduceMean <keepdims = 1> (i, axes) }""",
        w=pointwise(24, 16),
        p=vector(24),
        v=pointwise(8, 24),
        u=pointwise(24, 8),
        t=pointwise(16, 24),
        q=vector(16),
        o=vector(16),
        n=np.abs(vector(16)) + np.float32(0.5),
        axes=np.array([2, -1], np.int64),
    ),
    "up": network(
        """g (float["b",16,"s","h"] x) => (float["b",16,"u","v"] y, float["b",8,"u","v"] z) {
          a = Conv(x, w) r = Relu(a) c = ConvTranspose <strides = [2, 2]> (r, e, p) d = Relu(c)
          f = ConvTranspose <strides = [2, 2]> (x, i) k = Concat <axis = 1> (d, f)
          l = ConvTranspose <pads = [1, 1, 1, 1]> (k, o) y = Relu(l) z = Add(d, f) }""",
        w=pointwise(16, 16),
        e=np.ascontiguousarray(sparse(8 * 4, 16).T).reshape(16, 8, 2, 2),
        p=vector(8),
        i=np.ascontiguousarray(sparse(8 * 4, 16).T).reshape(16, 8, 2, 2),
        o=np.ascontiguousarray(sparse(16 * 9, 16).T).reshape(16, 16, 3, 3),
    ),
    "groups": network(
        """g (float["b",16,"s","h"] x) => (float["b",16,"u","v"] y) {
          a = Conv(x, w) r = Relu(a) c = Conv <group = 4, strides = [2, 2], pads = [1, 1, 1, 1]> (r, e) d = Relu(c)
          f = Conv <group = 2> (d, u) i = Conv <strides = [2, 2]> (x, w) o = Add(i, f) y = Relu(o) }""",
        w=pointwise(16, 16),
        e=np.ascontiguousarray(sparse(4 * 9, 16).T).reshape(16, 4, 3, 3),
        u=np.ascontiguousarray(sparse(8, 16).T).reshape(16, 8, 1, 1),
    ),
    "down and up": network(
        """g (float["b",16,"s","h"] x) => (float["b",16,"u","v"] y) {
          a = Conv <pads = [1, 1, 1, 1]> (x, w) r = Relu(a) m = MaxPool <kernel_shape = [1, 1]> (r)
          c = Conv(m, v) i = Resize <mode = "nearest", coordinate_transformation_mode = "asymmetric", nearest_mode = "floor">
            (c, , scales)
          d = Conv(x, u) e = DepthToSpace <blocksize = 2> (d) f = AveragePool <kernel_shape = [2, 2], strides = [2, 2]> (e)
          j = Resize <mode = "nearest"> (f, , scales) k = Concat <axis = -3> (i, j) y = Conv(k, t) }""",
        w=np.ascontiguousarray(sparse(16 * 9, 16).T).reshape(16, 16, 3, 3),
        v=pointwise(8, 16),
        u=pointwise(32, 16),
        t=pointwise(16, 16),
        scales=np.array([1, 1, 2, 3], np.float32),
    ),
}


def at_random(seed: int) -> onnx.ModelProto:
    """MatMuls, biases, ReLUs, residuals and norms; what nothing reads is an output, values inside are read outside."""
    rng = np.random.default_rng(seed)
    lines, made, unread = [], ["x"], set[str]()
    for i in range(10):
        a, b = (made[max(0, len(made) - 1 - int(rng.integers(0, 3)))] for _ in range(2))
        op = str(rng.choice(["MatMul", "MatMul", "Bias", "Relu", "Tanh", "Add", "Norm"]))
        call = {
            "MatMul": f"MatMul({a}, w{rng.integers(3)})",
            "Bias": f"Add({a}, p)",
            "Relu": f"Relu({a})",
            "Tanh": f"Tanh({a})",
            "Add": f"Add({a}, {b})",
            "Norm": f"LayerNormalization({a}, gamma, beta)",
        }[op]
        lines.append(f"t{i} = {call}")
        unread -= {a, b} if op == "Add" else {a}
        made.append(f"t{i}")
        unread.add(f"t{i}")
    outs = ", ".join(f'float["b","s",16] {name}' for name in sorted(unread))
    return network(
        f'g (float["b","s",16] x) => ({outs}) {{ {" ".join(lines)} }}',
        **{f"w{i}": sparse(16, 16) for i in range(3)},
        p=vector(16),
        gamma=vector(16),
        beta=vector(16),
    )


CASES |= {f"random {seed}": at_random(seed) for seed in range(8)}
SIZES = {
    "b": (1, 2, 3, 1),
    "s": (1, 7, 33, 128),
    "h": (1, 5, 7, 16),
    "v": (1, 3, 9, 16),
    "t": (1, 5, 40, 64),
}


def feeds_of(model: Model, index: int) -> Feeds:
    return {
        v.name: vector(int(np.prod(shape))).reshape(shape)
        for v in model.signature.inputs
        for shape in [tuple(d if isinstance(d, int) else SIZES[str(d)][index] for d in v.shape)]
    }


@dataclass
class Rewritten:
    """A case with its sites replaced."""

    original: onnx.ModelProto
    model: Model
    regions: list[RegionSpec]


def rewrite(proto: onnx.ModelProto, joins: bool, rows: int | None = None) -> Rewritten:
    """R goes round with the sites, unless it is given."""
    model = load(proto)
    graph_shapes.infer(model)
    sites = find_sites(model)[0]
    chosen = {s.name: rx1.Blocks(rows or rx1.BLOCK_ROWS[i % len(rx1.BLOCK_ROWS)]) for i, s in enumerate(sites)}
    if joins:
        known = [graph_shapes.fixed(model, feeds_of(model, i)) for i in range(4)]
        between = [*find_depthwise(model), *find_between(model, known)]
        groups = join(model, sites, find_norms(model), find_attention(model, known), between, known)
    else:
        groups = single(sites)
    return Rewritten(proto, model, insert(model, groups, chosen, Packer()))


@functools.cache
def rewritten() -> tuple[dict[tuple[str, bool], Rewritten], Path]:
    """Every case both ways, and one library for all of them."""
    all_of_them = {(name, joins): rewrite(proto, joins) for name, proto in CASES.items() for joins in (False, True)}
    library = Path(tempfile.mkdtemp(prefix="spa-test-")) / "kernels.so"
    link([spec for each in all_of_them.values() for spec in each.regions], (MCPU,), library)
    return all_of_them, library


@pytest.fixture(scope="module")
def library() -> Path:
    return rewritten()[1]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("joins", [False, True], ids=["single", "joined"])
@pytest.mark.parametrize("name", CASES)
def test_the_rewritten_model_computes_the_same(name: str, joins: bool, threads: int, library: Path) -> None:
    each = rewritten()[0][name, joins]
    want = open_session(each.original.SerializeToString())
    got = open_session(to_proto(each.model).SerializeToString(), threads=threads, library=library)
    for index in range(4):
        feeds = feeds_of(each.model, index)
        expected, found = run(want, feeds), run(got, feeds)
        assert list(found) == list(expected)
        for output, value in expected.items():
            assert found[output].shape == value.shape
            scale = max(1.0, float(np.abs(value).max()))
            np.testing.assert_allclose(found[output], value, rtol=0, atol=1e-5 * scale, err_msg=f"{output} at {index}")


@pytest.mark.parametrize("joins", [False, True], ids=["single", "joined"])
@pytest.mark.parametrize("name", CASES)
def test_names_types_and_symbols_of_the_signature_stay(name: str, joins: bool) -> None:
    each = rewrite(CASES[name], joins)
    after = to_proto(each.model).graph
    for before, now in ((each.original.graph.input, after.input), (each.original.graph.output, after.output)):
        assert [v.SerializeToString(deterministic=True) for v in before] == [
            v.SerializeToString(deterministic=True) for v in now
        ]
    weights = {i.name for i in each.original.graph.initializer}
    assert not weights & {i.name for i in after.initializer if len(i.dims) == 2 and i.dims[0] > 8}, "dense weights stay"


@pytest.mark.parametrize("name", CASES)
def test_nodes_say_where_they_come_from(name: str) -> None:
    each = rewrite(CASES[name], True)
    nodes = [n for n in to_proto(each.model).graph.node if n.domain == DOMAIN]
    assert len(nodes) == len(each.regions)
    assert len({n.name for n in nodes}) == len(nodes)
    for node in nodes:
        facts = {p.key: p.value for p in node.metadata_props}
        assert set(facts) == {"spa.source", "spa.form", "spa.density"}
        forms, densities = facts["spa.form"].split(","), facts["spa.density"].split(",")
        assert len(forms) == len(densities)
        assert set(forms) <= {rx1.Blocks(rows).name for rows in rx1.BLOCK_ROWS}
        assert all(0 <= float(d) <= 1 for d in densities)
        names = facts["spa.source"].split(",")
        assert set(names) <= {n.name for n in each.original.graph.node}
        site = next(a.s.decode() for a in node.attribute if a.name == "site")
        assert site == "+".join(names)


def test_the_domain_is_imported_once() -> None:
    model = rewrite(CASES["mlp"], True).model
    assert [(d.domain, d.version) for d in to_proto(model).opset_import if d.domain] == [("ai.spa", 1)]


def test_without_groups_nothing_changes() -> None:
    model = load(CASES["mlp"])
    before = to_proto(model).SerializeToString(deterministic=True)
    assert insert(model, [], {}, Packer()) == []
    assert to_proto(model).SerializeToString(deterministic=True) == before


def test_equal_regions_are_one_op() -> None:
    proto = network(
        'g (float["b","s",32] x) => (float["b","s",32] y) { a = MatMul(x, w) t = Tanh(a) y = MatMul(t, v) }',
        w=sparse(32, 32),
        v=sparse(32, 32),
    )
    first, second = rewrite(proto, True, rows=4).regions
    assert first == second
    assert first.op_type == second.op_type


def body_of(model: Model) -> list[str]:
    """The nodes as text, without metadata; `Region_<hash>` is `Region`."""
    proto = to_proto(model)
    for node in proto.graph.node:
        del node.metadata_props[:]
    lines = [onnx.printer.to_text(node).strip() for node in proto.graph.node]
    return [
        re.sub(r"\s+", " ", re.sub(r"Region_[0-9a-f]{10}", "Region", re.sub(r"\[[^]]*\] ", "", line))) for line in lines
    ]


def test_before_and_after_as_text() -> None:
    each = rewrite(CASES["residual and norm"], True, rows=4)
    packed = [f'"{out}.{what}"' for out in ("h", "r") for what in ("indptr", "order", "columns", "values", "bias")]
    norm = ['"y.gamma"', '"y.beta"']
    (line,) = body_of(each.model)
    assert line.replace('"', "") == (
        f"y = ai.spa.Region <site: string = l+m+y> (x, {', '.join([*packed, *norm])})".replace('"', "")
    )


def test_what_is_no_site_stays_as_text() -> None:
    each = rewrite(CASES["a site within other ops"], True, rows=4)
    tanh, node, softmax, mul = body_of(each.model)
    assert (tanh, softmax, mul) == ("t = Tanh (x)", "z = Softmax (m)", "y = Mul (z, t)")
    assert node.startswith("m = ai.spa.Region")


def test_weights_are_packed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    pack = rx1.pack
    monkeypatch.setattr(rx1, "pack", lambda w, b, rows, *tile: calls.append(rows) or pack(w, b, rows, *tile))
    packer = Packer()
    for _ in range(2):
        model = load(CASES["siblings"])
        graph_shapes.infer(model)
        sites = find_sites(model)[0]
        insert(model, single(sites), dict.fromkeys((s.name for s in sites), rx1.Blocks(4)), packer)
    assert calls == [4, 4, 4]
