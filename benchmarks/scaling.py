"""How do the CPU and the wall seconds of a merge grow with parameters and experts, and shrink with workers and ranks?

    python -m benchmarks.scaling

One BLAS thread for each worker or rank. Seconds are those of the merge, without imports: the wall of the slowest rank,
the CPU of all ranks together. "speed-up" is the wall of one worker or rank over that of several.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import models
from benchmarks.contenders import METHODS
from benchmarks.measure import Failed, machine, measure, measure_all, python, say, table

QUESTIONS = ("parameters", "experts", "workers", "ranks")


def command(method: str, files: Sequence[Path], workers: int = 1, ranks: int = 0) -> list[str]:
    """The command that merges files; under torchrun if there are ranks."""
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", ranks) if ranks else ()
    output = files[0].parent / "merged.safetensors"
    return python(*launch, "-m", "benchmarks.contenders", "ours", method, output, *files, "--workers", workers)


def make(folder: Path, shape: str, experts: int) -> list[Path]:
    """Make models in a folder; the base first."""
    folder = folder / shape
    if not (folder / f"expert_{experts - 1}.safetensors").exists():
        measure(python("-m", "benchmarks.models", folder, "--shape", shape, "--experts", experts))
    return [folder / "base.safetensors", *(folder / f"expert_{i}.safetensors" for i in range(experts))]


def cases(question: str, given: argparse.Namespace, folder: Path) -> dict[str, list[str]]:
    """The merges that answer one of the questions, the smallest first."""
    files = make(folder, given.shape, max(given.experts))
    few, method = files[: given.experts[0] + 1], given.method
    if question == "parameters":
        return {shape: command(method, make(folder, shape, given.experts[0])) for shape in given.shapes}
    if question == "experts":
        return {str(count): command(method, files[: count + 1]) for count in given.experts}
    if question == "workers":
        return {str(count): command(method, few, workers=count) for count in given.counts}
    return {str(count): command(method, few, ranks=count) for count in given.counts}


def answer(question: str, given: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """One line for every merge."""
    rows, first = [], None
    for name, cost in measure_all(cases(question, given, folder), given.repeat).items():
        if isinstance(cost, Failed):
            rows.append({"what": f"{question}: {name}", "CPU s": str(cost)})
            continue
        first = first or cost
        wall = cost.said["wall"]
        line = {"what": f"{question}: {name}", "CPU s": cost.said["cpu"], "wall s": wall}
        rows.append(line | ({"speed-up": first.said["wall"] / wall} if question in ("workers", "ranks") else {}))
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=METHODS, default="SCORE")
    parser.add_argument("--questions", nargs="+", choices=QUESTIONS, default=QUESTIONS)
    parser.add_argument("--shape", choices=tuple(models.SHAPES), default="vit_small", help="Of all but `parameters`.")
    parser.add_argument(
        "--shapes", nargs="+", choices=tuple(models.SHAPES), default=["vit_tiny", "vit_small", "vit_base"]
    )
    parser.add_argument("--experts", nargs="+", type=int, default=[4, 8, 16], help="The first is that of the others.")
    parser.add_argument("--counts", nargs="+", type=int, default=[1, 2], help="Of workers and of ranks.")
    parser.add_argument("--repeat", type=int, default=3, help="The median is shown.")
    parser.add_argument("--folder", type=Path, help="For the files; a temporary one by default.")
    given = parser.parse_args(arguments)
    if given.folder:
        Path(given.folder).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        rows = [line for question in given.questions for line in answer(question, given, Path(folder))]
    title = machine(given.method, f"{given.shape} and {given.experts[0]} experts where not told otherwise")
    say(f"\n{title}\n\n{table(rows)}")


if __name__ == "__main__":
    main()
