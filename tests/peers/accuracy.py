"""docs/accuracy.md, and a table in README.md: what every method loses on real models, and whether the bars are met.

    python tests/peers/accuracy.py                                   what docs/accuracy.json lacks; many hours for all
    python tests/peers/accuracy.py --only minilm --setting "60*"     some models, settings, methods: names or globs
    python tests/peers/accuracy.py --method sparsegpt --fresh        anew, though the rows are there
    python tests/peers/accuracy.py --method "onnxsim*" --python onnxsim=/path/to/bin/python
    python tests/peers/accuracy.py --render                          both from the rows, nothing measured

Each compression runs in a process of its own and is written down when it is done, so a run that stops goes on where it
was. A row stays while the versions that it was measured with are the installed ones.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import importlib.util
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:  # as a script, Python looks beside this file alone
    sys.path.insert(0, str(ROOT))

import spa_compiler  # noqa: E402
from spa_compiler.graph.load import load  # noqa: E402
from spa_compiler.passes.sites import select  # noqa: E402
from spa_compiler.targets import host  # noqa: E402
from tests.peers import accuracy_calibration, accuracy_tables, graphs, sources  # noqa: E402
from tests.peers.accuracy_calibration import evaluate  # noqa: E402
from tests.peers.accuracy_process import watched  # noqa: E402
from tests.peers.accuracy_rows import DENSE, Row, Rows  # noqa: E402
from tests.peers.accuracy_settings import METHODS, MODELS, Method, Model, Setting, cells  # noqa: E402
from tests.peers.accuracy_settings import recipe as recipe_of  # noqa: E402

HERE = Path(__file__).resolve().parent
JSON = ROOT / "docs" / "accuracy.json"
MARKDOWN = ROOT / "docs" / "accuracy.md"
README = ROOT / "README.md"
BEGIN, END = "<!-- accuracy:begin -->", "<!-- accuracy:end -->"
SEED = 0
SCORING_THREADS = 2
LIBRARIES = ("onnxruntime", "numpy", "scipy")
SEMI_STRUCTURED = "2:4"
LINES_OF_ERROR = 6


class Failed(Exception):
    """A compression ended without a result and without a reason that it gave itself."""


class Absent(Exception):
    """Another tool is not installed here."""


@dataclass
class Bench:
    """Measures rows. `pythons` are interpreters that have a tool: `{"onnxsim": "/path/to/python"}`."""

    folder: Path
    pythons: dict[str, str] = field(default_factory=dict)

    def source(self, model: Model) -> Path:
        """The model as a plain ONNX file."""
        if model.file == "minilm_l6_v2":
            return sources.minilm()
        plain = graphs.MODELS / f"{model.file}.onnx"
        if plain.exists():
            return plain
        unpacked = self.folder / plain.name
        if not unpacked.exists():
            unpacked.write_bytes(evaluate().vision.model_bytes(graphs.MODELS / f"{model.file}.onnx.xz"))
        return unpacked

    def dense(self, model: Model) -> Row:
        """The model as it is."""
        begin = time.perf_counter()
        scores = _scores(model, self.source(model))
        seconds = round(time.perf_counter() - begin, 1)
        known: dict[str, Any] = {"versions": scoring_versions(), "scoring_seconds": seconds} | scores
        return Row(model=model.name, setting=DENSE, method=DENSE, **known)

    def measure(self, model: Model, setting: Setting, method: Method, dense: Row) -> Row:
        """Compresses and scores.

        Raises:
            Absent: the tool is not installed.
            Failed: its process died; the message has the last lines that it wrote.
        """
        output = self.folder / "compressed.onnx"
        known: dict[str, Any] = {
            "model": model.name,
            "setting": setting.name,
            "method": method.name,
            "versions": self.versions(method),
            "machine": machine(),
        }
        make = self._onnxsim if method.foreign else self._ours
        made = make(model, setting, method, output)
        known |= {key: value for key, value in made.items() if value is not None}
        if "refused" in made:
            return Row(**known)
        begin = time.perf_counter()
        scores = _scores(model, output)
        known["scoring_seconds"] = round(time.perf_counter() - begin, 1)
        if not all(map(math.isfinite, scores.values())):
            return Row(**known, refused="the score of what came out is not finite")
        known |= scores
        known["drop"] = _drop(model, scores["score"], dense.score)
        if "also" in scores:
            known["also_drop"] = _drop(model, scores["also"], dense.also)
        for file in self.folder.glob(f"{output.name}*"):
            file.unlink()
        return Row(**known)

    def versions(self, method: Method) -> dict[str, str]:
        """Of what a row of this method depends on.

        Raises:
            Absent: the tool is not installed.
        """
        if method.foreign:
            return scoring_versions() | {"onnxsim": _onnxsim_version(self._python())}
        return {"spa-compiler": spa_compiler.__version__} | {
            name: importlib.metadata.version(name) for name in LIBRARIES
        }

    def _ours(self, model: Model, setting: Setting, method: Method, output: Path) -> dict[str, Any]:
        plan = recipe_of(model, setting, method)
        calibration = f"{HERE / 'accuracy_calibration.py'}:{model.name}" if method.data else None
        job = {"model": str(self.source(model)), "calibration": calibration, "recipe": plan, "seed": SEED}
        made = self._run(sys.executable, "accuracy_ours.py", job | {"output": str(output)})
        return made | {"recipe": json.dumps(plan), "code": code()}

    def _onnxsim(self, model: Model, setting: Setting, method: Method, output: Path) -> dict[str, Any]:
        """onnxsim takes every weight it knows; only those of our sites are kept from what it made.

        Its methods look at one layer at a time and calibrate on the dense model, so this is what it would do if it
        could be told which layers to take.
        """
        n_m = {"n": 2, "m": 4} if setting.pattern == SEMI_STRUCTURED else {"sparsity": round(1 - setting.remains, 12)}
        job = {"model": str(self.source(model)), "method": method.options["method"], "options": n_m}
        job |= {"calibration": str(self._archive(model)), "output": str(self.folder / "onnxsim.onnx")}
        made = self._run(self._python(), "accuracy_onnxsim.py", job)
        kept, same = _take(self.source(model), Path(job["output"]), model.targets, output)
        notes = [f"{same} layers left dense by the tool"] if same else []
        notes += [f"calibrated with {model.peer_batches} of our batches"] if model.peer_batches else []
        return {key: made[key] for key in ("seconds", "memory")} | {"kept": kept, "note": ", ".join(notes)}

    def _python(self) -> str:
        if "onnxsim" in self.pythons:
            return self.pythons["onnxsim"]
        if importlib.util.find_spec("onnxsim") is None:
            raise Absent("onnxsim is not installed here: name an interpreter that has it, --python onnxsim=PATH")
        return sys.executable

    def _archive(self, model: Model) -> Path:
        """The calibration data as a file, for a process that cannot import what makes it."""
        path = self.folder / f"{model.name}.npz"
        if not path.exists():
            feeds = list(getattr(accuracy_calibration, model.name)())
            feeds = feeds[:: len(feeds) // (model.peer_batches or len(feeds))]
            arrays = {f"{i}/{name}": array for i, feed in enumerate(feeds) for name, array in feed.items()}
            with path.open("wb") as file:
                np.savez(file, **arrays)
        return path

    def _run(self, python: str, script: str, job: dict[str, Any]) -> dict[str, Any]:
        file = self.folder / "job.json"
        file.write_text(json.dumps(job), encoding="utf-8")
        done = watched([python, str(HERE / script), str(file)])
        if done.status:
            words = done.errors.strip().splitlines()[-LINES_OF_ERROR:]
            raise Failed("\n".join([f"its process ended with status {done.status}", *words]))
        made: dict[str, Any] = json.loads(done.out.strip().splitlines()[-1])
        if "seconds" in made:
            made["seconds"] = round(made["seconds"], 1)
        return made | {"memory": done.memory}


def _scores(model: Model, path: Path) -> dict[str, float]:
    """By `evaluate.py`."""
    metrics = evaluate()
    run = metrics.vision.session_run(str(path), threads=SCORING_THREADS)
    scores = {"score": float(metrics.METRICS[model.metric](run))}
    if model.also:
        scores["also"] = float(metrics.METRICS[model.also](run))
    return scores


def _drop(model: Model, score: float, dense: float | None) -> float:
    if dense is None:
        raise ValueError(f"{model.name} has no dense score")
    return 100 * (score / dense - 1) if model.perplexity else dense - score


def _take(source: Path, pruned: Path, targets: Sequence[str], output: Path) -> tuple[float, int]:
    """Writes the source with the pruned weights of our sites; gives the share that remains, and how many are as before.

    Raises:
        Failed: a weight is gone or has another shape.
    """
    theirs = {tensor.name: tensor for tensor in onnx.load(pruned).graph.initializer}
    proto = onnx.load(source)
    ours = {tensor.name: tensor for tensor in proto.graph.initializer}
    left = whole = same = 0
    for name in sorted({op.weight.name for op in select(load(source).graph, targets, ())[0]}):
        if name not in theirs or list(theirs[name].dims) != list(ours[name].dims):
            raise Failed(f"the pruned model has no weight {name!r} of shape {list(ours[name].dims)}")
        new = numpy_helper.to_array(theirs[name])
        same += int(np.array_equal(new, numpy_helper.to_array(ours[name])))
        left, whole = left + int(np.count_nonzero(new)), whole + new.size
        ours[name].CopyFrom(theirs[name])
    onnx.save(proto, output)
    return left / whole, same


# ---------------------------------------------------------------- what rows depend on


def scoring_versions() -> dict[str, str]:
    """Of what scores, whoever compressed."""
    return {"onnxruntime": importlib.metadata.version("onnxruntime")}


@cache
def _onnxsim_version(python: str) -> str:
    ask = "import importlib.metadata as m; print(m.version('onnxsim'))"
    done = subprocess.run([python, "-c", ask], capture_output=True, text=True, check=False)
    if done.returncode:
        raise Absent(f"{python} has no onnxsim: pip install onnxsim==0.8.1 there")
    return done.stdout.strip()


@cache
def code() -> str:
    """A digest of the package's sources."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / "spa_compiler").rglob("*.py")):
        digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def machine() -> str:
    """This machine in words."""
    cpu = host()
    return f"{cpu.model or cpu.name}, {cpu.cores_physical} cores"


