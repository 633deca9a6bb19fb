"""The options of `sparsify`, and what they mean together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from msgspec import Meta

from spa_compiler.errors import UsageError
from spa_compiler.passes import shares
from spa_compiler.passes.sites import Ignore, Targets
from spa_compiler.patterns import Pattern


@dataclass(frozen=True, kw_only=True)
class SparsifyOptions:
    """Options of `sparsify`."""

    sparsity: Annotated[
        Annotated[float, Meta(ge=0, lt=1)] | None,
        Meta(
            description="share of zeros among the elements of the weights that are taken; `N:M` patterns and masks "
            "have their own"
        ),
    ] = None
    pattern: Annotated[
        str,
        Meta(
            description="which zeros are allowed: `unstructured`, `block:4x1`, `block:RxC`, `2:4`, `N:M`, `fan-in`, "
            "`channel`"
        ),
    ] = "unstructured"
    method: Annotated[
        Literal[
            "auto",
            "magnitude",
            "random",
            "wanda",
            "dass",
            "symbolic",
            "dsnot",
            "sparsegpt",
            "admm",
            "swap",
            "envelope",
            "spectrum",
            "scores",
            "masks",
        ],
        Meta(
            description="how zeros are chosen, and what the other weights become; `auto` is the least output error "
            "that the solvers reach where there is calibration data, `magnitude` where there is none"
        ),
    ] = "auto"
    allocate: Annotated[
        shares.Name,
        Meta(
            description="who gets how many zeros: `uniform`, `global` (one threshold on magnitudes), `lamp`, `erk`, "
            "and with calibration data `error`, `proportional`, `ecoflap`, `evolution`; `auto` is `error` where there "
            "is such data and the method moves weights, else `uniform`"
        ),
    ] = "auto"
    scope: Annotated[
        Literal["layer", "global"],
        Meta(description="`global` is short for `allocate=global`"),
    ] = "layer"
    min_keep: Annotated[
        float,
        Meta(
            ge=0,
            le=1,
            description="where shares differ, what every weight keeps at least, as a share of `1 - sparsity`",
        ),
    ] = 0.2
    scores: Annotated[
        str | None,
        Meta(
            description="an .npz of importances, one array for each weight, by its name (`spa-compile --dry-run "
            "--json` lists them); makes the method `scores`, or is G in `symbolic`"
        ),
    ] = None
    masks: Annotated[
        str | None,
        Meta(
            description="an .npz of masks, one array for each weight, by its name: 0 or False goes; makes the method "
            "`masks`"
        ),
    ] = None
    expression: Annotated[
        str | None,
        Meta(description="of the method `symbolic`, over W, A=|W|, X, M, V, Y and G: `abs(W)*X` is Wanda's"),
    ] = None
    targets: Targets = ()
    ignore: Ignore = ()


def method_name(options: SparsifyOptions) -> str:
    """The method, which a file of scores or masks implies."""
    given = [name for name in ("scores", "masks") if getattr(options, name) is not None]
    method = str(options.method)
    if method == "symbolic":
        if options.expression is None or options.masks is not None:
            raise UsageError(
                "the method symbolic needs `expression`, and takes no masks",
                where="expression",
                fix="Write one, such as expression='abs(W)*X' (Wanda); G in it stands for scores=FILE",
            )
        return method
    if options.expression is not None:
        raise UsageError(f"method={method} has no expression", where="expression", fix="Take method=symbolic")
    if len(given) > 1:
        raise UsageError("scores and masks contradict each other", fix="Give one")
    if given and method not in ("auto", given[0]):
        raise UsageError(f"{given[0]} and method={method} contradict each other", fix="Leave `method` out")
    if method in ("scores", "masks") and not given:
        raise UsageError(f"the method {method} reads a file", where=method, fix=f"Name it: {method}=FILE.npz")
    return given[0] if given else method


def share_of_zeros(options: SparsifyOptions, pattern: Pattern) -> float:
    """The share of zeros, which some patterns and masks have themselves."""
    if pattern.sparsity is not None:
        if options.sparsity is not None and not np.isclose(options.sparsity, pattern.sparsity, atol=0.005):
            raise UsageError(
                f"the pattern {options.pattern} has {pattern.sparsity:.4g} zeros, not {options.sparsity:.4g}",
                where="sparsity",
                fix="Leave `sparsity` out",
            )
        return float(pattern.sparsity)
    if options.masks is not None:
        if options.sparsity is not None:
            raise UsageError("masks say how many zeros there are", where="sparsity", fix="Leave `sparsity` out")
        return 0.0
    if options.sparsity is None:
        raise UsageError("the share of zeros is missing", where="sparsity", fix="Say sparsity=0.8, for instance")
    return options.sparsity
