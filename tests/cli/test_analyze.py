"""The command: what goes to stdout, what to stderr, and with which exit code."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import msgspec
import numpy as np
import onnx
import pytest

from spa_compiler.analysis import schema
from spa_compiler.cli.analyze import main
from tests.analysis import nets
from tests.analysis.told import weighted
from tests.cli.command import invoke


@pytest.fixture
def model(tmp_path: Path) -> str:
    path = tmp_path / "net.onnx"
    onnx.save(weighted(nets.RESIDUAL), path)
    return str(path)


def test_tables(model: str) -> None:
    result = invoke(main, model)
    assert result.exit_code == 0
    lines = [line.split() for line in result.stdout.splitlines()]
    assert ["group", "size", "granularity", "params", "MACs", "members"] in lines
    first = next(line for line in lines if line[:2] == ["0", "8"])
    assert first[2:5] == ["channel", "928", "46,000"]
    assert "w0[0]," in first
    assert "prunable: 934 of 934 parameters (100.0%), in 14 units of 2 groups" in result.stdout


def test_pins_are_told_with_their_reasons(tmp_path: Path) -> None:
    path = tmp_path / "pinned.onnx"
    text = """g (float[1, 4] x, float[4, 6] w, float[6, 2] v) => (float[1, 2] y) {
      a = MatMul(x, w)
      b = Softmax(a)
      y = MatMul(b, v)
    }"""
    onnx.save(weighted(text), path)
    result = invoke(main, str(path))
    assert result.exit_code == 0
    assert "no groups: nothing can be removed" in result.stdout
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert "pinned by reason axes params for example" in lines
    assert any(line.startswith("Softmax ") and line.endswith(" 36 a[1]") for line in lines)
    assert "graph input interface 1 24 x[1]" in lines
    assert "graph output interface 1 12 y[1]" in lines
    assert "prunable: 0 of 36 parameters (0.0%), in 0 units of 0 groups" in lines
    last = lines[-1]
    assert last.startswith("pinned: 100.0% of parameters, held by: ")
    assert "interface (graph input) 66.7%" in last
    assert "interface (graph output) 33.3%" in last
    assert last.endswith("; a parameter may have several")


def test_a_model_without_pins_that_hold_says_so(model: str) -> None:
    assert invoke(main, model).stdout.splitlines()[-1] == "pinned: 0.0% of parameters"


def test_little_is_not_nothing(tmp_path: Path) -> None:
    path = tmp_path / "wide.onnx"
    onnx.save(
        weighted("""g (float[1, 1] x, float[1, 5000] w, float[5000, 2] v, float[2] b) => (float[1, 2] y) {
      h = MatMul(x, w)
      s = MatMul(h, v)
      y = Add(s, b)
    }"""),
        path,
    )
    last = invoke(main, str(path)).stdout.splitlines()[-1]
    assert last == "pinned: <0.1% of parameters, held by: interface (graph output) <0.1%"


def deep(layers: int) -> onnx.ModelProto:
    """`layers` groups, of which later ones are larger."""
    sizes = range(2, layers + 3)
    weights = ", ".join(f"float[{size}, {size + 1}] w{size}" for size in sizes)
    lines = "\n".join(f"h{size + 1} = MatMul(h{size}, w{size})" for size in sizes)
    end = layers + 3
    text = f"g (float[N, 2] x, {weights}) => (float[N, {end}] y) {{ h2 = Relu(x)\n{lines}\ny = Relu(h{end}) }}"
    return weighted(text)


def test_long_tables_show_the_largest_and_count_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "deep.onnx"
    onnx.save(deep(45), path)
    result = invoke(main, str(path))
    lines = [line.split() for line in result.stdout.splitlines()]
    shown = [int(line[3].replace(",", "")) for line in lines if len(line) > 3 and line[2:3] == ["channel"]]
    assert len(shown) == 40
    assert shown == sorted(shown, reverse=True)
    assert "and 5 more smaller groups; --all shows them" in result.stdout
    whole = invoke(main, str(path), "--all").stdout
    assert sum(line.split()[2:3] == ["channel"] for line in whole.splitlines()) == 45
    assert "--all" not in whole


def test_markup_in_names_is_text(tmp_path: Path) -> None:
    path = tmp_path / "named.onnx"
    model = weighted(nets.GATED)
    for tensor in model.graph.initializer:
        tensor.name = tensor.name.replace("wd", "[red]wd[/nonsense]")
    model.graph.node[-1].input[1] = "[red]wd[/nonsense]"
    onnx.save(model, path)
    result = invoke(main, str(path))
    assert result.exit_code == 0
    assert "[red]wd[/nonsense][0]" in result.stdout


def test_names_give_a_terminal_no_orders(tmp_path: Path) -> None:
    path = tmp_path / "named.onnx"
    model = weighted(nets.GATED)
    name = "\x1b[2J\x07\x9bm\u202e" + "long" * 1000
    for tensor in model.graph.initializer:
        tensor.name = tensor.name.replace("wd", name)
    model.graph.node[-1].input[1] = name
    onnx.save(model, path)
    result = invoke(main, str(path))
    assert result.exit_code == 0
    assert not set("\x1b\x07\x9b\u202e") & set(result.stdout)
    assert "\ufffd[2J\ufffd\ufffdm\ufffdlonglong" in result.stdout
    assert len(result.stdout) < 5_000


def test_json_is_all_there_is_on_stdout(model: str) -> None:
    result = invoke(main, model, "--json")
    assert result.exit_code == 0
    assert [group["size"] for group in json.loads(result.stdout)["groups"]] == [8, 6]
    msgspec.json.decode(result.stdout, type=schema.Document, strict=True)
    assert set(json.loads(result.stdout)) == set(schema.json_schema()["$defs"]["Document"]["properties"])


def test_drawings_are_written(model: str, tmp_path: Path) -> None:
    page, picture = tmp_path / "net.html", tmp_path / "net.svg"
    page.write_text("an older one")
    result = invoke(main, model, "--html", str(page), "--svg", str(picture))
    assert result.exit_code == 0
    assert result.stdout.splitlines()[-2:] == [f"written: {page}", f"written: {picture}"]
    assert page.read_text("utf-8").startswith("<!DOCTYPE html>")
    assert ElementTree.parse(picture).getroot().tag.endswith("svg")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["net.html", "net.onnx", "net.svg"]
    assert picture.stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_drawings_go_with_json(model: str, tmp_path: Path) -> None:
    result = invoke(main, model, "--json", "--svg", str(tmp_path / "net.svg"))
    assert result.exit_code == 0
    assert json.loads(result.stdout)["groups"]
    assert (tmp_path / "net.svg").exists()


def test_a_link_stays_a_link(model: str, tmp_path: Path) -> None:
    (tmp_path / "link.svg").symlink_to("real.svg")
    assert invoke(main, model, "--svg", str(tmp_path / "link.svg")).exit_code == 0
    assert (tmp_path / "link.svg").is_symlink()
    assert (tmp_path / "real.svg").read_text("utf-8").startswith("<?xml")


def test_a_device_can_be_named(model: str) -> None:
    assert invoke(main, model, "--svg", os.devnull).exit_code == 0
    assert Path(os.devnull).is_char_device()


def test_files_that_cannot_be_meant_exit_2_before_any_work(model: str, tmp_path: Path) -> None:
    before = Path(model).read_bytes()
    both = str(tmp_path / "x.html")
    for arguments, words in (
        (("--html", str(tmp_path)), "is a folder"),
        (("--svg", str(tmp_path / "none" / "x.svg")), "there is no folder"),
        (("--svg", model), "is the model itself"),
        (("--html", both, "--svg", both), "same file"),
    ):
        result = invoke(main, model, *arguments)
        assert (result.exit_code, result.stdout) == (2, "")
        assert words in result.stderr
    assert Path(model).read_bytes() == before
    assert invoke(main, str(tmp_path / "nothing.onnx"), "--html", str(tmp_path)).exit_code == 2


def test_what_cannot_be_written_exits_6_and_leaves_nothing(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = tmp_path / "net.svg"
    picture.write_text("the old one")

    def full(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    result = invoke(main, model, "--svg", str(picture))
    assert result.exit_code == 6
    assert result.stdout == ""
    assert "No space left on device" in result.stderr
    assert str(picture) in result.stderr
    assert picture.read_text() == "the old one"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["net.onnx", "net.svg"]


def test_unusable_models_exit_3_with_one_line(tmp_path: Path) -> None:
    result = invoke(main, str(tmp_path / "nothing.onnx"))
    assert result.exit_code == 3
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert "nothing.onnx" in result.stderr
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"this is no model")
    result = invoke(main, str(broken), "--json")
    assert result.exit_code == 3
    assert result.stdout == ""
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("arguments", [(), ("--nonsense",), ("a.onnx", "b.onnx")])
def test_wrong_usage_exits_2(arguments: tuple[str, ...]) -> None:
    assert invoke(main, *arguments).exit_code == 2


def test_help_has_examples_and_imports_nothing_heavy() -> None:
    result = invoke(main, "--help")
    assert result.exit_code == 0
    assert "spa-analyze model.onnx --json" in result.stdout
    assert "--html FILE" in result.stdout
    code = (
        "import sys; import spa_compiler.cli.analyze; "
        "sys.exit(', '.join({'numpy', 'onnx', 'networkx', 'scipy', 'tvm', 'rich'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert found.stderr.strip() == ""


def test_help_is_quick() -> None:
    code = "import sys; from spa_compiler.cli.analyze import main; sys.argv = ['spa-analyze', '--help']; main()"
    times = []
    for _ in range(3):
        before = os.times()
        subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
        after = os.times()
        times.append(after.children_user + after.children_system - before.children_user - before.children_system)
    assert min(times) < 0.3  # time of the processor: the clock also counts what else the machine does


DOCS = (Path(__file__).parents[2] / "docs" / "analysis.md").read_text(encoding="utf-8")


def test_the_documented_programs_run(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trainer's program of docs/analysis.md masks a quarter of every group, on every axis that it names."""
    monkeypatch.chdir(tmp_path)
    Path(model).rename("model.onnx")
    Path("groups.json").write_text(invoke(main, "model.onnx", "--json").stdout, encoding="utf-8")
    programs = re.findall(r"^```python\n(.*?)^```", DOCS, re.M | re.S)
    assert len(programs) == 2
    for program in programs:
        exec(compile(program, "docs/analysis.md", "exec"), {})
    with np.load("masks.npz") as masks:
        assert {name: np.flatnonzero(~masks[name]).tolist() for name in masks.files} == {
            "w0:0": [0, 1], "w1:1": [0, 1], "w2:0": [0, 1], "b2:0": [0, 1], "w3:1": [0, 1],
            "w1:0": [0], "b1:0": [0], "w2:1": [0],
        }  # fmt: skip


def test_every_field_of_the_schema_is_documented() -> None:
    for name, definition in schema.json_schema()["$defs"].items():
        for key in definition["properties"]:
            assert re.search(rf"`(\w+\[\]\.)*{key}(`|\[\])", DOCS), f"{name}.{key}"


def test_macs_are_counted_with_the_sizes_that_are_given(tmp_path: Path) -> None:
    text = """g (float[N, S, 4] x, float[4, 8] w, float[8, 3] v) => (float[N, S, 3] y) {
      a = MatMul(x, w)
      y = MatMul(a, v)
    }"""
    path = tmp_path / "open.onnx"
    onnx.save(weighted(text), path)
    result = invoke(main, str(path), "--shape", "x=1,50,4")
    assert result.exit_code == 0, result.output
    assert f"{50 * (4 * 8 + 8 * 3):,}" in result.output
    assert "counted with x=1,50,4" in result.output
