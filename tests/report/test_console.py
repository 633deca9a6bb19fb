import io
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from rich.console import Console

from spa_compiler.report import console as draw
from spa_compiler.report.report import PassChange, RaceRow, Report


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


def sites_shown(report: Report, screen: Console) -> list[str]:
    draw.sites(report, screen)
    return [" ".join(line.split()) for line in text(screen).splitlines()[1:]]


def test_like_sites_are_one_line(full: Report, screen: Console) -> None:
    (place,) = full.placements
    full.placements = [msgspec.structs.replace(place, node=f"fc{i}", density=0.1 + i / 1000) for i in range(5)]
    shown = sites_shown(full, screen)
    assert [line.split()[0] for line in shown[:3]] == ["fc0", "fc1", "fc2"]
    assert shown[3] == "and 2 more like them"
    assert len(shown) == 4
    assert sum("block:4x1 20.0" in line for line in shown) == 1


@pytest.mark.parametrize(
    "other",
    [{"tokens": 16}, {"reason": "else"}, {"density": 0.2}, {"candidates": ()}, {"region": "ai.spa/a"}, {"n": 9}],
)
def test_unlike_sites_have_lines_of_their_own(full: Report, screen: Console, other: dict[str, object]) -> None:
    full.placements *= 2
    full.placements[1] = msgspec.structs.replace(full.placements[0], **other)
    assert sum("[bold]layer/0[/x]" in line for line in sites_shown(full, screen)) == 2


def test_the_form_says_what_became_of_the_site(full: Report, screen: Console) -> None:
    (place,) = full.placements
    kinds = [("sparse", "ai.spa/a"), ("sparse", "ai.spa/b"), ("dense", "ai.spa/b"), ("dense", "")]
    full.placements = [
        msgspec.structs.replace(place, node=f"fc{i}", form=form, region=region)
        for i, (form, region) in enumerate(kinds)
    ]
    first = [line for line in sites_shown(full, screen) if line.startswith("fc")]
    forms = [
        "sparse, a node of its own",
        "sparse, in a region of 2 sites",
        "dense as a kernel, in a region of 2 sites",
        "dense",
    ]
    assert all(f" {form} 5.0x" in line for form, line in zip(forms, first, strict=True))


def test_sites_that_see_no_tokens_say_none(full: Report, screen: Console) -> None:
    full.placements[0] = msgspec.structs.replace(full.placements[0], tokens=0, density=float("nan"), n=7, k=7)
    assert "MatMul 7 x 7 block:4x1" in sites_shown(full, screen)[0]


def test_every_plan_of_the_race_is_shown(full: Report, screen: Console) -> None:
    def row(runtime: str, plan: str, ms: float) -> RaceRow:
        return RaceRow(shape="1x128", runtime=runtime, plan=plan, median_ms=ms, p10_ms=ms, p90_ms=ms, model="m")

    plans = [("onnxruntime", "source", 9.0), ("portable", "portable", 8.0), ("single sites", "single sites", 4.0)]
    full.race = [row(*plan) for plan in plans] + [row("spa", "regions", 2.0)]
    draw.race(full, screen)
    lines = [" ".join(line.split()) for line in text(screen).splitlines()]
    assert lines[1:] == [
        "1x128 m onnxruntime 9.000 9.000 9.000",
        "1x128 m portable 8.000 8.000 8.000",
        "1x128 m single sites 4.000 4.000 4.000 2.00",
        "1x128 m spa (regions) 2.000 2.000 2.000 4.00",
    ]


def test_a_shortfall_is_shown(full: Report, screen: Console) -> None:
    full.passes = [PassChange(name="prune-groups", summary="half [b]remains[/b]", warnings=("asked for [x] less",))]
    draw.changes(full, screen)
    assert "prune-groups: half [b]remains[/b]\nprune-groups: warning: asked for [x] less\n" in text(screen)


@pytest.mark.parametrize(("calib", "of"), [("data.npz", "outputs"), ("synthetic", "outputs"), (None, "weights")])
def test_what_passes_did_to_each_layer(full: Report, screen: Console, calib: str | None, of: str) -> None:
    full.asked.options["calib"] = calib
    (change,) = full.passes[0].sites
    other = msgspec.structs.replace(change, node="second", method="auto", error=0.001, restored=True)
    full.passes.append(PassChange(name="factorize", summary="", sites=(other,)))
    draw.layers(full, screen)
    header, first, second = (" ".join(line.split()) for line in text(screen).splitlines())
    assert header == f"pass layer pattern method kept error of its {of}"
    assert first == "sparsify [b]fc[/b] block:4x1 sparsegpt 10.0% 43.21%"
    assert second == "factorize second block:4x1 auto, then restored 10.0% 0.10%"


def test_passes_that_changed_no_layer_have_no_table(full: Report, screen: Console) -> None:
    full.passes = [PassChange(name="prune-groups", summary="half")]
    draw.layers(full, screen)
    assert text(screen) == ""


def race_row(runtime: str, low: float, high: float) -> RaceRow:
    return RaceRow(shape="1x128", runtime=runtime, median_ms=2.0, p10_ms=low, p90_ms=high)


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([("onnxruntime", 1.9, 2.2), ("spa", 1.8, 2.4)], None),
        ([("onnxruntime", 1.9, 2.2), ("spa", 1.9, 3.5)], "spa at 1x128 are 80% of the median apart"),
        ([("onnxruntime", 0.9, 3.9), ("spa", 1.9, 3.5)], "onnxruntime at 1x128 are 150% of the median apart"),
        ([("onnxruntime", 1.9, 2.2), ("spa", 1.9, 2.2), ("portable", 1.0, 9.0)], None),  # not in the ratio
    ],
)
def test_a_ratio_from_a_busy_machine_is_called_rough(
    full: Report, screen: Console, rows: list[tuple[str, float, float]], told: str | None
) -> None:
    full.race = [race_row(*row) for row in rows]
    full.ratios *= 2
    draw.summary(full, Path("m-spa"), screen)
    lines = text(screen).splitlines()
    warnings = [i for i, line in enumerate(lines) if line.startswith("warning: the machine was busy during the race")]
    if told is None:
        assert warnings == []
        return
    (at,) = warnings
    assert "as fast as onnxruntime" in lines[at - 1]
    assert told in lines[at]
    assert "Run the same again when nothing else runs, with --records NEW_FILE" in lines[at]


def test_nothing_was_raced(full: Report, screen: Console) -> None:
    full.race, full.ratios = [], []
    draw.summary(full, Path("m-spa"), screen)
    assert "busy" not in text(screen)


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
    compile(draw.snippet(Path("it's here"), gpu=True), "snippet", "exec")


@pytest.mark.parametrize("target, there", [("cpu:x86-64-v4", False), ("cuda:sm_90", True)])
def test_a_model_for_gpus_is_loaded_with_their_provider(
    full: Report, screen: Console, target: str, there: bool
) -> None:
    full.failure = None
    full.asked = msgspec.structs.replace(full.asked, target=target)
    draw.summary(full, Path("m-spa"), screen)
    assert ("CUDAExecutionProvider" in text(screen)) == there


def test_rich_is_imported_only_when_something_is_drawn() -> None:
    code = "import sys, spa_compiler.report.console; sys.exit('rich' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
