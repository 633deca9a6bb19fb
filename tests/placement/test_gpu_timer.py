"""placement/gpu_timer.py with a CPU in the place of the GPU: bound inputs and outputs, run again and again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx.parser
import pytest

from spa_compiler.errors import EnvironmentFault
from spa_compiler.graph.session import CPU, Feeds
from spa_compiler.placement.gpu_timer import CudaTimer
from spa_compiler.placement.timer import Contender
from tests.networks import mlp

WIDTH = 64
pytestmark = pytest.mark.filterwarnings("ignore:Duplicate provider")


class HereTimer(CudaTimer):
    provider, device = CPU, "cpu"

    def __init__(self) -> None:
        super().__init__()
        self.options: list[dict[str, str]] = []

    def _open_on_gpu(self, contender: Contender, threads: int, options: Any) -> Any:
        self.options.append(dict(options))
        return super()._open_on_gpu(contender, threads, {})


GRAPH, PLAIN = {"enable_cuda_graph": "1"}, dict[str, str]()


def network(folder: Path) -> Contender:
    onnx.save(mlp(1.0, WIDTH), folder / "m.onnx")
    return Contender(folder / "m.onnx")


def feeds(batch: int = 2) -> Feeds:
    return {"x": np.random.default_rng(batch).standard_normal((batch, 3, WIDTH), np.float32)}


def test_bound_calls_compute_what_sessions_do_and_write_to_the_same_place(tmp_path: Path) -> None:
    contender, timer = network(tmp_path), HereTimer()
    want = timer.run(contender, feeds(), 1)["y"]
    placed = timer.placed(feeds()["x"])
    call = timer.bound_to(timer.open(contender), {"x": placed})
    places = {call()[0].data_ptr() for _ in range(3)}
    assert len(places) == 1
    np.testing.assert_array_equal(call()[0].numpy(), want)
    other = np.random.default_rng(9).standard_normal((2, 3, WIDTH), np.float32)
    placed.update_inplace(other)
    np.testing.assert_array_equal(call()[0].numpy(), timer.run(contender, {"x": other}, 1)["y"])
    assert {call()[0].data_ptr()} == places


def test_every_time_has_sessions_of_its_own(tmp_path: Path) -> None:
    """A CUDA graph reads and writes where it was recorded: not at another shape, and not what was freed since."""
    contender, timer = network(tmp_path), HereTimer()
    for batch in (2, 4, 2):
        assert timer.time({"a": contender}, feeds(batch), 1, 0.0, 1)["a"].median_us > 0
    assert timer.options == [GRAPH] * 3


class NoneAtOpening(HereTimer):
    """As where a node is on the CPU."""

    def _open_on_gpu(self, contender: Contender, threads: int, options: Any) -> Any:
        session = super()._open_on_gpu(contender, threads, options)
        if options:
            raise RuntimeError("no graph here\nand more words")
        return session


class NoneAtRunning(HereTimer):
    """As where an operator waits for the GPU while it is recorded."""

    def _captures(self, session: Any) -> bool:
        return self.options[-1] == GRAPH

    def bound(self, session: Any, feeds: Feeds) -> Callable[[], Any]:
        if self._captures(session):
            raise RuntimeError("no graph here")
        return super().bound(session, feeds)


@pytest.mark.parametrize("kind", [NoneAtOpening, NoneAtRunning])
def test_without_a_graph_where_none_can_be_made(
    tmp_path: Path, kind: type[HereTimer], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    timer = kind()
    assert timer.time({"a": network(tmp_path)}, feeds(), 1, 0.0, 1)["a"].median_us > 0
    assert timer.options == [GRAPH, PLAIN]
    assert [record.message for record in caplog.records] == ["timed without a CUDA graph: no graph here"]


def test_a_call_that_fails_without_a_graph_is_no_matter_of_graphs(tmp_path: Path) -> None:
    timer = HereTimer()
    with pytest.raises(Exception, match="Got: 3 Expected: 64"):
        timer.time({"a": network(tmp_path)}, {"x": np.ones((1, 3, 3), np.float32)}, 1, 0.0, 1)
    assert timer.options == [GRAPH]


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_onnxruntime_that_takes_the_cpu_instead_is_refused(tmp_path: Path) -> None:
    """It does so without an error where CUDA's libraries are missing."""

    class Absent(CudaTimer):
        provider = "NoSuchExecutionProvider"

    for work in (
        lambda: Absent().time({"a": network(tmp_path)}, feeds(), 1, 0.0, 1),
        lambda: Absent().run(network(tmp_path), feeds(), 1),
    ):
        with pytest.raises(EnvironmentFault, match=r"does not use the GPU: .* without NoSuchExecutionProvider"):
            work()


def test_bfloat16_goes_in_and_comes_out() -> None:
    """numpy has no such type, nor does ONNX Runtime's own way from and to numpy."""
    text = "g (bfloat16[N] x, float[N] z) => (bfloat16[N] y, float[N] w) { y = Identity(x)  w = Neg(z) }"
    proto = onnx.parser.parse_model('<ir_version: 8, opset_import: ["" : 17]> ' + text)
    contender, timer = Contender(proto.SerializeToString()), HereTimer()
    x = np.linspace(-3, 3, 7).astype(ml_dtypes.bfloat16)
    placed = timer.placed(x)
    assert placed.data_type() == "tensor(bfloat16)"
    z = np.arange(7, dtype=np.float32)
    found = timer.run(contender, {"x": x, "z": z}, 1)
    assert found["y"].dtype == np.float32
    np.testing.assert_array_equal(found["y"], x.astype(np.float32))
    np.testing.assert_array_equal(found["w"], -z)
    assert timer.time({"a": contender}, {"x": x, "z": z}, 1, 0.0, 1)["a"].runs >= 1
