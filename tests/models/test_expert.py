"""The expert: heads, recipe, checks."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from torch.nn import functional as F

import lightning_merge as lm
from lightning_merge.models.expert import warmup_cosine
from lightning_merge.models.metrics import classification_metrics
from tests.toys import image_folders, quiet_trainer, register_tiny_clip, tiny_expert


def test_heads_of_all_experts_start_from_the_same_point():
    torch.manual_seed(1)
    one = tiny_expert()
    torch.manual_seed(2)
    assert torch.equal(one.head.weight, tiny_expert().head.weight)


def test_zero_shot_head_against_its_formula():
    import open_clip

    name = register_tiny_clip(Path())
    clip = open_clip.create_model(name)
    torch.save(clip.state_dict(), "clip.pt")
    classes, templates = ["guitar_case", "dog"], ["a photo of a {}.", "a sketch of a {}."]
    expert = lm.Expert(
        f"open_clip/{name}", class_names=classes, pretrained="clip.pt", head="zero_shot", templates=templates
    ).eval()
    images = torch.randn(3, 3, 32, 32)
    tokenizer = open_clip.get_tokenizer(name)
    with torch.no_grad():
        text = []
        for words in ("guitar case", "dog"):
            embedded = F.normalize(clip.encode_text(tokenizer([t.format(words) for t in templates])), dim=-1)
            text.append(F.normalize(embedded.mean(dim=0), dim=0))
        expected = clip.logit_scale.exp() * F.normalize(clip.encode_image(images), dim=-1) @ torch.stack(text).T
        torch.testing.assert_close(expert(images), expected, rtol=1e-5, atol=1e-5)
    assert not any(parameter.requires_grad for parameter in expert.head.parameters())
    assert expert.hparams.class_names == classes


def test_the_learning_rate_is_that_of_the_paper():
    assert warmup_cosine(0, 500, 1000) == 1 / 500
    assert warmup_cosine(499, 500, 1000) == 1
    assert warmup_cosine(750, 500, 1000) == pytest.approx(0.5)
    assert warmup_cosine(1000, 500, 1000) == pytest.approx(0)
    assert warmup_cosine(625, 500, 1000) == pytest.approx((1 + math.cos(math.pi / 4)) / 2)


def test_the_recipe_reaches_the_optimizer():
    model = tiny_expert(learning_rate=1e-5, head_learning_rate=1e-3)
    trainer = quiet_trainer(max_epochs=1, limit_train_batches=4, limit_val_batches=0, gradient_clip_val=1.0)
    trainer.fit(model, datamodule=lm.Digits(train_domains=["upright"], batch_size=16))
    optimizer = trainer.optimizers[0]
    assert type(optimizer) is torch.optim.AdamW
    assert [group["initial_lr"] for group in optimizer.param_groups] == [1e-5, 1e-3]
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.1}


def test_a_frozen_head_is_not_trained():
    model = tiny_expert(freeze_head=True, learning_rate=1e-2)
    torch.nn.init.normal_(model.head.weight)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    trainer = quiet_trainer(max_epochs=1, limit_train_batches=3, limit_val_batches=0)
    trainer.fit(model, datamodule=lm.Digits(train_domains=["upright"]))
    after = model.state_dict()
    assert torch.equal(after["head.weight"], before["head.weight"])
    assert not torch.equal(after["backbone.stem.0.weight"], before["backbone.stem.0.weight"])


def test_a_checkpoint_loads_into_a_new_expert():
    model = tiny_expert()
    trainer = quiet_trainer(max_epochs=1, limit_train_batches=1, limit_val_batches=0)
    trainer.fit(model, datamodule=lm.Digits(train_domains=["upright"]))
    trainer.save_checkpoint("expert.ckpt")
    loaded = lm.Expert.load_from_checkpoint("expert.ckpt", weights_only=True)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in loaded.state_dict().items())


def test_metrics_against_scikit_learn():
    from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score

    logits, labels = torch.randn(200, 4), torch.randint(0, 4, (200,))
    metrics = classification_metrics(4)
    metrics.update(logits, labels)
    found = {k: v.item() for k, v in metrics.compute().items()}
    predicted = logits.argmax(dim=1)
    assert found["accuracy"] == pytest.approx(accuracy_score(labels, predicted), abs=1e-6)
    assert found["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(labels, predicted), abs=1e-6)
    assert found["f1"] == pytest.approx(f1_score(labels, predicted, average="macro"), abs=1e-6)
    confidence, hit = logits.softmax(1).max(1).values.numpy(), (predicted == labels).numpy()
    bins = np.minimum((confidence * 15).astype(int), 14)
    gaps = [abs(hit[bins == b].mean() - confidence[bins == b].mean()) * (bins == b).mean() for b in np.unique(bins)]
    assert found["calibration_error"] == pytest.approx(sum(gaps), abs=1e-5)


class TestClassesMustFit:
    def test_number(self):
        with pytest.raises(lm.MergeError, match=r"10 classes .* head has 3; set model.num_classes to 10"):
            quiet_trainer(max_epochs=1).fit(tiny_expert(num_classes=3), datamodule=lm.Digits(train_domains=["upright"]))

    def test_order(self, tmp_path):
        root = image_folders(tmp_path / "data")
        model = lm.Expert(
            "timm/vit_tiny_patch16_224",
            class_names=["dog", "cat"],
            pretrained=False,
            backbone_args={"img_size": 32, "embed_dim": 16, "depth": 1, "num_heads": 2},
        )
        with pytest.raises(lm.MergeError, match="in the order of the data's labels"):
            quiet_trainer(max_epochs=1).fit(model, datamodule=lm.DomainFolders(str(root)))


def test_a_warmup_longer_than_the_fit_is_said():
    trainer = quiet_trainer(max_epochs=1, limit_train_batches=2, limit_val_batches=0)
    with pytest.warns(UserWarning, match=r"rises over 500 steps but the whole fit has 2"):
        trainer.fit(tiny_expert(warmup_steps=500), datamodule=lm.Digits(train_domains=["upright"]))


def test_predictions_are_probabilities():
    trainer: Trainer = quiet_trainer(limit_predict_batches=1)
    (batches,) = [trainer.predict(tiny_expert(), datamodule=lm.Digits(test_domains=["noisy"]))]
    torch.testing.assert_close(batches[0].sum(dim=1), torch.ones(len(batches[0])))
