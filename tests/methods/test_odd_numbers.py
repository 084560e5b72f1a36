"""Every method on numbers that no training gives: finite weights that are right, or a sentence; never NaN or infinity.

What a method gives must not depend on the size of the numbers, which is what the right result is known from; and where
all models are infinite alike, nothing else may change.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor, nn

import lightning_merge as lm
from lightning_merge import methods
from lightning_merge.merging.computation import NonFiniteError
from lightning_merge.methods import MergeMethod
from lightning_merge.methods.catalog import list_methods

State = dict[str, Tensor]

QUICK = {
    "AdaMerging": {"steps": 2},
    "DOGE": {"iterations": 20},
    "WUDI": {"iterations": 20, "parameters": ("*",)},
}
"""Arguments of methods that would be slow, or would find nothing to merge."""

CATALOG = [getattr(methods, row["method"])(**QUICK.get(row["method"], {})) for row in list_methods()]
VARIANTS = [
    methods.TIES(elect="normmass"),
    methods.TIES(elect="normfrac", merge="max"),
    methods.TIES(trim="std"),
    methods.TIES(trim="normfrac", disjoint=False, merge="median"),
    methods.SCE(select_topk=0.5),
    methods.TSVM("eig"),
    methods.TSVM("lossless"),
    methods.DELLA(rescale="l1"),
    methods.Magnitude(rescale=True),
    methods.PCB(variant="readme"),
    methods.WUDI(closed_form=True, parameters=("*",)),
    methods.MultiSLERP(origin="base"),
    methods.ModelStock(filter_wise=True),
    methods.Fisher(normalize="model", smooth=0.0),
    methods.CoreSpace(isotropize=True),
    methods.KnOTS(methods.SCE(), layers="matrices"),
]
OF_ONE_SIZE = (methods.AdaMerging, methods.DOGE, methods.Karcher, methods.MultiSLERP, methods.SLERP)
"""Methods that hold lengths against an absolute number, or run the model."""


def depends_on_size(method: MergeMethod) -> bool:
    """Whether the paper's formula gives something else for larger numbers: steps of Adam, a tanh of weights."""
    adam = isinstance(method, methods.WUDI) and not method.closed_form
    return isinstance(method, OF_ONE_SIZE) or adam or (isinstance(method, methods.PCB) and method.variant != "es")


def named(method: MergeMethod) -> str:
    return f"{type(method).__name__}-{CATALOG.index(method) if method in CATALOG else repr(method)[-40:]}"


everywhere = pytest.mark.parametrize("method", [*CATALOG, *VARIANTS], ids=named)


