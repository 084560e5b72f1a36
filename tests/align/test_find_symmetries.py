"""Permutation groups found in the graphs of modules."""

from __future__ import annotations

import copy
import functools
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from lightning_merge.align import (
    Fixed,
    Free,
    Group,
    Permutation,
    Product,
    Sum,
    Symmetries,
    describe,
    find_symmetries,
    verification,
)
from lightning_merge.align.axes import groups_of, sources
from lightning_merge.align.find_symmetries import propagated
from lightning_merge.align.tracing import copied, decomposed, exported
from lightning_merge.align.verification import verified, without
from lightning_merge.utilities.errors import MergeError
from lightning_merge.utilities.sites import Site, at_sites, split_name
from tests.align.zoo import ZOO


def randomized(module: nn.Module) -> nn.Module:
    """Parameters and statistics among which none equals another one, so that a wrong permutation shows."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if tensor.dim() > 1:
                tensor.normal_(std=tensor[0].numel() ** -0.5)
            elif tensor.is_floating_point():
                tensor.uniform_(0.5, 1.5) if name.endswith(("weight", "var", "gamma")) else tensor.normal_(std=0.3)
    return module.eval()


@functools.cache
def found(name: str) -> tuple[nn.Module, Tensor, Symmetries]:
    module, inputs = ZOO[name][0]()
    symmetries = find_symmetries(module, inputs, verify=False)
    if inputs.is_floating_point():
        inputs = torch.randn(2, *inputs.shape[1:], generator=torch.Generator().manual_seed(2))
    return randomized(module), inputs, symmetries


@torch.no_grad()
def activations(module: nn.Module, weights: dict[str, Tensor], inputs: Tensor, sites: list[Site]) -> dict[str, Tensor]:
    seen: dict[str, Tensor] = {}
    with at_sites(module, sites, lambda site, activation: seen.update({site.name: activation.clone()})):
        seen["the outputs"] = functional_call(module, weights, (inputs,), tie_weights=False)
    return seen


@pytest.mark.parametrize("name", ZOO)
def test_a_random_permutation_leaves_the_outputs_and_moves_the_activations(name):
    _, groups, within, share = ZOO[name]
    module, inputs, symmetries = found(name)
    permutation = Permutation.random(symmetries, seed=3)
    weights = module.state_dict()
    permuted = permutation.apply(weights)
    sites = [Site(path, input=is_input) for path, is_input in map(split_name, symmetries.features)]
    old, new = (activations(module, state, inputs, sites) for state in (weights, permuted))

    scale = old["the outputs"].abs().max()
    assert (new.pop("the outputs") - old["the outputs"]).abs().max() <= 1e-5 * scale
    for site, activation in new.items():
        expected = old[site]
        for dim, axis in enumerate(symmetries.features[site][1:], 1):
            expected = expected.index_select(dim, sources(axis, permutation.orders, symmetries.within))
        torch.testing.assert_close(activation, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()), msg=site)

    assert (len(symmetries.groups), len(symmetries.within)) == (groups, within)
    parameters = dict(module.named_parameters(remove_duplicate=False))
    movable = sum(tensor.numel() for key, tensor in parameters.items() if key in symmetries.axes)
    assert movable >= share * sum(tensor.numel() for tensor in parameters.values())
    identity = Permutation.identity(symmetries).orders
    still = {group for group, order in permutation.orders.items() if torch.equal(order, identity[group])}
    for key, axes in symmetries.axes.items():
        if not still.issuperset(group for axis in axes for group in groups_of(axis)):
            assert not torch.equal(permuted[key], weights[key]), key


@pytest.mark.parametrize("name", ["vit_tiny", "grouped", "gpt", "torchvision_vit"])
def test_simpler_operators_say_the_same(name):
    """PyTorch 2.4 exports core ATen operators right away."""
    module, inputs, symmetries = found(name)
    program = decomposed(exported(copied(module), (inputs,)))
    assert program is not None
    again = propagated(module, program)
    assert (again.axes, again.groups) == (symmetries.axes, symmetries.groups)


def test_the_heads_of_a_fused_layer_have_orders_of_their_own_for_queries_and_values():
    _, _, symmetries = found("vit_tiny")
    heads, key, value = (f"blocks.0.attn.qkv.weight:0{end}" for end in ("", ".2", ".3"))
    by_head = [Product((Free(heads, 2), Free(inner, 8))) for inner in (key, key, value)]
    assert symmetries.axes["blocks.0.attn.qkv.bias"] == (Sum(tuple(by_head)),)
    assert symmetries.axes["blocks.0.attn.proj.weight"][1] == by_head[2]
    assert symmetries.within[key] == symmetries.within[value] == heads


def test_the_context_of_an_attention_is_a_site():
    features = found("gpt")[2].features
    heads = Product((Free("qkv.weight:0", 2), Free("qkv.weight:0.3", 8)))
    assert features["out:input"] == (Fixed(-1), Fixed(6), heads)
    assert "norm1:input" in features  # a sum that no part computes
    assert "down:input" in features
    assert "qkv:input" not in features  # what norm1 computes
    assert "head" not in features


def test_statistics_are_named():
    _, _, symmetries = found("vgg11_bn")
    assert {name.rpartition(".")[2] for name in symmetries.statistics} == {"running_mean", "running_var"}
    assert not found("forked")[2].statistics


class Sorts(nn.Module):
    """Nothing says what sorting does to channels."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(4, 8), nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.third(torch.relu(self.second(self.first(x).sort(dim=-1).values)))


