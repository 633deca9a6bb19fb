"""What some tests need of the machine."""

from __future__ import annotations

import pytest

from spa_compiler.targets import host

needs_avx512 = pytest.mark.skipif(not host().runs("x86-64-v4"), reason="the kernels need x86-64-v4 (AVX-512)")
