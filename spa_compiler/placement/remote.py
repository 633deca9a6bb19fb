"""Times from another machine, through TVM's RPC tracker and a `spa-tune-server` that it knows (`serve.py`).

Models, libraries and inputs are sent under the SHA-256 of their bytes, each once in a session; what comes back is JSON
or an array, and is checked before anything is made of it. TVM's protocol has neither passwords nor encryption.
"""

from __future__ import annotations

import hashlib
import io
import logging
import math
import socket
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np
import onnx

from spa_compiler.errors import EnvironmentFault, UsageError
from spa_compiler.graph.external import files
from spa_compiler.graph.session import Feeds
from spa_compiler.placement.measure import LEAST_ROUNDS, Timing
from spa_compiler.placement.timer import Contender, Machine

_log = logging.getLogger(__name__)
T = TypeVar("T")

PREFIX = "spa_compiler.tune2."  # of the names of the server's functions; another protocol gets another number
MODEL = "model.onnx"
CHUNK = 8 << 20  # bytes that are sent at a time
_ANSWER_S = 60.0  # for what takes no time: a chunk, a word
_TURN_S = 3600.0  # the most that a session takes, and that others wait for it


class Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A contender, as files on the server."""

    model: str
    library: str | None = None


class Question(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What to time, or to run. `feeds` are .npy files by input."""

    contenders: dict[str, Entry]
    feeds: dict[str, str]
    threads: int
    budget_s: float = 0.0
    least_rounds: int = LEAST_ROUNDS
    stays: tuple[str, ...] | None = None
    gpu: bool = False


