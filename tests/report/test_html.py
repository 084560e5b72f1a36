from __future__ import annotations

import json
import math
import re
from base64 import b64encode
from hashlib import sha256
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest

from lightning_merge.report import Cell, Grid, Page, Section, render, write_page
from tests.report.pages import NASTY, many, nasty, ordinary, page

_VOID = ("meta", "link", "img", "br", "hr", "input")
_HEADINGS = ("h1", "h2", "h3", "h4", "h5", "h6")


class Tree(HTMLParser):
    """The elements of a page as ``(tag, attributes, text)``, in the order of their beginnings."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None], list[str]]] = []
        self.open: list[tuple[str, list[str]]] = []
        self.feed(text)
        self.close()
        assert not self.open, f"<{self.open[-1][0]}> is never closed"

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs), (tag, attrs)
        text: list[str] = []
        self.elements.append((tag, dict(attrs), text))
        if tag not in _VOID:
            self.open.append((tag, text))

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs), []))

    def handle_endtag(self, tag):
        assert self.open[-1][0] == tag, f"</{tag}> closes <{self.open[-1][0]}>"
        self.open.pop()

    def handle_data(self, data):
        for _, text in self.open:
            text.append(data)

    def find(self, tag: str, **attributes: str) -> list[tuple[dict[str, str | None], str]]:
        wanted = {name.rstrip("_").replace("_", "-"): value for name, value in attributes.items()}
        return [
            (own, "".join(text))
            for name, own, text in self.elements
            if name == tag and all(own.get(key) == value for key, value in wanted.items())
        ]


def copies(text: str) -> dict[str, str]:
    """What the buttons copy in the original order, put together as the page's script does."""
    ((_, lines),) = Tree(text).find("script", class_="copies")
    return {
        name: "\n".join([*part["before"], *part["rows"], *part["after"]]) for name, part in json.loads(lines).items()
    }


@pytest.fixture(scope="module")
def attacked() -> str:
    return render(nasty(), data={"names": list(NASTY), NASTY[1]: math.nan})


@pytest.fixture(scope="module")
def tree() -> Tree:
    return Tree(render(ordinary()))


def test_the_page_has_landmarks_headings_in_order_and_a_way_past_them(tree: Tree) -> None:
    assert tree.find("html")[0][0]["lang"] == "en"
    assert [len(tree.find(tag)) for tag in ("header", "nav", "main", "h1", "figure")] == [1] * 5
    headings = [int(tag[1]) for tag, _, _ in tree.elements if tag in _HEADINGS]
    assert headings[0] == 1
    assert all(after <= before + 1 for before, after in pairwise(headings))
    ids = [own["id"] for _, own, _ in tree.elements if own.get("id")]
    assert {own["href"] for own, _ in tree.find("a")} <= {f"#{name}" for name in ids}
    assert tree.find("a", class_="skip")[0][0]["href"] == "#" + tree.find("main")[0][0]["id"]
    labels = [own[key] for _, own, _ in tree.elements for key in ("aria-labelledby", "aria-describedby") if key in own]
    assert set(labels) <= set(ids)


def test_the_summary_comes_before_warnings_and_sections_and_all_are_in_the_contents(tree: Tree) -> None:
    assert [text for _, text in tree.find("h2")] == ["Summary", "Warning", "Results", "Configuration"]
    contents = [own["href"] for own, _ in tree.find("a") if own.get("class") != "skip"]
    assert contents == ["#summary", "#warnings", "#section-1", "#section-2"]
    assert "One seed." in tree.find("section", id="warnings")[0][1]
    assert [text for _, text in tree.find("dt")] == ["made", "experts"]


def test_tables_have_captions_and_scopes_and_are_sorted_by_what_is_not_rounded(tree: Tree) -> None:
    assert [text for _, text in tree.find("caption")] == ["Accuracy in % on each domain."]
    assert all(own["scope"] in ("col", "row") for own, _ in tree.find("th"))
    assert len(tree.find("th", scope="col")) == 3
    assert len(tree.find("th", scope="row")) == 6
    keys = [own["data-sort"] for own, _ in tree.find("td")][::2]
    assert keys == ["0.50041", "0.50039", "", "0.9", "", "-Infinity"]
    best = [text for own, text in tree.find("td") if "best" in own["class"]]
    assert best == ["90.0", "100.0"]


def test_a_column_with_a_single_text_in_it_is_sorted_as_text() -> None:
    rows = [[Cell("a", "a"), Cell("3", 3.0), Cell("", None)], [Cell("b", "b"), Cell("x", "x"), Cell("", None)]]
    tree = Tree(render(page(Grid(["name", "mixed", "empty"], rows))))
    assert [own["data-sort"] for own, _ in tree.find("td")] == ["x3.0", "", "xx", ""]


