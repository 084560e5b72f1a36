"""Draw what the benchmark over several foundations found: the figures of arXiv 2410.12766, on its own experts.

    lightning-merge benchmark --config configs/benchmark/nonlocal.yaml --data.root ROOT
    python -m benchmarks.foundations --config configs/benchmark/nonlocal.yaml --root ROOT --results results/nonlocal

writes ``tasks.svg`` (normalized accuracy by the number of tasks), ``layers.svg`` (distance and variance by layer),
``landscape.svg`` (accuracy in the plane of two task vectors) and ``embeddings.svg`` (t-SNE of the last features).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml
from matplotlib import rc_context
from matplotlib.figure import Figure
from torch import Tensor

import lightning_merge as lm
from lightning_merge.align import find_symmetries
from lightning_merge.align.foundations import Aligned
from lightning_merge.analysis import (
    compare_activations,
    embed,
    landscape,
    loss_and_accuracy,
    normalized_accuracy,
    project,
    task_plane,
)
from lightning_merge.evaluation.benchmark.foundations_table import FoundationsTable
from lightning_merge.evaluation.merge_data import calibration_images
from lightning_merge.evaluation.task_models import model_of_task
from lightning_merge.merging.aligning import Align, align, example_images
from lightning_merge.merging.repairing import Repair, repair
from lightning_merge.methods import TaskArithmetic
from lightning_merge.repair import corrected_weights, find_head, find_sites, probe_head, tact
from lightning_merge.report import Cell, Grid
from lightning_merge.report.plots import plot_embeddings, plot_landscapes, plot_tasks, plot_variance_ratio
from lightning_merge.report.style import house_style
from lightning_merge.utilities.sites import Site

SCALE = 0.4
Weights = Mapping[str, Tensor]


@dataclass
class Study:
    """The experts of one seed of a benchmark, and their data.

    Args:
        config: The benchmark's configuration.
        root: The folder of the tasks' files.
        folder: ``results/…/seed N``.
    """

    config: dict[str, Any]
    root: str
    folder: Path

    @cached_property
    def model(self) -> lm.Expert:
        """The module of all models."""
        return lm.Expert(**self.config["model"]["init_args"]).eval()

    @cached_property
    def data(self) -> lm.TaskArrays:
        """The tasks."""
        return lm.TaskArrays(**{**self.config["data"]["init_args"], "root": self.root})

    def model_of(self, task: str) -> lm.Expert:
        """The module with a head for a task's classes."""
        return model_of_task(self.model, self.data, task).eval()

    @property
    def tasks(self) -> list[str]:
        """The tasks of the experts, in the order in which they are merged."""
        used = self.config["foundations"]["domains"]
        known = self.config.get("domains") or [task for task in self.data.domains if task not in used]
        return known[: max(self.config["foundations"]["merged"])]

    def images(self, tasks: list[str], batches: int = 8, batch_size: int = 64) -> dict[str, list[Any]]:
        """Batches of training images and labels of each task."""
        return calibration_images("The figure", self.data, tasks, self.model, batches, batch_size)

    def test_images(self, task: str, count: int) -> list[Any]:
        """The first test images and labels of a task, in one random order, as batches."""
        data = self.data.only(train=[], test=[task])
        data.model = self.model
        (loader,) = data.test_dataloader()
        images, labels = (torch.cat(parts) for parts in zip(*loader, strict=True))
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:count]
        return list(zip(images[order].split(100), labels[order].split(100), strict=True))

    def aligned(self, tasks: list[str], by: str) -> Aligned:
        """The experts in one order of channels."""
        paths = sorted((self.folder / "foundations").iterdir())
        foundations = {path.name: str(path / "expert.ckpt") for path in paths}
        origin = {task: list(foundations)[i % len(foundations)] for i, task in enumerate(tasks)}
        experts = {task: str(self.folder / "experts" / task / "expert.ckpt") for task in tasks}
        groups = None if by == "nothing" else find_symmetries(self.model, example_images(self.model))
        return align(
            Align(foundations, origin, by=by),
            experts,
            self.model,
            self.images(tasks),
            private=["head.*"],
            symmetries=groups,
        )

    def merged(self, aligned: Aligned) -> lm.Merged:
        """The experts merged by Task Arithmetic."""
        return lm.merge(aligned.base, aligned.experts, TaskArithmetic(scale=SCALE), exclude=["head.*"])


