"""PPO: reads a policy, a reward and prompts; writes the improved policy.

One update: prompts → responses, rescored where another program sampled → scores, reference log-probabilities, values →
rewards → advantages → epochs of minibatches → KL controller. `../ppo` holds a file for each part; this one is the
sequence.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from data.artifacts import publish_folder
from data.chat import ChatEncoder
from data.encoded import EncodedPrompt
from data.errors import SharedUserError, UserError
from data.prepare import Prepared, prepare_prompts
from stages.core import ranks
from stages.core.bank import BankBuilder, PolicyBank, TokenOutputs
from stages.core.checkpoints import Checkpoint, latest_checkpoint, save_checkpoint
from stages.core.context import Interrupted, StageContext, StageResult
from stages.core.engine import Engine
from stages.core.engines import open_engine
from stages.core.heap import release_heap
from stages.core.judge.scoring import judge_scorer
from stages.core.measure import peak_memory_bytes
from stages.core.models import end_tokens, open_encoder
from stages.core.ops import explained_variance, masked_mean
from stages.core.responses import Responses, Sampler
from stages.core.rollout.choice import choose_engine
from stages.core.rollout.native import NativeEngine
from stages.core.rollout.policy_files import policy_files
from stages.core.rollout.protocol import EngineError, RolloutEngine, Sampling
from stages.core.rollout.start import FOLDER, computing_dtype, start_engine
from stages.ppo.config import PpoConfig
from stages.ppo.control import KlController, ScoreShaper
from stages.ppo.evaluation import Evaluation, evaluate
from stages.ppo.experience import Collector, Experience, ValueFit
from stages.ppo.importance import check_sampler, importance_figures, sampler_kl
from stages.ppo.order import rows_after
from stages.ppo.ptx import load_ptx
from stages.ppo.rollouts import Rollout, Rollouts
from stages.ppo.state import PpoState, load_moments, load_weights
from stages.ppo.update import Updater, build_optimizer, training_of


@dataclass(frozen=True)
class Ppo:
    """Everything that one run of the stage holds."""

    context: StageContext[PpoConfig]
    encoder: ChatEncoder
    prompts: Prepared[EncodedPrompt]
    collector: Collector
    rollouts: Rollouts
    updater: Updater
    state: PpoState

    @property
    def held_out(self) -> list[EncodedPrompt]:
        """The prompts of an evaluation."""
        return (self.prompts.holdout or self.prompts.train)[: self.context.config.eval_prompts]


def run(context: StageContext[PpoConfig]) -> StageResult:
    """Trains the policy and publishes it; resumes from the newest valid checkpoint of the same key.

    Raises Interrupted once a checkpoint is written after a stop was asked for, and with a checkpoint of the last whole
    update EngineError, where the rollout engine fails, and UserError, where the reward does.
    """
    checkpoint = ranks.from_main(latest_checkpoint(context.out / "checkpoints", context.key))
    ppo = build(context, checkpoint)
    try:
        if checkpoint is not None:
            context.metrics.say(f"resumed after update {ppo.state.update} of {context.config.updates}")
        # Without a checkpoint the samples taken before the first update go too.
        context.metrics.rewind(ppo.state.update if checkpoint else -1)
        context.metrics.start(context.config.updates, "update")
        train_loop(ppo)
    except EngineError as error:
        if not ppo.state.update:
            raise
        _save(ppo)
        raise EngineError(f"{error}; saved after update {ppo.state.update}, the same command resumes") from error
    except (UserError, Interrupted) as error:  # a reward that fails, or a judge that is not waited for
        if isinstance(error, SharedUserError) or not ranks.current().are_many:  # else the others know nothing of it
            _keep(ppo)
        raise
    finally:
        ppo.rollouts.close()
    with ppo.updater.engine.gathered():
        if ranks.current().is_main:
            publish_folder(context.out / "weights", lambda folder: _write_weights(ppo, folder))
    ppo.updater.engine.close()
    best = {f"best/{name}": value for name, value in ppo.state.best.items()}
    return StageResult("policy", metrics=ppo.state.last | best, parents=context.parents())


def build(context: StageContext[PpoConfig], checkpoint: Checkpoint | None = None) -> Ppo:
    """Loads prompts, models and rewards, and starts the rollout engine; goes on from `checkpoint`.

    Raises UserError for prompts, models, rewards and engines that cannot be used.
    """
    config, shared = context.config, context.shared
    encoder = open_encoder(context.inputs["policy"], shared)
    prompts = _prompts(context, encoder)
    torch.manual_seed(shared.seed)
    tuning = config.tuning or shared.tuning
    builder = BankBuilder(shared)
    bank = builder.policy_bank(context.inputs["policy"], tuning, config.rollout.temperature)
    sources = [
        judge_scorer(reward.judge, context) if reward.judge else context.inputs[f"reward.{place}"]
        for place, reward in enumerate(config.rewards)
    ]
    scorer, reward_models = builder.scorer(config.rewards, sources)
    if config.has_critic:
        reward = reward_models[0] if reward_models else None
        builder.add_critic(bank, config.critic, tuning, reward if config.value_init != "fresh" else None)
    ptx = load_ptx(context, encoder, builder.device)
    state = PpoState(KlController(config.kl, config.kl.coef), ScoreShaper(config.score))
    engine = _open_engine(context, bank, checkpoint)
    if checkpoint is not None:
        state.load(checkpoint.path)
    updater = Updater(bank, config, engine, builder.device, shared.seed, ptx)
    ends = end_tokens(encoder, bank.policy.trunk.model)
    sampling = Sampling(config.response_length, config.rollout.temperature, ends)
    sampler = Sampler(_start_engine(context, bank), encoder, sampling, shared.seed)  # last: from here on it is closed
    collector = Collector(bank, sampler, scorer, config, builder.device)
    rollouts = Rollouts(
        sampler,
        lambda update: _prompts_of(prompts.train, update, state, context),
        updates=config.updates,
        samples=config.samples_per_prompt,
        staleness=config.rollout.staleness,
    )
    return Ppo(context, encoder, prompts, collector, rollouts, updater, state)


def _open_engine(context: StageContext[PpoConfig], bank: PolicyBank, checkpoint: Checkpoint | None) -> Engine:
    """The training engine over the bank, as the checkpoint left it."""
    if checkpoint is not None:
        load_weights(checkpoint.path, bank)
    training = training_of(bank, context.config, build_optimizer(bank, context.config))
    engine = open_engine(training, context.shared.distributed)
    if checkpoint is not None:
        engine.load_moments(load_moments(checkpoint.path))
    return engine


def _start_engine(context: StageContext[PpoConfig], bank: PolicyBank) -> RolloutEngine:
    config = context.config
    choice = ranks.from_main(choose_engine(config.rollout, "ppo.rollout", staleness=config.rollout.staleness))
    if choice.engine != "native":
        context.metrics.say(f"rollouts by {choice.text}")
    trunk = bank.policy.trunk
    shared_head = bank.value_head if bank.value is None else None
    return start_engine(
        choice,
        config.rollout,
        NativeEngine(trunk, bank.policy.adapter, value_head=shared_head),
        lambda: policy_files(bank, computing_dtype(trunk)),
        max_length=context.shared.max_length,
        responses=config.rollout_batch_size,
        folder=context.out / FOLDER,
    )


def _prompts_of(
    prompts: Sequence[EncodedPrompt], update: int, state: PpoState, context: StageContext[PpoConfig]
) -> list[EncodedPrompt]:
    """The prompts of an update to come: the next ones after those that have trained, and after its forerunners'."""
    count = context.config.prompts_per_update
    cursor = state.cursor + (update - 1 - state.update) * count
    return rows_after(prompts, cursor, count, seed=context.shared.seed, purpose="prompts")


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
    if ranks.current().is_main:
        prompts.report.write_quarantine(context.out / "quarantine.jsonl")
    prompts.report.check_refused(shared.max_refused)
    context.metrics.say(prompts.report.summary())
    return prompts


