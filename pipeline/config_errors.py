"""Config errors in words: one line each, `<key>=<value found>: <what is wrong>; <what to do>`."""

import difflib
import json
import re
import types
import typing
from collections.abc import Iterable, Sequence
from typing import Any, cast

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

MISSING = object()
_WRONG_SHAPE = {
    "model_type": "a mapping",
    "dict_type": "a mapping",
    "list_type": "a list",
    "string_type": "a string",
    "float_type": "a number",
    "float_parsing": "a number",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
}


def problem_lines(error: ValidationError, raw: object, model: type[BaseModel]) -> list[str]:
    """One line per problem, in the order of the keys; alternatives of a union are told as one."""
    by_key: dict[str, list[ErrorDetails]] = {}
    for details in _pertinent(error.errors(include_url=False), raw):
        by_key.setdefault(".".join(map(str, _clean(details, raw))), []).append(details)
    lines: list[str] = []
    for key, group in by_key.items():
        message = _message(group, raw, model)
        if group[0]["type"] == "value_error" and re.match(r"[a-z_]+=", message):
            lines.append(f"{key}.{message}" if key else message)  # a check across fields names the field itself
            continue
        found = "" if group[0]["type"] == "missing" else f"={show(_value(raw, _clean(group[0], raw)))}"
        lines.append(f"{key or 'config'}{found}: {message}")
    return [one_line(line) for line in lines]


def one_line(text: str) -> str:
    """`text` with line ends and control characters escaped: a key may hold any of them."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


def show(value: object) -> str:
    """A value as short JSON, as it might stand in the file."""
    text = value if isinstance(value, str) and value else json.dumps(value, default=str, ensure_ascii=False)
    text = " ".join(text.split())
    return text if len(text) <= 60 else text[:57] + "…"


def _pertinent(errors: Sequence[ErrorDetails], raw: object) -> list[ErrorDetails]:
    """The errors without those of union members that the value was plainly not meant for.

    A union reports every member's errors. A member that rejects the value's very shape says nothing about it when
    another member got further.
    """
    unions: dict[tuple[int | str, ...], dict[int | str, list[ErrorDetails]]] = {}
    plain: list[ErrorDetails] = []
    for details in errors:
        if details["type"] == "finite_number":  # `validate` names these itself, also where a float may be infinite
            continue
        location = details["loc"]
        split = _union_at(location[:-1] if details["type"] == "missing" else location, raw)
        if split is None:
            plain.append(details)
        else:
            unions.setdefault(details["loc"][:split], {}).setdefault(details["loc"][split], []).append(details)
    kept: list[ErrorDetails] = []
    for location, members in unions.items():
        fitting = [
            group
            for group in members.values()
            if not any(e["type"] in _WRONG_SHAPE and len(e["loc"]) == len(location) + 1 for e in group)
        ]
        for group in fitting or members.values():
            kept.extend(group)
    order = {id(details): place for place, details in enumerate(errors)}
    return sorted([*plain, *kept], key=lambda details: order[id(details)])


def _union_at(location: Sequence[int | str], raw: object) -> int | None:
    """Where the location first names a member of a union, which is no key of the config; None where it does not."""
    value = raw
    for place, part in enumerate(location):
        inner = _step(value, part)
        if inner is MISSING:
            return place
        value = inner
    return None


def _clean(details: ErrorDetails, raw: object) -> list[int | str]:
    """The parts of an error's location that are keys of the config: without the names of union members."""
    parts: list[int | str] = []
    value = raw
    for part in details["loc"]:
        inner = _step(value, part)
        if inner is not MISSING:
            value = inner
            parts.append(part)
    return [*parts, details["loc"][-1]] if details["type"] == "missing" else parts


def _step(value: object, part: int | str) -> object:
    if isinstance(value, dict):
        return cast(dict[Any, object], value).get(part, MISSING)
    if isinstance(value, list) and isinstance(part, int):
        items = cast(list[object], value)
        return items[part] if part < len(items) else MISSING
    return MISSING


def _value(raw: object, location: Iterable[int | str]) -> object:
    for part in location:
        raw = _step(raw, part)
    return raw


def _message(group: Sequence[ErrorDetails], raw: object, model: type[BaseModel]) -> str:
    first = group[0]
    if first["type"] == "extra_forbidden":
        return _unknown_key(_clean(first, raw), model)
    if first["type"] == "missing":
        return "is missing; add it"
    if all(details["type"] in _WRONG_SHAPE for details in group):
        shapes = dict.fromkeys(_WRONG_SHAPE[details["type"]] for details in group)
        return f"is not {' or '.join(shapes)}; write {' or '.join(shapes)}"
    return " / ".join(dict.fromkeys(_one_message(details) for details in group))


def _one_message(details: ErrorDetails) -> str:
    context = details.get("ctx", {})
    bounds = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}
    for bound, words in bounds.items():
        if bound in context:
            return f"is out of range; use a number {words} {context[bound]}"
    match details["type"]:
        case "literal_error":
            return f"is none of the choices; use {context['expected'].replace(chr(39), '')}"
        case "value_error":
            return str(context["error"])
        case "too_short":
            return f"is too short; give at least {context['min_length']}"
        case "string_pattern_mismatch":
            return f"does not match {context['pattern']}; use letters, digits, '.', '_' and '-', 64 at most"
        case kind if kind in _WRONG_SHAPE:
            return f"is not {_WRONG_SHAPE[kind]}; write {_WRONG_SHAPE[kind]}"
        case _:
            return details["msg"]


def _unknown_key(location: Sequence[int | str], model: type[BaseModel]) -> str:
    """What to do about a key that the schema does not know: the nearest known one, else all that stand there."""
    here = _models_at(model, location[:-1])
    known = sorted({name for found in here for name in found.model_fields})
    nested = [
        f"{name}.{inner}"
        for found in here
        for name, field in found.model_fields.items()
        for part in _models_in(field.annotation)
        for inner in part.model_fields
    ]
    prefix = "".join(f"{part}." for part in location[:-1])
    wanted = str(location[-1])
    near = [name for name in known if _initials(name) == wanted]
    near += difflib.get_close_matches(wanted, [*known, *nested], n=1, cutoff=0.6)
    near += [name for name in nested if name.split(".")[-1] == wanted]
    if near:
        return f"unknown key; did you mean {prefix}{near[0]}?"
    nearest = difflib.get_close_matches(wanted, known, n=1, cutoff=0)
    return f"unknown key; the nearest is {prefix}{nearest[0]}; all: {', '.join(known)}" if known else "unknown key"


def _initials(name: str) -> str:
    """`lr` of `learning_rate`."""
    return "".join(word[0] for word in name.split("_"))


def _models_at(model: type[BaseModel], location: Sequence[int | str]) -> list[type[BaseModel]]:
    """The models that may stand at a location of the config."""
    models = [model]
    for part in location:
        if isinstance(part, int):
            continue
        fields = [found.model_fields[part] for found in models if part in found.model_fields]
        models = [inner for field in fields for inner in _models_in(field.annotation)] or (models if not fields else [])
    return models


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    """The models named in a type: inside Optional, unions, lists, dicts and Annotated."""
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return [annotation] if issubclass(annotation, BaseModel) else []
    return [model for part in typing.get_args(annotation) for model in _models_in(part)]