def draw_layers(study: Study) -> Figure:
    """Distance to the expert and variance ratio at every site (Figure 3), on the first task."""
    task, tasks = study.tasks[0], study.tasks
    images, test = study.images(tasks), study.test_images(study.tasks[0], 500)
    module = study.model_of(task)
    sites = find_sites(module, test[0][0])
    found = {}
    for label, by, kind in (
        ("naive", "nothing", None),
        ("aligned", "activations", None),
        ("aligned + REPAIR", "activations", "repair"),
        ("aligned + TACT", "activations", "tact"),
    ):
        aligned = study.aligned(tasks, by)
        merged = study.merged(aligned)
        model = merged if kind is None else repair(Repair(by=kind), merged, study.model, images)
        found[label] = compare_activations(module, model.for_task(task), dict(aligned.experts[task]), test, sites)
    return plot_variance_ratio(found, f"{len(tasks)} tasks, Task Arithmetic, on {task}")


def draw_landscape(study: Study, points: int, count: int) -> Figure:
    """Normalized accuracy in the plane of two task vectors (Figures 1 and 2): its average and its worst task."""
    tasks = study.tasks[:2]
    images = study.images(tasks, batches=4)
    test = {task: study.test_images(task, count) for task in tasks}
    modules = {task: study.model_of(task) for task in tasks}
    found = {}
    for title, by, corrects in (
        ("naive", "nothing", False),
        ("aligned", "activations", False),
        ("aligned + TACT", "activations", True),
    ):
        aligned = study.aligned(tasks, by)
        own = {task: dict(aligned.experts[task]) for task in tasks}
        body = {task: _without_head(weights) for task, weights in own.items()}
        plane = task_plane(_without_head(aligned.base), body[tasks[0]], body[tasks[1]])

        def accuracy(weights: dict[str, Tensor], task: str, own=own, corrects=corrects) -> float:
            complete = {**own[task], **weights}
            if corrects:
                corrections = tact(study.model, weights, {task: own[task]}, {task: images[task]})
                complete = corrected_weights(study.model, complete, corrections[task])
            return loss_and_accuracy(modules[task], test[task], complete)[1]

        experts = {task: loss_and_accuracy(modules[task], test[task], own[task])[1] for task in tasks}
        found[title] = landscape(plane, accuracy, experts, points), plane
    title = f"The plane of the task vectors of {tasks[0]} (1) and {tasks[1]} (2)"
    return plot_landscapes(found, SCALE, title)


def _without_head(weights: Weights) -> dict[str, Tensor]:
    return {name: weights[name] for name in weights if not name.startswith("head.")}


def draw_embeddings(study: Study, count: int) -> Figure:
    """t-SNE of the features before the head (Figure 4): merged, repaired, and the expert's, in one plane."""
    task, tasks = study.tasks[1], study.tasks
    images, test = study.images(tasks), study.test_images(study.tasks[1], count)
    aligned = study.aligned(tasks, "activations")
    merged = study.merged(aligned)
    kinds: dict[str, Callable[[], Weights]] = {
        "aligned": lambda: merged.for_task(task),
        "+ REPAIR": lambda: repair(Repair(by="repair"), merged, study.model, images).for_task(task),
        "+ TACT": lambda: repair(Repair(by="tact"), merged, study.model, images).for_task(task),
        "expert": lambda: dict(aligned.experts[task]),
    }
    module = study.model_of(task)
    site = Site(find_head(module, test[0][0]), -1, input=True)
    features, labels = {}, None
    for name, weights in kinds.items():
        features[name], labels = embed(module, weights(), test, site)
    return plot_embeddings(project(features), labels, f"Features of {task}, one t-SNE for all four models")


