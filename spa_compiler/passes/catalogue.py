"""What passes exist, in words: `--list-passes` and docs/recipes.md, both from the passes' own docstrings and options.

`python -m spa_compiler.passes.catalogue docs/recipes.md` writes the page anew.
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
import types
import typing
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from spa_compiler import patterns
from spa_compiler.passes.recipe import from_flags
from spa_compiler.passes.registry import passes

_EXAMPLE = "sparsify{sparsity=0.9,pattern=block:4x1}"

_INTRODUCTION = """\
# Recipes

<!-- Written by `python -m spa_compiler.passes.catalogue docs/recipes.md`; edit the passes' docstrings instead. -->

A recipe says which passes run, in which order, with which options. Without one, only exact rewrites are done, and zeros
that the model has already become time. These three ask for the same:

```
spa-compile model.onnx --sparsity 0.9 --pattern block:4x1
spa-compile model.onnx --passes "{example}"
spa-compile model.onnx --recipe recipe.yaml
```

with `recipe.yaml` holding (the options that are left out have the defaults below):

```yaml
version: 1
passes:
- name: sparsify
  sparsity: 0.9
  pattern: block:4x1
```

Every artifact holds its `recipe.yaml` with all options written out, which repeats the run (with the same `--calib`, if
there was one: without samples, `auto` is another method):

```yaml
{resolved}```

`--prune 0.3` cuts away 30 % of the multiply-accumulates; it is short for `--passes "prune-groups{{macs=0.7}}"`.

On the command line, lists are written `targets=[a,b]` (one entry needs no brackets), and values with spaces or any of
`{{}}[]=,` go in quotes. An option may be spelled with `-` for `_`, and `method` and `criterion` are the same word. What
does not exist or does not fit is refused with its place, such as `$.passes[1].sparsity`, and with what exists.

Patterns: {patterns}.
"""


@dataclasses.dataclass(frozen=True)
class OptionEntry:
    """One option of a pass, in words."""

    name: str
    type: str
    default: str
    """As a user would write it; "required" where there is none."""
    text: str


@dataclasses.dataclass(frozen=True)
class PassEntry:
    """One pass, in words."""

    name: str
    rewrite: str
    """Before -> after: the first paragraph of the docstring."""
    text: str
    options: tuple[OptionEntry, ...]


def catalogue() -> list[PassEntry]:
    """Every pass, in the registry's order."""
    entries = []
    for name, cls in passes().items():
        rewrite, _, text = (inspect.getdoc(cls) or "").partition("\n\n")
        hints = typing.get_type_hints(cls.Options, include_extras=True)
        options = tuple(_option(field, hints[field.name]) for field in dataclasses.fields(cls.Options))
        entries.append(PassEntry(name, rewrite, text, options))
    return entries


def page() -> str:
    """docs/recipes.md."""
    parts = [
        _INTRODUCTION.format(
            example=_EXAMPLE,
            resolved=from_flags(_EXAMPLE).to_yaml(),
            patterns=", ".join(f"`{n}`" for n in patterns.names()),
        )
    ]
    for entry in catalogue():
        parts.append(f"## {entry.name}\n\n```\n{entry.rewrite}\n```\n\n{entry.text}\n")
        rows = "".join(f"| `{o.name}` | {o.type} | {o.default} | {o.text} |\n" for o in entry.options)
        table = f"| option | type | default | meaning |\n|---|---|---|---|\n{rows}"
        parts.append(table if rows else "It has no options.\n")
    return "\n".join(parts)


def _option(field: dataclasses.Field[Any], hint: Any) -> OptionEntry:
    metas: list[msgspec.Meta] = []
    bare = hint
    while typing.get_origin(bare) is Annotated or types.NoneType in typing.get_args(bare):
        if typing.get_origin(bare) is Annotated:
            metas += [meta for meta in bare.__metadata__ if isinstance(meta, msgspec.Meta)]
            bare = bare.__origin__
        else:  # what may be left out: its default says so
            bare = next(arg for arg in typing.get_args(bare) if arg is not types.NoneType)
    text = next((meta.description for meta in metas if meta.description), "")
    return OptionEntry(field.name, _type(bare, metas), _default(field), text)


def _type(bare: Any, metas: list[msgspec.Meta]) -> str:
    """`float, >= 0, < 1`; the choices of a Literal; `list` for names."""
    if typing.get_origin(bare) is Literal:
        return ", ".join(f"`{choice}`" for choice in typing.get_args(bare))
    name = "list" if typing.get_origin(bare) is tuple else getattr(bare, "__name__", str(bare))
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    bounds = [
        f"{sign} {getattr(meta, key)}"
        for meta in metas
        for key, sign in signs.items()
        if getattr(meta, key) is not None
    ]
    return ", ".join([name, *bounds])


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is dataclasses.MISSING:
        return "required"
    if field.default is None:
        return "not set"
    return f"`{list(field.default) if isinstance(field.default, tuple) else field.default}`"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page(), encoding="utf-8")
