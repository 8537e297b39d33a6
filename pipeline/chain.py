"""The stage graph: what is built is skipped, what is broken stops the run, what changed is built anew."""

import contextlib
import fcntl
import importlib
import json
import shutil
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from data.artifacts import LEDGER_FILES, read_manifest, write_atomically, write_manifest
from data.errors import UserError
from pipeline.config import dump_config
from pipeline.inputs import Run, require_inputs, stage_facts, stage_inputs, stage_key
from pipeline.manifest import describe
from pipeline.metrics import MetricsLog, Silence, View
from pipeline.preflight import check_present
from pipeline.state import FACTS_FILE, Decision, Resume, decide
from pipeline.trackers import check_trackers, open_trackers
from stages.core import ranks
from stages.core.context import Interrupted, Metrics, StageContext, StageResult

_ALONE = ("toy", "label")  # too small to share, or waiting for the answers of others


class StageViewer(Protocol):
    """Makes the view of one stage; taken down when the stage ends, however it ends."""

    def __call__(self, stage: str) -> contextlib.AbstractContextManager[View]:
        """A view as a context manager."""
        ...


@dataclass(frozen=True)
class Launch:
    """One launch: which run, how to treat what is there, who is watching, and whether to stop."""

    run: Run
    resume: Resume
    viewer: StageViewer
    say: Callable[[str], None]
    should_stop: Callable[[], bool]  # the same answer on every rank; to be asked by all of them
    before_stage: Callable[[], None]  # seeds, so that a stage does not depend on which others ran in this process


@dataclass(frozen=True)
class Outcome:
    """What became of one stage."""

    stage: str
    action: Literal["skipped", "resumed", "built"]
    folder: str
    why: str
    key: str
    seconds: float = 0.0
    metrics: Mapping[str, float] = field(default_factory=dict[str, float])


def run_stages(launch: Launch, names: Sequence[str]) -> list[Outcome]:
    """Runs the named stages in order, each as its folder's state asks. Raises UserError, Interrupted.

    Every rank calls this. Rank 0 decides and writes; the others take part in what trains.
    """
    with contextlib.ExitStack() as held:
        ranks.on_main(lambda: _begin(launch, names, held))
        outcomes: list[Outcome] = []
        resume = launch.resume
        for stage in names:
            if launch.should_stop():
                raise Interrupted
            outcomes.append(_settle(launch, stage, resume))
            if outcomes[-1].action == "resumed" and resume == "must":
                resume = "auto"  # the stages after the resumed one were never begun
        return outcomes


def _begin(launch: Launch, names: Sequence[str], held: contextlib.ExitStack) -> None:
    check_trackers(launch.run.config)
    check_present(launch.run, names)
    held.enter_context(lock(launch.run.folder))


@contextlib.contextmanager
def lock(folder: Path) -> Generator[None]:
    """Holds the run folder, so that two launches cannot write one run; the system frees it when the process ends."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{folder}: another launch is writing this run; wait for it, or give another --out"
            ) from None
        yield


def _settle(launch: Launch, stage: str, resume: Resume) -> Outcome:
    """Skips, resumes or builds one stage."""
    folder = launch.run.stage_folder(stage)
    begun = time.monotonic()
    order = ranks.on_main(lambda: _order(launch, stage, resume))
    if order.decision.action == "skip":
        metrics = read_manifest(folder).metrics if ranks.current().is_main else {}
        return Outcome(stage, "skipped", str(folder), order.decision.why, order.key, metrics=metrics)
    if stage in _ALONE:
        metrics = ranks.alone(lambda: _build(launch, stage, order), Interrupted)
    else:
        metrics = _build(launch, stage, order)
    seconds = round(time.monotonic() - begun, 3)
    action = "resumed" if order.decision.action == "resume" else "built"
    if ranks.current().is_main:
        launch.say(f"{stage}: done in {seconds:.1f} s ({folder})")
    return Outcome(stage, action, str(folder), order.decision.why, order.key, seconds, metrics)


@dataclass(frozen=True)
class _Order:
    """What rank 0 says is to be done about a stage."""

    decision: Decision
    key: str
    parents: list[Path]


def _order(launch: Launch, stage: str, resume: Resume) -> _Order:
    """Rank 0's part: the decision, and a folder that is ready for it."""
    run, folder = launch.run, launch.run.stage_folder(stage)
    parents = require_inputs(run, stage)
    facts = stage_facts(run, stage)
    decision = decide(folder, facts, resume=resume)
    if decision.action == "skip":
        launch.say(f"{stage}: skipped, already built ({folder})")
    else:
        _make_room(launch, stage, decision)
        write_atomically(folder / "config.yaml", dump_config(run.config))
        write_atomically(folder / FACTS_FILE, json.dumps(facts, indent=2, sort_keys=True) + "\n")
    return _Order(decision, stage_key(facts), list(parents.values()))


