"""One look for all figures, on white and on dark pages."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from typing import Any

import matplotlib as mpl
import matplotlib.style
from matplotlib import figure
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb

INK = "#757779"
"""Text, axes and ticks: readable on white and on black; :func:`svg` makes it the colour of the page's text."""

PALETTE = ("#0072b2", "#d55e00", "#009e73", "#e69f00", "#cc79a7", "#56b4e9")
"""Okabe and Ito's colours, which colour-blind readers tell apart, but for black and yellow, which a page swallows."""

_TEN = ("#3f90da", "#ffa90e", "#bd1f01", "#94a4a2", "#832db6", "#a96b59", "#e76300", "#b9ac70", "#717581", "#92dadd")
"""Petroff's ten colours (arXiv 2107.02270), for more than those."""

SEQUENTIAL, DIVERGING = "viridis", "PuOr_r"

WIDTH = 7.2
"""Of a figure, in inches."""

_STYLE: dict[str, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": INK,
    "axes.facecolor": "none",
    "axes.formatter.use_mathtext": False,
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.labelsize": 9,
    "axes.linewidth": 0.7,
    "axes.prop_cycle": mpl.cycler(color=PALETTE),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "axes.titlesize": 9.5,
    "figure.edgecolor": "none",
    "figure.facecolor": "none",
    "figure.titlesize": 10,
    "font.family": ["DejaVu Sans"],
    "font.size": 9,
    "grid.alpha": 0.25,
    "grid.color": INK,
    "grid.linewidth": 0.6,
    "hatch.color": INK,
    "hatch.linewidth": 0.6,
    "image.cmap": SEQUENTIAL,
    "legend.edgecolor": "none",
    "legend.fontsize": 8,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "lines.linewidth": 1.6,
    "lines.markersize": 4,
    "patch.edgecolor": INK,
    "savefig.facecolor": "auto",
    "svg.fonttype": "none",
    "svg.hashsalt": "lightning_merge",
    "text.color": INK,
    "text.parse_math": False,
    "text.usetex": False,
    "xtick.color": INK,
    "xtick.labelsize": 8,
    "ytick.color": INK,
    "ytick.labelsize": 8,
}
_ALONE = threading.RLock()  # matplotlib's settings are one dictionary for all threads


@contextmanager
def house_style() -> Iterator[None]:
    """Draw in the house's style whatever the caller's settings are; a decorator, too. Glyphs may be missing silently."""
    with _ALONE, mpl.style.context(["default", _STYLE]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        yield


class Figure(figure.Figure):
    """A figure that is drawn in the house's style, whoever saves it and when.

    It belongs to no window and to no backend, so that it can be made in any thread.

    Args:
        width: In inches.
        height: In inches.
    """

    def __init__(self, width: float = WIDTH, height: float = 3.2) -> None:
        super().__init__(figsize=(width, height), layout="constrained")

    def draw(self, renderer: Any) -> None:
        """Draw it; ticks, which matplotlib makes only now, get the style, too."""
        with house_style():
            super().draw(renderer)


def shown(name: object, length: int = 40) -> str:
    """A name in one line, its middle left out where it is too long."""
    text = "".join(character if character.isprintable() else " " for character in str(name))
    text = " ".join(text.split())
    end = length // 3
    return text if len(text) <= length else f"{text[: length - end - 1]}…{text[-end:]}"


def colors(count: int) -> Sequence[Any]:
    """So many colours that can be told apart, as far as there are such."""
    for palette in (PALETTE, _TEN):
        if count <= len(palette):
            return palette[:count]
    return mpl.colormaps["turbo"].resampled(count)(range(count))


def looks(count: int) -> list[dict[str, Any]]:
    """The look of so many lines: the colours, and then dashed, and then dotted ones."""
    styles = [{"linestyle": style, "color": color} for style, color in product(("-", "--", ":", "-."), PALETTE)]
    return [styles[i % len(styles)] for i in range(count)]


def text_color(background: Any) -> str:
    """Black or white, whichever has more contrast to a colour (WCAG 2.2, relative luminance)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(background)]
    luminance = sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
    return "#111111" if luminance > 0.179 else "#ffffff"


def bare(axes: Axes) -> None:
    """Take the frame, the grid and the ticks' marks away."""
    axes.spines[:].set_visible(False)
    axes.grid(False)
    axes.tick_params(length=0)


def legend_below(figure: figure.Figure, axes: Axes, columns: int = 4) -> None:
    """One legend below all panels, if there is more than nothing to say."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=min(columns, len(handles)))
