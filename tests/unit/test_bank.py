"""The policy bank: views of one base, what trains, what stays, how the critic starts, what is saved."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerFast

from data.errors import UserError
from stages.core.bank import BankBuilder, PolicyBank
from stages.core.config import SharedConfig, Tuning
from stages.core.reward_config import RewardConfig
from stages.core.rewards import Answered, RewardModel
from stages.core.sequences import ResponseBatch
from tests.tiny import (
    tiny_adapter_folder,
    tiny_llama,
    tiny_model_folder,
    tiny_reward_folder,
    tiny_tokenizer,
)

CPU = torch.device("cpu")
LORA = Tuning(rank=4, alpha=8)
FULL = Tuning(method="full")
PROMPTS, RESPONSES = [[0, 10, 11, 12], [0, 20]], [[30, 31, 32], [40, 41, 42, 43, 1]]
ANSWERED = Answered(["the cat", "say"], [" sat", " yes or no"], [True, False], [{}, {}])


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tiny_model_folder(tmp_path / "base")


@pytest.fixture
def sft(tmp_path: Path, base: Path) -> Path:
    return tiny_adapter_folder(tmp_path / "sft", base, seed=1)


@pytest.fixture
def rm(tmp_path: Path, base: Path) -> Path:
    return tiny_adapter_folder(tmp_path / "rm", base, head="score", seed=2)


def builder_for(base: Path) -> BankBuilder:
    return BankBuilder(SharedConfig(base_model=str(base)), device=CPU)


def build(
    base: Path, policy: Path, *, critic: str = "adapter", tuning: Tuning = LORA, reward: Path | None = None
) -> tuple[PolicyBank, RewardModel | None, BankBuilder]:
    torch.manual_seed(0)
    builder = builder_for(base)
    bank = builder.policy_bank(str(policy), tuning, 1.0)
    model = builder.reward_model(str(reward), "reward-0") if reward else None
    builder.add_critic(bank, critic, tuning, model)
    return bank, model, builder


def batch() -> ResponseBatch:
    return ResponseBatch.of(PROMPTS, RESPONSES, CPU)


def train_a_little(bank: PolicyBank, steps: int = 3) -> None:
    """Moves every trained parameter a long way."""
    optimizer = torch.optim.SGD(list(bank.trained().values()), lr=1.0)
    for _ in range(steps):
        logprobs, values = bank.policy_logprobs(batch()), bank.values(batch())
        (logprobs.mean() + (values - 3).square().mean()).backward()
        optimizer.step()
        optimizer.zero_grad()


def unique_storage(*models: torch.nn.Module) -> int:
    """Numbers held by the models' parameters, each storage counted once."""
    sizes = {each.data_ptr(): each.numel() for model in models for each in model.parameters()}
    return sum(sizes.values())


def logprobs_of(model: torch.nn.Module, prompt: list[int], response: list[int]) -> Tensor:
    """Teacher-forced log-probabilities by a plain transformers model."""
    logits = model(input_ids=torch.tensor([[*prompt, *response]])).logits[0].log_softmax(1)
    places = torch.arange(len(prompt) - 1, len(prompt) + len(response) - 1)
    return logits[places, torch.tensor(response)]


@pytest.mark.parametrize("start", ["base", "sft"])
@pytest.mark.parametrize("critic", ["shared", "adapter", "model"])
def test_policy_equals_reference_at_the_start_and_leaves_it_in_training(
    base: Path, sft: Path, rm: Path, start: str, critic: str
) -> None:
    bank, reward, _ = build(base, base if start == "base" else sft, critic=critic, reward=rm)
    assert reward is not None
    ref, scores = bank.ref_logprobs(batch()), reward.score(ANSWERED)
    assert torch.equal(bank.policy_logprobs(batch()).detach(), ref)  # KL is exactly 0
    frozen = {
        name: parameter.detach().clone()
        for name, parameter in bank.reference.trunk.model.named_parameters()
        if not parameter.requires_grad
    }

    train_a_little(bank)

    assert not torch.allclose(bank.policy_logprobs(batch()), ref, atol=1e-2)
    assert torch.equal(bank.ref_logprobs(batch()), ref)
    assert reward.score(ANSWERED) == scores
    for name, parameter in bank.reference.trunk.model.named_parameters():
        assert name not in frozen or torch.equal(parameter, frozen[name]), name


