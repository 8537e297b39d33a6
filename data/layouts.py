"""The layouts that are no table of rows: message trees with ranked replies, and plain text."""

import random
import re
from collections.abc import Iterator, Mapping
from itertools import combinations
from typing import Any, Literal, TypeAlias, TypeVar, cast

from data.parse import ROLES, map_columns, parse_row, read_text
from data.rows import Demonstration, Message, Preference, Prompt, Row, RowError

RowT = TypeVar("RowT", Demonstration, Preference, Prompt)
Spoil: TypeAlias = Literal["shuffle", "cut"]
_BETWEEN_SENTENCES = re.compile(r"(?<=[.!?])\s+|(?<=[.!?][\"'”’])\s+")


def parse_text(
    kind: type[RowT],
    record: object,
    *,
    columns: Mapping[str, str],
    prompt_words: int,
    spoil: Spoil | None,
    origin: str,
) -> RowT:
    """The first `prompt_words` words of a text as a prompt; the rest, with the space before it, as the response.

    A preference pair sets the rest against the same rest spoiled.
    """
    text = record
    if isinstance(record, dict):
        fields = map_columns(cast(dict[str, Any], record), columns)
        if "text" not in fields:
            raise RowError("no column 'text'; map it with columns")
        text = fields["text"]
    if not isinstance(text, str) or not text.strip():
        raise RowError("no text" if text is None or isinstance(text, str) else "the text is not a string")
    text = cast(str, read_text(text, "text")).strip()
    words = list(re.finditer(r"\S+", text))
    end = words[min(prompt_words, len(words)) - 1].end()
    if kind is Prompt:
        return parse_row(kind, {"prompt": text[:end]}, columns={}, origin=origin)
    if end == len(text):
        raise RowError(f"{len(words)} words, so nothing is left to respond after prompt_words={prompt_words}")
    prompt, rest = text[:end], text[end:]
    if kind is Preference:
        assert spoil is not None
        return cast(RowT, Preference(prompt, rest, spoiled(rest, spoil), origin=origin))
    return parse_row(kind, {"prompt": prompt, "response": rest}, columns={}, origin=origin)


def spoiled(text: str, how: Spoil) -> str:
    """`text` made worse in one known way, seeded by the text itself.

    shuffle: the sentences after the first stand in another order, as in BART's sentence permutation (Lewis et al. 2019,
    1910.13461): same words, same length. cut: the text breaks off after a fifth to four fifths of its words, every
    other time at the end of a sentence. Raises RowError where it is too short for that.
    """
    chance = random.Random(text)
    if how == "cut":
        words = list(re.finditer(r"\S+", text))
        if len(words) < 5:
            raise RowError(f"{len(words)} words after the prompt, too few to cut; 5 are needed")
        end = words[round(len(words) * chance.uniform(0.2, 0.8)) - 1].end()
        sentence_ends = [space.start() for space in _BETWEEN_SENTENCES.finditer(text, endpos=end + 1)]
        return text[: sentence_ends[-1] if sentence_ends and chance.random() < 0.5 else end]
    sentences = _BETWEEN_SENTENCES.split(text)
    spaces = _BETWEEN_SENTENCES.findall(text)
    # The first one completes the prompt's sentence; elsewhere it would give the pair away.
    order = list(range(1, len(sentences)))
    if len({sentences[place] for place in order}) < 2:
        raise RowError(f"{len(sentences)} sentences after the prompt, too few to shuffle; 3 different ones are needed")
    while [sentences[place] for place in order] == sentences[1:]:
        chance.shuffle(order)
    return sentences[0] + "".join(space + sentences[place] for space, place in zip(spaces, order, strict=True))


def parse_tree(kind: type[RowT], record: object, origin: str) -> Iterator[RowT | RowError]:
    """The rows of one OpenAssistant message tree; a message that is malformed costs only what hangs on it.

    Preference: every pair of ranked siblings. Demonstration: the best of the ranked siblings. Prompt: the conversation
    up to each user message. Deleted messages and replies without a rank give no row.
    """
    if not isinstance(record, dict):
        yield RowError("not an object with a message tree")
        return
    fields = cast(dict[str, Any], record)
    root = fields.get("prompt", fields)
    yield from _walk(kind, root, [], origin)


def _walk(kind: type[RowT], node: object, before: list[Message], origin: str) -> Iterator[RowT | RowError]:
    try:
        message = _tree_message(node)
    except RowError as error:
        yield error
        return
    if message is None:
        return
    fields = cast(dict[str, Any], node)
    path = [*before, message]
    replies = fields.get("replies") or []
    if not isinstance(replies, list):
        yield RowError("replies is not a list")
        return
    nodes = cast(list[object], replies)
    if kind is Prompt:
        if message["role"] == "user":
            extra = {name: value for name, value in fields.items() if name not in ("text", "role", "replies")}
            yield cast(RowT, Prompt(path, extra, origin))
    else:
        yield from cast(Iterator[RowT | RowError], _ranked_rows(kind, nodes, path, origin))
    for reply in nodes:
        yield from _walk(kind, reply, path, origin)


def _ranked_rows(kind: type[Row], nodes: list[object], path: list[Message], origin: str) -> Iterator[Row | RowError]:
    replies = _ranked_replies(nodes)
    if path[-1]["role"] != "user" or not replies:
        return
    if kind is Demonstration:
        yield Demonstration(path, [replies[0][1]], origin)
        return
    for (better_rank, better), (worse_rank, worse) in combinations(replies, 2):
        if better_rank == worse_rank:
            yield RowError(f"two replies of rank {better_rank}: no preference between them")
        elif better["content"] == worse["content"]:
            yield RowError("two ranked replies are the same")
        else:
            yield Preference(path, [better], [worse], origin=origin)


def _ranked_replies(nodes: list[object]) -> list[tuple[float, Message]]:
    """Rank and message of the usable assistant replies, best (lowest rank) first."""
    replies: list[tuple[float, Message]] = []
    for node in nodes:
        try:
            message = _tree_message(node)
        except RowError:
            continue  # reported where the walk comes to this message itself
        rank = cast(dict[str, Any], node).get("rank")
        if message is not None and message["role"] == "assistant" and rank is not None:
            replies.append((rank, message))
    return sorted(replies, key=lambda reply: reply[0])


def _tree_message(node: object) -> Message | None:
    """The message of a tree's node; None where it was deleted."""
    if not isinstance(node, dict):
        raise RowError("a message of the tree is not an object")
    fields = cast(dict[str, Any], node)
    if fields.get("deleted"):
        return None
    text, role, rank = fields.get("text"), fields.get("role"), fields.get("rank")
    name = f"message {fields.get('message_id', '')}".strip()
    if not isinstance(text, str) or not text.strip():
        raise RowError(f"{name} has no text")
    if not isinstance(role, str) or role not in ROLES:
        raise RowError(f"{name} has role {role!r}")
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int | float) or rank != rank):
        raise RowError(f"{name} has rank {rank!r}, where a number is needed")
    return Message(role=ROLES[role], content=cast(str, read_text(text, name)))
