"""The numbers in a figure are those of the records, and every figure can stand in a page, whatever the names are."""

from __future__ import annotations

import itertools
import math
import re
import subprocess
import sys
import threading
import warnings
from dataclasses import replace
from xml.etree import ElementTree

import matplotlib as mpl
import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from matplotlib.patches import Rectangle

from lightning_merge.analysis import Landscape, Plane, SiteDifference
from lightning_merge.analysis.comparison import Comparison
from lightning_merge.analysis.records import MatrixComparison, ParameterComparison
from lightning_merge.evaluation.benchmark.foundations_table import FoundationsTable
from lightning_merge.evaluation.table import Table
from lightning_merge.report.plots import (
    best_rows,
    choose_matrices,
    plot_alignment,
    plot_domains,
    plot_embeddings,
    plot_heat_map,
    plot_landscape,
    plot_landscapes,
    plot_layers,
    plot_score_maps,
    plot_spectra,
    plot_sweep,
    plot_tasks,
    plot_variance_ratio,
)
from lightning_merge.report.style import INK, MUTED, house_style, shown, text_color
from lightning_merge.report.svg import svg
from lightning_merge.utilities.errors import MergeError
from lightning_merge.utilities.sites import Site

SCORES = {  # two domains
    "base": (0.2, 0.5),
    "Weight average": (0.4, 0.6),
    "TIES": (0.7, 0.55),
    "TSV-M": (0.6, 0.66),
    "MagMax": (0.1, 0.1),
    "own expert": (0.8, 1.0),
}
ODD = [
    "<script>alert('x')</script>",
    'quo"te & $x_1^2$ \\frac',
    "two\nlines\x00\x1b[0m \ud800",
    "🦊 中文",
    "a" * 300,
    "]]> &amp; --><!--",
    "#757779 url(#x)",
]


def table(scores: dict = SCORES, domains: tuple = ("photo", "sketch"), **more) -> Table:
    kinds = {"Weight average": {"class_path": "WeightAverage", "init_args": {}}}
    records = [
        {"row": row, "domain": domain, "accuracy": value, "method": kinds.get(row), **more}
        for i, domain in enumerate(domains)
        for row, values in scores.items()
        for value in [values[i]]
    ]
    return Table(records)


def numbers(axes) -> list[list[str]]:
    """The texts in the cells, row by row."""
    rows: dict[float, list] = {}
    for text in axes.texts:
        rows.setdefault(text.get_position()[1], []).append(text)
    return [[t.get_text() for t in sorted(row, key=lambda t: t.get_position()[0])] for _, row in sorted(rows.items())]


def labels(axis) -> list[str]:
    return [label.get_text() for label in axis.get_ticklabels()]


def framed(axes) -> list[tuple[int, int]]:
    """The cells with a frame, as (row, column)."""
    frames = [patch for patch in axes.patches if isinstance(patch, Rectangle) and patch.get_linewidth() > 1]
    return [(math.floor(frame.get_y()), math.floor(frame.get_x())) for frame in frames]


def hatched(axes) -> list[tuple[int, int]]:
    return [(int(patch.get_y()), int(patch.get_x())) for patch in axes.patches if patch.get_hatch()]


def parsed(text: str) -> ElementTree.Element:
    """The element; it must be well-formed."""
    return ElementTree.fromstring(text)


def ids(text: str) -> list[str]:
    return [element.attrib["id"] for element in parsed(text).iter() if "id" in element.attrib]


# ------------------------------------------------------------------------------------------------- scores


def test_the_heat_map_shows_every_number_and_frames_the_best_methods():
    domains, mean, _ = plot_heat_map(table()).axes
    assert labels(domains.yaxis) == list(SCORES)
    assert labels(domains.xaxis) == ["photo", "sketch"]
    assert numbers(domains) == [[f"{100 * a:.1f}", f"{100 * b:.1f}"] for a, b in SCORES.values()]
    assert numbers(mean) == [["35.0"], ["50.0"], ["62.5"], ["63.0"], ["10.0"], ["90.0"]]
    cells = np.asarray(domains.collections[0].get_array()).reshape(6, 2)
    np.testing.assert_allclose(cells, 100 * np.array(list(SCORES.values())))
    assert framed(domains) == [(2, 0), (3, 1)]  # TIES on photo, TSV-M on sketch; not the base nor the own expert
    assert framed(mean) == [(3, 0)]


