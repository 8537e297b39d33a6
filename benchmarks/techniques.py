"""What each technique gives: the same work with it and without it, in alternation, in one process.

    python -m benchmarks.techniques --model stories3M-llama

A gain is the median of process seconds without, divided by that with it. The work is a pass over one batch of the
workload: an epoch of PPO's update, the scoring passes, or a rollout.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from peft.tuners.lora import Linear

from benchmarks.common import MODELS, Worker, add_common_options, machine, run_plain, spread, table
from benchmarks.workload import read_prompts, read_tokenizer
from pipeline.config import validate
from stages.core import attention, bank, blocks, decoding, lora, passes, products
from stages.core.bank import BankBuilder, PolicyBank
from stages.core.logprobs import token_logprobs_and_entropy
from stages.core.rollout import native
from stages.core.rollout.native import NativeEngine
from stages.core.rollout.protocol import Sampling
from stages.core.sequences import ResponseBatch

CPU = torch.device("cpu")
Work = Callable[[], None]


@dataclass
class Bench:
    """A bank on the workload and one batch of responses."""

    bank: PolicyBank
    prompts: list[list[int]]
    responses: list[list[int]]
    ends: tuple[int, ...]
    options: argparse.Namespace

    @classmethod
    def open(cls, folder: Path, options: argparse.Namespace, dtype: str, critic: str) -> "Bench":
        """The bank that PPO builds, and responses of its policy."""
        tuning = {"method": "lora", "rank": options.rank, "alpha": 2 * options.rank}
        shared = validate({"base_model": str(folder / "policy"), "dtype": dtype, "tuning": tuning}, [folder])
        builder = BankBuilder(shared, device=CPU)
        made = builder.policy_bank(str(folder / "policy-lora"), shared.tuning, 1.0)
        builder.add_critic(made, critic, shared.tuning, None)
        ends = (read_tokenizer(folder / "policy").eos_token_id,)
        bench = cls(made, [row["tokens"] for row in read_prompts(folder)], [], ends, options)
        bench.responses = [list(own[0].tokens) for own in bench.generate(1)]
        return bench

    def generate(self, samples: int) -> list[list[Any]]:
        """A rollout with `samples` responses a prompt."""
        engine = NativeEngine(self.bank.policy.trunk, self.bank.policy.adapter)
        seeds = [[place * samples + sample for sample in range(samples)] for place in range(len(self.prompts))]
        return engine.generate(self.prompts, Sampling(self.options.response_length, 1.0, self.ends), seeds)

    def rollout(self) -> None:
        """A response to each prompt."""
        self.generate(1)

    def four_samples(self) -> None:
        """Four responses to each prompt."""
        self.generate(4)

    def four_prompts(self) -> None:
        """The same number of responses, each with a prompt of its own."""
        replace(self, prompts=[prompt for prompt in self.prompts for _ in range(4)]).generate(1)

    def batches(self) -> Iterator[ResponseBatch]:
        """The minibatches of an epoch."""
        size = self.options.minibatch
        for start in range(0, len(self.prompts), size):
            yield ResponseBatch.of(self.prompts[start : start + size], self.responses[start : start + size], CPU)

    def update(self) -> None:
        """Gradients of an epoch, policy and critic."""
        for batch in self.batches():
            outputs = self.bank.outputs(batch)
            if outputs.values_M is not None:
                (outputs.logprobs_M.sum() + outputs.values_M.sum()).backward()
            else:
                outputs.logprobs_M.sum().backward()
                self.bank.values(batch).sum().backward()
            for parameter in self.bank.trained().values():
                parameter.grad = None

    def update_of_samples(self, *, share_prompts: bool) -> Work:
        """Gradients of the policy on four responses to each prompt, which stand together in a minibatch."""

        def work() -> None:
            size = self.options.minibatch
            for start in range(0, len(self.prompts), size // 4):
                prompts = [prompt for prompt in self.prompts[start : start + size // 4] for _ in range(4)]
                responses = [self.responses[(start * 4 + row) % len(self.responses)] for row in range(len(prompts))]
                batch = ResponseBatch.of(prompts, responses, CPU, share_prompts=share_prompts)
                self.bank.outputs(batch).logprobs_M.sum().backward()

        return work

    @torch.no_grad()
    def score(self) -> None:
        """Reference log-probabilities and values of all responses."""
        for batch in self.batches():
            self.bank.ref_logprobs(batch)
            self.bank.values(batch)

    @torch.no_grad()
    def score_without_values(self) -> None:
        """Reference log-probabilities alone: a shared critic's values came with the rollout."""
        for batch in self.batches():
            self.bank.ref_logprobs(batch)


@contextmanager
def pefts_layers() -> Iterator[None]:
    """LoRA layers with peft's own arithmetic."""
    with patch.object(lora.FastLinear, "forward", Linear.forward):
        yield


@contextmanager
def transformers_blocks() -> Iterator[None]:
    """Blocks as transformers runs them."""
    with ExitStack() as stack:
        for kind in blocks.FAST.values():
            stack.enter_context(patch.object(kind, "forward", kind.__mro__[2].forward, create=True))
        yield


@contextmanager
def padded_attention() -> Iterator[None]:
    """Attention as on a GPU: documents padded together, by a fused kernel."""
    with patch.object(attention, "SPAN_DEVICES", ()):
        yield


