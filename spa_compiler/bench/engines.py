"""The runtimes a model can be raced in, each at its best honest settings.

| engine | what it is |
|---|---|
| onnxruntime | default session options |
| onnxruntime-best | the fastest documented settings for float32: Attention and BiasGelu fused offline where the model is an encoder, SkipLayerNormFusion off (the fused op is slower than its parts), denormals as zero |
| onnxruntime-int8 | dense int8: static QDQ, calibrated on drawn inputs, for models with convolutions; dynamic for all others (static int8 encoders are slower than float32 in ONNX Runtime) |
| openvino | float32, one stream, fixed shapes |
| openvino-bf16 | the same, allowed to compute in bfloat16 |
| openvino-int8 | the same on a static QDQ model, whatever its operators |
| openvino-int8-vnni | the same without AMX: where a virtual machine shows AMX, OpenVINO's int8 convolutions were seen to run in float32 |
| deepsparse | DeepSparse, which was given up: its last engine wants an interpreter with numpy below 2, `--python deepsparse=PATH`. Its licence allows evaluation in development and testing alone |
"""  # noqa: E501, a table row is one line

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spa_compiler.errors import UsageError
from spa_compiler.graph.session import Feeds, onnxruntime_version
from spa_compiler.targets.machine import cache_dir

_log = logging.getLogger(__name__)

#: operators of the models that dynamic quantization serves badly and static quantization well
_CONVOLUTIONS = frozenset({"Conv", "ConvTranspose"})
#: the first opset with scales for each channel
_PER_CHANNEL = 13


@dataclass(frozen=True)
class Engine:
    """A runtime and how to set it up."""

    name: str
    loader: str  # one of bench/worker.py's
    form: str = ""  # of the model file: as it is, "fused", "int8" or "int8-static"
    disabled: tuple[str, ...] = ()  # ONNX Runtime's graph optimizers that stay off
    config: dict[str, str] = field(default_factory=dict)  # ONNX Runtime's session entries, OpenVINO's properties
    env: dict[str, str] = field(default_factory=dict)  # of its process, besides ours


_BEST = {"session.set_denormal_as_zero": "1"}
ENGINES = {
    engine.name: engine
    for engine in (
        Engine("onnxruntime", "onnxruntime"),
        Engine("onnxruntime-best", "onnxruntime", "fused", ("SkipLayerNormFusion",), _BEST),
        Engine("onnxruntime-int8", "onnxruntime", "int8"),
        Engine("openvino", "openvino", config={"INFERENCE_PRECISION_HINT": "f32"}),
        Engine("openvino-bf16", "openvino", config={"INFERENCE_PRECISION_HINT": "bf16"}),
        Engine("openvino-int8", "openvino", "int8-static", config={"INFERENCE_PRECISION_HINT": "f32"}),
        Engine(
            "openvino-int8-vnni",
            "openvino",
            "int8-static",
            config={"INFERENCE_PRECISION_HINT": "f32"},
            env={"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_FP16"},
        ),
        Engine("deepsparse", "deepsparse"),
    )
}
#: the artifact itself: stock ONNX Runtime, default options, its kernels registered
ARTIFACT = Engine("spa", "onnxruntime")


def parse(text: str) -> list[Engine]:
    """Engines by their names, separated by commas, each once.

    Raises:
        UsageError: an unknown name.
    """
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    for name in names:
        if name not in ENGINES:
            raise UsageError(f"unknown engine {name!r}", fix=f"There are {', '.join(ENGINES)}")
    if not names:
        raise UsageError("no engine named", fix=f"There are {', '.join(ENGINES)}")
    return [ENGINES[name] for name in names]


