"""`--calib` and `--restore-unused` through the command line: what is made of samples, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from spa_compiler import compiler
from spa_compiler.cli.compile import main
from tests.cli.command import invoke
from tests.folders import ARTIFACT, names
from tests.networks import network

WIDTH, VOCABULARY = 16, 20
pytestmark = pytest.mark.usefixtures("short_races")
ZEROS = ("--sparsity", "0.5", "--threads", "1")
ON_GPU = (*ZEROS, "--pattern", "unstructured", "--target", "cuda:sm_90")


def net() -> onnx.ModelProto:
    """A table, a masked feed-forward block with a residual and a norm."""
    rng = np.random.default_rng(0)
    shapes = {"table": (VOCABULARY, WIDTH), "u": (WIDTH, 32), "c": (32,), "v": (32, WIDTH), "d": (WIDTH,)}
    return network(
        f"""net (int64[batch, seq] ids, int64[batch, seq] attention_mask) => (float[batch, seq, {WIDTH}] y) {{
          e = Gather (table, ids) m = Cast <to = 1> (attention_mask) n = Unsqueeze (m, last) x = Mul (e, n)
          a = MatMul (x, u) p = Add (a, c) r = Relu (p) b = MatMul (r, v) q = Add (b, d) s = Add (q, x)
          y = LayerNormalization (s, ones)
        }}""",
        last=np.array([-1]),
        ones=np.ones(WIDTH, np.float32),
        **{name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()},
    )


def arrays(count: int = 70) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    return {"ids": rng.integers(0, VOCABULARY, (count, 6)), "attention_mask": np.ones((count, 6), np.int64)}


@pytest.fixture(autouse=True)
def here(tidy: Path) -> Path:
    """A tidy folder with net.onnx and data.npz."""
    onnx.save(net(), tidy / "net.onnx")
    np.savez(tidy / "data.npz", **arrays())
    return tidy


def weights(folder: Path) -> dict[str, np.ndarray]:
    """The weights of portable.onnx that had no zeros in net.onnx, [inputs, outputs]."""
    tensors = onnx.load(folder / "portable.onnx").graph.initializer
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in tensors if tensor.name in ("u", "v", "c", "d")}


def originals() -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in net().graph.initializer}


# ---------------------------------------------------------------- what is made of samples


def test_from_samples_to_an_artifact(here: Path) -> None:
    result = invoke(main, "net.onnx", "--calib", "data.npz", *ZEROS, "--pattern", "block:4x1", "-o", "out")
    assert result.exit_code == 0, result.output
    assert "on calibration samples that no pass has seen" in result.stdout
    assert names(here) == {"net.onnx", "data.npz", "out"}
    assert names(here / "out") == ARTIFACT
    report = json.loads((here / "out" / "report.json").read_bytes())
    assert report["asked"]["options"]["calib"] == "data.npz"
    assert "calibrated on 70 samples in 9 feeds, 1 of them held out" in report["notes"]
    assert 0 < report["output_change"] < 1
    sites = {site["node"]: site for site in report["passes"][0]["sites"]}
    assert set(sites) == {"a", "b"}
    held, before = weights(here / "out"), originals()
    for name, site in zip("uv", (sites["a"], sites["b"]), strict=True):
        assert site["method"] == "auto"
        assert site["pattern"] == "block:4x1"
        assert site["density_after"] == np.count_nonzero(held[name]) / held[name].size
        assert site["density_after"] < 0.9
        kept = held[name] != 0
        assert not np.array_equal(held[name][kept], before[name][kept])  # what stays makes up for what goes
    assert sum(np.count_nonzero(held[name]) for name in "uv") == pytest.approx(WIDTH * 32, abs=8)
    assert all(not np.array_equal(held[name], before[name]) for name in "cd")


def test_zeros_stay_unless_they_may_be_taken_back(here: Path) -> None:
    """Where nothing runs sparse (such small layers do not on a GPU), zeros that the user asked for stay."""
    asked = ("net.onnx", "--calib", "data.npz", *ON_GPU)
    before = originals()
    assert invoke(main, *asked, "-o", "zeros").exit_code == 0
    held = weights(here / "zeros")
    assert sum(np.count_nonzero(held[name]) for name in "uv") == WIDTH * 32
    result = invoke(main, *asked, "-o", "dense", "--restore-unused", "--json")
    assert result.exit_code == 0, result.output
    for name, values in weights(here / "dense").items():
        np.testing.assert_array_equal(values, before[name])
    report = json.loads(result.stdout)
    assert "2 layers that zeros make no faster have their dense weights back" in report["notes"]
    assert report["asked"]["options"]["restore_unused"] is True
    assert [site["restored"] for site in report["passes"][0]["sites"]] == [True, True]
    assert report["output_change"] == 0
    kept = json.loads((here / "zeros" / "report.json").read_bytes())
    assert [site["restored"] for site in kept["passes"][0]["sites"]] == [False, False]
    assert kept["output_change"] > 0


def test_nothing_to_restore_is_said() -> None:
    common = ("net.onnx", "--threads", "1", "--target", "cuda:sm_90", "-o", "out")
    told = "note: nothing to restore: no layer has zeros of the passes that make it no faster"
    assert invoke(main, *common, "--restore-unused").stdout.splitlines().count(told) == 1
    assert told not in invoke(main, *common).stdout


def test_one_layer_is_restored_and_the_other_keeps_its_zeros(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the second placement made is what comes out."""
    real = compiler.place_on_gpu
    placed: list[object] = []

    def place(*args: object, **options: object) -> object:
        result = real(*args, **options)  # type: ignore[arg-type]
        placed.append(result)
        monkeypatch.setattr(type(result), "gaining", ["b"])
        return result

    monkeypatch.setattr(compiler, "place_on_gpu", place)
    result = invoke(main, "net.onnx", *ON_GPU, "-o", "out", "--restore-unused", "--explain")
    assert result.exit_code == 0, result.output
    assert len(placed) == 2
    assert "note: 1 layer that zeros make no faster has its dense weights back" in result.stdout
    rows = [line.split() for line in result.stdout.splitlines() if line.startswith("sparsify ")]
    assert [row[1] for row in rows] == ["a", "b"]
    assert ["restored" in row for row in rows] == [True, False]
    held, before = weights(here / "out"), originals()
    np.testing.assert_array_equal(held["u"], before["u"])
    assert np.count_nonzero(held["v"]) < 0.6 * held["v"].size


