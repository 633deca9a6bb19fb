"""Times from elsewhere: what is sent, what is made of the answers, and whole compilations over a tracker on loopback."""

from __future__ import annotations

import dataclasses
import io
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import onnx
import psutil
import pytest
from onnx import TensorProto

import spa_compiler.targets
from spa_compiler.artifact import verify
from spa_compiler.compiler import compile
from spa_compiler.errors import EnvironmentFault, UsageError
from spa_compiler.graph.session import open_session
from spa_compiler.placement import remote, serve, timer
from spa_compiler.placement.measure import Timing
from spa_compiler.placement.remote import Answer, Entry, Question, RemoteTimer
from spa_compiler.placement.timer import Contender, LocalTimer, this_machine
from spa_compiler.targets import host
from tests.networks import mlp, model_of, weight
from tests.placement.rpc import ROOT, Session, server, talking_to, tracker

KEY = "here"
TIMING = Timing(10.0, 9.0, 11.0, 7)


def network() -> bytes:
    w = weight(np.random.default_rng(0), 8, 4)
    proto = model_of("g (float[N,8] x) => (float[N,4] y) { y = MatMul(x, w) }", w=w)
    from spa_compiler.graph.save import to_proto

    return to_proto(proto).SerializeToString()


@pytest.mark.parametrize(
    "address", ["", "host", "host:9190", "host:9190,", ":9190,key", "host:port,key", "h:0,k", "h:65536,k"]
)
def test_addresses_that_are_none(address: str) -> None:
    with pytest.raises(UsageError, match="is no HOST:PORT,KEY"):
        RemoteTimer(address)


@pytest.mark.parametrize(
    ("text", "parts"), [("10.0.0.5:9190,zen5", ("10.0.0.5", 9190, "zen5")), ("[::1]:9190, a b", ("::1", 9190, "a b"))]
)
def test_addresses(text: str, parts: tuple[str, int, str]) -> None:
    assert remote._parse(text) == parts


@pytest.mark.parametrize("name", ["", ".", "/etc/passwd", "../x", "a/../../x", "a/..", "link/x", "x\0y"])
def test_the_server_keeps_to_its_folder(name: str, tmp_path: Path) -> None:
    root = tmp_path / "session"
    root.mkdir()
    (root / "link").symlink_to(tmp_path)
    (tmp_path / "x").write_bytes(b"secret")
    question = Question({"a": Entry(name)}, {}, 1)
    for refused in (
        lambda: serve.append(root, name, 0, b"evil"),
        lambda: serve.append(root, name, 6, b"evil"),
        lambda: serve.fetch(root, name),
    ):
        with pytest.raises(serve.Refused, match="is no file of this session"):
            refused()
    for answer in (serve.time, serve.run):
        text = answer(root, msgspec.json.encode(question).decode())
        assert "is no file of this session" in msgspec.json.decode(text, type=Answer).failure
    assert (tmp_path / "x").read_bytes() == b"secret"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["session", "x"]


def test_files_come_in_order(tmp_path: Path) -> None:
    serve.append(tmp_path, "a/b", 0, b"12")
    serve.append(tmp_path, "a/b", 2, b"34")
    assert (tmp_path / "a" / "b").read_bytes() == b"1234"
    for offset in (0, 3, 5):
        with pytest.raises(serve.Refused, match="does not end at"):
            serve.append(tmp_path, "a/b", offset, b"5")


@pytest.mark.parametrize(
    "question", ["", "[]", '{"contenders": {}}', '{"contenders": {"a": "b"}, "feeds": {}, "threads": 1}']
)
def test_questions_that_make_no_sense(question: str, tmp_path: Path) -> None:
    assert msgspec.json.decode(serve.time(tmp_path, question), type=Answer).failure


