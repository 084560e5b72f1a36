"""One merge on several processes: the same bytes, and nobody waits for one that has failed."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import traceback
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import lightning_merge as lm
from lightning_merge.checkpoints import PartFile, save_weights
from lightning_merge.checkpoints.files import InputFile
from lightning_merge.methods import SCORE, TIES, MergeMethod, TaskArithmetic
from lightning_merge.utilities.processes import Processes
from tests.checkpoints.test_streaming import left_behind, make_files, same

PATIENCE = 300  # s; only against processes that hang


def _enter(rank: int, count: int, work, results, all_done) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{os.getcwd()}/rendezvous", rank=rank, world_size=count)
    try:
        results.put((rank, work(rank), None))
    except BaseException as error:  # a pytest.raises that has failed, too
        results.put((rank, None, f"{type(error).__name__}: {error}\n{traceback.format_exc()}"))
    finally:
        all_done.wait(PATIENCE)  # one that leaves early cuts off those that are still connecting
        dist.destroy_process_group()


def on_processes(count: int, work) -> tuple[list, list]:
    """What ``work(rank)`` returns on every process, and what it raises."""
    Path("rendezvous").unlink(missing_ok=True)
    context = multiprocessing.get_context("fork")
    results, all_done = context.Queue(), context.Barrier(count)
    processes = [context.Process(target=_enter, args=(rank, count, work, results, all_done)) for rank in range(count)]
    for process in processes:
        process.start()
    try:
        found = sorted((results.get(timeout=PATIENCE) for _ in processes), key=lambda result: result[0])
        for process in processes:
            process.join(PATIENCE)
            assert process.exitcode == 0
    finally:
        for process in processes:
            process.kill()
    return [value for _, value, _ in found], [error for _, _, error in found]


def sha256(output: str) -> list[str]:
    files = sorted(path for path in Path(output).glob("*")) if Path(output).is_dir() else [Path(output)]
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]


@pytest.mark.parametrize("output", ["merged.safetensors", "merged.ckpt", "merged"])
@pytest.mark.parametrize("method", [SCORE(), TIES()], ids=["SCORE", "TIES"])
def test_the_same_bytes_for_any_number_of_processes_and_workers(output, method):
    base, experts = make_files()

    def work(rank: int) -> None:
        lm.merge(base, experts, method, output=output, shard_size=3000, distributed=True, workers=1 + rank)

    lm.merge(base, experts, method, output=output, shard_size=3000)
    alone = sha256(output)
    for count in (1, 2, 4):
        _, errors = on_processes(count, work)
        assert errors == [None] * count
        assert sha256(output) == alone
    assert left_behind() == []


def test_every_process_has_the_whole_model_in_memory():
    base, experts = make_files()
    alone = lm.merge(base, experts, SCORE()).weights

    def work(rank: int) -> bool:
        return same(lm.merge(base, experts, SCORE(), distributed=True).weights, alone)

    assert on_processes(3, work) == ([True] * 3, [None] * 3)


@pytest.mark.parametrize("output", [None, "merged.safetensors"])
def test_a_process_that_fails_stops_the_others(output):
    base, experts = make_files()

    class FailsOnce(MergeMethod):
        def update(self, deltas, context):
            if context.name == "blocks.7.weight":
                raise RuntimeError("out of luck")
            return super().update(deltas, context)

    _, errors = on_processes(2, lambda rank: lm.merge(base, experts, FailsOnce(), output=output, distributed=True))
    assert sorted(error.partition("\n")[0] for error in errors) == [
        f"MergeError: Process {rank} has failed, and the others stop: out of luck"
        for rank in range(2)
        if errors[rank].startswith("RuntimeError")
    ] + ["RuntimeError: out of luck"]
    assert left_behind() == []


def test_a_file_that_only_one_process_can_read():
    base, experts = make_files()

    def work(rank: int) -> None:
        path = experts[0] if rank == 0 else "elsewhere.safetensors"
        lm.merge(base, {"a": path}, TaskArithmetic(), distributed=True, output="m.safetensors")

    _, errors = on_processes(2, work)
    assert all("no file or folder elsewhere.safetensors" in error for error in errors)


def test_a_process_that_cannot_hash_a_file_stops_the_others(monkeypatch):
    base, experts = make_files()

    def work(rank: int) -> None:
        if rank == 0:
            monkeypatch.setattr(InputFile, "fingerprint", lambda file: (_ for _ in ()).throw(lm.MergeError("gone")))
        lm.merge(base, experts, SCORE(), distributed=True)

    _, errors = on_processes(2, work)
    assert all(error.startswith("MergeError: gone") for error in errors)


def test_what_another_process_wrote_is_looked_at(monkeypatch):
    base, experts = make_files()

    def work(rank: int) -> None:
        if rank == 1:
            monkeypatch.setattr(PartFile, "_put", lambda *_: None)  # its bytes are lost
        lm.merge(base, experts, SCORE(), output="m.safetensors", distributed=True)

    _, errors = on_processes(2, work)
    assert all("as another process has written it" in error for error in errors)
    assert not Path("m.safetensors").exists()


def test_values_that_are_not_finite_are_found_whoever_looks_at_them():
    base, experts = make_files()
    broken = {name: tensor.clone() for name, tensor in lm.open_weights(experts[0]).items()}
    names = ["blocks.0.weight", "blocks.5.weight", "mlp.bias"]
    for name in names:
        broken[name].view(-1)[0] = float("nan")
    save_weights("broken.pt", broken)
    _, errors = on_processes(2, lambda rank: lm.merge(base, ["broken.pt"], SCORE(), distributed=True))
    assert all(error.startswith("MergeError: 3 problems") for error in errors)
    assert all(name in error for error in errors for name in names)


@pytest.mark.parametrize("sent", [{}, {"a": torch.arange(3.0), "b": torch.ones(2, 2, dtype=torch.int64)}])
def test_tensors_of_the_first_process_reach_all(sent):
    def work(rank: int) -> bool:
        return same(Processes(True).from_first(sent if rank == 0 else None), sent)

    assert on_processes(2, work) == ([True, True], [None, None])


def test_without_a_process_group_there_is_nobody_to_share_with():
    with pytest.raises(lm.MergeError, match="init_process_group"):
        lm.merge({"w": torch.ones(2)}, [{"w": torch.ones(2)}], TaskArithmetic(), distributed=True)


def test_shares_are_even_and_complete(monkeypatch):
    processes = Processes()
    processes.count = 3
    cost = {f"p{i}": float(i) for i in range(20)}
    shares = processes.share(list(cost), cost.__getitem__)
    assert sorted(name for share in shares for name in share) == sorted(cost)
    loads = [sum(cost[name] for name in share) for share in shares]
    assert max(loads) - min(loads) <= 4
    assert shares == processes.share(list(reversed(cost)), cost.__getitem__)
