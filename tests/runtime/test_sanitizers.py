"""The C side under AddressSanitizer and UndefinedBehaviorSanitizer: good models, malformed ones, wrong inputs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from spa_compiler.runtime import link
from tests import decoder_harness, deployment
from tests.image_harness import NETWORKS, network
from tests.region_harness import CASES, MCPU, case
from tests.runtime_malformed import malformed
from tests.window_harness import CONVOLUTIONS

pytestmark = pytest.mark.slow
needs_gcc = pytest.mark.skipif(shutil.which("gcc") is None, reason="AddressSanitizer needs gcc")
UBSAN = ("-fsanitize=undefined", "-fno-sanitize-recover=all")


def build(monkeypatch: pytest.MonkeyPatch, folder: Path, *flags: str) -> Path:
    """A deployment whose kernels.so is compiled with `flags`; returns the script that checks it."""
    zeros = np.zeros((2, 5, 301), np.float32)
    script, _ = deployment.write(
        folder,
        dict(malformed()),
        {
            "features": (case("mlp").model(None), {"x0": zeros}),
            "rank": (case("mlp").model(None), {"x0": np.zeros((1,) * 8 + (100,), np.float32)}),
            "disagree": (case("wide").model(None), {"x0": zeros, "x1": np.zeros((2, 6, 600), np.float32)}),
        },
    )
    for name, convolution in CONVOLUTIONS.items():
        feeds = convolution.image(2, *(37, 20)[2 - convolution.window.axes :])
        (folder / f"window {name}.onnx").write_bytes(convolution.model())
        np.savez(folder / f"window {name}_0.npz", **feeds, y0=convolution.expected(feeds)[0])
    for name in NETWORKS:
        n = network(name)
        for i, size in enumerate(((37, 20), (112, 96))):
            feeds = n.feeds(2, size[2 - n.made_by.axes :])
            outputs = {f"y{j}": y for j, y in enumerate(n.expected(feeds))}
            np.savez(folder / f"images {name}_{i}.npz", **feeds, **outputs)
        (folder / f"images {name}.onnx").write_bytes(n.model())
    for cached in (False, True):
        (folder / f"decoder {cached}.onnx").write_bytes(decoder_harness.model(cached))
        for i, (batch, tokens, past) in enumerate(((2, 1, 130), (1, 70, 3), (1, 1, 0))):
            given = decoder_harness.inputs(cached, batch, tokens, past * cached)
            outputs = dict(zip(("y0", "y1", "y2"), decoder_harness.expected(given), strict=False))
            np.savez(folder / f"decoder {cached}_{i}.npz", **decoder_harness.feeds(given), **outputs)
    monkeypatch.setattr(link, "FLAGS", ("-O1", "-g", "-std=c11", "-fPIC", "-shared", *flags))
    regions = [case(name).spec for name in CASES] + [c.region for c in CONVOLUTIONS.values()]
    regions += [network(name).spec for name in NETWORKS] + [decoder_harness.core(cached) for cached in (False, True)]
    link.link(regions, (MCPU,), folder / "kernels.so")
    return script


def check(script: Path, **environment: str) -> None:
    """Runs the script; sanitizers end the process at the first finding."""
    done = subprocess.run(
        [sys.executable, str(script), str(script.parent)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    assert not any(words in done.stderr for words in ("runtime error", "AddressSanitizer")), done.stderr[-6000:]
    assert f"refused {len(list((script.parent / 'refused').glob('*.onnx')))}" in done.stdout


def preload() -> str:
    """LD_PRELOAD for a process that loads a library with AddressSanitizer in it.

    libstdc++ comes along: exceptions of ONNX Runtime are intercepted only if it is there from the start.
    """
    found = []
    for name in ("libasan.so", "libstdc++.so.6"):
        command = ["gcc", f"-print-file-name={name}"]
        found.append(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())
    if not all(Path(path).is_absolute() for path in found):
        pytest.skip("gcc has no AddressSanitizer")
    return ":".join(found)


@needs_gcc
def test_address_and_undefined_behaviour_with_gcc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    libraries = preload()
    monkeypatch.setenv("SPA_CC", "gcc")
    script = build(monkeypatch, tmp_path / "asan", "-fsanitize=address", *UBSAN)
    check(script, LD_PRELOAD=libraries, ASAN_OPTIONS="detect_leaks=0:detect_stack_use_after_return=1")


def test_undefined_behaviour_with_the_linker_that_is_always_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SPA_CC", raising=False)
    check(build(monkeypatch, tmp_path / "ubsan", *UBSAN))


@needs_gcc
def test_the_sanitizer_sees_what_it_should(tmp_path: Path) -> None:
    """The setup itself: a read past a heap block in a preloaded process is found."""
    source = tmp_path / "bad.c"
    source.write_text("#include <stdlib.h>\nint bad(int i) { volatile char* p = malloc(4); return p[i]; }\n")
    subprocess.run(
        ["gcc", "-shared", "-fPIC", "-fsanitize=address", str(source), "-o", str(tmp_path / "bad.so")], check=True
    )
    done = subprocess.run(
        [sys.executable, "-c", f"import ctypes; ctypes.CDLL({str(tmp_path / 'bad.so')!r}).bad(4)"],
        env=os.environ | {"LD_PRELOAD": preload(), "ASAN_OPTIONS": "detect_leaks=0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr
