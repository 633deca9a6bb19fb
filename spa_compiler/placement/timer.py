"""Where times are taken: one interface, so that choices are made alike by times from here and from elsewhere."""

from __future__ import annotations

import platform
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import msgspec

from spa_compiler.graph.session import Feeds, flatten, onnxruntime_version, open_session, run, runtime
from spa_compiler.placement.measure import LEAST_ROUNDS, Timing, interleave
from spa_compiler.targets import host
from spa_compiler.targets.machine import timing_lock


class Machine(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What takes the times."""

    cpu: str
    isa: str  # the highest level that it runs
    cores: int  # physical
    platform: str
    providers: tuple[str, ...]  # of ONNX Runtime
    onnxruntime: str  # its version


def this_machine() -> Machine:
    """The machine that this process runs on. Raises EnvironmentFault as `graph.session.runtime` does."""
    cpu = host()
    return Machine(
        cpu=f"{cpu.model} ({cpu.name})" if cpu.model else cpu.name,
        isa=cpu.level,
        cores=cpu.cores_physical,
        platform=platform.platform(),
        providers=tuple(runtime().get_available_providers()),
        onnxruntime=onnxruntime_version(),
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

    def run(self, contender: Contender, feeds: Feeds, threads: int) -> Feeds:
        """Output name -> value of one run there; for outputs that are no arrays, see `graph.session.flatten`."""


class LocalTimer:
    """Takes times in this process."""

    @property
    def machine(self) -> Machine:
        return this_machine()

    def held(self) -> AbstractContextManager[None]:
        return timing_lock()

    def time(
        self,
        contenders: Mapping[str, Contender],
        feeds: Feeds,
        threads: int,
        budget_s: float,
        least_rounds: int = LEAST_ROUNDS,
        stays: Collection[str] | None = None,
    ) -> dict[str, Timing]:
        sessions = {n: open_session(c.model, threads=threads, library=c.library) for n, c in contenders.items()}
        calls: dict[str, Callable[[], object]] = {n: partial(s.run, None, feeds) for n, s in sessions.items()}
        return interleave(calls, budget_s, least_rounds, stays)

    def run(self, contender: Contender, feeds: Feeds, threads: int) -> Feeds:
        return dict(flatten(run(open_session(contender.model, threads=threads, library=contender.library), feeds)))