def test_the_smallest_error_is_the_best():
    records = [record | {"calibration_error": record["accuracy"]} for record in table().records]
    domains, mean, _ = plot_heat_map(Table(records, "calibration_error")).axes
    assert framed(domains) == [(4, 0), (4, 1)]
    assert framed(mean) == [(4, 0)]


def test_cells_without_a_number_are_hatched():
    scores = SCORES | {"TIES": (None, math.nan), "MagMax": (math.nan, 0.1)}
    domains, mean, _ = plot_heat_map(table(scores)).axes
    assert hatched(domains) == [(2, 0), (2, 1), (4, 0)]
    assert hatched(mean) == [(2, 0), (4, 0)]
    assert framed(domains) == [(3, 0), (3, 1)]
    assert numbers(domains)[3] == ["10.0"]


def test_numbers_are_readable_on_their_cells():
    axes = plot_heat_map(table()).axes[0]
    mesh = axes.collections[0]
    for text in axes.texts:
        column, row = (math.floor(place) for place in text.get_position())
        value = list(SCORES.values())[row][column] * 100
        assert contrast(text.get_color(), mesh.cmap(mesh.norm(value))) >= 4


def contrast(one, other) -> float:
    """WCAG 2.2, by its own words."""

    def luminance(color) -> float:
        channels = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in mpl.colors.to_rgb(color)]
        return float(np.dot([0.2126, 0.7152, 0.0722], channels))

    low, high = sorted([luminance(one), luminance(other)])
    return (high + 0.05) / (low + 0.05)


def test_the_ink_is_readable_on_white_and_on_a_dark_page():
    assert min(contrast(INK, "white"), contrast(INK, "#111111")) > 4
    assert text_color("white") == "#111111"
    assert text_color("#222244") == "#ffffff"


def bars(axes) -> dict[str, list[float]]:
    return {container.get_label(): [bar.get_height() for bar in container] for container in axes.containers}


def test_bars_are_divided_by_the_own_expert():
    found = bars(plot_domains(table()).axes[0])
    assert list(found) == ["base", "Weight average", "TIES", "TSV-M", "MagMax"]
    assert found["TIES"] == pytest.approx([87.5, 55.0, 71.25])
    assert found["base"] == pytest.approx([25, 50, 37.5])
    assert found["TSV-M"][-1] == pytest.approx(100 * table().normalized("TSV-M"))


def test_bars_without_an_own_expert_are_the_metric():
    scores = {row: values for row, values in SCORES.items() if row != "own expert"}
    found = bars(plot_domains(table(scores), ["TIES"]).axes[0])
    assert found == {"TIES": pytest.approx([70, 55, 62.5])}


def test_a_cross_stands_where_a_bar_is_missing():
    axes = plot_domains(table(SCORES | {"TIES": (math.nan, 0.5), "own expert": (0.8, 0.0)}), ["TIES", "TSV-M"]).axes[0]
    crosses = [text for text in axes.texts if text.get_text() == "×"]
    assert len(crosses) == 2 + 3  # photo and mean of TIES; both on sketch, and the mean of TSV-M
    assert all(math.isnan(height) for height in bars(axes)["TIES"])


def test_bars_show_the_best_the_base_and_the_weight_average():
    assert best_rows(table(), 1) == ["base", "Weight average", "TSV-M"]
    records = [record | {"calibration_error": record["accuracy"]} for record in table().records]
    assert best_rows(Table(records, "calibration_error"), 1) == ["base", "Weight average", "MagMax"]


def sweep(settings: list[dict], values: list[float]) -> Table:
    own = [{"row": "own expert", "domain": d, "accuracy": e} for d, e in (("a", 0.8), ("b", 0.5))]
    found = [
        {"row": ", ".join(f"{k} {v}" for k, v in s.items()), "domain": d, "accuracy": value * e, "setting": s}
        for s, value in zip(settings, values, strict=True)
        for d, e in (("a", 0.8), ("b", 0.5))
    ]
    return Table([*own, *found])


def lines(axes) -> dict[str, tuple[list, list]]:
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}


