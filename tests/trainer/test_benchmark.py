"""The verb ``benchmark`` with every config for it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import yaml

from lightning_merge.trainer.cli import main
from tests.toys import digit_tasks, image_folders
from tests.trainer.commands import CONFIGS, TINY_DIGITS, TINY_VIT


def test_benchmark_digits(capsys):
    """Both as they are, but for the number of steps and images; the second takes the experts of the first."""
    few = {"AdaMerging": {"steps": 2}, "WUDI": {"iterations": 2}, "DOGE": {"iterations": 2}}
    times = []
    for name in ("digits", "digits_all_methods"):
        config = yaml.safe_load((CONFIGS / "benchmark" / f"{name}.yaml").read_text())
        for method in config["methods"].values():
            method["init_args"] = method.get("init_args", {}) | few.get(method["class_path"], {})
        Path("c.yaml").write_text(yaml.safe_dump(config))
        main(
            ["benchmark", "--config=c.yaml", *TINY_DIGITS, "--pretrain.max_epochs=1"]
            + ["--domains=[noisy, thick, slanted]", "--statistics.batches=1"]
            + [f"--report={json.dumps(name == 'digits_all_methods')}"]
        )
        shown = capsys.readouterr().out
        assert all(f"| {row} " in shown for row in config["methods"])
        fits = [Path("results/digits/base"), *Path("results/digits/experts").iterdir()]
        times.append({folder: (folder / "expert.ckpt").stat().st_mtime_ns for folder in fits})
    assert times[0] == times[1]
    assert len(times[0]) == 4


def test_benchmark_pacs(capsys):
    root = image_folders(Path("data"))
    main(
        ["benchmark", f"--config={CONFIGS / 'benchmark/pacs.yaml'}", f"--data.root={root}", *TINY_DIGITS, *TINY_VIT]
        + ["--model.num_classes=2", "--data.batch_size=4", "--output=out"]
    )
    assert "| SCORE, full " in capsys.readouterr().out


def test_benchmark_nonlocal(capsys):
    root = digit_tasks(Path("tasks"))
    sources = {"mnist": "inverted", "fashion_mnist": "parity", "usps": "halves", "notmnist": "upright"}
    for name, source in {**sources, "cifar10": "upright"}.items():
        shutil.copy(root / f"{source}.npz", root / f"{name}.npz")
    main(
        ["benchmark", f"--config={CONFIGS / 'benchmark/nonlocal.yaml'}", f"--data.root={root}", *TINY_DIGITS]
        + ["--model.backbone_args={stages: [[8], [8], [8], [8]], hidden: [8], in_chans: 1, img_size: 16}"]
        + ["--foundations.merged=[2]", "--foundations.seeds=[0]", "--foundations.max_epochs=1"]
        + ["--foundations.batches=1", "--foundations.batch_size=32", "--data.max_test=50"]
    )
    shown = capsys.readouterr().out
    assert "| activations + TACT " in shown
    assert "Consensus TA" in shown
