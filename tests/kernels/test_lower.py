"""TVMScript -> objects: cached by content, plain C functions, nothing to link but libc."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from elftools.elf.elffile import ELFFile

from spa_compiler.kernels import lower
from spa_compiler.kernels.vector import ISAS
from spa_compiler.runtime.generate import symbol
from spa_compiler.runtime.link import kernel

LIBC = {"memcpy", "memset", "memmove"}  # LLVM may write a loop as one of these


def symbols(path: Path) -> tuple[set[str], set[str]]:
    """(defined, undefined) global symbols of an object."""
    with path.open("rb") as file:
        table = ELFFile(file).get_section_by_name(".symtab")
        found = [s for s in table.iter_symbols() if s.name and s["st_info"]["bind"] == "STB_GLOBAL"]
        undefined = {s.name for s in found if s["st_shndx"] == "SHN_UNDEF"}
        return {s.name for s in found} - undefined, undefined


@pytest.mark.parametrize("level", ISAS)
@pytest.mark.parametrize(
    "name",
    [
        "spa_rx1_4_64_gelu_erf",
        "spa_rx1_1_1_silu",
        "spa_rxc_4x4_1_silu",
        "spa_rxcw_2x4_32_relu",
        "spa_layernorm_16",
        "spa_attention_4",
        "spa_pack_rows_32",
        "spa_unpack_rows_8",
        "spa_rx1w_1_48_clip",
        "spa_shift",
        "spa_crop",
        "spa_pad",
        "spa_depthwise_5x5_2x2_1x1_silu",
    ],
)
def test_an_object_defines_its_kernel_and_needs_libc_alone(name: str, level: str, tmp_path: Path) -> None:
    called = symbol(name, level)
    defined, undefined = symbols(lower.build_object(called, kernel, level, tmp_path))
    assert called in defined
    assert undefined <= LIBC, "TVM's runtime does not ship with an artifact"


def test_the_second_build_comes_from_the_cache(tmp_path: Path) -> None:
    first = lower.build_object("spa_pack_rows_1", kernel, "x86-64-v4", tmp_path)
    stamp = first.stat().st_mtime_ns
    assert lower.build_object("spa_pack_rows_1", kernel, "x86-64-v4", tmp_path) == first
    assert first.stat().st_mtime_ns == stamp
    assert [p.name for p in tmp_path.iterdir()] == [first.name], "a partial file was left"


def test_a_kernel_in_the_cache_is_not_parsed_again(tmp_path: Path) -> None:
    first = lower.build_object("spa_pack_rows_1", kernel, "x86-64-v4", tmp_path)

    def never(name: str, mcpu: str) -> None:
        raise AssertionError(name, mcpu)

    assert lower.build_object("spa_pack_rows_1", never, "x86-64-v4", tmp_path) == first


def test_an_edited_source_is_another_object(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = lower.build_object("spa_pack_rows_1", kernel, "x86-64-v4", tmp_path)
    monkeypatch.setattr(lower, "_sources", lambda: b"edited")
    assert lower.build_object("spa_pack_rows_1", kernel, "x86-64-v4", tmp_path) != first


def test_another_kernel_or_level_is_another_object(tmp_path: Path) -> None:
    paths = {
        lower.build_object(f"spa_pack_rows_{lanes}", kernel, mcpu, tmp_path)
        for lanes in (1, 4)
        for mcpu in ("x86-64-v3", "x86-64-v4")
    }
    assert len(paths) == 4


def test_objects_are_the_same_bytes_every_time(tmp_path: Path) -> None:
    one = lower.build_object("spa_rx1_1_16_relu", kernel, "x86-64-v4", tmp_path / "a")
    other = lower.build_object("spa_rx1_1_16_relu", kernel, "x86-64-v4", tmp_path / "b")
    assert one.name == other.name
    assert one.read_bytes() == other.read_bytes()


def test_two_builds_at_once_share_a_cache(tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        paths = set(
            pool.map(lambda _: lower.build_object("spa_unpack_rows_4", kernel, "x86-64-v4", tmp_path), range(4))
        )
    assert len(paths) == 1
    assert len(list(tmp_path.iterdir())) == 1
