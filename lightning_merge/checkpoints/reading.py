"""Read weights: whatever the file, one mapping from parameter name to tensor."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypedDict, Union

from torch import Tensor

from lightning_merge.checkpoints.contents import MARK, split_source
from lightning_merge.checkpoints.files import InputFile
from lightning_merge.checkpoints.hub import HUB, download
from lightning_merge.checkpoints.recognition import find_format
from lightning_merge.checkpoints.remote import fetch
from lightning_merge.checkpoints.safetensors_format import TASK_VECTOR, open_safetensors
from lightning_merge.checkpoints.sharded import check_consolidated, check_no_part
from lightning_merge.checkpoints.torch_format import open_torch
from lightning_merge.checkpoints.weights import Weights, from_memory, plain_names
from lightning_merge.utilities.errors import MergeError
from lightning_merge.utilities.schemas import Where, read_json, shown

Source = Union[str, "os.PathLike[str]", Mapping[str, Tensor]]
"""Where weights come from: a file, a folder, or a state dict."""

STATISTICS = ".statistics.safetensors"
"""What replaces the ending of a weight file in the name of the statistics beside it."""
TORCH_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin")


def open_weights(source: Source, name: str | None = None) -> Weights:
    """Open weights for reading.

    Args:
        source: A ``.safetensors`` file, a Lightning ``.ckpt``, a ``.pt`` / ``.pth`` / ``.bin`` file with a state dict,
            a folder that holds one of these (a run of ``lightning-merge fit``, a Hugging Face, timm or open_clip
            folder, sharded or not), a model on the Hugging Face Hub (``hf-hub:OWNER/NAME``), or a state dict in memory.
            Where a file of torch holds several sets of weights, ``state_dict`` is read; another one is named behind the
            file: ``file.ckpt#state_dict_ema``, ``file.ckpt#callbacks/EMA/weights``.
        name: What to call this model in messages; by default the path.

    Returns:
        The weights; tensors of a file are read when they are asked for.

    Raises:
        MergeError: If there is no such file, or if it does not hold weights that can be trusted. Reading a tensor
            raises it, too, if the file was changed since.
    """
    if isinstance(source, Weights):
        return source
    if isinstance(source, Mapping):
        return from_memory(name or "the state dict", source)
    part = None
    if isinstance(source, str) and source.startswith(HUB):
        path = _find_file(download(source))
    else:
        place, part = split_source(source)
        path = _find_file(fetch(place, _FOLDER_PATTERNS))
    name = name or str(source)
    if part is not None and path.suffix not in TORCH_SUFFIXES:
        raise MergeError(f"{path} holds one set of weights, and none is called {part!r}; leave {MARK}{part} out.")
    return _from_shards(name, path) if path.name.endswith(".index.json") else _from_file(name, path, part)


def _from_file(name: str, path: Path, part: str | None = None) -> Weights:
    suffix = find_format(InputFile(path))
    if suffix == ".safetensors":
        weights = open_safetensors(name, path)
        if TASK_VECTOR in weights.header:
            raise MergeError(
                f"{path} is a task vector, which is no model but the difference to one; give it as an expert, over its "
                "base."
            )
        return weights
    if suffix == ".pt" and path.suffix == ".safetensors":
        raise MergeError(f"{path} is a file of torch.save and not what its name says; let its name end in .pt.")
    if suffix in TORCH_SUFFIXES:
        return open_torch(name, path, part)
    suffixes = ", ".join([".safetensors", *TORCH_SUFFIXES])
    raise MergeError(f"{path} is no weight file that is known here; give one that ends in {suffixes}, or a folder.")


_FOLDER_PATTERNS = (
    ("*.safetensors.index.json",),
    ("*.safetensors",),
    ("*.ckpt", "checkpoints/*.ckpt"),
    ("*.bin.index.json",),
    ("*.bin",),
    ("*.pt", "*.pth", "*.pth.tar"),
)
"""What a folder's weights may be called, most telling first."""


_FOREIGN = (".gguf", ".h5", ".keras", ".onnx", ".msgpack", ".npz")
"""How weights of other libraries end, which are named where a folder holds nothing else."""


