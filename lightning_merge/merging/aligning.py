"""Put experts of several foundations into one order of channels: the section ``align`` of a merge, and what it does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from lightning_merge.align.activation_matching import match_activations
from lightning_merge.align.find_symmetries import find_symmetries
from lightning_merge.align.foundations import Aligned, align_experts
from lightning_merge.align.match_many import match_many
from lightning_merge.align.permutation import Permutation
from lightning_merge.align.symmetries import Symmetries
from lightning_merge.align.weight_matching import match_weights
from lightning_merge.checkpoints import Source
from lightning_merge.checkpoints.names import matches
from lightning_merge.utilities.batches import TaskBatches, images_of
from lightning_merge.utilities.errors import MergeError
from lightning_merge.utilities.modules import plain
from lightning_merge.utilities.processes import Processes


@dataclass(frozen=True)
class Align:
    """Alignment of experts that were fine-tuned from several foundations: one order of channels before the merge.

    Args:
        foundations: The foundations' files by name. The first one's order of channels is the common one.
        foundation_of: For every expert the name of its foundation.
        by: What is compared: ``weights`` (git-re-basin's weight matching), ``activations`` on the experts' unlabelled
            training images, or ``nothing``: all channels stay where they are.
        together: Where there are three foundations or more: each is matched to the first one (``reference``), to the
            mean of the others in turn (``mean``), or all at once (``frank_wolfe``, C2M3); weights only.
        restarts: Number of searches of weight matching from different starts, of which the best one counts.
        batches: The most batches of each expert's images that activations are compared on.
        symmetries: A file with the permutation groups, as ``Symmetries.to_json`` writes them; by default they are found
            in the model.
    """

    foundations: dict[str, str]
    foundation_of: dict[str, str]
    by: Literal["weights", "activations", "nothing"] = "weights"
    together: Literal["reference", "mean", "frank_wolfe"] = "reference"
    restarts: int = 2
    batches: int = 32
    symmetries: str | None = None


def align(
    options: Align,
    experts: Mapping[str, Source],
    module: nn.Module | None = None,
    data: TaskBatches | None = None,
    *,
    private: Sequence[str] = (),
    symmetries: Symmetries | None = None,
    images: Tensor | None = None,
    seed: int = 0,
    distributed: bool = False,
) -> Aligned:
    """Open foundations and experts and put their channels into one order.

    Args:
        options: What is compared, and how.
        experts: The experts by name.
        module: The module that the weights are of; may be left out where nothing is compared, or where weights are
            compared by a specification of groups.
        data: For each expert's name batches of its images, to compare activations on.
        private: Shell patterns of the parameters that every model keeps to itself (heads): permuted, not compared.
        symmetries: The permutation groups; by default those of the file in the options, or those found in the module.
        images: Two images or more ``(N, …)``, to trace the module with; by default the first of the data.
        seed: Of the order in which groups are visited, and of the starts.
        distributed: Whether all processes of a process group make this call with the same data: they take the
            permutations of the first one, since rounding may differ with the number of threads.

    Raises:
        MergeError: If the models do not fit together, or if something is missing that the comparison needs.
    """
    processes = Processes(distributed)
    like = None if module is None else plain(module).state_dict()
    if options.by == "nothing":
        return align_experts(options.foundations, experts, options.foundation_of, None, like)
    if module is None and ((symmetries is None and options.symmetries is None) or options.by == "activations"):
        raise MergeError(
            "Foundations are aligned by the permutation groups of their module; give --model, or, to compare weights, "
            "a file of groups with --align.symmetries."
        )
    if options.by == "activations" and not data:
        raise MergeError("Activations are compared on the experts' images; give --data, or compare weights.")

    model = cast(nn.Module, module)  # where it is missing, groups are given and weights are compared

    def match(foundations: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Permutation]:
        with processes.together():
            groups = symmetries or (
                read_symmetries(options.symmetries) if options.symmetries else find_groups(model, data, images)
            )
            compared = groups.ignoring(private)
            if options.by == "weights":
                permutations = _match_by_weights(options, foundations, compared, seed)
            else:
                batches = cast(TaskBatches, data)
                permutations = _match_by_activations(
                    options, plain(model), foundations, compared, batches, private, seed
                )
        orders = processes.gather({name: permutation.orders for name, permutation in permutations.items()})[0]
        return {name: Permutation(groups, order) for name, order in orders.items()}

    return align_experts(options.foundations, experts, options.foundation_of, match, like)


def _match_by_weights(
    options: Align, foundations: Mapping[str, Mapping[str, Tensor]], symmetries: Symmetries, seed: int
) -> Mapping[str, Permutation]:
    if options.together != "reference" and len(foundations) > 2:
        return match_many(foundations, symmetries, method=options.together, seed=seed)
    (first, reference), *others = foundations.items()
    return {first: Permutation.identity(symmetries)} | {
        name: match_weights(reference, other, symmetries, seed=seed, restarts=options.restarts)
        for name, other in others
    }


def _match_by_activations(
    options: Align,
    module: nn.Module,
    foundations: Mapping[str, Mapping[str, Tensor]],
    symmetries: Symmetries,
    data: TaskBatches,
    private: Sequence[str],
    seed: int,
) -> dict[str, Permutation]:
    batches = [batch for loader in data.values() for batch in islice(loader, options.batches)]
    (first, reference), *others = (
        (name, with_private_of(module, weights, private)) for name, weights in foundations.items()
    )
    return {first: Permutation.identity(symmetries)} | {
        name: match_activations(module, reference, other, symmetries, batches) for name, other in others
    }


def with_private_of(module: nn.Module, weights: Mapping[str, Tensor], private: Sequence[str]) -> dict[str, Tensor]:
    """Put a module's private parameters into a model's weights, whose head may be for other classes."""
    module_weights = module.state_dict()
    return {**weights, **{name: tensor for name, tensor in module_weights.items() if matches(name, private)}}


def find_groups(module: nn.Module, data: TaskBatches | None = None, images: Tensor | None = None) -> Symmetries:
    """Find the permutation groups of a module by tracing it.

    Args:
        module: The module.
        data: For each expert's name batches of its images.
        images: The images ``(N, …)`` to trace it with; by default the first of the data, or :func:`example_images`.

    Raises:
        MergeError: If nobody says what the module takes.
    """
    if images is None and data:
        images = images_of(next(iter(next(iter(data.values())))), "the data")[:2]
    if images is None:
        images = example_images(module)
    return find_symmetries(plain(module), images)


def example_images(module: nn.Module) -> Any:
    """Choose inputs that a module takes: its ``example_input_array``, or noise ``(2, channels, height, width)``."""
    example = getattr(module, "example_input_array", None)
    if example is not None:
        return example
    preprocessing = getattr(module, "preprocessing", None)
    if preprocessing is None:
        raise MergeError(
            f"Nothing says what inputs {type(module).__name__} takes; set its example_input_array, or give data."
        )
    kernel = next((p for p in module.parameters() if p.dim() == 4), None)
    channels = len(preprocessing.mean) if kernel is None else kernel.shape[1]
    return torch.randn(2, channels, *preprocessing.size, generator=torch.Generator().manual_seed(0))


def read_symmetries(path: str) -> Symmetries:
    """Read permutation groups from a JSON file.

    Raises:
        MergeError: If it cannot be read, or holds something else.
    """
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise MergeError(f"The permutation groups cannot be read from {path}: {reason}.") from error
    try:
        return Symmetries.from_json(text)
    except MergeError as error:
        raise MergeError(f"{path}: {error}") from error
