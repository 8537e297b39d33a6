"""The `label.people:` section of a run's config. Imports no torch."""

from typing import Annotated, ClassVar, Self

from pydantic import Field, model_validator

from stages.core.config import Section
from stages.core.judge.config import Disagreement

Annotator = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,31}$")]


class PeopleConfig(Section):
    """People who compare answers on a local page, each by a link of their own."""

    # Where the page is, which changes no answer.
    operational: ClassVar[tuple[str, ...]] = ("host", "port")

    annotators: Annotated[list[Annotator], Field(min_length=1)] = Field(
        default=["me"], description="names; the first one also sees everybody's progress, and ends the labelling"
    )
    overlap: Annotated[int, Field(ge=1)] = Field(default=1, description="annotators who get the same pair")
    repeat_share: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.05, description="share of pairs that an annotator gets twice, to see how steady the verdicts are"
    )
    on_disagreement: Disagreement = Field(
        default="tie",
        description="where annotators, or both showings of a pair, differ: p_chosen 0.5, the mean, none",
    )
    host: str = Field(default="127.0.0.1", description="address to listen on; the default is this machine alone")
    port: Annotated[int, Field(ge=0, le=65535)] = Field(default=8765, description="0 takes any free port")

    @model_validator(mode="after")
    def _enough_annotators(self) -> Self:
        if len(set(self.annotators)) != len(self.annotators):
            raise ValueError("annotators names somebody twice; each name has one link")
        if self.overlap > len(self.annotators):
            raise ValueError(
                f"overlap={self.overlap} is more than the {len(self.annotators)} in annotators; lower it or name more"
            )
        return self
