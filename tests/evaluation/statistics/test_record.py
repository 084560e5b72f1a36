"""Statistics that Lightning collects: at the end of a fit or by the verb, on any number of processes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, TensorDataset

import lightning_merge as lm
from lightning_merge.evaluation.statistics.collect import Recipe, collect_statistics
from lightning_merge.evaluation.statistics.record import TrainingData
from tests.toys import image_folders, quiet_trainer, tiny_expert

EVERYTHING = ("fisher", "gram", "gram_out")
fork = pytest.mark.skipif(sys.platform == "win32", reason="there is no fork")


def assert_equal(found, expected, tolerance=1e-6):
    """To a share of the largest entry of each tensor."""
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert (found[name] - tensor).abs().max() <= tolerance * tensor.abs().max(), name


def by_hand(model, recipe, domain="noisy", batch_size=64):
    """Over the plain training split, without Lightning."""
    data = lm.Digits()
    images, labels = data.dataset(domain, data.split(domain, "train"), augment=False)[:]
    batches = zip(images.split(batch_size), labels.split(batch_size), strict=True)
    return collect_statistics(model, batches, recipe)


class TestTheVerb:
    @pytest.fixture
    def expert(self):
        model = tiny_expert()
        torch.nn.init.normal_(model.head.weight)
        lm.save_weights("noisy/expert.ckpt", model.state_dict())
        return model

    def test_by_hand(self, expert):
        fresh = tiny_expert()
        before = lm.open_weights(fresh.state_dict()).digest()
        data = lm.Digits(train_domains=["noisy"])
        path = quiet_trainer().statistics(fresh, data, "noisy", ["fisher", "gram_out"], labels="argmax")
        assert path == Path("noisy/expert.statistics.safetensors")
        assert_equal(lm.open_weights(path), by_hand(expert, Recipe(("fisher", "gram_out"), labels="argmax")), 1e-5)
        assert lm.open_weights(fresh.state_dict()).digest() == before
        assert type(data) is lm.Digits

    @fork
    @pytest.mark.parametrize("fisher", ["example", "batch"])
    def test_two_processes_collect_what_one_does(self, expert, fisher):
        for processes in (1, 2):
            strategy = "ddp_fork" if processes > 1 else "auto"
            trainer = quiet_trainer(devices=processes, strategy=strategy, precision="64-true")
            arguments = {
                "kinds": list(EVERYTHING),
                "fisher": fisher,
                "batches": 5,
                "output": f"{processes}.safetensors",
            }
            trainer.statistics(expert, lm.Digits(train_domains=["noisy"], batch_size=50), "noisy", **arguments)
        one, two = lm.open_weights("1.safetensors"), lm.open_weights("2.safetensors")
        assert one.header["statistics"]["examples"] == two.header["statistics"]["examples"]
        assert_equal(two, one)

    def test_images_get_the_backbone_s_preprocessing_and_no_augmentation(self):
        args = {"img_size": 32, "embed_dim": 16, "depth": 1, "num_heads": 2}
        model = lm.Expert("timm/vit_tiny_patch16_224", 2, pretrained=False, backbone_args=args)
        lm.save_weights("photo.ckpt", model.state_dict())
        data = lm.DomainFolders(str(image_folders(Path("data"))), ["photo"], batch_size=4, crop_scale=0.3)
        found = []
        for _ in range(2):
            path = quiet_trainer().statistics(model, data, "photo.ckpt", kinds=["gram"])
            found.append(dict(lm.open_weights(path)))
        assert_equal(*found, tolerance=0)
        assert "gram.backbone.blocks.0.attn.qkv.weight" in found[0]

    def test_a_data_module_is_asked_for_everything_and_stays_as_it_is(self, expert):
        """Every hook that a Trainer calls is the data module's own, as it is in a fit."""
        calls = []

        class Logged(LightningDataModule):
            def __init__(self):
                super().__init__()
                self.prepare_data_per_node = False

            def prepare_data(self):
                calls.append("prepare_data")

            def setup(self, stage):
                calls.append(f"setup {stage} of {type(self.trainer).__name__}")
                inputs = torch.randn(7, 1, 8, 8, generator=torch.Generator().manual_seed(0))
                self.samples = TensorDataset(inputs, torch.arange(7))

            def train_dataloader(self):
                return DataLoader(self.samples, batch_size=7)

            def on_before_batch_transfer(self, batch, dataloader_idx):
                return [batch[0] + 1, batch[1]]

            def transfer_batch_to_device(self, batch, device, dataloader_idx):
                calls.append("transfer")
                return super().transfer_batch_to_device(batch, device, dataloader_idx)

            def on_after_batch_transfer(self, batch, dataloader_idx):
                return [batch[0] * 2, batch[1]]

            def on_exception(self, exception):
                calls.append(f"on_exception {exception}")

            def teardown(self, stage):
                calls.append("teardown")

        data = Logged()
        before = dict(vars(data))
        path = quiet_trainer().statistics(tiny_expert(), data, "noisy", ["gram"])
        assert calls[:2] == ["prepare_data", "setup fit of MergeTrainer"]
        assert calls[2:] == ["transfer"] * (len(calls) - 3) + ["teardown"]
        assert vars(data) == before
        data.setup("fit")
        inputs, labels = data.samples.tensors
        assert_equal(lm.open_weights(path), collect_statistics(expert, [(2 * (inputs + 1), labels)], Recipe(("gram",))))
        assert TrainingData(data).prepare_data_per_node is False
        data.on_before_batch_transfer = lambda batch, dataloader_idx: "no"
        with pytest.raises(lm.MergeError, match="two tensors"):
            quiet_trainer().statistics(tiny_expert(), data, "noisy", ["gram"])
        assert "on_exception" in calls[-1]
        assert "two tensors" in calls[-1]

    def test_an_expert_of_another_model(self, expert):
        with pytest.raises(lm.MergeError, match=r"has shape \(10, 8\) in the candidate 'noisy'"):
            quiet_trainer().statistics(tiny_expert(num_classes=3), lm.Digits(), "noisy")
        with pytest.raises(lm.MergeError, match="give --expert"):
            quiet_trainer().statistics(expert, lm.Digits())
