"""Low-rank layers as regions compute what the graph computes, whatever their shapes and however they are spelled."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spa_compiler.graph import shapes as graph_shapes
from spa_compiler.graph.load import load
from spa_compiler.graph.model import Model
from spa_compiler.graph.save import to_proto
from spa_compiler.graph.session import open_session, run
from spa_compiler.placement.candidates import layouts, stored_forms
from spa_compiler.placement.chains import find_chains
from spa_compiler.placement.nodes import DOMAIN, Packer, insert
from spa_compiler.placement.norms import find_norms
from spa_compiler.placement.regions import join
from spa_compiler.placement.sites import find_sites, held
from spa_compiler.runtime.link import link
from spa_compiler.runtime.region import RegionSpec
from tests.networks import F32, network, weight
from tests.region_harness import MCPU

TOKENS = (1, 5, 33, 128)


@dataclass(frozen=True)
class Layer:
    """What is drawn: sizes, the sparse weight beside (or none), where biases stand, what follows."""

    k: int
    n: int
    rank: int
    heads: int  # that share the thin tensor
    rows: int  # height of the blocks of zeros; 0: no sparse weight
    swapped: bool  # operands of the Add
    biases: tuple[bool, bool, bool, bool]  # of the thin product, the sparse one, the other one, the sum
    act: bool
    residual: bool
    planes: bool
    choice: int  # which of the candidates is tried
    seed: int

    def proto(self) -> onnx.ModelProto:
        rng = np.random.default_rng(self.seed)
        weights: dict[str, F32] = {}
        lines: list[str] = []
        op = "Conv" if self.planes else "MatMul"

        def product(to: str, source: str, matrix: F32, biased: bool) -> str:
            weights[f"w_{to}"] = matrix.T[..., None, None].copy() if self.planes else matrix
            lines.append(f"{to} = {op}({source}, w_{to})")
            return added(f"{to}_b", to, vector(matrix.shape[1])) if biased else to

        def vector(size: int) -> F32:
            values = rng.standard_normal(size).astype(np.float32)
            return values.reshape(1, size, 1, 1) if self.planes else values

        def added(to: str, source: str, values: F32) -> str:
            weights[f"b_{to}"] = values
            lines.append(f"{to} = Add({source}, b_{to})")
            return to

        thin = product("z", "x", weight(rng, self.k, self.rank), self.biases[0])
        outs = []
        for i in range(self.heads):
            last = product(f"u{i}", thin, weight(rng, self.rank, self.n), self.biases[2])
            if self.rows:
                beside = product(f"s{i}", "x", weight(rng, self.k, self.n, 0.3, self.rows), self.biases[1])
                operands = (beside, last) if self.swapped else (last, beside)
                lines.append(f"t{i} = Add({operands[0]}, {operands[1]})")
                last = f"t{i}"
            if self.biases[3]:
                last = added(f"c{i}", last, vector(self.n))
            if self.residual:
                lines.append(f"r{i} = Add({last}, other)")
                last = f"r{i}"
            lines.append(f"y{i} = {'Relu' if self.act else 'Identity'}({last})")
            outs.append(f"y{i}")

        def of(features: int, name: str) -> str:
            return f'float["b",{features},4,"s"] {name}' if self.planes else f'float["b","s",{features}] {name}'

        given = [of(self.k, "x"), *([of(self.n, "other")] if self.residual else [])]
        head = f"g ({', '.join(given)}) => ({', '.join(of(self.n, y) for y in outs)})"
        return network(f"{head} {{ {' '.join(lines)} }}", **weights)

    def feeds(self, tokens: int) -> dict[str, F32]:
        rng = np.random.default_rng(tokens)
        sizes = {"x": self.k} | ({"other": self.n} if self.residual else {})
        shapes = {n: (2, f, 4, tokens) if self.planes else (2, tokens, f) for n, f in sizes.items()}
        return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}

    def rewritten(self, joined: bool) -> tuple[Model, list[RegionSpec]]:
        """As placement does it: by itself, or joined with what stands around."""
        model = load(self.proto())
        graph_shapes.infer(model)
        known = [graph_shapes.fixed(model, self.feeds(t)) for t in (5, 33)]
        sites = find_sites(model)[0]
        (chain,) = find_chains(sites, {s.name for s in sites if stored_forms(s)}, held(model.graph), known)
        assert len(chain.sparse) == (self.heads if self.rows else 0)
        ways = layouts(chain, {})
        forms = ways[self.choice % len(ways)].of(chain)
        fresh = [s for s in find_sites(model)[0] if s.name in forms]
        groups = join(model, fresh, find_norms(model), [], [], known) if joined else [chain.group]
        return model, insert(model, groups, forms, Packer())


@st.composite
def layers(draw: st.DrawFn) -> Layer:
    heads, n, k = draw(st.integers(1, 3)), draw(st.integers(8, 90)), draw(st.integers(8, 150))
    most = (k * n * heads - 1) // (k + n * heads)  # less work than the product
    if draw(st.booleans()):  # more than one chunk, more than one block of columns
        n, k, most = n + 512, k + 200, 60
    return Layer(
        k=k,
        n=n,
        rank=draw(st.integers(1, max(1, min(most, 60)))),
        heads=heads,
        rows=draw(st.sampled_from([0, 1, 4, 8])),
        swapped=draw(st.booleans()),
        biases=draw(st.tuples(*[st.booleans()] * 4)),
        act=draw(st.booleans()),
        residual=draw(st.booleans()),
        planes=draw(st.booleans()),
        choice=draw(st.integers(0, 2)),
        seed=draw(st.integers(0, 99)),
    )


@settings(max_examples=2, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(st.lists(layers(), min_size=6, max_size=6))
def test_regions_compute_the_same(drawn: list[Layer]) -> None:
    """Six layers at a time, because each example links a library."""
    cases = [(layer, *layer.rewritten(joined)) for layer in drawn for joined in (False, True)]
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "kernels.so"
        link([spec for _, _, specs in cases for spec in specs], (MCPU,), library)
        for layer, model, specs in cases:
            proto = to_proto(model)
            assert len(specs) == 1
            assert not any(n.op_type in ("MatMul", "Conv") for n in proto.graph.node if n.domain != DOMAIN)
            want = open_session(layer.proto().SerializeToString())
            got = open_session(proto.SerializeToString(), threads=2, library=library)
            for tokens in TOKENS:
                feeds = layer.feeds(tokens)
                expected, found = run(want, feeds), run(got, feeds)
                for name, value in expected.items():
                    scale = max(1.0, float(np.abs(value).max()))
                    np.testing.assert_allclose(
                        found[name], value, rtol=0, atol=1e-5 * scale, err_msg=f"{layer} {tokens}"
                    )


def test_the_thin_tensor_stays_in_its_panel_and_the_sum_is_one_step() -> None:
    layer = Layer(40, 64, 8, 1, 4, False, (False, False, False, True), True, False, False, 1, 0)
    (spec,) = layer.rewritten(True)[1]
    assert spec.lines == ("spa_pack(r, 0, 0)", "spa_linear(r, 0, 0, -1, 48)", "spa_sum_out(r, 1, 0, 2, 48, -1, 0)")
    assert [(s.n, s.k, s.form.rows, s.act) for s in spec.linears] == [
        (8, 40, 4, "none"),
        (64, 40, 4, "none"),
        (64, 8, 4, "relu"),
    ]


def test_full_weights_are_cut_into_blocks_that_stay_in_l1() -> None:
    spec = Layer(300, 700, 60, 1, 0, False, (False,) * 4, False, False, False, 0, 0).rewritten(False)[1][0]
    assert [s.form.k_block for s in spec.linears] == [128, 60]
