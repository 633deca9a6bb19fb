"""Shapes that nobody asked for, at which an artifact may be run all the same."""

from __future__ import annotations

import math
from collections.abc import Sequence

from spa_compiler.calibration.shapes import Shapes
from spa_compiler.graph.model import Model, ValueInfo

_Sizes = tuple[tuple[int, ...], ...]
_TEXTS: _Sizes = ((1, 1), (1, 16), (8, 64), (32, 128))  # batch, tokens
_BATCHES: _Sizes = ((1,), (8,), (32,))
_ROWS: _Sizes = ((1,), (16,), (512,))
_WIDEST_ROWS = 2  # axes of an input whose first one counts rows, not images


def telling(model: Model) -> ValueInfo | None:
    """The input with the most open dimensions, whose size tells how much there is to compute; None if none is open."""
    counts = [(sum(not isinstance(dim, int) for dim in value.shape), value) for value in model.signature.inputs]
    most = max((count for count, _ in counts), default=0)
    return next((value for count, value in counts if count == most), None) if most else None


def other_shapes(model: Model, asked: Sequence[Shapes]) -> list[Shapes]:
    """Few and many tokens, or images, the smallest first: what remains open besides stays as it was asked for.

    Nothing says that the model runs at all of them.
    """
    value = telling(model)
    if value is None:
        return []
    rank = len(value.shape)
    openings = [axis for axis, dim in enumerate(value.shape) if not isinstance(dim, int)]
    if openings[0] == 0 and len(openings) == 2 and rank <= 3:
        axes, choices = openings, _TEXTS
    elif openings[0] == 0 and rank > _WIDEST_ROWS:
        axes, choices = openings[:1], _BATCHES
    elif len(openings) == 1:
        axes, choices = openings, _ROWS
    else:
        return []
    keys = [_key(value, axis) for axis in axes]
    found = [_bound(model, asked[0], dict(zip(keys, sizes, strict=True))) for sizes in choices]
    return sorted((s for s in found if s not in asked), key=lambda shapes: math.prod(shapes[value.name]))


def _bound(model: Model, asked: Shapes, sizes: dict[str, int]) -> Shapes:
    return {
        value.name: tuple(
            now if isinstance(dim, int) else sizes.get(_key(value, axis), now)
            for axis, (dim, now) in enumerate(zip(value.shape, asked[value.name], strict=True))
        )
        for value in model.signature.inputs
    }


def _key(value: ValueInfo, axis: int) -> str:
    """Open dimensions that are one: by their symbol; those without, by where they are."""
    dim = value.shape[axis]
    return dim if isinstance(dim, str) else f"{axis} of {len(value.shape)}"
