"""spa-bench: model files and artifact folders, the runtimes to race them against, and the result as data."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from spa_compiler.bench.engines import ARTIFACT, ENGINES, Engine, prepare
from spa_compiler.bench.race import Absent, Contender, Times, race
from spa_compiler.calibration.examples import example_feeds
from spa_compiler.calibration.shapes import default_shapes, parse_shapes
from spa_compiler.errors import EnvironmentFault, ModelError, UsageError
from spa_compiler.graph.load import load
from spa_compiler.graph.model import Model
from spa_compiler.graph.session import Feeds
from spa_compiler.report.report import Ratio, shape_text

_log = logging.getLogger(__name__)

_SEED = 7
#: feeds that static quantization sees
_CALIBRATION_FEEDS = 4
Shapes = dict[str, tuple[int, ...]]


class Row(msgspec.Struct, frozen=True):
    """One model in one runtime at one shape."""

    model: str
    runtime: str
    shape: str
    median_ms: float
    p10_ms: float
    p90_ms: float
    version: str  # of the runtime
    error: float | None  # of its outputs, against what it is compared with in ONNX Runtime; null: not comparable


class Skip(msgspec.Struct, frozen=True):
    """A model in a runtime that did not run it."""

    model: str
    runtime: str
    shape: str
    reason: str


class Result(msgspec.Struct, frozen=True):
    """What `spa-bench --json` prints."""

    machine: str
    threads: int
    runs: int
    rows: list[Row]
    ratios: list[Ratio]  # above 1: `model` is the faster
    skipped: list[Skip]


@dataclass(frozen=True)
class Entry:
    """One of the models named on the command line."""

    name: str
    path: Path  # the file to load in any runtime: the model, or an artifact's portable.onnx
    folder: Path | None = None  # of an artifact
    source: str = ""  # the name of the file that an artifact was made from

    @property
    def library(self) -> Path | None:
        """kernels.so; None in an artifact that has none."""
        path = self.folder / "kernels.so" if self.folder else None
        return path if path and path.exists() else None


def entries(paths: Sequence[Path]) -> list[Entry]:
    """What the paths name; two with the same last part keep their whole paths as names.

    Raises:
        ModelError: no such file, or a folder that is no artifact.
    """
    found: list[Entry] = []
    last = [path.resolve().name for path in paths]
    for path, name in zip(paths, last, strict=True):
        label = name if last.count(name) == 1 else str(path)
        if not path.is_dir():
            if not path.exists():
                raise ModelError("no such file", where=str(path))
            found.append(Entry(label, path))
            continue
        for needed in ("model.onnx", "portable.onnx"):
            if not (path / needed).is_file():
                fix = "Name a folder that spa-compile wrote, or an .onnx file"
                raise ModelError(f"the folder has no {needed}, so it is no artifact", where=str(path), fix=fix)
        found.append(Entry(label, path / "portable.onnx", path, _source_name(path / "manifest.json")))
    return found


def compare(
    models: Sequence[Entry],
    engines: Sequence[Engine],
    *,
    machine: str,
    threads: int,
    runs: int,
    shapes: Sequence[str] = (),
    pythons: Mapping[str, str] | None = None,
    progress: Callable[[str, int, int], None] = lambda *_: None,
) -> Result:
    """Races all models at every shape, one race for each shape.

    A model file runs in every engine. An artifact runs as it is (runtime "spa"), its portable.onnx in ONNX Runtime,
    and, when no model file is named to compare with, portable.onnx in the other engines too.

    Args:
        machine: a text for the result.
        shapes: as `--shape` takes them; none: what the first model's signature allows.
        pythons: engine name -> interpreter.

    Raises:
        UsageError: a shape that does not fit.
        ModelError: a model that does not load, or does not run in ONNX Runtime.
        EnvironmentFault: none of them runs.
    """
    pythons = pythons or {}
    loaded = [load(entry.path) for entry in models]
    # Models with the same inputs get the very same arrays.
    loaded = [loaded[0] if inputs_of(model) == inputs_of(loaded[0]) else model for model in loaded]
    wanted = [shapes_of(shapes, model) for model in loaded]
    rows: list[Row] = []
    ratios: list[Ratio] = []
    skipped: list[Skip] = []
    for index in range(len(wanted[0])):
        contenders: list[Contender] = []
        for entry, model, own in zip(models, loaded, wanted, strict=True):
            shapes_here = own[min(index, len(own) - 1)]
            able, unable = _contenders(entry, models, model, shapes_here, engines, pythons)
            contenders += able
            skipped += unable
        done: list[tuple[Contender, Times]] = []
        for contender, times in zip(
            contenders, race(contenders, threads=threads, runs=runs, progress=progress), strict=True
        ):
            if isinstance(times, Absent):
                skipped.append(Skip(contender.model, contender.engine.name, _shape(contender), times.reason))
            else:
                done.append((contender, times))
        rows += [_row(contender, times, _reference(contender, models, done)) for contender, times in done]
        ratios += _ratios(models, done)
    if not rows:
        raise EnvironmentFault(
            "no engine could run",
            fix="Install onnxruntime or openvino with pip, or name another one with --against",
        )
    return Result(machine, threads, runs, rows, ratios, skipped)


def parse_pythons(options: Sequence[str]) -> dict[str, str]:
    """`ENGINE=PATH` options as a dict.

    Raises:
        UsageError: not of that form, or an unknown engine.
    """
    known = (*ENGINES, ARTIFACT.name)
    result: dict[str, str] = {}
    for option in options:
        name, equals, path = option.partition("=")
        if not equals or not path or name not in known:
            fix = f"Write ENGINE=PATH with one of {', '.join(known)}"
            raise UsageError(f"--python {option!r} names no engine and interpreter", fix=fix)
        result[name] = path
    return result


def _source_name(manifest: Path) -> str:
    """The name of the model an artifact was made from; nothing when the manifest cannot say."""
    try:
        return str(msgspec.json.decode(manifest.read_bytes())["source"]["name"])
    except (OSError, msgspec.DecodeError, KeyError, TypeError):
        _log.warning("%s does not say which model the artifact was made from", manifest)
        return ""


def python_of(entry: Entry, pythons: Mapping[str, str]) -> str:
    """The interpreter that a model runs in, in ONNX Runtime as it is."""
    own = pythons.get(ARTIFACT.name) if entry.folder else None
    return own or pythons.get("onnxruntime") or sys.executable


def shapes_of(options: Sequence[str], model: Model) -> list[Shapes]:
    """The sets of shapes to measure at: what `--shape` says, else what the signature allows."""
    return parse_shapes(options, model) if options else [default_shapes(model)]


def inputs_of(model: Model) -> list[tuple[str, str]]:
    """Names and types: models that agree in them take the same feeds."""
    return [(value.name, str(value.dtype)) for value in model.signature.inputs]


def drawn(model: Model, shapes: Shapes, seed: int = _SEED) -> Feeds:
    """Inputs for all contenders of a race."""
    return example_feeds(model, shapes, np.random.default_rng(seed))


def _base(entry: Entry, models: Sequence[Entry]) -> Entry:
    """What an artifact is compared with: the file it was made from, else the first file named, else its portable."""
    files = [other for other in models if not other.folder]
    named = [other for other in files if entry.source and other.path.name == entry.source]
    return (named or files or [entry])[0]


def _contenders(
    entry: Entry,
    models: Sequence[Entry],
    model: Model,
    shapes: Shapes,
    engines: Sequence[Engine],
    pythons: Mapping[str, str],
) -> tuple[list[Contender], list[Skip]]:
    """An entry in every engine; and in which it cannot be."""
    feeds = drawn(model, shapes)
    result: list[Contender] = []
    skipped: list[Skip] = []
    chosen = list(engines)
    if entry.folder:
        python = python_of(entry, pythons)
        result.append(
            Contender(entry.name, ARTIFACT, entry.folder / "model.onnx", feeds, library=entry.library, python=python)
        )
        default = ENGINES["onnxruntime"]
        alone = _base(entry, models) is entry
        chosen = [default, *(e for e in engines if e is not default)] if alone else [default]
    for engine in chosen:
        required = engine.form == "" and engine.loader == "onnxruntime"
        try:
            path = prepare(engine, entry.path, [drawn(model, shapes, seed) for seed in range(_CALIBRATION_FEEDS)])
        except Exception as error:  # noqa: BLE001, a tool that fails on this model must not stop the others
            reason = " ".join(f"cannot be prepared: {type(error).__name__}: {error}".split())
            skipped.append(Skip(_label(entry), engine.name, shape_text(_sizes(feeds)), reason))
            _log.warning("left out: %s in %s %s", _label(entry), engine.name, reason)
            continue
        python = pythons.get(engine.name, sys.executable)
        result.append(Contender(_label(entry), engine, path, feeds, python=python, required=required))
    return result, skipped


def _label(entry: Entry) -> str:
    return f"{entry.name}/portable.onnx" if entry.folder else entry.name


def _sizes(feeds: Feeds) -> Shapes:
    return {name: value.shape for name, value in feeds.items()}


def _shape(contender: Contender) -> str:
    return shape_text(_sizes(contender.feeds))


def _row(contender: Contender, times: Times, reference: Times | None) -> Row:
    return Row(
        model=contender.model,
        runtime=contender.engine.name,
        shape=_shape(contender),
        median_ms=times.percentile(50),
        p10_ms=times.percentile(10),
        p90_ms=times.percentile(90),
        version=times.version,
        error=times.error(reference) if reference else None,
    )


def _reference(contender: Contender, models: Sequence[Entry], done: Sequence[tuple[Contender, Times]]) -> Times | None:
    """What ONNX Runtime, with default options, makes of the model that a contender's is compared with."""
    (entry,) = [entry for entry in models if contender.model in (entry.name, _label(entry))]
    base = _label(_base(entry, models) if entry.folder else entry)
    found = [times for other, times in done if (other.model, other.engine.name) == (base, "onnxruntime")]
    return found[0] if found else None


def _ratios(models: Sequence[Entry], done: Sequence[tuple[Contender, Times]]) -> list[Ratio]:
    """Every artifact over its base in each engine and over its portable; every later file over the first, alike."""
    result: list[Ratio] = []
    for entry in models:
        base = _base(entry, models)
        if not entry.folder and base is entry:
            continue
        for contender, times in done:
            if contender.model != entry.name:
                continue
            for other, theirs in done:
                if other.model != _label(base) or (not entry.folder and other.engine != contender.engine):
                    continue
                ratio = times.ratio(theirs)
                result.append(Ratio(model=entry.name, over=other.engine.name, shape=_shape(contender), ratio=ratio))
            for other, theirs in done:
                if entry.folder and base is not entry and other.model == _label(entry):
                    ratio = times.ratio(theirs)
                    result.append(Ratio(model=entry.name, over="portable", shape=_shape(contender), ratio=ratio))
    return result
