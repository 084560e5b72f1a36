"""Read weights: whatever the file, one mapping from parameter name to tensor.

Nothing here runs code from a file: pickles are loaded with ``weights_only=True`` and there is no way around it.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Union

import torch
from torch import Tensor

from lightning_merge.errors import MergeError

Source = Union[str, "os.PathLike[str]", Mapping[str, Tensor]]
"""Where weights come from: a file, a folder, or a state dict."""

STATISTICS = ".statistics.safetensors"
"""What replaces the ending of a weight file in the name of the statistics beside it."""
TORCH_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin")
TIED = "tied:"  # in a safetensors header: "tied:<alias>" -> the name under which the shared tensor is stored


class Weights(Mapping[str, Tensor]):
    """The weights of one model, read parameter by parameter.

    Args:
        name: What to call this model in messages.
        readers: For every parameter a function that returns its tensor.
        meta: For every parameter a tensor on the ``meta`` device: its shape and dtype, known without reading it.
        path: The file behind it, if there is one.
        header: What else the file holds: ``hyper_parameters``, a ``merge`` manifest, what ``statistics`` are of.
        tied: Names that share a tensor with another name: ``{alias: name}``.
    """

    def __init__(
        self,
        name: str,
        readers: Mapping[str, Callable[[], Tensor]],
        meta: Mapping[str, Tensor],
        path: Path | None = None,
        header: Mapping[str, Any] | None = None,
        tied: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        self.meta = meta
        self.path = path
        self.header = dict(header or {})
        self.tied = dict(tied or {})
        self._readers = readers

    def __getitem__(self, name: str) -> Tensor:
        try:
            return self._readers[name]()
        except KeyError:
            raise KeyError(f"{self.name} has no parameter {name!r}") from None

    def __contains__(self, name: object) -> bool:
        return name in self._readers

    def __iter__(self) -> Iterator[str]:
        return iter(self._readers)

    def __len__(self) -> int:
        return len(self._readers)

    def __repr__(self) -> str:
        return f"Weights({self.name!r}, {len(self)} parameters)"

    def fingerprint(self) -> str | None:
        """The sha256 of the file behind these weights; None where they live in memory or in several files."""
        if self.path is None or not self.path.is_file():
            return None
        digest = hashlib.sha256()
        with self.path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        return digest.hexdigest()

    def note_fingerprint(self, f): ...
    def check_unchanged(self): ...

    def digest(self) -> str:
        """The sha256 of all names, types, shapes and values: the same for the same weights in any file or in memory."""
        digest = hashlib.sha256()
        for name in sorted(name for name in self if name not in self.tied):
            tensor = self[name].detach().cpu().contiguous()
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))
        return digest.hexdigest()


def open_weights(source: Source, name: str | None = None) -> Weights:
    """Open weights for reading.

    Args:
        source: A ``.safetensors`` file, a Lightning ``.ckpt``, a ``.pt`` / ``.pth`` / ``.bin`` file with a state dict,
            a folder that holds one of these (a run of ``lightning-merge fit``, a Hugging Face, timm or open_clip
            folder, sharded or not), or a state dict in memory.
        name: What to call this model in messages; by default the path.

    Returns:
        The weights; tensors of a file are read when they are asked for.

    Raises:
        MergeError: If there is no such file, or if it does not hold weights that can be trusted.
    """
    if isinstance(source, Weights):
        return source
    if isinstance(source, Mapping):
        return from_memory(name or "the state dict", source)
    path = _find_file(Path(source).expanduser())
    name = name or str(source)
    if path.name.endswith(".index.json"):
        return _from_shards(name, path)
    if path.suffix == ".safetensors":
        return _from_safetensors(name, path)
    if path.suffix in TORCH_SUFFIXES:
        return _from_torch(name, path)
    known = ", ".join([".safetensors", *TORCH_SUFFIXES])
    raise MergeError(f"{path} is no weight file that is known here; give one that ends in {known}, or a folder.")


_FOLDER_PATTERNS = (
    ("*.safetensors.index.json",),
    ("*.safetensors",),
    ("*.ckpt", "checkpoints/*.ckpt"),
    ("*.bin.index.json",),
    ("*.bin",),
    ("*.pt", "*.pth"),
)
"""What a folder's weights may be called, most telling first."""


