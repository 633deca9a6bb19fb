import json
from pathlib import Path

import pytest

from spa_compiler.artifact.manifest import Manifest, Source, check, digest, read, seal
from spa_compiler.errors import ModelError

EMPTY = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model.onnx").write_bytes(b"model")
    (tmp_path / "kernels.so").write_bytes(b"")
    (tmp_path / "report.json").write_text("{}")
    return tmp_path


def sealed(folder: Path) -> Manifest:
    return seal(folder, version="0.1.0", target="cpu", isa="x86-64-v4", source=Source("m.onnx", EMPTY))


def test_every_file_but_the_report_is_in_it(folder: Path) -> None:
    manifest = sealed(folder)
    assert list(manifest.files) == ["kernels.so", "model.onnx"]
    assert manifest.files["kernels.so"].sha256 == EMPTY == digest(folder / "kernels.so")
    assert manifest.files["model.onnx"].size == 5
    content = json.loads((folder / "manifest.json").read_text())
    assert content["artifact_version"] == 1
    assert content["min_onnxruntime"] == "1.18"
    assert check(folder) == manifest


def test_the_bytes_are_the_same_each_time(folder: Path) -> None:
    sealed(folder)
    first = (folder / "manifest.json").read_bytes()
    (folder / "report.json").write_text('{"time": 1}')
    sealed(folder)
    assert (folder / "manifest.json").read_bytes() == first
    check(folder)


@pytest.mark.parametrize(
    "content, message", [(b"modeL", "SHA-256"), (b"mode", "4 bytes instead of 5"), (None, "missing")]
)
def test_damage_is_found(folder: Path, content: bytes | None, message: str) -> None:
    sealed(folder)
    if content is None:
        (folder / "model.onnx").unlink()
    else:
        (folder / "model.onnx").write_bytes(content)
    with pytest.raises(ModelError, match=message):
        check(folder)


@pytest.mark.parametrize("content", ["", "[]", "{", '{"artifact_version": 1}', '{"artifact_version": "1"}'])
def test_a_damaged_manifest(tmp_path: Path, content: str) -> None:
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(ModelError, match="damaged"):
        read(tmp_path)


def test_no_manifest(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no artifact"):
        read(tmp_path)


def test_a_newer_version_is_refused_in_words(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"artifact_version": 2, "all": "different"}')
    with pytest.raises(ModelError, match="newer version"):
        read(tmp_path)


@pytest.mark.parametrize("name", ["../model.onnx", "/etc/passwd"])
def test_files_outside_of_the_folder_are_refused(folder: Path, name: str) -> None:
    sealed(folder)
    content = json.loads((folder / "manifest.json").read_text())
    content["files"][name] = content["files"]["model.onnx"]
    (folder / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(ModelError, match="outside"):
        check(folder)
