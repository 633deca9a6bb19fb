"""What is installed is what is tracked, the rooms keep their doors shut, and the Makefile speaks plainly."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def tracked() -> list[str]:
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    done = subprocess.run(["git", "ls-files", "spa_compiler"], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_the_wheel_has_every_tracked_file(tmp_path: Path) -> None:
    # from a clean export: a build folder would bring deleted modules back
    export = tmp_path / "export"
    for name in [*tracked(), "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"]:
        (export / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, export / name)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(tmp_path), str(export)]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        packed = {n for n in archive.namelist() if n.startswith("spa_compiler/")}
    assert packed == set(tracked())


def test_help_pulls_in_nothing_heavy() -> None:
    code = (
        "import sys, spa_compiler.cli.compile, spa_compiler.cli.analyze, spa_compiler.cli.bench, spa_compiler.cli.tune_server;"
        "print([m for m in ('tvm', 'onnx', 'onnxruntime', 'numpy', 'scipy', 'rich') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_no_library_code_prints() -> None:
    for file in (ROOT / "spa_compiler").rglob("*.py"):
        if "cli" not in file.parts:
            assert not re.search(r"^\s*print\(", file.read_text(), re.MULTILINE), file


@pytest.mark.parametrize(
    ("script", "sentence"),
    [
        ('#!/bin/sh\ncase "$1" in -V) echo Python 3.9.2;; *) exit 1;; esac\n', "needs Python 3.11 or newer"),
        ('#!/bin/sh\ncase "$2" in *ensurepip*) exit 1;; *) exit 0;; esac\n', "apt install python3-venv"),
    ],
)
def test_a_python_that_will_not_do_gets_one_clear_sentence(script: str, sentence: str, tmp_path: Path) -> None:
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    fake = tmp_path / "python"
    fake.write_text(script)
    fake.chmod(0o755)
    command = ["make", "-C", str(ROOT), "venv", f"PYTHON={fake}", f"VENV={tmp_path / 'venv'}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert sentence in done.stderr
    assert not (tmp_path / "venv" / "ready").exists()
