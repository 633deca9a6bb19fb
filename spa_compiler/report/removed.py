"""What cuts removed, in the words of the source file: its groups and units, and its tensors' names and indices.

Passes see the canonical model, in which some tensors of the file are gone (a BatchNormalization that went into the
convolution before it), and a second cut sees what the first one left. Whoever checks a run has the file.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spa_compiler.analysis import Analysis, analyze
from spa_compiler.analysis.schema import Slab
from spa_compiler.graph.model import Model
from spa_compiler.passes.cutting import removals
from spa_compiler.passes.matching import match, slabs
from spa_compiler.passes.pass_ import Change, Removal
from spa_compiler.passes.trail import Trail, also
from spa_compiler.report.report import NO_GROUP, Removed, RemovedSlab


class InSource:
    """Tells the cuts of one run, one after the other.

    Args:
        source: the model as it was loaded; analyzed when the first cut is told.
    """

    def __init__(self, source: Model) -> None:
        self._source = source
        self._trail = Trail()
        self._analysis: Analysis | None = None
        self._units: dict[int, NDArray[np.int64]] = {}

    def tell(self, analysis: Analysis, change: Change) -> tuple[Removed, ...]:
        """One entry for each group of the source that lost units.

        Args:
            analysis: of the model right before the change.
        """
        if not change.removed:
            return ()
        gone = self._trail.cut(analysis, {one.group: one.units for one in change.removed})
        if self._analysis is None:
            self._analysis = analyze(self._source)
        known, self._units = self._units, also(self._units, match(self._analysis, gone).removed)
        new = {group: np.setdiff1d(own, known.get(group, own[:0])) for group, own in self._units.items()}
        folded = _stored(self._source) - (analysis.facts.axes.keys() - set(analysis.parameters))
        told = tuple(_told(one, folded) for one in removals(self._analysis, new))
        rest = self._unexplained(gone, slabs(self._analysis, self._units))
        return (*told, rest) if rest is not None else told

    def _unexplained(
        self, gone: Mapping[tuple[str, int], NDArray[np.bool_]], explained: Mapping[tuple[str, int], NDArray[np.bool_]]
    ) -> Removed | None:
        """What lies on tensors of the file, but in no unit that the file's own analysis finds."""
        left: dict[tuple[str, int], NDArray[np.bool_]] = {}
        for (name, axis), mask in gone.items():
            size = _size(self._source.graph.tensors().get(name), axis)
            known = explained.get((name, axis), np.zeros_like(mask))
            if known.size == mask.size and size in (None, mask.size) and (mask & ~known).any():
                left[name, axis] = mask & ~known
        here = {name for name, _ in left} & self._source.graph.tensors().keys()
        constant = {name for name in here if hasattr(self._source.graph.tensors()[name], "values")}
        pairs = [
            (name in constant, RemovedSlab(name=name, axis=axis, indices=tuple(np.flatnonzero(mask).tolist())))
            for (name, axis), mask in left.items()
            if name in here
        ]
        if not pairs:
            return None
        return Removed(
            group=NO_GROUP,
            granularity="",
            units=(),
            parameters=tuple(slab for fixed, slab in pairs if fixed),
            activations=tuple(slab for fixed, slab in pairs if not fixed),
        )


def _stored(model: Model) -> set[str]:
    """Tensors that hang on no input, as what standardizes weights makes; where folding made constants of them, whole
    ones went in, so nothing is to be masked.
    """
    out: set[str] = set()
    for node in model.graph.nodes:
        if node.op == "Constant" or (
            node.inputs and all(not t.name or hasattr(t, "values") or t.name in out for t in node.inputs)
        ):
            out.update(tensor.name for tensor in node.outputs)
    return out


def _told(removal: Removal, folded: Container[str]) -> Removed:
    return Removed(
        group=removal.group,
        granularity=removal.granularity,
        units=removal.units,
        parameters=_slabs(removal.parameters),
        activations=_slabs(slab for slab in removal.activations if slab.name not in folded),
    )


def _slabs(own: Iterable[Slab]) -> tuple[RemovedSlab, ...]:
    return tuple(RemovedSlab(name=slab.name, axis=slab.axis, indices=tuple(slab.indices)) for slab in own)


def _size(tensor: Any, axis: int) -> int | None:
    """The size that the file states."""
    if tensor is None or tensor.shape is None or axis >= len(tensor.shape):
        return None
    size = tensor.shape[axis]
    return int(size) if isinstance(size, int | np.integer) and size >= 0 else None
