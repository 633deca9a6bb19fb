"""`spa-compile`: options in, one call, tables or JSON out, and the exit codes."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import onnx
import pytest
import yaml

import spa_compiler
from spa_compiler.artifact import manifest
from spa_compiler.cli.compile import main
from spa_compiler.targets import cuda, host
from tests.cli.command import invoke
from tests.folders import ARTIFACT, names
from tests.networks import mlp

pytestmark = pytest.mark.usefixtures("short_races")
SPARSE = ("--sparsity", "0.9", "--pattern", "block:4x1")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder that holds net.onnx, without zeros, and zeros.onnx."""
    monkeypatch.chdir(tmp_path)
    onnx.save(mlp(1.0, 64), "net.onnx")
    onnx.save(mlp(0.1, 64), "zeros.onnx")
    return tmp_path


def subprocess_of(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "spa_compiler.cli.compile", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload, no-any-return]


def test_the_output_is_called_after_the_model(here: Path) -> None:
    result = invoke(main, "net.onnx", "--threads", "1")
    assert result.exit_code == 0, result.output
    assert names(here) == {"net.onnx", "zeros.onnx", "net-spa"}
    assert names(here / "net-spa") == ARTIFACT
    manifest.check(here / "net-spa")


def test_what_is_printed(here: Path) -> None:
    result = invoke(main, "net.onnx", "--threads", "1")
    first, *_ = lines = result.stdout.splitlines()
    assert first == f"spa-compiler {spa_compiler.__version__} | net.onnx -> cpu:{host().level} ({host().level})"
    assert "1 thread" in lines[1]
    assert lines[2].startswith("ONNX Runtime ")
    assert "CPUExecutionProvider" in lines[2]
    assert any("as fast as onnxruntime at 1x128x64" in line for line in lines)
    assert any(line.startswith("size: ") for line in lines)
    assert any(line.startswith("error: ") for line in lines)
    assert f"wrote {here / 'net-spa'}" in lines
    assert any("--sparsity 0.8 --pattern block:4x1" in line for line in lines)
    assert "register_custom_ops_library" in lines[-2]
    assert lines[-1].startswith("session = ort.InferenceSession(")


def test_the_snippet_runs(here: Path) -> None:
    lines = invoke(main, "net.onnx", "--threads", "1").stdout.splitlines()
    code = "\n".join(lines[lines.index("import onnxruntime as ort") :])
    done = subprocess.run([sys.executable, "-c", f"{code}\nprint(session.get_inputs()[0].name)"], capture_output=True)
    assert done.stdout == b"x\n"


def test_json_and_nothing_else_on_stdout(here: Path) -> None:
    done = subprocess_of("zeros.onnx", "--json", "--threads", "1", "-o", "out")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report == json.loads((here / "out" / "report.json").read_bytes())
    assert report["asked"]["source"] == "zeros.onnx"
    assert "Traceback" not in done.stderr


def test_json_of_a_failure_is_empty() -> None:
    result = invoke(main, "missing.onnx", "--json")
    assert (result.exit_code, result.stdout) == (3, "")
    assert result.stderr.startswith("error: ")


def test_json_of_a_dry_run(here: Path) -> None:
    result = invoke(main, "zeros.onnx", "--json", "--dry-run", *SPARSE)
    report = json.loads(result.stdout)
    assert report["passes"][0]["name"] == "sparsify"
    assert names(here) == {"net.onnx", "zeros.onnx"}


def test_quiet(here: Path) -> None:
    assert invoke(main, "net.onnx", "-q", "--dry-run").stderr == ""


def test_a_dry_run_shows_the_plan(here: Path) -> None:
    result = invoke(main, "zeros.onnx", "--dry-run", "--explain")
    assert result.exit_code == 0
    assert "would be timed dense and as unstructured" in result.stdout
    assert names(here) == {"net.onnx", "zeros.onnx"}


def test_explain(here: Path) -> None:
    result = invoke(main, "net.onnx", "--explain", "--threads", "1")
    assert "64 x 64" in result.stdout
    assert "it has no zeros" in result.stdout
    assert "64 x 64" not in invoke(main, "net.onnx", "--threads", "1").stdout


def test_check_hardware() -> None:
    result = invoke(main, "--check-hardware")
    assert result.exit_code == 0
    assert host().level in result.stdout
    assert "linker" in result.stdout
    facts = json.loads(invoke(main, "--check-hardware", "--json").stdout)
    assert facts["linker"] == "works"
    assert facts["isa"] == host().level


def test_check_hardware_tells_what_there_is_for_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    here = cuda.Device("A GPU", "sm_90", 132, 1 << 37, 50 << 20, 13000)
    for device, words in ((here, "A GPU (sm_90)"), (None, "none (cuda:sm_90 needs none)")):
        monkeypatch.setattr(cuda, "device", lambda found=device: found)
        facts = json.loads(invoke(main, "--check-hardware", "--json").stdout)
        assert facts["gpu"] == words
        assert facts["cuda compiler"]


def test_check_hardware_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPA_CC", "/no/such/compiler")
    result = invoke(main, "--check-hardware")
    assert result.exit_code == 6
    assert "/no/such/compiler" in result.stdout
    assert "SPA_CC must name a C compiler" in result.stderr


def test_list_passes() -> None:
    result = invoke(main, "--list-passes")
    assert result.exit_code == 0
    assert "sparsify" in result.stdout
    for option in ("sparsity", "pattern", "scope", "targets", "ignore"):
        assert f"  {option}  (" in result.stdout


