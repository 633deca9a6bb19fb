"""The form of a site on a GPU: by times where there are any, else by a stated model, and said to be no measurement.

    dense      launch + start + max(2 n k tokens / (share of the tensor cores), bytes / bandwidth)     as cuBLAS does it
    form       what the form says of itself (`kernels/cuda/form.py`), in the variant that it would launch

Both are microseconds of one launch in a CUDA graph. The share of the tensor cores that cuBLAS reaches: 0.75 of the rate
in the datasheet at 4096 x 4096 x 4096 (on Hopper by wgmma, which `mma.sync` does not reach), times how full its last
wave of tiles is. All weights of a model pass through L2 between two runs, so they are read from memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from spa_compiler.errors import SpaError
from spa_compiler.kernels.cuda import roofline
from spa_compiler.kernels.cuda.form import F32, LAUNCH_US, Arrays, Dtype, Epilogue, Form, Kernel, Layout, holds
from spa_compiler.kernels.cuda.forms import FORMS
from spa_compiler.kernels.cuda.lowrank import LowRank
from spa_compiler.kernels.cuda.matvec import FourBit
from spa_compiler.placement.candidates import DENSE, LOW_RANK
from spa_compiler.placement.choose import nothing_to_leave_out
from spa_compiler.placement.gpu_sites import PIXEL, Pair
from spa_compiler.placement.measure import CLOSE, Timing
from spa_compiler.placement.sites import Site
from spa_compiler.runtime.gpu import NodeLayout, kernel_layout
from spa_compiler.targets.cuda import Architecture

#: By the model alone a kernel must come out this much faster than dense: neither side's errors are known.
MARGIN = 1.2
#: What the clock is asked: the forms that the model puts first.
WORTH_TIMING = 3
#: A launch picks its variant by the number of tokens: at most so many, the last one for any number.
LIMITS: tuple[int | None, ...] = (1, 8, 16, 32, 64, 256, None)
MANY = 4096
"""Tokens that the last variant is picked at."""

MOST_STORED = 0.8
"""A form that stores more of a weight's bytes is not packed: cuBLAS reads and multiplies all of it in that time."""

_SAMPLE = 256

_REACHED = 0.75  # of the tensor cores' rate, by cuBLAS
_TILE = (128, 128)  # of cuBLAS, outputs by tokens; halved while tiles do not fill the chip
_BYTES = {"fp16": 2, "bf16": 2, "fp32": 4}

Variants = tuple[tuple[int | None, Kernel], ...]
"""(most tokens, kernel), with more and more tokens; None for any number."""


@dataclass(frozen=True)
class GpuForm:
    """A form as one site has it: with what it launches."""

    form: Form
    dtype: Dtype
    layout: NodeLayout
    epilogue: Epilogue
    variants: Variants

    @property
    def name(self) -> str:
        return self.form.name

    @property
    def pattern(self) -> str:
        """The zeros that it takes, or `4-bit`."""
        return DENSE if isinstance(self.form, LowRank) else self.form.name.split()[0]

    def kernel(self, tokens: int) -> Kernel:
        """What is launched for so many tokens."""
        return next(kernel for most, kernel in self.variants if most is None or tokens <= most)


@dataclass(frozen=True)
class Candidate:
    """A form that holds a site's weight; `expected_us` for each measured shape."""

    form: GpuForm
    arrays: Arrays
    expected_us: tuple[float, ...]


@dataclass(frozen=True)
class GpuChoice:
    """What one site got; the fields are those of `choose.Choice`."""

    site: Site
    form: GpuForm | None
    reason: str
    would_help: str = ""
    timings: tuple[dict[str, Timing], ...] = ()
    tokens: tuple[int, ...] = ()
    candidate: str = DENSE
    expected: float = 1.0
    arrays: Arrays | None = None  # of the node; None where it has none, or where `pair.up` has it
    expected_us: tuple[float, ...] = ()  # by the model, as chosen, at each measured shape
    pair: Pair | None = None  # the low-rank layer that became one node

    @property
    def kind(self) -> str:
        """dense, sparse, low rank or 4-bit: that has no need of zeros, but room for them."""
        if self.form is None:
            return DENSE
        if isinstance(self.form.form, FourBit):
            return self.form.pattern
        return "sparse" if self.pair is None else LOW_RANK

    @property
    def home(self) -> Site:
        """The site that the node is called after."""
        return self.site if self.pair is None else self.pair.up

    @property
    def gain(self) -> float:
        """Speed over dense, geometric mean over the shapes; as the model has it where nothing was timed."""
        if self.form is None or not self.timings:
            return self.expected
        return mean([t[DENSE].median_us / t[self.candidate].median_us for t in self.timings])


