"""The command line as a whole, and in a project of one's own."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, SaveConfigCallback
from lightning_merge.callbacks import FreezeBatchNorm
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_merge as lm
from lightning_merge.trainer import MergeCLI
from lightning_merge.trainer.cli import main
from tests.toys import quiet_trainer
from tests.trainer.commands import CONFIGS

DIGITS_SEARCH = ["search", f"--config={CONFIGS / 'fit/digits.yaml'}", "--method=IsoC", "--experts={noisy: a.ckpt}"]


def test_every_config_is_run_by_a_test():
    tested = {
        "fit/digits.yaml",
        "fit/folders.yaml",
        "fit/score_paper.yaml",
        "merge/score.yaml",
        "merge/iso_cts.yaml",
        "merge/ties.yaml",
        "merge/foundations.yaml",  # in test_align_and_repair.py
        "evaluate/held_out.yaml",
        "benchmark/digits.yaml",
        "benchmark/digits_all_methods.yaml",
        "benchmark/pacs.yaml",
        "benchmark/nonlocal.yaml",
    }
    assert {path.relative_to(CONFIGS).as_posix() for path in CONFIGS.rglob("*.yaml")} == tested


class Theirs(LightningModule):
    """A module that owes this package nothing."""

    def __init__(self, hidden: int):
        super().__init__()
        self.net = nn.Linear(4, hidden)

    def training_step(self, batch, batch_idx):
        return self.net(batch[0]).square().mean()

    def test_step(self, batch, batch_idx):
        self.log("mean", self.net(batch[0]).mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class TheirData(LightningDataModule):
    """Data that know nothing of domains."""

    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.randn(8, 4)), batch_size=4)

    test_dataloader = train_dataloader


class TestDropIn:
    """An existing project changes one word: ``LightningCLI(MyModel, MyData)`` -> ``MergeCLI(MyModel, MyData)``."""

    def cli(self, verb: str, *arguments: str) -> MergeCLI:
        quiet = ["--trainer.logger=false", "--trainer.max_epochs=1", "--trainer.enable_progress_bar=false"]
        return MergeCLI(Theirs, TheirData, args=[verb, *quiet, *arguments], seed_everything_default=1)

    def test_fit_merge_and_test(self, capsys):
        lm.save_weights("base.ckpt", Theirs(3).state_dict())
        for run in ("a", "b"):
            cli = self.cli("fit", "--model.hidden=3", f"--trainer.default_root_dir={run}")
            assert isinstance(cli.trainer, lm.MergeTrainer)
        runs = ["--experts={a: a, b: b}", "--method=WeightAverage", "--base=base.ckpt"]
        self.cli("merge", "--config=a/config.yaml", *runs)
        assert "wrote merged.ckpt" in capsys.readouterr().out
        merged, one, two = lm.open_weights("merged.ckpt"), lm.open_weights("a"), lm.open_weights("b")
        torch.testing.assert_close(merged["net.weight"], (one["net.weight"] + two["net.weight"]) / 2)
        self.cli("test", "--config=a/config.yaml", "--ckpt_path=merged.ckpt")

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["evaluate", "--model.hidden=3"], "TheirData says nothing of domains"),
            (["benchmark", "--model.hidden=3"], "data of several domains"),
            (["merge", "--model.hidden=3", "--experts=[nowhere]"], "no file or folder nowhere"),
        ],
    )
    def test_what_cannot_work_ends_in_one_sentence(self, arguments, message, capsys):
        with pytest.raises(SystemExit):
            self.cli(*arguments)
        assert message in capsys.readouterr().err.splitlines()[-1]


class TheirTrainer(Trainer):
    """A trainer of an existing project.

    Args:
        patience: How long they wait.
        kwargs: Lightning's.
    """

    def __init__(self, patience: int = 3, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.patience = patience
        self.fits = 0

    def fit(self, *args: Any, **kwargs: Any) -> None:
        self.fits += 1
        super().fit(*args, **kwargs)


class Ours(lm.MergeTrainer, TheirTrainer):
    """Theirs, with merging."""


class OursReversed(TheirTrainer, lm.MergeTrainer):
    """The other way round, with an argument that no other class knows."""

    def __init__(self, gain: float = 1.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.gain = gain


class Saving(Theirs):
    """A module that notes what it was made of."""

    def __init__(self, hidden: int = 2):
        super().__init__(hidden)
        self.save_hyperparameters()


class Plain(Theirs):
    """A module without arguments."""

    def __init__(self):
        super().__init__(2)


class TheirCLI(MergeCLI):
    """A command line with arguments of its own."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--width", type=int, default=5, help="Theirs.")
        parser.link_arguments("width", "model.hidden")


