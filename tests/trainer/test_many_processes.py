"""Runs of several processes as they are launched: torchrun, SLURM, Lightning's own, and two hosts."""

from __future__ import annotations

import contextlib
import hashlib
import json
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

import lightning_merge as lm
from lightning_merge.methods import TIES
from lightning_merge.trainer.cli import main
from tests.conftest import ROOT
from tests.toys import image_folders, quiet_trainer, tiny_expert

SCRIPT = str(ROOT / "tests" / "run_on_processes.py")
TWO = json.dumps({"devices": 2, "strategy": "ddp"})
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
MERGE = [
    *("-m", "lightning_merge", "merge", "--base=base.pt", "--experts=[old.pt]", "--method=TIES"),
    *("--trainer.strategy=ddp", "--trainer.accelerator=cpu", "--trainer.logger=false"),
]
TIMEOUT = 600  # s; only against processes that hang


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def launch(commands: Sequence[Sequence[str]], environments: Sequence[dict] = ()) -> list:
    """Run commands at the same time; returns the exit status, the output and the errors of each.

    Once one has failed, the others are given some seconds to find that out.
    """
    common = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    running, latest = [], time.monotonic() + TIMEOUT
    try:
        for i, command in enumerate(commands):
            environment = common | (environments[i] if environments else {})
            with Path(f"{i}.out").open("w") as out, Path(f"{i}.err").open("w") as errors:
                running.append(subprocess.Popen(command, env=environment, stdout=out, stderr=errors))
        while None in (states := [process.poll() for process in running]) and time.monotonic() < latest:
            if any(states):
                latest = min(latest, time.monotonic() + 20)
            time.sleep(0.05)
    finally:
        for process in running:
            process.terminate()  # torchrun ends its workers then
        for process in running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
            process.kill()
    streams = [[Path(f"{i}.{end}").read_text() for end in ("out", "err")] for i in range(len(running))]
    return [(process.wait(), *said) for process, said in zip(running, streams, strict=True)]


def assert_well(ended: Sequence[tuple[int, str, str]]) -> None:
    """None of the commands has failed; or else show the errors of all."""
    assert [status for status, _, _ in ended] == [0] * len(ended), "\n\n".join(errors for _, _, errors in ended)


def slurm(rank: int, port: int) -> dict[str, str]:
    """What srun tells one of two processes."""
    return {
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "2",
        "SLURM_NNODES": "1",
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank),
        "SLURM_NODEID": "0",
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NAME": "merge",
        "SLURM_NODELIST": "localhost",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def accuracies(folder: str) -> list[float]:
    return [json.loads(line)["accuracy"] for line in Path(folder, "results.jsonl").read_text().splitlines()]


@pytest.fixture(autouse=True)
def files() -> None:
    """A base and an earlier expert."""
    start = tiny_expert().state_dict()
    lm.save_weights("base.pt", start)
    lm.save_weights("old.pt", {name: 1.1 * weight for name, weight in start.items()})


@pytest.mark.parametrize("how", ["torchrun", "slurm"])  # Lightning's own launcher: test_evaluate.py
def test_a_fit_that_merges_and_an_evaluation(how):
    """Whoever starts the processes, the merge is that of the files, and the table that of one process."""
    if how == "slurm":
        port = free_port()
        ended = launch([[sys.executable, SCRIPT, TWO]] * 2, [slurm(rank, port) for rank in range(2)])
    else:
        ended = launch([[*TORCHRUN, "--standalone", "--nproc-per-node=2", SCRIPT, TWO]])
    assert_well(ended)
    merged = lm.open_weights("merged.ckpt")
    by_hand = lm.merge("base.pt", ["old.pt", "run/last.ckpt"], TIES()).weights
    assert {name: weight.tolist() for name, weight in merged.items()} == {n: w.tolist() for n, w in by_hand.items()}
    data = lm.Digits(train_domains=["noisy"], test_domains=["thick"])
    quiet_trainer().evaluate(tiny_expert(), data, {"merged": "merged.ckpt"}, output="alone")
    assert accuracies("table") == accuracies("alone")


