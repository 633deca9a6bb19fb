"""Placing for GPUs without one: by the model of costs, or by a clock whose times are given."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from spa_compiler.graph import shapes
from spa_compiler.graph.load import load
from spa_compiler.graph.model import Model
from spa_compiler.graph.precision import convert
from spa_compiler.graph.rounding import in_types
from spa_compiler.graph.session import Feeds
from spa_compiler.kernels.cuda.form import Dtype
from spa_compiler.placement.gpu_choose import GpuChoice, calculated, candidates
from spa_compiler.placement.gpu_low_rank import joined
from spa_compiler.placement.gpu_nodes import insert
from spa_compiler.placement.gpu_place import place_on_gpu
from spa_compiler.placement.gpu_sites import find_gpu_sites, find_pairs, tokens_of
from spa_compiler.placement.gpu_sums import handed_over
from spa_compiler.placement.measure import LEAST_ROUNDS, Timing
from spa_compiler.placement.place import Placed
from spa_compiler.placement.records import Records
from spa_compiler.placement.sites import held
from spa_compiler.placement.timer import Contender, Machine, this_machine
from spa_compiler.targets import parse
from spa_compiler.targets.cuda import architecture

WIDTH = 64


def chosen(model: Model, feed: Feeds, dtype: Dtype = "fp16") -> tuple[Model, list[GpuChoice]]:
    """The model with every site that should gain on an H100 as a node, and what was chosen."""
    twin, (known,) = convert(model, None if dtype == "fp32" else dtype), shapes.fixed_at(model, [feed])
    sites, _ = find_gpu_sites(model, {} if dtype == "fp32" else twin.kept, [known])
    archs, alone = [architecture("sm_90")], []
    for site in sites:
        sizes = [tokens_of(site, known)]
        alone.append(calculated(site, candidates(site, archs, dtype, sizes), archs, dtype, sizes))
    kept = held(model.graph)
    choices = joined(alone, find_pairs(sites, kept), archs, dtype, lambda pair: [tokens_of(pair.down, known)])
    choices = handed_over(choices, archs, kept, [known])
    own = twin.model.copy()
    insert(own, choices)
    return own, choices


class Clock:
    """A timer whose times are given: microseconds of dense ones, of what has nodes of ours, and by name of some."""

    def __init__(self, dense: float, ours: float, named: Mapping[str, float] | None = None) -> None:
        self._times, self._named, self.asked = (dense, ours), named or {}, list[list[str]]()

    @property
    def machine(self) -> Machine:
        return this_machine()

    def held(self) -> AbstractContextManager[None]:
        return nullcontext()

    def rest(self) -> None:
        pass

    def time(
        self,
        contenders: Mapping[str, Contender],
        feeds: Feeds,
        threads: int,
        budget_s: float,
        least_rounds: int = LEAST_ROUNDS,
        stays: Collection[str] | None = None,
    ) -> dict[str, Timing]:
        self.asked.append(list(contenders))
        found = {}
        for name, each in contenders.items():
            proto = onnx.load(each.model) if isinstance(each.model, Path) else onnx.load_from_string(each.model)
            assert {v.name: v.type.tensor_type.elem_type for v in proto.graph.input} == {
                n: onnx.helper.np_dtype_to_tensor_dtype(v.dtype) for n, v in feeds.items()
            }
            ours = any(node.domain == "ai.spa" for node in proto.graph.node)
            assert not ours or each.library is not None
            us = self._named.get(name, self._times[ours])
            found[name] = Timing(us, us, us, 7)
        return found

    def run(self, contender: Contender, feeds: Feeds, threads: int) -> Feeds:
        raise AssertionError("placing takes times, and asks for no outputs")


def placed(
    folder: Path,
    proto: onnx.ModelProto,
    timer: Any = None,
    dtype: Dtype = "fp16",
    archs: str = "sm_90",
    shape: tuple[int, ...] = (1, 3, WIDTH),
) -> Placed:
    source = folder / "source.onnx"
    onnx.save(proto, source)
    model = load(source)
    shapes.infer(model)
    twin = convert(model, None if dtype == "fp32" else dtype, model)
    workspace = next(p for i in itertools.count() if not (p := folder / f"work{i}").exists())
    workspace.mkdir()
    book = Records(folder / "records.sqlite", {"gpu": "this one"})
    feeds = [in_types(twin.model, {"x": np.ones(shape, np.float32)})]
    try:
        return place_on_gpu(
            model, twin, dtype, source, feeds, parse(f"cuda:{archs}"), book, workspace, lambda *_: None, timer=timer
        )
    finally:
        book.close()
