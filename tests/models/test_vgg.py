"""The VGG, and backbones of the user's own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lightning_merge as lm
from lightning_merge.models.backbones import Preprocessing, python_backbone
from lightning_merge.models.vgg import VGG, ChannelLayerNorm

NAME = "python/lightning_merge.models.vgg.VGG"
SMALL = {"stages": [[4], [6, 8]], "hidden": [5, 7], "in_chans": 1, "img_size": 8}


def test_the_model_is_the_formula():
    model = VGG(**SMALL)
    images = torch.randn(3, 1, 8, 8)
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    norms = [m for m in model.modules() if isinstance(m, ChannelLayerNorm)]
    for norm in norms:
        nn.init.uniform_(norm.weight)
        nn.init.normal_(norm.bias)
    x = images
    for i, (convolution, norm) in enumerate(zip(convolutions, norms, strict=True)):
        x = F.conv2d(x, convolution.weight, padding=1)
        centred = x - x.mean(dim=1, keepdim=True)
        x = centred / (x.var(dim=1, keepdim=True, unbiased=False) + norm.eps).sqrt()
        x = (x * norm.weight[:, None, None] + norm.bias[:, None, None]).relu()
        x = F.max_pool2d(x, 2) if i in (0, 2) else x
    x = x.mean(dim=(2, 3))
    for layer in (m for m in model.modules() if isinstance(m, nn.Linear)):
        x = (x @ layer.weight.T + layer.bias).relu()
    torch.testing.assert_close(model(images), x)
    assert [c.weight.shape[0] for c in convolutions] == [4, 6, 8]
    assert (model.num_features, model.preprocessing.size) == (7, (8, 8))


def test_batch_norm_and_no_hidden_layer():
    model = VGG([[4], [6]], norm="batch")
    assert model.num_features == 6
    assert "stages.1.running_mean" in model.state_dict()
    assert model(torch.randn(2, 3, 12, 12)).shape == (2, 6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"stages": []}, "at least one convolution"),
        ({"stages": [[4], []]}, "at least one convolution"),
        ({"norm": "group"}, "layer or batch"),
        ({"img_size": 16}, "cannot be halved 5 times; .* at least 32"),
    ],
)
def test_shapes_that_cannot_work(arguments, message):
    with pytest.raises(lm.MergeError, match=message):
        VGG(**arguments)


def test_an_expert_has_it_by_name_and_finds_it_again_in_its_checkpoint():
    expert = lm.Expert(NAME, 3, pretrained=False, backbone_args=SMALL)
    assert expert(torch.zeros(2, 1, 8, 8)).shape == (2, 3)
    assert expert.preprocessing.mean == (0.5,)
    lm.save_weights("backbone.safetensors", expert.backbone.state_dict())
    other = lm.Expert(NAME, 3, pretrained="backbone.safetensors", backbone_args=SMALL)
    assert all(torch.equal(v, expert.state_dict()[k]) for k, v in other.state_dict().items())


class TestOwnModules:
    @pytest.fixture(autouse=True)
    def _module(self, monkeypatch: pytest.MonkeyPatch):
        Path("own_backbones.py").write_text(
            "from torch import nn\n"
            "def flat(width, img_size=4, in_chans=3) -> nn.Module:\n"
            "    model = nn.Sequential(nn.Flatten(), nn.Linear(in_chans * img_size**2, width))\n"
            "    model.num_features = width\n"
            "    return model\n"
            "def bare() -> nn.Module:\n"
            "    return nn.Flatten()\n"
            "constant = 3\n"
        )
        Path("half_backbones.py").write_text("import a_package_that_is_not_there\n")
        monkeypatch.syspath_prepend(Path.cwd())
        yield
        for name in ("own_backbones", "half_backbones"):
            __import__("sys").modules.pop(name, None)

    def test_a_function_will_do(self):
        model, features, preprocessing = python_backbone("own_backbones.flat", False, width=6, img_size=4)
        assert model(torch.zeros(2, 3, 4, 4)).shape == (2, features) == (2, 6)
        assert preprocessing == Preprocessing((4, 4), (0.5,) * 3, (0.5,) * 3)
        assert python_backbone("own_backbones.flat", False, width=6)[2].size == (224, 224)

    @pytest.mark.parametrize(
        ("name", "arguments", "message"),
        [
            ("flat", {}, "names no module; write python/PACKAGE.MODULE.CLASS"),
            ("no.such.module.Net", {}, "cannot be imported: No module named 'no'.*PYTHONPATH"),
            ("half_backbones.Net", {}, "cannot be imported: No module named 'a_package_that_is_not_there'"),
            ("own_backbones.Net", {}, "own_backbones has no class or function 'Net'"),
            ("own_backbones.constant", {}, "no class or function 'constant'"),
            ("own_backbones.flat", {}, "could not be called with no arguments: .*width"),
            ("own_backbones.bare", {}, "a Flatten without num_features"),
        ],
    )
    def test_what_cannot_work_is_said_in_a_sentence(self, name, arguments, message):
        with pytest.raises(lm.MergeError, match=message):
            lm.Expert(f"python/{name}", 2, pretrained=False, backbone_args=arguments)

    def test_weights(self):
        with pytest.raises(lm.MergeError, match="no pretrained weights to download"):
            lm.Expert("python/own_backbones.flat", 2, backbone_args={"width": 6})
        with pytest.raises(lm.MergeError, match=r"no file or folder gone\.ckpt"):
            lm.Expert("python/own_backbones.flat", 2, pretrained="gone.ckpt", backbone_args={"width": 6})
        lm.save_weights("other.ckpt", {"1.weight": torch.zeros(6, 48)})
        with pytest.raises(lm.MergeError, match=r"other\.ckpt lacks '1\.bias' of this model"):
            lm.Expert("python/own_backbones.flat", 2, pretrained="other.ckpt", backbone_args={"width": 6})


def test_it_is_fitted_from_a_yaml_file():
    import numpy as np
    from sklearn.datasets import load_digits

    from lightning_merge.trainer.cli import main

    images, labels = load_digits(return_X_y=True)
    images = (images * 15).astype(np.uint8).reshape(-1, 8, 8)
    parts = {"train_images": images[:256], "train_labels": labels[:256], "test_images": images[256:300]}
    np.savez("digits.npz", **parts, test_labels=labels[256:300], classes=np.arange(10).astype(str))
    Path("fit.yaml").write_text(
        "seed_everything: 1\n"
        "trainer: {accelerator: cpu, devices: 1, max_steps: 2, logger: false, enable_progress_bar: false}\n"
        "model:\n"
        f"  class_path: Expert\n  init_args: {{backbone: {NAME}, num_classes: 10, pretrained: false, warmup_steps: 1,\n"
        "    backbone_args: {stages: [[4], [8]], hidden: [6], in_chans: 1, img_size: 8}}\n"
        "data:\n"
        "  class_path: TaskArrays\n  init_args: {root: ., tasks: [digits], image_size: 8, channels: 1}\n"
    )
    main(["fit", "--config", "fit.yaml"])
    (checkpoint,) = Path().glob("**/*.ckpt")
    loaded = lm.Expert.load_from_checkpoint(checkpoint, weights_only=True)
    assert isinstance(loaded.backbone, VGG)


def test_nothing_else_is_called(tmp_path):
    """A name in a checkpoint must not run code: only what makes modules is called."""
    for name in ("os.system", "subprocess.run", "builtins.eval", "builtins.print", "pathlib.Path"):
        with pytest.raises(lm.MergeError, match="neither a class of modules nor a function"):
            lm.Expert(f"python/{name}", 2, pretrained=False, backbone_args={"command": f"touch {tmp_path}/owned"})
    assert not (tmp_path / "owned").exists()
