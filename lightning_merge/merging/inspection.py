"""Look at every byte of the inputs before a merge: what the files' hashes are, and what is not finite."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from lightning_merge.checkpoints import Weights
from lightning_merge.utilities.errors import raise_all
from lightning_merge.utilities.processes import Processes
from lightning_merge.utilities.tensors import is_finite
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


def check_finite(
    models: Mapping[str, Weights], names: Mapping[str, Sequence[str]], processes: Processes, workers: int
) -> None:
    """Raise one error that lists every parameter that holds NaN or infinity; reads every tensor once.

    Args:
        models: The models, by what to call them in the sentence: ``the base``, ``the expert photo``.
        names: The parameters to look at, by model.
        processes: Who shares the work.
        workers: Tensors that are read at the same time.

    Raises:
        MergeError: If there is any.
    """
    jobs = {
        f"{i}/{name}": (what, name) for i, what in enumerate(models) for name in names[what] if name in models[what]
    }
    problems: dict[str, str] = {}

    def look(job: str) -> None:
        what, name = jobs[job]
        tensor = models[what][name]
        if not is_finite(tensor):
            problems[job] = (
                f"{name!r} of {what} holds values that are not finite ({int((~torch.isfinite(tensor)).sum())} of "
                f"{tensor.numel()}); was its training diverging? Give another checkpoint, or merge all the same with "
                "allow_non_finite: true."
            )

    def entries(job: str) -> float:
        what, name = jobs[job]
        return float(models[what].meta[name].numel())

    shares = processes.share(list(jobs), entries)
    with processes.together():
        run_each(look, shares[processes.rank], workers, "checking", entries, "tensors")
    gathered = {job: problem for part in processes.gather(problems) for job, problem in part.items()}
    raise_all([gathered[job] for job in jobs if job in gathered])
