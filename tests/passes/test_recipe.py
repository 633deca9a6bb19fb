"""Recipes: three ways to write one, one meaning, and messages that say where."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spa_compiler.errors import UsageError
from spa_compiler.passes import Recipe, from_command_line, from_flags, from_yaml, read
from spa_compiler.passes.flags import parse_flags
from spa_compiler.passes.sparsify import Sparsify, SparsifyOptions

OPTIONS = SparsifyOptions(sparsity=0.9, pattern="block:4x1")

YAML = """\
version: 1
passes:
- name: sparsify
  sparsity: 0.9
  pattern: block:4x1
"""


@pytest.mark.parametrize(
    "recipe",
    [
        from_yaml(YAML),
        from_yaml('{"version": 1, "passes": [{"name": "sparsify", "sparsity": 0.9, "pattern": "block:4x1"}]}'),
        from_flags("sparsify{sparsity=0.9,pattern=block:4x1}"),
        from_flags('  sparsify { sparsity = "0.9" , pattern = block:4x1, }  '),
        from_flags("sparsify{sparsity=0.9,pattern=block:4x1,criterion=auto,min-keep=0.2,targets=[]}"),
        from_command_line(sparsity=0.9, pattern="block:4x1"),
        from_command_line(passes="sparsify{sparsity=0.9,pattern=block:4x1}"),
    ],
)
def test_one_meaning(recipe: Recipe) -> None:
    assert recipe == from_yaml(YAML)
    assert recipe.passes[0].options == OPTIONS
    (built,) = recipe.build()
    assert isinstance(built, Sparsify)
    assert built.options == OPTIONS


def test_no_pass() -> None:
    assert from_command_line() == from_yaml("version: 1") == from_flags("") == Recipe()


def test_zeros_for_gpus_come_in_blocks_unless_a_pattern_is_named() -> None:
    blocks = from_command_line(sparsity=0.9, pattern="block:32x32")
    assert from_command_line(sparsity=0.9, target="cuda:sm_90") == blocks
    assert from_command_line(sparsity=0.9, target="cpu") == from_command_line(sparsity=0.9) != blocks
    assert from_command_line(pattern="2:4", target="cuda") == from_command_line(pattern="2:4")
    assert Recipe().build() == []


def test_yaml_holds_every_option() -> None:
    assert from_yaml(YAML).to_yaml() == (
        "version: 1\npasses:\n- name: sparsify\n  sparsity: 0.9\n  pattern: block:4x1\n  method: auto\n"
        "  allocate: auto\n  scope: layer\n  min_keep: 0.2\n  scores: null\n  masks: null\n  expression: null\n"
        "  targets: []\n  ignore: []\n"
    )


NAMES = st.lists(st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=12), max_size=3)


@given(
    st.floats(0, 1, exclude_max=True),
    st.sampled_from(["unstructured", "block:4x1", "block:8x1"]),
    st.sampled_from(["layer", "global"]),
    NAMES,
    NAMES,
)
def test_yaml_round_trip(sparsity: float, pattern: str, scope: str, targets: list[str], ignore: list[str]) -> None:
    options = SparsifyOptions(
        sparsity=sparsity,
        pattern=pattern,
        scope=scope,  # type: ignore[arg-type]
        targets=tuple(targets),
        ignore=tuple(ignore),
    )
    recipe = Recipe(passes=(from_flags("sparsify{sparsity=0}").passes[0].__class__("sparsify", options),))
    assert from_yaml(recipe.to_yaml()) == recipe


def test_lists_on_the_command_line() -> None:
    options = from_flags("""sparsify{sparsity=0.5,targets=[/layer.0/*,"a b",'x[0]'],ignore=Conv}""").passes[0].options
    assert options.targets == ("/layer.0/*", "a b", "x[0]")
    assert options.ignore == ("Conv",)
    assert from_yaml("{version: 1, passes: [{name: sparsify, sparsity: 0.5, ignore: Conv}]}").passes[
        0
    ].options.ignore == ("Conv",)


def test_several_passes() -> None:
    recipe = from_flags("sparsify{sparsity=0.5,targets=Conv} sparsify{sparsity=0.9,ignore=Conv}")
    assert [step.options.sparsity for step in recipe.passes] == [0.5, 0.9]


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("", []),
        ("a", [("a", {})]),
        ("a b-c", [("a", {}), ("b-c", {})]),
        ("a{}b{x=1}", [("a", {}), ("b", {"x": "1"})]),
        ("a{x=[],y=[p],z=[p,q,]}", [("a", {"x": [], "y": ["p"], "z": ["p", "q"]})]),
        ("a{x='',y=\"{}\"}", [("a", {"x": "", "y": "{}"})]),
    ],
)
def test_grammar(text: str, wanted: list[tuple[str, dict[str, object]]]) -> None:
    assert parse_flags(text) == wanted


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "the name of a pass is expected before '{'"),
        ("a{", "the name of an option or '}' is expected at the end"),
        ("a{x}", "'=' is expected before '}'"),
        ("a{x=}", "a value is expected before '}'"),
        ("a{x=1 y=2}", "',' or '}' is expected before 'y=2}'"),
        ("a{x=[1}", "',' or ']' is expected before '}'"),
        ("a{x=1,x=2}", "option 'x' is given twice"),
        ("a}", "the name of a pass is expected before '}'"),
        ("a{x='1}", "a value is expected before"),
        ("a,b", "the name of a pass is expected before ',b'"),
    ],
)
def test_grammar_errors_say_where(text: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_flags(text)
    assert message in str(caught.value)


SECOND = "version: 1\npasses:\n- {name: sparsify, sparsity: 0.5}\n- "


@pytest.mark.parametrize(
    "item, where, message",
    [
        ("{name: sparsify, sparsity: 1.5}", "$.passes[1].sparsity", "Expected `float` < 1.0, got 1.5"),
        ("{name: sparsify, sparsity: 1}", "$.passes[1].sparsity", "Expected `float` < 1.0, got 1"),
        ("{name: sparsify, sparsity: -0.1}", "$.passes[1].sparsity", "Expected `float` >= 0.0, got -0.1"),
        ("{name: sparsify, sparsity: .nan}", "$.passes[1].sparsity", "got nan"),
        ("{name: sparsify, sparsity: '0.9'}", "$.passes[1].sparsity", "Expected `float | null`, got `str`"),
        ("{name: sparsify, sparsity: yes}", "$.passes[1].sparsity", "Expected `float | null`, got `bool`"),
        ("{name: sparsify}", "$.passes[1].sparsity", "the share of zeros is missing"),
        ("{name: sparsify, sparsty: 0.9}", "$.passes[1].sparsty", "Did you mean sparsity?"),
        (
            "{name: sparsify, sparsity: 0.9, pattern: '2:4'}",
            "$.passes[1].sparsity",
            "the pattern 2:4 has 0.5 zeros, not 0.9",
        ),
        ("{name: sparsify, sparsity: 0.9, pattern: '4x1'}", "$.passes[1].pattern", "unstructured, block:4x1"),
        (
            "{name: sparsify, sparsity: 0.9, scope: model}",
            "$.passes[1].scope",
            "has no scope 'model'. There are: layer",
        ),
        (
            "{name: sparsify, sparsity: 0.9, method: sparsegtp}",
            "$.passes[1].method",
            "Did you mean sparsegpt? There are",
        ),
        ("{name: sparsify, sparsity: 0.9, targets: 3}", "$.passes[1].targets", "got `int`"),
        ("{name: sparsify, sparsity: 0.9, ignore: [a, 3]}", "$.passes[1].ignore[1]", "Expected `str`, got `int`"),
        ("{name: sparsify, sparsity: 0.9, method: auto, criterion: auto}", "$.passes[1].criterion", "given twice"),
        ("{name: sparsfy}", "$.passes[1]", "Did you mean sparsify?"),
        ("{name: fuse}", "$.passes[1]", "There are: sparsify"),
        ("[]", "$.passes[1]", "a pass is expected"),
        ("{sparsity: 0.9}", "$.passes[1]", "a pass is expected"),
    ],
)
def test_errors_say_where(item: str, where: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        from_yaml(SECOND + item, "r.yaml")
    assert caught.value.where == f"r.yaml: {where}"
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "r.yaml: $: Expected `object`, got `null`"),
        ("passes: []", "missing required field `version`"),
        ("version: 2", "r.yaml: $.version: Expected `int` <= 1"),
        ("version: 1\npases: []", "unknown field `pases`"),
        ("version: 1\npasses: {}", "r.yaml: $.passes: Expected `array`"),
        ("version: 1\npasses: [", "r.yaml, line 2: not valid YAML"),
        ("version: 1\nversion: 1", "given twice"),
        ("version: 1\npasses: [!!python/name:os.system ]", "not valid YAML"),
        ("? {a: 1}\n: 2", "not valid YAML"),
        ("[" * 5000, "not valid YAML"),
    ],
)
def test_bad_files(text: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        from_yaml(text, "r.yaml")
    assert message in str(caught.value)


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    with pytest.raises(UsageError, match="No such file"):
        read(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="UTF-8"):
        read(path)
    path.write_text(YAML)
    assert read(path) == from_command_line(recipe=path) == from_yaml(YAML)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"sparsity": 0.9, "prune": 0.3}, "--sparsity and --prune contradict"),
        ({"sparsity": 0.9, "passes": "sparsify"}, "--sparsity and --passes contradict"),
        ({"passes": "sparsify", "recipe": Path("r.yaml")}, "--passes and --recipe contradict"),
        ({"pattern": "block:4x1"}, "--pattern needs --sparsity"),
        ({"sparsity": 1.0}, "--sparsity: Expected `float` < 1.0"),
        ({"sparsity": 0.9, "pattern": "block:4"}, "--pattern: there is no pattern 'block:4'"),
        ({"prune": 1.0}, "--prune: expected a share"),
        ({"passes": "sparsify{sparsity=x}"}, "$.passes[0].sparsity: Expected `float | null`, got `str`"),
        ({"passes": "sparsify{sparsity=nan}"}, "$.passes[0].sparsity"),
    ],
)
def test_the_command_line(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        from_command_line(**arguments)  # type: ignore[arg-type]
    assert message in str(caught.value)


def test_prune_is_short_for_a_share_of_the_macs() -> None:
    assert from_command_line(prune=0.3) == from_flags("prune-groups{macs=0.7}")
