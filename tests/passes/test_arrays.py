"""Files of scores and masks: read by name, and refused with the first thing that does not fit."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spa_compiler.errors import UsageError
from spa_compiler.graph.operators import weighted_ops
from spa_compiler.passes import arrays
from tests.networks import model_of
from tests.passes.tiny import HIDDEN, WIDTH, bits, context, feed_forward, sparsify

A, B = (WIDTH, HIDDEN), (HIDDEN, WIDTH)


def ones(**changed: Any) -> dict[str, Any]:
    return {"A0": np.ones(A), "B0": np.ones(B)} | changed


def nan_in(shape: tuple[int, int]) -> np.ndarray[Any, Any]:
    values = np.ones(shape)
    values[-1, -1] = np.nan
    return values


@pytest.mark.parametrize(
    "what, held, message",
    [
        ("scores", {"A0": np.ones(A)}, "no scores for 'B0'"),
        ("scores", {}, r"no scores for 'A0' and 1 other weights"),
        ("scores", ones(A1=np.ones(A)), r"no weight that this pass takes is named 'A1'. There are: A0, B0"),
        ("scores", ones(B0=np.ones(A)), r"'B0' has shape \[12, 16\], \[16, 12\] is expected"),
        ("scores", ones(B0=np.ones(3)), r"'B0' has shape \[3\], \[16, 12\] is expected"),
        ("scores", ones(A0=nan_in(A)), "'A0' has a NaN or an infinity"),
        ("scores", ones(A0=-np.inf * np.ones(A)), "'A0' has a NaN or an infinity"),
        ("scores", ones(A0=np.full(A, "a")), "'A0' holds <U1, numbers are expected"),
        ("scores", ones(A0=np.ones(A, complex)), "'A0' holds complex128, numbers are expected"),
        ("scores", ones(A0=np.full(A, None)), "the scores cannot be read .*pickle"),
        ("masks", {"B0": np.ones(B)}, "no masks for 'A0'"),
        ("masks", ones(A0=np.full(A, 2)), "'A0' has other values than 0 and 1.*0 removes, 1 keeps"),
        ("masks", ones(A0=np.full(A, 0.5)), "'A0' has other values than 0 and 1"),
        ("masks", ones(A0=np.full(A, None)), "the masks cannot be read .*pickle"),
        ("masks", ones(A0=nan_in(A)), "'A0' has a NaN or an infinity"),
    ],
)
def test_the_first_mismatch_is_named(what: str, held: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "file.npz"
    np.savez(path, **held)
    model = feed_forward()
    before = bits(model)
    share = {"sparsity": 0.5} if what == "scores" else {}
    with pytest.raises(UsageError, match=message) as caught:
        sparsify(model, context(), **{what: str(path)}, **share)
    assert caught.value.where == str(path)
    assert bits(model) == before


def cut_short(path: Path) -> None:
    np.savez(path, **ones())
    path.write_bytes(path.read_bytes()[:-200])


def bit_flipped(path: Path) -> None:
    np.savez(path, **ones())
    data = bytearray(path.read_bytes())
    data[300] ^= 0xFF
    path.write_bytes(data)


def no_array(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("A0.txt", "hello")


def broken_header(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("A0.npy", b"\x93NUMPY\x01\x00\x10\x00{'descr': (((((")


@pytest.mark.parametrize(
    "make",
    [
        lambda path: None,
        lambda path: path.mkdir(),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_text("no archive"),
        lambda path: np.save(path.open("wb"), np.ones(3)),
        cut_short,
        bit_flipped,
        no_array,
        broken_header,
    ],
)
def test_damaged_files(make: Callable[[Path], object], tmp_path: Path) -> None:
    path = tmp_path / "scores.npz"
    make(path)
    with pytest.raises(UsageError, match="the scores cannot be read") as caught:
        sparsify(feed_forward(), context(), sparsity=0.5, scores=str(path))
    assert caught.value.where == str(path)


def test_an_array_that_would_not_fit_memory_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez_compressed(tmp_path / "s.npz", **ones())
    monkeypatch.setattr(arrays, "_LARGEST", 1000)
    with pytest.raises(UsageError, match=r"'A0\.npy' would take"):
        sparsify(feed_forward(), context(), sparsity=0.5, scores=str(tmp_path / "s.npz"))


def test_arrays_have_the_layout_of_the_file(tmp_path: Path) -> None:
    """MatMul keeps [inputs, outputs], a transposed Gemm [outputs, inputs], Conv [outputs, channels, kernel]."""
    rng = np.random.default_rng(0)
    weights = {
        "M": rng.standard_normal((6, 5)).astype(np.float32),
        "G": rng.standard_normal((4, 5)).astype(np.float32),
        "C": rng.standard_normal((3, 2, 2, 2)).astype(np.float32),
    }
    model = model_of(
        """agraph (float[b, 6] x, float[b, 2, 4, 4] z) => (float[b, 4] y, float[b, 3, 3, 3] w)
        { m = MatMul (x, M) y = Gemm <transB = 1> (m, G) w = Conv (z, C) }""",
        **weights,
    )
    ops = weighted_ops(model.graph)
    np.savez(tmp_path / "s.npz", **weights)
    found = arrays.for_weights(tmp_path / "s.npz", "scores", ops)
    assert sorted(found) == [0, 1, 2]
    for place, op in enumerate(ops):
        np.testing.assert_array_equal(found[place], op.rows())


@pytest.mark.parametrize("dtype", [np.bool_, np.int8, np.uint64, np.float16, np.float64])
def test_masks_of_any_type(dtype: type, tmp_path: Path) -> None:
    keep = {name: (np.arange(np.prod(shape)) % 2).reshape(shape) for name, shape in {"A0": A, "B0": B}.items()}
    np.savez(tmp_path / "m.npz", **{name: values.astype(dtype) for name, values in keep.items()})
    model = feed_forward()
    sparsify(model, context(), masks=str(tmp_path / "m.npz"))
    first, _ = weighted_ops(model.graph)
    np.testing.assert_array_equal(first.rows().T != 0, keep["A0"] != 0)


def test_masks_that_do_not_follow_the_pattern(tmp_path: Path) -> None:
    keep = ones()
    keep["B0"][0, 0] = 0
    np.savez(tmp_path / "m.npz", **keep)
    with pytest.raises(UsageError, match="the mask of 'B0' does not follow the pattern block:4x1"):
        sparsify(feed_forward(), context(), masks=str(tmp_path / "m.npz"), pattern="block:4x1")
    keep["B0"][0, :4] = 0
    np.savez(tmp_path / "m.npz", **keep)
    change = sparsify(feed_forward(), context(), masks=str(tmp_path / "m.npz"), pattern="block:4x1")
    assert [site.pattern for site in change.sites] == ["block:4x1"] * 2
