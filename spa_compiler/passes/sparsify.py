"""`sparsify`: weights become zero where they matter least, in a pattern that the kernels run fast."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from spa_compiler import patterns
from spa_compiler.calibration.samples import Samples
from spa_compiler.calibration.stream import as_it_is
from spa_compiler.criteria import symbolic
from spa_compiler.errors import UsageError
from spa_compiler.graph.model import Model
from spa_compiler.graph.operators import WeightedOp, weighted_ops
from spa_compiler.passes import arrays, shares
from spa_compiler.passes.gated import gates
from spa_compiler.passes.layerwise import Outcome, leaders, rewrite, solve_alone
from spa_compiler.passes.methods import METHODS, REFITTED, Method
from spa_compiler.passes.outcomes import DENSE, apply, check_finite, scarce
from spa_compiler.passes.pass_ import Change, Context, SiteChange, SkippedSite, check_options
from spa_compiler.passes.sites import DEPTHWISE, select
from spa_compiler.passes.sparsify_options import SparsifyOptions, method_name, share_of_zeros
from spa_compiler.passes.worth import Worth
from spa_compiler.passes.zeroing import Zeroing
from spa_compiler.patterns import FanIn, NofM, Pattern
from spa_compiler.solvers.problem import F64, Zeros
from spa_compiler.solvers.regions import exchangeable

__all__ = ["Sparsify", "SparsifyOptions"]

_log = logging.getLogger(__name__)


class Sparsify:
    """x -> MatMul(W) -> y    becomes    x -> MatMul(W') -> y        and the same for Gemm and Conv
    W'[i, j] = 0 where the unit of (i, j) goes, and what keeps y best elsewhere

    Sets the least important units of constant MatMul, Gemm and Conv weights to zero. A unit is what the pattern makes
    it: one element, or R x C of them (where R or C does not divide the weight, the last units are shorter). For a
    k x k convolution the inputs are channels x kernel positions. The share of zeros is met to one unit, and the result
    is the same for the same seed.

    With calibration data, layers are solved in the order of the graph, each from what it reads once those before it are
    rewritten, and biases take up the shift of the means. `sparsegpt`, `admm`, `swap`, `envelope`, `spectrum` and `auto`
    give the weights that stay new values, and so do `masks` then; the other methods leave them.

    Depthwise convolutions keep all of their weights; where methods give new values, they get some, too, which make up
    for what was lost before. Embeddings, the first convolution, and a layer that reaches an output with no residual or
    norm after it are left alone, unless `targets` names them (a name or a glob, not an op type).
    """

    name: ClassVar[str] = "sparsify"
    Options: ClassVar[type[Any]] = SparsifyOptions

    def __init__(self, options: SparsifyOptions) -> None:
        """Raises UsageError for options that are out of bounds, contradict each other, or lack a part."""
        check_options(options)
        self.options = options
        self.pattern = patterns.parse(options.pattern)
        self.method = method_name(options)
        self.allocate: shares.Name = "global" if options.scope == "global" else options.allocate
        self.expression = None if options.expression is None else symbolic.parse(options.expression)
        self.sparsity = share_of_zeros(options, self.pattern)
        if self.method in ("dsnot", "swap") and not exchangeable(self.pattern):
            raise UsageError(
                f"method={self.method} cannot exchange zeros in the pattern {self.pattern.name}",
                where="pattern",
                fix="Take method=admm, or a pattern such as block:4x1",
            )
        if options.scope == "global" and options.allocate not in ("auto", "global"):
            raise UsageError(f"scope=global and allocate={options.allocate} contradict each other", fix="Give one")
        fixed = self.pattern.sparsity is not None or self.method == "masks"
        if fixed and self.allocate not in ("auto", "uniform"):
            raise UsageError(
                f"allocate={self.allocate}: how many zeros each weight has is said by "
                + ("the masks" if self.method == "masks" else f"the pattern {options.pattern}"),
                fix="Leave `allocate` and `scope` out",
            )

    def run(self, model: Model, context: Context) -> Change:
        """Sets weights of `model` to zero; arrays are replaced, never written to.

        Raises:
            UsageError: an entry of `targets` matches nothing, the method needs samples and there are none, or a file of
                scores or masks does not fit.
            ModelError: a weight that is taken has a NaN or an infinity.
        """
        ops, skipped = select(model.graph, self.options.targets, self.options.ignore)
        for op in ops:
            check_finite(op)
        samples = context.calibration
        method = self._method(samples)
        pattern_of = [self.pattern.on(op.kernel_size) for op in ops]
        scores, masks = self._files(ops, pattern_of)
        allocation = self._allocation(method, samples)
        first = leaders(ops)
        distinct = sorted(set(first))
        worth = Worth(ops) if self._compares_outputs(samples) else None
        shared = self._shares(allocation, model, ops, pattern_of, distinct, context, worth)
        share = shared[np.searchsorted(distinct, first)]
        layers = Zeroing(
            ops,
            [Zeros(pattern, float(part)) for pattern, part in zip(pattern_of, share, strict=True)],
            method,
            int(context.rng.integers(1 << 62)),
            scores,
            masks,
            self._gated(model, ops, context),
            self.expression,
            {} if worth is None or samples is None else _complete(worth, model, ops, samples, context),
        )
        dense = _between(model, skipped) if method.moves and samples is not None else []
        if samples is None:
            outcomes = solve_alone(ops, layers.solve, name=self.name, progress=context.progress)
        else:
            outcomes = rewrite(
                model,
                [*ops, *dense],
                samples,
                layers.solve,
                repair=method.moves,
                threads=context.workers,
                progress=context.progress,
                seed=layers.seed,
            )
        refitted = _refitted(dense, outcomes[len(ops) :])
        outcomes = outcomes[: len(ops)]
        unlike = {change.node for change in refitted}
        skipped = [site for site in skipped if site.node not in unlike]
        changes = apply(ops, outcomes, [pattern.name for pattern in pattern_of], self._label(samples))
        if not changes:
            _log.warning("%s took no weight: every MatMul, Gemm and Conv was left alone", self.name)
        return Change(
            pass_name=self.name,
            summary=self._summary([changes[place] for place in distinct], samples, allocation),
            sites=(*changes, *refitted),
            skipped=tuple(skipped),
            zeros_alone=True,
            warnings=scarce(ops, outcomes),
        )

    def _label(self, samples: Samples | None) -> str:
        return "magnitude" if self.method == "auto" and samples is None else self.method

    def _method(self, samples: Samples | None) -> Method:
        if self.method == "masks" and samples is not None:
            return REFITTED
        method = METHODS[self._label(samples)]
        if method.data and samples is None:
            raise UsageError(
                f"the method {self.method} works from calibration samples, and there are none",
                where="method",
                fix="Give them with --calib DATA (or --calib synthetic), or take method=magnitude",
            )
        return method

    def _files(
        self, ops: Sequence[WeightedOp], pattern_of: Sequence[Pattern]
    ) -> tuple[Mapping[int, F64], Mapping[int, NDArray[np.bool_]]]:
        """What `scores` and `masks` hold, by site."""
        scores: dict[int, F64] = {}
        masks: dict[int, NDArray[np.bool_]] = {}
        if self.options.scores is not None:
            found = arrays.for_weights(Path(self.options.scores), "scores", ops)
            scores = {place: np.asarray(values, np.float64) for place, values in found.items()}
            _require_all(scores, ops, "scores", self.options.scores)
        if self.options.masks is not None:
            path = Path(self.options.masks)
            for place, values in arrays.for_weights(path, "masks", ops).items():
                masks[place] = arrays.boolean(values, ops[place].weight.name, path)
                if not pattern_of[place].fits(masks[place]):
                    raise UsageError(
                        f"the mask of {ops[place].weight.name!r} does not follow the pattern {self.options.pattern}",
                        where=str(path),
                        fix="Leave `pattern` out, or make the mask in its units",
                    )
            _require_all(masks, ops, "masks", self.options.masks)
        return scores, masks

    def _allocation(self, method: Method, samples: Samples | None) -> shares.Name | None:
        """None where the pattern or the masks say how many zeros each weight has."""
        if self.pattern.sparsity is not None or self.method == "masks":
            return None
        if self.allocate == "auto":
            return "error" if method.moves and samples is not None else "uniform"
        return self.allocate

    def _shares(
        self,
        name: shares.Name | None,
        model: Model,
        ops: Sequence[WeightedOp],
        pattern_of: Sequence[Pattern],
        distinct: Sequence[int],
        context: Context,
        worth: Worth | None,
    ) -> F64:
        """Share of zeros of the `distinct` ones among the sites: a weight that several read counts once.

        What is measured for it is shown to `worth`.
        """
        if name is None:
            return np.full(len(distinct), self.sparsity)
        request = shares.Request(
            model,
            [ops[place] for place in distinct],
            [pattern_of[place] for place in distinct],
            self.sparsity,
            self.options.min_keep,
            context.rng,
            context.calibration,
            context.workers,
            context.progress,
            lambda layer, moments: None if worth is None else worth.see(distinct[layer], moments),
        )
        return shares.allocate(name, request)

    def _gated(self, model: Model, ops: Sequence[WeightedOp], context: Context) -> Mapping[int, F64]:
        """For `dass`: of each gate and up projection the root mean square of the product, `[n]`, before any change."""
        samples = context.calibration
        if self.method != "dass" or samples is None:
            return {}
        pairs = gates(ops)
        downs = sorted(set(pairs.values()))
        norms: dict[int, F64] = {}
        for collected in as_it_is(model, [ops[down] for down in downs], samples, threads=context.workers):
            gram = collected.fit.get("gram")[0]
            norms[downs[collected.site]] = np.sqrt(np.maximum(np.diagonal(gram), 0))
        return {place: norms[down] for place, down in pairs.items()}

    def _compares_outputs(self, samples: Samples | None) -> bool:
        """Whether outputs of one weight compete for zeros by their worth."""
        return self.method == "auto" and samples is not None and not isinstance(self.pattern, NofM | FanIn)

    def _summary(self, changes: Sequence[SiteChange], samples: Samples | None, allocation: str | None) -> str:
        elements = sum(site.n * site.k for site in changes)
        if not elements:
            return "no weight taken"
        zeros = 1 - sum(site.density_after * site.n * site.k for site in changes) / elements
        return (
            f"{zeros:.1%} zeros in {len(changes)} weights of {elements:,} elements "
            f"({self.pattern.name}, {self._label(samples)}{f', {allocation} shares' if allocation else ''})"
        )


def _complete(
    worth: Worth, model: Model, ops: Sequence[WeightedOp], samples: Samples, context: Context
) -> Mapping[int, F64]:
    """The worth of outputs, once what is missing was measured."""
    if missing := worth.missing:
        sites = [ops[place] for place in missing]
        for collected in as_it_is(model, sites, samples, threads=context.workers, progress=context.progress):
            worth.see(missing[collected.site], collected.fit)
    return worth.of_outputs()


def _between(model: Model, skipped: Sequence[SkippedSite]) -> list[WeightedOp]:
    """Depthwise convolutions that nobody named: with few weights for each channel, refitting them is safe."""
    names = {site.node for site in skipped if site.reason == DEPTHWISE}
    return [op for op in weighted_ops(model.graph) if op.depthwise and op.name in names]


def _refitted(ops: Sequence[WeightedOp], outcomes: Sequence[Outcome]) -> list[SiteChange]:
    """Writes what is not as it was."""
    moved = [
        (op, outcome)
        for op, outcome in zip(ops, outcomes, strict=True)
        if not np.array_equal(op.rows(), outcome.result.rows)
    ]
    return apply([op for op, _ in moved], [outcome for _, outcome in moved], [DENSE] * len(moved), "refit")


def _require_all(found: Mapping[int, Any], ops: Sequence[WeightedOp], what: str, path: str) -> None:
    missing = [op.weight.name for place, op in enumerate(ops) if place not in found]
    if missing:
        raise UsageError(
            f"no {what} for {missing[0]!r}" + (f" and {len(missing) - 1} other weights" if len(missing) > 1 else ""),
            where=path,
            fix="Add them, or leave those weights alone with `targets` or `ignore`",
        )
