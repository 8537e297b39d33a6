"""Candidates: responses that policies and endpoints give to each prompt, without near-duplicates, and pairs of them."""

import difflib
import itertools
import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.artifacts import write_atomically
from data.encoded import EncodedPrompt
from data.errors import UserError
from data.prepare import prepare_prompts
from data.report import DataReport
from data.rows import Prompt
from stages.core.answering import engine_of, load_view
from stages.core.bank import BankBuilder, View
from stages.core.context import Interrupted, StageContext
from stages.core.models import end_tokens, open_encoder
from stages.core.responses import Sampler
from stages.core.rewards import Answered, Scorer, load_function
from stages.core.rollout.protocol import Sampling
from stages.label.config import Candidates, LabelConfig
from stages.label.endpoints import answers_of
from stages.label.pairs import Pair, as_response

CHUNK_PROMPTS = 256  # between two saves


@dataclass(frozen=True)
class Candidate:
    """One response to a prompt, and whether it ended by itself."""

    text: str
    finished: bool = True


def read_prompts(context: StageContext[LabelConfig]) -> tuple[list[Prompt], DataReport]:
    """The prompts that every policy can read, and the account of their rows."""
    config, shared = context.config, context.shared
    room = shared.max_length - config.candidates.response_length
    if room < 1:
        raise UserError(
            f"label.candidates.response_length={config.candidates.response_length} leaves no room in "
            f"max_length={shared.max_length}; lower it or raise max_length"
        )
    sources = policy_sources(context) or [context.inputs["base"]]
    encoders = [open_encoder(source, shared) for source in sources]
    prepared = prepare_prompts(
        config.prompts,
        0.0,
        encoder=encoders[0],
        run_folder=context.run_folder,
        seed=shared.seed,
        max_prompt_tokens=room,
    )
    prepared.report.check_refused(shared.max_refused)
    context.metrics.say(prepared.report.summary())
    rows = [prompt.row for prompt in prepared.train]
    rows = [row for row in rows if all(encoder.prompt(row, room) for encoder in encoders[1:])]
    return rows[: config.max_prompts], prepared.report


def policy_sources(context: StageContext[LabelConfig]) -> list[str]:
    """The policies that answer, in the config's order."""
    return [source for role, source in context.inputs.items() if role.startswith("policy.")]


def sample_candidates(context: StageContext[LabelConfig], prompts: Sequence[Prompt]) -> list[list[Candidate]]:
    """The responses to each prompt, of every policy and endpoint. Saved in `checkpoints/` as they come.

    Raises Interrupted; what is saved is not sampled again.
    """
    folder = context.out / "checkpoints"
    folder.mkdir(exist_ok=True)
    found: list[list[Candidate]] = [[] for _ in prompts]
    builder = BankBuilder(context.shared)
    for place, source in enumerate(policy_sources(context)):
        saved = _Saved(folder, f"policy-{place}", len(prompts))
        if not saved.complete:
            view = load_view(source, f"policy-{place}", builder)
            _sample_policy(context, source, view, prompts, saved)
        _join(found, saved.read())
        context.metrics.say(f"{source} answered {len(prompts)} prompts")
    if context.config.endpoints:
        for own, texts in zip(found, answers_of(context, prompts), strict=True):
            own += [Candidate(text) for text in texts]
    return found


def _sample_policy(
    context: StageContext[LabelConfig], source: str, view: View, prompts: Sequence[Prompt], saved: "_Saved"
) -> None:
    candidates, shared = context.config.candidates, context.shared
    encoder = open_encoder(source, shared)
    room = shared.max_length - candidates.response_length
    encoded = [prompt for row in prompts if (prompt := encoder.prompt(row, room)) is not None]
    assert len(encoded) == len(prompts), "prompts are chosen so that every policy can read them"
    ends = end_tokens(encoder, view.trunk.model)
    sizes = {"max_length": shared.max_length, "responses": CHUNK_PROMPTS * candidates.per_prompt}
    with engine_of(source, view, context.config.rollout, "label.rollout", **sizes, out=context.out) as engine:
        for chunk in saved.missing():
            if context.should_stop():
                raise Interrupted
            rows = encoded[chunk * CHUNK_PROMPTS : (chunk + 1) * CHUNK_PROMPTS]
            drawn: list[list[Candidate]] = []
            for sample, temperature in enumerate(candidates.temperatures):
                sampling = Sampling(candidates.response_length, temperature, ends)
                drawn.append(_draw(Sampler(engine, encoder, sampling, shared.seed), rows, chunk, sample))
            saved.write(chunk, [list(each) for each in zip(*drawn, strict=True)])


def _draw(sampler: Sampler, rows: Sequence[EncodedPrompt], chunk: int, sample: int) -> list[Candidate]:
    """One response to each prompt; seeds follow from chunk, sample and place."""
    responses = sampler.respond(rows, f"label {sample}", chunk)
    return [Candidate(text, done) for text, done in zip(responses.texts, responses.finished, strict=True)]


