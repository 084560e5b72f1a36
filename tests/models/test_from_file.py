"""An expert is built from its checkpoint alone, and the checkpoint chooses no code."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import yaml

import lightning_merge as lm
from lightning_merge.models import from_file
from tests.toys import quiet_trainer, register_tiny_clip, tiny_expert


@pytest.fixture
def foreign(monkeypatch, tmp_path):
    """A module of somebody's that says so when it is imported, and a class in it that says so when it is called."""
    Path("foreign_net.py").write_text(
        "from pathlib import Path\nfrom torch import nn\nPath('imported').touch()\n"
        "class Net(nn.Linear):\n"
        "    num_features = 4\n"
        "    def __init__(self, width=4):\n"
        "        super().__init__(width, 4)\n"
        "        Path('called').touch()\n"
        "def make(width=4) -> nn.Module:\n    return Net(width)\n"
    )
    monkeypatch.syspath_prepend(str(Path.cwd()))
    yield
    sys.modules.pop("foreign_net", None)


def ran() -> bool:
    return Path("imported").exists() or Path("called").exists()


def checkpoint(state=None, /, **hyper_parameters) -> str:
    lm.save_weights("a.ckpt", state or {"w": torch.ones(2)}, hyper_parameters=hyper_parameters)
    return "a.ckpt"


HOSTILE = [
    {"backbone": "python/foreign_net.Net", "num_classes": 2},
    {"backbone": "python/foreign_net.make", "num_classes": 2, "pretrained": False},
    {"_class_path": "foreign_net.Net", "backbone": "timm/resnet18", "num_classes": 2},
    {"_class_path": "foreign_net.Net", "_instantiator": "lightning.pytorch.cli.instantiate_module", "width": 3},
    {"backbone": "timm/resnet18", "backbone_args": {"block": {"class_path": "foreign_net.Net"}}, "num_classes": 2},
    {"backbone": "open_clip/ViT-B-32", "backbone_args": {"pretrained_image_path": "a.pt"}, "num_classes": 2},
    {"backbone": "open_clip/ViT-B-32", "backbone_args": {"weights_only": False}, "num_classes": 2},
    {"backbone": "timm/hf-hub:somebody/model", "num_classes": 2},
    {"backbone": "timm/resnet18", "num_classes": 10**12},
    {"num_classes": 2},
]


@pytest.mark.parametrize("stated", HOSTILE, ids=lambda stated: str(next(iter(stated.values())))[:30])
def test_what_a_checkpoint_may_not_choose(foreign, stated):
    with pytest.raises(lm.MergeError, match=r"a\.ckpt"):
        lm.Expert.load_from_checkpoint(checkpoint(**stated))
    assert not ran()


def test_old_places_of_hyper_parameters_are_not_read(foreign):
    content = {"state_dict": {"w": torch.ones(2)}, "hparams": {"backbone": "python/foreign_net.Net", "num_classes": 2}}
    torch.save({**content, "module_arguments": content["hparams"]}, "a.ckpt")
    with pytest.raises(lm.MergeError, match="does not say which backbone"):
        lm.Expert.load_from_checkpoint("a.ckpt")
    assert not ran()


def test_what_the_user_says_themselves_is_built(foreign):
    expert = lm.Expert("python/foreign_net.Net", num_classes=2, pretrained=False)
    path = checkpoint(expert.state_dict(), **expert.hparams)
    loaded = lm.Expert.load_from_checkpoint(path, backbone="python/foreign_net.Net")
    assert torch.equal(loaded.backbone.weight, expert.backbone.weight)
    with pytest.raises(lm.MergeError, match=r"names the backbone 'python/foreign_net.Net'"):
        lm.Expert.load_from_checkpoint(path)
    with pytest.raises(lm.MergeError, match=r"names the backbone 'python/foreign_net.Net'"):
        from_file.expert_arguments(path, expert.hparams, {"backbone": "python/foreign_net.make"}, lm.Expert)


