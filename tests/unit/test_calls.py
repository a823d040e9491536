"""FunctionGemma's calls as they are read from an answer's text: every corner of the grammar."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from function_gemma.vllm_plugin.calls import Call, CallError, parse

ANSWERS: dict[str, dict[str, str]] = json.loads(
    (Path(__file__).parents[1] / "lab" / "model" / "answers.json").read_text()
)
START, END, RESPONSE = "<start_function_call>", "<end_function_call>", "<start_function_response>"
# What the lab's models call; every other answer of theirs has no call.
CALLED = {
    "Which tool should run next for src/app.py?": {
        "lint": [Call("run_linter", {"path": "src/app.py"})],
        "docstring": [Call("write_docstring", {"path": "src/app.py", "style": "google"})],
    },
    "Please look at tests/test_api.py.": {
        "lint": [Call("run_linter", {"path": "tests/test_api.py", "fix": True, "max_problems": 20})],
        "docstring": [
            Call("write_docstring", {"functions": ["test_get", "test_post"], "path": "tests/test_api.py"})
        ],
    },
    "Prepare the package billing for a release.": {
        "lint": [Call("run_linter", {"path": "billing/"}), Call("run_linter", {"path": "tests/"})],
    },
}


def call(pairs: str, name: str = "f") -> str:
    return f"{START}call:{name}{{{pairs}}}{END}"


def value(text: str) -> Any:  # noqa: ANN401 - whatever JSON can say
    (only,) = parse(call(f"key:{text}"))
    return only.arguments["key"]


@pytest.mark.parametrize("prompt", ANSWERS)
def test_the_labs_answers_are_the_calls_that_they_look_like(prompt: str) -> None:
    for speaker, answer in ANSWERS[prompt].items():
        assert parse(answer) == CALLED.get(prompt, {}).get(speaker, []), speaker


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<escape>src/app.py<escape>", "src/app.py"),
        ("<escape><escape>", ""),
        ("<escape>123<escape>", "123"),
        ("<escape>true<escape>", "true"),
        ("<escape>null<escape>", "null"),
        ("<escape>a,b:{c}[d]<escape>", "a,b:{c}[d]"),
        ("<escape>}<end_function_call><start_function_response><escape>", f"}}{END}{RESPONSE}"),
        ("<escape>call:g{a:1}<start_function_call><escape>", f"call:g{{a:1}}{START}"),
        ("<escape> two\nlines, ä 🙂 <escape>", " two\nlines, ä 🙂 "),
        ("true", True),
        ("false", False),
        ("null", None),
        ("None", None),
        ("0", 0),
        ("-12", -12),
        ("0.5", 0.5),
        ("-2.50", -2.5),
        ("1e3", 1000.0),
        ("-1.5E-3", -0.0015),
        ("2e+2", 200.0),
        ("google", "google"),
        ("True", "True"),
        ("007", "007"),
        ("1.", "1."),
        ("+1", "+1"),
        ("NaN", "NaN"),
        ("-Infinity", "-Infinity"),
        ("1e999", "1e999"),
        ("٣", "٣"),
        ("two words", "two words"),
        ("http://host:80/x", "http://host:80/x"),
        ("a<b>c", "a<b>c"),
        ("[]", []),
        ("{}", {}),
        ("[<escape>a<escape>,1,true,null,word]", ["a", 1, True, None, "word"]),
        ("[[1,2],[],[[3]]]", [[1, 2], [], [[3]]]),
        ("{a:{b:{c:[1,{d:<escape>}<escape>}]}},e:2}", {"a": {"b": {"c": [1, {"d": "}"}]}}, "e": 2}),
        ("[{a:1},{a:2}]", [{"a": 1}, {"a": 2}]),
    ],
)
def test_a_value_is_what_the_grammar_says_with_its_type(text: str, expected: Any) -> None:  # noqa: ANN401 - whatever JSON can say
    read = value(text)
    assert (type(read), json.dumps(read)) == (type(expected), json.dumps(expected))  # True is no 1, 1 no 1.0


def test_a_call_without_arguments_has_none() -> None:
    assert parse(call("")) == [Call("f", {})]


def test_names_and_keys_may_have_dots_and_dashes() -> None:
    assert parse(call("max-line.length:88", "ruff.check-all")) == [
        Call("ruff.check-all", {"max-line.length": 88})
    ]


def test_calls_follow_each_other_in_their_order() -> None:
    assert [one.name for one in parse(call("", "b") + call("", "a") + call("", "b"))] == ["b", "a", "b"]


@pytest.mark.parametrize("text", ["", "I am the base model.", "call:f{a:1}", "<start_function_ca", END])
def test_a_text_without_a_call_has_none(text: str) -> None:
    assert parse(text) == []


def test_text_before_the_calls_is_no_part_of_them() -> None:
    assert parse("I look at {it}, <escape> " + call("a:1")) == [Call("f", {"a": 1})]


def test_nothing_is_read_behind_the_beginning_of_a_response() -> None:
    assert parse(call("a:1") + RESPONSE + call("a:2") + "{") == [Call("f", {"a": 1})]
    assert parse(RESPONSE + call("a:1")) == []


@pytest.mark.parametrize(
    ("text", "position", "expected"),
    [
        (START, 21, "'call:'"),
        (START + "f{}" + END, 21, "'call:'"),
        (START + "call:", 26, "the name of a function"),
        (START + "call:{}" + END, 26, "the name of a function"),
        (START + "call:f", 27, "'{'"),
        (START + "call:f" + END + call(""), 27, "'{'"),
        (START + "call:f{", 28, "a key"),
        (START + "call:f{a", 29, "':'"),
        (START + "call:f{a:", 30, "a value"),
        (START + "call:f{a:1", 31, "',' or '}'"),
        (START + "call:f{a:<escape>x", 39, "'<escape>'"),
        (START + "call:f{a:[1", 32, "',' or ']'"),
        (START + "call:f{a:1}", 32, "'<end_function_call>'"),
        (START + "call:f{a:1}<end_function", 32, "'<end_function_call>'"),
        (call("a"), 29, "':'"),
        (call("a:"), 30, "a value"),
        (call("a:,b:1"), 30, "a value"),
        (call("a:1,"), 32, "a key"),
        (call(",a:1"), 28, "a key"),
        (call(":1"), 28, "a key"),
        (call("a:[1,]"), 33, "a value"),
        (call("a:[1}"), 32, "',' or ']'"),
        (call("a:{b:1]"), 34, "',' or '}'"),
        (call("a:1]"), 31, "',' or '}'"),
        (call("a:x<escape>y<escape>"), 31, "',' or '}'"),
        (call("a:<escape>y<escape>x"), 47, "',' or '}'"),
        (call("<escape>a<escape>:1"), 28, "a key"),
        (call("a:1,a:2"), 32, "another key than 'a', which is there"),
        (call("") + "text", 48, f"{START}, {RESPONSE} or the end"),
    ],
)
def test_a_malformed_call_says_where_and_what_was_expected(text: str, position: int, expected: str) -> None:
    with pytest.raises(CallError) as refused:
        parse(text)
    assert (refused.value.position, refused.value.expected) == (position, expected)
    found = repr(text[position : position + 20]) if position < len(text) else "the end"
    assert str(refused.value) == f"at character {position}: expected {expected}, found {found}"


def test_every_truncation_of_an_answer_is_refused_or_a_text_without_a_call() -> None:
    for answers in ANSWERS.values():
        for answer in answers.values():
            whole = parse(answer)
            for length in range(len(answer)):
                with suppress(CallError):
                    assert parse(answer[:length]) in ([], whole[:1]), answer[:length]


def test_depth_has_an_end_before_pythons_own() -> None:
    assert json.dumps(value("[" * 99 + "]" * 99)) == "[" * 99 + "]" * 99
    for opening in ("[", "{a:"):
        with pytest.raises(CallError, match="at most 100 lists and objects within each other"):
            value(opening * 100_000)


@pytest.mark.parametrize(
    "text",
    [
        START * 50_000,
        call("") * 25_000,
        START + "call:" + "f" * 1_000_000,
        START + "call:" + "<" * 1_000_000,
        START + "call:f{" + "<escape>" * 125_000,
        START + "call:f{a:<escape>" + "<start_function_call>" * 50_000,
        call("a:" + "1" * 1_000_000),
        call("a:[" + "1," * 500_000 + "1]"),
        call(",".join(f"key{number}:<escape>x<escape>" for number in range(40_000))),
        "<" * 1_000_000,
    ],
    ids=lambda text: text[:40],
)
def test_a_megabyte_of_anything_ends(text: str) -> None:
    # In a moment; where time grew with the square of the length, this would not end today.
    with suppress(CallError):
        parse(text)