def candidates(
    site: Site, archs: Sequence[Architecture], dtype: Dtype, sizes: Sequence[tuple[int, int]]
) -> list[Candidate]:
    """The forms that hold the site's weight, the fastest by the model first.

    Args:
        archs: the library is to run on each of them.
        sizes: (tokens, images) at each measured shape.
    """
    weight, (n, k) = site.weight, site.weight.shape
    # What a weight without zeros takes is known from any of them.
    alike = weight if site.density < 1 else np.ones((_SAMPLE, _SAMPLE), np.float32)
    epilogue = Epilogue(site.act, site.residual is not None)
    layout = kernel_layout(node_layout(site))
    found = []
    passed: set[Form] = set()
    for form in FORMS:
        if form.rather in passed:
            passed.add(form)
            continue
        if form.stored(alike, dtype) > MOST_STORED:
            continue
        try:
            arrays = form.pack(weight, dtype)
        except ValueError:  # it cannot hold this weight
            continue
        passed.add(form)
        variants = variants_of(form, arrays, archs, dtype, layout, epilogue, (n, k))
        if variants:
            own = GpuForm(form, dtype, node_layout(site), epilogue, variants)
            found.append(Candidate(own, arrays, costs_of(own, arrays, archs, (n, k), sizes)))
    return sorted(found, key=lambda c: mean(c.expected_us))


def node_layout(site: Site) -> NodeLayout:
    """How activations of a site look (`gpu_sites.py`)."""
    return "pixel" if site.layout == PIXEL else "planes" if site.layout == "planes" else "rows"


def costs_of(
    own: GpuForm,
    arrays: Arrays,
    archs: Sequence[Architecture],
    shape: tuple[int, int],
    sizes: Sequence[tuple[int, int]],
) -> tuple[float, ...]:
    """Microseconds that a form should take at each of `sizes`, for a weight of `shape` [n, k]."""
    return tuple(
        mean([own.form.cost(a, own.kernel(t), arrays, *shape, t, images) for a in archs]) for t, images in sizes
    )


def variants_of(
    form: Form,
    arrays: Arrays,
    archs: Sequence[Architecture],
    dtype: Dtype,
    layout: Layout,
    epilogue: Epilogue,
    shape: tuple[int, int],
) -> Variants:
    """For each number of tokens the kernel that should be the fastest of those that every architecture can launch."""
    best: list[tuple[int | None, Kernel]] = []
    for most in LIMITS:
        tokens = most or MANY
        options = form.kernels(archs[0], dtype, layout, epilogue, tokens)
        fitting = [kernel for kernel in options if all(kernel.fits(arch) for arch in archs)]
        if not fitting:
            continue
        costs = {k.name: mean([form.cost(a, k, arrays, *shape, tokens) for a in archs]) for k in fitting}
        kernel = min(fitting, key=lambda k: costs[k.name])
        if best and best[-1][1].name == kernel.name:
            best[-1] = (most, kernel)
        else:
            best.append((most, kernel))
    if best:
        best[-1] = (None, best[-1][1])  # all compute the same for any number of tokens
    return tuple(best)


def dense_us(arch: Architecture, dtype: Dtype, n: int, k: int, tokens: int, images: int = 1) -> float:
    """Microseconds that cuBLAS should take, by the model above."""
    size, columns = _BYTES[dtype], tokens * images
    rate = arch.tensor_tflops * (0.5 if dtype == "fp32" else 1.0) * _REACHED
    arithmetic = 2 * n * k * columns / (rate * 1e6) / _filled(n, columns, arch.sms)
    traffic = size * (n * k + columns * (n + k)) / (arch.dram_gb_s * roofline.REACHED * 1e3)
    return LAUNCH_US + roofline.START_US + max(arithmetic, traffic)


