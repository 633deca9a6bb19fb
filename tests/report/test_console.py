import io
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from spa_compiler.report import console as draw
from spa_compiler.report.report import PassChange, Report


@pytest.fixture
def screen() -> Console:
    return Console(file=io.StringIO(), width=200, color_system=None)


def text(screen: Console) -> str:
    assert isinstance(screen.file, io.StringIO)
    return screen.file.getvalue()


def test_the_header_names_versions_target_and_providers(full: Report, screen: Console) -> None:
    draw.header(full, screen)
    for word in ("spa-compiler 0.1.0", "cpu (x86-64-v4)", "1 thread\n", "ONNX Runtime 1.20 (CPUExecutionProvider)"):
        assert word in text(screen)


def test_the_table_shows_every_candidate_the_fastest_first(full: Report, screen: Console) -> None:
    draw.sites(full, screen)
    shown = text(screen)
    for word in ("[bold]layer/0[/x]", "3072 x 768", "90%", "5.0x as fast as dense", "would help: nothing"):
        assert word in shown
    assert shown.index("* block:4x1 20.0 (19.0-22.5)") < shown.index("dense 100.0 (95.0-110.0)")


def test_a_shortfall_is_shown(full: Report, screen: Console) -> None:
    full.passes = [PassChange(name="prune-groups", summary="half [b]remains[/b]", warnings=("asked for [x] less",))]
    draw.changes(full, screen)
    assert "prune-groups: half [b]remains[/b]\nprune-groups: warning: asked for [x] less\n" in text(screen)


def test_no_sites_is_a_sentence(full: Report, screen: Console) -> None:
    full.placements = []
    draw.sites(full, screen)
    assert "no sites" in text(screen)


def test_the_last_lines(full: Report, screen: Console) -> None:
    draw.changes(full, screen)
    draw.race(full, screen)
    draw.summary(full, Path("m-spa"), screen)
    for word in (
        "note: folded a BatchNormalization",
        "sparsify: 90 % zeros in 1 weight",
        "2.000",
        "hint: --sparsity 0.9",
        "4.50x as fast as onnxruntime at 1x128",
        "size: 90.4 MB -> 20.3 MB (22%)",
        "error: 1.0e-06 of the largest output, 1e-05 allowed (1 check",
        "wrote m-spa",
        "options.register_custom_ops_library('m-spa/kernels.so')",
        "ort.InferenceSession('m-spa/model.onnx', options)",
    ):
        assert word in text(screen)


def test_a_failure_shows_no_snippet(full: Report, screen: Console) -> None:
    full.failure = "output 'y' is wrong"
    draw.summary(full, Path("m-spa"), screen)
    assert "failed: output 'y' is wrong" in text(screen)
    assert "import onnxruntime" not in text(screen)


def test_the_snippet_is_python() -> None:
    compile(draw.snippet(Path("it's here")), "snippet", "exec")


def test_rich_is_imported_only_when_something_is_drawn() -> None:
    code = "import sys, spa_compiler.report.console; sys.exit('rich' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