def test_a_model_is_sent_once_in_a_session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "CHUNK", 100)
    session = Session(tmp_path)
    there, feeds = talking_to(session, monkeypatch), {"x": np.ones((2, 8), np.float32)}
    model = network()
    sent: list[int] = []
    plain = session.functions["append"]
    session.functions["append"] = lambda name, offset, data: (sent.append(len(data)), plain(name, offset, data))
    with there.held():
        timings = there.time({"a": Contender(model), "b": Contender(model)}, feeds, 1, 0.01)
        assert timings.keys() == {"a", "b"}
        files = len(list(tmp_path.rglob("*.*")))
        assert files == 2
        assert sum(sent) == sum(p.stat().st_size for p in tmp_path.rglob("*.*"))
        assert max(sent) == 100
        count = len(sent)
        there.time({"c": Contender(model)}, feeds, 1, 0.01)
        assert len(sent) == count
    # the next session may be another process, with an empty folder
    with (
        there.held(),
        pytest.raises(EnvironmentFault, match=r"broke off while sending a file: .*does not end at 0"),
    ):
        there.time({"c": Contender(model)}, feeds, 1, 0.01)


def test_weights_beside_the_model_are_sent_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tmp_path / "model"
    (own / "deep").mkdir(parents=True)
    proto = onnx.load_model_from_string(network())
    values = onnx.numpy_helper.to_array(proto.graph.initializer[0])
    (own / "deep" / "w.bin").write_bytes(values.tobytes())
    tensor = proto.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="deep/w.bin")
    onnx.save(proto, own / "other name.onnx")
    (tmp_path / "session").mkdir()
    there = talking_to(Session(tmp_path / "session"), monkeypatch)
    x = np.random.default_rng(0).standard_normal((3, 8)).astype(np.float32)
    with there.held():
        y = there.run(Contender(own / "other name.onnx"), {"x": x}, 1)["y"]
    np.testing.assert_allclose(y, x @ values, rtol=1e-5)


def test_texts_travel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    proto = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> g (string[N] x) => (string[N] y) { y = Identity(x) }'
    )
    there = talking_to(Session(tmp_path), monkeypatch)
    with there.held():
        out = there.run(Contender(proto.SerializeToString()), {"x": np.asarray(["a", "longer"], object)}, 1)
    assert out["y"].tolist() == ["a", "longer"]


def test_a_model_that_does_not_run_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = talking_to(Session(tmp_path), monkeypatch)
    with there.held(), pytest.raises(EnvironmentFault, match=r"timing failed there: .*Got: 5 Expected: 8") as caught:
        there.time({"a": Contender(network())}, {"x": np.ones((2, 5), np.float32)}, 1, 0.01)
    assert caught.value.where == "there:1,key"


