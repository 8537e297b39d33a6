"""Where everybody is, and how far annotators agree with each other and with themselves."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import combinations
from typing import Any

from stages.core.judge.agreement import agreement
from stages.label.people.desk import Answer, Desk

Label = tuple[str, float]  # the pair, and how much its first answer is preferred


def overview(desk: Desk) -> dict[str, Any]:
    """Per annotator the answers, skips and agreement of repeats; per two annotators the agreement on pairs of both.

    Agreement is on first, second or equal. A pair shown twice counts between annotators by its first showing.
    """
    answers = desk.answers()
    annotators = [{"name": name, **_of_one(given)} for name, given in answers.items()]
    between: list[dict[str, Any]] = []
    for one, other in combinations(answers, 2):
        mine, theirs = (dict(_labels(answers[name], showing=1)) for name in (one, other))
        both = [(mine[pair], theirs[pair]) for pair in mine if pair in theirs]
        if both:
            between.append({"names": [one, other], **asdict(agreement(both))})
    return {
        "pairs": desk.num_pairs,
        "finished_pairs": desk.finished_pairs(),
        "annotators": annotators,
        "between": between,
    }


def overview_notes(seen: Mapping[str, Any]) -> list[str]:
    """The overview in words."""
    notes = [f"{seen['finished_pairs']} of {seen['pairs']} pairs labelled by as many people as asked for."]
    for one in seen["annotators"]:
        again = f", {one['same']:.0%} of {one['repeats']} repeats alike" if one["repeats"] else ""
        notes.append(f"{one['name']}: {one['answered']} answers, {one['skipped']} skipped{again}.")
    for two in seen["between"]:
        kappa = "" if two["kappa"] is None else f", kappa {two['kappa']:.2f} ({two['low']:.2f} to {two['high']:.2f})"
        notes.append(f"{' and '.join(two['names'])}: {two['share']:.0%} of {two['count']} pairs alike{kappa}.")
    return notes


def _of_one(answers: Sequence[Answer]) -> dict[str, Any]:
    """How much one annotator answered and skipped, and how often a repeat got the verdict of the first showing."""
    first = dict(_labels(answers, showing=1))
    repeats = [(first[pair], again) for pair, again in _labels(answers, showing=2) if pair in first]
    skipped = sum(answer.skipped for answer in answers)
    within = agreement(repeats)
    same = within.share if repeats else None
    return {"answered": len(answers) - skipped, "skipped": skipped, "repeats": len(repeats), "same": same}


def _labels(answers: Sequence[Answer], *, showing: int) -> list[Label]:
    found = [
        (answer.task.pair.id, answer.task.for_first(answer.verdict))
        for answer in answers
        if answer.task.showing == showing
    ]
    return [(pair, label) for pair, label in found if label is not None]
