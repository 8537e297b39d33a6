"""The policy on held-out prompts: the same prompts and the same seeds every time, so that curves compare."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from data.encoded import EncodedPrompt
from stages.core.responses import kl_per_response
from stages.ppo.experience import Collector

LOGGED_SAMPLES = 16


@dataclass(frozen=True)
class Evaluation:
    """Figures and sampled texts of one evaluation."""

    figures: dict[str, float]
    samples: list[Mapping[str, Any]]


def evaluate(collector: Collector, prompts: Sequence[EncodedPrompt], version: int = 0) -> Evaluation:
    """Mean score, KL to the reference (nats per response), length and share of ended responses on `prompts`.

    `version` is that of the policy that the engine has.
    """
    responses = collector.sampler.respond(prompts, "eval", 0, version=version)
    scores = collector.scorer.score(responses.answered())
    kls = kl_per_response(
        responses,
        collector.bank.ref_logprobs,
        max_tokens=collector.config.microbatch_tokens,
        device=collector.device,
    )
    figures = {
        "score_mean": fmean(score for score in scores if not math.isnan(score)),
        "kl_ref_mean": fmean(kls),
        "length_mean": fmean(responses.lengths),
        "eos_fraction": fmean(responses.finished),
    }
    rows = zip(responses.prompts, responses.texts, scores, kls, responses.finished, strict=True)
    samples: list[Mapping[str, Any]] = [
        {"prompt": prompt.row.prompt, "response": text, "score": known, "kl": kl, "finished": finished}
        for prompt, text, score, kl, finished in rows
        for known in (None if math.isnan(score) else score,)
    ]
    return Evaluation(figures, samples[:LOGGED_SAMPLES])