def test_what_an_unknown_operator_touches_is_fixed_and_reported():
    module = Sorts()
    symmetries = find_symmetries(module, torch.randn(2, 4))
    assert list(symmetries.groups) == ["second.weight:0"]
    assert symmetries.fixed["aten.sort.default"] == 3  # first.weight, first.bias, second.weight
    text = describe(symmetries, module)
    assert text.startswith("1 permutation groups, 0 of them within others, order 62.6% of 115 parameters.")
    assert "Fixed axes, aten.sort.default: 3." in text


def test_parameters_can_be_kept_in_their_places():
    module, inputs = ZOO["forked"][0]()
    symmetries = find_symmetries(module, inputs, fixed=["branch.*"])
    assert set(symmetries.groups) == {"side.weight:0"}
    assert symmetries.fixed["as asked"] > 0
    with pytest.raises(MergeError, match=r"'brunch\.\*' matches no parameter"):
        find_symmetries(module, inputs, fixed=["brunch.*"])


def test_a_module_is_left_as_it_is():
    module, inputs = ZOO["grouped"][0]()
    module.train().head.weight.grad = torch.ones(5, 16)
    state = copy.deepcopy(module.state_dict())
    find_symmetries(module, inputs)
    assert module.training
    assert module.batch.training
    assert torch.equal(module.head.weight.grad, torch.ones(5, 16))
    assert all(torch.equal(state[key], value) for key, value in module.state_dict().items())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())


def test_a_lightning_module_with_its_trainer():
    import lightning

    class Lit(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.net = ZOO["forked"][0]()[0]

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

    module = Lit()
    trainer = lightning.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    trainer.loader = (number for number in range(3))  # cannot be copied
    module.trainer = trainer
    symmetries = find_symmetries(module, torch.zeros(1, 3, 2, 2))
    assert set(symmetries.groups) == {"net.stem.weight:0", "net.branch.weight:0", "net.side.weight:0"}
    assert module.trainer is trainer


class Branches(nn.Module):
    """Control flow that depends on data."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        return x if x.sum() > 0 else -x


def test_what_cannot_be_traced_or_run_is_refused():
    with pytest.raises(MergeError, match=r"(?s)cannot trace the module.*by hand with Symmetries\.from_axes"):
        find_symmetries(Branches(), torch.randn(2, 4))
    with pytest.raises(MergeError, match="does not run on the example inputs: mat1 and mat2 shapes"):
        find_symmetries(Sorts(), torch.randn(2, 5))
    module = Sorts()
    module.computed = module.first.weight * 2
    with pytest.raises(MergeError, match="cannot be copied in order to trace it"):
        find_symmetries(module, torch.randn(2, 4))


def test_a_wrong_group_is_found_and_left_out():
    module, inputs, right = found("vit_tiny")
    wrong = replace(
        right,
        groups={**right.groups, "classes": Group("classes", 5), "tokens": Group("tokens", 5)},
        axes={
            **right.axes,
            "head.bias": (Free("classes", 5),),
            "pos_embed": (Fixed(1), Free("tokens", 5), right.axes["pos_embed"][2]),
        },
    )
    checked = verified(wrong, copied(module), (inputs,))
    assert set(checked.groups) == set(right.groups)
    assert {reason for reason in checked.fixed if reason.startswith("failed")} == {
        "failed verification: classes",
        "failed verification: tokens",
    }
    assert "head.bias" not in checked.axes
    heads = "blocks.0.attn.qkv.weight:0"
    fixed_heads = without(right, [heads])
    assert fixed_heads.groups[f"{heads}.2"].within is None
    assert verified(fixed_heads, copied(module), (inputs,)) is fixed_heads


def test_zeros_and_constants_do_not_hide_a_wrong_group():
    """A residual branch with a zero LayerScale, whose inner group is wrong."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.gamma = nn.Linear(4, 6), nn.Linear(6, 4), nn.Parameter(torch.zeros(4))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.gamma * self.second(self.first(x).relu())

    module = Block()
    wrong = Symmetries({"g": Group("g", 6)}, {"first.weight": (Free("g", 6), Fixed(4))})
    assert not verified(wrong, copied(module), (torch.zeros(2, 4),)).groups
    right = find_symmetries(module, torch.zeros(1, 4))
    assert list(right.groups) == ["first.weight:0"]


def test_outputs_that_show_nothing_are_refused():
    class Nothing(Sorts):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 0

    with pytest.raises(MergeError, match="zero or not finite"):
        find_symmetries(Nothing(), torch.randn(2, 4))


def test_layers_that_compute_in_single_precision_are_no_reason_to_fix_a_group():
    class Rounds(Sorts):
        def forward(self, x: Tensor) -> Tensor:
            h = self.second(self.first(x).relu())
            return self.third(nn.functional.normalize(h.float(), dim=-1).to(h.dtype))

    symmetries = find_symmetries(Rounds(), torch.randn(2, 4))
    assert len(symmetries.groups) == 2
    assert verification.Trial(copied(Rounds()), (torch.randn(2, 4),)).tolerance == verification.ROUNDED
    assert verification.Trial(copied(Sorts()), (torch.randn(2, 4),)).tolerance == verification.EXACT


def test_a_process_that_has_traced_can_still_train_in_forks():
    code = """
import os, torch
from lightning_merge.align import find_symmetries
find_symmetries(torch.nn.Linear(3, 2), torch.randn(2, 3), verify=False)
torch.ones(2, requires_grad=True).sum().backward()
child = os.fork()
if child == 0:
    torch.ones(2, requires_grad=True).sum().backward()
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
