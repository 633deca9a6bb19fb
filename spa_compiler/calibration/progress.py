"""How long work tells how far it is."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called with what is being worked on, how many are done, and how many there are."""


def no_progress(what: str, done: int, total: int) -> None:
    """The progress of a run that nobody watches."""