class TheirSaver(SaveConfigCallback):
    """Saves the config under another name."""

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        Path("saved").touch()


QUIET = ["--trainer.logger=false", "--trainer.max_epochs=1", "--trainer.enable_progress_bar=false"]


FIT = ["fit", *QUIET]


class TestTheirTrainer:
    """``class Ours(MergeTrainer, Theirs)``: what theirs takes and does stays."""

    def test_its_arguments_are_in_help_and_survive_yaml(self, capsys):
        with pytest.raises(SystemExit):
            MergeCLI(Theirs, TheirData, trainer_class=Ours, args=["fit", "--help"])
        assert "How long they wait." in " ".join(capsys.readouterr().out.split())
        callback = ["--trainer.callbacks+=FreezeBatchNorm", "--trainer.patience=7", "--model.hidden=3"]
        with pytest.raises(SystemExit):
            MergeCLI(Theirs, TheirData, trainer_class=Ours, args=["fit", *QUIET, *callback, "--print_config"])
        Path("c.yaml").write_text(capsys.readouterr().out)
        cli = MergeCLI(Theirs, TheirData, trainer_class=Ours, args=["fit", "--config=c.yaml"])
        assert (cli.trainer.patience, cli.trainer.fits) == (7, 1)
        assert any(isinstance(callback, FreezeBatchNorm) for callback in cli.trainer.callbacks)

    @pytest.mark.parametrize(
        ("trainer_class", "own"), [(Ours, {"patience": 7}), (OursReversed, {"patience": 7, "gain": 2.0})]
    )
    def test_a_new_trainer_has_all_arguments(self, trainer_class, own):
        callback = FreezeBatchNorm()
        trainer = trainer_class(callbacks=[callback], max_steps=5, accelerator="cpu", logger=False, **own)
        assert trainer.given_callbacks == [callback]
        again = copy.deepcopy(trainer).again(max_epochs=2)
        assert {name: getattr(again, name) for name in own} == own
        assert (type(again), again.max_steps, again.max_epochs) == (trainer_class, 5, 2)

    def test_a_trainer_that_cannot_merge_is_refused_with_what_to_write(self, capsys):
        def build(**kwargs: Any) -> Trainer:
            return Trainer(**kwargs)

        for given in (TheirTrainer, build):
            with pytest.raises(SystemExit) as ended:
                MergeCLI(Theirs, TheirData, trainer_class=given, args=["fit", "--model.hidden=3"])
            assert ended.value.code == 1
            assert "makes no MergeTrainer" in capsys.readouterr().err
        with pytest.raises(SystemExit):
            MergeCLI(Theirs, TheirData, trainer_class=TheirTrainer, args=["fit"])
        assert "`class Ours(MergeTrainer, TheirTrainer): pass`" in capsys.readouterr().err

    def test_a_function_that_makes_the_trainer(self):
        def build(max_epochs: int = 1) -> lm.MergeTrainer:
            return quiet_trainer(max_epochs=max_epochs)

        cli = MergeCLI(Theirs, TheirData, trainer_class=build, args=["fit", "--model.hidden=3"])
        assert cli.trainer.current_epoch == 1


