"""Merging at the end of a fit, in Lightning's own Trainer."""

from __future__ import annotations

import copy
import hashlib
from datetime import timedelta
from pathlib import Path

import lightning.pytorch.callbacks
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from lightning_merge.callbacks import MergeAfterFit, RecordStatistics, merge_after_fit
from torch import nn

import lightning_merge as lm
from lightning_merge.checkpoints import open_weights
from lightning_merge.methods import TIES, AdaMerging, Fisher, MergeMethod, TaskArithmetic, WeightAverage
from lightning_merge.trainer import MergeCLI, MergeTrainer
from tests.callbacks.project import Data, Project, fork, make_net, make_trainer, moved, read, write_models
from tests.toys import tiny_expert

EXPERTS = ["expert0.ckpt", "expert1.ckpt"]


def sha256(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def assert_mean(path: str, run: dict[str, torch.Tensor]) -> None:
    """The file is the mean of both experts and the run."""
    found, one, two = read(path), read(EXPERTS[0]), read(EXPERTS[1])
    assert found.keys() == run.keys()
    for name in (name for name in run if "num_batches" not in name):
        torch.testing.assert_close(found[name], (one[name] + two[name] + run[name]) / 3)


class TestWhatIsMerged:
    def test_the_last_weights_without_checkpoints(self):
        project, callback = write_models(), MergeAfterFit("base.ckpt", EXPERTS, WeightAverage(), output="out/m.ckpt")
        trainer = make_trainer(callback)
        trainer.fit(project, Data())
        assert_mean("out/m.ckpt", project.state_dict())
        files = lm.merge("base.ckpt", [*EXPERTS, project.state_dict()], WeightAverage())
        assert all(torch.equal(tensor, files.weights[name]) for name, tensor in read("out/m.ckpt").items())
        loaded = Project.load_from_checkpoint(callback.output, weights_only=True)
        before = trainer.test(loaded, Data(), verbose=False)
        assert trainer.test(project, Data(), ckpt_path=callback.output, verbose=False) == before
        manifest = torch.load("out/m.ckpt", weights_only=True)["merge"]
        assert manifest["experts"]["this run"] == {"path": None, "sha256": None}
        assert manifest["experts"]["expert0.ckpt"]["sha256"] == sha256("expert0.ckpt")
        assert manifest["base"]["sha256"] == sha256("base.ckpt")

    @pytest.mark.parametrize("which", [None, "best", "last"])
    def test_a_checkpoint(self, which):
        class Worse(Callback):
            def on_train_epoch_end(self, trainer, pl_module):
                with torch.no_grad():
                    pl_module.head.bias += 100 * trainer.current_epoch * torch.arange(3)

        project = write_models()
        checkpoint = ModelCheckpoint(dirpath="run", monitor="val/loss", save_last=True)
        callback = MergeAfterFit("base.ckpt", EXPERTS, WeightAverage(), checkpoint=which)
        make_trainer(Worse(), checkpoint, callback, max_epochs=3, enable_checkpointing=True).fit(project, Data())
        assert not torch.equal(read(checkpoint.best_model_path)["head.bias"], project.head.bias)
        chosen = "run/last.ckpt" if which == "last" else checkpoint.best_model_path
        assert_mean("merged.ckpt", project.state_dict() if which == "last" else read(chosen))
        manifest = torch.load("merged.ckpt", weights_only=True)["merge"]
        if which != "last":
            assert manifest["experts"]["this run"]["sha256"] == sha256(chosen)

    @pytest.mark.parametrize("which", [None, "average"])
    def test_the_average(self, which):
        average = getattr(lightning.pytorch.callbacks, "EMAWeightAveraging", None)
        if average is None:
            pytest.skip("this Lightning has no EMAWeightAveraging")
        project = write_models()
        callback = MergeAfterFit("base.ckpt", EXPERTS, WeightAverage(), checkpoint=which)
        weights, last = {}, Callback()
        last.on_train_end = lambda trainer, module: weights.update(copy.deepcopy(module.state_dict()))
        make_trainer(last, average(decay=0.5), callback).fit(project, Data())
        assert not torch.equal(weights["head.weight"], project.head.weight)
        assert_mean("merged.ckpt", project.state_dict())

    def test_what_is_excluded_is_this_run_s(self):
        project = write_models("net")
        callback = MergeAfterFit("base.ckpt", EXPERTS, WeightAverage(), exclude=["head.*"])
        make_trainer(callback, accumulate_grad_batches=2).fit(project, Data())
        found = read("merged.ckpt")
        assert torch.equal(found["head.weight"], project.head.weight)
        mean = (read(EXPERTS[0])["0.weight"] + read(EXPERTS[1])["0.weight"] + project.net[0].weight) / 3
        torch.testing.assert_close(found["net.0.weight"], mean)
        Project().load_state_dict(torch.load("merged.ckpt", weights_only=True)["state_dict"], strict=True)

    def test_several_methods_give_several_candidates(self):
        methods = {"average": WeightAverage(), "TIES": TIES()}
        callback = MergeAfterFit("base.ckpt", EXPERTS, methods=methods, output="out/m.ckpt")
        assert callback.outputs == {"average": "out/m-average.ckpt", "TIES": "out/m-TIES.ckpt"}
        with pytest.raises(lm.MergeError, match="several outputs"):
            _ = callback.output
        project = write_models()
        make_trainer(callback, MergeAfterFit("base.ckpt", EXPERTS, TIES(), output="m.ckpt")).fit(project, Data())
        assert all(torch.equal(tensor, read("out/m-TIES.ckpt")[name]) for name, tensor in read("m.ckpt").items())
        for name, method in methods.items():
            expected = lm.merge("base.ckpt", [*EXPERTS, project.state_dict()], method).weights
            assert all(torch.equal(tensor, expected[key]) for key, tensor in read(callback.outputs[name]).items())
        assert MergeAfterFit("b", ["e"], methods=methods, output="{method}/m.ckpt").outputs["TIES"] == "TIES/m.ckpt"


class TestStrangers:
    """Experts, and runs, that do not come from the base."""

    @pytest.fixture(autouse=True)
    def files(self):
        for seed, name in enumerate(("base", "other")):
            torch.manual_seed(seed)
            self.project = Project(width=200)
            lm.save_weights(f"{name}.ckpt", self.project.state_dict())
            lm.save_weights(f"{name}-expert.ckpt", moved(self.project.state_dict(), seed))

    def test_an_earlier_expert_is_refused_before_the_fit(self):
        before = {name: tensor.clone() for name, tensor in self.project.state_dict().items()}
        callback = MergeAfterFit("base.ckpt", {"earlier": "other-expert.ckpt"}, WeightAverage())
        with pytest.raises(lm.MergeError, match="do not come from this base: earlier"):
            make_trainer(callback).fit(self.project, Data())
        assert all(torch.equal(before[name], tensor) for name, tensor in self.project.state_dict().items())
        allowed = MergeAfterFit("base.ckpt", ["other-expert.ckpt"], WeightAverage(), allow_strangers=True)
        make_trainer(allowed).fit(self.project, Data())
        assert Path(allowed.output).is_file()

    def test_of_this_run_it_is_said_and_nothing_is_lost(self):
        callback = MergeAfterFit("base.ckpt", ["base-expert.ckpt"], WeightAverage())
        with pytest.warns(UserWarning, match=r"hardly look as if they came from this base: this run \("):
            make_trainer(callback).fit(self.project, Data())
        assert Path(callback.output).is_file()


class TestBesideTheWeights:
    def test_the_data_module_and_extra_state(self):
        class Options(Data):
            def __init__(self, config: dict) -> None:
                super().__init__()
                self.save_hyperparameters(config)

        class Counts(Project):
            steps = 0

            def training_step(self, batch, batch_idx):
                self.steps += 1
                return super().training_step(batch, batch_idx)

            def get_extra_state(self):
                return {"steps": self.steps}

            def set_extra_state(self, state):
                self.steps = state["steps"]

        write_models()
        project, callback = Counts(), MergeAfterFit("base.ckpt", EXPERTS, WeightAverage())
        make_trainer(callback).fit(project, Options({"size": 3}))
        assert Options.load_from_checkpoint(callback.output, weights_only=True).hparams == {"size": 3}
        assert Counts.load_from_checkpoint(callback.output, weights_only=True).steps == project.steps == 12


class TestLifeOfARun:
    def test_fast_dev_run_writes_nothing(self):
        project = write_models()
        Path("merged.ckpt").write_text("from an earlier run")
        seen = []

        class Seen(WeightAverage):
            def update(self, deltas, context):
                seen.append(context.name)
                return super().update(deltas, context)

        checkpoint = ModelCheckpoint(dirpath="run", monitor="val/loss")
        callback = MergeAfterFit("base.ckpt", EXPERTS, Seen(), checkpoint="best")
        make_trainer(callback, checkpoint, fast_dev_run=True, enable_checkpointing=True).fit(project, Data())
        assert seen
        assert Path("merged.ckpt").read_text() == "from an earlier run"

    def test_resumed_and_twice_in_one_trainer(self):
        def checkpoints():
            return ModelCheckpoint(dirpath="run", filename="{epoch}", save_top_k=-1)

        def callbacks():
            return MergeAfterFit("base.ckpt", EXPERTS, WeightAverage()), checkpoints()

        project = write_models()
        trainer = make_trainer(*callbacks(), enable_checkpointing=True)
        trainer.fit(project, Data())
        once = read("merged.ckpt")
        trainer.fit_loop.max_epochs = 3
        trainer.fit(project, Data())
        assert_mean("merged.ckpt", project.state_dict())
        assert not torch.equal(once["head.weight"], read("merged.ckpt")["head.weight"])
        Path("merged.ckpt").unlink()
        resumed = Project()
        again = make_trainer(*callbacks(), enable_checkpointing=True, max_epochs=4)
        again.fit(resumed, Data(), ckpt_path="run/epoch=2.ckpt")
        assert_mean("merged.ckpt", resumed.state_dict())

    @pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
    def test_a_fit_that_fails_merges_nothing(self, error):
        class Fails(Callback):
            def on_train_epoch_end(self, trainer, pl_module):
                raise error

        with pytest.raises((RuntimeError, KeyboardInterrupt, SystemExit)):
            make_trainer(Fails(), MergeAfterFit("base.ckpt", EXPERTS)).fit(write_models(), Data())
        assert not Path("merged.ckpt").exists()

    def test_hooks_of_the_module_s_checkpoints(self):
        class Frozen(Project):
            def __init__(self, **arguments):
                super().__init__(**arguments)
                self.strict_loading = False

            def on_save_checkpoint(self, checkpoint):
                checkpoint["words"] = ["a", "b"]
                checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if "net.0" not in k}

            def on_load_checkpoint(self, checkpoint):
                assert checkpoint["words"] == ["a", "b"]

        write_models()
        project = Frozen()
        project.load_state_dict(read("base.ckpt"))
        checkpoint = ModelCheckpoint(dirpath="run", monitor="val/loss")
        callback = MergeAfterFit("base.ckpt", EXPERTS, WeightAverage())
        trainer = make_trainer(checkpoint, callback, enable_checkpointing=True)
        trainer.fit(project, Data())
        assert "net.0.weight" not in read(callback.output)
        trainer.test(project, Data(), ckpt_path=callback.output, verbose=False)

    def test_layers_that_are_made_late(self):
        class Late(Project):
            def __init__(self):
                super().__init__()
                del self.net, self.head
                self.net = None

            def configure_model(self):
                if self.net is None:
                    self.net, self.head = make_net(), nn.Linear(5, 3)

        write_models()
        project = Late()
        make_trainer(MergeAfterFit("base.ckpt", EXPERTS, WeightAverage())).fit(project, Data())
        assert_mean("merged.ckpt", project.state_dict())
        with pytest.raises(lm.MergeError, match=r"no file or folder gone\.ckpt"):
            make_trainer(MergeAfterFit("base.ckpt", ["gone.ckpt"])).fit(Late(), Data())