def test_a_sweep_has_a_line_and_its_best_is_marked():
    axes = plot_sweep(sweep([{"scale": s} for s in (0.1, 0.5, 0.9)], [0.6, 0.9, 0.7])).axes[0]
    found = lines(axes)
    assert found["mean"] == ([0.1, 0.5, 0.9], pytest.approx([60, 90, 70]))
    assert found["a"] == ([0.1, 0.5, 0.9], pytest.approx([60, 90, 70]))
    assert axes.get_xlabel() == "scale"
    assert [text.get_text() for text in axes.texts] == ["scale 0.5: 90.0"]


def test_a_sweep_over_two_fields_has_a_line_for_each_value_of_the_first():
    settings = [{"density": d, "scale": s} for d in (0.1, 0.2) for s in (1.0, 2.0)]
    axes = plot_sweep(sweep(settings, [0.1, 0.2, 0.3, math.nan])).axes[0]
    assert lines(axes)["density 0.1"] == ([1.0, 2.0], pytest.approx([10, 20]))
    assert lines(axes)["density 0.2"][1] == pytest.approx([30, math.nan], nan_ok=True)
    assert axes.texts[0].get_text() == "density 0.2, scale 1.0: 30.0"


def test_a_sweep_over_words_names_them():
    axes = plot_sweep(sweep([{"mode": m, "scale": 1.0} for m in ("trimmed", "full")], [0.5, 0.4])).axes[0]
    assert labels(axes.xaxis) == ["trimmed", "full"]
    assert axes.get_xlabel() == "mode"


def test_tasks_have_a_line_for_each_way():
    records = [
        {"seed": s, "merged": n, "arm": arm, "method": "TA", "task": t, "accuracy": a * x / n, "expert": a}
        for s in (0, 1)
        for n in (2, 4)
        for arm, x in (("naive", 0.8), ("aligned + TACT", 1.6))
        for t, a in (("a", 0.9), ("b", 0.5 + 0.1 * s))
    ]
    average, worst = plot_tasks(FoundationsTable(records), "TA").axes
    assert lines(average)["naive"] == ([2, 4], pytest.approx([40, 20]))
    assert lines(worst)["aligned + TACT"] == ([2, 4], pytest.approx([80, 40]))


def test_records_without_settings_are_no_sweep():
    with pytest.raises(MergeError, match="no record has a setting"):
        plot_sweep(table())


# ------------------------------------------------------------------------------------------------- weights


def matrix(name: str = "blocks.0.weight", experts: int = 2, alignment: float = 0.5, conflict: float = 0.3, r: int = 4):
    square = torch.full((experts, experts), alignment)
    return MatrixComparison(
        name,
        (r, r + 1),
        torch.arange(experts * r, 0, -1.0).reshape(experts, r),
        square.fill_diagonal_(1),
        square.acos(),
        {"TIES": torch.arange(r, 0, -1.0), "empty": torch.zeros(r)},
        {},
        torch.arange(float(r * r)).reshape(r, r) if experts > 1 else None,
        0.5,
        conflict,
    )


def comparison(experts: int = 2, merged: tuple = ("TIES",), prefix: str = "net.blocks") -> Comparison:
    names = [f"expert {i}" for i in range(experts)]
    base = torch.tensor([[4.0, 1.0, 0.0], [1.0, 9.0, 0.0], [0.0, 0.0, 1.0]])[:experts, :experts]
    parameters = [
        ParameterComparison(
            f"{prefix}.{layer}.{part}",
            (3, 4),
            base * (layer + 1),
            10,
            4 - layer,
            dict.fromkeys(merged, 2.0),
            {name: torch.ones(experts) for name in merged},
        )
        for layer in range(3)
        for part in ("weight", "bias")
    ]
    return Comparison(names, merged, parameters, [matrix(experts=experts)])


def test_the_matrix_of_pairs_has_its_numbers_in_place():
    axes = plot_alignment(torch.tensor([[1.0, 0.25], [math.nan, -0.001]]), ["a", "b"]).axes[0]
    assert numbers(axes) == [["1.00", "0.25"], ["0.00"]]
    assert hatched(axes) == [(1, 0)]
    assert (labels(axes.yaxis), labels(axes.xaxis)) == (["a", "b"], ["a", "b"])


