"""report.json: what was asked, what came out, why each site got its form, and what was measured where.

Times are in milliseconds or microseconds as the field's name says, errors relative to the reference's largest
magnitude, ratios above 1 when the compiled model is better (faster, smaller).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from spa_compiler.errors import ModelError

REPORT = "report.json"
ARTIFACT_RUNTIME = "spa"  # of the race: what came out
#: equals the manifest's, so that a folder with nothing but a report (after a failed verification) is known as ours
ARTIFACT_VERSION = 1


class Versions(msgspec.Struct, frozen=True, kw_only=True):
    """Of what took part."""

    spa_compiler: str
    python: str
    onnx: str
    onnxruntime: str
    tvm: str
    numpy: str


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """Where the times were taken."""

    cpu: str
    isa: str  # the machine's own level; the artifact's is `Report.isa`
    cores: int  # physical
    threads: int  # used
    platform: str
    providers: tuple[str, ...]  # of ONNX Runtime
    gpu: str = ""  # that ONNX Runtime can use


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """The request: enough to run it again."""

    source: str
    target: str
    seed: int
    recipe: Any  # as in recipe.yaml
    options: dict[str, Any]  # the other options by their names, those that were given


class SiteChange(msgspec.Struct, frozen=True, kw_only=True):
    """What a pass did to one weight."""

    node: str
    op: str = ""
    weight: str
    pattern: str
    n: int = 0  # outputs
    k: int = 0  # inputs per output
    density_before: float
    density_after: float
    error: float  # relative output error; ||dW|| / ||W|| without data
    method: str = ""  # how the weights were chosen
    seconds: float = 0.0  # how long that took
    restored: bool = False  # it has its dense weight back, since zeros made it no faster


class SkippedSite(msgspec.Struct, frozen=True, kw_only=True):
    """A weight that a pass left alone, and why."""

    node: str
    reason: str


NO_GROUP = -1


class RemovedSlab(msgspec.Struct, frozen=True, kw_only=True):
    """`indices` (ascending, of the source file) of one axis of a tensor of the source file."""

    name: str
    axis: int  # 0 is the first
    indices: tuple[int, ...]


class Removed(msgspec.Struct, frozen=True, kw_only=True):
    """What was cut out of one group of coupled channels, in the words of `spa-analyze SOURCE --json`.

    The source file with the indices of `activations` set to zero wherever they are read computes what the cut model
    computes, where nothing else was asked for.
    """

    group: int  # NO_GROUP: tensors that the canonical form couples otherwise than the file
    granularity: str  # what a unit is: "channel", "head", ...
    units: tuple[int, ...]
    parameters: tuple[RemovedSlab, ...]
    activations: tuple[RemovedSlab, ...]


class PassChange(msgspec.Struct, frozen=True, kw_only=True):
    """What a pass did."""

    name: str
    summary: str
    sites: tuple[SiteChange, ...] = ()
    skipped: tuple[SkippedSite, ...] = ()
    removed: tuple[Removed, ...] = ()
    asked: dict[str, float] = {}  # what should remain, as a share of the whole model: {"macs": 0.5}
    got: dict[str, float] = {}  # what remains of "macs", "params" and "channels" (units)
    warnings: tuple[str, ...] = ()


class Candidate(msgspec.Struct, frozen=True, kw_only=True):
    """One form of a site, timed beside the others; of the whole layer, where its form is low rank."""

    name: str  # "dense" is ONNX Runtime's own op
    median_us: float
    p10_us: float
    p90_us: float
    chosen: bool


class Placement(msgspec.Struct, frozen=True, kw_only=True):
    """Which form a site got, for one number of tokens."""

    node: str
    op: str
    n: int  # outputs
    k: int  # inputs per output
    tokens: int
    form: str  # "dense", "sparse", "low rank", "sparse + low rank", "4-bit"
    pattern: str  # of the zeros: "dense", "unstructured", "block:4x1"
    density: float
    candidates: tuple[Candidate, ...]
    reason: str
    would_help: str = ""  # what one could ask for to make it faster
    region: str = ""  # the node of model.onnx that it became, alone or with its neighbours; empty: it stayed as it was


class RaceRow(msgspec.Struct, frozen=True, kw_only=True):
    """The whole model in one runtime at one shape."""

    shape: str  # as `shape_text` writes it
    runtime: str  # "spa" is the artifact, "onnxruntime" the source or portable model
    median_ms: float
    p10_ms: float
    p90_ms: float
    model: str = ""
    plan: str = ""  # "source", or one of the ways that the model could be placed, which took part in the race

    @property
    def spread(self) -> float:
        """How far apart p10 and p90 are, as a share of the median."""
        return (self.p90_ms - self.p10_ms) / self.median_ms if self.median_ms else 0.0


class Ratio(msgspec.Struct, frozen=True, kw_only=True):
    """How many times as fast `model` is as `over`."""

    model: str
    over: str
    shape: str
    ratio: float


class OtherShape(msgspec.Struct, frozen=True, kw_only=True):
    """A shape that nobody asked for: the compiled model beside portable.onnx, both in ONNX Runtime."""

    shape: str
    dense_ms: float | None = None  # medians; None: not raced
    sparse_ms: float | None = None
    form: str  # "sparse" or "dense": what runs there; empty: not raced
    reason: str = ""  # why it was not raced


class Check(msgspec.Struct, frozen=True, kw_only=True):
    """One output of the artifact against the same output of portable.onnx."""

    output: str
    shape: str  # of the inputs
    threads: int
    error: float | None  # None: another shape or type, or NaN or Inf in other places: nothing to measure
    tolerance: float
    noise: float  # the portable graph at two of ONNX Runtime's optimization levels

    @property
    def passed(self) -> bool:
        return self.error is not None and self.error <= self.tolerance

    def badness(self) -> float:
        """The error in tolerances: above 1 the check failed."""
        if self.error is None:
            return math.inf
        return self.error / self.tolerance if self.tolerance else math.inf if self.error else 0.0


class Sizes(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes."""

    source: int
    model: int
    portable: int
    kernels: int


