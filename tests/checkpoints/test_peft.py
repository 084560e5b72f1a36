"""Adapters that peft itself has written, compared with what its ``merge_and_unload`` makes of them."""

from __future__ import annotations

import dataclasses
import json
import warnings

import peft
import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from lightning_merge import merge
from lightning_merge.checkpoints import open_adapter
from lightning_merge.checkpoints.adapter_config import _KNOWN
from lightning_merge.methods import TaskArithmetic, WeightAverage
from lightning_merge.utilities.errors import MergeError

pytestmark = pytest.mark.filterwarnings("ignore")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.square = nn.Linear(4, 5), nn.Linear(6, 6)
        self.inner = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 3))
        self.conv, self.point = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 6, 1)
        self.wave, self.volume = nn.Conv1d(3, 4, 5), nn.Conv3d(2, 3, 2)
        self.grouped = nn.Conv2d(8, 8, 3, groups=4)
        self.words, self.attn = nn.Embedding(9, 4), nn.MultiheadAttention(4, 2)
        self.head = nn.Linear(3, 2)


def trained(folder, module, **config):
    """Save an adapter whose tensors are all random; return it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapter = peft.get_peft_model(module, peft.LoraConfig(**{"r": 2, "lora_alpha": 6} | config))
        generator = torch.Generator().manual_seed(1)
        for name, parameter in adapter.named_parameters():
            if parameter.requires_grad or "lora_" in name:
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator).abs() + 0.1)  # tied ones follow
        adapter.save_pretrained(folder)
    return adapter


def same(found, expected):
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-4, atol=1e-5, msg=name)


LAYERS = ["fc", "square", "conv", "point", "wave", "volume", "words"]
KINDS = {
    "plain": {"target_modules": LAYERS},
    "rank-stabilised": {"target_modules": LAYERS, "use_rslora": True},
    "DoRA": {"target_modules": LAYERS, "use_dora": True},
    "DoRA of square layers": {"target_modules": ["square", "inner.1"], "use_dora": True, "use_rslora": True},
    "biases of factors": {"target_modules": ["fc", "conv"], "lora_bias": True},
    "all biases": {"target_modules": ["fc", "conv"], "bias": "all"},
    "patterns": {
        "target_modules": ["fc", "inner.0", "inner.1"],
        "rank_pattern": {r"inner\.\d": 3, "fc": 1},
        "alpha_pattern": {"^fc": 5, "0|1": 2},
    },
    "patterns of whole names": {"target_modules": ["inner.0", "inner.1"], "rank_pattern": {"nner.0": 3, "inner.1": 1}},
    "trained as a whole": {"target_modules": ["fc"], "modules_to_save": ["head", "conv", "words"]},
    "rows": {"target_modules": ["fc"], "trainable_token_indices": {"words": [7, 0, 3]}},
    "only some": {"target_modules": ["fc", "square"], "exclude_modules": ["square"]},
    "orthogonal": {"target_modules": ["fc"], "init_lora_weights": "orthogonal"},
    "gaussian": {"target_modules": ["fc"], "init_lora_weights": "gaussian"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_peft_merges(tmp_path, kind):
    torch.manual_seed(0)
    module = Net()
    base = {name: weight.clone() for name, weight in module.state_dict().items()}
    adapter = trained(tmp_path, module, **KINDS[kind])
    expert = open_adapter(tmp_path, base)
    same(dict(expert), adapter.merge_and_unload().state_dict())
    merged = merge(base, [tmp_path], TaskArithmetic(scale=1.0)).weights
    same(merged, dict(expert))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"target_modules": ["fc"], "alora_invocation_tokens": [1, 2]},
            "alora_invocation_tokens: .*leave this expert out",
        ),
        ({"target_modules": [], "target_parameters": ["fc.weight"]}, "target_parameters: .*merge_and_unload"),
        ({"target_modules": ["attn"]}, "'attn', a MultiheadAttention.*merge_and_unload"),
        ({"target_modules": ["grouped"], "r": 4}, "a convolution in 4 groups; .*leave this expert out"),
        ({"target_modules": ["fc"], "init_lora_weights": "olora"}, "olora, which changes the base"),
        ({"target_modules": ["fc"], "init_lora_weights": "pissa"}, "pissa, which changes the base"),
        ({"target_modules": ["fc"], "kasa_config": {}}, "kasa_config: .*merge_and_unload"),
        ({"target_modules": ["fc"], "velora_config": {}}, "velora_config: .*merge_and_unload"),
        ({"target_modules": ["fc"], "use_bdlora": {"target_modules_bd_a": ["fc"], "nblocks": 2}}, "use_bdlora: "),
    ],
)
def test_what_is_refused_by_name(tmp_path, config, message):
    module = Net()
    base = {name: weight.clone() for name, weight in module.state_dict().items()}
    trained(tmp_path, module, **config)
    with pytest.raises(MergeError, match=message):
        open_adapter(tmp_path, base)


def test_every_field_of_the_installed_peft_is_known():
    fields = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    assert not fields - _KNOWN


def test_fields_that_are_not_known_are_refused_unless_they_say_nothing(tmp_path):
    module = Net()
    base = {name: weight.clone() for name, weight in module.state_dict().items()}
    trained(tmp_path, module, target_modules=["fc"])
    file = tmp_path / "adapter_config.json"
    config = json.loads(file.read_text())
    for value in (None, False, "", [], {}, 0):
        file.write_text(json.dumps(config | {"use_tomorrows_lora": value}))
        open_adapter(tmp_path, base)
    file.write_text(
        json.dumps(config | {"use_tomorrows_lora": True, "layer_replication": [[0, 1], [0, 1]], "r": "two"})
    )
    with pytest.raises(MergeError) as error:
        open_adapter(tmp_path, base)
    assert len(error.value.problems) == 3
    for what in ("sets use_tomorrows_lora, which this version", "sets layer_replication: ", "gives r as 'two'"):
        assert what in str(error.value)


class Mixed(nn.Module):
    """As parts of GPT-2: layers that are stored as (in, out) beside linear ones."""

    def __init__(self, last):
        super().__init__()
        self.c_attn, self.c_proj, self.last = Conv1D(12, 4), Conv1D(4, 4), nn.Linear(4, last)


@pytest.mark.parametrize(
    ("targets", "flag"), [(["c_attn", "c_proj"], True), (["c_attn", "c_proj", "last"], False), (["c_proj"], True)]
)
def test_mixed_layouts(tmp_path, targets, flag):
    torch.manual_seed(0)
    module = Mixed(last=5)
    base = {name: weight.clone() for name, weight in module.state_dict().items()}
    adapter = trained(tmp_path, module, target_modules=targets)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["fan_in_fan_out"] is flag
    same(dict(open_adapter(tmp_path, base)), adapter.merge_and_unload().state_dict())


def test_square_layers_of_which_nothing_tells_how_they_are_stored(tmp_path):
    module = Mixed(last=4)
    base = {name: weight.clone() for name, weight in module.state_dict().items()}
    trained(tmp_path, module, target_modules=["c_proj", "last"])
    with pytest.raises(MergeError, match=r"'c_proj.weight' is square.*config\.json.*merge_and_unload"):
        open_adapter(tmp_path, base)


def test_the_configuration_of_the_base_tells(tmp_path):
    """GPT-2 with a square c_proj beside a square linear layer, whose flag alone would be wrong for one of them."""
    torch.manual_seed(0)
    module = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=16, n_positions=8))
    module.save_pretrained(tmp_path / "base")
    before = {name: weight.clone() for name, weight in module.state_dict().items()}
    adapter = trained(tmp_path / "adapter", module, target_modules=["attn.c_proj"], fan_in_fan_out=True)
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"fan_in_fan_out": False}))
    expected = adapter.merge_and_unload().state_dict()
    expert = open_adapter(tmp_path / "adapter", tmp_path / "base")
    same(dict(expert), {name: expected[name] for name in expert})
    with pytest.raises(MergeError, match="is square"):
        open_adapter(tmp_path / "adapter", before)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """The folder of a model whose configuration alone says that the head is the embedding."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=8, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=24, tie_word_embeddings=True,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


