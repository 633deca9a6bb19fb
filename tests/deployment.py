"""What a deployment has: a folder with kernels.so and models, a script that needs numpy and onnxruntime alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from tests.region_harness import case

SCRIPT = '''\
"""python check.py FOLDER: every model against its recorded outputs, at 1 and 2 threads; then the ones to be refused."""
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort

extra = {m.split(".")[0] for m in sys.modules} & {"onnx", "tvm", "scipy", "spa_compiler"}
assert not extra, extra
folder = Path(sys.argv[1])


def session(path, threads):
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    options.register_custom_ops_library(str(folder / "kernels.so"))
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


checked = refused = 0
quiet = ort.RunOptions()
quiet.log_severity_level = 4
for path in sorted(folder.glob("*.onnx")):
    for threads in (1, 2):
        s = session(path, threads)
        for record in sorted(folder.glob(path.stem + "_*.npz")):
            data = np.load(record)
            got = s.run(None, {n: data[n] for n in data.files if n[0] == "x"}, quiet)
            for i, y in enumerate(got):
                want = data["y%d" % i]
                assert y.shape == want.shape, (record.name, y.shape, want.shape)
                error = np.abs(y - want).max(initial=0)
                assert error <= 1e-5 * np.abs(want).max(initial=1e-30), (record.name, i, error)
            checked += 1
for path in sorted(folder.glob("refused/*.onnx")):
    try:
        s = session(path, 1)
        for record in sorted(folder.glob("refused/" + path.stem + "_*.npz")):
            s.run(None, dict(np.load(record)), quiet)
    except Exception as error:
        assert "ai.spa::" in str(error) or "Region_" in str(error), error
        refused += 1
    else:
        raise AssertionError(path.name + " was not refused")
print("onnxruntime", ort.__version__, "checked", checked, "refused", refused)
'''

SHAPES = {"mlp": ((1, 1), (1, 7), (3, 33), (0, 4), (1, 200)), "wide": ((1, 65),)}
SHAPES |= {"single": ((1, 3), (2, 64))}


def write(
    folder: Path,
    bad: Mapping[str, bytes] | None = None,
    bad_feeds: Mapping[str, tuple[bytes, dict[str, np.ndarray]]] | None = None,
) -> tuple[Path, int]:
    """Models of all cases with inputs and outputs; `bad` and `bad_feeds` must be refused at creation or in a run.

    Returns the script and how many checks it makes.
    """
    (folder / "refused").mkdir(parents=True)
    for name, shapes in SHAPES.items():
        c = case(name)
        (folder / f"{name}.onnx").write_bytes(c.model())
        for i, dims in enumerate(shapes):
            feeds = c.feeds(dims)
            outputs = {f"y{j}": y.astype(np.float32) for j, y in enumerate(c.expected(feeds))}
            np.savez(folder / f"{name}_{i}.npz", **feeds, **outputs)
    for number, model in enumerate((bad or {}).values()):
        (folder / "refused" / f"b{number}.onnx").write_bytes(model)
    for number, (model, feeds) in enumerate((bad_feeds or {}).values()):
        (folder / "refused" / f"f{number}.onnx").write_bytes(model)
        np.savez(folder / "refused" / f"f{number}_0.npz", **feeds)
    script = folder / "check.py"
    script.write_text(SCRIPT)
    return script, 2 * sum(map(len, SHAPES.values()))