class TestRefusals:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"experts": ["gone.ckpt"]}, r"no file or folder gone\.ckpt"),
            ({"base": "gone.ckpt"}, r"no file or folder gone\.ckpt"),
            ({"output": "expert0.ckpt"}, "is one of the models to merge"),
            ({"output": "base.ckpt"}, "is one of the models to merge"),
            ({"checkpoint": "best"}, "no ModelCheckpoint monitors a metric"),
            ({"checkpoint": "average"}, "nothing averages them"),
            ({"method": Fisher()}, "needs statistics of the data of expert expert0"),
            ({"method": AdaMerging()}, "give the trainer a DomainDataModule"),
            ({"exclude": ["nothing.*"]}, "'nothing.*' matches no parameter"),
        ],
    )
    def test_before_the_fit(self, arguments, message):
        project = write_models()
        before = lm.open_weights(project.state_dict()).digest()
        callback = MergeAfterFit(**{"base": "base.ckpt", "experts": EXPERTS, **arguments})
        with pytest.raises(lm.MergeError, match=message):
            make_trainer(callback).fit(project, Data())
        assert lm.open_weights(project.state_dict()).digest() == before
        assert not Path("merged.ckpt").exists()

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"output": "merged.safetensors"}, "end the output merged.safetensors in .ckpt"),
            ({"method": TIES(), "methods": {"a": TIES()}}, "one method or several"),
            ({"methods": {"a/b": TIES(), "c": TIES()}}, "cannot be part of a file's name"),
        ],
    )
    def test_at_once(self, arguments, message):
        with pytest.raises(lm.MergeError, match=message):
            MergeAfterFit("base.ckpt", EXPERTS, **arguments)


