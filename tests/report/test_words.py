from __future__ import annotations

import pytest

from lightning_merge.report.words import count, extremes, listed, percent, points


@pytest.mark.parametrize(
    ("words", "expected"),
    [("a", "a"), ("ab", "a and b"), ("abcdef", "a, b, c, d, e and f"), ("abcdefgh", "a, b, c, d, e and 3 more")],
)
def test_lists(words, expected):
    assert listed(list(words)) == expected


def test_numbers():
    assert (percent(0.68949), points(-0.0123)) == ("68.9", "-1.2")
    assert [count(1, "method"), count(3, "method"), count(2, "matrix", "matrices")] == [
        "1 method",
        "3 methods",
        "2 matrices",
    ]


def test_extremes_where_there_are_some():
    assert extremes([2.0, 1.0, 3.0], ["a", "b", "c"]) == ("b", "c")
    assert extremes([1.0, 1.0 + 1e-6], ["a", "b"]) is None
    assert extremes([0.0], ["a"]) is None
