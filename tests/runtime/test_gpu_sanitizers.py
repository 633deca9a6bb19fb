"""The C side for GPUs, the driver's stand-in included, under AddressSanitizer and UndefinedBehaviorSanitizer."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runtime.test_sanitizers import UBSAN, needs_gcc, preload

pytestmark = pytest.mark.slow
TESTS = Path(__file__).parent / "test_gpu.py"


def run_tests(**environment: str) -> None:
    """All of test_gpu.py in one new process, with sanitizers in everything that it compiles."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(TESTS)]
    done = subprocess.run(
        command,
        env=os.environ | {"SPA_TEST_IN_CHILD": "1"} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-6000:]
    assert not any(words in said for words in ("runtime error", "AddressSanitizer", "LeakSanitizer")), said[-6000:]


@needs_gcc
def test_address_and_undefined_behaviour_with_gcc() -> None:
    run_tests(
        SPA_CC="gcc",
        SPA_TEST_SANITIZERS=" ".join(("-fsanitize=address", *UBSAN)),
        LD_PRELOAD=preload(),
        ASAN_OPTIONS="detect_leaks=0:detect_stack_use_after_return=1",
    )


def test_undefined_behaviour_with_the_linker_that_is_always_there() -> None:
    run_tests(SPA_CC="", SPA_TEST_SANITIZERS=" ".join(UBSAN))
