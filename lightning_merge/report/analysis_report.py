"""The report of an analysis: what the experts' weights say without any data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lightning_merge.analysis.comparison import Comparison
from lightning_merge.report.experts import agreement, experts_in_words, layers, suspicions
from lightning_merge.report.page import Page, again
from lightning_merge.report.words import count, extremes


def analysis_page(comparison: Comparison, configuration: str = "", facts: Sequence[tuple[str, str]] = ()) -> Page:
    """Build the page about experts and about the models merged of them.

    Args:
        comparison: The experts and the merged models, compared.
        configuration: The YAML that makes it again; none if empty.
        facts: Names and values that stand below the title.
    """
    beside = f" and {count(len(comparison.merged), 'merged model')}" if comparison.merged else ""
    return Page(
        f"{count(len(comparison.experts), 'expert')}{beside}",
        [*_lengths(comparison), *experts_in_words(comparison)],
        [agreement(comparison), layers(comparison), *again(configuration)],
        ["Weights alone say nothing of how good a model is; benchmark or evaluate them.", *suspicions(comparison)],
        facts,
    )


def _lengths(comparison: Comparison) -> Iterator[str]:
    norms = comparison.norms().tolist()
    ends = extremes(norms, comparison.experts)
    if ends:
        yield f"{ends[1]} went farthest from the base (norm {max(norms):.3g}), {ends[0]} least far ({min(norms):.3g})."
    for name in comparison.merged:
        yield f"{name} lies {comparison.update_ratio(name):.2f} times as far from the base as an expert on average."
