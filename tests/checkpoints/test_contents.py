"""What a checkpoint holds besides its weights, and which weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader

import lightning_merge as lm
from lightning_merge.checkpoints.contents import split_source
from lightning_merge.methods import TaskArithmetic, WeightAverage
from lightning_merge.trainer.cli import main


class Tokens(LightningModule):
    """Stores its arguments under the name of one of them, and a vocabulary beside its weights."""

    def __init__(self, config: dict) -> None:
        super().__init__()
        self.save_hyperparameters(config)
        torch.manual_seed(0)
        self.embed = nn.Embedding(5, config["width"])
        self.vocabulary: list[str] | None = None

    def training_step(self, batch, batch_idx):
        return self.embed(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

    def on_save_checkpoint(self, checkpoint):
        checkpoint["vocabulary"] = ["one", "two"]
        checkpoint["prototypes"] = {"mean": torch.arange(3.0)}

    def on_load_checkpoint(self, checkpoint):
        self.vocabulary = checkpoint["vocabulary"]
        assert torch.equal(checkpoint["prototypes"]["mean"], torch.arange(3.0))


class Texts(LightningDataModule):
    def __init__(self, options: dict) -> None:
        super().__init__()
        self.save_hyperparameters(options)

    def train_dataloader(self):
        return DataLoader(torch.arange(5), batch_size=5)


def write_checkpoint(path: str, epochs: int) -> None:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    trainer = Trainer(max_epochs=epochs, enable_model_summary=False, **quiet)
    trainer.fit(Tokens({"width": 3}), datamodule=Texts({"length": 7}))
    trainer.save_checkpoint(path)


@pytest.mark.parametrize("base", ["base.ckpt", "base.pt"])
def test_a_merged_checkpoint_is_loaded_like_the_experts(base):
    """Whether the base is a checkpoint itself, or only the first expert is."""
    for i in range(2):
        write_checkpoint(f"{i}.ckpt", i + 1)
    write_checkpoint("base.ckpt", 1)
    torch.save(Tokens({"width": 3}).state_dict(), "base.pt")
    merged = lm.merge(base, ["0.ckpt", "1.ckpt"], WeightAverage())
    assert merged.save("saved.ckpt") != lm.merge(base, ["0.ckpt", "1.ckpt"], WeightAverage(), output="streamed.ckpt")
    for path in ("saved.ckpt", "streamed.ckpt"):
        loaded = Tokens.load_from_checkpoint(path, weights_only=True)
        assert torch.equal(loaded.embed.weight, merged.weights["embed.weight"])
        assert loaded.vocabulary == ["one", "two"]
        assert Texts.load_from_checkpoint(path, weights_only=True).hparams == {"length": 7}
        assert not {"optimizer_states", "callbacks", "lr_schedulers"} & set(torch.load(path, weights_only=True))


def write(path: str, **beside) -> None:
    torch.save({"state_dict": {"w": torch.arange(6.0)}, "pytorch-lightning_version": "2.5", **beside}, path)


class TestNoCode:
    def test_what_names_code_is_left_out_and_said(self, capsys):
        target = {"_target_": "os.system", "command": "true"}
        plain = {"model": {"depth": 2}, "table": [1, 2]}
        hyper_parameters = {"lr": 0.1, "backbone": "python/os.system"}
        of_data = {"size": 3, "reader": target}
        write("1.ckpt", **plain, hook=target, hyper_parameters=hyper_parameters, datamodule_hyper_parameters=of_data)
        lm.save_weights("0.pt", {"w": torch.arange(6.0)})
        main(["merge", "--base=0.pt", "--experts=[1.ckpt]", "--method=WeightAverage", "--output=m.ckpt"])
        found = torch.load("m.ckpt", weights_only=True)
        assert (found["hyper_parameters"], found["datamodule_hyper_parameters"]) == ({"lr": 0.1}, {"size": 3})
        assert {key: found[key] for key in plain} == plain
        assert "hook" not in found
        named = ["hook", "hyper_parameters.backbone", "datamodule_hyper_parameters.reader"]
        merged = lm.merge("0.pt", ["1.ckpt"], WeightAverage())
        assert sorted(merged.beside.left_out) == sorted(named)
        said = capsys.readouterr().out
        assert all(name in said and name in merged.notes[0] for name in named)

    def test_nothing_is_said_where_nothing_was_left_out(self):
        write("1.ckpt", hyper_parameters={"backbone": "timm/resnet18", "weights": "x.pt", "lr": 1})
        assert lm.merge({"w": torch.zeros(6)}, ["1.ckpt"], WeightAverage()).notes == ()


class Counted(nn.Linear):
    """A layer with a state that is no tensor."""

    seen = 0

    def get_extra_state(self):
        return {"seen": self.seen}

    def set_extra_state(self, state):
        self.seen = state["seen"]


def counted(seed: int, prefix: str = "") -> dict:
    torch.manual_seed(0)
    model = nn.Sequential(Counted(3, 3), nn.Linear(3, 2))
    model[0].seen = seed
    return {f"{prefix}{name}": value for name, value in model.state_dict().items()}


class TestExtraState:
    @pytest.mark.parametrize("output", [None, "m.ckpt", "m.pt"])
    def test_it_is_the_base_s(self, output):
        merged = lm.merge(counted(1), [counted(2), counted(3)], WeightAverage(), output=output)
        model = nn.Sequential(Counted(3, 3), nn.Linear(3, 2))
        model.load_state_dict(merged.weights)
        assert model[0].seen == 1
        if output is not None:
            stored = torch.load(output, weights_only=True)
            assert stored.get("state_dict", stored).keys() == counted(0).keys()

    def test_else_the_first_expert_s_under_the_base_s_names(self):
        base = {name: value for name, value in counted(1).items() if isinstance(value, torch.Tensor)}
        torch.save(counted(2, prefix="net."), "2.pt")
        assert lm.merge(base, ["2.pt", counted(3)], WeightAverage()).weights["0._extra_state"] == {"seen": 2}

    def test_an_expert_keeps_its_own_where_its_layer_is_left_out(self):
        experts = {"one": counted(2), "two": counted(3)}
        merged = lm.merge(counted(1), experts, WeightAverage(), exclude=["0.*"])
        assert merged.for_task("two")["0._extra_state"] == {"seen": 3}
        assert merged.weights["0._extra_state"] == {"seen": 1}

    def test_numpy_values_stay(self):
        np = pytest.importorskip("numpy")
        base = {"w": torch.ones(2), "labels": np.arange(2)}
        merged = lm.merge(base, [{"w": torch.ones(2)}], WeightAverage()).weights
        assert merged["labels"] is base["labels"]

    def test_of_shards(self):
        Path("shards").mkdir()
        state = counted(4)
        places = {key: f"{int(key[0])}.bin" for key in state}
        for shard in set(places.values()):
            torch.save({key: value for key, value in state.items() if places[key] == shard}, f"shards/{shard}")
        tensors = {key: place for key, place in places.items() if isinstance(state[key], torch.Tensor)}
        Path("shards/model.bin.index.json").write_text(json.dumps({"weight_map": tensors}))
        assert lm.open_weights("shards").header["extra_state"] == {"0._extra_state": {"seen": 4}}

    def test_a_safetensors_file_cannot_hold_it_which_is_said(self):
        merged = lm.merge(counted(1), [counted(2)], WeightAverage(), output="m.safetensors")
        assert "0._extra_state in the state dict is no tensor" in merged.notes[0]
        assert merged.weights["0._extra_state"] == {"seen": 1}
        planned = lm.plan(counted(1), [counted(2)], WeightAverage(), output="m.safetensors")
        assert merged.notes[0] in planned.notes
        with pytest.raises(lm.MergeError, match=r"is no tensor.* end x\.safetensors in \.ckpt or \.pt"):
            lm.save_weights("x.safetensors", counted(1))


class TestSeveralSetsOfWeights:
    @pytest.fixture(autouse=True)
    def files(self):
        state = {"w": torch.zeros(3, 2), "b": torch.zeros(3)}
        averaged = {f"module.{name}": value + 1 for name, value in state.items()}
        callbacks = {"EMA{'decay': 0.9}": {"weights": {name: value + 2 for name, value in state.items()}, "step": 3}}
        optimizer = [{"state": {"0": {name: value + 9 for name, value in state.items()}}}]
        content = {
            "state_dict": state,
            "state_dict_ema": averaged,
            "callbacks": callbacks,
            "optimizer_states": optimizer,
        }
        torch.save(content, "a.ckpt")
        torch.save(state, "plain.pt")
        lm.save_weights("plain.safetensors", state)

    @pytest.mark.parametrize(
        ("part", "value"),
        [("", 0), ("#state_dict", 0), ("#state_dict_ema", 1), ("#callbacks/EMA{'decay': 0.9}/weights", 2)],
    )
    def test_each_can_be_chosen(self, part, value):
        merged = lm.merge("plain.pt", [f"a.ckpt{part}"], TaskArithmetic(scale=1.0), output="m.ckpt")
        assert merged.weights["w"].eq(value).all()
        sha256 = merged.manifest["experts"][f"a.ckpt{part}"]["sha256"]
        assert merged.manifest["experts"][f"a.ckpt{part}"] == {"path": f"a.ckpt{part}", "sha256": sha256}
        (note,) = merged.notes
        assert f"of which {part[1:] or 'state_dict'} is taken" in note
        remedy = note.rpartition("give ")[2].removesuffix(".")
        assert lm.open_weights(remedy).header["part"] != part[1:]
        assert "state_dict_ema" not in torch.load("m.ckpt", weights_only=True)

    def test_on_the_command_line(self, capsys):
        arguments = ["--base=plain.pt", "--experts=[a.ckpt#state_dict_ema]", "--method=WeightAverage"]
        main(["merge", *arguments, "--output=m.pt"])
        assert lm.open_weights("m.pt")["b"].eq(1).all()
        assert "state_dict_ema is taken" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("source", "message"),
        [
            ("a.ckpt#ema", "no set of weights 'ema'; it holds state_dict, state_dict_ema, callbacks/EMA"),
            ("plain.pt#ema", "it is a state dict itself: leave #ema out"),
            ("plain.safetensors#ema", "holds one set of weights, and none is called 'ema'; leave #ema out"),
            ("gone.ckpt#ema", r"no file or folder gone\.ckpt"),
        ],
    )
    def test_one_that_is_not_there(self, source, message):
        with pytest.raises(lm.MergeError, match=message):
            lm.open_weights(source)

    def test_a_file_of_this_very_name_comes_first(self):
        Path("plain.pt").rename("run#1.pt")
        assert split_source("run#1.pt") == (Path("run#1.pt"), None)
        assert lm.open_weights("run#1.pt")["b"].eq(0).all()

    def test_other_mappings_of_tensors_are_none(self):
        torch.save({"state_dict": {"w": torch.ones(4, 4)}, "moments": {"w": torch.ones(4)}}, "b.ckpt")
        header = lm.open_weights("b.ckpt").header
        assert "others" not in header
        assert torch.equal(header["beside"]["moments"]["w"], torch.ones(4))
