"""Names that a terminal would obey, or not show, are shown escaped wherever they appear."""

from __future__ import annotations

import csv
import io
import pickle

import pytest
import torch

import lightning_merge as lm
from lightning_merge.methods import TaskArithmetic
from lightning_merge.utilities.errors import MergeError, problems_of, raise_all
from lightning_merge.utilities.grid import Cell, Grid
from lightning_merge.utilities.terminal import visible

HOSTILE = {
    "title\x1b]0;mine\x07": r"title\x1b]0;mine\x07",
    "clear\x9b2J": r"clear\x9b2J",
    "two\nlines\r": r"two\nlines\r",
    "left\u202etfel": r"left\u202etfel",
    "isolate\u2066x\u2069": r"isolate\u2066x\u2069",
    "zero\u200bwidth\ufeff": r"zero\u200bwidth\ufeff",
    "no\u2028break\xa0here": r"no\u2028break\xa0here",
    "bytes\udcff": r"bytes\udcff",
}
PLAIN = ["", "blocks.0.attn.qkv.weight", "Käse", "日本", "C:\\models\\new", "a b", "🙂"]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_name(name):
    assert visible(name) == HOSTILE[name]
    assert visible(visible(name)) == visible(name)


@pytest.mark.parametrize("name", PLAIN)
def test_a_plain_name_stays(name):
    assert visible(name) is name


def test_lines_of_a_text_are_kept_where_asked():
    assert visible("a\nb\tc", keep="\n") == "a\nb\\tc"


@pytest.mark.parametrize("name", HOSTILE)
def test_in_sentences(name):
    assert str(MergeError(f"no {name}.")) == f"no {HOSTILE[name]}."
    assert problems_of(raise_all, [f"no {name}.", "two."]) == [f"no {HOSTILE[name]}.", "two."]
    with pytest.raises(MergeError) as raised:
        raise_all([f"no {name}.", "two."])
    assert str(raised.value).splitlines() == ["2 problems:", f"  - no {HOSTILE[name]}.", "  - two."]
    sent = pickle.loads(pickle.dumps(raised.value))
    assert (str(sent), sent.problems) == (str(raised.value), raised.value.problems)


@pytest.mark.parametrize("name", HOSTILE)
def test_in_what_a_merge_says(name):
    base, expert = ({key: torch.full((2, 2), value)} for key, value in ((name, 0.0), (name, 1.0)))
    plan = lm.plan(base, {name: expert | {f"{name}2": torch.ones(1)}}, TaskArithmetic()).text()
    assert HOSTILE[name] in plan
    assert visible(plan, keep="\n") == plan
    plain = lm.plan({"w": base[name]}, {"x": {"w": base[name], "v": torch.ones(1)}}, TaskArithmetic()).text()
    assert len(plan.splitlines()) == len(plain.splitlines())
    assert HOSTILE[name] in lm.merge({"w": base[name]}, {name: {"w": expert[name]}}, TaskArithmetic()).summary()


@pytest.mark.parametrize("name", HOSTILE)
def test_in_tables(name):
    grid = Grid(["method", name], [[Cell(name), Cell("1.0", 1.0)]], name)
    for text in (grid.markdown(), grid.latex()):
        assert visible(text, keep="\n") == text
    assert len(grid.markdown().splitlines()) == 5
    assert list(csv.reader(io.StringIO(grid.csv(), newline=""))) == [["method", name], [name, "1.0"]]  # data stay data


FORMULAS = ["=1+1", "+cmd|'/C calc'!A0", "-2+3", "@SUM(A1)", "\t=1", "\r=1", " =1", "\n=1", "＝1", "-a"]


@pytest.mark.parametrize("text", FORMULAS)
def test_a_spreadsheet_executes_no_cell(text):
    rows = list(csv.reader(io.StringIO(Grid(["a", text], [[Cell(text), Cell("", text)]]).csv(), newline="")))
    assert rows == [["a", f"'{text}"], [f"'{text}", f"'{text}"]]


def test_numbers_stay_numbers_in_csv():
    cells = [Cell("x"), Cell("-1.0", -1.0), Cell("-2.5"), Cell("-inf"), Cell("+3")]
    assert Grid(list("abcde"), [cells]).csv() == "a,b,c,d,e\nx,-1.0,-2.5,-inf,+3\n"
