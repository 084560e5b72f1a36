"""Pieces against the whole, bit by bit."""

from __future__ import annotations

import pytest
import torch

from lightning_merge.checkpoints import open_weights
from lightning_merge.methods import EMR, PCB, TIES, Context, MagMax, MergeMethod, TALLMask, TaskArithmetic, Wrapper
from lightning_merge.methods.base.task_vectors import ExpertTaskVectors
from lightning_merge.methods.consensus_ta import ConsensusTA
from lightning_merge.utilities import tiling as module
from lightning_merge.utilities.tiling import in_pieces, indicator, pieces


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(module, "_ENTRIES", 2**12)


@pytest.mark.parametrize("shape", [(5, 70, 61), (2, 4096), (3,), (3, 0, 2), (9, 5)])
def test_pieces_are_aligned_and_make_up_the_whole(shape, small_pieces):
    stack = torch.randn(shape)
    parts = pieces(stack)
    assert torch.equal(torch.cat(parts, dim=1), stack.reshape(len(stack), -1))
    assert all(part.shape[1] % module._ALIGNMENT == 0 for part in parts[:-1])
    assert all(part.data_ptr() >= stack.data_ptr() for part in parts)
    assert torch.equal(in_pieces(lambda some: some.sum(dim=0), stack), stack.sum(dim=0))


def test_an_indicator_is_a_mask_in_the_values_dtype():
    values = torch.tensor([[1.0, -2.0, torch.nan]], dtype=torch.float64)
    found = indicator(torch.ge, values, 0)
    assert found.dtype == torch.float64
    assert found.tolist() == [[1, 0, 0]]


@pytest.mark.parametrize(
    "method",
    [
        TaskArithmetic(),
        MagMax(),
        EMR(),
        TIES(),
        TIES(elect="normfrac", merge="max"),
        TIES(trim="std", merge="median", disjoint=False),
        PCB(),
        PCB(variant="vision"),
        TALLMask(TIES(merge="sum")),
        ConsensusTA(EMR(), k=1),
    ],
    ids=repr,
)
def test_methods_give_the_same_bits_in_pieces(method, monkeypatch):
    g = torch.Generator().manual_seed(0)
    base = {
        "matrix": torch.randn(90, 77, generator=g),
        "vector": torch.randn(5001, generator=g),
        "scalar": torch.ones(()),
    }
    experts = [{k: v + 0.1 * torch.randn(v.shape, generator=g) for k, v in base.items()} for _ in range(7)]
    sources = [open_weights(expert, str(i)) for i, expert in enumerate(experts)]
    task_vectors = ExpertTaskVectors(open_weights(base, "base"), sources, list(base))
    survey = method.survey(task_vectors)
    for name in base:
        context, deltas = task_vectors.context(name, survey), task_vectors[name]
        whole = method.update(deltas, context), method.task_update(deltas, 1, context)
        with monkeypatch.context() as patch:
            patch.setattr(module, "_ENTRIES", 1)  # pieces of the alignment
            assert len(pieces(task_vectors["matrix"])) > 5
            parts = method.update(deltas, context), method.task_update(deltas, 1, context)
        assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


def test_only_methods_that_say_so_get_pieces(small_pieces):
    class Whole(MergeMethod):
        def tensor(self, deltas, context):
            assert deltas.shape == (2, 9000)
            return deltas.mean(dim=0)

    Whole().update(torch.ones(2, 9000), Context())
    assert not Wrapper(TIES()).entrywise
    assert not TALLMask(Whole()).entrywise
    assert TALLMask(TIES()).entrywise
