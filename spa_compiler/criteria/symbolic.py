"""An importance that the user writes as an expression over a weight and its statistics.

    W  weight [n, k]              X  root mean square of each input, a row [1, k]       G  given scores [n, k]
    A  |W|                        M  mean of each input, V its variance, rows           Y  root mean square of each
                                                                                           output, a column [n, 1]
    numbers, + - * / ** and parentheses, with Python's precedence
    abs  sq  sqrt  exp  log  neg  element by element
    mms  (x - min) / (max - min) over the whole array          zsn  (x - mean) / deviation; both 0 where x is constant

Where a bias takes up what the means give, X and Y are those of inputs and outputs without their means.

`sq(W)*mms(G)` is what the genetic search of Pruner-Zero found (Dong et al., "Pruner-Zero: Evolving Symbolic Pruning
Metric from Scratch for Large Language Models", 2024), with G the aggregated gradients; `A*X` is Wanda, `sq(W)`
magnitude. G is whatever the user's score file holds.

The text is parsed here, into a tree of the operations above and of nothing else; it never becomes Python. Its length,
its depth and its number of operations are bounded, and so are the time and the memory that it can cost.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NoReturn, TypeAlias

import numpy as np
from numpy.typing import NDArray

from spa_compiler.errors import UsageError

F64: TypeAlias = NDArray[np.float64]

MAX_LENGTH = 2000
MAX_NODES = 200
MAX_DEPTH = 40

VARIABLES = ("W", "A", "X", "M", "V", "G", "Y")

_TOKEN = re.compile(
    r"\s*(?:([0-9]+\.?[0-9]*(?:[eE][+-]?[0-9]+)?|\.[0-9]+(?:[eE][+-]?[0-9]+)?)|([A-Za-z_]\w*)|(\*\*|\S))"
)
_SUMS = {"+": operator.add, "-": operator.sub}
_PRODUCTS = {"*": operator.mul, "/": operator.truediv}


@dataclass(frozen=True)
class Statistics:
    """What the variables stand for.

    Attributes:
        weight: `[n, k]`.
        norms: root mean square of each input, `[k]`.
        mean: of each input, `[k]`.
        variance: of each input, `[k]`.
        output_norms: root mean square of each output, `[n]`, where known.
        scores: given, `[n, k]`, such as gradients.
    """

    weight: F64
    norms: F64
    mean: F64
    variance: F64
    output_norms: F64 | None = None
    scores: F64 | None = None

    def variable(self, name: str) -> F64 | None:
        """The array that `name` stands for, so that it broadcasts against `[n, k]`; None where it is not known."""
        if name in "WA":
            return np.abs(self.weight) if name == "A" else np.asarray(self.weight, np.float64)
        if name == "Y":
            return None if self.output_norms is None else np.asarray(self.output_norms, np.float64)[:, None]
        if name == "G":
            return None if self.scores is None else np.asarray(self.scores, np.float64)
        row = {"X": self.norms, "M": self.mean, "V": self.variance}[name]
        return np.asarray(row, np.float64)[None, :]


@dataclass(frozen=True)
class _Node:
    """An operation on other nodes, a variable or a number; `text` is how it was written."""

    text: str
    apply: Callable[..., F64] | None = None
    parts: tuple[_Node, ...] = ()
    variable: str = ""
    number: float = 0.0


@dataclass(frozen=True)
class Expression:
    """A parsed expression.

    Attributes:
        text: as the user wrote it.
        variables: those that it reads.
    """

    text: str
    variables: frozenset[str]
    _root: _Node

    def evaluate(self, statistics: Statistics) -> F64:
        """Importance `[n, k]`, not negative: where the value goes below 0, everything is shifted up to 0.

        Raises:
            UsageError: a variable is not known here, or a value is not finite.
        """
        values: dict[str, F64] = {}
        for name in sorted(self.variables):
            value = statistics.variable(name)
            if value is None:
                what = "given scores" if name == "G" else "the norms of the outputs"
                fix = "Give them with scores=" if name == "G" else "They need calibration data"
                raise UsageError(f"the expression {self.text!r} reads {name}, {what}, and there are none", fix=fix)
            values[name] = value
        with np.errstate(all="ignore"):
            value = self._value(self._root, values)
            low = float(value.min(initial=np.inf))
            out = np.array(np.broadcast_to(value, statistics.weight.shape), np.float64)
            if low < 0:
                out -= low
        if not np.isfinite(out).all():
            raise UsageError(f"the expression {self.text!r} has values too far apart to compare")
        return out

    def _value(self, node: _Node, values: Mapping[str, F64]) -> F64:
        """The value of a node; every one has to be finite."""
        if node.variable:
            value = values[node.variable]
        elif node.apply is None:
            value = np.asarray(node.number)
        else:
            value = np.asarray(node.apply(*(self._value(part, values) for part in node.parts)))
        wrong = ~np.isfinite(value)
        if wrong.any():
            at = tuple(int(index) for index in np.argwhere(wrong)[0])
            raise UsageError(
                f"the expression {self.text!r} is not finite: {node.text!r} is {value[at]} at {list(at)}",
                fix="Add a small number to what may be 0, and take abs() of what must not be negative",
            )
        return value


def parse(text: str) -> Expression:
    """The expression that `text` writes.

    Raises:
        UsageError: it is none, or it is too long.
    """
    return _Parser(text).expression()


class _Parser:
    """Recursive descent, one token ahead."""

    def __init__(self, text: str) -> None:
        if len(text) > MAX_LENGTH:
            raise UsageError(f"the expression has {len(text)} characters", fix=f"At most {MAX_LENGTH} are read")
        self._text = text
        self._tokens = [
            (match.start(match.lastindex or 0), match.lastindex, match[match.lastindex or 0])
            for match in _TOKEN.finditer(text)
        ]
        self._at = 0
        self._nodes = 0
        self._variables: set[str] = set()

    def expression(self) -> Expression:
        """The whole text."""
        root = self._sum(0)
        if self._at < len(self._tokens):
            self._fail(f"{self._token()!r} is not expected")
        if not self._variables:
            raise UsageError(f"the expression {self._text!r} has no variable", fix=f"There are: {', '.join(VARIABLES)}")
        return Expression(self._text, frozenset(self._variables), root)

    def _sum(self, depth: int) -> _Node:
        return self._chain(self._product, _SUMS, depth)

    def _product(self, depth: int) -> _Node:
        return self._chain(self._signed, _PRODUCTS, depth)

    def _chain(self, operand: Callable[[int], _Node], operators: Mapping[str, Callable[..., F64]], depth: int) -> _Node:
        """Operands with operators of one rank between them, from left to right."""
        start = self._place()
        node = operand(depth)
        while (token := self._token()) in operators:
            # Each turn makes the tree one level deeper, though the text is not nested.
            depth += 1
            self._at += 1
            node = self._node(start, depth, operators[token], node, operand(depth))
        return node

    def _signed(self, depth: int) -> _Node:
        _limit(depth)  # every way down comes through here
        start = self._place()
        if self._token() == "-":
            self._at += 1
            return self._node(start, depth, operator.neg, self._signed(depth + 1))
        base = self._atom(depth)
        if self._token() != "**":
            return base
        self._at += 1
        return self._node(start, depth, np.power, base, self._signed(depth + 1))

    def _atom(self, depth: int) -> _Node:
        start, kind, token = self._place(), self._kind(), self._token()
        self._at += 1
        if kind == 1:
            return self._leaf(_Node(token, number=float(token)))
        if kind == 2 and token in VARIABLES:
            self._variables.add(token)
            return self._leaf(_Node(token, variable=token))
        if kind == 2 and token in FUNCTIONS:
            self._expect("(")
            inner = self._sum(depth + 1)
            self._expect(")")
            return self._node(start, depth, FUNCTIONS[token], inner)
        if token == "(":
            inner = self._sum(depth + 1)
            self._expect(")")
            return inner
        self._at -= 1
        known = f"Variables: {', '.join(VARIABLES)}. Functions: {', '.join(FUNCTIONS)}"
        self._fail(
            f"there is no {token!r}" if kind == 2 else f"{token!r} is not expected" if token else "it ends", known
        )

    def _node(self, start: int, depth: int, apply: Callable[..., F64], *parts: _Node) -> _Node:
        """An operation, counted."""
        _limit(depth)
        _, _, last = self._tokens[self._at - 1]
        end = self._tokens[self._at - 1][0] + len(last)
        return self._leaf(_Node(self._text[start:end], apply, parts))

    def _leaf(self, node: _Node) -> _Node:
        self._nodes += 1
        if self._nodes > MAX_NODES:
            raise UsageError("the expression is too large", fix=f"At most {MAX_NODES} operations and operands are read")
        return node

    def _expect(self, token: str) -> None:
        if self._token() != token:
            self._fail(f"{token!r} is expected")
        self._at += 1

    def _fail(self, what: str, fix: str | None = None) -> NoReturn:
        raise UsageError(f"the expression {_short(self._text)!r}, character {self._place() + 1}: {what}", fix=fix)

    def _place(self) -> int:
        return self._tokens[self._at][0] if self._at < len(self._tokens) else len(self._text)

    def _kind(self) -> int | None:
        return self._tokens[self._at][1] if self._at < len(self._tokens) else None

    def _token(self) -> str:
        return self._tokens[self._at][2] if self._at < len(self._tokens) else ""


def _limit(depth: int) -> None:
    if depth > MAX_DEPTH:
        raise UsageError("the expression is nested too deeply", fix=f"At most {MAX_DEPTH} levels are read")


def _short(text: str) -> str:
    return text if len(text) <= 80 else text[:77] + "..."


def _mms(value: F64) -> F64:
    """Scaled to 0..1."""
    low, high = value.min(initial=np.inf), value.max(initial=-np.inf)
    return np.asarray((value - low) / (high - low)) if high > low else np.zeros_like(value)


def _zsn(value: F64) -> F64:
    """Mean 0, deviation 1."""
    deviation = value.std() if value.size else 0.0
    return np.asarray((value - value.mean()) / deviation) if deviation > 0 else np.zeros_like(value)


FUNCTIONS: dict[str, Callable[..., F64]] = {
    "abs": np.abs,
    "sq": np.square,
    "sqrt": np.sqrt,
    "exp": np.exp,
    "log": np.log,
    "neg": np.negative,
    "mms": _mms,
    "zsn": _zsn,
}