# ---------------------------------------------------------------- the run


@dataclass(frozen=True)
class Cell:
    """One row to measure."""

    model: Model
    setting: Setting
    method: Method

    @property
    def text(self) -> str:
        """In words."""
        return f"{self.model.name}, {self.setting.name}, {self.method.name}"


def wanted(only: Sequence[str], settings: Sequence[str], methods: Sequence[str]) -> list[Cell]:
    """What names and globs select."""

    def chosen(name: str, globs: Sequence[str]) -> bool:
        return not globs or any(name == glob or fnmatchcase(name, glob) for glob in globs)

    return [
        Cell(model, setting, method)
        for model in MODELS.values()
        if chosen(model.name, only)
        for setting, method in cells(model)
        if chosen(setting.name, settings) and chosen(method.name, methods)
    ]


def missing(queue: Sequence[Cell], rows: Rows, bench: Bench, *, fresh: bool) -> list[Cell]:
    """What has no row of these versions. Tools that are not here are named once, and their cells left as they are."""
    absent: set[str] = set()
    found = []
    for cell in queue:
        row = rows.get((cell.model.name, cell.setting.name, cell.method.name))
        try:
            versions = bench.versions(cell.method)
            if fresh or row is None or row.versions != versions:
                found.append(cell)
        except Absent as error:
            absent.add(str(error))
    for reason in sorted(absent):
        say(f"SKIPPED: {reason}")
    return found


