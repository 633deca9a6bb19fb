"""The options of `factorize`, and what they mean together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, TypeAlias

from msgspec import Meta

from spa_compiler.errors import UsageError
from spa_compiler.passes.sites import Ignore, Targets
from spa_compiler.targets import Target

BUDGETS = ("params", "macs")
"""Goals that all weights together are held to; the others are of each layer."""

Asked: TypeAlias = Literal["auto", "whitened", "svd", "fwsvd", "tucker", "sparse-low-rank"]
_Share = Annotated[float, Meta(gt=0, lt=1)]


@dataclass(frozen=True, kw_only=True)
class FactorizeOptions:
    """Options of `factorize`: exactly one of `params`, `macs`, `energy` and `error`."""

    params: Annotated[
        _Share | None, Meta(description="share of the parameters of the weights that are taken to keep")
    ] = None
    macs: Annotated[
        _Share | None, Meta(description="share of the multiply-accumulates of the weights that are taken to keep")
    ] = None
    energy: Annotated[_Share | None, Meta(description="share of each layer's output energy to keep")] = None
    error: Annotated[_Share | None, Meta(description="largest relative error of each layer's output")] = None
    method: Annotated[
        Asked,
        Meta(
            description="`whitened` keeps the outputs over the calibration data, `svd` the weights, `fwsvd` them in "
            "the Fisher norm of `scores` (without them E[x^2] stands in for it); `tucker` takes k x k convolutions "
            "apart in three, `sparse-low-rank` puts a sparse weight beside; `auto` is `tucker` and `whitened` where "
            "there is calibration data, `svd` where there is none"
        ),
    ] = "auto"
    allocate: Annotated[
        Literal["auto", "uniform", "error", "welore"],
        Meta(
            description="who gets which share of the budget: all the same, each by what the outputs lose (with "
            "calibration data), or by one threshold on singular values; `auto` is `error` where there is data, else "
            "`uniform`"
        ),
    ] = "auto"
    joint: Annotated[
        bool, Meta(description="whether weights that read the same input share the first of their two factors")
    ] = False
    multiple: Annotated[
        int,
        Meta(ge=0, le=4096, description="ranks are multiples of it; 0: of what the target likes, 8, and 16 on GPUs"),
    ] = 0
    pattern: Annotated[str, Meta(description="of `sparse-low-rank`: which zeros the sparse weight has")] = (
        "unstructured"
    )
    rank: Annotated[
        Annotated[float, Meta(ge=0, lt=1)] | None,
        Meta(
            description="of `sparse-low-rank`: share of the parameters left that the low-rank part gets; not set: what "
            "loses least, layer by layer"
        ),
    ] = None
    scores: Annotated[
        str | None,
        Meta(description="of `fwsvd`: an .npz of mean squared gradients, one array for each weight, by its name"),
    ] = None
    targets: Targets = ()
    ignore: Ignore = ()


def goal_of(options: FactorizeOptions) -> str:
    """Which of the four says how much stays."""
    given = [name for name in (*BUDGETS, "energy", "error") if getattr(options, name) is not None]
    if len(given) != 1:
        raise UsageError(
            f"{' and '.join(given)} contradict each other" if given else "it is missing how much should stay",
            fix="Give one of params, macs, energy and error, such as params=0.5",
        )
    return given[0]


def multiple_of(options: FactorizeOptions, target: Target) -> int:
    """What ranks are multiples of: tensor cores take 16 columns at a time."""
    return options.multiple or (16 if target.kind == "cuda" else 8)


def method_name(options: FactorizeOptions, goal: str) -> Asked:
    """The method, which scores imply."""
    method: Asked = options.method
    if options.scores is not None:
        if method not in ("auto", "fwsvd"):
            raise UsageError(f"method={method} has no scores", where="scores", fix="Take method=fwsvd")
        method = "fwsvd"
    if goal not in BUDGETS and options.allocate != "auto":
        raise UsageError(
            f"allocate={options.allocate} divides a budget, but {goal} is of each layer",
            where="allocate",
            fix="Leave it out, or give params or macs",
        )
    if options.allocate == "welore" and (goal != "params" or method in ("tucker", "sparse-low-rank")):
        raise UsageError(
            "allocate=welore knows one rank of each weight, and parameters alone",
            where="allocate",
            fix="Take params and method=whitened, svd or fwsvd with it",
        )
    if options.joint and method in ("tucker", "sparse-low-rank"):
        raise UsageError(f"method={method} shares no factor", where="joint", fix="Leave `joint` out")
    if method != "sparse-low-rank" and (options.rank is not None or options.pattern != "unstructured"):
        raise UsageError(
            f"method={method} has no sparse part",
            where="rank" if options.rank is not None else "pattern",
            fix="Take method=sparse-low-rank",
        )
    return method


def check_sparse(options: FactorizeOptions, goal: str, fixed: float | None) -> None:
    """Raises UsageError where the options of `sparse-low-rank` leave nothing for one of the parts."""
    if goal != "params":
        raise UsageError(f"method=sparse-low-rank needs params, not {goal}", where=goal, fix="Say params=0.5")
    if fixed is None:
        return
    if options.rank is not None or options.allocate not in ("auto", "uniform"):
        raise UsageError(
            f"the pattern {options.pattern} says itself what it leaves for the low-rank part",
            where="pattern",
            fix="Leave `rank` and `allocate` out",
        )
    if float(options.params or 0) <= 1 - fixed:
        raise UsageError(
            f"the pattern {options.pattern} alone keeps {1 - fixed:.1%} of the parameters",
            where="params",
            fix="Give more, or take a sparser pattern",
        )
