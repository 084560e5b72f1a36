"""Task vectors in other coordinates than the parameters'."""

from __future__ import annotations

import pytest
import torch

import lightning_merge as lm
from lightning_merge.checkpoints import open_weights
from lightning_merge.merging.toy_models import make_models
from lightning_merge.methods import DOGE, TIES, CoreSpace, KnOTS
from lightning_merge.methods.base.blocks import Blocks
from lightning_merge.methods.base.matrices import Matrices
from lightning_merge.methods.base.task_vectors import ExpertTaskVectors

BASE = {"a": torch.arange(12.0).reshape(4, 3), "b": torch.ones(2, 3), "text_projection": torch.ones(2, 2)}
EXPERTS = [{name: tensor + i * (1 + tensor) for name, tensor in BASE.items()} for i in (1, 2)]


@pytest.fixture
def source() -> ExpertTaskVectors:
    experts = [open_weights(expert) for expert in EXPERTS]
    return ExpertTaskVectors(open_weights(BASE), experts, list(BASE), seed=7, matrices=Matrices(split=["a"]))


@pytest.fixture
def blocks(source) -> Blocks:
    """The first two rows of every parameter."""
    return Blocks(
        source,
        {name: (2, BASE[name].shape[1]) for name in BASE},
        read=lambda name: source[name][:, :2],
        read_base=lambda name: source.context(name).base[:2],
    )


def test_look_like_parameters(source, blocks):
    assert (list(blocks), len(blocks), blocks.num_experts) == ([*BASE], 3, 2)
    for found in (blocks.items(), blocks.stream()):
        for name, deltas in found:
            assert torch.equal(deltas, source[name][:, :2])
    assert [blocks.shape(name) for name in blocks] == [(2, 3), (2, 3), (2, 2)]
    assert [blocks.numel(name) for name in blocks] == [6, 6, 4]
    assert [blocks.is_matrix(name) for name in blocks] == [True, True, False]
    assert blocks.factors("a") is None


def test_a_block_is_never_several_matrices(source, blocks):
    assert source.matrices.split == ["a"]
    assert blocks.matrices == source.matrices.whole()


def test_a_context_has_the_base_s_block_and_the_parameter_s_seed(source, blocks):
    context = blocks.context("a", survey="found")
    assert (context.name, context.survey, context.matrices) == ("a", "found", blocks.matrices)
    assert torch.equal(context.base, BASE["a"][:2])
    assert context.seed == source.context("a").seed
    assert not context.statistics


def test_one_block_alone(blocks):
    alone = blocks.only("b")
    assert list(alone) == ["b"]
    assert torch.equal(alone["b"], blocks["b"])
    assert alone.context("b").seed == blocks.context("b").seed
    assert list(blocks) == [*BASE]


def test_seen_through_a_transformation(blocks):
    seen = blocks.map(lambda deltas, context: deltas + context.base)
    assert torch.equal(seen["a"], blocks["a"] + BASE["a"][:2])
    assert seen.numel("a") == 6


def test_no_module_takes_them(blocks):
    with pytest.raises(lm.MergeError, match="not inside KnOTS or CoreSpace"):
        _ = blocks.map(lambda deltas, context: deltas).tasks


@pytest.mark.parametrize("around", [KnOTS, CoreSpace])
@pytest.mark.parametrize("inside", [DOGE(iterations=2), KnOTS(TIES()), CoreSpace()], ids=lambda m: type(m).__name__)
def test_methods_that_ask_for_shapes_stand_inside_a_wrapper(around, inside):
    base, experts = make_models(3)
    merged = lm.merge(base, experts, around(inside))
    assert all(bool(torch.isfinite(tensor).all()) for tensor in merged.weights.values())
    name = "visual.transformer.resblocks.0.mlp.c_fc.weight"
    assert not torch.equal(merged.weights[name], base[name])
