"""Log, while an expert is trained, how well it is aligned with the experts before it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning_merge.callbacks.merging_callback import MergingCallback
from torch import Tensor

from lightning_merge.analysis.alignment import leading_subspace, projected_ratio
from lightning_merge.analysis.groups import GROUPS, check_pattern, group_of
from lightning_merge.checkpoints import Weights, open_weights
from lightning_merge.evaluation.merge_data import module_and_data
from lightning_merge.merging.merge import merge
from lightning_merge.methods import MergeMethod, TaskArithmetic
from lightning_merge.methods.base.matrices import Matrices
from lightning_merge.utilities.errors import problems_of, raise_all
from lightning_merge.utilities.processes import processes_of_run
from lightning_merge.utilities.tensors import wide


class LogAlignment(MergingCallback):
    """Monitor of this run's subspace alignment ratio and task-vector norm, logged per group of layers to every logger.

    ``alignment/GROUP`` is the share of this run's task matrices that lies in the leading subspace of the experts'
    merged ones (Marczak et al., ICML 2025, arXiv 2502.04959: the higher, the more a merge gives to the task), the mean
    over the group's matrices that have moved; ``task_vector_norm/GROUP`` the Frobenius norm of what was done to all of
    the group's parameters. ``…/total`` is that of the whole model.

    The subspaces are computed once, in ``setup``, by the first process, which alone must be able to read the files.
    They are kept in main memory, as large as the base at most, besides a copy of the base. Weights, gradients and
    random numbers stay as they are. In a run with ``WeightAveraging`` these are the weights that are trained, not the
    average.

    Args:
        base: The checkpoint that all experts started from.
        experts: The checkpoints of the experts to compare with: a list, or a mapping from a name.
        method: How they are merged for that; by default their task vectors are added, as in the paper.
        each: Compare with every expert by itself, too: ``alignment/EXPERT/GROUP``.
        every_n_epochs: After how many training epochs to log.
        every_n_steps: After how many optimizer steps to log, instead; the loggers get these values at these very steps,
            whatever the trainer's ``log_every_n_steps``.
        groups: What this regular expression matches at the beginning of a parameter's name is its group; by default
            everything up to the first number (``backbone.blocks.3``), else the first part of the name.
        error: How much of the merged matrix, as a share of its norm, may lie outside of its leading subspace.
        include: Look only at the parameters whose name matches one of these shell patterns.
        exclude: Do not look at those that match one of these.
        matrices: Which parameters count as matrices.
    """

    def __init__(
        self,
        base: str,
        experts: list[str] | dict[str, str],
        method: MergeMethod | None = None,
        each: bool = False,
        every_n_epochs: int = 1,
        every_n_steps: int | None = None,
        groups: str = GROUPS,
        error: float = 0.05,
        include: list[str] | None = None,
        exclude: list[str] | None = None,
        matrices: Matrices = Matrices(),  # noqa: B008, a frozen dataclass
    ) -> None:
        super().__init__(base, experts, include, exclude, matrices)
        self.method = method or TaskArithmetic(scale=1.0)
        self.each = each
        self.every_n_epochs = every_n_epochs
        self.every_n_steps = every_n_steps
        self.groups = groups
        self.error = error
        self._logged_at = 0
        self._base: dict[str, Tensor] = {}
        self._subspaces: dict[str, dict[str, list[Tensor]]] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Merge the experts and compute the leading subspaces of the result."""
        if stage != "fit":
            return
        self._check_arguments()
        self.check(trainer, pl_module, {"alignment": self.method}, with_run=False)
        processes, references = processes_of_run(), None
        with processes.together():
            if processes.is_first:
                references = self._references(trainer, pl_module)
        self._base, self._subspaces = {}, defaultdict(lambda: defaultdict(list))
        for key, tensor in processes.from_first(references).items():
            reference, name, block = key.rsplit("/", 2)
            if block:
                self._subspaces[reference][name].append(tensor)
            else:
                self._base[name] = tensor

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count optimizer steps from here."""
        self._logged_at = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Log after every ``every_n_steps`` optimizer steps."""
        step = trainer.global_step
        if self.every_n_steps is None or step % self.every_n_steps or step == self._logged_at:
            return
        self._logged_at = step
        values = self.measure(pl_module)
        pl_module.log_dict(values, logger=False, on_step=True, on_epoch=False)
        for logger in trainer.loggers:
            logger.log_metrics(values, step=step)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log after every ``every_n_epochs`` epochs."""
        if self.every_n_steps is None and (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            pl_module.log_dict(self.measure(pl_module), sync_dist=trainer.world_size > 1)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Free the memory of the base and the subspaces."""
        self._base, self._subspaces = {}, {}

    @torch.no_grad()
    def measure(self, pl_module: LightningModule) -> dict[str, float]:
        """Compute the values to log for the module's current weights, by their names in the log."""
        rule: Matrices = self.options["matrices"]
        squares: dict[str, float] = defaultdict(float)
        ratios: dict[str, list[float]] = defaultdict(list)
        weights = open_weights(pl_module.state_dict(), self.name)
        for name, base in self._base.items():
            weight = wide(weights[name])
            delta = weight - wide(base.to(weight.device))
            for group in (group_of(name, self.groups), "total"):
                squares[group] += float(delta.double().square().sum())
            if (blocks := rule.blocks(name, delta[None])) is None or not delta.any():
                continue
            for reference, subspaces in self._subspaces.items():
                for block, U in zip(blocks, subspaces[name], strict=True):
                    if block.any():
                        ratio = float(projected_ratio(block[0], U.to(block)))
                        for group in (group_of(name, self.groups), "total"):
                            ratios[f"{reference}{group}"].append(ratio)
        values = {f"alignment/{group}": sum(shares) / len(shares) for group, shares in ratios.items()}
        return values | {f"task_vector_norm/{group}": square**0.5 for group, square in squares.items()}

    def _check_arguments(self) -> None:
        """Raise a MergeError that lists the arguments that are out of range."""
        problems = []
        for name, value in (("every_n_epochs", self.every_n_epochs), ("every_n_steps", self.every_n_steps)):
            if value is not None and value < 1:
                problems.append(f"LogAlignment: {name} must be at least 1, got {value}.")
        if not 0 <= self.error < 1:
            problems.append(f"LogAlignment: error must lie in [0, 1), got {self.error}.")
        problems += [f"LogAlignment: {problem}" for problem in problems_of(check_pattern, self.groups)]
        raise_all(problems)

    def _references(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Tensor]:
        """Return the base's parameters ``(…)`` as ``/NAME/``, the subspaces ``(m, k)`` as ``REFERENCE/NAME/BLOCK``."""
        running = open_weights(pl_module.state_dict(), self.name)
        base, experts = self.models_of(running, with_run=False)
        tensors: dict[str, Tensor] = {}
        references: dict[str, tuple[MergeMethod, Mapping[str, Weights]]] = {"": (self.method, experts)}
        if self.each:
            references |= {f"{name}/": (TaskArithmetic(scale=1.0), {name: expert}) for name, expert in experts.items()}
        for reference, (method, sources) in references.items():
            module_data = module_and_data(trainer, pl_module, getattr(trainer, "datamodule", None), method, sources)
            options = self.options_for(base, *sources.values())
            computation = merge(base, sources, method, keep_update=True, **options, **module_data).computation
            assert computation is not None  # it is kept with the update
            updates = computation.updates or {}
            tensors |= {f"/{name}/": base[name].cpu() for name in updates}
            for name, update in updates.items():
                for i, block in enumerate(self.options["matrices"].blocks(name, update[None]) or ()):
                    tensors[f"{reference}/{name}/{i}"] = leading_subspace(block[0], self.error).cpu()
        return tensors
