"""Sessions: quiet, and clear about a missing or doubled ONNX Runtime."""

from __future__ import annotations

import builtins
import importlib.metadata
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from spa_compiler.errors import EnvironmentFault
from spa_compiler.graph import session
from tests.graph.protos import large_mlp


def installed(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Makes it look as if just these distributions were there."""

    def version(name: str) -> str:
        if name in names:
            return "1.0"
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)


def test_runs_bytes_and_files(tmp_path: Path) -> None:
    onnx.save(large_mlp(), tmp_path / "m.onnx")
    feed = {"x": np.ones((2, 64), np.float32)}
    from_file = session.run(session.open_session(tmp_path / "m.onnx", threads=2), feed)
    for optimize in ("none", "basic", "extended", "all", True, False):
        got = session.run(session.open_session(large_mlp().SerializeToString(), optimize=optimize), feed)
        assert np.allclose(got["y"], from_file["y"])
    assert session.onnxruntime_version().count(".") == 2


def test_quiet_when_a_run_fails(capfd: pytest.CaptureFixture[str]) -> None:
    opened = session.open_session(large_mlp().SerializeToString())
    with pytest.raises(Exception, match="x"):
        session.run(opened, {"x": np.ones((2, 63), np.float32)})
    assert capfd.readouterr() == ("", "")


def test_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "onnxruntime":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    installed(monkeypatch)
    with pytest.raises(
        EnvironmentFault, match=r'not installed\. Install it: pip install "spa-compiler\[cpu\]"'
    ) as caught:
        session.runtime()
    assert caught.value.exit_code == 6
    installed(monkeypatch, "onnxruntime")
    with pytest.raises(EnvironmentFault, match="installed but cannot be imported"):
        session.runtime()


def test_both_wheels(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, "onnxruntime", "onnxruntime-gpu")
    with pytest.raises(
        EnvironmentFault, match=r"both installed.*pip uninstall -y onnxruntime onnxruntime-gpu.*pip install"
    ):
        session.open_session(b"")
