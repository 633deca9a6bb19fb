"""The accuracy benchmark's own arithmetic: what is kept, what a bar and a paper's claim say about it, what is shown."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import msgspec
import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import numpy_helper

from spa_compiler.passes.factorize_options import Asked
from spa_compiler.passes.methods import METHODS as ZEROING
from spa_compiler.passes.recipe import from_yaml
from tests.peers import accuracy, accuracy_ours, accuracy_tables
from tests.peers.accuracy_bars import BARS, CLAIMS, Bar, Than, findings, judge, judge_memory, judge_time
from tests.peers.accuracy_ours import facts
from tests.peers.accuracy_process import watched
from tests.peers.accuracy_rows import DENSE, Row, Rows
from tests.peers.accuracy_settings import CONTROLS, HALF, METHODS, MODELS, TWO_OF_FOUR, cells, recipe

MEBI = 1 << 20
U60 = "60% unstructured"


def rows(**drops: float) -> Rows:
    made = [Row(model="minilm", setting=U60, method=name, versions={}, drop=drop) for name, drop in drops.items()]
    return Rows({row.key: row for row in made})


def test_every_method_of_sparsify_and_factorize_is_measured_somewhere() -> None:
    measured = [method for model in MODELS.values() for _, method in cells(model)]
    assert {method.name for method in measured} == set(METHODS)
    from_files = {"scores", "masks"}
    options = [method.options for method in measured if method.pass_name == "sparsify"]
    assert {option["method"] for option in options} == set(ZEROING) - from_files
    low_rank = {method.options["method"] for method in measured if method.pass_name == "factorize"}
    assert low_rank == set(get_args(Asked))


def bar(at_most: float | None, *than: Than) -> Bar:
    return Bar("minilm", U60, "auto", at_most, than)


def two_layers() -> onnx.ModelProto:
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["": 17]> g (float[1, 4] x) => (float[1, 2] y)'
        " { h = MatMul(x, a) r = Relu(h) y = MatMul(r, b) }"
    )
    rng = np.random.default_rng(0)
    for name, shape in (("a", (4, 4)), ("b", (4, 2))):
        model.graph.initializer.append(numpy_helper.from_array(rng.normal(size=shape).astype(np.float32), name))
    return model


@pytest.mark.parametrize(
    "limit, drops, holds",
    [
        (bar(0.1), {"auto": 0.1}, True),
        (bar(0.1), {"auto": 0.11}, False),
        (bar(0.1), {"magnitude": 0.0}, None),
        (bar(0.6, Than(("svd",), factor=0.5)), {"auto": 0.5, "svd": 1.0}, True),
        (bar(0.6, Than(("svd",), factor=0.5)), {"auto": 0.5, "svd": 0.9}, False),
        (bar(0.6, Than(("svd",), factor=0.5)), {"auto": 0.7, "svd": 2.0}, False),
        (bar(0.6, Than(("svd",), factor=0.5)), {"auto": 0.5}, None),
        (bar(None, Than(("svd", "wanda"), less=True)), {"auto": 0.5, "svd": 0.5, "wanda": 1.0}, False),
        (bar(None, Than(("svd", "wanda"), less=True)), {"auto": 0.4, "svd": 0.5, "wanda": 1.0}, True),
        (bar(None, Than(("svd",), plus=0.25)), {"auto": -0.25, "svd": -0.5}, True),
        (bar(None, Than(("svd",), plus=0.25)), {"auto": -0.2, "svd": -0.5}, False),
    ],
)
def test_a_bar_is_judged_by_its_rows(limit: Bar, drops: dict[str, float], holds: bool | None) -> None:
    assert judge(limit, rows(**drops)).holds is holds


def test_time_and_memory_have_bars() -> None:
    for seconds, memory, holds in ((179.0, 1_200_000_000, True), (181.0, 1_300_000_000, False)):
        row = Row(model="minilm", setting=U60, method="sparsegpt", versions={}, seconds=seconds, memory=memory)
        found = Rows({row.key: row})
        assert (judge_time(found).holds, judge_memory(found).holds) == (holds, holds)


def test_claims_compare_in_their_own_settings() -> None:
    found = {(f.claim.method, f.claim.baseline): f.holds for f in findings(rows(sparsegpt=0.5, wanda=1.0, admm=1.5))}
    assert found == {("sparsegpt", "wanda"): True, ("admm", "wanda"): False}


def test_a_claim_with_a_factor_is_a_limit_and_one_without_wants_less() -> None:
    assert [one.holds for one in findings(rows(whitened=0.5, svd=1.0))] == [True]
    assert [one.holds for one in findings(rows(whitened=0.6, svd=1.0))] == [False]
    assert [one.holds for one in findings(rows(sparsegpt=1.0, wanda=1.0))] == [False]


def test_a_claim_is_about_its_settings_alone() -> None:
    """Wanda's paper prunes hard; at 80 % it promises nothing here."""
    made = [
        Row(model="minilm", setting="80% unstructured", method=name, versions={}, drop=drop)
        for name, drop in (("wanda", 2.0), ("magnitude + data", 1.0), ("magnitude", 1.0), ("random", 2.0))
    ]
    assert [one.claim.method for one in findings(Rows({row.key: row for row in made}))] == ["magnitude"]


