"""Where tables go."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

_WIDTH = 200  # of tables where stdout is no terminal: a log has no edge to fold at


def screen() -> Console:
    """rich's console on stdout."""
    from rich.console import Console

    return Console() if sys.stdout.isatty() else Console(width=_WIDTH)
