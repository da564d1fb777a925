"""Rows as people have them, and templates as models have them."""

from __future__ import annotations

from typing import Any

import pytest
from tiny_models import byte_tokenizer

from offline_prune.calibration.chat import Chat, RefusedChat, chat_template, plain_text, read_row, templated
from vllm_spense.errors import SpenseError

TOKENIZER = byte_tokenizer()
ANY = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + ANY
ALTERNATING = (
    "{% for m in messages if m.role != 'system' %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}" + ANY
)
STRICT = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}" + ANY
)


def chat(*turns: str) -> Chat:
    """From turns such as `user: hi`."""
    return Chat(tuple(dict(zip(("role", "content"), turn.split(": "), strict=True)) for turn in turns), "f, line 7")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ("hello", "hello"),
        ({"text": "hello", "question": "no", "answer": "no"}, "hello"),
        ({"question": "q", "answer": "a"}, "<user>q<assistant>a"),
        ({"question": "q", "response": "a"}, "<user>q<assistant>a"),
        ({"prompt": "q", "completion": "a"}, "<user>q<assistant>a"),
        ({"prompt": "q", "response": "a"}, "<user>q<assistant>a"),
        ({"problem": "q", "solution": "a", "answer": "42"}, "<user>q<assistant>a"),
        ({"problem": "q", "answer": "42"}, "<user>q<assistant>42"),
        ({"instruction": "q", "output": "a"}, "<user>q<assistant>a"),
        ({"instruction": "q", "input": "", "output": "a"}, "<user>q<assistant>a"),
        ({"instruction": "q", "input": "about", "output": "a"}, "<user>q\n\nabout<assistant>a"),
        ({"instruction": "q", "context": "about", "response": "a"}, "<user>q\n\nabout<assistant>a"),
        ({"system_prompt": "s", "question": "q", "response": "a"}, "<system>s<user>q<assistant>a"),
        (
            {"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "a"}]},
            "<user>q<assistant>a",
        ),
        (
            {"question": "q", "deepseek_thinking_trajectory": "t", "deepseek_attempt": "a", "solution": "no"},
            "<user>q<assistant><think>\nt\n</think>\n\na",
        ),
    ],
)
def test_columns(row: Any, expected: str) -> None:
    found = read_row(row, "here")
    assert (found if isinstance(found, str) else templated(found, ANY, TOKENIZER)) == expected


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ({"role": "user", "content": "hi"}, "<user>hi"),
        ({"role": "user", "content": ""}, "<user>"),
        ({"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}, "<assistant>"),
        ({"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}, "<assistant>"),
        ({"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}, "<user>ab"),
        ({"role": "user", "content": ["a", "b"]}, "<user>ab"),
        ({"role": "User", "content": "hi"}, "<user>hi"),
        *(
            ({"from": name, "value": "hi"}, f"<{role}>hi")
            for name, role in {
                "human": "user",
                "user": "user",
                "gpt": "assistant",
                "assistant": "assistant",
                "chatgpt": "assistant",
                "system": "system",
                "tool": "tool",
                "observation": "tool",
            }.items()
        ),
        # Tables have all columns in all rows.
        ({"role": None, "content": None, "from": "gpt", "value": "hi"}, "<assistant>hi"),
    ],
)
def test_messages(message: dict[str, Any], expected: str) -> None:
    for key in ("messages", "conversations"):
        found = read_row({key: [message]}, "here")
        assert isinstance(found, Chat)
        assert templated(found, ANY, TOKENIZER) == expected


def test_a_system_column_stands_before_conversations() -> None:
    found = read_row({"system": "s", "conversations": [{"from": "human", "value": "hi"}]}, "here")
    assert isinstance(found, Chat)
    assert templated(found, ANY, TOKENIZER) == "<system>s<user>hi"


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"body": "a"}, "here: found body; expected a column text, messages, or question and answer"),
        ([1], "here: found list"),
        (None, "here: found NoneType"),
        ({"question": 1, "answer": 2}, "here: found question, answer"),
        ({"messages": ["hi"]}, "here: found the message hi; expected one with role and content"),
        ({"messages": [{"role": "user"}]}, "expected one with role and content"),
        ({"messages": [{"role": "user", "content": {"a": 1}}]}, "expected one with role and content"),
        (
            {"conversations": [{"from": "alice", "value": "hi"}]},
            "here: found a message from alice, expected human, gpt",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
            "here: found a content part of type image_url, expected text",
        ),
    ],
)
def test_rows_without_text_are_explained(row: Any, words: str) -> None:
    with pytest.raises(SpenseError, match=words):
        read_row(row, "here")


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (ANY, "<system>s<user>a<user>b<assistant>c<tool>d"),
        (NO_SYSTEM, "<user>s\n\na\n\nb<assistant>c<user>d"),
        (ALTERNATING, "<system>s<user>a\n\nb<assistant>c<user>d"),
        (STRICT, "<user>s\n\na\n\nb<assistant>c<user>d"),
    ],
)
def test_chats_are_made_to_fit_the_template(template: str, expected: str) -> None:
    whole = chat("system: s", "user: a", "user: b", "assistant: c", "tool: d")
    assert templated(whole, template, TOKENIZER) == expected
    assert whole == chat("system: s", "user: a", "user: b", "assistant: c", "tool: d")


@pytest.mark.parametrize(
    "template",
    [
        *(STRICT, "{{ messages[0].content + 1 }}", "{% if %}", "{{ nothing.at.all }}"),
        *("{{ 1 // (messages | length - 1) }}", "{{ 10.0 ** 400 }}", "{{ '{}'.format() }}"),
        "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
    ],
)
def test_other_chats_are_refused_with_the_templates_reason(template: str) -> None:
    with pytest.raises(RefusedChat, match=r"f, line 7: .*(alternate|str|Expected|undefined|zero|range|recursion)"):
        templated(chat("assistant: a"), template, TOKENIZER)


def test_calls_of_tools_reach_the_template_and_stay_when_turns_are_merged() -> None:
    calls = [{"function": {"name": "f", "arguments": {"x": 1}}}]
    found = read_row(
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": None, "tool_calls": calls}]},
        "here",
    )
    assert isinstance(found, Chat)
    assert templated(found, "{{ messages[1].tool_calls[0].function.name }}", TOKENIZER) == "f"
    assert '"arguments": {"x": 1}' in plain_text(found)
    refusing = "{% if messages[1].tool_calls %}{{ raise_exception('no tools') }}{% endif %}" + ANY
    assert '<assistant>[{"function": {"name": "f"' in templated(found, refusing, TOKENIZER)


@pytest.mark.parametrize(
    ("templates", "expected"),
    [(None, None), ("one", "one"), ({"tool_use": "t", "default": "d"}, "d"), ({"rag": "r", "tool_use": "t"}, "r")],
)
def test_one_of_several_templates(templates: Any, expected: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TOKENIZER, "chat_template", templates)
    assert chat_template(TOKENIZER) == expected


def test_a_template_is_used_though_none_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TOKENIZER, "chat_template", {"rag": "no", "tool_use": "no"})
    assert templated(chat("user: hi"), ANY, TOKENIZER) == "<user>hi"