def _make_room(launch: Launch, stage: str, decision: Decision) -> None:
    """Moves aside what a build must not find; what was begun but never saved is removed."""
    folder = launch.run.stage_folder(stage)
    if decision.action == "resume":
        launch.say(f"{stage}: resumes ({decision.why})")
        return
    kept = _ledger_aside(folder)
    if decision.displace:
        old = folder.with_name(f"{stage}.old")
        if old.exists():
            shutil.rmtree(old)
        folder.rename(old)
        launch.say(f"{stage}: built anew, {decision.why}; the earlier one is now {old}")
    else:
        if folder.exists():
            shutil.rmtree(folder)
        launch.say(f"{stage}: begins ({decision.why})")
    folder.mkdir(exist_ok=True)
    for file in kept:
        file.rename(folder / file.name.removeprefix(f".{stage}-"))


def _ledger_aside(folder: Path) -> list[Path]:
    """The ledger's files, moved out of a folder that is about to go; also those of a launch killed in between."""
    for name in LEDGER_FILES:
        if (folder / name).is_file():
            (folder / name).rename(folder.with_name(f".{folder.name}-{name}"))
    return [path for name in LEDGER_FILES if (path := folder.with_name(f".{folder.name}-{name}")).is_file()]


def load_stage(stage: str) -> Callable[[StageContext[Any]], StageResult]:
    """The `run` function of a stage, imported only now: it brings torch and more."""
    return importlib.import_module(f"stages.{stage}.stage").run


def _build(launch: Launch, stage: str, order: _Order) -> Mapping[str, float]:
    """Runs one stage in its folder; its metrics, once rank 0 has written the manifest, which comes last."""
    launch.before_stage()
    run, folder = launch.run, launch.run.stage_folder(stage)
    with _metrics(launch, stage) as metrics:
        context = StageContext[Any](
            stage=stage,
            out=folder,
            run_folder=run.folder,
            config_folder=run.config_folder,
            shared=run.config,
            config=getattr(run.config, stage),
            inputs=stage_inputs(run, stage),
            key=order.key,
            metrics=metrics,
            should_stop=launch.should_stop,
        )
        result = load_stage(stage)(context)
    return ranks.on_main(lambda: _publish(folder, stage, order, result))


def _publish(folder: Path, stage: str, order: _Order, result: StageResult) -> Mapping[str, float]:
    artifact = describe(folder, stage=stage, key=order.key, result=result, parents=order.parents)
    write_manifest(folder, artifact)
    return artifact.metrics


@contextlib.contextmanager
def _metrics(launch: Launch, stage: str) -> Generator[Metrics]:
    """Where the stage reports: nowhere, but on rank 0."""
    if not ranks.current().is_main:
        yield Silence()
        return
    run, folder = launch.run, launch.run.stage_folder(stage)
    trackers = open_trackers(run.config, stage, folder, run.config.model_dump(mode="json"))
    with launch.viewer(stage) as view, contextlib.closing(MetricsLog(folder, view=view, trackers=trackers)) as metrics:
        yield metrics
