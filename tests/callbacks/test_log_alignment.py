"""The alignment with earlier experts, logged while another one is trained."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning_merge.callbacks import LogAlignment

import lightning_merge as lm
from lightning_merge.analysis import subspace_alignment_ratio
from lightning_merge.methods import TIES
from tests.toys import tiny_expert

EXPERTS = {"a": "a.ckpt", "b": "b.ckpt"}
QUIET = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}


class Notes(Logger):
    """A logger that remembers, in a file as well, since processes that are forked take their memory with them."""

    name, version = "notes", 0

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, metrics, step=None):
        found = {k: v for k, v in metrics.items() if k.startswith(("alignment", "task_vector_norm"))}
        if found:
            self.rows.append((step, found))
            Path("rows.json").write_text(json.dumps(self.rows))

    def log_hyperparams(self, *args, **kwargs):
        pass


class Keeps(Callback):
    """Keep the weights of every step, and the random numbers that come next."""

    def __init__(self) -> None:
        self.steps, self.epochs = {}, {}

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.gradients = [p.grad.clone() for p in pl_module.parameters()]

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.steps[trainer.global_step] = {k: v.clone() for k, v in pl_module.state_dict().items()}

    def on_train_epoch_end(self, trainer, pl_module):
        self.epochs[trainer.current_epoch] = {k: v.clone() for k, v in pl_module.state_dict().items()}
        self.random = (torch.get_rng_state(), random.getstate(), str(np.random.get_state()))


@pytest.fixture
def base():
    """The weights of a module before its fit in ``base.ckpt``, and two earlier experts."""
    state = {k: v.clone() for k, v in tiny_expert().state_dict().items()}
    lm.save_weights("base.ckpt", state)
    for seed, name in enumerate(EXPERTS):
        draw = torch.Generator().manual_seed(seed)
        lm.save_weights(f"{name}.ckpt", {k: v + 0.1 * torch.randn(v.shape, generator=draw) for k, v in state.items()})
    return state


def fit(base, *callbacks, **arguments):
    model = tiny_expert(learning_rate=1e-2)
    model.load_state_dict(base)
    torch.manual_seed(3)
    settings = {"max_epochs": 2, "limit_train_batches": 4, "limit_val_batches": 1, "accelerator": "cpu", "devices": 1}
    trainer = Trainer(callbacks=list(callbacks), **{"logger": False, **QUIET, **settings, **arguments})
    trainer.fit(model, lm.Digits(train_domains=["noisy"]))
    return trainer, model


def expected(base, weights, updates, group) -> tuple[float, float]:
    """The ratio and the norm of a group by the formulas, from its names' beginning."""
    names = [name for name in base if name.startswith(group)]
    deltas = {name: (weights[name] - base[name]).double() for name in names}
    ratios = [
        float(subspace_alignment_ratio(delta, updates[name].double()))
        for name, delta in deltas.items()
        if delta.ndim == 2 and delta.any()
    ]
    norm = torch.cat([delta.flatten() for delta in deltas.values()]).norm()
    return sum(ratios) / len(ratios) if ratios else float("nan"), float(norm)


def summed(base) -> dict[str, torch.Tensor]:
    experts = [lm.open_weights(path) for path in EXPERTS.values()]
    return {name: sum(expert[name] - tensor for expert in experts) for name, tensor in base.items()}


def agrees(values, base, weights, updates) -> None:
    for group, start in (("total", ""), ("backbone.stages.1", "backbone.stages.1."), ("head", "head.")):
        ratio, norm = expected(base, weights, updates, start)
        assert values[f"alignment/{group}"] == pytest.approx(ratio, abs=2e-5)
        assert values[f"task_vector_norm/{group}"] == pytest.approx(norm, rel=1e-4)


def test_each_epochs_values_are_the_formulas(base):
    notes, keeps = Notes(), Keeps()
    trainer, _ = fit(base, LogAlignment("base.ckpt", EXPERTS), keeps, logger=[notes, CSVLogger("csv")])
    assert len(notes.rows) == 2
    for (_, values), weights in zip(notes.rows, keeps.epochs.values(), strict=True):
        agrees(values, base, weights, summed(base))
        assert 0 < values["alignment/total"] < 1
        groups = {key.partition("/")[2] for key in values}
        assert {"backbone.stem.0", "backbone.stages.0", "head", "total"} <= groups
    assert float(trainer.callback_metrics["alignment/total"]) == pytest.approx(notes.rows[-1][1]["alignment/total"])
    assert "alignment/total" in next(Path("csv").glob("**/metrics.csv")).read_text()


