"""Make a base and experts of a vision transformer's shape, the same for the same arguments.

python -m benchmarks.models FOLDER --shape vit_base --experts 4
"""

from __future__ import annotations

import argparse
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

SHAPES = {"toy": (16, 2), "vit_tiny": (192, 12), "vit_small": (384, 12), "vit_base": (768, 12), "vit_large": (1024, 24)}
"""Width and depth."""
LIKE = ("random", "decaying")


def parameters(width: int, depth: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The names and shapes of timm's ``vit_*_patch16_224`` without its head."""
    yield "cls_token", (1, 1, width)
    yield "pos_embed", (1, 197, width)
    yield "patch_embed.proj.weight", (width, 3, 16, 16)
    yield "patch_embed.proj.bias", (width,)
    for block in range(depth):
        for name, rows, columns in (
            ("attn.qkv", 3 * width, width),
            ("attn.proj", width, width),
            ("mlp.fc1", 4 * width, width),
            ("mlp.fc2", width, 4 * width),
        ):
            yield f"blocks.{block}.{name}.weight", (rows, columns)
            yield f"blocks.{block}.{name}.bias", (rows,)
        for norm in ("norm1", "norm2"):
            yield f"blocks.{block}.{norm}.weight", (width,)
            yield f"blocks.{block}.{norm}.bias", (width,)
    yield "norm.weight", (width,)
    yield "norm.bias", (width,)


def draw(shape: Sequence[int], *seed: str) -> Tensor:
    """Gaussian numbers that follow from the seed."""
    import torch

    generator = torch.Generator().manual_seed(zlib.crc32("/".join(seed).encode()))
    return torch.randn(tuple(shape), generator=generator)


def task_vector(name: str, shape: Sequence[int], expert: str, like: str) -> Tensor:
    """A task vector: Gaussian, or (matrices) with a spectrum that decays as ``1 / k``, half of it shared by all.

    Its entries are of the order of 1e-3, a twentieth of the base's.
    """
    import torch

    if like == "random" or len(shape) != 2:
        return 1e-3 * draw(shape, "task", name, expert)
    r = min(shape)
    left, right = (
        (draw(size, side, name, "shared") + draw(size, side, name, expert)) / 2**0.5
        for side, size in (("left", (shape[0], r)), ("right", (r, shape[1])))
    )
    decay = 1 / torch.arange(1, r + 1)
    return 1e-3 * ((left * decay) @ right) / decay.norm()


def make(
    folder: str | Path,
    shape: str = "vit_base",
    experts: int = 4,
    like: str = "decaying",
    dtype: str = "float32",
    suffix: str = ".safetensors",
) -> list[Path]:
    """Write the base and the experts to a folder, and say where: the base first."""
    import torch

    shapes = list(parameters(*SHAPES[shape]))
    base = {name: 0.02 * draw(size, "base", name) for name, size in shapes}
    paths = [Path(folder) / f"base{suffix}"]
    _save(paths[0], base, getattr(torch, dtype))
    for i in range(experts):
        expert = {name: base[name] + task_vector(name, size, str(i), like) for name, size in shapes}
        paths.append(Path(folder) / f"expert_{i}{suffix}")
        _save(paths[-1], expert, getattr(torch, dtype))
    return paths


def _save(path: Path, weights: dict[str, Tensor], dtype: torch.dtype) -> None:
    import torch
    from safetensors.torch import save_file

    weights = {name: tensor.to(dtype) for name, tensor in weights.items()}
    if path.suffix == ".safetensors":
        save_file(weights, path, {"format": "pt"})
    elif path.suffix == ".ckpt":
        epochs = {"epoch": 0, "global_step": 0, "pytorch-lightning_version": "2.4.0"}
        torch.save({"state_dict": weights, **epochs}, path)
    else:
        torch.save(weights, path)


def make_task_vectors(folder: str | Path, base: str | Path, experts: Sequence[str | Path]) -> list[Path]:
    """Write a base of zeros and the experts' task vectors as float32: what is merged of them is the update itself.

    Beside a base the rounding of ``base + update`` would hide the error of the update.
    """
    import torch
    from safetensors.torch import load_file

    origin = load_file(base)
    paths = [Path(folder) / "zeros.safetensors"]
    _save(paths[0], {name: torch.zeros_like(tensor) for name, tensor in origin.items()}, torch.float32)
    for i, expert in enumerate(experts):
        weights = load_file(expert)
        paths.append(Path(folder) / f"task_vector_{i}.safetensors")
        _save(paths[-1], {name: weights[name].float() - origin[name].float() for name in origin}, torch.float32)
    return paths


def add_arguments(parser: argparse.ArgumentParser, shape: str = "vit_base") -> None:
    """The arguments that say which models."""
    parser.add_argument("--shape", choices=tuple(SHAPES), default=shape)
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--experts-like", choices=LIKE, default="decaying", help="Gaussian, or as fine-tuned ones are.")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16", "float64"), default="float32")


def main(arguments: Sequence[str] | None = None) -> None:
    """Make models, or (``--task-vectors BASE EXPERT …``) the task vectors of models."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--suffix", choices=(".safetensors", ".ckpt", ".pt"), default=".safetensors")
    parser.add_argument("--task-vectors", nargs="+")
    add_arguments(parser)
    given = parser.parse_args(arguments)
    given.folder.mkdir(parents=True, exist_ok=True)
    if given.task_vectors:
        make_task_vectors(given.folder, given.task_vectors[0], given.task_vectors[1:])
    else:
        make(given.folder, given.shape, given.experts, given.experts_like, given.dtype, given.suffix)


if __name__ == "__main__":
    main()
