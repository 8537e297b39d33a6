"""Rollouts by a real vLLM server against transformers and the trainer: LoRA policies, handed over as adapters."""

from collections.abc import Generator
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import LlamaForCausalLM

from data.errors import UserError
from stages.core.bank import PolicyBank
from stages.core.rollout.client import Client, Request, ServerError
from stages.core.rollout.protocol import EngineError, Sampling
from stages.core.rollout.vllm import VllmEngine, VllmOptions
from stages.core.rollout.vllm_servers import Server, check_server
from stages.core.sequences import PackedBatch
from tests.vllm import (
    PROMPTS,
    SAMPLING,
    SEEDS,
    answers,
    largest_difference,
    living,
    move,
    needs_vllm,
    processes_of,
    start_engine,
    tiny_bank,
    tiny_base,
)

pytestmark = needs_vllm


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("vllm")


@pytest.fixture(scope="module")
def bank(folder: Path) -> PolicyBank:
    return tiny_bank(tiny_base(folder / "base"), "lora")


@pytest.fixture(scope="module")
def engine(bank: PolicyBank, folder: Path) -> Generator[VllmEngine]:
    with start_engine(bank, folder / "engine", max_length=512) as engine:
        with pytest.raises(EngineError, match="no policy has been handed over"):
            answers(engine)
        engine.sync(1)
        processes = processes_of(engine)
        assert len(processes) >= 3
        yield engine
    assert living(processes) == []
    assert [path.name for path in (folder / "engine").iterdir()] == ["vllm-0.log"]


def test_the_adapter_as_transformers_reads_it_gives_the_same_logprobs(
    engine: VllmEngine, bank: PolicyBank, folder: Path
):
    completions = answers(engine)
    bank.save_policy(_new(folder / "saved"))
    model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(folder / "base"), folder / "saved").eval()
    worst = 0.0
    prompts = [prompt for prompt, own in zip(PROMPTS, SEEDS, strict=True) for _ in own]
    for prompt, completion in zip(prompts, completions, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *completion.tokens]])).logits[0, len(prompt) - 1 : -1]
        logprobs = (logits / SAMPLING.temperature).log_softmax(-1)
        tokens = torch.tensor(completion.tokens)
        expected = logprobs.gather(1, tokens[:, None])[:, 0]
        worst = max(worst, float((torch.tensor(completion.logprobs) - expected).abs().max()))
    print(f"largest difference to transformers: {worst:.2e} nats")
    assert worst <= 1e-3


def test_a_response_ends_with_an_end_token_or_is_cut_at_the_limit(engine: VllmEngine):
    completions = answers(engine)
    assert {completion.finished for completion in completions} == {True, False}
    for completion in completions:
        assert (completion.tokens[-1] in SAMPLING.end_token_ids) == completion.finished
        assert completion.finished or len(completion.tokens) == SAMPLING.max_new_tokens


def test_a_seed_fixes_its_completion_whoever_shares_the_batch(engine: VllmEngine):
    together = engine.generate(PROMPTS, SAMPLING, SEEDS)
    assert len({completion.tokens for group in together for completion in group}) == sum(map(len, SEEDS))
    for prompt, seeds, expected in zip(PROMPTS, SEEDS, together, strict=True):
        alone = engine.generate([prompt], SAMPLING, [seeds[::-1]])[0][::-1]
        for one, other in zip(alone, expected, strict=True):
            assert one.tokens == other.tokens
            assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)


def test_long_prompts_that_come_at_once_do_not_disturb_the_seeds(engine: VllmEngine):
    """More tokens than vLLM takes in a step: a prompt that it cut in two would end the server, or move a seed."""
    prompts = [[0, *(3 + (7 * place + each) % 250 for each in range(300))] for place in range(16)]
    seeds = [[place] for place in range(16)]
    together = engine.generate(prompts, SAMPLING, seeds)
    for place in (0, 7, 15):
        (alone,) = engine.generate([prompts[place]], SAMPLING, [seeds[place]])
        assert [each.tokens for each in alone] == [each.tokens for each in together[place]]


