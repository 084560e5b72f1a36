"""The result of a merge: one model, what happened to every parameter, and how it was made."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lightning_merge.checkpoints import Weights, check_output
from lightning_merge.checkpoints.contents import Beside
from lightning_merge.checkpoints.folders import check_folder, is_folder
from lightning_merge.checkpoints.names import is_left_out
from lightning_merge.checkpoints.paths import local_path
from lightning_merge.checkpoints.streaming import SHARD_SIZE, StreamedModel
from lightning_merge.merging.computation import Computation
from lightning_merge.merging.inventory import Inventory
from lightning_merge.merging.model_card import Scores, model_card
from lightning_merge.merging.origins import Origins
from lightning_merge.merging.repair_result import RepairResult
from lightning_merge.repair.corrections import Correction
from lightning_merge.utilities.errors import MergeError
from lightning_merge.utilities.processes import Processes
from lightning_merge.utilities.terminal import visible

if TYPE_CHECKING:
    from huggingface_hub import ModelCard


@dataclass(frozen=True)
class Merged:
    """Model merged from several, with a record of how it was made.

    Args:
        weights: The merged parameters and buffers, in the dtype and on the device of the base; where the model was
            written while it was computed, they are read from the file when they are asked for. In memory they are a
            state dict that the experts' module loads, with the entries of theirs that are no tensors
            (``_extra_state``).
        base: What the experts were merged onto.
        inventory: What happened to every parameter.
        manifest: Method, arguments, versions, and the sha256 of every file that went in.
        experts: The experts by name, for what they keep to themselves.
        hyper_parameters: The arguments of the base's LightningModule (else the first expert's), if its file has them.
        beside: What else a checkpoint of it holds: the base's (else the first expert's) entries beside the weights.
        notes: What is to be known of this merge, in sentences: what was left out of the checkpoint because it names
            code, which of several sets of weights in a file was taken.
        origins: How the experts lie to the base.
        paths: How often this process has decomposed matrices in which way, see
            :func:`lightning_merge.utilities.linalg.paths_taken`.
        computation: What gives the models of the tasks, and other scales, where they are not these weights.
        repair: What a repair after the merge has found; None if there was none.
    """

    weights: Mapping[str, Tensor]
    base: Weights
    inventory: Inventory
    manifest: dict[str, Any]
    experts: dict[str, Weights]
    hyper_parameters: dict[str, Any]
    beside: Beside = Beside()  # noqa: RUF009, a frozen dataclass
    notes: tuple[str, ...] = ()
    origins: Origins | None = None
    paths: Counter[str] = field(default_factory=Counter)
    computation: Computation | None = field(default=None, repr=False)
    repair: RepairResult | None = field(default=None, repr=False)

    def for_task(self, expert: str) -> dict[str, Tensor]:
        """Compute the weights of the model for one expert's task.

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
        of_task = self.computation.for_task(list(self.experts).index(expert)) if self.computation else {}
        private = {name: source[name].clone() for name in self.inventory.private[source.name]}
        private |= self._extra_state_of(source)
        if self.repair is None:
            return {**self.weights, **of_task, **private}
        shared = self.weights if self.repair.unrepaired is None else self.repair.unrepaired
        return self.repair.changes[expert]({**shared, **of_task, **private})

    def _extra_state_of(self, expert: Weights) -> dict[str, Any]:
        """Return what an expert keeps to itself and is no tensor."""
        patterns = self.manifest["include"], self.manifest["exclude"]
        extra = expert.header.get("extra_state", {})
        return {name: value for name, value in extra.items() if is_left_out(name, *patterns)}

    @property
    def knows_tasks(self) -> bool:
        """Whether the model for an expert's task may differ from ``weights``."""
        per_task = self.computation is not None and self.computation.method.per_task
        return per_task or self.repair is not None or any(self.inventory.private.values())

    @property
    def corrections(self) -> Mapping[str, Correction]:
        """The corrections of activations that the weights do not hold, by task, where the model was repaired."""
        return {} if self.repair is None else self.repair.corrections

    @property
    def heads(self) -> Mapping[str, Mapping[str, Tensor]]:
        """The heads that a repair has trained anew, by task and the parameter's name."""
        return {} if self.repair is None else self.repair.heads

    def rescaled(self, scale: float) -> Merged:
        """Return the same merge with another scaling coefficient, bit for bit, without merging again.

        Raises:
            MergeError: If the update was not kept.
        """
        if self.repair is not None:
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
        """Summarize in one line what was merged."""
        parts = [f"{len(self.inventory.merged)} parameters merged"]
        for names, what in (
            (self.inventory.averaged, "running statistics averaged"),
            (self.inventory.copied, "copied from the base"),
            (self.inventory.magnitudes, "magnitudes of merged weights"),
            (self.inventory.tied, "tied"),
        ):
            parts += [f"{len(names)} {what}"] if names else []
        method = self.manifest["method"]["class_path"]
        count = f"{len(self.experts)} expert{'' if len(self.experts) == 1 else 's'}"
        return visible(f"{method} of {count} ({', '.join(self.experts)}): {', '.join(parts)}")

    def save(self, path: str | os.PathLike[str], shard_size: int = SHARD_SIZE, carry_code: bool = False) -> Path:
        """Write the merged model, completely or not at all.

        Args:
            path: Ends in ``.ckpt`` (a checkpoint that ``LightningModule.load_from_checkpoint`` and
                ``trainer.test(ckpt_path=…)`` take), ``.safetensors``, or ``.pt`` / ``.pth`` / ``.bin`` (a state dict).
                Without a suffix it is a folder like the base's, which its library loads (Hugging Face, timm,
                open_clip), with what lies next to the base's weights and a model card.
            shard_size: The most bytes of one file in a folder.
            carry_code: Whether a folder gets the code (``*.py``) that lies next to the base's weights, too.

        Returns:
            The path that was written.

        Raises:
            MergeError: If it cannot be written; what stood there before is still there.
        """
        if is_folder(path):
            check_folder(path, self.base.path, carry_code=carry_code)
        else:
            check_output(path)
        model = self.writer(path, shard_size=shard_size, carry_code=carry_code)
        with model.open(Processes()):
            for name in self.inventory.stored:
                model.write(name, self.weights[name])
        return Path(os.path.abspath(local_path(path)))

    def card(self, scores: Scores | None = None, output: str | os.PathLike[str] = "merged.safetensors") -> ModelCard:
        """Describe the merged model as the Hugging Face Hub shows it: ``str(merged.card())`` is its ``README.md``.

        A folder that is written has one already, without scores.

        Args:
            scores: What was measured, as ``MergeTrainer.merge`` returns it in ``trainer.table``.
            output: The name of the model.
        """
        return model_card(self.manifest, output, scores)

    def writer(
        self,
        path: str | os.PathLike[str],
        *,
        resume: bool = False,
        shard_size: int = SHARD_SIZE,
        carry_code: bool = False,
    ) -> StreamedModel:
        """Prepare the writing of this model to a file or folder.

        Returns:
            See :class:`lightning_merge.checkpoints.streaming.StreamedModel`.
        """
        stored = set(self.inventory.stored)
        return StreamedModel(
            local_path(path),
            {name: meta for name, meta in self.base.meta.items() if name in stored},
            self.inventory.tied,
            self.manifest,
            self.hyper_parameters,
            self.base.path,
            resume,
            shard_size,
            carry_code,
            later=[f"{what}.safetensors" for what in ("corrections", "heads") if getattr(self, what)],
            card=lambda: str(self.card(output=os.path.abspath(local_path(path)))),
            beside=self.beside,
        )
