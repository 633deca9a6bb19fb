"""Bad input through the command line: the exit code, words that say what, where and what to do, and nothing left."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
from click.testing import Result
from onnx import TensorProto, numpy_helper

from spa_compiler import compiler, compression
from spa_compiler.artifact import manifest
from spa_compiler.cli.compile import main
from spa_compiler.placement import place
from tests.cli.command import invoke
from tests.folders import names
from tests.networks import mlp, network
from tests.onnx_text import HEADER

WIDTH = 16


@pytest.fixture(autouse=True)
def here(tidy: Path) -> Path:
    return tidy


def assert_refused(result: Result, code: int, *words: str) -> None:
    """One message on stderr, nothing but a header on stdout, no traceback."""
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    assert "internal error" not in result.output
    for word in words:
        assert word in result.stderr, result.stderr


# ---------------------------------------------------------------- models

Spoil = Callable[[onnx.ModelProto], None]


def net() -> onnx.ModelProto:
    return mlp(1.0, WIDTH)


def spoiled(spoil: Spoil) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        proto = net()
        spoil(proto)
        onnx.save(proto, folder / "bad.onnx")

    return write


def content(data: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / "bad.onnx").write_bytes(data) and None


def truncated(share: float) -> Callable[[Path], None]:
    return lambda folder: (
        (folder / "bad.onnx").write_bytes((d := net().SerializeToString())[: int(len(d) * share)]) and None
    )


def text(graph: str, header: str = HEADER, **weights: np.ndarray) -> Callable[[Path], None]:
    return lambda folder: onnx.save(network(graph, header, check=False, **weights), folder / "bad.onnx")


def external(location: str) -> Callable[[Path], None]:
    """The first weight lies in a file of its own; only `../outside` and the link's target exist."""

    def write(folder: Path) -> None:
        proto = net()
        tensor = next(t for t in proto.graph.initializer if t.name == "w0")
        data = tensor.raw_data or numpy_helper.to_array(tensor).tobytes()
        (folder.parent / "outside").write_bytes(data)
        (folder / "link").symlink_to(folder.parent / "outside")
        tensor.ClearField("raw_data")
        tensor.ClearField("float_data")
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=location.format(folder=folder))
        (folder / "bad.onnx").write_bytes(proto.SerializeToString())

    return write


def _set(path: str, value: object) -> Spoil:
    def spoil(proto: onnx.ModelProto) -> None:
        *parents, last = path.split(".")
        owner: object = proto
        for name in parents:
            owner = owner[int(name)] if name.isdigit() else getattr(owner, name)  # type: ignore[index]
        if last.isdigit():
            owner[int(last)] = value  # type: ignore[index]
        else:
            setattr(owner, last, value)

    return spoil


def _weight_holds(value: float) -> Spoil:
    def spoil(proto: onnx.ModelProto) -> None:
        tensor = next(t for t in proto.graph.initializer if t.name == "w1")
        values = numpy_helper.to_array(tensor).copy()
        values[3, 5] = value
        tensor.CopyFrom(numpy_helper.from_array(values, "w1"))

    return spoil


@dataclass(frozen=True)
class Bad:
    """A model that cannot be used: how it is made, and what the message must say besides the file's name."""

    id: str
    make: Callable[[Path], None]
    words: tuple[str, ...]
    options: tuple[str, ...] = ()
    code: int = 3
    where: str = "bad.onnx"
    left: frozenset[str] = field(default=frozenset({"bad.onnx"}))


