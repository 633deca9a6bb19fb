from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.folders import names


@pytest.fixture
def tidy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty current folder; temporary files go to a folder beside it, which must be empty in the end."""
    work, temporary = tmp_path / "work", tmp_path / "temporary"
    work.mkdir()
    temporary.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setattr("tempfile.tempdir", None)
    yield work
    assert names(temporary) == set(), "temporary files were left"