def test_rows_of_other_versions_are_measured_again() -> None:
    (cell,) = accuracy.wanted(["minilm"], [U60], ["wanda"])
    bench = accuracy.Bench(Path())
    row = Row(model="minilm", setting=U60, method="wanda", versions=bench.versions(cell.method), drop=1.0)
    old = Row(model="minilm", setting=U60, method="wanda", versions={"numpy": "1"}, drop=1.0)
    assert accuracy.missing([cell], Rows({row.key: row}), bench, fresh=False) == []
    assert accuracy.missing([cell], Rows({row.key: row}), bench, fresh=True) == [cell]
    assert accuracy.missing([cell], Rows({old.key: old}), bench, fresh=False) == [cell]
    assert accuracy.missing([cell], Rows(), bench, fresh=False) == [cell]


def test_a_tool_that_is_not_there_leaves_its_rows_alone() -> None:
    queue = accuracy.wanted(["minilm"], [U60], ["onnxsim wanda", "wanda"])
    bench = accuracy.Bench(Path(), {"onnxsim": "/bin/false"})
    assert [cell.method.name for cell in accuracy.missing(queue, Rows(), bench, fresh=True)] == ["wanda"]


def test_digits_that_say_nothing_are_left_out() -> None:
    found = Row(model="minilm", setting=U60, method="random", versions={}, drop=-0.001, score=86.0)
    assert accuracy_tables.told(found) == "drop 0.00, score 86.000"
    assert accuracy_tables.told(msgspec.structs.replace(found, drop=12345.0)) == "drop > 1000, score 86.000"


def test_the_document_has_what_was_refused() -> None:
    row = Row(model="minilm", setting=U60, method="dass", versions={}, refused="no gated block")
    text = accuracy_tables.render(Rows({row.key: row}))
    assert f"- minilm, {U60}, dass: no gated block" in text


def test_bars_and_claims_name_what_is_measured() -> None:
    for limit in BARS:
        assert set(limit.needs) <= set(MODELS[limit.model].setting(limit.setting).methods)
    compared = {name for model in MODELS.values() for setting in model.settings for name in setting.methods}
    assert {name for claim in CLAIMS for name in (claim.method, claim.baseline)} <= compared
    assert compared == set(METHODS)


def test_every_column_has_the_controls() -> None:
    assert all(set(CONTROLS) <= set(setting.methods) for model in MODELS.values() for setting in model.settings)


def test_recipes_have_the_budget_and_the_pattern() -> None:
    model, setting = MODELS["efficientnet_lite0"], MODELS["efficientnet_lite0"].settings[0]
    (step,) = recipe(model, setting, METHODS["auto"])["passes"]
    assert step == {
        "name": "sparsify",
        "method": "auto",
        "targets": ["Conv"],
        "pattern": "unstructured",
        "sparsity": 0.3,
    }
    (step,) = recipe(MODELS["minilm"], TWO_OF_FOUR, METHODS["wanda"])["passes"]
    assert step == {"name": "sparsify", "method": "wanda", "allocate": "uniform", "pattern": "2:4"}
    (step,) = recipe(MODELS["minilm"], HALF, METHODS["sparse-low-rank"])["passes"]
    assert step == {"name": "factorize", "method": "sparse-low-rank", "params": 0.5}


@pytest.mark.parametrize("name", MODELS)
def test_the_passes_take_every_recipe(name: str) -> None:
    for setting, method in cells(MODELS[name]):
        if not method.foreign:
            from_yaml(json.dumps(recipe(MODELS[name], setting, method)))


