"""BatchNorm's statistics during a fit."""

from __future__ import annotations

import torch
from lightning.pytorch import Trainer
from lightning_merge.callbacks import FreezeBatchNorm

import lightning_merge as lm


def fit(model, *callbacks, **arguments) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "max_epochs": 2}
    settings = {**quiet, "limit_train_batches": 3, "accelerator": "cpu", "devices": 1, **arguments}
    trainer = Trainer(callbacks=list(callbacks), **settings)
    trainer.fit(model, datamodule=lm.Digits(train_domains=["noisy"]))
    return trainer


def test_frozen_batchnorm_keeps_its_statistics_and_trains_its_weights():
    def resnet():
        narrow = {"in_chans": 1, "channels": [8, 8, 16, 16]}
        return lm.Expert("timm/resnet10t", 10, pretrained=False, backbone_args=narrow, learning_rate=1e-2)

    model = resnet()
    torch.nn.init.normal_(model.head.weight)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    fit(model, FreezeBatchNorm(), enable_checkpointing=False)
    after = model.state_dict()
    assert torch.equal(after["backbone.bn1.running_var"], before["backbone.bn1.running_var"])
    assert not torch.equal(after["backbone.bn1.weight"], before["backbone.bn1.weight"])
    model.load_state_dict(before)
    fit(model, enable_checkpointing=False)
    assert not torch.equal(model.state_dict()["backbone.bn1.running_var"], before["backbone.bn1.running_var"])
