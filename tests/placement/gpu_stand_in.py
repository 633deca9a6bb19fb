"""A stand-in for a GPU: this machine's CPU, which has nodes of ours as standard operators and says that they are fast.

All else is as on a GPU: sessions and bound calls are `CudaTimer`'s, and a node must be one that its library registers.

    python -m tests.placement.gpu_stand_in --tracker ...      `spa-tune-server` with such a GPU
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Collection, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import msgspec
import onnx

from spa_compiler.graph import shapes
from spa_compiler.graph.load import load
from spa_compiler.graph.save import to_proto
from spa_compiler.graph.session import CPU, Feeds
from spa_compiler.kernels.cuda.form import DTYPES, Epilogue, Layout
from spa_compiler.placement import gpu_choose, serve
from spa_compiler.placement.candidates import DENSE
from spa_compiler.placement.gpu_check import expanded
from spa_compiler.placement.gpu_choose import GpuChoice, GpuForm
from spa_compiler.placement.gpu_nodes import node_name, operator_of
from spa_compiler.placement.gpu_timer import CudaTimer
from spa_compiler.placement.measure import LEAST_ROUNDS, Timing
from spa_compiler.placement.nodes import DOMAIN
from spa_compiler.placement.timer import Contender, Machine, this_machine
from spa_compiler.targets.cuda import Device, architecture
from tests.gpu_harness import register
from tests.placement.gpu_forms import Rows

ARCH = "sm_90"
FASTER = 100.0

ACTS = ("none", "relu", "gelu_erf")


def machine() -> Machine:
    return msgspec.structs.replace(this_machine(), gpu="Stand-in", gpu_arch=ARCH)


def device() -> Device:
    return Device("Stand-in", ARCH, 132, 1 << 37, 50 << 20, 13000)


class Favouring(CudaTimer):
    """A clock on which models with nodes of ours are far faster than they are, so that they win."""

    def time(
        self,
        contenders: Mapping[str, Contender],
        feeds: Feeds,
        threads: int,
        budget_s: float,
        least_rounds: int = LEAST_ROUNDS,
        stays: Collection[str] | None = None,
    ) -> dict[str, Timing]:
        times = super().time(contenders, feeds, threads, budget_s, least_rounds, stays)
        speed = self.speed(contenders)
        return {name: _faster(t, speed) if has_nodes(contenders[name]) else t for name, t in times.items()}

    def speed(self, contenders: Mapping[str, Contender]) -> float:
        """So many times as fast are models with nodes of ours, by this clock."""
        return FASTER


class StandIn(Favouring):
    """This machine's CPU as a GPU."""

    provider, device = CPU, "cpu"

    @property
    def machine(self) -> Machine:
        return machine()

    def _open_on_gpu(self, contender: Contender, threads: int, options: Mapping[str, str]) -> Any:
        if has_nodes(contender):
            contender = Contender(in_standard_operators(contender))
        return super()._open_on_gpu(contender, threads, {})


class Wrong(StandIn):
    """A GPU whose kernels compute something else."""

    def run(self, contender: Contender, feeds: Feeds, threads: int) -> Feeds:
        found = super().run(contender, feeds, threads)
        return {name: value * 1.5 for name, value in found.items()} if has_nodes(contender) else found


class SlowTogether(StandIn):
    """A GPU where sites gain by themselves, and whole models lose."""

    def speed(self, contenders: Mapping[str, Contender]) -> float:
        return FASTER if DENSE in contenders else 1 / FASTER


def has_nodes(contender: Contender) -> bool:
    """Whether any node is ours."""
    model = contender.model
    proto = onnx.load_from_string(model) if isinstance(model, bytes) else onnx.load(model, load_external_data=False)
    return any(node.domain == DOMAIN for node in proto.graph.node)


def in_standard_operators(contender: Contender) -> bytes:
    """Its model without nodes of ours, all of which its library must have for CUDA."""
    assert isinstance(contender.model, Path)
    assert contender.library is not None
    model = load(contender.model)
    shapes.infer(model)
    nodes = [node for node in model.graph.nodes if node.domain == DOMAIN]
    missing = {(node.op, "CUDAExecutionProvider") for node in nodes} - _registered(contender.library)
    assert not missing, missing
    sites = [(node.op, SimpleNamespace(name=str(node.name).removeprefix(f"{DOMAIN}/"))) for node in nodes]
    choices = [GpuChoice(site, _forms()[op], "", arrays={}) for op, site in sites]  # type: ignore[arg-type]
    assert [node_name(choice) for choice in choices] == [node.name for node in nodes]
    return to_proto(expanded(model, choices)).SerializeToString()


def _registered(library: Path) -> set[tuple[str, str]]:
    """(operator, provider); a file is one library of a process, under any name, and meets one ONNX Runtime there."""
    state = library.stat()
    key = state.st_dev, state.st_ino
    if key not in _KNOWN:
        _KNOWN[key] = set(register(library))
    return _KNOWN[key]


_KNOWN: dict[tuple[int, int], set[tuple[str, str]]] = {}


@functools.cache
def _forms() -> dict[str, GpuForm]:
    """Operator -> what it runs, of tests/placement/gpu_forms.py."""
    rows, found = Rows(), {}
    for dtype, layout, act, residual in itertools.product(DTYPES, get_args(Layout), ACTS, (False, True)):
        epilogue = Epilogue(act, residual)
        variants = gpu_choose.variants_of(rows, {}, [architecture(ARCH)], dtype, layout, epilogue, (1, 1))
        form = GpuForm(rows, dtype, layout, epilogue, variants)
        found[operator_of(form).op_type] = form
    return found


def _faster(timing: Timing, times: float) -> Timing:
    return Timing(timing.median_us / times, timing.p10_us / times, timing.p90_us / times, timing.runs)


if __name__ == "__main__":
    from spa_compiler.cli.tune_server import main
    from tests.placement import gpu_stand_in  # as others import it, so that other processes find the function

    serve.this_machine = gpu_stand_in.machine  # type: ignore[attr-defined]
    serve.CudaTimer = gpu_stand_in.StandIn  # type: ignore[misc]
    main()
