"""README.md's table of measured results: compiles, races, writes docs/measured.json, and renders it.

    python tests/peers/tables.py                   everything, some 15 minutes on a quiet machine
    python tests/peers/tables.py --only minilm     one race, the others stay as docs/measured.json has them
    python tests/peers/tables.py --quick           few runs, BERT cut to two layers; goes to build/, not to README.md
    python tests/peers/tables.py --render          README.md from docs/measured.json, nothing measured

All models of a race take turns in one run: the source in ONNX Runtime (default, best settings, int8) and every artifact
made from it. Times compare within a race; a ratio is the quotient of two medians of one race.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:  # as a script, Python looks beside this file alone
    sys.path.insert(0, str(ROOT))

import spa_compiler  # noqa: E402
from spa_compiler.bench import compare, engines  # noqa: E402
from spa_compiler.calibration.shapes import parse_shapes  # noqa: E402
from spa_compiler.errors import SpaError  # noqa: E402
from spa_compiler.graph.load import load  # noqa: E402
from spa_compiler.graph.session import onnxruntime_version  # noqa: E402
from spa_compiler.passes import Recipe, from_flags  # noqa: E402
from spa_compiler.report.report import shape_text  # noqa: E402
from spa_compiler.targets import host  # noqa: E402
from tests.peers import sources  # noqa: E402

MEASURED = ROOT / "docs" / "measured.json"
QUICK = ROOT / "build" / "measured-quick.json"
README = ROOT / "README.md"
BEGIN, END = "<!-- measured:begin -->", "<!-- measured:end -->"
ENGINES = "onnxruntime,onnxruntime-best,onnxruntime-int8"
RUNS, QUICK_RUNS = 100, 6
QUICK_LAYERS = 2
#: nearer than this two medians of one race are called equal
CLOSE = 0.03
NOTHING = "Nothing has been measured yet: `make bench` does, and writes this table."


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One contender of a race."""

    what: str  # an engine on the source model, or a form such as "90 % 4x1"
    median_ms: float
    p10_ms: float
    p90_ms: float
    compiled: bool = False
    error: float | None = None  # of an artifact, against the same arithmetic in standard ops


class Race(msgspec.Struct, frozen=True, kw_only=True):
    """One model at one shape and number of threads; everything in it took turns."""

    key: str
    model: str
    shape: str
    threads: int
    runs: int
    rows: list[Row]


class Measured(msgspec.Struct, kw_only=True):
    """docs/measured.json."""

    machine: str
    versions: dict[str, str]
    races: list[Race] = msgspec.field(default_factory=list)


@dataclass(frozen=True)
class Form:
    """A recipe: so many zeros in such a pattern."""

    sparsity: float
    pattern: str
    scope: str = "layer"

    @property
    def recipe(self) -> Recipe:
        return from_flags(f"sparsify{{sparsity={self.sparsity},pattern={self.pattern},scope={self.scope}}}")

    @property
    def text(self) -> str:
        return f"{self.sparsity:.0%}".replace("%", " %") + f" {self.pattern.removeprefix('block:')}"


@dataclass(frozen=True)
class Narrow:
    """A recipe: coupled channels cut until so many of the multiply-accumulates remain.

    What comes out needs no kernels, so `portable.onnx` is raced too, in ONNX Runtime alone.
    """

    macs: float

    @property
    def recipe(self) -> Recipe:
        return from_flags(f"prune-groups{{macs={self.macs}}}")

    @property
    def text(self) -> str:
        return f"{1 - self.macs:.0%} of the MACs cut".replace("%", " %")


@dataclass(frozen=True)
class Configuration:
    """One race to run. `source` is asked when it runs, so that only what is raced is built."""

    key: str
    model: str
    source: Callable[[bool], Path]  # True: a smaller one, to try the script
    shapes: tuple[str, ...]
    forms: tuple[Form | Narrow, ...]
    threads: int = 1


def _tokens(batch: int, length: int) -> tuple[str, ...]:
    return tuple(f"{name}={batch},{length}" for name in ("input_ids", "attention_mask", "token_type_ids"))


def _bert(quick: bool) -> Path:
    return sources.bert_base(QUICK_LAYERS) if quick else sources.bert_base()


