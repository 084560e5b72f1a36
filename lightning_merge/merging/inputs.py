"""Inputs of a merge: all models opened, compared and looked at before anything is computed."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lightning_merge.checkpoints import Experts, Source, Weights, open_experts, open_statistics, open_weights
from lightning_merge.checkpoints.joined import join
from lightning_merge.checkpoints.views import mean_of
from lightning_merge.checkpoints.weights import widest
from lightning_merge.merging.checks import check_arguments, check_resumable, check_separable, check_task_data
from lightning_merge.merging.inspection import Values, fingerprint_all, inspect_values
from lightning_merge.merging.inventory import Inventory, take_inventory
from lightning_merge.merging.options import MergeOptions
from lightning_merge.merging.origins import Origins, check_origins
from lightning_merge.methods import MergeMethod
from lightning_merge.methods.base.task_data import TaskData
from lightning_merge.utilities.processes import Processes
from lightning_merge.utilities.workers import count_workers


@dataclass(frozen=True)
class Inputs:
    """Inputs of a merge, opened, and where it is computed.

    Args:
        method: The method.
        base: The base.
        experts: The experts by name.
        statistics: The statistics of each expert's data, in the order of the experts; none if the method needs none.
        inventory: What happens to every parameter.
        origins: How the experts lie to the base.
        home: Where the base's weights are.
        device: Where the merge is computed.
        workers: Parameters that are merged at the same time.
    """

    method: MergeMethod
    base: Weights
    experts: dict[str, Weights]
    statistics: list[Weights]
    inventory: Inventory
    origins: Origins
    home: torch.device
    device: torch.device
    workers: int


def open_inputs(
    base: Source, experts: Experts, method: MergeMethod, options: MergeOptions, processes: Processes
) -> Inputs:
    """Open all models and find every conflict between them, from headers and a sample of the weights."""
    with processes.together():
        base = open_weights(base, name="base")
        opened = open_experts(experts, base)
        check_arguments(method, base, opened, options)
        inventory = take_inventory(base, list(opened.values()), options.include, options.exclude)
        check_separable(method, inventory)
        if method.needs_data:
            check_task_data(type(method).__name__, options.module, options.data, base, opened, inventory)
        statistics = open_statistics(options.statistics, method.needs, base, opened, inventory.merged)
        if options.resume:
            check_resumable(statistics)
        base, opened = join(base, opened, inventory.magnitudes)
        origins = check_origins(base, opened, inventory.merged, options.allow_strangers)
        home = base[inventory.merged[0]].device
    device = home if options.device is None else torch.device(options.device)
    workers = count_workers(options.workers, device, sum(base.meta[name].numel() for name in inventory.merged))
    return Inputs(method, base, opened, statistics, inventory, origins, home, device, workers)


def inspect_inputs(inputs: Inputs, options: MergeOptions, processes: Processes) -> Values:
    """Hash every file, and look at every value that goes in; each process does a part of it."""
    base, experts, statistics = inputs.base, inputs.experts, inputs.statistics
    fingerprint_all([base, *experts.values(), *statistics], processes, inputs.workers)
    if options.allow_non_finite:
        return Values()
    return inspect_values(base, experts, statistics, inputs.method.needs, inputs.inventory, processes, inputs.workers)


def task_data_of(inputs: Inputs, options: MergeOptions) -> TaskData:
    """Collect the module and the data of the experts' tasks for a method that runs the model while it merges."""
    base, experts, inventory = inputs.base, inputs.experts, inputs.inventory
    assert options.module is not None  # see checktask_data_of
    assert options.data is not None
    kept = {name: mean_of(name, base, experts) for name in inventory.averaged}
    kept |= {name: base[name].clone() for name in inventory.copied}
    return TaskData(
        options.module, options.data, kept, experts, inventory.tied, inventory.private, widest(base), options.seed
    )