def test_samples_follow_the_policys_distribution(engine: VllmEngine, bank: PolicyBank):
    """Of one prompt's first token, over 1000 seeds: the mean surprise is the entropy, to four standard errors."""
    one = Sampling(1, SAMPLING.temperature, ())
    samples = engine.generate([PROMPTS[0]], one, [list(range(1000))])[0]
    surprise = torch.tensor([-completion.logprobs[0] for completion in samples])
    model = bank.policy.trunk
    with torch.no_grad():
        hidden = model.hidden(PackedBatch.of([PROMPTS[0]], torch.device("cpu")), bank.policy.adapter)[-1]
        logprobs = (model.lm_head(hidden) / SAMPLING.temperature).log_softmax(-1)
    entropy = float(-(logprobs.exp() * logprobs).sum())
    assert abs(float(surprise.mean()) - entropy) <= 4 * float(surprise.std()) / len(samples) ** 0.5
    frequency = torch.bincount(torch.tensor([each.tokens[0] for each in samples]), minlength=len(logprobs)) / 1000
    likeliest = int(logprobs.argmax())
    p = float(logprobs[likeliest].exp())
    assert abs(float(frequency[likeliest]) - p) <= 4 * (p * (1 - p) / 1000) ** 0.5


def test_changed_weights_change_the_output_after_a_sync(engine: VllmEngine, bank: PolicyBank):
    engine.sync(2)
    before = answers(engine)
    assert {completion.version for completion in before} == {2}
    move(bank, 2)
    unsynced = answers(engine)
    assert unsynced == before  # a change alone is nobody's business but the trainer's
    assert largest_difference(bank, unsynced) > 0.01
    engine.sync(3)
    after = answers(engine)
    assert {completion.version for completion in after} == {3}
    assert [completion.tokens for completion in after] != [completion.tokens for completion in before]
    assert largest_difference(bank, after) <= 1e-3
    assert [path.name for path in sorted(engine.folder.iterdir())] == ["v3", "vllm-0.log"]


def test_the_same_version_can_be_handed_over_again(engine: VllmEngine, bank: PolicyBank):
    engine.sync(5)
    move(bank, 5)
    engine.sync(5)
    assert largest_difference(bank, answers(engine)) <= 1e-3


def test_an_old_version_is_refused(engine: VllmEngine):
    engine.sync(6)
    engine.sync(7)
    client = engine.servers[0].client
    with pytest.raises(ServerError, match=rf"policy-{engine.nonce}-v6. does not exist"):
        client.complete(f"policy-{engine.nonce}-v6", Request((1,), 0), SAMPLING, 6)
    assert client.complete(f"policy-{engine.nonce}-v7", Request((1,), 0), SAMPLING, 7).version == 7


def test_the_server_is_for_its_owner_alone(engine: VllmEngine):
    server = engine.servers[0]
    assert server.own is not None
    assert server.own.folder.stat().st_mode & 0o077 == 0
    with pytest.raises(ServerError, match="status 401"):
        Client(server.client.address, token="guessed", timeout_s=5).get("/v1/models")
    token = server.client.token
    assert token
    assert all(token not in " ".join(process.cmdline()) for process in processes_of(engine))
    assert token not in server.own.log.read_text(encoding="utf-8")
    listening = [each for process in processes_of(engine) for each in process.net_connections(kind="inet")]
    assert all(each.laddr.ip in ("127.0.0.1", "::1") for each in listening if each.status == "LISTEN")


def test_a_server_that_takes_shorter_sequences_than_the_run_is_refused(engine: VllmEngine):
    server = Server("http://elsewhere:8000", engine.servers[0].client)
    with pytest.raises(UserError, match="http://elsewhere:8000: takes sequences of 512 tokens, and max_length is 513"):
        check_server(server, VllmOptions(max_length=513), lambda _: None)
    check_server(server, VllmOptions(max_length=512), lambda _: None)


def test_servers_that_run_already_are_used_and_left_as_they_were(engine: VllmEngine, bank: PolicyBank, tmp_path: Path):
    server = engine.servers[0]
    engine.sync(8)
    ours = answers(engine)
    address = {"urls": (server.client.address,), "token": server.client.token}
    with start_engine(bank, tmp_path / "other", **address) as other:
        other.sync(8)
        assert answers(other) == ours
        assert len(_adapters(server.client)) == 2  # of the same version, and neither engine's is the other's
    assert _adapters(server.client) == [f"policy-{engine.nonce}-v8"]
    assert answers(engine) == ours
    with pytest.raises(UserError, match="status 401"):
        start_engine(bank, tmp_path / "third", **address | {"token": "guessed"})


def test_no_prompts_no_completions(engine: VllmEngine):
    assert engine.generate([], SAMPLING, []) == []


def _adapters(client: Client) -> list[str]:
    return [model["id"] for model in client.get("/v1/models")["data"] if model["parent"] is not None]


def _new(folder: Path) -> Path:
    folder.mkdir()
    return folder
