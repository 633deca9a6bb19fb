"""The peers' race as a picture: a line for each race, a mark for each contender, speed over ONNX Runtime on a log axis."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path

from tests.peers.peers_rows import Race
from tests.peers.peers_tables import DEFAULT, OURS

#: engine -> shape and colour; hollow marks are reduced precision
STYLES = {
    "onnxruntime": ("|", "#555555", True),
    "onnxruntime-best": ("o", "#555555", True),
    "onnxruntime-int8": ("s", "#555555", False),
    "openvino": ("o", "#1f77b4", True),
    "openvino-bf16": ("D", "#1f77b4", False),
    "openvino-int8": ("s", "#1f77b4", False),
    "openvino-int8-vnni": ("v", "#1f77b4", False),
    "deepsparse": ("^", "#2ca02c", True),
    OURS: ("*", "#d62728", True),
}
INCHES_A_LINE = 0.32


def draw(races: Sequence[Race], path: Path) -> None:
    """Writes an SVG; the same numbers give the same bytes.

    Raises:
        ImportError: matplotlib is not installed (the extra `bench` has it).
    """
    matplotlib = importlib.import_module("matplotlib")
    matplotlib.use("svg")
    pyplot = importlib.import_module("matplotlib.pyplot")
    with pyplot.rc_context({"svg.hashsalt": "peers", "svg.fonttype": "none", "font.size": 9}):
        figure, axes = pyplot.subplots(figsize=(9, 1.4 + INCHES_A_LINE * len(races)))
        for engine, (shape, colour, filled) in STYLES.items():
            points = [(_ratio(race, engine), line) for line, race in enumerate(races)]
            there = [(ratio, line) for ratio, line in points if ratio is not None]
            if there:
                name, size = ("spa-compiler", 11) if engine == OURS else (engine, 6)
                style = {
                    "marker": shape,
                    "color": colour,
                    "markersize": size,
                    "fillstyle": "full" if filled else "none",
                }
                axes.plot(*zip(*there, strict=True), linestyle="none", label=name, zorder=3, **style)
        axes.set_yticks(range(len(races)), [f"{race.model} {race.shape}, {race.zeros}" for race in races])
        axes.invert_yaxis()
        axes.set_xscale("log")
        ticks = [0.5, 1, 2, 4, 8, 16]
        axes.set_xticks(ticks, [f"{tick:g}x" for tick in ticks], minor=False)
        axes.set_xticks([], minor=True)
        axes.set_xlabel("times as fast as ONNX Runtime with default options, on the same file, in the same race")
        axes.grid(axis="both", linewidth=0.4, zorder=0)
        figure.legend(loc="upper center", ncol=5, frameon=False)
        figure.tight_layout(rect=(0, 0, 1, 1 - 0.55 / figure.get_figheight()))
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})
        pyplot.close(figure)


def _ratio(race: Race, engine: str) -> float | None:
    row, default = race.row(engine), race.row(DEFAULT)
    if row is None or default is None or row.median_ms is None or default.median_ms is None:
        return None
    return default.median_ms / row.median_ms
