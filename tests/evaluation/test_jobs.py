"""The jobs of a benchmark: markers, settings, seeds, and what is sent to another process."""

from __future__ import annotations

import json
import logging
import os
import pickle
import random
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import lightning_merge as lm
from lightning_merge.evaluation import jobs
from lightning_merge.evaluation.jobs import Job, JobList
from tests.toys import quiet_trainer, tiny_expert


@dataclass
class Empty(JobList):
    """A benchmark without a job."""

    trainer: lm.MergeTrainer
    output: Path

    def jobs(self) -> list[Job]:
        return []


def test_a_marker_says_what_was_found():
    folder = Path("job")
    assert not jobs.is_done(folder)
    assert jobs.read_done(folder) == {}
    jobs.mark_done(folder, {"seconds": 1.5})
    assert jobs.is_done(folder)
    assert jobs.read_done(folder) == {"seconds": 1.5}


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


def test_a_benchmark_takes_its_trainer_to_another_process():
    sent = pickle.loads(pickle.dumps(Empty(quiet_trainer(max_epochs=3), Path("out"))))
    assert sent.output == Path("out")
    assert isinstance(sent.trainer, lm.MergeTrainer)
    assert sent.trainer.max_epochs == 3


def test_lightning_is_quiet_during_a_job_only():
    logger = logging.getLogger("lightning.pytorch")
    before = logger.level
    with jobs.quiet_lightning():
        assert logger.level == logging.WARNING
    assert logger.level == before
