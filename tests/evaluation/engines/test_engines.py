"""What is the same for every engine: what they refuse, and how they are named."""

from __future__ import annotations

import pickle
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer

import lightning_merge as lm
from lightning_merge.evaluation.benchmark.foundations import FoundationsBenchmark
from lightning_merge.evaluation.benchmark.leave_one_out import Benchmark
from lightning_merge.evaluation.benchmark.options import Arm, Foundations
from lightning_merge.evaluation.engines import Ray, Sequential, Slurm, make_engine
from lightning_merge.evaluation.engines.elsewhere import Elsewhere
from lightning_merge.evaluation.engines.parcels import Parcel, clear, send, withdraw
from lightning_merge.evaluation.jobs import settings_of
from lightning_merge.merging.repairing import Repair
from lightning_merge.methods import SCORE
from lightning_merge.trainer.cli import main
from tests.conftest import ROOT
from tests.evaluation.engines.toys import Note, run
from tests.toys import digit_tasks, quiet_trainer, tiny_expert, tiny_vgg


def benchmark(**changes):
    settings = {"trainer": quiet_trainer(max_epochs=1, limit_train_batches=2, callbacks=[Note()]), "methods": {}}
    settings |= {"model": tiny_expert(), "datamodule": lm.Digits(), "domains": ["noisy", "thick"]}
    return Benchmark(**{**settings, "output": Path("out"), **changes})


def parcel(name="expert noisy", **changes):
    return Parcel(**{"name": name, "seed": 3, "threads": 1, "folder": Path("sent").absolute(), **changes})


def test_an_engine_is_named_or_given():
    assert make_engine(None) == Sequential()
    assert make_engine("ray") == Ray()
    assert make_engine("slurm") == Slurm()
    assert make_engine(Ray(cpus=2)) == Ray(cpus=2)


@pytest.mark.parametrize(
    ("arguments", "engine"),
    [
        (["--engine=ray"], Ray()),
        (["--engine=Ray", "--engine.cpus=2", "--engine.address=auto"], Ray(cpus=2, address="auto")),
        (["--config=engine.yaml", "--engine.time=5"], Slurm(cluster="local", memory=2.0, more={"qos": "high"}, time=5)),
    ],
)
def test_on_the_command_line_and_in_a_file(monkeypatch, arguments, engine):
    Path("engine.yaml").write_text(
        "engine: {class_path: Slurm, init_args: {cluster: local, memory: 2, more: {qos: high}}}\n"
    )
    seen = []
    monkeypatch.setattr(Benchmark, "run", lambda self: seen.append(self.engine))
    monkeypatch.setattr(lm.MergeTrainer, "_publish", lambda *_: None)  # there is no table
    main(["benchmark", f"--config={ROOT / 'configs/benchmark/digits.yaml'}", *arguments])
    assert seen == [engine]


def test_what_an_engine_refuses(monkeypatch):
    engine = Ray() if "ray" in sys.modules else Slurm(cluster="local")
    pytest.importorskip(engine.package)
    with pytest.raises(lm.MergeError, match="each in one process, and the trainer has 2"):
        engine.check(quiet_trainer(devices=2, strategy="ddp_fork"))
    with pytest.raises(lm.MergeError, match="takes at least 1 for cpus"):
        type(engine)(cpus=0).check(quiet_trainer())
    trainer = quiet_trainer()
    monkeypatch.setattr(type(trainer.strategy), "root_device", torch.device("cuda"))
    with pytest.raises(lm.MergeError, match="gives its jobs none; set gpus of the engine to 1"):
        engine.check(trainer)
    monkeypatch.setitem(sys.modules, engine.package, None)
    with pytest.raises(lm.MergeError, match=rf"pip install 'lightning_merge\[{type(engine).__name__.lower()}\]'"):
        run(engine)
    assert not Path("out").exists()


