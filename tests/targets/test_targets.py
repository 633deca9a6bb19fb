"""Targets: spellings, the host, and platforms that are refused."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import archspec.cpu
import pytest

from spa_compiler import targets
from spa_compiler.errors import EnvironmentFault, UsageError
from spa_compiler.targets import cpu, cuda


@pytest.mark.parametrize(
    "text, level",
    [
        ("cpu:x86-64-v4", "x86-64-v4"),
        ("cpu:avx512", "x86-64-v4"),
        ("cpu:x86-64-v3", "x86-64-v3"),
        ("cpu:avx2", "x86-64-v3"),
        ("cpu:x86-64", "x86-64"),
        ("cpu:x86-64-v2", "x86-64"),
        ("cpu:aarch64", "aarch64"),
        ("cpu:neon", "aarch64"),
        ("CPU:AVX2", "x86-64-v3"),
    ],
)
def test_levels_and_their_other_spellings(text: str, level: str) -> None:
    target = targets.parse(text)
    assert (target.kind, target.arch, target.mcpu) == ("cpu", level, level)
    assert target.host_runs == targets.host().runs(level)
    assert target.isa == ("aarch64" if level == "aarch64" else "x86-64")
    assert targets.parse(str(target)) == target


@pytest.mark.parametrize("text", ["cpu:avx512,avx2", "cpu:avx2, avx512,x86-64-v3", "cpu:x86-64-v4,x86-64-v3"])
def test_a_list_of_levels(text: str) -> None:
    target = targets.parse(text)
    assert (target.kind, target.archs) == ("cpu", ("x86-64-v4", "x86-64-v3"))
    assert target.mcpu == ("x86-64-v4" if targets.host().runs("x86-64-v4") else "x86-64-v3")
    assert target.host_runs == targets.host().runs("x86-64-v3")
    assert targets.parse(str(target)) == target


def test_of_several_levels_the_highest_that_runs_here_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    from spa_compiler.targets import target as module

    older = dataclasses.replace(targets.host(), level="x86-64-v3")
    monkeypatch.setattr(module, "host", lambda: older)
    target = targets.parse("cpu:avx512,avx2")
    assert (target.archs, target.mcpu, target.host_runs) == (("x86-64-v4", "x86-64-v3"), "x86-64-v3", True)


@pytest.mark.parametrize(
    "level, kernels",
    [("x86-64-v4", "x86-64-v4"), ("x86-64-v3", "x86-64-v3"), ("x86-64-v2", "x86-64"), ("x86-64", "x86-64")],
)
def test_cpu_alone_is_the_best_that_this_machine_has_kernels_for(
    level: str, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from spa_compiler.targets import target as module

    monkeypatch.setattr(module, "host", lambda: dataclasses.replace(targets.host(), level=level))
    target = targets.parse("cpu")
    assert (target.arch, target.mcpu, target.host_runs) == (kernels, kernels, True)
    assert targets.parse("cuda:sm_90").mcpu == kernels


@pytest.mark.parametrize("text", ["cpu:avx2,neon", "cpu:aarch64,x86-64"])
def test_two_architectures_do_not_fit_one_library(text: str) -> None:
    with pytest.raises(UsageError, match="Compile twice"):
        targets.parse(text)


def test_the_base_of_an_architecture_is_number_1() -> None:
    assert [targets.level_number(v) for v in ("x86-64", "x86-64-v2", "x86-64-v4", "aarch64")] == [1, 2, 4, 1]


@pytest.mark.parametrize(
    "text, archs",
    [
        ("cuda:sm_90", ("sm_90",)),
        ("cuda:sm_90,sm_80", ("sm_80", "sm_90")),
        ("cuda:sm_120, sm_90a,sm_120", ("sm_90a", "sm_120")),
    ],
)
def test_cuda_architectures(text: str, archs: tuple[str, ...]) -> None:
    target = targets.parse(text)
    assert (target.kind, target.archs) == ("cuda", archs)
    assert target.mcpu == targets.parse("cpu").mcpu
    assert targets.parse(str(target)) == target


@pytest.mark.parametrize(
    "text",
    ["", "gpu", "cpu:", "cpu:arm", "cpu:x86_64", "cpu:x86-64-v5", "cpu:avx2,", "cpu:avx2,sve", "cud", "tpu:v4"],
)
def test_unknown_targets_list_what_exists(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        targets.parse(text)
    assert all(spelling in str(caught.value) for spelling in targets.SPELLINGS)


def test_a_near_miss_is_named() -> None:
    with pytest.raises(UsageError, match="Did you mean cpu:x86-64-v4"):
        targets.parse("cpu:x86-64-4")


@pytest.mark.parametrize("text", ["cuda:", "cuda:90", "cuda:sm_9", "cuda:sm_35", "cuda:sm_90,", "cuda:sm_90,ampere"])
def test_bad_cuda_architectures(text: str) -> None:
    with pytest.raises(UsageError, match="not a CUDA architecture"):
        targets.parse(text)


@pytest.mark.parametrize(
    "system, machine", [("Darwin", "arm64"), ("Windows", "AMD64"), ("Linux", "aarch64"), ("Darwin", "x86_64")]
)
def test_other_platforms_are_refused_in_words(system: str, machine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.system", lambda: system)
    monkeypatch.setattr("platform.machine", lambda: machine)
    with pytest.raises(EnvironmentFault) as caught:
        targets.parse("cpu")
    assert all(word in str(caught.value) for word in (system, machine, "Linux on x86-64 only"))
    assert caught.value.exit_code == 6


def test_the_host() -> None:
    host = targets.host()
    assert host.name
    assert host.level in targets.LEVELS
    assert 1 <= host.cores_physical <= len(os.sched_getaffinity(0))
    assert host.runs("x86-64")
    assert not host.runs("aarch64")


@pytest.mark.parametrize(
    "name, level",
    [("icelake", "x86-64-v4"), ("zen4", "x86-64-v4"), ("zen2", "x86-64-v3"), ("haswell", "x86-64-v3"),
     ("nehalem", "x86-64-v2"), ("x86_64", "x86-64")],
)  # fmt: skip
def test_levels_of_known_processors(name: str, level: str) -> None:
    assert cpu._level(frozenset(archspec.cpu.TARGETS[name].features)) == level


def test_a_hidden_instruction_set_lowers_the_level() -> None:
    features = frozenset(archspec.cpu.TARGETS["icelake"].features)
    assert cpu._level(features - {"avx512dq"}) == "x86-64-v3"
    assert cpu._level(features - {"fma"}) == "x86-64-v2"


def test_levels_are_ordered() -> None:
    host = targets.HostCpu("haswell", "x86-64-v3", 4)
    assert [host.runs(level) for level in targets.LEVELS] == [True, True, True, False]


def _machine(folder: Path, siblings: list[str]) -> Path:
    for number, text in enumerate(siblings):
        topology = folder / f"cpu{number}" / "topology"
        topology.mkdir(parents=True)
        (topology / "thread_siblings_list").write_text(text + "\n")
    return folder


def test_hyperthreads_are_not_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    topology = _machine(tmp_path, ["0,4", "1,5", "2,6", "3,7"] * 2)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)))
    none = tmp_path / "none"
    assert cpu.physical_cores(topology, none) == 4
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {1, 5, 6})
    assert cpu.physical_cores(topology, none) == 2
    assert cpu.physical_cores(none, none) == 3


@pytest.mark.parametrize("text, cores", [("max 100000", 8), ("250000 100000", 3), ("10000 100000", 1), ("junk", 8)])
def test_a_containers_quota_counts(text: str, cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)))
    (tmp_path / "cpu.max").write_text(text)
    assert cpu.physical_cores(tmp_path, tmp_path / "cpu.max") == cores


@pytest.mark.parametrize(
    "text, archs, runs",
    [
        ("cuda", "sm_90", True),
        ("cuda:sm_90", "sm_90", True),
        ("cuda:sm_80", "sm_80", True),  # its PTX
        ("cuda:sm_80,sm_120", "sm_80,sm_120", True),
        ("cuda:sm_120", "sm_120", False),
        ("cuda:sm_80a", "sm_80a", False),
        ("cuda:sm_90a", "sm_90a", True),
    ],
)
def test_a_gpu_is_what_cuda_alone_means_and_says_what_can_be_timed(text: str, archs: str, runs: bool) -> None:
    target = targets.parse(text, gpu="sm_90")
    assert (target.arch, target.host_runs) == (archs, runs)


def test_without_a_gpu_an_architecture_must_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "device", lambda: None)
    with pytest.raises(UsageError, match="no NVIDIA GPU to compile for") as caught:
        targets.parse("cuda")
    assert "cuda:sm_90 (H100" in str(caught.value)
    assert not targets.parse("cuda:sm_90").host_runs
    here = cuda.Device("GPU", "sm_86", 72, 1 << 34, 6 << 20, 13000)
    monkeypatch.setattr(cuda, "device", lambda: here)
    assert (targets.parse("cuda").arch, targets.parse("cuda").host_runs) == ("sm_86", True)


def test_there_are_no_kernels_for_older_gpus() -> None:
    with pytest.raises(UsageError, match="sm_80 or newer"):
        targets.parse("cuda:sm_75")
