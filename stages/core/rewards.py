"""Scores of responses: from a reward model, a Python function, a judge (`judge/scoring.py`), or a weighted sum.

Every source is given text, never token ids, so a reward model may have its own tokenizer and chat template.

Legend: B sequences, N packed tokens, D hidden size.
"""

import importlib
import importlib.util
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from data.chat import ChatEncoder
from data.encoded import EncodedPreference
from data.errors import UserError
from data.rows import Text
from stages.core import ranks
from stages.core.portions import number_prompts, share_rows, split_rows
from stages.core.sequences import PackedBatch
from stages.core.trunk import Trunk


@dataclass(frozen=True)
class Answered:
    """Responses to score: B prompts, their decoded responses, whether each ended by itself, and the rows' columns."""

    prompts: Sequence[Text]
    responses: Sequence[str]
    finished: Sequence[bool]
    rows: Sequence[Mapping[str, Any]]


class Scorer(Protocol):
    """A source of scores."""

    def score(self, answered: Answered) -> list[float]:
        """One finite number a response; higher is better. NaN where a judge gave none: that response does not count."""
        ...


@dataclass(frozen=True)
class RewardModel:
    """A reward model: a trunk, the adapter it runs under, its head, how it reads text, and where it came from."""

    trunk: Trunk
    adapter: str | None
    head: nn.Linear
    encoder: ChatEncoder
    source: str
    batch_tokens: int = 16384

    def score(self, answered: Answered) -> list[float]:
        """The head's output at the last token of each prompt with its response, in float32."""
        texts = zip(answered.prompts, answered.responses, answered.finished, strict=True)
        return self.score_sequences(
            [self.encoder.score_tokens(prompt, response, finished=finished) for prompt, response, finished in texts]
        )

    def score_pairs(self, pairs: Sequence[EncodedPreference]) -> list[tuple[float, float]]:
        """The scores of both sides of each pair, chosen and rejected."""
        scores = self.score_sequences(
            [(side, pair.prompt_length) for pair in pairs for side in (pair.chosen, pair.rejected)]
        )
        return list(zip(scores[::2], scores[1::2], strict=True))

    @torch.no_grad()
    def score_sequences(self, sequences: Sequence[tuple[list[int], int]]) -> list[float]:
        """The head's output at the last token of each sequence, in float32; each rank reads its part.

        A sequence is token ids and how many of them are its prompt, which is read once for all that begin with it in
        the same pass: let them stand beside each other.
        """
        limit = getattr(self.trunk.model.config, "max_position_embeddings", None)
        sequences = [_within(tokens, prompt, limit or len(tokens)) for tokens, prompt in sequences]
        all_rows = number_prompts((tokens[:prompt], len(tokens) - prompt) for tokens, prompt in sequences)
        own = share_rows(all_rows)
        scores: list[tuple[int, float]] = []
        for group in split_rows([all_rows[place] for place in own], self.batch_tokens):
            rows = [own[place] for place in group]
            tokens, prompts = zip(*(sequences[row] for row in rows), strict=True)
            packed = PackedBatch.of(tokens, self.trunk.device, prompts=prompts)
            hidden_BD = self.trunk.hidden_at(packed, self.adapter, packed.last_B)
            scores_B = self.head(hidden_BD.to(self.head.weight.dtype))[:, 0].float().cpu()
            scores += zip(rows, scores_B.tolist(), strict=True)
        return [score for _, score in sorted(ranks.gather_lists(scores))]


def _within(tokens: list[int], prompt: int, limit: int) -> tuple[list[int], int]:
    """The last `limit` of the tokens, and how many of them are the prompt.

    A model cannot read beyond its positions; the end of the response is what it judges.
    """
    cut = max(0, len(tokens) - limit)
    return tokens[cut:], max(0, prompt - cut)


@dataclass(frozen=True)
class FunctionScorer:
    """A user's Python function `name(prompts, responses, rows) -> list[float]`; chat prompts reach it as messages."""

    name: str
    function: Callable[[Sequence[Text], Sequence[str], Sequence[Mapping[str, Any]]], Sequence[float]]

    def score(self, answered: Answered) -> list[float]:
        """What the function returned, checked; rank 0 alone calls it, with all responses.

        Raises UserError where it is not one finite number a response.
        """
        return ranks.alone(lambda: self._score(answered))

    def _score(self, answered: Answered) -> list[float]:
        returned: Any = self.function(list(answered.prompts), list(answered.responses), list(answered.rows))
        if not isinstance(returned, Iterable):
            raise UserError(f"reward function {self.name}: returned {returned!r}; return one number a response")
        scores: list[Any] = returned.tolist() if isinstance(returned, Tensor) else list(returned)
        if len(scores) != len(answered.responses):
            raise UserError(
                f"reward function {self.name}: {len(scores)} scores for {len(answered.responses)} responses; "
                "return one number a response"
            )
        for score in scores:
            if isinstance(score, bool) or not isinstance(score, Real) or not math.isfinite(score):
                raise UserError(f"reward function {self.name}: returned {score!r}; return finite numbers")
        return [float(score) for score in scores]


@dataclass(frozen=True)
class WeightedSum:
    """The weighted sum of several sources."""

    scorers: Sequence[Scorer]
    weights: Sequence[float]

    def score(self, answered: Answered) -> list[float]:
        """Sum of weight x score, source by source."""
        totals = [0.0] * len(answered.responses)
        for scorer, weight in zip(self.scorers, self.weights, strict=True):
            totals = [total + weight * score for total, score in zip(totals, scorer.score(answered), strict=True)]
        return totals


def load_function(name: str) -> FunctionScorer:
    """The scorer behind `path.py:function` or `package.module:function`.

    Raises UserError where there is no such file, module or function.
    """
    source, _, attribute = name.rpartition(":")
    if not source:
        raise UserError(f"reward function {name}: names no function; give path.py:function")
    if source.endswith(".py"):
        path = Path(source)
        spec = importlib.util.spec_from_file_location(f"reward_function_{path.stem}", path)
        if not path.is_file() or spec is None or spec.loader is None:
            raise UserError(f"reward function {name}: no file {path}; give path.py:function")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses and pickle look a module up by its name
        try:
            spec.loader.exec_module(module)
        except (ImportError, SyntaxError) as error:
            raise UserError(f"reward function {name}: cannot be imported ({error}); mend {path}") from error
    else:
        try:
            module = importlib.import_module(source)
        except (ImportError, ValueError) as error:
            raise UserError(f"reward function {name}: cannot be imported ({error}); give path.py:function") from error
    function = getattr(module, attribute, None)
    if not callable(function):
        raise UserError(f"reward function {name}: no function {attribute!r} in {source}; name one that is there")
    return FunctionScorer(name, function)


def score_head(weights: Mapping[str, Tensor], device: torch.device) -> nn.Linear:
    """The one-number head among saved weights, in float32.

    Raises UserError where there is none, or one with another number of outputs.
    """
    found = {key.rsplit(".", 1)[-1]: value for key, value in weights.items() if "score." in key}
    if "weight" not in found or found["weight"].shape[0] != 1:
        raise UserError("reward model: no score head with one output among its weights; train it with the rm stage")
    head = nn.Linear(found["weight"].shape[1], 1, bias="bias" in found)
    head.load_state_dict({key: value.float() for key, value in found.items()})
    return head.to(device).requires_grad_(False)
