"""The search finds what is right by construction, on validation data only, with no evaluation too many."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.data import TensorDataset

import lightning_merge as lm
from lightning_merge.evaluation import evaluate_candidates, greedy_soup_on_validation, search, search_coefficients
from lightning_merge.methods import IsoC, Soup, TaskArithmetic, WeightAverage
from tests.toys import quiet_trainer

CLASSES, SAMPLES = 4, 40
LOOKS = {"a": 0.4, "b": -0.4, "c": 0.0}


class Shifted(lm.DomainDataModule):
    """Class k shows as the number k - 1, shifted a little in each domain. Only validation splits may be read."""

    held_out_domains = ("c",)

    @property
    def domains(self):
        return list(LOOKS)

    @property
    def class_names(self):
        return [str(k) for k in range(CLASSES)]

    def labels(self, domain):
        return np.arange(SAMPLES) % CLASSES

    def split(self, domain, split):
        assert split == "val", f"the {split} split was read"
        assert domain not in self.held_out_domains, f"the held-out domain {domain} was read"
        return super().split(domain, split)

    def dataset(self, domain, indices, augment):
        labels = torch.tensor(self.labels(domain)[indices])
        return TensorDataset(labels.unsqueeze(1) - 1 + LOOKS[domain], labels)


class Shift(LightningModule):
    """Adds a number, which must be 1; the class is the nearest integer."""

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(1))

    def forward(self, images):
        return -(images + self.shift - torch.arange(CLASSES)).square()


BASE, EXPERT = {"shift": torch.zeros(1)}, {"shift": torch.full((1,), 2.0)}
EXPERTS = {"a": EXPERT, "b": EXPERT}  # the base and twice what it needs
SCALES = [0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]


def run(method=WeightAverage(), grid=None, experts=EXPERTS, trainer=None, data=None, **arguments):  # noqa: B008
    trainer, data = trainer or quiet_trainer(), data or Shifted(batch_size=7)
    return search_coefficients(trainer, Shift(), data, BASE, experts, method, grid, **arguments)


def test_half_of_twice_the_way_is_found():
    found = run(grid={"scale": SCALES}, patience=None)
    assert found.method == WeightAverage(scale=0.5)
    assert found.setting == {"scale": 0.5}
    assert torch.equal(found.merged.weights["shift"], torch.ones(1))
    assert torch.equal(found.merged.weights["shift"], lm.merge(BASE, EXPERTS, found.method).weights["shift"])
    assert [found.table.value("scale 0.5", domain) for domain in "ab"] == [1.0, 1.0]
    assert found.table.row_names == [f"scale {scale}" for scale in SCALES] + ["own expert"]
    own = {domain: found.table.value("own expert", domain) for domain in "ab"}
    assert found.score == found.table.normalized("scale 0.5") == (1 / own["a"] + 1 / own["b"]) / 2
    assert "scale 0.5: the best of 8 settings" in found.summary()


def test_the_scores_are_those_of_a_test_of_each_alone():
    found = run(grid={"scale": [0.4, 0.9]}, at_once=2)
    for scale in (0.4, 0.9):
        merged = lm.merge(BASE, EXPERTS, WeightAverage(scale=scale)).weights
        data = Shifted().only(train=[], test=["a", "b"], test_on="val")
        for record in evaluate_candidates(quiet_trainer(), Shift(), data, {"alone": merged}):
            assert found.table.value(f"scale {scale}", record["domain"]) == record["accuracy"]


def test_normalized_accuracy_decides_and_not_the_mean():
    """Domain b's own expert is poor, so that what serves b counts more than what serves a."""
    experts = {"a": {"shift": torch.ones(1)}, "b": {"shift": torch.full((1,), 3.0)}}  # their mean is 2
    found = run(grid={"scale": [0.25, 0.75]}, experts=experts)  # right in a only, right in b only
    rows = {row: found.table.values(row) for row in found.table.row_names}
    assert rows == {"scale 0.25": [1.0, 0.25], "scale 0.75": [0.25, 1.0], "own expert": [1.0, 0.25]}
    assert found.setting == {"scale": 0.75}
    assert found.score == (0.25 / 1 + 1 / 0.25) / 2


@pytest.fixture
def passes(monkeypatch):
    """The candidates of every pass over the data."""
    seen = []

    def counting(trainer, model, datamodule, candidates, *args):
        seen.append(list(candidates))
        return evaluate_candidates(trainer, model, datamodule, candidates, *args)

    monkeypatch.setattr(search, "evaluate_candidates", counting)
    return seen


class TestEarlyStopping:
    def test_three_coefficients_that_do_not_raise_the_mean_end_it(self, passes):
        found = run(grid={"scale": SCALES}, at_once=1)
        tried = [f"scale {scale}" for scale in (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)]  # 0.4 is no better, 0.5 is
        assert [name for names in passes for name in names if name != "own expert"] == tried
        assert found.table.row_names == [*tried, "own expert"]
        assert found.setting == {"scale": 0.5}

    def test_a_plateau_ends_it_before_the_best(self):
        assert run(at_once=1).table.row_names[:-1] == [f"scale {scale}" for scale in (0.1, 0.2, 0.3, 0.4)]
        assert run(at_once=1, patience=None).setting == {"scale": 0.5}

    @pytest.mark.parametrize("at_once", [2, 3, 5, 100])
    def test_what_is_found_does_not_depend_on_how_many_are_evaluated_at_once(self, passes, at_once):
        found = run(grid={"scale": SCALES}, at_once=at_once)
        alone = run(grid={"scale": SCALES}, at_once=1)
        assert found.table.records == alone.table.records
        assert found.setting == alone.setting
        merged = [names for names in passes if names != ["own expert"]]
        assert max(map(len, merged)) == min(at_once, len(SCALES))

    def test_each_setting_of_the_other_fields_starts_anew(self):
        grid = {"smooth": [0.0, 1.0], "scale": SCALES}
        fisher = {name: {"fisher.shift": torch.ones(1)} for name in EXPERTS}
        found = run(lm.methods.Fisher(), grid, statistics=fisher, at_once=3)
        rows = [f"smooth {s}, scale {x}" for s in (0.0, 1.0) for x in SCALES[:6]]
        assert found.table.row_names == [*rows, "own expert"]
        assert found.setting == {"smooth": 0.0, "scale": 0.5}  # the first of equal ones


