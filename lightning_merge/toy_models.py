"""Small made-up models, experts and statistics, always the same, on which methods are tried."""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import torch
from torch import Tensor

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
    """Make up the statistics of every expert, by its name: Fishers, and Gram matrices for most layers."""
    found: dict[str, State] = {}
    for expert in experts:
        found[expert] = {}
        for name, tensor in base.items():
            if not tensor.is_floating_point():
                continue
            draw = torch.Generator().manual_seed(zlib.crc32(f"{expert}/{name}".encode()))
            found[expert][f"fisher.{name}"] = torch.rand(tensor.shape, generator=draw) * 1e-3
            if tensor.ndim >= 2 and name != "visual.proj":
                sides = {"gram": tensor[0].numel(), "gram_out": len(tensor)}
                for kind, side in sides.items():
                    x = torch.randn(4 * side, side, generator=draw)
                    found[expert][f"{kind}.{name}"] = x.mT @ x / len(x)
    return found
