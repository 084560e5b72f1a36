"""Is anything lost when a benchmark is killed, again and again, and begun again?

    python -m benchmarks.benchmark_kills --kills 15

A benchmark of three domains is killed (SIGKILL) at random moments and started again, until it has been killed so often;
then it is let finish. What was done stays as it is, byte for byte, and the tables are those of a benchmark that nobody
has killed. A process is forked for every start; ``--terminate`` sends SIGTERM instead.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import signal
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

from benchmarks.measure import machine, say, table

DOMAINS = ["rotated", "noisy", "thick"]
SLOWEST = 600  # s; one that takes longer hangs


def start(output: Path) -> int:
    """Fork a process that runs the benchmark; returns its number."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        _benchmark(output)
        status = 0
    finally:
        os._exit(status)


def _benchmark(output: Path) -> None:
    import torch
    from lightning.pytorch import seed_everything

    import lightning_merge as lm
    from lightning_merge.utilities.signals import ended_by_sigterm

    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    seed_everything(3, verbose=False)
    tiny = {"in_chans": 1, "depths": [1, 1, 1, 0], "dims": [8, 8, 8, 8], "patch_size": 1, "kernel_sizes": 3}
    model = lm.Expert("timm/convnext_tiny", num_classes=10, pretrained=False, backbone_args=tiny, warmup_steps=2)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    trainer = lm.MergeTrainer(accelerator="cpu", devices=1, max_epochs=1, limit_train_batches=10, **quiet)
    methods = {"average": lm.methods.WeightAverage(), "SCORE": lm.methods.SCORE()}
    with ended_by_sigterm():
        trainer.benchmark(model, lm.Digits(batch_size=64), methods, str(output), DOMAINS)


def finish(output: Path, patience: float, end: int = signal.SIGKILL) -> int | None:
    """Run the benchmark for some seconds; returns its exit status, or None if it was not done by then and was ended."""
    child, latest = start(output), time.monotonic() + patience
    while time.monotonic() < latest:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(child, end)
    os.waitpid(child, 0)
    return None


def done(output: Path) -> dict[str, bytes]:
    """The files of jobs that are done, and their bytes."""
    folders = [path.parent for path in output.rglob("done")]
    files = [path for folder in folders for path in folder.glob("*") if path.is_file()]
    return {str(path): path.read_bytes() for path in files}


def results(output: Path) -> list[dict[str, object]]:
    """What was measured, but for the time that it took."""
    lines = (output / "results.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "merge_seconds"} for line in lines]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the study."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--terminate", action="store_true", help="send SIGTERM instead of SIGKILL")
    options = parser.parse_args(arguments)
    end = signal.SIGTERM if options.terminate else signal.SIGKILL
    draw = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as name:
        whole, killed = Path(name, "whole"), Path(name, "killed")
        _benchmark(whole.with_name("first"))  # forked processes find all imported
        started = time.monotonic()
        assert finish(whole, SLOWEST) == 0
        seconds = time.monotonic() - started
        kills = lost = complete = 0
        while kills < options.kills:
            before = done(killed)
            status = finish(killed, draw.uniform(0, 0.4) * seconds, end)
            lost += sum(path.read_bytes() != content for path, content in ((Path(p), c) for p, c in before.items()))
            kills += status is None
            if status is not None:  # it was quicker than the kill: begin again with another folder
                assert status == 0
                complete += 1
                assert results(killed) == results(whole)
                killed = killed.with_name(f"killed {complete}")
        starts_with = len(done(killed))
        assert finish(killed, SLOWEST) == 0
        same = results(killed) == results(whole)
        csv = (killed / "table.csv").read_bytes() == (whole / "table.csv").read_bytes()
        left = list(killed.rglob("*.part"))
    columns = {"kills": kills, "benchmarks": complete + 1, "done files changed or lost": lost}
    columns |= {"done before the last start": starts_with, "same results": same, "same table.csv": csv}
    say(table([columns | {"temporary files left": len(left)}]))
    say(machine())


if __name__ == "__main__":
    main()
