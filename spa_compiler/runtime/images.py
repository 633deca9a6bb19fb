"""Builds a region of convolutions, step by step.

    b = ImageBuilder()
    x = b.input(24)
    h = b.depthwise(b.linear(x, LinearSpec(...clip...)), DepthwiseSpec(Window(144, (3, 3), pads=(1, 1, 1, 1)), "clip"))
    b.output(b.linear(h, LinearSpec(...), residual=x))
    spec = b.finish()

An image is what `[images, channels, height, width]` holds of one image of the batch, channel by channel: pixels fill
the vector lanes, so nothing is packed, and where an image is an input or an output of the node it is used in place. A
step sees single pixels, a window of them with all channels, or a window of one channel. Sizes follow from those of the
inputs in every call.

Channels of an image are a **view** of it, and images that are put together (`concat`) are written where they belong in
what they make, as far as they are made here; others are copied. Neither is a step of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field

from spa_compiler.kernels import rx1
from spa_compiler.kernels.window import Window
from spa_compiler.runtime.image_plan import Image, chains_of, looped, slots_of
from spa_compiler.runtime.image_spec import (
    MAX_IMAGES,
    CombineSpec,
    DepthwiseSpec,
    ImageRegion,
    ImageSpec,
    fits_buffer,
)
from spa_compiler.runtime.region import MAX_INPUTS, MAX_OUTPUTS, LinearSpec


@dataclass
class ImageBuilder:
    """Collects the steps of one region."""

    inputs: list[int] = field(default_factory=list)
    outputs: list[Image] = field(default_factory=list)
    linears: list[LinearSpec] = field(default_factory=list)
    depthwises: list[DepthwiseSpec] = field(default_factory=list)
    windows: list[Window] = field(default_factory=list)  # whose largest values are taken
    combines: list[CombineSpec] = field(default_factory=list)
    _axes: set[int] = field(default_factory=set)
    _images: list[Image] = field(default_factory=list)
    _lines: list[str] = field(default_factory=list)
    _made_at: dict[int, int] = field(default_factory=dict)  # the image of each step

    def input(self, channels: int) -> Image:
        """The next input of the node."""
        self.inputs.append(channels)
        image = self._new(channels, "INPUT", len(self.inputs) - 1, None, 1.0)
        self._lines.append(f"spa_image_in(r, {image.number})")
        return image

    def linear(
        self,
        source: Image,
        spec: LinearSpec,
        residual: Image | None = None,
        term: tuple[Image, LinearSpec] | None = None,
    ) -> Image:
        """act(W x + b + residual) of every pixel; the activation is that of `spec`.

        Args:
            term: another image and a second product, added in the same pass; its bias is not read, and the activation
                is its own, since it comes last.
        """
        if spec.k != source.channels or (term is not None and not spec.same_chunks(term[1])):
            raise ValueError(f"{spec} cannot read {source.channels} channels, or is cut differently from its term")
        first, second, others = self._number(_pitched(spec)), "-1, 0", [residual] if residual else []
        if term is not None:
            second, others = f"{self._number(_pitched(term[1]))}, {term[0].number}", [term[0], *others]
        made = self._made(spec.n, "LINEAR", source, None, others)
        made.over = _apart(residual, [source] if term is None else [source, term[0]])
        arguments = f"{first}, {source.number}, {second}, {residual.number if residual else -1}, {made.number}"
        self._lines.append(f"spa_image_linear(r, {arguments})")
        return made

    def window(self, source: Image, window: Window, spec: LinearSpec, residual: Image | None = None) -> Image:
        """act(W x + b + residual), where x is what a window sees: a pixel of some, once the others are left out, is all
        of an image."""
        if window.channels != source.channels or spec.k != window.k:
            raise ValueError(f"{window} takes {window.k} columns of {window.channels} channels")
        if window.size == (1, 1) and not any(window.pads):
            return self.linear(self._every(source, window), spec, residual)
        number = self._number(spec)
        made = self._made(spec.n, "WINDOW", source, window, [residual] if residual else [])
        made.over = _apart(residual, [source])
        arguments = f"{number}, {source.number}, {residual.number if residual else -1}, {made.number}"
        self._lines.append(f"spa_image_window(r, {arguments})")
        return made

    def depthwise(self, source: Image, spec: DepthwiseSpec) -> Image:
        """Every channel through a window of its own."""
        if spec.window.channels != source.channels:
            raise ValueError(f"{spec} reads {source.channels} channels")
        self.depthwises.append(spec)
        made = self._made(source.channels, "DEPTHWISE", source, spec.window, [])
        self._lines.append(f"spa_image_depthwise(r, {len(self.depthwises) - 1}, {source.number}, {made.number})")
        return made

    def largest(self, source: Image, window: Window) -> Image:
        """The largest value of each channel that a window sees, in which padding is nothing."""
        if window.channels != source.channels:
            raise ValueError(f"{window} reads {source.channels} channels")
        if not fits_buffer(window):
            raise ValueError(f"{window} sees more than the buffer of a depthwise step holds")
        self.windows.append(window)
        made = self._made(source.channels, "LARGEST", source, window, [])
        self._lines.append(f"spa_image_largest(r, {len(self.windows) - 1}, {source.number}, {made.number})")
        return made

    def mean(self, source: Image, axes: int) -> Image:
        """The mean of each channel, an image of one pixel over `axes` axes."""
        made = self._made(source.channels, "MEAN", source, None, [])
        self._axes.add(axes)
        self._lines.append(f"spa_image_mean(r, {source.number}, {made.number})")
        return made

    def combine(self, source: Image, spec: CombineSpec, other: Image | None = None) -> Image:
        """An image and another one of its size, or of one pixel for `scale`, pixel by pixel."""
        if (other is None) != (spec.op == "copy") or (other is not None and other.channels != source.channels):
            raise ValueError(f"{spec} of {source.channels} and {other.channels if other else 'no'} channels")
        self.combines.append(spec)
        made = self._made(source.channels, "COMBINE", source, None, [other] if other else [])
        arguments = f"{len(self.combines) - 1}, {source.number}, {other.number if other else -1}, {made.number}"
        self._lines.append(f"spa_image_combine(r, {arguments})")
        return made

    def repeat(self, source: Image, grow: tuple[int, int], axes: int = 2) -> Image:
        """Every pixel as often, down and to the right, as `grow` says."""
        return self._grown("repeat", source, source.channels, grow, axes)

    def unfold(self, source: Image, grow: tuple[int, int], axes: int = 2) -> Image:
        """Channels (y, x, channel) of each pixel become its pixels (y, x) of every channel."""
        if source.channels % (grow[0] * grow[1]):
            raise ValueError(f"{source.channels} channels are not those of {grow[0]} x {grow[1]} pixels")
        return self._grown("unfold", source, source.channels // (grow[0] * grow[1]), grow, axes)

    def part(self, source: Image, first: int, channels: int) -> Image:
        """Some channels of an image: a view, no step."""
        if not 0 <= first < first + channels <= source.channels:
            raise ValueError(f"channels {first} .. {first + channels} of {source.channels}")
        made = self._view(source, channels, source.born)
        made.part_of, made.first = source, first
        source.parts.append(made)
        return made

    def concat(self, sources: Sequence[Image]) -> Image:
        """Images one behind the other. What is made here and has no place yet is written to its place at once."""
        pieces = _whole(sources)
        pieces = [p if self._movable(p, pieces) else self.combine(p, CombineSpec("copy")) for p in pieces]
        made = self._view(pieces[0], sum(p.channels for p in pieces), min(p.born for p in pieces))
        made.dies = max(p.dies for p in pieces)
        for piece in pieces:
            piece.part_of, piece.first = made, sum(p.channels for p in made.parts)
            made.parts.append(piece)
        return made

    def output(self, image: Image) -> None:
        """The next output of the node."""
        image.outputs.append(len(self.outputs))
        self.outputs.append(image)

    def finish(self) -> ImageRegion:
        """Plans scratch."""
        axes = self._axes | {w.axes for w in (i.window for i in self._images) if w is not None}
        if len(axes) > 1 or len(self.inputs) > MAX_INPUTS or len(self.outputs) > MAX_OUTPUTS:
            raise ValueError("windows of one and of two axes, or too many inputs or outputs, in one region")
        if len(self._images) > MAX_IMAGES:
            raise ValueError(f"more than {MAX_IMAGES} images in one region")
        for image in self._images:
            if not image.home.in_place or image.part_of is not None:
                for output in image.outputs:
                    self._lines.append(f"spa_image_out(r, {image.number}, {output})")
                    image.keep(len(self._lines) - 1)
        chains = chains_of(self._images)
        for first, last in chains:
            for image in self._images[first.number + 1 : last.number + 1]:
                image.born = first.born  # a loop makes all of them again and again
                image.home.born = min(image.home.born, image.born)
        slots, count = slots_of(self._images)
        return ImageRegion(
            max(axes, default=0),
            tuple(self.inputs),
            tuple(i.channels for i in self.outputs),
            tuple(i.number for i in self.outputs),
            tuple(self.linears),
            tuple(self.depthwises),
            tuple(self.windows),
            tuple(self.combines),
            tuple(
                ImageSpec(i.channels, i.kind, i.source, i.window, slots[i.home.number], i.home.number, i.place, i.grow)
                for i in self._images
            ),
            count,
            tuple((first.number, last.number) for first, last in chains),
            tuple(looped(self._lines, self._made_at, chains)),
        )

    def _number(self, spec: LinearSpec) -> int:
        self.linears.append(spec)
        return len(self.linears) - 1

    def _made(self, channels: int, kind: str, source: Image, window: Window | None, others: list[Image]) -> Image:
        for image in (source, *others):
            image.keep(len(self._lines))
            image.readers.append(len(self._lines))
        step = window.stride[0] * window.stride[1] if window else 1
        return self._new(channels, kind, source.number, window, source.shrunk / step)

    def _every(self, source: Image, window: Window) -> Image:
        """The pixels that a stride leaves."""
        made = self._made(source.channels, "EVERY", source, window, [])
        self._lines.append(f"spa_image_every(r, {source.number}, {made.number})")
        return made

    def _grown(self, step: str, source: Image, channels: int, grow: tuple[int, int], axes: int) -> Image:
        made = self._made(channels, "GROW", source, None, [])
        made.grow, made.shrunk = grow, source.shrunk * grow[0] * grow[1]
        self._axes.add(axes)
        self._lines.append(f"spa_image_{step}(r, {source.number}, {made.number})")
        return made

    def _view(self, source: Image, channels: int, born: int) -> Image:
        """An image that no step makes."""
        made = Image(len(self._images), channels, "VIEW", source.number, None, source.shrunk, born, source.dies)
        self._images.append(made)
        return made

    def _movable(self, image: Image, among: Sequence[Image]) -> bool:
        """Whether it can lie in another image: nothing else says where."""
        return image.kind != "INPUT" and image.part_of is None and sum(image is other for other in among) == 1

    def _new(self, channels: int, kind: str, source: int, window: Window | None, shrunk: float) -> Image:
        at = len(self._lines)
        self._made_at[at] = len(self._images)
        self._images.append(Image(len(self._images), channels, kind, source, window, shrunk, at, at))
        return self._images[-1]


def _pitched(spec: LinearSpec) -> LinearSpec:
    """The same, by kernels that do not ask where a channel lies, where asking takes its time."""
    return dataclasses.replace(spec, pitched=isinstance(spec.form, rx1.Blocks) and spec.form.rows == 1)


def _apart(residual: Image | None, sources: list[Image]) -> Image | None:
    """The residual, where none of the sources of the same step lies in it."""
    return None if residual is None or any(s.home is residual.home for s in sources) else residual


def _whole(sources: Sequence[Image]) -> list[Image]:
    """Images that are put together, with parts that make up all of another one, in order, replaced by that."""
    found: list[Image] = []
    at = 0
    while at < len(sources):
        whole, end, channels = sources[at].part_of, at, 0
        while end < len(sources) and whole and (sources[end].part_of, sources[end].first) == (whole, channels):
            channels += sources[end].channels
            end += 1
        if whole is not None and channels == whole.channels:
            found.append(whole)
            at = end
        else:
            found.append(sources[at])
            at += 1
    return found if found == list(sources) else _whole(found)
