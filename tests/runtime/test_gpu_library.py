"""A kernels.so for GPUs as a file, in stock ONNX Runtime on a CPU, and where the driver is missing, too old or does not start."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx.parser
import onnxruntime as ort
import pytest
from elftools.elf.elffile import ELFFile
from onnx import TensorProto, helper, numpy_helper

from spa_compiler.kernels.cuda.form import Epilogue
from spa_compiler.runtime import link
from spa_compiler.runtime.gpu import Code, GpuLibrary, GpuOp, Variant, build, kernels_of, operator
from spa_compiler.targets.machine import cache_dir
from tests import gpu_harness
from tests.gpu_harness import RULES, K, N, kernel, library_of, weights
from tests.runtime.test_link import IMPORTS

OP = gpu_harness.operator(residual=True)
GPU_IMPORTS = IMPORTS | {"dlopen", "dlsym", "dlerror", "memcmp", "bcmp", "pthread_mutex_lock", "pthread_mutex_unlock"}


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gpu_harness.build(library_of([OP]), tmp_path_factory.mktemp("gpu"))


# ---- the file ----


def test_it_exports_one_symbol_and_needs_no_cuda(library: Path) -> None:
    with library.open("rb") as file:
        elf = ELFFile(file)
        symbols = list(elf.get_section_by_name(".dynsym").iter_symbols())
        assert [s.name for s in symbols if s.name and s["st_shndx"] != "SHN_UNDEF"] == ["RegisterCustomOps"]
        assert {s.name for s in symbols if s.name and s["st_shndx"] == "SHN_UNDEF"} <= GPU_IMPORTS
        needed = {t.needed for t in elf.get_section_by_name(".dynamic").iter_tags("DT_NEEDED")}
        assert needed <= {"libc.so.6", "libm.so.6", "libdl.so.2"}
        for _, versions in elf.get_section_by_name(".gnu.version_r").iter_versions():
            for version in versions:
                assert tuple(map(int, version.name.removeprefix("GLIBC_").split("."))) <= (2, 28)
        segments = {s["p_type"]: s["p_flags"] for s in elf.iter_segments()}
        assert segments["PT_GNU_STACK"] & 1 == 0


def test_code_lies_in_it_as_it_is_and_ptx_ends(library: Path) -> None:
    content = library.read_bytes()
    for name in ("few", "some", "many"):
        for arch in ("sm_80", "sm_90"):
            assert content.count(f"cubin {arch} {name}\0".encode()) == 1
        assert content.count(f"ptx sm_90 {name}\0".encode()) == 1


def test_equal_links_are_equal_and_new_code_is_never_old_code(tmp_path: Path) -> None:
    def linked(word: str) -> bytes:
        op = gpu_harness.operator(kernels=[(None, kernel("few"))])
        codes = {"few": [Code("sm_80", word.encode() * 100)]}
        link.link([], ("x86-64",), tmp_path / "kernels.so", GpuLibrary((op,), ("sm_80",), codes))
        return (tmp_path / "kernels.so").read_bytes()

    first, second = linked("one"), linked("two")
    assert b"one" * 100 in first
    assert b"two" * 100 in second, "a cache must know more of what is taken in than its name"
    assert linked("one") == first
    assert str(tmp_path).encode() not in first
    assert str(cache_dir()).encode() not in first


def test_a_model_without_such_nodes_gets_a_library_that_does_no_harm(tmp_path: Path) -> None:
    path = gpu_harness.build(library_of([]), tmp_path)
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 21]> g (float[N] x) => (float[N] y) { y = Abs(x) }'
    )
    options = ort.SessionOptions()
    options.register_custom_ops_library(str(path))
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    assert session.run(None, {"x": np.array([-2, 3], np.float32)})[0].tolist() == [2, 3]


# ---- in ONNX Runtime without a GPU ----


def model(read_as: int = N) -> bytes:
    """The node, and a product that reads it as [.., read_as]."""
    arrays = weights()
    node = helper.make_node(OP.op_type, ["x", "r", *arrays], ["y"], domain="ai.spa", site="a/MatMul", n=N, k=K)
    arrays["second"] = np.zeros((read_as, 3), np.float16)
    shape = ["batch", "tokens"]
    graph = helper.make_graph(
        [node, helper.make_node("MatMul", ["y", "second"], ["z"])],
        "gpu",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT16, [*shape, s]) for name, s in (("x", K), ("r", N))],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT16, [*shape, 3])],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("ai.spa", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString()


def session(library: Path, model: bytes) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.register_custom_ops_library(str(library))
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def test_a_session_on_the_cpu_says_what_is_missing(library: Path) -> None:
    with pytest.raises(Exception) as raised:
        session(library, model())
    message = str(raised.value)
    assert f"ai.spa::{OP.op_type} at site 'a/MatMul': this model was compiled for NVIDIA GPUs (sm_80, sm_90" in message
    assert "CUDAExecutionProvider" in message
    assert "portable.onnx runs on CPUs" in message


def test_onnx_runtime_infers_the_shape_that_the_node_will_have(library: Path) -> None:
    with pytest.raises(Exception, match="Incompatible dimensions"):
        session(library, model(read_as=N + 1))


# ---- the driver ----

SCRIPT = """
import sys
from pathlib import Path
from tests import gpu_harness
if sys.argv[2]:
    fake = gpu_harness.Driver(Path(sys.argv[2]))
    fake.fail(sys.argv[3], 100)