def train_loop(ppo: Ppo) -> None:
    """Runs the updates that are left, and the evaluation that an engine's failure left out."""
    context, config, state = ppo.context, ppo.context.config, ppo.state
    if not ppo.prompts.holdout:
        context.metrics.say("no prompts are held out: evaluations use training prompts; set ppo.holdout to mend that")
    start: dict[str, float] = {}
    if state.update == 0:
        start = _evaluate(ppo, "eval_start")
    while state.update < config.updates or state.unlogged:
        began = time.perf_counter()
        if not state.unlogged:
            state.unlogged = start | train_once(ppo)
        figures, update = state.unlogged, state.update
        if update % config.eval_every == 0 or update == config.updates:
            figures = figures | _evaluate(ppo, "eval")
        figures["seconds"] = time.perf_counter() - began
        context.metrics.log(update, figures)
        start, state.last, state.unlogged = {}, figures, {}
        stop = ranks.any_rank(context.should_stop())
        if stop or update % context.shared.checkpoint_every == 0 or update == config.updates:
            _save(ppo)
        if stop and update < config.updates:
            raise Interrupted(f"ppo: stopped after update {update} of {config.updates}")


def train_once(ppo: Ppo) -> dict[str, float]:
    """One update, counted in the state; its figures. Where the engine fails, nothing has changed."""
    state, config = ppo.state, ppo.context.config
    update, kl_coef = state.update + 1, state.kl.coef
    with ppo.updater.engine.gathered():
        rollout = ppo.rollouts.take(update)
        probe = ppo.rollouts.go_ahead(update)
        for line in ppo.rollouts.newly_lost():
            ppo.context.metrics.say(line)
        rescored, sampler_figures = _rescored(ppo, rollout, probe)
        experience = ppo.collector.collect(
            rollout.responses,
            rescored,
            kl_coef=kl_coef,
            shaper=state.shaper,
            fit_values=state.update == 0 and config.value_fit,
        )
    fitted = {} if experience.value_fit is None else _fit_critic(ppo, experience.value_fit)
    release_heap()
    trained = time.perf_counter()
    figures = ppo.updater.update(experience, update, kl_coef)
    ppo.updater.engine.discard()  # the last gradients would stay through a rollout and its scoring
    release_heap()
    update_seconds = time.perf_counter() - trained
    state.update, state.cursor = update, state.cursor + config.prompts_per_update
    figures |= sampler_figures | fitted | _count(state, experience, rollout)
    figures |= importance_figures(experience, config.rollout.importance_cap)
    if update > config.critic_warmup:  # before, the policy stands on the reference and says nothing about beta
        state.kl.update(figures["kl/ref_mean"])
    return figures | {"time/update_s": update_seconds, "kl/coef": kl_coef}


