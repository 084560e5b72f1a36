"""A tiny benchmark, and callbacks that travel with it to the workers."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

from lightning.pytorch import Callback, seed_everything

import lightning_merge as lm
from lightning_merge.evaluation.statistics.collect import Recipe
from lightning_merge.methods import SCORE, RegMean
from lightning_merge.utilities.errors import MergeError
from tests.toys import quiet_trainer, tiny_expert

PATIENCE = 300  # s; only against a worker that never begins


class Note(Callback):
    """Adds a line to a file for every fit."""

    def on_train_start(self, trainer, pl_module):
        with Path("fits.txt").open("a") as file:
            file.write(Path(trainer.default_root_dir).name + "\n")


class Die(Note):
    """Kills the process in the first fit of a domain."""

    def on_train_end(self, trainer, pl_module):
        if Path(trainer.default_root_dir).name == "noisy" and not Path("died").exists():
            Path("died").touch()
            os.kill(os.getpid(), signal.SIGKILL)


class Fail(Note):
    """Fails in the fit of a domain, as soon as the other one's has begun, while there is no file ``mended``."""

    def on_train_end(self, trainer, pl_module):
        if Path(trainer.default_root_dir).name == "noisy" and not Path("mended").exists():
            latest = time.monotonic() + PATIENCE
            while "rotated" not in fits() and time.monotonic() < latest:
                time.sleep(0.05)
            raise MergeError("the noise is too loud")


def run(engine=None, callback: Callback | None = None):
    """Run the benchmark with relative paths; it writes to ``out``."""
    seed_everything(3, verbose=False)
    trainer = quiet_trainer(max_epochs=1, limit_train_batches=3, callbacks=[callback or Note()])
    return trainer.benchmark(
        tiny_expert(learning_rate=3e-3),
        lm.Digits(batch_size=64),
        methods={"SCORE": SCORE(), "RegMean": RegMean()},
        domains=["rotated", "noisy"],
        statistics=Recipe(batches=2),
        output="out",
        engine=engine,
        report=False,
    )


def results(output: str | Path) -> list[dict]:
    """What was measured, without the times."""
    lines = Path(output, "results.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "merge_seconds"} for line in lines]


def fits() -> list[str]:
    """The names of the experts that were fitted, sorted."""
    return sorted(Path("fits.txt").read_text().split())
