"""docs/coverage.md: how much of each graph of the zoo can be removed, beside what other tools remove.

    python tests/peers/coverage.py                 the whole table, some minutes; exits 1 if a bar is not met
    python tests/peers/coverage.py resnet18 unet   some rows, to the terminal

Graphs are brought into canonical form, as before every pass; half of the units of every group are cut (widths not
rounded), and float initializer elements are counted before and after. The others' numbers are parsed from
`../shared/notes/peers_onnx_pruning.md`.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:  # as a script, Python looks beside this file alone
    sys.path.insert(0, str(ROOT))

from spa_compiler.analysis import Analysis, analyze  # noqa: E402
from spa_compiler.analysis.choose import random_units  # noqa: E402
from spa_compiler.analysis.cut import cut  # noqa: E402
from spa_compiler.graph.canonicalize import canonicalize  # noqa: E402
from spa_compiler.graph.load import load  # noqa: E402
from spa_compiler.graph.model import Model, constants  # noqa: E402
from tests.peers import graphs, sources  # noqa: E402

NOTES = sources.SHARED / "notes" / "peers_onnx_pruning.md"
TARGET = ROOT / "docs" / "coverage.md"
RATIO = 0.5

LEAST = {
    "resnet18": 72.0, "densenet121": 70.0, "unet": 73.0, "yolo_c2f": 65.0, "shufflenet_v2_x1_0": 60.0, "bert": 55.0,
    "vit_tiny": 70.0, "llama_gqa": 54.0, "gpt2": 50.0, "swin_t": 65.0, "BERT-base": 65.0,
}  # fmt: skip
PINNED = 10.0
"""Percent of the parameters of the trained models that may be pinned by something else than `FORCED`."""
FORCED = {"graph input", "graph output", "Gather"}
"""The interface, and tables that are looked up (words, positions): what the file says, not what we do not know."""
MEDIAN = 65.0
LOW = 65.0
"""Below this, the pins that hold most are listed."""
BEHIND = 2.0
"""Points that Torch-Pruning may be ahead."""
ROUNDING = 0.05
"""The others' numbers have one decimal."""

NOTHING: dict[str, str] = {}
"""Graphs whose weights are all pinned by what ONNX says, and why."""


@dataclass(frozen=True)
class Peers:
    """Percent of the parameters that others removed; None where it did not run or does not apply."""

    onnxsim: float | None
    torch_pruning: float | None


@dataclass(frozen=True)
class Row:
    """One graph."""

    name: str
    params: int
    removed: float
    groups: int
    prunable: float
    peers: Peers
    unforced: float
    pins: list[str] = field(default_factory=list)


def parse_peers(text: str) -> dict[str, Peers]:
    """The table of the notes: the best of onnxsim's columns if the result ran, the best of Torch-Pruning's that did."""
    out = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if len(cells) != 8 or not re.fullmatch(r"[\d.]+", cells[1]):
            continue
        name, _, *routes, runs, plain, heads = cells
        best = max((value for cell in routes if (value := _leading(cell)) is not None), default=None)
        ran = [float(cell) for cell in (plain, heads) if re.fullmatch(r"-?[\d.]+", cell)]
        out[name] = Peers(best if runs == "yes" else None, max(ran, default=None))
    return out


def _leading(cell: str) -> float | None:
    """A number alone; what failed has words behind it."""
    return float(cell) if re.fullmatch(r"-?[\d.]+", cell) else None


def row(name: str, proto: onnx.ModelProto, peers: Peers) -> Row:
    """Cuts and counts."""
    model = canonicalize(load(proto), []).model
    analysis = analyze(model)
    small = cut(model, analysis, random_units(analysis, RATIO, np.random.default_rng(0)))
    before, after = floats(model), floats(small)
    removed = max(0.0, 100.0 * (before - after) / before)
    pins = holders(analysis) if removed < LOW else []
    prunable = 100.0 * analysis.prunable / analysis.params
    return Row(name, before, removed, len(analysis.groups), prunable, peers, unforced(analysis), pins)


def unforced(analysis: Analysis) -> float:
    """Percent of the parameters that would be pinned if nothing of `FORCED` pinned anything."""
    numbering = analysis.numbering
    free = np.ones(numbering.free.size + 1, np.bool_)
    for pin, labels in zip(analysis.facts.pins, numbering.held, strict=True):
        if pin.op not in FORCED:
            free[labels] = False
    free[-1] = False  # stands for label -1
    stuck = 0
    for name in analysis.parameters:
        axes = [numbering.on(axis) for axis in analysis.facts.axes[name]]
        stuck += int(np.prod([on.shape[1] - int(free[on].any(0).sum()) for on in axes]))
    return 100.0 * stuck / analysis.params


def floats(model: Model) -> int:
    """Float elements of all initializers."""
    return sum(int(np.prod(t.shape)) for t in constants(model.graph) if np.dtype(t.dtype).kind == "f")


def holders(analysis: Analysis, count: int = 3) -> list[str]:
    """The reasons that hold most parameters; several may hold the same ones."""
    held: dict[tuple[str, str], tuple[int, str]] = {}
    for pin in analysis.pins:
        key = (pin.op, pin.reason)
        if pin.params > held.get(key, (0, ""))[0]:
            held[key] = (pin.params, f"{pin.tensor}[{pin.axis}]")
    most = sorted(held.items(), key=lambda item: -item[1][0])[:count]
    return [
        f"{op} at `{where}`: {reason} ({100.0 * params / analysis.params:.0f} %)"
        for (op, reason), (params, where) in most
    ]


