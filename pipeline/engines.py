"""The rollout engine of each stage that samples, as this machine would run it."""

from pipeline.inputs import Run
from stages.core.rollout.choice import Choice, choose_engine


def stage_engine(run: Run, stage: str) -> Choice | None:
    """The engine of a stage, with what it lacks here; None for a stage that samples nothing."""
    if stage == "ppo" and run.config.ppo is not None:
        rollout = run.config.ppo.rollout
        return choose_engine(rollout, "ppo.rollout", staleness=rollout.staleness)
    if stage == "eval" and run.config.eval is not None:
        return choose_engine(run.config.eval.rollout, "eval.rollout")
    return None
