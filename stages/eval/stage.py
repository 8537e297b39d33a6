"""Policies side by side: the same prompts, the same seeds, scores that nobody trained on; and the reward models."""

import json
import math
import time
from collections.abc import Mapping, Sequence

from data.artifacts import write_atomically
from data.chat import ChatEncoder
from data.errors import UserError
from data.prepare import prepare_preferences, prepare_prompts
from data.report import DataReport
from data.rows import Prompt
from stages.core import ranks
from stages.core.answering import engine_of, load_view
from stages.core.bank import BankBuilder
from stages.core.calibration import JudgedPair, reward_figures
from stages.core.context import Interrupted, StageContext, StageResult
from stages.core.judge.scoring import judge_scorer
from stages.core.models import open_encoder
from stages.core.responses import Responses
from stages.core.rewards import RewardModel
from stages.eval.config import EvalConfig
from stages.eval.policies import Policy, answer, kl_to_reference
from stages.eval.report import ENDED, KL, LENGTH, Findings, Measured, make_report


def run(context: StageContext[EvalConfig]) -> StageResult:
    """Writes report.json and samples.jsonl. Raises Interrupted; there is no checkpoint, the stage starts over."""
    started = time.perf_counter()
    context.metrics.rewind(-1)
    reports: list[DataReport] = []
    policies = open_policies(context, reports)
    builder = BankBuilder(context.shared)
    answers, kls = sample_policies(context, policies, builder)
    scores, reward_models = score_answers(context, answers, builder, reports)
    refused = DataReport(refused=[refusal for report in reports for refusal in report.refused])
    if ranks.current().is_main:
        refused.write_quarantine(context.out / "quarantine.jsonl")
    measured = [
        _measured(policy.name, each, kls[policy.name], {column: values[place] for column, values in scores.items()})
        for place, (policy, each) in enumerate(zip(policies, answers, strict=True))
    ]
    findings = Findings(measured, reward_models)
    report = make_report(findings, context.config)
    if ranks.current().is_main:
        write_atomically(context.out / "report.json", json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    for each, own in zip(answers, measured, strict=True):
        _log_samples(context, each, own)
    metrics = findings.metrics()
    context.metrics.log(1, metrics | {"seconds": time.perf_counter() - started})
    return StageResult("evaluation", metrics=metrics, parents=context.parents())


def open_policies(context: StageContext[EvalConfig], reports: list[DataReport]) -> list[Policy]:
    """Every policy with the prompts that all of them can read.

    Raises UserError where there is no such prompt.
    """
    config, shared = context.config, context.shared
    room = shared.max_length - config.response_length
    if room < 1:
        raise UserError(
            f"eval.response_length={config.response_length} leaves no room in max_length={shared.max_length}; "
            "lower it or raise max_length"
        )
    sources = {name: context.inputs[f"policy.{name}"] for name in config.policies}
    encoders = {name: open_encoder(source, shared) for name, source in sources.items()}
    prepared = prepare_prompts(
        config.prompts,
        0.0,
        encoder=next(iter(encoders.values())),
        run_folder=context.run_folder,
        seed=shared.seed,
        max_prompt_tokens=room,
    )
    prepared.report.check_refused(shared.max_refused)
    reports.append(prepared.report)
    context.metrics.say(f"{prepared.report.summary()}")
    rows = [prompt.row for prompt in prepared.train]
    rows = [row for row in rows if all(encoder.prompt(row, room) for encoder in encoders.values())]
    rows = rows[: config.max_prompts]
    if not rows:
        raise UserError(f"eval.prompts: none is short enough for every policy; raise max_length={shared.max_length}")
    return [Policy(name, sources[name], encoder, _encode(encoder, rows, room)) for name, encoder in encoders.items()]


def _encode(encoder: ChatEncoder, rows: Sequence[Prompt], room: int) -> list:
    return [prompt for row in rows if (prompt := encoder.prompt(row, room)) is not None]


def sample_policies(
    context: StageContext[EvalConfig], policies: Sequence[Policy], builder: BankBuilder
) -> tuple[list[Responses], dict[str, list[float] | None]]:
    """Each policy's answers, and by its name their KL to the first policy."""
    config = context.config
    context.metrics.start(1, "evaluation")
    answers: list[Responses] = []
    kls: dict[str, list[float] | None] = {}
    reference = load_view(policies[0].source, "policy-0", builder)
    for place, policy in enumerate(policies):
        _check_stop(context)
        view = load_view(policy.source, f"policy-{place}", builder) if place else reference
        engine = engine_of(
            policy.source,
            view,
            config.rollout,
            "eval.rollout",
            max_length=context.shared.max_length,
            responses=len(policy.prompts),
            out=context.out,
        )
        with engine as sampler:
            answers.append(
                answer(
                    policy,
                    view,
                    sampler,
                    max_new_tokens=config.response_length,
                    temperature=config.temperature,
                    run_seed=context.shared.seed,
                )
            )
        context.metrics.say(f"{policy.name} answered {len(policy.prompts)} prompts")
        kls[policy.name] = (
            kl_to_reference(policies[0], reference, policy, answers[-1], temperature=config.temperature)
            if place
            else [0.0] * len(policy.prompts)
        )
        if kls[policy.name] is None:
            context.metrics.say(f"{policy.name} has another vocabulary than {policies[0].name}: no KL")
    return answers, kls


def score_answers(
    context: StageContext[EvalConfig], answers: Sequence[Responses], builder: BankBuilder, reports: list[DataReport]
) -> tuple[dict[str, list[list[float]]], dict[str, dict[str, float]]]:
    """Column -> scores of each policy's answers; and the figures of the reward models among the scores on the pairs."""
    scores: dict[str, list[list[float]]] = {}
    figures: dict[str, dict[str, float]] = {}
    for place, (name, reward) in enumerate(context.config.scores.items()):
        _check_stop(context)
        source = judge_scorer(reward.judge, context) if reward.judge else context.inputs[f"score.{name}"]
        scorer = builder.one_scorer(reward, source, f"score-{place}")
        scores[name] = [[reward.weight * score for score in scorer.score(each.answered())] for each in answers]
        if isinstance(scorer, RewardModel) and context.config.pairs:
            figures[name] = _judge_pairs(context, scorer, reports)
    return scores, figures


def _judge_pairs(context: StageContext[EvalConfig], model: RewardModel, reports: list[DataReport]) -> dict[str, float]:
    """The reward model's diagnostics on `eval.pairs`, encoded as in its training."""
    prepared = prepare_preferences(
        context.config.pairs, 0.0, encoder=model.encoder, run_folder=context.run_folder, seed=context.shared.seed
    )
    prepared.report.check_refused(context.shared.max_refused)
    reports.append(prepared.report)
    rows = prepared.train
    pairs = [
        JudgedPair(
            better, worse, len(row.chosen) - row.prompt_length, len(row.rejected) - row.prompt_length, row.p_chosen
        )
        for (better, worse), row in zip(model.score_pairs(rows), rows, strict=True)
    ]
    return {"pairs": float(len(pairs)), **reward_figures(pairs)}


def _measured(name: str, answers: Responses, kl: list[float] | None, scores: Mapping[str, Sequence[float]]) -> Measured:
    lengths, ended = [float(length) for length in answers.lengths], [float(each) for each in answers.finished]
    columns = {**scores, LENGTH: lengths, ENDED: ended}
    return Measured(name, columns if kl is None else columns | {KL: kl})


def _log_samples(context: StageContext[EvalConfig], answers: Responses, measured: Measured) -> None:
    rows = zip(answers.prompts, answers.texts, strict=True)
    context.metrics.samples(
        1,
        [
            {
                "policy": measured.policy,
                "prompt": prompt.row.prompt,
                "response": text,
                **{name: _known(values[place]) for name, values in measured.columns.items()},
            }
            for place, (prompt, text) in enumerate(rows)
        ],
    )


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def _check_stop(context: StageContext[EvalConfig]) -> None:
    if ranks.any_rank(context.should_stop()):
        raise Interrupted("eval: stopped; it is short and will start over")
