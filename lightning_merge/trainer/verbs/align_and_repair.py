"""Align before a merge and repair after it: the sections ``align`` and ``repair`` of the verb ``merge``."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from lightning_merge.checkpoints import (
    Experts,
    Source,
    Weights,
    open_experts,
    open_weights,
    private_folder,
    put_in_place,
    save_weights,
)
from lightning_merge.checkpoints.adapters import is_adapter
from lightning_merge.checkpoints.folders import is_folder
from lightning_merge.checkpoints.paths import local_path
from lightning_merge.checkpoints.safetensors_format import read_header
from lightning_merge.checkpoints.task_vector_files import is_task_vector
from lightning_merge.data import DomainDataModule
from lightning_merge.evaluation.merge_data import calibration_images, check_named_after_domains, on_device
from lightning_merge.merging.aligning import Align, align
from lightning_merge.merging.merged import Merged
from lightning_merge.merging.recorded_moments import moments_file, read_moments
from lightning_merge.merging.repairing import Repair, repair
from lightning_merge.methods import MergeMethod
from lightning_merge.repair import save_corrections
from lightning_merge.utilities.errors import problems_of, raise_all
from lightning_merge.utilities.processes import Processes

_IMAGES = 64
"""Images of a batch that the model is run on."""
_KINDS = ("corrections", "heads")
"""What belongs to the tasks of a repaired model, each kind in a file of its own."""


@dataclass(frozen=True)
class AlignAndRepair:
    """The sections ``align`` and ``repair`` of the verb ``merge``.

    Args:
        trainer: The model is run on its device.
        model: The experts' module.
        datamodule: The data of the experts' domains.
        alignment: How channels are aligned; None if they are not.
        correction: What is repaired; None if nothing is.
        private: Shell patterns of the parameters that are left out of the merge.
        seed: Of all draws.
    """

    trainer: Trainer
    model: LightningModule | None
    datamodule: DomainDataModule | None
    alignment: Align | None
    correction: Repair | None
    private: tuple[str, ...]
    seed: int

    def check(self, experts: Any, base: str | None, method: MergeMethod, resume: bool, output: str) -> None:
        """Check before any work that the merge can be done with these options.

        Raises:
            MergeError: If not; every problem is listed.
        """
        problems = []
        if self.correction is not None:
            problems += [*self.correction.problems(), *self.correction.problems_with(method)]
        if self.alignment is not None and base is not None:
            problems.append("With `align` the base is the mean of the foundations; leave --base out.")
        if self.alignment is not None and method.needs:
            problems.append(
                f"{type(method).__name__} weighs parameters by statistics, which know nothing of a new order of "
                "channels; merge experts of several foundations by another method."
            )
        if (self.alignment or self.correction) and not isinstance(experts, Mapping):
            problems.append("Aligned and repaired experts need names; give --experts '{NAME: PATH, …}'.")
        if self.correction is not None and (self.model is None or self.datamodule is None):
            problems.append("A repair runs the model on images; give --model and --data with a domain for each expert.")
        if self.correction is not None and resume:
            problems.append("A merge that is repaired is written when it is complete, so that there is no resume.")
        for what in _KINDS if self.correction is not None else ():
            path = _beside(output, what)
            if os.path.lexists(path) and not is_folder(output) and not _is_of_tasks(path, what):
                problems.append(
                    f"{path} is none of the {what} that belong to a merged model, and those of the tasks of {output} "
                    "would replace it; move it away, or give another output."
                )
        raise_all(problems)
        if self._needs_images:
            assert self.datamodule is not None
            who = "A repair" if self.correction else "Aligning by activations"
            check_named_after_domains(who, self.datamodule, list(experts))

    @property
    def _needs_images(self) -> bool:
        by_activations = self.alignment is not None and self.alignment.by == "activations"
        return self.datamodule is not None and (by_activations or self.correction is not None)

    def open(self, base: Source, experts: Experts, processes: Processes) -> tuple[Weights, dict[str, Weights]]:
        """Open the base and the experts, each once, with their channels in one order.

        Args:
            base: The base; not used where experts are aligned, whose base is the mean of the foundations.
            experts: The experts.
            processes: The processes that make this call.

        Raises:
            MergeError: If a file cannot be opened, or if moments that were to be recorded are missing.
        """
        if self.alignment is None:
            with processes.together():
                weights = open_weights(base, name="base")
                opened = open_experts(experts, weights)
                self._check_moments(opened)
            return weights, opened
        with processes.together():
            dense = _open_dense(experts)
            self._check_moments(dense)
        return self._align(self.alignment, dense, processes)

    def unaligned(
        self, base: Source, experts: Sequence[str] | Mapping[str, Source]
    ) -> tuple[Source, Sequence[str] | Mapping[str, Source]]:
        """Return base and experts for a plan, to which the order of channels makes no difference.

        Raises:
            MergeError: If moments that were to be recorded are missing.
        """
        if self._reads_moments:
            self._check_moments(_open_dense(experts))
        if self.alignment is None:
            return base, experts
        return self._align(replace(self.alignment, by="nothing"), _named(experts), Processes())

    @property
    def _reads_moments(self) -> bool:
        return self.correction is not None and self.correction.recorded

    def _check_moments(self, experts: Mapping[str, Source]) -> None:
        """Check that the moments of every expert that could be opened without a base were recorded."""
        if self._reads_moments:
            opened = {name: expert for name, expert in experts.items() if isinstance(expert, Weights)}
            raise_all([p for name, expert in opened.items() for p in problems_of(read_moments, expert, name)])

    def _align(
        self, options: Align, experts: Mapping[str, Source], processes: Processes
    ) -> tuple[Weights, dict[str, Weights]]:
        """Compute the common initialisation, and put the experts' channels into one order."""
        images = None
        if options.by == "activations" and self.datamodule is not None:
            images = self._images("Aligning by activations", list(experts), options.batches)
        distributed = processes.count > 1
        aligned = align(
            options, experts, self._module, images, private=self.private, seed=self.seed, distributed=distributed
        )
        return aligned.base, aligned.experts

    def repair(self, merged: Merged, processes: Processes) -> Merged:
        """Repair the merged model, and note in its manifest how."""
        assert self.correction is not None
        images = self._images("A repair", list(merged.experts), self.correction.batches)
        module = self._module
        assert module is not None
        distributed = processes.count > 1
        repaired = repair(self.correction, merged, module, images, seed=self.seed, distributed=distributed)
        settings = asdict(self.correction)
        if self.correction.recorded:
            settings["moments"] = {
                name: open_weights(file).provenance()
                for name, expert in merged.experts.items()
                if (file := moments_file(expert)) is not None
            }
        return replace(repaired, manifest=merged.manifest | {"repair": settings})

    def save(self, merged: Merged, output: str, shard_size: int, carry_code: bool) -> None:
        """Write the merged model if it was repaired, and beside it what belongs to its tasks.

        The files take their places only when all of them are on the disk. What an earlier merge left beside a model of
        this name belongs to that one, and is removed.
        """
        heads = {f"{task}.{name}": t for task, head in merged.heads.items() for name, t in head.items()}
        path = local_path(output).absolute()
        path.parent.mkdir(parents=True, exist_ok=True)
        with private_folder(path.with_name(f"{path.name}.tasks")) as folder:
            new = {what: folder / f"{what}.safetensors" for what in _KINDS}
            if merged.corrections:
                save_corrections(new["corrections"], merged.corrections)
            if heads:
                save_weights(new["heads"], heads, manifest={"heads": list(merged.heads)})
            if self.correction is not None:  # else it was written while it was merged
                merged.save(output, shard_size, carry_code)
            for what, file in new.items():
                path = _beside(output, what)
                if file.exists():
                    put_in_place(file, path)
                elif _is_of_tasks(path, what):
                    path.unlink()

    @property
    def _module(self) -> LightningModule | None:
        return None if self.model is None else on_device(self.trainer, self.model)

    def _images(self, who: str, experts: list[str], batches: int) -> dict[str, list[Any]]:
        assert self.datamodule is not None
        assert self.model is not None
        return calibration_images(who, self.datamodule, experts, self.model, batches, _IMAGES)


def _named(experts: Experts) -> Mapping[str, Source]:
    """Return experts that have names, as :meth:`AlignAndRepair.check` demands of those to align or repair."""
    assert isinstance(experts, Mapping)
    return experts


def _open_dense(experts: Experts) -> dict[str, Source]:
    """Open the experts that are no adapters and no task vectors, which need a base."""
    return {
        name: source if is_adapter(source) or is_task_vector(source) else open_weights(source, f"expert {name}")
        for name, source in _named(experts).items()
    }


def _is_of_tasks(path: Path, what: str) -> bool:
    """Tell whether a file holds the corrections or heads that an earlier merge has written."""
    if path.is_symlink() or problems_of(read_header, path):
        return False
    metadata = read_header(path)[0]
    return what in metadata or f'"{what}"' in metadata.get("merge", "")


def _beside(output: str, what: str) -> Path:
    """Name the file of a merged model's corrections or heads: beside the model's file, or in its folder."""
    path = local_path(output)
    return path / f"{what}.safetensors" if is_folder(output) else path.with_suffix(f".{what}.safetensors")
