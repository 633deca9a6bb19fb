"""Which zeros a sparse weight may have, one pattern per file; `parse` turns their names into patterns."""

from __future__ import annotations

import re

from spa_compiler.errors import UsageError
from spa_compiler.patterns.block import Block
from spa_compiler.patterns.channel import Channel
from spa_compiler.patterns.fan_in import FanIn
from spa_compiler.patterns.n_m import NofM
from spa_compiler.patterns.pattern import Pattern
from spa_compiler.patterns.unstructured import Unstructured

__all__ = ["Block", "Channel", "FanIn", "NofM", "Pattern", "Unstructured", "names", "parse"]

_PLAIN: dict[str, type[Unstructured] | type[FanIn] | type[Channel]] = {
    cls.name: cls for cls in (Unstructured, FanIn, Channel)
}
_BLOCK = re.compile(r"block:([0-9]{1,9})x([0-9]{1,9})")
_N_M = re.compile(r"([0-9]{1,9}):([0-9]{1,9})")


def names() -> list[str]:
    """The patterns that exist, as a user writes them; `R`, `C`, `N` and `M` stand for numbers."""
    return ["unstructured", "block:4x1", "block:RxC", "2:4", "N:M", "fan-in", "channel"]


def parse(text: str) -> Pattern:
    """The pattern that `text` names, such as `unstructured`, `block:4x1`, `2:4`.

    Raises:
        UsageError: there is no such pattern, or it has an impossible number.
    """
    if text in _PLAIN:
        return _PLAIN[text]()
    if found := _BLOCK.fullmatch(text):
        return Block(int(found[1]), int(found[2]))
    if found := _N_M.fullmatch(text):
        return NofM(int(found[1]), int(found[2]))
    raise UsageError(f"there is no pattern {text!r}", fix=f"There are: {', '.join(names())}")
