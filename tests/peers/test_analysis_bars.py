"""How long the analysis takes and how much memory it needs, on BERT-base and on the largest graphs of the zoo."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.peers import graphs, sources

pytestmark = [pytest.mark.peers, pytest.mark.slow]

MEASURE = """
import re, sys, time
from spa_compiler.analysis import analyze
from spa_compiler.graph.load import load
begin = time.perf_counter()
analysis = analyze(load(sys.argv[1]))
analysis.groups[0].units
seconds = time.perf_counter() - begin
print(seconds, int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]) * 1024, len(analysis.groups))
"""


def measure(path: Path) -> tuple[float, int, int]:
    """Seconds, the most bytes in memory, groups: of a process that loads and analyzes one model."""
    out = subprocess.run([sys.executable, "-c", MEASURE, str(path)], check=True, capture_output=True, text=True).stdout
    seconds, memory, count = out.split()
    return float(seconds), int(memory), int(count)


@sources.needs_shared
def test_bert_base() -> None:
    path = sources.bert_base()
    seconds, memory, count = measure(path)
    print(f"BERT-base: {seconds:.2f} s, {memory / 2**20:.0f} MiB, {count} groups")
    assert seconds < 5
    assert memory < 2.2 * path.stat().st_size + 300e6


@graphs.needs_zoo
@pytest.mark.parametrize("name", ["swin_t", "swinv2_tiny", "keras_nasnet_mobile", "densenet121_dynamo", "t5"])
def test_large_graphs(name: str, tmp_path: Path) -> None:
    import onnx

    path = tmp_path / f"{name}.onnx"
    onnx.save(graphs.zoo_graph(name)[0], path)
    seconds, memory, count = measure(path)
    print(f"{name}: {seconds:.2f} s, {memory / 2**20:.0f} MiB, {count} groups")
    assert seconds < 3
    assert memory < 2.2 * path.stat().st_size + 300e6
