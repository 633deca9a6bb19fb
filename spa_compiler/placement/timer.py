"""Where times are taken: one interface, so that choices are made alike by times from here and from elsewhere."""

from __future__ import annotations

import platform
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import msgspec

from spa_compiler.graph.session import CUDA, Feeds, flatten, onnxruntime_version, open_session, run, runtime
from spa_compiler.placement.measure import LEAST_ROUNDS, Timing, interleave
from spa_compiler.targets import cuda, host
from spa_compiler.targets.machine import give_back, timing_lock

if TYPE_CHECKING:
    import onnxruntime as ort

_LARGE = 16 << 20  # bytes of a model whose memory is worth the time that giving it back takes


class Machine(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What takes the times."""

    cpu: str
    isa: str  # the highest level that it runs
    cores: int  # physical
    platform: str
    providers: tuple[str, ...]  # of ONNX Runtime
    onnxruntime: str  # its version
    gpu: str = ""  # its name
    gpu_arch: str = ""  # "sm_90"; empty: there is none, or ONNX Runtime cannot use it


def this_machine() -> Machine:
    """The machine that this process runs on. Raises EnvironmentFault as `graph.session.runtime` does."""
    cpu, providers = host(), tuple(runtime().get_available_providers())
    gpu = cuda.device() if CUDA in providers else None
    return Machine(
        cpu=f"{cpu.model} ({cpu.name})" if cpu.model else cpu.name,
        isa=cpu.level,
        cores=cpu.cores_physical,
        platform=platform.platform(),
        providers=providers,
        onnxruntime=onnxruntime_version(),
        gpu=gpu.name if gpu else "",
        gpu_arch=gpu.arch if gpu else "",
    )


@dataclass(frozen=True)
class Contender:
    """A model, as a file or as bytes, and the library that its nodes need."""

    model: Path | bytes
    library: Path | None = None


class Timer(Protocol):
    """Takes times on one machine."""

    @property
    def machine(self) -> Machine:
        """What the times are of."""

    def held(self) -> AbstractContextManager[None]:
        """Keeps others from that machine; times may be taken inside alone."""

    def time(
        self,
        contenders: Mapping[str, Contender],
        feeds: Feeds,
        threads: int,
        budget_s: float,
        least_rounds: int = LEAST_ROUNDS,
        stays: Collection[str] | None = None,
    ) -> dict[str, Timing]:
        """Runs all contenders on the feeds in turns, as `measure.interleave` does.

        Raises:
            EnvironmentFault: the machine cannot be used.
        """

    def rest(self) -> None:
        """Frees what is kept for the next times."""

    def run(self, contender: Contender, feeds: Feeds, threads: int) -> Feeds:
        """Output name -> value of one run there; for outputs that are no arrays, see `graph.session.flatten`."""


def bytes_of(contender: Contender) -> int:
    """The size of its model, with the weights beside it."""
    model = contender.model
    if isinstance(model, bytes):
        return len(model)
    beside = model.with_name(model.name + ".data")
    return model.stat().st_size + (beside.stat().st_size if beside.exists() else 0)


class LocalTimer:
    """Takes times in this process.

    Sessions of races in which all `stay` are open until others are asked for: whole models, at several shapes.
    """

    reuses = True
    """Whether a session can be timed again, on other feeds."""

    def __init__(self) -> None:
        self._open: dict[tuple[object, ...], ort.InferenceSession] = {}

    @property
    def machine(self) -> Machine:
        return this_machine()

    @contextmanager
    def held(self) -> Iterator[None]:
        with timing_lock():
            try:
                yield
            finally:
                self.rest()

    def time(
        self,
        contenders: Mapping[str, Contender],
        feeds: Feeds,
        threads: int,
        budget_s: float,
        least_rounds: int = LEAST_ROUNDS,
        stays: Collection[str] | None = None,
    ) -> dict[str, Timing]:
        sessions = self._sessions(contenders, threads, keep=self.reuses and stays is None)
        calls = {name: self._call(contenders[name], session, feeds, threads) for name, session in sessions.items()}
        return interleave(calls, budget_s, least_rounds, stays)

    def rest(self) -> None:
        if self._open:
            self._open.clear()
            give_back()

    def run(self, contender: Contender, feeds: Feeds, threads: int) -> Feeds:
        return dict(flatten(run(self._session(contender, threads), feeds)))

    def _session(self, contender: Contender, threads: int) -> ort.InferenceSession:
        return open_session(contender.model, threads=threads, library=contender.library)

    def _call(
        self, contender: Contender, session: ort.InferenceSession, feeds: Feeds, threads: int
    ) -> Callable[[], object]:
        """What is timed."""
        return partial(session.run, None, feeds)

    def _sessions(
        self, contenders: Mapping[str, Contender], threads: int, keep: bool
    ) -> dict[str, ort.InferenceSession]:
        """A session for each. To load a model takes half as much memory again, so the largest one is loaded first."""
        keys = {name: _key(each, threads) for name, each in contenders.items()}
        sizes = {name: bytes_of(each) for name, each in contenders.items()}
        new = max((sizes[name] for name, key in keys.items() if key not in self._open), default=0)
        staying = {key for name, key in keys.items() if sizes[name] >= new}
        kept = {key: session for key, session in self._open.items() if key in staying}
        if len(kept) < len(self._open):
            self._open = kept
            give_back()
        sessions = {name: kept[key] for name, key in keys.items() if key in kept}
        for name in sorted(contenders.keys() - sessions.keys(), key=lambda n: (-sizes[n], n)):
            each = contenders[name]
            sessions[name] = self._session(each, threads)
            if keep and isinstance(each.model, Path):
                self._open[keys[name]] = sessions[name]
            if sizes[name] > _LARGE:
                give_back()
        return {name: sessions[name] for name in contenders}


def _key(contender: Contender, threads: int) -> tuple[object, ...]:
    """What a session hangs on: a file of the same name may be another one."""
    if isinstance(contender.model, bytes):
        return (None,)
    state = contender.model.stat()
    return contender.model, state.st_ino, state.st_size, state.st_mtime_ns, contender.library, threads
