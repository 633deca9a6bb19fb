"""A region of convolutions as data: which steps make which images, and where those lie in scratch.

    b = ImageBuilder()
    x = b.input(24)
    h = b.depthwise(b.linear(x, LinearSpec(...clip...)), DepthwiseSpec(Window(144, (3, 3), pads=(1, 1, 1, 1)), "clip"))
    b.output(b.linear(h, LinearSpec(...), residual=x))
    spec = b.finish()

An image is what `[images, channels, height, width]` holds of one image of the batch, channel by channel: pixels fill
the vector lanes, so nothing is packed, and where an image is an input or an output of the node it is used in place. A
step sees single pixels, a window of them with all channels, or a window of one channel. Sizes follow from those of the
inputs in every call; images that do not live at the same time share slots of scratch.

Steps in a **chain**, each of which alone reads what the one before makes, are computed band by band of rows, so that
what lies between them never leaves L2. A chain sees a window once at most: rows around a band are computed for both of
its neighbours, and that adds up.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

from spa_compiler.kernels.window import Window
from spa_compiler.runtime.region import MAX_INPUTS, MAX_OUTPUTS, LinearSpec

MAX_IMAGES = 256  # of the C side: region.h
_BLOCK, _BUFFER, _REGISTER, _STEP = 8, 16 << 10, 16, 8  # of depthwise.c


@dataclass(frozen=True)
class DepthwiseSpec:
    """y = act(w * x + b), each channel by itself; `window.channels` is how many there are."""

    window: Window
    act: str = "none"
    low: float = 0.0
    high: float = 0.0

    def __post_init__(self) -> None:
        if not fits_buffer(self.window):
            raise ValueError(f"{self.window} sees more than the buffer of a depthwise step holds")


def fits_buffer(window: Window) -> bool:
    """Whether a block of rows of one register of outputs sees no more than depthwise.c has room for."""
    rows = (_BLOCK - 1) * window.stride[0] + (window.size[0] - 1) * window.dilation[0] + 2
    pitch = _REGISTER + (window.size[1] - 1) * window.dilation[1] // window.stride[1]
    return rows * window.stride[1] * -(-pitch // _STEP) * _STEP <= _BUFFER


@dataclass(frozen=True)
class ImageSpec:
    """What a step makes: `kind` is INPUT, LINEAR, WINDOW or DEPTHWISE.

    Attributes:
        source: the input's number, or the image that it is made of and that gives its size.
        window: that the size is seen through; None keeps it.
        slot: of scratch; below 0 it is output -1 - slot of the node, written in place.
    """

    channels: int
    kind: str
    source: int
    window: Window | None
    slot: int


@dataclass(frozen=True)
class ImageRegion:
    """Everything about a region of convolutions but its weights. `lines` are the C calls, in order.

    Attributes:
        axes: of the windows; 0 where there are none, and images may have any number of axes.
        output_images: which images are the outputs.
    """

    axes: int
    input_features: tuple[int, ...]
    output_features: tuple[int, ...]
    output_images: tuple[int, ...]
    linears: tuple[LinearSpec, ...]
    depthwise: tuple[DepthwiseSpec, ...]
    images: tuple[ImageSpec, ...]
    slots: int
    chains: tuple[tuple[int, int], ...]  # the first and the last image of each
    lines: tuple[str, ...]

    @property
    def statements(self) -> list[str]:
        """The body of its function in C."""
        return list(self.lines)

    @property
    def op_type(self) -> str:
        """`Region_<hash>`: the name of the op in the domain ai.spa."""
        return f"Region_{hashlib.sha256(repr(self).encode()).hexdigest()[:10]}"


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
    readers: list[int] = field(default_factory=list)  # steps
    outputs: list[int] = field(default_factory=list)

    @property
    def weight(self) -> float:
        """What its slot must hold, as far as that is known here."""
        return self.channels * self.shrunk


@dataclass
class ImageBuilder:
    """Collects the steps of one region."""

    inputs: list[int] = field(default_factory=list)
    outputs: list[Image] = field(default_factory=list)
    linears: list[LinearSpec] = field(default_factory=list)
    depthwises: list[DepthwiseSpec] = field(default_factory=list)
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
        first, second, others = self._number(spec), "-1, 0", [residual] if residual else []
        if term is not None:
            second, others = f"{self._number(term[1])}, {term[0].number}", [term[0], *others]
        made = self._made(spec.n, "LINEAR", source, None, others)
        arguments = f"{first}, {source.number}, {second}, {residual.number if residual else -1}, {made.number}"
        self._lines.append(f"spa_image_linear(r, {arguments})")
        return made

    def window(self, source: Image, window: Window, spec: LinearSpec, residual: Image | None = None) -> Image:
        """act(W x + b + residual), where x is what a window sees."""
        if window.channels != source.channels or spec.k != window.k:
            raise ValueError(f"{window} takes {window.k} columns of {window.channels} channels")
        number = self._number(spec)
        made = self._made(spec.n, "WINDOW", source, window, [residual] if residual else [])
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

    def output(self, image: Image) -> None:
        """The next output of the node."""
        image.outputs.append(len(self.outputs))
        self.outputs.append(image)

    def finish(self) -> ImageRegion:
        """Plans scratch."""
        axes = {w.axes for w in (i.window for i in self._images) if w is not None}
        if len(axes) > 1 or len(self.inputs) > MAX_INPUTS or len(self.outputs) > MAX_OUTPUTS:
            raise ValueError("windows of one and of two axes, or too many inputs or outputs, in one region")
        if len(self._images) > MAX_IMAGES:
            raise ValueError(f"more than {MAX_IMAGES} images in one region")
        for image in self._images:
            if not self._in_place(image):
                for output in image.outputs:
                    self._lines.append(f"spa_image_out(r, {image.number}, {output})")
                    image.dies = len(self._lines) - 1
        chains = self._chains()
        for first, last in chains:
            for image in self._images[first.number + 1 : last.number + 1]:
                image.born = first.born  # a loop makes all of them again and again
        slots, count = self._slots()
        return ImageRegion(
            max(axes, default=0),
            tuple(self.inputs),
            tuple(i.channels for i in self.outputs),
            tuple(i.number for i in self.outputs),
            tuple(self.linears),
            tuple(self.depthwises),
            tuple(ImageSpec(i.channels, i.kind, i.source, i.window, slots[i.number]) for i in self._images),
            count,
            tuple((first.number, last.number) for first, last in chains),
            tuple(self._looped(chains)),
        )

    def _chains(self) -> list[tuple[Image, Image]]:
        """The first and the last image of every chain, from left to right.

        Behind its window a chain goes on as long as images get smaller: what ends it is written as a whole.
        """
        chains, at = [], 0
        while at < len(self._images):
            last = at
            while last + 1 < len(self._images) and self._continues(at, last):
                last += 1
            if last > at:
                chains.append((self._images[at], self._images[last]))
            at = last + 1
        return chains

    def _continues(self, first: int, last: int) -> bool:
        """Whether the image behind `last` belongs to the chain from `first` to `last`."""
        chain, image, following = self._images[first : last + 1], self._images[last], self._images[last + 1]
        if "INPUT" in (image.kind, following.kind) or following.source != last or following.born != image.born + 1:
            return False
        if image.readers != [following.born] or image.outputs:
            return False
        seen = any(i.window for i in chain)
        return not (seen and (following.window or following.weight > image.weight))

    def _looped(self, chains: list[tuple[Image, Image]]) -> list[str]:
        """The statements of all steps, those of a chain in a loop over its bands."""
        before: dict[int, str] = {}
        after: dict[int, str] = {}
        for number, (first, last) in enumerate(chains):
            steps = [i for i, image in self._made_at.items() if first.number <= image <= last.number]
            before[min(steps)] = f"for (int64_t n = 0; spa_image_band(r, {number}, n); ++n) {{"
            after[max(steps)] = "}"
        out = []
        for i, line in enumerate(self._lines):
            out += [before[i]] if i in before else []
            out.append(f"TRY({line});")
            out += [after[i]] if i in after else []
        return out

    def _in_place(self, image: Image) -> bool:
        """Whether it is written straight to an output: nothing reads it, since what reads, reads whole registers."""
        return len(image.outputs) == 1 and not image.readers and image.kind in ("LINEAR", "WINDOW")

    def _slots(self) -> tuple[list[int], int]:
        """The slot of every image, and how many there are: of those free, the one that fits best."""
        sizes: list[float] = []
        free_from: list[int] = []
        places = []
        for image in self._images:
            if self._in_place(image):
                places.append(-1 - image.outputs[0])
                continue
            free = [s for s in range(len(sizes)) if free_from[s] <= image.born]
            if free:
                slot = min(free, key=lambda s: (sizes[s] < image.weight, abs(sizes[s] - image.weight)))
            else:
                slot = len(sizes)
                sizes.append(0.0)
                free_from.append(0)
            sizes[slot] = max(sizes[slot], image.weight)
            free_from[slot] = image.dies + 1
            places.append(slot)
        return places, len(sizes)

    def _number(self, spec: LinearSpec) -> int:
        self.linears.append(spec)
        return len(self.linears) - 1

    def _made(self, channels: int, kind: str, source: Image, window: Window | None, others: list[Image]) -> Image:
        for image in (source, *others):
            image.dies = len(self._lines)
            image.readers.append(len(self._lines))
        step = window.stride[0] * window.stride[1] if window else 1
        return self._new(channels, kind, source.number, window, source.shrunk / step)

    def _new(self, channels: int, kind: str, source: int, window: Window | None, shrunk: float) -> Image:
        at = len(self._lines)
        self._made_at[at] = len(self._images)
        self._images.append(Image(len(self._images), channels, kind, source, window, shrunk, at, at))
        return self._images[-1]
