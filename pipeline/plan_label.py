"""What the label stage would ask, and what that can cost at most; nothing is sampled and no judge is asked."""

from pipeline.inputs import Run
from pipeline.plan_data import DataPlan
from stages.core.judge.config import JudgeConfig
from stages.label.config import Candidates, LabelConfig
from stages.label.pairs import read_pairs


def given_pairs(run: Run, section: LabelConfig) -> DataPlan:
    """The account of the rows that give pairs."""
    pairs, refused = read_pairs(section.pairs, run_folder=run.folder)
    humans = sum(pair.known is not None for pair in pairs)
    read = len(pairs) + len(refused)
    problems: list[str] = []
    if len(refused) > run.config.max_refused * read:
        problems.append(f"label.pairs: {len(refused)} of {read} rows were refused, more than max_refused; mend them")
    return DataPlan(
        rows={"read": read, "refused": len(refused), "train": len(pairs), "holdout": 0},
        summary=f"{read} rows read, {len(refused)} refused; {len(pairs)} pairs, {humans} with a human label",
        refused=[f"{each.origin}: {each.reason}" for each in refused[:20]],
        problems=problems,
    )


def label_arithmetic(section: LabelConfig, rows: int | None) -> list[str]:
    """Pairs and calls, in words; `rows` are prompts or pairs, None where they are not known yet."""
    if section.max_prompts is not None:
        rows = section.max_prompts if rows is None else min(rows, section.max_prompts)
    pairs_per_row = 1 if section.pairs else most_pairs(section)
    what = "pairs" if section.pairs else f"prompts x {pairs_per_row} pairs at most"
    lines = [f"{'?' if rows is None else rows} {what}"]
    for judge in section.judges:
        calls = calls_per_pair(judge)
        total = "" if rows is None else f", {rows * pairs_per_row * calls} at most"
        lines.append(f"judge {judge.name}: {calls} {'calls' if calls > 1 else 'call'} a pair{total}")
    if section.people is not None:
        people = section.people
        lines.append(
            f"people: {', '.join(people.annotators)}; each pair to {people.overlap}, {people.repeat_share:.0%} twice"
        )
    if section.revise is not None:
        calls = section.revise.rounds * (1 + section.revise.critique)
        lines.append(
            f"{section.revise.model} rewrites each prompt's answer: {calls} {'calls' if calls > 1 else 'call'}"
        )
    return lines


def most_pairs(section: LabelConfig) -> int:
    """Pairs that a prompt's candidates can make."""
    candidates: Candidates = section.candidates
    answering = (len(section.policies) or (0 if section.endpoints else 1)) + len(section.endpoints)
    count = candidates.per_prompt * answering
    every = count * (count - 1) // 2
    if candidates.strategy == "random":
        return min(candidates.pairs_per_prompt, every)
    return min(every, 1) if candidates.strategy == "best-worst" else every


def calls_per_pair(judge: JudgeConfig) -> int:
    """Questions that a judge is asked about a pair; each is one call where none fails."""
    return 2 if judge.both_orders or judge.mode == "pointwise" else 1
