"""What a snapshot keeps, and that it is put back in place."""

from __future__ import annotations

import functools
import random
import weakref
from collections import OrderedDict, defaultdict, deque

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.data import DataLoader, Dataset, RandomSampler

import lightning_merge as lm
from lightning_merge.evaluation.beside.snapshot import Snapshot


class Whole(LightningModule):
    """A module of a layer; what else it has is put there by the tests."""

    counted: list[int] = []  # noqa: RUF012, of the class on purpose

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.register_buffer("bank", torch.zeros(3), persistent=False)


class Slotted:
    __slots__ = ("entries",)

    def __init__(self) -> None:
        self.entries = [1]


def counter():
    count, seen = 0, []

    def step():
        nonlocal count
        count += 1
        seen.append(count)
        return count, seen

    return step


def kept(module: LightningModule, change, loaders=(), **arguments) -> None:
    """Take a snapshot, change something, and put it back."""
    snapshot = Snapshot(module, loaders, **arguments)
    change()
    snapshot.restore()


@pytest.mark.parametrize(
    "container",
    [
        [1, 2],
        {"a": 1, "b": 2},
        {1, 2},
        deque([1, 2], maxlen=3),
        OrderedDict(a=1, b=2),
        defaultdict(list, a=[1]),
    ],
)
@pytest.mark.parametrize("hidden", [False, True])
def test_containers(container, hidden):
    module, before = Whole(), repr(container)
    module.held = ({"deep": container},) if hidden else container

    def change():
        container.clear()
        if isinstance(container, dict):
            container["new"] = 3
        elif isinstance(container, set):
            container.add(3)
        else:
            container.append(3)

    kept(module, change)
    assert repr(container) == before
    assert module.held is container or hidden


def test_attributes_also_of_other_objects_and_of_the_class():
    class Meter:
        def __init__(self) -> None:
            self.total, self.slotted = 0, Slotted()

    module = Whole()
    meter = module.meter = Meter()

    def change():
        meter.total = 5
        meter.slotted.entries.append(2)
        meter.new = True
        module.other = Meter()
        module.counted.append(1)
        module.layer.eval()

    kept(module, change)
    assert (meter.total, meter.slotted.entries, module.meter) == (0, [1], meter)
    assert not hasattr(meter, "new")
    assert not hasattr(module, "other")
    assert module.counted == []
    assert module.layer.training


def test_tensors_stay_the_same_objects():
    module = Whole()
    weight, bank, free = module.layer.weight, module.bank, torch.zeros(2)
    module.free, module.array = [free], np.zeros(2)
    content = weight.detach().clone()

    def change():
        with torch.no_grad():
            weight.fill_(7)
        bank.add_(1)
        free.resize_(4).fill_(2)
        module.array += 1
        module.bank = torch.ones(3)
        module.layer.weight = nn.Parameter(torch.ones(2, 2))

    kept(module, change)
    assert module.layer.weight is weight
    assert torch.equal(weight, content)
    assert module.bank is bank
    assert bank.tolist() == free.tolist() + [0] == module.array.tolist() + [0]


def test_tensors_that_are_left_out_and_those_of_inference():
    module = Whole()
    with torch.inference_mode():
        module.bank = torch.zeros(3)

    def change():
        with torch.no_grad():
            module.layer.bias.fill_(7)
        with torch.inference_mode():
            module.bank.fill_(7)

    kept(module, change, without=[module.layer.bias])
    assert module.layer.bias.tolist() == [7, 7]
    assert module.bank.tolist() == [0, 0, 0]


def test_functions_and_what_they_hold():
    step, weak, other = counter(), counter(), Whole()
    module = Whole()
    module.steps = [functools.partial(step), lambda: other.layer]
    module.weak = weakref.ref(weak)
    module.cached = functools.lru_cache(lambda: float(module.layer.bias.sum()))

    def change():
        step()
        weak()
        module.cached()
        with torch.no_grad():
            other.layer.bias.fill_(7)
            module.layer.bias.fill_(7)

    bias = other.layer.bias.tolist()
    kept(module, change)
    assert step() == weak() == (1, [1])
    assert other.layer.bias.tolist() == bias
    assert module.cached() == float(module.layer.bias.sum()) != 14


def test_random_numbers():
    module = Whole()
    module.drawing = [torch.Generator(), random.Random(1), np.random.default_rng(1), np.random.RandomState(1)]
    sampler = RandomSampler(range(9), generator=torch.Generator())
    loader = DataLoader(range(9), sampler=sampler, generator=torch.Generator())

    def draw():
        generator, python, numpy, legacy = module.drawing
        own = torch.rand(1, generator=generator).item(), python.random(), numpy.random(), legacy.rand()
        alone = torch.rand(1).item(), random.random(), np.random.rand()
        return own, alone, torch.rand(1, generator=loader.generator).item(), list(sampler)

    first = []
    kept(module, lambda: first.append(draw()), [loader])
    assert draw() == first[0]


def test_of_a_data_set_all_but_its_samples():
    class Own(Dataset):
        def __init__(self) -> None:
            self.samples, self.drawing, self.count = torch.zeros(4), np.random.default_rng(1), 0

        def __len__(self) -> int:
            return 4

        def __getitem__(self, index):
            self.count += 1
            self.samples[index] += 1
            return self.drawing.random()

    data, first = Own(), []
    kept(Whole(), lambda: first.extend(DataLoader(data)), [DataLoader(data)])
    assert data.count == 0
    assert [data[i] for i in range(4)] == torch.cat(first).tolist()
    assert data.samples.tolist() == [2] * 4


@pytest.mark.parametrize("of_data", [False, True])
def test_what_can_be_gone_through_once_is_refused(of_data):
    module, stream = Whole(), (i for i in range(3))
    loaders = [stream] if of_data else []
    if not of_data:
        module.lines = {"of": [stream]}
    owner = "a loader holds" if of_data else "Whole holds"
    with pytest.raises(lm.MergeError, match=f"{owner} something that can be gone through only once .generator"):
        Snapshot(module, loaders)
