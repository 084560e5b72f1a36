"""Candidates beside the current weights: the numbers of separate runs, on any number of processes."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning_merge.callbacks import CompareMerged
from torch.utils.data import DataLoader

import lightning_merge as lm
from lightning_merge.methods import SCORE, RegMean, WeightAverage
from tests.own_project import Classifier, data, loader, plain, processes, quiet, save, weights

BASE = {"base": "0.ckpt", "experts": ["1.ckpt", "2.ckpt"]}


def compare(callback, loaders=None, module=None, stage="test", **arguments) -> dict[str, float]:
    """Everything that is logged."""
    trainer = quiet(callbacks=[callback], **arguments)
    run = trainer.test if stage == "test" else trainer.validate
    if module is None:
        module = Classifier()
        module.load_state_dict(weights(0))
    logged = {}
    for results in run(module, loaders or loader(), verbose=False):
        logged |= results
    return logged


def alone(state, stage="test", loaders=None) -> dict[str, float]:
    module = Classifier()
    module.load_state_dict(state)
    trainer, logged = quiet(), {}
    run = trainer.test if stage == "test" else trainer.validate
    for results in run(module, loaders or loader(), verbose=False):
        logged |= plain(results)
    return logged


class Never(Classifier):
    """Fails where it comes to a first batch."""

    def test_step(self, batch, batch_idx):
        raise AssertionError


def row_of(logged, row) -> dict[str, float]:
    return {name.removeprefix(f"{row}/"): value for name, value in logged.items() if name.startswith(f"{row}/")}


@pytest.mark.parametrize("stage", ["test", "validate"])
def test_checkpoints_and_merges_beside_the_current_weights(stage, capsys):
    save(0, 1, 2)
    callback = CompareMerged({"one": "1.ckpt"}, **BASE, methods={"mean": WeightAverage(), "SCORE": SCORE()})
    logged = compare(callback, stage=stage)
    merged = {name: lm.merge("0.ckpt", BASE["experts"], m).weights for name, m in callback.methods.items()}
    states = {"current": weights(0), "one": weights(1), **merged}
    assert [record.pop("row") for record in callback.table] == list(states)
    for record, (row, state) in zip(callback.table, states.items(), strict=True):
        expected = alone(state, stage)
        assert record == pytest.approx(expected, rel=1e-6)
        assert row_of(logged, row) == ({} if row == "current" else pytest.approx(expected, rel=1e-6))
    printed = capsys.readouterr().out
    assert printed.count("| SCORE     |") == 1
    assert all(f"{value:.4g}" in printed for record in callback.table for value in record.values())


@pytest.mark.parametrize("n", [7, 23])
def test_the_same_numbers_on_any_number_of_processes(n):
    save(0, 1, 2)
    callback = CompareMerged({"one": "1.ckpt"}, **BASE, methods={"mean": WeightAverage()})
    expected = compare(callback, loader(n))
    expected |= {f"current/{name}": value for name, value in alone(weights(0), loaders=loader(n)).items()}
    for count in (2, 3):
        logged = compare(callback, loader(n), **processes(count))
        for row in ("current", "one", "mean"):
            found = row_of(logged, row)
            assert found == pytest.approx(row_of(expected, row), rel=1e-6)
            assert found["test/accuracy"] == expected[f"{row}/test/accuracy"]


def test_several_loaders_and_batches_without_repeats_on_two_processes():
    save(0, 1)
    loaders = [loader(5, batch_size=1), loader(9, batch_size=4, seed=1)]
    expected = row_of(compare(CompareMerged({"one": "1.ckpt"}), loaders), "one")
    assert row_of(compare(CompareMerged({"one": "1.ckpt"}), loaders, **processes(2)), "one") == pytest.approx(expected)


def test_digits_on_two_processes():
    """The package's own data module repeats nothing, and its module logs from its hooks."""
    from tests.toys import tiny_vgg

    module = tiny_vgg()
    lm.save_weights("one.ckpt", {k: v + 0.1 * torch.randn_like(v) for k, v in module.state_dict().items()})
    found = []
    for count in (1, 2):
        callback = CompareMerged({"one": "one.ckpt"}, output="table.csv")
        trainer = quiet(callbacks=[callback], **processes(count))
        trainer.test(module, lm.Digits(test_domains=["thick"]), verbose=False)
        found.append(list(csv.DictReader(Path("table.csv").read_text().splitlines())))
    assert [row["candidate"] for row in found[0]] == ["current", "one"]
    assert [row["test/thick/accuracy"] for row in found[0]] == [row["test/thick/accuracy"] for row in found[1]]


def test_candidates_that_only_the_first_process_can_read():
    save(0, 1, 2)
    arguments = {"candidates": {"one": "1.ckpt"}, **BASE, "methods": {"mean": WeightAverage()}}
    expected = compare(CompareMerged(**arguments))

    class Elsewhere(CompareMerged):
        def setup(self, trainer, pl_module, stage):
            if trainer.global_rank:
                self.paths, self.base = {"one": "elsewhere.ckpt"}, "elsewhere.ckpt"
            super().setup(trainer, pl_module, stage)

    logged = compare(Elsewhere(**arguments), **processes(2))
    for row in ("one", "mean"):
        assert row_of(logged, row) == pytest.approx(row_of(expected, row))


def test_more_processes_than_samples():
    save(1)
    with pytest.raises(Exception, match="cannot share out 2 samples over 3 processes; use fewer"):
        compare(CompareMerged({"one": "1.ckpt"}), loader(2), **processes(3))