B90, U90, U80, B50 = (
    Form(0.9, "block:4x1"),
    Form(0.9, "unstructured"),
    Form(0.8, "unstructured"),
    Form(0.5, "block:4x1"),
)
HALF = Narrow(0.5)
_IMAGE = "1,3,224,224"
_CONFIGURATIONS = (
    Configuration("minilm", "MiniLM-L6", lambda _: sources.minilm(), _tokens(1, 128), (B90, U90, U80, B50, HALF)),
    Configuration("bert", "BERT-base", _bert, _tokens(1, 128), (B90, U90, U80)),
    Configuration("bert-short", "BERT-base", _bert, _tokens(1, 16), (B90,)),
    Configuration("bert-2-threads", "BERT-base", _bert, _tokens(1, 128), (B90,), threads=2),
    Configuration("mobilenet", "MobileNetV2", lambda _: sources.mobilenet_v2(), (f"input={_IMAGE}",), (U90, B90, HALF)),
    Configuration("resnet50", "ResNet-50", lambda _: sources.resnet50(), (f"input={_IMAGE}",), (B90, U90)),
    Configuration("resnet18", "ResNet-18", lambda _: sources.resnet18(), (f"image={_IMAGE}",), (HALF,)),
)
_DIGITS_BATCH = 64


def configurations() -> list[Configuration]:
    """Everything the table shows that this machine can run."""
    found = list(_CONFIGURATIONS) if sources.have_shared() else []
    for name, entry in sources.digits().items():
        if not entry["recipe"]:  # no share of zeros kept its accuracy
            continue
        shape = ",".join(map(str, [_DIGITS_BATCH, *entry["input"]["shape"][1:]]))
        form = Form(**entry["recipe"])
        shapes, file = (f"{entry['input']['name']}={shape}",), entry["file"]
        found.append(Configuration(name, name.replace("_", " "), lambda _, f=file: f, shapes, (form,)))  # type: ignore[misc]
    return found


def measure(configuration: Configuration, workspace: Path, *, quick: bool) -> Race:
    """Compiles the source in every form and races all of them in one run."""
    source = configuration.source(quick)
    folders: dict[str, tuple[Form | Narrow, float | None]] = {}
    for form in configuration.forms:
        folder = workspace / f"{configuration.key}-{form.text.replace(' ', '-')}".replace("%-", "")
        print(f"compiling {configuration.model}, {form.text}", file=sys.stderr, flush=True)
        result = spa_compiler.compile(
            source,
            folder,
            recipe=form.recipe,
            shapes=configuration.shapes,
            threads=configuration.threads,
        )
        worst = result.report.worst_check()
        folders[folder.name] = (form, worst.error if worst else None)
    print(f"racing {configuration.model}, {configuration.key}", file=sys.stderr, flush=True)
    result = compare.compare(
        compare.entries([source, *(workspace / name for name in folders)]),
        engines.parse(ENGINES),
        machine=machine(),
        threads=configuration.threads,
        runs=QUICK_RUNS if quick else RUNS,
        shapes=configuration.shapes,
    )
    rows = []
    for row in result.rows:
        times = {"median_ms": row.median_ms, "p10_ms": row.p10_ms, "p90_ms": row.p90_ms}
        if row.model == source.name:
            rows.append(Row(what=row.runtime, **times))
        elif row.runtime == engines.ARTIFACT.name:
            form, error = folders[row.model]
            rows.append(Row(what=form.text, compiled=True, error=error, **times))
        elif (maker := folders.get(row.model.partition("/")[0])) and isinstance(maker[0], Narrow):
            rows.append(Row(what=f"{maker[0].text}, portable.onnx in onnxruntime alone", compiled=True, **times))
    shapes = parse_shapes(configuration.shapes, load(source))[0]
    return Race(
        key=configuration.key,
        model=configuration.model,
        shape=shape_text(shapes),
        threads=configuration.threads,
        runs=result.runs,
        rows=rows,
    )


def machine() -> str:
    """This machine in words."""
    cpu = host()
    return f"{cpu.model or cpu.name} ({cpu.level}, {cpu.cores_physical} cores)"


def versions() -> dict[str, str]:
    """Of what the numbers depend on."""
    return {"spa-compiler": spa_compiler.__version__, "onnxruntime": onnxruntime_version()}


# ---------------------------------------------------------------- rendering


def read(path: Path) -> Measured | None:
    """What was measured; None if nothing was yet."""
    return msgspec.json.decode(path.read_bytes(), type=Measured) if path.exists() else None


