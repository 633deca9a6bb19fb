"""Two runs of one model side by side over the calibration samples, wave by wave: as it was, and as it becomes.

For every site the stream gives the moments of what it reads in the run that is already rewritten up to there, and how
that hangs together with what it read before anything was rewritten. What is in flight between two waves lies on disk,
so memory is bounded by one feed for each thread and the moments of one wave, for any number of samples. Samples are
read once; those that are held out take no part.
"""

from __future__ import annotations

import tempfile
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from spa_compiler.calibration.moments import Geometry, Moments
from spa_compiler.calibration.progress import Progress, no_progress
from spa_compiler.calibration.samples import Samples
from spa_compiler.calibration.spool import Spool
from spa_compiler.calibration.waves import Waves
from spa_compiler.errors import ModelError
from spa_compiler.graph.model import Model
from spa_compiler.graph.operators import WeightedOp
from spa_compiler.graph.session import Feeds, open_session, run

ROWS_PER_COLUMN = 64
MOST_ROWS = 1 << 15
"""Positions that moments are taken over: at least this many, and 64 for each column, where the samples have them."""

_PART = 1 << 23
"""Values of the rows that are made at a time."""

NOW, BEFORE = "now", "before"

_Made = TypeVar("_Made")
_Key = tuple[str, Geometry, str | None]
"""What a site reads, how, and its target: sites that agree share their moments."""


@dataclass(frozen=True)
class Collected:
    """Moments of one site, over the samples that are not held out."""

    site: int
    fit: Moments