@pytest.mark.parametrize("start", ["base", "sft"])
def test_views_are_the_models_they_stand_for(base: Path, sft: Path, rm: Path, start: str) -> None:
    bank, reward, _ = build(base, base if start == "base" else sft, reward=rm)
    assert reward is not None
    plain = AutoModelForCausalLM.from_pretrained(base)
    if start == "sft":
        plain = AutoPeftModelForCausalLM.from_pretrained(sft)
    expected = torch.cat([logprobs_of(plain, *pair) for pair in zip(PROMPTS, RESPONSES, strict=True)])
    torch.testing.assert_close(bank.ref_logprobs(batch()), expected.detach(), rtol=1e-5, atol=1e-5)

    from peft import AutoPeftModelForSequenceClassification

    judge = AutoPeftModelForSequenceClassification.from_pretrained(rm, num_labels=1).eval()
    judge.config.pad_token_id = 2
    for prompt, response, finished, score in zip(
        ANSWERED.prompts, ANSWERED.responses, ANSWERED.finished, reward.score(ANSWERED), strict=True
    ):
        ids, _ = reward.encoder.score_tokens(prompt, response, finished=finished)
        assert score == pytest.approx(judge(input_ids=torch.tensor([ids])).logits.item(), abs=1e-5)


@pytest.mark.parametrize("critic", ["shared", "adapter", "model"])
def test_one_base_in_memory(base: Path, sft: Path, rm: Path, critic: str) -> None:
    bank, _, builder = build(base, sft, critic=critic, reward=rm)
    assert builder.frozen is not None
    trunks = {id(view.trunk): view.trunk for view in (bank.policy, bank.reference, bank.value) if view is not None}
    assert len(trunks) == (2 if critic == "model" else 1)
    assert bank.policy.trunk is builder.frozen
    size = sum(each.numel() for each in tiny_llama(vocabulary=len(tiny_tokenizer())).parameters())
    adapter = sum(each.numel() for each in bank.policy.parameters())
    # policy, reference and reward adapters, and the critic's
    adapters = {"shared": 3, "adapter": 4, "model": 3}[critic]
    assert unique_storage(bank.policy.trunk.model) == size + adapters * adapter


@pytest.mark.parametrize("critic", ["shared", "adapter", "model"])
@pytest.mark.parametrize("tuning", [LORA, FULL])
def test_exactly_the_trained_parameters_want_gradients_whatever_view_was_used(
    base: Path, rm: Path, critic: str, tuning: Tuning
) -> None:
    bank, reward, _ = build(base, base, critic=critic, tuning=tuning, reward=rm)
    assert reward is not None
    views = [view for view in (bank.policy, bank.reference, bank.value) if view is not None]
    trained = {id(parameter) for parameter in bank.trained().values()}
    models = {id(view.trunk): view.trunk.model for view in views} | {0: reward.trunk.model, 1: bank.value_head}

    def wanting() -> set[int]:
        return {id(each) for model in models.values() for each in model.parameters() if each.requires_grad}

    assert wanting() == trained
    bank.ref_logprobs(batch())
    assert wanting() == trained
    reward.score(ANSWERED)
    assert wanting() == trained
    for _ in range(2):
        bank.values(batch())
        bank.policy_logprobs(batch())
        bank.ref_logprobs(batch())
        assert wanting() == trained


