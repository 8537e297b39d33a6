"""Rows -> token ids and loss masks: the one place that touches chat templates.

Text is tokenised segment by segment (prompt, response, next turns), so the ids of a prompt are always the beginning of
the ids of prompt and response, and the same messages have the same ids in every stage.
"""

import re
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from data.encoded import (
    EncodedDemonstration,
    EncodedPreference,
    EncodedPrompt,
    FitCounts,
    Overlong,
    fit_row,
)
from data.errors import UserError
from data.rows import Demonstration, Message, Preference, Prompt, RowError, Text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EncodedT = TypeVar("EncodedT", EncodedDemonstration, EncodedPreference)

TEMPLATES = {
    # Content stands on lines of its own, so that a response is the same text with and without its header.
    "simple": (
        "{% for message in messages %}{{ message['role'] | capitalize }}:\n{{ message['content'] }}"
        "{{ eos_token if message['role'] == 'assistant' else '' }}\n\n{% endfor %}"
        "{% if add_generation_prompt %}Assistant:\n{% endif %}"
    ),
    "chatml": (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
}
_CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
_PROBE = "probe"
# Text that a segment is put behind while it is tokenised, so that it is not taken for the beginning of a text. The
# first one that does not melt into the segment is used.
_ANCHORS = ("\n", "a", ".")


def load_tokenizer(path: str, chat_template: str | None = None) -> "PreTrainedTokenizerBase":
    """The tokenizer of a model folder or hub id, with a pad token and a chat template.

    The template is `chat_template` (a file or a built-in name), else the tokenizer's own, else `simple`. Raises
    UserError where there is no tokenizer, no such template, or no EOS token to end responses with.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: no tokenizer can be loaded from it ({first_line}); check the path") from error
    if tokenizer.eos_token_id is None:
        raise UserError(f"{path}: its tokenizer has no EOS token, so responses could not end; set eos_token in it")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if chat_template is not None:
        tokenizer.chat_template = _template_text(chat_template)
    elif tokenizer.chat_template is None:
        tokenizer.chat_template = TEMPLATES["simple"]
    if tokenizer.chat_template == TEMPLATES["chatml"]:
        known = tokenizer.get_vocab()
        if missing := [token for token in _CHATML_TOKENS if token not in known]:
            raise UserError(
                f"chat_template=chatml: {path} has no token {missing[0]}; use simple or a model that has it"
            )
    return tokenizer


def _template_text(name: str) -> str:
    if name in TEMPLATES:
        return TEMPLATES[name]
    if not Path(name).is_file():
        raise UserError(f"chat_template={name}: neither a file nor one of {', '.join(TEMPLATES)}")
    return Path(name).read_text(encoding="utf-8")


def template_name(tokenizer: "PreTrainedTokenizerBase") -> str:
    """What to call the tokenizer's chat template in logs and errors."""
    built_in = [name for name, text in TEMPLATES.items() if text == tokenizer.chat_template]
    return built_in[0] if built_in else f"that of {tokenizer.name_or_path}"


class ChatEncoder:
    """Turns rows into token ids for one tokenizer, and counts what it had to cut or drop."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", *, max_length: int, overlong: Overlong = "drop") -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.overlong: Overlong = overlong
        self.counts = FitCounts()
        self.template_name = template_name(tokenizer)
        self._eos = cast(int, tokenizer.eos_token_id)
        self._bos = _wanted_bos(tokenizer)
        # The sides of a pair, and pairs that follow each other, share their prompts.
        self._cached_ids = lru_cache(maxsize=256)(self._ids)
        self._anchors = [(text, self._encode(text)) for text in _ANCHORS]
        self._decode_anchor = self._encode("a")
        self._lead, self._tail = self._probe_template()
        self.end_token_ids = self._find_end_tokens()
        ends = "|".join(re.escape(text) for text in tokenizer.convert_ids_to_tokens(list(self.end_token_ids)))
        # The first end token behind which nothing but end tokens and whitespace follows.
        self._ending = re.compile(rf"({ends})(?:{ends}|\s)*$")

    def prompt_tokens(self, prompt: Text) -> list[int]:
        """What generation is given: one BOS where the model expects one, and for messages the generation prompt."""
        tokens = self._plain_prompt(prompt) if isinstance(prompt, str) else self._conversation(prompt)[0]
        if not tokens:
            raise RowError("the prompt has no tokens")
        return tokens

    def response_tokens(self, prompt: Text, response: Text, *, finished: bool = True) -> list[int]:
        """What follows `prompt_tokens(prompt)`: the response, and its end token where it is finished."""
        if isinstance(prompt, str) and isinstance(response, str):
            tokens = self._continue(response)
            ended = bool(tokens) and tokens[-1] in self.end_token_ids
            return [*tokens, self._eos] if finished and not ended else tokens
        question = _as_turns(prompt, "user")
        tokens, _ = self._conversation([*question, *_as_turns(response, "assistant")], finished=finished)
        return tokens[len(self.prompt_tokens(question)) :]

    def demonstration(self, row: Demonstration) -> EncodedDemonstration:
        """The row's ids; the mask is True on every assistant turn of the response and on what ends it."""
        if isinstance(row.prompt, str) and isinstance(row.response, str):
            prompt, response = self.prompt_tokens(row.prompt), self.response_tokens(row.prompt, row.response)
            mask = [False] * len(prompt) + [True] * len(response)
            return EncodedDemonstration(prompt + response, mask, row.origin)
        question = _as_turns(row.prompt, "user")
        tokens, mask = self._conversation([*question, *_as_turns(row.response, "assistant")])
        num_prompt = len(self.prompt_tokens(question))
        return EncodedDemonstration(tokens, [False] * num_prompt + mask[num_prompt:], row.origin)

    def preference(self, row: Preference) -> EncodedPreference:
        """The ids of both sides behind the same prompt."""
        prompt = self.prompt_tokens(row.prompt)
        chosen, rejected = (prompt + self.response_tokens(row.prompt, side) for side in (row.chosen, row.rejected))
        if chosen == rejected:
            raise RowError("chosen and rejected have the same tokens")
        return EncodedPreference(
            chosen,
            rejected,
            prompt_length=len(prompt),
            margin=row.margin,
            weight=row.weight,
            p_chosen=row.p_chosen,
            origin=row.origin,
        )

    def prompt(self, row: Prompt, max_tokens: int) -> EncodedPrompt | None:
        """The prompt within `max_tokens`; None, and counted, where it is longer and may not be cut."""
        encoded = EncodedPrompt(self.prompt_tokens(row.prompt), row)
        fitted = fit_row(encoded, max_length=max_tokens, overlong=self.overlong, bos=self._bos)
        self._count(encoded.length > max_tokens, kept=fitted is not None)
        return fitted

    def fit(self, row: EncodedT) -> EncodedT | None:
        """The row within `max_length` by the `overlong` policy; None, and counted, where it is dropped."""
        fitted = fit_row(row, max_length=self.max_length, overlong=self.overlong, bos=self._bos)
        self._count(row.length > self.max_length, kept=fitted is not None)
        return cast(EncodedT | None, fitted)

    def decode_response(self, token_ids: list[int]) -> str:
        """The text of a response, without its end token, what follows it, and special tokens."""
        end = next((place for place, token in enumerate(token_ids) if token in self.end_token_ids), len(token_ids))
        # Behind an anchor, because decoders strip the space that begins a text.
        anchor, text = (
            cast(str, self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
            for ids in (self._decode_anchor, self._decode_anchor + token_ids[:end])
        )
        return text.removeprefix(anchor)

    def score_tokens(self, prompt: Text, response: str, *, finished: bool) -> tuple[list[int], int]:
        """The ids of a generated response behind its prompt, as a reward model reads them, and how many are the prompt.

        Nothing is cut.
        """
        if not isinstance(prompt, str):
            # What the template itself puts around a response was generated too, and would stand there twice.
            response = response.removeprefix(self._lead).removesuffix(self._split_end(self._tail)[0])
        tokens = self.prompt_tokens(prompt)
        return tokens + self.response_tokens(prompt, response, finished=finished), len(tokens)

    def _count(self, too_long: bool, *, kept: bool) -> None:
        self.counts.kept += kept
        self.counts.dropped += not kept
        self.counts.prompt_truncated += kept and too_long and self.overlong == "truncate_prompt"
        self.counts.response_truncated += kept and too_long and self.overlong == "truncate_response"

    def _plain_prompt(self, prompt: str) -> list[int]:
        return self._with_bos(self._encode(prompt))

    def _with_bos(self, tokens: list[int]) -> list[int]:
        return tokens if self._bos is None or tokens[:1] == [self._bos] else [self._bos, *tokens]

    def _encode(self, text: str) -> list[int]:
        return list(self._cached_ids(text))

    def _ids(self, text: str) -> tuple[int, ...]:
        # verbose=False: the tokenizer's own remark on lengths; ours are handled by `fit`.
        return tuple(cast(list[int], self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]))

    def _continue(self, text: str) -> list[int]:
        """The ids of text that follows other text: without the space that sentencepiece puts before a beginning."""
        for anchor, anchor_tokens in self._anchors:
            tokens = self._encode(anchor + text)
            if tokens[: len(anchor_tokens)] == anchor_tokens:
                return tokens[len(anchor_tokens) :]
        return self._encode(text)

    def _conversation(self, messages: list[Message], *, finished: bool = True) -> tuple[list[int], list[bool]]:
        """Ids of a conversation and whether an assistant wrote them; a generation prompt ends one that awaits it."""
        tokens: list[int] = []
        mask: list[bool] = []

        def add(text: str, learned: bool) -> None:
            ids = self._continue(text) if tokens else self._with_bos(self._encode(text))
            tokens.extend(ids)
            mask.extend([learned] * len(ids))

        rendered, done = "", 0
        for place, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._render_on(messages[:place], rendered, generation=True)
            rendered = self._render_on(messages[: place + 1], before, generation=False)
            words, end = self._split_end(rendered[len(before) :])
            is_last = place == len(messages) - 1
            add(before[done:], False)
            add(words + end if finished or not is_last else words, True)
            if is_last and finished and not end:
                tokens.append(self._eos)
                mask.append(True)
            done = len(before) + len(words) + len(end)
        if messages and messages[-1]["role"] != "assistant":
            add(self._render_on(messages, rendered, generation=True)[done:], False)
        return tokens, mask

    def _split_end(self, segment: str) -> tuple[str, str]:
        """A rendered response as the text up to its end token, and that token ("" where the template has none)."""
        if match := self._ending.search(segment):
            return segment[: match.start()], match[1]
        return segment.removesuffix(self._tail), ""

    def _render(self, messages: list[Message], *, generation: bool) -> str:
        from jinja2 import TemplateError

        turns = cast(list[dict[str, str]], messages)
        try:
            return cast(
                str, self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=generation)
            )
        except TemplateError as error:
            raise RowError(f"the chat template ({self.template_name}) refuses the messages: {error}") from error

    def _render_on(self, messages: list[Message], earlier: str, *, generation: bool) -> str:
        """The rendered messages, which must begin with what was rendered of them before."""
        text = self._render(messages, generation=generation)
        if not text.startswith(earlier):
            raise UserError(
                f"chat template ({self.template_name}): it renders earlier turns in another way once a turn follows "
                f"(…{earlier[-40:]!r}), so a prompt would not be the beginning of its row; set chat_template to "
                f"{' or '.join(TEMPLATES)}, or train on single-turn rows"
            )
        return text

    def _probe_template(self) -> tuple[str, str]:
        """What the template puts before and behind the content of an assistant turn."""
        question = [Message(role="user", content=_PROBE)]
        try:
            before = self._render(question, generation=True)
            answered = [*question, Message(role="assistant", content=_PROBE)]
            lead, probe, tail = self._render_on(answered, before, generation=False)[len(before) :].rpartition(_PROBE)
        except RowError as error:
            raise UserError(f"{error}; mend the template or set chat_template to another") from error
        if not probe:
            raise UserError(f"chat template ({self.template_name}): it leaves out what the assistant says; use another")
        return lead, tail

    def _find_end_tokens(self) -> tuple[int, ...]:
        """EOS, and the special token that the template ends a response with where that is another."""
        special = {token for token, added in self.tokenizer.added_tokens_decoder.items() if added.special}
        special.update(self.tokenizer.all_special_ids)
        of_turn = [token for token in self._encode(self._tail) if token in special][:1]
        return tuple(dict.fromkeys([self._eos, *of_turn]))


def _wanted_bos(tokenizer: "PreTrainedTokenizerBase") -> int | None:
    """The BOS id that every sequence begins with; None where the model was trained without one."""
    bos = cast(int | None, tokenizer.bos_token_id)
    adds_itself = cast(list[int], tokenizer("")["input_ids"])[:1] == [bos]
    return bos if bos is not None and (bos != tokenizer.eos_token_id or adds_itself) else None


def _as_turns(text: Text, role: str) -> list[Message]:
    return [Message(role=role, content=text)] if isinstance(text, str) else text
