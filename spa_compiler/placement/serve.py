"""What `spa-tune-server` does: times models for `remote.RemoteTimer`, as a server of TVM's RPC tracker.

Each session is a process of its own with a folder of its own, in which alone files are written and read. That holds for
the functions of this file; TVM's own functions, which every server of its protocol has, load what they are given. So
whoever reaches the port may run code here: it belongs into a network of people one trusts.
"""

from __future__ import annotations

import io
import logging
import multiprocessing
import os
import signal
import socket
import threading
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import ml_dtypes
import msgspec
import numpy as np
import tvm

from spa_compiler.errors import EnvironmentFault
from spa_compiler.graph.session import Feeds
from spa_compiler.placement.gpu_timer import CudaTimer
from spa_compiler.placement.remote import PREFIX, Answer, Question
from spa_compiler.placement.timer import Contender, LocalTimer, Machine, this_machine

_log = logging.getLogger(__name__)

_PORTS = 100  # that are tried, from the first one on
_TRACKER_S = 10.0
_WORDS = 500  # characters of an error
_OUTPUTS = "outputs"  # the folder of what models gave out


class Refused(ValueError):
    """What a client asks for is outside of its folder, or makes no sense."""


def inside(root: Path, name: str) -> Path:
    """The file that a client names, below `root`, which has no links of which it could make use.

    Raises:
        Refused: a path that is absolute, or leads out.
    """
    pure = PurePosixPath(name)
    path = root.resolve() / pure
    if not pure.parts or "\0" in name or ".." in pure.parts or not path.resolve().is_relative_to(root.resolve()):
        raise Refused(f"{name!r} is no file of this session")
    return path


def append(root: Path, name: str, offset: int, data: bytes) -> None:
    """Writes the next bytes of a file. Raises Refused where they would leave a hole or lie outside."""
    path = inside(root, name)
    if offset != (path.stat().st_size if path.is_file() else 0):
        raise Refused(f"{name!r} does not end at {offset}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        file.write(data)


def fetch(root: Path, name: str) -> bytes:
    """The bytes of a file, such as `run` makes."""
    return inside(root, name).read_bytes()


def time(root: Path, question: str) -> str:
    """Answers a Question with timings, both as JSON."""

    def answer(asked: Question, contenders: dict[str, Contender], feeds: Feeds) -> Answer:
        timer = _timer(asked)
        with timer.held():  # others may measure here without the tracker
            times = timer.time(contenders, feeds, asked.threads, asked.budget_s, asked.least_rounds, asked.stays)
        return Answer(timings=times)

    return _answer(root, question, answer)


def run(root: Path, question: str) -> str:
    """Answers a Question of one contender with its outputs; `fetch` has their bytes."""

    def answer(asked: Question, contenders: dict[str, Contender], feeds: Feeds) -> Answer:
        (contender,) = contenders.values()
        folder = root / _OUTPUTS
        folder.mkdir(exist_ok=True)
        places = {}
        for i, (name, value) in enumerate(_timer(asked).run(contender, feeds, asked.threads).items()):
            np.save(folder / f"{i}.npy", value.astype(str) if value.dtype == object else value, allow_pickle=False)
            places[name] = f"{_OUTPUTS}/{i}.npy"
        return Answer(outputs=places)

    return _answer(root, question, answer)


def _timer(asked: Question) -> LocalTimer:
    return CudaTimer() if asked.gpu else LocalTimer()


def _array(data: bytes) -> np.ndarray:
    """What a .npy file holds; two bytes of no type are bfloat16, which numpy does not know."""
    array: np.ndarray = np.load(io.BytesIO(data), allow_pickle=False)
    return array.view(ml_dtypes.bfloat16) if array.dtype == np.dtype("V2") else array


def _answer(root: Path, text: str, answer: Callable[[Question, dict[str, Contender], Feeds], Answer]) -> str:
    try:
        asked = msgspec.json.decode(text, type=Question, strict=True)
        contenders = {
            name: Contender(inside(root, e.model), None if e.library is None else inside(root, e.library))
            for name, e in asked.contenders.items()
        }
        feeds = {name: _array(inside(root, path).read_bytes()) for name, path in asked.feeds.items()}
        result = answer(asked, contenders, feeds)
    except Exception as error:  # noqa: BLE001 - whatever it is, the client has to know it
        _log.info("a question could not be answered", exc_info=True)
        result = Answer(failure=" ".join(str(error).split())[:_WORDS] or type(error).__name__)
    return msgspec.json.encode(result).decode()


def serve(
    tracker: tuple[str, int],
    key: str,
    *,
    host: str,
    port: int,
    address: str | None,
    ready: Callable[[Machine], None],
) -> None:
    """Offers this machine under a key until it is interrupted. A session that crashes ends that session alone.

    Args:
        host, port: to listen at; where the port is taken, one of the next ones.
        address: where clients find this machine, if not where the tracker sees it.
        ready: called once, when everything that times are taken with is there.

    Raises:
        EnvironmentFault: ONNX Runtime is missing, no port is free, or the tracker does not answer.
    """
    _ask(tracker)
    # A process that has loaded ONNX Runtime must not fork, and each session is a fork.
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        machine = pool.apply(this_machine)
    multiprocessing.set_start_method("fork", force=True)
    os.register_at_fork(after_in_child=lambda: signal.signal(signal.SIGTERM, signal.SIG_DFL))
    _register()
    ready(machine)
    home = Path.cwd()
    while True:
        _ask(tracker)
        os.chdir(home)  # a session that crashed leaves the process in its folder, which is gone
        # Its threads inherit that they end with the process.
        failures: list[Exception] = []
        thread = threading.Thread(target=_listen, args=(tracker, key, host, port, address, failures), daemon=True)
        thread.start()
        thread.join()
        if failures:
            raise failures[0]
        _log.warning("a session crashed; the next one can come")


def _listen(
    tracker: tuple[str, int], key: str, host: str, port: int, address: str | None, failures: list[Exception]
) -> None:
    """Serves sessions one after the other until one crashes or the tracker is gone."""
    from tvm.rpc.server import PopenRPCServerState

    try:
        state = PopenRPCServerState(
            host, port, port + _PORTS, tracker_addr=tracker, key=key, custom_addr=address, silent=True
        )
    except (OSError, ValueError) as error:
        failures.append(
            EnvironmentFault(
                f"cannot listen: {error}", where=f"{host}:{port}", fix="Name another place with --host and --port"
            )
        )
        return
    state.thread.join()
    state.sock.close()


def _ask(tracker: tuple[str, int]) -> None:
    try:
        socket.create_connection(tracker, timeout=_TRACKER_S).close()
    except OSError as error:
        raise EnvironmentFault(
            f"no RPC tracker answers ({error.strerror or error})",
            where=f"{tracker[0]}:{tracker[1]}",
            fix="Start one with `python -m tvm.exec.rpc_tracker`",
        ) from error


def _register() -> None:
    def root() -> Path:
        return Path(tvm.get_global_func("tvm.rpc.server.workpath")("."))

    functions: dict[str, Callable[..., Any]] = {
        "describe": lambda: msgspec.json.encode(this_machine()).decode(),
        "append": lambda name, offset, data: append(root(), str(name), int(offset), bytes(data)),
        "fetch": lambda name: fetch(root(), str(name)),
        "time": lambda question: time(root(), str(question)),
        "run": lambda question: run(root(), str(question)),
    }
    for name, function in functions.items():
        tvm.register_global_func(PREFIX + name, function)
