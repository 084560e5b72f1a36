"""How long does the report of a merge take, and how large is it?

    python -m benchmarks.report

Measures ``lightning-merge analyze`` on experts and a model merged of them by Task Arithmetic: files in, page out, with
imports.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import models
from benchmarks.measure import machine, measure, python, say, table


def row(folder: Path, experts: int, workers: int) -> dict[str, Any]:
    """One line of the table."""
    merged = folder / "merged.safetensors"
    inputs = [folder / "base.safetensors", *(folder / f"expert_{i}.safetensors" for i in range(experts))]
    measure(python("-m", "benchmarks.contenders", "ours", "TaskArithmetic", merged, *inputs))
    named = ", ".join(f"{path.stem}: {path}" for path in inputs[1:])
    command = ["-m", "lightning_merge", "analyze", f"--base={inputs[0]}", f"--experts={{{named}}}"]
    output = folder / "analysis"
    options = [f"--merged={{merged: {merged}}}", f"--output={output}", f"--workers={workers}"]
    cost = measure(python(*command, *options))
    size = (output / "report.html").stat().st_size
    return {
        "experts": experts,
        "workers": workers,
        "wall s": cost.wall,
        "CPU s": cost.cpu,
        "peak MB": cost.peak / 1e6,
        "report MB": size / 1e6,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=tuple(models.SHAPES), default="vit_base")
    parser.add_argument("--experts", nargs="+", type=int, default=[8])
    parser.add_argument("--workers", nargs="+", type=int, default=[2])
    parser.add_argument("--folder", type=Path, help="For the files; a temporary one by default.")
    given = parser.parse_args(arguments)
    if given.folder:
        Path(given.folder).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        measure(python("-m", "benchmarks.models", name, "--shape", given.shape, "--experts", max(given.experts)))
        rows = [row(Path(name), experts, workers) for experts in given.experts for workers in given.workers]
    say(f"\n{machine(given.shape)}\n\n{table(rows)}")


if __name__ == "__main__":
    main()
