"""The rollout engine of each stage that samples, as this machine would run it, and what a judge lacks here."""

from pipeline.inputs import Run
from stages.core.judge.config import Endpoint, missing_key
from stages.core.rollout.choice import Choice, choose_engine


def stage_engine(run: Run, stage: str) -> Choice | None:
    """The engine of a stage, with what it lacks here; None for a stage that samples nothing."""
    if stage == "ppo" and run.config.ppo is not None:
        rollout = run.config.ppo.rollout
        return choose_engine(rollout, "ppo.rollout", staleness=rollout.staleness)
    if stage == "label" and run.config.label is not None and run.config.label.prompts:
        return choose_engine(run.config.label.rollout, "label.rollout")
    if stage == "eval" and run.config.eval is not None:
        return choose_engine(run.config.eval.rollout, "eval.rollout")
    return None


def judge_problems(run: Run, stage: str) -> list[str]:
    """One line for each key of an endpoint that a stage asks and that is not in the environment, and for a label
    stage that asks nobody."""
    label = run.config.label
    problems: list[str] = []
    if stage == "label" and label is not None and not (label.judges or label.people or label.revise):
        problems.append("label.judge: missing; name a judge, or add --people to label by people")
    missing = [missing_key(endpoint.api_key_env) for endpoint in _endpoints(run, stage)]
    return problems + [f"{stage}.{problem}" for problem in missing if problem is not None]


def _endpoints(run: Run, stage: str) -> list[Endpoint]:
    """Whom a stage asks over HTTP."""
    config = run.config
    if stage == "label" and config.label is not None:
        revise = [config.label.revise] if config.label.revise is not None else []
        return [*config.label.judges, *config.label.endpoints, *revise]
    if stage == "ppo" and config.ppo is not None:
        return [reward.judge for reward in config.ppo.rewards if reward.judge is not None]
    if stage == "eval" and config.eval is not None:
        return [score.judge for score in config.eval.scores.values() if score.judge is not None]
    return []
