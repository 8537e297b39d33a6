"""What a stage would read: rows counted, refused ones with reasons, lengths, and examples with their loss mask."""

import itertools
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.artifacts import MANIFEST
from data.chat import ChatEncoder, load_tokenizer
from data.encoded import EncodedDemonstration, EncodedPreference, EncodedPrompt
from data.errors import UserError
from data.paths import STAGE_PREFIX, in_run
from data.prepare import Prepared, prepare_demonstrations, prepare_preferences, prepare_prompts
from data.report import DataReport
from data.sources import SourceConfig
from pipeline.inputs import STAGES, Run, is_path, stage_inputs, why_unfinished
from pipeline.model_files import cached_file
from stages.dpo.labels import refuse_margins

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_EXAMPLES = 3
_REFUSED_SHOWN = 20
_HISTOGRAM_BARS = 8

Encoded = EncodedDemonstration | EncodedPreference | EncodedPrompt


@dataclass(frozen=True)
class Piece:
    """A stretch of an example's text, and whether the loss falls on it."""

    text: str
    trained: bool


@dataclass(frozen=True)
class DataPlan:
    """What a stage's data would come to; `unchecked` says why nothing could be counted."""

    rows: dict[str, int] = field(default_factory=dict[str, int])
    summary: str = ""
    refused: list[str] = field(default_factory=list[str])
    histogram: list[tuple[int, int, int]] = field(default_factory=list[tuple[int, int, int]])  # from, to, rows
    examples: list[list[Piece]] = field(default_factory=list[list[Piece]])
    longest: int = 0
    mean: float = 0.0  # tokens of a row
    unchecked: str = ""
    problems: list[str] = field(default_factory=list[str])


def stage_sources(run: Run, stage: str) -> list[SourceConfig]:
    """Every source of rows that a stage's section names."""
    config = run.config
    sources: list[SourceConfig] = []
    if config.eval is not None and stage == "eval":
        return [*config.eval.prompts, *config.eval.pairs]
    if (section := config.supervised(stage)) is not None:
        sources += [*section.data, *([section.holdout] if isinstance(section.holdout, SourceConfig) else [])]
    if config.label is not None and stage == "label":
        canaries = config.label.canaries.pairs if config.label.canaries is not None else []
        return [*config.label.prompts, *config.label.pairs, *canaries]
    if config.ppo is not None and stage == "ppo":
        holdout = config.ppo.holdout
        sources += [*config.ppo.prompts, *([holdout] if isinstance(holdout, SourceConfig) else [])]
        sources += config.ppo.ptx.data if config.ppo.ptx is not None else []
    return sources


def unbuilt_sources(run: Run, stage: str) -> list[str]:
    """The stages of this run that the rows come from and that are not built yet."""
    names = [source.path.removeprefix(STAGE_PREFIX) for source in stage_sources(run, stage) if _in_run(source)]
    owners = dict.fromkeys(Path(name).parts[0] for name in names)
    return [owner for owner in owners if not (run.stage_folder(owner) / MANIFEST).is_file()]


def missing_sources(run: Run, stage: str, *, building: Collection[str]) -> list[str]:
    """One line for each stage of this run that the rows come from, not built and not in `building`."""
    owners = [owner for owner in unbuilt_sources(run, stage) if owner not in building]
    return [f"{stage}: rows of stage:{owner}: {why_unfinished(run, owner)}" for owner in owners]


def _in_run(source: SourceConfig) -> bool:
    return source.path.startswith(STAGE_PREFIX)


def check_data(run: Run, stage: str) -> DataPlan:
    """What the stage's rows come to under the tokenizer it would use. Raises UserError as the stage itself would."""
    if pending := unbuilt_sources(run, stage):
        return DataPlan(unchecked=f"its rows come from stage {', '.join(pending)}, which is not built yet")
    place = tokenizer_place(run, stage)
    if place is None:
        return DataPlan(unchecked="its tokenizer comes from stage toy, which is not built yet")
    if not Path(place).is_dir() and is_path(place):
        return DataPlan(unchecked=f"there is no folder {place} to take the tokenizer from")
    if not Path(place).is_dir() and cached_file(place, "tokenizer_config.json") is None:
        return DataPlan(unchecked=f"the tokenizer of {place} is not on this disk; download it to count tokens")
    tokenizer = load_tokenizer(place, run.config.chat_template)
    encoder = ChatEncoder(tokenizer, max_length=run.config.max_length, overlong=run.config.overlong)
    plan = _data_plan(run, _prepare(run, stage, encoder), tokenizer)
    section = run.config.ppo
    if stage != "ppo" or section is None or section.ptx is None:
        return plan
    ptx = prepare_demonstrations(section.ptx.data, 0.0, encoder=encoder, run_folder=run.folder, seed=run.config.seed)
    return _with_ptx(plan, _data_plan(run, ptx, tokenizer))


def tokenizer_place(run: Run, stage: str) -> str | None:
    """The folder or hub id that the stage's tokenizer comes from; None where that is yet to be built.

    An unbuilt sft stage will hand on its base model's tokenizer.
    """
    inputs = stage_inputs(run, stage)
    value = next(iter(inputs.values()), in_run(run.config.base_model, run.folder))
    for _ in STAGES:
        folder = Path(value)
        if (folder / "weights").is_dir():
            return str(folder / "weights")
        if folder.parent != run.folder or folder.name not in ("sft", "dpo", "ppo"):
            break
        value = next(iter(stage_inputs(run, folder.name).values()), in_run(run.config.base_model, run.folder))
    return None if Path(value) == run.stage_folder("toy") else value


