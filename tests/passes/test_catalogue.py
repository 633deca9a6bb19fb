"""The list of passes comes from the passes, and the committed page is up to date."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from spa_compiler.passes import passes
from spa_compiler.passes.catalogue import catalogue, page

ROOT = Path(__file__).parents[2]


def test_the_page_is_up_to_date() -> None:
    committed = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert committed == page(), "run: python -m spa_compiler.passes.catalogue docs/recipes.md"


def test_every_pass_and_option_is_described() -> None:
    entries = catalogue()
    assert [entry.name for entry in entries] == list(passes())
    for entry, cls in zip(entries, passes().values(), strict=True):
        assert "becomes" in entry.rewrite
        assert entry.text
        assert [option.name for option in entry.options] == [field.name for field in dataclasses.fields(cls.Options)]
        assert all(option.text and option.type and option.default for option in entry.options)
