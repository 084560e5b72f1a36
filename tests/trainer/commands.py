"""What the tests of several verbs type."""

from __future__ import annotations

import json
from pathlib import Path

from lightning_merge.trainer.cli import main
from tests.conftest import ROOT

CONFIGS = ROOT / "configs"


TINY_DIGITS = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=4", "--trainer.enable_progress_bar=false"]


TINY_VIT = [
    "--model.pretrained=false",
    "--model.backbone=timm/vit_tiny_patch16_224",
    "--model.backbone_args={img_size: 32, embed_dim: 16, depth: 1, num_heads: 2}",
]


def fit(domain: str, *more: str) -> str:
    """Fit an expert by the digits' config and return its run folder."""
    config = f"--config={CONFIGS / 'fit/digits.yaml'}"
    folder = f"experts/{domain}"
    main(
        ["fit", config, *TINY_DIGITS, f"--data.train_domains=[{domain}]", f"--trainer.default_root_dir={folder}", *more]
    )
    return folder


def read_jsonl(path: str) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]
