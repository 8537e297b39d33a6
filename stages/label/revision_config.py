"""The `label.revise:` section of a run's config. Imports no torch."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from stages.core.judge.config import Endpoint, Principles


class RevisionConfig(Endpoint):
    """Answers criticised and rewritten by sampled principles, for supervised fine-tuning."""

    constitution: Principles = Field(
        description="principles, or a YAML file that lists them (Bai et al. 2022, arXiv 2212.08073)"
    )
    rounds: Annotated[int, Field(ge=1)] = Field(
        default=1, description="times that an answer is rewritten, each by another principle (Bai et al. 2022: 4)"
    )
    critique: bool = Field(default=True, description="ask what is wrong before asking for the rewritten answer")
    constrained: bool = Field(default=True, description="send response_format json_schema; false where it is refused")
    max_tokens: Annotated[int, Field(ge=1)] = Field(default=512, description="most tokens of a critique or an answer")

    @property
    def source(self) -> str:
        """Its name in the ledger and in demonstrations.jsonl."""
        return f"revision:{self.model}"

    @model_validator(mode="after")
    def _can_be_asked(self) -> Self:
        if self.base_url is None or self.model is None:
            raise ValueError("needs base_url and model: who rewrites; `launch serve` serves a policy of yours")
        if self.rounds > len(self.constitution):
            raise ValueError(
                f"rounds={self.rounds} with {len(self.constitution)} in constitution; add principles or lower it"
            )
        return self