def _answer(**timings: object) -> str:
    return msgspec.json.encode({"timings": timings}).decode()


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "no JSON",
        "[]",
        '{"timings": {"a": 5}}',
        '{"timings": {}, "more": 1}',
        _answer(),
        _answer(b=TIMING),
        _answer(a=TIMING, b=TIMING),
        _answer(a=dataclasses.replace(TIMING, p10_us=-1.0)),
        _answer(a=dataclasses.replace(TIMING, p10_us=0.0)),
        _answer(a=dataclasses.replace(TIMING, median_us=12.0)),
        _answer(a=dataclasses.replace(TIMING, p90_us=1e999)),
    ],
)
def test_answers_are_not_trusted(answer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = talking_to(Session(tmp_path, time=lambda question: answer), monkeypatch)
    with there.held(), pytest.raises(EnvironmentFault, match=r"makes? no sense"):
        there.time({"a": Contender(network())}, {}, 1, 0.01)


def _pickled() -> bytes:
    out = io.BytesIO()
    np.save(out, np.asarray([{"a": 1}], object), allow_pickle=True)
    return out.getvalue()


@pytest.mark.parametrize("data", [b"", b"rubbish", _pickled()])
def test_outputs_are_not_trusted(data: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = msgspec.json.encode(Answer(outputs={"y": "0.npy"})).decode()
    there = talking_to(Session(tmp_path, run=lambda question: answer, fetch=lambda name: data), monkeypatch)
    with there.held(), pytest.raises(EnvironmentFault, match="its outputs make no sense"):
        there.run(Contender(network()), {}, 1)


@pytest.mark.parametrize("machine", ["", "{}", '{"cpu": 5}'])
def test_machines_that_make_no_sense(machine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EnvironmentFault, match="its answer makes no sense"):
        talking_to(Session(tmp_path, describe=lambda: machine), monkeypatch)


def test_a_server_of_another_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = Session(tmp_path)
    session.functions.clear()
    with pytest.raises(EnvironmentFault, match="no spa-tune-server of this version"):
        talking_to(session, monkeypatch)


def test_a_server_that_says_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_ANSWER_S", 0.1)
    over = threading.Event()
    with pytest.raises(EnvironmentFault, match="no answer within 0 s while describing itself"):
        talking_to(Session(tmp_path, describe=over.wait), monkeypatch)
    over.set()


def test_the_level_of_the_other_machine_is_the_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    older = msgspec.structs.replace(this_machine(), isa="x86-64-v3", cores=1, cpu="Old")
    there = Session(tmp_path, describe=lambda: msgspec.json.encode(older).decode())
    monkeypatch.setattr(RemoteTimer, "_connect", lambda self: there)
    proto = mlp(0.1, 64)
    result = compile(proto, tmp_path / "out", dry_run=True, tune_rpc="there:1,key")
    assert (result.report.asked.target, result.report.isa) == ("cpu:x86-64-v3", "x86-64-v3")
    assert (result.report.machine.cpu, result.report.machine.threads) == ("Old", 1)
    assert result.report.asked.options["tune_rpc"] == "there:1,key"
    words = "the machine that is to take the times"
    none = f"{words} has no NVIDIA GPU that ONNX Runtime uses"
    for target, why in (("cpu:avx512", f"{words} does not run"), ("cuda:sm_90", none), ("cuda", none)):
        with pytest.raises(UsageError, match=why):
            compile(proto, tmp_path / "out", dry_run=True, target=target, tune_rpc="there:1,key")


@pytest.fixture(scope="module")
def loopback(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    with tracker() as port, server(port, KEY, tmp_path_factory.mktemp("server") / "log") as process:
        yield f"127.0.0.1:{port},{KEY}", process


@pytest.fixture
def far(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing may be timed in this process."""

    def refuse(*_: object) -> None:
        raise AssertionError("timed here")

    monkeypatch.setattr(timer, "interleave", refuse)


def test_models_are_timed_by_the_server(loopback: tuple[str, object], far: None) -> None:
    there = RemoteTimer(loopback[0])
    assert there.machine == this_machine()
    small, large = network(), _wide()
    with there.held():
        timings = there.time({"small": Contender(small), "large": Contender(large)}, _feed(), 1, 0.05)
    assert timings["large"].median_us > 2 * timings["small"].median_us
    with there.held():
        y = there.run(Contender(small), _feed(), 2)
    assert y.keys() == {"y"}
    np.testing.assert_array_equal(y["y"], open_session(small).run(None, _feed())[0])


def _feed() -> dict[str, np.ndarray]:
    return {"x": np.ones((2, 8), np.float32)}


def _wide() -> bytes:
    from spa_compiler.graph.save import to_proto

    rng = np.random.default_rng(0)
    text = "g (float[N,8] x) => (float[N,4] y) { h = MatMul(x, w) i = MatMul(h, v) y = MatMul(i, u) }"
    matrices = {"w": weight(rng, 8, 1024), "v": weight(rng, 1024, 1024), "u": weight(rng, 1024, 4)}
    return to_proto(model_of(text, **matrices)).SerializeToString()


@pytest.mark.usefixtures("short_races")
def test_a_compilation_is_timed_by_the_server(
    loopback: tuple[str, object], far: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with records; and what this machine cannot run is verified there."""
    onnx.save(mlp(0.1, 64), tmp_path / "model.onnx")

    def compiled() -> bytes:
        result = compile(
            tmp_path / "model.onnx",
            tmp_path / "out",
            shapes=["x=1,16,64"],
            threads=1,
            tune_rpc=loopback[0],
            records=tmp_path / "records.sqlite",
        )
        assert result.ratio is not None
        assert result.report.checks
        assert {p.runtime for p in result.report.race} >= {"onnxruntime", "portable", "single sites"}
        return b"".join(p.read_bytes() for p in sorted((tmp_path / "out").iterdir()) if p.name != "report.json")

    first = compiled()
    asked: list[str] = []
    ask = RemoteTimer._ask
    monkeypatch.setattr(
        RemoteTimer, "_ask", lambda self, function, *a: (asked.append(function), ask(self, function, *a))[1]
    )
    assert compiled() == first
    assert asked == []
    older = dataclasses.replace(host(), level="x86-64-v2")
    monkeypatch.setattr(spa_compiler.targets, "host", lambda: older)

    def only_dense(*arguments: object, **options: object) -> object:
        assert options.get("library") is None, "this machine does not run it"
        return open_session(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(verify, "open_session", only_dense)
    assert compiled() == first
    assert set(asked) == {"run"}


def test_no_server_has_the_key(loopback: tuple[str, object]) -> None:
    with pytest.raises(EnvironmentFault, match=f"no server with the key 'other'; it knows: {KEY}") as caught:
        RemoteTimer(loopback[0].replace(KEY, "other"))
    assert "spa-tune-server --tracker 127.0.0.1:" in str(caught.value)


def test_no_tracker() -> None:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{listening.getsockname()[1]}"
    with pytest.raises(EnvironmentFault, match="no RPC tracker answers"):
        RemoteTimer(f"{address},{KEY}")
    command = [sys.executable, "-m", "spa_compiler.cli.tune_server", "--tracker", address, "--key", KEY]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60, check=False)
    assert done.returncode == EnvironmentFault.exit_code
    assert done.stderr.startswith(f"error: {address}: no RPC tracker answers")


def test_something_else_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_ANSWER_S", 1.0)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        with pytest.raises(EnvironmentFault, match="no answer within 1 s while asking the tracker"):
            RemoteTimer(f"127.0.0.1:{listening.getsockname()[1]},{KEY}")


def test_a_session_that_crashes_ends_alone(loopback: tuple[str, subprocess.Popen[str]]) -> None:
    address, process = loopback
    there = RemoteTimer(address)
    with there.held():
        (session,) = _sessions(process)
        session.kill()
        with pytest.raises(EnvironmentFault, match="it broke off while sending a file"):
            there.time({"a": Contender(network())}, _feed(), 1, 0.01)
    end = time.monotonic() + 20
    while True:
        try:
            RemoteTimer(address)
            break
        except EnvironmentFault:  # it has to listen again
            assert time.monotonic() < end
            time.sleep(0.1)
    assert process.poll() is None


def _sessions(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """Forks of the server; the helper of `multiprocessing` is a program of its own."""
    children = psutil.Process(process.pid).children()
    return [c for c in children if "resource_tracker" not in " ".join(c.cmdline())]


@pytest.mark.usefixtures("short_races")
def test_a_server_that_dies_leaves_nothing_half_written(tmp_path: Path) -> None:
    onnx.save(mlp(0.1, 64), tmp_path / "model.onnx")
    with tracker() as port, server(port, KEY, tmp_path / "log") as process:

        def die(what: str, done: int, total: int) -> None:
            if what == "racing whole models":
                os.killpg(process.pid, signal.SIGKILL)

        with pytest.raises(EnvironmentFault, match="it broke off while"):
            compile(
                tmp_path / "model.onnx",
                tmp_path / "out",
                shapes=["x=1,16,64"],
                threads=1,
                tune_rpc=f"127.0.0.1:{port},{KEY}",
                progress=die,
            )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["log", "model.onnx"]


def test_this_machine_is_a_timer_too() -> None:
    here = LocalTimer()
    with here.held():
        assert here.time({"a": Contender(network())}, _feed(), 1, 0.01)["a"].median_us > 0
    assert here.run(Contender(network()), _feed(), 1).keys() == {"y"}
