"""ONNX Runtime sessions: quiet, one thread unless asked, with clear words where ONNX Runtime is missing or broken."""

from __future__ import annotations

import importlib.metadata
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from spa_compiler.errors import EnvironmentFault
from spa_compiler.graph.model import Model
from spa_compiler.graph.save import save, to_proto, weight_bytes

if TYPE_CHECKING:
    import onnxruntime as ort

Feeds: TypeAlias = dict[str, np.ndarray[Any, Any]]
"""Input name -> array: what a session is run with."""

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
"""ONNX Runtime's names of providers."""

_QUIET = 4  # fatal errors only; all others reach us as exceptions
_IN_MEMORY_BYTES = 32 << 20  # models above this go through a temporary file, whose weights ONNX Runtime maps


def runtime() -> Any:
    """The `onnxruntime` module, its telemetry off unless the user's environment says otherwise.

    Raises:
        EnvironmentFault: it is missing, cannot be imported, or both of its wheels are installed.
    """
    installed = [name for name in ("onnxruntime", "onnxruntime-gpu") if _version(name) is not None]
    if len(installed) > 1:
        raise EnvironmentFault(
            "onnxruntime and onnxruntime-gpu are both installed, and each overwrites files of the other",
            fix="Mend it with these two commands: `pip uninstall -y onnxruntime onnxruntime-gpu`, then "
            "`pip install onnxruntime` (or `pip install onnxruntime-gpu` on a CUDA machine)",
        )
    # From 1.29 on ONNX Runtime reports to its makers unless this is set before it is loaded.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        import onnxruntime
    except ImportError as error:
        if not installed:
            raise EnvironmentFault(
                "ONNX Runtime is not installed", fix='Install it: pip install "spa-compiler[cpu]"'
            ) from error
        raise EnvironmentFault(
            f"ONNX Runtime is installed but cannot be imported: {error}",
            fix='Install it again: pip install --force-reinstall "spa-compiler[cpu]"',
        ) from error
    return onnxruntime


def onnxruntime_version() -> str:
    """Version of the installed ONNX Runtime. Raises EnvironmentFault as `runtime` does."""
    return str(runtime().__version__)


def open_session(
    model: Path | bytes,
    *,
    threads: int = 1,
    library: Path | None = None,
    optimize: bool | str = "all",
    providers: Sequence[str | tuple[str, Mapping[str, str]]] = (CPU,),
    prepack: bool = True,
) -> ort.InferenceSession:
    """A session on a model file or on serialized bytes.

    Args:
        threads: intra-op threads; operators run one after the other.
        library: a custom-op library to register.
        optimize: `"all"` (or True), `"extended"`, `"basic"`, or `"none"` (or False): graph optimization level.
        providers: execution providers, best first, with their options or without.
        prepack: lay weights out anew when they are loaded, which takes as much memory again. False: in every run.

    Raises:
        EnvironmentFault: see `runtime`.
    """
    ort = runtime()
    levels = ort.GraphOptimizationLevel
    level = ("all" if optimize else "none") if isinstance(optimize, bool) else optimize
    options = ort.SessionOptions()
    options.log_severity_level = _QUIET
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Several sessions are timed in turns here: threads that spin on after a run would take the cores of the next one's.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.graph_optimization_level = {
        "all": levels.ORT_ENABLE_ALL,
        "extended": levels.ORT_ENABLE_EXTENDED,
        "basic": levels.ORT_ENABLE_BASIC,
        "none": levels.ORT_DISABLE_ALL,
    }[level]
    if not prepack:
        options.add_session_config_entry("session.disable_prepacking", "1")
    if library is not None:
        options.register_custom_ops_library(str(library))
    return ort.InferenceSession(
        str(model) if isinstance(model, Path) else model, sess_options=options, providers=list(providers)
    )


def open_model(
    model: Model,
    *,
    threads: int = 1,
    optimize: bool | str = "all",
    outputs: Sequence[str] = (),
    prepack: bool = True,
) -> ort.InferenceSession:
    """A session on a model in memory; a large one goes through a temporary file.

    Args:
        outputs: names of further tensors of the outermost graph to give out, after the model's own outputs.
        prepack: as for `open_session`; without it, the weights of a large model stay in the file.
    """
    if weight_bytes(model) <= _IN_MEMORY_BYTES:
        data = to_proto(model, extra_outputs=outputs).SerializeToString()
        return open_session(data, threads=threads, optimize=optimize, prepack=prepack)
    with tempfile.TemporaryDirectory(prefix="spa-model-") as folder:  # the open session keeps what it has mapped
        path = Path(folder) / "model.onnx"
        save(model, path, threshold=0, extra_outputs=outputs)
        return open_session(path, threads=threads, optimize=optimize, prepack=prepack)


def run(session: ort.InferenceSession, feeds: Feeds) -> Feeds:
    """Output name -> value, for all outputs."""
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def flatten(outputs: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
    """Outputs as arrays: the elements of sequences and maps become outputs of their own, `name[i]`, `name[key]`."""
    for name, value in outputs.items():
        if isinstance(value, list):
            yield from flatten({f"{name}[{i}]": element for i, element in enumerate(value)})
        elif isinstance(value, Mapping):
            yield from flatten({f"{name}[{key}]": element for key, element in value.items()})
        else:
            yield name, np.asarray(value)


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
