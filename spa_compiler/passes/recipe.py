"""Recipes: which passes run with which options, from YAML or from the command line; both mean the same.

version: 1
passes:
- name: sparsify            is        --passes "sparsify{sparsity=0.9,pattern=block:4x1}"
  sparsity: 0.9             is        --sparsity 0.9 --pattern block:4x1
  pattern: block:4x1
"""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import yaml

from spa_compiler import patterns
from spa_compiler.errors import UsageError
from spa_compiler.passes.flags import parse_flags
from spa_compiler.passes.names import did_you_mean
from spa_compiler.passes.pass_ import Pass
from spa_compiler.passes.registry import find

VERSION: Literal[1] = 1

_SAME_MEANING = {"method": "criterion", "criterion": "method"}
"""Every pass that ranks has one of the two, and takes both words."""


class Step(msgspec.Struct, frozen=True):
    """One pass of a recipe: its name and its own `Options`."""

    name: str
    options: Any


class Recipe(msgspec.Struct, frozen=True):
    """The passes to run, in order. Without any, only exact rewrites are done."""

    version: Literal[1] = VERSION
    passes: tuple[Step, ...] = ()

    def build(self) -> list[Pass]:
        """The passes, ready to run."""
        return [find(step.name)(step.options) for step in self.passes]

    def to_yaml(self) -> str:
        """The recipe with every option written out: `from_yaml` gives an equal recipe, and the run repeats."""
        steps = [{"name": step.name} | msgspec.to_builtins(step.options) for step in self.passes]
        plain = {"version": self.version, "passes": msgspec.to_builtins(steps)}
        return str(yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, default_flow_style=False))


class _File(msgspec.Struct, forbid_unknown_fields=True):
    """The outermost keys of a recipe file."""

    version: Annotated[int, msgspec.Meta(ge=VERSION, le=VERSION)]
    passes: list[Any] = msgspec.field(default_factory=list)


def from_yaml(text: str, source: str = "recipe") -> Recipe:
    """The recipe that a YAML (or JSON) text holds; `source` names it in messages.

    Raises:
        UsageError: it is not YAML, or not a recipe; says where: `$.passes[1].sparsity`.
    """
    try:
        plain = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "it cannot be read"
        raise UsageError(f"not valid YAML: {problem}", where=f"{source}{line}") from error
    except RecursionError as error:
        raise UsageError("not valid YAML: it is nested too deeply", where=source) from error
    try:
        file = msgspec.convert(plain, _File)
    except msgspec.ValidationError as error:
        raise _usage_error(error, f"{source}: $", 'A recipe is "version: 1" and a list "passes"') from error
    return Recipe(passes=tuple(_step(item, f"{source}: $.passes[{i}]") for i, item in enumerate(file.passes)))


def from_flags(text: str) -> Recipe:
    """The recipe that the grammar of `--passes` (`passes/flags.py`) writes.

    Raises:
        UsageError: the text does not follow the grammar, or names what does not exist.
    """
    steps = enumerate(parse_flags(text))
    return Recipe(
        passes=tuple(_build(name, options, f"--passes: $.passes[{i}]", strict=False) for i, (name, options) in steps)
    )


GPU_PATTERN = "block:32x32"


def from_command_line(
    *,
    sparsity: float | None = None,
    pattern: str | None = None,
    prune: float | None = None,
    passes: str | None = None,
    recipe: Path | None = None,
    target: str = "cpu",
) -> Recipe:
    """The recipe that the command line asks for; at most one of the four ways to ask may be used.

    `--sparsity 0.9 --pattern P` is `sparsify{sparsity=0.9,pattern=P}`, `--prune 0.3` is `prune-groups{macs=0.7}`.
    Without a pattern zeros come one by one, for GPUs in the blocks that their tensor cores leave out.

    Raises:
        UsageError: two ways at once, `--pattern` alone, an unreadable file, or what the recipe itself refuses.
    """
    given = {"--sparsity": sparsity, "--prune": prune, "--passes": passes, "--recipe": recipe}
    used = [flag for flag, value in given.items() if value is not None]
    if len(used) > 1:
        raise UsageError(
            f"{' and '.join(used)} contradict each other", fix="Give one; --passes can hold several passes"
        )
    if pattern is not None and (passes is not None or recipe is not None or prune is not None):
        raise UsageError("--pattern goes with --sparsity alone", fix="Name the pattern where the pass is named")
    if recipe is not None:
        return read(recipe)
    if passes is not None:
        return from_flags(passes)
    if sparsity is not None or pattern is not None:
        if sparsity is None and patterns.parse(str(pattern)).sparsity is None:
            raise UsageError("--pattern needs --sparsity", fix="Give --sparsity S too, the share of zeros, such as 0.9")
        if pattern is None and target.strip().lower().startswith("cuda"):
            pattern = GPU_PATTERN
        given_both = {"sparsity": sparsity, "pattern": pattern}
        options = {name: value for name, value in given_both.items() if value is not None}
        return Recipe(passes=(_shorthand("sparsify", options),))
    if prune is not None:
        if not 0 <= prune < 1:
            raise UsageError(f"expected a share from 0 to below 1, got {prune}", where="--prune")
        # Rounded so that 1 - 0.3 is written 0.7 in the recipe.
        return Recipe(passes=(_shorthand("prune-groups", {"macs": round(1 - prune, 12)}),))
    return Recipe()


