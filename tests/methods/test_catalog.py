"""``lightning-merge methods``, and that what it says of the methods is so."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

import lightning_merge as lm
from lightning_merge import methods
from lightning_merge.__main__ import main
from lightning_merge.merging.toy_models import ToyModule, make_data, make_models, make_statistics
from lightning_merge.methods import DARE, DELLA, TIES, CoreSpace, LiNeS, MergeMethod, TaskArithmetic, Wrapper
from lightning_merge.methods.catalog import list_methods, name_problem
from tests.conftest import ROOT

EXPORTED = [
    cls
    for cls in map(methods.__getattribute__, methods.__all__)
    if issubclass(cls, MergeMethod) and cls not in (MergeMethod, Wrapper)
]
ROWS = {row["method"]: row for row in list_methods()}
FEW = {"AdaMerging": {"steps": 20}, "DOGE": {"iterations": 20}, "WUDI": {"iterations": 20}}
"""Steps of those that descend: what they use, they use in each."""


def show(capsys, *args: str) -> str:
    main(["methods", *args])
    return capsys.readouterr().out


def test_every_exported_method_has_a_row(capsys):
    table = show(capsys).splitlines()
    names = [line.split("|")[1].strip().strip("`") for line in table[2:]]
    assert sorted(names) == sorted(cls.__name__ for cls in EXPORTED) == sorted(ROWS)
    assert len({line.count(" | ") for line in (table[0], *table[2:])}) == 1
    assert table[1].count("|") == table[0].count("|")


@pytest.mark.parametrize("cls", EXPORTED, ids=lambda cls: cls.__name__)
def test_every_method_names_its_paper_as_its_module_does(cls):
    text, paper = sys.modules[cls.__module__].__doc__, vars(cls)["paper"]
    assert paper.authors.removesuffix(" et al.") in text
    assert paper.venue in text or paper.venue in ("arXiv", "ICML", "EMNLP Industry")
    assert str(paper.year) in text
    assert paper.arxiv is None or paper.arxiv in text


def test_json(capsys):
    rows = json.loads(show(capsys, "--json"))
    (ties,) = [row for row in rows if row["method"] == "TIES"]
    assert (ties["year"], ties["arxiv"], ties["needs"]) == (2023, "2306.01708", [])
    assert ties["defaults"] == TIES().describe()["init_args"]


def test_a_row_of_the_table(capsys):
    table = show(capsys).splitlines()
    (row,) = [line for line in table if line.startswith("| `DELLA`")]
    assert "[Deep et al., arXiv](https://arxiv.org/abs/2406.11617) | 2024 | random numbers" in " ".join(row.split())
    assert "method=TIES(trim='none')" in row


def merge(method: MergeMethod, seed: int = 0):
    base, experts = make_models(method.max_experts or 3)
    made_up = {"statistics": make_statistics(base, experts), "module": ToyModule(), "data": make_data(experts)}
    return lm.merge(base, experts, method, seed=seed, **made_up).weights


@pytest.mark.parametrize("cls", EXPORTED, ids=lambda cls: cls.__name__)
def test_what_a_method_needs_is_what_it_uses(cls, monkeypatch):
    """Random numbers: another seed gives other weights. Factorized matrices: torch's decompositions are called."""
    called = []
    for name in ("svd", "eigh", "qr", "pinv"):
        function = getattr(torch.linalg, name)
        spy = lambda *args, function=function, **kwargs: called.append(1) or function(*args, **kwargs)  # noqa: E731
        monkeypatch.setattr(torch.linalg, name, spy)
    method = cls(**FEW.get(cls.__name__, {}))
    weights, other = merge(method), merge(method, seed=1)
    differs = any(not torch.equal(weights[name], other[name]) for name in weights)
    needs = ROWS[cls.__name__]["needs"]
    assert ("random numbers" in needs) == differs
    assert ("factorized matrices" in needs) == bool(called)
    assert ("a model per task" in needs) == cls().per_task
    assert [need for need in needs if need.startswith("data (")] == [
        *(f"data ({kind})" for kind in cls().needs),
        *(["data (the model is run on images)"] if cls().needs_data else []),
    ]


def test_the_method_inside_a_wrapper_counts():
    from lightning_merge.methods.catalog import _needs

    assert list(_needs(CoreSpace(DARE(method=TaskArithmetic())))) == ["factorized matrices", "random numbers"]
    assert list(_needs(LiNeS(DELLA()))) == ["random numbers"]


def test_nothing_heavy_is_imported():
    code = (
        "import sys; from lightning_merge.__main__ import main; main(['methods', '--json'])\n"
        "print([m for m in ('lightning', 'timm', 'open_clip', 'jsonargparse') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("ties", "TIES"),
        ("task_arithmetic", "TaskArithmetic"),
        ("dare_ties", "DARE"),
        ("Tie", "TIES"),
        ("iso_cts", "IsoC"),
    ],
)
def test_a_name_that_is_nearly_right(typed, meant):
    problem = name_problem(typed)
    assert problem.startswith(f"There is no merging method {typed!r}; do you mean {meant}")
    assert problem.endswith("? `lightning-merge methods` lists them.")


def test_names_that_are_left_to_the_parser():
    assert name_problem("qqq_zzz") == "There is no merging method 'qqq_zzz'; `lightning-merge methods` lists them."
    for name in (*ROWS, "mine.Method", "{class_path: TIES}", "null"):
        assert name_problem(name) is None


@pytest.mark.parametrize("arguments", [["--method", "ties"], ["--method=ties"]])
def test_the_command_line_says_it_in_one_line(arguments, capsys):
    from lightning_merge.trainer.cli import main

    with pytest.raises(SystemExit) as ended:
        main(["merge", *arguments, "--base=b.safetensors", "--experts=[e.safetensors]"])
    assert ended.value.code == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "merging method" in line]
    assert line.startswith("lightning-merge: There is no merging method 'ties'; do you mean TIES?")
