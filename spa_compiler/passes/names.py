"""What to say about a name that does not exist."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

_MOST = 20
"""Names that a message lists at most."""


def did_you_mean(wrong: str, known: Sequence[str]) -> str:
    """The end of a message about an unknown name: the nearest one that exists, if one is near, and what there is."""
    close = difflib.get_close_matches(wrong, known, n=1)
    more = ", ..." if len(known) > _MOST else ""
    return f"{f'Did you mean {close[0]}? ' if close else ''}There are: {', '.join(known[:_MOST])}{more}"
