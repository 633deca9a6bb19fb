"""docs/peers.md: the races as tables, and what they say of ours against the fastest peer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

from spa_compiler.bench.engines import ARTIFACT
from tests.peers.peers_rows import WITHHELD, Peers, Race, Row

OURS = ARTIFACT.name
DEFAULT = "onnxruntime"
FULL_PRECISION = ("onnxruntime", "onnxruntime-best", "openvino", "deepsparse")
#: errors above these are marked
REDUCED, ANOTHER = 1e-3, 0.1
#: nearer than this two medians of one race are called equal
CLOSE = 0.03
NOTHING = "Nothing has been measured yet: `make bench` does, and writes this page.\n"
HEAD = """# Against its peers

Written by `tests/peers/peers_race.py` from `{json}`; `make bench` measures all of it anew.

{machine}, one thread; {versions}.

Every model was sparsified once, by magnitude, layer by layer; all contenders of a race load the *same file* (the int8 ones
what ONNX Runtime's quantizer makes of it), in a process each, and take turns in short bursts. Compare within a race. Ratios
are between medians of one race; above 1 is faster. `spa-bench --help` and `spa_compiler/bench/engines.py` say what the
contenders are.

`error` is the largest difference of the outputs from ONNX Runtime's on that file, relative to their largest value.
(~): above {reduced:.0e}: reduced precision. (!): above {another:.0%}, or not comparable at all: what this contender computes is not
what the file says, whatever its time. Weights are random in all models but MiniLM, and inputs in all, so errors say which
contender computes the same, and nothing about a model's accuracy: int8 with good calibration data does better than here.
Time does not depend on the values.

"Dense" behind ours: no kernel was faster when it was compiled, so what runs is the dense model, and a lead of it over ONNX
Runtime is chance, or how weights lie in memory; the count below leaves such races out of the wins. An engine that did not
run has the reason in its row. DeepSparse's licence (the DeepSparse Community License in its wheel)
grants evaluation in development and testing and is silent on publishing results. So `make bench` measures it in the same
races, and writes its numbers to `build/peers.md` alone, which is not committed.
"""


def render(peers: Peers | None, json: str, plot: str | None = None) -> str:
    """The page.

    Args:
        json: the file that has the numbers, as the text names it.
        plot: the picture's path, as the page links it.
    """
    if peers is None or not peers.races:
        return f"# Against its peers\n\n{NOTHING}"
    used = {row.engine.split("-")[0]: row.version for race in peers.races for row in race.rows if row.version}
    used.pop(OURS, None)
    versions = ", ".join(f"{name} {version}" for name, version in (used | peers.versions).items())
    parts = [HEAD.format(json=json, machine=peers.machine, versions=versions, reduced=REDUCED, another=ANOTHER)]
    if plot:
        parts.append(f"![Speed of every contender over ONNX Runtime, race by race]({plot})\n")
    parts.append("\n".join(summary(peers.races)))
    for (model, shape), races in groupby(peers.races, key=lambda race: (race.model, race.shape)):
        parts.append(f"## {model}, {shape}\n\n" + "\n".join(_table(list(races))))
    return "\n".join(part.rstrip("\n") + "\n" for part in parts)


def summary(races: Sequence[Race]) -> Iterator[str]:
    """A row for each race: ours, the fastest peer in float32, the fastest of all; and how often it wins."""
    yield "| model | shape | zeros | spa-compiler, ms | over onnxruntime | fastest float32 peer | fastest peer |"
    yield "|---|---|---|---:|---:|---|---|"
    won = {"float32": 0, "all": 0}
    counted = 0
    for race in races:
        ours, default = race.row(OURS), race.row(DEFAULT)
        if ours is None or default is None:
            continue
        counted += 1
        peers = [row for row in race.rows if row.engine != OURS and row.median_ms is not None]
        cells = []
        for name, rivals in (("float32", [row for row in peers if row.engine in FULL_PRECISION]), ("all", peers)):
            best = min(rivals, key=_ms)
            won[name] += not ours.dense and _ms(ours) < _ms(best) * (1 - CLOSE)
            cells.append(f"{best.engine}{_mark(best)}, {_number(_ms(best))} ms: {_ms(best) / _ms(ours):.2f}x")
        ratio = f"{_ms(default) / _ms(ours):.2f}"
        time = f"{_number(_ms(ours))}{_mark(ours)}{' (dense)' if ours.dense else ''}"
        facts = (race.model, race.shape, race.zeros, time, ratio, *cells)
        yield f"| {' | '.join(facts)} |"
    yield ""
    hidden = {row.engine for race in races for row in race.rows if row.absent == WITHHELD.get(row.engine)}
    uncounted = f" Not counted, as said above: {', '.join(sorted(hidden))}." if hidden else ""
    yield (
        f"Faster than every float32 peer, by more than {CLOSE:.0%}, in {won['float32']} of {counted} races; than every peer, "
        f"bfloat16 and int8 included, in {won['all']}. A ratio behind a peer's name is its median over ours: below 1 that peer wins.{uncounted}"
    )


def _table(races: Sequence[Race]) -> Iterator[str]:
    yield "| zeros | contender | median ms | p10 - p90 | over onnxruntime | error |"
    yield "|---|---|---:|---:|---:|---:|"
    for race in races:
        default = race.row(DEFAULT)
        for row in race.rows:
            name = "**spa-compiler**" if row.engine == OURS else row.engine
            name += ", dense" if row.dense else ""
            if row.median_ms is None:
                yield f"| {race.zeros} | {name} | - | - | - | {row.absent} |"
                continue
            ratio = f"{_ms(default) / _ms(row):.2f}" if default else "-"
            spread = f"{_number(row.p10_ms or 0)} - {_number(row.p90_ms or 0)}"
            error = "" if row.error is None else f"{row.error:.0e}"
            cells = (race.zeros, name, _number(_ms(row)), spread, ratio, f"{error}{_mark(row)}".strip())
            yield f"| {' | '.join(cells)} |"


def _mark(row: Row) -> str:
    if row.error is None or row.error > ANOTHER:
        return " (!)"
    return " (~)" if row.error > REDUCED else ""


def _ms(row: Row) -> float:
    if row.median_ms is None:
        raise ValueError(f"{row.engine} has no times")
    return row.median_ms


def _number(value: float) -> str:
    """Three significant digits."""
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"