def test_cosines_part_at_zero():
    figure = plot_alignment(torch.eye(2), ["a", "b"], "cosine", (-1, 1), directed=False)
    mesh = figure.axes[0].collections[0]
    assert (mesh.norm.vmin, mesh.norm.vmax, mesh.cmap.name) == (-1, 1, "PuOr_r")
    assert figure.axes[0].get_xlabel() == ""


def test_spectra_are_drawn_before_and_after():
    axes = plot_spectra([matrix()], ["a", "b"]).axes[0]
    drawn = [list(line.get_ydata()) for line in axes.lines]
    assert drawn == [[8, 7, 6, 5], [4, 3, 2, 1], [4, 3, 2, 1], [0, 0, 0, 0]]
    assert list(axes.lines[0].get_xdata()) == [1, 2, 3, 4]
    assert axes.get_yscale() == "log"


def test_score_maps_show_magnitudes():
    figure = plot_score_maps([replace(matrix(), resolved=torch.tensor([[-10.0, 0.0], [1.0, 100.0]]))])
    image = figure.axes[0].images[0]
    np.testing.assert_array_equal(image.get_array(), [[10, 0], [1, 100]])
    assert (image.norm.vmin, image.norm.vmax) == (pytest.approx(0.01), 100)
    assert "alignment 0.50, off diagonal 0.30" in figure.axes[0].get_title()


def test_a_large_map_keeps_its_largest_values_and_is_small():
    large = torch.rand(768, 768)
    large[700, 3] = -50
    figure = plot_score_maps([replace(matrix(), resolved=large)] * 3)
    pixels = figure.axes[0].images[0].get_array()
    assert pixels.shape == (192, 192)
    assert pixels[175, 0] == pixels.max() == 50
    assert len(svg(figure)) < 1e6


def test_the_chosen_matrices_lie_farthest_out():
    found = {"fight": (0.1, 0.9), "both": (0.9, 0.8), "agree": (0.8, 0.1), "middle": (0.5, 0.5)}
    matrices = [matrix(name, alignment=a, conflict=c) for name, (a, c) in found.items()]
    assert [m.name for m in choose_matrices(matrices)] == ["agree", "both", "fight"]
    assert [m.name for m in choose_matrices(matrices, 5)] == ["agree", "both", "fight", "middle"]
    assert choose_matrices([replace(matrices[0], resolved=None)]) == []
    assert len(choose_matrices(matrices[:1])) == 1


def test_layers_are_sums_over_their_parameters():
    norms, merged, conflicts, cosines = plot_layers(comparison()).axes
    scale = np.sqrt([2, 4, 6])  # two parameters a layer
    np.testing.assert_allclose(norms.lines[0].get_ydata(), 2 * scale)
    np.testing.assert_allclose(norms.lines[1].get_ydata(), 3 * scale)
    np.testing.assert_allclose(merged.lines[0].get_ydata(), 2 / (2.5 * scale))
    assert [bar.get_height() for bar in conflicts.patches] == pytest.approx([40, 30, 20])
    np.testing.assert_allclose(cosines.lines[0].get_ydata(), [1 / 6] * 3)
    np.testing.assert_allclose(cosines.lines[1].get_ydata(), (2 / (2 * 2 * scale) + 2 / (2 * 3 * scale)) / 2)
    assert labels(cosines.xaxis) == ["0", "1", "2"]


def test_layers_of_one_expert_or_of_none_merged():
    assert len(plot_layers(comparison(1, ())).axes) == 1
    assert len(plot_layers(comparison(1)).axes) == 3
    assert len(plot_layers(comparison(3, ())).axes) == 3


def test_layers_that_nobody_moved_have_no_ratio():
    still = [replace(p, products=torch.zeros(2, 2), moved=0, conflicts=0) for p in comparison().parameters]
    _, merged, conflicts, cosines = plot_layers(replace(comparison(), parameters=still)).axes
    assert np.isnan(merged.lines[0].get_ydata()).all()
    assert np.isnan(cosines.lines[0].get_ydata()).all()
    assert all(math.isnan(bar.get_height()) for bar in conflicts.patches)


# ------------------------------------------------------------------------------------------------- activations


def measured() -> tuple[Landscape, Plane]:
    axis = torch.linspace(-1, 2, 3, dtype=torch.float64)
    average = torch.arange(9.0, dtype=torch.float64).reshape(3, 3) / 10
    return Landscape(axis, axis, {"a": average}, average, average - 0.3), Plane({}, {}, {}, (0.25, 1.0))


