"""Ranks of all layers within one budget: what each rank costs and loses here, and what the outputs make of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal, TypeAlias

import joblib
import numpy as np
from threadpoolctl import threadpool_limits

from spa_compiler.calibration.probe import Probe
from spa_compiler.calibration.stream import Stream
from spa_compiler.errors import BudgetError, UsageError
from spa_compiler.graph import shapes
from spa_compiler.graph.model import Model
from spa_compiler.graph.operators import WeightedOp
from spa_compiler.graph.save import PROTOBUF_LIMIT, weight_bytes
from spa_compiler.passes import ranks
from spa_compiler.passes.chains import Form, product
from spa_compiler.passes.layerwise import leaders, problem_of
from spa_compiler.passes.low_rank import Cut, Site, numbers
from spa_compiler.passes.pass_ import Context
from spa_compiler.passes.ranks import Layer, Rank
from spa_compiler.solvers.problem import F64, Problem
from spa_compiler.solvers.svd import Factors
from spa_compiler.solvers.tucker import Tucker
from spa_compiler.targets import host

Allocation: TypeAlias = Literal["uniform", "error", "welore"]
Unit: TypeAlias = Literal["params", "macs"]

_PROBED = 192
"""Samples that the model's outputs are compared on."""


@dataclass(frozen=True)
class Price:
    """What one parameter of a site costs: 1, or the positions that it is multiplied at.

    `inside` is at the operator's input, for what stands in front of a kernel, `outside` at its result.
    """

    inside: float
    outside: float

    def of(self, form: Form, part: float) -> float:
        """What a form costs. `part` is the share of `down` that the site pays for."""
        if isinstance(form, Factors):
            return (form.up.size + part * form.down.size) * self.outside
        if isinstance(form, Tucker):
            return form.first.size * self.inside + (form.core.size + form.last.size) * self.outside
        low = 0 if form.factors is None else form.factors.up.size + form.factors.down.size
        return (int(np.count_nonzero(form.sparse)) + low) * self.outside


def prices(unit: Unit, model: Model, ops: Sequence[WeightedOp], context: Context) -> list[Price]:
    """The price of each site. A weight that several share is paid for once in parameters, by each in MACs.

    Raises:
        UsageError: MACs hang on sizes that nobody stated.
    """
    if unit == "params":
        first = {id(op.weight): place for place, op in reversed(list(enumerate(ops)))}
        once = [1.0 if first[id(op.weight)] == place else 0.0 for place, op in enumerate(ops)]
        return [Price(each, each) for each in once]
    known = _sizes(model, context)
    return [
        Price(_positions(op, op.node.inputs[0].name, known), _positions(op, op.node.outputs[0].name, known))
        for op in ops
    ]


def _sizes(model: Model, context: Context) -> Mapping[str, Sequence[object]]:
    if context.feeds:
        return shapes.fixed(model, context.feeds[0])
    return {name: tensor.shape for name, tensor in model.graph.tensors().items() if tensor.shape is not None}


def _positions(op: WeightedOp, name: str, known: Mapping[str, Sequence[object]]) -> float:
    """How many positions the tensor has: the product of all sizes but that of the channels."""
    shape = list(known.get(name, ()))
    if shape:
        del shape[1 if op.kind == "Conv" else -1]
    sizes = [size for size in shape if isinstance(size, int)]
    if name not in known or len(sizes) < len(shape):
        raise UsageError(
            f"the multiply-accumulates of {op.name!r} hang on sizes that are not known",
            where="macs",
            fix="State them with --shape, or give a budget of `params`",
        )
    return float(prod(sizes))