@dataclass(frozen=True)
class _Saved:
    """One policy's responses on disk, a file for each chunk of prompts."""

    folder: Path
    name: str
    prompts: int

    @property
    def chunks(self) -> list[Path]:
        return [self.folder / f"{self.name}-{chunk:05}.json" for chunk in range(-(-self.prompts // CHUNK_PROMPTS))]

    @property
    def complete(self) -> bool:
        return not self.missing()

    def missing(self) -> list[int]:
        return [chunk for chunk, path in enumerate(self.chunks) if not path.is_file()]

    def write(self, chunk: int, rows: Sequence[Sequence[Candidate]]) -> None:
        content = [[[each.text, each.finished] for each in row] for row in rows]
        write_atomically(self.chunks[chunk], json.dumps(content))

    def read(self) -> list[list[Candidate]]:
        rows = [row for path in self.chunks for row in json.loads(path.read_text(encoding="utf-8"))]
        return [[Candidate(text, finished) for text, finished in row] for row in rows]


def _join(found: list[list[Candidate]], more: Iterable[list[Candidate]]) -> None:
    for own, new in zip(found, more, strict=True):
        own += new


def distinct(candidates: Sequence[Candidate], *, near_duplicate: float) -> list[Candidate]:
    """The candidates without those that repeat an earlier one, in their order."""
    kept: list[Candidate] = []
    for candidate in candidates:
        if candidate.text and not any(likeness(candidate.text, other.text) >= near_duplicate for other in kept):
            kept.append(candidate)
    return kept


def likeness(left: str, right: str) -> float:
    """The share of words that two texts have in common in the same order, 0 to 1; letter case does not count.

    2 M / T for M matching of T words (Ratcliff and Obershelp, as in difflib).
    """
    words = [text.lower().split() for text in (left, right)]
    if words[0] == words[1]:
        return 1.0
    return difflib.SequenceMatcher(None, *words, autojunk=False).ratio()


def pair_up(
    prompts: Sequence[Prompt], found: Sequence[Sequence[Candidate]], context: StageContext[LabelConfig]
) -> list[Pair]:
    """The pairs that the strategy makes of each prompt's candidates, each with its responses in a random order."""
    config, seed = context.config.candidates, context.shared.seed
    scores = _scores(prompts, found, context) if config.strategy == "best-worst" else [[] for _ in prompts]
    pairs: list[Pair] = []
    for place, (prompt, candidates) in enumerate(zip(prompts, found, strict=True)):
        rng = random.Random(f"pairs {seed} {place}")
        for first, second in choose(len(candidates), config, scores[place], rng):
            sides = [candidates[first].text, candidates[second].text]
            rng.shuffle(sides)
            one, other = (as_response(prompt.prompt, side) for side in sides)
            pairs.append(Pair(prompt.prompt, one, other, prompt.origin))
    return pairs


def choose(count: int, config: Candidates, scores: Sequence[float], rng: random.Random) -> list[tuple[int, int]]:
    """Which of `count` candidates are paired, by the strategy; none where there are fewer than two."""
    every = list(itertools.combinations(range(count), 2))
    if config.strategy == "all" or not every:
        return every
    if config.strategy == "random":
        return rng.sample(every, min(config.pairs_per_prompt, len(every)))
    best, worst = max(range(count), key=lambda i: scores[i]), min(range(count), key=lambda i: scores[i])
    return [] if scores[best] == scores[worst] else [(best, worst)]


def _scores(
    prompts: Sequence[Prompt], found: Sequence[Sequence[Candidate]], context: StageContext[LabelConfig]
) -> list[list[float]]:
    source, reward = context.inputs["score"], context.config.candidates.score
    assert reward is not None
    scorer: Scorer = (
        load_function(source) if reward.function else BankBuilder(context.shared).reward_model(source, "score")
    )
    rows = [(prompt, candidate) for prompt, own in zip(prompts, found, strict=True) for candidate in own]
    flat = iter(
        scorer.score(
            Answered(
                [prompt.prompt for prompt, _ in rows],
                [candidate.text for _, candidate in rows],
                [candidate.finished for _, candidate in rows],
                [prompt.extra for prompt, _ in rows],
            )
        )
    )
    return [[next(flat) for _ in own] for own in found]


def collect(context: StageContext[LabelConfig]) -> tuple[list[Pair], DataReport, dict[str, Any]]:
    """Pairs of sampled candidates, the account of the prompts, and counts for the report."""
    prompts, report = read_prompts(context)
    found = sample_candidates(context, prompts)
    kept = [distinct(own, near_duplicate=context.config.candidates.near_duplicate) for own in found]
    pairs = pair_up(prompts, kept, context)
    sampled, different = sum(map(len, found)), sum(map(len, kept))
    counts = {"prompts": len(prompts), "candidates": sampled, "near_duplicates": sampled - different}
    return pairs, report, counts
