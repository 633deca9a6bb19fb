"""The passes that exist, by name."""

from __future__ import annotations

import difflib

from spa_compiler.errors import UsageError
from spa_compiler.passes.pass_ import Pass
from spa_compiler.passes.sparsify import Sparsify

_PASSES: tuple[type[Pass], ...] = (Sparsify,)


def passes() -> dict[str, type[Pass]]:
    """Every pass by its name, in the order in which they are listed."""
    return {pass_.name: pass_ for pass_ in _PASSES}


def find(name: str) -> type[Pass]:
    """The pass of that name.

    Raises:
        UsageError: there is none; the message lists what exists.
    """
    known = passes()
    if name not in known:
        raise UsageError(f"there is no pass {name!r}", fix=did_you_mean(name, list(known)))
    return known[name]


def did_you_mean(wrong: str, known: list[str]) -> str:
    """The end of a message about an unknown name: the nearest one that exists, if one is near, and all of them."""
    close = difflib.get_close_matches(wrong, known, n=1)
    return f"{f'Did you mean {close[0]}? ' if close else ''}There are: {', '.join(known)}"
