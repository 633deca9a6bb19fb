"""Servers that take times: in this process, and as processes that a tracker on loopback knows."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from spa_compiler.placement import remote, serve
from spa_compiler.placement.remote import RemoteTimer
from spa_compiler.placement.timer import this_machine

ROOT = Path(__file__).resolve().parents[2]


class Session:
    """A server in this process, with a folder; `functions` of it may be others."""

    def __init__(self, root: Path, **functions: Callable[..., object]) -> None:
        self.root = root
        self.calls: list[str] = []
        self.functions = {
            "describe": lambda: msgspec.json.encode(this_machine()).decode(),
            "append": lambda name, offset, data: serve.append(root, name, offset, data),
            "fetch": lambda name: serve.fetch(root, name),
            "time": lambda question: serve.time(root, question),
            "run": lambda question: serve.run(root, question),
        } | functions

    def get_function(self, name: str) -> Callable[..., object]:
        short = name.removeprefix(remote.PREFIX)
        self.calls.append(short)
        try:
            return self.functions[short]
        except KeyError:
            raise AttributeError(f"no function {name}") from None


def talking_to(session: Session, monkeypatch: pytest.MonkeyPatch, *, gpu: bool = False) -> RemoteTimer:
    """A timer that every connection leads to this server."""
    monkeypatch.setattr(RemoteTimer, "_connect", lambda self: session)
    return RemoteTimer("there:1,key", gpu=gpu)


@contextlib.contextmanager
def tracker() -> Iterator[int]:
    from tvm.rpc.tracker import Tracker

    found = Tracker(host="127.0.0.1", port=9190, port_end=9990, silent=True)
    try:
        yield found.port
    finally:
        found.terminate()


@contextlib.contextmanager
def server(
    port: int, key: str, log: Path, program: str = "spa_compiler.cli.tune_server"
) -> Iterator[subprocess.Popen[str]]:
    """A server that is known to the tracker when this returns."""
    command = [sys.executable, "-m", program, "--tracker", f"127.0.0.1:{port}", "--key", key, "-v"]
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, text=True, cwd=ROOT, start_new_session=True)
    try:
        from tvm import rpc

        known, end = rpc.connect_tracker("127.0.0.1", port), time.monotonic() + 60
        while not any(s["key"] == f"server:{key}" for s in known.summary()["server_info"]):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.05)
        known.close()
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
