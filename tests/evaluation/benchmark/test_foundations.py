"""The benchmark over several foundations, on tasks made of scikit-learn's digits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import lightning_merge as lm
from lightning_merge.evaluation import evaluate_candidates
from lightning_merge.evaluation.benchmark.options import Arm, Foundations
from lightning_merge.evaluation.task_models import model_of_task
from lightning_merge.merging.aligning import Align, align
from lightning_merge.merging.repairing import Repair
from lightning_merge.methods import AdaMerging, TaskArithmetic, WeightAverage
from lightning_merge.utilities.errors import MergeError
from tests.toys import digit_tasks, quiet_trainer, tiny_vgg

ARMS = {
    "naive": Arm(align="nothing"),
    "naive + TACT": Arm(align="nothing", repair=Repair(by="tact")),
    "aligned": Arm(),
    "aligned + REPAIR": Arm(repair=Repair(by="repair")),
    "aligned + probe": Arm(align="activations", repair=Repair(by="probe")),
}
METHODS = {"TA": TaskArithmetic(scale=0.4), "average": WeightAverage()}


def run(tmp_path: Path, methods=METHODS, tasks=None, **changes):
    options = {"domains": ["upright"], "arms": ARMS, "merged": [2, 3], "max_epochs": 2, "batches": 2, "batch_size": 32}
    data = lm.TaskArrays(
        str(digit_tasks(tmp_path / "tasks")),
        image_size=8,
        channels=1,
        batch_size=32,
        test_on=changes.pop("test_on", "test"),
    )
    trainer = quiet_trainer(max_epochs=1, limit_train_batches=6, **changes.pop("trainer", {}))
    return trainer.benchmark(
        tiny_vgg(),
        data,
        methods=methods,
        output=str(tmp_path / "out"),
        domains=tasks,
        report=False,
        foundations=Foundations(**{**options, **changes}),
    )


def test_every_number_is_that_of_a_merge_by_hand(tmp_path):
    table = run(tmp_path)
    assert len(table.records) == 2 * 5 * (2 + 3)
    assert (tmp_path / "out/table.md").read_text().startswith(table.markdown())
    out = tmp_path / "out/seed 0"
    names = ["halves", "inverted", "parity"]
    options = Align(
        {name: str(out / "foundations" / name / "expert.ckpt") for name in "ab"},
        {"halves": "a", "inverted": "b", "parity": "a"},
    )
    model = tiny_vgg()
    experts = {name: lm.open_weights(out / "experts" / name / "expert.ckpt") for name in names}
    found = align(options, experts, model, private=["head.*"])
    merged = lm.merge(found.base, found.experts, METHODS["TA"], exclude=["head.*"])
    data = lm.TaskArrays(str(tmp_path / "tasks"), image_size=8, channels=1, test_domains=["parity"])
    rows = {"aligned": merged.for_task("parity"), "own": dict(experts["parity"])}
    by_hand = {
        record["row"]: record["accuracy"]
        for record in evaluate_candidates(quiet_trainer(), model_of_task(model, data, "parity"), data, rows)
    }
    (record,) = [
        record
        for record in table.records
        if (record["merged"], record["arm"], record["method"], record["task"]) == (3, "aligned", "TA", "parity")
    ]
    assert record["accuracy"] == by_hand["aligned"]
    assert record["expert"] == by_hand["own"]
    foundations = [lm.open_weights(path) for path in options.foundations.values()]
    assert not torch.equal(*(weights["backbone.stages.0.weight"] for weights in foundations))


def test_what_is_done_is_not_done_again(tmp_path, monkeypatch):
    table = run(tmp_path, merged=[2])
    from lightning_merge.evaluation.benchmark import foundations

    monkeypatch.setattr(foundations, "fit_expert", lambda *args, **kwargs: pytest.fail("fitted again"))
    assert run(tmp_path, merged=[2]).records == table.records
    lines = (tmp_path / "out/results.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == list(table.records)
    with pytest.raises(MergeError, match="holds results of other settings"):
        run(tmp_path, merged=[2], batches=3)


def test_corrections_that_no_weight_can_hold_are_measured_too(tmp_path, monkeypatch):
    from lightning_merge.repair import folding

    arms = {name: ARMS[name] for name in ("naive", "naive + TACT")}
    folded = run(tmp_path, merged=[2], arms=arms)
    monkeypatch.setattr(folding, "_home", lambda *_: None)
    (tmp_path / "out/seed 0/merged/2/done").unlink()
    inserted = run(tmp_path, merged=[2], arms=arms)
    for one, other in zip(folded.records, inserted.records, strict=True):
        assert one["accuracy"] == pytest.approx(other["accuracy"], abs=0.006)


def test_the_validation_split_is_tested_on_where_that_is_asked_for(tmp_path, monkeypatch):
    from lightning_merge.evaluation.benchmark import foundations_models

    seen = []
    monkeypatch.setattr(
        foundations_models,
        "evaluate_candidates",
        lambda trainer, model, data, rows: seen.append(data.test_on) or [{"row": row, "accuracy": 1.0} for row in rows],
    )
    run(tmp_path, merged=[2], arms={"naive": ARMS["naive"]}, test_on="val")
    assert set(seen) == {"val"}


def test_a_failed_fit_does_not_change_the_seed_of_the_next_run(tmp_path, monkeypatch):
    from lightning_merge.evaluation.benchmark import foundations

    def fail(*_, **__):
        raise RuntimeError("power cut")

    monkeypatch.setattr(foundations, "fit_expert", fail)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="power cut"):
            run(tmp_path, merged=[2], seeds=[3])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": ["halves", "upright"]}, "fitted on 'upright', which an expert is of"),
        ({"domains": ["faces"]}, "no task 'faces'"),
        ({"domains": []}, "Say what the foundations are fitted on"),
        ({"merged": [9]}, r"how many of the 3 tasks are merged; got \[9\]"),
        ({"arms": {}}, "no way to merge to compare"),
        ({"count": 0}, "1 to 26 foundations, not 0"),
        ({"seeds": []}, "at least one seed"),
        ({"private": ["classifier.*"]}, "No parameter of the model matches foundations.private"),
        ({"methods": {}}, "no methods to compare"),
        ({"methods": {"AdaMerging": AdaMerging()}}, "'AdaMerging' needs statistics or images"),
        ({"tasks": ["halves", "halves"]}, "domains holds a value twice"),
        ({"batch_size": 1}, "batch_size at least 2"),
        ({"arms": {"aligned": Arm(repair=Repair(by="batch_norm"))}}, "no BatchNorm with running statistics"),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_written(tmp_path, changes, message):
    with pytest.raises(MergeError, match=message):
        run(tmp_path, **({"trainer": {}} | changes))
    assert not (tmp_path / "out").exists()


def test_all_problems_are_said_at_once(tmp_path):
    with pytest.raises(MergeError) as info:
        run(tmp_path, methods={}, domains=["faces"], arms={}, seeds=[1, 1], private=["classifier.*"])
    starts = [
        "There is no task 'faces'",
        "There are no methods",
        "There is no way",
        "foundations.seeds holds",
        "No para",
    ]
    assert [next(start for start in starts if problem.startswith(start)) for problem in info.value.problems] == starts
