"""In which form a policy goes to vLLM, and that merging an adapter into a copy changes no function and no weight."""

from pathlib import Path

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftConfig, PrefixTuningConfig, PromptTuningConfig
from transformers import AutoModelForCausalLM

from data.errors import UserError
from stages.core.models import load_model
from stages.core.rollout.policy_files import policy_files, served_form, write_merged
from stages.core.trunk import Trunk
from tests.tiny import tiny_adapter_folder, tiny_model_folder
from tests.tiny_ppo import make_bank


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder(tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(),
        LoraConfig(use_rslora=True),
        LoraConfig(init_lora_weights="gaussian"),
        LoraConfig(rank_pattern={"q": 4}),
    ],
)
def test_plain_lora_goes_as_it_is(config: PeftConfig):
    assert served_form(config, "float32") == "adapter"
    assert served_form(config, "bfloat16") == "adapter"


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (LoraConfig(use_dora=True), "DoRA"),
        (LoraConfig(modules_to_save=["embed_tokens"]), "modules_to_save"),
        (LoraConfig(init_lora_weights="pissa"), "init_lora_weights=pissa"),
        (LoraConfig(trainable_token_indices=[3]), "trained token embeddings"),
        (LoraConfig(lora_bias=True), "LoRA with a bias"),
        (IA3Config(), "tuning by IA3"),
    ],
)
def test_what_vllm_has_no_code_for_is_merged_where_that_is_exact(config: PeftConfig, name: str):
    assert served_form(config, "float32") == "full"
    with pytest.raises(UserError, match=f"cannot serve {name} as an adapter, and merged into bfloat16"):
        served_form(config, "bfloat16")


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (PromptTuningConfig(num_virtual_tokens=2), "tuning by PROMPT_TUNING"),
        (PrefixTuningConfig(num_virtual_tokens=2), "tuning by PREFIX_TUNING"),
        (LoraConfig(layer_replication=[(0, 2), (1, 2)]), "layer_replication"),
    ],
)
def test_what_no_weight_can_express_is_refused_with_its_reason(config: PeftConfig, name: str):
    with pytest.raises(UserError, match=rf"cannot serve {name}, and it cannot be merged .*engine=native"):
        served_form(config, "float32")


def test_a_lora_policy_stands_on_the_base_of_its_sft_adapter(base: Path, tmp_path: Path):
    folder = tiny_adapter_folder(tmp_path / "sft", base, rank=4)
    files = policy_files(make_bank(folder), "float32")
    assert (files.base, files.form, files.rank) == (str(base), "adapter", 4)
    (tmp_path / "out").mkdir()
    files.write(tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_a_full_policy_starts_from_where_its_architecture_is(base: Path, tmp_path: Path):
    folder = tiny_adapter_folder(tmp_path / "sft", base, rank=4)
    bank = make_bank(folder, method="full")
    files = policy_files(bank, "float32")
    assert (files.base, files.form) == (str(base), "full")
    (tmp_path / "out").mkdir()
    files.write(tmp_path / "out")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for name, parameter in bank.policy.trunk.model.named_parameters():
        assert torch.equal(parameter, saved.get_parameter(name)), name


@pytest.mark.parametrize("use_dora", [True, False])
@torch.no_grad()
def test_a_merged_copy_is_the_same_function_and_leaves_the_policy_alone(base: Path, tmp_path: Path, use_dora: bool):
    trunk = Trunk(load_model(str(base), head="lm", packing=False), torch.device("cpu"))
    for name in ("policy", "reference"):
        trunk.add_adapter(name, LoraConfig(r=4, use_dora=use_dora, target_modules="all-linear", task_type="CAUSAL_LM"))
        for parameter in trunk.adapter_parameters(name):
            parameter.add_(0.1 * torch.randn_like(parameter))
    trunk.use("policy")
    before = {name: parameter.clone() for name, parameter in trunk.model.named_parameters()}
    ids = torch.arange(3, 30)[None]
    expected = trunk.model(ids).logits
    write_merged(trunk, "policy", tmp_path)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(trunk.model(ids).logits, expected)
    assert all(torch.equal(parameter, before[name]) for name, parameter in trunk.model.named_parameters())
    trunk.use(None)
    assert not torch.allclose(trunk.model(ids).logits, expected, atol=1e-3)
