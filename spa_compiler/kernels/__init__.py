"""Generated kernels, one format or step per file: the format in words, pack/unpack, a numpy reference, the TVMScript.

A kernel is a C function on raw pointers. Nothing here knows ONNX, ONNX Runtime or threads.

Activations live in panels: a tile of tokens is `[features, lanes]` (feature-major), `lanes` one of
`panel.LANE_COUNTS`. Every step has one function per lane count, so that one token costs one lane, not sixteen.
"""

from spa_compiler.errors import EnvironmentFault

try:
    from tvm import tirx as _tirx  # noqa: F401 - the part of TVM that everything here is written in
except ImportError as error:
    raise EnvironmentFault(
        f"Apache TVM cannot be imported: {error}",
        fix="Install it: pip install apache-tvm. (The package called tvm on PyPI is something else; if it is "
        "installed, remove it first: pip uninstall tvm)",
    ) from error
