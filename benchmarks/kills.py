"""What is lost when a merge is killed at any moment?

    python -m benchmarks.kills

Processes write one of two models in turn, again and again, and are killed (SIGKILL) at a random moment; and one after
another is killed before each single change of the folder (a file or folder made, renamed, removed). Then the output
must be the whole old model or the whole new one, all else in the folder as it was, and the next merge must give the
bytes of one that was never interrupted and leave nothing else behind. Needs ``fork``.
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import lightning_merge as lm
from benchmarks.measure import say, table
from lightning_merge.checkpoints import save_weights
from lightning_merge.methods import TaskArithmetic

OUTPUTS = ("merged.safetensors", "merged.ckpt", "merged")
SCALES = (0.4, 0.7)
"""The coefficients of the two models that are written in turn."""
CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "shutil.rmtree")
"""What Python tells an audit hook before it changes a folder."""


def make_inputs(folder: Path, layers: int, width: int) -> None:
    """Write a base, as a folder with a configuration, an expert, and a file that is nobody's business."""
    base = {f"layers.{i}.weight": torch.randn(width, width) for i in range(layers)}
    save_weights(folder / "base/model.safetensors", base)
    (folder / "base/config.json").write_text("{}")
    (folder / "base/LICENSE").write_text("free")
    save_weights(folder / "expert.safetensors", {name: weight + 0.1 for name, weight in base.items()})
    (folder / "notes.txt").write_text("precious")


def merge(folder: Path, output: str, scale: float, resume: bool) -> None:
    """Write one of the models."""
    lm.merge(
        folder / "base",
        [folder / "expert.safetensors"],
        TaskArithmetic(scale=scale),
        output=folder / output,
        resume=resume,
        shard_size=1 << 18,
        workers=2,
    )


def merge_for_ever(folder: Path, output: str, resume: bool) -> None:
    """Write both models in turn, until somebody puts an end to it."""
    torch.set_num_threads(1)
    while True:
        for scale in SCALES:
            merge(folder, output, scale, resume)


def digests(folder: Path) -> dict[str, str]:
    """The sha256 of every file in a folder, at every depth."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def kill(folder: Path, output: str, resume: bool, seconds: float) -> None:
    """Let a process merge for a while from when it begins to write, and kill it."""
    process = multiprocessing.get_context("fork").Process(target=merge_for_ever, args=(folder, output, resume))
    process.start()
    while not any(folder.glob(".*.lock")):
        time.sleep(0.0005)
    time.sleep(seconds)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()


def merge_and_die(folder: Path, output: str, scale: float, resume: bool, step: int) -> None:
    """Write a model, and die before one of the changes of the folder."""
    torch.set_num_threads(1)
    left = step

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        changes = event in CHANGES or (event == "open" and arguments[2] & (os.O_CREAT | os.O_WRONLY | os.O_RDWR))
        if changes and str(arguments[0]).startswith(str(folder)):
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    merge(folder, output, scale, resume)


def kill_at(folder: Path, output: str, scale: float, resume: bool, step: int) -> bool:
    """Have a process die before one of its changes; tell whether it came to that."""
    process = multiprocessing.get_context("fork").Process(
        target=merge_and_die, args=(folder, output, scale, resume, step)
    )
    process.start()
    process.join()
    return process.exitcode == -signal.SIGKILL


def row(folder: Path, output: str, resume: bool, waits: Iterator[float], count: int, steps: int) -> dict[str, Any]:
    """One line of the table."""
    whole = []
    for scale in SCALES:
        merge(folder, output, scale, resume)
        whole.append(digests(folder))
    found: Counter[str] = Counter()
    for i in range(count + steps):
        if i < count:
            kill(folder, output, resume, next(waits))
        elif not kill_at(folder, output, SCALES[i % 2], resume, i - count):
            break
        found["kills"] += 1
        now = digests(folder)
        left = {name for name in now if name.startswith(".")}
        seen = {name: digest for name, digest in now.items() if name not in left}
        found["while writing"] += bool(left)
        found["lost or changed"] += seen not in whole
        merge(folder, output, SCALES[i // 2 % 2], resume)
        found["next merge differs"] += digests(folder) != whole[i // 2 % 2]
        found["left behind"] += any(path.name.startswith(".") for path in folder.iterdir())
    names = ("kills", "while writing", "lost or changed", "next merge differs", "left behind")
    return {"output": output, "resume": resume} | {name: found[name] for name in names}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10, help="Kills for each kind of output, with and without resume.")
    parser.add_argument("--steps", type=int, default=10**6, help="The most changes before which a merge is killed.")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument("--most", type=float, default=0.1, help="The longest that a process then runs, in seconds.")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    torch.manual_seed(given.seed)
    draw = random.Random(given.seed)
    waits = iter(lambda: draw.uniform(0.0, given.most), None)
    rows = []
    for output in OUTPUTS:
        for resume in (False, True):
            with tempfile.TemporaryDirectory() as name:
                make_inputs(Path(name), given.layers, given.width)
                rows.append(row(Path(name), output, resume, waits, given.count, given.steps))
    say(f"\n{table(rows)}")


if __name__ == "__main__":
    main()
