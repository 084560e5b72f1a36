"""Recognize what a file is by its content: weights, under whatever key, or something that is not read here, and why."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from lightning_merge.checkpoints.files import InputFile
from lightning_merge.utilities.errors import MergeError
from lightning_merge.utilities.schemas import shown

_LOOKED_AT = 512  # bytes
_TORCH = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # the magic number of torch.save before 1.6, pickled
_ZIP = b"PK\x03\x04"
_SAVE = "and save what it holds by names as tensors with safetensors.torch.save_file"
_DOWNLOAD = "download the file itself (on Hugging Face, where its address says /resolve/ and not /blob/)"


class _Kind(NamedTuple):
    """Kind of file that is not read here.

    Args:
        start: What it starts with.
        name: What it is.
        remedy: What to do with it.
    """

    start: bytes
    name: str
    remedy: str


_UNPACK = "unpack it and give the file in it"
_KINDS = (
    _Kind(rb"version https://git-lfs", "a pointer of Git LFS, not the file", "run `git lfs pull` in its repository"),
    _Kind(rb"\s*<(!doctype|html|\?xml|head|body)", "a web page, perhaps of an error or a login", _DOWNLOAD),
    _Kind(rb"GGUF", "a GGUF file of llama.cpp", "give the safetensors that it was converted from"),
    _Kind(rb"\x89HDF\r\n", "an HDF5 file, as Keras writes it", f"load it with its library, {_SAVE}"),
    _Kind(rb"\x93NUMPY", "an array of NumPy without a name", f"load it with numpy.load, {_SAVE}"),
    _Kind(rb"\x08[\x01-\x20](\x12.[A-Za-z]|:)", "an ONNX model", f"read it with onnx.load, {_SAVE}"),
    _Kind(
        rb"[\x81-\x8f\xde\xdf].{0,4}[\xa1-\xbf\xd9][\w.]",
        "a msgpack file of Flax",
        f"load it with flax, {_SAVE}",
    ),
    _Kind(rb"\x1f\x8b|\xfd7zXZ|BZh|\x28\xb5\x2f\xfd|7z\xbc\xaf|Rar!", "a compressed file", _UNPACK),
    _Kind(rb".{257}ustar", "a tar archive", _UNPACK),
)


def find_format(file: InputFile) -> str:
    """Tell how a file is to be read, by its content: ``.safetensors``, ``.pt``, or, if that does not tell, its suffix.

    Raises:
        MergeError: If it is of a kind that is not read here; the sentence says what to do with it.
    """
    path, head = file.path, file.head(_LOOKED_AT)
    if not head:
        raise MergeError(f"{path} is empty; copy or download it again.")
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= file.size:
        return ".safetensors"
    if head.startswith((_ZIP, _TORCH)):
        return ".pt"
    for kind in _KINDS:
        if re.match(kind.start, head, re.DOTALL | re.IGNORECASE):
            raise MergeError(f"{path} is {kind.name}; {kind.remedy}.")
    return path.suffix


def check_archive_kind(path: Path, names: Collection[str]) -> None:
    """Raise a :class:`MergeError` if a zip archive is none of ``torch.save``.

    Args:
        path: The file.
        names: The names of its records, without the folder that all of them are in.
    """
    if "constants.pkl" in names or any(name.startswith("code/") for name in names):
        raise MergeError(
            f"{path} is a TorchScript archive, a program and not weights alone; if you trust it, save its weights with "
            f"`torch.save(torch.jit.load({str(path)!r}, map_location='cpu').state_dict(), 'weights.pt')`."
        )
    if "data.pkl" in names:
        return
    if "archive_format" in names:
        what, how = "a program of torch.export", "save the state_dict of what torch.export.load returns"
    elif names and all(name.endswith(".npy") for name in names):
        what, how = "an archive of NumPy arrays", f"load it with numpy.load, {_SAVE}"
    else:
        what, how = "a zip archive that torch.save has not written", _UNPACK
    raise MergeError(f"{path} is {what}; {how}.")


_NO_MODEL = re.compile(r"optim|sched|scaler|callback|loop|rng|_extra_state$", re.IGNORECASE)
_DEEPEST = 3  # levels at which a training script may keep the weights


def find_state(path: Path, content: Mapping[Any, Any]) -> Mapping[Any, Any]:
    """Find the one state dict that a file holds: in ``state_dict``, as a whole, or under ``model``, ``teacher``, ….

    Args:
        path: The file, for messages.
        content: What it holds.

    Raises:
        MergeError: If it holds none, or several.
    """
    if isinstance(whole := content.get("state_dict"), Mapping) and _has_tensors(whole):
        return whole
    nested = dict(states_within(content))
    if _has_tensors(content) and not (nested and _are_counters(content)):
        return content
    if len(nested) == 1:
        return next(iter(nested.values()))
    if nested:
        names = ["/".join(keys) for keys in nested]
        raise MergeError(
            f"{path} holds several state dicts ({', '.join(names[:8])}); name the one that you mean, as in "
            f"{path}#{names[0]}."
        )
    raise MergeError(f"{path} holds no state dict; its keys are {', '.join(map(shown, list(content)[:8]))}.")


def states_within(content: Mapping[Any, Any]) -> Iterator[tuple[tuple[str, ...], Mapping[Any, Any]]]:
    """Yield the state dicts within a file's content with the keys that lead to them, each once."""
    return _nested_states(content, (), {id(content)})


def _nested_states(
    content: Mapping[Any, Any], keys: tuple[str, ...], seen: set[int]
) -> Iterator[tuple[tuple[str, ...], Mapping[Any, Any]]]:
    """Yield the state dicts within a mapping with their keys, each once, but for those of optimizers and the like."""
    for key, value in content.items():
        if not isinstance(value, Mapping) or not isinstance(key, str) or _NO_MODEL.search(key) or id(value) in seen:
            continue
        seen.add(id(value))
        if _has_tensors(value):
            yield (*keys, key), value
        elif len(keys) + 1 < _DEEPEST:
            yield from _nested_states(value, (*keys, key), seen)


def _has_tensors(content: Mapping[Any, Any]) -> bool:
    return any(isinstance(value, Tensor) for value in content.values())


def _are_counters(content: Mapping[Any, Any]) -> bool:
    """Tell whether all tensors of a mapping are single numbers, such as a step or a temperature."""
    return all(value.numel() == 1 for value in content.values() if isinstance(value, Tensor))