@pytest.fixture
def not_a_number(monkeypatch):
    """Give the accuracies of some rows as NaN."""
    rows: set[str] = set()

    def evaluate(*args):
        return [r | {"accuracy": math.nan} if r["row"] in rows else r for r in evaluate_candidates(*args)]

    monkeypatch.setattr(search, "evaluate_candidates", evaluate)
    return rows


@pytest.mark.parametrize("lost", [["scale 0.3"], ["scale 0.3", "scale 0.4"], ["scale 0.7"]])
def test_what_has_no_number_is_not_the_best(not_a_number, lost):
    not_a_number.update(lost)
    assert run(grid={"scale": SCALES}, patience=None).setting == {"scale": 0.5}


def test_a_search_without_any_number(not_a_number):
    not_a_number.update(f"scale {scale}" for scale in SCALES)
    with pytest.raises(lm.MergeError, match="No setting of the search has a number"):
        run(grid={"scale": SCALES}, patience=None)


def test_one_merge_serves_all_coefficients(monkeypatch):
    updated, update = [], TaskArithmetic.update

    def counting(self, deltas, context):
        updated.append(context.name)
        return update(self, deltas, context)

    monkeypatch.setattr(TaskArithmetic, "update", counting)
    assert len(run(TaskArithmetic(), patience=None).table.row_names) == 31
    assert updated == ["shift"]


def test_results_are_written():
    run(grid={"scale": [0.3, 0.5]}, output="out")
    records = [json.loads(line) for line in Path("out/results.jsonl").read_text().splitlines()]
    assert [(r["row"], r["domain"]) for r in records[2:]] == [(f"scale {s}", d) for s in (0.3, 0.5) for d in "ab"]
    assert records[-1]["setting"] == {"scale": 0.5}
    assert records[-1]["method"] == WeightAverage(scale=0.5).describe()
    assert {r["test_on"] for r in records} == {"val"}
    assert "validation split" in Path("out/table.md").read_text()
    assert Path("out/table.csv").read_text().splitlines()[0] == "method,a,b,mean,worst,normalized"


@pytest.mark.skipif(sys.platform == "win32", reason="there is no fork")
def test_two_processes_find_what_one_finds():
    alone = run(grid={"scale": SCALES})
    together = run(grid={"scale": SCALES}, trainer=quiet_trainer(devices=2, strategy="ddp_fork"))
    assert together.setting == alone.setting
    assert together.score == alone.score
    assert [r["accuracy"] for r in together.table.records] == [r["accuracy"] for r in alone.table.records]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"grid": {"density": [0.5]}}, "WeightAverage has no field 'density'"),
        ({"grid": {"scale": []}}, "'scale' is empty"),
        ({"method": lm.methods.TIES(), "grid": {"density": [2.0]}}, r"density must lie in \(0, 1\]"),
        ({"patience": 0}, "patience must be at least 1"),
        ({"at_once": 0}, "at_once must be at least 1"),
        ({"experts": {}}, "needs the experts by the name of their domain"),
        ({"experts": [EXPERT]}, "needs the experts by the name of their domain"),
        ({"experts": {"z": EXPERT}}, "The expert 'z' has no domain to validate on; .* a, b, c"),
        ({"data": Shifted(held_out="a")}, "'a' is held out"),
        ({"experts": {"a": {"other": torch.ones(1)}}}, "no fine-tuned form of the base"),
    ],
)
def test_what_cannot_work_is_said_before_any_evaluation(passes, arguments, message):
    with pytest.raises(lm.MergeError, match=message):
        run(**arguments)
    assert passes == []


def test_an_expert_that_knows_nothing_is_no_reference(monkeypatch):
    monkeypatch.setattr(search, "evaluate_candidates", lambda *args: [{"row": "own expert", "accuracy": 0.0}])
    with pytest.raises(lm.MergeError, match="The expert a classifies no image of its own validation split right"):
        run()


def test_the_greedy_soup_takes_who_helps_on_validation_data():
    experts = {"a": {"shift": torch.full((1,), 0.5)}, "b": {"shift": torch.full((1,), 1.5)}}
    soup = greedy_soup_on_validation(quiet_trainer(), Shift(), Shifted(), BASE, experts)
    assert set(soup.experts) == {"a", "b"}  # together they are right
    experts["b"] = {"shift": torch.full((1,), 9.0)}
    experts["a"] = {"shift": torch.ones(1)}
    data = Shifted()
    soup = greedy_soup_on_validation(quiet_trainer(), Shift(), data, BASE, experts)
    assert list(soup.experts) == ["a"]
    assert torch.equal(soup.weights["shift"], lm.merge(BASE, {"a": experts["a"]}, Soup()).weights["shift"])


def test_iso_is_searched_as_any_other():
    assert run(IsoC(), {"scale": [0.4, 0.5, 0.6]}).method == IsoC(scale=0.5)
