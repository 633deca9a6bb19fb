"""spa-compiler: turns the zeros and coupled channels of an ONNX model into speed in stock ONNX Runtime.

The whole public API:

    compile(model, ...) -> Result      an artifact folder from a model
    compress(model, recipe, ...)       a recipe's passes alone: the model in standard ops, and the report
    analyze(model) -> Analysis         groups of coupled channels, and what pins the rest
    load(folder) -> InferenceSession   an artifact in ONNX Runtime
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spa_compiler.analysis import analyze
    from spa_compiler.compiler import Result, compile, load
    from spa_compiler.compression import compress

__all__ = ["Result", "__version__", "analyze", "compile", "compress", "load"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:  # `import spa_compiler` must not pull in TVM: --help answers at once
    if name == "analyze":
        from spa_compiler.compiler import analyze

        return analyze
    if name == "compress":
        from spa_compiler.compression import compress

        return compress
    if name in __all__:
        from spa_compiler import compiler

        return getattr(compiler, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
