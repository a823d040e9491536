"""FunctionGemma's calls, read from the text of an answer.

    calls = { text } { "<start_function_call>" "call:" name "{" [pair {"," pair}] "}" "<end_function_call>" }
    pair  = key ":" value
    value = "<escape>" any* "<escape>" | "true" | "false" | "null" | "None" | number
          | "[" [value {"," value}] "]" | "{" [pair {"," pair}] "}" | word

Between two <escape> all is literal, and the value a string. A word that is nothing else is a string too.
The calls end with the text or at <start_function_response>, behind which the model would answer itself.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

_START, _END = "<start_function_call>", "<end_function_call>"
_RESPONSE = "<start_function_response>"
_ESCAPE = "<escape>"
_MARK = r"<escape>|<(?:start|end)_function_(?:call|response)>"
_NAME = re.compile(rf"(?:(?!{_MARK})[^{{])+")
_KEY = re.compile(rf"(?:(?!{_MARK})[^]\[{{}},:])+")
_WORD = re.compile(rf"(?:(?!{_MARK})[^]\[{{}},])+")
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
_CONSTANTS = {"true": True, "false": False, "null": None, "None": None}
_MOST_DIGITS = 300  # of a number: more is beyond a float, and slow to read as an int
_DEEPEST = 100  # lists and objects within each other: Python's own stack has an end


class CallError(ValueError):
    """A call that breaks the grammar: what was expected at `position`, counted in characters from 0."""

    def __init__(self, text: str, position: int, expected: str) -> None:
        """Say so, with the beginning of what is there instead."""
        found = repr(text[position : position + 20]) if position < len(text) else "the end"
        super().__init__(f"at character {position}: expected {expected}, found {found}")
        self.position = position
        self.expected = expected


@dataclass(frozen=True)
class Call:
    """One call of a tool; the arguments are what JSON can say."""

    name: str
    arguments: dict[str, Any]


def parse(text: str) -> list[Call]:
    """Return the calls in their order, none where the text has none; CallError where one is malformed.

    Takes time in proportion to the text's length.
    """
    start, response = text.find(_START), text.find(_RESPONSE)
    if start < 0 or 0 <= response < start:
        return []
    return _Reader(text, start).calls()


class _Reader:
    """Reads on from a position."""

    def __init__(self, text: str, position: int) -> None:
        self.text = text
        self.position = position

    def calls(self) -> list[Call]:
        calls = []
        while self._skip(_START):
            self._need("call:")
            name = self._match(_NAME, "the name of a function")
            self._need("{")
            calls.append(Call(name, self._object(1)))
            self._need(_END)
        if self.position < len(self.text) and not self._skip(_RESPONSE):
            raise self._expected(f"{_START}, {_RESPONSE} or the end")
        return calls

    def _object(self, depth: int) -> dict[str, Any]:
        """Read on behind a {."""
        pairs: dict[str, Any] = {}
        if self._skip("}"):
            return pairs
        while True:
            at = self.position
            key = self._match(_KEY, "a key")
            if key in pairs:
                self.position = at
                raise self._expected(f"another key than {key!r}, which is there")
            self._need(":")
            pairs[key] = self._value(depth)
            if self._skip("}"):
                return pairs
            self._need(",", "',' or '}'")

    def _array(self, depth: int) -> list[Any]:
        """Read on behind a [."""
        values: list[Any] = []
        if self._skip("]"):
            return values
        while True:
            values.append(self._value(depth))
            if self._skip("]"):
                return values
            self._need(",", "',' or ']'")

    def _value(self, depth: int) -> Any:  # noqa: ANN401 - whatever JSON can say
        if self._skip(_ESCAPE):
            start, end = self.position, self.text.find(_ESCAPE, self.position)
            self.position = len(self.text) if end < 0 else end
            self._need(_ESCAPE)
            return self.text[start:end]
        if depth == _DEEPEST and self.text.startswith(("{", "["), self.position):
            raise self._expected(f"at most {_DEEPEST} lists and objects within each other")
        if self._skip("{"):
            return self._object(depth + 1)
        if self._skip("["):
            return self._array(depth + 1)
        word = self._match(_WORD, "a value")
        return _CONSTANTS[word] if word in _CONSTANTS else _number_or_word(word)

    def _skip(self, mark: str) -> bool:
        """Whether the mark is here; then it is read."""
        here = self.text.startswith(mark, self.position)
        if here:
            self.position += len(mark)
        return here

    def _need(self, mark: str, expected: str | None = None) -> None:
        if not self._skip(mark):
            raise self._expected(expected or repr(mark))

    def _match(self, pattern: re.Pattern[str], expected: str) -> str:
        found = pattern.match(self.text, self.position)
        if not found:
            raise self._expected(expected)
        self.position = found.end()
        return found[0]

    def _expected(self, what: str) -> CallError:
        return CallError(self.text, self.position, what)


def _number_or_word(word: str) -> int | float | str:
    """Return the number that the word is; one that JSON could not say stays a word."""
    number = _NUMBER.fullmatch(word) if len(word) <= _MOST_DIGITS else None
    if not number:
        return word
    if number[1] is None and number[2] is None:
        return int(word)
    value = float(word)
    return value if value not in (float("inf"), float("-inf")) else word
