"""spa-bench --profile: the time of each node of a model and of its artifact, side by side, by the original's names.

Both run in ONNX Runtime with its own profiler on, in processes of their own and in turns. A row is the least part of
the original that nodes on either side share: what became a region, or one node that ONNX Runtime runs on both sides.
Every node that ran is in one row, so the rows of a side add up to all of its nodes' time.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import msgspec
import networkx as nx
import onnx

from spa_compiler.bench.compare import Entry, drawn, inputs_of, python_of, shapes_of
from spa_compiler.bench.engines import ARTIFACT, ENGINES
from spa_compiler.bench.lineage import Whole
from spa_compiler.bench.race import Contender, Times, race
from spa_compiler.bench.trace import Op, Profile, ops_of, read
from spa_compiler.errors import UsageError
from spa_compiler.graph.either import original_name
from spa_compiler.graph.load import load
from spa_compiler.graph.session import Feeds
from spa_compiler.report.report import shape_text


class NodeTime(msgspec.Struct, frozen=True):
    """A node that ran. `originals` are the names of the original's nodes that it stands for."""

    name: str
    op: str
    ms: float
    originals: list[str]


class Row(msgspec.Struct, frozen=True):
    """Nodes of both sides that stand for the same nodes of the original.

    `own` is the operator of nodes that ONNX Runtime put in for itself, which stand for none: a change of layout. It is
    empty in all other rows. Without `theirs` or `ours` the other side has no such node, and there is no ratio.
    """

    own: str
    theirs: list[NodeTime]
    ours: list[NodeTime]
    theirs_ms: float
    ours_ms: float
    ratio: float | None  # above 1: ours is the faster


class Side(msgspec.Struct, frozen=True):
    """One of the two models. `nodes_ms` is the sum of its nodes' times, `wall_ms` the time of a whole run."""

    model: str
    onnxruntime: str
    nodes_ms: float
    wall_ms: float


class Shape(msgspec.Struct, frozen=True):
    """Both sides at one shape, the row that takes longest first."""

    shape: str
    theirs: Side
    ours: Side
    rows: list[Row]


class Profiled(msgspec.Struct, frozen=True):
    """What `spa-bench --profile --json` prints. Times are medians over the runs, in milliseconds."""

    machine: str
    threads: int
    runs: int
    shapes: list[Shape]


def profile(
    models: Sequence[Entry],
    *,
    machine: str,
    threads: int,
    runs: int,
    shapes: Sequence[str] = (),
    pythons: Mapping[str, str] | None = None,
    progress: Callable[[str, int, int], None] = lambda *_: None,
) -> Profiled:
    """Profiles two models in turns: an original and its artifact, an artifact and its portable.onnx, or any two files.

    Args:
        models: two, the original first unless the other one is the only artifact; or one artifact.
        machine: a text for the result.
        runs: of each, those that count.
        shapes: as `--shape` takes them; none: what the original's signature allows.
        pythons: engine name -> interpreter.

    Raises:
        UsageError: another number of models, models of different inputs, or a shape that does not fit.
        ModelError: a model does not load or run, or its profile cannot be read.
        EnvironmentFault: an interpreter cannot be started.
    """
    sides = _pair(models)
    loaded = [load(side.path) for side in sides]
    if inputs_of(loaded[0]) != inputs_of(loaded[1]):
        raise UsageError(
            f"{sides[0].name} and {sides[1].name} have different inputs",
            fix="Name a model and what was made from it",
        )
    files = [Whole(ops_of(onnx.load(str(_file(side)), load_external_data=False))) for side in sides]
    found = []
    for own in shapes_of(shapes, loaded[0]):
        feeds = drawn(loaded[0], own)
        with tempfile.TemporaryDirectory(prefix="spa-profile-") as folder:
            contenders = [_contender(side, feeds, Path(folder) / str(i), pythons or {}) for i, side in enumerate(sides)]
            raced = race(contenders, threads=threads, runs=runs, progress=progress)
            times = [t for t in raced if isinstance(t, Times)]
            profiles = [read(t.trace, t.trace.with_name("optimized.onnx"), t.counted) for t in times if t.trace]
        theirs, ours = (
            Side(side.name, t.version, sum(each.ms), each.wall_ms)
            for side, t, each in zip(sides, times, profiles, strict=True)
        )
        shape = shape_text({name: value.shape for name, value in feeds.items()})
        found.append(Shape(shape, theirs, ours, rows(files[0], files[1], profiles[0], profiles[1])))
    return Profiled(machine, threads, runs, found)