def _fit_critic(ppo: Ppo, fit: ValueFit) -> dict[str, float]:
    """Gives the critic the values that the first experience has of it, before anything has trained; its figures."""
    bank = ppo.updater.bank
    assert bank.value_head is not None
    with ppo.updater.engine.rewriting(list(bank.value_head.parameters())):
        bank.rescale_values(fit.factor, fit.offset)
    fitted = f"{fit.factor:.3g} * value {fit.offset:+.3g}"
    ppo.context.metrics.say(f"critic fitted to the first returns (ppo.value_fit): {fitted}")
    return {"value/fit_factor": fit.factor, "value/fit_offset": fit.offset}


def _rescored(ppo: Ppo, rollout: Rollout, probe: Responses | None) -> tuple[TokenOutputs | None, dict[str, float]]:
    """What the trainer says of the rollout, where another program sampled it; and how far the two are apart.

    They are compared on tokens that came from the same weights: the rollout's own, or a probe's where it is stale.
    """
    if ppo.rollouts.is_policy:
        return None, {}
    rescored = ppo.collector.rescored(rollout.responses)
    if probe is not None:
        kl = sampler_kl(probe.logprobs(), ppo.collector.rescored(probe).logprobs_M)
    elif rollout.staleness == 0:
        kl = sampler_kl(rollout.responses.logprobs(), rescored.logprobs_M)
    else:
        return rescored, {}
    return rescored, check_sampler(kl, ppo.context.config.rollout.max_sampler_kl, ppo.state.update)