def test_explain_tells_what_passes_did_to_each_layer(here: Path) -> None:
    asked = ("net.onnx", "--calib", "data.npz", *ON_GPU, "-o", "out")
    result = invoke(main, *asked, "--explain")
    assert result.exit_code == 0, result.output
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert "pass layer pattern method kept error of its outputs" in lines
    report = json.loads((here / "out" / "report.json").read_bytes())
    for site in report["passes"][0]["sites"]:
        kept, error = f"{site['density_after']:.1%}", f"{site['error']:.2%}"
        assert f"sparsify {site['node']} unstructured auto {kept} {error}" in lines
        assert (site["op"], site["n"] * site["k"]) == ("MatMul", WIDTH * 32)
    assert "error of its" not in invoke(main, *asked).stdout


def test_a_recipe_that_needs_the_samples_again_says_so(here: Path) -> None:
    common = ("net.onnx", "--target", "cuda:sm_90", "--threads", "1")
    told = {}
    for name, asked in {
        "with": ("--calib", "data.npz", *ZEROS),
        "without": ZEROS,
        "no": ("--calib", "data.npz"),
    }.items():
        assert invoke(main, *common, *asked, "-o", name).exit_code == 0
        told[name] = (here / name / "recipe.yaml").read_text().startswith("# Calibrated: to repeat it, give --calib")
    assert told == {"with": True, "without": False, "no": False}


def test_synthetic_samples_are_marked(here: Path) -> None:
    result = invoke(main, "net.onnx", "--calib", "synthetic", *ZEROS, "--dry-run", "--json")
    assert result.exit_code == 0, result.output
    (note,) = [note for note in json.loads(result.stdout)["notes"] if "calibrated" in note]
    assert "synthetic noise" in note
    assert names(here) == {"net.onnx", "data.npz"}


def test_too_few_samples_are_warned_about(here: Path) -> None:
    np.savez("few.npz", **arrays(2))
    result = invoke(main, "net.onnx", "--calib", "few.npz", *ZEROS, "--dry-run")
    assert result.exit_code == 0, result.output
    assert "layers saw fewer positions than they have inputs" in result.stdout
    assert "times as many samples" in result.stdout
    assert "fewer positions" not in invoke(main, "net.onnx", "--calib", "data.npz", *ZEROS, "--dry-run").stdout


def test_folders_and_functions(here: Path) -> None:
    (here / "folder").mkdir()
    for name, array in arrays().items():
        np.save(here / "folder" / f"{name}.npy", array)
    (here / "mine.py").write_text(
        "import numpy as np\ndef feeds():\n    with np.load('data.npz') as data:\n        yield dict(data)\n"
    )
    told = []
    for data in ("folder", "mine.py:feeds"):
        result = invoke(main, "net.onnx", "--calib", data, *ZEROS, "--dry-run", "--json")
        assert result.exit_code == 0, result.output
        told += [note for note in json.loads(result.stdout)["notes"] if "calibrated" in note]
    assert told == [
        "calibrated on 70 samples in 9 feeds, 1 of them held out",
        "calibrated on 70 samples in 1 feed, 0 of them held out",
    ]


# ---------------------------------------------------------------- what is refused


def npz(**changed: np.ndarray | None) -> Callable[[Path], None]:
    held = {name: array for name, array in (arrays() | changed).items() if array is not None}
    return lambda folder: np.savez(folder / "bad.npz", **held)  # type: ignore[arg-type]


def text(content: str, name: str = "bad.npz") -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(content) and None


def first(name: str, value: float) -> np.ndarray:
    array = arrays()[name]
    array[0, 0] = value
    return array


