"""The verb ``fit`` with every config for it."""

from __future__ import annotations

from pathlib import Path

import torch

import lightning_merge as lm
from lightning_merge.trainer.cli import main
from tests.toys import image_folders, register_tiny_clip
from tests.trainer.commands import CONFIGS, TINY_DIGITS, TINY_VIT


def test_fit_folders():
    root = image_folders(Path("data"))
    main(
        ["fit", f"--config={CONFIGS / 'fit/folders.yaml'}", f"--data.root={root}", "--data.train_domains=[photo]"]
        + [*TINY_DIGITS, *TINY_VIT, "--model.num_classes=2", "--data.batch_size=4"]
        + ["--trainer.default_root_dir=run"]
    )
    assert len(lm.open_weights("run")) > 0


def test_fit_score_paper():
    import open_clip

    name = register_tiny_clip(Path())
    torch.save(open_clip.create_model(name).state_dict(), "clip.pt")
    names = ["dog", "elephant", "giraffe", "guitar", "horse", "house", "person"]
    root = image_folders(Path("data"), domains=["photo", "sketch"], classes=names, n=10)
    main(
        ["fit", f"--config={CONFIGS / 'fit/score_paper.yaml'}", f"--data.root={root}"]
        + [f"--model.backbone=open_clip/{name}", "--model.pretrained=clip.pt", "--data.train_domains=[photo]"]
        + ["--model.templates=['a photo of a {}.']", "--data.num_workers=0", "--data.batch_size=8"]
        + ["--model.warmup_steps=1", *TINY_DIGITS, "--trainer.default_root_dir=run"]
    )
    assert lm.open_weights("run")["head.weight"].shape == (7, 16)