@pytest.mark.parametrize("critic", ["shared", "adapter", "model"])
@pytest.mark.parametrize("tuning", [LORA, FULL])
def test_each_loss_reaches_its_own_parameters(base: Path, critic: str, tuning: Tuning) -> None:
    bank, _, _ = build(base, base, critic=critic, tuning=tuning)
    torch.nn.init.normal_(bank.value_head.weight)  # at zero no gradient passes the head

    def reached(loss: Callable[[], Tensor]) -> set[str]:
        for parameter in bank.trained().values():
            parameter.grad = None
        loss().sum().backward()
        return {
            name.split(".")[0]
            for name, parameter in bank.trained().items()
            if parameter.grad is not None and bool(parameter.grad.any())
        }

    assert reached(lambda: bank.policy_logprobs(batch())) == {"policy"}
    assert reached(lambda: bank.values(batch())) == {"value_head", "policy" if critic == "shared" else "value"}
    assert reached(lambda: bank.outputs(batch()).logprobs_M) == {"policy"}


@pytest.mark.parametrize("critic", ["shared", "adapter", "model"])
def test_one_pass_gives_a_shared_critics_values_too(base: Path, rm: Path, critic: str) -> None:
    bank, _, _ = build(base, base, critic=critic, reward=rm)
    logprobs, values, _ = bank.outputs(batch())
    assert torch.equal(logprobs, bank.policy_logprobs(batch()))
    assert logprobs.shape == bank.values(batch()).shape == (8,)
    if critic == "shared":
        assert values is not None
        assert torch.equal(values, bank.values(batch()))
    else:
        assert values is None


def reward_at_every_token(reward: RewardModel) -> Tensor:
    """What the reward model's head says at the position before each response token: a critic copied from it."""
    hidden = reward.trunk.hidden(batch().packed, reward.adapter)[batch().before_M]
    return reward.head(hidden)[:, 0].detach()


@pytest.mark.parametrize("critic", ["adapter", "model"])
@pytest.mark.parametrize("tuning", [LORA, FULL])
def test_the_critic_starts_as_the_reward_model(base: Path, rm: Path, critic: str, tuning: Tuning) -> None:
    bank, reward, _ = build(base, base, critic=critic, tuning=tuning, reward=rm)
    assert reward is not None
    expected = reward_at_every_token(reward)
    torch.testing.assert_close(bank.values(batch()).detach(), expected, rtol=1e-5, atol=1e-5)
    bank.rescale_values(0.25, 2.0)
    torch.testing.assert_close(bank.values(batch()).detach(), 0.25 * expected + 2, rtol=1e-5, atol=1e-5)
    train_a_little(bank)
    assert not torch.allclose(bank.values(batch()), expected, atol=1e-2)
    assert torch.equal(reward_at_every_token(reward), expected)


