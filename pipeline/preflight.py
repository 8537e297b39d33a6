"""What is known to be missing before the first stage begins: no chain trains for hours to find a mistyped path."""

from collections.abc import Sequence

from data.errors import UserError
from data.paths import STAGE_PREFIX
from data.sources import source_files
from pipeline.engines import judge_problems, stage_engine
from pipeline.inputs import Run, missing_inputs, stage_inputs
from pipeline.plan_data import missing_sources, stage_sources


def check_present(run: Run, stages: Sequence[str]) -> None:
    """Raises UserError naming every data file, model, stage, reward function and engine that will not be there."""
    problems: dict[str, None] = {}
    for place, stage in enumerate(stages):
        earlier = stages[:place]
        problems |= dict.fromkeys(missing_inputs(run, stage_inputs(run, stage), building=earlier))
        problems |= dict.fromkeys(missing_sources(run, stage, building=earlier))
        for source in stage_sources(run, stage):
            if source.path.startswith(STAGE_PREFIX):
                continue
            try:
                source_files(source, run.folder)
            except UserError as error:
                problems |= dict.fromkeys(error.problems)
        engine = stage_engine(run, stage)
        problems |= dict.fromkeys(engine.problems if engine is not None else ())
        problems |= dict.fromkeys(judge_problems(run, stage))
    if problems:
        raise UserError(*problems)