@contextmanager
def whole_last_block() -> Iterator[None]:
    """The last block on all tokens."""
    with patch.object(passes, "trimmed", lambda *_: nullcontext()):
        yield


@contextmanager
def by_the_model() -> Iterator[None]:
    """Decoding by transformers' forward pass, on the weights as they lie, adapters beside them."""
    with patch.object(decoding, "_packed_blocks", lambda model: None):
        yield


def _logprobs(*arguments: Any) -> torch.Tensor:
    return token_logprobs_and_entropy(*arguments)[0]


def without(work: Work, *patches: Any) -> Work:
    """The same work under the patches."""

    def run() -> None:
        with ExitStack() as stack:
            for each in patches:
                stack.enter_context(each())
            work()

    return run


def training_comparisons(fp32: Bench, low: Bench, shared: Bench) -> list[tuple[str, str, Work, Work]]:
    """Name, work, without and with: updates, and the passes that score."""
    bf16_sizes = patch.object(low.bank.policy.trunk, "multiple", 1)

    def beside() -> Any:
        return patch.object(products, "_folds", lambda *_: False)

    return [
        (
            "LoRA product in place, in transformers' blocks",
            "update",
            without(fp32.update, transformers_blocks, pefts_layers),
            without(fp32.update, transformers_blocks),
        ),
        (
            "log-probabilities' derivative taken on the way forward",
            "update",
            without(fp32.update, lambda: patch.object(bank, "token_logprobs", _logprobs)),
            fp32.update,
        ),
        ("last block for read tokens only", "update", without(fp32.update, whole_last_block), fp32.update),
        ("last block for read tokens only", "scoring", without(fp32.score, whole_last_block), fp32.score),
        (
            "padded attention: documents of like length together",
            "update",
            without(fp32.update, padded_attention, lambda: patch.object(attention, "BUCKET_SHARE", 0.0)),
            without(fp32.update, padded_attention),
        ),
        (
            "attention on spans of documents where they stand",
            "update",
            without(fp32.update, padded_attention),
            fp32.update,
        ),
        (
            "attention on spans of documents where they stand",
            "scoring",
            without(fp32.score, padded_attention),
            fp32.score,
        ),
        ("one pass for policy and critic (`shared`)", "update", fp32.update, shared.update),
        ("bfloat16 products", "update", fp32.update, low.update),
        ("few sizes of bfloat16 products", "update", without(low.update, lambda: bf16_sizes), low.update),
        ("blocks written out", "update", without(fp32.update, transformers_blocks), fp32.update),
        ("adapters folded into copies of the weights", "update", without(fp32.update, beside), fp32.update),
        ("adapters folded into copies of the weights", "scoring", without(fp32.score, beside), fp32.score),
        (
            "a prompt held once for four samples",
            "update",
            fp32.update_of_samples(share_prompts=False),
            fp32.update_of_samples(share_prompts=True),
        ),
        ("values read while decoding (`shared`)", "scoring", shared.score, shared.score_without_values),
    ]


def rollout_comparisons(fp32: Bench, low: Bench) -> list[tuple[str, str, Work, Work]]:
    """The same of rollouts."""
    return [
        (
            "decoding steps of our own, float32",
            "rollout",
            without(fp32.rollout, by_the_model),
            fp32.rollout,
        ),
        (
            "decoding steps of our own, bfloat16",
            "rollout",
            without(low.rollout, by_the_model),
            low.rollout,
        ),
        (
            "ended responses leave the batch",
            "rollout",
            without(fp32.rollout, lambda: patch.object(native, "COMPACT_SHARE", 1.0)),
            fp32.rollout,
        ),
        ("one prefill for four samples", "rollout", fp32.four_prompts, fp32.four_samples),
    ]


def seconds(work: Work) -> float:
    """Process seconds of one run."""
    began = time.process_time()
    work()
    return time.process_time() - began


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.techniques",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_common_options(parser)
    parser.set_defaults(repeats=5)
    parser.add_argument("--model", choices=MODELS, default="stories3M-llama")
    parser.add_argument("--lengths", choices=("eos", "fixed"), default="eos")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--minibatch", type=int, default=16)
    parser.add_argument("--response-length", type=int, default=64)
    parser.add_argument("--rank", type=int, default=16)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "workload"
        spec = {name: getattr(options, name) for name in ("model", "lengths", "batch", "response_length", "rank")}
        run_plain(Worker("benchmarks.workload", spec | {"folder": str(folder), "seed": 0}), folder, options.threads)
        fp32, low, shared = (
            Bench.open(folder, options, dtype, critic)
            for dtype, critic in (("float32", "adapter"), ("bfloat16", "adapter"), ("float32", "shared"))
        )
    rows: list[list[str]] = []
    for name, what, before_it, with_it in [*training_comparisons(fp32, low, shared), *rollout_comparisons(fp32, low)]:
        with_it()
        times = [(seconds(before_it), seconds(with_it)) for _ in range(options.repeats)]
        before, after = zip(*times, strict=True)
        gain = statistics.median(before) / statistics.median(after)
        rows.append([name, what, spread(before), spread(after), f"{gain:.2f}x"])
        print(f"{name}: {gain:.2f}x", file=sys.stderr)
    print(machine(options.threads), table(["technique", "work", "s without", "s with", "gain"], rows), sep="\n\n")


if __name__ == "__main__":
    main()
