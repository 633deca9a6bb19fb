import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner

from spa_compiler.bench.compare import Result, compare, entries, parse_pythons
from spa_compiler.bench.engines import ENGINES, Engine, parse
from spa_compiler.cli.bench import main
from spa_compiler.errors import ModelError, UsageError

ROW = {"model", "runtime", "shape", "median_ms", "p10_ms", "p90_ms", "version", "error"}


@pytest.fixture
def source(linear: Callable[..., Path]) -> Path:
    return linear("source.onnx", 500)


@pytest.fixture
def folder(linear: Callable[..., Path], source: Path, tmp_path: Path) -> Path:
    """As spa-compile writes it, with a faster model and no kernels."""
    path = tmp_path / "source-spa"
    path.mkdir()
    linear("source-spa/model.onnx", 2)
    linear("source-spa/portable.onnx", 500)
    (path / "manifest.json").write_text(json.dumps({"source": {"name": "source.onnx"}}))
    return path


def bench(paths: list[Path], against: str = "onnxruntime", *shapes: str) -> Result:
    return compare(entries(paths), parse(against), machine="m", threads=1, runs=4, shapes=shapes)


def pairs(result: Result) -> list[tuple[str, str]]:
    return [(row.model, row.runtime) for row in result.rows]


def over(result: Result) -> dict[tuple[str, str], float]:
    return {(ratio.model, ratio.over): ratio.ratio for ratio in result.ratios}


def test_an_artifact_against_its_source(source: Path, folder: Path, linear: Callable[..., Path]) -> None:
    result = bench([linear("other.onnx"), source, folder], "onnxruntime,onnxruntime-int8", "x=4,64")
    assert pairs(result)[-3:] == [
        ("source.onnx", "onnxruntime-int8"),
        ("source-spa", "spa"),
        ("source-spa/portable.onnx", "onnxruntime"),
    ]
    ratios = over(result)
    # Some 100 times the work; how far it shows in four calls is up to what else the machine does.
    assert ratios["source-spa", "onnxruntime"] > 1
    assert ratios["source-spa", "portable"] > 1
    assert ("source-spa", "onnxruntime-int8") in ratios
    assert {row.shape for row in result.rows} == {"4x64"}


def test_an_artifact_alone_is_compared_with_its_portable(folder: Path) -> None:
    result = bench([folder], "onnxruntime-best", "x=4,64")
    assert pairs(result) == [
        ("source-spa", "spa"),
        ("source-spa/portable.onnx", "onnxruntime"),
        ("source-spa/portable.onnx", "onnxruntime-best"),
    ]
    assert set(over(result)) == {("source-spa", "onnxruntime"), ("source-spa", "onnxruntime-best")}


def test_files_are_compared_with_the_first_in_each_engine(source: Path, linear: Callable[..., Path]) -> None:
    result = bench([source, linear("fast.onnx")], "onnxruntime,onnxruntime-best")
    assert set(over(result)) == {("fast.onnx", "onnxruntime"), ("fast.onnx", "onnxruntime-best")}


def test_every_shape_has_its_rows_and_ratios(source: Path, folder: Path) -> None:
    result = bench([source, folder], "onnxruntime", "x=1,64", "x=8,64")
    assert [row.shape for row in result.rows] == ["1x64"] * 3 + ["8x64"] * 3
    assert [ratio.shape for ratio in result.ratios] == ["1x64"] * 2 + ["8x64"] * 2


def test_an_engine_that_is_not_there_is_left_out(source: Path, caplog: pytest.LogCaptureFixture) -> None:
    engines = parse("onnxruntime,openvino")
    false = {"openvino": "/bin/false"}
    result = compare(entries([source]), engines, machine="m", threads=1, runs=1, pythons=false)
    assert pairs(result) == [("source.onnx", "onnxruntime")]
    assert "left out: source.onnx in openvino" in caplog.text
    (skip,) = result.skipped
    assert (skip.model, skip.runtime, skip.shape) == ("source.onnx", "openvino", "1x64")
    assert "status 1" in skip.reason


