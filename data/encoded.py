"""Rows as token ids, and what happens to those that are too long."""

from dataclasses import dataclass, replace
from typing import Literal, TypeAlias, overload

from data.rows import Prompt

Overlong: TypeAlias = Literal["drop", "truncate_prompt", "truncate_response"]


@dataclass(frozen=True)
class EncodedDemonstration:
    """Token ids of prompt and response; `loss_mask` is True on the tokens to learn, end of turn included."""

    tokens: list[int]
    loss_mask: list[bool]
    origin: str = ""

    @property
    def length(self) -> int:
        """Tokens of prompt and response."""
        return len(self.tokens)

    @property
    def prompt_length(self) -> int:
        """Tokens before the first one to learn."""
        return self.loss_mask.index(True)


@dataclass(frozen=True)
class EncodedPreference:
    """Token ids of both sides; the first `prompt_length` are the prompt, the same on both."""

    chosen: list[int]
    rejected: list[int]
    prompt_length: int
    margin: float = 0.0
    weight: float = 1.0
    p_chosen: float = 1.0
    origin: str = ""

    @property
    def length(self) -> int:
        """Tokens of the longer side."""
        return max(len(self.chosen), len(self.rejected))


@dataclass(frozen=True)
class EncodedPrompt:
    """Token ids that generation starts from, and the row they stand for."""

    tokens: list[int]
    row: Prompt

    @property
    def origin(self) -> str:
        """file:line of the row."""
        return self.row.origin

    @property
    def length(self) -> int:
        """Tokens of the prompt."""
        return len(self.tokens)


@dataclass
class FitCounts:
    """What became of the rows that were fitted; truncated rows are among the kept ones."""

    kept: int = 0
    dropped: int = 0
    prompt_truncated: int = 0
    response_truncated: int = 0


@overload
def fit_row(
    row: EncodedDemonstration, *, max_length: int, overlong: Overlong, bos: int | None
) -> EncodedDemonstration | None: ...
@overload
def fit_row(
    row: EncodedPreference, *, max_length: int, overlong: Overlong, bos: int | None
) -> EncodedPreference | None: ...
@overload
def fit_row(row: EncodedPrompt, *, max_length: int, overlong: Overlong, bos: int | None) -> EncodedPrompt | None: ...
def fit_row(
    row: EncodedDemonstration | EncodedPreference | EncodedPrompt,
    *,
    max_length: int,
    overlong: Overlong,
    bos: int | None,
) -> EncodedDemonstration | EncodedPreference | EncodedPrompt | None:
    """The row within `max_length` tokens, or None where the policy drops it or leaves nothing to learn.

    truncate_prompt cuts the prompt's left behind its BOS and keeps at least one token of it; both sides of a
    preference lose the same tokens. truncate_response cuts the right, so a cut response has no end token.
    """
    if row.length <= max_length:
        return row
    if overlong == "truncate_prompt":
        return _without_left(row, row.length - max_length, bos)
    if overlong == "truncate_response":
        return _without_right(row, max_length)
    return None


def _without_left(
    row: EncodedDemonstration | EncodedPreference | EncodedPrompt, excess: int, bos: int | None
) -> EncodedDemonstration | EncodedPreference | EncodedPrompt | None:
    prompt_length = row.length if isinstance(row, EncodedPrompt) else row.prompt_length
    first = (row.chosen if isinstance(row, EncodedPreference) else row.tokens)[0]
    start = 1 if first == bos else 0
    if excess >= prompt_length - start:
        return None
    end = start + excess
    if isinstance(row, EncodedPreference):
        chosen, rejected = (side[:start] + side[end:] for side in (row.chosen, row.rejected))
        return replace(row, chosen=chosen, rejected=rejected, prompt_length=prompt_length - excess)
    tokens = row.tokens[:start] + row.tokens[end:]
    if isinstance(row, EncodedPrompt):
        return replace(row, tokens=tokens)
    return replace(row, tokens=tokens, loss_mask=row.loss_mask[:start] + row.loss_mask[end:])


def _without_right(
    row: EncodedDemonstration | EncodedPreference | EncodedPrompt, max_length: int
) -> EncodedDemonstration | EncodedPreference | None:
    if isinstance(row, EncodedPrompt):
        return None  # a prompt has no response to cut
    if row.prompt_length >= max_length:
        return None
    if isinstance(row, EncodedDemonstration):
        return replace(row, tokens=row.tokens[:max_length], loss_mask=row.loss_mask[:max_length])
    chosen, rejected = row.chosen[:max_length], row.rejected[:max_length]
    return None if chosen == rejected else replace(row, chosen=chosen, rejected=rejected)
