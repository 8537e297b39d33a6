"""What was measured, as a table for people and figures for machines."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from stages.eval.config import EvalConfig
from stages.eval.figures import Mean

KL, LENGTH, ENDED = "kl", "length", "ended"


@dataclass(frozen=True)
class Measured:
    """One policy's values, prompt by prompt: the score columns, `length`, `ended`, and `kl` where it is defined."""

    policy: str
    columns: Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class Findings:
    """Everything the stage measured; the first policy is the reference."""

    policies: Sequence[Measured]
    reward_models: Mapping[str, Mapping[str, float]] = field(default_factory=dict[str, dict[str, float]])

    @property
    def reference(self) -> Measured:
        """The first policy."""
        return self.policies[0]

    def means(self) -> dict[str, dict[str, Mean]]:
        """policy -> column -> mean."""
        return {each.policy: {name: Mean.of(values) for name, values in each.columns.items()} for each in self.policies}

    def differences(self) -> dict[str, dict[str, Mean]]:
        """`policy - reference` -> column -> mean difference, paired by prompt."""
        own = self.reference.columns
        return {
            f"{each.policy} - {self.reference.policy}": {
                name: Mean.of_difference(values, own[name]) for name, values in each.columns.items() if name != KL
            }
            for each in self.policies[1:]
        }

    def metrics(self) -> dict[str, float]:
        """The means as flat metrics: `policy/column`, `policy - reference/column`, `score/accuracy`."""
        flat = {
            f"{row}/{column}": mean.mean
            for row, means in (self.means() | self.differences()).items()
            for column, mean in means.items()
        }
        accuracies = {f"{name}/accuracy": each["accuracy"] for name, each in self.reward_models.items()}
        return flat | accuracies


def make_report(findings: Findings, config: EvalConfig) -> dict[str, Any]:
    """The content of report.json: title, columns, rows and notes for the closing table; `figures` for machines."""
    columns = [*config.scores, KL, LENGTH, ENDED]
    means, differences = findings.means(), findings.differences()
    rows = [[name, *(_cell(own, column) for column in columns)] for name, own in means.items()]
    rows += [[name, *(_cell(own, column, sign=True) for column in columns)] for name, own in differences.items()]
    count = means[findings.reference.policy][LENGTH].count
    return {
        "title": f"{' and '.join(means)} on {count} prompts",
        "columns": ["policy", *columns],
        "rows": rows,
        "notes": [
            f"± is a 95 % interval; differences are paired by prompt. kl: nats per response, from "
            f"{findings.reference.policy}; length: tokens; sampled at temperature {config.temperature:g}.",
            *_accuracy_notes(findings),
            *_budget_notes(findings, config.kl_budget),
        ],
        "figures": {
            "policies": {name: _figures(own) for name, own in means.items()},
            "differences": {name: _figures(own) for name, own in differences.items()},
            "reward_models": findings.reward_models,
        },
    }


def _cell(means: Mapping[str, Mean], column: str, *, sign: bool = False) -> str:
    return means[column].text(sign=sign) if column in means else ""


def _figures(means: Mapping[str, Mean]) -> dict[str, Any]:
    return {name: mean.figures() for name, mean in means.items()}


def _accuracy_notes(findings: Findings) -> list[str]:
    return [
        f"{name}: prefers the better response in {each['accuracy']:.1%} of {each['pairs']:.0f} pairs "
        f"(95 % interval {each['accuracy_low']:.1%} to {each['accuracy_high']:.1%})."
        for name, each in findings.reward_models.items()
    ]


def _budget_notes(findings: Findings, budget: float | None) -> list[str]:
    if budget is None:
        return []
    notes: list[str] = []
    for measured in findings.policies[1:]:
        if KL in measured.columns:
            kl = Mean.of(measured.columns[KL]).mean
            verdict = "within" if kl <= budget else "OVER"
            notes.append(f"{measured.policy}: {kl:.2f} nats per response, {verdict} the budget of {budget:g}.")
    return notes