@pytest.mark.parametrize("hook", ["test_step", "on_test_epoch_end"])
def test_a_step_that_fails_in_one_process_stops_the_others(hook):
    save(1)

    class Fails(Classifier):
        """Fails on one process, with the second weights that it is tested with."""

        tests = 0

        def on_test_start(self):
            type(self).tests += 1

        def fail(self):
            if self.trainer.global_rank == 1 and self.tests == 2:
                raise RuntimeError("out of luck")

        def test_step(self, batch, batch_idx):
            if hook == "test_step":
                self.fail()
            self.evaluate(batch, "test")

        def on_test_epoch_end(self):
            if hook == "on_test_epoch_end":
                self.fail()

    with pytest.raises(Exception, match="out of luck"):
        compare(CompareMerged({"one": "1.ckpt"}), module=Fails(), **processes(2))


def test_every_logger_has_the_rows():
    tensorboard = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    from lightning.pytorch.loggers import TensorBoardLogger

    save(1)
    loggers = [CSVLogger("csv"), TensorBoardLogger("tb")]
    logged = compare(CompareMerged({"one": "1.ckpt"}), logger=loggers)
    rows = list(csv.DictReader(Path(loggers[0].log_dir, "metrics.csv").read_text().splitlines()))
    assert float(rows[-1]["one/test/accuracy"]) == pytest.approx(logged["one/test/accuracy"])
    events = tensorboard.EventAccumulator(loggers[1].log_dir)
    events.Reload()
    assert events.Scalars("one/test/loss")[0].value == pytest.approx(logged["one/test/loss"])


def test_tables_are_written_and_twice_in_one_trainer(capsys):
    save(1)
    callback = CompareMerged({"a | b": "1.ckpt"}, output="tables/table.tex")
    trainer, module = quiet(callbacks=[callback], fast_dev_run=True), Classifier()
    trainer.validate(module, loader(), verbose=False)
    first, callback.output = callback.table, "tables/table.md"
    assert Path("tables/table.tex").read_text() == callback.grid().latex() + "\n"
    trainer.test(module, loader(seed=1), verbose=False)
    assert callback.table[0]["row"] == "current"
    assert "test/accuracy" in callback.table[1]
    assert "val/accuracy" in first[1]
    assert Path("tables/table.md").read_text() == callback.markdown() + "\n"
    assert "a \\| b" in capsys.readouterr().out


def test_the_validations_of_a_fit_are_left_alone_unless_asked_for():
    save(1)
    callback = CompareMerged({"one": "1.ckpt"})
    trainer = quiet(callbacks=[callback])
    trainer.fit(Classifier(), loader(), loader())
    assert callback.table == []
    callback = CompareMerged({"one": "1.ckpt"}, stages=["fit"])
    quiet(callbacks=[callback]).fit(Classifier(), loader(), loader())
    assert callback.table[1].pop("row") == "one"
    assert callback.table[1] == pytest.approx(alone(weights(1), "validate"), rel=1e-6)


def test_a_validation_after_a_fit_has_its_own_loader():
    save(1)
    callback = CompareMerged({"one": "1.ckpt"})
    trainer, module = quiet(callbacks=[callback], limit_train_batches=1), Classifier()
    trainer.fit(module, loader(), loader(9))
    trainer.validate(module, loader(13), verbose=False)
    assert callback.table[1].pop("row") == "one"
    assert callback.table[1] == pytest.approx(alone(weights(1), "validate", loader(13)), rel=1e-6)


def test_every_candidate_reads_the_same_samples_in_the_same_order():
    save(1, 2)
    read = []

    class Counted(torch.utils.data.Dataset):
        def __len__(self):
            return 23

        def __getitem__(self, index):
            read.append(index)
            return data()[index]

    for generator in (None, torch.Generator().manual_seed(3)):
        read.clear()
        shuffled = DataLoader(Counted(), batch_size=4, shuffle=True, generator=generator)
        compare(CompareMerged({"one": "1.ckpt", "two": "2.ckpt"}), shuffled, limit_test_batches=2)
        assert read == read[:8] * 3
        assert len(set(read)) == 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "nothing to compare"),
        ({"candidates": {"current": "1.ckpt"}}, "cannot call a row 'current', which is taken"),
        ({"candidates": {"a": "1.ckpt"}, **BASE, "methods": {"a": SCORE()}}, "cannot call a row 'a'"),
        ({"methods": {"a": SCORE()}}, "give it a base and experts"),
        ({"candidates": {"a": "gone.ckpt"}}, r"no file or folder gone\.ckpt"),
        ({"candidates": {"a": "wide.ckpt", "b": "gone.ckpt"}}, r"(?s)'head.weight' has shape \(3, 16\).*gone\.ckpt"),
        ({"candidates": {"a": "1.ckpt"}, "output": "table.txt"}, r"as \.csv, \.md or \.tex, and not as table\.txt"),
        ({**BASE, "methods": {"a": RegMean()}}, "(?i)statistics"),
    ],
)
def test_what_cannot_work_is_said_before_the_first_batch(arguments, message):
    save(0, 1, 2)
    lm.save_weights("wide.ckpt", Classifier(width=16).state_dict())
    with pytest.raises(lm.MergeError, match=message):
        compare(CompareMerged(**arguments), module=Never())


def test_what_cannot_work_stops_every_process():
    with pytest.raises(Exception, match=r"no file or folder gone\.ckpt"):
        compare(CompareMerged({"a": "gone.ckpt"}), module=Never(), **processes(2))


def test_a_module_that_draws_its_batches_by_itself():
    class Draws(Classifier):
        def test_step(self, dataloader_iter):
            raise AssertionError

    save(1)
    with pytest.raises(lm.MergeError, match="let test_step take a batch"):
        compare(CompareMerged({"one": "1.ckpt"}), module=Draws())
