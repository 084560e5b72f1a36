"""REPAIR: give an interpolated model activations whose statistics are interpolated, too.

Jordan, Sedghi, Saukh, Entezari and Neyshabur, "REPAIR: REnormalizing Permuted Activations for Interpolation Repair",
ICLR 2023, arXiv 2211.08403.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from lightning_merge.repair.calibration import Calibration, Goals, Known, NewMoments, correct_in_turn, observe_once
from lightning_merge.repair.corrections import Correction, correction_towards
from lightning_merge.repair.find_sites import find_sites
from lightning_merge.repair.moments import Moments
from lightning_merge.utilities.batches import read_images, rereading_problems
from lightning_merge.utilities.errors import MergeError, raise_all
from lightning_merge.utilities.modules import common_dtype, fit_problems, plain, stored_tensors
from lightning_merge.utilities.processes import Processes
from lightning_merge.utilities.sites import Site

Weights = Mapping[str, Tensor]


def repair(
    module: nn.Module,
    merged: Weights,
    experts: Mapping[str, Weights],
    data: Iterable[Any] | Mapping[str, Iterable[Any]],
    *,
    alpha: Sequence[float] | None = None,
    sites: Sequence[str | Site] | None = None,
    batches: int | None = None,
    passes: int = 1,
    max_gain: float = 10.0,
    eps: float = 1e-5,
    statistics: NewMoments = Moments,
    distributed: bool = False,
    seed: int = 0,
    known: Known | None = None,
) -> Correction:
    """Correct the merged model, in one way for all tasks.

    The goals are ``μ* = Σ αᵢ μᵢ`` and ``σ* = Σ αᵢ σᵢ`` over the experts (standard deviations, not variances), all
    measured on the same data (eq. 4 and 5 of the paper). As in its code, all sites are then normalised in one pass of
    the merged model, and the correction is ``a = σ* / √(v + ε)``, ``b = μ* − a·m``. With more than two experts this
    is the multi-task REPAIR that TACT was compared with.

    Args:
        module: Maps images to logits; its own weights are not used, and it is as before afterwards.
        merged: The weights of the merged model. What they lack (a head) is the first expert's.
        experts: The weights of what was merged, permuted as they were for the merge.
        data: Batches of images or ``(images, labels)`` that can be read again; by task, they are pooled, so that every
            batch has images of all tasks. Under several processes, this one's part of every batch.
        alpha: The weights of the experts; by default all alike.
        sites: Which activations; by default those of :func:`lightning_merge.repair.find_sites`.
        batches: The most (pooled) batches in one pass; by default all.
        passes: How often the data are read.
        max_gain: The most that a channel is scaled by. The official code has no limit.
        eps: Added to variances. A channel of less than ``eps`` times the variance that it should have is only
            shifted.
        statistics: Makes what accumulates batches.
        distributed: Whether the processes of the default process group share the data.
        seed: Seed of data that are drawn from PyTorch's global generator.
        known: Statistics of the same experts on the same data, where several merged models are corrected: what is
            found is added, and what is there is not computed again.

    Raises:
        MergeError: If the data are too few, if the weights are not those of this many experts, or if an activation is
            not finite.
    """
    pool = Pool(data) if isinstance(data, Mapping) else data
    processes = Processes(distributed)
    calibration = Calibration("all tasks", pool, batches, passes, seed, processes)
    weights = list(alpha) if alpha is not None else [1 / max(len(experts), 1)] * len(experts)
    tensors = stored_tensors(plain(module))
    problems = [
        problem
        for name, expert in experts.items()
        for problem in fit_problems(tensors, expert, f"expert {name}", "cover")
    ]
    with processes.together():
        raise_all([*_problems(experts, data, weights), *calibration.problems(), *problems])
        Goals({}, {}, max_gain, eps)  # whether these can be, before work starts
        chosen = find_sites(module, calibration.first_images(), sites)
    mean = dict.fromkeys(chosen, torch.tensor(0.0))
    std = dict(mean)
    for (name, expert), weight in zip(experts.items(), weights, strict=True):
        observed = observe_once(known, ("all data", name), module, expert, chosen, calibration, statistics)
        for site, moments in observed.items():
            mean[site] = mean[site] + weight * moments.mean
            std[site] = std[site] + weight * moments.std
    complete = {**next(iter(experts.values())), **merged}
    goals = Goals(mean, std, max_gain, eps)
    now = correct_in_turn(module, complete, chosen, goals.affine, calibration, statistics)
    return correction_towards(goals, now, common_dtype(complete))


@dataclass(frozen=True)
class Pool:
    """The data of several tasks as one: every batch holds a batch of each task that has one left.

    Args:
        data: By task, batches of images or ``(images, labels)``.
    """

    data: Mapping[str, Iterable[Any]]

    def __iter__(self) -> Iterator[Tensor]:
        for images in zip_longest(*(read_images(batches, f"task {task}") for task, batches in self.data.items())):
            present = [batch for batch in images if batch is not None]
            if len({batch.shape[1:] for batch in present}) > 1:
                shapes = ", ".join(str(tuple(batch.shape[1:])) for batch in present)
                raise MergeError(f"The images of the tasks have different shapes, {shapes}; resize them to one.")
            yield torch.cat(present)


def _problems(experts: Mapping[str, Weights], data: Any, alpha: Sequence[float]) -> list[str]:
    problems = [] if experts else ["experts: give the weights of at least one expert."]
    if len(alpha) != len(experts):
        problems.append(f"alpha has {len(alpha)} weights for {len(experts)} experts; give one for each.")
    if any(not weight >= 0 for weight in alpha) or (alpha and abs(sum(alpha) - 1) > 1e-6):
        problems.append(f"alpha must be at least 0 and add up to 1, got {list(alpha)}.")
    if isinstance(data, Mapping):
        for task, batches in data.items():
            problems += rereading_problems(batches, f"task {task}")
        problems += [] if data else ["data: give the data of at least one task."]
    return problems