def test_the_checkpoint_of_a_subclass_is_loaded_by_it():
    class Mine(lm.Expert):
        def __init__(self, temperature: float = 1.0, **arguments):
            super().__init__(**arguments)
            self.save_hyperparameters()
            self.temperature = temperature

    model = Mine(temperature=3.0, **tiny_expert().hparams)
    path = checkpoint(model.state_dict(), **model.hparams, _class_path=f"{Mine.__module__}.{Mine.__qualname__}")
    loaded = Mine.load_from_checkpoint(path)
    assert type(loaded) is Mine
    assert loaded.temperature == 3.0
    with pytest.raises(lm.MergeError, match=r"may not choose which code runs"):
        lm.Expert.load_from_checkpoint(path)


def test_weights_come_from_the_checkpoint_alone(monkeypatch):
    """Neither is anything downloaded, nor must the file that it once started from still be there."""
    model = tiny_expert()
    path = checkpoint(model.state_dict(), **{**model.hparams, "pretrained": True, "weights": "gone.ckpt"})
    loaded = lm.Expert.load_from_checkpoint(path)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in loaded.state_dict().items())
    checkpoint(model.state_dict(), **{**model.hparams, "pretrained": "https://example.org/a.pt"})
    assert lm.Expert.load_from_checkpoint(path).hparams.pretrained is False


def test_a_clip_keeps_its_zero_shot_head():
    import open_clip

    name = register_tiny_clip(Path())
    torch.save(open_clip.create_model(name).state_dict(), "clip.pt")
    expert = lm.Expert(f"open_clip/{name}", class_names=["cat", "dog"], pretrained="clip.pt", head="zero_shot")
    path = checkpoint(expert.state_dict(), **expert.hparams)
    Path("clip.pt").unlink()
    loaded = lm.Expert.load_from_checkpoint(path)
    assert torch.equal(loaded.head.weight, expert.head.weight)


def test_hyper_parameters_in_yaml_are_a_file_too(foreign):
    model = tiny_expert()
    path = checkpoint(model.state_dict(), num_classes=2)
    Path("hparams.yaml").write_text(yaml.safe_dump(dict(model.hparams)))
    assert lm.Expert.load_from_checkpoint(path, hparams_file="hparams.yaml").num_classes == model.num_classes
    Path("hparams.yaml").write_text(yaml.safe_dump({"backbone": "python/foreign_net.Net"}))
    with pytest.raises(lm.MergeError, match="python/foreign_net"):
        lm.Expert.load_from_checkpoint(path, hparams_file="hparams.yaml")
    Path("hparams.yaml").write_text("!!python/object/apply:foreign_net.make []")
    with pytest.raises(lm.MergeError, match=r"hparams.yaml cannot be read"):
        lm.Expert.load_from_checkpoint(path, hparams_file="hparams.yaml")
    assert not ran()


def test_no_code_in_pickles():
    model = tiny_expert()
    torch.save({"state_dict": model.state_dict(), "hyper_parameters": {"x": print}}, "a.ckpt")
    with pytest.raises(lm.MergeError, match="without running code"):
        lm.Expert.load_from_checkpoint("a.ckpt")
    with pytest.raises(lm.MergeError, match="weights_only=False would run code"):
        lm.Expert.load_from_checkpoint("a.ckpt", weights_only=False)


@pytest.mark.parametrize("arguments", [{"weights_only": False}, {"trust_remote_code": True}])
def test_no_loader_s_safety_is_switched_off_by_a_config_either(arguments):
    with pytest.raises(lm.MergeError, match="no loader's safety is switched off here"):
        lm.Expert("open_clip/ViT-B-32", num_classes=2, pretrained=False, backbone_args=arguments)


def test_an_open_file_and_a_fit_s_own_checkpoint():
    model = tiny_expert()
    trainer = quiet_trainer(max_epochs=1, limit_train_batches=1, limit_val_batches=0)
    trainer.strategy.connect(model)
    trainer.save_checkpoint("b.ckpt", weights_only=True)
    with open("b.ckpt", "rb") as file:
        loaded = lm.Expert.load_from_checkpoint(file)
    assert loaded.hparams == model.hparams
