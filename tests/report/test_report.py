import re
from pathlib import Path

import msgspec
import pytest

from spa_compiler.artifact.manifest import ARTIFACT_VERSION
from spa_compiler.errors import ModelError
from spa_compiler.report import report as module
from spa_compiler.report.report import (
    Candidate,
    Check,
    OtherShape,
    PassChange,
    Placement,
    RaceRow,
    Ratio,
    Report,
    SiteChange,
    Sizes,
    read,
    shape_text,
)


def test_it_reads_back_what_it_wrote(full: Report, tmp_path: Path) -> None:
    assert full.write(tmp_path) == tmp_path / "report.json"
    again = read(tmp_path)
    assert again == full
    assert again.to_json() == full.to_json()


def test_it_has_the_keys_that_scripts_read(full: Report) -> None:
    content = msgspec.json.decode(full.to_json())
    candidate = content["placements"][0]["candidates"][0]
    assert set(candidate) == {"name", "median_us", "p10_us", "p90_us", "chosen"}
    assert {"node", "op", "n", "k", "tokens", "form", "pattern", "density", "reason", "would_help"} < set(
        content["placements"][0]
    )
    assert {"shape", "runtime", "median_ms", "p10_ms", "p90_ms"} < set(content["race"][0])
    assert content["asked"]["recipe"] == full.asked.recipe


@pytest.mark.parametrize(
    ("key", "struct", "also"),
    [
        ("passes", PassChange, SiteChange),
        ("placements", Placement, None),
        ("placements[].candidates", Candidate, None),
        ("race", RaceRow, None),
        ("ratios", Ratio, None),
        ("others", OtherShape, None),
        ("sizes", Sizes, None),
    ],
)
def test_the_documented_keys_are_there(key: str, struct: type, also: type | None) -> None:
    page = (Path(__file__).parents[2] / "docs" / "formats.md").read_text(encoding="utf-8")
    (line,) = [line for line in page.splitlines() if line.startswith(f"| `{key}` |")]
    told = set(re.findall(r"`(\w+)`", line.split("|", 2)[2]))
    fields = {*struct.__struct_fields__, *(also.__struct_fields__ if also else ())}  # type: ignore[attr-defined]
    assert fields <= told
    assert told - fields <= {"dense", "sparse", "unstructured", "onnxruntime", "spa"}  # values


def test_a_lone_report_is_known_as_ours() -> None:
    assert module.ARTIFACT_VERSION == ARTIFACT_VERSION


@pytest.mark.parametrize("content", [None, "", "{}", "[1]"])
def test_a_damaged_report(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "report.json").write_text(content)
    with pytest.raises(ModelError, match="report cannot be read"):
        read(tmp_path)


def test_the_worst_check_is_measured_in_tolerances(full: Report) -> None:
    def check(error: float | None, tolerance: float) -> Check:
        return Check(output="y", shape="1", threads=1, error=error, tolerance=tolerance, noise=0.0)

    full.checks = [check(1e-6, 1e-5), check(2e-6, 3e-6), check(0.0, 0.0)]
    assert full.worst_check() is full.checks[1]
    full.checks.append(check(None, 1e-5))
    assert full.worst_check() is full.checks[-1]
    assert [c.passed for c in full.checks] == [True, True, True, False]


def test_shapes_are_one_word_when_they_agree() -> None:
    assert shape_text({"a": (1, 128), "b": (1, 128)}) == "1x128"
    assert shape_text({"a": (1, 3, 8, 8), "b": ()}) == "a=1x3x8x8 b=scalar"
