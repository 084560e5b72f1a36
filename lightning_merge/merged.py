"""What comes out of a merge: one model, what happened to every parameter, and how it was made."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_merge.checkpoints import Weights, save_weights
from lightning_merge.computation import Computation
from lightning_merge.errors import MergeError
from lightning_merge.folders import is_folder, save_folder
from lightning_merge.task_vectors import Inventory


@dataclass(frozen=True)
class Merged:
    """One model made of several.

    Args:
        weights: The merged parameters and buffers, in the dtype and on the device of the base; where the model was
            written while it was computed, they are read from the file when they are asked for.
        base: What the experts were merged onto.
        inventory: What happened to every parameter.
        manifest: Method, arguments, versions, and the sha256 of every file that went in.
        experts: The experts by name, for what they keep to themselves.
        hyper_parameters: The arguments of the base's LightningModule (else the first expert's), if its file has them.
        computation: What gives the models of the tasks, and other scales, where they are not these weights.
    """

    weights: Mapping[str, Tensor]
    base: Weights
    inventory: Inventory
    manifest: dict[str, Any]
    experts: dict[str, Weights]
    hyper_parameters: dict[str, Any]
    computation: Computation | None = field(default=None, repr=False)

    def for_task(self, expert: str) -> dict[str, Tensor]:
        """Return the model for one expert's task.

        That is the merged model with the expert's own excluded parameters (its head), and, where the method keeps a
        model for each task, with its update for this task.

        Raises:
            MergeError: If there is no such expert.
        """
        if expert not in self.experts:
            raise MergeError(f"There is no expert {expert!r}; the experts are {', '.join(self.experts)}.")
        source = self.experts[expert]
        own = self.computation.for_task(list(self.experts).index(expert)) if self.computation else {}
        private = {name: source[name].clone() for name in self.inventory.private[source.name]}
        return {**self.weights, **own, **private}

    def rescaled(self, scale: float) -> Merged:
        """Return the same merge with another scaling coefficient, bit for bit, without merging again.

        Raises:
            MergeError: If the update was not kept.
        """
        if self.computation is None or self.computation.updates is None:
            raise MergeError("The update of this merge is gone; keep it with merge(…, keep_update=True) to rescale it.")
        computation = self.computation.rescaled(scale)
        return replace(
            self,
            weights={**self.weights, **computation.all_merged()},
            manifest=self.manifest | {"method": computation.method.describe()},
            computation=computation,
        )

    def summary(self) -> str:
        """What was merged, in one line."""
        found = self.inventory
        parts = [f"{len(found.merged)} parameters merged"]
        for names, what in (
            (found.averaged, "running statistics averaged"),
            (found.copied, "copied from the base"),
            (found.tied, "tied"),
        ):
            parts += [f"{len(names)} {what}"] if names else []
        method = self.manifest["method"]["class_path"]
        count = f"{len(self.experts)} expert{'' if len(self.experts) == 1 else 's'}"
        return f"{method} of {count} ({', '.join(self.experts)}): {', '.join(parts)}"

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the merged model.

        Args:
            path: A file, see :func:`lightning_merge.checkpoints.save_weights`, or, without a suffix, a folder as
                Hugging Face writes them, see :func:`lightning_merge.folders.save_folder`.
        """
        if is_folder(path):
            return save_folder(path, self.weights, self.base.path, self.manifest)
        return save_weights(path, self.weights, hyper_parameters=self.hyper_parameters, manifest=self.manifest)
