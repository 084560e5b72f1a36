"""The base class of callbacks that merge: a base, earlier experts, and the options of the merge."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import takewhile
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.seed import isolate_rng
from lightning_merge.callbacks.record_statistics import RecordStatistics
from torch import Tensor

from lightning_merge.checkpoints import Weights, open_experts, open_statistics, open_weights
from lightning_merge.checkpoints.names import is_left_out, matches
from lightning_merge.checkpoints.views import Completed, under_names_of
from lightning_merge.checkpoints.weights import plain_names
from lightning_merge.data import DomainDataModule
from lightning_merge.evaluation.merge_data import check_named_after_domains, module_and_data
from lightning_merge.merging.checks import check_arguments
from lightning_merge.merging.inventory import compare
from lightning_merge.merging.merge import merge
from lightning_merge.merging.merged import Merged
from lightning_merge.merging.origins import check_origins
from lightning_merge.methods import MergeMethod
from lightning_merge.methods.base.matrices import Matrices
from lightning_merge.models.fitted import callbacks_of, check_forward, check_whole
from lightning_merge.utilities.errors import MergeError, problems_of, raise_all
from lightning_merge.utilities.processes import Processes, processes_of_run
from lightning_merge.utilities.progress import show_progress

_MODULE = "the running module"
"""What the module's own weights are called in messages where they are no expert."""


