"""Small models, experts and image folders for the tests."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from lightning_merge.checkpoints import save_weights
from lightning_merge.merging.merge import merge
from lightning_merge.merging.merged import Merged
from lightning_merge.methods import TaskArithmetic
from lightning_merge.models import Expert
from lightning_merge.trainer import MergeTrainer

GOLDEN = Path(__file__).parent / "golden"
TINY_CONVNEXT = {
    "in_chans": 1,
    "depths": [1, 1, 1, 0],
    "dims": [8, 8, 8, 8],
    "patch_size": 1,
    "kernel_sizes": 3,
    "ls_init_value": None,
}


def base_weights(dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Tensor]:
    """A state dict with every kind of entry that models have."""
    draw = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw).to(dtype)

    return {
        "conv.weight": randn(8, 3, 2, 2),
        "bn.weight": randn(8),
        "bn.running_mean": randn(8),
        "bn.running_var": randn(8).abs(),
        "bn.num_batches_tracked": torch.tensor(7),
        "mlp.weight": randn(12, 8),
        "mlp.bias": randn(12),
        "proj.weight": randn(8, 12),
        "logit_scale": randn(),
        "head.weight": randn(3, 8),
    }


def expert_weights(base: dict[str, Tensor], seed: int, size: float = 0.05) -> dict[str, Tensor]:
    """The base, moved a little; buffers stay valid."""
    draw = torch.Generator().manual_seed(1000 + seed)
    expert = {}
    for name, tensor in base.items():
        if not tensor.is_floating_point():
            expert[name] = tensor + seed
        else:
            moved = tensor.float() + size * torch.randn(tensor.shape, generator=draw)
            expert[name] = (moved.abs() if name.endswith("running_var") else moved).to(tensor.dtype)
    return expert


def golden(name: str) -> dict[str, dict[str, Tensor]]:
    """The groups of tensors of a golden file."""
    groups: dict[str, dict[str, Tensor]] = {}
    for key, tensor in load_file(GOLDEN / f"{name}.safetensors").items():
        group, _, parameter = key.partition(".")
        groups.setdefault(group, {})[parameter] = tensor
    return groups


def golden_experts(groups: dict[str, dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """The experts of a golden file, in order."""
    return [groups[f"expert{i}"] for i in range(sum(name.startswith("expert") for name in groups))]


def image_folders(
    root: Path,
    domains: Sequence[str] = ("photo", "sketch", "cartoon"),
    classes: Sequence[str] = ("cat", "dog"),
    n: int = 10,
) -> Path:
    """Write ``root/domain/class/image``: small JPEG images whose brightness tells the class."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for d, domain in enumerate(domains):
        for c, name in enumerate(classes):
            folder = root / domain / name
            folder.mkdir(parents=True)
            for i in range(n):
                pixels = rng.integers(0, 60, (20, 24, 3)) + 90 * c + 20 * d
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i:02d}.jpg")
    return root


def register_tiny_clip(folder: Path) -> str:
    """Tell open_clip of a very small CLIP and return its name."""
    import open_clip

    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
    (folder / "tiny-clip.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / "tiny-clip.json")
    return "tiny-clip"


def tiny_expert(**arguments) -> Expert:
    """An expert for the digits that is fitted in no time."""
    settings = {"num_classes": 10, "pretrained": False, "backbone_args": TINY_CONVNEXT, "warmup_steps": 2}
    return Expert("timm/convnext_tiny", **{**settings, **arguments})


def merged_files() -> Merged:
    """Write a base, two experts and what is merged of them to safetensors files, and return the merged model."""
    save_weights("base.safetensors", base_weights())
    for i, name in enumerate(("photo", "sketch")):
        save_weights(f"{name}.safetensors", expert_weights(base_weights(), i))
    experts = {name: f"{name}.safetensors" for name in ("photo", "sketch")}
    return merge("base.safetensors", experts, TaskArithmetic(scale=0.5), output="merged.safetensors")


def quiet_trainer(**arguments) -> MergeTrainer:
    """A trainer on one CPU process that shows and writes nothing."""
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return MergeTrainer(**{"accelerator": "cpu", "devices": 1, **quiet, **arguments})


def tiny_vgg(**arguments) -> Expert:
    """An expert with a small VGG for 8 × 8 grey images."""
    backbone = {"stages": [[8], [12]], "hidden": [16], "in_chans": 1, "img_size": 8}
    settings = {"num_classes": 10, "pretrained": False, "backbone_args": backbone, "warmup_steps": 2}
    settings |= {"learning_rate": 3e-3, "weight_decay": 0.0}
    return Expert("python/lightning_merge.models.vgg.VGG", **{**settings, **arguments})


def digit_tasks(folder: Path) -> Path:
    """Write four tasks made of scikit-learn's digits, which do not all have the same classes: ``folder/TASK.npz``."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    images = (images.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    tasks = {
        "upright": (images, labels, [str(i) for i in range(10)]),
        "inverted": (255 - images, labels, [str(i) for i in range(10)]),
        "parity": (images, labels % 2, ["even", "odd"]),
        "halves": (images[:, ::-1], (labels > 4).astype(int), ["small", "large"]),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, (pictures, targets, classes) in tasks.items():
        np.savez(
            folder / f"{name}.npz",
            train_images=pictures[:400],
            train_labels=targets[:400],
            test_images=pictures[400:600],
            test_labels=targets[400:600],
            classes=np.array(classes),
        )
    return folder