class Answer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Timings by contender, or outputs as .npy files, or why there are none."""

    timings: dict[str, Timing] = {}
    outputs: dict[str, str] = {}
    failure: str = ""


class RemoteTimer:
    """Takes times on the machine behind `HOST:PORT,KEY`: a tracker, and the key of its servers; with `gpu`, on its GPU.

    Raises:
        UsageError: the address is none.
        EnvironmentFault: there is no such tracker or server, it does not answer, or what it says makes no sense. The
            methods raise it, too.
    """

    def __init__(self, address: str, *, gpu: bool = False) -> None:
        self.address, self.gpu = address, gpu
        self._host, self._port, self._key = _parse(address)
        self._session: Any = None
        self._sent: set[str] = set()
        self._functions: dict[str, Any] = {}
        with self.held():
            self._machine = self._decode(self._call("describe", "describing itself"), Machine)

    @property
    def machine(self) -> Machine:
        return self._machine

    @contextmanager
    def held(self) -> Iterator[None]:
        """A session: the tracker lends the machine to nobody else until its end."""
        self._session = self._connect()
        try:
            yield
        finally:
            self._session = None  # which ends it, with the last of its functions
            self._functions.clear()
            self._sent.clear()

    def time(
        self,
        contenders: Mapping[str, Contender],
        feeds: Feeds,
        threads: int,
        budget_s: float,
        least_rounds: int = LEAST_ROUNDS,
        stays: Collection[str] | None = None,
    ) -> dict[str, Timing]:
        question = self._question(contenders, feeds, threads, budget_s, least_rounds, stays)
        timings = self._ask("time", "timing", question).timings
        sound = (math.isfinite(t.p90_us) and 0 < t.p10_us <= t.median_us <= t.p90_us for t in timings.values())
        if timings.keys() != contenders.keys() or not all(sound):
            raise self._fault("its times make no sense")
        return timings

    def rest(self) -> None:
        """Sessions are closed there after each question."""

    def run(self, contender: Contender, feeds: Feeds, threads: int) -> Feeds:
        """Output name -> value of one run there."""
        outputs = self._ask("run", "running a model", self._question({MODEL: contender}, feeds, threads)).outputs
        values: Feeds = {}
        for name, path in outputs.items():
            data = bytes(self._call("fetch", "sending outputs", path))
            try:
                values[name] = np.load(io.BytesIO(data), allow_pickle=False)
            except (ValueError, EOFError, OSError) as error:
                raise self._fault("its outputs make no sense") from error
        return values

    def _question(
        self,
        contenders: Mapping[str, Contender],
        feeds: Feeds,
        threads: int,
        budget_s: float = 0.0,
        least_rounds: int = LEAST_ROUNDS,
        stays: Collection[str] | None = None,
    ) -> Question:
        """Sends what is not there yet."""
        entries = {
            name: Entry(self._send_model(c.model), None if c.library is None else self._send({"kernels.so": c.library}))
            for name, c in contenders.items()
        }
        arrays = {name: self._send({"feed.npy": _npy(value)}) for name, value in feeds.items()}
        staying = None if stays is None else tuple(stays)
        return Question(entries, arrays, threads, budget_s, least_rounds, staying, self.gpu)

    def _send_model(self, model: Path | bytes) -> str:
        if isinstance(model, bytes):
            return self._send({MODEL: model})
        beside = files(onnx.load(model, load_external_data=False))
        return self._send({MODEL: model} | {name: model.parent / name for name in beside})

    def _send(self, parts: Mapping[str, Path | bytes]) -> str:
        """Files that lie beside each other; returns the place of the first one on the server."""
        digests = {name: _digest(content) for name, content in parts.items()}
        folder = hashlib.sha256(msgspec.json.encode(digests)).hexdigest()
        if folder not in self._sent:
            for name, content in parts.items():
                for offset, data in _chunks(content):
                    self._call("append", "sending a file", f"{folder}/{name}", offset, data)
            self._sent.add(folder)
        return f"{folder}/{next(iter(parts))}"

    def _ask(self, function: str, doing: str, question: Question) -> Answer:
        text = self._call(function, doing, msgspec.json.encode(question).decode(), limit_s=_TURN_S)
        answer = self._decode(text, Answer)
        if answer.failure:
            raise self._fault(f"{doing} failed there: {answer.failure}")
        return answer

    def _call(self, function: str, doing: str, *arguments: object, limit_s: float = 0.0) -> Any:
        session = self._session
        if session is None:
            raise RuntimeError("times are taken inside of `held`")
        if function not in self._functions:
            self._functions[function] = self._within(_ANSWER_S, doing, lambda: _function(session, PREFIX + function))
        call = self._functions[function]
        if call is None:
            raise self._fault("the server there is no spa-tune-server of this version")
        return self._within(limit_s or _ANSWER_S, doing, lambda: call(*arguments))

    def _connect(self) -> Any:
        try:
            socket.create_connection((self._host, self._port), timeout=_ANSWER_S).close()  # TVM tries for a minute
        except OSError as error:
            raise EnvironmentFault(
                f"no RPC tracker answers ({error.strerror or error})",
                where=self.address,
                fix="Start one with `python -m tvm.exec.rpc_tracker`, or name another one with --tune-rpc",
            ) from error
        from tvm import rpc

        tracker = self._within(_ANSWER_S, "asking the tracker", lambda: rpc.connect_tracker(self._host, self._port))
        summary = self._within(_ANSWER_S, "asking the tracker", tracker.summary)
        try:
            keys = sorted({str(server["key"]).removeprefix("server:") for server in summary["server_info"]})
            free = int(summary["queue_info"].get(self._key, {"free": 0})["free"])
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise self._fault("the tracker's answer makes no sense") from error
        if self._key not in keys:
            raise EnvironmentFault(
                f"the tracker knows no server with the key {self._key!r}; it knows: {', '.join(keys) or 'none'}",
                where=self.address,
                fix=f"Start one there: spa-tune-server --tracker {self._host}:{self._port} --key {self._key}",
            )
        if not free:
            _log.info("others measure at %s: waiting for them", self.address)
        return self._within(
            _TURN_S, "waiting for a turn", lambda: tracker.request(self._key, session_timeout=_TURN_S, max_retry=1)
        )

    def _within(self, limit_s: float, doing: str, function: Callable[[], T]) -> T:
        """TVM's sockets wait for ever, and not even an interrupt reaches them; a thread can be left behind."""
        results: list[T] = []
        errors: list[BaseException] = []

        def work() -> None:
            try:
                results.append(function())
            except BaseException as error:  # noqa: BLE001 - it is raised again, where it is waited for
                errors.append(error)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        thread.join(limit_s)
        if results:
            return results[0]
        if (error := next(iter(errors), None)) is not None:
            words = (str(error).strip() or type(error).__name__).splitlines()[-1]
            raise self._fault(f"it broke off while {doing}: {words}") from error
        raise self._fault(f"no answer within {limit_s:.0f} s while {doing}")

    def _decode(self, text: object, kind: type[T]) -> T:
        try:
            return msgspec.json.decode(str(text), type=kind, strict=True)
        except msgspec.MsgspecError as error:
            raise self._fault(f"its answer makes no sense ({error})") from error

    def _fault(self, what: str) -> EnvironmentFault:
        return EnvironmentFault(
            what,
            where=self.address,
            fix="Look at what spa-tune-server says there; without --tune-rpc, this machine takes the times",
        )


def _parse(address: str) -> tuple[str, int, str]:
    place, _, key = address.partition(",")
    host, _, port = place.rpartition(":")
    if not (host and key.strip() and port.isascii() and port.isdigit() and 0 < int(port) < 1 << 16):
        raise UsageError(
            f"--tune-rpc {address!r} is no HOST:PORT,KEY",
            fix="Name the tracker and the key that a server has there, for instance 10.0.0.5:9190,zen5",
        )
    return host.strip().strip("[]"), int(port), key.strip()


def _function(session: Any, name: str) -> Any:
    """A function of the server, or None: TVM asks for it right away."""
    try:
        return session.get_function(name)
    except AttributeError:
        return None


def _npy(value: np.ndarray[Any, Any]) -> bytes:
    """An array as a .npy file; texts have a fixed width there."""
    out = io.BytesIO()
    np.save(out, value.astype(str) if value.dtype == object else value, allow_pickle=False)
    return out.getvalue()


def _digest(content: Path | bytes) -> str:
    if isinstance(content, bytes):
        return hashlib.sha256(content).hexdigest()
    with content.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _chunks(content: Path | bytes) -> Iterator[tuple[int, bytes]]:
    """(offset, bytes), at least one."""
    with io.BytesIO(content) if isinstance(content, bytes) else content.open("rb") as file:
        data, offset = file.read(CHUNK), 0
        yield offset, data
        while data:
            offset += len(data)
            data = file.read(CHUNK)
            if data:
                yield offset, data