def test_an_engine_whose_file_cannot_be_made_is_left_out(
    source: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(engine: Engine, *_: object) -> Path:
        if engine.form:
            raise RuntimeError("no such operator")
        return source

    monkeypatch.setattr("spa_compiler.bench.compare.prepare", fail)
    result = bench([source], "onnxruntime,onnxruntime-int8")
    (skip,) = result.skipped
    assert skip.reason == "cannot be prepared: RuntimeError: no such operator"
    assert f"left out: source.onnx in onnxruntime-int8 {skip.reason}" in caplog.text


def test_errors_are_against_onnxruntime_on_what_is_compared_with(
    source: Path, folder: Path, linear: Callable[..., Path]
) -> None:
    """The fixture's artifact computes something else than its source; its portable.onnx is the source."""
    for name in ("source.onnx", "source-spa/portable.onnx"):
        linear(name, 5)  # 500 layers overflow
    other = linear("other.onnx", 3)
    result = bench([source, other, folder], "onnxruntime,onnxruntime-int8", "x=4,64")
    errors = {(row.model, row.runtime): row.error for row in result.rows}
    assert errors["source.onnx", "onnxruntime"] == errors["other.onnx", "onnxruntime"] == 0
    assert errors["source-spa/portable.onnx", "onnxruntime"] == 0
    assert (errors["source-spa", "spa"] or 0) > 1e-3
    assert (errors["other.onnx", "onnxruntime-int8"] or 0) > 0


def test_an_error_without_a_reference_is_none(source: Path) -> None:
    (row,) = bench([source], "onnxruntime-int8").rows
    assert row.error is None


def test_equal_names_keep_their_paths(folder: Path, linear: Callable[..., Path]) -> None:
    paths = [linear("model.onnx"), folder / "model.onnx"]
    assert [entry.name for entry in entries(paths)] == [str(path) for path in paths]


def test_what_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such file"):
        entries([tmp_path / "none.onnx"])
    with pytest.raises(ModelError, match=r"no model\.onnx"):
        entries([tmp_path])


@pytest.mark.parametrize("option", ["openvino", "openvino=", "=python", "tensorrt=python"])
def test_pythons_are_engine_and_path(option: str) -> None:
    assert parse_pythons(["openvino=a=b", "spa=c"]) == {"openvino": "a=b", "spa": "c"}
    with pytest.raises(UsageError, match="ENGINE=PATH"):
        parse_pythons([option])


class TestCommand:
    def test_json_is_all_that_stdout_has(self, source: Path, folder: Path) -> None:
        arguments = [str(source), str(folder), "--threads", "1", "--runs", "2", "--json"]
        command = [
            sys.executable,
            "-m",
            "spa_compiler.cli.bench",
            *arguments,
            "--against",
            "onnxruntime,onnxruntime-int8",
        ]
        content = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
        assert list(content) == ["machine", "threads", "runs", "rows", "ratios", "skipped"]
        assert (content["threads"], content["runs"]) == (1, 2)
        assert set(content["rows"][0]) == ROW
        assert set(content["ratios"][0]) == {"model", "over", "shape", "ratio"}

    def test_the_table(self, source: Path, folder: Path) -> None:
        answer = CliRunner().invoke(main, [str(source), str(folder), "--runs", "2", "--threads", "1"])
        assert answer.exit_code == 0, answer.output
        for word in ("1 thread, 2 runs", "source-spa/portable.onnx", "median ms", "x as fast as onnxruntime at 1x64"):
            assert word in answer.stdout

    def test_what_was_left_out_is_below_the_table(self, source: Path) -> None:
        options = ["--against", "onnxruntime,deepsparse", "--python", "deepsparse=/bin/false", "--runs", "1"]
        answer = CliRunner().invoke(main, [str(source), *options])
        assert answer.exit_code == 0, answer.output
        assert "left out: source.onnx in deepsparse at 1x64: does not run: its process ended" in answer.stdout

    @pytest.mark.parametrize(
        "arguments, code",
        [([], 2), (["--runs", "0"], 2), (["--against", "tensorrt"], 2), (["--shape", "x=1,3"], 2), (["no.onnx"], 3)],
    )
    def test_errors_are_a_sentence_and_a_code(self, source: Path, arguments: list[str], code: int) -> None:
        answer = CliRunner().invoke(main, [*([str(source)] if arguments else []), *arguments])
        assert answer.exit_code == code
        assert "Traceback" not in answer.output

    def test_help_names_every_engine(self) -> None:
        (option,) = [parameter for parameter in main.params if parameter.name == "against"]
        named = option.help.removeprefix("Runtimes, separated by commas: ").removesuffix(".")  # type: ignore[attr-defined]
        assert named.split(", ") == list(ENGINES)

    def test_an_interruption(self, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def interrupt(*_: object, **__: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr("spa_compiler.bench.compare.compare", interrupt)
        assert CliRunner().invoke(main, [str(source)]).exit_code == 130

    def test_help_imports_nothing_heavy(self) -> None:
        code = (
            "import sys, spa_compiler.cli.bench as b\n"
            "try: b.main(['--help'])\n"
            "except SystemExit: pass\n"
            "heavy = {'numpy', 'onnx', 'onnxruntime', 'msgspec', 'rich', 'tvm'} & set(sys.modules)\n"
            "sys.exit(' '.join(heavy) or None)"
        )
        assert subprocess.run([sys.executable, "-c", code], check=False, capture_output=True).returncode == 0


def test_the_result_is_a_struct_that_reads_back(source: Path) -> None:
    result = bench([source])
    assert msgspec.json.decode(msgspec.json.encode(result), type=Result) == result
