"""What an analysis says of ONNX text, in forms that are easy to compare."""

from __future__ import annotations

from spa_compiler.analysis import Analysis, Group, analyze
from spa_compiler.graph.load import load
from tests.analysis.cutting import with_weights


def analysis_of(text: str) -> Analysis:
    """Inputs that are not named x... are weights."""
    return analyze(load(with_weights(text)))


def groups_of(text: str) -> tuple[Group, ...]:
    return analysis_of(text).groups


def group_members(text: str) -> list[set[tuple[str, int]]]:
    """The axes of each group, as (tensor, axis)."""
    return [{(member.tensor, member.axis) for member in group.members} for group in groups_of(text)]


def pins_of(text: str) -> set[tuple[str, int, str, str, int]]:
    return {(pin.tensor, pin.axis, pin.op, pin.reason, pin.params) for pin in analysis_of(text).pins}
