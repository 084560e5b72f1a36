"""Only the difference to the base is saved."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning_merge.callbacks import SaveTaskVector
from safetensors.torch import load_file

import lightning_merge as lm
from lightning_merge.methods import TIES
from lightning_merge.models.fitted import average_callback
from tests.toys import tiny_expert

QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
FILE = "last.task_vector.safetensors"


def trainer(*callbacks, **arguments) -> Trainer:
    settings = {**QUIET, "max_epochs": 2, "limit_train_batches": 3, "limit_val_batches": 1, "devices": 1}
    return Trainer(callbacks=list(callbacks), **{**settings, **arguments})


def data() -> lm.Digits:
    return lm.Digits(train_domains=["noisy"])


@pytest.fixture
def model():
    """An expert before its fit, of which ``backbone.safetensors`` holds the backbone and ``base.ckpt`` everything."""
    expert = tiny_expert(learning_rate=1e-2)
    lm.save_weights("base.ckpt", expert.state_dict())
    lm.save_weights("backbone.safetensors", expert.backbone.state_dict())
    return expert


def keeps(**arguments) -> ModelCheckpoint:
    return ModelCheckpoint(dirpath="run", filename="last", **arguments)


def test_is_the_checkpoint_as_an_expert(model):
    callback = SaveTaskVector("base.ckpt")
    trainer(keeps(), callback).fit(model, data())
    assert callback.path == Path("run").absolute() / FILE
    assert sorted(path.name for path in Path("run").iterdir()) == ["last.ckpt", FILE]
    one, other = (lm.merge("base.ckpt", [path], TIES()) for path in (callback.path, "run/last.ckpt"))
    assert all(torch.equal(one.weights[name], tensor) for name, tensor in other.weights.items())
    opened, base = lm.open_task_vector(callback.path, "base.ckpt"), lm.open_weights("base.ckpt")
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(opened[name], tensor)
    assert opened.digest() == lm.open_weights("run/last.ckpt").digest()
    assert opened.header["task_vector"]["base"] == {"path": "base.ckpt", "digest": base.digest()}


def test_of_a_bare_backbone_it_keeps_the_head_as_it_is(model):
    trainer(keeps(), SaveTaskVector("backbone.safetensors", output="x.safetensors", dtype="bfloat16", rank=2)).fit(
        model, data()
    )
    stored, head = load_file("x.safetensors"), model.head.weight.detach()
    assert torch.equal(stored["own.head.weight"], head)
    assert {t.dtype for k, t in stored.items() if not k.startswith("own")} == {torch.bfloat16}
    assert any(key.startswith("left.stages") for key in stored)
    merged = lm.merge("backbone.safetensors", {"x": "x.safetensors"}, TIES(), exclude=["head.*"])
    assert torch.equal(merged.for_task("x")["head.weight"], head)


def test_the_best_checkpoint(model):
    best = keeps(monitor="val/accuracy", mode="max", save_top_k=1)
    last = SaveTaskVector("base.ckpt", output="x.safetensors", checkpoint="last")
    callbacks = [best, SaveTaskVector("base.ckpt"), last]
    trainer(*callbacks, max_epochs=3, limit_val_batches=1.0).fit(model, data())
    (found,) = Path("run").glob("*.task_vector.safetensors")
    assert found.name == Path(best.best_model_path).stem + ".task_vector.safetensors"
    digests = [lm.open_task_vector(path, "base.ckpt").digest() for path in (found, "x.safetensors")]
    assert digests == [lm.open_weights(best.best_model_path).digest(), lm.open_weights(model.state_dict()).digest()]


def test_no_checkpoint_holds_the_last_weights(model):
    callback = SaveTaskVector("base.ckpt")
    trainer(ModelCheckpoint(dirpath="run", every_n_epochs=2), callback, max_epochs=3).fit(model, data())
    assert callback.path.name == FILE
    assert lm.open_task_vector(callback.path, "base.ckpt").digest() == lm.open_weights(model.state_dict()).digest()


def test_the_average_of_the_weights(model):
    averaging = pytest.importorskip("lightning.pytorch.callbacks.weight_averaging")
    ema = averaging.EMAWeightAveraging(decay=0.5)
    trained = trainer(ema, keeps(), SaveTaskVector("base.ckpt", output="x.safetensors", checkpoint="average"))
    trained.fit(model, data())
    assert average_callback(trained) is ema
    opened = lm.open_task_vector("x.safetensors", "base.ckpt")
    assert opened.digest() == lm.open_weights(model.state_dict()).digest()


def test_resumed_and_twice_in_one_trainer(model):
    callback = SaveTaskVector("base.ckpt", output="x.safetensors")
    again = trainer(keeps(), callback, accumulate_grad_batches=2)
    again.fit(model, data())
    first = lm.open_task_vector("x.safetensors", "base.ckpt").digest()
    again.fit_loop.max_epochs = 3
    again.fit(model, data(), ckpt_path="run/last.ckpt")
    second = lm.open_task_vector("x.safetensors", "base.ckpt").digest()
    assert first != second == lm.open_weights(model.state_dict()).digest()


class Interrupts(Callback):
    def on_train_epoch_end(self, trainer, pl_module):
        raise KeyboardInterrupt


def test_nothing_is_written_in_a_trial_or_after_an_interruption(model):
    callback = SaveTaskVector("base.ckpt", output="x.safetensors", checkpoint="best")
    trainer(keeps(monitor="val/accuracy"), callback, fast_dev_run=True).fit(model, data())
    trainer(SaveTaskVector("base.ckpt"), enable_checkpointing=False, fast_dev_run=True).fit(model, data())
    with pytest.raises(SystemExit):
        trainer(SaveTaskVector("base.ckpt", output="x.safetensors"), Interrupts(), enable_checkpointing=False).fit(
            model, data()
        )
    assert callback.path is None
    assert list(Path().glob("**/*.task_vector*")) == list(Path().glob("x.*")) == []


def test_two_processes_write_one_file(model):
    callback = SaveTaskVector("base.ckpt", output="x.safetensors")
    trainer(keeps(), callback, devices=2, strategy="ddp_fork").fit(model, data())
    assert lm.open_task_vector("x.safetensors", "base.ckpt").digest() == lm.open_weights("run/last.ckpt").digest()


class OnlyFirst(SaveTaskVector):
    """The base can be read by the first process only, or fails there."""

    fails = False

    def _models(self, run):
        if self.fails and not self.reached:
            raise lm.MergeError("The disk is gone.")
        return super()._models(run)

    def setup(self, trainer, pl_module, stage):
        self.reached = True
        if trainer.global_rank:
            self.base = "elsewhere.ckpt"
        super().setup(trainer, pl_module, stage)
        self.reached = False


@pytest.mark.parametrize("fails", [False, True])
def test_only_the_first_process_reads_and_its_failure_is_everyones(model, fails):
    callback = OnlyFirst("base.ckpt", output="x.safetensors")
    callback.fails = fails
    run = trainer(callback, enable_checkpointing=False, devices=2, strategy="ddp_fork")
    if fails:
        with pytest.raises(Exception, match=r"The disk is gone\."):
            run.fit(model, data())
    else:
        run.fit(model, data())
    assert Path("x.safetensors").exists() is not fails


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"base": "gone.ckpt"}, r"no file or folder gone\.ckpt"),
        ({"base": "other.safetensors"}, "no fine-tuned form of the base"),
        ({"checkpoint": "best"}, "no ModelCheckpoint monitors a metric"),
        ({"checkpoint": "average"}, "nothing averages them"),
        ({"output": "x.ckpt"}, r"end x\.ckpt in \.task_vector\.safetensors"),
        ({"output": None}, "beside which to write; give output"),
        ({"rank": 0}, "at least 1, got 0"),
        ({"exclude": ["heads.*"]}, "matches no parameter"),
    ],
)
def test_what_cannot_work_is_said_before_the_fit(model, arguments, message):
    lm.save_weights("other.safetensors", {"other": torch.ones(2)})
    callback = SaveTaskVector(**{"base": "base.ckpt", "output": "x.safetensors", **arguments})
    before = lm.open_weights(model.state_dict()).digest()
    with pytest.raises(lm.MergeError, match=message):
        trainer(callback, enable_checkpointing=False).fit(model, data())
    assert lm.open_weights(model.state_dict()).digest() == before


def test_a_callback_that_writes_checkpoints_in_a_way_of_its_own(model):
    class Elsewhere(Checkpoint):
        """Has no folder beside whose files to write."""

    with pytest.raises(lm.MergeError, match="no ModelCheckpoint is there, beside which to write; give output"):
        trainer(Elsewhere(), SaveTaskVector("base.ckpt")).fit(model, data())
    callback = SaveTaskVector("base.ckpt")
    trainer(Elsewhere(), keeps(), callback).fit(model, data())
    assert callback.path == Path("run").absolute() / FILE


def test_by_their_short_names_on_the_command_line(model):
    from lightning_merge.trainer import MergeCLI

    arguments = {"base": "base.ckpt", "output": "x.safetensors", "rank": 2, "dtype": "float16"}
    lm.save_weights("old.ckpt", {name: tensor + 0.1 for name, tensor in model.state_dict().items()})
    alignment = {"base": "base.ckpt", "experts": {"old": "old.ckpt"}, "method": {"class_path": "TIES"}}
    callbacks = [
        {"class_path": "SaveTaskVector", "init_args": arguments},
        {"class_path": "LogAlignment", "init_args": alignment},
    ]
    settings = {**QUIET, "max_epochs": 1, "limit_train_batches": 1, "limit_val_batches": 0, "callbacks": callbacks}
    config = {"trainer": settings | {"enable_checkpointing": False}, "data": {"train_domains": ["noisy"]}}
    model_arguments = {key: model.hparams[key] for key in ("backbone", "num_classes", "pretrained", "backbone_args")}
    Path("fit.yaml").write_text(yaml.safe_dump(config | {"model": model_arguments}))
    cli = MergeCLI(lm.models.Expert, lm.Digits, args=["fit", "--config=fit.yaml"], save_config_callback=None)
    assert lm.checkpoints.open_safetensors("x", Path("x.safetensors")).header["task_vector"]["dtype"] == "float16"
    assert 0 <= cli.trainer.callback_metrics["alignment/total"] <= 1
