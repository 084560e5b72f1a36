"""The verb ``evaluate``, after ``fit`` and ``merge``."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

import lightning_merge as lm
from lightning_merge.trainer.cli import main
from tests.trainer.commands import CONFIGS, TINY_DIGITS, read_jsonl


def test_the_whole_way(experts, capsys):
    config = f"--config={experts['rotated']}/config.yaml"
    main(["merge", config, f"--config={CONFIGS / 'merge/score.yaml'}", f"--experts={json.dumps(experts)}"])
    assert "SCORE of 2 experts (rotated, noisy)" in capsys.readouterr().out
    by_hand = lm.merge("experts/upright", experts, lm.methods.SCORE()).weights
    merged = lm.open_weights("merged.ckpt")
    assert all(torch.equal(merged[name], tensor) for name, tensor in by_hand.items())

    more = [
        "--data.train_domains=null",
        "--data.held_out=thick",
        "--candidates={SCORE: merged.ckpt}",
        "--output=out",
    ]
    held_out = f"--config={CONFIGS / 'evaluate/held_out.yaml'}"
    main(["evaluate", config, held_out, *more, f"--experts={json.dumps(experts)}"])
    shown = capsys.readouterr().out
    assert "| SCORE" in shown
    assert "| logit ensemble" in shown
    assert shown.strip() in Path("out/table.md").read_text()

    main(["test", config, "--ckpt_path=merged.ckpt", "--data.train_domains=null", "--data.held_out=thick"])
    record = next(record for record in read_jsonl("out/results.jsonl") if record["row"] == "SCORE")
    assert str(record["accuracy"])[:8] in capsys.readouterr().out
    saved = yaml.safe_load(Path("experts/rotated/config.yaml").read_text())
    assert saved["data"]["init_args"]["train_domains"] == ["rotated"]  # `test` left it alone


def test_two_processes_fit_merge_and_evaluate_as_one(experts):
    """`fit` under DDP, then `merge`, then `evaluate`: launched by commands, but for `merge`, which is forked."""
    two = ["--trainer.devices=2", "--trainer.accelerator=cpu"]
    ddp, forked = [*two, "--trainer.strategy=ddp"], [*two, "--trainer.strategy=ddp_fork"]

    def launch(*arguments: str) -> None:
        command = [sys.executable, "-m", "lightning_merge", *arguments]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr

    config = f"--config={CONFIGS / 'fit/digits.yaml'}"
    start = ["--model.weights=experts/upright", "--trainer.default_root_dir=experts/ddp"]
    merging = ["--trainer.callbacks+=MergeAfterFit", "--trainer.callbacks.base=experts/upright"]
    merging += ["--trainer.callbacks.experts=[experts/noisy]", "--trainer.callbacks.output=after.ckpt"]
    launch("fit", config, *TINY_DIGITS, *ddp, *start, "--data.train_domains=[rotated]", *merging)
    pair = ["experts/noisy", "experts/ddp"]
    after, by_hand = lm.open_weights("after.ckpt"), lm.merge("experts/upright", pair, lm.methods.SCORE()).weights
    assert all(torch.equal(after[name], tensor) for name, tensor in by_hand.items())
    one, two = lm.open_weights(experts["rotated"]), lm.open_weights("experts/ddp")
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=1e-6)

    run = f"--config={experts['rotated']}/config.yaml"
    pair = "{rotated: experts/ddp, noisy: experts/noisy}"
    main(["merge", run, *forked, f"--experts={pair}", "--output=ddp.ckpt", "--data.test_domains=[thick]"])
    main(["merge", run, f"--experts={pair}", "--output=one.ckpt", "--data.test_domains=[thick]"])
    merged = lm.open_weights("ddp.ckpt")
    assert all(torch.equal(merged[name], tensor) for name, tensor in lm.open_weights("one.ckpt").items())

    rows = ["--candidates={merged: ddp.ckpt}", "--data.test_domains=[thick]"]
    launch("evaluate", run, *ddp, *rows, "--output=two")
    main(["evaluate", run, *rows, "--output=one"])
    for a, b in zip(read_jsonl("one/results.jsonl"), read_jsonl("two/results.jsonl"), strict=True):
        assert a["accuracy"] == b["accuracy"]
        for metric in ("balanced_accuracy", "f1", "calibration_error"):
            assert a[metric] == pytest.approx(b[metric], abs=1e-6)
