"""What the tests of `sft`, `rm` and `dpo` share: small rows, a stage context, and rows as token ids.

Run as a script it is one stage in a process of its own, for tests that kill it: `python -m tests.supervised FOLDER`
reads FOLDER/case.json.
"""

import importlib
import json
import os
import random
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from data.encoded import EncodedDemonstration, EncodedPreference
from data.sources import SourceConfig
from pipeline.metrics import MetricsLog
from stages.core.config import SharedConfig
from stages.core.context import Interrupted, StageContext, StageResult
from stages.dpo.config import DpoConfig
from stages.rm.config import RmConfig
from stages.sft.config import SftConfig

WORDS = ["the", "cat", "sat", "on", "a", "mat", "dog", "ran", "to", "red", "house", "yes", "no", "good", "day"]


class SilentView:
    """A console that shows nothing."""

    def start(self, total_steps: int, unit: str, done: int) -> None:
        """Nothing."""

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """Nothing."""

    def say(self, message: str) -> None:
        """Nothing."""


def demonstrations(num_rows: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows with prompts and responses of 1 to 12 words."""
    rng = random.Random(seed)
    return [{"prompt": _words(rng), "response": _words(rng)} for _ in range(num_rows)]


def preferences(num_rows: int, seed: int = 0) -> list[dict[str, Any]]:
    """Pairs whose better response ends with `yes`, the worse with `no`."""
    rng = random.Random(seed)
    return [
        {"prompt": _words(rng), "chosen": f"{_words(rng)} yes", "rejected": f"{_words(rng)} no"}
        for _ in range(num_rows)
    ]


def _words(rng: random.Random) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(1, 12)))


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """The rows as JSONL."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def token_demonstrations(num_rows: int, seed: int = 0) -> list[EncodedDemonstration]:
    """Rows of random token ids, prompts and responses of 1 to 12 tokens."""
    rng = random.Random(seed)
    rows = []
    for number in range(num_rows):
        prompt, response = (rng.choices(range(3, 300), k=rng.randint(1, 12)) for _ in range(2))
        mask = [False] * len(prompt) + [True] * len(response)
        rows.append(EncodedDemonstration(prompt + response, mask, f"rows.jsonl:{number + 1}"))
    return rows


def token_preferences(num_rows: int, seed: int = 0) -> list[EncodedPreference]:
    """Pairs of random token ids."""
    rng = random.Random(seed)
    rows = []
    for number in range(num_rows):
        prompt, chosen, rejected = (rng.choices(range(3, 300), k=rng.randint(1, 12)) for _ in range(3))
        rows.append(
            EncodedPreference(prompt + chosen, prompt + rejected, len(prompt), origin=f"pairs.jsonl:{number + 1}")
        )
    return rows


def stage_context(
    folder: Path,
    *,
    stage: str,
    source: str | Path,
    data: Path,
    shared: Mapping[str, Any] | None = None,
    section: Mapping[str, Any] | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> StageContext[Any]:
    """The context that `pipeline` would hand to `sft`, `rm` or `dpo`, writing below `folder`."""
    out = folder / stage
    out.mkdir(parents=True, exist_ok=True)
    kind = {"sft": SftConfig, "rm": RmConfig, "dpo": DpoConfig}[stage]
    return StageContext(
        stage=stage,
        out=out,
        run_folder=folder,
        config_folder=None,
        shared=SharedConfig(base_model=str(source), **(shared or {})),
        config=kind(data=[SourceConfig(path=str(data))], **(section or {})),
        inputs={"base" if stage == "sft" else "policy": str(source)},
        key="key",
        metrics=MetricsLog(out, view=SilentView()),
        should_stop=should_stop,
    )


def run_stage(context: StageContext[Any]) -> StageResult:
    """The stage of that name, run."""
    return importlib.import_module(f"stages.{context.stage}.stage").run(context)


def metrics_lines(context: StageContext[Any]) -> list[dict[str, Any]]:
    """What the stage wrote to metrics.jsonl."""
    return [json.loads(line) for line in (context.out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def main(folder: Path) -> int:
    """Runs the case in `folder`; 75 where it stopped with a checkpoint.

    `die_after` kills the process (-9) after that many steps of its own, `die_in_save` within that checkpoint.
    """
    import torch

    from stages.core import checkpoints

    torch.set_num_threads(1)
    case = json.loads((folder / "case.json").read_text(encoding="utf-8"))
    die_after, die_in_save = case.pop("die_after", None), case.pop("die_in_save", None)
    data = Path(case.pop("data"))
    counts = {"steps": 0, "saves": 0}
    seal = checkpoints.seal_checkpoint

    def should_stop() -> bool:
        counts["steps"] += 1
        if counts["steps"] == die_after:
            os.kill(os.getpid(), 9)
        return False

    def seal_or_die(path: Path, *, step: int, key: str) -> None:
        counts["saves"] += 1
        if counts["saves"] == die_in_save:
            os.kill(os.getpid(), 9)
        seal(path, step=step, key=key)

    checkpoints.seal_checkpoint = seal_or_die
    context = stage_context(folder, data=data, should_stop=should_stop, **case)
    try:
        run_stage(context)
    except Interrupted:
        return 75
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
