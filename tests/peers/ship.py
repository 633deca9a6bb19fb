"""Measures tiles of layers of common sizes, and writes what won to the file that ships with the package.

    python tests/peers/ship.py [--level x86-64-v3] [--records FILE]

It ranks what compilations try first, nothing more (`spa_compiler/placement/variants.py`). With --records, what an earlier
run measured is not measured again, and what is in that file from compilations is taken, too. Other levels' winners stay.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
from pathlib import Path

import msgspec
import numpy as np

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:  # as a script, Python looks beside this file alone
    sys.path.insert(0, str(ROOT))

from spa_compiler import __version__  # noqa: E402
from spa_compiler.placement import variants  # noqa: E402
from spa_compiler.placement.candidates import SiteClass, classes  # noqa: E402
from spa_compiler.placement.choose import choose  # noqa: E402
from spa_compiler.placement.contests import Referee  # noqa: E402
from spa_compiler.placement.records import Records  # noqa: E402
from spa_compiler.placement.sites import find_sites  # noqa: E402
from spa_compiler.placement.timer import LocalTimer  # noqa: E402
from spa_compiler.targets import host  # noqa: E402
from tests.networks import model_of, weight  # noqa: E402

TRIALS = 15
#: outputs, inputs: attention and feed-forward layers of small and base encoders
ROWS = ((384, 384), (1536, 384), (384, 1536), (768, 768), (3072, 768), (768, 3072))
TOKENS = (1, 16, 128)
#: outputs, inputs, pixels each way: 1 x 1 convolutions
PLANES = ((256, 64, 28), (128, 512, 28), (1024, 256, 14))
DENSITY = 0.1
BLOCK_ROWS = (1, 4)  # of the zeros
SITES = 3  # side by side, so that not all of their weights are in cache


def layers(rng: np.random.Generator) -> list[SiteClass]:
    """Classes of sites, each at one shape."""
    found: list[SiteClass] = []
    for (n, k), rows in itertools.product(ROWS, BLOCK_ROWS):
        for tokens in TOKENS:
            found += _classes(
                "MatMul", "N", (k,), [weight(rng, k, n, DENSITY, rows) for _ in range(SITES)], (tokens, k)
            )
    for (n, k, size), rows in itertools.product(PLANES, BLOCK_ROWS):
        kernels = [weight(rng, k, n, DENSITY, rows).T.reshape(n, k, 1, 1).copy() for _ in range(SITES)]
        found += _classes("Conv", "N", (k, size, size), kernels, (1, k, size, size))
    return found


def _classes(
    op: str, batch: str, inner: tuple[int, ...], weights: list[np.ndarray], shape: tuple[int, ...]
) -> list[SiteClass]:
    names = [f"y{i}" for i in range(len(weights))]
    nodes = " ".join(f"{y} = {op}(x, w{i})" for i, y in enumerate(names))
    outputs = ", ".join(f"float[{batch}{', ?' * len(inner)}] {y}" for y in names)
    text = f"g (float[{batch}, {', '.join(map(str, inner))}] x) => ({outputs}) {{ {nodes} }}"
    sites = find_sites(model_of(text, **{f"w{i}": w for i, w in enumerate(weights)}))[0]
    return [max(classes(sites, [{"x": shape}]), key=lambda c: len(c.sites))]  # shares may be rounded apart


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--level", default=host().level, choices=("x86-64-v3", "x86-64-v4"))
    parser.add_argument("--records", type=Path)
    arguments = parser.parse_args()
    timer = LocalTimer()
    with tempfile.TemporaryDirectory() as folder:
        machine = {
            "cpu": timer.machine.cpu,
            "onnxruntime": timer.machine.onnxruntime,
            "spa_compiler": __version__,
            "isa": arguments.level,
        }
        book = Records(arguments.records or Path(folder) / "records.sqlite", machine)
        rng = np.random.default_rng(0)
        for each in layers(rng):
            referee = Referee(arguments.level, 1, book, Path(folder), lambda *_: None, rng, timer=timer, trials=TRIALS)
            with timer.held():
                choice = choose([each], referee)[0]
            site = each.sites[0]
            print(f"{site.layout} {site.n} x {site.k}, {choice.tokens[0]} tokens: {choice.reason}", flush=True)
        found = variants.winners(arguments.level, book.all())
        book.close()
    file = Path(variants.__file__).with_name(variants.SHIPPED)
    others = [w for w in msgspec.json.decode(file.read_bytes(), type=list[variants.Winner]) if w.isa != arguments.level]
    lines = sorted({msgspec.json.encode(w).decode() for w in (*others, *found)})
    file.write_text("[\n" + ",\n".join(lines) + "\n]\n")
    print(f"{len(found)} winners in {file}")


if __name__ == "__main__":
    main()