@pytest.mark.skipif(os.name != "posix", reason="no fork")
def test_a_process_that_cannot_read_an_expert_ends_all():
    """Under SLURM, with a folder that only the first host has."""
    Path("elsewhere").mkdir()
    shutil.copy("base.pt", "elsewhere")
    port, context = free_port(), multiprocessing.get_context("fork")

    def work(rank: int, folder: str) -> None:
        os.environ.update(slurm(rank, port))
        with Path(f"{rank}.err").open("w") as errors, contextlib.redirect_stderr(errors):
            os.chdir(folder)
            main([*MERGE[2:], "--trainer.devices=2"])

    processes = [context.Process(target=work, args=arguments) for arguments in enumerate([".", "elsewhere"])]
    for process in processes:
        process.start()
    for process in processes:
        process.join(TIMEOUT)
        process.kill()
    assert [process.exitcode for process in processes] == [1, 1]
    for rank in range(2):
        assert "lightning-merge: There is no file or folder old.pt" in Path(f"{rank}.err").read_text().splitlines()[-1]
    assert not Path("merged.ckpt").exists()


@pytest.mark.skipif(os.name != "posix", reason="no fork")
def test_more_processes_than_samples_are_a_sentence(capsys):
    root = image_folders(Path("data"))
    model = ["--model=Expert", "--model.backbone=timm/vit_tiny_patch16_224", "--model.num_classes=2"]
    model += ["--model.pretrained=false", "--model.backbone_args={img_size: 32, embed_dim: 16, depth: 1, num_heads: 2}"]
    three = [
        "--trainer.devices=3",
        "--trainer.strategy=ddp_fork",
        "--trainer.accelerator=cpu",
        "--trainer.logger=false",
    ]
    data = ["--data=DomainFolders", f"--data.root={root}", "--data.test_domains=[photo]", "--data.test_fraction=0.1"]
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", *model, *data, *three])
    assert ended.value.code == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(
        "lightning-merge: 2 samples in batches of 128 cannot be shared out over 3 processes; use fewer"
    )


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True, timeout=30)


@pytest.fixture
def hosts() -> Iterator[tuple[str, str]]:
    """Two hosts with a cable between them: network namespaces."""
    tag = uuid.uuid4().hex[:6]
    names = f"merge-{tag}-a", f"merge-{tag}-b"
    cable = f"ma{tag}", f"mb{tag}"
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", cable[0], "netns", names[0], "type", "veth", "peer", "name", cable[1], "netns", names[1])
        for i, (name, end) in enumerate(zip(names, cable, strict=True)):
            ip("-n", name, "link", "set", end, "name", "merge0")
            ip("-n", name, "addr", "add", f"10.111.0.{i + 1}/24", "dev", "merge0")
            ip("-n", name, "link", "set", "merge0", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        pytest.skip(f"this machine may not make network namespaces: {getattr(error, 'stderr', error)}")
    finally:
        for name in names:
            if shutil.which("ip"):
                subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False, timeout=30)


def test_two_hosts_merge_and_evaluate_as_one_process(hosts, capsys):
    data = ["--model=Expert", "--model.backbone=timm/convnext_tiny", "--model.num_classes=10"]
    data += ["--model.pretrained=false", f"--model.backbone_args={json.dumps(tiny_expert().hparams.backbone_args)}"]
    data += ["--data=Digits", "--data.test_domains=[thick]", "--trainer.enable_progress_bar=false"]
    both = [*TORCHRUN, "--nnodes=2", "--nproc-per-node=1", "--master-addr=10.111.0.1", "--master-port=29511"]
    last = [*MERGE, *data, "--trainer.num_nodes=2", "--trainer.devices=1", "--output=two.safetensors"]
    commands = [["ip", "netns", "exec", host, *both, f"--node-rank={i}", *last] for i, host in enumerate(hosts)]
    ended = launch(commands, [{"GLOO_SOCKET_IFNAME": "merge0"}] * 2)
    assert_well(ended)
    main([*MERGE[2:], *data, "--trainer.devices=1", "--output=one.safetensors"])
    alone = capsys.readouterr().out
    assert table(ended[0][1]) == table(alone) != []
    assert table(ended[1][1]) == []
    one, two = (hashlib.sha256(Path(f"{n}.safetensors").read_bytes()).hexdigest() for n in ("one", "two"))
    assert one == two


def table(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("|")]