class Layer(nn.Linear):
    """A layer with a buffer beside it, as attention masks are."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__(inputs, outputs)
        self.register_buffer("mask", torch.zeros(2, 2))


def draw(seed: int, *shape: int) -> Tensor:
    """Draw integers of two digits, which are exact at any size, denormal too."""
    return torch.randint(-99, 100, shape, generator=torch.Generator().manual_seed(seed)).float()


def models(make: Callable[[int, tuple[int, ...]], Tensor], shape: tuple[int, int] = (6, 5)) -> list[State]:
    """Make a base (seed 0) and three experts."""
    return [{"weight": make(seed, shape), "bias": make(10 + seed, shape[:1])} for seed in range(4)]


def sized(*sizes: float) -> list[State]:
    return models(lambda seed, shape: sizes[seed % 10] / 99 * draw(seed, *shape))


def equal(size: float) -> list[State]:
    return models(lambda seed, shape: torch.full(shape, size if seed % 10 else 0.0))


def one_huge(size: float) -> list[State]:
    states = sized(1.0, 1.0, 1.0, 1.0)
    states[2]["weight"][3, 1] = size
    return states


def low_rank(*_: int) -> list[State]:
    column, row = draw(5, 6, 1), draw(6, 1, 5)
    return models(lambda seed, shape: seed * (column @ row) if len(shape) == 2 else draw(seed, *shape))


KINDS: Mapping[str, Callable[[], list[State]]] = {
    "zeros": lambda: sized(0, 0, 0, 0),
    "all equal": lambda: equal(1.0),
    "equal at 2e38": lambda: equal(2e38),
    "equal denormals": lambda: equal(1e-45),
    "1e38": lambda: sized(1e38, 1e38, 1e38, 1e38),
    "beside zeros of 1e38": lambda: sized(0, 1e38, 1e38, 1e38),
    "opposite": lambda: models(lambda seed, shape: torch.full(shape, -3e38 if seed % 10 else 3e38)),
    "1e19": lambda: sized(1e19, 1e19, 1e19, 1e19),
    "1e-22": lambda: sized(0, 1e-22, 1e-22, 1e-22),
    "1e-38": lambda: sized(0, 1e-38, 1e-38, 1e-38),
    "denormals": lambda: sized(0, 2e-43, 2e-43, 2e-43),
    "float16's largest": lambda: [
        {name: tensor.half() for name, tensor in state.items()} for state in sized(65504, 65504, 65504, 65504)
    ],
    "mixed scales": lambda: sized(1, 1e-30, 1, 1e30),
    "one huge entry": lambda: one_huge(1e38),
    "rank deficient": low_rank,
    "one row": lambda: models(lambda seed, shape: draw(seed, *shape), (1, 5)),
    "one column": lambda: models(lambda seed, shape: draw(seed, *shape), (6, 1)),
    "one entry": lambda: models(lambda seed, shape: draw(seed, *shape), (1, 1)),
    "no columns": lambda: models(lambda seed, shape: draw(seed, *shape), (6, 0)),
    "float64's largest": lambda: [
        {name: 1e308 / 99 * tensor.double() for name, tensor in state.items()} for state in sized(99, 99, 99, 99)
    ],
}


LARGE = {name for name in KINDS if "e38" in name or "largest" in name or name in ("opposite", "one huge entry")}
"""Kinds whose merge may be beyond the largest number."""


def run(method: MergeMethod, base: State, experts: list[State], **options) -> list[Mapping[str, Tensor]]:
    """Merge; return the model, and that of each task where there is one, with all that a method may need."""
    count = max(min(len(experts), method.max_experts or 3), method.min_experts)
    named = {f"expert {i}": expert for i, expert in enumerate(experts[:count])}
    shape = base["weight"].shape
    statistics = {}
    for i, name in enumerate(named):
        x, y = draw(20 + i, 9, shape[1]), draw(30 + i, 9, shape[0])
        kinds = {"gram": x.mT @ x, "gram_out": y.mT @ y}
        statistics[name] = {f"{kind}.weight": kinds[kind] for kind in method.needs if kind in kinds}
        if "fisher" in method.needs:
            statistics[name] |= {f"fisher.{key}": draw(40 + i, *base[key].shape).abs() for key in base}
    if method.needs_data:
        options |= {
            "module": Layer(*shape),
            "data": {name: [draw(50 + i, 4, shape[1])] for i, name in enumerate(named)},
        }
    merged = lm.merge(base, named, method, statistics=statistics, workers=1, **options)
    return [merged.weights, *([merged.for_task(name) for name in named] if method.per_task else [])]


@pytest.mark.parametrize("method", CATALOG, ids=named)
@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_finite_or_there_is_a_sentence(method, kind):
    base, *experts = KINDS[kind]()
    if method.needs_data:
        for state in (base, *experts):
            state["mask"] = torch.zeros(2, 2, dtype=base["weight"].dtype)
    try:
        found = run(method, base, experts)
    except NonFiniteError as error:
        found, sentence = [], str(error)
    if not found:  # it could not be helped
        assert kind in LARGE
        assert sentence.startswith(f"'weight', merged by {type(method).__name__}, ")
    for weights in found:
        assert all(bool(tensor.isfinite().all()) for tensor in weights.values())
        assert all(tensor.dtype == base[name].dtype for name, tensor in weights.items())


@everywhere
@pytest.mark.parametrize("power", [100, -80, -135])
def test_the_size_of_the_numbers_makes_no_difference(method, power):
    if depends_on_size(method) or method.needs_data:
        pytest.skip("its formula depends on the size")
    states = models(lambda seed, shape: draw(seed, *shape))
    scaled = [{name: tensor.double().mul(2.0**power).float() for name, tensor in state.items()} for state in states]
    exact = [{name: tensor.double() for name, tensor in state.items()} for state in states]
    for found, expected in zip(run(method, *split(scaled)), run(method, *split(exact)), strict=True):
        for name, tensor in found.items():
            values, right = tensor.double() / 2.0**power, expected[name]
            smallest = 2.0 ** (-149 - power)  # of the denormals
            assert float((values - right).abs().max()) <= 2e-5 * float(right.abs().max()) + 4 * smallest


def split(states: list[State]) -> tuple[State, list[State]]:
    return states[0], states[1:]


@everywhere
@pytest.mark.parametrize("allow", [False, True])
def test_what_is_infinite_in_all_models_stays_and_changes_nothing_else(method, allow):
    states, plain = (models(lambda seed, shape: draw(seed, *shape) / 99) for _ in range(2))
    here = torch.zeros(6, 5, dtype=torch.bool) if method.needs_data else torch.ones(6, 5).triu(2).bool()
    for state, without in zip(states, plain, strict=True):
        state["mask"] = torch.tensor([[0.0, -torch.inf], [0.0, torch.inf]])
        without["mask"] = torch.zeros(2, 2)
        state["weight"][here], without["weight"][here] = -torch.inf, 0.0
    found = run(method, *split(states), allow_non_finite=allow)
    for weights, expected in zip(found, run(method, *split(plain)), strict=True):
        assert torch.equal(weights["mask"], states[0]["mask"])
        assert torch.equal(weights["weight"].isinf(), here)
        assert torch.equal(weights["weight"][~here], expected["weight"][~here])
        assert torch.equal(weights["bias"], expected["bias"])