def _find_file(path: Path) -> Path:
    """The weight file that ``path`` means: itself, or the only one in the folder."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise MergeError(f"There is no file or folder {path}; check the path to the weights.")
    for patterns in _FOLDER_PATTERNS:
        found = sorted(file for pattern in patterns for file in path.glob(pattern))
        found = [file for file in found if not file.name.endswith(STATISTICS)]
        if len(found) == 1:
            return found[0]
        if found:
            names = ", ".join(str(file.relative_to(path)) for file in found)
            raise MergeError(f"The folder {path} holds several weight files ({names}); name the one that you mean.")
    raise MergeError(f"The folder {path} holds no weight file (.safetensors, .ckpt, .bin or .pt).")


def from_memory(
    name: str, state: Mapping[str, Any], path: Path | None = None, header: Mapping[str, Any] | None = None
) -> Weights:
    """See a state dict as weights; entries that are no tensors are left out, names that share a tensor are noted."""
    tensors = {_plain(key): value.detach() for key, value in state.items() if isinstance(value, Tensor)}
    if not tensors:
        raise MergeError(f"{name} holds no tensors.")
    first: dict[tuple[Any, ...], str] = {}
    tied = {}
    for key, tensor in tensors.items():
        if tensor.numel() and tensor.device.type != "meta":
            place = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride())
            if (owner := first.setdefault(place, key)) != key:
                tied[key] = owner
    return Weights(
        name,
        readers={key: lambda tensor=tensor: tensor for key, tensor in tensors.items()},
        meta={key: torch.empty_like(tensor, device="meta") for key, tensor in tensors.items()},
        path=path,
        header=header,
        tied=tied,
    )


def _plain(key: str) -> str:
    """The name of a parameter without what ``torch.compile`` puts into it."""
    return key.replace("_orig_mod.", "")


def _from_torch(name: str, path: Path) -> Weights:
    try:
        content = _load_pickle(path)
    except pickle.UnpicklingError as error:
        raise MergeError(
            f"{path} cannot be loaded without running code that is stored in it, so it was refused; "
            f"save its state_dict alone and give that file. ({first_line(error)})"
        ) from error
    except Exception as error:  # a damaged pickle can raise anything
        raise MergeError(f"{path} is damaged or no PyTorch file ({first_line(error)}).") from error
    if not isinstance(content, Mapping):
        raise MergeError(f"{path} holds a {type(content).__name__}, not a state dict.")
    header = {key: content[key] for key in ("hyper_parameters", "merge") if key in content}
    state = content.get("state_dict", content)
    if not isinstance(state, Mapping) or not any(isinstance(value, Tensor) for value in state.values()):
        raise MergeError(f"{path} holds no state dict; its keys are {', '.join(map(str, list(content)[:8]))}.")
    return from_memory(name, state, path, header)


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its kind where that says nothing."""
    line = (str(error).splitlines() or [""])[0]
    return line if " " in line else f"{type(error).__name__} {line}".strip()


def _load_pickle(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except RuntimeError as error:
        if "mmap can only be used" not in str(error):
            raise
        return torch.load(path, map_location="cpu", weights_only=True)  # a file of torch < 1.6 cannot be mapped


def _from_safetensors(name: str, path: Path) -> Weights:
    from safetensors import SafetensorError, safe_open

    try:
        file = safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError, ValueError) as error:
        raise MergeError(f"{path} is damaged or no safetensors file: {error}") from error
    metadata = dict(file.metadata() or {})
    stored = {_plain(key): key for key in file.keys()}  # noqa: SIM118, a safetensors file is no dictionary
    tied = {key.removeprefix(TIED): owner for key, owner in metadata.items() if key.startswith(TIED)}
    for alias, owner in tied.items():
        if owner not in stored:
            raise MergeError(f"{path} is damaged: {alias!r} is said to be {owner!r}, which is not there.")
        stored[alias] = stored[owner]
    meta = {}
    for key, place in stored.items():
        part = file.get_slice(place)
        if part.get_dtype() not in _SAFETENSORS_DTYPES:
            raise MergeError(f"{key!r} in {path} is of type {part.get_dtype()}, which cannot be merged; leave it out.")
        meta[key] = torch.empty(part.get_shape(), dtype=_SAFETENSORS_DTYPES[part.get_dtype()], device="meta")
    return Weights(
        name,
        readers={key: lambda place=place: file.get_tensor(place) for key, place in stored.items()},
        meta=meta,
        path=path,
        header=_read_header(metadata),
        tied=tied,
    )


def _read_header(metadata: Mapping[str, str]) -> dict[str, Any]:
    """What this package wrote into a header; nothing where another one used the same words."""
    header = {}
    for key in ("merge", "statistics"):
        try:
            content = json.loads(metadata.get(key, "null"))
        except ValueError:
            continue
        if isinstance(content, dict):
            header[key] = content
    return header


_SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


def _from_shards(name: str, index: Path) -> Weights:
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise MergeError(f"{index} is no index of shards: it lacks a readable `weight_map`.") from error
    shards: dict[str, Weights] = {}
    for shard in sorted(set(weight_map.values())):
        if shard != Path(shard).name:
            raise MergeError(f"{index} points to {shard!r}, outside its own folder, so it was refused.")
        file = _find_file(index.parent / shard)
        shards[shard] = (_from_safetensors if file.suffix == ".safetensors" else _from_torch)(name, file)
    missing = [f"{key!r} in {shard}" for key, shard in weight_map.items() if _plain(key) not in shards[shard]]
    if missing:
        raise MergeError(f"{index} promises parameters that its shards do not hold: {', '.join(missing[:5])}.")
    homes = {_plain(key): shards[shard] for key, shard in weight_map.items()}
    return Weights(
        name,
        readers={key: lambda key=key, home=home: home[key] for key, home in homes.items()},
        meta={key: home.meta[key] for key, home in homes.items()},
        path=index,
    )
