"""Regular expressions that a file brings along."""

from __future__ import annotations

import re

import pytest

from lightning_merge.checkpoints.patterns import Patterns
from lightning_merge.utilities.errors import MergeError

MODULES = ["q_proj", "layers.0.q_proj", "layers.10.mlp.fc", "fc2", "a.fc"]
PATTERNS = [
    "q_proj",
    "fc",
    r"layers\.\d+\.mlp.*",
    "^fc2",
    r"(layers|h)\.(0|1)\.q_proj",
    "proj",
    r".*\.fc",
    "[qv]_proj",
    "a.fc",
]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_match_as_in_peft(pattern):
    for module in MODULES:
        expected = re.match(rf"(.*\.)?({pattern})$", module) is not None
        assert Patterns({pattern: 1}, "it").find(module, 0) == expected, module


def test_the_first_that_matches_wins():
    assert Patterns({"x": 1, "f.": 2, "fc": 3}, "it").find("a.fc", 0) == 2


def test_a_pattern_that_takes_too_long_is_named(monkeypatch):
    """A pattern that takes Python's own engine longer than anybody waits."""
    monkeypatch.setattr("lightning_merge.checkpoints.patterns._SECONDS", 0.2)
    patterns = Patterns({r"(.|..)+\d": 4}, "the rank_pattern of the adapter photo")
    with pytest.raises(MergeError, match="in the rank_pattern of the adapter photo takes too long"):
        patterns.find("model.layers.10.self_attention.query_projection", 8)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("(", "is no regular expression"),
        ("*", "is no regular expression"),
        ("(?R)", "is no regular expression"),
        ("(" * 4000 + ")" * 4000, "is no regular expression"),
        ("((((a{9999}){9999}){9999}){9999})", "is too large"),
        ("a{50000}", "is too large"),
        ("ab|" * 30000, "is too large"),
    ],
)
def test_what_is_no_pattern_is_named(pattern, message):
    with pytest.raises(MergeError, match=message) as error:
        Patterns({"fine": 2, pattern: 4}, "the rank_pattern of the adapter photo").find("model.fc", 8)
    assert "the rank_pattern of the adapter photo" in str(error.value)
    assert len(str(error.value)) < 600