def test_a_landscape_has_both_parts_and_the_models_in_place():
    average, worst, _ = plot_landscape(*measured(), scale=0.4).axes
    np.testing.assert_allclose(average.images[0].get_array(), measured()[0].average)
    np.testing.assert_allclose(worst.images[0].get_array(), measured()[0].worst)
    assert average.images[0].origin == "lower"
    assert {t.get_text(): t.xy for t in average.texts} == {
        "θ": (0, 0),
        "1": (0.25, 1),
        "2": (1, 0),
        "TA": (pytest.approx(0.5), 0.4),
    }
    assert average.get_title() == "average, at most 0.80"


def test_landscapes_stand_side_by_side():
    axes = plot_landscapes({"naive": measured(), "aligned": measured()}).axes
    assert [a.get_title().split(",")[0] for a in axes[:4]] == [
        "naive\naverage",
        "aligned\naverage",
        "naive\nworst task",
        "aligned\nworst task",
    ]


def test_variance_ratios_are_drawn_site_by_site():
    found = [SiteDifference(Site(f"backbone.{i}", 1), 1.0, 0.1 * i, 0.5**i, 1.0) for i in range(3)]
    distance, ratio = plot_variance_ratio({"merged": found}).axes
    assert list(distance.lines[0].get_ydata()) == pytest.approx([0, 0.1, 0.2])
    assert list(ratio.lines[0].get_ydata()) == [1, 0.5, 0.25]
    assert labels(ratio.xaxis) == ["0", "1", "2"]


def test_embeddings_have_a_colour_for_each_class():
    points = torch.arange(8.0).reshape(4, 2)
    axes = plot_embeddings({"merged": points, "expert": points + 1}, torch.tensor([0, 1, 1, 0])).axes
    first, second = axes[0].collections
    np.testing.assert_array_equal(first.get_offsets(), points[[0, 3]])
    np.testing.assert_array_equal(second.get_offsets(), points[[1, 2]])
    assert to_hex(first.get_facecolor()[0]) != to_hex(second.get_facecolor()[0])
    assert len(plot_embeddings({"alone": points}).axes[0].collections) == 1


# ------------------------------------------------------------------------------------------------- in a page


def figures(names: list[str] = ODD):
    """Every figure, with these names in it."""
    scores = {name: [0.1 * i] * 9 for i, name in enumerate(names)} | {"own expert": [0.9] * 9}
    yield plot_heat_map(table(scores, tuple(names)))
    yield plot_domains(table(scores, tuple(names)))
    yield plot_alignment(torch.eye(len(names)), names)
    yield plot_spectra([replace(matrix(names[0]), merged_spectra={n: torch.ones(4) for n in names})], names[:2])
    yield plot_score_maps([matrix(name) for name in names[:3]])
    yield plot_layers(comparison(merged=tuple(names), prefix=names[0]))
    yield plot_sweep(sweep([{names[0]: name} for name in names], [0.5] * len(names)))
    yield plot_landscapes({names[0]: measured(), names[1]: measured()}, title=names[2])
    yield plot_embeddings(dict.fromkeys(names, torch.rand(5, 2)), title=names[3])
    yield plot_variance_ratio({names[0]: [SiteDifference(Site(name, 1), 1, 1, 1, 1) for name in names]})
    records = [
        {"seed": 0, "merged": 2, "arm": name, "method": "TA", "task": "a", "accuracy": 0.5, "expert": 1.0}
        for name in names
    ]
    yield plot_tasks(FoundationsTable(records), "TA")


@pytest.mark.filterwarnings("error")
def test_odd_names_are_escaped_and_nothing_warns():
    everything = []
    for figure in figures():
        text = svg(figure, ODD[0])
        root = parsed(text)
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert root.attrib["aria-label"] == root[0].text == ODD[0]
        assert "<script" not in text
        everything.append(text)
    found = [name for text in everything for name in ids(text)]
    assert len(found) == len(set(found)) > 0
    assert "$x_1^2$" in everything[0]
    assert "🦊 中文" in everything[0]