def _filled(n: int, columns: int, sms: int) -> float:
    """How full the waves of tiles are: 1 where the last one is full."""
    rows, tokens = _TILE
    while rows * tokens > 32 * 32 and math.ceil(n / rows) * math.ceil(columns / tokens) < sms:
        rows, tokens = (rows // 2, tokens) if rows >= tokens else (rows, tokens // 2)
    tiles = math.ceil(n / rows) * math.ceil(columns / tokens)
    whole = n * columns / (rows * tokens)
    # where a few tiles cannot fill the chip, cuBLAS splits k
    return min(1.0, whole / (math.ceil(tiles / sms) * sms)) if tiles >= sms else min(1.0, whole / tiles)


def calculated(
    site: Site,
    found: Sequence[Candidate],
    archs: Sequence[Architecture],
    dtype: Dtype,
    sizes: Sequence[tuple[int, int]],
) -> GpuChoice:
    """The form that should be the fastest, if it should win by the margin; else dense."""
    tokens, n, k = tuple(t * images for t, images in sizes), site.n, site.k
    dense = tuple(mean([dense_us(a, dtype, n, k, t, images) for a in archs]) for t, images in sizes)
    if not found:
        return GpuChoice(site, None, f"not measured: {_why_none(site)}", tokens=tokens, expected_us=dense)
    best = found[0]
    speed = mean([d / s for d, s in zip(dense, best.expected_us, strict=True)])
    told = f"not measured: by the model {best.form.name} takes {in_words(best.expected_us)} "
    told = f"{told}and cuBLAS {in_words(dense)}: {speed:.1f}x"
    if speed < MARGIN:
        return GpuChoice(site, None, f"{told}; {MARGIN} is asked for", tokens=tokens, expected_us=dense)
    return GpuChoice(
        site,
        best.form,
        told,
        tokens=tokens,
        candidate=best.form.name,
        expected=speed,
        arrays=best.arrays,
        expected_us=best.expected_us,
    )


def timed(
    site: Site, found: Sequence[Candidate], timings: Sequence[dict[str, Timing]], sizes: Sequence[tuple[int, int]]
) -> GpuChoice:
    """The fastest form by the clock; dense wins ties.

    Args:
        timings: of dense and of every candidate, for each measured shape.
    """
    tokens = tuple(t * images for t, images in sizes)
    if not found:
        return GpuChoice(site, None, _why_none(site), tokens=tokens)
    gains = {c.form.name: mean([t[DENSE].median_us / t[c.form.name].median_us for t in timings]) for c in found}
    best = max(found, key=lambda c: gains[c.form.name])
    name = best.form.name
    if gains[name] <= 1 + CLOSE:
        told = f"dense is faster or as fast: {name} reaches {gains[name]:.2f}x"
        return GpuChoice(site, None, told, timings=tuple(timings), tokens=tokens)
    told = f"{gains[name]:.2f}x over dense as {name}"
    return GpuChoice(site, best.form, told, timings=tuple(timings), tokens=tokens, candidate=name, arrays=best.arrays)


def check_packed(choice: GpuChoice) -> None:
    """Compares what a form has packed with the weight: all that can be shown of a kernel without a GPU.

    Raises:
        SpaError: they differ.
    """
    if choice.form is None or choice.arrays is None:
        return
    site, form, dtype = choice.site, choice.form.form, choice.form.dtype
    if isinstance(form, LowRank) and choice.pair is not None:
        given: tuple[F32, ...] = (site.weight, choice.pair.down.weight)
        again: tuple[F32, ...] = form.factors(choice.arrays, site.n, choice.pair.k, dtype)
        rank = choice.pair.rank
        held = not (again[0][:, rank:].any() or again[1][rank:].any())
        again = again[0][:, :rank], again[1][:rank]
    else:
        given, again, held = (site.weight,), (form.unpack(choice.arrays, site.n, site.k, dtype),), True
    if not held or not all(holds(a, g, dtype) for a, g in zip(again, given, strict=True)):
        raise SpaError(
            f"{choice.form.name} does not hold the weight of {site.name} as it is",
            where=site.name,
            fix="Please report this with the model's sizes and recipe",
        )


def _why_none(site: Site) -> str:
    return nothing_to_leave_out(site) if site.density == 1 else "no form has a kernel for it"


def in_words(values: Sequence[float]) -> str:
    """Microseconds at each measured shape."""
    return " and ".join(f"{v:.1f}" for v in values) + " us"


def mean(values: Sequence[float]) -> float:
    """The geometric one."""
    return math.exp(sum(map(math.log, values)) / len(values))
