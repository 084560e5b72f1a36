"""Small made-up models, experts, statistics and data, always the same, on which methods are tried."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

State = dict[str, Tensor]

_WIDTH = 12


def make_models(num_experts: int = 3, dtype: torch.dtype = torch.float32) -> tuple[State, dict[str, State]]:
    """Make up a small CLIP-like base and its experts: matrices, vectors, a kernel, a scalar, an integer buffer."""
    draw = torch.Generator().manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {"visual.conv1.weight": (_WIDTH, 3, 2, 2), "visual.class_embedding": (_WIDTH,)}
    for block in range(2):
        prefix = f"visual.transformer.resblocks.{block}"
        shapes |= {
            f"{prefix}.ln_1.weight": (_WIDTH,),
            f"{prefix}.attn.in_proj_weight": (3 * _WIDTH, _WIDTH),
            f"{prefix}.mlp.c_fc.weight": (_WIDTH + 4, _WIDTH),
            f"{prefix}.mlp.c_fc.bias": (_WIDTH + 4,),
        }
    shapes |= {"visual.proj": (2, _WIDTH), "text_projection": (6, 6), "logit_scale": ()}
    base = {name: 0.2 * torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    experts = {}
    for i in range(num_experts):
        deltas = {name: 0.01 * torch.randn(shape, generator=draw) for name, shape in shapes.items()}
        experts[f"expert {i}"] = {name: (base[name] + deltas[name]).to(dtype) for name in shapes}
    base = {name: tensor.to(dtype) for name, tensor in base.items()}
    for state in (base, *experts.values()):
        state["visual.position_ids"] = torch.arange(5)
    return base, experts


def make_statistics(base: State, experts: Mapping[str, State]) -> dict[str, State]:
    """Make up the statistics of every expert, by its name: Fishers ``(…)``, and for most layers Gram matrices.

    A layer ``(out, in)`` has Gram matrices ``(in, in)`` and ``(out, out)``.
    """
    statistics: dict[str, State] = {}
    for expert in experts:
        statistics[expert] = {}
        for name, tensor in base.items():
            if not tensor.is_floating_point():
                continue
            draw = torch.Generator().manual_seed(zlib.crc32(f"{expert}/{name}".encode()))
            statistics[expert][f"fisher.{name}"] = torch.rand(tensor.shape, generator=draw) * 1e-3
            if tensor.ndim >= 2 and name != "visual.proj":
                sides = {"gram": tensor[0].numel(), "gram_out": len(tensor)}
                for kind, side in sides.items():
                    x = torch.randn(4 * side, side, generator=draw)
                    statistics[expert][f"{kind}.{name}"] = x.mT @ x / len(x)
    return statistics


def make_data(experts: Iterable[str]) -> dict[str, list[Tensor]]:
    """Make up the images of every expert's task, by its name: two batches ``(6, 3, 4, 4)``, of colours of its own."""
    images = {}
    for expert in experts:
        draw = torch.Generator().manual_seed(zlib.crc32(expert.encode()))
        images[expert] = [torch.randn(6, 3, 4, 4, generator=draw) + torch.randn(3, 1, 1, generator=draw) for _ in "12"]
    return images


class ToyModule(nn.Module):
    """A small vision transformer whose parameters are those of :func:`make_models`; ``text_projection`` is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.visual = _ToyTower()
        self.text_projection = nn.Parameter(torch.zeros(6, 6))
        self.logit_scale = nn.Parameter(torch.zeros(()))

    def forward(self, images: Tensor) -> Tensor:
        """Map images ``(N, 3, 4, 4)`` to logits ``(N, 2)``."""
        patches = self.visual.conv1(images).flatten(2).mT  # (N, 4, width)
        tokens = torch.cat([self.visual.class_embedding.expand(len(images), 1, -1), patches], dim=1)
        for block in self.visual.transformer["resblocks"].children():
            tokens = block(tokens)
        return self.logit_scale.exp() * tokens[:, 0] @ self.visual.proj.mT


class _ToyTower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, _WIDTH, 2, stride=2, bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(_WIDTH))
        self.transformer = nn.ModuleDict({"resblocks": nn.ModuleList(_ToyBlock() for _ in range(2))})
        self.proj = nn.Parameter(torch.zeros(2, _WIDTH))
        self.register_buffer("position_ids", torch.arange(5))


class _ToyBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(_WIDTH, bias=False)
        self.attn = nn.ParameterDict({"in_proj_weight": nn.Parameter(torch.zeros(3 * _WIDTH, _WIDTH))})
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(_WIDTH, _WIDTH + 4)})

    def forward(self, tokens: Tensor) -> Tensor:
        queries, keys, values = F.linear(self.ln_1(tokens), self.attn["in_proj_weight"]).chunk(3, dim=-1)
        tokens = tokens + F.scaled_dot_product_attention(queries, keys, values)
        return tokens + F.gelu(self.mlp["c_fc"](tokens))[..., :_WIDTH]
