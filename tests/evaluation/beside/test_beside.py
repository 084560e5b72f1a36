"""Other weights beside the module: the numbers of separate evaluations, and a module that is left alone."""

from __future__ import annotations

import copy
import functools
from collections import namedtuple
from types import SimpleNamespace

import pytest
import torch
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from lightning.pytorch import Callback
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, DistributedSampler, SequentialSampler

import lightning_merge as lm
from lightning_merge.evaluation.beside.beside import Beside
from lightning_merge.evaluation.beside.copies import copy_with_weights
from lightning_merge.evaluation.beside.repeats import check_enough, without_repeats
from lightning_merge.utilities.processes import Processes
from tests.own_project import Classifier, data, loader, plain, quiet, weights
from tests.toys import tiny_vgg


class Look(Callback):
    """Evaluates beside the module in ``test`` and keeps what comes out."""

    def __init__(self, candidates) -> None:
        self.candidates, self.beside, self.rows = candidates, None, {}

    def on_test_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=None) -> None:
        self.beside = self.beside or Beside(trainer, pl_module, self.candidates, Processes())
        self.beside.run_batch(batch, batch_idx, dataloader_idx)

    def on_test_epoch_end(self, trainer, pl_module) -> None:
        self.rows = self.beside.finish()


def beside(module, candidates, loaders, **arguments) -> dict[str, dict[str, float]]:
    look = Look(candidates)
    quiet(callbacks=[look], **arguments).test(module, loaders, verbose=False)
    return look.rows


def alone(module, state, loaders, **arguments) -> dict[str, float]:
    """What a separate ``trainer.test`` says of the weights."""
    module = copy.deepcopy(module)
    module.load_state_dict(state)
    logged = {}
    for results in quiet(**arguments).test(module, loaders, verbose=False):
        logged |= plain(results)
    return logged


CANDIDATES = {"a": weights(1), "b": weights(2)}


def check(module, loaders, candidates=CANDIDATES, **arguments) -> dict[str, dict[str, float]]:
    """Compare with separate evaluations."""
    before = copy.deepcopy(module.state_dict())
    rows = beside(module, candidates, loaders, **arguments)
    for row, state in candidates.items():
        assert rows[row] == pytest.approx(alone(module, state, loaders, **arguments), rel=1e-6)
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    return rows


def test_a_module_that_logs_numbers_and_metrics():
    rows = check(Classifier(), loader())
    assert list(rows["a"]) == ["test/accuracy", "test/loss", "test/largest", "test/labels"]
    assert rows["a"] != rows["b"]


@pytest.mark.parametrize("inference_mode", [True, False])
def test_several_loaders(inference_mode):
    loaders = [loader(11), loader(7, batch_size=3, seed=1), loader(5, seed=2)]
    rows = check(Classifier(), loaders, inference_mode=inference_mode, limit_test_batches=2)
    assert "test/loss/dataloader_idx_2" in rows["a"]


def test_a_module_that_logs_from_its_hooks():
    module, digits = tiny_vgg(), lm.Digits(test_domains=["thick", "noisy"])
    states = {str(seed): {k: v + 0.1 * torch.randn_like(v) for k, v in module.state_dict().items()} for seed in (1, 2)}
    rows = check(module, digits, states, limit_test_batches=2)
    assert {"test/thick/accuracy", "test/noisy/accuracy"} <= set(rows["1"])


def test_names_for_each_loader_that_the_module_gives_itself():
    class Named(Classifier):
        def test_step(self, batch, batch_idx, dataloader_idx):
            loss = F.cross_entropy(self(batch[0]), batch[1])
            self.log(f"loss of {dataloader_idx}", loss, add_dataloader_idx=False)
            self.log("every step", loss, on_step=True, on_epoch=False)

    rows = check(Named(), [loader(11), loader(6)])
    assert list(rows["a"]) == ["loss of 0", "loss of 1"]


