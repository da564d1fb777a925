"""Rows of calibration data as text: columns that data sets for language models use, and chat templates."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from vllm_spense.errors import SpenseError

#: `role`, `content` (a string), and what else of it a chat template may use.
Message = dict[str, Any]

_CHATS = ("messages", "conversations")
#: Column with a question → column with its answer, unless one of the others has it.
_ANSWERS = {"question": "answer", "prompt": "completion", "instruction": "output", "problem": "solution"}
_OTHER_ANSWERS = ("answer", "response", "output", "completion", "solution")
#: What a question is about; Alpaca and Dolly keep it in a column of its own.
_INPUTS = ("input", "context")
_SYSTEMS = ("system", "system_prompt")
#: Names of ShareGPT and its like → those that chat templates know.
_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "function": "tool",
    "function_response": "tool",
    "observation": "tool",
}
_KNOWN = ("system", "developer", "user", "assistant", "tool")
_FOR_TEMPLATES = ("name", "tool_calls", "tool_call_id", "reasoning_content")
_BETWEEN = "\n\n"
#: By raise_exception, an undefined name, or an operation on a value of another type, or one that it has no result for.
_RAISED_IN_TEMPLATES = (
    *(TemplateError, TypeError, ValueError, ArithmeticError),
    *(LookupError, AttributeError, RecursionError),
)


@dataclass(frozen=True)
class Chat:
    """Messages, and where they stand, for error messages."""

    messages: tuple[Message, ...]
    where: str


class RefusedChat(Exception):
    """A chat that a template has no form for."""


def read_row(row: Any, where: str) -> str | Chat:
    """A row as plain text or as a chat.

    Args:
        row: a string; or columns: `messages` or `conversations`, `text`, or a question and an answer.
        where: it stands.

    Raises:
        SpenseError: it is something else.
    """
    if isinstance(row, str):
        return row
    if isinstance(row, dict):
        for key in _CHATS:
            if isinstance(row.get(key), list):
                return Chat((*_system(row), *(_message(message, where) for message in row[key])), where)
        if isinstance(row.get("text"), str):
            return row["text"]
        messages = _question_and_answer(row, where)
        if messages:
            return Chat((*_system(row), *messages), where)
    found = ", ".join(map(str, row)) if isinstance(row, dict) else type(row).__name__
    raise SpenseError(f"{where}: found {found}; expected a column text, messages, or question and answer")


def _system(row: dict[str, Any]) -> Iterator[Message]:
    found = _first_of(row, _SYSTEMS)
    if isinstance(found, str):
        yield {"role": "system", "content": found}


def _question_and_answer(row: dict[str, Any], where: str) -> list[Message]:
    """The messages of such a row; empty if it is none."""
    asked = next((key for key in _ANSWERS if row.get(key)), None)
    if asked is None:
        return []
    question = row[asked]
    answer = _first_of(row, ("deepseek_attempt", _ANSWERS[asked], *_OTHER_ANSWERS))
    if isinstance(question, list) and isinstance(answer, list):
        return [_message(message, where) for message in question + answer]
    if not isinstance(question, str) or not isinstance(answer, str):
        return []
    about = _first_of(row, _INPUTS)
    if isinstance(about, str):
        question += _BETWEEN + about
    thinking = row.get("deepseek_thinking_trajectory")
    if thinking:
        answer = f"<think>\n{thinking}\n</think>\n\n{answer}"
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _first_of(row: dict[str, Any], keys: tuple[str, ...]) -> Any:
    """The first of these columns that has something in it."""
    return next((row[key] for key in keys if row.get(key)), None)


def _message(message: Any, where: str) -> Message:
    if isinstance(message, dict):
        role = message.get("role") or message.get("from")
        found = message.get("content") if message.get("content") is not None else message.get("value")
        content = _content(found, where)
        named = "content" in message or "value" in message or message.get("tool_calls")
        if isinstance(role, str) and content is not None and named:
            role = _ROLES.get(role.lower(), role.lower())
            if role not in _KNOWN and "role" not in message:
                raise SpenseError(f"{where}: found a message from {role}, expected {', '.join((*_ROLES, *_KNOWN))}")
            kept = {key: message[key] for key in _FOR_TEMPLATES if message.get(key)}
            return {**kept, "role": role, "content": content}
    raise SpenseError(f"{where}: found the message {str(message)[:80]}; expected one with role and content")


def _content(content: Any, where: str) -> str | None:
    """As one string; None if it is nothing of the kind."""
    if content is None:  # As beside calls of tools.
        return ""
    if not isinstance(content, list):
        return content if isinstance(content, str) else None
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, dict) else part
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise SpenseError(f"{where}: found a content part of type {kind}, expected text")
        texts.append(text)
    return "".join(texts)


def plain_text(chat: Chat) -> str:
    """The messages one after another, for a tokenizer without a chat template."""
    return _BETWEEN.join(filter(None, map(_words, chat.messages)))


def templated(chat: Chat, template: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """A chat in the form that a template gives it.

    Templates that refuse it get its turns merged until user and assistant alternate, then also without a system role.

    Raises:
        RefusedChat: the template refuses these too; says where and why.
    """
    reason: Exception | None = None
    for messages in (list(chat.messages), _alternating(chat.messages), _alternating(_without_system(chat.messages))):
        try:
            return str(tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False))
        except _RAISED_IN_TEMPLATES as error:
            reason = reason or error
    raise RefusedChat(f"{chat.where}: {reason}")


def chat_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The tokenizer's template; of several the default, else the first."""
    template = tokenizer.chat_template
    if isinstance(template, dict):
        return template.get("default") or next(iter(template.values()), None)
    return template


def _words(message: Message) -> str:
    """What a message says, its calls of tools as JSON."""
    calls = message.get("tool_calls")
    return _BETWEEN.join(filter(None, (message["content"], json.dumps(calls, default=str) if calls else "")))


def _alternating(messages: tuple[Message, ...]) -> list[Message]:
    """Neighbours of one role as one message; what is neither system nor assistant is the user's."""
    merged: list[Message] = []
    for message in messages:
        role = message["role"] if message["role"] in ("system", "assistant") else "user"
        if merged and merged[-1]["role"] == role:
            merged[-1]["content"] = _BETWEEN.join(filter(None, (merged[-1]["content"], _words(message))))
        else:
            merged.append({"role": role, "content": _words(message)})
    return merged


def _without_system(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """System text as words of the user, which stand before those that follow."""
    return tuple({**m, "role": "user"} if m["role"] in ("system", "developer") else m for m in messages)
