"""Engines side by side: each in a process of its own, timed in turns.

All contenders are loaded first. Then, in rounds, each one runs a short burst of calls while the others sleep, and the
order rotates from round to round, so a machine that slows down for a second slows all of them down. A ratio is the
median over the rounds of (burst median of the one / burst median of the other): bursts of a round lie next to each
other, which medians over the whole race do not.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np

from spa_compiler.bench.engines import Engine
from spa_compiler.errors import EnvironmentFault, ModelError
from spa_compiler.graph.difference import difference
from spa_compiler.graph.session import Feeds
from spa_compiler.targets.machine import timing_lock

_log = logging.getLogger(__name__)

_WORKER = Path(__file__).with_name("worker.py")
#: turns that the calls are spread over
_ROUNDS = 10
#: seconds between two bursts: the threads of the one before stop spinning and leave the core
_PAUSE = 0.01
#: of a worker's stderr, what an error message quotes
_TAIL_LINES = 3


@dataclass(frozen=True)
class Contender:
    """A model file in an engine."""

    model: str  # the name it has in the result
    engine: Engine
    path: Path
    feeds: Feeds
    library: Path | None = None
    python: str = sys.executable
    required: bool = True  # else it is left out, with a warning, when it does not run
    profile: Path | None = None  # a folder that ONNX Runtime's profile goes to, which makes it a little slower


@dataclass(frozen=True)
class Times:
    """What was measured: milliseconds, one list for each round."""

    bursts: tuple[tuple[float, ...], ...]
    version: str  # of the engine
    outputs: dict[str, np.ndarray] = field(default_factory=dict)  # numeric ones by their place among all
    trace: Path | None = None  # of a contender that is profiled, in its folder; the optimized model is beside it
    counted: tuple[bool, ...] = ()  # for each run in the trace, whether it is a timed call

    def percentile(self, percent: float) -> float:
        """Over all calls, in ms."""
        return float(np.percentile(np.concatenate(self.bursts), percent))

    def ratio(self, over: Times) -> float:
        """How many times as fast as `over`, from the same race."""
        pairs = zip(over.bursts, self.bursts, strict=True)
        return float(np.median([np.median(theirs) / np.median(ours) for theirs, ours in pairs]))

    def error(self, reference: Times) -> float | None:
        """The largest `difference` of any output; None if one is missing or cannot be compared, or if there is none."""
        worst: list[float] = []
        for place, want in reference.outputs.items():
            apart = difference(want, self.outputs[place]) if place in self.outputs else None
            if apart is None:
                return None
            worst.append(apart)
        return max(worst, default=None)


@dataclass(frozen=True)
class Absent:
    """A contender that did not run, and why."""

    reason: str


def race(
    contenders: Sequence[Contender],
    *,
    threads: int,
    runs: int,
    progress: Callable[[str, int, int], None] = lambda *_: None,
) -> list[Times | Absent]:
    """Times every contender, in the order given; `Absent` for one that is not required and does not run.

    Args:
        threads: of each engine.
        runs: timed calls of each contender.
        progress: told what is done, how much of it and of how much.

    Raises:
        EnvironmentFault: an interpreter cannot be started.
        ModelError: a contender that is required does not run.
    """
    with ExitStack() as stack, timing_lock():
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="spa-bench-")))
        workers: list[_Worker] = []
        for index, contender in enumerate(contenders):
            progress("loading", index, len(contenders))
            worker = stack.enter_context(_Worker(contender, folder / str(index), threads))
            worker.start()
            workers.append(worker)
        running = [worker for worker in workers if not worker.absent]
        bursts = _split(runs, min(_ROUNDS, runs))
        for turn, calls in enumerate(bursts):
            progress("timing", turn, len(bursts))
            shift = turn % max(len(running), 1)
            for worker in running[shift:] + running[:shift]:
                worker.burst(calls)
                time.sleep(_PAUSE)
        return [worker.result() for worker in workers]


def _split(total: int, parts: int) -> list[int]:
    """`total` calls in bursts that differ by one at most."""
    return [total // parts + (i < total % parts) for i in range(parts)]


@dataclass
class _Worker:
    """The process of a contender, ended with the block."""

    contender: Contender
    folder: Path
    threads: int
    version: str = ""
    absent: str = ""
    bursts: list[tuple[float, ...]] = field(default_factory=list)
    process: subprocess.Popen[str] | None = None

    def __enter__(self) -> _Worker:
        self.folder.mkdir()
        return self

    def __exit__(self, *_: object) -> None:
        if self.process:
            self.process.kill()
            self.process.communicate()

    @property
    def name(self) -> str:
        return f"{self.contender.model} in {self.contender.engine.name}"

    def start(self) -> None:
        """Loads the model; `absent` says why it does not run, if it need not."""
        contender, engine = self.contender, self.contender.engine
        feeds = self.folder / "feeds.npz"
        np.savez(feeds, **cast("dict[str, Any]", contender.feeds))
        job = {
            "loader": engine.loader,
            "model": str(contender.path.resolve()),
            "library": str(contender.library.resolve()) if contender.library else "",
            "feeds": str(feeds),
            "outputs": str(self._outputs),
            "threads": self.threads,
            "disabled": engine.disabled,
            "config": engine.config,
            "profile": str(contender.profile.resolve()) if contender.profile else "",
        }
        command = [contender.python, str(_WORKER), json.dumps(job)]
        pipe, env = subprocess.PIPE, {**os.environ, **engine.env}
        try:
            with (self.folder / "log").open("w") as log:
                self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=log, text=True, env=env)
        except OSError as error:
            raise EnvironmentFault(
                f"the interpreter for {engine.name} cannot be started ({error.strerror})",
                where=contender.python,
                fix="Name another one with --python ENGINE=PATH",
            ) from error
        answer = self._answer()
        if "error" not in answer:
            self.version = answer["version"]
        elif contender.required:
            raise ModelError(f"does not run: {answer['error']}", where=self.name)
        else:
            self.absent = " ".join(f"does not run: {answer['error']}".split())
            _log.warning("left out: %s %s", self.name, self.absent)

    def result(self) -> Times | Absent:
        """What became of it."""
        if self.absent:
            return Absent(self.absent)
        with np.load(self._outputs, allow_pickle=False) as archive:
            outputs = {place: archive[place] for place in archive.files}
        trace, counted = None, ()
        if self.contender.profile:
            answer = self._ask("profile")
            trace, counted = Path(answer["trace"]), tuple(answer["counted"])
        return Times(tuple(self.bursts), self.version, outputs, trace, counted)

    @property
    def _outputs(self) -> Path:
        return self.folder / "outputs.npz"

    def burst(self, calls: int) -> None:
        """Times `calls` calls."""
        self.bursts.append(tuple(self._ask(str(calls))))

    def _ask(self, line: str) -> Any:
        if self.process is None or self.process.stdin is None:
            raise RuntimeError("a question before start()")
        try:
            self.process.stdin.write(f"{line}\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # the answer says more
        answer = self._answer()
        if isinstance(answer, dict) and "error" in answer:
            raise ModelError(f"stopped while it was timed: {answer['error']}", where=self.name)
        return answer

    def _answer(self) -> Any:
        """The next line the worker writes; its last words on stderr if it has died."""
        if self.process is None or self.process.stdout is None:
            raise RuntimeError("an answer before start()")
        line = self.process.stdout.readline()
        if line:
            return json.loads(line)
        words = (self.folder / "log").read_text(errors="replace").strip().splitlines()[-_TAIL_LINES:]
        return {"error": " ".join([f"its process ended with status {self.process.wait()}", *words])}