@pytest.mark.parametrize("caption", ["", "What the *cells* are."])
def test_what_is_copied_in_the_original_order_is_what_the_table_writes(caption: str) -> None:
    names = [*NASTY, 'a "quoted", name']
    rows = [[Cell(name, name), Cell("50.0", 0.5 + i / 1e9, 1), Cell("–")] for i, name in enumerate(names)]
    for grid in (Grid(["method", "a|b", "c,\nd"], rows, caption), Grid(["method", "a", "b"], [], caption)):
        text = render(page(grid))
        copied = copies(text)
        assert copied["Markdown"] == grid.markdown()
        assert copied["CSV"] == grid.csv()
        assert copied["LaTeX"] == grid.latex()
        lines = json.loads(Tree(text).find("script", class_="copies")[0][1])
        assert {len(part["rows"]) for part in lines.values()} == {len(grid.rows)}


def test_names_that_attack_are_text(attacked: str) -> None:
    tree = Tree(attacked)
    kinds = [own.get("type", "own") for own, _ in tree.find("script")]
    assert kinds == ["own", *["application/json"] * 2]
    assert len(tree.find("style")) == 1
    assert not tree.find("img")
    assert not [own for _, own, _ in tree.elements if any(key.startswith("on") for key in own)]
    names = [text for _, text in tree.find("th", scope="row")]
    assert names == list(NASTY)
    assert tree.find("h1")[0][1] == tree.find("title")[0][1] == " ".join(NASTY)
    assert [text for _, text in tree.find("code")] == list(NASTY)


def test_ids_are_unique_even_if_a_figure_stands_on_the_page_twice(attacked: str) -> None:
    ids = [own["id"] for _, own, _ in Tree(attacked).elements if "id" in own]
    assert len(ids) == len(set(ids)) > 40


def test_nothing_is_loaded(attacked: str) -> None:
    tree = Tree(attacked)
    for tag, own, _ in tree.elements:
        for key in ("src", "srcset", "action", "data", "poster"):
            assert not own.get(key), (tag, own)
        link = own.get("href", own.get("xlink:href", "#")) or "#"
        assert tag == "a" or link.startswith(("#", "data:image/png;base64,")), (tag, own)
        assert all(name.startswith("#") for name in re.findall(r"url\((.*?)\)", " ".join(map(str, own.values()))))
    style = tree.find("style")[0][1]
    assert "@import" not in style
    assert "url(" not in style
    assert not tree.find("link")


def test_the_policy_allows_the_pages_own_script_and_nothing_else(tree: Tree) -> None:
    (policy,) = [own["content"] for own, _ in tree.find("meta") if own.get("http-equiv")]
    script = tree.find("script")[0][1]
    assert policy.startswith("default-src 'none'; ")
    assert f"script-src 'sha256-{b64encode(sha256(script.encode()).digest()).decode()}';" in policy
    assert "sortable-tablesort 4.1.7" in script


def test_the_same_page_is_the_same_text() -> None:
    assert render(ordinary(), data={"b": 1, "a": [2]}) == render(ordinary(), data={"b": 1, "a": [2]})


def test_data_are_embedded_and_what_json_does_not_know_is_null(attacked: str) -> None:
    ((_, text),) = Tree(attacked).find("script", id="data")
    assert json.loads(text) == {"names": list(NASTY), NASTY[1]: None}
    data = {"scores": [math.inf, {"a": (1, 0.1 + 0.2)}], "first": True}
    ((_, text),) = Tree(render(many(1, 1), data=data)).find("script", id="data")
    assert json.loads(text) == {"scores": [None, {"a": [1, 0.30000000000000004]}], "first": True}
    assert not Tree(render(many(1, 1))).find("script", id="data")


def test_pages_with_almost_nothing_and_with_much_are_written() -> None:
    assert "<h1>Bare</h1>" in render(Page("Bare", [], []))
    assert len(Tree(render(Page("Bare", [], [Section("Empty", [])]))).find("h2")) == 2
    assert len(Tree(render(many(1, 1))).find("td")) == 1
    assert len(Tree(render(many(40, 8))).find("td")) == 320
    assert r"\udcff" in render(Page("half of a character: \udcff", [], []))


def test_a_page_takes_its_place_at_once(tmp_path: Path) -> None:
    bare = Page("Bare", [], [])
    path = write_page(bare, tmp_path / "new" / "report.html")
    assert path == tmp_path / "new" / "report.html"
    before = path.read_text(encoding="utf-8")
    assert before == render(bare)
    with pytest.raises(TypeError):
        write_page(bare, path, data={"what JSON does not know": object()})
    assert path.read_text(encoding="utf-8") == before
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]