def test_version() -> None:
    assert invoke(main, "--version").stdout == f"spa-compile, version {spa_compiler.__version__}\n"


def test_help_names_every_exit_code() -> None:
    text = invoke(main, "--help").stdout
    assert "130 interrupted" in text
    assert all(f"{code} " in text for code in range(7))


def test_help_comes_at_once() -> None:
    seconds = []
    for _ in range(3):
        begin = time.perf_counter()
        assert subprocess_of("--help").returncode == 0
        seconds.append(time.perf_counter() - begin)
    empty = []
    for _ in range(3):
        begin = time.perf_counter()
        subprocess.run([sys.executable, "-c", "pass"], check=True)
        empty.append(time.perf_counter() - begin)
    # 0.3 s on an idle machine; what Python itself takes shows how idle this one is
    assert statistics.median(seconds) < 0.3 + 8 * statistics.median(empty)


def test_help_imports_nothing_heavy() -> None:
    code = "import sys, spa_compiler.cli.compile; print(*sys.modules)"
    loaded = set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.split())
    assert not loaded & {"numpy", "onnx", "tvm", "onnxruntime", "rich", "networkx", "scipy", "yaml", "msgspec"}


def test_a_recipe_file_says_the_same_as_flags(here: Path) -> None:
    recipe = {"version": 1, "passes": [{"name": "sparsify", "sparsity": 0.9, "pattern": "block:4x1"}]}
    (here / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    common = ("net.onnx", "--threads", "1", "--records", "records.sqlite")
    for name, arguments in {"flags": SPARSE, "file": ("--recipe", "recipe.yaml")}.items():
        result = invoke(main, *common, *arguments, "-o", name)
        assert result.exit_code == 0, result.output
    for file in ARTIFACT - {"report.json"}:
        assert (here / "file" / file).read_bytes() == (here / "flags" / file).read_bytes(), file


def test_every_way_to_ask_is_one_recipe(here: Path) -> None:
    (here / "recipe.yaml").write_text("{version: 1, passes: [{name: sparsify, sparsity: 0.9, pattern: block:4x1}]}")
    ways = (SPARSE, ("--recipe", "recipe.yaml"), ("--passes", "sparsify{sparsity=0.9,pattern=block:4x1}"))
    asked = [json.loads(invoke(main, "net.onnx", "--dry-run", "--json", *way).stdout)["asked"] for way in ways]
    assert asked[0] == asked[1] == asked[2]
    assert asked[0]["recipe"]["passes"][0]["options"]["sparsity"] == 0.9


def test_too_large(here: Path) -> None:
    result = invoke(main, "net.onnx", "--max-size", "10kB", "--threads", "1")
    assert result.exit_code == 5
    assert "more than the 10.0 kB of --max-size" in result.stderr
    assert names(here) == {"net.onnx", "zeros.onnx"}


@pytest.mark.parametrize(
    "text,size", [("1000", 1000), ("10kB", 10_000), ("1.5MB", 1_500_000), ("2GiB", 2 << 30), ("3m", 3_000_000)]
)
def test_sizes(monkeypatch: pytest.MonkeyPatch, text: str, size: int) -> None:
    from spa_compiler import compiler

    seen: list[object] = []
    monkeypatch.setattr(compiler, "compile", lambda *_, max_size, **__: seen.append(max_size) or sys.exit(0))
    invoke(main, "net.onnx", "--max-size", text)
    assert seen == [size]


@pytest.mark.parametrize("text", ["", "much", "-5MB", "nan", "inf", "5PB", "MB", "1e3", "5 5MB"])
def test_sizes_that_are_none(text: str) -> None:
    result = invoke(main, "net.onnx", "--max-size", text)
    assert result.exit_code == 2
    assert "is no size: write 500MB" in result.stderr


def test_an_artifact_is_placed_anew(here: Path) -> None:
    assert invoke(main, "net.onnx", "--threads", "1", "-o", "out").exit_code == 0
    before = (here / "out" / "portable.onnx").read_bytes()
    result = invoke(main, "out", "--threads", "1")
    assert result.exit_code == 0, result.output
    assert f"wrote {here / 'out'}" in result.stdout
    assert names(here) == {"net.onnx", "zeros.onnx", "out"}
    assert (here / "out" / "portable.onnx").read_bytes() == before
    assert invoke(main, "out", "--threads", "1", "-o", "moved", "--target", "cuda:sm_90").exit_code == 0
    assert names(here / "moved") == ARTIFACT


def test_shapes_in_all_three_spellings() -> None:
    for spelling in ("x=2,5,64", "x:2x5x64", "x:[2,5,64]"):
        result = invoke(main, "net.onnx", "--dry-run", "--json", "--shape", spelling)
        assert json.loads(result.stdout)["shapes"] == ["2x5x64"]


def test_a_log_file(here: Path) -> None:
    assert invoke(main, "net.onnx", "--dry-run", "--log-file", "log.txt").exit_code == 0
    log = (here / "log.txt").read_text()
    assert all(stage in log for stage in ("load", "canonicalize", "analyze"))


def test_verbose_logs_on_stderr() -> None:
    result = invoke(main, "net.onnx", "--dry-run", "-v")
    assert "canonicalize" in result.stderr
    assert "INFO" not in result.stdout


def test_completion() -> None:
    import os

    done = subprocess.run(
        [sys.executable, "-c", "from spa_compiler.cli.compile import main; main(prog_name='spa-compile')"],
        env=os.environ | {"_SPA_COMPILE_COMPLETE": "bash_source"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0
    assert "_SPA_COMPILE_COMPLETE=bash_complete" in done.stdout
