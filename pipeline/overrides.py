"""`key=value` on the command line: dotted keys, values parsed as YAML, written over the file's."""

from collections.abc import Sequence
from typing import Any, cast

import yaml

from pipeline.yaml_text import parse_yaml, yaml_problem


def apply_overrides(tree: dict[str, Any], overrides: Sequence[str]) -> list[str]:
    """Writes each `a.b.0.c=value` into `tree`; the problems found, one line each."""
    problems: list[str] = []
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key or not all(key.split(".")):
            problems.append(f"{override}: is no override; write key=value, as in ppo.kl.coef=0.02")
            continue
        try:
            value = parse_yaml(text)
        except yaml.YAMLError as error:
            problems.append(f"{override}: the value is not YAML ({yaml_problem(error)}); quote it")
            continue
        if problem := _assign(tree, key.split("."), value):
            problems.append(f"{override}: {problem}")
    return problems


def _assign(tree: dict[str, Any], parts: Sequence[str], value: object) -> str | None:
    """Sets the value at a dotted key, making the mappings on the way; why it cannot be set, or None."""
    node: Any = tree
    for depth, part in enumerate(parts[:-1]):
        found = _child(node, part)
        if isinstance(found, str):
            return f"{'.'.join(parts[:depth]) or 'the config'} {found}"
        (node,) = found
    last = parts[-1]
    found = _child(node, last)
    if isinstance(found, str):
        return f"{'.'.join(parts[:-1])} {found}"
    node[int(last) if isinstance(node, list) else last] = value
    return None


def _child(node: Any, part: str) -> tuple[Any] | str:
    """What stands at one step of a key (a mapping is made where nothing does), or why nothing can."""
    if isinstance(node, list):
        items = cast(list[Any], node)
        if not part.isdigit() or int(part) >= len(items):
            return f"is a list of {len(items)}, without an item {part!r}; count from 0"
        return (items[int(part)],)
    if not isinstance(node, dict):
        return f"is {node!r}, which has no key {part!r}; set the whole value"
    mapping = cast(dict[str, Any], node)
    if mapping.get(part) is None:
        mapping[part] = {}
    return (mapping[part],)
