"""The jobs of a benchmark: markers, settings, seeds, and what is sent to another process."""

from __future__ import annotations

import json
import logging
import os
import pickle
import random
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger

import lightning_merge as lm
from lightning_merge.evaluation import jobs
from lightning_merge.evaluation.benchmark.records import HeldOut
from lightning_merge.evaluation.jobs import Job, JobList
from lightning_merge.utilities.errors import MergeError
from tests.toys import quiet_trainer, tiny_expert


class Noted(Callback):
    """A callback with a setting."""

    def __init__(self, text: str) -> None:
        self.text = text


class Positional(lm.MergeTrainer):
    """A trainer with an argument that has no name when it is called."""

    def __init__(self, epochs: int, **arguments) -> None:
        super().__init__(max_epochs=epochs, **arguments)


@dataclass
class Two(JobList):
    """A benchmark of two jobs that write their names, the second after the first."""

    trainer: lm.MergeTrainer
    output: Path
    names: tuple[str, ...] = ("first", "second")

    def jobs(self) -> list[Job]:
        first, second = self.names
        return [
            Job(first, partial(self.write, first), (self.output / first).exists),
            Job(second, partial(self.write, second), (self.output / second).exists, [first]),
        ]

    def write(self, name: str) -> None:
        self.output.mkdir(exist_ok=True)
        (self.output / name).write_text(f"{name}, {self.trainer.max_epochs} epochs")


def send(benchmark: JobList) -> JobList:
    """Send a benchmark as to another process."""
    return pickle.loads(pickle.dumps(benchmark))


def test_a_marker_says_what_was_found():
    folder = Path("job")
    assert not jobs.is_done(folder)
    assert jobs.read_done(folder) == {}
    jobs.mark_done(folder, {"seconds": 1.5})
    assert jobs.is_done(folder)
    assert jobs.read_done(folder) == {"seconds": 1.5}


@pytest.mark.parametrize("text", ["{", "[]", '{"records": {}}', '{"records": [{"row": "x"}]}', '{"updates": [1]}'])
def test_a_marker_of_another_shape_says_how_to_go_on(text):
    folder = Path("job")
    jobs.mark_done(folder, {"records": []})
    (folder / "done").write_text(text)
    remedy = "delete it, and the benchmark does this part again"
    with pytest.raises(MergeError, match=rf"job/done is no record of what a benchmark has done: .*; {remedy}\.$"):
        jobs.read_done(folder, HeldOut)


def test_settings_of_another_shape_are_no_traceback():
    Path("out").mkdir()
    Path("out/settings.json").write_text("[1]")
    with pytest.raises(MergeError, match=r"settings\.json is no record of a benchmark's settings: .*choose another"):
        jobs.claim_output(Path("out"), {"a": 1}, write=True)


def test_a_job_starts_from_its_seed_whatever_ran_before():
    drawn = []

    def draw() -> None:
        drawn.append((random.random(), float(torch.rand(()))))
        os.environ["PL_GLOBAL_SEED"] = "99"

    for _ in range(2):
        torch.rand(3)
        jobs.do_job(Job("draw", draw, lambda: False), seed=5)
        assert os.environ["PL_GLOBAL_SEED"] == "5"
    assert drawn[0] == drawn[1]
    jobs.do_job(Job("draw", draw, lambda: False), seed=6)
    assert drawn[2] != drawn[0]


def test_what_is_done_is_not_done_again():
    jobs.do_job(Job("done", lambda: pytest.fail("done again"), lambda: True), seed=0)


def test_settings_are_claimed_once_and_compared_afterwards():
    output, settings = Path("out"), {"model": {"depth": 1}, "seed": 0}
    jobs.claim_output(output, settings, write=False)
    assert not (output / "settings.json").exists()
    jobs.claim_output(output, settings, write=True)
    assert json.loads((output / "settings.json").read_text()) == settings
    jobs.claim_output(output, settings, write=True)
    with pytest.raises(lm.MergeError, match=r"model\.depth was 1, is 2"):
        jobs.claim_output(output, settings | {"model": {"depth": 2}}, write=True)
    assert json.loads((output / "settings.json").read_text()) == settings


def test_settings_follow_weights_and_arguments_and_not_where_it_runs():
    model, data = tiny_expert(), lm.Digits()

    def settings(trainer, model=model):
        return jobs.settings_of(trainer, model, data)

    first = settings(quiet_trainer(max_epochs=3))
    assert first == settings(quiet_trainer(max_epochs=3, default_root_dir="elsewhere", log_every_n_steps=1))
    assert first["trainer"] == {"max_epochs": 3}
    assert first != settings(quiet_trainer(max_epochs=4))
    other = tiny_expert()
    other.load_state_dict({name: tensor + 1 for name, tensor in model.state_dict().items()})
    assert first["weights"] != settings(quiet_trainer(max_epochs=3), other)["weights"]


class TestSent:
    """A benchmark that is sent to another process."""

    def test_its_trainer_is_built_again_from_the_same_arguments(self):
        trainer = quiet_trainer(max_epochs=3, gradient_clip_val=0.5, limit_val_batches=2)
        sent = send(Two(trainer, Path("out"))).trainer
        assert sent is not trainer
        assert type(sent) is lm.MergeTrainer
        assert sent.arguments == trainer.arguments | {"callbacks": []}
        assert (sent.max_epochs, sent.gradient_clip_val, sent.limit_val_batches) == (3, 0.5, 2)

    def test_its_trainer_keeps_its_class_and_positional_arguments(self):
        sent = send(Two(Positional(4, accelerator="cpu", devices=1, logger=False), Path("out"))).trainer
        assert type(sent) is Positional
        assert sent.positional == (4,)
        assert sent.max_epochs == 4

    def test_callbacks_go_along_and_loggers_do_not(self):
        callback, logger = Noted("kept"), CSVLogger("logs")
        trainer = quiet_trainer(callbacks=[callback], logger=logger)
        sent = send(Two(trainer, Path("out"))).trainer
        (copied,) = sent.given_callbacks
        assert isinstance(copied, Noted)
        assert copied is not callback
        assert copied.text == "kept"
        assert copied in sent.callbacks
        assert sent.given_loggers == []
        assert sent.loggers == []
        assert trainer.given_callbacks == [callback]  # the one that was sent is as before
        assert trainer.loggers == [logger]

    def test_its_fields_and_jobs_are_the_same(self):
        benchmark = Two(quiet_trainer(max_epochs=3), Path("out"), ("a", "b"))
        sent = send(benchmark)
        assert (sent.output, sent.names) == (Path("out"), ("a", "b"))
        assert [(job.name, list(job.after)) for job in sent.jobs()] == [("a", []), ("b", ["a"])]

    def test_its_jobs_are_done_there_and_seen_here(self):
        benchmark = Two(quiet_trainer(max_epochs=3), Path("out"))
        for job in send(benchmark).jobs():
            jobs.do_job(job, seed=0)
        assert all(job.done() for job in benchmark.jobs())
        assert Path("out/second").read_text() == "second, 3 epochs"


def test_lightning_is_quiet_during_a_job_only():
    logger = logging.getLogger("lightning.pytorch")
    before = logger.level
    with jobs.quiet_lightning():
        assert logger.level == logging.WARNING
    assert logger.level == before
