"""Check the arguments of a merge before any work."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from lightning_merge.checkpoints import Weights, check_dtypes, check_output
from lightning_merge.checkpoints.folders import check_folder, is_folder
from lightning_merge.checkpoints.paths import is_url
from lightning_merge.merging.inventory import Inventory
from lightning_merge.merging.options import MergeOptions
from lightning_merge.methods import MergeMethod
from lightning_merge.utilities.batches import TaskBatches, data_problems
from lightning_merge.utilities.errors import MergeError, problems_of, raise_all
from lightning_merge.utilities.modules import fit_problems, plain, stored_tensors


def check_arguments(
    method: MergeMethod,
    base: Weights,
    experts: Mapping[str, Weights],
    options: MergeOptions = MergeOptions(),  # noqa: B008, a frozen dataclass
) -> None:
    """Check that a merge can be done and written as it is asked for, before any work.

    Args:
        method: The method.
        base: The base.
        experts: The experts by name.
        options: Workers, precision and output.

    Raises:
        MergeError: If not; every problem is listed.
    """
    problems = []
    output = options.output
    if options.workers is not None and options.workers < 1:
        problems.append(f"workers must be at least 1, got {options.workers}.")
    if options.shard_size < 1:
        problems.append(f"shard_size is a number of bytes and must be at least 1, got {options.shard_size}.")
    if options.resume and output is None:
        problems.append("resume goes on with a half-finished output; give output, too.")
    if options.resume and method.needs_data:
        problems.append(
            f"{type(method).__name__} runs the model on data, which may be others by now; it cannot be resumed."
        )
    if options.resume:
        problems += problems_of(check_resumable, [base, *experts.values()])
    if output is not None and is_url(output) and (options.resume or options.distributed):
        how = "resumed" if options.resume else "made by several processes"
        problems.append(f"A merge to {output} is complete before it is uploaded and cannot be {how}; write to a file.")
    if options.dtype not in (None, torch.float32, torch.float64):
        problems.append(f"The arithmetic can be float32 or float64, not {options.dtype}.")
    problems += problems_of(method.check_count, len(experts))
    if output is not None and is_folder(output):
        problems += problems_of(check_folder, output, base.path, [base, *experts.values()], options.carry_code)
    elif output is not None:
        problems += problems_of(check_output, output, [base, *experts.values()])
    if output is not None:
        problems += problems_of(check_dtypes, output, base.meta)
    raise_all(problems)


def check_resumable(inputs: Iterable[Weights]) -> None:
    """Raise a :class:`MergeError` if an input is in memory: nobody could tell whether it is still the same."""
    raise_all(
        [
            f"A merge can only be resumed if all of its inputs are files, and {weights.name} is in memory; give a file."
            for weights in inputs
            if not weights.inputs
        ]
    )


def check_separable(method: MergeMethod, inventory: Inventory) -> None:
    """Raise a :class:`MergeError` if a method looks at the parts of weights that mean something only together."""
    if inventory.magnitudes and (method.needs or method.needs_data):
        v = next(iter(inventory.magnitudes.values()))
        raise MergeError(
            f"{type(method).__name__} looks at the statistics or gradients of parameters, which of normalised weights "
            f"({v!r}) are not those of the weights; take another method, or in every model call torch.nn.utils."
            "remove_weight_norm (or parametrize.remove_parametrizations) of these modules and save its state_dict()."
        )


def check_task_data(
    method: str,
    module: nn.Module | None,
    data: TaskBatches | None,
    base: Weights,
    experts: Mapping[str, Weights],
    inventory: Inventory,
) -> None:
    """Check that a method can run the model on the data of every expert's task, without running anything.

    Raises:
        MergeError: If the module or the data of an expert are missing, or belong to other models.
    """
    if module is None or data is None:
        example = ", ".join(f"{name!r}: loader" for name in experts)
        raise MergeError(
            f"{method} runs the model on images of every expert's task while it merges; give "
            f"merge(…, module=model, data={{{example}}}), or on the command line --model and --data."
        )
    raise_all([*data_problems(data, experts, "merge"), *_module_problems(plain(module), base, experts, inventory)])


def _module_problems(
    module: nn.Module, base: Weights, experts: Mapping[str, Weights], inventory: Inventory
) -> list[str]:
    """Check that the module has all that is merged, and that base and expert together have all of the module."""
    tensors = stored_tensors(module)
    shared = {name: base.meta[name] for name in (*inventory.merged, *inventory.averaged)}
    problems = fit_problems(tensors, shared, "the base", "within")
    for expert, weights in experts.items():
        for_task = {**base.meta, **{name: weights.meta[name] for name in inventory.private[weights.name]}}
        problems += fit_problems(tensors, for_task, f"the base and in what expert {expert} keeps to itself", "cover")
    return problems