op = gpu_harness.operator(residual=True)
there = gpu_harness.register(Path(sys.argv[1]))[op.op_type, "CUDAExecutionProvider"]
for turn in range(2):
    try:
        there.destroy(there.create(gpu_harness.node(op)))
        print("made")
    except gpu_harness.Refused as error:
        print(error)
    if sys.argv[2]:
        fake.fail("nothing", 0)
"""


def told(library: Path, driver: Path | str, fail: str = "nothing", folder: Path | None = None) -> list[str]:
    """What two attempts to make a node say, in a new process; a failure of the driver is over before the second one.

    Args:
        folder: where libraries are looked for first.
    """
    command = [sys.executable, "-c", SCRIPT, str(library), str(driver), fail]
    environment = os.environ | ({} if folder is None else {"LD_LIBRARY_PATH": str(folder)})
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout.splitlines()


def test_no_driver(library: Path, tmp_path: Path) -> None:
    """A file in its place hides a driver that this machine may have."""
    (tmp_path / "libcuda.so.1").write_bytes(b"")
    first, second = told(library, "", folder=tmp_path)
    assert first == second
    assert f"ai.spa::{OP.op_type} at site 'encoder/dense': NVIDIA's driver cannot be loaded: " in first
    assert "libcuda.so.1: file too short" in first


def test_a_driver_that_does_not_start_is_asked_again(library: Path, tmp_path: Path) -> None:
    first, second = told(library, gpu_harness.build_driver(tmp_path), "cuInit")
    assert "cuInit: 100 an unknown error (the driver has no words for it)" in first
    assert second == "made"


def test_a_driver_without_a_function(library: Path, tmp_path: Path) -> None:
    first, _ = told(library, gpu_harness.build_driver(tmp_path, "-DWITHOUT_INIT"))
    assert "NVIDIA's driver is too old: libcuda.so.1 has no cuInit" in first


# ---- operators ----


def test_names_say_everything_but_sizes_and_weights() -> None:
    some = [
        gpu_harness.operator(),
        gpu_harness.operator("planes"),
        gpu_harness.operator("pixel"),
        gpu_harness.operator(act="relu"),
        gpu_harness.operator(residual=True),
        gpu_harness.operator(kernels=[(None, kernel("few"))]),
        gpu_harness.operator(kernels=[(4, kernel("few")), (None, kernel("many"))]),
        gpu_harness.operator(kernels=[(5, kernel("few")), (None, kernel("many"))]),
        GpuOp("block:4x4", "bf16", "rows", Epilogue(), RULES, gpu_harness.operator().variants),
        GpuOp("block:4x4", "fp16", "rows", Epilogue(), RULES[:-1], gpu_harness.operator().variants),
    ]
    assert len({op.op_type for op in some}) == len(some)
    assert gpu_harness.operator().op_type == gpu_harness.operator().op_type


@pytest.mark.parametrize("limits", [[], [4], [None, None], [None, 4], [4, 4, None], [8, 4, None], [*range(16), None]])
def test_variants_are_for_more_and_more_tokens(limits: list[int | None]) -> None:
    with pytest.raises(ValueError, match="variants"):
        GpuOp("f", "fp16", "rows", Epilogue(), RULES, tuple(Variant(most, kernel("few")) for most in limits))


def test_a_kernel_for_newer_architectures_is_not_compiled_for_older_ones() -> None:
    new = gpu_harness.operator(kernels=[(None, kernel("few"))])
    newer = gpu_harness.kernel("few").__class__(**vars(kernel("few")) | {"oldest": 90})
    op = GpuOp("f", "fp16", "rows", Epilogue(), RULES, (Variant(None, newer),))
    assert list(kernels_of([new, op])) == ["few"]
    with pytest.raises(ValueError, match="few needs sm_90, so it cannot be compiled for sm_80"):
        build([op], ["sm_80", "sm_90"])


def test_an_operator_of_a_form_has_its_rules() -> None:
    class Form:
        name = "test"

        def rules(self, dtype: str) -> tuple[object, ...]:
            return RULES if dtype == "fp16" else ()

    op = operator(Form(), "fp16", "rows", Epilogue(), [(4, kernel("few")), (None, kernel("many"))])  # type: ignore[arg-type]
    assert (op.form, op.rules) == ("test", RULES)
    assert [v.most_tokens for v in op.variants] == [4, None]