class TestMethodsThatNeedData:
    @pytest.fixture
    def base(self):
        model = tiny_expert(learning_rate=1e-2)
        lm.save_weights("base.ckpt", model.state_dict())
        return model

    def fit(self, model, domain, *callbacks):
        trainer = make_trainer(*callbacks, enable_checkpointing=True, limit_train_batches=3, limit_val_batches=1)
        trainer.fit(model, lm.Digits(train_domains=[domain]))

    def test_statistics_that_were_recorded_in_the_same_fit(self, base):
        checkpoint = ModelCheckpoint(dirpath="thick", filename="expert")
        self.fit(base, "thick", RecordStatistics(["fisher"], batches=2), checkpoint)
        base.load_state_dict(read("base.ckpt"))
        checkpoint = ModelCheckpoint(dirpath="noisy", filename="expert")
        merging = MergeAfterFit("base.ckpt", ["thick/expert.ckpt"], Fisher())
        with pytest.raises(lm.MergeError, match=r"put RecordStatistics\(kinds=\['fisher'\]\) before MergeAfterFit"):
            self.fit(base, "noisy", merging, RecordStatistics(["fisher"], batches=2), checkpoint)
        monitored = ModelCheckpoint(dirpath="noisy", monitor="val/accuracy")
        last = MergeAfterFit("base.ckpt", ["thick/expert.ckpt"], Fisher(), checkpoint="last")
        with pytest.raises(lm.MergeError, match="of the best checkpoint where a metric is monitored"):
            self.fit(base, "noisy", RecordStatistics(["fisher"]), last, monitored)
        for skipping in ({"every_n_epochs": 3}, {"save_top_k": 0}):
            skips = ModelCheckpoint(dirpath="noisy", **skipping)
            with pytest.raises(lm.MergeError, match="no ModelCheckpoint is written after the last of 2 epochs"):
                self.fit(base, "noisy", RecordStatistics(["fisher"], batches=2), merging, skips)
        self.fit(base, "noisy", RecordStatistics(["fisher"], batches=2), merging, checkpoint)
        expected = lm.merge("base.ckpt", ["thick/expert.ckpt", "noisy/expert.ckpt"], Fisher())
        found = read("merged.ckpt")
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.weights.items())
        assert torch.load("merged.ckpt", weights_only=True)["merge"]["statistics"].keys() == {
            "thick/expert.ckpt",
            "this run",
        }

    def test_images_of_the_experts_domains(self, base):
        method = AdaMerging(steps=2, lr=0.05)
        lm.save_weights("thick.ckpt", moved(read("base.ckpt"), 1))
        self.fit(base, "noisy", MergeAfterFit("base.ckpt", {"thick": "thick.ckpt"}, method, name="noisy"))
        data = lm.Digits(train_domains=["noisy"]).training_images(["thick", "noisy"], base)
        experts = {"thick": "thick.ckpt", "noisy": base.state_dict()}
        expected = lm.merge("base.ckpt", experts, method, module=base, data=data).weights
        found = read("merged.ckpt")
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
        with pytest.raises(lm.MergeError, match="there is no domain 'this run'"):
            self.fit(base, "noisy", MergeAfterFit("base.ckpt", {"thick": "thick.ckpt"}, method))


