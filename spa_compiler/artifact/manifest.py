"""manifest.json: what the artifact is, what it needs, and the SHA-256 of every file that a deployment relies on.

report.json holds times, so it differs from run to run and is not in here; the manifest's own bytes depend on nothing
but the other files and the arguments.
"""

from __future__ import annotations

import hashlib
from pathlib import Path, PurePosixPath

import msgspec

from spa_compiler.errors import ModelError

#: grows when a reader of an older version would misread the folder
ARTIFACT_VERSION = 1
#: the oldest ONNX Runtime whose custom-op interface kernels.so uses (ORT_API_VERSION 18)
MIN_ONNXRUNTIME = "1.18"
MANIFEST = "manifest.json"
_NOT_HASHED = frozenset({MANIFEST, "report.json"})


class File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One file of the artifact."""

    sha256: str
    size: int  # bytes


class Source(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The model that was compiled."""

    name: str  # the file's name, without its folder
    sha256: str  # of the .onnx file alone, external data not included


class Fallback(msgspec.Struct, frozen=True):
    """Where the dense form runs: `input` has fewer than `below` elements, or `above` or more; 0: no such bound."""

    input: str
    below: int
    above: int


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """The content of manifest.json."""

    artifact_version: int
    spa_compiler: str  # the version that wrote it
    target: str  # as asked for: "cpu", "cpu:x86-64-v4", ...
    isa: str  # what kernels.so needs: "x86-64-v4", ...
    min_onnxruntime: str
    source: Source
    files: dict[str, File]  # by path relative to the folder, with forward slashes
    measured: bool = True  # whether the compiling machine runs the target, so that it timed and verified the kernels
    fallback: Fallback | None = None  # of a model.onnx with both forms


def digest(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def seal(
    folder: Path,
    *,
    version: str,
    target: str,
    isa: str,
    source: Source,
    min_onnxruntime: str = MIN_ONNXRUNTIME,
    measured: bool = True,
    fallback: Fallback | None = None,
) -> Manifest:
    """Writes manifest.json for what lies in `folder` now.

    Args:
        version: of spa-compiler.
        isa: the instruction set level that kernels.so was built for.
        measured: whether this machine runs it.
        fallback: where model.onnx runs its dense form, if it has both.
    """
    paths = sorted(p for p in folder.rglob("*") if p.is_file())
    names = {p.relative_to(folder).as_posix(): p for p in paths}
    manifest = Manifest(
        artifact_version=ARTIFACT_VERSION,
        spa_compiler=version,
        target=target,
        isa=isa,
        min_onnxruntime=min_onnxruntime,
        source=source,
        measured=measured,
        fallback=fallback,
        files={n: File(digest(p), p.stat().st_size) for n, p in sorted(names.items()) if n not in _NOT_HASHED},
    )
    (folder / MANIFEST).write_bytes(msgspec.json.format(msgspec.json.encode(manifest), indent=2) + b"\n")
    return manifest


def read(folder: Path) -> Manifest:
    """The manifest of an artifact, its files not looked at.

    Raises:
        ModelError: there is none, it is damaged, or a newer version of this tool wrote it.
    """
    path = folder / MANIFEST
    again = "Compile the model again"
    try:
        content = path.read_bytes()
    except NotADirectoryError as error:
        fix = "Name the folder that spa-compile wrote, not a file in it"
        raise ModelError("this is a file, not an artifact folder", where=str(folder), fix=fix) from error
    except FileNotFoundError as error:
        fix = "Name a folder that spa-compile wrote; spa-compile takes .onnx files, too"
        if not folder.exists():
            raise ModelError("there is no such folder", where=str(folder), fix=fix) from error
        raise ModelError(
            "this folder has no manifest.json, so it is no artifact", where=str(folder), fix=fix
        ) from error
    except OSError as error:
        raise ModelError(f"cannot be read ({error.strerror})", where=str(path)) from error
    try:
        version = msgspec.json.decode(content, type=dict[str, msgspec.Raw]).get("artifact_version")
        if version is None:
            fix = "Name a folder that spa-compile wrote; spa-compile takes .onnx files, too"
            raise ModelError(
                "its manifest.json is something else's, so this is no artifact", where=str(folder), fix=fix
            )
        if msgspec.json.decode(version, type=int) > ARTIFACT_VERSION:
            fix = "Install that version, or compile the model again"
            raise ModelError("a newer version of spa-compiler wrote this artifact", where=str(path), fix=fix)
        manifest = msgspec.json.decode(content, type=Manifest)
    except msgspec.DecodeError as error:
        raise ModelError(f"the manifest is damaged: {error}", where=str(path), fix=again) from error
    for name in manifest.files:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise ModelError(f"the manifest names a file outside of the artifact: {name!r}", where=str(path), fix=again)
    return manifest


def check(folder: Path) -> Manifest:
    """Compares every file with the manifest.

    Raises:
        ModelError: the manifest cannot be used (`read`), or a file is missing or not what was written.
    """
    manifest = read(folder)
    for name, expected in manifest.files.items():
        path = folder / name
        try:
            size = path.stat().st_size
            damaged = size != expected.size or digest(path) != expected.sha256
        except OSError as error:
            what = f"a file of the artifact is missing or cannot be read ({error.strerror})"
            raise ModelError(what, where=str(path), fix="Copy the folder again, or compile the model again") from error
        if damaged:
            what = f"the file is not what was written: {size:,} bytes, SHA-256 differs"
            if size != expected.size:
                what = f"the file is not what was written: {size:,} bytes instead of {expected.size:,}"
            raise ModelError(what, where=str(path), fix="Copy the folder again, or compile the model again")
    return manifest
