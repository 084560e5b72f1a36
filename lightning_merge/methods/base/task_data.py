"""The experts' module and unlabelled data of their tasks, for the methods that run the model while they merge."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lightning_merge.checkpoints import Weights
from lightning_merge.utilities.batches import TaskBatches, read_images
from lightning_merge.utilities.modules import device_of, evaluating, plain, seeded


class TaskData:
    """The experts' module and the data of their tasks; the module runs with any weights, and is as before afterwards.

    Everything is computed on the module's device, in float32 (float64 if the merged weights are).

    Args:
        module: Maps images to logits; its own weights are not used.
        data: The batches of every expert's task.
        kept: The parameters and buffers of the merged model that no method merges.
        experts: The experts by name. Their excluded parameters (heads) are used for their own tasks.
        tied: Names that share a tensor with another name: ``{alias: name}``.
        private: The excluded parameters of each expert, by the expert's name in messages.
        dtype: What the model is computed in.
        seed: Seed of data that are drawn from PyTorch's global generator (a shuffled ``DataLoader``).
    """

    def __init__(
        self,
        module: nn.Module,
        data: TaskBatches,
        kept: Mapping[str, Tensor],
        experts: Mapping[str, Weights],
        tied: Mapping[str, str],
        private: Mapping[str, Sequence[str]],
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> None:
        self.module = plain(module)
        self.experts = list(experts)
        self._data = data
        self._dtype = dtype
        self._seed = seed
        self._tied = tied
        shared = {name: self._moved(tensor) for name, tensor in kept.items()}
        self._kept = {
            name: shared | {key: self._moved(expert[key]) for key in private[expert.name]}
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
        """Put the module into evaluation mode and seed the data within the block; afterwards all is as before."""
        with seeded(self._seed, self.device), evaluating(self.module):
            yield self

    def batches(self, expert: str) -> Iterator[Tensor]:
        """Read an expert's images ``(N, …)`` once, batch by batch, on the module's device."""
        return map(self._moved, read_images(self._data[expert], f"expert {expert}"))

    def endless_batches(self, expert: str) -> Iterator[Tensor]:
        """Read an expert's images ``(N, …)`` again and again."""
        while True:
            yield from self.batches(expert)

    def logits(self, expert: str, weights: Mapping[str, Tensor], images: Tensor) -> Tensor:
        """Compute the logits for images of an expert's task: ``(N, …) -> (N, classes)``.

        Args:
            expert: The expert whose own parameters (head) are used.
            weights: All merged parameters; gradients flow back to them.
            images: A batch of :meth:`batches`.
        """
        complete = self._kept[expert] | {name: self._moved(tensor) for name, tensor in weights.items()}
        complete |= {alias: complete[owner] for alias, owner in self._tied.items() if owner in complete}
        return functional_call(self.module, complete, (images,))
