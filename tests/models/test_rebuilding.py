"""A model is built again from its hyper-parameters: of the same class, with those that differ."""

from __future__ import annotations

import inspect

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn

from lightning_merge.models.rebuilding import accepted_arguments, build_again, rebuild
from tests.toys import tiny_expert


class Own(LightningModule):
    """A project's own module, which notes more in its hyper-parameters than it is called with."""

    def __init__(self, width: int, lr: float = 0.1) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.save_hyperparameters({"git_commit": "abc"})
        self.layer = nn.Linear(width, 2)


def test_the_same_class_and_hyper_parameters_but_for_the_changes():
    again = build_again(Own(3, lr=0.5), {"lr": 0.25})
    assert type(again) is Own
    assert (again.hparams.width, again.hparams.lr) == (3, 0.25)
    assert again.layer.weight.shape == (2, 3)


def test_a_change_may_change_a_shape_where_weights_are_drawn_anew():
    assert build_again(Own(3), {"width": 5}).layer.weight.shape == (2, 5)
    with pytest.raises(RuntimeError, match="size mismatch"):
        rebuild(Own(3), {"width": 5})


def test_weights_are_drawn_anew_or_the_same_and_never_shared():
    model = tiny_expert()
    with torch.no_grad():
        model.head.weight.normal_()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    again, same = build_again(model, {}), rebuild(model, {"learning_rate": 0.5})
    assert not torch.equal(again.head.weight, model.head.weight)
    assert same.hparams.learning_rate == 0.5
    torch.testing.assert_close(same.state_dict(), before, rtol=0, atol=0)
    with torch.no_grad():
        for tensor in same.state_dict().values():
            tensor.zero_()
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_an_argument_that_the_class_does_not_take_is_refused():
    with pytest.raises(TypeError, match="depth"):
        build_again(Own(3), {"depth": 2})


def test_the_arguments_that_a_class_takes():
    assert accepted_arguments(Own(3)) == {"width", "lr"}
    assert set(inspect.signature(type(tiny_expert())).parameters) <= accepted_arguments(tiny_expert())
