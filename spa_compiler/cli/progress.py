"""Progress on stderr: bars with the time that is left in a terminal, and plain lines now and then elsewhere."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

Advance = Callable[[str, int, int], None]

_EVERY_S = 10.0  # between two plain lines: a run that is over sooner prints none


@contextmanager
def bars(console: Console, quiet: bool) -> Iterator[Advance]:
    """What to call with (label, done, total); nothing is shown where `quiet`.

    In a terminal, a bar with time left for each label. Elsewhere, in a log, a line every ten seconds that says how long
    the run has taken and what it is at.
    """
    if quiet:
        yield lambda label, done, total: None
    elif console.is_terminal:
        with _live(console) as advance:
            yield advance
    else:
        with _lines(console) as advance:
            yield advance


@contextmanager
def _live(console: Console) -> Iterator[Advance]:
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, transient=True) as shown:
        tasks: dict[str, Any] = {}

        def advance(label: str, done: int, total: int) -> None:
            if label not in tasks:
                tasks[label] = shown.add_task(label, total=total)
            shown.update(tasks[label], completed=done, total=total)

        yield advance


@contextmanager
def _lines(console: Console) -> Iterator[Advance]:
    """A thread prints them, so that a long step that reports nothing shows that it is still at work, too."""
    begin, over = time.monotonic(), threading.Event()
    now = ""

    def advance(label: str, done: int, total: int) -> None:
        nonlocal now
        now = f"{label} {done}/{total}" if total > 1 else label

    def tell() -> None:
        while not over.wait(_EVERY_S):
            if now:
                line = f"{time.monotonic() - begin:.0f} s: {now}"
                console.print(line, markup=False, highlight=False, soft_wrap=True)

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield advance
    finally:
        over.set()
        thread.join()