class Stage(msgspec.Struct, frozen=True, kw_only=True):
    """How long a stage of the compilation took."""

    name: str
    seconds: float


class Report(msgspec.Struct, kw_only=True):
    """The content of report.json. Filled stage by stage, so that a run that fails can say how far it came."""

    artifact_version: int = ARTIFACT_VERSION
    spa_compiler: str
    asked: Asked
    versions: Versions
    machine: Machine
    isa: str = ""  # that kernels.so needs
    shapes: list[str] = msgspec.field(default_factory=list)
    notes: list[str] = msgspec.field(default_factory=list)  # canonicalization's, and what the run chose or gave up
    passes: list[PassChange] = msgspec.field(default_factory=list)
    output_change: float | None = None  # relative, of all passes together, on calibration samples that none has seen
    placements: list[Placement] = msgspec.field(default_factory=list)
    race: list[RaceRow] = msgspec.field(default_factory=list)
    ratios: list[Ratio] = msgspec.field(default_factory=list)
    others: list[OtherShape] = msgspec.field(default_factory=list)
    checks: list[Check] = msgspec.field(default_factory=list)
    hints: list[str] = msgspec.field(default_factory=list)  # what one could ask for
    sizes: Sizes | None = None
    stages: list[Stage] = msgspec.field(default_factory=list)
    failure: str = ""  # why the run failed, if it did

    def write(self, folder: Path) -> Path:
        """Writes report.json into `folder`."""
        path = folder / REPORT
        path.write_bytes(self.to_json())
        return path

    def to_json(self) -> bytes:
        """The file's content, a line end last."""
        return msgspec.json.format(msgspec.json.encode(self), indent=2) + b"\n"

    def worst_check(self) -> Check | None:
        """The check that comes closest to its tolerance, or lies furthest beyond it."""
        return max(self.checks, key=Check.badness, default=None)


def read(folder: Path) -> Report:
    """The report of an artifact.

    Raises:
        ModelError: there is none, or it is damaged.
    """
    path = folder / REPORT
    try:
        return msgspec.json.decode(path.read_bytes(), type=Report)
    except (OSError, msgspec.DecodeError) as error:
        raise ModelError(f"the report cannot be read: {error}", where=str(path)) from error


def shape_text(shapes: Mapping[str, Sequence[int]]) -> str:
    """One word for the shapes of all inputs: "1x128" when they agree, else "ids=1x128 image=1x3x32x32"."""
    texts = {name: "x".join(map(str, shape)) or "scalar" for name, shape in shapes.items()}
    if len(set(texts.values())) == 1:
        return next(iter(texts.values()))
    return " ".join(f"{name}={text}" for name, text in texts.items())
