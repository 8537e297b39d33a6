"""Where scores come from: `ppo.reward` and `eval.scores` in a config."""

from typing import Self

from pydantic import Field, model_validator

from data.paths import ConfigPath
from stages.core.config import Section
from stages.core.judge.reward import RewardJudge


class RewardConfig(Section):
    """One source of scores: a reward model, a Python function, or an LLM judge."""

    model: ConfigPath | None = Field(
        default=None, description="`rm` for the rm stage of this run, else a folder or hub id"
    )
    function: ConfigPath | None = Field(
        default=None,
        description="path.py:name or package.module:name; called as name(prompts, responses, rows) -> list[float]",
    )
    judge: RewardJudge | None = Field(default=None, description="an LLM that grades each response from 1 to 10")
    weight: float = 1.0

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        if sum(source is not None for source in (self.model, self.function, self.judge)) != 1:
            raise ValueError("name exactly one of model, function and judge")
        return self