def test_a_step_without_the_index_of_the_batch_that_changes_the_batch():
    class InPlace(Classifier):
        def test_step(self, batch):
            batch[0].mul_(-1)
            self.evaluate(batch, "test")

    check(InPlace(), loader())


def test_random_numbers_are_drawn_as_by_each_alone():
    class Noisy(Classifier):
        def test_step(self, batch, batch_idx):
            self.log("noise", F.cross_entropy(self(batch[0] + torch.randn_like(batch[0])), batch[1]))
            self.drawn = torch.rand(())

    module = Noisy()
    torch.manual_seed(5)
    rows = beside(module, CANDIDATES, loader(4))
    drawn = module.drawn.clone()
    for row, state in CANDIDATES.items():
        torch.manual_seed(5)
        assert rows[row] == pytest.approx(alone(module, state, loader(4)), rel=1e-6)
    torch.manual_seed(5)
    quiet().test(module, loader(4), verbose=False)
    assert torch.equal(module.drawn, drawn)


def test_precision_is_the_trainers():
    rows = check(Classifier(), loader(), precision="bf16-mixed")
    assert rows["a"]["test/loss"] != beside(Classifier(), CANDIDATES, loader())["a"]["test/loss"]


class TestCopy:
    def test_a_function_that_holds_on_to_a_layer_is_refused(self):
        module = Classifier()
        layer = next(part for part in module.modules() if isinstance(part, nn.Linear))
        module.shortcut = lambda x: layer(x)
        with pytest.raises(lm.MergeError, match="'shortcut' of Classifier would still use the original's"):
            copy_with_weights(module, module.state_dict())

    def test_it_shares_no_tensor_with_the_original_and_takes_the_weights_as_they_are(self):
        module, state = Classifier(), weights(1)
        twin = copy_with_weights(module, state)
        assert {t.data_ptr() for t in twin.state_dict().values()}.isdisjoint(
            t.data_ptr() for t in module.state_dict().values()
        )
        assert twin.head.weight.data_ptr() == state["head.weight"].data_ptr()
        assert not any(parameter.requires_grad for parameter in twin.parameters())
        twin.eval()(torch.ones(2, 4))
        assert torch.equal(twin.net[1].running_mean, state["net.1.running_mean"])

    def test_dtype_is_the_modules(self):
        assert copy_with_weights(Classifier().double(), weights(1)).head.weight.dtype == torch.float64

    def test_tied_weights_stay_tied(self):
        class Tied(Classifier):
            def __init__(self):
                super().__init__()
                self.again, self.itself = self.head, [self]

        twin = copy_with_weights(Tied(), {**weights(1), "again.weight": torch.ones(3, 8), "again.bias": torch.ones(3)})
        assert twin.again is twin.head
        assert twin.itself[0] is twin
        assert bool((twin.head.weight == 1).all())

    def test_a_module_that_was_compiled_runs_the_copys_weights(self):
        module, x = Classifier().eval(), torch.ones(2, 4)
        expected = copy_with_weights(module, weights(1))(x)
        module._compiler_ctx = {"compiler": "dynamo"}  # as Lightning leaves a module that was compiled
        for name in ("forward", "training_step", "validation_step", "test_step", "predict_step"):
            setattr(module, name, functools.partial(getattr(module, name)))
        assert torch.equal(copy_with_weights(module, weights(1))(x), expected)

    def test_what_a_fit_leaves_lying_about(self):
        module = Classifier()
        module.losses = [module(torch.ones(2, 4)).sum()]
        module.samples = data()
        twin = copy_with_weights(module, weights(1))
        assert twin.losses[0].grad_fn is None
        assert twin.samples is module.samples

    def test_an_attribute_that_cannot_be_copied_is_named(self):
        module = Classifier()
        module.file = (line for line in "text")
        with pytest.raises(lm.MergeError, match="attribute 'file' cannot be copied"):
            copy_with_weights(module, weights(1))

    def test_a_compiled_part_has_names_of_its_own(self):
        class Whole(Classifier):
            def __init__(self):
                super().__init__()
                self.net = nn.ModuleDict({"_orig_mod": self.net})

            def forward(self, x):
                return self.head(self.net["_orig_mod"](x))

        x, expected = torch.ones(2, 4), Classifier().eval()
        expected.load_state_dict(weights(1))
        assert torch.equal(copy_with_weights(Whole().eval(), weights(1))(x), expected(x))


