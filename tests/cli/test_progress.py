"""Progress: bars in a terminal, plain lines now and then in a log, nothing where nobody wants it."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from rich.console import Console

from spa_compiler.cli import progress
from spa_compiler.cli.compile import main
from tests.cli.command import invoke
from tests.networks import mlp


def console(terminal: bool) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=100, color_system=None)


def shown(screen: Console) -> str:
    assert isinstance(screen.file, io.StringIO)
    return screen.file.getvalue()


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


def test_a_log_gets_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_EVERY_S", 0.01)
    screen = console(terminal=False)
    with progress.bars(screen, quiet=False) as advance:
        advance("load", 0, 1)
        wait_for(lambda: "s: load\n" in shown(screen))
        advance("timing [bold]sites", 3, 12)
        wait_for(lambda: shown(screen).count("s: timing [bold]sites 3/12\n") >= 2)  # still at it
    printed = shown(screen)
    assert all(line.split(" s: ")[0].isdigit() for line in printed.splitlines())
    time.sleep(0.05)
    assert shown(screen) == printed, "it is over"


def test_what_is_over_soon_prints_no_line() -> None:
    screen = console(terminal=False)
    with progress.bars(screen, quiet=False) as advance:
        for done in range(100):
            advance("timing sites", done, 100)
    assert shown(screen) == ""


def test_lines_end_with_a_run_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_EVERY_S", 0.01)
    screen = console(terminal=False)

    def fail() -> None:
        with progress.bars(screen, quiet=False) as advance:
            advance("load", 0, 1)
            raise RuntimeError("it fails")

    with pytest.raises(RuntimeError, match="it fails"):
        fail()
    printed = shown(screen)
    time.sleep(0.05)
    assert shown(screen) == printed


@pytest.mark.parametrize("terminal", [True, False])
def test_quiet(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_EVERY_S", 0.001)
    screen = console(terminal)
    with progress.bars(screen, quiet=True) as advance:
        advance("load", 0, 1)
        time.sleep(0.05)
    assert shown(screen) == ""


def test_a_terminal_gets_bars() -> None:
    screen = console(terminal=True)
    with progress.bars(screen, quiet=False) as advance:
        advance("timing sites", 3, 12)
    assert "timing sites" in shown(screen)
    assert "3/12" in shown(screen)


def test_the_command_prints_them_on_stderr(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from spa_compiler import compiler

    def slow(*_: object, progress: progress.Advance, **__: object) -> None:
        progress("timing sites", 3, 12)
        time.sleep(0.2)
        sys.exit(0)

    monkeypatch.setattr(progress, "_EVERY_S", 0.01)
    monkeypatch.setattr(compiler, "compile", slow)
    onnx.save(mlp(1.0, 64), tmp_path / "net.onnx")
    result = invoke(main, str(tmp_path / "net.onnx"))
    assert "s: timing sites 3/12\n" in result.stderr
    assert result.stdout == ""
    assert invoke(main, str(tmp_path / "net.onnx"), "-q").stderr == ""
