"""What the labelling came to: how many labels, how far the judges can be believed, and what they cost."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from stages.core.calibration import wilson_interval
from stages.core.judge.aggregate import side
from stages.core.judge.agreement import agreement
from stages.core.judge.config import JudgeConfig
from stages.core.judge.ledger import Ledger
from stages.label.judging import RULE, Opinion, Outcome, canary_points

Figures = dict[str, float]

_COUNTS = {
    *("pairs", "labelled", "by_rule", "quarantined", "abstentions", "ties", "canaries", "human_pairs"),
    *("prompt_tokens", "completion_tokens"),
}


def make_report(
    outcomes: Sequence[Outcome], judges: Sequence[JudgeConfig], ledger: Ledger, counts: Mapping[str, int]
) -> dict[str, Any]:
    """The content of report.json: title, columns, rows and notes for the table; `figures` for machines."""
    pairs = [outcome for outcome in outcomes if not outcome.pair.canary]
    labels = (
        label_figures(pairs)
        | canary_figures(outcomes)
        | human_figures([(each.pair.known, each.label) for each in pairs])
    )
    by_judge = {
        f"{place + 1}. {judge.name}" if len(judges) > 1 else judge.name: judge_figures(outcomes, place)
        | cost_figures(ledger, judge)
        for place, judge in enumerate(judges)
    }
    causes = dict(Counter(outcome.cause for outcome in pairs if outcome.cause).most_common())
    names = dict.fromkeys([*labels, *(name for own in by_judge.values() for name in own)])
    shown = [name for name in names if not name.endswith(("_low", "_high"))]  # intervals stand behind their figure
    return {
        "title": f"{labels['labelled']:.0f} of {labels['pairs']:.0f} pairs labelled",
        "columns": ["", "labels", *by_judge],
        "rows": [
            [name.replace("_", " "), *(_cell(own, name) for own in (labels, *by_judge.values()))] for name in shown
        ],
        "notes": [f"{times} pairs without a label: {cause}." for cause, times in causes.items()],
        "figures": {"counts": dict(counts), "labels": labels, "judges": by_judge, "causes": causes},
    }


def _cell(own: Figures, name: str) -> str:
    """A figure as text, whole where it is a count, with its interval where it has one."""
    if name not in own:
        return ""
    if name in _COUNTS:
        return f"{own[name]:,.0f}"
    if f"{name}_low" not in own:
        return f"{own[name]:.3f}"
    return f"{own[name]:.3f} ({own[f'{name}_low']:.3f} to {own[f'{name}_high']:.3f})"


def label_figures(pairs: Sequence[Outcome]) -> Figures:
    """Counts, the shares of ties and abstentions, and length bias: how often a label prefers the longer response."""
    labels = [outcome.label for outcome in pairs if outcome.label is not None]
    figures: Figures = {
        "pairs": float(len(pairs)),
        "labelled": float(len(labels)),
        "by_rule": float(sum(each.source.startswith(RULE) and each.label is not None for each in pairs)),
        "quarantined": float(sum(each.label is None and not each.abstained for each in pairs)),
        "abstentions": float(sum(each.abstained for each in pairs)),
        "ties": float(sum(label == 0.5 for label in labels)),
    }
    if pairs:
        figures["abstention_rate"] = figures["abstentions"] / len(pairs)
    if labels:
        figures["tie_rate"] = figures["ties"] / len(labels)
    sized = [(len(each.pair.responses[0]), len(each.pair.responses[1]), each.label) for each in pairs]
    return figures | length_bias(sized)


def length_bias(sized: Sequence[tuple[int, int, float | None]]) -> Figures:
    """The share of untied labels on responses of different length (in characters) that prefer the longer one.

    0.5 would be none, as long as longer responses are not better; with a 95 % interval.
    """
    longer = [
        float((label > 0.5) == (first > second))
        for first, second, label in sized
        if label is not None and label != 0.5 and first != second
    ]
    if not longer:
        return {}
    low, high = wilson_interval(sum(longer), len(longer))
    share = sum(longer) / len(longer)
    return {"longer_preferred": share, "longer_preferred_low": low, "longer_preferred_high": high}


def judge_figures(outcomes: Sequence[Outcome], place: int) -> Figures:
    """One judge's position bias and its agreement with the known labels."""
    answered = [outcome for outcome in outcomes if len(outcome.opinions) > place]
    opinions = [outcome.opinions[place] for outcome in answered]
    known = [(each.pair.known, each.opinions[place].label) for each in answered if not each.pair.canary]
    return position_figures(opinions) | human_figures(known)


def position_figures(opinions: Sequence[Opinion]) -> Figures:
    """`inconsistent`: the share of pairs asked in both orders whose verdicts prefer different responses, with a 95 %
    interval; `first_preferred`: the share of untied verdicts that are for what was shown first (0.5 would be none).
    """
    figures: Figures = {}
    both = [opinion.shown_first for opinion in opinions if len(opinion.shown_first) == 2]
    if both:
        changed = sum(side(first) != side(1.0 - second) for first, second in both)
        low, high = wilson_interval(changed, len(both))
        figures |= {"inconsistent": changed / len(both), "inconsistent_low": low, "inconsistent_high": high}
    untied = [each for opinion in opinions for each in opinion.shown_first if each != 0.5]
    if untied:
        figures["first_preferred"] = sum(each > 0.5 for each in untied) / len(untied)
    return figures


def human_figures(rated: Sequence[tuple[float | None, float | None]]) -> Figures:
    """Agreement of labels with those that came with the data, where both are: its share and Cohen's kappa over the
    preferred side (first, second or tie), with a 95 % interval.
    """
    both = [(side(known), side(label)) for known, label in rated if known is not None and label is not None]
    if not both:
        return {}
    found = agreement(both)
    figures: Figures = {"human_pairs": float(found.count), "human_agreement": found.share}
    if found.kappa is not None and found.low is not None and found.high is not None:
        figures |= {"human_kappa": found.kappa, "human_kappa_low": found.low, "human_kappa_high": found.high}
    return figures


def canary_figures(outcomes: Sequence[Outcome]) -> Figures:
    """How many canaries were answered, and the share known."""
    points = [canary_points(outcome) for outcome in outcomes if outcome.pair.canary and outcome.opinions]
    return {"canaries": float(len(points)), "canary_accuracy": sum(points) / len(points)} if points else {}


def cost_figures(ledger: Ledger, judge: JudgeConfig) -> Figures:
    """What the judge's answers took, usable or not, in every launch of this run."""
    names = ("prompt_tokens", "completion_tokens", *(("cost",) if judge.price is not None else ()))
    return {name: ledger.total(name, judge.source) for name in names}
