"""Architectures and their limits; a device as its driver describes it."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import pytest

from spa_compiler.errors import EnvironmentFault, UsageError
from spa_compiler.targets import cuda


@pytest.mark.parametrize(
    "asked, given",
    [("sm_80", "sm_80"), ("sm_90a", "sm_90"), ("sm_87", "sm_86"), ("sm_103", "sm_100"), ("sm_121", "sm_120")],
)
def test_an_unlisted_architecture_has_the_limits_of_an_older_one(asked: str, given: str) -> None:
    assert cuda.architecture(asked).name == given


@pytest.mark.parametrize("name", ["sm_75", "sm_50", "gfx90a"])
def test_older_ones_have_no_kernels(name: str) -> None:
    with pytest.raises(UsageError, match="sm_80 or newer"):
        cuda.architecture(name)


def test_tf32_has_half_the_rate() -> None:
    arch = cuda.architecture("sm_90")
    assert arch.tflops("fp32") == arch.tflops("fp16") / 2 == arch.tflops("bf16") / 2


class FakeDriver:
    """A driver of one GPU."""

    def __init__(self, status: int = 0, count: int = 1) -> None:
        self.status, self.count = status, count

    def cuInit(self, flags: int) -> int:  # noqa: N802
        return self.status

    def __getattr__(self, name: str) -> Any:
        attributes = {75: 9, 76: 0, 16: 132, 38: 62914560}

        def put(pointer: Any, value: int) -> int:
            pointer._obj.value = value
            return 0

        return {
            "cuDeviceGetCount": lambda p: put(p, self.count),
            "cuDeviceGet": lambda p, index: put(p, index),
            "cuDeviceGetName": lambda buffer, size, handle: setattr(buffer, "value", b"NVIDIA H200") or 0,
            "cuDeviceTotalMem_v2": lambda p, handle: put(p, 150 << 30),
            "cuDriverGetVersion": lambda p: put(p, 13000),
            "cuDeviceGetAttribute": lambda p, number, handle: put(p, attributes[number]),
        }[name]


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    fake = FakeDriver()
    monkeypatch.setattr(cuda, "ctypes", SimpleNamespace(**{**vars(ctypes), "CDLL": lambda name: fake}))
    return fake


def test_a_device_is_described(driver: FakeDriver) -> None:
    assert cuda.device() == cuda.Device("NVIDIA H200", "sm_90", 132, 150 << 30, 62914560, 13000)
    assert cuda.device(1) is None


def test_no_device_is_no_error_and_a_broken_driver_is(driver: FakeDriver) -> None:
    driver.status = 100
    assert cuda.device() is None
    driver.status = 803
    with pytest.raises(EnvironmentFault, match="803"):
        cuda.device()


def test_no_driver_is_no_error() -> None:
    assert cuda.device(library="libcuda-that-is-not-there.so") is None
