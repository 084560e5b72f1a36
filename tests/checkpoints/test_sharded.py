"""Checkpoints in parts: refused with the command that puts them together, and merged once that was done."""

from __future__ import annotations

import runpy
import shlex
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

import lightning_merge as lm
from lightning_merge.methods import WeightAverage
from tests.toys import base_weights, expert_weights

MODEL, OPTIMIZER = "mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"


def sharded(folder: Path) -> dict[str, torch.Tensor]:
    """Write an expert as Lightning's FSDP and ModelParallel strategies do, and return its weights."""
    weights = expert_weights(base_weights(), 0)
    dcp.save({"model": weights, "optimizer_0": {"state": {}}}, checkpoint_id=folder, no_dist=True)
    torch.save({"epoch": 0, "pytorch-lightning_version": "2.6.0"}, folder / "meta.pt")
    return weights


def command(error: pytest.ExceptionInfo[lm.MergeError]) -> list[str]:
    """The command that the sentence says."""
    return shlex.split(str(error.value).split("`")[1])


def test_what_fsdp_wrote_is_merged_after_the_command_that_the_sentence_says(monkeypatch):
    expert = sharded(Path("run/checkpoints/last.ckpt"))
    for given in ("run", "run/checkpoints/last.ckpt", "run/checkpoints/last.ckpt/__0_0.distcp"):
        with pytest.raises(lm.MergeError, match="as FSDP and ModelParallel write it") as refused:
            lm.open_weights(given)
    python, dash_m, module, *arguments = command(refused)
    assert [python, dash_m] == ["python", "-m"]
    monkeypatch.setattr("sys.argv", [module, *arguments])
    runpy.run_module(module, run_name="__main__")
    whole = arguments[-1]
    base = base_weights()
    merged = lm.merge(base, {"a": whole, "base": base}, WeightAverage(scale=1.0)).weights
    torch.testing.assert_close(merged["mlp.weight"], (base["mlp.weight"] + expert["mlp.weight"]) / 2)
    opened = lm.open_weights(whole)
    assert {name: tensor.tolist() for name, tensor in opened.items()} == {n: t.tolist() for n, t in expert.items()}


@pytest.mark.parametrize("given", ["last.ckpt", "last.ckpt/checkpoint", "run", MODEL, OPTIMIZER])
def test_what_deepspeed_wrote_is_refused_with_its_own_command(given):
    folder = Path("run/checkpoints/last.ckpt") if given == "run" else Path("last.ckpt")
    (folder / "checkpoint").mkdir(parents=True)
    for name in (MODEL, OPTIMIZER):
        torch.save({"module": base_weights()}, folder / "checkpoint" / name)
    (folder / "latest").write_text("checkpoint")
    (folder / "zero_to_fp32.py").write_text("# DeepSpeed's own\n")
    given = f"last.ckpt/checkpoint/{given}" if given.endswith(".pt") else given
    with pytest.raises(lm.MergeError, match="as DeepSpeed writes it") as refused:
        lm.open_weights(given)
    whole = folder.with_name("last.bin")
    assert command(refused) == ["python", str(folder / "zero_to_fp32.py"), str(folder), str(whole)]
    torch.save(expert_weights(base_weights(), 0), whole)  # what the script writes, a state dict
    assert torch.equal(lm.open_weights(whole)["mlp.weight"], expert_weights(base_weights(), 0)["mlp.weight"])


@pytest.mark.parametrize("name", [MODEL, OPTIMIZER, "__0_0.distcp"])
def test_a_part_by_itself_is_refused(name):
    torch.save({"module": base_weights()}, name)
    with pytest.raises(lm.MergeError, match=f"{name} is a part of a checkpoint.*copy the folder"):
        lm.open_weights(name)


def test_a_consolidated_file_in_the_folder_of_the_parts_is_opened_by_its_name():
    expert = sharded(Path("last.ckpt"))
    torch.save({"state_dict": expert}, "last.ckpt/whole.ckpt")
    assert torch.equal(lm.open_weights("last.ckpt/whole.ckpt")["mlp.weight"], expert["mlp.weight"])