def _save(ppo: Ppo) -> None:
    context, engine = ppo.context, ppo.updater.engine
    moments = engine.moments()
    with engine.gathered():
        if ranks.current().is_main:
            weights = {name: each.detach().cpu() for name, each in ppo.collector.bank.trained().items()}
            save_checkpoint(
                context.out / "checkpoints",
                ppo.state.update,
                lambda folder: ppo.state.save(folder, weights, moments),
                key=context.key,
                keep=context.shared.keep_checkpoints,
            )


def _keep(ppo: Ppo) -> None:
    """Saves the whole updates that no checkpoint holds yet."""
    newest = ranks.from_main(latest_checkpoint(ppo.context.out / "checkpoints", ppo.context.key))
    if ppo.state.update > (newest.step if newest else 0):
        _save(ppo)


def _count(state: PpoState, experience: Experience, rollout: Rollout) -> dict[str, float]:
    """Advances the counters by one experience; the metrics that describe it."""
    responses, mask_BR = experience.responses, experience.mask_BR
    response_tokens = int(mask_BR.sum())
    state.episodes += len(responses.completions)
    state.tokens += response_tokens + sum(len(prompt.tokens) for prompt in responses.prompts)
    lengths = torch.tensor(responses.lengths, dtype=torch.float)
    return _value_figures(experience) | {
        "tokens": state.tokens,
        "episodes": state.episodes,
        **_score_figures(experience.score_B),
        "kl/ref_mean": float(experience.kl_B.mean()),
        # Sampled tokens' mean surprise is an unbiased estimate of the policy's entropy, at no cost.
        "policy/entropy": float(masked_mean(-experience.logprobs_BR, mask_BR)),
        "response/length_mean": float(lengths.mean()),
        "response/eos_fraction": sum(responses.finished) / len(responses.finished),
        "rollout/staleness": rollout.staleness,
        "time/rollout_s": rollout.seconds,
        "time/rollout_wait_s": rollout.waited_seconds,
        "time/score_s": experience.score_seconds,
        "throughput/response_tokens_per_s": response_tokens / rollout.seconds,
        "memory/peak_bytes": peak_memory_bytes(),
    }


def _score_figures(score_B: Tensor) -> dict[str, float]:
    """Mean and spread of the scores that were given; where a judge left some out, how many."""
    given_B = score_B[~score_B.isnan()]
    figures = {"score/mean": float(given_B.mean()), "score/std": float(given_B.std(correction=0))}
    missing = len(score_B) - len(given_B)
    return figures | ({"score/missing": float(missing)} if missing else {})


def _value_figures(experience: Experience) -> dict[str, float]:
    """How good the critic is on what trains; nothing where there is no critic."""
    values_BR, returns_BR = experience.values_BR, experience.returns_BR
    if values_BR is None or returns_BR is None:
        return {}
    return {"value/explained_variance": float(explained_variance(values_BR, returns_BR, experience.loss_mask_BR))}


def _evaluate(ppo: Ppo, name: str) -> dict[str, float]:
    """Metrics of the held-out prompts under `name`; texts go to the sample log, the best evaluation to the state."""
    state = ppo.state
    with ppo.updater.engine.gathered():
        ppo.rollouts.sync(state.update)
        evaluation: Evaluation = evaluate(ppo.collector, ppo.held_out, state.update)
    ppo.context.metrics.samples(state.update, evaluation.samples)
    if not state.best or evaluation.figures["score_mean"] > state.best["score_mean"]:
        state.best = evaluation.figures | {"update": float(state.update)}
    return {f"{name}/{figure}": value for figure, value in evaluation.figures.items()}


def _write_weights(ppo: Ppo, folder: Path) -> None:
    ppo.collector.bank.save_policy(folder)
    ppo.encoder.tokenizer.save_pretrained(str(folder))
