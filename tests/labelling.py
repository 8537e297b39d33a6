"""What the tests of labelling share: pairs of known quality, configs, and the stage run by the chain, in process."""

import contextlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pipeline.chain import Launch, Outcome, run_stages
from pipeline.config import load_config
from pipeline.inputs import Run
from pipeline.state import Resume
from tests.judge_server import JudgeServer
from tests.supervised import SilentView


def pair_rows(count: int, *, ties: int = 0) -> list[dict[str, Any]]:
    """Pairs of known quality: the first `ties` of equal quality, then in turn the first and the second better."""
    rows: list[dict[str, Any]] = []
    for place in range(count):
        better, worse = (5, 5) if place < ties else (9, place % 8)
        sides = [f"Answer {place} of quality {better}.", f"Reply {place} of quality {worse}."]
        rows.append({"prompt": f"Question {place}?", "responses": sides if place % 2 else sides[::-1]})
    return rows


def write_config(folder: Path, server: JudgeServer | None, rows: list[dict[str, Any]], **label: Any) -> Path:
    """A config that judges the rows by the server; `judge` in label adds to the judge's keys."""
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(folder / "pairs.jsonl", rows)
    own = {} if server is None else {"base_url": server.base_url, "model": "scripted", "backoff_s": 0.01}
    judge = label.pop("judge", {})
    judges = [{**own, **each} for each in judge] if isinstance(judge, list) else {**own, **judge}
    config = {
        "base_model": "none",
        "trackers": [],
        "label": {"pairs": [{"path": str(folder / "pairs.jsonl")}], "judge": judges, **label},
    }
    path = folder / "config.yaml"
    path.write_text(json.dumps(config), encoding="utf-8")
    return path


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """The rows as JSON lines."""
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def label_here(
    config: Path, out: Path, *, resume: Resume = "auto", should_stop: Callable[[], bool] = lambda: False
) -> Outcome:
    """What became of the label stage, run by the chain in this process. Raises UserError, Interrupted."""
    loaded = load_config(str(config))
    launch = Launch(
        run=Run(loaded.config, loaded.folder, out),
        resume=resume,
        viewer=lambda stage: contextlib.nullcontext(SilentView()),
        say=lambda message: None,
        should_stop=should_stop,
        before_stage=lambda: None,
    )
    return run_stages(launch, ["label"])[0]


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def labels_of(out: Path) -> dict[str, tuple[str, float]]:
    """Prompt -> chosen response and p_chosen."""
    return {row["prompt"]: (row["chosen"], row["p_chosen"]) for row in rows_of(out / "label" / "preferences.jsonl")}


def figures_of(out: Path) -> Mapping[str, Any]:
    """The figures of the report."""
    return json.loads((out / "label" / "report.json").read_text(encoding="utf-8"))["figures"]
