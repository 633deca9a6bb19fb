"""`quantize`: weights move onto grids of 16 values, which kernels for GPUs read as 4 bits each."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from msgspec import Meta

from spa_compiler.calibration.samples import Samples
from spa_compiler.errors import UsageError
from spa_compiler.graph.model import Model
from spa_compiler.graph.operators import WeightedOp
from spa_compiler.passes.layerwise import Job, Result, leaders, rewrite, solve_alone
from spa_compiler.passes.outcomes import apply, check_finite, scarce
from spa_compiler.passes.pass_ import Change, Context, SiteChange, SkippedSite, check_options
from spa_compiler.passes.sites import Ignore, Targets, select
from spa_compiler.solvers.four_bits import Grid, rtn
from spa_compiler.solvers.gptq import gptq

_log = logging.getLogger(__name__)

GROUPS = (32, 64, 128)
_CONVOLUTION = "a convolution: weights of 4 bits are for MatMul and Gemm"


@dataclass(frozen=True, kw_only=True)
class QuantizeOptions:
    """Options of `quantize`."""

    bits: Annotated[int, Meta(ge=4, le=4, description="of a weight: 4")] = 4
    group: Annotated[
        int, Meta(description="inputs of an output that share a scale and a zero point: 32, 64 or 128")
    ] = 128
    symmetric: Annotated[bool, Meta(description="whether the zero point is 8 everywhere: the range is even then")] = (
        False
    )
    method: Annotated[
        Literal["auto", "rtn", "gptq"],
        Meta(
            description="how weights are rounded: `rtn` to the nearest value, `gptq` so that inputs which come later "
            "make up for it; `auto` is `gptq` where there is calibration data, `rtn` where there is none"
        ),
    ] = "auto"
    targets: Targets = ()
    ignore: Ignore = ()


class Quantize:
    """x -> MatMul(W) -> y    becomes    x -> MatMul(W') -> y        and the same for Gemm
    W'[i, j] = (q[i, j] - z[i, g]) s[i, g]    q, z = 0 .. 15, g = the group of input j

    Rounds constant MatMul and Gemm weights to 16 values for each output and group of inputs. Zeros stay zeros, so the
    pass may follow `sparsify`: the weights that are left are rounded then. W' is stored in floats, as any weight, so
    every runtime computes the same. What makes it faster is a kernel that reads 4 bits for each weight: for
    `--target cuda` with `--precision fp16` or `bf16`, at up to 16 tokens. Put it last: what changes weights afterwards
    takes them off the grid.

    With calibration data, layers are solved in the order of the graph, each from what it reads once those before it are
    rewritten, and biases take up the shift of the means. `rtn` weighs errors by the size of their inputs there.

    Convolutions keep their weights. Embeddings, and a layer that reaches an output with no residual or norm after it,
    are left alone, unless `targets` names them (a name or a glob, not an op type).
    """

    name: ClassVar[str] = "quantize"
    Options: ClassVar[type[Any]] = QuantizeOptions

    def __init__(self, options: QuantizeOptions) -> None:
        """Raises UsageError for options that are out of bounds."""
        check_options(options)
        self.options = options
        if options.group not in GROUPS:
            raise UsageError(
                f"kernels have no groups of {options.group} inputs", where="group", fix="Take 128, 64 or 32"
            )
        self.grid = Grid(options.group, options.symmetric)

    def run(self, model: Model, context: Context) -> Change:
        """Rounds weights of `model`; arrays are replaced, never written to.

        Raises:
            UsageError: an entry of `targets` matches nothing, or `gptq` has no samples.
            ModelError: a weight that is taken has a NaN or an infinity.
        """
        found, skipped = select(model.graph, self.options.targets, self.options.ignore)
        ops = [op for op in found if op.kind != "Conv"]
        skipped += [SkippedSite(op.name, _CONVOLUTION) for op in found if op.kind == "Conv"]
        for op in ops:
            check_finite(op)
        samples = context.calibration
        method = self._method(samples)
        if samples is None:
            outcomes = solve_alone(ops, self._solve, name=self.name, progress=context.progress)
        else:
            outcomes = rewrite(
                model,
                ops,
                samples,
                self._learn if method == "gptq" else self._solve,
                repair=method == "gptq",
                threads=context.workers,
                progress=context.progress,
                seed=int(context.rng.integers(1 << 62)),
            )
        changes = apply(ops, outcomes, [f"4 bits in groups of {self.options.group}"] * len(ops), method)
        if not changes:
            _log.warning("%s took no weight: every MatMul and Gemm was left alone", self.name)
        return Change(
            pass_name=self.name,
            summary=self._summary([changes[place] for place in sorted(set(leaders(ops)))], method),
            sites=tuple(changes),
            skipped=tuple(skipped),
            zeros_alone=True,
            warnings=(*_no_faster(context, ops), *(scarce(ops, outcomes) if method == "gptq" else ())),
        )

    def _method(self, samples: Samples | None) -> str:
        if self.options.method == "gptq" and samples is None:
            raise UsageError(
                "the method gptq works from calibration samples, and there are none",
                where="method",
                fix="Give them with --calib DATA (or --calib synthetic), or take method=rtn",
            )
        if self.options.method == "auto":
            return "rtn" if samples is None else "gptq"
        return self.options.method

    def _solve(self, jobs: Sequence[Job]) -> list[Result]:
        """A `layerwise.Solve`."""
        return [Result.of(job, [rtn(problem, self.grid) for problem in job.problems]) for job in jobs]

    def _learn(self, jobs: Sequence[Job]) -> list[Result]:
        """The same with samples."""
        results = []
        for job in jobs:
            (problem,), (before,) = job.problems, job.original
            if not job.repaired:  # a weight that is on a grid stays there
                problem = replace(problem, weight=before)
            results.append(Result.of(job, [gptq(problem, self.grid, np.asarray(before != 0))]))
        return results

    def _summary(self, changes: Sequence[SiteChange], method: str) -> str:
        if not changes:
            return "no weight taken"
        elements = sum(site.n * site.k for site in changes)
        even = ", symmetric" if self.options.symmetric else ""
        return (
            f"{len(changes)} weights of {elements:,} elements on grids of 4 bits "
            f"(groups of {self.options.group}{even}, {method})"
        )


def _no_faster(context: Context, ops: Sequence[WeightedOp]) -> tuple[str, ...]:
    """What to know where no kernel reads 4 bits."""
    if not ops or (context.target.kind == "cuda" and context.precision != "f32"):
        return ()
    where = f"{context.target}" if context.target.kind == "cpu" else "float32"
    return (
        f"weights of 4 bits make nothing faster on {where}: kernels that read them are for --target cuda with "
        "--precision fp16 or bf16. The accuracy can be measured with portable.onnx all the same",
    )
