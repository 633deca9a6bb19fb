"""What goes with units according to the JSON alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from spa_compiler.analysis import schema

Removal = dict[tuple[str, int], set[int]]
"""(tensor, axis) -> the indices that go."""


def removal(document: schema.Document, units: Mapping[int, Sequence[int]]) -> tuple[Removal, Removal]:
    """What goes from parameters and from activations, for units by group id, as an outsider reads it."""
    parameters: Removal = {}
    activations: Removal = {}
    for group in document.groups:
        for number in units.get(group.id, []):
            unit = group.units[number]
            for slabs, target in ((unit.parameters, parameters), (unit.activations, activations)):
                for slab in slabs:
                    target.setdefault((slab.name, slab.axis), set()).update(slab.indices)
    return parameters, activations
