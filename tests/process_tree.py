"""What a command takes of the machine, with all processes that it starts."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_EVERY_S = 0.05


@dataclass(frozen=True)
class Cost:
    """Of one command; `bytes` is the most that its processes had resident together, shared pages counted once."""

    seconds: float
    bytes: int


def cost(arguments: Sequence[str | Path], folder: Path) -> Cost:
    """Runs Python with arguments, from a folder, to its end. Raises CalledProcessError if it fails."""
    begin, most = time.monotonic(), 0
    with (
        subprocess.Popen(
            [sys.executable, *arguments], cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as started,
    ):
        while started.poll() is None:
            most = max(most, sum(map(_resident, _tree(started.pid))))
            time.sleep(_EVERY_S)
    if started.returncode:
        raise subprocess.CalledProcessError(started.returncode, list(map(str, arguments)))
    return Cost(time.monotonic() - begin, most)


def _tree(root: int) -> list[int]:
    found = [root]
    for number in found:  # grows
        for children in Path(f"/proc/{number}/task").glob("*/children"):
            found += map(int, _read(children).split())
    return found


def _resident(number: int) -> int:
    """The proportional set size: pages that several processes share count in parts."""
    for line in _read(Path(f"/proc/{number}/smaps_rollup")).splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) << 10
    return 0


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # the process has ended
        return ""
