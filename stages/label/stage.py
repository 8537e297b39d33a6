"""Candidates or given pairs -> judged pairs -> preferences.jsonl, with what was refused and a report beside it."""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from data.artifacts import write_atomically
from data.errors import UserError
from data.report import DataReport
from data.rows import Preference, Refusal
from data.sources import read_source, shortened
from stages.core.context import StageContext, StageResult
from stages.core.judge.ledger import Ledger
from stages.label.candidates import collect
from stages.label.config import LabelConfig
from stages.label.endpoints import LEDGER
from stages.label.judging import Outcome, judge_pairs
from stages.label.pairs import Pair, known_pair, mixed_in, read_pairs, shuffled_canaries
from stages.label.people.labelling import ask_people
from stages.label.people.overview import overview_notes
from stages.label.report import make_report
from stages.label.revising import revise_answers, revision_figures, revision_note

SAMPLED_PAIRS = 8  # shown in samples.jsonl


def run(context: StageContext[LabelConfig]) -> StageResult:
    """Writes preferences.jsonl, quarantine.jsonl and report.json; a verdict is in the ledger as soon as it is given.

    Raises Interrupted, and UserError where nothing can be asked, the money is spent, or the judge fails its canaries;
    a later launch takes up what the ledger and `checkpoints/` hold.
    """
    started = time.perf_counter()
    context.metrics.rewind(-1)
    with Ledger(context.out / LEDGER) as ledger:
        labelled = label(context, ledger)
        causes = {each.key: each.cause for each in ledger.quarantined()}
        report = make_report(labelled.outcomes, context.config.judges, ledger, labelled.counts)
        report["figures"] |= {"call_faults": _counted(causes.values()), **labelled.figures}
        report["notes"] += labelled.notes
    judged, refused = labelled.final, labelled.refused
    write_preferences(context.out, judged)
    write_quarantine(context.out, refused, judged)
    write_atomically(context.out / "report.json", json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    context.metrics.samples(1, [_sample(outcome) for outcome in judged[:SAMPLED_PAIRS]])
    metrics = _flat(report["figures"])
    context.metrics.log(1, metrics | {"seconds": time.perf_counter() - started})
    if not metrics["labels/labelled"]:
        raise UserError(
            f"label: no pair got a label ({'; '.join(report['notes'])}); see {context.out}/quarantine.jsonl"
        )
    return StageResult("preferences", metrics=metrics, parents=context.parents())


@dataclass(frozen=True)
class Labelled:
    """What the stage found: `outcomes` as the judges gave them, with canaries; `final`, where people's go first."""

    outcomes: Sequence[Outcome]
    final: Sequence[Outcome]
    refused: Sequence[Refusal]
    counts: dict[str, int]
    figures: dict[str, Any]
    notes: list[str]


def label(context: StageContext[LabelConfig], ledger: Ledger) -> Labelled:
    """Answers rewritten where the config asks for it; pairs labelled by people, by judges, or by both."""
    config = context.config
    figures: dict[str, Any] = {}
    notes: list[str] = []
    revised = revise_answers(context, config.revise, ledger) if config.revise is not None else []
    if config.revise is not None:
        figures["revision"] = revision_figures(revised)
        notes.append(revision_note(revised))
    refused = [each.refusal() for each in revised if each.response is None]
    if config.revise is not None and not config.judges and config.people is None:
        outcomes = [each.outcome(config.revise.source) for each in revised if each.response is not None]
        return Labelled(outcomes, outcomes, refused, {"prompts": len(revised)}, figures, notes)
    pairs, unread, counts = gather(context)
    by_people: dict[str, Outcome] = {}
    if config.people is not None:
        given, seen = ask_people(context, config.people, pairs, ledger)
        figures["people"] = seen
        notes += overview_notes(seen)
        if not config.judges:
            return Labelled(given, given, [*refused, *unread], counts, figures, notes)
        by_people = {each.pair.id: each for each in given if each.label is not None and each.opinions}
        pairs = [replace(pair, known=by_people[pair.id].label) if pair.id in by_people else pair for pair in pairs]
    outcomes = judge_pairs(context, mixed_in(pairs, canaries_of(context, pairs)), ledger)
    final = [by_people.get(each.pair.id, each) for each in outcomes if not each.pair.canary]
    return Labelled(outcomes, final, [*refused, *unread], counts, figures, notes)


def gather(context: StageContext[LabelConfig]) -> tuple[list[Pair], list[Refusal], dict[str, int]]:
    """The pairs to label, each once; the rows that were refused; and counts for the report.

    Raises UserError where too many rows were refused or there is no pair.
    """
    config = context.config
    if config.pairs:
        pairs, refused = read_pairs(config.pairs, run_folder=context.run_folder)
        _check_refused(len(refused), len(pairs) + len(refused), refused, context.shared.max_refused)
        pairs = pairs[: config.max_prompts]
        counts = {"given_pairs": len(pairs)}
    else:
        sampled, report, counts = collect(context)
        pairs, refused = list({pair.id: pair for pair in sampled}.values()), report.refused
    if not pairs:
        raise UserError(f"label: no pair to label ({json.dumps(counts)}); add prompts, candidates or pairs")
    context.metrics.say(f"{len(pairs)} pairs to label")
    context.metrics.start(1, "labelling")
    return pairs, refused, counts


def _check_refused(refused: int, read: int, rows: list[Refusal], most: float) -> None:
    report = DataReport(refused=rows)
    if refused > most * read:
        shown = "; ".join(f"{each.origin}: {each.reason}" for each in report.refused[:3])
        raise UserError(
            f"label.pairs: {refused} of {read} rows were refused, more than max_refused={most}; mend the rows or the "
            f"columns, or raise max_refused. First: {shown}"
        )


def canaries_of(context: StageContext[LabelConfig], pairs: Sequence[Pair]) -> list[Pair]:
    """The canaries for these pairs; none where the config has no `canaries`."""
    config = context.config.canaries
    if config is None:
        return []
    wanted = max(1, round(config.share * len(pairs)))
    if not config.pairs:
        return shuffled_canaries(pairs, wanted, seed=context.shared.seed)
    rows = [
        row for source in config.pairs for row in read_source(Preference, source, run_folder=context.run_folder).rows
    ]
    if not rows:
        raise UserError(f"label.canaries.pairs: no rows in {', '.join(source.path for source in config.pairs)}")
    return [known_pair(row, canary=True) for row in rows[:wanted]]


def write_preferences(folder: Path, outcomes: Sequence[Outcome]) -> None:
    """One row a labelled pair, in the order of the pairs."""
    rows = [
        outcome.pair.preference(outcome.label, source=outcome.source, ledger=outcome.ledger)
        for outcome in outcomes
        if outcome.label is not None
    ]
    write_atomically(folder / "preferences.jsonl", _lines(rows))


def write_quarantine(folder: Path, refused: Sequence[Refusal], outcomes: Sequence[Outcome]) -> None:
    """The rows that were refused, and the pairs without a label, each with its cause."""
    unlabelled = [
        Refusal(outcome.pair.origin, outcome.cause, shortened(_row(outcome.pair)))
        for outcome in outcomes
        if outcome.label is None
    ]
    write_atomically(folder / "quarantine.jsonl", _lines([asdict(each) for each in [*refused, *unlabelled]]))


def _row(pair: Pair) -> dict[str, Any]:
    return {"prompt": pair.prompt, "responses": [pair.first, pair.second]}


def _lines(rows: Sequence[dict[str, Any]]) -> str:
    return "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows)


def _sample(outcome: Outcome) -> dict[str, Any]:
    first, second = outcome.pair.responses
    return {
        "prompt": outcome.pair.prompt,
        "responses": [first, second],
        "for_first": outcome.label,
        "source": outcome.source,
        "cause": outcome.cause,
    }


def _counted(causes: Any) -> dict[str, int]:
    counts: dict[str, int] = {}
    for cause in causes:
        counts[cause] = counts.get(cause, 0) + 1
    return counts


def _flat(figures: dict[str, Any]) -> dict[str, float]:
    """Figures as metrics: counts/…, labels/…, and each judge's by its name."""
    flat = {f"counts/{name}": float(value) for name, value in figures["counts"].items()}
    flat |= {f"labels/{name}": value for name, value in figures["labels"].items()}
    return flat | {f"{judge}/{name}": value for judge, own in figures["judges"].items() for name, value in own.items()}