@dataclass(frozen=True)
class Planner:
    """Everything that ranks are chosen from.

    Attributes:
        clusters: sites that are taken apart together.
        prices: of each site.
        share: of the whole cost that may stay.
    """

    model: Model
    sites: Sequence[Site]
    clusters: Sequence[tuple[int, ...]]
    prices: Sequence[Price]
    share: float
    multiple: int
    context: Context

    def choose(self, allocation: Allocation) -> list[Rank | None]:
        """The rank of each site; None stays dense."""
        layers, rows = self._measured(self.share if allocation == "error" else None)
        if allocation == "error":
            chosen = ranks.by_error(layers, self.share, self._reactions(layers, rows))
        elif allocation == "welore":
            try:
                chosen = ranks.by_welore(layers, self.share, self.multiple)
            except BudgetError:
                chosen = [layer.within(0.0) for layer in layers]
        else:
            chosen = ranks.uniform(layers, self.share)
        return [chosen[number] for number in numbers(self.sites, self.clusters)]

    def _measured(self, target: float | None) -> tuple[list[Layer], dict[int, dict[int, F64]]]:
        """What the ranks of each cluster cost and lose, in the model as it is.

        Args:
            target: share at which to hand back weights, too: cluster -> site -> `[n, k]`.
        """
        layers: dict[int, Layer] = {}
        rows: dict[int, dict[int, F64]] = {}

        def work(number: int, problems: Sequence[Problem]) -> tuple[int, Layer, dict[int, F64]]:
            cluster = self.clusters[number]
            cut = Cut([self.sites[site] for site in cluster], problems)
            price = self._price(cluster)
            layer = cut.layer(price.inside, price.outside, self.multiple)
            rank = None if target is None else layer.within(target)
            forms = [] if rank is None else cut.forms(rank)
            return number, layer, {site: product(form) for site, form in zip(cluster, forms, strict=False)}

        for several in self._problems():
            # One thread of BLAS for each: the bits must not depend on how many are solved at a time.
            with threadpool_limits(1, "blas"):
                for number, layer, made in joblib.Parallel(n_jobs=self.context.workers, prefer="threads")(
                    joblib.delayed(work)(number, problems) for number, problems in several.items()
                ):
                    layers[number], rows[number] = layer, made
            self.context.progress("measuring how layers take lower ranks", len(layers), len(self.clusters))
        return [layers[number] for number in range(len(self.clusters))], rows

    def _price(self, cluster: Sequence[int]) -> Price:
        """All sites of a cluster read the same; those with a tied weight pay together."""
        first = leaders([site.op for site in self.sites])
        tied = [place for place, leader in enumerate(first) if leader == cluster[0]]
        return Price(sum(self.prices[p].inside for p in tied), sum(self.prices[p].outside for p in tied))

    def _problems(self) -> Iterator[dict[int, list[Problem]]]:
        """Cluster -> problems, some at a time."""
        ops = [site.op for site in self.sites]
        number_of = {site: number for number, cluster in enumerate(self.clusters) for site in cluster}
        if self.context.calibration is None:
            for number, cluster in enumerate(self.clusters):
                yield {number: [without_data(ops[site]) for site in cluster]}
            return
        stream = Stream(self.model, ops, self.context.calibration, sequential=False, threads=host().cores_physical)
        for wave in stream:
            found: dict[int, list[Problem]] = {}
            for collected in wave:
                if collected.site not in number_of:
                    continue
                site = self.sites[collected.site]
                weight = np.asarray(site.op.rows(), np.float64)
                problem = problem_of(weight, collected.fit, centred=site.centred)
                found.setdefault(number_of[collected.site], []).append(problem)
            yield found

    def _reactions(self, layers: Sequence[Layer], rows: Mapping[int, Mapping[int, F64]]) -> F64 | None:
        """How much the outputs change for each loss of a layer; None where a session cannot hold the weights."""
        samples = self.context.calibration
        if samples is None or weight_bytes(self.model) > PROTOBUF_LIMIT:
            return None
        sites = [site.op for site in self.sites]
        probe = Probe(self.model, sites, samples, most=_PROBED, threads=host().cores_physical)
        found = np.zeros(len(layers))
        for number, layer in enumerate(layers):
            self.context.progress("measuring what the outputs make of it", number, len(layers))
            loss = layer.loss(layer.within(self.share)) if rows[number] else 0.0
            found[number] = probe.change(rows[number]) / loss if loss > 0 else 0.0
        return found


def without_data(op: WeightedOp) -> Problem:
    """The problem whose loss is that of the weights."""
    return Problem(np.asarray(op.rows(), np.float64), np.eye(op.k), np.zeros(op.k), 0)
