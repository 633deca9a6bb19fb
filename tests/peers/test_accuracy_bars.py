"""The accuracy that the project promises on real models, measured anew: hours on 2 cores. One test for each bar.

`pytest -s -m peers tests/peers/test_accuracy_bars.py -k "resnet56"`; every test prints its numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

import spa_compiler
from spa_compiler.bench import compare, engines
from spa_compiler.passes.recipe import from_command_line
from tests.peers import accuracy, accuracy_tables, sources
from tests.peers.accuracy_bars import BARS, TIMED, Bar, findings, judge, judge_memory, judge_time
from tests.peers.accuracy_calibration import evaluate
from tests.peers.accuracy_rows import DENSE, Rows
from tests.peers.accuracy_settings import METHODS, MODELS

pytestmark = [pytest.mark.peers, sources.needs_shared]

Measure = Callable[[str, str, Iterable[str]], Rows]

CALIBRATION = Path(accuracy.__file__).with_name("accuracy_calibration.py")
TOKENS = tuple(f"{name}=1,128" for name in ("input_ids", "attention_mask", "token_type_ids"))
RUNS = 60
FASTER = 1.6
DENSE_TOLERANCE = 0.01
"""Dense scores are stated with two decimals."""


@pytest.fixture(scope="session")
def measure(tmp_path_factory: pytest.TempPathFactory) -> Measure:
    """Rows of a setting, each measured once."""
    folder = tmp_path_factory.mktemp("accuracy")
    bench, rows, path = accuracy.Bench(folder), Rows(), folder / "accuracy.json"

    def run(model: str, setting: str, methods: Iterable[str]) -> Rows:
        chosen = MODELS[model]
        dense = accuracy.dense_row(chosen, rows, bench, path)
        for name in methods:
            if (model, setting, name) not in rows:
                row = bench.measure(chosen, chosen.setting(setting), METHODS[name], dense)
                print(f"\n{model}, {setting}, {name}: {accuracy_tables.told(row)}")
                rows.record(row, path)
        return rows

    return run


@pytest.mark.parametrize("bar", BARS, ids=lambda bar: f"{bar.model}: {bar.setting}, {bar.method}")
def test_no_more_is_lost_than_promised(bar: Bar, measure: Measure) -> None:
    verdict = judge(bar, measure(bar.model, bar.setting, bar.needs))
    print(f"\n{bar.model}, {bar.setting}: {verdict.shown}, wanted {bar.text}")
    assert verdict.holds


def test_a_pass_over_minilm_takes_minutes(measure: Measure) -> None:
    verdict = judge_time(measure(*TIMED[:2], [TIMED[2]]))
    print(f"\n{verdict.shown}")
    assert verdict.holds


def test_a_pass_over_minilm_needs_little_memory(measure: Measure) -> None:
    verdict = judge_memory(measure(*TIMED[:2], [TIMED[2]]))
    print(f"\n{verdict.shown}")
    assert verdict.holds


@pytest.mark.parametrize("name", MODELS)
def test_the_dense_model_scores_what_is_stated(name: str, measure: Measure) -> None:
    rows = measure(name, MODELS[name].settings[0].name, [])
    dense = rows[name, DENSE, DENSE]
    assert dense.score == pytest.approx(MODELS[name].dense, abs=DENSE_TOLERANCE)


def test_one_command_gives_speed_and_accuracy(tmp_path: Path) -> None:
    """`spa-compile minilm.onnx --calib ... --sparsity 0.5 --pattern block:4x1`"""
    folder, source = tmp_path / "artifact", sources.minilm()
    recipe, calib = from_command_line(sparsity=0.5, pattern="block:4x1"), f"{CALIBRATION}:minilm"
    spa_compiler.compile(source, folder, recipe=recipe, shapes=TOKENS, threads=1, calib=calib)
    metrics = evaluate()
    run = metrics.vision.session_run(str(folder / "model.onnx"), str(folder / "kernels.so"), threads=2)
    drop = MODELS["minilm"].dense - metrics.stsb_dev(run)
    models = compare.entries([source, folder])
    raced = compare.compare(models, engines.parse("onnxruntime"), machine="", threads=1, runs=RUNS, shapes=TOKENS)
    medians = {(row.model, row.runtime): row.median_ms for row in raced.rows}
    ratio = medians[source.name, "onnxruntime"] / medians[folder.name, engines.ARTIFACT.name]
    print(f"\n{ratio:.2f}x, drop {drop:.2f}")
    assert ratio >= FASTER
    (bar,) = [bar for bar in BARS if (bar.model, bar.setting) == ("minilm", "50% in 4x1 blocks")]
    assert bar.at_most is not None
    assert drop <= bar.at_most


def test_the_document_is_what_the_rows_say() -> None:
    assert accuracy.MARKDOWN.read_text(encoding="utf-8") == accuracy_tables.render(Rows.read(accuracy.JSON))


def test_where_a_paper_is_contradicted_the_reason_is_given() -> None:
    lost = [one for one in findings(Rows.read(accuracy.JSON)) if not one.holds and not one.why]
    assert not [f"{one.claim.method} over {one.claim.baseline}: {one.model}, {one.setting}" for one in lost]
