"""The command: what goes to stdout, what to stderr, and with which exit code."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from click.testing import CliRunner, Result

from spa_compiler.cli.analyze import main
from tests.analysis import nets
from tests.analysis.cutting import with_weights


def invoke(*arguments: str) -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(main, list(arguments))


@pytest.fixture
def model(tmp_path: Path) -> str:
    path = tmp_path / "net.onnx"
    onnx.save(with_weights(nets.RESIDUAL), path)
    return str(path)


def test_tables(model: str) -> None:
    result = invoke(model)
    assert result.exit_code == 0
    lines = [line.split() for line in result.stdout.splitlines()]
    assert ["group", "size", "granularity", "params", "MACs", "members"] in lines
    first = next(line for line in lines if line[:2] == ["0", "8"])
    assert first[2:5] == ["channel", "928", "46,000"]
    assert "w0[0]," in first
    assert "prunable: 934 of 934 parameters (100.0%), in 14 units of 2 groups" in result.stdout


def test_pins_are_told_with_their_reasons(tmp_path: Path) -> None:
    path = tmp_path / "pinned.onnx"
    text = """g (float[N, 4] x, float[4, 6] w, float[6, 2] v) => (float[N, 2] y) {
      a = MatMul(x, w)
      b = Softmax(a)
      y = MatMul(b, v)
    }"""
    onnx.save(with_weights(text), path)
    result = invoke(str(path))
    assert result.exit_code == 0
    assert "no groups: nothing can be removed" in result.stdout
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert "a 1 Softmax no rule for Softmax yet 24" in lines
    assert "x 1 graph input interface 24" in lines
    assert "prunable: 0 of 36 parameters (0.0%), in 0 units of 0 groups" in lines


def test_markup_in_names_is_text(tmp_path: Path) -> None:
    path = tmp_path / "named.onnx"
    model = with_weights(nets.GATED)
    for tensor in model.graph.initializer:
        tensor.name = tensor.name.replace("wd", "[red]wd[/nonsense]")
    model.graph.node[-1].input[1] = "[red]wd[/nonsense]"
    onnx.save(model, path)
    result = invoke(str(path))
    assert result.exit_code == 0
    assert "[red]wd[/nonsense][0]" in result.stdout


def test_json_is_all_there_is_on_stdout(model: str) -> None:
    result = invoke(model, "--json")
    assert result.exit_code == 0
    assert [group["size"] for group in json.loads(result.stdout)["groups"]] == [8, 6]


def test_unusable_models_exit_3_with_one_line(tmp_path: Path) -> None:
    result = invoke(str(tmp_path / "nothing.onnx"))
    assert result.exit_code == 3
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert "nothing.onnx" in result.stderr
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"this is no model")
    result = invoke(str(broken), "--json")
    assert result.exit_code == 3
    assert result.stdout == ""
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("arguments", [(), ("--nonsense",), ("a.onnx", "b.onnx")])
def test_wrong_usage_exits_2(arguments: tuple[str, ...]) -> None:
    assert invoke(*arguments).exit_code == 2


def test_help_has_examples_and_imports_nothing_heavy() -> None:
    result = invoke("--help")
    assert result.exit_code == 0
    assert "spa-analyze model.onnx --json" in result.stdout
    code = (
        "import sys; import spa_compiler.cli.analyze; "
        "sys.exit(', '.join({'numpy', 'onnx', 'networkx', 'scipy', 'tvm', 'rich'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert found.stderr.strip() == ""
