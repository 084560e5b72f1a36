"""What a merge says, and does, about values that are not finite."""

from __future__ import annotations

import pytest
import torch

import lightning_merge as lm
from lightning_merge.analysis.compare_experts import compare_experts
from lightning_merge.checkpoints import open_weights
from lightning_merge.merging.inspection import inspect_values
from lightning_merge.merging.inventory import take_inventory
from lightning_merge.methods import Fisher, IsoC, TaskArithmetic, WeightAverage
from lightning_merge.utilities.processes import Processes

INF = float("inf")


def make() -> tuple[dict, dict, dict]:
    """A base and two experts with a mask that all share."""
    mask = torch.full((4, 4), -INF).triu(1)
    draw = torch.Generator().manual_seed(0)
    states = [
        {
            "proj": torch.randn(4, 4, generator=draw),
            "bn.running_var": torch.rand(4, generator=draw),
            "mask": mask.clone(),
        }
        for _ in range(3)
    ]
    return states[0], states[1], states[2]


def refusal(base, one, two, method=WeightAverage(), **options) -> str:  # noqa: B008, a frozen dataclass
    with pytest.raises(lm.MergeError) as caught:
        lm.merge(base, {"one": one, "two": two}, method, **options)
    return str(caught.value)


@pytest.mark.parametrize("allow", [False, True])
def test_infinity_that_all_models_share_stays(allow):
    base, one, two = make()
    for state in (base, one, two):
        state["bn.running_var"][2] = INF
    merged = lm.merge(base, [one, two], IsoC(), allow_non_finite=allow).weights
    assert torch.equal(merged["mask"], base["mask"])
    assert bool(merged["proj"].isfinite().all())
    assert merged["bn.running_var"].isinf().tolist() == [False, False, True, False]


def test_a_sentence_names_what_is_wrong_and_nothing_else():
    base, one, two = make()
    one["proj"][0, :2] = float("nan")
    one["proj"][3, 3] = INF
    message = refusal(base, one, two)
    assert message.startswith(
        "'proj' of the expert one holds values that are not finite (3 of 16: 2 NaN and 1 infinite)"
    )
    assert "mask'" not in message


def test_a_mask_that_differs_is_said_of_every_model_and_every_remedy_works():
    base, one, two = make()
    two["mask"][0, 1] = 0.0
    message = refusal(base, one, two)
    assert "'mask' of the base" in message
    assert "(1 of 16: 1 infinite)" in message
    assert "expert one" not in message
    assert "make it the same in all models" in message
    assert "exclude: [mask]" in message
    assert "allow_non_finite: true" in message
    kept = lm.merge(base, [one, two], WeightAverage(), exclude=["mask"]).weights
    assert torch.equal(kept["mask"], base["mask"])
    allowed = lm.merge(base, [one, two], WeightAverage(), allow_non_finite=True).weights
    assert torch.equal(allowed["mask"].isneginf(), base["mask"].isneginf() & two["mask"].isneginf())
    two["mask"] = base["mask"].clone()
    lm.merge(base, [one, two], WeightAverage())


def test_infinity_of_the_other_sign_is_another_value():
    base, one, two = make()
    one["mask"][0, 1] = INF
    message = refusal(base, one, two)
    assert "'mask' of the base" in message
    assert "'mask' of the expert one" in message


def test_an_expert_that_is_infinite_alone():
    base, one, two = make()
    base["bn.running_var"][0] = 1.0
    two["bn.running_var"][0] = INF
    message = refusal(base, one, two)
    assert message.startswith(
        "'bn.running_var' of the expert two holds values that are not finite (1 of 4: 1 infinite)"
    )


def test_what_is_copied_may_be_infinite_but_not_nan():
    base, one, two = make()
    base["mask"][0, 0] = INF
    assert torch.equal(
        lm.merge(base, [one, two], WeightAverage(), exclude=["mask"]).weights["mask"].isinf(), base["mask"].isinf()
    )
    base["mask"][0, 0] = float("nan")
    message = refusal(base, one, two, exclude=["mask"])
    assert "(1 of 16: 1 NaN)" in message
    assert "exclude" not in message  # which was tried already


def test_statistics_are_never_infinite():
    base, one, two = make()
    statistics = {
        name: {f"fisher.{key}": torch.ones_like(base[key]) for key in ("proj", "mask")} for name in ("one", "two")
    }
    for state in statistics.values():
        state["fisher.proj"][0] = INF
    message = refusal(base, one, two, Fisher(), statistics=statistics)
    assert "'fisher.proj' of the statistics of one holds values that are not finite (4 of 16: 4 infinite)" in message
    assert "exclude" not in message


@pytest.mark.parametrize(
    ("size", "differs", "large"), [(1e20, True, True), (1e20, False, False), (-1e38, True, True), (1e3, True, False)]
)
def test_large_numbers_count_where_models_differ(size, differs, large):
    base, one, two = make()
    for state in (base, one, two):
        state["proj"][1, 1] = size
    if differs:
        base["proj"][1, 1] = 0.0
    models = {"one": open_weights(one, "one"), "two": open_weights(two, "two")}
    origin = open_weights(base, "base")
    inventory = take_inventory(origin, list(models.values()))
    values = inspect_values(origin, models, [], (), inventory, Processes(), 1)
    assert values.large is large
    assert values.infinite == {"mask"}


def test_experts_keep_a_mask_as_task_vectors_and_in_comparisons(tmp_path):
    base, one, two = make()
    for state in (base, one, two):
        del state["bn.running_var"]
    lm.save_task_vector(tmp_path / "one.safetensors", base, one)
    expected = lm.merge(base, [one], TaskArithmetic(scale=0.5)).weights
    merged = lm.merge(base, [tmp_path / "one.safetensors"], TaskArithmetic(scale=0.5)).weights
    assert all(torch.equal(merged[name], expected[name]) for name in base)
    assert not compare_experts(base, {"one": one, "two": two}).by_name["mask"].products.any()