def expected(cell: Cell, rows: Rows) -> float | None:
    """Seconds that a cell takes, by what rows of its model and method, or else of its model, took."""
    of_model = [row for row in rows.values() if row.model == cell.model.name and row.seconds is not None]
    of_method = [row for row in of_model if row.method == cell.method.name]
    took = [(row.seconds or 0) + row.scoring_seconds for row in of_method or of_model]
    return sum(took) / len(took) if took else None


def left(queue: Sequence[Cell], rows: Rows) -> str:
    """How long the rest takes, as far as that is known."""
    known = [seconds for cell in queue if (seconds := expected(cell, rows)) is not None]
    if not known:
        return ""
    return f"; about {sum(known) / len(known) * len(queue) / 60:.0f} minutes left"


def say(text: str) -> None:
    """Progress, at once."""
    print(text, file=sys.stderr, flush=True)


def measure_all(queue: Sequence[Cell], rows: Rows, bench: Bench, path: Path) -> int:
    """Measures, saving after each row; gives how many failed."""
    failures = 0
    for done, cell in enumerate(queue):
        say(f"[{done + 1}/{len(queue)}] {cell.text}{left(queue[done:], rows)}")
        try:
            row = bench.measure(cell.model, cell.setting, cell.method, dense_row(cell.model, rows, bench, path))
        except Failed as error:
            failures += 1
            say(f"    FAILED: {error}")
            continue
        rows.record(row, path)
        say(f"    {accuracy_tables.told(row)}")
    return failures


