"""One record -> one row: columns, conversations, implicit prompts. Everything that is wrong raises RowError."""

import math
import os
import re
from collections.abc import Mapping
from typing import Any, TypeVar, cast

from data.rows import Demonstration, Message, Preference, Prompt, RowError, Text

RowT = TypeVar("RowT", Demonstration, Preference, Prompt)

ROLES = {
    "system": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "human": "user",
    "gpt": "assistant",
    "prompter": "user",
}
CONVERSATION_COLUMNS = ("messages", "conversations")
PLAIN_TURN = "\n\nAssistant:"
_FIELD = re.compile(r"\{\{|\}\}|\{([^{}]+)\}")


def map_columns(record: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """The record under our names: columns mapped by name lose their own, format strings leave theirs."""
    renamed = {source for source in columns.values() if "{" not in source}
    mapped = {name: value for name, value in record.items() if name not in renamed}
    for name, source in columns.items():
        mapped[name] = _fill(source, record) if "{" in source else _column(record, source)
    return mapped


def _column(record: Mapping[str, Any], name: str) -> Any:
    if name not in record:
        raise RowError(f"no column {name!r}; the row has {_names(record)}")
    return record[name]


def _names(record: Mapping[str, Any]) -> str:
    return ", ".join(sorted(map(str, record))) or "no columns"


def _fill(template: str, record: Mapping[str, Any]) -> str:
    """`template` with each {column} replaced; trailing whitespace goes where a column was empty."""
    any_empty = False

    def value_of(match: re.Match[str]) -> str:
        nonlocal any_empty
        if match[1] is None:
            return match[0][0]
        value = _column(record, match[1])
        if value is not None and not isinstance(value, str | int | float):
            raise RowError(f"column {match[1]!r} is a {type(value).__name__}, which cannot stand in {template!r}")
        text = "" if value is None else str(value)
        any_empty = any_empty or not text.strip()
        return text

    filled = _FIELD.sub(value_of, template)
    return filled.rstrip() if any_empty else filled


def parse_row(kind: type[RowT], record: object, *, columns: Mapping[str, str], origin: str) -> RowT:
    """The row that a record holds."""
    if isinstance(record, str):
        raise RowError("a string, where an object with columns is needed; set layout: text for plain text")
    if not isinstance(record, dict):
        raise RowError(f"a {_json_name(record)}, where an object with columns is needed")
    mapped = map_columns(cast(dict[str, Any], record), columns)
    if kind is Demonstration:
        return cast(RowT, _demonstration(mapped, origin))
    if kind is Preference:
        return cast(RowT, _preference(mapped, origin))
    return cast(RowT, _prompt(mapped, origin))


def _json_name(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, list | dict):
        return "list" if isinstance(value, list) else "object"
    return "string" if isinstance(value, str) else "number"


def _demonstration(record: Mapping[str, Any], origin: str) -> Demonstration:
    answer = next((name for name in ("response", "completion") if name in record), None)
    if answer is None:
        if (column := _conversation_column(record)) is None:
            raise RowError(f"no response, completion or messages; the row has {_names(record)}; map them with columns")
        return conversation_demonstration(read_text(record[column], column), origin)
    prompt = read_text(_column(record, "prompt"), "prompt")
    response = read_text(record[answer], answer)
    if isinstance(prompt, str) and isinstance(response, str):
        _need_words(prompt, "prompt")
        _need_words(response, answer)
        return Demonstration(prompt, response, origin)
    turns = _as_turns(response, "assistant")
    if turns and turns[0]["role"] != "assistant":
        return conversation_demonstration(turns, origin)  # a whole transcript beside its first prompt
    question = _as_turns(prompt, "user")
    _need_question(question)
    # Assistant turns of the prompt are context, as in TRL: only the response is learned.
    return Demonstration(question, conversation_demonstration([*question[-1:], *turns], origin).response, origin)


def conversation_demonstration(turns: Text, origin: str) -> Demonstration:
    """The demonstration that a conversation holds: all turns from the first assistant turn to the last."""
    if isinstance(turns, str):
        raise RowError("messages is a string, where a list of turns is needed")
    places = [place for place, turn in enumerate(turns) if turn["role"] == "assistant"]
    if not places:
        raise RowError("no assistant turn to learn from")
    for turn in turns:
        _need_words(turn["content"], f"{turn['role']} turn")
    prompt, response = turns[: places[0]], turns[places[0] : places[-1] + 1]
    _need_question(prompt)
    return Demonstration(prompt, response, origin)


def _preference(record: Mapping[str, Any], origin: str) -> Preference:
    chosen = read_text(_column(record, "chosen"), "chosen")
    rejected = read_text(_column(record, "rejected"), "rejected")
    prompt, chosen, rejected = _split_pair(_given_prompt(record), chosen, rejected)
    for name, side in (("chosen", chosen), ("rejected", rejected)):
        if not plain_text(side):
            raise RowError(f"{name} is empty")
    if not (plain_text(chosen).strip() or plain_text(rejected).strip()):
        raise RowError("chosen and rejected are both blank")
    if chosen == rejected:
        raise RowError("chosen and rejected are the same")
    margin, weight, p_chosen = (
        _number(record, name, default) for name, default in (("margin", 0.0), ("weight", 1.0), ("p_chosen", 1.0))
    )
    if not 0 < p_chosen <= 1:
        raise RowError(f"p_chosen={p_chosen} is outside (0, 1]")
    if weight < 0:
        raise RowError(f"weight={weight} is negative")
    return Preference(prompt, chosen, rejected, margin, weight, p_chosen, origin)


def _prompt(record: Mapping[str, Any], origin: str) -> Prompt:
    extra = dict(record)
    prompt = _given_prompt(record)
    if prompt is not None:
        for name in ("prompt",) if "prompt" in record else CONVERSATION_COLUMNS:
            extra.pop(name, None)
    elif "chosen" in record and "rejected" in record:
        sides = [read_text(record[name], name) for name in ("chosen", "rejected")]
        prompt, _, _ = _split_pair(None, sides[0], sides[1])
    else:
        raise RowError(f"no prompt or messages; the row has {_names(record)}; map it with columns")
    if isinstance(prompt, str):
        _need_words(prompt, "prompt")
        return Prompt(prompt, extra, origin)
    if prompt and prompt[-1]["role"] == "assistant":
        prompt = prompt[:-1]
    _need_question(prompt)
    return Prompt(prompt, extra, origin)


def _given_prompt(record: Mapping[str, Any]) -> Text | None:
    name = "prompt" if "prompt" in record else _conversation_column(record)
    return None if name is None else read_text(record[name], name)


def _conversation_column(record: Mapping[str, Any]) -> str | None:
    return next((name for name in CONVERSATION_COLUMNS if name in record), None)


def _split_pair(prompt: Text | None, chosen: Text, rejected: Text) -> tuple[Text, Text, Text]:
    """Prompt, chosen and rejected, all plain or all conversations; whole transcripts are split where they part."""
    if isinstance(chosen, str) and isinstance(rejected, str):
        if prompt is None:
            return _split_plain_transcripts(chosen, rejected)
        if isinstance(prompt, str):
            _need_words(prompt, "prompt")
            return prompt, chosen, rejected
    first, second = _as_turns(chosen, "assistant"), _as_turns(rejected, "assistant")
    if not first or not second:
        raise RowError("chosen or rejected has no turns")
    if first[0]["role"] != "assistant" or second[0]["role"] != "assistant":
        prompt, first, second = _split_conversations(first, second)
    if prompt is None:
        raise RowError("no prompt, and chosen and rejected hold only responses")
    turns = _as_turns(prompt, "user")
    _need_question(turns)
    if any(side[0]["role"] != "assistant" or side[-1]["role"] != "assistant" for side in (first, second)):
        raise RowError("chosen and rejected must begin and end with an assistant turn where they part")
    return turns, cast(Text, first), cast(Text, second)


def _split_conversations(
    chosen: list[Message], rejected: list[Message]
) -> tuple[list[Message], list[Message], list[Message]]:
    common = 0
    while common < min(len(chosen), len(rejected)) and chosen[common] == rejected[common]:
        common += 1
    if common == len(chosen) == len(rejected):
        raise RowError("chosen and rejected are the same")
    if common in (0, len(chosen), len(rejected)):
        raise RowError("chosen and rejected share no opening turns, or one is the beginning of the other")
    return chosen[:common], chosen[common:], rejected[common:]


def _split_plain_transcripts(chosen: str, rejected: str) -> tuple[str, str, str]:
    """Two transcripts as in hh-rlhf, split behind the last assistant mark that they share."""
    # Character by character is what is wanted here.
    end = os.path.commonprefix([chosen, rejected]).rfind(PLAIN_TURN)  # noqa: RUF071
    if chosen == rejected:
        raise RowError("chosen and rejected are the same")
    if end < 0:
        raise RowError(f"no prompt column, and no {PLAIN_TURN!r} that chosen and rejected share")
    end += len(PLAIN_TURN)
    return chosen[:end], chosen[end:], rejected[end:]


def read_text(value: object, name: str) -> Text:
    """A string, or the turns of a conversation in our form; blank system turns are left out."""
    if isinstance(value, str):
        _need_unicode(value, name)
        return value
    if isinstance(value, dict):
        value = [cast(object, value)]
    if not isinstance(value, list):
        raise RowError(f"{name} is a {_json_name(value)}, where text or a list of turns is needed")
    turns = [_message(turn, name) for turn in cast(list[object], value)]
    return [turn for turn in turns if turn["role"] != "system" or turn["content"].strip()]


def _message(turn: object, name: str) -> Message:
    if not isinstance(turn, dict):
        raise RowError(f"{name} holds a turn that is no object with role and content")
    fields = cast(dict[str, Any], turn)
    role, content = fields.get("role", fields.get("from")), fields.get("content", fields.get("value"))
    if not isinstance(role, str) or role not in ROLES:
        raise RowError(f"{name} holds a turn with role {role!r}; known roles are {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise RowError(f"{name} holds a turn whose content is not text")
    _need_unicode(content, name)
    return Message(role=ROLES[role], content=content)


def plain_text(text: Text) -> str:
    """The words of a text without its roles."""
    return text if isinstance(text, str) else "".join(turn["content"] for turn in text)


def _as_turns(text: Text, role: str) -> list[Message]:
    return [Message(role=role, content=text)] if isinstance(text, str) else text


def _need_words(text: str, name: str) -> None:
    if not text.strip():
        raise RowError(f"{name} is empty")


def _need_question(turns: list[Message]) -> None:
    if not turns or turns[-1]["role"] not in ("user", "tool"):
        raise RowError("the prompt does not end with a user turn")
    for turn in turns:
        _need_words(turn["content"], f"{turn['role']} turn of the prompt")


def _need_unicode(text: str, name: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowError(f"{name} is not valid Unicode (character {error.start + 1})") from error


def _number(record: Mapping[str, Any], name: str, default: float) -> float:
    """A finite number; also from text, because CSV has nothing else."""
    value = record.get(name)
    if value is None or value == "":
        return default
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise RowError(f"{name} is a {_json_name(value)}, where a number is needed")
    try:
        number = float(value)
    except (ValueError, OverflowError) as error:
        raise RowError(f"{name}={value!r:.40} is not a number") from error
    if not math.isfinite(number):
        raise RowError(f"{name}={number} is not finite")
    return number