@pytest.mark.parametrize("accumulate", [1, 2])
def test_every_so_many_optimizer_steps(base, accumulate):
    notes, keeps = Notes(), Keeps()
    callback = LogAlignment("base.ckpt", ["a.ckpt", "b.ckpt"], every_n_steps=2)
    fit(base, callback, keeps, logger=notes, accumulate_grad_batches=accumulate)
    assert [step for step, _ in notes.rows] == [2, 4, 6, 8][: 4 // accumulate]
    for step, values in notes.rows:
        agrees(values, base, keeps.steps[step], summed(base))


def test_another_method_and_each_expert(base):
    notes, keeps = Notes(), Keeps()
    fit(base, LogAlignment("base.ckpt", EXPERTS, TIES(), each=True, groups="backbone|head"), keeps, logger=notes)
    updates = lm.merge("base.ckpt", EXPERTS, TIES(), keep_update=True).computation.updates
    _, values = notes.rows[-1]
    assert {key.partition("/")[2] for key in values} == {
        *("backbone", "head", "total"),
        *(f"{expert}/{group}" for expert in EXPERTS for group in ("backbone", "head", "total")),
    }
    for group in ("backbone", "head"):
        ratio, _ = expected(base, keeps.epochs[1], updates, group)
        assert values[f"alignment/{group}"] == pytest.approx(ratio, abs=2e-5)
    alone = {name: lm.open_weights("b.ckpt")[name] - tensor for name, tensor in base.items()}
    assert values["alignment/b/total"] == pytest.approx(expected(base, keeps.epochs[1], alone, "")[0], abs=2e-5)


def test_an_expert_that_trains_again_is_aligned_with_itself(base):
    again = {"a": "a.ckpt"}
    notes = Notes()
    fit({k: v.clone() for k, v in lm.open_weights("a.ckpt").items()}, LogAlignment("base.ckpt", again), logger=notes)
    assert notes.rows[0][1]["alignment/head"] > 0.99


def test_training_does_not_notice(base):
    runs = []
    for callbacks in ([], [LogAlignment("base.ckpt", EXPERTS, every_n_steps=1)]):
        keeps = Keeps()
        _, model = fit(base, *callbacks, keeps)
        runs.append((model.state_dict(), keeps))
    (one, kept), (other, with_callback) = runs
    assert all(torch.equal(other[name], tensor) for name, tensor in one.items())
    assert torch.equal(kept.random[0], with_callback.random[0])
    assert kept.random[1:] == with_callback.random[1:]
    assert all(torch.equal(a, b) for a, b in zip(kept.gradients, with_callback.gradients, strict=True))


class FirstReads(LogAlignment):
    """The experts can be read by the first process only."""

    def setup(self, trainer, pl_module, stage):
        if trainer.global_rank:
            self.base, self.experts = "elsewhere.ckpt", ["nowhere.ckpt"]
        super().setup(trainer, pl_module, stage)


def test_two_processes_log_the_same_numbers(base):
    fit(base, FirstReads("base.ckpt", EXPERTS), Saves(), logger=Notes(), devices=2, strategy="ddp_fork")
    rows = json.loads(Path("rows.json").read_text())
    assert len(rows) == 2
    agrees(rows[-1][1], base, torch.load("weights.pt"), summed(base))


class Saves(Callback):
    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.is_global_zero:
            torch.save(pl_module.state_dict(), "weights.pt")


def test_a_process_that_cannot_read_stops_the_others(base):
    with pytest.raises(Exception, match=r"no file or folder gone\.ckpt"):
        fit(base, LogAlignment("base.ckpt", ["gone.ckpt"]), devices=2, strategy="ddp_fork")


def test_beside_a_task_vector_of_a_bare_backbone_in_a_trial_run_twice_and_resumed(base):
    prefix = "backbone."
    for path in ("base.ckpt", "a.ckpt"):
        weights = lm.open_weights(path)
        lm.save_weights(f"bare_{path}", {k.removeprefix(prefix): v for k, v in weights.items() if prefix in k})
    lm.save_task_vector("a.task_vector.safetensors", "bare_base.ckpt", "a.ckpt")  # whose head belongs to it alone
    callback = LogAlignment("bare_base.ckpt", ["bare_a.ckpt", "a.task_vector.safetensors"], exclude=["head.*"])
    notes = Notes()
    fit(base, callback, fast_dev_run=True)
    trainer, model = fit(base, callback, logger=notes)
    trainer.save_checkpoint("half.ckpt")
    trainer.fit_loop.max_epochs = 3
    trainer.fit(model, lm.Digits(train_domains=["noisy"]), ckpt_path="half.ckpt")
    assert len(notes.rows) == 3
    norms = [values["task_vector_norm/backbone.stages.1"] for _, values in notes.rows]
    assert norms == sorted(norms)
    assert "alignment/head" not in notes.rows[0][1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"experts": ["gone.ckpt"]}, r"no file or folder gone\.ckpt"),
        ({"base": "gone.ckpt"}, r"no file or folder gone\.ckpt"),
        ({"every_n_steps": 0}, "every_n_steps must be at least 1, got 0"),
        ({"every_n_epochs": 0}, "every_n_epochs must be at least 1, got 0"),
        ({"error": 1.0}, r"error must lie in \[0, 1\), got 1.0"),
        ({"groups": "("}, "is no regular expression"),
        ({"exclude": ["heads.*"]}, "matches no parameter"),
        ({"base": "wide.ckpt", "experts": ["wide.ckpt"]}, "'head.weight' of the base wide.ckpt is not in the module"),
    ],
)
def test_what_cannot_work_is_said_before_the_fit(base, arguments, message):
    lm.save_weights("wide.ckpt", base | {"head.weight": torch.ones(11, 8)})
    with pytest.raises(lm.MergeError, match=message):
        fit(base, LogAlignment(**{"base": "base.ckpt", "experts": EXPERTS, **arguments}))