class TestParcels:
    @pytest.fixture(autouse=True)
    def _cloudpickle(self):
        pytest.importorskip("cloudpickle")

    def test_a_job_is_done_from_what_was_sent(self):
        send(benchmark(), Path("sent"))
        outcome = parcel()()
        assert outcome.error is None
        assert Path("out/experts/noisy/done").exists()
        before = Path("fits.txt").read_text()
        assert parcel()().error is None  # it is done
        assert Path("fits.txt").read_text() == before
        clear(Path("sent"))
        assert not Path("sent").exists()

    def test_an_error_is_told_and_not_raised(self):
        send(benchmark(), Path("sent"))
        outcome = parcel("held out noisy")()  # without experts
        assert (outcome.known, "expert.ckpt" in outcome.error) == (True, True)
        outcome = parcel("nonsense")()
        assert (outcome.known, "Traceback" in outcome.error) == (False, True)
        elsewhere = parcel(cwd=Path("/nowhere"))()
        assert "There is no folder /nowhere on" in elsewhere.error

    def test_the_trainer_keeps_what_it_was_given_by_position(self):
        class Theirs(Trainer):
            def __init__(self, epochs, **rest):
                super().__init__(max_epochs=epochs, **rest)

        class Ours(lm.MergeTrainer, Theirs):
            pass

        trainers = [Ours(epochs, accelerator="cpu", devices=1, logger=False) for epochs in (3, 5)]
        cloudpickle = pytest.importorskip("cloudpickle")
        sent = pickle.loads(cloudpickle.dumps(benchmark(trainer=trainers[0])))
        assert sent.trainer.max_epochs == 3
        settings = [settings_of(trainer, tiny_expert(), lm.Digits())["trainer"] for trainer in trainers]
        assert settings[0] != settings[1]

    def test_modules_are_the_driver_s(self, monkeypatch):
        send(benchmark(), Path("sent"))
        first = [str(Path("project").absolute()), *sys.path]
        monkeypatch.setattr(sys, "path", [*sys.path])
        parcel(path=first)()
        assert sys.path == first

    def test_after_a_failure_nothing_begins(self):
        send(benchmark(), Path("sent"))
        withdraw(Path("sent"))
        assert "another job has failed" in parcel()().error
        assert not Path("out").exists()

    def test_a_worker_that_is_taken_away_says_so(self, monkeypatch):
        send(benchmark(), Path("sent"))
        monkeypatch.setattr(Note, "on_train_start", lambda *_: (_ for _ in ()).throw(TimeoutError("over")))
        assert "TimeoutError" in parcel()().error
        with pytest.raises(TimeoutError):
            parcel(withdrawals=(TimeoutError,))()

    def test_what_cannot_be_sent(self):
        model = tiny_expert()
        model.lock = (i for i in range(3))
        with pytest.raises(lm.MergeError, match=r"cannot be sent to another process: .*generator"):
            send(benchmark(model=model), Path("sent"))


def test_experts_of_several_foundations_wait_for_their_own():
    options = Foundations(["upright"], {"aligned": Arm()}, merged=[2, 3], seeds=[0, 1])
    domains = ["rotated", "noisy", "thick"]
    jobs = FoundationsBenchmark(
        quiet_trainer(), tiny_expert(), lm.Digits(), {"SCORE": SCORE()}, Path("out"), domains, options
    ).jobs()
    after = {job.name: list(job.after) for job in jobs}
    assert after["seed 0, foundation a"] == []
    assert after["seed 1, expert noisy"] == ["seed 1, foundation b"]
    assert after["seed 1, expert thick"] == ["seed 1, foundation a"]
    foundations = ["seed 0, foundation a", "seed 0, foundation b"]
    assert after["seed 0, 2 tasks"] == [*foundations, "seed 0, expert rotated", "seed 0, expert noisy"]
    assert len(after["seed 1, 3 tasks"]) == 5


class Here(Elsewhere):
    """Sends jobs to this process."""

    package = "cloudpickle"

    @contextmanager
    def workers(self, output):
        yield self

    def hand_out(self, parcels):
        return [(parcel.name, parcel()) for parcel in parcels]

    def wait(self, handles):
        return [(handle, handle[1]) for handle in handles]


def test_several_foundations_are_sent_as_well(tmp_path):
    pytest.importorskip("cloudpickle")
    data = lm.TaskArrays(str(digit_tasks(tmp_path / "tasks")), image_size=8, channels=1, batch_size=64)
    options = Foundations(["upright"], {"aligned": Arm(repair=Repair())}, batches=2, batch_size=32)
    records = [
        quiet_trainer(max_epochs=1, limit_train_batches=2)
        .benchmark(
            tiny_vgg(),
            data,
            methods={"SCORE": SCORE()},
            output=type(engine).__name__,
            foundations=options,
            engine=engine,
            report=False,
        )
        .records
        for engine in (None, Here())
    ]
    assert records[0] == records[1]
    assert len(records[0]) == 2
