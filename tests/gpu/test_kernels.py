"""The archive for machines with a GPU, and what runs it, on the stand-in for the driver and the emulator."""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spa_compiler.kernels import activation
from spa_compiler.kernels.cuda import form as contract
from spa_compiler.kernels.cuda.blocks import Blocks
from spa_compiler.kernels.cuda.few import Few
from spa_compiler.kernels.cuda.form import DTYPES, Kernel
from spa_compiler.kernels.cuda.lowrank import LowRank
from spa_compiler.kernels.cuda.matvec import FourBit
from spa_compiler.kernels.cuda.two_four import TwoFour
from spa_compiler.kernels.cuda.vectors import Vectors
from tests.cuda_emulator import emulator
from tests.gpu import kernels, pack
from tests.gpu_harness import build_driver, in_child

FORMS = (Few(), Blocks(32, 32), FourBit(128), TwoFour())
SHAPES = ((40, 72, 1), (37, 75, 9))


def packer() -> pack.Packer:
    """An archive of a few small cases and bars."""
    made = pack.Packer()
    made.matrix(FORMS, ("fp16", "bf16"), ("rows", "planes"), SHAPES)
    made.matrix(FORMS[:2], ("fp32",), ("rows",), SHAPES[1:])
    made.matrix((Vectors(8),), ("fp16",), ("planes",), SHAPES[1:])
    made.low_rank((16,), ("fp32", "bf16"), SHAPES[1:])
    layer = made.block_layer(64, 96, 0.5, seed=1, count=2, rotate=True)
    layer["candidates"] = [c for c in layer["candidates"] if c["kernel"].startswith("spa_blocks32_32x")]
    made.bar("blocks", 2.0, 20, [layer, layer | {"count": 3}])
    made.bar("few", 1.5, 3, [made.few_layer(64, 96, 0.2, 3, seed=2)])
    layer = made.four_bit_layer(128, 256, 0.5, 1, seed=3, repeat=2)
    made.bar("four bits", 3.0, 1, [layer | {"candidates": layer["candidates"][:1]}])
    return made


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its images are the emulator's."""
    made, path = packer(), tmp_path_factory.mktemp("archive") / "kernels.zip"
    used = [*made.cases, *(c for b in made.bars for la in b["layers"] for c in la["candidates"])]
    pointers = {c["kernel"]: len(c["arrays"]) + 4 for c in used}
    made.kernels = {name: kernel for name, kernel in made.kernels.items() if name in pointers}
    library = emulator.library(tuple(made.kernels.values()))._name

    def emulated(kernel: Kernel) -> list[tuple[int, bool, bytes]]:
        return [(90, False, f"emulate {library} {kernel.name} {pointers[kernel.name]}".encode())]

    made.write(path, emulated, "the emulator")
    return path


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a name of its own: tests that run in the same child later find theirs by the name that a driver has."""
    return build_driver(tmp_path_factory.mktemp("driver"), name="fake.so")


def run(*arguments: Any) -> subprocess.CompletedProcess[str]:
    """As users run it: the file alone, with nothing of the project on the path."""
    command = [sys.executable, "-P", kernels.__file__, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd="/")


def test_parity_and_bars_run_through_the_driver(archive: Path, driver: Path, tmp_path: Path) -> None:
    done = run(archive, "--driver", driver, "--rounds", 3, "--json", tmp_path / "report.json")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    cases = json.loads(zipfile.ZipFile(archive).read("manifest.json"))["cases"]
    assert [r["status"] for r in report["parity"]] == ["ok"] * len(cases)
    assert {(r["form"], r["dtype"]) for r in report["parity"]} >= {(f.name, "bf16") for f in (*FORMS, LowRank(16))}
    assert {"rows", "planes"} == {r["layout"] for r in report["parity"]}
    assert [bar["bar"] for bar in report["bars"]] == ["blocks", "few", "four bits"]
    first = report["bars"][0]
    assert first["us"] == pytest.approx(2 * first["layers"][0]["us"] + 3 * first["layers"][1]["us"])
    for text in ("unstructured scattered", "block:32x32 in 32", "useful TFLOP/s", "GB/s"):
        assert text in done.stdout


def test_a_wrong_result_is_found(archive: Path, driver: Path, tmp_path: Path) -> None:
    """Weights that are others than the archive says."""
    wrong = tmp_path / "wrong.zip"
    with zipfile.ZipFile(archive) as old, zipfile.ZipFile(wrong, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name == "manifest.json":
                manifest = json.loads(content)
                for case in manifest["cases"][:1]:
                    case["weight"] = case["weight"] | {"seed": 5}
                manifest["cases"][-1]["weight"][0]["seed"] += 1
                manifest["bars"][1]["layers"][0]["weight"]["seed"] += 1
                content = json.dumps(manifest).encode()
            new.writestr(name, content)
    done = run(wrong, "--driver", driver, "--rounds", 1)
    assert done.returncode == 1
    assert done.stdout.count("WRONG") == 2
    assert "FAILED: few" in done.stdout
    assert "FAILED: blocks" not in done.stdout


def test_without_a_gpu_it_says_so_and_is_no_failure(archive: Path) -> None:
    for more, status in (((), 0), (("--strict",), 3)):
        done = run(archive, "--driver", "libno-such-driver.so.1", *more)
        assert done.returncode == status
        assert done.stderr.startswith("SKIPPED: no CUDA kernel was run. NVIDIA's driver is not here")
        assert "Traceback" not in done.stderr


@in_child
def test_memory_is_given_back_and_graphs_are_launched(archive: Path, driver: Path) -> None:
    gpu = kernels.Gpu(str(driver))
    library = ctypes.CDLL(str(driver))
    runner = kernels.Runner(kernels.Archive(archive), gpu)
    runner.check(runner.manifest["cases"][0], 0)
    assert library.fake_allocated() == 0
    runner.bar(runner.manifest["bars"][1], None, 4)
    assert library.fake_allocated() == 0
    assert library.fake_graph_launches() == 2 * (1 + 3) + 2 * 4  # both forms, then the better one
    assert library.fake_wrong() == 0


def test_columns_of_outputs_are_packed_from_their_recipe() -> None:
    made = pack.Packer()
    layer = made.vector_layer(48, 100, 0.25, 16, 64, seed=3)
    weight = kernels.weight_of(layer["weight"])
    kept = weight.reshape(3, 16, 100) != 0
    assert (kept == kept[:, :1]).all()
    assert layer["nonzeros"] == np.count_nonzero(weight) == 16 * 75
    stored = dict(zip(Vectors(16).arrays, layer["candidates"][0]["arrays"], strict=True))
    arrays = {name: made.arrays[spec["stored"]] for name, spec in stored.items()}
    np.testing.assert_array_equal(Vectors(16).unpack(arrays, 48, 100, "fp16"), weight)
    assert {c["kernel"] for c in layer["candidates"]} == set(made.kernels)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_are_those_of_the_contract(dtype: Any) -> None:
    values = np.random.default_rng(0).standard_normal(5000).astype(np.float32) * 100
    np.testing.assert_array_equal(kernels.to_bits(values, dtype), contract.to_bits(values, dtype))
    bits = contract.to_bits(values, dtype)
    np.testing.assert_array_equal(kernels.from_bits(bits, dtype), contract.from_bits(bits, dtype))


@pytest.mark.parametrize("act", activation.NAMES)
def test_activations_are_those_of_the_contract(act: str) -> None:
    x = np.linspace(-9, 9, 999)
    np.testing.assert_allclose(kernels.activate(x, act, 0.2, 0.5), activation.reference(x, act, 0.2, 0.5), atol=1e-12)


def test_recipes_are_exact_and_never_change() -> None:
    assert [hex(v) for v in kernels.noise(0, 2)] == ["0xe220a8397b1dcdaf", "0x6e789e6aa1b965f4"]  # SplitMix64 of 0
    weight = kernels.weight_of(pack.recipe(64, 96, 1 / 3, 32, 9, 2048))
    there = weight.reshape(2, 32, 3, 32).transpose(0, 2, 1, 3) != 0
    assert there.all(axis=(2, 3)).sum() == there.any(axis=(2, 3)).sum() == 2
    for levels, dtype in ((2048, "fp16"), (128, "bf16")):
        values = kernels.numbers(3, (4000,), levels)
        np.testing.assert_array_equal(contract.rounded(values, dtype), values)
        assert len(np.unique(values)) > levels * 0.8
        assert abs(values.mean()) < 0.03


@in_child
def test_the_code_of_the_gpu_s_own_kind_is_taken(archive: Path, driver: Path) -> None:
    runner = kernels.Runner(kernels.Archive(archive), kernels.Gpu(str(driver)))
    images = [{"capability": c, "ptx": p, "image": f"{c}{p}"} for c in (80, 90) for p in (False, True)]
    runner.manifest["kernels"]["one"] = {"images": images}
    for capability, image in ((80, "80False"), (86, "80False"), (90, "90False"), (120, "90True"), (75, None)):
        runner.gpu.capability = capability
        assert runner.image_of("one") == image
