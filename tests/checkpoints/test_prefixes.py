"""Experts that hold the base's network under another name."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from safetensors.torch import save_file
from torch import nn

import lightning_merge as lm
from lightning_merge.checkpoints import match_names, open_weights, save_weights
from lightning_merge.checkpoints.prefixes import Prefix, find_prefix
from lightning_merge.checkpoints.statistics_files import save_statistics
from lightning_merge.checkpoints.views import Renamed
from lightning_merge.methods import Fisher, TaskArithmetic, WeightAverage
from tests.toys import base_weights, expert_weights


def vit(num_classes: int = 5) -> nn.Module:
    timm = pytest.importorskip("timm")
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, embed_dim=16, depth=3, num_heads=2, num_classes=num_classes
    )


class Whole(LightningModule):
    """Keeps the network as ``self.model``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.criterion = nn.CrossEntropyLoss(weight=torch.ones(5))


class Parts(LightningModule):
    """Keeps the network as ``self.backbone`` and a head of its own beside it."""

    def __init__(self, backbone: nn.Module, num_classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(16, num_classes)


def moved(model: nn.Module, seed: int) -> nn.Module:
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=draw)
    return model


def copied(model: nn.Module, like: nn.Module) -> nn.Module:
    model.load_state_dict(like.state_dict(), strict=False)
    return model