@dataclass
class Stream:
    """One pass over a model.

    Args:
        sites: what will be rewritten.
        sequential: whether later sites see what was done to earlier ones; else both runs are the model as it was, and
            moments are of one input alone.
        targets: for a site, the tensor that its result is added to: the difference between both runs of that tensor is
            then part of what the site should make up for (`Moments.get("extra")`, absent where the runs cannot differ).
        threads: feeds that run side by side. The result does not depend on it.
    """

    model: Model
    sites: Sequence[WeightedOp]
    samples: Samples
    sequential: bool = True
    targets: Mapping[int, str] = field(default_factory=dict)
    threads: int = 1
    progress: Progress = no_progress
    seed: int = 0

    def __post_init__(self) -> None:
        self.waves = Waves(self.model, self.sites, self.targets)
        self._overrides: dict[tuple[int, int], np.ndarray[Any, Any]] = {}
        self._geometry = [Geometry.of(op) for op in self.sites]
        self._masks: list[NDArray[np.bool_] | None] = []
        self._feeds = sum(not self.samples.holds_out(number) for number in range(self.samples.count))

    def replace(self, site: int, rows: NDArray[Any], bias: tuple[tuple[int, int], NDArray[Any]] | None = None) -> None:
        """What the run that is rewritten computes with from the next wave on.

        Args:
            rows: `[n, k]`.
            bias: (number of the node, which input) and the constant to put there.
        """
        op = self.sites[site]
        self._overrides[self.waves.numbers[site], 1] = op.laid_out(rows)
        if bias is not None:
            self._overrides[bias[0]] = bias[1]

    def __iter__(self) -> Generator[list[Collected], None, None]:
        """The sites of each wave; `replace` them before asking for the next wave.

        Raises:
            ModelError: what has to wait between two waves is no numeric tensor, or what a site reads is not finite.
        """
        self._overrides.clear()
        with tempfile.TemporaryDirectory(prefix="spa-calibration-") as folder:
            runs = {}
            for which in (NOW, BEFORE) if self.sequential else (NOW,):
                Path(folder, which).mkdir()
                runs[which] = Spool(Path(folder, which))
            last = self.waves.last_use()
            for wave, segment in enumerate(self.waves.segments):
                self.progress("calibrating", wave, len(self.waves.segments))
                yield self._wave(wave, runs, last)
                for name in segment.takes:
                    if last[name] == wave:
                        for spool in runs.values():
                            spool.drop(name)
                for key in [key for key in self._overrides if key[0] in segment.nodes]:
                    del self._overrides[key]  # no later segment has the node
            self.progress("calibrating", len(self.waves.segments), len(self.waves.segments))

    def _wave(self, wave: int, runs: Mapping[str, Spool], last: Mapping[str, int]) -> list[Collected]:
        """Runs one segment over all samples, in both runs, and takes the moments of what its sites read."""
        keys = {site: self._key(site) for site, own in enumerate(self.waves.waves) if own == wave}
        whole = {key: Moments(self.sites[site].group, self.sites[site].k) for site, key in keys.items()}
        # What comes before every site is the same in both runs.
        differ = runs if wave else {NOW: runs[NOW]}
        sessions: dict[str, Any] = {}
        lock = threading.Lock()

        def work(number: int, common: Feeds) -> dict[_Key, Moments]:
            values = {}
            for which, spool in differ.items():
                arrays = common | {name: spool.get(name, number) for name in takes if name not in common}
                with lock:
                    if which not in sessions:
                        sessions[which] = self._open(wave, which, arrays)
                made = {} if sessions[which] is None else run(sessions[which], arrays)
                for name in self.waves.segments[wave].gives:
                    spool.put(name, number, made[name])
                values[which] = arrays | made
            return {key: self._moments(key, own, number, values) for key, own in whole.items()}

        takes = self.waves.segments[wave].takes
        feeds = self._read(runs[NOW], last) if wave == 0 else self._common(wave, runs[NOW])
        # Feeds side by side, one thread each, added up in their order: the bits do not depend on how many threads.
        with threadpool_limits(1, "blas"), ThreadPoolExecutor(self.threads) as pool:
            for number, parts in enumerate(_in_order(pool, work, enumerate(feeds), self.threads)):
                for key, part in parts.items():
                    whole[key].merge(part, into_half=number % 2 == 1)
        for site, key in keys.items():
            if not whole[key].finite:
                raise ModelError(
                    "it reads NaN or infinities on the calibration samples, or values too large to square",
                    where=f"node {self.sites[site].name!r}",
                    fix="See that the model computes finite numbers on them; `ignore` leaves the layer alone",
                )
        return [Collected(site, whole[key]) for site, key in keys.items()]

    def _open(self, wave: int, which: str, arrays: Feeds) -> Any:
        """A session on a segment, or None where it computes nothing."""
        if not self.waves.computed(wave):
            return None
        return open_session(self.waves.build(wave, arrays, self._overrides if which == NOW else {}))

    def _read(self, spool: Spool, last: Mapping[str, int]) -> Iterator[Feeds]:
        """The model's inputs for each sample; what later segments take of them is kept."""
        self._masks.clear()
        for sample in self.samples.feeds():
            if sample.held:
                continue
            for name in self.waves.inputs:
                if last.get(name, 0) > 0:
                    spool.put(name, len(self._masks), sample.feed[name])
            self._masks.append(sample.mask)
            yield {name: sample.feed[name] for name in self.waves.segments[0].takes}

    def _common(self, wave: int, spool: Spool) -> Iterator[Feeds]:
        """What a segment takes that is the same in both runs, for each sample."""
        names = [name for name in self.waves.segments[wave].takes if self.waves.is_common(name)]
        for number in range(len(self._masks)):
            yield {name: spool.get(name, number) for name in names}

    def _key(self, site: int) -> _Key:
        return str(self.sites[site].node.inputs[0].name), self._geometry[site], self.waves.watched.get(site)

    def _moments(self, key: _Key, like: Moments, number: int, values: Mapping[str, Feeds]) -> Moments:
        """The moments of one feed, for all sites with one key."""
        name, geometry, target = key
        now, before = values[NOW], values.get(BEFORE, values[NOW])
        x = geometry.view(now[name])
        z = x if before[name] is now[name] else geometry.view(before[name])
        lost = None
        if target is not None and before[target] is not now[target]:
            lost = np.subtract(before[target], now[target], dtype=np.float32)
        moments = Moments(like.groups, like.k)
        for which in self._parts(now[name], geometry.positions(x), geometry, moments, number):
            rows = geometry.rows(x, which)
            dense = rows if z is x else geometry.rows(z, which)
            extra = None if lost is None else geometry.at(lost, which, moments.groups)
            with np.errstate(over="ignore", invalid="ignore"):  # the wave says which site reads such values
                moments.add(rows, dense if self.sequential else None, extra)
        return moments

    def _parts(
        self, x: np.ndarray[Any, Any], total: int, geometry: Geometry, moments: Moments, number: int
    ) -> Iterator[NDArray[np.int64] | None]:
        """The positions that count, no more at a time than memory should hold; None for all."""
        which = self._positions(x, total, geometry, moments.k, number)
        have = total if which is None else len(which)
        most = max(1, _PART // (moments.groups * moments.k))
        if have <= most:
            yield which
            return
        which = np.arange(total) if which is None else which
        yield from (which[start : start + most] for start in range(0, have, most))

    def _positions(
        self, x: np.ndarray[Any, Any], total: int, geometry: Geometry, k: int, number: int
    ) -> NDArray[np.int64] | None:
        """Those that are not padding, and of them a fair share of what one matrix needs; None for all."""
        mask, which = self._masks[number], None
        if geometry.kind == "rows" and mask is not None and x.shape[:-1] in (mask.shape, (mask.size,)):
            which = np.flatnonzero(mask)
        quota = -(-max(MOST_ROWS, ROWS_PER_COLUMN * k) // self._feeds)
        have = total if which is None else len(which)
        if have <= quota:
            return which
        rng = np.random.default_rng((self.seed, number, total))
        drawn = np.sort(rng.choice(have, quota, replace=False))
        return drawn if which is None else which[drawn]


def as_it_is(
    model: Model,
    sites: Sequence[WeightedOp],
    samples: Samples,
    *,
    threads: int,
    progress: Progress = no_progress,
) -> Iterator[Collected]:
    """Moments of what each site reads in the model as it is, site by site; arguments are those of `Stream`."""
    for wave in Stream(model, sites, samples, sequential=False, threads=threads, progress=progress):
        yield from wave


def _in_order(
    pool: ThreadPoolExecutor, work: Callable[..., _Made], items: Iterable[tuple[Any, ...]], ahead: int
) -> Iterator[_Made]:
    """The results of `work`, in the order of the items, of which no more than `ahead` are in memory."""
    waiting: deque[Future[_Made]] = deque()
    for item in items:
        waiting.append(pool.submit(work, *item))
        if len(waiting) >= ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
