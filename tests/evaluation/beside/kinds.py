"""Modules that reach their weights, or what they have made of them, in ways that a copy would not follow."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

BANK = torch.linspace(-2, 2, 15).view(5, 3).sin()
"""Samples ``(5, 3)`` of which a module makes prototypes, or a bank of neighbours."""


def batches(n: int = 14) -> DataLoader:
    """Samples ``(3,)`` with labels, which two processes cannot share out evenly in batches of 4."""
    x = torch.linspace(-1, 1, 3 * n).view(n, 3)
    return DataLoader(TensorDataset(x, torch.arange(n) % 2), batch_size=4)


class Kind(LightningModule):
    """Computes features, and logs how often their sign tells the label, and how large they are."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.net = nn.Sequential(nn.Linear(3, 4), nn.Tanh())
            self.head = nn.Linear(4, 1)
        self.reach()

    def reach(self) -> None:
        """Make a way to the weights."""

    def features(self, x: Tensor) -> Tensor:
        """Map ``(N, 3)`` to ``(N, 4)``."""
        return self.net(x)

    def evaluate(self, batch: tuple[Tensor, Tensor], split: str) -> None:
        x, labels = batch
        found = self.head(self.features(x)).squeeze(1)  # (N,)
        self.log(f"{split}/accuracy", ((found > 0.1) == (labels > 0)).double().mean())
        self.log(f"{split}/size", found.abs().mean())

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.evaluate(batch, "val")

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.evaluate(batch, "test")

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return self.head(self.net(batch[0])).squeeze(1).sub(batch[1]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class CompiledMethod(Kind):
    def reach(self):
        self.features = torch.compile(self._features, backend="eager")

    def _features(self, x):
        return self.net(x)


class CompiledPart(Kind):
    def reach(self):
        self.net = torch.compile(self.net, backend="eager")


class CompiledForwardOfAPart(Kind):
    def reach(self):
        self.net.forward = torch.compile(self.net.forward, backend="eager")


class CompiledInPlace(Kind):
    def reach(self):
        self.net.compile(backend="eager")


class Bound(Kind):
    def reach(self):
        self.features = self.net.forward


class Decorated(Kind):
    def reach(self):
        original = self.features

        @functools.wraps(original)
        def features(x):
            return original(x)

        self.features = features


class Partial(Kind):
    def reach(self):
        self.features = functools.partial(nn.Sequential.forward, self.net)


class LambdasInALists(Kind):
    def reach(self):
        self.steps = {"features": [lambda x: self.net[0](x), self.net[1].forward]}

    def features(self, x):
        for step in self.steps["features"]:
            x = step(x)
        return x


class ClosureInAHook(Kind):
    def reach(self):
        weight = self.head.weight  # (1, 4)
        self.net.register_forward_hook(lambda part, inputs, outputs: outputs * weight)


class WeakReference(Kind):
    def reach(self):
        self.part = weakref.ref(self.net)

    def features(self, x):
        return self.part()(x)


class TorchScript(Kind):
    def reach(self):
        self.net = torch.jit.script(self.net)


class Traced(Kind):
    def reach(self):
        self.traced = torch.jit.trace(self.net, torch.ones(2, 3))

    def features(self, x):
        return self.traced(x)


class WithPrototypes(Kind):
    """Measures how far features are from those of some samples."""

    prototypes: Tensor

    def make(self) -> None:
        with torch.no_grad():
            self.prototypes = self.net(BANK)  # (5, 4)

    def features(self, x):
        return self.net(x) - self.prototypes.mean(dim=0)


class PrototypesInSetup(WithPrototypes):
    def setup(self, stage):
        self.make()


class PrototypesAtStart(WithPrototypes):
    def on_test_start(self):
        self.make()

    def on_validation_start(self):
        self.make()


class BankOfTheEpoch(Kind):
    """Fills a list with features when an epoch starts, and has its own number of neighbours in it."""

    def reach(self):
        self.bank: list[Tensor] = []
        self.register_buffer("filled", torch.zeros(5, 4), persistent=False)

    def fill(self):
        for sample in BANK.split(1):
            self.bank.append(self.net(sample))
        self.filled.copy_(torch.cat(self.bank)[-5:])

    def features(self, x):
        features = self.net(x)
        neighbours = torch.cdist(features, torch.cat(self.bank)).topk(2, largest=False).indices
        return features + torch.cat(self.bank)[neighbours].sum(dim=1) + self.filled.mean(dim=0) * len(self.bank)

    def on_test_epoch_start(self):
        self.fill()

    def on_validation_epoch_start(self):
        self.fill()


class CacheOfAMethod(Kind):
    @functools.lru_cache  # noqa: B019
    def text(self):
        return self.net(BANK).mean(dim=0)  # (4,)

    def features(self, x):
        return self.net(x) * self.text()


def remembering(function: Callable) -> Callable:
    known: dict[str, Tensor] = {}

    @functools.wraps(function)
    def remember(self):
        if "result" not in known:
            known["result"] = function(self)
        return known["result"]

    remember.known = known
    return remember


class CacheInAClosure(CacheOfAMethod):
    @remembering
    def text(self):
        return self.net(BANK).mean(dim=0)


class LayersOfSetup(Kind):
    """Makes its head anew in every ``setup``, so that its weights come from a checkpoint."""

    def setup(self, stage):
        self.head = nn.Linear(4, 1)


KINDS = [
    kind
    for kind in vars().copy().values()
    if isinstance(kind, type) and issubclass(kind, Kind) and kind not in (Kind, WithPrototypes, LayersOfSetup)
]
