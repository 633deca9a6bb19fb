"""Whole compilations and their records: a second one measures nothing, and several at once share a file."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import onnx
import pytest

from spa_compiler.compiler import Result, compile
from spa_compiler.placement import timer
from spa_compiler.placement.candidates import DENSE
from tests.networks import mlp

ROOT = Path(__file__).resolve().parents[1]
SHAPE = "x=1,4,64"
WIDTH = 64


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The contenders of every round of times that is taken in this process."""
    asked: list[list[str]] = []
    plain = timer.interleave

    def interleave(calls: Mapping[str, Callable[[], object]], budget_s: float, *rest: object) -> object:
        asked.append(list(calls))
        return plain(calls, 0.05, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(timer, "interleave", interleave)
    return asked


def compiled(folder: Path, **options: object) -> Result:
    return compile(
        folder / "model.onnx",
        folder / "out",
        shapes=[SHAPE],
        threads=1,
        records=folder / "records.sqlite",
        **options,  # type: ignore[arg-type]
    )


def test_a_second_compilation_measures_nothing(tmp_path: Path, counted: list[list[str]]) -> None:
    onnx.save(mlp(0.1, WIDTH), tmp_path / "model.onnx")
    first = compiled(tmp_path)
    trials = [names for names in counted if DENSE in names]
    tiles = [sum(" in " in name for name in names) for names in trials]
    assert set(tiles) == {0, 6}  # first the forms, then tiles of those that lead
    assert len(counted) > len(trials)  # the races
    files = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    counted.clear()
    again = compiled(tmp_path)
    assert counted == []
    assert again.report.race == first.report.race
    assert again.report.placements == first.report.placements
    for name, content in files.items():
        assert name == "report.json" or (tmp_path / "out" / name).read_bytes() == content
    compiled(tmp_path, tune_trials=0)
    assert [names for names in counted if DENSE in names]
    assert not any(" in " in name for names in counted for name in names)


def test_compilations_at_once_share_records(tmp_path: Path, counted: list[list[str]]) -> None:
    """They take turns at the clock, and what they leave answers a third one."""
    onnx.save(mlp(0.1, WIDTH), tmp_path / "model.onnx")
    command = [sys.executable, "-m", "spa_compiler.cli.compile", "model.onnx", "--shape", SHAPE, "--threads", "1", "-q"]
    command += ["--records", "records.sqlite"]
    processes = [
        subprocess.Popen(
            [*command, "-o", f"out{i}"],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        for i in range(2)
    ]
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert errors == ["", ""]
    assert [process.returncode for process in processes] == [0, 0]
    compiled(tmp_path)
    assert counted == []
    made = [
        {p.name: p.read_bytes() for p in (tmp_path / f).iterdir() if p.name != "report.json"} for f in ("out0", "out")
    ]
    assert made[0] == made[1]