def _prepare(run: Run, stage: str, encoder: ChatEncoder) -> Prepared[Any]:
    config, folder = run.config, run.folder
    if stage == "sft" and config.sft is not None:
        section = config.sft
        return prepare_demonstrations(
            section.data, section.holdout, encoder=encoder, run_folder=folder, seed=config.seed
        )
    if stage == "rm" and config.rm is not None:
        section = config.rm
        return prepare_preferences(section.data, section.holdout, encoder=encoder, run_folder=folder, seed=config.seed)
    if stage == "dpo" and config.dpo is not None:
        section = config.dpo
        prepared = prepare_preferences(
            section.data, section.holdout, encoder=encoder, run_folder=folder, seed=config.seed
        )
        refuse_margins([*prepared.train, *prepared.holdout])
        return prepared
    section = {"label": config.label, "ppo": config.ppo, "eval": config.eval}[stage]
    assert section is not None
    return prepare_prompts(
        section.prompts,
        config.ppo.holdout if stage == "ppo" and config.ppo is not None else 0.0,
        encoder=encoder,
        run_folder=folder,
        seed=config.seed,
        max_prompt_tokens=max(config.max_length - section.response_length, 1),
    )


def _data_plan(run: Run, prepared: Prepared[Any], tokenizer: "PreTrainedTokenizerBase") -> DataPlan:
    report: DataReport = prepared.report
    problems: list[str] = []
    try:
        report.check_refused(run.config.max_refused)
    except UserError as error:
        problems = list(error.problems)  # told beside the counts, which show what to mend
    fit = report.fit
    return DataPlan(
        rows={
            "read": report.read,
            "refused": len(report.refused),
            "duplicates": report.duplicates,
            "overlap": report.overlap,
            "too_long": fit.dropped,
            "prompt_truncated": fit.prompt_truncated,
            "response_truncated": fit.response_truncated,
            "train": report.train,
            "holdout": report.holdout,
        },
        summary=report.summary(),
        refused=[f"{refusal.origin}: {refusal.reason}" for refusal in report.refused[:_REFUSED_SHOWN]],
        histogram=length_histogram(report.lengths),
        examples=[list(_pieces(row, tokenizer)) for row in prepared.train[:_EXAMPLES]],
        longest=max(report.lengths, default=0),
        mean=sum(report.lengths) / len(report.lengths) if report.lengths else 0.0,
        problems=problems,
    )


def _with_ptx(plan: DataPlan, ptx: DataPlan) -> DataPlan:
    """The prompts' plan with the account of the demonstrations that are mixed in."""
    return replace(
        plan,
        rows=plan.rows | {f"ptx_{name}": count for name, count in ptx.rows.items()},
        summary=f"{plan.summary}; ptx: {ptx.summary}",
        refused=plan.refused + ptx.refused,
        examples=plan.examples + ptx.examples,
        problems=plan.problems + [f"ppo.ptx: {problem}" for problem in ptx.problems],
    )


def length_histogram(lengths: Sequence[int]) -> list[tuple[int, int, int]]:
    """(from, to, rows) of equally wide ranges of token counts; the ranges cover every length once."""
    if not lengths:
        return []
    low, high = min(lengths), max(lengths)
    width = max(1, -(-(high - low + 1) // _HISTOGRAM_BARS))
    starts = range(low, high + 1, width)
    return [
        (start, min(start + width - 1, high), sum(start <= length < start + width for length in lengths))
        for start in starts
    ]


def _pieces(row: Encoded, tokenizer: "PreTrainedTokenizerBase") -> Iterator[Piece]:
    """The example's text, cut where the loss begins and ends; a pair's two sides stand one after the other."""
    if isinstance(row, EncodedDemonstration):
        yield from masked_pieces(row.tokens, row.loss_mask, tokenizer)
    elif isinstance(row, EncodedPreference):
        for name, tokens in [("chosen", row.chosen), ("rejected", row.rejected)]:
            mask = [place >= row.prompt_length for place in range(len(tokens))]
            pieces = list(masked_pieces(tokens, mask, tokenizer))
            yield from pieces if name == "chosen" else [Piece("\n   rejected: ", False), *pieces[1:]]
    else:
        yield from masked_pieces(row.tokens, [False] * len(row.tokens), tokenizer)


def masked_pieces(tokens: Sequence[int], mask: Sequence[bool], tokenizer: "PreTrainedTokenizerBase") -> Iterator[Piece]:
    """The decoded text in stretches of equal mask, special tokens included.

    Each stretch is what it adds to the text before it: decoders treat the beginning of a text differently.
    """
    end, before = 0, ""
    for trained, group in itertools.groupby(mask):
        end += len(list(group))
        text = _decoded(tokens[:end], tokenizer)
        yield Piece(text[len(before) :], trained)
        before = text


def _decoded(tokens: Sequence[int], tokenizer: "PreTrainedTokenizerBase") -> str:
    """The text of the tokens, without a character of which a cut row holds only the first bytes."""
    text = ""
    for cut in range(4):  # a character has at most four bytes
        text = str(tokenizer.decode(list(tokens[: len(tokens) - cut]), clean_up_tokenization_spaces=False))
        if not text.endswith("\ufffd"):
            break
    return text