def read(path: Path) -> Recipe:
    """`from_yaml` of a file.

    Raises:
        UsageError: the file cannot be read, or is no recipe.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"the recipe cannot be read ({error.strerror})", where=str(path)) from error
    except UnicodeDecodeError as error:
        raise UsageError("the recipe is not UTF-8 text", where=str(path)) from error
    return from_yaml(text, str(path))


class _Loader(yaml.SafeLoader):
    """Safe loading that refuses a key given twice, which YAML's own loader would silently let win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        mapping = super().construct_mapping(node, deep)
        if len(mapping) != len(node.value):
            raise yaml.constructor.ConstructorError(None, None, "a key is given twice", node.start_mark)
        return mapping


def _step(item: object, path: str) -> Step:
    """`{name: sparsify, sparsity: 0.9}`, or just `sparsify`."""
    if isinstance(item, str):
        item = {"name": item}
    if not isinstance(item, dict) or not isinstance(item.get("name"), str):
        raise UsageError("a pass is expected", where=path, fix='Write "- name: sparsify" and its options below')
    return _build(item["name"], {key: value for key, value in item.items() if key != "name"}, path, strict=True)


def _shorthand(name: str, options: Mapping[str, object]) -> Step:
    """A pass from flags of its own: messages name the flag instead of the path."""
    try:
        return _build(name, options, "", strict=True)
    except UsageError as error:
        where = f"--{error.where.removeprefix('.')}" if error.where else None
        raise UsageError(error.what, where=where, fix=error.fix) from error


def _build(name: str, given: Mapping[Any, object], path: str, *, strict: bool) -> Step:
    """The step, checked: by the types and bounds of the options, then by the pass itself.

    Args:
        strict: whether text is refused where a number is wanted; the command line has nothing but text.
    """
    try:
        cls = find(name)
    except UsageError as error:
        raise UsageError(error.what, where=path or None, fix=error.fix) from error
    types = {
        key: _bare(hint)
        for key, hint in typing.get_type_hints(cls.Options).items()
        if key in {field.name for field in dataclasses.fields(cls.Options)}
    }
    plain: dict[str, object] = {}
    for key, value in given.items():
        field = str(key).replace("-", "_")
        if field not in types and _SAME_MEANING.get(field) in types:
            field = _SAME_MEANING[field]
        if field not in types:
            raise UsageError(
                f"{name} has no option {key!r}", where=f"{path}.{key}", fix=did_you_mean(str(key), list(types))
            )
        if field in plain:
            raise UsageError(f"option {field!r} is given twice", where=f"{path}.{key}")
        plain[field] = [value] if types[field] == tuple[str, ...] and isinstance(value, str) else value
    try:
        # `replace` goes through the constructor: msgspec leaves defaults unset on the instance, and then out of YAML.
        options = dataclasses.replace(msgspec.convert(plain, cls.Options, strict=strict))
    except msgspec.ValidationError as error:
        for key, value in plain.items():
            if f"at `$.{key}`" in str(error) and typing.get_origin(types[key]) is Literal:
                known = [str(word) for word in typing.get_args(types[key])]
                fix = did_you_mean(str(value), known)
                raise UsageError(f"{name} has no {key} {value!r}", where=f"{path}.{key}", fix=fix) from error
        raise _usage_error(error, path, None, plain) from error
    try:
        cls(options)
    except UsageError as error:
        where = f"{path}.{error.where}" if error.where in types else error.where or _guilty(error, plain, path)
        raise UsageError(error.what, where=where, fix=error.fix) from error
    return Step(name, options)


def _bare(hint: Any) -> Any:
    """A type without its `Annotated`."""
    return hint.__origin__ if typing.get_origin(hint) is Annotated else hint


def _guilty(error: UsageError, plain: Mapping[str, object], path: str) -> str:
    """The path of the option whose value the message quotes, else of the pass."""
    for key, value in plain.items():
        if isinstance(value, str) and repr(value) in error.what:
            return f"{path}.{key}"
    return path


def _usage_error(
    error: msgspec.ValidationError, path: str, fix: str | None, given: Mapping[str, object] | None = None
) -> UsageError:
    """msgspec's "Expected `float` < 1.0 - at `$.sparsity`" with the whole path in front, and the value."""
    found = re.fullmatch(r"(?s)(.*?)(?: - at `\$(.*?)`)?", str(error))
    what, below = (found[1], found[2] or "") if found else (str(error), "")
    value = (given or {}).get(below.removeprefix("."))
    shown = f", got {value!r}" if value is not None and "got" not in what else ""
    return UsageError(f"{what}{shown}", where=f"{path}{below}" or None, fix=fix)
