"""TACT: give the merged model the activation statistics of each task's expert, on that task's data.

Sharma, Roy and Dziugaite, "Non-Local Model Merging Problem: Permutation Symmetries and Variance Collapse", 2024,
arXiv 2410.12766.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from lightning_merge.repair.calibration import (
    Calibration,
    Goals,
    Known,
    NewMoments,
    correct_in_turn,
    known_problems,
    observe_once,
)
from lightning_merge.repair.corrections import Correction, correction_towards
from lightning_merge.repair.find_sites import find_sites
from lightning_merge.repair.moments import Moments
from lightning_merge.utilities.batches import data_problems
from lightning_merge.utilities.errors import raise_all
from lightning_merge.utilities.modules import common_dtype, fit_problems, plain, stored_tensors
from lightning_merge.utilities.processes import Processes
from lightning_merge.utilities.sites import Site

Weights = Mapping[str, Tensor]

OWN_DATA = "own data"
"""The name of the data of an expert's own task among known statistics."""


def tact(
    module: nn.Module,
    merged: Weights | Callable[[str], Weights],
    experts: Mapping[str, Weights],
    data: Mapping[str, Iterable[Any]],
    *,
    sites: Sequence[str | Site] | None = None,
    batches: int | None = None,
    passes: int = 1,
    max_gain: float = 10.0,
    eps: float = 1e-5,
    statistics: NewMoments = Moments,
    distributed: bool = False,
    seed: int = 0,
    known: Known | None = None,
) -> dict[str, Correction]:
    """Correct the merged model for every task.

    For a task t, μ* and σ* are the mean and standard deviation of every channel at every site, of the expert of t on
    data of t. In one pass of the merged model over the same data, each site is normalised by the statistics of the
    batch and takes those of the expert, so that sites behind it see what they will see in the end; m and v are its
    statistics over the whole pass. The correction is ``a = σ* / √(v + ε)``, ``b = μ* − a·m``. No labels are read.

    Args:
        module: Maps images to logits; its own weights are not used, and it is as before afterwards.
        merged: The weights of the merged model, or a function that gives them for a task (``Merged.for_task``). What
            they lack (a head) is the expert's.
        experts: The weights of every task's expert. An expert of another foundation must have been permuted as it was
            for the merge: channel c of the expert must be channel c of the merged model.
        data: For every expert, batches of images or ``(images, labels)`` that can be read again; under several
            processes, this one's part of every batch. A last batch that is less than half as large as the one before
            it joins that one.
        sites: Which activations; by default those of :func:`find_sites`.
        batches: The most batches of each task in one pass; by default all.
        passes: How often the data are read, which differs where they are augmented.
        max_gain: The most that a channel is scaled by. The official code has no limit.
        eps: Added to variances. A channel of less than ``eps`` times the variance that it should have is only
            shifted.
        statistics: Makes what accumulates batches. ``partial(Moments, momentum=0.99)`` and ``max_gain=math.inf``
            are the official code.
        distributed: Whether the processes of the default process group share the data.
        seed: Seed of data that are drawn from PyTorch's global generator.
        known: Statistics of the same experts on their own data, by ``(OWN_DATA, task)`` and site: recorded earlier, or
            found while another merged model was corrected. What is found is added, and what is
            there is not computed again.

    Returns:
        For every expert a correction, in float32 (float64 if the weights are).

    Raises:
        MergeError: If there are no data for an expert, if they are too few, or if an activation is not finite.
    """
    processes = Processes(distributed)
    calibrations = {
        task: Calibration(f"expert {task}", data.get(task, ()), batches, passes, seed, processes) for task in experts
    }
    problems = [problem for calibration in calibrations.values() for problem in calibration.problems()]
    tensors = stored_tensors(plain(module))
    for task, expert in experts.items():
        problems += fit_problems(tensors, expert, f"expert {task}", "cover")
    problems += [] if experts else ["experts: give the weights of at least one expert."]
    with processes.together():
        raise_all(list(dict.fromkeys([*data_problems(data, experts, "tact"), *problems])))
        Goals({}, {}, max_gain, eps)  # whether these can be, before work starts
        chosen = find_sites(module, next(iter(calibrations.values())).first_images(), sites)
        raise_all(
            [
                line
                for task, expert in experts.items()
                if known is not None and (OWN_DATA, task) in known
                for line in known_problems(known[OWN_DATA, task], module, expert, chosen, calibrations[task])
            ]
        )
    corrections = {}
    for task, expert in experts.items():
        complete = {**expert, **(merged(task) if callable(merged) else merged)}
        goal = observe_once(known, (OWN_DATA, task), module, expert, chosen, calibrations[task], statistics)
        mean = {site: moments.mean for site, moments in goal.items()}
        std = {site: moments.std for site, moments in goal.items()}
        goals = Goals(mean, std, max_gain, eps)
        now = correct_in_turn(module, complete, chosen, goals.affine, calibrations[task], statistics)
        corrections[task] = correction_towards(goals, now, common_dtype(complete))
    return corrections
