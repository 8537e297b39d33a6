"""Real vLLM servers for tests: a tiny policy whose weights can be moved, and engines that serve it."""

import os
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest
import torch
from torch import Tensor

from stages.core.bank import BankBuilder, PolicyBank
from stages.core.config import SharedConfig, Tuning
from stages.core.rollout.policy_files import policy_files
from stages.core.rollout.protocol import Completion, Sampling
from stages.core.rollout.server import PYTHON_VARIABLE
from stages.core.rollout.vllm import VllmEngine, VllmOptions
from stages.core.sequences import ResponseBatch
from tests.tiny import tiny_llama, tiny_tokenizer

ROOT = Path(__file__).resolve().parents[1]
PYTHON = os.environ.get(PYTHON_VARIABLE) or str(ROOT / ".venv-vllm" / "bin" / "python")
TIMEOUT = 20.0

needs_vllm = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(not Path(PYTHON).exists(), reason="run `make vllm` first"),
]

# Prompts of several lengths, two samples of each; end tokens that come up, so that responses differ in length.
PROMPTS = [[0, 11, 12, 40], [0, 7], [0, *range(60, 90)], [0, 200, 201], [0, 11, 12, 41]]
SEEDS = [[100 * place + 1, 100 * place + 2] for place in range(len(PROMPTS))]
SAMPLING = Sampling(12, 0.7, tuple(range(1, 40)))


def tiny_base(folder: Path) -> Path:
    """A random Llama with heads of 32: vLLM's CPU attention has no code for smaller ones."""
    tokenizer = tiny_tokenizer()
    tiny_llama(vocabulary=len(tokenizer), hidden=128).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tiny_bank(base: Path, method: str) -> PolicyBank:
    """A policy (and no critic) of the base that is not its reference."""
    builder = BankBuilder(SharedConfig(base_model=str(base)), device=torch.device("cpu"))
    tuning = Tuning(rank=4, alpha=8) if method == "lora" else Tuning(method="full")
    bank = builder.policy_bank(str(base), tuning, SAMPLING.temperature)
    move(bank, 0)
    return bank


@torch.no_grad()
def move(bank: PolicyBank, seed: int) -> None:
    """Changes every weight of the policy, by so much that its log-probabilities are others by tenths of a nat."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in bank.policy.parameters():
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def start_engine(bank: PolicyBank, folder: Path, **options: object) -> VllmEngine:
    """An engine on servers of our own."""
    settings: dict[str, object] = {"max_length": 64, "batch_size": 16, "timeout_s": TIMEOUT, "start_timeout_s": 300.0}
    settings |= {"python": PYTHON, "memory_gb": 0.25} | options
    return VllmEngine.start(policy_files(bank, "float32"), VllmOptions(**settings), folder)


def answers(engine: VllmEngine) -> list[Completion]:
    """What the engine answers to all of PROMPTS."""
    return [completion for group in engine.generate(PROMPTS, SAMPLING, SEEDS) for completion in group]


@torch.no_grad()
def rescored(bank: PolicyBank, completions: Sequence[Completion]) -> list[Tensor]:
    """The trainer's own log-probabilities of each response's tokens."""
    prompts = [prompt for prompt, own in zip(PROMPTS, SEEDS, strict=True) for _ in own]
    batch = ResponseBatch.of(prompts, [completion.tokens for completion in completions], torch.device("cpu"))
    return list(bank.policy_logprobs(batch).split(list(batch.lengths)))


def largest_difference(bank: PolicyBank, completions: Sequence[Completion]) -> float:
    """Between the engine's log-probability of a token and the trainer's, in nats, over all tokens."""
    theirs = [torch.tensor(completion.logprobs) for completion in completions]
    return max(float((a - b).abs().max()) for a, b in zip(theirs, rescored(bank, completions), strict=True))


def processes_of(engine: VllmEngine) -> list[psutil.Process]:
    """Every process of the engine's own servers, keepers first."""
    keepers = [psutil.Process(server.own.pid) for server in engine.servers if server.own and server.own.pid]
    return [each for keeper in keepers for each in (keeper, *keeper.children(recursive=True))]


def living(processes: Sequence[psutil.Process]) -> list[psutil.Process]:
    """Those that run still."""
    return [each for each in processes if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]