class TestTheirCommandLine:
    """What ``LightningCLI`` takes, ``MergeCLI`` takes."""

    def test_arguments_by_position(self):
        cli = MergeCLI(Theirs, TheirData, TheirSaver, {"save_to_log_dir": False}, Ours, args=[*FIT, "--model.hidden=3"])
        assert isinstance(cli.trainer, Ours)
        assert Path("saved").is_file()

    @pytest.mark.parametrize(("model", "given"), [(Theirs, ["--model.hidden=3"]), (Saving, []), (Plain, [])])
    def test_fit_merge_and_test_whatever_the_module_notes(self, model, given):
        for run in ("a", "b"):
            MergeCLI(model, TheirData, args=[*FIT, *given, f"--trainer.default_root_dir={run}"])
        merge = ["merge", *QUIET, *given, "--experts={a: a, b: b}", "--method=WeightAverage"]
        MergeCLI(model, TheirData, args=merge)
        cli = MergeCLI(model, TheirData, args=["test", *QUIET, *given, "--ckpt_path=merged.ckpt"])
        assert torch.equal(cli.model.net.weight, lm.open_weights("merged.ckpt")["net.weight"])

    def test_without_a_run_nothing_runs(self):
        cli = MergeCLI(Plain, TheirData, run=False, args=QUIET)
        assert isinstance(cli.trainer, lm.MergeTrainer)
        assert cli.trainer.current_epoch == 0
        cli.trainer.fit(cli.model, cli.datamodule)

    def test_callbacks_by_default_and_no_config_saved(self):
        frozen = FreezeBatchNorm()
        defaults = {"callbacks": [frozen], "max_epochs": 1, "logger": False}
        cli = MergeCLI(Plain, TheirData, save_config_callback=None, trainer_defaults=defaults, args=["fit"])
        assert cli.trainer.given_callbacks == [frozen]
        assert not Path("config.yaml").exists()

    def test_arguments_of_their_own_that_are_linked(self):
        cli = TheirCLI(Theirs, TheirData, args=[*FIT, "--width=4"])
        assert cli.model.net.out_features == 4
        TheirCLI(Theirs, TheirData, args=["merge", "--config=config.yaml", "--experts=[checkpoints]"])
        assert Path("merged.ckpt").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fit"], "`fit` needs a model"),
        (["fit", "--model=Expert", "--model.backbone=resnet18", "--model.num_classes=2"], "names no library"),
        (
            ["fit", "--model=Expert", "--model.num_classes=2", "--model.backbone=timm/resnet18"]
            + ["--model.pretrained=x.pt"],
            "no weight file x.pt",
        ),
        (["merge", "--base=b", "--experts=[a]", "--method=TIES", "--method.density=3"], "density must lie in (0, 1]"),
        (["statistics"], "`statistics` needs a model"),
        (["merge", "--base=b.ckpt"], "nothing to merge"),
        (["search"], "`search` needs a model"),
        ([*DIGITS_SEARCH, "--grid={density: [0.1]}"], "IsoC has no field 'density'"),
        ([*DIGITS_SEARCH, "--grid={scale: []}"], "'scale' is empty"),
        ([*DIGITS_SEARCH, "--grid={scale: [one]}"], "scale must be a finite number, got 'one'"),
        ([*DIGITS_SEARCH, "--output=merged.zip"], "Cannot tell how to write merged.zip"),
        ([*DIGITS_SEARCH, "--experts={sepia: a.ckpt}"], "The expert 'sepia' has no domain to validate on"),
        (["merge", "--experts=[a.ckpt]"], "give it with --base"),
        (["merge", "--experts=[a.ckpt]", "--base=b.ckpt"], "no file or folder b.ckpt"),
    ],
)
def test_what_cannot_work_ends_in_one_sentence(arguments, message, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 1
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith("lightning-merge: ")
    assert message in error.splitlines()[-1]
    assert "Traceback" not in error


@pytest.mark.parametrize(
    "first", [[], [f"--config={CONFIGS / 'merge/score.yaml'}"], ["--method=SCORE", "--method.z=1"]]
)
def test_another_method_on_the_command_line_has_its_own_defaults(first, capsys):
    """A default that the parser knows would hand its arguments on to the method that replaces it."""
    with pytest.raises(SystemExit):
        main(["merge", *first, "--method=MagMax", "--print_config"])
    method = yaml.safe_load(capsys.readouterr().out)["method"]
    assert method == {"class_path": "lightning_merge.methods.MagMax", "init_args": {"scale": 0.5}}


@pytest.mark.parametrize("verb", ["fit", "merge", "search", "statistics", "evaluate", "benchmark", "analyze"])
def test_every_verb_prints_a_config_that_it_reads(verb, capsys):
    with pytest.raises(SystemExit):
        main([verb, "--model=Expert", "--model.backbone=timm/resnet18", "--model.num_classes=3", "--print_config"])
    Path("c.yaml").write_text(capsys.readouterr().out)
    with pytest.raises(SystemExit):
        main([verb, "--config=c.yaml", "--print_config"])
    assert yaml.safe_load(capsys.readouterr().out) == yaml.safe_load(Path("c.yaml").read_text())


def test_help_speaks_of_every_argument(capsys):
    with pytest.raises(SystemExit):
        main(["benchmark", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "Leave each domain out in turn" in text
    assert "The methods to compare, by the name of their row." in text


def test_a_config_that_is_no_text(capsys):
    Path("c.yaml").write_bytes(b"base: \xc3\x28")
    with pytest.raises(SystemExit) as ended:
        main(["merge", "--config=c.yaml"])
    assert ended.value.code == 1
    assert "lightning-merge: A file given by --config is no text in UTF-8" in capsys.readouterr().err
