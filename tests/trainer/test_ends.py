"""Processes that are ended in the midst of their work: at once, in a sentence, with nothing half-written."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch
import yaml

import lightning_merge as lm
from lightning_merge.evaluation.candidates import CandidateEvaluator
from lightning_merge.methods import TaskArithmetic
from lightning_merge.models import Expert
from lightning_merge.trainer.cli import main
from lightning_merge.utilities.locking import LOCK
from tests.toys import TINY_CONVNEXT, tiny_expert
from tests.trainer.test_many_processes import free_port, slurm

pytestmark = pytest.mark.skipif(os.name != "posix", reason="no fork")
PATIENCE = 300  # s; only against processes that hang
CONFIG = {
    "trainer": {
        "accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False, "max_epochs": 1,
        "limit_train_batches": 1, "enable_checkpointing": False, "enable_model_summary": False,
    },
    "model": {
        "class_path": "Expert",
        "init_args": {
            "backbone": "timm/convnext_tiny", "backbone_args": TINY_CONVNEXT, "pretrained": False, "num_classes": 10,
            "warmup_steps": 0, "weights": "base.ckpt",
        },
    },
    "data": {"class_path": "Digits", "init_args": {"batch_size": 2000, "test_domains": ["thick"]}},
}  # fmt: skip
EXPERTS = "--experts={noisy: noisy.ckpt, rotated: rotated.ckpt}"
VERBS = {
    "fit": ["--data.train_domains=[noisy]"],
    "merge": [EXPERTS, "--method=TaskArithmetic", "--output=made.ckpt"],
    "evaluate": ["--candidates={noisy: noisy.ckpt}", "--output=made"],
    "benchmark": ["--methods={a: TaskArithmetic}", "--domains=[noisy, thick]", "--output=made"],
    "search": [EXPERTS, "--method=TaskArithmetic", "--output=made.ckpt", "--results=made"],
    "statistics": ["--expert=noisy.ckpt", "--data.train_domains=[noisy]", "--output=made.safetensors"],
}
SINGLE_BATCH = "the only batch, and so the last: Lightning looks for signals between batches"


@pytest.fixture(autouse=True)
def files() -> None:
    base = tiny_expert().state_dict()
    lm.save_weights("base.ckpt", base)
    for i, name in enumerate(("noisy", "rotated"), start=1):
        expert = {
            key: tensor * (1 + 0.01 * i) if tensor.is_floating_point() else tensor for key, tensor in base.items()
        }
        lm.save_weights(f"{name}.ckpt", expert)
    Path("config.yaml").write_text(yaml.safe_dump(CONFIG))


def start(work: Callable[[int], None], count: int = 1) -> list[multiprocessing.Process]:
    """Fork processes whose output goes to ``RANK.err``."""

    def enter(rank: int) -> None:
        torch.set_num_threads(1)
        with Path(f"{rank}.err").open("w") as errors, redirect_stderr(errors), redirect_stdout(errors):
            work(rank)

    processes = [multiprocessing.get_context("fork").Process(target=enter, args=(rank,)) for rank in range(count)]
    for process in processes:
        process.start()
    return processes


def ended(processes: Sequence[multiprocessing.Process]) -> list[tuple[int | None, str]]:
    """Wait for all; their exit status, and the last line that each has written."""
    for process in processes:
        process.join(PATIENCE)
        process.kill()
    said = [Path(f"{rank}.err").read_text().splitlines() for rank in range(len(processes))]
    return [(process.exitcode, lines[-1] if lines else "") for process, lines in zip(processes, said, strict=True)]


def wait_for(path: str, alive: Callable[[], object] = multiprocessing.active_children) -> None:
    """Wait for a file that processes write, as long as one of them is alive."""
    latest = time.monotonic() + PATIENCE
    while not Path(path).exists():
        assert time.monotonic() < latest, "it never came so far"
        assert alive(), "it ended before: " + Path("0.err").read_text()[-2000:]
        time.sleep(0.01)


def stop_here(name: str = "inside") -> None:
    """Tell that the work has come here, and stay."""
    Path(name).touch()
    for _ in range(100 * PATIENCE):
        time.sleep(0.01)


def stopping(monkeypatch, verb: str, only: int | None = None) -> None:
    """Have a verb stay in the midst of its work, on all processes or on one."""
    where = {"merge": (TaskArithmetic, "update"), "evaluate": (CandidateEvaluator, "test_step")}
    kind, name = where.get(verb, (Expert, "forward"))
    before = getattr(kind, name)

    def stay(self, *args, **kwargs):
        if only is None or int(os.environ.get("SLURM_PROCID", "0")) == only:
            stop_here()
        return before(self, *args, **kwargs)

    monkeypatch.setattr(kind, name, stay)


def written() -> list[str]:
    """The files of results that are there."""
    paths = (path.relative_to(Path.cwd()) for path in Path.cwd().rglob("*") if path.is_file())
    ours = ("config.yaml", "base.ckpt", "noisy.ckpt", "rotated.ckpt", "inside", "0.err", "1.err", "lightning_logs")
    return sorted(str(path) for path in paths if path.parts[0] not in ours and path.name != LOCK)


@pytest.mark.parametrize("verb", VERBS)
def test_sigterm(verb, monkeypatch):
    stopping(monkeypatch, verb)
    (process,) = processes = start(lambda rank: main([verb, "--config=config.yaml", *VERBS[verb]]))
    wait_for("inside")
    os.kill(process.pid, signal.SIGTERM)
    sentence = "lightning-merge: ended by SIGTERM; no file is half-written, and the same command begins again."
    assert ended(processes) == [(143, sentence)], SINGLE_BATCH
    assert [
        name for name in written() if name not in ("made/settings.json", "made/experts/noisy/logs/hparams.yaml")
    ] == []


@pytest.mark.parametrize("verb", ["merge", "evaluate"])
def test_an_interrupt_from_the_keyboard(verb, monkeypatch):
    stopping(monkeypatch, verb)
    (process,) = processes = start(lambda rank: main([verb, "--config=config.yaml", *VERBS[verb]]))
    wait_for("inside")
    os.kill(process.pid, signal.SIGINT)
    sentence = "lightning-merge: interrupted; no file is half-written, and the same command begins again."
    assert ended(processes) == [(130, sentence)]
    assert written() == []


def test_a_handler_of_the_programs_own_stays(monkeypatch):
    heard = []
    monkeypatch.setattr(CandidateEvaluator, "on_test_start", lambda self: os.kill(os.getpid(), signal.SIGTERM))
    monkeypatch.setattr(CandidateEvaluator, "test_step", lambda *args: None)
    monkeypatch.setattr(CandidateEvaluator, "on_test_epoch_end", lambda self: heard.append("went on"))
    before = signal.signal(signal.SIGTERM, lambda *_: heard.append("SIGTERM"))
    try:
        with pytest.raises(KeyError):  # nothing was measured
            main(["evaluate", "--config=config.yaml", *VERBS["evaluate"]])
    finally:
        signal.signal(signal.SIGTERM, before)
    assert heard == ["SIGTERM", "went on"]


def test_two_benchmarks_in_one_folder(monkeypatch):
    command = ["benchmark", "--config=config.yaml", *VERBS["benchmark"]]
    stopping(monkeypatch, "benchmark")
    (first,) = start(lambda rank: main(command))
    wait_for("inside")
    before = {name: Path(name).read_bytes() for name in written()}
    ((status, said),) = ended(start(lambda rank: main(command)))
    assert status == 1
    assert (
        said
        == "lightning-merge: Another process is working in made; wait until it has ended, or choose another folder."
    )
    assert {name: Path(name).read_bytes() for name in written()} == before
    assert Path("made", LOCK).read_bytes() == b""
    Path("inside").unlink()
    first.kill()
    first.join()
    (next_one,) = start(lambda rank: main(command))
    wait_for("inside")
    next_one.kill()
    next_one.join()


LOST = "lightning-merge: Another process of this run has ended or cannot be reached any more"


@pytest.mark.parametrize("verb", ["merge", "evaluate", "benchmark"])
@pytest.mark.parametrize("lost", [0, 1])
def test_a_process_that_is_lost_ends_the_other(verb, lost, monkeypatch):
    stopping(monkeypatch, verb, only=lost)
    port = free_port()
    more = ["--trainer.devices=2", "--trainer.strategy=ddp", "--data.batch_size=32"]

    def work(rank: int) -> None:
        os.environ.update(slurm(rank, port))
        main([verb, "--config=config.yaml", *VERBS[verb], *more])

    processes = start(work, 2)
    wait_for("inside")
    processes[lost].kill()
    results = ended(processes)
    assert results[lost][0] == -signal.SIGKILL
    status, said = results[1 - lost]
    assert status == 1
    assert said.startswith(LOST)


FORKING = """
import sys, time
from pathlib import Path
from lightning_merge.models import Expert
from lightning_merge.trainer.cli import main