def rows(original: Whole, file: Whole, theirs: Profile, ours: Profile) -> list[Row]:
    """What ran on both sides, by the part of the original that it stands for.

    Args:
        original: the original's file; `theirs` is its profile.
        file: the file of `ours`.
    """
    stand = original.claims(theirs.ops)  # what ONNX Runtime made of the original
    made = file.claims(ours.ops)  # and of the other file
    ran = {f for op, own, ms in zip(ours.ops, made, ours.ms, strict=True) if ms or not op.depth for f in own}
    meaning: list[list[int]] = [[] for _ in file.ops]
    for f, own in zip(sorted(ran), original.claims([_as_was(file.ops[f]) for f in sorted(ran)]), strict=True):
        meaning[f] = own
    same: nx.Graph[tuple[str, int | str]] = nx.Graph()

    def tie(what: str, at: int | str, to: str, others: Sequence[int | str]) -> None:
        same.add_node((what, at))
        same.add_edges_from(((what, at), (to, other)) for other in others)

    for i, (op, own) in enumerate(zip(theirs.ops, stand, strict=True)):
        tie("theirs", i, *(("original", own) if own else ("put in", [op.kind])))
    for i, (op, own) in enumerate(zip(ours.ops, made, strict=True)):
        tie("ours", i, *(("file", own) if own else ("put in", [op.kind])))
    for i, op in enumerate(file.ops):
        # A node that a pass put in works for the one that reads what it gives out: a thin factor.
        tie("file", i, *(("original", meaning[i]) if meaning[i] else ("file", file.readers(op)[:1])))

    result = []
    for part in nx.connected_components(same):
        members = sorted(part, key=str)
        left = [
            _node(theirs, i, [_label(original.ops[j]) for j in stand[i]])
            for i in sorted(i for what, i in members if what == "theirs" and isinstance(i, int))
        ]
        right = [
            _node(ours, i, [_label(original.ops[j]) for f in made[i] for j in meaning[f]])
            for i in sorted(i for what, i in members if what == "ours" and isinstance(i, int))
        ]
        if left or right:
            sums = sum(n.ms for n in left), sum(n.ms for n in right)
            own_kind = next((str(kind) for what, kind in members if what == "put in"), "")
            result.append(Row(own_kind, left, right, *sums, sums[0] / sums[1] if left and sums[1] else None))
    return sorted(result, key=lambda row: -max(row.theirs_ms, row.ours_ms))


def _as_was(op: Op) -> Op:
    """A node of a file with two forms, under the names that it had in its own."""
    if not op.depth:
        return op
    inputs, outputs = (tuple(map(original_name, names)) for names in (op.inputs, op.outputs))
    return replace(op, name=original_name(op.name), inputs=inputs, outputs=outputs)


def _pair(models: Sequence[Entry]) -> tuple[Entry, Entry]:
    """The original, and what is compared with it."""
    folders = [entry for entry in models if entry.folder]
    if len(models) == 1 and folders:
        portable = Entry(f"{models[0].name}/portable.onnx", models[0].path)
        return portable, models[0]
    if len(models) != 2:
        fix = "Name the original and the artifact, the artifact alone, or two .onnx files"
        raise UsageError(f"--profile compares two models, not {len(models)}", fix=fix)
    first, second = models
    return (second, first) if folders == [first] else (first, second)


def _file(entry: Entry) -> Path:
    """What runs: of an artifact its model.onnx."""
    return entry.folder / "model.onnx" if entry.folder else entry.path


def _contender(side: Entry, feeds: Feeds, folder: Path, pythons: Mapping[str, str]) -> Contender:
    folder.mkdir()
    engine = ARTIFACT if side.folder else ENGINES["onnxruntime"]
    python = python_of(side, pythons)
    return Contender(side.name, engine, _file(side), feeds, library=side.library, python=python, profile=folder)


def _node(profile: Profile, at: int, originals: list[str]) -> NodeTime:
    op = profile.ops[at]
    return NodeTime(_label(op), op.kind, profile.ms[at], originals)


def _label(op: Op) -> str:
    """Its name; of a node without one the name of what it gives out."""
    return op.name or next(iter(op.outputs), op.kind)
