"""What does it take to evaluate several candidates: a run with CompareMerged, or a `trainer.test` for each?

    python -m benchmarks.candidates

All by one module with its metrics, in one process. "forward passes alone" is the least: every candidate's forward
passes on batches that are there already, without loader, Trainer and metrics. CompareMerged also evaluates the current
weights, one model more; it reads the data for each of them, as `trainer.test` does. The samples are ``ready`` in
memory, or a ``jpeg`` that is decoded whenever one is read.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning_merge.callbacks import CompareMerged
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import lightning_merge as lm
from benchmarks.measure import machine, say, table

COUNTS: Counter[str] = Counter()
"""Forward passes and samples read so far."""


class Counting(lm.Expert):
    """An expert whose forward passes are counted."""

    def forward(self, images: Tensor) -> Tensor:
        """Count one."""
        COUNTS["forward passes"] += 1
        return super().forward(images)


class Images(Dataset):
    """Random images, each with a label, ready or as JPEG; what is read is counted.

    Args:
        count: How many.
        size: Pixels of a side.
        classes: Number of classes.
        kind: ``ready`` or ``jpeg``.
    """

    def __init__(self, count: int, size: int, classes: int, kind: str) -> None:
        draw = torch.Generator().manual_seed(0)
        pixels = torch.randint(0, 256, (count, size, size, 3), generator=draw, dtype=torch.uint8)
        self.labels = torch.randint(0, classes, (count,), generator=draw)
        self.images = [_jpeg(image) if kind == "jpeg" else _floats(image) for image in pixels]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        COUNTS["samples read"] += 1
        image = self.images[index]
        if isinstance(image, bytes):
            with Image.open(io.BytesIO(image)) as opened:
                image = _floats(torch.frombuffer(bytearray(opened.tobytes()), dtype=torch.uint8).view(*opened.size, 3))
        return image, self.labels[index]


def _floats(pixels: Tensor) -> Tensor:
    return pixels.permute(2, 0, 1).float().div(255)


def _jpeg(pixels: Tensor) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(out, "jpeg")
    return out.getvalue()


def new_trainer(*callbacks: CompareMerged) -> Trainer:
    """Lightning's own Trainer, on one CPU process, that shows and writes nothing."""
    shown = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    return Trainer(accelerator="cpu", devices=1, callbacks=list(callbacks), **dict.fromkeys(shown, False))


def contenders(module: Counting, files: dict[str, str], loader: DataLoader) -> dict[str, Callable[[], None]]:
    """By name, what is measured."""
    states = {row: dict(lm.open_weights(path)) for row, path in files.items()}
    batches: list[Tensor] = []

    def forward_passes() -> None:
        module.eval()
        with torch.inference_mode():
            for state in states.values():
                module.load_state_dict(state)
                for images in batches:
                    module(images)

    def one_run() -> None:
        new_trainer(CompareMerged(files)).test(module, loader, verbose=False)

    def one_by_one() -> None:
        for path in files.values():
            module.load_state_dict(lm.open_weights(path))
            new_trainer().test(module, loader, verbose=False)

    batches += [images for images, _ in loader]
    return {"forward passes alone": forward_passes, "CompareMerged": one_run, "trainer.test for each": one_by_one}


def compare(module: Counting, files: dict[str, str], given: argparse.Namespace, kind: str) -> list[dict[str, Any]]:
    """One line for every contender, on one kind of samples; in turns, so that a busy minute falls on all of them."""
    loader = DataLoader(Images(given.images, given.size, given.classes, kind), given.batch_size)
    every = contenders(module, files, loader)
    costs: dict[str, list[tuple[float, float]]] = {name: [] for name in every}
    counts: dict[str, Counter[str]] = {}
    for _ in range(given.repeat):
        for name, run in every.items():
            COUNTS.clear()
            cpu, wall = time.process_time(), time.perf_counter()
            with contextlib.redirect_stdout(io.StringIO()):
                run()
            costs[name].append((time.process_time() - cpu, time.perf_counter() - wall))
            counts[name] = Counter(COUNTS)
    medians = {name: tuple(map(median, zip(*found, strict=True))) for name, found in costs.items()}
    least = medians["forward passes alone"][0]
    return [
        {
            "samples": kind,
            "by": name,
            "CPU s": cpu,
            "wall s": wall,
            "CPU, forward passes = 1": cpu / least,
            "forward passes": counts[name]["forward passes"],
            "samples read": counts[name]["samples read"],
        }
        for name, (cpu, wall) in medians.items()
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="timm/resnet10t", help="As `Expert` takes it.")
    parser.add_argument("--candidates", type=int, default=8)
    parser.add_argument("--images", type=int, default=250)
    parser.add_argument("--size", type=int, default=64, help="Pixels of a side.")
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--samples", nargs="+", choices=("ready", "jpeg"), default=("ready", "jpeg"))
    parser.add_argument("--repeat", type=int, default=3, help="The median is shown.")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    module = Counting(given.backbone, given.classes, pretrained=False)
    with tempfile.TemporaryDirectory() as folder:
        files = {f"candidate {i}": str(Path(folder, f"{i}.ckpt")) for i in range(given.candidates)}
        for path in files.values():
            lm.save_weights(path, module.state_dict())
        rows = [row for kind in given.samples for row in compare(module, files, given, kind)]
    notes = f"{given.candidates} candidates, {given.backbone}, {given.images} images of {given.size} pixels"
    say(f"\n{machine(notes, f'batches of {given.batch_size}', f'median of {given.repeat}')}\n\n{table(rows)}")


if __name__ == "__main__":
    main()
