"""The verb ``search``."""

from __future__ import annotations

import json

import torch

import lightning_merge as lm
from lightning_merge.trainer.cli import main
from tests.trainer.commands import read_jsonl


def test_search(experts, capsys):
    """The best setting's checkpoint is written, and it is a merge by hand; the test split is not touched."""
    run = f"--config={experts['rotated']}/config.yaml"
    grid = "--grid={scale: [0.5, 1, 1.5], common_fraction: [0.5, 0.8]}"
    main(["search", run, f"--experts={json.dumps(experts)}", "--method=IsoCTS", grid, "--results=out"])
    shown = capsys.readouterr().out
    records = [r for r in read_jsonl("out/results.jsonl") if r["row"] != "own expert"]
    assert {r["domain"] for r in records} == set(experts)
    assert {(r["setting"]["common_fraction"], r["setting"]["scale"]) for r in records} == {
        (c, s) for c in (0.5, 0.8) for s in (0.5, 1, 1.5)
    }
    chosen = lm.open_weights("merged.ckpt").header["merge"]["method"]["init_args"]
    method = lm.methods.IsoCTS(**chosen)
    by_hand = lm.merge("experts/upright", experts, method).weights
    assert all(torch.equal(lm.open_weights("merged.ckpt")[name], tensor) for name, tensor in by_hand.items())
    assert f"common_fraction {method.common_fraction}, scale {method.scale}: the best of 6 settings" in shown
    assert "| common_fraction 0.8, scale 1.5 |" in shown
    main(["validate", run, "--ckpt_path=merged.ckpt", "--data.train_domains=[rotated]"])
    setting = {"common_fraction": method.common_fraction, "scale": method.scale}
    best = next(r for r in records if r["domain"] == "rotated" and r["setting"] == setting)
    assert str(best["accuracy"])[:8] in capsys.readouterr().out