LINKED = frozenset({"bad.onnx", "link"})
MODELS = [
    Bad("no file", lambda folder: None, ("there is no such file", "Check the path"), left=frozenset()),
    Bad("a folder", lambda folder: (folder / "bad.onnx").mkdir(), ("no manifest.json", "Name a folder that spa-compile wrote")),
    Bad("empty", content(b""), ("the file is empty",)),
    Bad("text", content(b"hello, I am no model at all"), ("not an ONNX model",)),
    Bad("zip", content(b"PK\x03\x04 and so on"), ("zip archive",)),
    Bad("git lfs", content(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"), ("git lfs pull",)),
    Bad("truncated early", truncated(0.2), ("cut short", "Copy or download it again")),
    Bad("truncated late", truncated(0.95), ("cut short", "Copy or download it again")),
    Bad("opset too old", spoiled(_set("opset_import.0.version", 6)), ("opset 6 is too old", "version_converter")),
    Bad("opset too new", spoiled(_set("opset_import.0.version", 999)), ("opset 999 is newer",)),
    Bad("missing data", external("nowhere.bin"), ("nowhere.bin",), where="tensor 'w0'", left=LINKED),
    Bad("data above", external("../outside"), ("../outside",), where="tensor 'w0'", left=LINKED),
    Bad("absolute data", external("{folder}/../outside"), ("outside",), where="tensor 'w0'", left=LINKED),
    Bad("data behind a link", external("link"), ("link",), where="tensor 'w0'", left=LINKED),
    Bad("cycle", spoiled(_set("graph.node.0.input.0", "y")), ("the graph has a cycle", "'m0' (MatMul)")),
    Bad("undefined tensor", spoiled(_set("graph.node.0.input.0", "ghost")), ("'ghost', which nothing defines",)),
    Bad("undefined output", spoiled(_set("graph.output.0.name", "ghost")), ("output 'ghost' is defined by nothing",)),
    Bad("unknown op", spoiled(_set("graph.node.2.op_type", "Reluu")), ("there is no operator 'Reluu'", "'h0' (Reluu)")),
    Bad("inconsistent shapes", spoiled(_set("graph.input.0.type.tensor_type.shape.dim.2.dim_value", 17)), ("shapes or types do not fit",)),
    Bad("zero-size input", spoiled(_set("graph.input.0.type.tensor_type.shape.dim.0.dim_value", 0)), ("axis 0 of input 'x' has size zero",)),
    Bad("no weights", text("g (float[N,8] x) => (float[N,8] y) { t = Tanh(x) y = Relu(t) }"), ("no constant weights", "initializers"), where="bad"),
    Bad("no weights but scalars", text("g (float[N,8] x) => (float[N,8] y) { y = Mul(x, {0.5}) }"), ("no constant weights",), where="bad"),
    Bad("NaN", spoiled(_weight_holds(np.nan)), ("the weight 'w1' holds NaN or Inf", "Export the model again"), where="m1"),
    Bad("Inf", spoiled(_weight_holds(np.inf)), ("the weight 'w1' holds NaN or Inf",), where="m1"),
    Bad("NaN, with a pass", spoiled(_weight_holds(np.nan)), ("NaN or Inf",), ("--sparsity", "0.5"), where="m1"),
    Bad("NaN, dry run", spoiled(_weight_holds(np.nan)), ("NaN or Inf",), ("--dry-run",), where="m1"),
    Bad("NaN, no kernels", spoiled(_weight_holds(np.nan)), ("NaN or Inf",), ("--target", "cuda:sm_90"), where="m1"),
]  # fmt: skip


@pytest.mark.parametrize("bad", MODELS, ids=[bad.id for bad in MODELS])
def test_models(here: Path, bad: Bad) -> None:
    bad.make(here)
    result = invoke(main, "bad.onnx", "--threads", "1", *bad.options)
    assert_refused(result, bad.code, "error: ", bad.where, *bad.words)
    assert names(here) == bad.left


def test_masks_may_hold_infinity(here: Path) -> None:
    mask = np.array([0, -np.inf] * 4, np.float32)
    text("g (float[N,8] x) => (float[N,8] y) { m = MatMul(x, w) a = Add(m, mask) y = Softmax(a) }", w=np.eye(8, dtype=np.float32), mask=mask)(here)  # fmt: skip
    assert invoke(main, "bad.onnx", "--dry-run").exit_code == 0


# ---------------------------------------------------------------- usage

USAGE: list[tuple[str, tuple[str, ...], tuple[str, ...]]] = [
    ("no model", (), ("MODEL is missing", "spa-compile model.onnx")),
    ("unknown option", ("net.onnx", "--frobnicate"), ("No such option",)),
    ("sparsity and passes", ("net.onnx", "--sparsity", "0.5", "--passes", "sparsify"), ("--sparsity and --passes contradict each other",)),
    ("passes and recipe", ("net.onnx", "--passes", "sparsify", "--recipe", "r.yaml"), ("--passes and --recipe contradict",)),
    ("pattern alone", ("net.onnx", "--pattern", "block:4x1"), ("--pattern needs --sparsity",)),
    ("verbose and quiet", ("net.onnx", "-v", "-q"), ("--verbose and --quiet contradict each other",)),
    ("unknown pass", ("net.onnx", "--passes", "sparsifi{sparsity=0.5}"), ("sparsifi", "sparsify")),
    ("unknown pass option", ("net.onnx", "--passes", "sparsify{sparsty=0.5}"), ("no option 'sparsty'", "sparsity")),
    ("unknown pattern", ("net.onnx", "--sparsity", "0.5", "--pattern", "block:4y1"), ("block:4y1", "unstructured")),
    ("sparsity out of range", ("net.onnx", "--sparsity", "1.5"), ("--sparsity", "1.5")),
    ("sparsity is no number", ("net.onnx", "--sparsity", "much"), ("--sparsity",)),
    ("unbalanced passes", ("net.onnx", "--passes", "sparsify{sparsity=0.5"), ("--passes", "}")),
    ("no recipe file", ("net.onnx", "--recipe", "missing.yaml"), ("missing.yaml", "cannot be read")),
    ("unknown target", ("net.onnx", "--target", "cpux"), ("there is no target 'cpux'", "cpu:x86-64-v4")),
    ("no threads", ("net.onnx", "--threads", "0"), ("--threads",)),
    ("no size", ("net.onnx", "--max-size", "big"), ("is no size: write 500MB",)),
    ("shape: unknown input", ("net.onnx", "--shape", "z=1,2,16"), ("no input 'z'", "Its inputs are: x")),
    ("shape: rank", ("net.onnx", "--shape", "x=1,16"), ("2 dimensions for an input of 3", "[batch, seq, 16]")),
    ("shape: fixed axis", ("net.onnx", "--shape", "x=1,2,17"), ("axis 2 is 17, but the model fixes it to 16",)),
    ("shape: zero", ("net.onnx", "--shape", "x=1,0,16"), ("axis 1 has size zero",)),
    ("shape: negative", ("net.onnx", "--shape", "x=1,-1,16"), ("cannot read the shape",)),
    ("shape: spelling", ("net.onnx", "--shape", "x=one"), ("cannot read the shape", "x=1,3,224,224")),
    ("no samples", ("net.onnx", "--samples", "missing.npz"), ("missing.npz",)),
    ("log file nowhere", ("net.onnx", "--log-file", "no/such/folder/log"), ("--log-file no/such/folder/log cannot be written",)),
    ("output is a file", ("net.onnx", "-o", "net.onnx"), ("the output must be a folder", "-o")),
    ("output is somebody's", ("net.onnx", "-o", "photos"), ("holds files that this tool did not write", "--force")),
    ("output is the root", ("net.onnx", "-o", "/"), ("root of the file system",)),
]  # fmt: skip


@pytest.mark.parametrize("arguments,words", [case[1:] for case in USAGE], ids=[case[0] for case in USAGE])
def test_usage(here: Path, arguments: tuple[str, ...], words: tuple[str, ...]) -> None:
    onnx.save(net(), "net.onnx")
    (here / "photos").mkdir()
    (here / "photos" / "me.jpg").write_text("")
    result = invoke(main, *arguments)
    assert_refused(result, 2, *words)
    assert names(here) == {"net.onnx", "photos"}
    assert names(here / "photos") == {"me.jpg"}


def test_pickles_in_samples_are_not_opened(here: Path) -> None:
    onnx.save(net(), "net.onnx")
    np.savez("evil.npz", x=np.array([{"a": 1}], dtype=object), allow_pickle=True)
    assert_refused(invoke(main, "net.onnx", "--samples", "evil.npz"), 2, "evil.npz", "Python objects", "numpy.savez")


def test_force_replaces_other_content_but_never_the_model(here: Path) -> None:
    onnx.save(net(), "net.onnx")
    (here / "photos").mkdir()
    (here / "photos" / "me.jpg").write_text("")
    onnx.save(net(), here / "photos" / "net.onnx")
    assert_refused(invoke(main, "photos/net.onnx", "-o", "photos", "--force"), 2, "net.onnx lies in it")
    assert names(here / "photos") == {"me.jpg", "net.onnx"}
    assert invoke(main, "net.onnx", "-o", "photos", "--force", "--threads", "1").exit_code == 0
    assert "me.jpg" not in names(here / "photos")


def test_a_damaged_artifact(here: Path) -> None:
    onnx.save(net(), "net.onnx")
    assert invoke(main, "net.onnx", "-o", "out", "--threads", "1").exit_code == 0
    with (here / "out" / "portable.onnx").open("r+b") as file:
        file.truncate(100)
    assert_refused(invoke(main, "out"), 3, "portable.onnx", "not what was written", "Copy the folder again")
    assert names(here) == {"net.onnx", "out"}


# ---------------------------------------------------------------- environment


@pytest.fixture
def model(here: Path) -> str:
    onnx.save(net(), "net.onnx")
    return "net.onnx"


@pytest.mark.parametrize(
    "compiler_name,words",
    [
        ("/no/such/compiler", ("the linker cannot be run", "/no/such/compiler", "SPA_CC must name a C compiler")),
        ("false", ("linking kernels.so failed", "SPA_CC must name a C compiler")),
        ("'unclosed", ("the linker cannot be run", "Close the quotes")),
    ],
)
def test_the_linker(
    here: Path, model: str, monkeypatch: pytest.MonkeyPatch, compiler_name: str, words: tuple[str, ...]
) -> None:
    monkeypatch.setenv("SPA_CC", compiler_name)
    assert_refused(invoke(main, model, "--threads", "1"), 6, *words)
    assert names(here) == {"net.onnx"}


def test_an_output_below_a_file(here: Path, model: str) -> None:
    (here / "file").write_text("")
    assert_refused(invoke(main, model, "-o", "file/out"), 6, "file/out", "cannot be written", "-o")
    assert names(here) == {"net.onnx", "file"}


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is unwritable to root")
def test_an_output_folder_without_permission(here: Path, model: str) -> None:
    (here / "locked").mkdir(mode=0o500)
    assert_refused(invoke(main, model, "-o", "locked/out"), 6, "cannot be written (Permission denied)", "-o")
    assert names(here / "locked") == set()


def test_an_output_on_a_read_only_file_system(here: Path, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.mkdir

    def mkdir(self: Path, *arguments: object, **options: object) -> None:
        if self.name.startswith(".out.spa-"):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))
        real(self, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Path, "mkdir", mkdir)
    assert_refused(invoke(main, model, "-o", "out"), 6, "cannot be written (Read-only file system)", "-o")
    assert names(here) == {"net.onnx"}


@pytest.mark.parametrize("stage", ["settle", "collect"])
def test_a_full_disk(here: Path, model: str, monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(place if stage == "settle" else compiler, stage, full)
    assert_refused(
        invoke(main, model, "-o", "deep/out", "--threads", "1"), 6, "the disk is full", "deep/out", "Make room"
    )
    assert names(here) == {"net.onnx"}


def test_a_cache_that_cannot_be_made(here: Path, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "file").write_text("")
    monkeypatch.setenv("SPA_CACHE_DIR", str(here / "file" / "cache"))
    assert_refused(invoke(main, model, "--threads", "1"), 6, "the cache folder cannot be created", "SPA_CACHE_DIR")
    assert names(here) == {"net.onnx", "file"}


def test_records_that_are_none(here: Path, model: str) -> None:
    (here / "records").write_bytes(b"this is no database at all, whatever it may be called" * 100)
    assert_refused(
        invoke(main, model, "--records", "records", "--threads", "1"), 6, "the records cannot be used", "--records"
    )
    assert names(here) == {"net.onnx", "records"}


def test_without_onnxruntime(here: Path, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from spa_compiler.graph import session

    monkeypatch.setattr(session, "_version", lambda name: None)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert_refused(invoke(main, model), 6, "ONNX Runtime is not installed", 'pip install "spa-compiler[cpu]"')


def test_with_both_onnxruntimes(here: Path, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from spa_compiler.graph import session

    monkeypatch.setattr(session, "_version", lambda name: "1.31.1")
    assert_refused(invoke(main, model), 6, "both installed", "pip uninstall -y onnxruntime onnxruntime-gpu")


def test_an_internal_error_has_no_traceback(here: Path, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compression, "canonicalize", lambda *_: 1 / 0)
    result = invoke(main, model, "--log-file", "log.txt")
    assert result.exit_code == 1
    assert "internal error: ZeroDivisionError" in result.stderr
    assert "Traceback" not in result.output
    assert "Traceback" in (here / "log.txt").read_text()


# ---------------------------------------------------------------- interrupted

#: a linker that tells that it runs, and then takes its time
SLOW = '#!/bin/sh\ntouch "$MARK"\nexec sleep 60\n'


def start(folder: Path, *arguments: str, slow: bool = True) -> subprocess.Popen[str]:
    """spa-compile in a process group of its own; with `slow`, it hangs in the linker when this returns."""
    mark, script = folder.parent / "mark", folder.parent / "slow-linker"
    mark.unlink(missing_ok=True)
    script.write_text(SLOW)
    script.chmod(0o755)
    environment = {k: v for k, v in os.environ.items() if k != "ORT_DISABLE_TELEMETRY"}
    environment |= {"SPA_CC": str(script), "MARK": str(mark)} if slow else {}
    process = subprocess.Popen(
        [sys.executable, "-m", "spa_compiler.cli.compile", *arguments, "--threads", "1"],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while slow and not mark.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_half_way(here: Path, model: str, number: int) -> None:
    process = start(here, model, "-o", "deep/out")
    assert names(here / "deep") != {"out"}
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.splitlines()[-1] == "interrupted: nothing was written"
    assert "Traceback" not in errors
    assert names(here) == {"net.onnx"}


def test_killed_half_way(here: Path, model: str) -> None:
    """The next run removes what a killed one left, and leaves alone what belongs to one that still runs."""
    killed = start(here, model, "-o", "out")
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate(timeout=60)
    (left,) = names(here) - {"net.onnx"}
    assert left.startswith(".out.spa-")
    living = start(here, model, "-o", "out")
    (used,) = names(here) - {"net.onnx"}
    assert used != left, "the run that is still at it has removed what the killed one left"
    living.send_signal(signal.SIGINT)
    living.communicate(timeout=60)
    assert names(here) == {"net.onnx"}


def test_two_compilations_into_one_folder(here: Path, model: str) -> None:
    processes = [start(here, model, "-o", "out", slow=False) for _ in range(2)]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    assert names(here) == {"net.onnx", "out"}
    manifest.check(here / "out")
