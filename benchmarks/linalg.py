"""How exact and how fast is ``lightning_merge.utilities.linalg``, beside ``torch.linalg.svd`` in float32?

    python -m benchmarks.linalg

Errors are Frobenius norms as a share of the reference's, which is the float64 SVD of the same matrix without what lies
below 1e-6 of the largest singular value (float64: numpy's matrix_rank). For ``svd`` it is that of the leading quarter
of the rank, put together again. "values" is the largest error of a singular value, as a share of the largest. A time is
that of one matrix on one thread: CPU seconds, or on CUDA those of the clock. The float32 SVD is told the rank of the
reference.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import machine, say, table
from lightning_merge.utilities import linalg

DTYPES = {"float32": torch.float32, "float64": torch.float64}
Solve = Callable[[Tensor], tuple[Tensor, ...]]


def draw(kind: str, m: int, n: int) -> Tensor:
    """A float64 matrix ``(m, n)`` of a kind, the same for the same arguments."""
    generator = torch.Generator().manual_seed(0)

    def gaussian(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    r = min(m, n)
    if kind == "random":
        return gaussian(m, n)
    if kind == "LoRA":  # the product of two float32 factors of rank 16
        return (gaussian(m, 16).float() @ gaussian(16, n).float()).double()
    U, Vt = torch.linalg.qr(gaussian(m, r)).Q, torch.linalg.qr(gaussian(n, r)).Q.T
    return (U * SPECTRA[kind](torch.arange(1, r + 1, dtype=torch.float64))) @ Vt


SPECTRA: dict[str, Callable[[Tensor], Tensor]] = {
    "1/sqrt(k)": lambda k: k**-0.5,
    "1/k": lambda k: 1 / k,
    "1/k^2": lambda k: k**-2,
    "0.98^k": lambda k: 0.98**k,
    "rank r/4": lambda k: (k <= len(k) // 4).double(),
}
KINDS = ("random", "LoRA", *SPECTRA)


def reference(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The float64 SVD, without what is below the rounding of the matrix's own precision."""
    U, s, Vt = torch.linalg.svd(matrix.double(), full_matrices=False)
    floor = 1e-6 if matrix.dtype == torch.float32 else max(matrix.shape) * torch.finfo(matrix.dtype).eps
    there = s > floor * s[0]
    return U * there, s * there, Vt * there.unsqueeze(-1)


def share(found: Tensor, exact: Tensor) -> float:
    """The error as a share of the norm of what is exact."""
    return ((found.double() - exact).norm() / exact.norm()).item()


def errors(matrix: Tensor, lapack: bool) -> dict[str, float]:
    """The errors of ``linalg``, or those of the SVD of LAPACK (cuSOLVER) in the matrix's own precision."""
    U, s, Vt = reference(matrix)
    q = max(len(s) // 4, 1)
    exact = (U[:, :q] * s[:q]) @ Vt[:q]
    if lapack:
        u, values, vt = torch.linalg.svd(matrix, full_matrices=False)
        there = s > 0  # it is told the rank of the reference
        triplets, values = (u[:, :q], values[:q], vt[:q]), values * there
        polar = (u * there) @ vt
        flat = values.mean() * polar
    else:
        triplets, polar, flat = linalg.svd(matrix, q), linalg.polar(matrix), linalg.isotropize(matrix)
        values = linalg.svd(matrix)[1]
    return {
        "svd error": share((triplets[0] * triplets[1]) @ triplets[2], exact),
        "polar error": share(polar, U @ Vt),
        "isotropize error": share(flat, s.mean() * (U @ Vt)),
        "values error": ((values.double() - s).abs().max() / s[0]).item(),
    }


def seconds(solve: Callable[[], Any], device: str, repeat: int) -> float:
    """The median time, of the CPU, or of the clock on the wall for CUDA."""
    cuda, times = device != "cpu", []
    for _ in range(repeat):
        if cuda:
            torch.cuda.synchronize()
        start = time.perf_counter() if cuda else time.process_time()
        solve()
        if cuda:
            torch.cuda.synchronize()
        times.append((time.perf_counter() if cuda else time.process_time()) - start)
    return median(times)


def rows(kind: str, m: int, n: int, dtype: str, device: str, repeat: int) -> list[dict[str, Any]]:
    """The lines of one matrix: ours, and for float32 the SVD of LAPACK (cuSOLVER)."""
    matrix = draw(kind, m, n).to(device, DTYPES[dtype])
    q = max(min(m, n) // 4, 1)
    what = {"matrix": kind, "shape": f"{m}×{n}", "input": dtype}
    single = matrix.float()
    base = seconds(lambda: torch.linalg.svd(single, full_matrices=False), device, repeat)
    ours = {**what, "by": "ours", **errors(matrix, lapack=False)}
    ways = {
        "svd": lambda: linalg.svd(matrix, q),
        "polar": lambda: linalg.polar(matrix),
        "isotropize": lambda: linalg.isotropize(matrix),
    }
    with linalg.paths_taken() as paths:
        for name, solve in ways.items():
            took = seconds(solve, device, repeat)
            ours |= {f"{name} s": took, f"{name}, float32 SVD = 1": took / base}
    ours["path"] = ", ".join(paths)
    if dtype != "float32":
        return [ours]
    return [ours, {**what, "by": "float32 SVD", **errors(matrix, lapack=True), "svd s": base}]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["768x768", "3072x768", "768x3072", "384x384"])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--dtypes", nargs="+", choices=tuple(DTYPES), default=tuple(DTYPES))
    parser.add_argument("--repeat", type=int, default=3, help="The median time is shown.")
    parser.add_argument("--device", default="cpu", help="Or cuda.")
    given = parser.parse_args(arguments)
    if given.device != "cpu" and not torch.cuda.is_available():
        say("There is no CUDA device at hand; nothing was measured.")
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = [
            row
            for size in given.shapes
            for kind in given.kinds
            for dtype in given.dtypes
            for row in rows(kind, *map(int, size.split("x")), dtype, given.device, given.repeat)
        ]
    finally:
        torch.set_num_threads(threads)
    say(f"\n{machine(f'device {given.device}', f'median of {given.repeat}')}\n\n{table(found)}")


if __name__ == "__main__":
    main()
