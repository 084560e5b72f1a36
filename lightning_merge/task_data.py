"""The experts' module and unlabelled data of their tasks, for the methods that run the model while they merge."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lightning_merge.checkpoints import Weights
from lightning_merge.errors import MergeError, raise_all
from lightning_merge.running import device_of, evaluating, read_images, seeded

if TYPE_CHECKING:
    from lightning_merge.inventory import Inventory

Data = Mapping[str, Iterable[Any]]
"""By expert, batches that can be read again and again: images, or ``(images, labels)``, whose labels are not read."""


class TaskData:
    """Runs the experts' module with any weights on the data of any expert's task, and leaves it as it was.

    Everything is computed on the module's device, in float32 (float64 if the merged weights are).

    Args:
        module: Maps images to logits; its own weights are not used.
        data: The batches of every expert's task.
        kept: The parameters and buffers of the merged model that no method merges.
        experts: The experts by name. Their excluded parameters (heads) are used for their own tasks.
        inventory: What happens to every parameter.
        dtype: What the model is computed in.
        seed: Seed of data that are drawn from PyTorch's global generator (a shuffled ``DataLoader``).
    """

    def __init__(
        self,
        module: nn.Module,
        data: Data,
        kept: Mapping[str, Tensor],
        experts: Mapping[str, Weights],
        inventory: Inventory,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> None:
        self.module = plain(module)
        self.experts = list(experts)
        self._data = data
        self._dtype = dtype
        self._seed = seed
        self._tied = inventory.tied
        shared = {name: self._moved(tensor) for name, tensor in kept.items()}
        self._kept = {
            name: shared | {key: self._moved(expert[key]) for key in inventory.private[expert.name]}
            for name, expert in experts.items()
        }

    @property
    def device(self) -> torch.device:
        """The device of the module."""
        return device_of(self.module)

    def _moved(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, self._dtype if tensor.is_floating_point() else tensor.dtype)

    @contextmanager
    def running(self) -> Iterator[TaskData]:
        """Put the module into evaluation mode and seed the data; afterwards all is as before."""
        with seeded(self._seed, self.device), evaluating(self.module):
            yield self

    def batches(self, expert: str) -> Iterator[Tensor]:
        """Read an expert's images ``(N, …)`` once, batch by batch, on the module's device."""
        return map(self._moved, read_images(self._data[expert], f"expert {expert}"))

    def endless_batches(self, expert: str) -> Iterator[Tensor]:
        """Read an expert's images again and again."""
        while True:
            yield from self.batches(expert)

    def logits(self, expert: str, weights: Mapping[str, Tensor], images: Tensor) -> Tensor:
        """Run the model on images of an expert's task: ``(N, …) -> (N, classes)``.

        Args:
            expert: The expert whose own parameters (head) are used.
            weights: All merged parameters; gradients flow back to them.
            images: A batch of :meth:`batches`.
        """
        complete = self._kept[expert] | {name: self._moved(tensor) for name, tensor in weights.items()}
        complete |= {alias: complete[owner] for alias, owner in self._tied.items() if owner in complete}
        return functional_call(self.module, complete, (images,))


def plain(module: nn.Module) -> nn.Module:
    """The module inside what ``torch.compile`` returns, whose parameters have the names of the weights."""
    return getattr(module, "_orig_mod", module)


def check_task_data(
    method: str,
    module: nn.Module | None,
    data: Data | None,
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


def data_problems(data: Data, experts: Iterable[str], call: str) -> list[str]:
    """What is wrong with the data of some experts, which are given to a function, in sentences."""
    return [
        *(
            f"There are no data of expert {name}; give {call}(…, data={{{name!r}: loader}})."
            for name in experts
            if name not in data
        ),
        *(
            f"There are data for {name!r}, which is no expert; the experts are {', '.join(experts)}."
            for name in data
            if name not in experts
        ),
        *(
            f"The data of expert {name} can be read only once; give a DataLoader or a list of batches."
            for name, batches in data.items()
            if isinstance(batches, Iterator)
        ),
    ]


def _module_problems(
    module: nn.Module, base: Weights, experts: Mapping[str, Weights], inventory: Inventory
) -> list[str]:
    own = module.state_dict()
    shared = [*inventory.merged, *inventory.averaged]
    return [
        *(f"The module lacks {name!r} of the base; is it another model?" for name in shared if name not in own),
        *(
            f"{name!r} has shape {tuple(own[name].shape)} in the module and {tuple(base.meta[name].shape)} in the base."
            for name in shared
            if name in own and own[name].shape != base.meta[name].shape
        ),
        *(
            f"The module has {name!r}, which neither the base nor the expert {expert} has; is it another model?"
            for name in own
            for expert, weights in experts.items()
            if name not in base and name not in inventory.private[weights.name]
        ),
    ]