@fork
class TestManyProcesses:
    def fit(self, processes: int, *callbacks, **arguments) -> None:
        forked = DDPStrategy(start_method="fork", timeout=timedelta(minutes=5))  # a wait without end is another error
        strategy = forked if processes > 1 else "auto"
        make_trainer(*callbacks, devices=processes, strategy=strategy, **arguments).fit(write_models(), Data())

    def test_the_same_weights_on_any_number_of_processes(self):
        """Nothing is learnt, so that the runs are the same on any number of processes."""

        class Still(Callback):
            def on_train_start(self, trainer, pl_module):
                trainer.optimizers[0].param_groups[0]["lr"] = 0.0

        found = []
        for processes in (1, 2, 3):
            callback = MergeAfterFit("base.ckpt", EXPERTS, TIES(), exclude=["*running*"], output=f"{processes}.ckpt")
            self.fit(processes, Still(), callback)
            found.append({k: v for k, v in read(callback.output).items() if "running" not in k and "num_b" not in k})
        for other in found[1:]:
            assert all(torch.equal(other[name], tensor) for name, tensor in found[0].items())

    def test_what_is_merged_is_the_first_process_s(self):
        checkpoint = ModelCheckpoint(dirpath="run", filename="last")
        self.fit(2, checkpoint, MergeAfterFit("base.ckpt", EXPERTS, WeightAverage()), enable_checkpointing=True)
        assert_mean("merged.ckpt", read("run/last.ckpt"))

    def test_a_failure_at_the_end_stops_all(self, monkeypatch):
        def full(path, content):
            raise lm.MergeError(f"Could not write {path}: No space left on device.")

        monkeypatch.setattr(merge_after_fit, "save_checkpoint", full)
        with pytest.raises(Exception, match="No space left on device"):
            self.fit(2, MergeAfterFit("base.ckpt", EXPERTS))
        assert list(Path().glob("*merged*")) == []

    def test_an_expert_that_only_the_first_process_sees(self, monkeypatch):
        from lightning_merge.checkpoints import adapters as lora

        def only_first(source, name=None):
            if source == "expert1.ckpt" and torch.distributed.is_initialized() and torch.distributed.get_rank():
                raise lm.MergeError("There is no file here.")
            return open_weights(source, name)

        monkeypatch.setattr(lora, "open_weights", only_first)
        checkpoint = ModelCheckpoint(dirpath="run", filename="last")
        self.fit(2, checkpoint, MergeAfterFit("base.ckpt", EXPERTS, WeightAverage()), enable_checkpointing=True)
        assert_mean("merged.ckpt", read("run/last.ckpt"))


def test_short_names_on_the_command_line():
    write_models()
    config = """
    trainer:
      accelerator: cpu
      max_epochs: 1
      logger: false
      enable_progress_bar: false
      enable_model_summary: false
      callbacks:
        - class_path: MergeAfterFit
          init_args:
            base: base.ckpt
            experts: {a: expert0.ckpt, b: expert1.ckpt}
            methods:
              average: WeightAverage
              TA: {class_path: TaskArithmetic, init_args: {scale: 0.5}}
            exclude: [head.*]
    """
    Path("fit.yaml").write_text(config)
    cli = MergeCLI(Project, Data, args=["fit", "--config=fit.yaml"])
    callback = next(c for c in cli.trainer.callbacks if isinstance(c, MergeAfterFit))
    assert callback.methods["TA"] == TaskArithmetic(scale=0.5)
    assert set(callback.outputs.values()) == {"merged-average.ckpt", "merged-TA.ckpt"}
    assert all(Path(path).is_file() for path in callback.outputs.values())
    assert isinstance(cli.trainer, MergeTrainer)
    assert isinstance(callback.methods["average"], MergeMethod)
    assert torch.equal(read("merged-TA.ckpt")["head.weight"], cli.model.head.weight)
