"""Einsum: one axis per letter. Equal letters are joined, also within one operand; `...` are axes that broadcast.

A letter that the output lacks is summed over, and a removed index adds zero to the sum, unless all that has the letter
is stored.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import onnx_graphsurgeon as gs

from spa_compiler.analysis.facts import Axis, Facts, Rule
from spa_compiler.analysis.rules.broadcast import UNKNOWN_RANK, broadcast
from spa_compiler.analysis.rules.inputs import pin_stored_sum

_ELLIPSIS = "..."


@dataclass(frozen=True)
class Equation:
    """The terms, each as a list of letters and `...`."""

    operands: tuple[tuple[str, ...], ...]
    output: tuple[str, ...]


def parse(equation: str) -> Equation:
    """Reads `ij,jk->ik`; without an arrow the output has every letter that occurs once, in alphabetical order."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    operands = tuple(_letters(term) for term in left.split(","))
    if arrow:
        return Equation(operands, _letters(right))
    every = [letter for term in operands for letter in term]
    once = sorted(letter for letter in set(every) - {_ELLIPSIS} if every.count(letter) == 1)
    return Equation(operands, (*([_ELLIPSIS] if _ELLIPSIS in every else []), *once))


def _letters(term: str) -> tuple[str, ...]:
    return tuple(re.findall(r"\.\.\.|.", term))


def einsum(node: gs.Node, facts: Facts) -> str | None:
    """Equal letters join; see the top of this file."""
    equation = node.attrs["equation"]
    parsed = parse(equation.decode() if isinstance(equation, bytes) else equation)
    if any(facts.of(tensor) is None for tensor in node.inputs):
        return UNKNOWN_RANK
    places: dict[str, list[tuple[gs.Tensor, int]]] = {}
    free = []
    for tensor, term in zip(node.inputs, parsed.operands, strict=True):
        rank, axis = len(facts.axes[tensor.name]), 0
        for letter in term:
            if letter == _ELLIPSIS:
                stop = axis + rank - len(term) + 1
                free.append((tensor, range(axis, stop)))
                axis = stop
            else:
                places.setdefault(letter, []).append((tensor, axis))
                axis += 1
    # one letter is a broadcast of single axes: sizes of 1 couple nothing
    found = {
        letter: broadcast(node, facts, [(tensor, (axis,)) for tensor, axis in where])[0]
        for letter, where in places.items()
    }
    for letter, where in places.items():
        if letter not in parsed.output:
            pin_stored_sum(node, facts, [tensor for tensor, _ in where], where[-1][1])
    ellipsis = broadcast(node, facts, free) if any(axes for _, axes in free) else []
    facts.put(node.outputs[0], _axes(parsed.output, found, ellipsis))
    if len(node.inputs) > 1:
        facts.work(node, [*found.values(), *ellipsis], 1)
    return None


def _axes(term: tuple[str, ...], found: dict[str, Axis], ellipsis: list[Axis]) -> list[Axis]:
    return [axis for letter in term for axis in (ellipsis if letter == _ELLIPSIS else [found[letter]])]


RULES: dict[str, Rule] = {"Einsum": einsum}
