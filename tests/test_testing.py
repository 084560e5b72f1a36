"""The public battery: every method passes, and every property catches a method that violates it."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import threading
from dataclasses import dataclass, field, fields
from typing import ClassVar

import pytest
import torch

from lightning_merge import methods
from lightning_merge.methods import SCORE, TIES, Context, MagMax, MergeMethod, TaskArithmetic, Wrapper
from lightning_merge.methods.adamerging import AdaMerging
from lightning_merge.methods.fisher import Fisher
from lightning_merge.methods.mats import MaTS
from lightning_merge.methods.model_stock import ModelStock
from lightning_merge.methods.multi_slerp import MultiSLERP
from lightning_merge.methods.regmean import RegMean
from lightning_merge.methods.regmean_plus_plus import RegMeanPlusPlus
from lightning_merge.methods.slerp import SLERP
from lightning_merge.testing import check_method


def every_method() -> list[MergeMethod]:
    """One of every method in the package, whether ``methods/__init__.py`` names it or not."""
    found = {}
    for module in pkgutil.iter_modules(methods.__path__):
        for thing in vars(importlib.import_module(f"{methods.__name__}.{module.name}")).values():
            if isinstance(thing, type) and issubclass(thing, MergeMethod) and not abstract(thing):
                found[thing.__qualname__] = thing
    return [make(found[name]) for name in sorted(found)]


def abstract(kind: type[MergeMethod]) -> bool:
    return kind in (MergeMethod, Wrapper) or inspect.isabstract(kind)


def make(kind: type[MergeMethod]) -> MergeMethod:
    """A method with its defaults, but few iterations."""
    return kind(**{argument.name: 10 for argument in fields(kind) if argument.name in ("iterations", "steps")})


@pytest.mark.parametrize("method", every_method(), ids=lambda method: type(method).__name__)
def test_every_method_passes(method):
    check_method(method)


@pytest.mark.parametrize(
    "method",
    [
        SCORE(threshold="paper"),
        TIES(merge="max"),
        Wrapper(MagMax()),
        Wrapper(RegMean()),
        SLERP(t=0.2),
        MultiSLERP(origin="base"),
        ModelStock(filter_wise=True),
        Fisher(normalize="model"),
        Fisher(smooth=0.0, floor=1e-6, favor_target_model=True, normalize="param"),
        RegMean(reduce_off_diagonal=0.0),
        MaTS(iterations=20, backward=False, initialization="pretrained"),
        AdaMerging(granularity="task", trimmed=True, density=0.5, lr=0.1, steps=3),
        Wrapper(RegMeanPlusPlus(num_examples=6)),
    ],
    ids=repr,
)
def test_other_arguments_pass(method):
    check_method(method)


@dataclass(frozen=True)
class DependsOnExpertOrder(MergeMethod):
    def tensor(self, deltas, context):
        return deltas[0]


@dataclass(frozen=True)
class FailsOnOneExpert(MergeMethod):
    def tensor(self, deltas, context):
        return deltas.mean(dim=0) + 0 * deltas[1]


@dataclass(frozen=True)
class CallsItselfEntrywise(MergeMethod):
    entrywise: ClassVar[bool] = True

    def tensor(self, deltas, context):
        return deltas.mean(dim=0) * deltas.norm()


@dataclass(frozen=True)
class MovesForZero(MergeMethod):
    def update(self, deltas, context):
        return deltas.mean(dim=0) + 1e-3


@dataclass(frozen=True)
class ScalesItself(MergeMethod):
    def tensor(self, deltas, context):
        return self.scale * deltas.mean(dim=0)


@dataclass(frozen=True)
class ChangesDtype(MergeMethod):
    def tensor(self, deltas, context):
        return deltas.mean(dim=0).double()


@dataclass(frozen=True)
class ChangesShape(MergeMethod):
    def update(self, deltas, context):
        return deltas.mean(dim=0).reshape(1, *deltas.shape[1:])


@dataclass(frozen=True)
class OverflowsHalf(MergeMethod):
    def tensor(self, deltas, context):
        return deltas.mean(dim=0) * 1e8


@dataclass(frozen=True)
class ChangesDeltas(MergeMethod):
    def tensor(self, deltas, context):
        return deltas.mul_(2).mean(dim=0)


@dataclass(frozen=True)
class ChangesBase(MergeMethod):
    def survey(self, task_vectors):
        for name in task_vectors:
            task_vectors.context(name).base.add_(1e-3)

    def tensor(self, deltas, context):
        return deltas.mean(dim=0)


@dataclass(frozen=True)
class ChangesStatistics(MergeMethod):
    needs: ClassVar[tuple[str, ...]] = ("fisher",)

    def survey(self, task_vectors):
        for source in task_vectors._statistics:
            for name in source:
                source[name].add_(1)


@dataclass(frozen=True)
class DividesByZero(MergeMethod):
    def matrix(self, deltas, context):
        return (deltas / deltas.norm(dim=tuple(range(1, deltas.ndim)), keepdim=True)).mean(dim=0)


@dataclass(frozen=True)
class DividesByDistance(MergeMethod):
    def tensor(self, deltas, context):
        return deltas.mean(dim=0) / (deltas - deltas.mean(dim=0)).norm() if len(deltas) > 1 else deltas[0]


@dataclass(frozen=True)
class InvertsGram(MergeMethod):
    def matrix(self, deltas, context):
        gram = torch.einsum("tmn,smn->ts", deltas, deltas)
        return torch.einsum("ts,tmn->mn", torch.linalg.inv(gram), deltas) * gram.diagonal().mean()


@dataclass(frozen=True)
class DividesByMean(MergeMethod):
    def tensor(self, deltas, context):
        return deltas.mean(dim=0) / deltas.mean(dim=0).norm()


@dataclass(frozen=True)
class DividesByRows(MergeMethod):
    def matrix(self, deltas, context):
        moved = deltas[deltas.flatten(1).any(dim=1)]
        return (moved / moved.norm(dim=2, keepdim=True)).mean(dim=0)


@dataclass(frozen=True)
class GivesEveryExpertADirection(MergeMethod):
    def matrix(self, deltas, context):
        return deltas.mean(dim=0) / (2 * min(deltas.shape[1:]) // len(deltas))


@dataclass(frozen=True)
class DrawsFreely(MergeMethod):
    def tensor(self, deltas, context):
        return deltas.mean(dim=0) * (1 + 1e-6 * torch.rand(()))


@dataclass(frozen=True)
class CountsParameters(MergeMethod):
    def survey(self, task_vectors):
        return {name: i for i, name in enumerate(task_vectors)}

    def tensor(self, deltas, context):
        return deltas.mean(dim=0) * context.survey[context.name]


@dataclass(frozen=True)
class Forgets(MergeMethod):
    strength: float = 0.5

    def describe(self):
        return {"class_path": "Forgets", "init_args": {}}


@dataclass(frozen=True)
class CannotBeWritten(MergeMethod):
    dtype_of_masks: torch.dtype = torch.bool


@dataclass(frozen=True)
class TupleFromConfig(MergeMethod):
    weights: tuple[float, ...] = (0.5, 0.5)


@dataclass(frozen=True)
class KeepsList(MergeMethod):
    weights: list[float] = field(default_factory=lambda: [0.5, 0.5])


class Thawed(TaskArithmetic):
    def __setattr__(self, name, value):
        object.__setattr__(self, name, value)


@dataclass(frozen=True)
class Remembers(MergeMethod):
    def tensor(self, deltas, context):
        self.__dict__.setdefault("seen", []).append(context.name)
        return deltas.mean(dim=0)


@dataclass(frozen=True)
class TaskModelsDependOnOrder(MergeMethod):
    per_task: ClassVar[bool] = True

    def task_update(self, deltas, expert, context):
        return deltas[expert] * (1 + expert)


@pytest.mark.parametrize(
    ("method", "sentence"),
    [
        (DependsOnExpertOrder(), "DependsOnExpertOrder must not depend on the order of experts, but"),
        (TaskModelsDependOnOrder(), "TaskModelsDependOnOrder must not depend on the order of experts, but"),
        (FailsOnOneExpert(), "FailsOnOneExpert must be able to merge (case: one expert), but it raised IndexError"),
        (CallsItselfEntrywise(), "CallsItselfEntrywise is not `entrywise`: pieces of 'visual.conv1.weight' give"),
        (MovesForZero(), "MovesForZero must give zero for updates of zeros, but it moves"),
        (ScalesItself(), "ScalesItself must scale its update linearly"),
        (
            ChangesDtype(),
            "ChangesDtype must keep the dtype of 'visual.conv1.weight': it is torch.float32,",
        ),
        (ChangesShape(), "ChangesShape must keep the shape of"),
        (OverflowsHalf(), "OverflowsHalf must give finite weights for a base in torch.float16"),
        (ChangesDeltas(), "ChangesDeltas must not change its inputs, but it changed the tensors of"),
        (ChangesBase(), "ChangesBase must not change its inputs, but it changed 'visual.conv1.weight'"),
        (ChangesStatistics(), "ChangesStatistics must not change its inputs, but it changed 'fisher."),
        (DividesByZero(), "DividesByZero must give finite weights for an expert that has not moved"),
        (DividesByDistance(), "DividesByDistance must give finite weights for duplicate experts"),
        (InvertsGram(), "InvertsGram must be able to merge (case: duplicate experts)"),
        (DividesByMean(), "DividesByMean must give finite weights for opposite experts"),
        (DividesByRows(), "DividesByRows must give finite weights for updates with zero rows"),
        (GivesEveryExpertADirection(), "GivesEveryExpertADirection must give finite weights for more experts than the"),
        (DrawsFreely(), "DrawsFreely must give the same bytes twice"),
        (CountsParameters(), "CountsParameters must not depend on the order of parameters"),
        (
            Forgets(strength=0.7),
            "Forgets must survive the round trip through describe() and a config, but came",
        ),
        (CannotBeWritten(), "CannotBeWritten must survive the round trip"),
        (TupleFromConfig(), "TupleFromConfig must survive the round trip"),
        (KeepsList(), "KeepsList must have frozen arguments"),
        (Thawed(), "Thawed must be a frozen dataclass, but its argument 'scale' can be set"),
        (Remembers(), "Remembers must not change its own arguments or keep a state"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, MergeMethod) else "",
)
def test_broken_methods_are_caught(method, sentence):
    with pytest.raises(AssertionError) as caught:
        check_method(method)
    assert str(caught.value).startswith(sentence), str(caught.value)


def test_workers_are_caught():
    there, all_there = set(), threading.Event()

    @dataclass(frozen=True)
    class KnowsItsThread(MergeMethod):
        def tensor(self, deltas, context):
            name = threading.current_thread().name
            if name.startswith("ThreadPoolExecutor"):  # every worker gets something to do
                there.add(name)
                if len(there) == 3:
                    all_there.set()
                assert all_there.wait(60)
            return deltas.mean(dim=0) * (1 + name.endswith("_2"))

    with pytest.raises(AssertionError, match=r"KnowsItsThread must give the same bytes with any number of workers"):
        check_method(KnowsItsThread())


def test_order_may_matter_where_the_class_says_so():
    @dataclass(frozen=True)
    class First(DependsOnExpertOrder):
        order_matters: ClassVar[bool] = True

    check_method(First())


def test_tolerance_is_a_share_of_the_update():
    @dataclass(frozen=True)
    class Slightly(MergeMethod):
        def tensor(self, deltas, context):
            return deltas.mean(dim=0) + 1e-3 * deltas[0]

    check_method(Slightly(), tolerance=1e-1)
    with pytest.raises(AssertionError, match="order of experts"):
        check_method(Slightly())


def test_a_method_with_at_most_two_experts_gets_no_more():
    @dataclass(frozen=True)
    class Pair(MergeMethod):
        max_experts: ClassVar[int | None] = 2

        def tensor(self, deltas, context):
            assert len(deltas) <= 2
            return deltas.mean(dim=0)

    check_method(Pair())


def test_context_of_the_battery_has_statistics():
    @dataclass(frozen=True)
    class Needs(MergeMethod):
        needs: ClassVar[tuple[str, ...]] = ("fisher", "gram", "gram_out")

        def tensor(self, deltas, context: Context):
            assert context.statistics["fisher"].shape == deltas.shape
            if "gram" in context.statistics:
                assert set(context.statistics) == {"fisher", "gram", "gram_out"}
            return deltas.mean(dim=0)

    check_method(Needs())
    check_method(TaskArithmetic())
