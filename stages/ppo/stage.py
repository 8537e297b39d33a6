"""PPO: reads a policy, a reward and prompts; writes the improved policy.

One update: prompts → responses → scores, reference log-probabilities, values → rewards → advantages → epochs of
minibatches → KL controller. `../ppo` holds a file for each part; this one is the sequence.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from data.artifacts import publish_folder
from data.chat import ChatEncoder
from data.encoded import EncodedPrompt
from data.errors import UserError
from data.prepare import Prepared, prepare_prompts
from stages.core.bank import BankBuilder
from stages.core.checkpoints import latest_checkpoint, save_checkpoint
from stages.core.context import Interrupted, StageContext, StageResult
from stages.core.measure import peak_memory_bytes
from stages.core.models import end_tokens, open_encoder
from stages.core.ops import explained_variance, masked_mean
from stages.core.responses import Sampler
from stages.core.rollout.native import NativeEngine
from stages.core.rollout.protocol import Sampling
from stages.ppo.config import PpoConfig
from stages.ppo.control import KlController, ScoreShaper
from stages.ppo.evaluation import Evaluation, evaluate
from stages.ppo.experience import Collector, Experience
from stages.ppo.order import rows_after
from stages.ppo.ptx import load_ptx
from stages.ppo.state import PpoState
from stages.ppo.update import Updater, build_optimizer


@dataclass(frozen=True)
class Ppo:
    """Everything that one run of the stage holds."""

    context: StageContext[PpoConfig]
    encoder: ChatEncoder
    prompts: Prepared[EncodedPrompt]
    collector: Collector
    updater: Updater
    state: PpoState


def run(context: StageContext[PpoConfig]) -> StageResult:
    """Trains the policy and publishes it; resumes from the newest valid checkpoint of the same key.

    Raises Interrupted once a checkpoint is written after a stop was asked for.
    """
    ppo = build(context)
    checkpoint = latest_checkpoint(context.out / "checkpoints", context.key)
    if checkpoint is not None:
        ppo.state.load(checkpoint.path, ppo.collector.bank, ppo.updater.optimizer)
        context.metrics.say(f"resumed after update {ppo.state.update} of {context.config.updates}")
    # Without a checkpoint the samples taken before the first update go too.
    context.metrics.rewind(ppo.state.update if checkpoint else -1)
    context.metrics.start(context.config.updates, "update")
    train_loop(ppo)
    publish_folder(context.out / "weights", lambda folder: _write_weights(ppo, folder))
    best = {f"best/{name}": value for name, value in ppo.state.best.items()}
    return StageResult("policy", metrics=ppo.state.last | best, parents=context.parents())


def build(context: StageContext[PpoConfig]) -> Ppo:
    """Loads prompts, models and rewards.

    Raises UserError for prompts, models and rewards that cannot be used.
    """
    config, shared = context.config, context.shared
    encoder = open_encoder(context.inputs["policy"], shared)
    prompts = _prompts(context, encoder)
    torch.manual_seed(shared.seed)
    tuning = config.tuning or shared.tuning
    builder = BankBuilder(shared)
    bank = builder.policy_bank(context.inputs["policy"], tuning, config.rollout.temperature)
    sources = [context.inputs[f"reward.{place}"] for place in range(len(config.rewards))]
    scorer, reward_models = builder.scorer(config.rewards, sources)
    if config.has_critic:
        reward = reward_models[0] if reward_models else None
        builder.add_critic(bank, config.critic, tuning, reward, init=config.value_init)
    ends = end_tokens(encoder, bank.policy.trunk.model)
    shared_head = bank.value_head if bank.value is None else None
    engine = NativeEngine(bank.policy.trunk, bank.policy.adapter, value_head=shared_head)
    sampling = Sampling(config.response_length, config.rollout.temperature, ends)
    sampler = Sampler(engine, encoder, sampling, shared.seed)
    collector = Collector(bank, sampler, scorer, config, builder.device)
    ptx = load_ptx(context, encoder, builder.device)
    updater = Updater(bank, config, build_optimizer(bank, config), builder.device, shared.seed, ptx)
    state = PpoState(KlController(config.kl, config.kl.coef), ScoreShaper(config.score))
    return Ppo(context, encoder, prompts, collector, updater, state)


def _prompts(context: StageContext[PpoConfig], encoder: ChatEncoder) -> Prepared[EncodedPrompt]:
    config, shared = context.config, context.shared
    room = shared.max_length - config.response_length
    if room < 1:
        raise UserError(
            f"ppo.response_length={config.response_length} leaves no room in max_length={shared.max_length}; "
            "lower it or raise max_length"
        )
    prompts = prepare_prompts(
        config.prompts,
        config.holdout,
        encoder=encoder,
        run_folder=context.run_folder,
        seed=shared.seed,
        max_prompt_tokens=room,
    )
    prompts.report.write_quarantine(context.out / "quarantine.jsonl")
    prompts.report.check_refused(shared.max_refused)
    context.metrics.say(prompts.report.summary())
    return prompts


def train_loop(ppo: Ppo) -> None:
    """Runs the updates that are left."""
    context, config, state = ppo.context, ppo.context.config, ppo.state
    checkpoints = context.out / "checkpoints"
    held_out = (ppo.prompts.holdout or ppo.prompts.train)[: config.eval_prompts]
    if not ppo.prompts.holdout:
        context.metrics.say("no prompts are held out: evaluations use training prompts; set ppo.holdout to mend that")
    start: dict[str, float] = {}
    if state.update == 0:
        start = _evaluate(ppo, held_out, "eval_start")
    while state.update < config.updates:
        began = time.perf_counter()
        update = state.update + 1
        prompts = rows_after(
            ppo.prompts.train, state.cursor, config.prompts_per_update, seed=context.shared.seed, purpose="prompts"
        )
        kl_coef = state.kl.coef
        experience = ppo.collector.collect(prompts, update, kl_coef=kl_coef, shaper=state.shaper)
        trained = time.perf_counter()
        figures = ppo.updater.update(experience, update, kl_coef)
        update_seconds = time.perf_counter() - trained
        state.update, state.cursor = update, state.cursor + len(prompts)
        figures |= _count(state, experience) | start | {"time/update_s": update_seconds, "kl/coef": kl_coef}
        if update > config.critic_warmup:  # before, the policy stands on the reference and says nothing about beta
            state.kl.update(figures["kl/ref_mean"])
        if update % config.eval_every == 0 or update == config.updates:
            figures |= _evaluate(ppo, held_out, "eval")
        figures["seconds"] = time.perf_counter() - began
        context.metrics.log(update, figures)
        start, state.last = {}, figures
        stop = context.should_stop()
        if stop or update % context.shared.checkpoint_every == 0 or update == config.updates:
            save_checkpoint(
                checkpoints,
                update,
                lambda folder: state.save(folder, ppo.collector.bank, ppo.updater.optimizer),
                key=context.key,
                keep=context.shared.keep_checkpoints,
            )
        if stop and update < config.updates:
            raise Interrupted(f"ppo: stopped after update {update} of {config.updates}")


def _count(state: PpoState, experience: Experience) -> dict[str, float]:
    """Advances the counters by one experience; the metrics that describe it."""
    responses, mask_BR = experience.responses, experience.mask_BR
    response_tokens = int(mask_BR.sum())
    state.episodes += len(responses.completions)
    state.tokens += response_tokens + sum(len(prompt.tokens) for prompt in responses.prompts)
    lengths = torch.tensor(responses.lengths, dtype=torch.float)
    return _value_figures(experience) | {
        "tokens": state.tokens,
        "episodes": state.episodes,
        "score/mean": float(experience.score_B.mean()),
        "score/std": float(experience.score_B.std(correction=0)),
        "kl/ref_mean": float(experience.kl_B.mean()),
        # Sampled tokens' mean surprise is an unbiased estimate of the policy's entropy, at no cost.
        "policy/entropy": float(masked_mean(-experience.logprobs_BR, mask_BR)),
        "response/length_mean": float(lengths.mean()),
        "response/eos_fraction": sum(responses.finished) / len(responses.finished),
        "time/rollout_s": experience.rollout_seconds,
        "time/score_s": experience.score_seconds,
        "throughput/response_tokens_per_s": response_tokens / experience.rollout_seconds,
        "memory/peak_bytes": peak_memory_bytes(),
    }


def _value_figures(experience: Experience) -> dict[str, float]:
    """How good the critic is on what trains; nothing where there is no critic."""
    values_BR, returns_BR = experience.values_BR, experience.returns_BR
    if values_BR is None or returns_BR is None:
        return {}
    return {"value/explained_variance": float(explained_variance(values_BR, returns_BR, experience.loss_mask_BR))}


def _evaluate(ppo: Ppo, prompts: Sequence[EncodedPrompt], name: str) -> dict[str, float]:
    """Metrics of the held-out prompts under `name`; texts go to the sample log, the best evaluation to the state."""
    evaluation: Evaluation = evaluate(ppo.collector, prompts)
    state = ppo.state
    ppo.context.metrics.samples(state.update, evaluation.samples)
    if not state.best or evaluation.figures["score_mean"] > state.best["score_mean"]:
        state.best = evaluation.figures | {"update": float(state.update)}
    return {f"{name}/{figure}": value for figure, value in evaluation.figures.items()}


def _write_weights(ppo: Ppo, folder: Path) -> None:
    ppo.collector.bank.save_policy(folder)
    ppo.encoder.tokenizer.save_pretrained(str(folder))
