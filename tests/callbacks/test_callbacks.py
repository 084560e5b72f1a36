"""The callbacks, in Lightning's own Trainer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_merge.callbacks import FreezeBatchNorm, MergeAfterFit

import lightning_merge as lm
from lightning_merge.methods import WeightAverage
from tests.toys import tiny_expert


def fit(model, *callbacks, **arguments) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "max_epochs": 2}
    settings = {**quiet, "limit_train_batches": 3, "accelerator": "cpu", "devices": 1, **arguments}
    trainer = Trainer(callbacks=list(callbacks), **settings)
    trainer.fit(model, datamodule=lm.Digits(train_domains=["noisy"]))
    return trainer


def test_frozen_batchnorm_keeps_its_statistics_and_trains_its_weights():
    def resnet():
        return lm.Expert("timm/resnet10t", 10, pretrained=False, backbone_args={"in_chans": 1}, learning_rate=1e-2)

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


class TestMergeAfterFit:
    @pytest.fixture
    def base(self):
        model = tiny_expert(learning_rate=1e-2)
        lm.save_weights("base.ckpt", model.state_dict())
        lm.save_weights("old.ckpt", {k: v + 1 for k, v in model.state_dict().items()})
        return model

    def test_the_last_weights_are_merged_and_lightning_tests_them(self, base):
        callback = MergeAfterFit("base.ckpt", ["old.ckpt"], WeightAverage(), output="out/merged.ckpt")
        trainer = fit(base, callback, enable_checkpointing=False)
        merged, old = lm.open_weights("out/merged.ckpt"), lm.open_weights("old.ckpt")
        for name, tensor in base.state_dict().items():
            torch.testing.assert_close(merged[name], (tensor + old[name]) / 2)
        results = trainer.test(base, lm.Digits(test_domains=["thick"]), ckpt_path=callback.output, verbose=False)
        assert "test/thick/accuracy" in results[0]
        loaded = lm.Expert.load_from_checkpoint("out/merged.ckpt", weights_only=True)
        assert torch.equal(loaded.head.weight, merged["head.weight"])

    def test_the_checkpoint_that_was_monitored_is_merged(self, base):
        checkpoint = ModelCheckpoint(dirpath="run", monitor="val/accuracy", mode="max", save_top_k=1)
        fit(base, checkpoint, MergeAfterFit("base.ckpt", ["old.ckpt"], WeightAverage()), max_epochs=3)
        best, old = lm.open_weights(checkpoint.best_model_path), lm.open_weights("old.ckpt")
        torch.testing.assert_close(
            lm.open_weights("merged.ckpt")["head.weight"], (best["head.weight"] + old["head.weight"]) / 2
        )

    def test_a_missing_expert_is_said_before_the_fit(self, base):
        with pytest.raises(lm.MergeError, match=r"no file or folder gone\.ckpt"):
            fit(base, MergeAfterFit("base.ckpt", ["gone.ckpt"]))
        assert not Path("merged.ckpt").exists()
