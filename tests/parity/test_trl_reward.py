"""Our packed reward-model step against TRL's own, padded one."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import AutoModelForSequenceClassification
from trl import RewardConfig, RewardTrainer

from data.encoded import EncodedPreference
from stages.core.pairs import measure
from stages.core.supervised_run import trl_options
from stages.rm.stage import build_trainer
from stages.rm.trainer import RmTrainer
from tests.parity.steps import assert_same_step, first_step, supervised_run
from tests.supervised import stage_context, token_preferences
from tests.tiny import tiny_model_folder

ROWS = [replace(row, margin=0.1 * number) for number, row in enumerate(token_preferences(8))]
FULL = {"method": "full"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder(tmp_path_factory.mktemp("base"))


def our_trainer(
    folder: Path,
    base: Path,
    *,
    rows: list[EncodedPreference] = ROWS,
    packing: bool = True,
    tuning: dict[str, Any] = FULL,
    **section: Any,
) -> RmTrainer:
    context = stage_context(
        folder,
        stage="rm",
        source=base,
        data=folder,
        shared={"packing": packing, "tuning": tuning},
        section={"batch_size": 8, "centering": 0.5, **section},
    )
    return build_trainer(context, supervised_run(context, rows, measure))


def stock_trainer(folder: Path, ours: RmTrainer) -> RewardTrainer:
    """TRL's trainer on the same pairs in the same order, from the same weights (head included)."""
    rows = [ROWS[row] for row in ours.run.order]
    ours.model.save_pretrained(folder / "start")
    section, shared = ours.run.context.config, ours.run.context.shared
    columns = {
        "chosen_ids": [row.chosen for row in rows],
        "rejected_ids": [row.rejected for row in rows],
        "margin": [row.margin for row in rows],
    }
    return RewardTrainer(
        model=AutoModelForSequenceClassification.from_pretrained(folder / "start"),
        args=RewardConfig(
            **trl_options(section, shared, folder=folder, steps=1), center_rewards_coefficient=section.centering
        ),
        train_dataset=Dataset.from_dict(columns),
        processing_class=ours.run.encoder.tokenizer,
    )


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("microbatch_size", [8, 2])
def test_the_first_step_is_trls(tmp_path: Path, base: Path, packing: bool, microbatch_size: int) -> None:
    ours = our_trainer(tmp_path, base, packing=packing, microbatch_size=microbatch_size)
    theirs = stock_trainer(tmp_path, ours)
    assert_same_step(first_step(ours), first_step(theirs))


@pytest.mark.parametrize("tuning", [FULL, {"method": "lora", "rank": 4, "alpha": 8}], ids=["full", "lora"])
def test_accumulation_does_not_change_the_step(tmp_path: Path, base: Path, tuning: dict[str, Any]) -> None:
    """Also with weights and soft labels, for which a mean of microbatch means would differ."""
    rows = [replace(row, weight=1.0 + number, p_chosen=1.0 - 0.05 * number) for number, row in enumerate(ROWS)]
    whole = our_trainer(tmp_path, base, rows=rows, tuning=tuning, microbatch_size=8)
    single = our_trainer(tmp_path, base, rows=rows, tuning=tuning, microbatch_size=1)
    assert_same_step(first_step(single), first_step(whole))