def dense_row(model: Model, rows: Rows, bench: Bench, path: Path) -> Row:
    """The model as it is, measured once for each version of what scores it."""
    row = rows.get((model.name, DENSE, DENSE))
    if row is None or row.versions != scoring_versions():
        row = bench.dense(model)
        rows.record(row, path)
        say(f"    dense {model.name}: {row.score:.4f}")
    return row


def main() -> int:
    """Options in, files out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", default=[], metavar="MODEL", help=f"one of {', '.join(MODELS)}")
    parser.add_argument("--setting", action="append", default=[], metavar="NAME", help='such as "60%% unstructured"')
    parser.add_argument("--method", action="append", default=[], metavar="NAME", help=f"one of {', '.join(METHODS)}")
    parser.add_argument("--fresh", action="store_true", help="measure what is there as well")
    parser.add_argument("--render", action="store_true", help="docs/accuracy.md from the JSON alone")
    parser.add_argument("--python", action="append", default=[], metavar="onnxsim=PATH", help="where a tool is")
    parser.add_argument("--json", type=Path, default=JSON, metavar="FILE", help="default docs/accuracy.json")
    options = parser.parse_args()
    pythons = dict(item.partition("=")[::2] for item in options.python)
    rows = Rows.read(options.json)
    failures = 0
    if not options.render:
        if not sources.have_shared():
            parser.error(f"the models are not there: {sources.SHARED}")
        queue = wanted(options.only, options.setting, options.method)
        if not queue:
            parser.error("no model, setting and method has such names")
        with tempfile.TemporaryDirectory(prefix="spa-accuracy-") as folder:
            bench = Bench(Path(folder), pythons)
            for model in {cell.model.name: cell.model for cell in queue}.values():
                dense_row(model, rows, bench, options.json)
            failures = measure_all(missing(queue, rows, bench, fresh=options.fresh), rows, bench, options.json)
    stale = sum(1 for row in rows.values() if row.code and row.code != code())
    if stale:
        say(f"{stale} rows were measured with other sources of this package: --fresh measures them anew")
    if options.json.resolve() == JSON:
        MARKDOWN.write_text(accuracy_tables.render(rows), encoding="utf-8")
        before, _, rest = README.read_text(encoding="utf-8").partition(BEGIN)
        after = rest.partition(END)[2]
        README.write_text(f"{before}{BEGIN}\n{accuracy_tables.brief(rows)}\n{END}{after}", encoding="utf-8")
    else:
        print(accuracy_tables.render(rows), end="")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
