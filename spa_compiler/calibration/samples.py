"""The calibration samples: read, checked, batched, some of them held out.

Of every eight feeds the last is held out: no solver sees it, and the report's estimate of what a run changed comes
from it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from spa_compiler.calibration import data, examples, synthetic
from spa_compiler.calibration.shapes import Shapes
from spa_compiler.errors import UsageError
from spa_compiler.graph.model import Model
from spa_compiler.graph.session import Feeds

SYNTHETIC = "synthetic"
"""The DATA that stands for noise."""

HOLD_OUT = 8
"""One feed in this many is held out."""

BATCH = 32
"""Samples of an .npz or a folder that run together where their shapes agree."""

_AHEAD = 512
"""Samples to look at for such that agree."""

_MOST_BYTES = 1 << 26
"""Of the samples that are looked at ahead, and of a batch."""


@dataclass(frozen=True)
class Sample:
    """One feed. `mask [batch, positions]` is True where there is no padding, None where the feed has no mask."""

    feed: Feeds
    held: bool
    mask: NDArray[np.bool_] | None


@dataclass(frozen=True)
class Samples:
    """Feeds that can be gone through again and again, always the same.

    Attributes:
        read: each call goes through the feeds from the start.
        count: how many feeds there are.
        rows: how many samples they hold: the sizes of their first axes.
        synthetic: whether they are noise.
    """

    read: Callable[[], Iterator[Feeds]]
    count: int
    rows: int = 0
    synthetic: bool = False

    def feeds(self) -> Iterator[Sample]:
        """Every feed, and whether it is held out.

        Raises:
            UsageError: there are not as many as before.
        """
        seen = 0
        for seen, feed in enumerate(self.read(), 1):
            yield Sample(feed, self.holds_out(seen - 1), padding_mask(feed))
        if seen != self.count:
            raise UsageError(
                f"there were {self.count} feeds of samples at first, and {seen} when they were read again",
                fix="Give the same ones at every call of the function",
            )

    def holds_out(self, number: int) -> bool:
        """Whether a feed is held out: each eighth, the last one of fewer, never a single one."""
        last = self.count - 1 if 1 < self.count < HOLD_OUT else None
        return number % HOLD_OUT == HOLD_OUT - 1 or number == last


def load(source: str, model: Model, shapes: Shapes, seed: int) -> Samples:
    """Opens DATA, or makes noise, and goes through it once to see that it fits.

    Args:
        source: DATA as in `data.read`, or `synthetic`.
        shapes: of noise.

    Raises:
        UsageError: it does not fit the model (names, types, shapes), holds NaN or infinities or ids that a table does
            not have, or holds nothing.
    """
    if source == SYNTHETIC:
        first = next(synthetic.feeds(model, shapes, seed))
        return Samples(
            lambda: synthetic.feeds(model, shapes, seed), synthetic.FEEDS, synthetic.FEEDS * size_of(first), True
        )
    each = data.read(source, model)

    def grouped(feeds: Iterator[Feeds]) -> Iterator[Feeds]:
        return feeds if data.is_function(source) else batched(feeds, model)

    count = rows = 0
    for feed in grouped(_checked(each(), examples.bounds(model), source)):
        count += 1
        rows += size_of(feed)
    if not count:
        raise UsageError("it holds no samples", where=source, fix="Give at least one; a few hundred are better")
    return Samples(lambda: grouped(each()), count, rows)


def padding_mask(feed: Feeds) -> NDArray[np.bool_] | None:
    """True where a rank-2 input whose name says "mask" is not zero; None where no input is one, or it masks nothing."""
    for name, array in feed.items():
        if "mask" in name.lower() and array.ndim == 2 and array.dtype.kind in "iubf":
            mask = array != 0
            return None if mask.all() else mask
    return None


def batched(feeds: Iterator[Feeds], model: Model) -> Iterator[Feeds]:
    """Feeds of one sample that agree in shape, together; as they are where a first axis is fixed."""
    open_first = all(value.shape and not isinstance(value.shape[0], int) for value in model.signature.inputs)
    if not open_first:
        yield from feeds
        return
    waiting: list[Feeds] = []
    held, all_of_them = 0, True
    for feed in feeds:
        waiting.append(feed)
        held += sum(array.nbytes for array in feed.values())
        if len(waiting) == _AHEAD or held > _MOST_BYTES:
            yield from _together(waiting, BATCH)
            waiting, held, all_of_them = [], 0, False
    # Of a few samples some must be held out, too, and what is held out are whole feeds.
    yield from _together(waiting, min(BATCH, max(1, len(waiting) // HOLD_OUT)) if all_of_them else BATCH)


def _together(feeds: Sequence[Feeds], size: int) -> Iterator[Feeds]:
    alike: dict[tuple[tuple[int, ...], ...], list[Feeds]] = {}
    for feed in feeds:
        alike.setdefault(tuple(array.shape for array in feed.values()), []).append(feed)
    for several in alike.values():
        for start in range(0, len(several), size):
            part = several[start : start + size]
            yield {name: np.concatenate([feed[name] for feed in part]) for name in part[0]}


def size_of(feed: Feeds) -> int:
    """How many samples a feed holds: the size of its first axes."""
    return max((array.shape[0] for array in feed.values() if array.ndim), default=1)


def _checked(feeds: Iterator[Feeds], bounds: dict[str, int], source: str) -> Iterator[Feeds]:
    for number, feed in enumerate(feeds):
        _check(feed, bounds, source, number)
        yield feed


def _check(feed: Feeds, bounds: dict[str, int], source: str, number: int) -> None:
    for name, array in feed.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise UsageError(
                f"sample {number} of {name!r} holds NaN or infinity", where=source, fix="Leave such samples out"
            )
        if name in bounds and array.size and (int(array.max()) >= bounds[name] or int(array.min()) < -bounds[name]):
            worst = int(array.max()) if int(array.max()) >= bounds[name] else int(array.min())
            raise UsageError(
                f"sample {number} of {name!r} holds {worst}, but the model's table has {bounds[name]} entries",
                where=source,
                fix="Use the tokenizer that belongs to the model",
            )
        if array.size == 0:
            raise UsageError(f"sample {number} of {name!r} is empty", where=source)
