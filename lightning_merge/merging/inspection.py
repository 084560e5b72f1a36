"""Look at every byte of the inputs before a merge: what the files' hashes are, and what is not finite."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from lightning_merge.checkpoints import Weights
from lightning_merge.merging.inventory import Inventory
from lightning_merge.utilities.errors import raise_all
from lightning_merge.utilities.processes import Processes
from lightning_merge.utilities.tensors import LARGE, largest_magnitude, without_masks
from lightning_merge.utilities.workers import run_each


def fingerprint_all(models: Sequence[Weights], processes: Processes, workers: int) -> None:
    """Hash the files of every model; each process hashes some of them and is told the others' hashes."""
    files = {str(file.path.absolute()): file for model in models for file in model.inputs}

    def size(path: str) -> float:
        return float(files[path].size)

    def compute_hash(path: str) -> None:
        files[path].fingerprint()

    shares = processes.share(list(files), size)
    with processes.together():
        share = shares[processes.rank]
        run_each(compute_hash, share, workers, "hashing", size, "files")
        computed = {path: files[path].fingerprint() for path in share}
    for digests in processes.gather(computed):
        for path, digest in digests.items():
            files[path].note_fingerprint(digest)


@dataclass(frozen=True)
class Values:
    """Values of the inputs, as far as a merge must know them before it computes.

    Args:
        infinite: The parameters that are infinite in places, in all models alike (attention masks); None if nobody has
            looked.
        large: Whether there are finite numbers whose squares float32 may not hold, where the models differ.
    """

    infinite: frozenset[str] | None = None
    large: bool = False


def inspect_values(
    base: Weights,
    experts: Mapping[str, Weights],
    statistics: Sequence[Weights],
    kinds: Sequence[str],
    inventory: Inventory,
    processes: Processes,
    workers: int,
) -> Values:
    """Look at every value that goes into a merge; each process reads a part of the tensors once.

    Args:
        base: The base.
        experts: The experts by name.
        statistics: The statistics of each expert's data.
        kinds: The kinds of statistics that are used.
        inventory: What happens to every parameter.
        processes: Who shares the work.
        workers: Tensors that are read at the same time.

    Raises:
        MergeError: If there is NaN, or infinity that not all models have in the same place; every parameter is listed.
    """
    models = {f"the expert {name}": expert for name, expert in experts.items()}
    weights = {"the base": base, **models}
    sources = {**weights, **{source.name: source for source in statistics}}
    shared = [*inventory.merged, *inventory.averaged]
    names = {
        "the base": [*shared, *inventory.copied],
        **dict.fromkeys(models, shared),
        **{source.name: [f"{kind}.{name}" for kind in kinds for name in inventory.merged] for source in statistics},
    }
    jobs = {
        f"{i}/{name}": (what, name) for i, what in enumerate(names) for name in names[what] if name in sources[what]
    }
    copied = set(inventory.copied)
    problems: dict[str, str] = {}
    infinite: set[str] = set()
    large: set[str] = set()

    def look(job: str) -> None:
        what, name = jobs[job]
        tensor = sources[what][name]
        if not tensor.is_floating_point() or (largest := largest_magnitude(tensor)) <= LARGE:
            return
        others = [] if name in copied else experts.values() if what == "the base" else [base] if what in models else []
        differences = [_difference(tensor, other[name]) for other in others]
        if not math.isfinite(largest):
            odd = ~tensor.isfinite() if what not in weights else tensor.isnan()
            for differing in differences:
                odd |= ~differing.isfinite() & ~tensor.isfinite()
            if odd.any():
                problems[job] = _sentence(name, what, tensor, odd, what in weights)
                return
            infinite.add(name)
        # Statistics are added up, but not squared.
        sizes = map(largest_magnitude, differences) if what in weights else [largest / LARGE]
        if any(size > LARGE for size in sizes):
            large.add(name)

    def entries(job: str) -> float:
        what, name = jobs[job]
        return float(sources[what].meta[name].numel())

    shares = processes.share(list(jobs), entries)
    with processes.together():
        run_each(look, shares[processes.rank], workers, "checking", entries, "tensors")
    found = processes.gather((problems, infinite, large))
    gathered = {job: problem for part, _, _ in found for job, problem in part.items()}
    raise_all([gathered[job] for job in jobs if job in gathered])
    return Values(
        frozenset().union(*(part for _, part, _ in found)),
        any(bool(part) for _, _, part in found),
    )


def _difference(a: Tensor, b: Tensor) -> Tensor:
    """Compute ``a - b`` in float64, ``(…), (…) -> (…)``; 0 where both are infinite and equal."""
    a, b = without_masks(a.double(), b.to(a.device).double())
    return a - b


def _sentence(name: str, what: str, tensor: Tensor, odd: Tensor, is_weight: bool) -> str:
    """Say which values of a tensor ``(…)`` cannot be merged, those that ``odd (…)`` marks, and what to do."""
    nan, count = int(tensor.isnan().sum()), int(odd.sum())
    kinds = [f"{nan} NaN"] if nan else []
    kinds += [f"{count - nan} infinite"] if count > nan else []
    remedies = ["Give another checkpoint"]
    if is_weight and count > nan:
        remedies.append("make it the same in all models if it is a mask")
    if is_weight and not (nan and what == "the base"):
        remedies.append(f"keep the base's with exclude: [{name}]")
    return (
        f"{name!r} of {what} holds values that are not finite ({count} of {tensor.numel()}: {' and '.join(kinds)}); "
        f"was its training diverging? {', '.join(remedies)}, or merge all the same with allow_non_finite: true."
    )