TIED = [
    {"target_modules": ["embed_tokens"]},
    {"target_modules": ["lm_head"]},
    {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
    {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
]


@pytest.mark.parametrize("config", TIED)
def test_a_tie_that_only_the_configuration_declares(tmp_path, llama, config):
    trained(tmp_path / "adapter", LlamaForCausalLM.from_pretrained(llama), **config)
    with pytest.raises(MergeError, match=r"tie_word_embeddings.*untie the base first"):
        open_adapter(tmp_path / "adapter", llama)

    module = LlamaForCausalLM.from_pretrained(llama, tie_word_embeddings=False)  # what the sentence says
    module.get_output_embeddings().weight.data.copy_(module.get_input_embeddings().weight)
    module.save_pretrained(tmp_path / "untied")
    adapter = peft.PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(llama), tmp_path / "adapter").eval()
    merge(tmp_path / "untied", [tmp_path / "adapter"], TaskArithmetic(scale=1.0), output=tmp_path / "merged")
    merged = LlamaForCausalLM.from_pretrained(tmp_path / "merged").eval()
    tokens = torch.arange(20)[None]
    torch.testing.assert_close(merged(tokens).logits, adapter(tokens).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["q_proj", "gate_proj", "down_proj"]},  # as many outputs as there are tokens
        {"target_modules": ["q_proj"], "trainable_token_indices": [3, 20]},
    ],
)
def test_a_tie_that_an_adapter_keeps(tmp_path, llama, config):
    trained(tmp_path / "adapter", LlamaForCausalLM.from_pretrained(llama), **config)
    adapter = peft.PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(llama), tmp_path / "adapter").eval()
    merge(llama, [tmp_path / "adapter"], TaskArithmetic(scale=1.0), output=tmp_path / "merged")
    merged = LlamaForCausalLM.from_pretrained(tmp_path / "merged").eval()
    tokens = torch.arange(24)[None]
    expected = adapter(tokens).logits
    torch.testing.assert_close(merged(tokens).logits, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(adapter.merge_and_unload()(tokens).logits, expected, rtol=1e-4, atol=1e-4)


def test_rows_of_tied_embeddings_in_memory_stay_tied(tmp_path, llama):
    module = LlamaForCausalLM.from_pretrained(llama)
    base = module.state_dict()
    trained(tmp_path, LlamaForCausalLM.from_pretrained(llama), target_modules=["q_proj"], trainable_token_indices=[5])
    merged = merge(base, [tmp_path], WeightAverage()).weights
    assert merged["lm_head.weight"] is merged["model.embed_tokens.weight"]
    assert not torch.equal(merged["lm_head.weight"][5], base["lm_head.weight"][5])
