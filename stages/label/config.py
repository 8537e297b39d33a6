"""The `label:` section of a run's config: which responses are compared, and by whom."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from data.paths import ConfigPath
from data.sources import SourceConfig
from stages.core.config import Section
from stages.core.judge.config import Endpoint, JudgeConfig
from stages.core.reward_config import RewardConfig
from stages.core.rollout.config import EngineConfig
from stages.label.people.config import PeopleConfig
from stages.label.revision_config import RevisionConfig


class Candidates(Section):
    """Responses to each prompt, and which of them make pairs."""

    per_prompt: Annotated[int, Field(ge=1)] = Field(
        default=2, description="responses that each policy and endpoint gives to each prompt"
    )
    temperature: Annotated[float, Field(gt=0)] | Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=1)] = (
        Field(default=1.0, description="of sampling; a list is taken in turn by the responses to a prompt")
    )
    response_length: Annotated[int, Field(ge=1)] = Field(default=64, description="most new tokens")
    near_duplicate: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.95, description="share of words in common, in order, from which the later of two responses is dropped"
    )
    strategy: Literal["all", "random", "best-worst"] = Field(
        default="all", description="all pairs of a prompt, some of them, or the best with the worst by `score`"
    )
    pairs_per_prompt: Annotated[int, Field(ge=1)] = Field(default=1, description="strategy random: pairs of a prompt")
    score: RewardConfig | None = Field(default=None, description="strategy best-worst: a reward model or function")

    @property
    def temperatures(self) -> list[float]:
        """The temperature of each of a policy's responses to one prompt."""
        given = self.temperature if isinstance(self.temperature, list) else [self.temperature]
        return [given[sample % len(given)] for sample in range(self.per_prompt)]

    @model_validator(mode="after")
    def _score_for_best_worst(self) -> Self:
        if (self.strategy == "best-worst") != (self.score is not None):
            raise ValueError("score goes with strategy best-worst, and only with it")
        if self.score is not None and self.score.model == "rm":
            raise ValueError("score.model=rm: the rm stage comes after this one; name a folder or hub id")
        return self


class Canaries(Section):
    """Pairs with a known answer, mixed in to watch the judge."""

    pairs: list[SourceConfig] = Field(
        default=[],
        description="preference rows; default: responses of this run beside themselves with their words shuffled",
    )
    share: Annotated[float, Field(gt=0, lt=1)] = Field(default=0.02, description="canaries for each other pair")
    min_accuracy: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.7, description="share of right answers below which the run stops; a tie counts as half"
    )
    patience: Annotated[int, Field(ge=1)] = Field(default=20, description="answered canaries before it can stop")


class LabelConfig(Section):
    """Preferences from responses, sampled here or given, by judges or people; and answers rewritten for sft."""

    prompts: list[SourceConfig] = Field(default=[], description="candidates are sampled for these …")
    pairs: list[SourceConfig] = Field(
        default=[],
        description="… or pairs are given: {prompt, responses: [a, b]}, with an optional human `label` A, B or tie; or "
        "preference rows, whose choice is the human label",
    )
    max_prompts: Annotated[int, Field(ge=1)] | None = Field(default=None, description="default: every prompt")
    policies: list[ConfigPath] = Field(
        default=[], description="stages, folders or hub ids that answer; default: the sft stage's, else base_model"
    )
    endpoints: list[Endpoint] = Field(default=[], description="models behind endpoints that answer too")
    candidates: Candidates = Candidates()
    rollout: EngineConfig = Field(default=EngineConfig(), description="who samples, as in ppo.rollout")
    judge: JudgeConfig | Annotated[list[JudgeConfig], Field(min_length=1)] | None = Field(
        default=None, description="who compares; a list votes"
    )
    people: PeopleConfig | None = Field(
        default=None,
        description="people compare them on a local page; with a judge too, it labels what they left, and the report "
        "says how far it agrees with them",
    )
    revise: RevisionConfig | None = Field(
        default=None,
        description="answers to `prompts`, rewritten by principles into demonstrations.jsonl; without judge and "
        "people, the rewritten answers are preferred to the first ones",
    )
    canaries: Canaries | None = None
    min_words: Annotated[int, Field(ge=1)] = Field(
        default=1, description="words of a response below which it loses without being judged"
    )
    addressing: Literal["quarantine", "ask"] = Field(
        default="quarantine",
        description="pairs with a response that speaks to the judge: set aside, or judged like others",
    )

    max_unanswered: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.1, description="share of pairs without a usable verdict above which the run stops"
    )

    @property
    def response_length(self) -> int:
        """Most new tokens of a candidate."""
        return self.candidates.response_length

    @property
    def judges(self) -> list[JudgeConfig]:
        """The judges, one or several."""
        return self.judge if isinstance(self.judge, list) else [self.judge] if self.judge is not None else []

    @model_validator(mode="after")
    def _prompts_or_pairs(self) -> Self:
        if bool(self.prompts) == bool(self.pairs):
            raise ValueError("name either prompts, to sample candidates for, or pairs")
        if self.pairs and (self.policies or self.endpoints):
            raise ValueError("policies and endpoints answer prompts; with pairs nothing is sampled")
        if self.revise is not None and not self.prompts:
            raise ValueError("revise rewrites answers to prompts; name prompts, not pairs")
        if any(endpoint.base_url is None or endpoint.model is None for endpoint in self.endpoints):
            raise ValueError("each of endpoints needs base_url and model")
        if len({judge.on_disagreement for judge in self.judges}) > 1:
            raise ValueError("judges that vote need the same on_disagreement")
        return self
