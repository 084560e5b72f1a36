"""Experts of several foundations around one common initialisation."""

from __future__ import annotations

import json

import pytest
import torch

import lightning_merge as lm
from lightning_merge.align import Permutation, Symmetries
from lightning_merge.align.foundations import align_experts
from lightning_merge.methods import TaskArithmetic
from lightning_merge.utilities.errors import MergeError

SHAPES = {"in.weight": (6, 4), "in.bias": (6,), "out.weight": (6, 6), "head.weight": (3, 6), "steps": ()}
SYMMETRIES = Symmetries.from_axes(
    {
        "in.weight": ["P", None],
        "in.bias": ["P"],
        "out.weight": ["Q", "P"],
        "head.weight": [None, "Q"],
    },
    SHAPES | {"in.bias": (6,)},
)


def draw(seed: int, classes: int = 3) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    found = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items() if shape}
    found["head.weight"] = torch.randn(classes, 6, generator=generator)
    return found | {"steps": torch.tensor(seed)}


def run(weights: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    hidden = torch.relu(x @ weights["in.weight"].T + weights["in.bias"])
    return torch.relu(hidden @ weights["out.weight"].T) @ weights["head.weight"].T


FOUNDATIONS = {"a": draw(0), "b": draw(1)}
EXPERTS = {"digits": draw(2), "letters": draw(3, classes=5)}
ORIGIN = {"digits": "a", "letters": "b"}
PLANTED = {"a": Permutation.identity(SYMMETRIES), "b": Permutation.random(SYMMETRIES, 7)}


def aligned():
    return align_experts(FOUNDATIONS, EXPERTS, ORIGIN, lambda models: PLANTED)


def test_the_formula_of_the_paper():
    found = aligned()
    moved = PLANTED["b"].apply(FOUNDATIONS["b"])
    for name in ("in.weight", "in.bias", "out.weight"):
        assert torch.allclose(found.base[name], (FOUNDATIONS["a"][name] + moved[name]) / 2)
    assert found.base["steps"] == 0  # a counter is no mean
    merged = lm.merge(found.base, found.experts, TaskArithmetic(scale=0.4), exclude=["head.*"])
    theta = {name: found.base[name] for name in SHAPES}
    expert = PLANTED["b"].apply(EXPERTS["letters"])
    for name in ("in.weight", "in.bias", "out.weight"):
        by_hand = theta[name] + 0.4 * (EXPERTS["digits"][name] - theta[name] + expert[name] - theta[name])
        assert torch.allclose(merged.weights[name], by_hand, atol=1e-6)
    assert torch.equal(merged.for_task("letters")["head.weight"], expert["head.weight"])


def test_a_permuted_expert_computes_what_it_did():
    x = torch.randn(8, 4)
    found = aligned()
    assert torch.allclose(run(found.experts["letters"], x), run(EXPERTS["letters"], x), atol=1e-5)
    assert not torch.equal(found.experts["letters"]["in.weight"], EXPERTS["letters"]["in.weight"])
    assert torch.equal(found.experts["digits"]["in.weight"], EXPERTS["digits"]["in.weight"])


def test_the_control_leaves_all_channels_where_they_are():
    found = align_experts(FOUNDATIONS, EXPERTS, ORIGIN, None)
    assert torch.equal(found.experts["letters"]["in.weight"], EXPERTS["letters"]["in.weight"])
    mean = (FOUNDATIONS["a"]["in.weight"] + FOUNDATIONS["b"]["in.weight"]) / 2
    assert torch.allclose(found.base["in.weight"], mean)


def test_files_are_read_when_they_are_needed_and_named_in_the_manifest(tmp_path):
    paths = {name: str(tmp_path / f"{name}.safetensors") for name in [*FOUNDATIONS, *EXPERTS]}
    for name, weights in (FOUNDATIONS | EXPERTS).items():
        lm.save_weights(paths[name], {f"model.{key}": tensor for key, tensor in weights.items()})
    found = align_experts(
        {name: paths[name] for name in FOUNDATIONS},
        {name: paths[name] for name in EXPERTS},
        ORIGIN,
        lambda models: PLANTED,
        like=FOUNDATIONS["a"],
    )
    output = tmp_path / "merged.ckpt"
    merged = lm.merge(found.base, found.experts, TaskArithmetic(), exclude=["head.*"], output=output, resume=True)
    manifest = json.loads(json.dumps(merged.manifest))
    assert list(manifest["base"]["mean_of"]) == ["a", "b"]
    assert manifest["base"]["mean_of"]["a"]["path"] == paths["a"]
    assert manifest["experts"]["letters"]["path"] == paths["letters"]
    assert manifest["experts"]["letters"]["permutation"] == PLANTED["b"].digest()
    in_memory = lm.merge(aligned().base, aligned().experts, TaskArithmetic(), exclude=["head.*"])
    for name, tensor in lm.open_weights(output).items():
        assert torch.equal(tensor, in_memory.weights[name])


@pytest.mark.parametrize(
    ("origin", "message"),
    [
        ({"digits": "a"}, "foundation of the expert 'letters' is not told"),
        (ORIGIN | {"letters": "c"}, "'letters' is from 'c', which is no foundation; they are a, b"),
        (ORIGIN | {"faces": "a"}, "speaks of 'faces', which is no expert"),
    ],
)
def test_an_expert_without_a_foundation_is_refused(origin, message):
    with pytest.raises(MergeError, match=message):
        align_experts(FOUNDATIONS, EXPERTS, origin, None)


def test_a_head_that_the_foundation_lacks_is_named_as_in_the_module():
    def blocks(prefix: str = "") -> dict[str, torch.Tensor]:
        return {f"{prefix}blocks.{i}.weight": torch.randn(4, 4) for i in range(24)}

    foundations = {"a": blocks(), "b": blocks()}
    experts = {name: {**weights, "head.weight": torch.ones(3, 4)} for name, weights in foundations.items()}
    module = {**blocks("model."), "model.head.weight": torch.zeros(3, 4)}
    aligned = align_experts(foundations, experts, {"a": "a", "b": "b"}, None, module)
    merged = lm.merge(aligned.base, aligned.experts, lm.methods.TaskArithmetic(), exclude=["model.head.*"])
    assert merged.for_task("a")["model.head.weight"].sum() == 12


def test_a_model_of_another_architecture_is_named():
    other = EXPERTS | {"letters": EXPERTS["letters"] | {"out.weight": torch.randn(6, 5)}}
    with pytest.raises(MergeError, match=r"'out.weight' has shape \(6, 5\) in expert letters"):
        align_experts(FOUNDATIONS, other, ORIGIN, lambda models: PLANTED)
