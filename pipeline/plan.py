"""Everything short of training: what each stage would read, do and take, and whether it would run at all."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from data.errors import UserError
from pipeline.engines import judge_problems, stage_engine
from pipeline.inputs import Run, missing_inputs, stage_facts, stage_inputs
from pipeline.plan_batches import ppo_arithmetic, supervised_arithmetic
from pipeline.plan_choices import Choice, Place, stage_choices, stage_time
from pipeline.plan_data import DataPlan, check_data, missing_sources, unbuilt_sources
from pipeline.plan_label import given_pairs, label_arithmetic
from pipeline.plan_memory import memory_estimate
from pipeline.plan_time import Seconds
from pipeline.state import Resume, decide


@dataclass(frozen=True)
class StagePlan:
    """What a launch would do about one stage; `memory` is bytes by "role: part", or why there is no estimate."""

    stage: str
    action: str
    why: str
    data: DataPlan
    batches: list[str]
    memory: dict[str, int] | str
    engine: str = ""  # that would sample, and where; empty: the stage samples nothing
    problems: list[str] = field(default_factory=list[str])
    seconds: Seconds | None = None  # of one step or update, where a device is named
    choices: list[Choice] = field(default_factory=list[Choice])  # strategies and what each would take


def make_plan(run: Run, names: Sequence[str], *, resume: Resume, place: Place | None = None) -> list[StagePlan]:
    """A plan for each named stage, in order. Reads configs, tokenizers and rows; no weights; writes nothing."""
    plans: list[StagePlan] = []
    for stage in names:
        changing = [plan.stage for plan in plans if plan.action != "skip"]
        plans.append(_plan_stage(run, stage, changing=changing, resume=resume, place=place or Place()))
    return plans


def plan_data(plans: Sequence[StagePlan], run: Run) -> dict[str, Any]:
    """The plan as data, for machines."""
    return {"out": str(run.folder), "stages": [asdict(plan) for plan in plans]}


def _plan_stage(run: Run, stage: str, *, changing: Sequence[str], resume: Resume, place: Place) -> StagePlan:
    problems: list[str] = []
    action, why = "build", ""
    try:
        action, why = _decision(run, stage, changing=changing, resume=resume)
    except UserError as error:
        problems += error.problems
        why = "see the errors"
    data = DataPlan(unchecked="reads no rows")
    try:
        if stage != "toy":
            pairs = run.config.label if stage == "label" and run.config.label and run.config.label.pairs else None
            data = given_pairs(run, pairs) if pairs and not unbuilt_sources(run, stage) else check_data(run, stage)
            problems += data.problems
    except UserError as error:
        problems += [problem for problem in error.problems if problem not in problems]
        data = DataPlan(unchecked="see the errors")
    engine = stage_engine(run, stage)
    if engine is not None:
        problems += engine.problems
    problems += judge_problems(run, stage)
    spread = place.spread(run.config.distributed.strategy, run.config.distributed.offload)
    return StagePlan(
        stage=stage,
        action=action,
        why=why,
        data=data,
        batches=_batches(run, stage, data, place.ranks),
        memory=memory_estimate(run, stage, data.longest, spread) if stage != "toy" else "less than 1 GB",
        engine=engine.text if engine is not None else "",
        problems=problems,
        seconds=stage_time(run, stage, data.mean, place, spread),
        choices=stage_choices(run, stage, (data.longest, data.mean), place),
    )


def _decision(run: Run, stage: str, *, changing: Sequence[str], resume: Resume) -> tuple[str, str]:
    """skip, resume or build, and why; a stage whose input is yet to be built or rebuilt is built after it."""
    inputs = stage_inputs(run, stage)
    missing = missing_inputs(run, inputs, building=changing) + missing_sources(run, stage, building=changing)
    if missing:
        raise UserError(*missing)
    after = {name for name in changing if str(run.stage_folder(name)) in inputs.values()}
    after.update(unbuilt_sources(run, stage))
    if stage != "toy":
        after.update(name for name in changing if name == "toy" and run.config.base_model == "stage:toy")
    if after:
        return "build", f"after {', '.join(sorted(after))}"
    decision = decide(run.stage_folder(stage), stage_facts(run, stage), resume=resume)
    return decision.action, decision.why


def _batches(run: Run, stage: str, data: DataPlan, ranks: int) -> list[str]:
    config = run.config
    if stage == "ppo" and config.ppo is not None:
        return ppo_arithmetic(config.ppo, ranks)
    if stage == "label" and config.label is not None:
        return label_arithmetic(config.label, data.rows.get("train"))
    section = config.supervised(stage)
    return supervised_arithmetic(section, data.rows.get("train"), ranks) if section is not None else []
