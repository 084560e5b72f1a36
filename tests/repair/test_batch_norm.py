"""Re-estimated BatchNorm statistics against what PyTorch collects in training, on one process and on two."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call

from lightning_merge.repair import reestimate_batch_norm
from lightning_merge.utilities.errors import MergeError
from tests.repair.models import VGG, expert_of, images, resnet18
from tests.utilities.test_processes import on_processes


def pytorch_s(module: nn.Module, weights: dict, batch: torch.Tensor) -> dict:
    module = copy.deepcopy(module).train()
    module.load_state_dict(weights)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.momentum = None
            part.reset_running_stats()
    with torch.no_grad():
        module(batch)
    return module.state_dict()


def test_one_batch_gives_what_pytorch_collects_in_training():
    module, batch = resnet18().double(), images(16, 32).double()
    module.layer1[0].bn1.eps = 1e-2
    weights = expert_of(module, 1)
    weights["bn1.running_var"] = -weights["bn1.running_var"]  # what task arithmetic makes of it does not matter
    found, expected = reestimate_batch_norm(module, weights, [batch]), pytorch_s(module, weights, batch)
    for name, tensor in weights.items():
        if name.endswith(("running_mean", "running_var")):
            torch.testing.assert_close(found[name], expected[name], rtol=1e-6, atol=1e-8)
            assert not torch.allclose(found[name], tensor)
        else:
            assert found[name] is tensor
    assert module.training


def test_the_first_layer_pools_all_images_whatever_the_batches():
    module, x = resnet18(), images(20, 16)
    weights = expert_of(module, 1)
    inputs = module.maxpool.__class__ and functional_call(module.conv1, {"weight": weights["conv1.weight"]}, (x,))
    found = reestimate_batch_norm(module, weights, [(batch, None) for batch in x.split([12, 8])])
    torch.testing.assert_close(found["bn1.running_mean"], inputs.mean((0, 2, 3)), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found["bn1.running_var"], inputs.var((0, 2, 3)), rtol=1e-5, atol=1e-6)


def test_two_processes_give_the_statistics_of_one():
    module, x = resnet18(), images(12, 16)
    weights = expert_of(module, 1)
    alone = reestimate_batch_norm(module, weights, list(x.split(6)))

    def work(rank: int):
        mine = [batch[rank::2] for batch in x.split(6)]
        found = reestimate_batch_norm(module, weights, mine, distributed=True)
        return {name: tensor.tolist() for name, tensor in found.items() if "running" in name}

    found, errors = on_processes(2, work)
    assert errors == [None, None]
    assert found[0] == found[1]
    for name, values in found[0].items():
        torch.testing.assert_close(torch.tensor(values), alone[name], rtol=1e-4, atol=1e-5)


def test_a_model_without_batch_norm_is_refused():
    with pytest.raises(MergeError, match="no BatchNorm with running statistics"):
        reestimate_batch_norm(VGG(), VGG().state_dict(), [images(4)])
    with pytest.raises(MergeError, match="holds 1 image"):
        reestimate_batch_norm(resnet18(), resnet18().state_dict(), [images(1, 16)])