def test_two_runs_fill_one_file(tmp_path: Path) -> None:
    path = tmp_path / "accuracy.json"
    first, second = Rows.read(path), Rows.read(path)
    first.record(Row(model="minilm", setting=U60, method="wanda", versions={}, drop=1.0), path)
    second.record(Row(model="minilm", setting=DENSE, method=DENSE, versions={}, score=86.0), path)
    assert [row.method for row in Rows.read(path).values()] == [DENSE, "wanda"]
    assert Rows.read(path) == second


def test_a_drop_above_zero_is_worse() -> None:
    assert accuracy._drop(MODELS["minilm"], 86.0, 86.5) == pytest.approx(0.5)
    assert accuracy._drop(MODELS["stories260k"], 4.4, 4.0) == pytest.approx(10.0)


def test_the_table_marks_the_best_and_what_is_not_met() -> None:
    found = rows(auto=0.2, sparsegpt=0.3)
    text = accuracy_tables.render(found)
    assert "| auto | **0.20** |" in text
    assert "| minilm | 60% unstructured | auto | at most 0.1 | 0.20 | **not met** |" in text
    assert "| minilm | 70% unstructured | auto | at most 0.9 | not measured | - |" in text


def test_only_our_sites_are_taken_from_another_tool(tmp_path: Path) -> None:
    model = two_layers()
    onnx.save(model, tmp_path / "source.onnx")
    first = numpy_helper.to_array(model.graph.initializer[0]).copy()
    first[:3] = 0
    for tensor, values in zip(model.graph.initializer, (first, np.zeros((4, 2), np.float32)), strict=True):
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    onnx.save(model, tmp_path / "pruned.onnx")
    kept, same = accuracy._take(tmp_path / "source.onnx", tmp_path / "pruned.onnx", (), tmp_path / "out.onnx")
    assert (kept, same) == (0.25, 0)
    out = {t.name: numpy_helper.to_array(t) for t in onnx.load(tmp_path / "out.onnx").graph.initializer}
    np.testing.assert_array_equal(out["a"], first)
    assert np.count_nonzero(out["b"]) == out["b"].size  # it reaches the output bare, and our passes leave it alone


def test_what_a_report_says() -> None:
    sites = [
        SimpleNamespace(weight="a", density_after=0.5, error=0.1, method="auto"),
        SimpleNamespace(weight="b", density_after=1.0, error=0.3, method="auto"),
        SimpleNamespace(weight="c", density_after=1.0, error=0.0, method="refit"),  # was not to be compressed
    ]
    report = SimpleNamespace(passes=[SimpleNamespace(sites=sites, got={})], output_change=0.25)
    found = facts(report, {"a": 4, "b": 12, "c": 16}, data=True)
    assert found == {"kept": pytest.approx(14 / 16), "site_error": pytest.approx(0.2), "holdout": 0.25}
    assert facts(report, {"a": 4, "b": 12}, data=False)["site_error"] is None
    report.passes[0].got = {"params": 0.7}
    assert facts(report, {}, data=True)["kept"] == 0.7


def test_a_job_of_ours(tmp_path: Path) -> None:
    onnx.save(two_layers(), tmp_path / "source.onnx")
    plan = {"version": 1, "passes": [{"name": "sparsify", "sparsity": 0.5, "method": "magnitude"}]}
    job = {"model": str(tmp_path / "source.onnx"), "calibration": None, "recipe": plan, "seed": 0}
    made = accuracy_ours.run(job | {"output": str(tmp_path / "out.onnx")})
    assert (made["kept"], made["site_error"]) == (0.5, None)
    (first, _) = onnx.load(tmp_path / "out.onnx").graph.initializer
    assert np.count_nonzero(numpy_helper.to_array(first)) == 8


def test_what_the_package_refuses_is_a_row() -> None:
    job = {"model": "", "calibration": "", "recipe": {"version": 1, "passes": ["nothing"]}, "seed": 0, "output": ""}
    assert "nothing" in accuracy_ours.run(job)["refused"]


def test_memory_counts_the_process_and_its_children() -> None:
    hold = "x = bytearray(b'1') * (64 << 20); import time; time.sleep(5)"
    child = (
        f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {hold!r}]); {hold}; p.wait(); print(1)"
    )
    done = watched([sys.executable, "-c", child])
    assert (done.status, done.out) == (0, "1\n")
    assert 128 * MEBI <= done.memory < 256 * MEBI


def test_a_process_that_dies_leaves_its_words() -> None:
    done = watched([sys.executable, "-c", "raise SystemExit('no such thing')"])
    assert (done.status, done.errors) == (1, "no such thing\n")
