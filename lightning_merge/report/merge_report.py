"""The report of one merge: what came out, where the experts agree, and what the method did to each layer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lightning_merge.analysis.comparison import Comparison
from lightning_merge.evaluation.table import Table
from lightning_merge.merging.merged import Merged
from lightning_merge.merging.recipe import SYMBOLS, method_class, models_grid, summary_of
from lightning_merge.merging.recipe import layers as layers_of
from lightning_merge.report.experts import agreement, experts_in_words, layers, suspicions
from lightning_merge.report.page import Listing, Page, Section, again
from lightning_merge.report.words import count, extremes, listed, percent
from lightning_merge.utilities.grid import Cell, Grid


def merge_page(
    merged: Merged,
    comparison: Comparison,
    table: Table | None = None,
    configuration: str = "",
    facts: Sequence[tuple[str, str]] = (),
) -> Page:
    """Build the page of a merge.

    Args:
        merged: The result of the merge.
        comparison: The experts and the merged model, which has the method's name there, see
            :func:`lightning_merge.analysis.compare_experts`.
        table: The scores of the merged model, if it was evaluated.
        configuration: The YAML that makes it again; none if empty.
        facts: Names and values that stand below the title.
    """
    method = merged.manifest["method"]["class_path"]
    sections = [Section("Scores", table.grids())] if table else []
    sections += [
        method_section(merged.manifest),
        layers(comparison),
        agreement(comparison),
        Section("What happened to the parameters", [parameters_grid(merged)]),
        Section("What went in", [models_grid(merged.manifest)]),
        *again(configuration),
    ]
    return Page(
        f"{method} of {count(len(merged.experts), 'expert')}",
        [*_answers(merged, comparison, table), *experts_in_words(comparison)],
        sections,
        list(_warnings(merged, comparison, table)),
        facts,
    )


def parameters_grid(merged: Merged) -> Grid:
    """Count the parameters, and their entries, that were merged, averaged, copied, tied and kept."""
    inventory = merged.inventory
    base = merged.base.meta
    kinds = {
        "merged by the method": [base[name] for name in inventory.merged],
        "averaged (running statistics)": [base[name] for name in inventory.averaged],
        "copied from the base": [base[name] for name in inventory.copied],
        "magnitudes of merged weights (weight_norm)": [base[name] for name in inventory.magnitudes],
        "tied to another one": [base[name] for name in inventory.tied.values()],
        "kept by the experts (heads)": [
            expert.meta[name] for expert in merged.experts.values() for name in inventory.private[expert.name]
        ],
    }
    rows = []
    for kind, tensors in kinds.items():
        if tensors:
            entries = sum(tensor.numel() for tensor in tensors)
            rows.append([Cell(kind), Cell(f"{len(tensors)}", len(tensors)), Cell(f"{entries:,}", entries)])
    return Grid(["what happened", "parameters", "entries"], rows)


def method_section(manifest: Mapping[str, Any]) -> Section:
    """Describe every method, the outer one first: its paper, what it does, its formula and its arguments."""
    parts: list[str | Listing] = []
    for method in layers_of(manifest["method"]):
        cls = method_class(method)
        name, paper = method["class_path"], cls and cls.paper
        parts.append(f"{name}{f' ({paper})' if paper else ''}: {summary_of(cls) if cls else 'a method of your own.'}")
        if cls is not None and cls.formula is not None:
            parts.append(Listing(cls.formula, "Formula"))
        arguments = {key: value for key, value in method["init_args"].items() if not isinstance(value, Mapping)}
        parts.append(f"Arguments: {', '.join(f'{key} = {value}' for key, value in arguments.items())}.")
    if any(isinstance(part, Listing) for part in parts):
        parts.append(SYMBOLS.replace("`", ""))
    return Section("Method", parts)


def _answers(merged: Merged, comparison: Comparison, table: Table | None) -> Iterator[str]:
    yield f"{merged.summary()}."
    if table is not None:
        means = {row: mean for row in table.row_names if (mean := table.mean(row)) is not None}
        said = [f"{row} {percent(mean)} %" for row, mean in means.items()]
        if said:
            yield f"{table.metric.capitalize()} on {listed(table.domains)}: {listed(said)}."
    for name in comparison.merged:
        ratio, distances = comparison.update_ratio(name), (comparison.distances(name) / comparison.norms()).tolist()
        if math.isfinite(ratio):
            yield f"The merged model lies {ratio:.2f} times as far from the base as the experts do on average."
        ends = extremes(distances, comparison.experts)
        if ends:
            yield f"In relation to how far each expert went, it is nearest to {ends[0]} and farthest from {ends[1]}."


def _warnings(merged: Merged, comparison: Comparison, table: Table | None) -> Iterator[str]:
    if table is None:
        yield "This model was not evaluated here: what follows is about weights, and says nothing of what it can do."
    yield from merged.notes
    yield from suspicions(comparison)
    if any(merged.inventory.private.values()):
        yield (
            "Experts keep parameters of their own (heads), which are not in the merged model; where the base has some "
            "of that name, it has the base's."
        )
    if not comparison.merged:
        yield "The merged weights hold values that are not finite; what follows is about the experts alone."
