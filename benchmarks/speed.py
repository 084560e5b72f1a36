"""How fast and how small is a merge, and how exact, beside the published formula and other packages?

    python -m benchmarks.speed --fusion-bench ~/fusion/bin/python --mergekit ~/mergekit/bin/python

Same files, same run, file to file, one thread, a process for each merge. The contenders, all with the paper's settings:

- ours: ``lightning_merge.merge(…, output=…, workers=1)``;
- formula: the published formula in float32 on whole models, with ``torch.linalg.svd`` (``formulas.py``);
- fusion_bench and mergekit, each under the interpreter of its own environment (``pip install fusion-bench`` and
  ``pip install mergekit``); left out if not given;
- least: no merge, but what none can do without: one read, a float64 Gram product for each matrix that the formula
  decomposes, one write.

"merge" is what a process took once the contender's packages were imported; its peak is what it held beyond a process
that only imports them ("start-up"). The error is that of the update over all matrices, as a share of its norm, against
the formula in float64, on task vectors in float32 beside a base of zeros, so that the rounding of base + update does
not hide it. mergekit's TIES trims every tensor by itself, which is another rule, and shows as an error.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import models
from benchmarks.contenders import METHODS
from benchmarks.measure import Cost, Failed, machine, measure, measure_all, python, say, table

MB = 1e6


def commands(given: argparse.Namespace) -> dict[str, list[str]]:
    """For every contender the command that merges, without the method."""
    interpreters = {"fusion_bench": given.fusion_bench, "mergekit": given.mergekit}
    own = dict.fromkeys(("ours", "formula", "least"), sys.executable)
    every = own | {name: path for name, path in interpreters.items() if path}
    return {name: python("-m", "benchmarks.contenders", name, interpreter=path) for name, path in every.items()}


def start_ups(contenders: Mapping[str, Sequence[str]], device: str, repeat: int) -> dict[str, Cost | Failed]:
    """What every contender takes to import its packages."""
    every = {name: [*command, "TaskArithmetic", "--device", device] for name, command in contenders.items()}
    return measure_all(every, repeat)


def merges(
    contenders: Mapping[str, Sequence[str]], method: str, files: Sequence[Path], folder: Path, device: str, repeat: int
) -> dict[str, Cost | Failed]:
    """What every contender takes for one method."""
    output = folder / "merged.safetensors"
    rest = [method, str(output), *map(str, files), "--device", device]
    return measure_all({name: [*command, *rest] for name, command in contenders.items()}, repeat)


def errors(
    contenders: Mapping[str, Sequence[str]], method: str, files: Sequence[Path], device: str
) -> dict[str, float]:
    """The error of every contender's update on the files of task vectors."""
    folder = files[0].parent
    reference, rest = folder / "reference.safetensors", [*map(str, files), "--device", device]
    measure([*contenders["formula"], method, str(reference), *map(str, files), "--double"])
    written = {}
    for name, command in contenders.items():
        if name == "least":
            continue
        try:
            measure([*command, method, str(folder / f"{name}.safetensors"), *rest])
        except Failed:
            continue
        written[str(folder / f"{name}.safetensors")] = name
    said = measure(python("-m", "benchmarks.errors", reference, *written)).said
    for path in written:
        Path(path).unlink()
    return {written[path]: error for path, error in said.items()}


def row(
    method: str, name: str, costs: Mapping[str, Cost], start_up: Mapping[str, Cost], error: float | str, model: float
) -> dict[str, Any]:
    """One line of the table."""
    merge, ours = costs[name].said, costs.get("ours", costs[name]).said
    peak = costs[name].peak - start_up[name].peak
    device = {"device peak MB": merge["device_peak"] / MB} if "device_peak" in merge else {}
    return {
        "method": method,
        "by": name,
        "merge CPU s": merge["cpu"],
        "merge wall s": merge["wall"],
        "CPU, ours = 1": merge["cpu"] / ours["cpu"],
        "wall, ours = 1": merge["wall"] / ours["wall"],
        "merge peak MB": peak / MB,
        "in models": peak / model,
        **device,
        "start-up CPU s": start_up[name].cpu,
        "start-up MB": start_up[name].peak / MB,
        "error": error,
    }


