"""The published formulas, as plainly as they can be written: whole models in memory, ``torch.linalg.svd`` throughout.

What the merging methods are measured against. Sources: the papers' official codes; where those leave a choice (the sign
of singular vectors in SCORE, directions that nobody fills), the choice is lightning_merge's, so that results compare.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


def svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The thin SVD."""
    return torch.linalg.svd(matrix, full_matrices=False)


def leading(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The leading triplets of the whole SVD."""
    U, s, Vt = svd(matrix)
    return U[:, :rank], s[:rank], Vt[:rank]


def polar(matrix: Tensor) -> Tensor:
    """The polar factor, by an SVD."""
    U, _, Vt = svd(matrix)
    return U @ Vt


def iso_c(deltas: Tensor) -> Tensor:
    """Iso-C: ``(T, m, n) -> (m, n)``."""
    U, s, Vt = svd(deltas.sum(dim=0))
    return s.mean() * (U @ Vt)


def iso_cts(deltas: Tensor, common_fraction: float = 0.8) -> Tensor:
    """Iso-CTS: ``(T, m, n) -> (m, n)``."""
    T, r = len(deltas), min(deltas.shape[1:])
    q = round((r - int(r * common_fraction)) / T)
    common = r - q * T
    if q == 0:
        return iso_c(deltas)
    U, s, Vt = leading(deltas.sum(dim=0), common)
    own = [leading(delta - U @ (U.T @ delta), q) for delta in deltas]
    left = polar(torch.cat([*(u for u, _, _ in own), U], dim=1))
    right = polar(torch.cat([*(vt for _, _, vt in own), Vt], dim=0))
    return torch.cat([*(values for _, values, _ in own), s]).mean() * (left @ right)


def singular_basis(deltas: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The orthogonalised leading singular vectors of all experts: ``(m, qT), (qT,), (qT, n)``, ``q = r // T``."""
    triplets = [leading(delta, min(delta.shape) // len(deltas)) for delta in deltas]
    signs = [U.gather(0, U.abs().argmax(dim=0, keepdim=True)).sign() for U, _, _ in triplets]  # (1, q)
    U = torch.cat([U * sign for (U, _, _), sign in zip(triplets, signs, strict=True)], dim=1)
    Vt = torch.cat([Vt * sign.T for (_, _, Vt), sign in zip(triplets, signs, strict=True)], dim=0)
    return polar(U), torch.cat([s for _, s, _ in triplets]), polar(Vt)


def tsv_m(deltas: Tensor) -> Tensor:
    """TSV-M: ``(T, m, n) -> (m, n)``."""
    U, s, Vt = singular_basis(deltas)
    return (U * s) @ Vt


def score(deltas: Tensor) -> Tensor:
    """SCORE: ``(T, m, n) -> (m, n)``."""
    U, _, Vt = singular_basis(deltas)
    total = 0
    for delta in deltas:
        projection = U.T @ delta @ Vt.T  # (r, r)
        diagonal = torch.diag(projection.diagonal())
        rest = projection - diagonal
        kept = (rest - rest.mean()).abs() <= 1.96 * rest.std() / len(deltas)
        total = total + diagonal + rest * kept
    return U @ total @ Vt


def ties(vectors: Tensor, density: float = 0.2) -> Tensor:
    """TIES on whole models: ``(T, d) -> (d,)``."""
    d = vectors.shape[1]
    thresholds = vectors.abs().kthvalue(max(d - int(d * density), 1), dim=1, keepdim=True).values
    trimmed = vectors * (vectors.abs() >= thresholds)
    sign = trimmed.sum(dim=0).sign()
    sign = torch.where(sign == 0, sign.sum().sign(), sign)
    agreeing = torch.where(torch.where(sign > 0, trimmed > 0, trimmed < 0), trimmed, 0)
    return agreeing.sum(dim=0) / (agreeing != 0).sum(dim=0).clamp(min=1)


MATRICES: dict[str, Callable[[Tensor], Tensor]] = {"IsoC": iso_c, "IsoCTS": iso_cts, "TSVM": tsv_m, "SCORE": score}
"""Rules for matrices; everything else is averaged."""
ELEMENTWISE: dict[str, Callable[[Tensor], Tensor]] = {
    "TaskArithmetic": lambda deltas: 0.3 * deltas.sum(dim=0),
    "WeightAverage": lambda deltas: deltas.mean(dim=0),
}
"""Rules for every parameter."""
DECOMPOSED = {"IsoC": lambda T: 1, "IsoCTS": lambda T: T + 3, "TSVM": lambda T: T + 2, "SCORE": lambda T: T + 2}
"""How many matrices of its size a rule decomposes for each parameter."""


def merge(
    method: str,
    base: str,
    experts: Sequence[str],
    output: str,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> None:
    """Merge safetensors files into another, written in the precision of the base, or in float64 if ``dtype`` is."""
    origin = load_file(base, device)
    models = [load_file(expert, device) for expert in experts]
    names = [name for name in sorted(origin) if origin[name].is_floating_point()]

    def task_vectors(name: str) -> Tensor:  # (T, …)
        return torch.stack([model[name].to(dtype) - origin[name].to(dtype) for model in models])

    if method == "TIES":
        flat = torch.stack([_flat(model, names, dtype) - _flat(origin, names, dtype) for model in models])  # (T, d)
        parts = ties(flat).split([origin[name].numel() for name in names])
        updates = {name: part.view_as(origin[name]) for name, part in zip(names, parts, strict=True)}
    else:
        updates = {name: _rule(method, name, task_vectors(name)) for name in names}
    kept = torch.float64 if dtype == torch.float64 else None
    merged = {name: (origin[name].to(dtype) + updates[name]).to(kept or origin[name].dtype) for name in names}
    save_file({**origin, **merged}, output)


def _flat(model: dict[str, Tensor], names: Sequence[str], dtype: torch.dtype) -> Tensor:
    return torch.cat([model[name].to(dtype).flatten() for name in names])


def is_matrix(name: str, parameter: Tensor) -> bool:
    """The rule of all published codes."""
    return parameter.ndim == 2 and "text_projection" not in name


def _rule(method: str, name: str, deltas: Tensor) -> Tensor:
    if method in ELEMENTWISE:
        return ELEMENTWISE[method](deltas)
    if not is_matrix(name, deltas[0]):
        return deltas.mean(dim=0)
    if method in ("TSVM", "SCORE") and len(deltas) > min(deltas.shape[1:]):
        return deltas.mean(dim=0)  # no direction for each expert
    return MATRICES[method](deltas)


def least(method: str, base: str, experts: Sequence[str], output: str, device: str = "cpu") -> None:
    """No merge, but what none can do without: one read, a float64 Gram product per decomposed matrix, one write."""
    origin = load_file(base, device)
    models = [load_file(expert, device) for expert in experts]
    for name, parameter in origin.items():
        total = sum(model[name] for model in models)
        if method in MATRICES and is_matrix(name, parameter):
            matrix = total.double() if parameter.shape[0] >= parameter.shape[1] else total.double().T
            for _ in range(DECOMPOSED[method](len(experts))):
                matrix.T @ matrix
        origin[name] = total.to(parameter.dtype)
    save_file(origin, output)
