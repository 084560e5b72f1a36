"""Tensors that mean something only together."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, remove_spectral_norm, spectral_norm, weight_norm

from lightning_merge import merge, open_weights, plan, save_task_vector
from lightning_merge.analysis import compare_experts
from lightning_merge.checkpoints.joined import find_inseparable, find_magnitudes
from lightning_merge.checkpoints.weights import from_memory
from lightning_merge.methods import DARE, EMR, Fisher, TaskArithmetic, WeightAverage
from lightning_merge.utilities.errors import MergeError

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")

FORMS = {"old": weight_norm, "new": parametrizations.weight_norm}


INPUTS = {"conv": (1, 3, 5, 5), "up": (1, 3, 5)}


def normalised(form, seed):
    """A fine-tuned form of one module whose weights are normalised along several axes, directions of all lengths."""
    torch.manual_seed(0)
    norm = FORMS[form]
    module = nn.ModuleDict(
        {
            "fc": norm(nn.Linear(4, 5)),
            "columns": norm(nn.Linear(4, 5), dim=1),
            "whole": norm(nn.Linear(4, 5), dim=None),
            "one": norm(nn.Linear(4, 1)),
            "conv": norm(nn.Conv2d(3, 4, 3)),
            "up": norm(nn.ConvTranspose1d(3, 4, 3), dim=1),
            "rnn": norm(nn.LSTM(3, 4), "weight_hh_l0"),
            "plain": nn.Linear(4, 2),
        }
    )
    torch.manual_seed(seed)
    sign = -1 if seed == 2 else 1  # of magnitude and direction, so that the weight keeps its own
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.add_(0.3 * parameter.abs().mean() * torch.randn_like(parameter) if seed else 0)
            if name.endswith(("_v", "original1")):
                lengths = torch.rand(parameter.shape[0]).reshape(-1, *[1] * (parameter.dim() - 1)) + 0.1 + seed
                parameter.mul_(sign * lengths if name.partition(".")[0] not in ("columns", "whole", "up") else sign)
            if name.endswith(("_g", "original0")):
                parameter.mul_(1.5 * sign)
    return module


def effective(module, state):
    """The weights that a module computes with."""
    module.load_state_dict(state)
    weights = {}
    for name, part in module.items():
        if name == "rnn":
            part(torch.ones(2, 1, 3))
            weights["rnn.weight"] = part.weight_hh_l0.detach().clone()
        else:
            part(torch.ones(INPUTS.get(name, (1, 4))))
            weights |= {f"{name}.{key}": getattr(part, key).detach().clone() for key in ("weight", "bias")}
    return weights


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("output", [None, "merged.ckpt", "merged.safetensors"])
def test_normalised_weights_are_merged_as_weights(tmp_path, form, output):
    modules = [normalised(form, seed) for seed in range(3)]
    states = [{name: weight.clone() for name, weight in module.state_dict().items()} for module in modules]
    base, *experts = [effective(normalised(form, 0), state) for state in states]
    output = output and tmp_path / output
    merged = merge(states[0], states[1:], TaskArithmetic(scale=0.5), output=output)
    weights = dict(merged.weights)
    assert weights.keys() == states[0].keys()
    for name, weight in effective(normalised(form, 0), weights).items():
        expected = base[name] + 0.5 * sum(expert[name] - base[name] for expert in experts)
        torch.testing.assert_close(weight, expected, rtol=1e-4, atol=1e-5)
    for state, module in zip(states, modules, strict=True):
        assert all(torch.equal(state[name], weight) for name, weight in module.state_dict().items())
    assert "7 magnitudes of merged weights" in merged.summary()
    assert "| magnitudes of merged weights (weight_norm) |" in plan(states[0], states[1:], WeightAverage()).text()


def test_the_model_of_a_task_another_scale_and_random_methods(tmp_path):
    states = [normalised("new", seed).state_dict() for seed in range(3)]
    merged = merge(states[0], {"a": states[1], "b": states[2]}, DARE(TaskArithmetic()), keep_update=True, seed=3)
    again = merge(states[0], {"a": states[1], "b": states[2]}, DARE(TaskArithmetic(scale=0.3)), seed=3).weights
    rescaled = merged.rescaled(0.3).weights
    assert rescaled.keys() == again.keys()
    assert all(torch.equal(rescaled[name], weight) for name, weight in again.items())

    own = merge(states[0], {"a": states[1]}, EMR()).for_task("a")
    expected = effective(normalised("new", 0), states[1])
    for name, weight in effective(normalised("new", 0), own).items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-4, atol=1e-4)


def test_task_vectors_and_half_precision_of_normalised_weights(tmp_path):
    states = [normalised("old", seed).state_dict() for seed in range(2)]
    vector = save_task_vector(tmp_path / "a.task_vector.safetensors", states[0], states[1])
    found = effective(normalised("old", 0), merge(states[0], [vector], WeightAverage()).weights)
    for name, weight in effective(normalised("old", 0), states[1]).items():
        torch.testing.assert_close(found[name], weight, rtol=1e-4, atol=1e-4)
    half = [{name: weight.bfloat16() for name, weight in state.items()} for state in states]
    merged = merge(half[0], [half[1]], WeightAverage()).weights
    assert all(weight.dtype == torch.bfloat16 for weight in merged.values())
    torch.testing.assert_close(merged["fc.weight_v"].float(), found["fc.weight"], rtol=0.05, atol=0.05)


def test_a_row_that_merges_to_zero_is_zero(tmp_path):
    base, expert = ({"fc.weight_g": g * torch.ones(2, 1), "fc.weight_v": v} for g, v in (
        (1.0, torch.eye(2)), (1.0, torch.tensor([[-1.0, 0.0], [0.0, 1.0]]))))  # fmt: skip
    merged = merge(base, [base, expert], WeightAverage()).weights
    assert merged["fc.weight_g"].tolist() == [[0.0], [1.0]]
    module = weight_norm(nn.Linear(2, 2, bias=False))
    module.load_state_dict({name.removeprefix("fc."): weight for name, weight in merged.items()})
    assert module(torch.ones(1, 2)).tolist() == [[0.0, 1.0]]


def test_both_parts_of_a_normalised_weight_are_left_out_or_none(tmp_path):
    states = [normalised("old", seed).state_dict() for seed in range(2)]
    with pytest.raises(MergeError, match=r"'fc.weight_g' and 'fc.weight_v' are one weight together"):
        merge(states[0], [states[1]], WeightAverage(), exclude=["fc.weight_g"])
    merged = merge(states[0], [states[1]], WeightAverage(), exclude=["fc.*"])
    assert all(torch.equal(merged.weights[name], states[0][name]) for name in states[0] if name.startswith("fc."))
    assert torch.equal(merged.for_task(merged.inventory.private and next(iter(merged.experts)))["fc.weight_v"],
                       states[1]["fc.weight_v"])  # fmt: skip


def test_comparisons_look_at_the_weights(tmp_path):
    states = [normalised("old", seed).state_dict() for seed in range(2)]
    longer = {name: 3 * weight if name.endswith("_v") else weight for name, weight in states[1].items()}
    names = [[p.name for p in compare_experts(states[0], {"a": s}).parameters] for s in (states[1], longer)]
    assert "fc.weight_v" in names[0]
    assert "fc.weight_g" not in names[0]
    lengths = [{p.name: float(p.products[0, 0]) for p in compare_experts(states[0], {"a": s}).parameters}
               for s in (states[1], longer)]  # fmt: skip
    assert lengths[0] == pytest.approx(lengths[1], rel=1e-4)


def test_methods_that_need_statistics_say_so(tmp_path):
    states = [normalised("old", seed).state_dict() for seed in range(2)]
    with pytest.raises(MergeError, match=r"Fisher looks at .*remove_weight_norm"):
        merge(states[0], {"a": states[1]}, Fisher())
    assert any("Fisher looks at" in problem for problem in plan(states[0], {"a": states[1]}, Fisher()).problems)


def test_names_that_only_look_alike_are_merged_as_they_are():
    """A gate and a value of a recurrent cell; a head and a body of other shapes."""
    state = {"time_mix_g": torch.ones(1, 1, 4), "time_mix_v": torch.ones(1, 1, 4), "weight_g": torch.ones(3, 4),
             "weight_v": torch.ones(3, 4), "other.weight_g": torch.ones(2)}  # fmt: skip
    assert find_magnitudes(from_memory("a", state)) == {}


def codes(**tensors):
    return {
        "norm.weight": torch.ones(3),
        "norm.bias": torch.ones(3),
        **{k.replace("__", "."): v for k, v in tensors.items()},
    }


i8, i32, f8 = (
    torch.ones(4, 4).to(torch.int8),
    torch.ones(4, 4).to(torch.int32),
    torch.ones(4, 4).to(torch.float8_e4m3fn),
)
QUANTIZED = {
    "GPTQ": codes(fc__qweight=i32, fc__qzeros=i32, fc__scales=torch.ones(1, 4), fc__g_idx=torch.ones(4).int()),
    "bitsandbytes 8 bit": codes(fc__weight=i8, fc__SCB=torch.ones(4)),
    "bitsandbytes 4 bit": codes(**{"fc.weight": torch.ones(8, 1, dtype=torch.uint8), "fc.weight.absmax": torch.ones(1),
                                   "fc.weight.quant_state.bitsandbytes__nf4": torch.ones(9, dtype=torch.uint8)}),
    "HQQ": codes(fc__W_q=i8, fc__zero=torch.ones(4), fc__scale=torch.ones(4)),
    "compressed-tensors": codes(fc__weight_packed=i32, fc__weight_scale=torch.ones(4)),
    "float8 of blocks": codes(fc__weight=f8, fc__weight_scale_inv=torch.ones(1, 1)),
    "float8": codes(fc__weight=f8, fc__weight_scale=torch.ones(1)),
    "mxfp4": codes(experts__gate_blocks=i8.view(torch.uint8), experts__gate_scales=i8.view(torch.uint8)),
    "of one's own": codes(fc__codes_of_mine=i8, fc__codes_of_mine_scale=torch.ones(4)),
    "without a module": codes(qweight=i32, scales=torch.ones(4)),
}  # fmt: skip


@pytest.mark.parametrize("kind", QUANTIZED)
def test_quantized_codes_are_refused(kind):
    state, dense = QUANTIZED[kind], codes(fc__weight=torch.ones(4, 4))
    for base, expert, who in ((state, state, "The base"), (dense, state, "The expert b"), (state, dense, "The base")):
        with pytest.raises(
            MergeError, match=f"{who} holds quantized weights .*give the model in floating point"
        ) as error:
            merge(base, {"b": expert}, WeightAverage())
        assert plan(base, {"b": expert}, WeightAverage()).problems == error.value.problems
    with pytest.raises(MergeError, match="holds quantized"):
        compare_experts(state, {"b": state})
    merge(state, {"b": state}, WeightAverage(), exclude=[name for name in state if not name.startswith("norm")])


def test_ordinary_integers_and_plain_float8_are_merged_as_before():
    state = {
        "swin.relative_position_index": torch.zeros(9, 9, dtype=torch.int64), "swin.logit_scale": torch.ones(3),
        "bn.weight": torch.ones(4), "bn.running_var": torch.ones(4), "bn.num_batches_tracked": torch.tensor(3),
        "swin.attn_mask": torch.ones(3, 3, dtype=torch.uint8), "gpt.scale": torch.ones(1),
        "gpt.bias": torch.ones(1, 1, 8, 8, dtype=torch.uint8), "gpt.mask": torch.ones(3, 3, dtype=torch.bool),
        "emb.position_ids": torch.arange(9)[None], "emb.token_type_ids": torch.zeros(1, 9, dtype=torch.int64),
        "emb.ids": torch.arange(9, dtype=torch.int32)[None], "fc.weight": f8, "fc.bias": torch.ones(4),
    }  # fmt: skip
    merged = merge(state, [state, state], WeightAverage())
    assert set(merged.inventory.copied) == {name for name, t in state.items() if not t.is_floating_point()}


FACTORS = [
    ("fc.lora_A.default.weight", "fc.lora_B.default.weight"),
    ("fc.lora_A", "fc.lora_B"),
    ("fc.lora_a.weight", "fc.lora_b.weight"),
    ("lora_unet_fc.lora_down.weight", "lora_unet_fc.lora_up.weight"),
    ("fc.hada_w1_a", "fc.hada_w1_b"),
]


@pytest.mark.parametrize("names", FACTORS)
def test_factors_within_a_checkpoint_are_refused(names):
    state = {"fc.base_layer.weight": torch.ones(4, 4), "norm.weight": torch.ones(4)}
    adapted = state | dict.fromkeys(names, torch.ones(4, 4))
    for base, expert in ((adapted, adapted), (state, adapted)):
        with pytest.raises(
            MergeError, match=rf"factors of adapters \('{names[0]}' and 1 more\).*merge_and_unload"
        ) as error:
            merge(base, {"b": expert}, WeightAverage())
        assert plan(base, {"b": expert}, WeightAverage()).problems == error.value.problems


def orthogonal():
    return parametrizations.orthogonal(nn.Linear(4, 4))


UNDONE = {
    "spectral norm": (lambda: spectral_norm(nn.Linear(4, 4)), lambda m: remove_spectral_norm(m, "weight")),
    "new spectral norm": (
        lambda: parametrizations.spectral_norm(nn.Linear(4, 4)),
        lambda m: parametrize.remove_parametrizations(m, "weight"),
    ),
    "orthogonal": (orthogonal, lambda m: parametrize.remove_parametrizations(m, "weight")),
    "pruned": (lambda: prune.random_unstructured(nn.Linear(4, 4), "weight", 0.5), lambda m: prune.remove(m, "weight")),
}


@pytest.mark.parametrize("kind", UNDONE)
def test_other_parametrized_weights_are_refused_with_a_remedy_that_works(kind):
    make, undo = UNDONE[kind]
    modules = [nn.Sequential(make(), nn.Linear(4, 4)) for _ in range(3)]
    base, *experts = [module.state_dict() for module in modules]
    with pytest.raises(
        MergeError, match=r"is no weight, but what a weight is computed from.*in every model call"
    ) as error:
        merge(base, experts, WeightAverage())
    calls = {"spectral norm": "remove_spectral_norm(0, 'weight')", "pruned": "prune.remove(0, 'weight')"}
    assert calls.get(kind, "parametrize.remove_parametrizations(0, 'weight')") in str(error.value)
    for module in modules:
        undo(module[0])
    base, *experts = [module.state_dict() for module in modules]
    merged = merge(base, experts, WeightAverage()).weights
    torch.testing.assert_close(merged["0.weight"], (experts[0]["0.weight"] + experts[1]["0.weight"]) / 2)


def test_every_kind_is_said_at_once(tmp_path):
    state = QUANTIZED["HQQ"] | {
        "fc.lora_A": torch.ones(2, 2),
        "g.weight_orig": torch.ones(2),
        "g.weight_u": torch.ones(2),
    }
    assert len(find_inseparable(open_weights(state), "The base", lambda name: False)) == 3
    assert find_inseparable(open_weights(state), "The base", lambda name: name.startswith(("fc", "g"))) == []
