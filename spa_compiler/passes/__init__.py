"""Rewrites of a model, one per file, and the recipes that name them."""

from __future__ import annotations

from spa_compiler.passes.pass_ import Change, Context, Pass, Removal, SiteChange, SkippedSite
from spa_compiler.passes.recipe import Recipe, Step, from_command_line, from_flags, from_yaml, read
from spa_compiler.passes.registry import find, passes

__all__ = [
    "Change",
    "Context",
    "Pass",
    "Recipe",
    "Removal",
    "SiteChange",
    "SkippedSite",
    "Step",
    "find",
    "from_command_line",
    "from_flags",
    "from_yaml",
    "passes",
    "read",
]
