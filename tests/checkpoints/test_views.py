"""Models seen under other names, completed, or as a mean: what is known of them stays known."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import lightning_merge as lm
from lightning_merge.checkpoints import open_adapter, open_weights, save_weights
from lightning_merge.checkpoints.prefixes import Prefix
from lightning_merge.checkpoints.views import Completed, Mean, Renamed, View, as_named, own_names, under_names_of
from lightning_merge.checkpoints.weights import Weights
from tests.toys import base_weights, expert_weights

BASE = base_weights()
PREFIX = Prefix("", "model.")


def renamed(original: Weights) -> Renamed:
    return Renamed(original, {f"model.{name}": name for name in original}, PREFIX)


def completed(original: Weights) -> Completed:
    return Completed(original, open_weights(BASE | {"more": torch.ones(2)}))


VIEWS = pytest.mark.parametrize("see", [renamed, completed])


@pytest.fixture
def file() -> Weights:
    save_weights("expert.ckpt", expert_weights(BASE, 1), hyper_parameters={"lr": 1})
    return open_weights("expert.ckpt")


@pytest.fixture
def adapter() -> Weights:
    """An expert that changes one matrix by a product of rank 2."""
    draw = torch.Generator().manual_seed(0)
    Path("adapter").mkdir()
    factors = {"A": torch.randn(2, 8, generator=draw), "B": torch.randn(12, 2, generator=draw)}
    tensors = {f"base_model.model.mlp.lora_{side}.weight": factor for side, factor in factors.items()}
    save_file(tensors, "adapter/adapter_model.safetensors")
    Path("adapter/adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
    return open_adapter("adapter", BASE)


class TestEveryView:
    @VIEWS
    def test_has_the_file_the_header_and_the_name_of_the_model(self, see, file):
        view = see(file)
        assert isinstance(view, View)
        assert (view.name, view.path, view.header) == (file.name, file.path, file.header)
        assert (view.inputs, view.files) == (file.inputs, file.files)
        assert view.fingerprint() == file.fingerprint() is not None
        assert view.provenance() == file.provenance()

    @VIEWS
    def test_has_the_digest_of_the_model_which_is_computed_once(self, see, file, monkeypatch):
        times = []
        compute = Weights._hash
        monkeypatch.setattr(Weights, "_hash", lambda self: times.append(self) or compute(self))
        view = see(file)
        assert view.digest() == see(view).digest() == file.digest() == open_weights(expert_weights(BASE, 1)).digest()
        assert times[:-1] == [file]

    @VIEWS
    def test_says_when_the_file_was_changed(self, see, file):
        view = see(file)
        view.check_unchanged()
        save_weights("expert.ckpt", BASE | {"more": torch.ones(3)})
        for ask in (view.check_unchanged, view.digest, view.fingerprint, lambda: view[next(iter(view))]):
            with pytest.raises(lm.MergeError, match=r"expert\.ckpt was changed"):
                ask()

    @VIEWS
    def test_knows_the_differences_of_an_adapter(self, see, adapter):
        view = see(adapter)
        name = "model.mlp.weight" if see is renamed else "mlp.weight"
        assert view.origin is adapter.origin is not None
        assert view.low_rank
        base = BASE["mlp.weight"]
        assert torch.equal(view.delta(name, base), adapter.delta("mlp.weight", base))
        assert torch.linalg.matrix_rank(view.delta(name, base)) == 2
        ((B, A),) = view.factors(name, base)
        assert (B.shape, A.shape) == ((12, 2), (2, 8))
        assert view.factors(name.replace("mlp", "proj"), BASE["proj.weight"]) == []
        assert view.delta(name, base + 1) is None  # another base

    @VIEWS
    def test_dense_weights_are_no_differences(self, see, file):
        view = see(file)
        name = "model.mlp.weight" if see is renamed else "mlp.weight"
        assert (view.origin, view.low_rank) == (None, False)
        assert view.delta(name, BASE["mlp.weight"]) is None
        assert view.factors(name, BASE["mlp.weight"]) is None

    @VIEWS
    def test_of_models_in_memory(self, see):
        original = open_weights(expert_weights(BASE, 1), "in memory")
        view = see(original)
        assert (view.path, view.inputs, view.fingerprint()) == (None, (), None)
        assert view.digest() == original.digest()

    def test_of_a_mean_says_what_the_mean_is_of(self):
        mean = Mean("mean", {name: open_weights(expert_weights(BASE, i)) for i, name in enumerate("ab")})
        assert renamed(mean).provenance().keys() == {"mean_of"}


class TestRenamed:
    def test_has_every_tensor_under_its_new_name(self, file):
        view = renamed(file)
        assert list(view) == [f"model.{name}" for name in file]
        for name, tensor in file.items():
            assert torch.equal(view[f"model.{name}"], tensor)
            assert view.meta[f"model.{name}"].shape == tensor.shape
        with pytest.raises(KeyError, match=r"expert\.ckpt has no parameter 'mlp\.weight'"):
            _ = view["mlp.weight"]

    def test_tied_names_are_renamed(self):
        shared = torch.ones(2)
        view = renamed(open_weights({"a": shared, "b": shared, "c": torch.ones(2)}))
        assert view.tied == {"model.b": "model.a"}

    def test_a_view_of_a_view(self, file):
        twice = renamed(renamed(file))
        assert torch.equal(twice["model.model.mlp.weight"], file["mlp.weight"])
        assert twice.digest() == file.digest()

    def test_adapters_are_seen_as_their_base_is(self, adapter):
        base = renamed(open_weights(BASE))
        seen = as_named(adapter, base)
        assert list(seen) == list(base)
        assert own_names(base) is base.original
        assert as_named(adapter, base.original) is adapter

    def test_a_base_under_the_names_of_a_module_that_has_more(self):
        module = open_weights({f"net.{name}": tensor for name, tensor in BASE.items()} | {"head": torch.ones(1)})
        seen = under_names_of(module, open_weights(BASE))
        assert list(seen) == [f"net.{name}" for name in BASE]


class TestCompleted:
    def test_takes_what_it_lacks_from_the_other_model(self):
        whole = open_weights({"a": torch.zeros(2), "b": torch.zeros(3), "c": torch.zeros(1)})
        part = open_weights({"a": torch.ones(2), "b": torch.ones(3), "d": torch.ones(1)})
        view = Completed(part, whole, lambda name: name == "b")
        assert {name: tensor.sum().item() for name, tensor in view.items()} == {"a": 2, "b": 0, "c": 0}
        assert view.digest() == part.digest()

    def test_shapes_are_those_of_the_model_that_gives_a_tensor(self):
        view = Completed(open_weights({"a": torch.ones(2)}), open_weights({"a": torch.ones(3), "b": torch.ones(4)}))
        assert [view.meta[name].shape for name in view] == [(2,), (4,)]

    def test_a_tied_name_that_is_lacking_is_the_model_s_own(self):
        shared = torch.zeros(2)
        whole = open_weights({"a": shared, "b": shared, "c": torch.zeros(1)})
        view = Completed(open_weights({"b": torch.ones(2)}), whole)
        assert {name: tensor.sum().item() for name, tensor in view.items()} == {"a": 2, "b": 2, "c": 0}
        assert view.tied == {"b": "a"}

    def test_names_of_two_models_share_no_tensor(self):
        shared = torch.zeros(2)
        whole = open_weights({"a": shared, "b": shared})
        view = Completed(open_weights({"a": torch.ones(2)}), whole, lambda name: name == "b")
        assert view.tied == {}

    def test_what_the_other_model_gives_is_no_difference(self, adapter):
        view = Completed(adapter, open_weights(BASE), lambda name: name == "mlp.weight")
        assert torch.equal(view["mlp.weight"], BASE["mlp.weight"])
        assert view.delta("mlp.weight", BASE["mlp.weight"]) is None


class TestMean:
    def test_is_computed_where_all_models_have_a_parameter(self):
        states = {name: expert_weights(BASE, i) for i, name in enumerate("ab")}
        states["b"]["head.weight"] = torch.ones(5, 8)
        mean = Mean("mean", {name: open_weights(state) for name, state in states.items()})
        assert list(mean) == [*BASE]
        expected = (states["a"]["mlp.weight"] + states["b"]["mlp.weight"]) / 2
        torch.testing.assert_close(mean["mlp.weight"], expected)
        for name in ("head.weight", "bn.num_batches_tracked"):
            assert torch.equal(mean[name], states["a"][name])

    def test_says_where_its_models_are_from(self, file):
        mean = Mean("mean", {"a": file, "b": open_weights(BASE)})
        assert mean.path is None
        assert mean.inputs == file.inputs
        assert mean.provenance()["mean_of"]["a"] == file.provenance()