class MergingCallback(Callback):
    """Callback that merges experts within a run.

    The base and the experts may be of the module or of a part of it (the file of a backbone that the module keeps as
    ``self.model``): their names are matched by what stands before them. What comes out has the module's names.

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
        allow_strangers: Merge experts that do not come from the base, without a word about it.
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
        allow_strangers: bool = False,
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
            "allow_strangers": allow_strangers,
        }

    def check(
        self, trainer: Trainer, pl_module: LightningModule, methods: Mapping[str, MergeMethod], with_run: bool
    ) -> None:
        """Check in ``setup`` that the merges can work; what is wrong in one process stops all of them.

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
            if processes.is_first:
                raise_all(list(dict.fromkeys(self._problems(trainer, pl_module, methods.values(), with_run))))

    def merge(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        method: MergeMethod,
        run: Weights | Callable[[], Weights] | None = None,
    ) -> tuple[dict[str, Tensor], Merged | None]:
        """Merge in memory; all processes must call it. The module and the random numbers stay as they are.

        The parameters are shared out over the processes, where all of them see the same files; else the first process
        merges and the others get what comes out. What is in memory is the first process's everywhere: BatchNorm's
        running statistics differ between the processes of ``ddp``.

        Args:
            trainer: The trainer.
            pl_module: Its module.
            method: The merging method.
            run: The weights of this run, if they are one of the experts, or what opens them.

        Returns:
            Weights ``(…)`` under the keys of the module's state dict, with what this run keeps to itself (its head,
            where that is excluded), on every process; and the merged model, on the first one at least.
        """
        processes, state = processes_of_run(), pl_module.state_dict()
        running = open_weights(state, _MODULE)
        opened, failure = None, None
        try:
            opened = self._open(running, method, run() if callable(run) else run)
        except Exception as error:  # raised below, together with the other processes
            failure = error
        with processes.together():
            if processes.is_first and failure is not None:
                raise failure
        seen = processes.gather(None if opened is None else _sizes(opened))
        work = partial(self._merge, trainer, pl_module, method)
        merged, tensors = None, None
        with isolate_rng(), show_progress(False):  # Lightning's own bar may be up
            if opened is not None and all(files == seen[0] for files in seen):
                merged = work(running, *opened, processes)
                tensors = _tensors(merged)
            else:
                with processes.together():
                    if processes.is_first and opened is not None:
                        merged = work(running, *opened, Processes())
                        tensors = _tensors(merged)
                tensors = processes.from_first(tensors)
        return {key: tensors[name] for name, key in plain_names(_MODULE, state).items() if name in tensors}, merged

    def _problems(
        self, trainer: Trainer, pl_module: LightningModule, methods: Iterable[MergeMethod], with_run: bool
    ) -> list[str]:
        """List everything that is in the way of the merges, from headers and a sample of the weights."""
        state, who = pl_module.state_dict(), type(pl_module).__name__
        late = f"If {who} makes layers in setup() or configure_model(), make them in __init__: they are not there yet."
        if not state:
            return [f"{type(self).__name__} cannot compare {who} with the base, because it has no parameters. {late}"]
        running = open_weights(state, self.name if with_run else _MODULE)
        base, earlier = self.models_of(running, with_run)
        experts = earlier | ({self.name: running} if with_run else {})
        inventory, problems = compare(
            base, [*earlier.values(), running], self.options["include"], self.options["exclude"]
        )
        if problems and makes_layers_late(pl_module):
            problems.append(late)
        for method in methods:
            problems += problems_of(check_arguments, method, base, experts)
            problems += self._data_problems(trainer, method, experts)
            problems += problems_of(check_forward, pl_module, type(method).__name__) if method.needs_data else []
            if method.needs and not problems:
                problems += self._statistics_problems(trainer, method, base, earlier, inventory.merged, with_run)
        if not problems and earlier:
            problems += problems_of(check_origins, base, earlier, inventory.merged, self.options["allow_strangers"])
        return problems

    def models_of(self, own: Weights, with_run: bool) -> tuple[Weights, dict[str, Weights]]:
        """Open the base and the earlier experts, under the module's names."""
        base = under_names_of(own, open_weights(self.base, "base"))
        experts = open_experts(self.experts, base)
        if with_run and self.name in experts:
            raise MergeError(f"This run is called {self.name!r}, and so is one of the experts; give it another name.")
        return base, experts

    def _open(
        self, running: Weights, method: MergeMethod, run: Weights | None
    ) -> tuple[Weights, dict[str, Weights], list[Weights]]:
        """Open the base, all experts, and their statistics."""
        base, experts = self.models_of(running, run is not None)
        if run is not None:
            lacks = any(name not in run for name in running)
            experts[self.name] = Completed(run, running) if lacks else run  # a checkpoint may leave out what is frozen
        inventory, _ = compare(base, list(experts.values()), self.options["include"], self.options["exclude"])
        sources = self.options["statistics"]
        return base, experts, open_statistics(sources, method.needs, base, experts, inventory.merged, read=False)

    def _data_problems(self, trainer: Trainer, method: MergeMethod, experts: Mapping[str, Weights]) -> list[str]:
        """Check that a method which runs the model finds images of every expert's domain."""
        if not method.needs_data:
            return []
        who, datamodule = type(method).__name__, getattr(trainer, "datamodule", None)
        if not isinstance(datamodule, DomainDataModule):
            return [f"{who} runs the model on images of every expert's domain; give the trainer a DomainDataModule."]
        return problems_of(check_named_after_domains, who, datamodule, list(experts))

    def _statistics_problems(
        self,
        trainer: Trainer,
        method: MergeMethod,
        base: Weights,
        earlier: Mapping[str, Weights],
        merged: Sequence[str],
        with_run: bool,
    ) -> list[str]:
        """Check that the statistics that a method needs are there, or will be recorded in time."""
        sources = self.options["statistics"] or {}
        others = {name: source for name, source in sources.items() if name != self.name}
        problems = problems_of(open_statistics, others, method.needs, base, earlier, merged, read=False)
        if with_run and self.name not in sources and not self._will_be_recorded(trainer, method.needs):
            kinds = ", ".join(repr(kind) for kind in method.needs)
            problems.append(
                f"{type(method).__name__} needs statistics of this run's data, and nothing records them beside its "
                f"checkpoint; put RecordStatistics(kinds=[{kinds}]) before {type(self).__name__} in the callbacks."
            )
        return problems

    def _will_be_recorded(self, trainer: Trainer, kinds: Sequence[str]) -> bool:
        """Tell whether a callback before this one records these kinds of statistics beside the checkpoint."""
        before = takewhile(lambda callback: callback is not self, callbacks_of(trainer))
        recorders = [callback for callback in before if isinstance(callback, RecordStatistics)]
        return any(set(kinds) <= set(r.recipe.kinds) and r.output is None and r.when == "fit" for r in recorders)

    def _merge(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        method: MergeMethod,
        running: Weights,
        base: Weights,
        experts: Mapping[str, Weights],
        statistics: Sequence[Weights],
        processes: Processes,
    ) -> Merged:
        """Merge onto the base, completed with what this run keeps, so that the result fits the module."""
        left_out = partial(is_left_out, include=self.options["include"], exclude=self.options["exclude"])
        experts = {name: _of_first(processes, weights) for name, weights in experts.items()}
        keeps = experts.get(self.name, running)
        if keeps is running and any(left_out(name) for name in running):
            keeps = _of_first(processes, running)
        whole = Completed(base, keeps, left_out)
        module_data = module_and_data(trainer, pl_module, getattr(trainer, "datamodule", None), method, experts)
        options = self.options_for(whole, *experts.values()) | {"allow_strangers": True}  # see `check`
        return merge(whole, experts, method, distributed=processes.count > 1, **options, **module_data)

    def options_for(self, *models: Weights) -> dict[str, Any]:
        """Return the options of a merge of these models, without patterns for other parameters of the module."""
        names = {name for model in models for name in model}
        used = [pattern for pattern in self.options["exclude"] if any(matches(name, [pattern]) for name in names)]
        return self.options | {"exclude": used}


def makes_layers_late(module: LightningModule) -> bool:
    """Tell whether a module may make layers after the ``setup`` of callbacks."""
    return is_overridden("setup", module) or is_overridden("configure_model", module)


def _tensors(merged: Merged) -> dict[str, Tensor]:
    """Collect the merged tensors ``(…)``; other entries of a state dict (``_extra_state``) are the running module's."""
    return {name: tensor for name, tensor in merged.weights.items() if isinstance(tensor, Tensor)}


def _sizes(opened: tuple[Weights, Mapping[str, Weights], Sequence[Weights]]) -> list[tuple[str, int]]:
    """List names and sizes of the files, by which a process tells whether another one sees the same."""
    base, experts, statistics = opened
    return [(file.path.name, file.size) for w in (base, *experts.values(), *statistics) for file in w.inputs]


def _of_first(processes: Processes, weights: Weights) -> Weights:
    """Return the weights of the first process, where they are in memory."""
    if processes.count == 1 or weights.inputs:
        return weights
    sent = processes.from_first({name: weights[name] for name in weights if name not in weights.tied})
    return open_weights(sent | {alias: sent[owner] for alias, owner in weights.tied.items()}, weights.name)
