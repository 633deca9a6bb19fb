"""Small models that hold one kind of site, timed on a GPU to choose a form: as `trial` and `contests` do it on CPUs."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx

from spa_compiler.graph import names
from spa_compiler.graph import shapes as graph_shapes
from spa_compiler.graph.half_kernels import ELEMENT, Half
from spa_compiler.graph.load import load
from spa_compiler.graph.model import Model
from spa_compiler.graph.precision import NUMPY, convert
from spa_compiler.graph.save import to_proto
from spa_compiler.kernels.cuda.form import Dtype
from spa_compiler.placement import gpu_nodes
from spa_compiler.placement.candidates import DENSE
from spa_compiler.placement.gpu_choose import WORTH_TIMING, Candidate, GpuChoice, candidates
from spa_compiler.placement.gpu_low_rank import APART, candidate
from spa_compiler.placement.gpu_sites import PIXEL, Pair, find_gpu_sites, find_pairs, tokens_of
from spa_compiler.placement.measure import Timing
from spa_compiler.placement.records import Records
from spa_compiler.placement.regions import Element, Group
from spa_compiler.placement.sites import Site
from spa_compiler.placement.timer import Contender, Timer
from spa_compiler.placement.trial import dense_model
from spa_compiler.runtime.gpu import GpuOp, build
from spa_compiler.runtime.link import link
from spa_compiler.targets import LEVELS, Target
from spa_compiler.targets.cuda import Architecture, architecture

MOST_COPIES = 8
_EACH_S = 0.1  # of each candidate at one shape


def copies(n: int, k: int, l2_bytes: int, size: int = 2) -> int:
    """How many times a trial holds a weight [n, k], so that it leaves the GPU's L2 between two launches."""
    return max(1, min(MOST_COPIES, -(-2 * l2_bytes // (n * k * size))))


Choices = Callable[[Sequence[Site], tuple[int, ...]], dict[str, list[GpuChoice]]]
"""What copies become in each contender but dense: from the sites of a trial's model and the shape of its input."""


@dataclass(frozen=True)
class GpuReferee:
    """Times sites, or looks them up."""

    timer: Timer
    records: Records
    target: Target
    dtype: Dtype
    workspace: Path
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))

    def leading(self, found: Sequence[Candidate]) -> list[Candidate]:
        """Those that are worth timing."""
        return list(found[:WORTH_TIMING])

    def timings(
        self, site: Site, found: Sequence[Candidate], shapes: Sequence[tuple[int, ...]]
    ) -> list[dict[str, Timing]]:
        """Of dense and of every candidate's form, at each shape of the input."""

        def choices(own: Sequence[Site], shape: tuple[int, ...]) -> dict[str, list[GpuChoice]]:
            wanted = {c.form.name for c in found}
            like = [c for c in self._candidates(own[0], shape) if c.form.name in wanted]
            return {c.form.name: [GpuChoice(each, c.form, "", arrays=c.arrays) for each in own] for c in like}

        questions = [self._question(site, found, shape) for shape in shapes]
        return self._answers([site], site.n, site.k, questions, shapes, choices)

    def timings_of_pair(
        self,
        pair: Pair,
        one: Candidate,
        halves: tuple[GpuChoice, GpuChoice],
        shapes: Sequence[tuple[int, ...]],
    ) -> list[dict[str, Timing]]:
        """Of a low-rank layer: dense, as one node, and apart where a product has a form by itself."""
        forms = [half.candidate for half in halves]
        kernels = [half.form and [[most, kernel.name] for most, kernel in half.form.variants] for half in halves]

        def choices(own: Sequence[Site], shape: tuple[int, ...]) -> dict[str, list[GpuChoice]]:
            pairs = find_pairs(own, ())
            parts = [p.down for p in pairs], [p.up for p in pairs]
            like = self._one_node(pairs[0], shape)
            made = {like.form.name: [GpuChoice(p.up, like.form, "", arrays=like.arrays, pair=p) for p in pairs]}
            for half, name in enumerate(forms):
                if name != DENSE:
                    found = next(c for c in self._candidates(parts[half][0], shape) if c.form.name == name)
                    alone = [GpuChoice(each, found.form, "", arrays=found.arrays) for each in parts[half]]
                    made[APART] = made.get(APART, []) + alone
            return made

        question = self._question(pair.up, [one], shapes[0]) | {"k": pair.k, "rank": pair.rank}
        question |= {"halves": kernels, "densities": [round(half.site.density, 2) for half in halves]}
        questions = [question | {"shape": list(shape)} for shape in shapes]
        return self._answers([pair.down, pair.up], pair.rank, pair.n + pair.k, questions, shapes, choices)

    def _archs(self) -> list[Architecture]:
        return [architecture(name) for name in self.target.archs]

    def _candidates(self, site: Site, shape: tuple[int, ...]) -> list[Candidate]:
        return candidates(site, self._archs(), self.dtype, [tokens_of(site, {site.source.name: shape})])

    def _one_node(self, pair: Pair, shape: tuple[int, ...]) -> Candidate:
        sizes = [tokens_of(pair.down, {pair.down.source.name: shape})]
        found = candidate(pair, self._archs(), self.dtype, sizes)
        assert found is not None, "what is timed is a candidate"
        return found

    def _answers(
        self,
        sites: Sequence[Site],
        n: int,
        k: int,
        questions: Sequence[dict[str, object]],
        shapes: Sequence[tuple[int, ...]],
        choices: Choices,
    ) -> list[dict[str, Timing]]:
        """From the records, or of copies of `sites`, which follow each other and have n x k weights together."""
        known = [self.records.get(question) for question in questions]
        with tempfile.TemporaryDirectory(prefix="trial-", dir=self.workspace) as folder:
            for i, shape in enumerate(shapes):
                if known[i] is None:
                    answer = self._time(sites, copies(n, k, self._l2_bytes()), shape, choices, Path(folder))
                    self.records.put(questions[i], answer)
                    known[i] = answer
        return [answer for answer in known if answer is not None]

    def _l2_bytes(self) -> int:
        return max(arch.l2_bytes for arch in self._archs())

    def _question(self, site: Site, found: Sequence[Candidate], shape: Sequence[int]) -> dict[str, object]:
        """The key of a record: everything that the times depend on, but the machine."""
        return {
            "gpu": self.dtype,
            "layout": site.layout,
            "n": site.n,
            "k": site.k,
            "act": site.act,
            "bias": site.bias is not None,
            "shape": list(shape),
            "forms": {c.form.name: [[most, kernel.name] for most, kernel in c.form.variants] for c in found},
            "stored": {
                c.form.name: round(sum(a.nbytes for a in c.arrays.values()) / (site.n * site.k), 2) for c in found
            },
        }

    def _time(
        self, sites: Sequence[Site], count: int, shape: tuple[int, ...], choices: Choices, folder: Path
    ) -> dict[str, Timing]:
        layout = "planes" if sites[0].layout == PIXEL else sites[0].layout  # as the graph has it
        alone: list[Element] = [  # what is added costs all alike
            dataclasses.replace(site, residual=None, layout=layout) for site in sites
        ]
        dense = load(onnx.load_from_string(dense_model([Group(alone, layout)] * count, shape)))
        names.make_unique(dense)
        graph_shapes.infer(dense)
        half: Half | None = None if self.dtype == "fp32" else self.dtype
        twin = convert(dense, half, None if half is None else _narrow_borders(dense, half))
        own, _ = find_gpu_sites(dense, {}, graph_shapes.fixed_at(dense, [{"x": np.zeros(shape, np.float32)}]))
        models: dict[str, Model] = {DENSE: twin.model}
        operators: list[GpuOp] = []
        for name, chosen in choices(own, shape).items():
            models[name] = twin.model.copy()
            operators += gpu_nodes.insert(models[name], chosen)
        library = folder / "kernels.so"
        link([], (LEVELS[0],), library, build(operators, self.target.archs))
        entries: dict[str, Contender] = {}
        for name, model in models.items():
            path = folder / f"{len(entries)}.onnx"
            path.write_bytes(to_proto(model).SerializeToString())
            entries[name] = Contender(path, None if name == DENSE else library)
        x = self.rng.standard_normal(shape, np.float32).astype(np.float32 if half is None else NUMPY[half])
        times = self.timer.time(entries, {"x": x}, 1, _EACH_S * len(entries), stays=(DENSE,))
        return {
            name: Timing(t.median_us / count, t.p10_us / count, t.p90_us / count, t.runs) for name, t in times.items()
        }


def _narrow_borders(model: Model, half: Half) -> Model:
    """A model with the same inputs and outputs in 16 bits."""

    def narrow(values: Sequence[onnx.ValueInfoProto]) -> tuple[onnx.ValueInfoProto, ...]:
        copies = [onnx.ValueInfoProto() for _ in values]
        for copy, value in zip(copies, values, strict=True):
            copy.CopyFrom(value)
            copy.type.tensor_type.elem_type = ELEMENT[half]
        return tuple(copies)

    twin = model.copy()
    twin.metadata.inputs, twin.metadata.outputs = narrow(twin.metadata.inputs), narrow(twin.metadata.outputs)
    signed = [
        tuple(dataclasses.replace(v, dtype=NUMPY[half]) for v in part)
        for part in (twin.signature.inputs, twin.signature.outputs)
    ]
    twin.signature = dataclasses.replace(twin.signature, inputs=signed[0], outputs=signed[1])
    return twin
