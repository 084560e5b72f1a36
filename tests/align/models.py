"""Small models with permutation groups for the tests."""

from __future__ import annotations

import json

import torch
from safetensors.torch import load_file
from torch import Tensor

from lightning_merge.align import Fixed, Free, Group, Permutation, Product, Symmetries
from tests.toys import GOLDEN

MLP_AXES = json.loads((GOLDEN / "nonlocal_grb_planted_noise0.0.json").read_text())["axes_to_perm"]
HEADS, QUERIES, QK, VO, STREAM = Free("heads", 3), Free("queries", 2), Free("qk", 4), Free("vo", 5), Free("stream", 16)

GROUPED_QUERY_ATTENTION = Symmetries(
    groups={
        "heads": Group("heads", 3),
        "queries": Group("queries", 2, within="heads"),
        "qk": Group("qk", 4, within="heads"),
        "vo": Group("vo", 5, within="heads"),
        "stream": Group("stream", 16),
    },
    axes={
        "embedding": (STREAM, Fixed(7)),
        "query": (Product((HEADS, QUERIES, QK)), STREAM),
        "query bias": (Product((HEADS, QUERIES, QK)),),
        "key": (Product((HEADS, QK)), STREAM),
        "value": (Product((HEADS, VO)), STREAM),
        "output": (STREAM, Product((HEADS, QUERIES, VO))),
        "mixing": (STREAM, STREAM),
        "temperature": (HEADS,),
        "head": (Fixed(3), STREAM),
    },
)
ATTENTION = Symmetries(
    groups={name: group for name, group in GROUPED_QUERY_ATTENTION.groups.items() if name != "queries"},
    axes={
        "embedding": (STREAM, Fixed(7)),
        "query": (Product((HEADS, QK)), STREAM),
        "key": (Product((HEADS, QK)), STREAM),
        "value": (Product((HEADS, VO)), STREAM),
        "output": (STREAM, Product((HEADS, VO))),
        "head": (Fixed(3), STREAM),
    },
)


def golden(name: str) -> tuple[dict, dict[str, Tensor]]:
    path = GOLDEN / f"nonlocal_{name}"
    return json.loads(path.with_suffix(path.suffix + ".json").read_text()), load_file(f"{path}.safetensors")


def part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def mlp(weights: dict[str, Tensor]) -> Symmetries:
    return Symmetries.from_axes(MLP_AXES, {name: tensor.shape for name, tensor in weights.items()})


def draw(symmetries: Symmetries, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn([axis.size for axis in axes], generator=generator) for name, axes in symmetries.axes.items()
    }


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def same_orders(first: Permutation, second: Permutation) -> bool:
    return same(dict(first.orders), dict(second.orders))
