"""kernels.so and a model in an interpreter that has numpy and onnxruntime alone, newest and oldest."""

from __future__ import annotations

import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from tests import deployment
from tests.region_harness import library

NO_NETWORK = ("NewConnectionError", "Temporary failure in name resolution", "ProxyError", "ConnectTimeoutError")


def python_with(folder: Path, *requirements: str) -> Path:
    """A virtual environment's interpreter; skips without a network."""
    venv.create(folder, with_pip=True, symlinks=True)
    python = folder / "bin" / "python"
    command = [str(python), "-m", "pip", "install", "--quiet", "--no-compile", *requirements]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode and any(words in done.stderr + done.stdout for words in NO_NETWORK):
        pytest.skip("no package index can be reached")
    assert done.returncode == 0, done.stderr[-2000:]
    return python


@pytest.mark.parametrize(
    "requirements, version",
    [
        pytest.param(("onnxruntime",), "", id="newest"),
        pytest.param(
            ("onnxruntime==1.18.1", "numpy<2"),
            "1.18.1",
            id="oldest",
            marks=pytest.mark.skipif(sys.version_info >= (3, 13), reason="onnxruntime 1.18 has no wheel for it"),
        ),
    ],
)
def test_a_deployment_runs_without_the_compiler(requirements: tuple[str, ...], version: str, tmp_path: Path) -> None:
    script, checks = deployment.write(tmp_path / "deployed")
    shutil.copy(library(), script.parent / "kernels.so")
    python = python_with(tmp_path / "venv", *requirements)
    command = [str(python), "-I", str(script), str(script.parent)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.startswith(f"onnxruntime {version}")
    assert f"checked {checks} " in done.stdout
