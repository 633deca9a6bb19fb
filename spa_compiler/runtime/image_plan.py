"""Images while their region is built, and what is decided of them at its end: chains, and slots of scratch.

Steps in a **chain**, each of which alone reads what the one before makes, are computed band by band of rows, so that
what lies between them never leaves L2. A chain sees a window once at most: rows around a band are computed for both of
its neighbours, and that adds up. Images that do not live at the same time share slots of scratch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from spa_compiler.kernels.window import Window

_IN_CHAINS = {"LINEAR", "WINDOW", "DEPTHWISE"}
_EXACT = ("LINEAR", "WINDOW")  # steps that write no float behind an image


@dataclass(eq=False)
class Image:
    """One image of a region, alive from step `born` to step `dies`."""

    number: int
    channels: int
    kind: str
    source: int
    window: Window | None
    shrunk: float  # pixels, as a share of those of its input
    born: int
    dies: int
    grow: tuple[int, int] = (1, 1)
    readers: list[int] = field(default_factory=list)  # steps
    outputs: list[int] = field(default_factory=list)
    part_of: Image | None = None  # of whose channels, from `first` on, it is a view
    first: int = 0
    parts: list[Image] = field(default_factory=list)  # that are views of it
    over: Image | None = None  # may be written where this one lies: a residual, each float of which is read just before

    @property
    def home(self) -> Image:
        """The image that it lies in."""
        return self if self.part_of is None else self.part_of.home

    @property
    def place(self) -> int:
        """Its first channel there."""
        return 0 if self.part_of is None else self.first + self.part_of.place

    @property
    def weight(self) -> float:
        """What its slot must hold, as far as that is known here."""
        return self.channels * self.shrunk

    @property
    def in_place(self) -> bool:
        """Whether it is written straight to an output: nothing reads it, since what reads, reads whole registers."""
        if len(self.outputs) != 1 or self.readers or self.part_of is not None:
            return False
        if self.kind == "VIEW":
            return all(p.kind in _EXACT and not (p.outputs or p.readers or p.parts) for p in self.parts)
        return self.kind in _EXACT and not self.parts

    def keep(self, step: int) -> None:
        """It is read at `step`, and with it all that it lies in."""
        self.dies = max(self.dies, step)
        if self.part_of is not None:
            self.part_of.keep(step)


def chains_of(images: Sequence[Image]) -> list[tuple[Image, Image]]:
    """The first and the last image of every chain, from left to right.

    Behind its window a chain goes on as long as images get smaller: what ends it is written as a whole.
    """
    chains, at = [], 0
    while at < len(images):
        last = at
        while last + 1 < len(images) and _continues(images, at, last):
            last += 1
        if last > at:
            chains.append((images[at], images[last]))
        at = last + 1
    return chains


def _continues(images: Sequence[Image], first: int, last: int) -> bool:
    """Whether the image behind `last` belongs to the chain from `first` to `last`."""
    chain, image, following = images[first : last + 1], images[last], images[last + 1]
    if not {image.kind, following.kind} <= _IN_CHAINS or following.source != last:
        return False
    if following.born != image.born + 1 or image.part_of is not None or image.parts:
        return False
    if image.readers != [following.born] or image.outputs:
        return False
    seen = any(i.window for i in chain)
    return not (seen and (following.window or following.weight > image.weight))


def looped(lines: Sequence[str], made_at: Mapping[int, int], chains: Sequence[tuple[Image, Image]]) -> list[str]:
    """The statements of all steps, those of a chain in a loop over its bands."""
    before: dict[int, str] = {}
    after: dict[int, str] = {}
    for number, (first, last) in enumerate(chains):
        steps = [i for i, image in made_at.items() if first.number <= image <= last.number]
        before[min(steps)] = f"for (int64_t n = 0; spa_image_band(r, {number}, n); ++n) {{"
        after[max(steps)] = "}"
    out = []
    for i, line in enumerate(lines):
        out += [before[i]] if i in before else []
        out.append(f"TRY({line});")
        out += [after[i]] if i in after else []
    return out


def slots_of(images: Sequence[Image]) -> tuple[dict[int, int], int]:
    """The slot of every image that is no part of another, and how many there are: that of a residual that nothing
    needs any more, whose lines are in the caches when the sum is written; else the free one that fits best."""
    sizes: list[float] = []
    free_from: list[int] = []
    places: dict[int, int] = {}
    for image in sorted((i for i in images if i.part_of is None), key=lambda i: i.born):
        if image.in_place:
            places[image.number] = -1 - image.outputs[0]
            continue
        free = [s for s in range(len(sizes)) if free_from[s] <= image.born]
        over = image.over
        if over is not None and over.dies == image.born and places.get(over.number, -1) >= 0:
            slot = places[over.number]
        elif free:
            slot = min(free, key=lambda s: (sizes[s] < image.weight, abs(sizes[s] - image.weight)))
        else:
            slot = len(sizes)
            sizes.append(0.0)
            free_from.append(0)
        sizes[slot] = max(sizes[slot], image.weight)
        free_from[slot] = image.dies + 1
        places[image.number] = slot
    return places, len(sizes)
