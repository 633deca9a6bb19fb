"""What a pass is: one rewrite of a model, its options, and what it says about what it did."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import msgspec
import numpy as np

from spa_compiler.analysis.schema import Slab
from spa_compiler.calibration.progress import Progress, no_progress
from spa_compiler.calibration.samples import Samples
from spa_compiler.errors import UsageError
from spa_compiler.graph.model import Model
from spa_compiler.graph.session import Feeds
from spa_compiler.targets import Target

if TYPE_CHECKING:
    from spa_compiler.analysis import Analysis


@dataclass(frozen=True)
class Context:
    """What a pass may look at besides the model."""

    target: Target
    rng: np.random.Generator
    """The only source of chance: a pass gives the same model for the same seed."""
    analysis: Analysis | None = None
    """Of the model as the pass gets it; a pass that needs it and finds none makes it."""
    original: Model | None = None
    """The model as it was loaded: users name its tensors, some of which canonicalization folds into others."""
    feeds: Sequence[Feeds] = ()
    """Inputs that the model runs on."""
    calibration: Samples | None = None
    """The user's samples; None without `--calib`."""
    workers: int = 1
    """Layers that may be solved at a time; results do not depend on it."""
    progress: Progress = no_progress
    precision: str = "f32"
    """Floats of the result: `f32`, `fp16` or `bf16`. Passes work on float32 whatever it is."""


class SiteChange(msgspec.Struct, frozen=True, kw_only=True):
    """What a pass did to one weight."""

    node: str
    op: str
    weight: str
    """The initializer's name in the source file."""
    pattern: str
    n: int
    k: int
    density_before: float
    """Share of nonzeros, 0 to 1."""
    density_after: float
    error: float
    """Relative error of the layer's output where there was calibration data, else of its weight, ||W' - W|| / ||W||."""
    method: str
    """How the weights were chosen."""
    seconds: float
    """How long that took."""


class SkippedSite(msgspec.Struct, frozen=True):
    """A weight that a pass left alone, and why."""

    node: str
    reason: str


class Removal(msgspec.Struct, frozen=True, kw_only=True):
    """What a pass cut out of one group of coupled channels.

    Group, units and indices are those of the model as the pass got it. Masking `activations` (to zero, wherever they
    are read) in that model gives what the cut model computes.
    """

    group: int
    granularity: str
    units: tuple[int, ...]
    parameters: tuple[Slab, ...]
    activations: tuple[Slab, ...]


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """What a pass did."""

    pass_name: str
    summary: str
    """One sentence for the console."""
    sites: tuple[SiteChange, ...] = ()
    skipped: tuple[SkippedSite, ...] = ()
    zeros_alone: bool = False
    """Whether all that changed is the values of weights: then the groups of coupled channels are what they were."""
    removed: tuple[Removal, ...] = ()
    """What was cut, one entry for each group."""
    exact: bool = False
    """Whether the model computes what it did before; where it does not but something was removed, what the masked
    model computes.
    """
    unlike: str = ""
    """Why a cut model computes something else than the masked one; empty where it must compute the same."""
    asked: dict[str, float] = {}
    """What should remain, as a share of the whole model, by the option's name: `{"macs": 0.5}`."""
    got: dict[str, float] = {}
    """What remains of MACs (where they are known), parameters and units: `{"macs": 0.49, "params": 0.61, ...}`."""
    warnings: tuple[str, ...] = ()
    """What a user must know: a budget that was not met, and why."""


class Pass(Protocol):
    """One rewrite. The class's docstring opens with before -> after; `passes/registry.py` lists the classes."""

    name: ClassVar[str]
    """Kebab-case: how recipes and the command line call it."""
    Options: ClassVar[type[Any]]
    """A frozen dataclass; every field is `Annotated[type, msgspec.Meta(description=...)]` with its bounds."""

    def __init__(self, options: Any) -> None:
        """Takes its own `Options`, and refuses with UsageError what their types cannot say."""

    def run(self, model: Model, context: Context) -> Change:
        """Edits `model` in place and leaves it valid."""


def check_options(options: Any) -> None:
    """Holds options that were built in Python to the same types and bounds as those that were read from a recipe.

    Raises:
        UsageError: a value is outside of its bounds or of another type.
    """
    try:
        msgspec.convert(dataclasses.asdict(options), type(options))
    except msgspec.ValidationError as error:
        raise UsageError(str(error), where=type(options).__name__) from error
