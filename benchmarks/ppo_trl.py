"""TRL's PPOTrainer on the shared workload, its phases timed by wrapping the functions it calls.

Run as a worker with TRL 1.12 first on the path: `python -m benchmarks.ppo_trl SPEC RESULT`.
Legend: B sequences, S prompt and response, R response.
"""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import trl
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel, TrainerCallback
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

from benchmarks import text_reward
from benchmarks.common import clock, measure_peaks, read_spec, resident_peak, write_result
from benchmarks.workload import read_prompts, read_tokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Stopwatch:
    """Marks where TRL's phases begin, and reads tokens and values as they pass by.

    rollout: from `batch_generation` to the first forward pass behind it (the reference's); scoring: to the whitening of
    advantages, the last step before the epochs; update: to the log of the update's metrics; other: to the next update.
    """

    def __init__(self, pad: int, eos: int) -> None:
        self.pad, self.eos = pad, eos
        self.updates: list[dict[str, float]] = []
        self.context_length = 0
        self._now: dict[str, float] = {}
        self._marks: dict[str, float] = {}
        self._values_BR = torch.empty(0)

    def install(self) -> None:
        """Puts itself around the functions that PPOTrainer looks up in its module."""
        for name, around in [
            ("batch_generation", self._generation),
            ("forward", self._forward),
            ("get_reward", self._reward),
            ("masked_whiten", self._whiten),
        ]:
            setattr(ppo_trainer, name, around(getattr(ppo_trainer, name)))

    def _generation(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        def generate(model: nn.Module, queries_BP: Tensor, *rest: Any) -> Any:
            self.close_update()
            self.context_length = queries_BP.shape[1]
            self._marks = {"begin": clock()}
            self._now = {"cpu_began": time.process_time(), "prompt_tokens": float((queries_BP != self.pad).sum())}
            tokens_BS, logits = inner(model, queries_BP, *rest)
            self._check_ends(tokens_BS[:, self.context_length :])
            return tokens_BS, logits

        return generate

    def _check_ends(self, tokens_BR: Tensor) -> None:
        """Counts responses that ended, and what stands behind their end: it must be padding."""
        ended_BR = (tokens_BR == self.eos).cumsum(1) > 0
        behind_BR = ended_BR.roll(1, 1)
        behind_BR[:, 0] = False
        stray = int((tokens_BR[behind_BR] != self.pad).sum())
        self._now |= {"eos_fraction": float(ended_BR[:, -1].float().mean()), "tokens_behind_eos": float(stray)}

    def _forward(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any) -> Any:
            self._marks.setdefault("scoring", clock())
            return inner(*args)

        return forward

    def _reward(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        def get_reward(model: nn.Module, tokens_BS: Tensor, pad: int, context_length: int) -> Any:
            found = inner(model, tokens_BS, pad, context_length)
            if model is self.value_model:
                self._values_BR = torch.cat([self._values_BR, found[0][:, context_length - 1 : -1, 0].float()])
            return found

        return get_reward

    def _whiten(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        def whiten(advantages_BR: Tensor, mask_BR: Tensor, *rest: Any, **more: Any) -> Tensor:
            whitened_BR = inner(advantages_BR, mask_BR, *rest, **more)
            # Returns are advantages + values, so what the values leave unexplained are the advantages themselves.
            advantages_M, values_M = advantages_BR[mask_BR].float(), self._values_BR[mask_BR]
            explained = 1 - advantages_M.var() / (advantages_M + values_M).var()
            self._now |= {"response_tokens": float(mask_BR.sum()), "explained_variance": float(explained)}
            self._marks["update"] = clock()
            return whitened_BR

        return whiten

    def logged(self, figures: Mapping[str, float]) -> None:
        """The update's metrics have come: its epochs are over."""
        self._marks["over"] = clock()
        self._now |= {"score": figures["objective/scores"], "kl": figures["objective/kl"]}

    def close_update(self) -> None:
        """Files the update that the marks describe, where there is one."""
        if "over" in self._marks:
            end, marks, now = clock(), self._marks, self._now
            cpu = time.process_time() - now.pop("cpu_began")
            phases = {
                "rollout": marks["scoring"] - marks["begin"],
                "scoring": marks["update"] - marks["scoring"],
                "update": marks["over"] - marks["update"],
                "other": end - marks["over"],
            }
            self.updates.append({**phases, "total": end - marks["begin"], "cpu": cpu, **now})
        self._marks, self._values_BR = {}, torch.empty(0)


class Listener(TrainerCallback):
    """Hands TRL's logged metrics to the stopwatch."""

    def __init__(self, stopwatch: Stopwatch) -> None:
        self.stopwatch = stopwatch

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, float] | None = None, **rest: Any) -> None:
        """Called by TRL once an update."""
        if logs and "objective/scores" in logs:
            self.stopwatch.logged(logs)


class TextReward(nn.Module):
    """`text_reward.score` behind the two attributes that TRL asks of a reward model."""

    base_model_prefix = "backbone"

    def __init__(self, tokenizer: Any, stopwatch: Stopwatch) -> None:
        super().__init__()
        self.tokenizer, self.stopwatch = tokenizer, stopwatch
        self.score = nn.Identity()

    def backbone(self, input_ids: Tensor, attention_mask: Tensor, **unused: Any) -> SimpleNamespace:
        """The score of each row's response, at every position, where hidden states are looked for."""
        start = self.stopwatch.context_length
        rows = zip(input_ids[:, start:], attention_mask[:, start:].bool(), strict=True)
        texts = [self.tokenizer.decode(tokens_R[mask_R], skip_special_tokens=True) for tokens_R, mask_R in rows]
        score_B = torch.tensor(text_reward.score(texts, texts, texts), device=input_ids.device)
        return SimpleNamespace(hidden_states=[score_B[:, None, None].expand(*input_ids.shape, 1)])


def lora(spec: Mapping[str, Any], task: str) -> LoraConfig:
    """The adapters of our arms, in peft's words."""
    return LoraConfig(
        r=spec["rank"],
        lora_alpha=2 * spec["rank"],
        lora_dropout=0.0,
        target_modules="all-linear",
        task_type=task,
        modules_to_save=["score"] if task == "SEQ_CLS" else None,
    )


def value_model(spec: Mapping[str, Any], dtype: torch.dtype) -> PreTrainedModel:
    """A critic that starts as the reward model; from the policy with a zero head where the reward is a function."""
    folder = Path(spec["folder"])
    source = folder / ("reward-full" if spec["reward"] == "model" else "policy")
    model = AutoModelForSequenceClassification.from_pretrained(source, num_labels=1, dtype=dtype)
    if spec["reward"] == "function":
        nn.init.zeros_(model.score.weight)
    return get_peft_model(model, lora(spec, "SEQ_CLS")) if spec["arm"]["lora_critic"] else model


def options(spec: Mapping[str, Any]) -> PPOConfig:
    """What the spec fixes for both contestants; TRL's other defaults equal ours or are set to ours.

    `per_device_train_batch_size` is the whole batch and accumulation 1: otherwise accelerate would step the optimizer
    once an epoch instead of once a minibatch. A minibatch is then one forward pass, as with our token budget.
    """
    return PPOConfig(
        output_dir=str(Path.cwd() / "trl"),
        seed=spec["seed"],
        per_device_train_batch_size=spec["batch"],
        gradient_accumulation_steps=1,
        num_mini_batches=spec["batch"] // spec["minibatch"],
        local_rollout_forward_batch_size=spec["batch"],
        total_episodes=spec["batch"] * spec["updates"],
        num_ppo_epochs=spec["epochs"],
        response_length=spec["response_length"],
        temperature=1.0,
        stop_token="eos",
        kl_coef=spec["kl_coef"],
        learning_rate=spec["learning_rate"],
        lr_scheduler_type="constant",
        adam_epsilon=1e-5,
        weight_decay=0.0,
        bf16=False,
        gradient_checkpointing=False,
        num_sample_generations=0,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_steps=1,
    )


def build(spec: Mapping[str, Any], stopwatch: Stopwatch) -> PPOTrainer:
    """The trainer with its four models."""
    folder, dtype = Path(spec["folder"]), DTYPES[spec["arm"]["dtype"]]
    tokenizer = read_tokenizer(folder / "policy")
    reward: nn.Module = TextReward(tokenizer, stopwatch)
    if spec["reward"] == "model":
        reward = AutoModelForSequenceClassification.from_pretrained(folder / "reward-full", num_labels=1, dtype=dtype)
    stopwatch.value_model = value_model(spec, dtype)
    rows = Dataset.from_list([{"input_ids": row["tokens"]} for row in read_prompts(folder)])
    return PPOTrainer(
        args=options(spec),
        processing_class=tokenizer,
        model=AutoModelForCausalLM.from_pretrained(folder / "policy", dtype=dtype),
        ref_model=None,
        reward_model=reward,
        value_model=stopwatch.value_model,
        train_dataset=rows,
        eval_dataset=rows.select([0]),
        peft_config=lora(spec, "CAUSAL_LM") if spec["tuning"] == "lora" else None,
        callbacks=[Listener(stopwatch)],
    )


def measure(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Trains; the updates, memory and the machine's peaks."""
    assert trl.__version__ == "1.12.0", f"compares with TRL 1.12.0, found {trl.__version__}"
    torch.set_num_threads(spec["threads"])
    libraries = resident_peak()
    tokenizer = read_tokenizer(Path(spec["folder"]) / "policy")
    stopwatch = Stopwatch(tokenizer.pad_token_id, tokenizer.eos_token_id)
    stopwatch.install()
    began = clock()
    trainer = build(spec, stopwatch)
    trainer.train()
    stopwatch.close_update()
    return {
        "updates": stopwatch.updates,
        "seconds": clock() - began,
        "peak_bytes": resident_peak(),
        "libraries_bytes": libraries,
        "mixed_precision": str(trainer.accelerator.mixed_precision),
        "peaks": measure_peaks(),
    }


if __name__ == "__main__":
    write_result(measure(read_spec()))
