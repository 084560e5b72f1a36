"""The leave-one-domain-out benchmark: what it measures, and that it goes on where it stopped."""

from __future__ import annotations

import json
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

import lightning_merge as lm
from lightning_merge.evaluation import evaluate_candidates, search_coefficients
from lightning_merge.evaluation.benchmark.options import Pretrain
from lightning_merge.evaluation.statistics.collect import Recipe
from lightning_merge.methods import SCORE, ConsensusTA, Fisher, MaTS, RegMean, TaskArithmetic, WeightAverage
from tests.conftest import isolated
from tests.toys import image_folders, quiet_trainer, tiny_expert

DOMAINS = ["rotated", "noisy", "thick"]
METHODS = {"average": WeightAverage(), "SCORE": SCORE()}


def run(methods=METHODS, **arguments):
    from lightning.pytorch import seed_everything

    seed_everything(3, verbose=False)
    settings = {"learning_rate": 3e-3, "warmup_steps": 5} | arguments.pop("model", {})
    pretrain = Pretrain(["upright"], max_epochs=2, hparams={"learning_rate": 0.01})
    trainer = quiet_trainer(**{"max_epochs": 1, "limit_train_batches": 10, **arguments.pop("trainer", {})})
    arguments = {"domains": DOMAINS, "pretrain": pretrain, "output": "out", "report": False, **arguments}
    return trainer.benchmark(tiny_expert(**settings), lm.Digits(batch_size=64), methods=methods, **arguments)


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """The folder of a benchmark that was run once for all tests, and its table."""
    folder = tmp_path_factory.mktemp("first")
    with isolated(folder):
        return folder / "out", run()


@pytest.fixture
def done(first):
    """The table of a benchmark that has just written to ``out``: a copy of the first."""
    shutil.copytree(first[0], "out")
    return first[1]


@pytest.fixture
def fitted(first) -> None:
    """A base and experts in ``out``, and nothing measured yet."""
    for part in ("base", "experts"):
        shutil.copytree(first[0] / part, Path("out") / part)


def test_every_number_is_that_of_a_merge_by_hand(done):
    table = done
    weights = {d: lm.open_weights(f"out/experts/{d}") for d in DOMAINS}
    others = {d: weights[d] for d in ("rotated", "thick")}
    by_hand = lm.merge("out/base", others, SCORE()).weights
    data = lm.Digits(test_domains=["noisy"])
    rows = {"SCORE": by_hand, "own expert": dict(weights["noisy"]), "base": dict(lm.open_weights("out/base"))}
    for record in evaluate_candidates(quiet_trainer(), tiny_expert(), data, rows):
        assert table.value(record["row"], "noisy") == record["accuracy"]
    pair = {domain: dict(source) for domain, source in others.items()}
    ensemble = evaluate_candidates(quiet_trainer(), tiny_expert(), data, pair, {"both": list(pair)})[-1]
    assert table.value("logit ensemble", "noisy") == ensemble["accuracy"]
    assert table.row_names == ["base", "average", "SCORE", "logit ensemble", "own expert"]
    assert table.domains == DOMAINS
    assert Path("out/table.md").read_text().startswith(table.markdown())
    base = lm.open_weights("out/base")
    assert not torch.equal(base["head.weight"], weights["noisy"]["head.weight"])