def probes(study: Study, counts: Sequence[int] = (1, 2, 4, 16)) -> str:
    """What a new head alone gives, by the number of labelled images, beside TACT, which reads no labels.

    The features are those of an untrained network, of the experts merged naively, and of the aligned ones.
    """
    tasks = study.tasks
    test = {task: study.test_images(task, 1000) for task in tasks}
    modules = {task: study.model_of(task) for task in tasks}
    merged = {by: study.merged(study.aligned(tasks, by)) for by in ("nothing", "activations")}

    def accuracy(task: str, weights: Weights) -> float:
        return loss_and_accuracy(modules[task], test[task], weights)[1]

    own = {task: accuracy(task, dict(merged["nothing"].experts[task])) for task in tasks}
    rows: dict[str, list[Cell]] = {}
    for count in counts:
        images = study.images(tasks, batches=count)
        models = {"untrained + linear probe": (modules, None)}
        models |= {
            f"{name} + {kind}": (None, repair(Repair(by=by), merged[start], study.model, images))
            for name, start in (("naive", "nothing"), ("activations", "activations"))
            for kind, by in (("linear probe", "probe"), ("TACT", "tact"))
        }
        for name, (fresh, repaired) in models.items():
            found = {}
            for task in tasks:
                if fresh is None:
                    weights = repaired.for_task(task)
                else:
                    weights = fresh[task].state_dict()
                    weights = {**weights, **probe_head(fresh[task], weights, images[task])}
                found[task] = accuracy(task, weights)
            average = normalized_accuracy(found, own).average
            rows.setdefault(name, []).append(Cell(f"{100 * average:.1f}", average))
    header = [f"{len(tasks)} tasks", *(f"{64 * count} images" for count in counts)]
    return Grid(header, [[Cell(name), *cells] for name, cells in rows.items()]).markdown()


def main(args: list[str] | None = None) -> None:
    """Draw the figures."""
    parser = argparse.ArgumentParser("python -m benchmarks.foundations", description=__doc__.split("\n")[0])
    parser.add_argument("--config", type=Path, required=True, help="the benchmark's YAML file")
    parser.add_argument("--root", required=True, help="the folder of the tasks' files")
    parser.add_argument("--results", type=Path, required=True, help="what the benchmark wrote")
    parser.add_argument("--output", type=Path, default=Path("docs/figures"), help="where the figures go")
    parser.add_argument("--format", choices=("svg", "png", "pdf"), default="svg")
    parser.add_argument("--probes", action="store_true", help="print what labels alone give, instead of the figures")
    parser.add_argument("--method", default="Task Arithmetic", help="the method of tasks.svg")
    parser.add_argument("--seed", type=int, default=0, help="whose experts the other figures are of")
    parser.add_argument("--points", type=int, default=13, help="models a side of the landscape")
    parser.add_argument("--images", type=int, default=300, help="test images of the landscape and the embeddings")
    options = parser.parse_args(args)
    config = yaml.safe_load(options.config.read_text())
    study = Study(config, options.root, options.results / f"seed {options.seed}")
    if options.probes:
        sys.stdout.write(probes(study) + "\n")
        return
    records = [json.loads(line) for line in (options.results / "results.jsonl").read_text().splitlines()]
    options.output.mkdir(parents=True, exist_ok=True)
    for name, draw in {
        "tasks": lambda: plot_tasks(FoundationsTable(records), options.method),
        "layers": lambda: draw_layers(study),
        "landscape": lambda: draw_landscape(study, options.points, options.images),
        "embeddings": lambda: draw_embeddings(study, options.images),
    }.items():
        metadata = {"Date": None} if options.format == "svg" else None
        with house_style(), rc_context({"svg.fonttype": "path"}):  # the same file for the same numbers, on any machine
            draw().savefig(options.output / f"{name}.{options.format}", metadata=metadata, dpi=150)


if __name__ == "__main__":
    main()
