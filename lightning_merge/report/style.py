"""One look for all figures, on white and on dark pages."""

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from typing import Any, ParamSpec

import matplotlib as mpl
import matplotlib.style
from matplotlib import figure
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import to_rgb
from matplotlib.rcsetup import cycler
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

P = ParamSpec("P")

INK = "#757779"
"""Text, axes and ticks: readable on white and on black; :func:`lightning_merge.report.svg.svg` makes it the colour of
the page's text."""

MUTED = "#8c8e90"
"""The colour of what others are compared with: a grey on white and on black."""

PALETTE = ("#0072b2", "#d55e00", "#009e73", "#e69f00", "#cc79a7", "#56b4e9")
"""Okabe and Ito's colours, which colour-blind readers tell apart, but for black and yellow, which a page swallows."""

_TEN = ("#3f90da", "#ffa90e", "#bd1f01", "#94a4a2", "#832db6", "#a96b59", "#e76300", "#b9ac70", "#717581", "#92dadd")
"""Petroff's ten colours (arXiv 2107.02270), for more than those."""

SEQUENTIAL, DIVERGING = "viridis", "PuOr_r"

WIDTH = 7.2
"""The width of a figure, in inches."""

_STYLE: dict[str, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": INK,
    "axes.facecolor": "none",
    "axes.formatter.use_mathtext": False,
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.labelsize": 9,
    "axes.linewidth": 0.7,
    "axes.prop_cycle": cycler(color=PALETTE),
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
    """Draw in the house's style, whatever the caller's settings are, without warnings of glyphs that a font lacks."""
    with _ALONE, mpl.style.context(["default", _STYLE]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        yield


class Figure(figure.Figure):
    """A figure that is drawn in the house's style, whoever saves it and when.

    It belongs to no window and to no backend, so that it can be made in any thread. It is laid out once, by
    :meth:`settle`; who changes it afterwards may call ``set_layout_engine("constrained")``.

    Args:
        width: The width in inches.
        height: The height in inches.
    """

    def __init__(self, width: float = WIDTH, height: float = 3.2) -> None:
        super().__init__(figsize=(width, height), layout="constrained")

    def draw(self, renderer: Any) -> None:
        """Draw the figure; ticks, which matplotlib makes only now, get the style, too."""
        with house_style():
            super().draw(renderer)

    def settle(self) -> None:
        """Lay the figure out once and for all, so that it looks the same however often it is saved."""
        names = [label for axes in self.axes for label in axes.get_xticklabels()]
        is_tilted = any(name.get_rotation() for name in names)
        engine = self.get_layout_engine()
        assert engine is not None  # `__init__` asks for one
        for _ in range(2 if is_tilted else 1):  # the second time the room that tilted names take is known
            engine.execute(self)
        self.set_layout_engine("none")


def drawn(plot: Callable[P, Figure]) -> Callable[P, Figure]:
    """Let a function draw in the house's style, and lay its figure out."""

    @functools.wraps(plot)
    def draw(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with house_style():
            figure = plot(*args, **kwargs)
            figure.settle()
        return figure

    return draw


def shown(name: object, length: int = 40) -> str:
    """Write a name in one line, its middle left out where it is too long."""
    text = "".join(character if character.isprintable() else " " for character in str(name))
    text = " ".join(text.split())
    end = length // 3
    return text if len(text) <= length else f"{text[: length - end - 1]}…{text[-end:]}"


def colors(count: int) -> Sequence[Any]:
    """Choose ``count`` colours that can be told apart, as far as there are such."""
    for palette in (PALETTE, _TEN):
        if count <= len(palette):
            return palette[:count]
    return list(mpl.colormaps["turbo"].resampled(count)(range(count)))


def looks(count: int) -> list[dict[str, Any]]:
    """Choose the looks of ``count`` lines: every colour in solid lines, then in dashed, then in dotted ones."""
    styles = [{"linestyle": style, "color": color} for style, color in product(("-", "--", ":", "-."), PALETTE)]
    return [styles[i % len(styles)] for i in range(count)]


def text_color(background: Any) -> str:
    """Choose black or white, whichever has more contrast to a colour (WCAG 2.2, relative luminance)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(background)]
    luminance = sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
    return "#111111" if luminance > 0.179 else "#ffffff"


def bare(axes: Axes) -> None:
    """Remove the frame, the grid and the marks of the ticks."""
    axes.spines[:].set_visible(False)
    axes.grid(False)
    axes.tick_params(length=0)


def legend_below(figure: figure.Figure, panels: Iterable[Axes], columns: int = 4, **options: Any) -> None:
    """Draw one legend below all panels; a name that several panels share stands there once."""
    handles: dict[str, Any] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    if handles:
        columns = min(columns, len(handles))
        figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=columns, **options)


def name_ticks(axes: Axes, names: Sequence[str], most: int = 16) -> None:
    """Name the whole numbers 0, 1, … on the x axis, tilted, without what all the names begin with.

    Args:
        axes: The axes.
        names: The names, such as those of layers.
        most: The most names; if there are more, only every second, third, … is written.
    """
    step = -(-len(names) // most)
    start = len(common_path(names))
    labels = [shown(name[start:], 24) for name in names]
    axes.set_xticks(range(0, len(names), step), labels[::step], rotation=45, ha="right", rotation_mode="anchor")


def common_path(names: Sequence[str]) -> str:
    """Find what all names begin with, up to a dot."""
    first = names[0] if len(names) > 1 else ""
    length = next((i for i, c in enumerate(first) if any(name[i : i + 1] != c for name in names)), len(first))
    return first[: first.rfind(".", 0, length) + 1]


def plain_log(axis: Axis, between: Sequence[float] = (1.0,)) -> None:
    """Write plain numbers (0.01) at the ticks of a logarithmic axis: the powers of ten, times each of a few numbers."""
    axis.set_major_locator(LogLocator(subs=between, numticks=12))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def whole(axis: Axis) -> None:
    """Put ticks only at whole numbers."""
    axis.set_major_locator(MaxNLocator(5, integer=True))
