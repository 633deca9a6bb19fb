"""The JSON of `spa-analyze --json`, as msgspec structs: what a trainer or a checker reads.

    {"groups": [{"id", "size", "granularity", "params", "macs",
                 "units": [{"id", "parameters":  [{"name", "axis", "indices"}],
                                  "activations": [{"name", "axis", "indices"}]}]}],
     "pins": [{"tensor", "axis", "op", "reason", "params"}]}

Tensors are named as in the source file. Sizes that the file leaves open (a batch, a sequence) are bound to numbers
that fit the graph, see `graph.settle`. What is said of them holds for these numbers. `json_schema()` gives the same as
a JSON Schema.
"""

from __future__ import annotations

from typing import Any

import msgspec


class Slab(msgspec.Struct, frozen=True, gc=False):
    """`indices` (ascending, never empty) of axis `axis` (0 is the first) of the tensor `name`.

    Axes whose size depends on the inputs (heads merged with the batch) have no slabs, as their indices mean nothing for
    other inputs. What is zero before they are merged is zero on them.
    """

    name: str
    axis: int
    indices: list[int]


class Unit(msgspec.Struct, frozen=True):
    """The smallest thing that can be removed: all of its slabs go together.

    `id` counts from 0 within the group. Removing a unit deletes the slabs of `parameters` (constants of the file). The
    result computes what the whole model computes with the slabs of `activations` set to zero wherever they are read.
    """

    id: int
    parameters: list[Slab]
    activations: list[Slab]


class Group(msgspec.Struct, frozen=True):
    """Units that compete with each other: their axes hang together.

    `size`: number of units. `granularity`: what one unit is ("channel", "conv group", "slot of each conv group", ...).
    `params`: parameters that go when all units go. `macs`: multiply-accumulates that go then, for one sample: an open
    batch counts as 1, other open sizes as the numbers that they are bound to; null where they hang on sizes that follow
    from the inputs' values. Parameters and MACs on the crossing of two groups count in both.
    """

    id: int
    size: int
    granularity: str
    params: int
    macs: int | None
    units: list[Unit]


class Pin(msgspec.Struct, frozen=True):
    """Axis `axis` of `tensor` stays, for `reason`, which the operator type `op` gives.

    `op` is "graph input" or "graph output" for the interface. `params`: parameters that nothing can remove and that lie
    on this axis, or on one that is tied to it; several pins may hold the same parameters. Positions (pixels, taps of a
    convolution window) are no channels: their pins hold none. Axes of size 1, and axes whose size follows from the
    inputs' values, are not listed: there is nothing on them to remove.
    """

    tensor: str
    axis: int
    op: str
    reason: str
    params: int


class Document(msgspec.Struct, frozen=True):
    """The whole answer."""

    groups: list[Group]
    pins: list[Pin]


def json_schema() -> dict[str, Any]:
    """JSON Schema of `Document`."""
    return msgspec.json.schema(Document)
