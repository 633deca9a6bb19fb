"""The grammar of `--passes`: `sparsify{sparsity=0.9,pattern=block:4x1} other`.

passes  = { name [ "{" [ option { "," option } ] "}" ] }
option  = name "=" ( value | "[" [ value { "," value } ] "]" )
value   = a run of characters other than space { } [ ] = , ' "     or anything in quotes
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from spa_compiler.errors import UsageError

Value = str | list[str]

_TOKEN = re.compile(
    r"""\s*(?:(?P<mark>[{}\[\]=,])|"(?P<double>[^"]*)"|'(?P<single>[^']*)'|(?P<bare>[^\s{}\[\]=,"']+))"""
)


def parse_flags(text: str) -> list[tuple[str, dict[str, Value]]]:
    """`a{x=1,y=[p,q]} b` -> `[("a", {"x": "1", "y": ["p", "q"]}), ("b", {})]`: values stay text.

    Raises:
        UsageError: the text does not follow the grammar; the message says where.
    """
    return list(_Reader(text).passes())


class _Reader:
    """One token of look-ahead over the text."""

    def __init__(self, text: str) -> None:
        self.text, self.at = text, 0

    def passes(self) -> Iterator[tuple[str, dict[str, Value]]]:
        while self.text[self.at :].strip():
            yield self._value("the name of a pass"), dict(self._options())

    def _options(self) -> Iterator[tuple[str, Value]]:
        if not self._mark("{"):
            return
        seen: set[str] = set()
        while not self._mark("}"):
            name = self._value("the name of an option or '}'")
            if name in seen:
                raise self._error(f"option {name!r} is given twice")
            seen.add(name)
            self._expect("=")
            yield name, self._list() if self._mark("[") else self._value("a value")
            if not self._mark(","):
                self._expect("}", "',' or '}'")
                return

    def _list(self) -> list[str]:
        values: list[str] = []
        while not self._mark("]"):
            values.append(self._value("a value or ']'"))
            if not self._mark(","):
                self._expect("]", "',' or ']'")
                break
        return values

    def _value(self, wanted: str) -> str:
        found = _TOKEN.match(self.text, self.at)
        if found is None or found["mark"]:
            raise self._error(f"{wanted} is expected")
        self.at = found.end()
        return next(part for part in (found["double"], found["single"], found["bare"]) if part is not None)

    def _mark(self, mark: str) -> bool:
        found = _TOKEN.match(self.text, self.at)
        if found is None or found["mark"] != mark:
            return False
        self.at = found.end()
        return True

    def _expect(self, mark: str, wanted: str | None = None) -> None:
        if not self._mark(mark):
            raise self._error(f"{wanted or repr(mark)} is expected")

    def _error(self, what: str) -> UsageError:
        rest = self.text[self.at :].strip()
        return UsageError(
            f"{what} {f'before {rest[:20]!r}' if rest else 'at the end'}",
            where=f"--passes {self.text!r}",
            fix='Write "a{x=1,y=[p,q]} b", with quotes around values that hold spaces or any of {}[]=,',
        )