class TestRepeats:
    Pair = namedtuple("Pair", "x y")

    @pytest.mark.parametrize("count", [2, 3, 5])
    @pytest.mark.parametrize("batch_size", [1, 2, 4, None])
    @pytest.mark.parametrize("wrapped", [True, False])
    def test_every_sample_is_left_once(self, count, batch_size, wrapped):
        left = []
        for rank in range(count):
            if wrapped:  # as Lightning does
                sampler = DistributedSamplerWrapper(SequentialSampler(range(11)), count, rank, shuffle=False)
            else:
                sampler = DistributedSampler(range(11), count, rank, shuffle=False)
            batches = DataLoader(range(11), batch_size=batch_size, sampler=sampler)
            for i, batch in enumerate(batches):
                batch, is_left = without_repeats(batches, torch.as_tensor(batch), i)
                left += batch.reshape(-1).tolist() if is_left else []
        assert sorted(left) == list(range(11))

    @pytest.mark.parametrize(
        ("batch", "expected"),
        [
            ({"x": torch.ones(3, 2), "names": ["a", "b", "c"], "n": 3}, {"x": (2, 2), "names": ["a", "b"], "n": 3}),
            (Pair(torch.ones(3), torch.ones(3, 3)), Pair((2,), (2, 3))),
            ([torch.ones(3), torch.ones(3), torch.ones(3)], [(2,), (2,), (2,)]),
            ((["a", "b", "c"], ({"x": torch.ones(3)},)), (["a", "b"], ({"x": (2,)},))),
            ([torch.ones(2), torch.ones(5), torch.ones(4)], [(2,), (5,)]),
            ([{"a": 1}, {"a": 2}, {"a": 3}], [{"a": 1}, {"a": 2}]),
        ],
    )
    def test_whatever_a_batch_is(self, batch, expected):
        def shapes(found):
            if isinstance(found, torch.Tensor):
                return tuple(found.shape)
            if isinstance(found, dict):
                return {k: shapes(v) for k, v in found.items()}
            if isinstance(found, (list, tuple)):
                parts = [shapes(part) for part in found]
                return type(found)(*parts) if hasattr(found, "_fields") else type(found)(parts)
            return found

        sampler = DistributedSampler(range(5), 2, rank=1, shuffle=False)  # positions 1, 3 and a repeat
        assert shapes(without_repeats(DataLoader(range(5), 3, sampler=sampler), batch, 0)[0]) == expected

    def test_a_batch_that_holds_nothing_of_its_length(self):
        loader = DataLoader(range(5), 3, sampler=DistributedSampler(range(5), 2, rank=1, shuffle=False))
        with pytest.raises(lm.MergeError, match="a number of processes that divides"):
            without_repeats(loader, SimpleNamespace(x=torch.ones(3)), 0)

    def test_other_samplers_are_left_alone(self):
        class Sampler(DistributedSampler):
            """Repeats nothing."""

        loader = DataLoader(range(5), 3, sampler=Sampler(range(5), 2, rank=1, shuffle=False))
        batch = torch.ones(3)
        assert without_repeats(loader, batch, 0) == (batch, True)
        assert without_repeats(DataLoader(range(5), 3), batch, 0) == (batch, True)

    def test_more_processes_than_samples(self):
        class Two(Dataset):
            def __len__(self):
                return 2

        loader = DataLoader(Two(), sampler=DistributedSampler(Two(), 3, rank=0))
        with pytest.raises(lm.MergeError, match="cannot share out 2 samples over 3 processes"):
            check_enough([loader], "It")
