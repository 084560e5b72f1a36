"""What comes out of a merge: one model, what happened to every parameter, and how it was made."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lightning_merge.checkpoints import Weights, check_output
from lightning_merge.checkpoints.folders import check_folder, is_folder
from lightning_merge.checkpoints.streaming import SHARD_SIZE, StreamedModel
from lightning_merge.merging.computation import Computation
from lightning_merge.merging.inventory import Inventory
from lightning_merge.merging.model_card import Scores, model_card
from lightning_merge.repair.corrections import Correction
from lightning_merge.utilities.errors import MergeError
from lightning_merge.utilities.processes import Processes

if TYPE_CHECKING:
    from huggingface_hub import ModelCard


Change = Callable[[dict[str, Tensor]], dict[str, Tensor]]
"""Takes complete weights and gives others."""


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
        paths: How often this process has decomposed matrices in which way, see
            :func:`lightning_merge.utilities.linalg.paths_taken`.
        computation: What gives the models of the tasks, and other scales, where they are not these weights.
        repairs: What is done to the model of an expert's task, where it was repaired after the merge.
        unrepaired: The merged parameters as they were before a repair that ``weights`` have, too.
        corrections: The corrections of activations that the weights do not hold, by task.
        heads: The heads that were trained anew, by task.
    """

    weights: Mapping[str, Tensor]
    base: Weights
    inventory: Inventory
    manifest: dict[str, Any]
    experts: dict[str, Weights]
    hyper_parameters: dict[str, Any]
    paths: Mapping[str, int] = field(default_factory=dict)
    computation: Computation | None = field(default=None, repr=False)
    repairs: Mapping[str, Change] = field(default_factory=dict, repr=False)
    unrepaired: Mapping[str, Tensor] | None = field(default=None, repr=False)
    corrections: Mapping[str, Correction] = field(default_factory=dict, repr=False)
    heads: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict, repr=False)

    def for_task(self, expert: str) -> dict[str, Tensor]:
        """Return the model for one expert's task.

        That is the merged model with the expert's own excluded parameters (its head); where the method keeps a model
        for each task, with its update for this task; where the model was repaired for each task, with its correction,
        folded into the weights, or, where that would not be exact, as parameters of the modules that
        :func:`lightning_merge.repair.insert` puts into the module.

        Raises:
            MergeError: If there is no such expert.
        """
        if expert not in self.experts:
            raise MergeError(f"There is no expert {expert!r}; the experts are {', '.join(self.experts)}.")
        source = self.experts[expert]
        own = self.computation.for_task(list(self.experts).index(expert)) if self.computation else {}
        private = {name: source[name].clone() for name in self.inventory.private[source.name]}
        shared = self.weights if self.unrepaired is None else self.unrepaired
        weights = {**shared, **own, **private}
        return self.repairs[expert](weights) if expert in self.repairs else weights

    @property
    def knows_tasks(self) -> bool:
        """Whether the model for an expert's task may differ from ``weights``."""
        per_task = self.computation is not None and self.computation.method.per_task
        return per_task or bool(self.repairs) or any(self.inventory.private.values())

    def rescaled(self, scale: float) -> Merged:
        """Return the same merge with another scaling coefficient, bit for bit, without merging again.

        Raises:
            MergeError: If the update was not kept.
        """
        if self.repairs:
            raise MergeError("This model was repaired after the merge; rescale first and repair what comes out.")
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

    def save(self, path: str | os.PathLike[str], shard_size: int = SHARD_SIZE) -> Path:
        """Write the merged model, completely or not at all.

        Args:
            path: Ends in ``.ckpt`` (a checkpoint that ``LightningModule.load_from_checkpoint`` and
                ``trainer.test(ckpt_path=…)`` take), ``.safetensors``, or ``.pt`` / ``.pth`` / ``.bin`` (a state dict).
                Without a suffix it is a folder like the base's, which its library loads (Hugging Face, timm,
                open_clip), with what lies beside the base's weights and a model card.
            shard_size: The most bytes of one file in a folder.

        Returns:
            The path that was written.

        Raises:
            MergeError: If it cannot be written; what stood there before is still there.
        """
        if is_folder(path):
            check_folder(path, self.base.path)
        else:
            check_output(path)
        model = self.writer(path, shard_size=shard_size)
        with model.open(Processes()):
            for name in self.inventory.stored:
                model.write(name, self.weights[name])
        return model.path

    def card(self, scores: Scores | None = None, output: str | os.PathLike[str] = "merged.safetensors") -> ModelCard:
        """Describe the merged model as the Hugging Face Hub shows it: ``str(merged.card())`` is its ``README.md``.

        A folder that is written has one already, without scores.

        Args:
            scores: What was measured, as ``MergeTrainer.merge`` returns it in ``trainer.table``.
            output: The name of the model.
        """
        return model_card(self.manifest, output, scores)

    def writer(
        self, path: str | os.PathLike[str], *, resume: bool = False, shard_size: int = SHARD_SIZE
    ) -> StreamedModel:
        """Prepare the writing of this model to a file or folder.

        Returns:
            See :class:`lightning_merge.checkpoints.streaming.StreamedModel`.
        """
        stored = set(self.inventory.stored)
        return StreamedModel(
            Path(path),
            {name: meta for name, meta in self.base.meta.items() if name in stored},
            self.inventory.tied,
            self.manifest,
            self.hyper_parameters,
            self.base.path,
            resume,
            shard_size,
            card=lambda: str(self.card(output=Path(path).expanduser().resolve())),
        )