def test_an_element_has_no_date_no_prolog_no_style_sheet_and_no_size():
    text = svg(plot_heat_map(table()), 'What "TIES" reaches')
    assert text.startswith("<svg ")
    assert not re.search(r"<!DOCTYPE|<\?xml|<metadata|<style|xlink|dc:date|#757779", text)
    root = parsed(text)
    assert "width" not in root.attrib
    assert "height" not in root.attrib
    assert {"role": "img", "aria-label": 'What "TIES" reaches'}.items() <= root.attrib.items()
    assert "width:100%;max-width:691px" in root.attrib["style"]
    assert len(root.attrib["viewBox"].split()) == 4
    assert "currentColor" in text
    assert ">TIES</" in text
    assert "'DejaVu Sans', Verdana, sans-serif" in text


def test_what_an_element_refers_to_is_in_it():
    text = svg(plot_heat_map(table(SCORES | {"TIES": (math.nan, 0.5)})), prefix="mine")
    referred = set(re.findall(r"url\(#([^)]+)\)|\"#([^\"]+)\"", text))
    assert {a or b for a, b in referred} == set(ids(text))
    assert all(name.startswith("mine-") for name in ids(text))


def test_the_same_records_give_the_same_bytes():
    first = plot_domains(table())
    text = svg(first)
    first.savefig("first.png", dpi=70)
    assert svg(first) == text
    assert svg(plot_domains(table())) == text


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("value", [0.5, 0.0, math.nan, None])
def test_one_method_on_one_domain(value):
    one = table({"TIES": (value,)}, ("photo",))
    parsed(svg(plot_heat_map(one)))
    parsed(svg(plot_domains(one)))
    with_expert = table({"TIES": (value,), "own expert": (value,)}, ("photo",))
    parsed(svg(plot_heat_map(with_expert)))
    parsed(svg(plot_domains(with_expert)))


@pytest.mark.filterwarnings("error")
def test_one_expert():
    parsed(svg(plot_alignment(torch.ones(1, 1), ["only"])))
    parsed(svg(plot_spectra([matrix(experts=1)], ["only"])))
    parsed(svg(plot_spectra([replace(matrix(experts=1), spectra=torch.zeros(1, 4))], ["only"])))
    parsed(svg(plot_score_maps([matrix(experts=1)])))
    parsed(svg(plot_spectra([], ["only"])))
    parsed(svg(plot_layers(comparison(1))))


def test_forty_methods_have_room():
    scores = {f"a method with quite a long name, number {i}": (i / 40, 0.5) for i in range(40)}
    figure = plot_heat_map(table(scores))
    figure.savefig("many.png")
    boxes = [label.get_window_extent() for label in figure.axes[0].get_yticklabels()]
    assert len(boxes) == 40
    assert all(upper.y0 > lower.y1 for upper, lower in itertools.pairwise(boxes))
    assert min(box.x0 for box in boxes) >= 0


def test_the_callers_settings_neither_matter_nor_change():
    plain = svg(plot_domains(table()))
    with mpl.rc_context({"text.color": "red", "font.size": 30, "svg.fonttype": "path", "axes.facecolor": "blue"}):
        before = dict(mpl.rcParams)
        assert svg(plot_domains(table())) == plain
        assert dict(mpl.rcParams) == before


def test_figures_can_be_drawn_in_threads():
    before, found = dict(mpl.rcParams), {}

    def draw(i: int) -> None:
        found[i] = svg(plot_domains(table()))

    threads = [threading.Thread(target=draw, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(found) == 4
    assert len(set(found.values())) == 1
    assert dict(mpl.rcParams) == before


def test_long_names_lose_their_middle():
    assert shown("x" * 40) == "x" * 40
    assert shown("begin" + "x" * 300 + "end") == "begin" + "x" * 21 + "…" + "x" * 10 + "end"
    assert shown(" a\n\tb\x00c ") == "a b c"


def test_warnings_are_heard_again_afterwards():
    with house_style():
        pass
    with pytest.warns(UserWarning, match="Glyph"):
        warnings.warn("Glyph 1 missing from font", stacklevel=1)


def test_matplotlib_is_not_imported_before_it_is_needed():
    code = "import sys, lightning_merge, lightning_merge.report; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_the_base_is_grey():
    axes = plot_domains(table()).axes[0]
    assert to_hex(axes.containers[0][0].get_facecolor()) == MUTED
