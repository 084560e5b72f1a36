"""``check_method(method)``: what every merging method must hold, checked for anybody's :class:`MergeMethod`.

>>> from lightning_merge.methods import TIES
>>> from lightning_merge.testing import check_method
>>> check_method(TIES(density=0.5))
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from lightning_merge.checkpoints import open_statistics, open_weights
from lightning_merge.merging.computation import NonFiniteError
from lightning_merge.merging.inventory import take_inventory
from lightning_merge.merging.merge import merge
from lightning_merge.merging.toy_models import State, ToyModule, make_data, make_models, make_statistics
from lightning_merge.methods import MergeMethod
from lightning_merge.methods.base.task_data import TaskData
from lightning_merge.methods.base.task_vectors import ExpertTaskVectors

_Weights = Mapping[str, Tensor]


def check_method(method: MergeMethod, tolerance: float | None = None) -> None:
    """Check that a method is what :func:`lightning_merge.merge` takes it for.

    Small models are made up and merged. Checked are:

    * the arguments are frozen and survive a config;
    * one expert can be merged (or as few as the method says it needs);
    * the update has the shape, dtype and device of the parameter, and the model those of the base, be it in float32,
      bfloat16 or float16;
    * no input is changed;
    * a method that says ``entrywise`` gives the same on pieces of a parameter as on the whole;
    * updates of zeros give zero, and ``scale`` scales the update;
    * neither the order of the experts matters (unless the class says ``order_matters``) nor that of the parameters;
    * the same merge gives the same bytes again, and for any number of workers;
    * nothing is infinite or NaN where experts are equal, opposite, or more than the rank of a matrix, where one has not
      moved, or where rows of the updates are zero.

    Of a method that keeps a model for each task, all of them are checked.

    Args:
        method: The method, with the hyper-parameters to check it with.
        tolerance: The largest difference that counts as rounding, as a share of the largest entry of the update.

    Raises:
        AssertionError: If a property is violated; the sentence names the property and the method.
    """
    tolerance = 1e-4 if tolerance is None else tolerance
    before = repr(vars(method))
    for check in (
        _check_arguments,
        _check_rule,
        _check_entrywise,
        _check_one_expert,
        _check_dtypes,
        _check_inputs,
        _check_zero,
        _check_scale,
        _check_order_of_experts,
        _check_order_of_parameters,
        _check_repeatable,
        _check_finite,
    ):
        check(method, tolerance)
    _require(repr(vars(method)) == before, method, "must not change its own arguments or keep a state while merging")


def _check_arguments(method: MergeMethod, tolerance: float) -> None:
    for field in fields(method):
        value = getattr(method, field.name)
        try:
            setattr(method, field.name, value)
        except AttributeError:
            continue
        _require(False, method, f"must be a frozen dataclass, but its argument {field.name!r} can be set")
    try:
        hash(method)
    except TypeError as error:
        raise AssertionError(_sentence(method, f"must have frozen arguments, but {error}")) from error
    try:
        twin = _rebuild(method, json.loads(json.dumps(method.describe())))
    except (TypeError, ValueError, KeyError) as error:
        problem = f"must survive the round trip through describe() and a config, but it failed: {error}"
        raise AssertionError(_sentence(method, problem)) from error
    _require(
        twin == method and vars(twin) == vars(method),
        method,
        f"must survive the round trip through describe() and a config, but came back as {twin!r}",
    )


def _rebuild(method: MergeMethod, description: Mapping[str, Any]) -> MergeMethod:
    arguments: dict[str, Any] = {
        name: _rebuild(getattr(method, name), value) if isinstance(getattr(method, name), MergeMethod) else value
        for name, value in description["init_args"].items()
    }
    return type(method)(**arguments)


def _check_rule(method: MergeMethod, tolerance: float) -> None:
    base, experts = make_models(_count(method))
    sources = {name: open_weights(state, name) for name, state in experts.items()}
    origin = open_weights(base, "base")
    names = [name for name in base if base[name].is_floating_point()]
    statistics = open_statistics(make_statistics(base, experts), method.needs, origin, sources, names)
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    inventory = take_inventory(origin, [*sources.values()])
    copied = {name: base[name] for name in inventory.copied}
    for dtype, device in product((torch.float32, torch.float64), devices):
        tasks = TaskData(ToyModule().to(device), make_data(experts), copied, sources, inventory.tied, inventory.private)
        task_vectors = ExpertTaskVectors(
            origin, [*sources.values()], names, dtype, device, statistics=statistics, tasks=tasks
        )
        with _attempt(method, f"{dtype} on {device}"):
            survey = method.survey(task_vectors)
        for name in names:
            deltas, context = task_vectors[name], task_vectors.context(name, survey)
            kept = deltas.clone(), context.base.clone()
            with _attempt(method, f"{name!r}, {dtype} on {device}"):
                update = method.update(deltas, context)
            for what in ("shape", "dtype", "device"):
                expected, actual = getattr(deltas[0], what), getattr(update, what)
                _require(
                    actual == expected, method, f"must keep the {what} of {name!r}: it is {expected}, not {actual}"
                )
            untouched = torch.equal(deltas, kept[0]) and torch.equal(context.base, kept[1])
            _require(untouched, method, f"must not change its inputs, but it changed the tensors of {name!r}")


def _check_entrywise(method: MergeMethod, tolerance: float) -> None:
    if not method.entrywise:
        return
    base, experts = make_models(_count(method))
    sources = [open_weights(state, name) for name, state in experts.items()]
    names = [name for name in base if base[name].is_floating_point()]
    task_vectors = ExpertTaskVectors(open_weights(base, "base"), sources, names)
    survey = method.survey(task_vectors)
    for name in names:
        deltas, context = task_vectors[name], task_vectors.context(name, survey)
        rows = deltas.reshape(len(deltas), *([1] if task_vectors.is_matrix(name) else []), -1)
        cut = rows.shape[-1] // 3
        rules: list[Callable[..., Tensor]] = [method.update]
        if method.per_task:
            rules.append(partial(method.task_update, expert=0))
        for rule in rules:
            with _attempt(method, f"pieces of {name!r}"):
                whole = rule(deltas, context=context).reshape(-1)
                parts = [rule(part, context=context).reshape(-1) for part in (rows[..., :cut], rows[..., cut:])]
            same = torch.allclose(torch.cat(parts), whole, rtol=tolerance, atol=tolerance * float(whole.abs().max()))
            _require(same, method, f"is not `entrywise`: pieces of {name!r} give something else than the whole")


def _check_one_expert(method: MergeMethod, tolerance: float) -> None:
    _merge(method, "one expert", *make_models(_count(method, 1)))


def _check_dtypes(method: MergeMethod, tolerance: float) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        base, experts = make_models(_count(method), dtype)
        for weights in _merge(method, f"a base in {dtype}", base, experts):
            for name, tensor in weights.items():
                kept = tensor.dtype == base[name].dtype and tensor.device == base[name].device
                _require(kept, method, f"must keep the dtype and device of the base, but {name!r} is {tensor.dtype}")


def _check_inputs(method: MergeMethod, tolerance: float) -> None:
    base, experts = make_models(_count(method))
    statistics, module, data = make_statistics(base, experts), ToyModule(), make_data(experts)
    images = {f"batch {i} of {name}": batch for name, batches in data.items() for i, batch in enumerate(batches)}
    inputs = [base, *experts.values(), *statistics.values(), module.state_dict(), images]
    before = [{name: tensor.clone() for name, tensor in state.items()} for state in inputs]
    _merge(method, "untouched inputs", base, experts, statistics=statistics, module=module, data=data)
    changed = [
        name for state, old in zip(inputs, before, strict=True) for name in old if not _same(state[name], old[name])
    ]
    _require(not changed, method, f"must not change its inputs, but it changed {', '.join(map(repr, changed[:3]))}")


def _check_zero(method: MergeMethod, tolerance: float) -> None:
    base, experts = make_models(_count(method))
    still = {name: {k: v.clone() for k, v in base.items()} for name in experts}
    for weights in _merge(method, "updates of zeros", base, still):
        moved = [name for name in base if not torch.equal(weights[name], base[name])]
        _require(not moved, method, f"must give zero for updates of zeros, but it moves {moved[:3]}")


def _check_scale(method: MergeMethod, tolerance: float) -> None:
    base, experts = make_models(_count(method))
    once = _merge(method, "scale", base, experts, scale=1.0)
    twice = _merge(method, "scale", base, experts, scale=2.0)
    for weights, doubled in zip(once, twice, strict=True):
        expected = {name: 2 * tensor - base[name] for name, tensor in weights.items()}
        _require_close(method, "must scale its update linearly with `scale`", base, doubled, expected, tolerance)


def _check_order_of_experts(method: MergeMethod, tolerance: float) -> None:
    if method.order_matters:
        return
    base, experts = make_models(_count(method))
    turned = dict(reversed(experts.items()))
    first, *for_tasks = _merge(method, "the order of experts", base, experts)
    again, *turned_for_tasks = _merge(method, "the order of experts", base, turned)
    for weights, other in zip([first, *for_tasks], [again, *reversed(turned_for_tasks)], strict=True):
        _require_close(method, "must not depend on the order of experts", base, weights, other, tolerance)


def _check_order_of_parameters(method: MergeMethod, tolerance: float) -> None:
    base, experts = make_models(_count(method))
    turned = [dict(reversed(state.items())) for state in (base, *experts.values())]
    models = _merge(method, "the order of parameters", base, experts)
    again = _merge(method, "the order of parameters", turned[0], dict(zip(experts, turned[1:], strict=True)))
    for weights, other in zip(models, again, strict=True):
        _require_close(method, "must not depend on the order of parameters", base, weights, other, tolerance)


def _check_repeatable(method: MergeMethod, tolerance: float) -> None:
    base, experts = make_models(_count(method))
    models = _merge(method, "repeated merges", base, experts)
    for workers, when in ((1, "twice"), (3, "with any number of workers")):
        again = _merge(method, f"{workers} workers", base, experts, workers=workers)
        for weights, other in zip(models, again, strict=True):
            changed = [name for name in weights if not _same(weights[name], other[name])]
            _require(not changed, method, f"must give the same bytes {when}, but {changed[:3]} differ")


def _check_finite(method: MergeMethod, tolerance: float) -> None:
    base, (first, *others) = (models := make_models(_count(method)))[0], models[1].values()
    cases: dict[str, Sequence[State]] = {
        "duplicate experts": [first] * _count(method),
        "more experts than the rank of a matrix": [*make_models(_count(method, 8))[1].values()],
        "an expert that has not moved": [first, base, *others[1:]],
        "opposite experts": [first, _map(base, first, lambda b, e: 2 * b - e)],
        "updates with zero rows": [_map(base, e, _with_zero_rows) for e in (first, *others)],
    }
    for case, states in cases.items():
        copies = {f"expert {i}": {k: v.clone() for k, v in state.items()} for i, state in enumerate(states)}
        _merge(method, case, base, copies)


def _map(base: State, expert: State, change: Callable[[Tensor, Tensor], Tensor]) -> State:
    return {k: change(base[k], v) if v.is_floating_point() else v for k, v in expert.items()}


def _with_zero_rows(base: Tensor, expert: Tensor) -> Tensor:
    if expert.ndim < 2:
        return expert
    return torch.where(torch.arange(len(expert)).reshape(-1, *[1] * (expert.ndim - 1)) % 2 == 0, base, expert)


def _require_close(
    method: MergeMethod, what: str, base: State, weights: _Weights, expected: _Weights, tolerance: float
) -> None:
    floating = [name for name in base if base[name].is_floating_point()]
    largest = max(float((expected[name] - base[name]).abs().max()) for name in floating)
    worst = max(floating, key=lambda name: float((weights[name] - expected[name]).abs().max()))
    difference = float((weights[worst] - expected[worst]).abs().max())
    _require(
        difference <= tolerance * largest,
        method,
        f"{what}, but {worst!r} differs by {difference:.1e}, where {tolerance:g} of the largest update "
        f"({largest:.1e}) is allowed",
    )


def _merge(
    method: MergeMethod,
    case: str,
    base: State,
    experts: Mapping[str, State],
    **options: Any,
) -> list[_Weights]:
    """Merge, and return the model, and one for each expert where the method keeps them."""
    made_up = {"statistics": make_statistics(base, experts), "module": ToyModule(), "data": make_data(experts)}
    with _attempt(method, case):
        merged = merge(base, experts, method, **{**made_up, **options})
        return [merged.weights, *([merged.for_task(name) for name in experts] if method.per_task else [])]


@contextmanager
def _attempt(method: MergeMethod, case: str) -> Iterator[None]:
    """Name the method, and the case, in whatever error is raised within the block."""
    try:
        yield
    except NonFiniteError as error:
        raise AssertionError(_sentence(method, f"must give finite weights for {case}: {error}")) from error
    except Exception as error:
        problem = f"must be able to merge (case: {case}), but it raised {type(error).__name__}: {error}"
        raise AssertionError(_sentence(method, problem)) from error


def _same(a: Tensor, b: Tensor) -> bool:
    """Tell whether two tensors are the same bit by bit (where NaN is NaN and -0 is not 0)."""
    return a.dtype == b.dtype and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def _count(method: MergeMethod, experts: int = 3) -> int:
    experts = max(experts, method.min_experts)
    return experts if method.max_experts is None else min(experts, method.max_experts)


def _require(condition: bool, method: MergeMethod, what: str) -> None:
    if not condition:
        raise AssertionError(_sentence(method, what))


def _sentence(method: MergeMethod, what: str) -> str:
    return f"{type(method).__name__} {what}."
