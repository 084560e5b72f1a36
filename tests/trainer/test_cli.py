"""The command line, as a user types it."""

from __future__ import annotations

import copy
import json
import re
import shlex
import shutil
import subprocess
import sys
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
from lightning_merge.checkpoints import save_weights
from lightning_merge.trainer import MergeCLI
from lightning_merge.trainer.cli import main
from tests.conftest import ROOT, isolated
from tests.toys import base_weights, digit_tasks, expert_weights, image_folders, quiet_trainer, register_tiny_clip

CONFIGS = ROOT / "configs"
TINY_DIGITS = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=4", "--trainer.enable_progress_bar=false"]
TINY_VIT = [
    "--model.pretrained=false",
    "--model.backbone=timm/vit_tiny_patch16_224",
    "--model.backbone_args={img_size: 32, embed_dim: 16, depth: 1, num_heads: 2}",
]

DIGITS_SEARCH = ["search", f"--config={CONFIGS / 'fit/digits.yaml'}", "--method=IsoC", "--experts={noisy: a.ckpt}"]


def fit(domain: str, *more: str) -> str:
    """Fit an expert by the digits' config and return its run folder."""
    config = f"--config={CONFIGS / 'fit/digits.yaml'}"
    folder = f"experts/{domain}"
    main(
        ["fit", config, *TINY_DIGITS, f"--data.train_domains=[{domain}]", f"--trainer.default_root_dir={folder}", *more]
    )
    return folder


def read_jsonl(path: str) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


@pytest.fixture(scope="module")
def fitted(tmp_path_factory) -> Path:
    """The run folders of a base and of two experts that start from it, fitted once."""
    folder = tmp_path_factory.mktemp("fitted")
    with isolated(folder):
        fit("upright")
        for domain in ("rotated", "noisy"):
            fit(domain, "--model.weights=experts/upright")
    return folder / "experts"


@pytest.fixture
def experts(fitted) -> dict[str, str]:
    """A copy of the runs that a test may write to; the base is ``experts/upright``."""
    shutil.copytree(fitted, "experts")
    return {domain: f"experts/{domain}" for domain in ("rotated", "noisy")}


class TestFitMergeEvaluate:
    def test_the_whole_way(self, experts, capsys):
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

    def test_files_alone_need_no_model(self, experts):
        command = ["merge", "--base=experts/upright", "--method=TIES", "--method.density=0.3", "--output=m.safetensors"]
        main([*command, f"--experts={json.dumps(list(experts.values()))}"])
        by_hand = lm.merge("experts/upright", list(experts.values()), lm.methods.TIES(density=0.3)).weights
        assert all(torch.equal(lm.open_weights("m.safetensors")[name], tensor) for name, tensor in by_hand.items())

    def test_two_processes_fit_merge_and_evaluate_as_one(self, experts):
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


def test_statistics_and_what_they_are_for(experts, capsys):
    more = ["--method=RegMean", f"--experts={json.dumps(experts)}", "--base=experts/upright"]
    with pytest.raises(SystemExit):
        main(["merge", *more])
    said = capsys.readouterr().err
    commands = [line.split("`")[1] for line in said.splitlines() if "`" in line]
    assert len(commands) == 2
    for command in commands:  # what the error says works
        main(shlex.split(command)[1:] + ["--batches=2"])
        assert re.search(
            r"gram of 12\d examples; wrote experts/\w+/\S*\.statistics\.safetensors", capsys.readouterr().out
        )
    main(["merge", *more])
    main(["merge", *more, f"--config={experts['noisy']}/config.yaml", "--data.test_domains=[thick]"])
    beside = Path(lm.open_weights(experts["noisy"]).path).with_suffix(".statistics.safetensors")
    found = {"rotated": beside.as_posix(), "noisy": beside.as_posix()}
    with pytest.raises(SystemExit):
        main(["merge", *more, f"--statistics={json.dumps(found)}"])
    assert "statistics of other weights than those of expert rotated" in capsys.readouterr().err


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


