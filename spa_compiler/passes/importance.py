"""What each unit of a group is worth: a criterion's score per parameter that goes with it, over the group's mean.

    score[u] = sum of the criterion over the unit's slabs / elements in them
    worth[u] = score[u] / mean of the group's scores

Dividing by the number of elements makes it the score per saved cost: of two units of one group, the one that takes
more weights with it must matter more. Dividing by the group's mean makes groups comparable, whose weights differ in
scale for reasons that have nothing to do with importance; a share of a group's worth counts like the same share of
another's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeAlias

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from spa_compiler.analysis import Group
from spa_compiler.criteria import chance, l1, l2
from spa_compiler.errors import ModelError
from spa_compiler.graph.model import Model
from spa_compiler.graph.weights import array_of

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]
Gone: TypeAlias = Mapping[tuple[str, int], Iterable[int]]
"""(parameter, axis) -> indices that are gone already."""
Criterion: TypeAlias = Literal["l2", "l1", "random"]

_SLABS = {"l1": l1, "l2": l2}


class Importance:
    """Scores of groups of one model.

    Args:
        model: nothing in it is changed; weights are read one at a time.
    """

    def __init__(self, model: Model, criterion: Criterion, rng: np.random.Generator) -> None:
        self.criterion, self.rng = criterion, rng
        self.holders = holders(model.graph)

    def worth(self, group: Group, gone: Gone, removed: Iterable[int]) -> NDArray[np.float64]:
        """`[size]`, mean 1 over the units that are left.

        Args:
            gone: slabs that do not count any more.
            removed: units of the group that are gone; theirs is 0.

        Raises:
            ModelError: a weight has a NaN or an infinity.
        """
        left = np.ones(group.size, np.bool_)
        left[list(removed)] = False
        scores = chance(group.size, self.rng) if self.criterion == "random" else self._scores(group, gone)
        scores = np.where(left, scores, 0)
        mean = scores.sum() / max(1, int(left.sum()))
        return scores / mean if mean > 0 else scores

    def _scores(self, group: Group, gone: Gone) -> NDArray[np.float64]:
        total, elements = np.zeros(group.size), np.zeros(group.size)
        for member in group.parameters:
            values = array(self.holders[member.tensor])
            if not _is_float(values.dtype):
                continue
            for axis in range(values.ndim):
                if axis != member.axis and (member.tensor, axis) in gone:
                    values = np.delete(values, list(gone[member.tensor, axis]), axis)
            per_index = _SLABS[self.criterion](values, member.axis)
            if not np.isfinite(per_index).all():
                raise ModelError(
                    f"weight {member.tensor!r} has a NaN or an infinity",
                    fix="Export the model again from a checkpoint without them",
                )
            for units in member.occurrences:
                inside = units >= 0
                total += np.bincount(units[inside], per_index[inside], group.size)
                elements += np.bincount(units[inside], minlength=group.size) * (values.size / max(1, per_index.size))
        return total / np.maximum(elements, 1)


def holders(graph: gs.Graph) -> dict[str, gs.Tensor]:
    """Every constant of a graph by name, and the outputs of its Constant nodes."""
    return {
        name: tensor
        for name, tensor in graph.tensors().items()
        if isinstance(tensor, gs.Constant) or (tensor.inputs and tensor.inputs[0].op == "Constant")
    }


def array(holder: gs.Tensor) -> Array:
    """The values of what `holders` gives, never to be written to."""
    if isinstance(holder, gs.Constant):
        return array_of(holder)
    value = holder.inputs[0].attrs["value"]
    return array_of(value) if isinstance(value, gs.Constant) else np.asarray(value.values)


def _is_float(dtype: np.dtype[Any]) -> bool:
    return dtype.kind == "f" or "float" in dtype.name
