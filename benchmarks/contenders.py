"""One merge, from files to a file, by one of the contenders; what the benchmarks measure as a process of its own.

    python -m benchmarks.contenders ours SCORE merged.safetensors base.safetensors photo.safetensors sketch.safetensors

Without files it only imports what the contender needs (its start-up). The interpreter need not have anything but the
contender's own packages. Its last line is a JSON object: what the merge took without start-up.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

METHODS = ("IsoC", "IsoCTS", "TSVM", "SCORE", "TIES", "TaskArithmetic", "WeightAverage")
"""The classes of ``lightning_merge.methods``; all with their defaults."""

Run = Callable[[], None]
"""The merge, once everything is imported."""


def ours(given: argparse.Namespace) -> Run:
    """lightning_merge."""
    import safetensors.torch  # noqa: F401
    import torch  # noqa: F401

    import lightning_merge as lm

    method = getattr(lm.methods, given.method)()
    options = {
        "workers": given.workers,
        "device": None if given.device == "cpu" else given.device,
        "distributed": "RANK" in os.environ,
    }

    def run() -> None:
        lm.merge(given.files[0], given.files[1:], method, output=given.output, **options)

    return run


def formula(given: argparse.Namespace) -> Run:
    """The published formula in float32."""
    import torch

    from benchmarks import formulas

    dtype = torch.float64 if given.double else torch.float32
    return lambda: formulas.merge(given.method, given.files[0], given.files[1:], given.output, dtype, given.device)


def least(given: argparse.Namespace) -> Run:
    """Read, Gram products, write."""
    from benchmarks import formulas

    return lambda: formulas.least(given.method, given.files[0], given.files[1:], given.output, given.device)


def fusion_bench(given: argparse.Namespace) -> Run:
    """FusionBench: its algorithms, on modules that hold the parameters of the files."""
    if given.method == "SCORE":
        raise NotImplementedError("FusionBench has no SCORE")
    import torch
    from fusion_bench import BaseModelPool, method
    from safetensors.torch import load_file, save_file

    if given.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # it takes the accelerator that it finds

    def module(path: str) -> torch.nn.Module:
        root = torch.nn.Module()
        for name, tensor in load_file(path).items():
            *folders, leaf = name.split(".")
            parent = root
            for folder in folders:
                if folder not in parent._modules:
                    parent.add_module(folder, torch.nn.Module())
                parent = parent._modules[folder]
            parent.register_parameter(leaf, torch.nn.Parameter(tensor))
        return root

    class Files(BaseModelPool):
        def load_model(self, model_name_or_config: str, *args: Any, **kwargs: Any) -> torch.nn.Module:
            return module(self._models[model_name_or_config])

    algorithms: dict[str, Callable[[], Any]] = {
        "IsoC": lambda: method.ISO_C_Merge(scaling_factor=1.0),
        "IsoCTS": lambda: method.ISO_CTS_Merge(scaling_factor=1.0, common_space_fraction=0.8),
        "TSVM": lambda: method.TaskSingularVectorMerging(),
        "TIES": lambda: method.TiesMergingAlgorithm(
            scaling_factor=1.0, threshold=0.2, remove_keys=[], merge_func="mean"
        ),
        "TaskArithmetic": lambda: method.TaskArithmeticAlgorithm(scaling_factor=0.3),
        "WeightAverage": lambda: method.SimpleAverageAlgorithm(),
    }
    algorithm = algorithms[given.method]()

    def run() -> None:
        models = {f"model_{i}": path for i, path in enumerate(given.files[1:])}
        merged = algorithm.run(Files({"_pretrained_": given.files[0], **models}))
        save_file({name: tensor.contiguous() for name, tensor in merged.state_dict().items()}, given.output)

    return run


def mergekit(given: argparse.Namespace) -> Run:
    """mergekit: what ``mergekit-pytorch`` runs."""
    settings: dict[str, dict[str, Any]] = {
        "TIES": {"merge_method": "ties", "parameters": {"density": 0.2, "weight": 1.0, "normalize": True}},
        "TaskArithmetic": {"merge_method": "task_arithmetic", "parameters": {"weight": 0.3, "normalize": False}},
        "WeightAverage": {"merge_method": "linear", "parameters": {"weight": 1.0}},
    }
    if given.method not in settings:
        raise NotImplementedError(f"mergekit has no {given.method}")
    from mergekit.scripts.merge_raw_pytorch import main as merge_raw_pytorch

    def run() -> None:
        config: dict[str, Any] = {**settings[given.method], "models": [{"model": path} for path in given.files[1:]]}
        if given.method != "WeightAverage":
            config["base_model"] = given.files[0]
        with tempfile.TemporaryDirectory(dir=Path(given.output).parent) as folder:
            (Path(folder) / "config.yml").write_text(json.dumps(config))  # JSON is YAML
            cuda = [] if given.device == "cpu" else ["--cuda"]
            merge_raw_pytorch([f"{folder}/config.yml", f"{folder}/merged", *cuda], standalone_mode=False)
            (written,) = Path(folder, "merged").glob("*.safetensors")
            written.replace(given.output)

    return run


CONTENDERS = {"ours": ours, "formula": formula, "least": least, "fusion_bench": fusion_bench, "mergekit": mergekit}


def timed(run: Run, device: str) -> dict[str, float]:
    """Run a merge: its wall seconds, its CPU seconds, and the peak of the accelerator's memory in bytes if it has one.

    Under torchrun all ranks run it; wall is that of the slowest, CPU the sum.
    """
    import torch

    cuda = device.startswith("cuda")
    ranks = int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 0
    if ranks:
        torch.distributed.init_process_group("gloo")
        torch.distributed.barrier()
    if cuda:
        torch.linalg.svd(torch.eye(8, device=device))  # the libraries load when first asked for
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    wall, cpu = time.perf_counter(), _cpu()
    run()
    if cuda:
        torch.cuda.synchronize()
    took = torch.tensor([time.perf_counter() - wall, _cpu() - cpu], dtype=torch.float64)
    if ranks:
        slowest = took.clone()
        torch.distributed.all_reduce(slowest, torch.distributed.ReduceOp.MAX)
        torch.distributed.all_reduce(took)
        took[0] = slowest[0]
        torch.distributed.destroy_process_group()
    memory = {"device_peak": torch.cuda.max_memory_allocated()} if cuda else {}
    return {"wall": took[0].item(), "cpu": took[1].item(), "threads": torch.get_num_threads(), **memory}


def _cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one merge, or only import what it needs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("contender", choices=tuple(CONTENDERS))
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("output", nargs="?")
    parser.add_argument("files", nargs="*", help="The base, then the experts.")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--double", action="store_true", help="The formula in float64, its result in float64, too.")
    given = parser.parse_args(arguments)
    run = CONTENDERS[given.contender](given)
    took = timed(run if given.files else lambda: None, given.device)
    if int(os.environ.get("RANK", 0)) == 0:
        sys.stdout.write(f"\n{json.dumps(took)}\n")


if __name__ == "__main__":
    main()
