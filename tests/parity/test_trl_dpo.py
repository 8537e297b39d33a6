"""Our packed DPO step against TRL's own, padded one."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer

from data.encoded import EncodedPreference
from stages.core.models import resolve_model
from stages.core.pairs import measure
from stages.core.supervised import tuning_request
from stages.core.supervised_run import trl_options
from stages.core.tuning import tuned_model
from stages.dpo.stage import build_trainer
from stages.dpo.trainer import DpoTrainer
from tests.parity.steps import assert_same_step, first_step, supervised_run
from tests.supervised import stage_context, token_preferences
from tests.tiny import tiny_adapter_folder, tiny_model_folder

ROWS = token_preferences(8)
FULL = {"method": "full"}
LORA = {"method": "lora", "rank": 4, "alpha": 8}
ROBUST = {"loss": "robust", "label_smoothing": 0.2}
STEEP = {"beta": 2.0}  # far from the reference the loss bends, and a wrong beta shows


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    """A LoRA policy as sft saves it."""
    return tiny_adapter_folder(tmp_path_factory.mktemp("policy") / "sft", base)


def our_trainer(
    folder: Path,
    source: Path,
    *,
    rows: list[EncodedPreference] = ROWS,
    packing: bool = True,
    tuning: dict[str, Any] = FULL,
    **section: Any,
) -> DpoTrainer:
    """Our trainer, its policy moved a little away from the reference."""
    context = stage_context(
        folder,
        stage="dpo",
        source=source,
        data=folder,
        shared={"packing": packing, "tuning": tuning},
        section={"batch_size": 8, **section},
    )
    trainer = build_trainer(context, supervised_run(context, rows, measure))
    move(trainer.model)
    return trainer


def move(model: Any) -> None:
    """Changes every trained weight a little, by the same amount wherever it is called."""
    for number, (_, parameter) in enumerate(sorted(model.named_parameters())):
        if parameter.requires_grad:
            parameter.data.mul_(1 + 0.02 * (number % 5 - 2)).add_(0.003 * (number % 3 - 1))


def stock_trainer(folder: Path, ours: DpoTrainer) -> DPOTrainer:
    """TRL's trainer on the same pairs in the same order, from the same weights, against the same reference."""
    rows = [ROWS[row] for row in ours.run.order]
    context = ours.run.context
    section, shared = context.config, context.shared
    columns = {
        "prompt_ids": [row.chosen[: row.prompt_length] for row in rows],
        "chosen_ids": [row.chosen[row.prompt_length :] for row in rows],
        "rejected_ids": [row.rejected[row.prompt_length :] for row in rows],
    }
    if isinstance(ours.model, PeftModel):
        model = tuned_model(resolve_model(context.inputs["policy"]), head="lm", request=tuning_request(context))
        model.base_model.model.set_attn_implementation("sdpa")
        reference = None  # TRL copies the adapter, before we move it
    else:
        model = AutoModelForCausalLM.from_pretrained(context.inputs["policy"])
        reference = copy.deepcopy(model)
    options = trl_options(section, shared, folder=folder, steps=1)
    trainer = StockTrainer(
        model=model,
        ref_model=reference,
        args=DPOConfig(**options, beta=section.beta, loss_type=[section.loss], label_smoothing=section.label_smoothing),
        train_dataset=Dataset.from_dict(columns),
        processing_class=ours.run.encoder.tokenizer,
    )
    move(trainer.model)
    return trainer


class StockTrainer(DPOTrainer):
    """TRL's trainer on rows that are tokens already."""

    def _prepare_dataset(self, dataset: Dataset, *unused: object) -> Dataset:
        return dataset


@pytest.mark.parametrize("section", [{}, STEEP, {"loss": "ipo"}, ROBUST], ids=["sigmoid", "steep", "ipo", "robust"])
@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
def test_the_first_step_is_trls(tmp_path: Path, base: Path, packing: bool, section: dict[str, Any]) -> None:
    ours = our_trainer(tmp_path, base, packing=packing, **section)
    theirs = stock_trainer(tmp_path, ours)
    assert_same_step(first_step(ours), first_step(theirs))


@pytest.mark.parametrize("section", [STEEP, {"loss": "ipo"}], ids=["steep", "ipo"])
@pytest.mark.parametrize("start", ["base", "adapter"])
def test_the_first_lora_step_is_trls(
    tmp_path: Path, base: Path, policy: Path, start: str, section: dict[str, Any]
) -> None:
    ours = our_trainer(tmp_path, base if start == "base" else policy, tuning=LORA, microbatch_size=4, **section)
    theirs = stock_trainer(tmp_path, ours)
    assert_same_step(first_step(ours), first_step(theirs))
    assert all(".default." in name for name, value in ours.model.named_parameters() if value.requires_grad)


@pytest.mark.parametrize("tuning", [FULL, LORA], ids=["full", "lora"])
def test_accumulation_does_not_change_the_step(tmp_path: Path, base: Path, tuning: dict[str, Any]) -> None:
    """Also with weights and soft labels, for which a mean of microbatch means would differ."""
    rows = [replace(row, weight=1.0 + number, p_chosen=1.0 - 0.05 * number) for number, row in enumerate(ROWS)]
    whole = our_trainer(tmp_path, base, rows=rows, tuning=tuning, microbatch_size=8)
    single = our_trainer(tmp_path, base, rows=rows, tuning=tuning, microbatch_size=1)
    assert_same_step(first_step(single), first_step(whole))
