"""One engine in one process of its own: a script that needs numpy and the engine, nothing of spa_compiler.

So `spa-bench --python ENGINE=PATH` can run it in an interpreter with other versions. It is told what to do by a JSON
object in its only argument, writes what its first call computes to the file that `outputs` names, answers one JSON line
when it is ready, and then, for every line with a number N, one JSON line with the milliseconds of N calls. Where a
profile is asked for, a line "profile" ends it, and the answer says where it lies and which of the calls so far count.
The end of its input is the end of it.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np

Call = Callable[[], "list[Any]"]
End = Callable[[], str]
"""Ends the profile and returns the path of its trace."""

#: calls before the first that counts: allocations, prepacking, page faults
_WARM_UP = 3
#: kinds of arrays that are kept to compare: all but strings, and what numpy has no type for
_NUMBERS = "biufc"


def onnxruntime(job: dict[str, Any], feeds: dict[str, np.ndarray]) -> tuple[Call, str, End]:
    """ONNX Runtime with its default options but for what the job asks."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # newer wheels send some unless told otherwise
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = job["threads"]
    if job["library"]:
        options.register_custom_ops_library(job["library"])
    for key, value in job["config"].items():
        options.add_session_config_entry(key, value)
    if job["profile"]:
        options.enable_profiling = True
        options.profile_file_prefix = os.path.join(job["profile"], "trace")  # noqa: PTH118, ORT takes strings
        options.optimized_model_filepath = os.path.join(job["profile"], "optimized.onnx")  # noqa: PTH118
        external = "session.optimized_model_external_initializers"
        options.add_session_config_entry(f"{external}_file_name", "optimized.data")
        options.add_session_config_entry(f"{external}_min_size_in_bytes", "1024")
    session = ort.InferenceSession(
        job["model"], options, providers=["CPUExecutionProvider"], disabled_optimizers=job["disabled"]
    )
    return lambda: session.run(None, feeds), ort.__version__, session.end_profiling


def openvino(job: dict[str, Any], feeds: dict[str, np.ndarray]) -> tuple[Call, str]:
    """OpenVINO at fixed shapes, set for latency and to the precision that the job asks for."""
    ov = importlib.import_module("openvino")  # untyped, and installed by few
    core = ov.Core()
    model = core.read_model(job["model"])
    model.reshape({name: list(value.shape) for name, value in feeds.items()})
    config = {"INFERENCE_NUM_THREADS": job["threads"], "NUM_STREAMS": 1, **job["config"]}
    compiled = core.compile_model(model, "CPU", config)
    request = compiled.create_infer_request()

    def call() -> list[Any]:
        results = request.infer(feeds, share_inputs=True, share_outputs=True)
        return [results[output] for output in compiled.outputs]

    return call, ov.__version__.split("-")[0]


def deepsparse(job: dict[str, Any], feeds: dict[str, np.ndarray]) -> tuple[Call, str]:
    """DeepSparse at fixed shapes. It writes these into the file that it is given, so it is given a copy."""
    os.environ.setdefault("NM_DISABLE_ANALYTICS", "1")  # it tells its makers where it runs otherwise
    engines = importlib.import_module("deepsparse")
    shapes = [list(value.shape) for value in feeds.values()]
    with tempfile.TemporaryDirectory() as folder:
        copy = shutil.copy(job["model"], folder)
        batch = shapes[0][0]
        engine = engines.Engine(copy, batch_size=batch, num_cores=job["threads"], input_shapes=shapes)
    values = list(feeds.values())
    return lambda: engine.run(values, val_inp=False), engines.__version__


LOADERS: dict[str, Callable[..., Any]] = {"onnxruntime": onnxruntime, "openvino": openvino, "deepsparse": deepsparse}


def keep(path: str, outputs: list[Any]) -> None:
    """Writes numeric outputs, each under its place among all."""
    arrays = {str(i): value for i, value in enumerate(outputs) if isinstance(value, np.ndarray)}
    numeric: dict[str, Any] = {place: value for place, value in arrays.items() if value.dtype.kind in _NUMBERS}
    np.savez(path, **numeric)


def main() -> None:
    """Whatever the engine writes to stdout goes to stderr; the answers have the real one to themselves."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    job = json.loads(sys.argv[1])
    try:
        with np.load(job["feeds"], allow_pickle=False) as archive:
            feeds = {name: archive[name] for name in archive.files}
        call, version, *end = LOADERS[job["loader"]](job, feeds)
        keep(job["outputs"], call())
        for _ in range(_WARM_UP - 1):
            call()
    except Exception as error:  # noqa: BLE001, the other side decides what a failure of this engine means
        answers.write(json.dumps({"error": f"{type(error).__name__}: {error}"}) + "\n")
        return
    answers.write(json.dumps({"version": version}) + "\n")
    counted = [False] * _WARM_UP
    for line in sys.stdin:
        if line.strip() == "profile":
            answers.write(json.dumps({"trace": end[0](), "counted": counted}) + "\n")
            continue
        call()  # not counted: the caches are still the engine's before
        times = []
        for _ in range(int(line)):
            begin = time.perf_counter_ns()
            call()
            times.append((time.perf_counter_ns() - begin) / 1e6)
        counted += [False, *[True] * len(times)]
        answers.write(json.dumps(times) + "\n")


if __name__ == "__main__":
    main()