def stay(self, images):
    Path("inside").touch()
    time.sleep(600)

Expert.forward = stay
main(sys.argv[1:])
"""


def test_forked_processes_end_with_the_first():
    """With ``ddp_fork`` the work is done in children, for which a process waits as it ends."""
    more = ["--trainer.devices=2", "--trainer.strategy=ddp_fork", "--data.batch_size=32"]
    command = [sys.executable, "-c", FORKING, "evaluate", "--config=config.yaml", *VERBS["evaluate"], *more]
    with Path("0.err").open("w") as errors:
        process = subprocess.Popen(command, stdout=errors, stderr=errors)
        try:
            wait_for("inside", alive=lambda: process.poll() is None)
            process.terminate()
            assert process.wait(PATIENCE) == 143
        finally:
            process.kill()
    assert "lightning-merge: ended by SIGTERM" in Path("0.err").read_text().splitlines()[-1]


def test_what_only_the_first_process_cannot_write_ends_all(monkeypatch):
    port = free_port()
    more = ["--trainer.devices=2", "--trainer.strategy=ddp", "--data.batch_size=32"]

    def work(rank: int) -> None:
        os.environ.update(slurm(rank, port))
        if rank == 0:
            monkeypatch.setattr("lightning_merge.evaluation.jobs.mark_done", full)
        main(["benchmark", "--config=config.yaml", *VERBS["benchmark"], *more])

    def full(*_) -> None:
        raise lm.MergeError("The disk is full.")

    assert ended(start(work, 2)) == [(1, "lightning-merge: The disk is full.")] * 2
