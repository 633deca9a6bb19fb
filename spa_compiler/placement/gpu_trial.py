"""Small models that hold one kind of site, timed on a GPU to choose a form: as `trial` and `contests` do it on CPUs."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence
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
from spa_compiler.placement.gpu_sites import PIXEL, find_gpu_sites, tokens_of
from spa_compiler.placement.measure import Timing
from spa_compiler.placement.records import Records
from spa_compiler.placement.regions import single
from spa_compiler.placement.sites import Site
from spa_compiler.placement.timer import Contender, Timer
from spa_compiler.placement.trial import dense_model
from spa_compiler.runtime.gpu import GpuOp, build
from spa_compiler.runtime.link import link
from spa_compiler.targets import LEVELS, Target
from spa_compiler.targets.cuda import architecture

MOST_COPIES = 8
_EACH_S = 0.1  # of each candidate at one shape


def copies(n: int, k: int, l2_bytes: int, size: int = 2) -> int:
    """How many times a trial holds a weight [n, k], so that it leaves the GPU's L2 between two launches."""
    return max(1, min(MOST_COPIES, -(-2 * l2_bytes // (n * k * size))))


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
        questions = [self._question(site, found, shape) for shape in shapes]
        known = [self.records.get(question) for question in questions]
        with tempfile.TemporaryDirectory(prefix="trial-", dir=self.workspace) as folder:
            for i, shape in enumerate(shapes):
                if known[i] is None:
                    answer = self._time(site, found, shape, Path(folder))
                    self.records.put(questions[i], answer)
                    known[i] = answer
        return [answer for answer in known if answer is not None]

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

    def _time(self, site: Site, found: Sequence[Candidate], shape: tuple[int, ...], folder: Path) -> dict[str, Timing]:
        archs = [architecture(name) for name in self.target.archs]
        count = copies(site.n, site.k, max(arch.l2_bytes for arch in archs))
        layout = "planes" if site.layout == PIXEL else site.layout  # as the graph has it
        alone = dataclasses.replace(site, residual=None, layout=layout)  # what is added costs both alike
        dense = load(onnx.load_from_string(dense_model(single([alone] * count), shape)))
        names.make_unique(dense)
        graph_shapes.infer(dense)
        half: Half | None = None if self.dtype == "fp32" else self.dtype
        twin = convert(dense, half, None if half is None else _narrow_borders(dense, half))
        own, _ = find_gpu_sites(dense, {}, [{"x": shape}])
        models: dict[str, Model] = {DENSE: twin.model}
        operators: list[GpuOp] = []
        for candidate in candidates(own[0], archs, self.dtype, [tokens_of(own[0], {"x": shape})]):
            if candidate.form.name in {c.form.name for c in found}:
                model = twin.model.copy()
                choices = [GpuChoice(each, candidate.form, "", arrays=candidate.arrays) for each in own]
                operators += gpu_nodes.insert(model, choices)
                models[candidate.form.name] = model
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
