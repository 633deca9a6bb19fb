"""The page of roofline.py: every kernel has its row, and no number is out of this world."""

from __future__ import annotations

import re

import pytest

from tests.peers import roofline

pytestmark = pytest.mark.peers


def test_every_kernel_has_a_row_that_can_be_true(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "SECONDS", 0.1)
    page = roofline.table(64 << 20)
    rows = [line for line in page.splitlines() if re.match(r"\| (block|unstructured)", line)]
    assert len(rows) == len(roofline.COMPUTE) + len(roofline.MEMORY)
    for row, case in zip(rows, [*roofline.COMPUTE, *roofline.MEMORY], strict=True):
        peak, memory = (int(share) for share in re.findall(r"(\d+)%", row)[1:])
        assert row.startswith(f"| {case.form.name} |")
        assert 0 < peak <= 130
        assert 0 < memory <= 130