def test_a_model_critic_starts_as_a_full_reward_model(base: Path, tmp_path: Path) -> None:
    bank, reward, _ = build(base, base, critic="model", reward=tiny_reward_folder(tmp_path / "judge", seed=5))
    assert reward is not None
    assert reward.trunk is not bank.policy.trunk
    torch.testing.assert_close(bank.values(batch()).detach(), reward_at_every_token(reward), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("critic", ["shared", "adapter", "model"])
def test_a_critic_without_a_reward_model_starts_at_zero(base: Path, sft: Path, critic: str) -> None:
    bank, _, _ = build(base, sft, critic=critic)
    assert torch.equal(bank.values(batch()).detach(), torch.zeros(8))
    hidden = (bank.value or bank.policy).hidden_before(batch()).detach()
    torch.testing.assert_close(hidden, (bank.policy if critic != "adapter" else bank.value).hidden_before(batch()))
    train_a_little(bank)
    assert bank.values(batch()).abs().min() > 0


@pytest.mark.parametrize("critic", ["adapter", "model"])
def test_a_fresh_critic_takes_nothing_from_the_reward_model(base: Path, rm: Path, critic: str) -> None:
    """It stands on the policy's own hidden states and says 0; from the reward model it would say something else."""
    bank, _, _ = build(base, base, critic=critic, reward=rm)
    assert bank.values(batch()).abs().min() > 0
    again, _, _ = build(base, base, critic=critic)
    bank, _, builder = build(base, base, critic="shared", reward=rm)
    builder.add_critic(bank, critic, LORA, None)
    assert torch.equal(bank.values(batch()).detach(), torch.zeros(8))
    assert bank.value is not None
    assert again.value is not None
    assert torch.equal(bank.value.hidden_before(batch()), again.value.hidden_before(batch()))


def test_a_shared_critic_starts_at_zero_also_with_a_reward_model(base: Path, rm: Path) -> None:
    bank, _, _ = build(base, base, critic="shared", reward=rm)
    assert torch.equal(bank.values(batch()).detach(), torch.zeros(8))


@pytest.mark.parametrize("start", ["base", "sft"])
@pytest.mark.parametrize("critic", ["shared", "adapter", "model"])
def test_full_tuning_keeps_a_frozen_reference(base: Path, sft: Path, rm: Path, start: str, critic: str) -> None:
    bank, reward, _ = build(base, base if start == "base" else sft, critic=critic, tuning=FULL, reward=rm)
    assert reward is not None
    ref, scores = bank.ref_logprobs(batch()), reward.score(ANSWERED)
    assert torch.equal(bank.policy_logprobs(batch()).detach(), ref)
    # An adapter that was merged changed the base, so a reward adapter on the old base needs one of its own.
    assert (reward.trunk is bank.reference.trunk) == (start == "base")
    optimizer = torch.optim.SGD(list(bank.trained().values()), lr=0.01)
    bank.policy_logprobs(batch()).sum().backward()
    optimizer.step()
    assert not torch.equal(bank.policy_logprobs(batch()).detach(), ref)
    assert torch.equal(bank.ref_logprobs(batch()), ref)
    assert reward.score(ANSWERED) == scores


@pytest.mark.parametrize("start", ["base", "sft"])
@pytest.mark.parametrize("tuning", [LORA, FULL])
def test_a_saved_policy_loads_elsewhere_with_the_same_logprobs(
    base: Path, sft: Path, rm: Path, tmp_path: Path, start: str, tuning: Tuning
) -> None:
    bank, _, _ = build(base, base if start == "base" else sft, tuning=tuning, reward=rm)
    train_a_little(bank, steps=1)
    folder = tmp_path / "saved"
    folder.mkdir()
    bank.save_policy(folder)
    kind = AutoModelForCausalLM if tuning.method == "full" else AutoPeftModelForCausalLM
    loaded = kind.from_pretrained(folder)
    expected = torch.cat([logprobs_of(loaded, *pair) for pair in zip(PROMPTS, RESPONSES, strict=True)])
    torch.testing.assert_close(bank.policy_logprobs(batch()).detach(), expected.detach(), rtol=1e-4, atol=1e-4)
    # The bank itself starts from what it saved.
    tiny_tokenizer().save_pretrained(folder)
    again, _, _ = build(base, folder, tuning=tuning)
    torch.testing.assert_close(again.ref_logprobs(batch()), expected.detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tuning", [LORA, FULL])
def test_bfloat16_trains_float32_weights(base: Path, tuning: Tuning) -> None:
    """Base and reference are bfloat16; what trains is float32, and its products are bfloat16 all the same."""
    exact, _, _ = build(base, base, tuning=tuning)
    builder = BankBuilder(SharedConfig(base_model=str(base), dtype="bfloat16"), device=CPU)
    bank = builder.policy_bank(str(base), tuning, 1.0)
    builder.add_critic(bank, "adapter", tuning, None)
    assert bank.reference.trunk.lm_head.weight.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in bank.trained().values()} == {torch.float32}
    logprobs = bank.policy_logprobs(batch()).detach()
    assert not torch.equal(logprobs, exact.policy_logprobs(batch()).detach())
    torch.testing.assert_close(logprobs, exact.policy_logprobs(batch()).detach(), rtol=0.02, atol=0.02)
    torch.testing.assert_close(logprobs, bank.ref_logprobs(batch()), rtol=0.02, atol=0.02)
    train_a_little(bank, steps=1)


def test_temperature_divides_the_logits_of_policy_and_reference(base: Path) -> None:
    builder = builder_for(base)
    bank = builder.policy_bank(str(base), LORA, 0.5)
    logits = AutoModelForCausalLM.from_pretrained(base)(torch.tensor([[*PROMPTS[0], *RESPONSES[0]]])).logits[0]
    expected = (logits[3:6] / 0.5).log_softmax(1)[torch.arange(3), torch.tensor(RESPONSES[0])].detach()
    torch.testing.assert_close(bank.policy_logprobs(batch()).detach()[:3], expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(bank.ref_logprobs(batch())[:3], expected, rtol=1e-5, atol=1e-5)


def shuffled_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer that knows the same text by other ids."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet(), reverse=True)
    vocabulary = {symbol: number for number, symbol in enumerate(["<end>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")


def test_a_reward_model_with_another_tokenizer_is_given_text(base: Path, tmp_path: Path) -> None:
    folder = tiny_reward_folder(tmp_path / "judge")
    tokenizer = shuffled_tokenizer()
    tokenizer.save_pretrained(folder)
    bank, reward, builder = build(base, base, critic="adapter", reward=folder)
    assert reward is not None
    judge = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    for prompt, response, finished, score in zip(
        ANSWERED.prompts, ANSWERED.responses, ANSWERED.finished, reward.score(ANSWERED), strict=True
    ):
        ids = tokenizer.encode(prompt + response) + [tokenizer.eos_token_id] * finished
        hidden = judge.model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]
        assert score == pytest.approx(judge.score(hidden).item(), abs=1e-5)
    # Nor can a critic that reads the policy's tokens be a copy of it.
    builder.add_critic(bank, "model", LORA, reward)
    assert torch.equal(bank.values(batch()).detach(), torch.zeros(8))


def test_a_language_model_is_no_reward_model(base: Path) -> None:
    with pytest.raises(UserError, match="score head"):
        builder_for(base).reward_model(str(base), "reward-0")


def test_several_reward_models_stand_on_one_base(base: Path, rm: Path, tmp_path: Path) -> None:
    second = tiny_adapter_folder(tmp_path / "rm2", base, head="score", seed=9)
    builder = builder_for(base)
    builder.policy_bank(str(base), LORA, 1.0)
    rewards = [RewardConfig(model=str(rm), weight=2.0), RewardConfig(model=str(second), weight=-1.0)]
    scorer, models = builder.scorer(rewards, [str(rm), str(second)])
    assert models[0].trunk is models[1].trunk is builder.frozen
    singles = [model.score(ANSWERED) for model in models]
    assert singles[0] != singles[1]
    assert scorer.score(ANSWERED) == pytest.approx([2 * a - b for a, b in zip(*singles, strict=True)], abs=1e-6)


@pytest.mark.parametrize("tuning", [Tuning(rank=8, alpha=8), Tuning(rank=4, alpha=16)])
def test_another_tuning_than_the_adapters_is_refused(base: Path, sft: Path, tuning: Tuning) -> None:
    with pytest.raises(UserError, match=r"rank=4 alpha=8.*tuning.method=full"):
        builder_for(base).policy_bank(str(sft), tuning, 1.0)


def test_an_adapter_of_another_base_is_refused(sft: Path, tmp_path: Path) -> None:
    """Fewer layers than the adapter was made for."""
    other = tiny_model_folder(tmp_path / "other", layers=1)
    config = sft / "adapter_config.json"
    config.write_text(config.read_text().replace(str(tmp_path / "base"), str(other)))
    with pytest.raises(UserError, match="does not fit this base"):
        builder_for(other).policy_bank(str(sft), LORA, 1.0)


def test_copies_share_nothing(base: Path, rm: Path) -> None:
    """The critic made from the reward adapter has weights of its own."""
    bank, reward, builder = build(base, base, critic="adapter", reward=rm)
    assert reward is not None
    assert builder.frozen is not None
    own = {each.data_ptr() for each in builder.frozen.adapter_parameters("value")}
    assert not own & {each.data_ptr() for each in builder.frozen.adapter_parameters("reward-0")}
    assert bank.value_head.weight.data_ptr() != reward.head.weight.data_ptr()
    assert copy.deepcopy(bank.value_head).weight.requires_grad