def _find_file(path: Path) -> Path:
    """Find the weight file that ``path`` means: itself, or the only one in the folder."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise MergeError(f"There is no file or folder {path}; check the path to the weights.") from error
    except OSError as error:
        raise MergeError(f"{path} cannot be read: {error.strerror}; check your rights to its folder.") from error
    if os.path.isfile(path):
        check_no_part(path)
        return path
    if not os.path.isdir(path) or not os.access(path, os.R_OK | os.X_OK):
        raise MergeError(f"{path} cannot be read: it is no file, or a folder to which you have no rights; check both.")
    check_consolidated(path)
    for patterns in _FOLDER_PATTERNS:
        files = sorted(file for pattern in patterns for file in path.glob(pattern))
        files = [file for file in files if not file.name.endswith((STATISTICS, f".{TASK_VECTOR}.safetensors"))]
        if len(files) == 1:
            return _find_file(files[0])
        if files:
            names = ", ".join(str(file.relative_to(path)) for file in files)
            raise MergeError(f"The folder {path} holds several weight files ({names}); name the one that you mean.")
    for file in sorted(file for suffix in _FOREIGN for file in path.glob(f"*{suffix}")):
        find_format(InputFile(file))
    raise MergeError(f"The folder {path} holds no weight file (.safetensors, .ckpt, .bin or .pt).")


def _from_shards(name: str, index: Path) -> Weights:
    """Open a model that an index spreads over files beside it; a symbolic link in its folder may lead anywhere."""
    file = InputFile(index)
    weight_map = _read_index(index)
    shards = {}
    for shard in sorted(set(weight_map.values())):
        if not os.path.isfile(index.parent / shard):
            raise MergeError(f"There is no file {index.parent / shard}, to which {index} points; copy all shards.")
        shards[shard] = _from_file(name, index.parent / shard)
    names = plain_names(str(index), weight_map)
    homes = {plain: shards[weight_map[key]] for plain, key in names.items()}
    homes |= {alias: shard for shard in shards.values() for alias in shard.tied if alias not in homes}
    missing = [f"{key!r} in {weight_map[key]}" for plain, key in names.items() if plain not in homes[plain]]
    if missing:
        raise MergeError(f"{index} promises parameters that its shards do not hold: {', '.join(missing[:5])}.")
    owner: dict[str, str] = {}
    for shard, weights in shards.items():
        for key in weights:
            if owner.setdefault(key, shard) != shard:
                raise MergeError(f"{key!r} is in {owner[key]} and in {shard}, two shards of {index}; remove one.")
    return Weights(
        name,
        readers={key: partial(home.__getitem__, key) for key, home in homes.items()},
        meta={key: home.meta[key] for key, home in homes.items()},
        path=index,
        header=_header_of_all(list(shards.values())),
        tied={a: o for weights in shards.values() for a, o in weights.tied.items() if a in homes and o in homes},
        inputs=[file, *(input for weights in shards.values() for input in weights.inputs)],
    )


def _header_of_all(shards: Sequence[Weights]) -> dict[str, Any]:
    """Join what the shards hold besides tensors: the first one's, and the extra state of every one."""
    extra = {key: value for shard in shards for key, value in shard.header.get("extra_state", {}).items()}
    return shards[0].header | ({"extra_state": extra} if extra else {})


class _Index(TypedDict):
    weight_map: Annotated[dict[str, str], Where("with a file for every tensor", bool)]


def _read_index(index: Path) -> dict[str, str]:
    """Read which shard holds which key: ``{key: name of a file beside the index}``.

    Raises:
        MergeError: If it does not say so, or if it points anywhere else.
    """
    content: _Index = read_json(
        index, _Index, "index of shards, with a `weight_map` from keys to files", "copy it again"
    )
    for shard in set(content["weight_map"].values()):
        if shard != Path(shard).name or shard == ".." or "\0" in shard:
            raise MergeError(f"{index} points to {shown(shard)}, outside its own folder, so it was refused.")
    return content["weight_map"]