def render(measured: Measured | None) -> str:
    """The text between README.md's markers."""
    if measured is None or not measured.races:
        return NOTHING
    facts = ", ".join(f"{name} {version}" for name, version in measured.versions.items())
    lines = [
        f"{measured.machine}; {facts}; float32 unless int8 is said. All rows of one model, shape and number of threads "
        "took turns in one run; the ratio is between their medians, above 1 is faster than ONNX Runtime's default.",
        "",
        "| model | shape | threads | what runs | median ms | p10 - p90 | over onnxruntime |",
        "|---|---|---:|---|---:|---:|---:|",
    ]
    for race in measured.races:
        default = _row(race, "onnxruntime").median_ms
        for row in race.rows:
            name = f"**spa-compiler, {row.what}**" if row.compiled else row.what
            ratio = f"{default / row.median_ms:.2f}"
            lines.append(
                f"| {race.model} | {race.shape} | {race.threads} | {name} | {_ms(row.median_ms)} "
                f"| {_ms(row.p10_ms)} - {_ms(row.p90_ms)} | {f'**{ratio}**' if row.compiled else ratio} |"
            )
    errors = [row.error for race in measured.races for row in race.rows if row.error is not None]
    lines += ["", _int8(measured)]
    if errors:
        lines[-1] += (
            " The largest difference between an artifact and the same arithmetic in standard ops was "
            f"{max(errors):.0e} of the largest output."
        )
    return "\n".join(lines)


def _int8(measured: Measured) -> str:
    """Where dense int8 is the better choice, from the numbers."""
    lost, tied, rivals = [], [], 0
    for race in measured.races:
        int8 = next((row for row in race.rows if row.what == "onnxruntime-int8"), None)
        for row in race.rows:
            if int8 is None or not row.compiled:
                continue
            rivals += 1
            threads = "" if race.threads == 1 else f", {race.threads} threads"
            times = f"{_ms(int8.median_ms)} against {_ms(row.median_ms)} ms"
            where = f"{race.model} {race.shape}{threads} at {row.what} ({times})"
            if int8.median_ms < row.median_ms * (1 - CLOSE):
                lost.append(where)
            elif int8.median_ms <= row.median_ms * (1 + CLOSE):
                tied.append(where)
    if not rivals:
        return "ONNX Runtime int8 ran for none of these models."
    words = [f"Dense int8 wins in {len(lost)} of {rivals} rows{': ' if lost else ''}{'; '.join(lost)}."]
    if tied:
        words.append(f"It is as fast in {len(tied)}: {'; '.join(tied)}.")
    words.append("int8 changes the model's numbers, and so does pruning: compare accuracies before you choose.")
    return " ".join(words)


def _row(race: Race, what: str) -> Row:
    return next(row for row in race.rows if row.what == what)


def _ms(value: float) -> str:
    """Three significant digits."""
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def write_readme(measured: Measured | None) -> None:
    """Puts the rendering between README.md's markers."""
    text = README.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    README.write_text(f"{before}{BEGIN}\n{render(measured)}\n{END}{after}", encoding="utf-8")


def save(measured: Measured, path: Path, order: Sequence[str]) -> None:
    """Writes the JSON, races in the table's order."""
    measured.races.sort(key=lambda race: order.index(race.key) if race.key in order else len(order))
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(msgspec.json.format(msgspec.json.encode(measured), indent=2) + b"\n")


def main() -> int:
    """Options in, files out."""
    possible = configurations()
    keys = [c.key for c in possible]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=keys, metavar="NAME", help=f"one of {', '.join(keys)}")
    parser.add_argument("--quick", action="store_true", help="few runs, smaller models; README.md is left alone")
    parser.add_argument("--render", action="store_true", help="README.md from the JSON alone")
    parser.add_argument("--json", type=Path, metavar="FILE", help="default docs/measured.json, with --quick in build/")
    options = parser.parse_args()
    path: Path = options.json or (QUICK if options.quick else MEASURED)
    if not options.render:
        chosen = [c for c in possible if c.key in (options.only or keys)]
        known = read(path)
        if known is None or (known.machine, known.versions) != (machine(), versions()):
            known = Measured(machine=machine(), versions=versions())  # times of different machines share no table
        with tempfile.TemporaryDirectory(prefix="spa-tables-") as workspace:
            for configuration in chosen:
                try:
                    race = measure(configuration, Path(workspace), quick=options.quick)
                except SpaError as error:
                    print(f"error: {configuration.key}: {error}", file=sys.stderr)
                    return error.exit_code
                known.races = [*(r for r in known.races if r.key != race.key), race]
                save(known, path, keys)  # after each, so that a long run that stops keeps what it has
    measured = read(path)
    if options.quick or (options.json and options.json.resolve() != MEASURED):
        print(render(measured))
    else:
        write_readme(measured)
    return 0


if __name__ == "__main__":
    sys.exit(main())
