"""kernels.so as a file: what it exports, needs and demands of a machine; the linker, chosen and broken."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import onnx.parser
import pytest
from elftools.elf.elffile import ELFFile

from spa_compiler.errors import EnvironmentFault
from spa_compiler.runtime import link
from spa_compiler.targets.machine import cache_dir
from tests.region_harness import MCPU, assert_parity, case, library, run, session
from tests.window_harness import CONVOLUTIONS

# Everything that the C side may call. A new name here is a decision, not an accident.
IMPORTS = {
    "calloc",
    "free",
    "malloc",
    "memcpy",
    "memset",
    "memmove",
    "snprintf",
    "vsnprintf",
    "sscanf",
    "getenv",
    "madvise",
}
IMPORTS |= {"__isoc99_sscanf", "__cxa_finalize", "__gmon_start__"}
IMPORTS |= {"_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable", "__stack_chk_fail"}


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("empty") / "kernels.so"
    link.link([], (MCPU,), path)
    return path


@pytest.fixture(scope="module")
def arm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("arm") / "kernels.so"
    link.link([case("single").spec, CONVOLUTIONS["same"].region], ("aarch64",), path)
    return path


@pytest.fixture(params=["all", "empty", "arm"])
def elf(request: pytest.FixtureRequest):
    path = library() if request.param == "all" else request.getfixturevalue(request.param)
    with path.open("rb") as file:
        yield ELFFile(file)


def test_one_symbol_is_exported(elf: ELFFile) -> None:
    symbols = elf.get_section_by_name(".dynsym").iter_symbols()
    assert [s.name for s in symbols if s.name and s["st_shndx"] != "SHN_UNDEF"] == ["RegisterCustomOps"]


def test_imports_are_on_the_list(elf: ELFFile) -> None:
    symbols = elf.get_section_by_name(".dynsym").iter_symbols()
    assert {s.name for s in symbols if s.name and s["st_shndx"] == "SHN_UNDEF"} <= IMPORTS


def test_libc_alone_is_needed(elf: ELFFile) -> None:
    needed = {t.needed for t in elf.get_section_by_name(".dynamic").iter_tags("DT_NEEDED")}
    assert needed <= {"libc.so.6", "libm.so.6"}
    tags = {t.entry.d_tag for t in elf.get_section_by_name(".dynamic").iter_tags()}
    assert not tags & {"DT_RPATH", "DT_RUNPATH", "DT_TEXTREL"}


def test_no_symbol_is_newer_than_the_glibc_floor(elf: ELFFile) -> None:
    floor = tuple(map(int, link.GLIBC.split(".")))
    assert floor == (2, 28)
    versions = elf.get_section_by_name(".gnu.version_r")
    for _, needed in versions.iter_versions():
        for v in needed:
            assert tuple(map(int, v.name.removeprefix("GLIBC_").split("."))) <= floor, v.name


def test_the_stack_is_not_executable_and_relocations_end_read_only(elf: ELFFile) -> None:
    segments = {s["p_type"]: s["p_flags"] for s in elf.iter_segments()}
    assert segments["PT_GNU_STACK"] & 1 == 0
    assert "PT_GNU_RELRO" in segments
    assert all(s["p_flags"] & 3 != 3 for s in elf.iter_segments() if s["p_type"] == "PT_LOAD"), (
        "writable and executable"
    )


def test_the_machine_is_the_one_that_was_asked_for(arm: Path) -> None:
    for path, machine in ((library(), "x64"), (arm, "AArch64")):
        with path.open("rb") as file:
            assert ELFFile(file).get_machine_arch() == machine


def test_there_is_no_debug_information(elf: ELFFile) -> None:
    assert elf["e_type"] == "ET_DYN"
    assert not {".symtab", ".debug_info", ".debug_line"} & {s.name for s in elf.iter_sections()}


def test_an_empty_library_loads_and_does_no_harm(empty: Path) -> None:
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 21]> g (float[N] x) => (float[N] y) { y = Abs(x) }'
    )
    (y,) = run(session(model.SerializeToString(), path=empty), {"x": np.array([-2, 3], np.float32)})
    assert y.tolist() == [2, 3]


def test_two_links_give_the_same_bytes(tmp_path: Path) -> None:
    for folder in ("a", "another/folder"):
        (tmp_path / folder).mkdir(parents=True)
        link.link([case("single").spec], (MCPU,), tmp_path / folder / "kernels.so")
    assert (tmp_path / "a/kernels.so").read_bytes() == (tmp_path / "another/folder/kernels.so").read_bytes()


def test_no_path_of_this_machine_ends_up_in_the_library() -> None:
    content = library().read_bytes()
    for path in (Path.home(), Path.cwd(), Path(link.__file__).parent, cache_dir()):
        assert len(str(path)) < 3 or str(path).encode() not in content


def test_linking_needs_no_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPA_CACHE_DIR", str(cache_dir()))
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    link.link([dataclasses.replace(case("single").spec, scratch_rows=71)], (MCPU,), tmp_path / "kernels.so")
    assert (tmp_path / "kernels.so").stat().st_size > 0


@pytest.mark.parametrize("command", ["/nonexistent/cc", "false", "python3 -c 'raise SystemExit(3)'"])
def test_a_linker_that_does_not_work(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPA_CC", command)
    with pytest.raises(EnvironmentFault, match="SPA_CC must name a C compiler") as raised:
        link.link([], (MCPU,), tmp_path / "kernels.so")
    assert raised.value.exit_code == 6
    assert command.split()[0] in str(raised.value)
    assert not (tmp_path / "kernels.so").exists()


@pytest.mark.parametrize("command", ["", " ", "'unbalanced"])
def test_a_linker_that_cannot_be_read(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPA_CC", command)
    if command.strip():
        with pytest.raises(EnvironmentFault, match="SPA_CC"):
            link.link([], (MCPU,), tmp_path / "kernels.so")
    else:
        link.link([], (MCPU,), tmp_path / "kernels.so")  # as good as not set


def test_an_output_that_is_a_folder_is_a_fault(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentFault, match=r"linking kernels\.so failed"):
        link.link([], (MCPU,), tmp_path)


@pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc is not installed")
def test_gcc_links_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPA_CC", "gcc -Werror")
    c = case("mlp")
    link.link([c.spec], (MCPU,), tmp_path / "kernels.so")
    feeds = c.feeds((2, 33))
    assert_parity(run(session(c.model(), 2, tmp_path / "kernels.so"), feeds), c.expected(feeds))
