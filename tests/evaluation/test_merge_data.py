"""Methods that run the model while they merge, given a data module: which images they see."""

from __future__ import annotations

import json

import pytest
import torch

import lightning_merge as lm
from lightning_merge.data import DomainDataModule
from lightning_merge.methods import AdaMerging, RegMeanPlusPlus, WeightAverage
from lightning_merge.trainer.cli import main
from tests.toys import image_folders, quiet_trainer, tiny_expert
from tests.trainer.commands import CONFIGS, fit

METHODS = [AdaMerging(steps=2, lr=0.05), RegMeanPlusPlus(num_examples=20)]


@pytest.fixture
def models():
    model = tiny_expert()
    torch.manual_seed(1)
    experts = {}
    for domain in ("rotated", "noisy"):
        state = model.state_dict()
        experts[domain] = {k: v + 0.05 * torch.randn(v.shape) for k, v in state.items()}
        lm.save_weights(f"{domain}.ckpt", experts[domain])
    return model, experts


@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
def test_the_trainer_s_merge_is_that_on_the_training_images_of_the_domains(method, models):
    model, experts = models
    data = lm.Digits(held_out="thick")
    paths = {domain: f"{domain}.ckpt" for domain in experts}
    found = quiet_trainer().merge(model, data, experts=paths, method=method).weights
    images = {}
    for domain in experts:  # the same batches on any number of processes, in a shuffled order
        dataset = data.dataset(domain, data.split(domain, "train"), augment=False)
        order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0)).tolist()
        images[domain] = [
            torch.stack([dataset[i][0] for i in order[start : start + 16]]) for start in range(0, len(order) - 15, 16)
        ]
    expected = lm.merge(model.state_dict(), experts, method, module=model, data=images).weights
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor)
    average = lm.merge(model.state_dict(), experts, WeightAverage()).weights
    assert any(not torch.allclose(found[name], average[name]) for name in found)


def test_experts_that_are_not_named_after_domains(models):
    model, _ = models
    for given in ({"first": "rotated.ckpt"}, ["rotated.ckpt"]):
        with pytest.raises(lm.MergeError, match=r"AdaMerging reads images .* no domain '(first|rotated.ckpt)'; name"):
            quiet_trainer().merge(model, lm.Digits(), experts=given, method=METHODS[0])
        planned = quiet_trainer().merge(model, lm.Digits(), experts=given, method=METHODS[0], workers=0, plan=True)
        assert len(planned.problems) == 2
        assert "name the experts after their domains" in planned.problems[0]
        assert "workers" in planned.problems[1]
    with pytest.raises(lm.MergeError, match=r"give .* --model and --data"):
        quiet_trainer().merge(model, experts={"rotated": "rotated.ckpt"}, method=METHODS[0])


def test_a_benchmark_never_reads_the_domain_that_is_left_out(monkeypatch):
    asked = []
    read = DomainDataModule.training_images

    def training_images(self, domains, *arguments):
        asked.append(list(domains))
        return read(self, domains, *arguments)

    monkeypatch.setattr(DomainDataModule, "training_images", training_images)
    table = quiet_trainer(max_epochs=1, limit_train_batches=2).benchmark(
        tiny_expert(),
        lm.Digits(),
        methods={"average": WeightAverage(), "AdaMerging": METHODS[0], "RegMean++": METHODS[1]},
        output="out",
        report=False,
        domains=["rotated", "noisy", "thick"],
    )
    assert asked == [d for d in (["noisy", "thick"], ["rotated", "thick"], ["rotated", "noisy"]) for _ in range(2)]
    assert {"AdaMerging", "RegMean++"} <= set(table.row_names)


def test_images_in_folders_are_prepared_for_the_model(tmp_path):
    data = lm.DomainFolders(str(image_folders(tmp_path / "images")), batch_size=4)
    model = lm.Expert(
        "timm/vit_tiny_patch16_224",
        num_classes=2,
        pretrained=False,
        backbone_args={"img_size": 32, "embed_dim": 16, "depth": 1, "num_heads": 2},
    )
    loaders = data.training_images(["photo"], model)
    (images, labels), *_ = loaders["photo"]
    assert images.shape[1:] == (3, 32, 32)
    assert len(images) == len(labels) == min(16, len(data.split("photo", "train")))
    assert data.model is None


def test_the_command_line(capsys):
    experts = {domain: fit(domain) for domain in ("rotated", "noisy")}
    main(
        [
            "merge",
            f"--config={CONFIGS / 'fit/digits.yaml'}",
            "--trainer.enable_progress_bar=false",
            "--data.train_domains=null",
            "--data.held_out=thick",
            "--method=AdaMerging",
            "--method.steps=2",
            "--method.granularity=task",
            f"--experts={json.dumps(experts)}",
        ]
    )
    assert "AdaMerging of 2 experts (rotated, noisy)" in capsys.readouterr().out
