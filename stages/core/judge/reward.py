"""A judge in a config where scores are asked for: it grades one response at a time. Imports no torch."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from stages.core.judge.config import JudgeConfig, Mode


class RewardJudge(JudgeConfig):
    """A judge that grades responses from 1 to 10; the score is (points - 5.5) / 4.5, from -1 to 1."""

    mode: Mode = Field(default="pointwise", description="pointwise: 1 to 10 for each response")
    max_unanswered: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.1,
        description="share of a batch without a usable score above which the run stops; below, such responses do not "
        "count: no score is made up",
    )

    @model_validator(mode="after")
    def _grades(self) -> Self:
        if self.mode == "pairwise":
            raise ValueError("mode=pairwise compares two responses, and gives no score; leave it out")
        return self
