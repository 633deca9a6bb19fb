"""Times of whole models on this machine's GPU: bound inputs and outputs, CUDA graphs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np
from onnx import TensorProto, helper

from spa_compiler.errors import EnvironmentFault
from spa_compiler.graph.session import CPU, CUDA, Feeds, flatten, open_session, run, runtime
from spa_compiler.placement.timer import Contender, LocalTimer

if TYPE_CHECKING:
    import onnxruntime as ort

_log = logging.getLogger(__name__)

_BFLOAT16 = "tensor(bfloat16)"


class CudaTimer(LocalTimer):
    """Takes times on this machine's GPU: inputs and outputs stay in its memory, and every call waits for the GPU.

    Kernels are launched from a CUDA graph where ONNX Runtime can make one: sizes are fixed then, and no node may run on
    the CPU. A graph reads and writes the places of the call that it was recorded in, so no session serves a second one.
    """

    provider, device = CUDA, "cuda"
    reuses = False

    def run(self, contender: Contender, feeds: Feeds, threads: int) -> Feeds:
        """One run, without a CUDA graph; bfloat16 comes out as float32, since numpy has no such type."""
        session = self._open_on_gpu(contender, threads, {})
        values = (*session.get_inputs(), *session.get_outputs())
        if not any(value.type == _BFLOAT16 for value in values):
            return dict(flatten(run(session, feeds)))
        outputs = self.bound(session, feeds)()
        wide = [self._cast(v, TensorProto.FLOAT) if v.data_type() == _BFLOAT16 else v for v in outputs]
        names = [output.name for output in session.get_outputs()]
        return {name: value.numpy() for name, value in zip(names, wide, strict=True)}

    def open(self, contender: Contender, threads: int = 1, *, graph: bool = True) -> ort.InferenceSession:
        """A session on the GPU, whose second run at the latest is recorded into a CUDA graph.

        Raises:
            EnvironmentFault: ONNX Runtime does not use the GPU.
            Exception: of ONNX Runtime's, where a node would run on the CPU.
        """
        return self._open_on_gpu(contender, threads, {"enable_cuda_graph": "1"} if graph else {})

    def bound(self, session: ort.InferenceSession, feeds: Feeds) -> Callable[[], list[ort.OrtValue]]:
        """A call that runs on these feeds and returns the outputs, all in the GPU's memory, always at the same places.

        It has run once when this returns.
        """
        return self.bound_to(session, {name: self.placed(value) for name, value in feeds.items()})

    def bound_to(
        self, session: ort.InferenceSession, feeds: Mapping[str, ort.OrtValue]
    ) -> Callable[[], list[ort.OrtValue]]:
        """`bound`, to inputs that are in the GPU's memory."""
        binding = session.io_binding()
        for name, value in feeds.items():
            binding.bind_ortvalue_input(name, value)
        names = [output.name for output in session.get_outputs()]
        for name in names:
            binding.bind_output(name, self.device)
        # A graph is captured in this run or the next one, and then writes to the same places for ever.
        session.run_with_iobinding(binding)
        outputs = list(binding.get_outputs())
        for name, value in zip(names, outputs, strict=True):
            binding.bind_ortvalue_output(name, value)

        def call() -> list[ort.OrtValue]:
            session.run_with_iobinding(binding)
            binding.synchronize_outputs()
            return outputs

        return call

    def placed(self, value: np.ndarray) -> ort.OrtValue:
        """An array in the GPU's memory."""
        if value.dtype != ml_dtypes.bfloat16:
            return runtime().OrtValue.ortvalue_from_numpy(value, self.device, 0)
        wide = runtime().OrtValue.ortvalue_from_numpy(value.astype(np.float32), self.device, 0)
        return self._cast(wide, TensorProto.BFLOAT16)

    def _session(self, contender: Contender, threads: int) -> ort.InferenceSession:
        try:
            return self.open(contender, threads)
        except EnvironmentFault:
            raise
        except Exception as error:  # noqa: BLE001 - ONNX Runtime's errors have no common root
            _log.info("timed without a CUDA graph: %s", str(error).splitlines()[0])
            return self.open(contender, threads, graph=False)

    def _open_on_gpu(self, contender: Contender, threads: int, options: Mapping[str, str]) -> ort.InferenceSession:
        providers = ((self.provider, options), CPU)
        session = open_session(contender.model, threads=threads, library=contender.library, providers=providers)
        if self.provider not in session.get_providers():  # it says so in its log alone, and takes the CPU
            raise EnvironmentFault(
                f"ONNX Runtime does not use the GPU: it made a session without {self.provider}",
                fix="It needs onnxruntime-gpu, with CUDA's and cuDNN's libraries where it finds them: "
                "pip install 'onnxruntime-gpu[cuda,cudnn]' brings them",
            )
        return session

    def _call(
        self, contender: Contender, session: ort.InferenceSession, feeds: Feeds, threads: int
    ) -> Callable[[], object]:
        try:
            return self.bound(session, feeds)
        except Exception as error:
            if not self._captures(session):
                raise
            _log.info("timed without a CUDA graph: %s", str(error).splitlines()[0])
            return self.bound(self.open(contender, threads, graph=False), feeds)

    def _captures(self, session: ort.InferenceSession) -> bool:
        """Whether a session was to make a CUDA graph."""
        return str(session.get_provider_options().get(self.provider, {}).get("enable_cuda_graph", "0")) == "1"

    def _cast(self, value: ort.OrtValue, to: int) -> ort.OrtValue:
        """A value in another type: made by a model, since nothing on the way through numpy knows bfloat16."""
        given = TensorProto.FLOAT if to == TensorProto.BFLOAT16 else TensorProto.BFLOAT16
        session = self._open_on_gpu(Contender(_casting(given, to)), 1, {})
        binding = session.io_binding()
        binding.bind_ortvalue_input("x", value)
        binding.bind_output("y", self.device)
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        return binding.get_outputs()[0]


def _casting(given: int, to: int) -> bytes:
    """A model of one Cast."""
    x, y = (helper.make_tensor_value_info(name, kind, None) for name, kind in (("x", given), ("y", to)))
    graph = helper.make_graph([helper.make_node("Cast", ["x"], ["y"], to=to)], "cast", [x], [y])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    return bytes(made.SerializeToString())
