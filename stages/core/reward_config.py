"""Where scores come from: `ppo.reward` and `eval.scores` in a config."""

from typing import Self

from pydantic import Field, model_validator

from data.paths import ConfigPath
from stages.core.config import Section


class RewardConfig(Section):
    """One source of scores: a reward model, or a Python function."""

    model: ConfigPath | None = Field(
        default=None, description="`rm` for the rm stage of this run, else a folder or hub id"
    )
    function: ConfigPath | None = Field(
        default=None,
        description="path.py:name or package.module:name; called as name(prompts, responses, rows) -> list[float]",
    )
    weight: float = 1.0

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        if (self.model is None) == (self.function is None):
            raise ValueError("name exactly one of model and function")
        return self