def nothing(folder: Path) -> None:
    pass


IDS = arrays()["ids"]
BAD: list[tuple[str, Callable[[Path], None], str, tuple[str, ...]]] = [
    ("no file", nothing, "bad.npz", ("there is no such file or folder",)),
    ("another kind", text("1,2", "bad.csv"), "bad.csv", ("cannot be read", ".npz")),
    ("no archive", text("hello"), "bad.npz", ("cannot be read",)),
    ("an empty folder", lambda folder: (folder / "bad").mkdir(), "bad", ("neither .npz nor .npy",)),
    ("names", npz(ids=None, input_ids=IDS), "bad.npz", ("no array for input 'ids'", "['attention_mask']")),
    ("no name fits", npz(ids=None, attention_mask=None, x=IDS), "bad.npz", ("named after an input", "ids")),
    ("types", npz(ids=IDS.astype(np.float32)), "bad.npz", ("'ids' are float32, the input is int64",)),
    ("shapes", npz(ids=IDS[:, :, None]), "bad.npz", ("'ids' has shape [1, 6, 1]", "[batch, seq]")),
    ("counts", npz(ids=IDS[:5]), "bad.npz", ("disagree on how many samples",)),
    ("an id outside of the table", npz(ids=first("ids", 20)), "bad.npz", ("sample 0 of 'ids' holds 20", "20 entries")),
    ("a negative id", npz(ids=first("ids", -21)), "bad.npz", ("holds -21", "tokenizer")),
    ("empty", npz(ids=IDS[:0], attention_mask=IDS[:0]), "bad.npz", ("it holds no samples",)),
    ("no positions", npz(ids=IDS[:, :0], attention_mask=IDS[:, :0]), "bad.npz", ("'ids' is empty",)),
    ("no function", text("", "bad.py"), "bad.py:feeds", ("it has no function 'feeds'",)),
    ("a function that fails", text("def feeds():\n    yield from (1 / 0,)", "bad.py"), "bad.py:feeds", ("the function failed: ZeroDivisionError",)),
    ("a file that fails", text("import nowhere_at_all", "bad.py"), "bad.py:feeds", ("running it failed: ModuleNotFoundError",)),
]  # fmt: skip


@pytest.mark.parametrize("make, data, words", [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_bad_samples(
    here: Path, make: Callable[[Path], None], data: str, words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiler, "place", lambda *_, **__: pytest.fail("timed"))
    make(here)
    before = names(here) | {"__pycache__"}
    result = invoke(main, "net.onnx", "--calib", data, *ZEROS, "-o", "deep/out")
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    assert "internal error" not in result.output
    last = result.stderr.splitlines()[-1]
    assert last.startswith("error: ")
    for word in (data, *words):
        assert word in last
    assert names(here) <= before


def test_floats_with_nan(here: Path) -> None:
    proto = network("g (float[batch, 4] x) => (float[batch, 4] y) { a = MatMul (x, w) y = LayerNormalization (a, s) }", w=np.eye(4, dtype=np.float32), s=np.ones(4, np.float32))  # fmt: skip
    onnx.save(proto, "net.onnx")
    x = np.ones((9, 4), np.float32)
    x[6, 2] = np.inf
    np.savez("bad.npz", x=x)
    result = invoke(main, "net.onnx", "--calib", "bad.npz", *ZEROS)
    assert (result.exit_code, result.stdout.count("wrote")) == (2, 0)
    assert "sample 6 of 'x' holds NaN or infinity" in result.stderr
    assert names(here) == {"net.onnx", "data.npz", "bad.npz"}


def test_samples_that_end_early_the_second_time(here: Path) -> None:
    """Half of the work is done by then; an older result stays whole."""
    assert invoke(main, "net.onnx", "--threads", "1", "-o", "out").exit_code == 0
    older = {path.name: path.read_bytes() for path in (here / "out").iterdir()}
    (here / "bad.py").write_text(
        "import numpy as np\ncalls = 0\ndef feeds():\n    global calls\n    calls += 1\n"
        "    for _ in range(4 - calls):\n        yield {name: np.ones((2, 6), np.int64) for name in ('ids', 'attention_mask')}\n"
    )
    result = invoke(main, "net.onnx", "--calib", "bad.py:feeds", *ZEROS, "-o", "out")
    assert result.exit_code == 2, result.output
    assert "there were 3 feeds of samples at first, and 2 when they were read again" in result.stderr
    assert {path.name: path.read_bytes() for path in (here / "out").iterdir()} == older
    assert names(here) <= {"net.onnx", "data.npz", "bad.py", "out", "__pycache__"}


@pytest.mark.parametrize("passes", ["sparsify{sparsity=0.5,method=wanda}", "sparsify{sparsity=0.5,allocate=ecoflap}"])
def test_what_needs_samples_says_so(here: Path, passes: str) -> None:
    result = invoke(main, "net.onnx", "--passes", passes, "--threads", "1")
    assert result.exit_code == 2, result.output
    assert "--calib" in result.stderr
    assert names(here) == {"net.onnx", "data.npz"}
