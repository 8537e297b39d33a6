"""Our packed SFT step against TRL's own, padded one."""

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

from stages.core.supervised_run import trl_options
from stages.sft.stage import build_trainer
from stages.sft.trainer import SftTrainer, measure
from tests.parity.steps import assert_same_step, first_step, supervised_run
from tests.supervised import stage_context, token_demonstrations
from tests.tiny import tiny_model_folder

ROWS = token_demonstrations(8)
FULL = {"method": "full"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder(tmp_path_factory.mktemp("base"))


def our_trainer(
    folder: Path, base: Path, *, packing: bool = True, tuning: dict[str, Any] = FULL, **section: Any
) -> SftTrainer:
    context = stage_context(
        folder,
        stage="sft",
        source=base,
        data=folder,
        shared={"packing": packing, "tuning": tuning},
        section={"batch_size": 8, "warmup": 0.0, "learning_rate": 0.01, **section},
    )
    return build_trainer(context, supervised_run(context, ROWS, measure))


def stock_trainer(folder: Path, base: Path, ours: SftTrainer) -> SFTTrainer:
    """TRL's trainer on the same rows in the same order, as it pads them."""
    rows = [ROWS[row] for row in ours.run.order]
    labels = [
        [token if learn else -100 for token, learn in zip(row.tokens, row.loss_mask, strict=True)] for row in rows
    ]
    return SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(base),
        args=SFTConfig(
            **trl_options(ours.run.context.config, ours.run.context.shared, folder=folder, steps=ours.run.steps)
        ),
        train_dataset=Dataset.from_dict({"input_ids": [row.tokens for row in rows], "labels": labels}),
        processing_class=ours.run.encoder.tokenizer,
    )


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("microbatch_size", [8, 2])
def test_the_first_step_is_trls(tmp_path: Path, base: Path, packing: bool, microbatch_size: int) -> None:
    ours = our_trainer(tmp_path, base, packing=packing, microbatch_size=microbatch_size)
    theirs = stock_trainer(tmp_path, base, ours)
    assert_same_step(first_step(ours), first_step(theirs))


def test_three_epochs_of_training_are_trls(tmp_path: Path, base: Path) -> None:
    ours = our_trainer(tmp_path, base, batch_size=4, microbatch_size=2, epochs=3, learning_rate=1e-3)
    theirs = stock_trainer(tmp_path, base, ours)
    ours.train()
    theirs.train()
    start = dict(AutoModelForCausalLM.from_pretrained(base).named_parameters())
    trained = dict(theirs.model.named_parameters())
    for name, value in ours.model.named_parameters():
        moved = (trained[name] - start[name]).abs().max()
        assert moved > 1e-3
        # AdamW's first steps are signs of gradients: where one is about 0, rounding decides which. Mean, not maximum.
        assert (value - trained[name]).abs().mean() < 1e-3 * moved


@pytest.mark.parametrize("tuning", [FULL, {"method": "lora", "rank": 4, "alpha": 8}], ids=["full", "lora"])
def test_accumulation_does_not_change_the_step(tmp_path: Path, base: Path, tuning: dict[str, Any]) -> None:
    whole = our_trainer(tmp_path, base, tuning=tuning, microbatch_size=8)
    single = our_trainer(tmp_path, base, tuning=tuning, microbatch_size=1)
    assert_same_step(first_step(single), first_step(whole))