def save_checkpoint(module: LightningModule, path: str) -> str:
    """What Lightning itself writes."""
    trainer = Trainer(logger=False, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu")
    trainer.strategy.connect(module)
    trainer.save_checkpoint(path, weights_only=True)
    return path


def mean(states, name):
    return torch.stack([state[name] for state in states]).mean(dim=0)


class TestTimm:
    @pytest.mark.parametrize("compiled", [False, True])
    def test_a_lightning_module_around_it(self, compiled):
        base = vit()
        save_file(base.state_dict(), "base.safetensors")
        networks = [moved(copied(vit(), base), seed) for seed in (1, 2)]
        for i, network in enumerate(networks):
            save_checkpoint(Whole(torch.compile(network) if compiled else network), f"{i}.ckpt")
        assert any("_orig_mod" in name for name in torch.load("0.ckpt")["state_dict"]) == compiled
        with pytest.raises(lm.MergeError, match=r"has 'criterion\.weight', which the base lacks.*exclude: \[criterion"):
            lm.merge("base.safetensors", {"a": "0.ckpt"}, WeightAverage())

        merged = lm.merge("base.safetensors", ["0.ckpt", "1.ckpt"], WeightAverage(), exclude=["criterion.*"])
        states = [network.state_dict() for network in networks]
        assert merged.weights.keys() == base.state_dict().keys()
        for name, weight in merged.weights.items():
            torch.testing.assert_close(weight, mean(states, name))
        vit().load_state_dict(merged.weights)

    def test_a_backbone_beside_a_head(self):
        base = vit(num_classes=0)
        save_file(base.state_dict(), "base.safetensors")
        experts = {}
        for i, classes in enumerate((3, 7)):
            experts[str(i)] = Parts(moved(copied(vit(0), base), i), classes)
            save_checkpoint(experts[str(i)], f"{i}.ckpt")
        files = {name: f"{name}.ckpt" for name in experts}
        with pytest.raises(lm.MergeError, match=r"has 'head\.weight', which the base lacks.*exclude: \[head\.\*\]"):
            lm.merge("base.safetensors", files, WeightAverage())

        merged = lm.merge("base.safetensors", files, WeightAverage(), exclude=["head.*"])
        states = [expert.backbone.state_dict() for expert in experts.values()]
        for name, weight in merged.weights.items():
            torch.testing.assert_close(weight, mean(states, name))
        assert merged.for_task("1")["head.weight"].shape == (7, 16)

    def test_a_base_that_is_the_module_and_experts_that_are_not(self):
        base = Whole(vit())
        save_checkpoint(base, "base.ckpt")
        one = moved(copied(vit(), base.model), 1).state_dict()
        two = Parts(moved(copied(vit(), base.model), 2), 4).state_dict()
        merged = lm.merge("base.ckpt", {"one": one, "two": two}, WeightAverage(), exclude=["criterion.*", "head.*"])
        for name in one:
            expected = (one[name] + two[f"backbone.{name}"]) / 2
            torch.testing.assert_close(merged.weights[f"model.{name}"], expected)


def under(prefix: str, state):
    return {prefix + name: tensor for name, tensor in state.items()}


@pytest.mark.parametrize(
    ("of_base", "of_expert", "prefix"),
    [
        ("", "model.", Prefix("model.", "")),
        ("", "module.net.", Prefix("module.net.", "")),
        ("model.", "", Prefix("", "model.")),
        ("model.", "backbone.", Prefix("backbone.", "model.")),
        ("model.net.", "ema.net.", Prefix("ema.", "model.")),
        ("a.b.", "b.", Prefix("", "a.")),
        ("", "", None),
        ("model.", "model.", None),
    ],
)
def test_the_rule(of_base, of_expert, prefix):
    base = base_weights()
    expert = under(of_expert, expert_weights(base, 1)) | {"criterion.weight": torch.ones(3)}
    origin, found = open_weights(under(of_base, base)), open_weights(expert, "expert")
    assert find_prefix(origin, found) == prefix
    seen = match_names(origin, found)
    assert (seen is found) == (prefix is None)
    assert all(torch.equal(seen[of_base + name], expert[of_expert + name]) for name in base)
    added = prefix.add if prefix is not None and not prefix.strip else ""
    assert {*seen} - {*origin} == {f"{added}criterion.weight"}


class TestLeftAlone:
    def test_two_of_the_base_s_networks_in_one_file(self):
        base = base_weights()
        both = under("student.", expert_weights(base, 1)) | under("teacher.", base)
        assert find_prefix(open_weights(base), open_weights(both)) is None
        with pytest.raises(lm.MergeError, match="no fine-tuned form of the base"):
            lm.merge(base, [both], WeightAverage())

    def test_a_network_of_other_shapes(self):
        base = base_weights()
        other = {name: torch.zeros(5) for name in base}
        assert find_prefix(open_weights(base), open_weights(under("model.", other))) is None
        half = {name: tensor for i, (name, tensor) in enumerate(base.items()) if i % 2}
        assert find_prefix(open_weights(base), open_weights(under("model.", half))) is None

    def test_two_names_that_would_become_one(self):
        base = base_weights()
        assert (
            find_prefix(open_weights(base), open_weights(under("model.", base) | {"mlp.bias": torch.ones(2)})) is None
        )

    def test_an_expert_that_has_the_names_already(self):
        """Though another copy of the network is in it."""
        base = base_weights()
        both = expert_weights(base, 1) | under("ema.", base)
        merged = lm.merge(base, [both], WeightAverage(), exclude=["ema.*"])
        assert torch.equal(merged.weights["mlp.weight"], both["mlp.weight"])


class TestSeenAs:
    """What is known of an expert stays known under other names."""

    def test_its_file_and_its_digest(self):
        base = base_weights()
        save_weights("expert.ckpt", under("model.", expert_weights(base, 1)), hyper_parameters={"lr": 1})
        expert = open_weights("expert.ckpt")
        seen = match_names(open_weights(base), expert)
        assert isinstance(seen, Renamed)
        assert (seen.path, seen.header, seen.name) == (expert.path, expert.header, expert.name)
        assert (seen.digest(), seen.fingerprint()) == (expert.digest(), expert.fingerprint())
        with pytest.raises(KeyError, match=r"expert.ckpt has no parameter 'model\.mlp\.weight'"):
            _ = seen["model.mlp.weight"]

    def test_tied_names(self):
        base = base_weights()
        base["decoder.weight"] = base["head.weight"]
        expert = expert_weights(base, 1)
        expert["decoder.weight"] = expert["head.weight"]
        merged = lm.merge(base, [under("model.", expert)], WeightAverage())
        assert merged.inventory.tied == {"decoder.weight": "head.weight"}

    def test_statistics_beside_its_file(self):
        base = base_weights()
        experts = [expert_weights(base, i) for i in range(2)]
        for i, expert in enumerate(experts):
            fisher = {f"fisher.{name}": torch.rand(tensor.shape) + 0.1 for name, tensor in expert.items()}
            for prefix, folder in (("", "plain"), ("model.", "wrapped")):
                file = save_weights(f"{folder}/{i}.ckpt", under(prefix, expert))
                renamed = {key.replace(".", f".{prefix}", 1): tensor for key, tensor in fisher.items()}
                save_statistics(f"{folder}/{i}.statistics.safetensors", renamed, open_weights(file), {})
        plain, wrapped = (
            lm.merge(base, [f"{folder}/{i}.ckpt" for i in range(2)], Fisher()).weights
            for folder in ("plain", "wrapped")
        )
        assert all(torch.equal(plain[name], wrapped[name]) for name in base)
        assert not torch.equal(plain["mlp.weight"], lm.merge(base, experts, WeightAverage()).weights["mlp.weight"])


def test_a_merge_reads_the_same_values_by_either_name():
    base = base_weights()
    experts = [expert_weights(base, i) for i in range(2)]
    expected = lm.merge(base, experts, TaskArithmetic()).weights
    found = lm.merge(base, [under(f"net{i}.", expert) for i, expert in enumerate(experts)], TaskArithmetic()).weights
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
