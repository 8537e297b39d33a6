"""A judge in a config: who is asked, what, how fast, and for how much. Imports no torch."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import yaml
from pydantic import BeforeValidator, Field, ValidationInfo, field_validator, model_validator

from data.paths import ConfigPath, absolute_path
from stages.core.config import Section

Mode = Literal["pairwise", "pointwise"]
Disagreement = Literal["tie", "soft", "drop"]

DEFAULT_RUBRIC = (
    "Prefer the response that a knowledgeable and honest person would be better served by: it does what was asked, "
    "states nothing false, leaves out nothing that matters, and adds nothing that was not asked for."
)
_ADDRESS = re.compile(r"https?://[^/\s:@?#]+(:\d{1,5})?(/[^\s@?#]*)?")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def missing_key(variable: str | None) -> str | None:
    """What is wrong with the environment variable that a config names for a key, in one line; None: nothing."""
    if variable is None or os.environ.get(variable):
        return None
    return f"api_key_env={variable}: this environment variable is not set; set it to the endpoint's key"


def _principles(value: Any, info: ValidationInfo) -> Any:
    """The principles in a YAML file where one is named: the resolved config holds them, and its key follows them."""
    if not isinstance(value, str):
        return value
    folders: Sequence[Path] = (info.context or {}).get("folders", ())
    path = Path(absolute_path(value, folders))
    if not path.is_file():
        raise ValueError("no such file; give a YAML file with a list of principles, or the list itself")
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        raise ValueError(f"{path} cannot be read as YAML; it should be a list of principles") from None


Principles = Annotated[list[Annotated[str, Field(min_length=1)]], BeforeValidator(_principles)]


class Price(Section):
    """What a judge's tokens cost, in US dollars per million."""

    input: Annotated[float, Field(ge=0)]
    output: Annotated[float, Field(ge=0)]


class Endpoint(Section):
    """A model behind an OpenAI-compatible /chat/completions, and how fast it may be asked."""

    # How an endpoint is reached and paid, which changes no answer.
    operational: ClassVar[tuple[str, ...]] = (
        *("base_url", "api_key_env", "max_concurrency", "requests_per_minute", "tokens_per_minute"),
        *("timeout_s", "attempts", "backoff_s", "price", "max_cost", "local"),  # which is an input
    )

    base_url: str | None = Field(
        default=None, description="address of an OpenAI-compatible server, up to and with /v1: http://127.0.0.1:8000/v1"
    )
    model: str | None = Field(default=None, description="the model's name at base_url")
    api_key_env: str | None = Field(
        default=None, description="name of the environment variable that holds the key; never the key itself"
    )
    temperature: Annotated[float, Field(ge=0)] = 0.0
    max_tokens: Annotated[int, Field(ge=1)] = Field(default=256, description="most tokens of one answer")
    max_concurrency: Annotated[int, Field(ge=1)] = Field(default=8, description="most calls at a time")
    requests_per_minute: Annotated[int, Field(ge=1)] | None = None
    tokens_per_minute: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="of questions and answers; an open call counts with the most that it can take"
    )
    timeout_s: Annotated[float, Field(gt=0)] = Field(default=60.0, description="seconds for one whole answer")
    attempts: Annotated[int, Field(ge=1)] = Field(
        default=8, description="times that a question is put before it is quarantined; being told to wait is none"
    )
    backoff_s: Annotated[float, Field(gt=0)] = Field(
        default=1.0, description="seconds before the second attempt, doubled each time up to 60, drawn from half to all"
    )
    price: Price | None = Field(default=None, description="US dollars per million tokens, for the cost in the report")
    max_cost: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="US dollars after which the run stops; open calls count with the most they can cost"
    )

    @property
    def has_rates(self) -> bool:
        """Whether anything is limited per minute."""
        return self.requests_per_minute is not None or self.tokens_per_minute is not None

    @field_validator("base_url")
    @classmethod
    def _is_address(cls, value: str | None) -> str | None:
        if value is not None and not _ADDRESS.fullmatch(value):
            raise ValueError("not an address without user, query or fragment; use http(s)://host:port/v1")
        return value

    @field_validator("api_key_env")
    @classmethod
    def _is_variable(cls, value: str | None) -> str | None:
        if value is not None and not _VARIABLE.fullmatch(value):
            raise ValueError("not the name of an environment variable; put the key in one, and its name here")
        return value

    @model_validator(mode="after")
    def _price_for_cap(self) -> Self:
        if self.max_cost is not None and self.price is None:
            raise ValueError("max_cost needs price: {input: …, output: …}, in US dollars per million tokens")
        return self


class ToyJudge(Section):
    """The built-in judge of the toy world: knows the true quality, and errs as it is told to."""

    noise: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.1, description="share of its verdicts turned around; the same in both orders"
    )
    position_bias: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.1, description="share of its verdicts that name the first response whatever it is"
    )
    sharpness: Annotated[float, Field(gt=0)] = Field(
        default=10.0, description="prefers by Bradley-Terry on sharpness x the difference of true quality"
    )


class JudgeConfig(Endpoint):
    """One judge: an endpoint, a local model, or the toy world's own."""

    local: ConfigPath | None = Field(
        default=None,
        description="folder, hub id or stage: of a model that judges in this process; its preference is read from the "
        "log-probabilities of the labels A and B (Lee et al. 2023, arXiv 2309.00267)",
    )
    toy: ToyJudge | None = Field(
        default=None, description="the toy world's judge, served over HTTP on this machine while the stage runs"
    )
    mode: Mode = Field(default="pairwise", description="pairwise: A, B or tie; pointwise: 1 to 10 for each response")
    both_orders: bool = Field(default=True, description="ask twice, with the responses swapped")
    on_disagreement: Disagreement = Field(
        default="tie",
        description="where the two orders, or the judges, do not agree: p_chosen 0.5, the mean, or no label",
    )
    rubric: Annotated[str, Field(min_length=1)] = Field(default=DEFAULT_RUBRIC, description="what better means")
    constitution: Principles = Field(
        default=[], description="principles, or a YAML file that lists them (Bai et al. 2022, arXiv 2212.08073)"
    )
    principles_per_pair: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="principles drawn for each pair, the same in both orders; default: all of them"
    )
    reasoning: bool = Field(default=False, description="ask for reasons before the verdict")
    constrained: bool = Field(default=True, description="send response_format json_schema; false where it is refused")

    @property
    def name(self) -> str:
        """What the judge is called in sources and reports."""
        return self.model or self.local or "toy"

    @property
    def source(self) -> str:
        """Its name in the ledger and in preferences.jsonl."""
        return f"judge:{self.name}"

    @model_validator(mode="after")
    def _one_backend(self) -> Self:
        named = [name for name in ("base_url", "local", "toy") if getattr(self, name) is not None]
        if len(named) != 1:
            raise ValueError(f"name exactly one of base_url, local and toy, not {' and '.join(named) or 'none'}")
        if (self.base_url is not None) != (self.model is not None):
            raise ValueError("base_url and model go together: the address, and the model's name there")
        if self.local is not None and (self.mode == "pointwise" or self.reasoning):
            raise ValueError("local reads A and B off one position; it takes neither mode: pointwise nor reasoning")
        if self.principles_per_pair is not None and self.principles_per_pair > len(self.constitution):
            raise ValueError(
                f"principles_per_pair={self.principles_per_pair} of {len(self.constitution)} in constitution; "
                "add principles or lower it"
            )
        return self
