"""RegMean++ (arXiv 2508.03121).

Nguyen et al., "RegMean++: Enhancing Effectiveness and Generalization of Regression Mean for Model Merging", 2025.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from lightning_merge.methods.base import Context, Paper, check_range
from lightning_merge.methods.base.task_data import TaskData
from lightning_merge.methods.base.task_vectors import TaskVectors
from lightning_merge.methods.regmean import RegMean
from lightning_merge.utilities.layer_inputs import watch_inputs


def layer_of(name: str) -> str:
    """Name the layer of a parameter: its block (``blocks.3`` of ``blocks.3.mlp.fc1.weight``), otherwise its module.

    A block is what has a number in its name, the innermost one.
    """
    parts = name.split(".")
    ends = [i + 1 for i, part in enumerate(parts[:-1]) if part.isdigit()]
    return ".".join(parts[: ends[-1] if ends else -1])


class _Enough(Exception):
    """The end of a run of the model, when the layer of interest is passed."""


def find_layers(tasks: TaskData, weights: Mapping[str, Tensor], images: Tensor) -> dict[str, list[str]]:
    """Find the layers in the order in which they run on images ``(N, …)``, and the weights in each, use by use."""
    layers: dict[str, list[str]] = {}
    with watch_inputs(tasks.module, weights, lambda name, rows: layers.setdefault(layer_of(name), []).append(name)):
        tasks.logits(tasks.experts[0], weights, images)
    return layers


def gram_matrices(
    tasks: TaskData, expert: str, weights: Mapping[str, Tensor], batches: Sequence[Tensor], layer: Sequence[str]
) -> dict[str, Tensor]:
    """Compute the Gram matrices ``(in, in)``, the mean of x xᵀ, of a layer's inputs on an expert's images.

    Args:
        tasks: The model, running.
        expert: The expert.
        weights: The weights to run it with.
        batches: Images of the expert's task.
        layer: The layer's weights, as often as they are used in one run.
    """
    grams_of_batches: dict[str, list[Tensor]] = {}
    rows_seen: dict[str, int] = {}
    to_come: list[str] = []

    def see(name: str, rows: Tensor) -> None:
        rows = rows.double()
        grams_of_batches.setdefault(name, []).append(rows.mT @ rows)
        rows_seen[name] = rows_seen.get(name, 0) + len(rows)
        to_come.pop()
        if not to_come:
            raise _Enough

    with watch_inputs(tasks.module, set(layer), see):
        for images in batches:
            to_come[:] = layer
            try:
                tasks.logits(expert, weights, images)
            except _Enough:
                continue
    return {name: torch.stack(grams).sum(dim=0) / rows_seen[name] for name, grams in grams_of_batches.items()}


@dataclass(frozen=True)
class RegMeanPlusPlus(RegMean):
    """RegMean, layer after layer: the Gram matrices are of what each layer will see in the merged model.

    Needs the module and unlabelled batches of every expert's task: ``merge(…, module=…, data=…)``. The inputs of a
    layer (a block, as in the authors' code; see :func:`layer_of`) come from the merged layers before it and, within the
    layer, from the expert's own. Weights of ``Linear``, ``Conv2d`` and ``MultiheadAttention`` are merged so, and all
    else is averaged. (The authors leave what comes after the last block as the base has it.)

    The Gram matrices of all layers and experts are held in memory, and the model is run once for every layer.

    Args:
        reduce_off_diagonal: What the off-diagonal entries of the Gram matrices are multiplied by, in [0, 1]; 1 leaves
            them, 0 keeps the diagonals only.
        num_examples: Images of each task, rounded up to whole batches; at least 1.
        scale: Scaling coefficient of the update; 1 is the regression mean itself.
    """

    needs: ClassVar[tuple[str, ...]] = ()
    paper: ClassVar[Paper] = Paper("Nguyen et al.", "arXiv", 2025, "2508.03121")
    formula: ClassVar[str] = "W = (Σ_t W_t G_t) (Σ_t G_t)⁻¹; G_t = X_tᵀ X_t of a layer's inputs in the merged model"
    needs_data: ClassVar[bool] = True
    factorizations: ClassVar[tuple[int, int]] = (0, 2)  # in the survey, and again
    reads_twice: ClassVar[bool] = True

    num_examples: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "num_examples", 1, float("inf"))

    def survey(self, task_vectors: TaskVectors) -> dict[str, Tensor]:
        """Find the Gram matrices ``(T, in, in)`` of every linear layer, merging one layer after the other."""
        base = {name: task_vectors.context(name).base for name in task_vectors}
        merged = {name: base[name] + deltas.mean(dim=0) for name, deltas in task_vectors.items()}
        grams: dict[str, Tensor] = {}
        with task_vectors.tasks.running() as tasks, torch.no_grad():
            batches = [self._batches(tasks, expert) for expert in tasks.experts]
            for layer, weights in find_layers(tasks, merged, batches[0][0]).items():
                inside = {name: base[name] + task_vectors[name] for name in merged if layer_of(name) == layer}
                by_expert = []
                for i, expert in enumerate(tasks.experts):
                    candidate = merged | {name: stack[i] for name, stack in inside.items()}
                    by_expert.append(gram_matrices(tasks, expert, candidate, batches[i], weights))
                for name in by_expert[0]:
                    grams[name] = torch.stack([gram[name] for gram in by_expert]).to(base[name].device)  # (T, in, in)
                    merged[name] = base[name] + self.update(task_vectors[name], task_vectors.context(name, grams))
        return grams

    def _batches(self, tasks: TaskData, expert: str) -> list[Tensor]:
        batches: list[Tensor] = []
        for images in tasks.batches(expert):
            batches.append(images)
            if sum(map(len, batches)) >= self.num_examples:
                break
        return batches

    def update(self, deltas: Tensor, context: Context) -> Tensor:
        """Merge a parameter, ``(T, …) -> (…)``: RegMean, with the Gram matrices that were found."""
        gram = context.survey.get(context.name)
        return super().update(deltas, replace(context, statistics={} if gram is None else {"gram": gram.to(deltas)}))