def test_the_same_seed_gives_the_same_numbers_and_an_interrupted_run_goes_on(first, monkeypatch):
    whole_results = (first[0] / "results.jsonl").read_text()

    from lightning_merge.evaluation.benchmark import leave_one_out as benchmark

    calls = []
    evaluate = benchmark.evaluate_domain

    def interrupted(*args, **kwargs):
        calls.append(args[3])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return evaluate(*args, **kwargs)

    monkeypatch.setattr(benchmark, "evaluate_domain", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run()
    assert sorted(p.parent.name for p in Path("out/held_out").glob("*/done")) == ["rotated"]
    experts = {p: p.stat().st_mtime_ns for p in Path("out").glob("*/**/expert.ckpt")}
    table = run()
    assert calls == ["rotated", "noisy", "noisy", "thick"]
    assert experts == {p: p.stat().st_mtime_ns for p in experts}
    assert table.markdown() == first[1].markdown()
    assert _without_times(Path("out/results.jsonl").read_text()) == _without_times(whole_results)


def _without_times(text: str) -> list[dict]:
    return [{k: v for k, v in json.loads(line).items() if k != "merge_seconds"} for line in text.splitlines()]


@pytest.mark.usefixtures("done")
def test_a_new_method_costs_only_itself():
    before = _without_times(Path("out/results.jsonl").read_text())
    table = run({**METHODS, "arithmetic": TaskArithmetic()})
    after = _without_times(Path("out/results.jsonl").read_text())
    assert [r for r in after if r["row"] != "arithmetic"] == before
    assert "arithmetic" in table.row_names
    changed = run({"average": WeightAverage(scale=0.5), "SCORE": SCORE()})
    assert changed.row_names == ["base", "average", "SCORE", "logit ensemble", "own expert"]
    assert changed.value("average", "noisy") is not None
    assert "scale" in Path("out/results.jsonl").read_text()


def test_jobs_do_not_depend_on_those_before_them(first):
    weights = dict(lm.open_weights(first[0] / "experts/thick"))
    run(domains=["thick", "noisy"])
    again = lm.open_weights("out/experts/thick")
    assert all(torch.equal(again[name], tensor) for name, tensor in weights.items())


@pytest.mark.usefixtures("done")
def test_a_base_that_was_not_finished_is_fitted_from_the_start():
    before = dict(lm.open_weights("out/base"))
    Path("out/base/done").unlink()
    run()
    assert all(torch.equal(lm.open_weights("out/base")[name], tensor) for name, tensor in before.items())


@pytest.mark.skipif(sys.platform == "win32", reason="there is no fork")
def test_two_processes_give_the_table_of_one(first):
    two = run(trainer={"devices": 2, "strategy": "ddp_fork"})
    assert two.markdown() == first[1].markdown()


def test_the_checkpoint_that_was_monitored_is_the_expert():
    checkpoint = ModelCheckpoint(monitor="val/accuracy", mode="max", filename="best", save_weights_only=True)
    run(domains=["noisy", "thick"], trainer={"callbacks": [checkpoint], "max_epochs": 3, "enable_checkpointing": True})
    (best,) = Path("out/experts/noisy").rglob("best.ckpt")
    expert = lm.open_weights("out/experts/noisy/expert.ckpt")
    assert all(torch.equal(expert[name], tensor) for name, tensor in lm.open_weights(best).items())


def test_a_start_with_other_weights_is_another_setting():
    settings = {"methods": METHODS, "output": "out", "domains": ["noisy", "thick"], "report": False}
    trainer = quiet_trainer(max_epochs=1, limit_train_batches=2)
    torch.manual_seed(1)
    trainer.benchmark(tiny_expert(), lm.Digits(), **settings)
    torch.manual_seed(2)
    with pytest.raises(lm.MergeError, match="weights was"):
        trainer.benchmark(tiny_expert(), lm.Digits(), **settings)


def test_hyper_parameters_of_the_base_take_effect():
    run(pretrain=Pretrain(["upright"], hparams={"freeze_head": True}))
    assert not lm.open_weights("out/base")["head.weight"].any()


@pytest.mark.usefixtures("fitted")
def test_a_row_that_asks_for_it_is_searched_on_the_domains_that_are_merged(monkeypatch):
    read = []
    split = lm.Digits.split
    monkeypatch.setattr(lm.Digits, "split", lambda self, d, s: read.append((d, s)) or split(self, d, s))
    grid = {"scale": [0.5, 1.0, 1.5]}
    run(search={"average": grid})
    records = {(r["row"], r["domain"]): r for r in map(json.loads, Path("out/results.jsonl").read_text().splitlines())}
    weights = {d: lm.open_weights(f"out/experts/{d}") for d in DOMAINS}
    for domain in DOMAINS:
        others = {d: weights[d] for d in DOMAINS if d != domain}
        read.clear()
        trainer = quiet_trainer(limit_train_batches=10)
        found = search_coefficients(
            trainer, tiny_expert(), lm.Digits(batch_size=64), "out/base", others, WeightAverage(), grid
        )
        assert set(read) == {(d, "val") for d in others}
        record = records["average", domain]
        assert (record["grid"], record["chosen"]) == (grid, found.setting)
        data = lm.Digits(test_domains=[domain])
        alone = evaluate_candidates(quiet_trainer(), tiny_expert(), data, {"found": found.merged.weights})
        assert record["accuracy"] == alone[0]["accuracy"]
        assert "chosen" not in records["SCORE", domain]

    read.clear()
    run(search={"average": grid})
    assert "val" not in {s for _, s in read}  # it was done already
    run(search={"average": {"scale": [0.5]}})
    again = [json.loads(line) for line in Path("out/results.jsonl").read_text().splitlines()]
    assert [r["chosen"] for r in again if r["row"] == "average"] == [{"scale": 0.5}] * 3
    assert [r for r in again if r["row"] == "SCORE"] == [r for (row, _), r in records.items() if row == "SCORE"]


@pytest.mark.usefixtures("done")
def test_results_of_other_settings_are_never_mixed():
    with pytest.raises(lm.MergeError, match=r"model\.learning_rate was 0\.003, is 0\.1.*another output folder"):
        run(model={"learning_rate": 0.1})


def test_a_held_out_domain_as_a_whole():
    quiet_trainer(max_epochs=1, limit_train_batches=2).benchmark(
        tiny_expert(),
        lm.Digits(test_on="all"),
        methods={"average": WeightAverage()},
        output="out",
        report=False,
        domains=["noisy", "thick"],
    )
    tested = {(r["row"], r["test_on"]) for r in map(json.loads, Path("out/results.jsonl").read_text().splitlines())}
    assert ("own expert", "test") in tested  # it has seen the rest
    assert ("average", "all") in tested
    assert "all of it" in Path("out/table.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"domains": ["noisy"]}, "needs at least two"),
        ({"domains": ["noisy", "nosy"]}, "no domain 'nosy'"),
        ({"domains": ["nosy"]}, "no domain 'nosy'"),
        ({"domains": ["noisy", "upright"]}, "fitted on 'upright', which is held out"),
        ({"methods": {}}, "no methods to compare"),
        ({"methods": {"base": SCORE()}}, "'base' is there anyway"),
        ({"methods": {"three": ConsensusTA(k=3)}}, "2 experts are merged at a time, which is not for 'three'"),
        ({"search": {"SCOR": {}}}, "no method 'SCOR' to search; the methods are average, SCORE"),
        ({"search": {"SCORE": {"z": [-1.0]}}}, "z must lie in"),
        ({"pretrain": Pretrain(["upright"], hparams={"lr": 1})}, "no hyper-parameter 'lr'"),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_written(arguments, message):
    with pytest.raises(lm.MergeError, match=message):
        run(**arguments)
    assert not Path("out").exists()


def test_all_problems_are_said_at_once():
    pretrain = Pretrain(["nosy", "noisy"], hparams={"lr": 1})
    with pytest.raises(lm.MergeError) as info:
        run({"base": SCORE(), "three": ConsensusTA(k=3)}, pretrain=pretrain, search={"SCOR": {}})
    assert [problem.split(";")[0].split(", which")[0] for problem in info.value.problems] == [
        "There is no domain 'nosy'",
        "The base would be fitted on 'noisy'",
        "The model has no hyper-parameter 'lr' to change for the base",
        "The row 'base' is there anyway, for what merged models are compared with",
        "With 3 domains 2 experts are merged at a time",
        "There is no method 'SCOR' to search",
    ]


@pytest.mark.usefixtures("fitted")
def test_methods_that_need_statistics_are_rows_like_any_other():
    methods = {"average": WeightAverage(), "RegMean": RegMean(), "Fisher": Fisher()}
    table = run(methods, statistics=Recipe(fisher="batch", labels="true", batches=3))
    assert table.row_names[:4] == ["base", *methods]
    files = {d: Path(f"out/experts/{d}/expert.statistics.safetensors") for d in DOMAINS}
    others = {d: f"out/experts/{d}" for d in ("rotated", "thick")}
    by_hand = lm.merge("out/base", others, RegMean(), statistics={d: files[d] for d in others}).weights
    record = evaluate_candidates(quiet_trainer(), tiny_expert(), lm.Digits(test_domains=["noisy"]), {"R": by_hand})[0]
    assert table.value("RegMean", "noisy") == record["accuracy"]
    header = lm.open_weights(files["noisy"]).header["statistics"]
    assert (header["kinds"], header["examples"], header["fisher"]) == (
        ["gram", "fisher"],
        188,
        "batch",
    )  # of 1,257 in 20 even batches

    times = {file: file.stat().st_mtime_ns for file in files.values()}
    again = run(
        methods | {"more": RegMean(reduce_off_diagonal=0.5)},
        statistics=Recipe(fisher="batch", labels="true", batches=3),
    )
    assert times == {file: file.stat().st_mtime_ns for file in times}  # once
    assert again.values("RegMean") == table.values("RegMean")
    run({"MaTS": MaTS(iterations=2)}, statistics=Recipe(fisher="batch", labels="true", batches=3))
    assert lm.open_weights(files["noisy"]).header["statistics"]["kinds"] == ["gram", "gram_out"]


def test_an_unreadable_image_is_found_before_anything_is_fitted(tmp_path):
    root = image_folders(tmp_path / "data")
    broken = root / "sketch" / "dog" / "03.jpg"
    broken.write_bytes(broken.read_bytes()[:100])
    shape = {"size": (8, 8), "mean": (0.5,) * 3, "std": (0.5,) * 3}
    with pytest.raises(lm.MergeError, match=r"03\.jpg cannot be read"):
        quiet_trainer(max_epochs=1).benchmark(
            tiny_expert(num_classes=2), lm.DomainFolders(str(root), **shape), methods=METHODS, output="out"
        )
    assert not Path("out").exists()


class Interrupt(Callback):
    """Ctrl-C in the second batch."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 1:
            raise KeyboardInterrupt


def test_an_interrupted_fit_leaves_no_expert_and_says_how_to_go_on(caplog):
    handler = signal.getsignal(signal.SIGINT)
    try:
        with caplog.at_level("INFO"), pytest.raises((KeyboardInterrupt, SystemExit)):
            run(trainer={"callbacks": [Interrupt()]})
    finally:
        signal.signal(signal.SIGINT, handler)  # Lightning lets it be ignored
    assert "interrupted in base; the same command goes on there" in caplog.text
    assert not [path for path in Path("out").rglob("*") if path.name == "done" or path.suffix == ".ckpt"]