def compare(given: argparse.Namespace, folder: Path) -> None:
    """Measure and show all methods, a table at the end."""
    files = given.files or _made(given, folder)
    exact = _task_vectors(files, folder) if given.errors else []
    contenders = commands(given)
    start_up = start_ups(contenders, given.device, given.repeat)
    notes = [f"- {name} cannot start, left out: {cost}" for name, cost in start_up.items() if isinstance(cost, Failed)]
    contenders = {name: command for name, command in contenders.items() if isinstance(start_up[name], Cost)}
    rows = []
    for method in given.methods:
        costs = merges(contenders, method, files, folder, given.device, given.repeat)
        notes += [f"- {method} by {name}: {cost}" for name, cost in costs.items() if isinstance(cost, Failed)]
        costs = {name: cost for name, cost in costs.items() if isinstance(cost, Cost)}
        found = errors({name: contenders[name] for name in costs}, method, exact, given.device) if exact else {}
        rows += [row(method, name, costs, start_up, found.get(name, ""), files[0].stat().st_size) for name in costs]
    say(f"\n{title(given, files)}\n\n{table(rows)}\n\n" + "\n".join(notes))


def title(given: argparse.Namespace, files: Sequence[Path]) -> str:
    """What was merged, where."""
    what = "given files" if given.files else f"{given.shape}, {given.experts_like} task vectors, {given.dtype}"
    size = f"{len(files) - 1} experts of {files[0].stat().st_size / MB:.0f} MB"
    return machine(f"device {given.device}", what, size, f"median of {given.repeat}")


def _made(given: argparse.Namespace, folder: Path) -> list[Path]:
    options = ("--shape", given.shape, "--experts", given.experts, "--dtype", given.dtype)
    measure(python("-m", "benchmarks.models", folder, *options, "--experts-like", given.experts_like))
    return [folder / "base.safetensors", *(folder / f"expert_{i}.safetensors" for i in range(given.experts))]


def _task_vectors(files: Sequence[Path], folder: Path) -> list[Path]:
    measure(python("-m", "benchmarks.models", folder / "errors", "--task-vectors", *files))
    names = [f"task_vector_{i}.safetensors" for i in range(len(files) - 1)]
    return [folder / "errors" / name for name in ("zeros.safetensors", *names)]


def has_cuda() -> bool:
    """Whether there is a CUDA device at hand (asked in another process, see ``measure.py``)."""
    code = "import json, torch; print(json.dumps({'cuda': torch.cuda.is_available()}))"
    return bool(measure(python("-c", code)).said.get("cuda"))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models.add_arguments(parser)
    parser.add_argument("--files", nargs="+", type=Path, help="Real ones: base.safetensors, then the experts'.")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS[:-1])
    parser.add_argument("--repeat", type=int, default=3, help="The median is shown.")
    parser.add_argument("--device", default="cpu", help="Or cuda.")
    parser.add_argument("--fusion-bench", metavar="PYTHON", help="The interpreter of an environment that has it.")
    parser.add_argument("--mergekit", metavar="PYTHON", help="The same.")
    parser.add_argument("--no-errors", dest="errors", action="store_false", help="Only speed and memory.")
    parser.add_argument("--folder", type=Path, help="For the files; a temporary one by default.")
    given = parser.parse_args(arguments)
    if given.device != "cpu" and not has_cuda():
        say("There is no CUDA device at hand; nothing was measured.")
        return
    given.files = given.files and [path.resolve() for path in given.files]
    if given.folder:
        Path(given.folder).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        compare(given, Path(folder))


if __name__ == "__main__":
    main()
