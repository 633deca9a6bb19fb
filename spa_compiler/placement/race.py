"""Races of whole models: looked up, or run; in heats, where all of them at once would take too much memory."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from spa_compiler.graph.session import Feeds
from spa_compiler.placement.measure import CLOSE, Timing
from spa_compiler.placement.records import Records
from spa_compiler.placement.timer import Contender, Timer, bytes_of

TOGETHER = 512 << 20
"""Models of fewer bytes than this, all in all, race at once."""

Table = list[dict[str, Timing]]
"""Contender -> timing, for each shape."""


@dataclass
class Race:
    """Takes the times of whole models that take turns, or those of the records: the key is every contender's bytes.

    Attributes:
        records: to look up and to keep them in; None: neither.
    """

    timer: Timer
    threads: int
    records: Records | None = None
    _digests: dict[Path, tuple[object, str]] = field(default_factory=dict, repr=False)

    def __call__(
        self, contenders: Mapping[str, Contender], feeds: Feeds, seconds: float, rounds: int
    ) -> dict[str, Timing]:
        timings = self.known(contenders, feeds)
        if timings is None:
            timings = self.timer.time(contenders, feeds, self.threads, seconds, rounds)
            if self.records:
                self.records.put(self._question(contenders, feeds), timings)
        return timings

    def known(self, contenders: Mapping[str, Contender], feeds: Feeds) -> dict[str, Timing] | None:
        """What the records say."""
        return self.records.get(self._question(contenders, feeds)) if self.records else None

    def rest(self) -> None:
        """Frees what the timer keeps for the next times."""
        self.timer.rest()

    def _question(self, contenders: Mapping[str, Contender], feeds: Feeds) -> dict[str, object]:
        files = {name: self._digest(each.model) for name, each in contenders.items()}
        shapes = {name: list(array.shape) for name, array in feeds.items()}
        return {"race": files, "threads": self.threads, "shapes": shapes}

    def _digest(self, model: Path | bytes) -> str:
        if isinstance(model, bytes):
            return hashlib.sha256(model).hexdigest()
        state = model.stat()
        version = state.st_ino, state.st_size, state.st_mtime_ns
        if self._digests.get(model, (None, ""))[0] != version:
            with model.open("rb") as file:
                self._digests[model] = version, hashlib.file_digest(file, "sha256").hexdigest()
        return self._digests[model][1]


@dataclass(frozen=True)
class Result:
    """What came of a race.

    Attributes:
        table: everybody's times. Those of one heat are times of one race; others are given as if they had run in the
            last heat, by the yardstick, which runs in all.
        finalists: who ran against the source in the last heat, and has not lost to it if there were several heats.
        heats: how many there were.
    """

    table: Table
    finalists: tuple[str, ...]
    heats: int = 1


def compete(
    race: Race,
    contenders: Mapping[str, Contender],
    source: str,
    yardstick: str,
    feeds: Sequence[Feeds],
    seconds: float,
    rounds: int,
) -> Result:
    """Races all contenders at every shape.

    If they are too large to be loaded at once, they run in heats, each beside the yardstick; then the fastest of them
    runs against the source and the yardstick. If it loses there at any shape, the next one does.

    Args:
        source, yardstick: two of the contenders, that all others have to beat.
    """
    sizes = {name: bytes_of(each) for name, each in contenders.items()}
    others = [name for name in contenders if name not in (source, yardstick)]
    room = max(TOGETHER, sizes[source] + sizes[yardstick] + max((sizes[name] for name in others), default=0))
    if sum(sizes.values()) <= room:
        table = [race(contenders, feed, seconds, rounds) for feed in feeds]
        return Result(table, tuple(others))

    def heat(names: Sequence[str]) -> Table:
        return [race({name: contenders[name] for name in names}, feed, seconds, rounds) for feed in feeds]

    heats = [heat([yardstick, *names]) for names in share_out(others, sizes, room - sizes[yardstick])]
    gains = {
        name: [times[yardstick].median_us / times[name].median_us for times in table]
        for table in heats
        for name in table[0]
        if name != yardstick
    }
    best = sorted((name for name in others if worth(gains[name])), key=lambda name: -_mean(gains[name]))
    winner: tuple[str, ...] = ()
    count = len(heats)
    for name in best:
        heats.append(heat([source, yardstick, name]))
        if worth([min(t[source].median_us, t[yardstick].median_us) / t[name].median_us for t in heats[-1]]):
            winner = (name,)
            break
    if len(heats) == count:
        heats.append(heat([source, yardstick]))
    return Result(_together(list(contenders), heats, yardstick), winner, len(heats))


def share_out(names: Sequence[str], sizes: Mapping[str, int], room: int) -> list[list[str]]:
    """Groups of names, in order, that fit into a room; who does not fit is alone."""
    groups: list[list[str]] = []
    left = 0
    for name in names:
        if not groups or sizes[name] > left:
            groups.append([])
            left = room
        groups[-1].append(name)
        left -= sizes[name]
    return groups


def worth(gains: Sequence[float]) -> bool:
    """Whether speed-ups, one for each shape, are a gain: in the mean, and a loss nowhere."""
    return min(gains) >= 1 - CLOSE and _mean(gains) > 1 + CLOSE


def _mean(gains: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, gains)) / len(gains))


def _together(names: Sequence[str], heats: Sequence[Table], yardstick: str) -> Table:
    """One table of all heats, in the order of `names`; the latest times of each, in terms of the last heat."""
    found: Table = [{} for _ in heats[-1]]
    for table in heats:
        for row, times, last in zip(found, table, heats[-1], strict=True):
            scale = last[yardstick].median_us / times[yardstick].median_us
            row.update({name: _scaled(timing, scale) for name, timing in times.items()})
    return [{name: row[name] for name in names} for row in found]


def _scaled(timing: Timing, factor: float) -> Timing:
    if factor == 1:
        return timing
    return dataclasses.replace(
        timing, median_us=timing.median_us * factor, p10_us=timing.p10_us * factor, p90_us=timing.p90_us * factor
    )
