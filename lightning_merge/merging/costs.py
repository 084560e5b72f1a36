"""Estimated costs of a merge: memory, and time as this machine needs it."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from lightning_merge.methods import MergeMethod
from lightning_merge.utilities.workers import one_thread

_SIDE = 192
"""Side of the small matrices that are timed."""
_PASSES = 12
"""Passes over the task vectors that a method makes which only adds, trims and masks."""


@dataclass(frozen=True)
class Machine:
    """Speed of one core (or one GPU), measured in a few hundredths of a second.

    Args:
        flops: Floating-point operations of a matrix product, in a second.
        eigh: Seconds that the eigenvalues and vectors of a symmetric matrix take, over its side to the power of three.
        bandwidth: Bytes of memory that are copied in a second.
        hashing: Bytes whose sha256 is computed in a second.
    """

    flops: float
    eigh: float
    bandwidth: float
    hashing: float


def measure_machine(device: torch.device | str | None = None) -> Machine:
    """Time one small product, one small ``eigh``, one copy and one hash, on one thread as a worker has it.

    Args:
        device: The device whose arithmetic is timed.
    """
    draw = torch.Generator().manual_seed(0)
    square = torch.randn(_SIDE, _SIDE, generator=draw, dtype=torch.float64).to(device)  # matrices are factorized in it
    symmetric = square @ square.mT
    block = torch.zeros(1 << 23, dtype=torch.float32, device=device)
    target, content = torch.empty_like(block), bytes(1 << 21)
    with one_thread():
        product = _fastest(lambda: square @ square, square.device)
        eigh = _fastest(lambda: torch.linalg.eigh(symmetric), square.device)
        copy = _fastest(lambda: target.copy_(block), square.device)
        hashing = _fastest(lambda: hashlib.sha256(content), square.device)
    return Machine(2 * _SIDE**3 / product, eigh / _SIDE**3, 4 * block.numel() / copy, len(content) / hashing)


def _fastest(call: Callable[[], object], device: torch.device) -> float:
    """Measure the seconds of the fastest of three calls, after one to warm up."""
    times = []
    for _ in range(4):
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return max(min(times[1:]), 1e-7)


def factorizes(method: MergeMethod) -> bool:
    """Tell whether a method, or one inside it, decomposes matrices."""
    return any(layer.factorizes for layer in method.nested())


def reads_twice(method: MergeMethod) -> bool:
    """Tell whether a method, or one inside it, looks at the whole model before it merges."""
    return any(layer.reads_twice for layer in method.nested())


def matrix_seconds(method: MergeMethod, m: int, n: int, num_experts: int, machine: Machine) -> float:
    """Estimate the seconds that a method takes for a matrix ``(m, n)`` of every expert.

    Counted are its factorizations and, of a method that iterates, its steps. A factorization is ``eigh`` of the Gram
    matrix of the short side, and three products: the Gram matrix itself, the other side's vectors, and what is put
    together again.
    """
    short = min(m, n)
    product = 2 * m * n * short / machine.flops
    seconds = 0.0
    for layer in method.nested():
        if layer.factorizes:
            for_each_expert, besides = layer.factorizations
            seconds += (for_each_expert * num_experts + besides) * (3 * product + machine.eigh * short**3)
        steps = getattr(layer, "iterations", 0)
        seconds += 2 * m * n * n / machine.flops * steps if isinstance(steps, int) else 0.0
    return seconds


def estimate_seconds(
    method: MergeMethod,
    matrices: Sequence[tuple[int, int, int]],
    values: int,
    num_experts: int,
    itemsize: int,
    moved: int,
    hashed: int,
    workers: int,
    machine: Machine,
) -> float:
    """Estimate how long a merge takes, without what a method does with a model and data.

    Args:
        method: The merging method.
        matrices: ``(count, m, n)``: so many merged matrices of one shape.
        values: Entries of all merged parameters of one model.
        num_experts: T.
        itemsize: Bytes of one number of the arithmetic.
        moved: Bytes that are read and written.
        hashed: Bytes whose sha256 is computed.
        workers: Parameters that are merged at the same time, each on a core of its own.
        machine: What the machine can do.

    Returns:
        Seconds.
    """
    passes = _PASSES * (3 if reads_twice(method) else 1)
    seconds = sum(count * matrix_seconds(method, m, n, num_experts, machine) for count, m, n in matrices)
    seconds += passes * values * (num_experts + 1) * itemsize / machine.bandwidth
    return (seconds + hashed / machine.hashing) / max(workers, 1) + moved / machine.bandwidth


def peak_memory(
    sizes: Sequence[int], matrices: Sequence[tuple[int, int, int]], num_experts: int, itemsize: int, workers: int
) -> int:
    """Estimate the bytes in flight at once: the largest parameters, one for each worker, of every model and two more.

    Args:
        sizes: The number of entries of every merged parameter.
        matrices: ``(count, m, n)`` of those that are factorized, which takes room for a Gram matrix, its vectors and
            the workspace of ``eigh``, and for the other side's vectors, all of them in float64.
        num_experts: T.
        itemsize: Bytes of one number of the task vectors.
        workers: Parameters that are merged at the same time.
    """
    largest = sorted(sizes, reverse=True)[: max(workers, 1)]
    workspaces = (2 * m * n + 3 * min(m, n) ** 2 for count, m, n in matrices for _ in range(count))
    largest_workspaces = sorted(workspaces, reverse=True)[: max(workers, 1)]
    return itemsize * sum(largest) * (num_experts + 2) + 8 * sum(largest_workspaces)
