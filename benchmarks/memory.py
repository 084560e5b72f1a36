"""How much does a merge to disk hold beyond the interpreter and torch, in units of one model?

    python -m benchmarks.memory

Zero is a process that imports what a merge needs. "peak" counts every resident page, those of mapped files, too, which
the kernel could drop; "anonymous" counts only what it could not (looked at every 10 ms; Linux).
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import models
from benchmarks.contenders import METHODS
from benchmarks.measure import Cost, Failed, machine, measure, python, say, table

SUFFIXES = (".safetensors", ".ckpt")


def files(folder: Path, suffix: str, experts: int) -> list[Path]:
    """The base and the first experts of a folder."""
    return [folder / f"base{suffix}", *(folder / f"expert_{i}{suffix}" for i in range(experts))]


def row(method: str, inputs: Sequence[Path], output: Path, zero: Cost, workers: int) -> dict[str, Any]:
    """One line of the table."""
    what = {"method": method, "in": inputs[0].suffix, "out": output.suffix, "experts": len(inputs) - 1}
    options = ("--workers", workers)
    try:
        cost = measure(python("-m", "benchmarks.contenders", "ours", method, output, *inputs, *options)) - zero
    except Failed as error:
        return {**what, "peak, models": str(error)}
    model = inputs[0].stat().st_size
    return {
        **what,
        "peak, models": cost.peak / model,
        "anonymous, models": cost.anonymous / model,
        "peak MB": cost.peak / 1e6,
        "anonymous MB": cost.anonymous / 1e6,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=tuple(models.SHAPES), default="vit_base")
    parser.add_argument("--experts", nargs="+", type=int, default=[4, 20])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["SCORE", "IsoC", "TIES", "TaskArithmetic"])
    parser.add_argument("--inputs", nargs="+", choices=SUFFIXES, default=SUFFIXES)
    parser.add_argument("--outputs", nargs="+", choices=SUFFIXES, default=SUFFIXES)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="For the files; a temporary one by default.")
    given = parser.parse_args(arguments)
    zero, rows = measure(python("-m", "benchmarks.contenders", "ours", given.methods[0])), []
    for suffix in given.inputs:
        if given.folder:
            Path(given.folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=given.folder) as name:
            folder, options = Path(name), ("--shape", given.shape, "--suffix", suffix)
            measure(python("-m", "benchmarks.models", folder, *options, "--experts", max(given.experts)))
            rows += [
                row(method, files(folder, suffix, experts), folder / f"merged{output}", zero, given.workers)
                for method in given.methods
                for output in given.outputs
                for experts in given.experts
            ]
    held = f"zero: {zero.peak / 1e6:.0f} MB, of which anonymous {zero.anonymous / 1e6:.0f}"
    say(f"\n{machine(given.shape, f'{given.workers} workers', held)}\n\n{table(rows)}")


if __name__ == "__main__":
    main()
