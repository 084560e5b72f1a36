"""The module and the data that some methods need while they merge: what is refused, and that nothing is changed."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_merge as lm
from lightning_merge.merging.inventory import take_inventory
from lightning_merge.merging.toy_models import ToyModule, make_data, make_models
from lightning_merge.methods import AdaMerging, KnOTS, RegMeanPlusPlus, Wrapper
from lightning_merge.methods.base.task_data import TaskData

METHODS = [AdaMerging(steps=3, lr=0.05), RegMeanPlusPlus()]


@pytest.fixture
def models():
    return make_models(2)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
class TestRefusals:
    def refusal(self, monkeypatch, method, models, **given) -> str:
        monkeypatch.setattr(
            type(method), "survey", lambda *_: pytest.fail("work began before the conflicts were found")
        )
        base, experts = models
        with pytest.raises(lm.MergeError) as caught:
            lm.merge(base, experts, method, **given)
        return str(caught.value)

    def test_no_module_and_no_data(self, monkeypatch, method, models):
        for given in ({}, {"module": ToyModule()}, {"data": make_data(models[1])}):
            message = self.refusal(monkeypatch, method, models, **given)
            assert f"{type(method).__name__} runs the model on images of every expert's task" in message
            assert "merge(…, module=model, data={'expert 0': loader, 'expert 1': loader})" in message
            assert "--model and --data" in message

    def test_data_of_other_experts(self, monkeypatch, method, models):
        data = make_data(["expert 0", "photo"])
        message = self.refusal(monkeypatch, method, models, module=ToyModule(), data=data)
        assert "no data of expert expert 1; give merge(…, data={'expert 1': loader})" in message
        assert "data for 'photo', which is no expert; the experts are expert 0, expert 1" in message

    def test_data_that_can_be_read_once(self, monkeypatch, method, models):
        data = {name: iter(batches) for name, batches in make_data(models[1]).items()}
        message = self.refusal(monkeypatch, method, models, module=ToyModule(), data=data)
        assert "The data of expert expert 0 can be read only once; give a DataLoader" in message

    def test_another_module(self, monkeypatch, method, models):
        module = ToyModule()
        module.visual.proj = nn.Parameter(torch.zeros(3, 12))
        module.more = nn.Linear(2, 2, bias=False)
        del module.text_projection
        message = self.refusal(monkeypatch, method, models, module=module, data=make_data(models[1]))
        assert "'text_projection' of the base is no parameter of the module" in message
        assert "'visual.proj' has shape (2, 12) in the base and (3, 12) in the module" in message
        assert (
            "'more.weight' of the module is missing in the base and in what expert expert 1 keeps to itself" in message
        )


@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
class TestRuns:
    def merge(self, method, models, **given):
        base, experts = models
        return lm.merge(base, experts, method, **{"module": ToyModule(), "data": make_data(experts), **given}).weights

    def test_labels_are_not_looked_at(self, method, models):
        labelled = {name: [(batch, "no label") for batch in batches] for name, batches in make_data(models[1]).items()}
        plain, other = self.merge(method, models), self.merge(method, models, data=labelled)
        assert all(torch.equal(plain[name], other[name]) for name in plain)

    def test_shuffled_data_are_drawn_by_the_seed_of_the_merge(self, method, models):
        data = {
            name: DataLoader(TensorDataset(torch.cat(batches)), batch_size=5, shuffle=True, drop_last=True)
            for name, batches in make_data(models[1]).items()
        }
        method = RegMeanPlusPlus(num_examples=5) if isinstance(method, RegMeanPlusPlus) else method
        module, state = ToyModule(), torch.get_rng_state()
        one, same, other = (
            lm.merge(*models, method, module=module, data=data, seed=seed).weights for seed in (1, 1, 2)
        )
        assert all(torch.equal(one[name], same[name]) for name in one)
        assert any(not torch.equal(one[name], other[name]) for name in one)
        assert torch.equal(torch.get_rng_state(), state)

    def test_the_module_stays_as_it_was(self, method, models):
        module = ToyModule()
        module.visual.eval()
        before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
        modes = [part.training for part in module.modules()]
        self.merge(method, models, module=module)
        assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
        assert modes == [part.training for part in module.modules()]
        assert all(parameter.grad is None for parameter in module.parameters())

    def test_own_weights_of_the_module_are_not_used(self, method, models):
        module = ToyModule()
        module.load_state_dict(models[1]["expert 0"])
        one, other = self.merge(method, models), self.merge(method, models, module=module)
        assert all(torch.equal(one[name], other[name]) for name in one)

    def test_inside_a_wrapper(self, method, models):
        one, other = self.merge(method, models), self.merge(Wrapper(method), models)
        assert all(torch.equal(one[name], other[name]) for name in one)

    def test_not_in_other_coordinates(self, method, models):
        with pytest.raises(lm.MergeError, match="not inside KnOTS or CoreSpace"):
            self.merge(KnOTS(method), models)

    def test_batches_that_are_none(self, method, models):
        with pytest.raises(lm.MergeError, match="data of expert expert 0 hold no batch"):
            self.merge(method, models, data={name: [] for name in models[1]})
        with pytest.raises(lm.MergeError, match="expert 0 holds a dict; it must be images"):
            self.merge(method, models, data={name: [{"image": 1}] for name in models[1]})

    def test_a_compiled_module(self, method, models):
        one, other = self.merge(method, models), self.merge(method, models, module=torch.compile(ToyModule()))
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_every_task_has_its_own_head_of_its_own_size():
    body, heads = torch.randn(4, 3), {"a": torch.randn(2, 4), "b": torch.randn(5, 4)}
    base = lm.open_weights({"0.weight": body}, "base")
    experts = {t: lm.open_weights({"0.weight": body + 1, "1.weight": head}, t) for t, head in heads.items()}
    net = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 7, bias=False))
    inventory = take_inventory(base, list(experts.values()), exclude=["1.*"])
    tasks = TaskData(net, {}, {}, experts, inventory.tied, inventory.private)
    images = torch.randn(6, 3)
    for task, head in heads.items():
        torch.testing.assert_close(tasks.logits(task, {"0.weight": 2 * body}, images), images @ (2 * body).T @ head.T)


def test_tied_weights_run_tied():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = nn.Linear(3, 3, bias=False)
            self.two = nn.Linear(3, 3, bias=False)
            self.two.weight = self.one.weight

        def forward(self, images):
            return self.two(torch.tanh(self.one(images)))

    draw = torch.Generator().manual_seed(0)
    net = Tied()
    base = net.state_dict()
    experts = {}
    for task in "ab":
        weight = base["one.weight"] + torch.randn(3, 3, generator=draw)
        experts[task] = {"one.weight": weight, "two.weight": weight}
    data = {task: [torch.randn(9, 3, generator=draw)] for task in "ab"}
    for method in METHODS:
        merged = lm.merge(base, experts, method, module=net, data=data).weights
        assert merged["one.weight"] is merged["two.weight"]
