"""The parts of a report that a comparison of the experts fills."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from lightning_merge.analysis.comparison import Comparison, mean_of_pairs
from lightning_merge.analysis.records import MatrixComparison
from lightning_merge.report.page import Picture, Section
from lightning_merge.report.plots import (
    choose_matrices,
    plot_alignment,
    plot_layers,
    plot_score_maps,
    plot_spectra,
    plot_updates,
)
from lightning_merge.report.words import count, listed
from lightning_merge.utilities.grid import Cell, Grid


def experts_grid(comparison: Comparison) -> Grid:
    """Tabulate how far every expert went, and how near it is to the others: a row for each."""
    others = ~torch.eye(len(comparison.experts), dtype=torch.bool)
    columns = {
        "norm": comparison.norms(),
        "cosine": _mean_of_others(comparison.cosines(), others),
        "alignment": _mean_of_others(_alignment(comparison), others),
        "angle": _mean_of_others(comparison.mean_angles(), others),
        "effective rank": _effective_ranks(comparison),
    }
    return Grid(
        ["expert", *columns],
        [
            [Cell(name), *(_number(float(values[i])) for values in columns.values())]
            for i, name in enumerate(comparison.experts)
        ],
        "Norm: of the expert's difference to the base. Cosine, alignment and angle: means over the other experts. "
        "Alignment: how much of its task matrices lies in the leading left (output) subspace of another expert's. "
        "Angle: the mean principal angle between both subspaces, in radians. Alignment, angle and effective rank are "
        f"means over the matrices{_by_chance(comparison)}.",
    )


def merged_grid(comparison: Comparison) -> Grid:
    """Tabulate what merging made of the experts: a row for every merged model and expert."""
    rows = []
    for merged in comparison.merged:
        cosines, distances = comparison.merged_cosines(merged), comparison.distances(merged)
        alignment, norms = comparison.mean_merged_alignment(merged), comparison.norms()
        update = comparison.update_norm(merged)
        for i, expert in enumerate(comparison.experts):
            norm = float(norms[i])
            numbers = [
                update / norm if norm else math.nan,
                float(cosines[i]),
                float(distances[i]) / norm if norm else math.nan,
                float(alignment[i]),
            ]
            rows.append([Cell(merged), Cell(expert), *map(_number, numbers)])
    return Grid(
        ["merged model", "expert", "update", "cosine", "distance", "alignment"],
        rows,
        "Update: the norm of what merging did to the base; distance: that between merged model and expert; both "
        "divided by the norm of the expert's own difference to the base, so that the base lies at update 0 and "
        "distance 1. Cosine: between both differences. Alignment: the share of the expert's task matrices that lies in "
        "the leading subspace of the merged update, the mean over the matrices.",
    )


def matrices_grid(matrices: Sequence[MatrixComparison]) -> Grid:
    """Tabulate the matrices whose subspaces were compared: a row for each."""
    rows = []
    for matrix in matrices:
        numbers = [
            None if matrix.effective_ranks is None else float(matrix.effective_ranks.double().mean()),
            mean_of_pairs(matrix.alignment),
            matrix.chance,
            mean_of_pairs(matrix.angles),
            matrix.off_diagonal,
            matrix.kept,
        ]
        shape = f"{matrix.shape[0]} × {matrix.shape[1]}"
        rows.append([Cell(matrix.name), Cell(shape), *map(_number, numbers)])
    return Grid(
        ["matrix", "shape", "effective rank", "alignment", "by chance", "angle", "off diagonal", "kept"],
        rows,
        "Effective rank: the mean over the experts. Alignment and angle: means over pairs of experts; by chance: the "
        "alignment of experts whose entries are independent, which is high where a leading subspace has many of the "
        "matrix's dimensions. Off diagonal: the share of the experts' energy, in SCORE's common basis, that couples "
        "one's subspace to another's; kept: what SCORE does not drop of it.",
    )


def agreement(comparison: Comparison) -> Section:
    """Build the section on where the experts agree and where they conflict."""
    names = comparison.experts
    parts: list[str | Grid | Picture] = [experts_grid(comparison)]
    if len(names) > 1:
        parts += _pairs(comparison)
        maps = choose_matrices(comparison.matrices)
        if maps:
            parts.append(
                Picture(
                    plot_score_maps(maps),
                    f"What SCORE makes of the experts, in {count(len(maps), 'matrix', 'matrices')}",
                    (_FARTHEST if len(maps) == 3 else "") + _MAP,
                )
            )
    if comparison.matrices:
        parts.append(matrices_grid(comparison.matrices))
    parts += _left_out(comparison)
    return Section("Where the experts agree and fight", parts)


_FARTHEST = (
    "Those with much alignment and little off the diagonal, with much of both, and with little alignment and much off "
    "the diagonal. "
)
_MAP = (
    "The diagonal is what the experts have for themselves, a block each in their order; entries off it couple their "
    "subspaces. Black are those that SCORE has dropped of every expert as conflicts."
)


def _pairs(comparison: Comparison) -> Iterator[Picture]:
    names = comparison.experts
    if comparison.matrices:
        yield Picture(
            plot_alignment(_alignment(comparison), names),
            "Subspace alignment of two experts",
            f"How much of the row's expert lies in the leading left subspace of the column's (singular vectors: "
            f"{comparison.rank_rule}, hence not 1 on the diagonal), the mean over "
            f"{count(len(comparison.matrices), 'matrix', 'matrices')}{_by_chance(comparison)}. What goes beyond chance "
            "is shared: there experts add up or collide when they are merged.",
        )
        angles = comparison.mean_angles()
        highest = math.pi / 2
        yield Picture(
            plot_alignment(angles, names, "mean principal angle in radians", (0.0, highest), directed=False),
            "Angles between the subspaces of two experts",
            "Zero: the same subspace; π/2 = 1.57: orthogonal, as two of more than half the dimensions cannot be.",
        )
    yield Picture(
        plot_alignment(comparison.cosines(), names, "cosine", (-1.0, 1.0), directed=False),
        "Cosine between two experts' task vectors",
        "Over all parameters. Near zero, what was learned has nothing in common entry by entry.",
    )


def layers(comparison: Comparison, updates: Mapping[str, Mapping[str, Mapping[str, float]]] | None = None) -> Section:
    """Build the section on what the experts, and what merging, did to each group of layers.

    Args:
        comparison: The experts and the merged models, compared.
        updates: The relative length of each method's update, by held-out domain, method and group of layers.
    """
    parts: list[str | Grid | Picture] = []
    lengths = _mean_over_domains(updates or {})
    if lengths:
        parts.append(
            Picture(
                plot_updates(lengths),
                "How far each method moves each layer",
                "The norm of a method's update, divided by the mean norm of the task vectors that it was made of; the "
                "mean over the domains that were left out. 1 is as far as an expert went, and the average of experts "
                "that have nothing in common goes 1/√T as far.",
            )
        )
    parts.append(
        Picture(
            plot_layers(comparison),
            "Layer by layer",
            "How far the experts went in each layer, where they pull in different directions, and how much their "
            "differences to the base point the same way.",
        )
    )
    shown = choose_matrices(comparison.matrices) or list(comparison.matrices[:3])
    if shown:
        parts.append(
            Picture(
                plot_spectra(shown, comparison.experts),
                "Singular values, before and after merging" if comparison.merged else "Singular values of the experts",
                "Thin lines: the experts' task matrices. A steep line is a change of low rank."
                + (
                    " Thick lines: the merged updates; one that ends early is of a method that keeps fewer directions."
                    if comparison.merged
                    else ""
                ),
            )
        )
    if comparison.merged:
        parts.append(merged_grid(comparison))
    return Section("What happened to each layer", parts)


def experts_in_words(comparison: Comparison) -> Iterator[str]:
    """Yield what a reader should know of the experts, in sentences."""
    if (origins := comparison.origins().summary()) is not None:
        yield origins
    names = comparison.experts
    if len(names) < 2:
        return
    conflict, chance = comparison.sign_conflict(), comparison.chance_conflict()
    if math.isfinite(conflict):
        yield (
            f"In {100 * conflict:.0f} % of the entries that several experts have moved, two of them pull in opposite "
            f"directions; with {count(len(names), 'expert')} of random signs it would be {100 * chance:.0f} %."
        )
    alignment = _alignment(comparison)
    both = (alignment + alignment.T) / 2
    pairs = {(names[j], names[i]): float(both[i, j]) for i in range(len(names)) for j in range(i)}
    pairs = {pair: value for pair, value in pairs.items() if math.isfinite(value)}
    if not pairs:
        return
    most, least = max(pairs, key=pairs.__getitem__), min(pairs, key=pairs.__getitem__)
    by_chance = f"{comparison.chance_alignment():.2f} by chance"
    if pairs[most] - pairs[least] > _TELLING:
        yield (
            f"The subspaces of {listed(most)} have most in common (alignment {pairs[most]:.2f}, {by_chance}), those of "
            f"{listed(least)} least ({pairs[least]:.2f})."
        )
    else:
        yield f"The subspaces of two experts have an alignment of about {pairs[most]:.2f} ({by_chance})."


_TELLING = 0.02  # a smaller difference of alignments is none to speak of


def suspicions(comparison: Comparison) -> Iterator[str]:
    """Yield what looks wrong with the experts, as far as weights tell, in sentences."""
    if (strangers := comparison.origins().warning()) is not None:
        yield strangers
    norms, cosines, names = comparison.norms(), comparison.cosines(), comparison.experts
    still = [name for name, norm in zip(names, norms.tolist(), strict=True) if norm == 0]
    if still:
        yield f"The base itself is among the experts: {listed(still)}. Was the right checkpoint given?"
    for i in range(len(names)):
        for j in range(i):
            if cosines[i, j] > 1 - 1e-9 and torch.isclose(norms[i], norms[j], rtol=1e-6):
                yield f"{names[j]} and {names[i]} have the same weights."


def _mean_over_domains(updates: Mapping[str, Mapping[str, Mapping[str, float]]]) -> dict[str, dict[str, float]]:
    """Average every method and group of layers over the domains where they were measured."""
    measured: dict[str, dict[str, list[float]]] = {}
    for methods in updates.values():
        for method, ratios in methods.items():
            for group, value in ratios.items():
                measured.setdefault(method, {}).setdefault(group, []).append(value)
    return {m: {g: sum(values) / len(values) for g, values in groups.items()} for m, groups in measured.items()}


def _alignment(comparison: Comparison) -> Tensor:
    """Average the alignment of two experts ``(T, T)``; NaN for one that is the base itself and has no subspace."""
    return comparison.mean_alignment().masked_fill(comparison.norms() == 0, math.nan)


def _by_chance(comparison: Comparison) -> str:
    """Say what the alignment would be by chance."""
    chance = comparison.chance_alignment()
    return f"; by chance the alignment would be {chance:.2f}" if math.isfinite(chance) else ""


def _mean_of_others(values: Tensor, others: Tensor) -> Tensor:
    """Average each row without the diagonal and without NaN ``(T, T) -> (T,)``."""
    return torch.where(others, values.double(), math.nan).nanmean(dim=1)


def _effective_ranks(comparison: Comparison) -> Tensor:
    ranks = [m.effective_ranks.double() for m in comparison.matrices if m.effective_ranks is not None]
    nothing = torch.full((len(comparison.experts),), math.nan, dtype=torch.float64)
    return torch.stack([nothing, *ranks]).nanmean(dim=0)


def _left_out(comparison: Comparison) -> list[str]:
    if not comparison.left_out:
        return []
    parameters = comparison.by_name  # a parameter that is seen as several matrices counts as one
    compared = len({m.name if m.name in parameters else m.name.rpartition("[")[0] for m in comparison.matrices})
    total = compared + len(comparison.left_out)
    return [
        f"Subspaces were compared in {compared} of {total} matrices, evenly spread over the model, to save time; "
        "`lightning-merge analyze --every_matrix true` looks at all. Norms, cosines and signs are of all parameters."
    ]


def _number(value: float | None) -> Cell:
    if value is None or not math.isfinite(value):
        return Cell("")
    return Cell(f"{value:.1f}" if abs(value) >= 10 else f"{value:.3f}", value)