def bert_base() -> onnx.ModelProto:
    """BERT-base, all 30,522 words, with a classifier of two classes on it: its last hidden state is no output."""
    model = onnx.load(sources.bert_base())
    hidden = next(value.name for value in model.graph.output if "hidden" in value.name)
    weight = np.random.default_rng(0).normal(size=(768, 2), scale=0.03).astype(np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(weight, "classifier"))
    model.graph.node.append(onnx.helper.make_node("MatMul", [hidden, "classifier"], ["scores"]))
    del model.graph.output[:], model.graph.value_info[:]
    model.graph.output.append(onnx.helper.make_tensor_value_info("scores", onnx.TensorProto.FLOAT, [None, None, 2]))
    return model


def problems(rows: Sequence[Row], trained: Sequence[Row]) -> Iterator[str]:
    """Bars that are not met."""
    for one in trained:
        if one.unforced > PINNED:
            yield f"{one.name}: {one.unforced:.1f} % of the parameters are pinned without need"
    for one in (*rows, *trained):
        others = one.peers
        if others.onnxsim is not None and one.removed < others.onnxsim - ROUNDING:
            yield f"{one.name}: {one.removed:.1f} % is below onnxsim's {others.onnxsim} %"
        if others.torch_pruning is not None and one.removed < others.torch_pruning - BEHIND - ROUNDING:
            yield f"{one.name}: {one.removed:.1f} % is behind Torch-Pruning's {others.torch_pruning} %"
        if one.removed < LEAST.get(one.name, 0.0):
            yield f"{one.name}: {one.removed:.1f} % is below {LEAST[one.name]} %"
        if one.removed <= 0 and one.name not in NOTHING:
            yield f"{one.name}: nothing is removed, and no reason is known"
    middle = statistics.median(one.removed for one in rows)
    if middle < MEDIAN:
        yield f"the median is {middle:.1f} %, below {MEDIAN} %"


def render(rows: Sequence[Row], trained: Sequence[Row]) -> str:
    """The whole document."""
    ours = statistics.median(one.removed for one in rows)
    theirs = statistics.median(one.peers.onnxsim or 0.0 for one in rows)
    lines = [
        "# How much of a model can be removed",
        "",
        "Parameters that go when half of the units of every group are cut, in percent of the float initializers of the",
        "graph (BatchNormalization folded, constants computed); weights are random, so this is about structure alone.",
        "onnxsim 0.8.1: the best of its three routes; Torch-Pruning 1.6.1: with its head counts given where that helps;",
        "`-` where a tool failed, its result did not run, or it does not apply. Half of the channels on both sides of",
        "every weight are 75 %. `prunable`: the share of the parameters that some unit can remove. Written by",
        "`tests/peers/coverage.py`.",
        "",
        f"Median over {len(rows)} graphs: **{ours:.1f} %**; onnxsim {theirs:.1f} %.",
        "",
        *_table(rows),
    ]
    if trained:
        lines += ["", "## Trained models, and BERT-base with its whole vocabulary", "", *_table(trained)]
    low = [one for one in (*rows, *trained) if one.pins]
    if low:
        lines += ["", f"## What holds the rest of those below {LOW:.0f} %", ""]
        lines.append("The pins that hold most parameters; several may hold the same ones.")
        lines.append("")
        lines += [f"- {one.name} ({one.removed:.1f} %): {'; '.join(one.pins)}" for one in low]
    return "\n".join(lines) + "\n"


def _table(rows: Sequence[Row]) -> list[str]:
    lines = [
        "| graph | parameters (M) | groups | prunable | removed | onnxsim | Torch-Pruning |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for one in rows:
        others = [("-" if value is None else f"{value:.1f}") for value in (one.peers.onnxsim, one.peers.torch_pruning)]
        lines.append(
            f"| {one.name} | {one.params / 1e6:.2f} | {one.groups} | {one.prunable:.1f} | **{one.removed:.1f}** "
            f"| {others[0]} | {others[1]} |"
        )
    return lines


def main() -> int:
    """Names in, table out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="GRAPH", help="only these, and no file is written")
    wanted = parser.parse_args().names
    peers = parse_peers(NOTES.read_text(encoding="utf-8"))
    rows = []
    for name in wanted or graphs.zoo_names():
        print(name, file=sys.stderr, flush=True)
        rows.append(row(name, graphs.zoo_graph(name)[0], peers.get(name, Peers(None, None))))
    nobody = Peers(None, None)
    trained = []
    if not wanted:
        trained = [row(name, graphs.model(name)[0], nobody) for name in graphs.model_names()]
        trained.append(row("BERT-base", bert_base(), nobody))
    if wanted:
        print(render(rows, trained), end="")
    else:
        TARGET.write_text(render(rows, trained), encoding="utf-8")
    missed = list(problems(rows, trained))
    print("\n".join(missed) or "every bar is met", file=sys.stderr)
    return bool(missed)


if __name__ == "__main__":
    sys.exit(main())
