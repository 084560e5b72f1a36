"""The verb ``merge``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import lightning_merge as lm
from lightning_merge.checkpoints import save_weights
from lightning_merge.merging.aligning import Align
from lightning_merge.methods import TIES
from lightning_merge.trainer.cli import main
from tests.toys import base_weights, expert_weights, quiet_trainer
from tests.trainer.commands import CONFIGS


@pytest.fixture
def files():
    base = base_weights()
    lm.save_weights("base.safetensors", base)
    for name, seed in (("photo", 1), ("sketch", 2)):
        lm.save_weights(f"{name}.safetensors", expert_weights(base, seed))
    return {name: f"{name}.safetensors" for name in ("photo", "sketch")}


INPUTS = {"base.safetensors": 1, "photo.safetensors": 1, "sketch.safetensors": 1}


def test_base_and_experts_are_opened_once(files, opened):
    quiet_trainer().merge(experts=files, base="base.safetensors", method=TIES(), output="merged.safetensors")
    assert dict(opened) == INPUTS | {"merged.safetensors": 1}


def test_so_are_those_of_several_foundations(files, opened):
    align = Align(
        foundations={"one": "base.safetensors"}, foundation_of={"photo": "one", "sketch": "one"}, by="nothing"
    )
    quiet_trainer().merge(experts=files, align=align, method=TIES(), output="merged.safetensors")
    assert dict(opened) == INPUTS | {"merged.safetensors": 1}


def test_files_alone_need_no_model(experts):
    command = ["merge", "--base=experts/upright", "--method=TIES", "--method.density=0.3", "--output=m.safetensors"]
    main([*command, f"--experts={json.dumps(list(experts.values()))}"])
    by_hand = lm.merge("experts/upright", list(experts.values()), lm.methods.TIES(density=0.3)).weights
    assert all(torch.equal(lm.open_weights("m.safetensors")[name], tensor) for name, tensor in by_hand.items())


@pytest.mark.parametrize("name", ["score", "iso_cts", "ties"])
def test_every_config_runs(name):
    for i in range(3):
        lm.save_weights(f"{i}.safetensors", {"w": torch.randn(6, 6)})
    main(
        ["merge", f"--config={CONFIGS / 'merge' / name}.yaml", "--base=0.safetensors"]
        + ["--experts=[1.safetensors, 2.safetensors]", "--output=m.safetensors"]
    )
    assert lm.open_weights("m.safetensors")["w"].shape == (6, 6)


class TestPlan:
    @pytest.fixture(autouse=True)
    def files(self):
        save_weights("base.pt", base_weights())
        for i in range(2):
            save_weights(f"{i}.ckpt", {f"model.{name}": w for name, w in expert_weights(base_weights(), i).items()})

    def plan(self, capsys, *arguments: str) -> tuple[int, str]:
        before = {path: path.stat().st_mtime_ns for path in Path().rglob("*")}
        with pytest.raises(SystemExit) as ended:
            main(["merge", "--base=base.pt", "--experts=[0.ckpt, 1.ckpt]", *arguments])
        assert {path: path.stat().st_mtime_ns for path in Path().rglob("*")} == before
        return ended.value.code, capsys.readouterr().out

    @pytest.mark.parametrize("more", [["--plan"], ["--plan", "--method=TIES"], ["--method=IsoC", "--plan=true"]])
    def test_nothing_stands_in_the_way(self, capsys, more):
        status, text = self.plan(capsys, *more)
        assert status == 0
        assert "Nothing stands in its way" in text
        assert "`model.* -> *`" in text
        assert "to merged.ckpt" in text

    def test_all_that_stands_in_the_way(self, capsys):
        status, text = self.plan(capsys, "--plan", "--exclude=[hed.*]", "--workers=0", "--output=x.onnx")
        assert status == 1
        assert "3 things stand in its way" in text
        assert all(word in text for word in ("'hed.*'", "workers", "x.onnx"))

    def test_false_merges(self):
        main(["merge", "--plan", "false", "--base=base.pt", "--experts=[0.ckpt, 1.ckpt]"])
        assert Path("merged.ckpt").is_file()
