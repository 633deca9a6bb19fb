"""Which zeros a sparse weight may have, one pattern per file; `parse` turns their names into patterns."""

from __future__ import annotations

import re

from spa_compiler.errors import UsageError
from spa_compiler.patterns.block import Block
from spa_compiler.patterns.pattern import Pattern
from spa_compiler.patterns.unstructured import Unstructured

__all__ = ["Block", "Pattern", "Unstructured", "names", "parse"]

_BLOCK = re.compile(r"block:([0-9]{1,9})x1")


def names() -> list[str]:
    """The patterns that exist, as a user writes them; `R` stands for a number."""
    return ["unstructured", "block:4x1", "block:Rx1"]


def parse(text: str) -> Pattern:
    """The pattern that `text` names: `unstructured`, `block:4x1`, and `block:Rx1` for other R.

    Raises:
        UsageError: there is no such pattern.
    """
    if text == "unstructured":
        return Unstructured()
    if found := _BLOCK.fullmatch(text):
        return Block(int(found[1]))
    raise UsageError(f"there is no pattern {text!r}", fix=f"There are: {', '.join(names())}")