class TestEveryConfigRuns:
    def test_all_are_tested(self):
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

    def test_fit_folders(self):
        root = image_folders(Path("data"))
        main(
            ["fit", f"--config={CONFIGS / 'fit/folders.yaml'}", f"--data.root={root}", "--data.train_domains=[photo]"]
            + [*TINY_DIGITS, *TINY_VIT, "--model.num_classes=2", "--data.batch_size=4"]
            + ["--trainer.default_root_dir=run"]
        )
        assert len(lm.open_weights("run")) > 0

    def test_fit_score_paper(self):
        import open_clip

        name = register_tiny_clip(Path())
        torch.save(open_clip.create_model(name).state_dict(), "clip.pt")
        names = ["dog", "elephant", "giraffe", "guitar", "horse", "house", "person"]
        root = image_folders(Path("data"), domains=["photo", "sketch"], classes=names, n=10)
        main(
            ["fit", f"--config={CONFIGS / 'fit/score_paper.yaml'}", f"--data.root={root}"]
            + [f"--model.backbone=open_clip/{name}", "--model.pretrained=clip.pt", "--data.train_domains=[photo]"]
            + ["--model.templates=['a photo of a {}.']", "--data.num_workers=0", "--data.batch_size=8"]
            + ["--model.warmup_steps=1", *TINY_DIGITS, "--trainer.default_root_dir=run"]
        )
        assert lm.open_weights("run")["head.weight"].shape == (7, 16)

    @pytest.mark.parametrize("name", ["score", "iso_cts", "ties"])
    def test_merge(self, name):
        for i in range(3):
            lm.save_weights(f"{i}.safetensors", {"w": torch.randn(6, 6)})
        main(
            ["merge", f"--config={CONFIGS / 'merge' / name}.yaml", "--base=0.safetensors"]
            + ["--experts=[1.safetensors, 2.safetensors]", "--output=m.safetensors"]
        )
        assert lm.open_weights("m.safetensors")["w"].shape == (6, 6)

    def test_benchmark_digits(self, capsys):
        """Both as they are, but for the number of steps and images; the second takes the experts of the first."""
        few = {"AdaMerging": {"steps": 2}, "WUDI": {"iterations": 2}, "DOGE": {"iterations": 2}}
        times = []
        for name in ("digits", "digits_all_methods"):
            config = yaml.safe_load((CONFIGS / "benchmark" / f"{name}.yaml").read_text())
            for method in config["methods"].values():
                method["init_args"] = method.get("init_args", {}) | few.get(method["class_path"], {})
            Path("c.yaml").write_text(yaml.safe_dump(config))
            main(
                ["benchmark", "--config=c.yaml", *TINY_DIGITS, "--pretrain.max_epochs=1"]
                + ["--domains=[noisy, thick, slanted]", "--statistics.batches=1"]
                + [f"--report={json.dumps(name == 'digits_all_methods')}"]
            )
            shown = capsys.readouterr().out
            assert all(f"| {row} " in shown for row in config["methods"])
            fits = [Path("results/digits/base"), *Path("results/digits/experts").iterdir()]
            times.append({folder: (folder / "expert.ckpt").stat().st_mtime_ns for folder in fits})
        assert times[0] == times[1]
        assert len(times[0]) == 4

    def test_benchmark_pacs(self, capsys):
        root = image_folders(Path("data"))
        main(
            ["benchmark", f"--config={CONFIGS / 'benchmark/pacs.yaml'}", f"--data.root={root}", *TINY_DIGITS, *TINY_VIT]
            + ["--model.num_classes=2", "--data.batch_size=4", "--output=out"]
        )
        assert "| SCORE, full " in capsys.readouterr().out

    def test_benchmark_nonlocal(self, capsys):
        root = digit_tasks(Path("tasks"))
        sources = {"mnist": "inverted", "fashion_mnist": "parity", "usps": "halves", "notmnist": "upright"}
        for name, source in {**sources, "cifar10": "upright"}.items():
            shutil.copy(root / f"{source}.npz", root / f"{name}.npz")
        main(
            ["benchmark", f"--config={CONFIGS / 'benchmark/nonlocal.yaml'}", f"--data.root={root}", *TINY_DIGITS]
            + ["--model.backbone_args={stages: [[8], [8], [8], [8]], hidden: [8], in_chans: 1, img_size: 16}"]
            + ["--foundations.merged=[2]", "--foundations.seeds=[0]", "--foundations.max_epochs=1"]
            + ["--foundations.batches=1", "--foundations.batch_size=32", "--data.max_test=50"]
        )
        shown = capsys.readouterr().out
        assert "| activations + TACT " in shown
        assert "Consensus TA" in shown


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
QUIET += ["--trainer.enable_model_summary=false", "--trainer.accelerator=cpu"]
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
