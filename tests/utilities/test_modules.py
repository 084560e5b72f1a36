"""A module runs with other weights than its own, in evaluation mode, and is left as it was."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.func import functional_call

from lightning_merge.utilities.errors import MergeError
from lightning_merge.utilities.modules import (
    all_tensors,
    common_dtype,
    complete_state,
    device_of,
    distinct_names,
    evaluating,
    fit_problems,
    plain,
    seeded,
    stored_tensors,
    unfused_attention,
)


class Tied(nn.Module):
    """Two layers that share a weight, one layer under two names, running statistics, and an unstored buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
        self.two.weight = self.one.weight
        self.again = self.one
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("offset", torch.ones(4), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.again(self.two(self.one(x)))) + self.offset


def drawn(module: nn.Module, seed: int = 1) -> dict[str, torch.Tensor]:
    """Weights of a module, other than its own, whose tied names stay tied."""
    generator = torch.Generator().manual_seed(seed)
    renewed = {}
    for place in {tensor.data_ptr(): tensor for tensor in module.state_dict().values()}.values():
        value = torch.rand(place.shape, generator=generator) if place.is_floating_point() else place.clone()
        renewed |= {name: value for name, t in module.state_dict().items() if t.data_ptr() == place.data_ptr()}
    return renewed


X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))


class TestEvaluating:
    def test_dropout_and_batch_statistics_are_off_within(self):
        module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout())
        with evaluating(module):
            torch.testing.assert_close(module(X), module[0](X) / (1 + 1e-5) ** 0.5)

    @pytest.mark.parametrize("fails", [False, True])
    def test_each_part_gets_its_own_mode_back(self, fails):
        module = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout(), nn.Dropout()))
        module[1].eval()
        module[1][0].train()
        before = [part.training for part in module.modules()]
        try:
            with evaluating(module):
                assert not any(part.training for part in module.modules())
                if fails:
                    raise ValueError
        except ValueError:
            pass
        assert [part.training for part in module.modules()] == before == [True, True, False, True, False]


class TestUnfusedAttention:
    def called(self, layer: nn.Module) -> list[str]:
        """The parts that are called, as seen from outside: newer versions of PyTorch look for hooks at the layer."""
        parts, names = {part: name for name, part in layer.named_modules()}, []
        handle = nn.modules.module.register_module_forward_hook(lambda part, *_: names.append(parts[part]))
        try:
            with torch.no_grad():
                layer(torch.randn(3, 5, 8))
        finally:
            handle.remove()
        return names

    def layer(self) -> nn.Module:
        return nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()

    def test_the_parts_of_an_encoder_layer_are_called(self):
        assert "linear1" not in self.called(self.layer()), "the fused kernel is no longer in the way"
        with unfused_attention():
            assert {"linear1", "linear2", "norm1", "norm2", "self_attn"} <= set(self.called(self.layer()))

    def test_the_result_is_that_of_the_fused_kernel(self):
        layer, x = self.layer(), torch.randn(3, 5, 8)
        with torch.no_grad():
            fused = layer(x)
            with unfused_attention():
                torch.testing.assert_close(layer(x), fused)

    @pytest.mark.parametrize("enabled", [True, False])
    def test_the_switch_is_as_before_even_after_an_error(self, enabled):
        torch.backends.mha.set_fastpath_enabled(enabled)
        try:
            with pytest.raises(ValueError, match="within"), unfused_attention():  # noqa: PT012
                assert not torch.backends.mha.get_fastpath_enabled()
                raise ValueError("within")
            assert torch.backends.mha.get_fastpath_enabled() == enabled
        finally:
            torch.backends.mha.set_fastpath_enabled(True)


def test_draws_are_those_of_a_fresh_seed_and_leave_no_trace():
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(0)
    undisturbed = torch.rand(3)
    torch.manual_seed(0)
    with seeded(7, torch.device("cpu")):
        assert torch.equal(torch.rand(3), expected)
    assert torch.equal(torch.rand(3), undisturbed)


def test_the_device_of_a_module():
    assert device_of(nn.Linear(2, 2, device="meta")) == torch.device("meta")
    assert device_of(nn.BatchNorm1d(2, affine=False, device="meta")) == torch.device("meta")
    assert device_of(nn.ReLU()) == torch.device("cpu")


def test_computed_in_double_where_one_weight_is():
    half, single, double = (torch.zeros(1, dtype=dtype) for dtype in (torch.float16, torch.float32, torch.float64))
    assert common_dtype({"a": half, "b": torch.zeros(1, dtype=torch.int64)}) == torch.float32
    assert common_dtype({"a": half, "b": single, "c": double}) == torch.float64


