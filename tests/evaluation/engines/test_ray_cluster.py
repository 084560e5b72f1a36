"""The benchmark on a Ray cluster of this machine."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

import lightning_merge as lm
from lightning_merge.evaluation.engines import Ray, ray_cluster
from tests.evaluation.engines.toys import Die, Fail, fits, results, run

ray = pytest.importorskip("ray")


@pytest.fixture(scope="module", autouse=True)
def _cluster():
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=80 * 2**20,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    yield
    ray.shutdown()


def test_a_killed_worker_costs_its_job_and_no_digit(alone, monkeypatch, caplog):
    before, table = alone
    with caplog.at_level("INFO", logger="lightning.pytorch"):
        on_ray = run("ray", Die())
    assert on_ray.markdown() == table.markdown()
    assert results("out") == results(before)
    for expert in ("experts/rotated", "experts/noisy"):
        one, other = (dict(lm.open_weights(output / expert)) for output in (before, Path("out")))
        assert all((one[name] == other[name]).all() for name in one)
    assert fits() == ["noisy", "noisy", "rotated"]
    assert "expert noisy has lost its worker and is handed out again (1 of 3)" in caplog.text
    assert not Path("out/engine").exists()

    monkeypatch.setattr(ray_cluster._RayWorkers, "hand_out", lambda *_: pytest.fail("done again"))
    assert run("ray", Die()).markdown() == table.markdown()


def test_a_job_that_fails_stops_the_benchmark_and_leaves_what_is_finished():
    with pytest.raises(lm.MergeError, match=r"The job 'expert noisy' has failed: the noise is too loud$"):
        run(Ray(), Fail())
    assert fits() == ["noisy", "rotated"]
    assert not Path("out/engine").exists()
    assert not Path("out/held_out").exists()
    Path("mended").touch()
    run(Ray(), Fail())
    assert fits() == ["noisy", "noisy", "rotated"]


def test_what_no_machine_has_is_not_waited_for():
    with pytest.raises(lm.MergeError, match=r"wants 64 CPU cores and 0 GPUs, and no machine .*: 2 and 0"):
        run(Ray(cpus=64))
    with pytest.raises(lm.MergeError, match=r"wants 1 CPU cores and 1 GPUs"):
        run(Ray(gpus=1))
