"""Coupled channels: which parts of a model's axes live and die together, and what must stay.

`terms`, `unify` and `axes` are the algebra, `facts` is what is stated, `rules` who states it, `groups` what follows,
`schema` how it is told.
"""

from __future__ import annotations

from spa_compiler.analysis.analyze import Analysis, analyze
from spa_compiler.analysis.groups import Group, Member

__all__ = ["Analysis", "Group", "Member", "analyze"]