def test_every_place_of_a_tensor_is_named_once():
    names = list(distinct_names(Tied()))
    assert len(names) == len(set(names))
    assert {"one.weight", "two.weight", "offset", "norm.running_mean"} <= set(names)
    assert not any(name.startswith("again.") for name in names)


def test_what_is_within_a_compiled_module():
    module = nn.Linear(2, 2)
    assert plain(module) is module
    assert plain(torch.compile(module)) is module


class TestCompleteState:
    def test_it_runs_as_the_loaded_module_does(self):
        module, loaded = Tied().eval(), Tied().eval()
        weights = drawn(module)
        loaded.load_state_dict(weights)
        state = complete_state(module, weights, "it")
        assert torch.equal(functional_call(module, state, (X,), tie_weights=False), loaded(X))
        assert not torch.equal(module(X), loaded(X))

    @pytest.mark.parametrize("left", ["one", "two"])
    def test_a_tied_weight_may_be_given_under_its_first_name_alone(self, left):
        module = Tied().eval()
        weights = drawn(module)
        some = {k: v for k, v in weights.items() if k not in ("two.weight", "again.weight", "again.bias")}
        state = complete_state(module, some, "it")
        assert torch.equal(state[f"{left}.weight"], weights["one.weight"])
        full = complete_state(module, weights, "it")
        assert torch.equal(*(functional_call(module, s, (X,), tie_weights=False) for s in (state, full)))

    def test_one_precision_and_no_gradients(self):
        module = Tied()
        weights = {k: v.half() if v.is_floating_point() else v for k, v in drawn(module).items()}
        state = complete_state(
            module, {k: v.clone().requires_grad_(v.is_floating_point()) for k, v in weights.items()}, ""
        )
        assert {tensor.dtype for name, tensor in state.items() if "tracked" not in name} == {torch.float32}
        assert state["norm.num_batches_tracked"].dtype == torch.int64
        assert not any(tensor.requires_grad for tensor in state.values())
        weights["one.bias"] = weights["one.bias"].double()
        assert complete_state(module, weights, "it")["two.weight"].dtype == torch.float64

    def test_what_is_missing_is_named(self):
        module = Tied()
        weights = drawn(module)
        del weights["norm.running_var"], weights["two.bias"]
        with pytest.raises(MergeError, match="2 problems") as refused:
            complete_state(module, weights, "expert art")
        for name in ("norm.running_var", "two.bias"):
            assert f"'{name}' of the module is missing in expert art; is that another model?" in str(refused.value)


@pytest.mark.parametrize(
    ("name", "value", "exactly", "cover", "within"),
    [
        ("two.bias", torch.ones(4), True, True, True),
        ("two.bias", None, False, False, True),
        ("two.weight", None, False, True, True),  # an alias: the value is there under the first name
        ("one.weight", None, False, False, True),
        ("three.weight", torch.zeros(1), False, True, False),
        ("two.bias", torch.zeros(5), False, True, False),
        ("offset", torch.zeros(4), False, True, True),  # a buffer that is not stored
    ],
)
def test_what_fits_exactly_is_what_torch_loads(name, value, exactly, cover, within):
    weights = {key: tensor for key, tensor in (drawn(Tied()) | {name: value}).items() if tensor is not None}
    own = stored_tensors(Tied())
    assert (not fit_problems(own, weights, "it")) == (not fit_problems(own, weights, "it", "exactly")) == exactly
    assert (not fit_problems(own, weights, "it", "cover")) == cover
    assert (not fit_problems(all_tensors(Tied()), weights, "it", "within")) == within
    with nullcontext() if exactly else pytest.raises(RuntimeError):
        Tied().load_state_dict(weights)


def test_what_does_not_fit_is_said_with_its_remedy():
    own = {"kept": torch.zeros(2), "lost": torch.zeros(2), "grown": torch.zeros(2, 3)}
    weights = {"kept": torch.ones(2), "grown": torch.ones(4, 3), "new": torch.ones(1)}
    assert fit_problems(own, weights, "the base") == [
        "'lost' of the module is missing in the base; is that another model?",
        "'new' of the base is no parameter of the module; give the models' own module.",
        "'grown' has shape (4, 3) in the base and (2, 3) in the module; is it of another backbone or head?",
    ]
    assert fit_problems(own, weights, "the base", "cover") == fit_problems(own, weights, "the base")[:1]
    assert fit_problems(own, weights, "the base", "within") == fit_problems(own, weights, "the base")[1:]


def test_the_tensors_of_a_module():
    stored, every = stored_tensors(Tied()), all_tensors(Tied())
    assert stored.keys() == Tied().state_dict().keys()
    assert every.keys() - stored.keys() == {"offset"}
