"""docs/peers.md: six models with zeros in them, in every engine that is here and in ours, on the same files, in turns.

    python tests/peers/peers_race.py                       what docs/peers.json lacks; hours for all
    python tests/peers/peers_race.py --only bert           some races, by the beginning of their names
    python tests/peers/peers_race.py --only yolo --fresh   anew, though they are there
    python tests/peers/peers_race.py --quick               few runs, BERT cut to two layers; goes to build/ alone
    python tests/peers/peers_race.py --render              the page from docs/peers.json, nothing measured

Each race is written down when it is done, so a run that stops goes on where it was. An engine that does not run has the
reason in its row. DeepSparse runs in an interpreter of its own, `--python deepsparse=PATH`; its numbers are kept in
build/peers.json and build/peers.md, which are not committed.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:  # as a script, Python looks beside this file alone
    sys.path.insert(0, str(ROOT))

import spa_compiler  # noqa: E402
from spa_compiler.bench import compare, engines  # noqa: E402
from spa_compiler.errors import SpaError  # noqa: E402
from spa_compiler.placement.nodes import DOMAIN  # noqa: E402
from tests.peers import peers_plot, peers_tables, sources, tables  # noqa: E402
from tests.peers.peers_rows import Peers, Race, Row, publishable, read, read_for, write  # noqa: E402
from tests.peers.tables import Form  # noqa: E402

JSON, PAGE, PLOT = (ROOT / "docs" / f"peers.{suffix}" for suffix in ("json", "md", "svg"))
LOCAL, LOCAL_PAGE, LOCAL_PLOT = (ROOT / "build" / f"peers.{suffix}" for suffix in ("json", "md", "svg"))
QUICK = ROOT / "build" / "peers-quick.json"
RUNS, BERT_RUNS, QUICK_RUNS = 100, 30, 6  # of each contender: seconds for a race, half a minute for BERT
LINE_OF_REASON = 200

B90, U90, U80, U50 = (
    Form(0.9, "block:4x1"),
    Form(0.9, "unstructured"),
    Form(0.8, "unstructured"),
    Form(0.5, "unstructured"),
)


@dataclass(frozen=True)
class Entry:
    """A model at a shape. `source` is asked when it runs, so that only what is raced is built."""

    name: str
    model: str
    source: Callable[[bool], Path]  # True: a smaller one, to try the script
    shape: str  # as the tables say it
    shapes: tuple[str, ...]
    forms: tuple[Form, ...]
    runs: int = RUNS


@dataclass(frozen=True)
class Start:
    """A race to run."""

    entry: Entry
    form: Form

    @property
    def key(self) -> str:
        """What it is found by."""
        return f"{self.entry.name} {self.form.text}"


def _encoder(name: str, model: str, source: Callable[[bool], Path], length: int, runs: int = RUNS) -> Entry:
    shapes = tuple(f"{name}=1,{length}" for name in ("input_ids", "attention_mask", "token_type_ids"))
    return Entry(name, model, source, f"1x{length}", shapes, (B90, U90, U80, U50), runs)


def _bert(quick: bool) -> Path:
    return sources.bert_base(tables.QUICK_LAYERS) if quick else sources.bert_base()


def _llama(past: int) -> Entry:
    cache = f"1,8,{past},64"
    shapes = ("hidden=1,1,2048", "position=1,1", f"past_key={cache}", f"past_value={cache}")
    name = f"Llama 3.2 1B block, one token, {past} in the cache"
    return Entry(f"llama-{past}", name, lambda _: sources.llama_block(), "1x1x2048", shapes, (B90, U90, U50))


ENTRIES = (
    _encoder("bert-128", "BERT-base", _bert, 128, BERT_RUNS),
    _encoder("bert-16", "BERT-base", _bert, 16),
    _encoder("minilm-128", "MiniLM-L6", lambda _: sources.minilm(), 128),
    Entry("resnet50", "ResNet-50", lambda _: sources.resnet50(), "1x3x224x224", ("input=1,3,224,224",), (B90, U90)),
    Entry(
        "mobilenet", "MobileNetV2", lambda _: sources.mobilenet_v2(), "1x3x224x224", ("input=1,3,224,224",), (B90, U80)
    ),
    Entry("yolo", "YOLO C2f (nano)", lambda _: sources.yolo_c2f(), "1x3x160x160", ("image=1,3,160,160",), (B90, U90)),
    _llama(128),
    _llama(512),
)
STARTS = tuple(Start(entry, form) for entry in ENTRIES for form in entry.forms)
ORDER = [start.key for start in STARTS]


def measure(start: Start, workspace: Path, pythons: Mapping[str, str], *, quick: bool) -> Race:
    """Writes the file with zeros, compiles it without any recipe, and races all.

    Raises:
        SpaError: ours fails, or ONNX Runtime does.
    """
    begin = time.perf_counter()
    entry, form = start.entry, start.form
    here, absent = present(pythons)
    file = sources.with_zeros(entry.source(quick), form.sparsity, form.pattern)
    folder = workspace / "artifact"
    spa_compiler.compile(file, folder, shapes=entry.shapes, threads=1, force=True)
    result = compare.compare(
        compare.entries([file, folder]),
        [engine for engine in engines.ENGINES.values() if engine.name not in absent],
        machine=tables.machine(),
        threads=1,
        runs=QUICK_RUNS if quick else entry.runs,
        shapes=entry.shapes,
        pythons=here,
    )
    return Race(
        key=start.key,
        model=entry.model,
        shape=entry.shape,
        zeros=form.text,
        runs=result.runs,
        seconds=round(time.perf_counter() - begin, 1),
        rows=rows(result, file.name, folder.name, absent, dense=stayed_dense(folder)),
    )


def stayed_dense(folder: Path) -> bool:
    """Whether an artifact has no node of ours."""
    graph = onnx.load(str(folder / "model.onnx"), load_external_data=False).graph
    return not any(node.domain == DOMAIN for node in graph.node)


def present(pythons: Mapping[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """Interpreters that are there, and of those that are not, why."""
    here = {engine: path for engine, path in pythons.items() if Path(path).exists()}
    return here, {engine: f"no interpreter at {path}" for engine, path in pythons.items() if engine not in here}


def rows(result: compare.Result, file: str, artifact: str, absent: Mapping[str, str], *, dense: bool) -> list[Row]:
    """A row for each engine on the file, in the order of the engines, and ours."""
    made = {
        row.runtime: Row(
            engine=row.runtime,
            median_ms=row.median_ms,
            p10_ms=row.p10_ms,
            p90_ms=row.p90_ms,
            version=row.version,
            error=row.error,
            dense=dense and row.model == artifact,
        )
        for row in result.rows
        if row.model in (file, artifact)
    }
    reasons = {skip.runtime: skip.reason for skip in result.skipped if skip.model == file} | dict(absent)
    made |= {name: Row(engine=name, absent=_one_line(reason)) for name, reason in reasons.items()}
    return [made[name] for name in (*engines.ENGINES, engines.ARTIFACT.name)]


def _one_line(reason: str) -> str:
    """Fit for a table: no line breaks, no bars, no paths of this machine, not longer than a reader takes."""
    text = re.sub(r"(?<!\S)/\S*/", "", " ".join(reason.split())).replace("|", "/")
    return text if len(text) <= LINE_OF_REASON else text[:LINE_OF_REASON].rsplit(" ", 1)[0] + " ..."


def wanted(only: Sequence[str]) -> list[Start]:
    """Races whose names begin so; all if nothing is asked."""
    return [start for start in STARTS if not only or start.key.startswith(tuple(only))]


def left(queue: Sequence[Start], races: Sequence[Race]) -> str:
    """How long the rest takes, by what the races so far took: those of the same model, else all."""
    if not races:
        return ""
    mean = sum(race.seconds for race in races) / len(races)
    seconds = 0.0
    for start in queue:
        alike = [race.seconds for race in races if race.key.split(" ")[0] == start.entry.name]
        seconds += sum(alike) / len(alike) if alike else mean
    return f"; about {seconds / 60:.0f} minutes left"


def say(text: str) -> None:
    """Progress, at once."""
    print(text, file=sys.stderr, flush=True)


def run(queue: Sequence[Start], pythons: Mapping[str, str], outs: Sequence[tuple[Path, bool]], *, quick: bool) -> int:
    """Races all, writing each down; gives how many failed.

    Args:
        outs: JSON files, and whether they may be published.
    """
    facts = tables.machine(), tables.versions()
    failures = 0
    for done, start in enumerate(queue):
        say(f"[{done + 1}/{len(queue)}] {start.key}{left(queue[done:], read_for(outs[0][0], *facts).races)}")
        try:
            with tempfile.TemporaryDirectory(prefix="spa-peers-") as workspace:
                race = measure(start, Path(workspace), pythons, quick=quick)
        except Exception as error:  # an internal error of ours is what the next race must not pay for, either
            failures += 1
            say(f"    FAILED: {error}" if isinstance(error, SpaError) else f"    FAILED: {traceback.format_exc()}")
            continue
        for path, public in outs:
            known = read_for(path, *facts)
            known.put(publishable(race) if public else race, ORDER)
            write(known, path)
        for row in race.rows:
            error = "not comparable" if row.error is None else f"{row.error:.0e}"
            say(
                f"    {row.engine:20}"
                + (f"SKIPPED: {row.absent}" if row.absent else f"{row.median_ms:9.3f} ms  error {error}")
            )
    return failures


def render(json: Path, page: Path, plot: Path) -> None:
    """The page from the rows, and the picture if matplotlib is here."""
    peers = read(json)
    if peers is not None and peers.races:
        try:
            peers_plot.draw(peers.races, plot)
        except ImportError as error:
            say(f"SKIPPED: no picture: {error}; pip install -e '.[bench]' has what it needs")
    picture = plot.name if plot.exists() else None
    page.write_text(peers_tables.render(peers, f"{json.parent.name}/{json.name}", picture), encoding="utf-8")


def main() -> int:
    """Options in, files out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ", ".join(entry.name for entry in ENTRIES)
    parser.add_argument(
        "--only", action="append", default=[], metavar="NAME", help=f"how a race's name begins: {names}"
    )
    parser.add_argument(
        "--python", action="append", default=[], metavar="ENGINE=PATH", help="the interpreter of an engine"
    )
    parser.add_argument("--fresh", action="store_true", help="measure what is there, too")
    parser.add_argument("--quick", action="store_true", help="few runs, a smaller BERT; docs/ is left alone")
    parser.add_argument("--render", action="store_true", help="the page from the JSON alone")
    options = parser.parse_args()
    failures = 0
    if not options.render:
        outs = [(QUICK, False)] if options.quick else [(JSON, True), (LOCAL, False)]
        known = read_for(outs[0][0], tables.machine(), tables.versions())
        queue = wanted(options.only)
        if not queue:
            parser.error(f"no race begins with {' or '.join(options.only)}: there are {names}")
        queue = [start for start in queue if options.fresh or not known.has(start.key)]
        if not sources.have_shared():
            say("SKIPPED: the benchmark models are not beside the repository, see tests/peers/sources.py")
            return 0
        pythons = compare.parse_pythons(options.python)
        for engine, reason in present(pythons)[1].items():
            say(f"SKIPPED: {engine}: {reason}")
        failures = run(queue, pythons, outs, quick=options.quick)
    if options.quick:
        quick: Peers | None = read(QUICK)
        print(peers_tables.render(quick, QUICK.name))
    else:
        render(JSON, PAGE, PLOT)
        if LOCAL.exists():
            render(LOCAL, LOCAL_PAGE, LOCAL_PLOT)
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
