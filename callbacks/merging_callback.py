"""What the callbacks that merge have in common: a base, earlier experts, and how they are merged."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_merge.checkpoints import Weights, open_weights
from lightning_merge.data import DomainDataModule
from lightning_merge.errors import MergeError, problems_of, raise_all
from lightning_merge.evaluation.merge_data import check_named_after_domains, module_and_data
from lightning_merge.inventory import take_inventory
from lightning_merge.matrices import Matrices
from lightning_merge.merged import Merged
from lightning_merge.merging import check_arguments, merge, open_experts
from lightning_merge.methods import MergeMethod
from lightning_merge.prefixes import match_names
from lightning_merge.statistics import open_statistics
from lightning_merge.trainers import check_whole, processes_of_run


class MergingCallback(Callback):
    """Merges experts within a run.

    Args:
        base: The checkpoint that all experts started from.
        experts: The checkpoints (run folders, adapters, task vectors) of the experts: a list, or a mapping from a name.
        include: Merge only the parameters whose name matches one of these shell patterns.
        exclude: Do not merge those that match one of these; this run's model keeps its own.
        matrices: Which parameters count as matrices.
        statistics: Statistics of the experts' data by their name, for methods that need them; by default the files
            beside the experts' checkpoints.
        seed: Seed of methods that draw random numbers.
        name: What this run's expert is called. Methods that run the model while they merge (AdaMerging, RegMean++) need
            a ``DomainDataModule`` and experts that are named after its domains.
    """

    def __init__(
        self,
        base: str,
        experts: list[str] | dict[str, str],
        include: list[str] | None = None,
        exclude: list[str] | None = None,
        matrices: Matrices = Matrices(),  # noqa: B008, a frozen dataclass
        statistics: dict[str, str] | None = None,
        seed: int = 0,
        name: str = "this run",
    ) -> None:
        self.base = base
        self.experts = experts
        self.name = name
        self.options: dict[str, Any] = {
            "include": include,
            "exclude": exclude or (),
            "matrices": matrices,
            "statistics": statistics,
            "seed": seed,
        }

    def check(
        self, trainer: Trainer, pl_module: LightningModule, methods: Mapping[str, MergeMethod], with_run: bool
    ) -> None:
        """Find out in ``setup`` whether the merges can work; what is wrong in one process stops all of them.

        Files are looked at by the first process only.

        Args:
            trainer: The trainer.
            pl_module: Its module.
            methods: The merging methods by name.
            with_run: Whether this run's model is one of the experts.

        Raises:
            MergeError: If not; every problem is listed.
        """
        check_whole(trainer, type(self).__name__)
        processes = processes_of_run()
        with processes.together():
            if not processes.is_first:
                return
            own = open_weights(pl_module.state_dict(), self.name)
            base, experts = self._open(own, own if with_run else None)
            earlier = {name: weights for name, weights in experts.items() if weights is not own}
            problems = problems_of(take_inventory, base, list(experts.values()), *self._patterns)
            for method in methods.values():
                problems += problems_of(check_arguments, method, base, experts)
                problems += self._data_problems(trainer, method, experts)
                if method.needs and not problems:
                    merged = take_inventory(base, list(experts.values()), *self._patterns).merged
                    given = {k: v for k, v in (self.options["statistics"] or {}).items() if k in earlier}
                    problems += problems_of(open_statistics, given, method.needs, base, earlier, merged, read=False)
            raise_all(list(dict.fromkeys(problems)))

    def merge(
        self, trainer: Trainer, pl_module: LightningModule, method: MergeMethod, run: Weights | None = None
    ) -> tuple[dict[str, Tensor], Merged | None]:
        """Merge in memory; all processes must call it.

        The parameters are shared out over the processes, where all of them can read the files; else the first process
        merges and the others get what comes out.

        Args:
            trainer: The trainer.
            pl_module: Its module, which is not changed.
            method: The merging method.
            run: The weights of this run, if they are one of the experts.

        Returns:
            Weights that fit the module, with what this run keeps to itself (its head, where that is excluded), on every
            process; and the merged model, on the first one at least.
        """
        processes = processes_of_run()
        own = open_weights(pl_module.state_dict(), self.name)
        opened, failure = None, None
        try:
            opened = self._open(own, run)
        except MergeError as error:
            failure = error
        shared = all(processes.gather(failure is None))
        merged: Merged | None = None
        weights: dict[str, Tensor] | None = None
        with processes.together():
            if processes.is_first and failure is not None:
                raise failure
        if shared:
            merged = self._merge(trainer, pl_module, method, *opened, distributed=processes.count > 1)
            return self._fitting(merged, own, run), merged
        with processes.together():
            if processes.is_first:
                merged = self._merge(trainer, pl_module, method, *opened, distributed=False)
                weights = self._fitting(merged, own, run)
        return processes.from_first(weights), merged

    @property
    def _patterns(self) -> tuple[Any, Any]:
        return self.options["include"], self.options["exclude"]

    def _open(self, own: Weights, run: Weights | None) -> tuple[Weights, dict[str, Weights]]:
        """The base under the module's names, and all experts."""
        base = match_names(own, open_weights(self.base, "base"))
        experts = open_experts(self.experts, base)
        if run is not None and self.name in experts:
            raise MergeError(f"This run is called {self.name!r}, and so is one of the experts; give it another name.")
        return base, experts | ({} if run is None else {self.name: run})

    def _data_problems(self, trainer: Trainer, method: MergeMethod, experts: Mapping[str, Weights]) -> list[str]:
        if not method.needs_data:
            return []
        who, datamodule = type(method).__name__, getattr(trainer, "datamodule", None)
        if not isinstance(datamodule, DomainDataModule):
            return [f"{who} runs the model on images of every expert's domain; give the trainer a DomainDataModule."]
        return problems_of(check_named_after_domains, who, datamodule, list(experts))

    def _merge(self, trainer, pl_module, method, base, experts, distributed) -> Merged:
        given = module_and_data(trainer, pl_module, getattr(trainer, "datamodule", None), method, experts)
        return merge(base, experts, method, distributed=distributed, **self.options, **given)

    @staticmethod
    def _fitting(merged: Merged, own: Weights, run: Weights | None) -> dict[str, Tensor]:
        """The merged weights, with the module's own for what is not merged: those of this run, or as they are."""
        kept = {name for names in merged.inventory.private.values() for name in names}
        source = own if run is None else run
        return {
            name: source[name] if name in kept or name not in merged.weights else merged.weights[name] for name in own
        }
