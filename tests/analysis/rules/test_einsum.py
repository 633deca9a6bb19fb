"""Einsum: equal letters are one axis, in any number of operands."""

from __future__ import annotations

import pytest

from spa_compiler.analysis.rules.einsum import Equation, parse
from tests.analysis.exactness import check_exact
from tests.analysis.told import analysis_of, group_members, weighted


def test_parse() -> None:
    assert parse("ij, jk -> ik") == Equation((("i", "j"), ("j", "k")), ("i", "k"))
    assert parse("bij,jA") == Equation((("b", "i", "j"), ("j", "A")), ("A", "b", "i"))
    assert parse("...ij,...jk") == Equation((("...", "i", "j"), ("...", "j", "k")), ("...", "i", "k"))
    assert parse("ii->") == Equation((("i", "i"),), ())


ATTENTION = """net (float[2, 5, 6] x, float[6, 3, 4] wq, float[6, 3, 4] wk, float[6, 3, 7] wv, float[3, 7, 8] wo)
     => (float[2, 5, 8] y) {
  q = Einsum <equation = "btd,dhk->bhtk"> (x, wq)
  k = Einsum <equation = "btd,dhk->bhtk"> (x, wk)
  v = Einsum <equation = "btd,dhe->bhte"> (x, wv)
  s = Einsum <equation = "bhqk,bhsk->bhqs"> (q, k)
  o = Einsum <equation = "bhqs,bhse->bqhe"> (s, v)
  y = Einsum <equation = "bqhe,hed->bqd"> (o, wo)
}"""


def test_attention() -> None:
    found = {frozenset(m for m in members if m[0].startswith("w")) for members in group_members(ATTENTION)}
    heads = frozenset({("wq", 1), ("wk", 1), ("wv", 1), ("wo", 0)})
    assert found == {heads, frozenset({("wq", 2), ("wk", 2)}), frozenset({("wv", 2), ("wo", 1)})}
    assert check_exact(weighted(ATTENTION)) == 3


def between(equation: str, operands: str = "a, w", weights: str = "float[6, 8] w", result: str = "8") -> str:
    return f"""net (float[2, 3, 5] x, float[5, 6] u, {weights}, float[{result}, 2] v) => (float[2, 3, 2] y) {{
      a = MatMul(x, u)
      b = Einsum <equation = "{equation}"> ({operands})
      y = MatMul(b, v)
    }}"""


@pytest.mark.parametrize(
    "text, groups",
    [
        (between("...i,ij->...j"), 2),
        (between("...i,ij"), 2),
        (between("bti,ij->btj"), 2),
        (between("bti,i->bti", weights="float[6] w", result="6"), 1),  # no contraction
        (between("bti,ij,j->btj", "a, w, s", "float[6, 8] w, float[8] s"), 2),
        (between("bti,i...->bt...", weights="float[6, 8] w"), 2),
        (between("bti,ij,bk->btj", "a, w, x0", "float[1, 4] x0, float[6, 8] w"), 2),
    ],
)
def test_exact(text: str, groups: int) -> None:
    assert check_exact(weighted(text)) == groups


def test_a_letter_twice_in_one_operand() -> None:
    text = """net (float[2, 3] x, float[3, 6] u, float[3, 6] w, float[6, 2] v) => (float[2] y, float[2, 2] z) {
      a = MatMul(x, u)
      b = MatMul(x, w)
      ab = Einsum <equation = "bi,bj->bij"> (a, b)
      y = Einsum <equation = "bii->b"> (ab)
      z = MatMul(a, v)
    }"""
    (members,) = group_members(text)
    assert members == {("u", 1), ("w", 1), ("a", 1), ("b", 1), ("ab", 1), ("ab", 2), ("v", 0)}
    assert check_exact(weighted(text)) == 1


def test_size_one_broadcasts() -> None:
    text = between("...i,...j->...j", "a, w", "float[1, 1, 8] w", "8")
    assert [members for members in group_members(text) if ("a", 2) in members] == [{("u", 1), ("a", 2)}]


def test_work() -> None:
    macs = sorted(group.macs or 0 for group in analysis_of(between("bti,ij->btj")).groups)
    assert macs == [2 * 3 * (6 * 8 + 8 * 2), 2 * 3 * (5 * 6 + 6 * 8)]