def prepare(engine: Engine, model: Path, calibration: Sequence[Feeds]) -> Path:
    """The file that `engine` loads: the model, or a fused or quantized copy, made once and kept in the cache.

    Args:
        calibration: drawn inputs, for static quantization.

    Raises:
        Exception: whatever ONNX Runtime's tools raise about a model they cannot work on.
    """
    if not engine.form:
        return model
    operators = _operators(model)
    if engine.form == "fused":
        # The fusions know encoders; elsewhere they find nothing and cost a copy of the model.
        if "Softmax" not in operators or operators & _CONVOLUTIONS:
            return model
        return _cached(model, "fused", lambda target: _fuse(model, target))
    if engine.form == "int8-static" or operators & _CONVOLUTIONS:
        return _cached(model, "int8-static", lambda target: _quantize_static(model, target, calibration))
    return _cached(model, "int8-dynamic", lambda target: _quantize_dynamic(model, target))


def _operators(model: Path) -> set[str]:
    import onnx

    return {node.op_type for node in onnx.load(str(model), load_external_data=False).graph.node}


def _cached(model: Path, kind: str, make: Callable[[Path], None]) -> Path:
    stat = model.stat()
    facts = f"{model.resolve()} {stat.st_size} {stat.st_mtime_ns} {onnxruntime_version()}"
    folder = cache_dir() / "bench"
    folder.mkdir(exist_ok=True)
    target = folder / f"{model.stem}-{hashlib.sha256(facts.encode()).hexdigest()[:12]}-{kind}.onnx"
    if not target.exists():
        _log.info("preparing %s (%s)", model, kind)
        partial = target.with_name(f"{target.stem}.{os.getpid()}.part.onnx")
        try:
            # These tools print and warn about things that nobody can act on; stdout belongs to the result.
            logging.disable(logging.WARNING)
            with contextlib.redirect_stdout(sys.stderr):
                make(partial)
            partial.rename(target)
        finally:
            logging.disable(logging.NOTSET)
            partial.unlink(missing_ok=True)
    return target


def _fuse(model: Path, target: Path) -> None:
    from onnxruntime.transformers.fusion_options import FusionOptions
    from onnxruntime.transformers.optimizer import optimize_model

    options = FusionOptions("bert")
    options.enable_skip_layer_norm = False
    options.enable_bias_skip_layer_norm = False
    options.enable_embed_layer_norm = False
    # 0 heads, 0 hidden: to be found in the graph. Level 0: ONNX Runtime's own fusions come when it loads the result.
    fused = optimize_model(str(model), "bert", num_heads=0, hidden_size=0, opt_level=0, optimization_options=options)
    fused.save_model_to_file(str(target))


def _quantize_dynamic(model: Path, target: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with _clean(model, target) as clean:
        quantize_dynamic(clean, target, weight_type=QuantType.QInt8)


def _quantize_static(model: Path, target: Path, calibration: Sequence[Feeds]) -> None:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        feeds: Iterator[Any] = iter(calibration)

        def get_next(self) -> Feeds | None:
            return next(self.feeds, None)

    with _clean(model, target) as clean:
        quantize_static(
            clean, target, Reader(), quant_format=QuantFormat.QDQ, per_channel=True, weight_type=QuantType.QInt8
        )


@contextlib.contextmanager
def _clean(model: Path, target: Path) -> Iterator[Path]:
    """The model after ONNX Runtime's own preparation for quantization, without which fused ops stay float32.

    Its opset becomes 13 if it is older: scales for each channel are not in operators before that, but the quantizer
    writes them all the same.
    """
    import onnx
    import onnx.version_converter
    from onnxruntime.quantization import quant_pre_process

    clean = target.with_suffix(".clean.onnx")
    try:
        quant_pre_process(str(model), str(clean), skip_symbolic_shape=True)
        proto = onnx.load(str(clean))
        if any(opset.domain in ("", "ai.onnx") and opset.version < _PER_CHANNEL for opset in proto.opset_import):
            onnx.save(onnx.version_converter.convert_version(proto, _PER_CHANNEL), str(clean))
        yield clean
    finally:
        clean.unlink(missing_ok=True)
