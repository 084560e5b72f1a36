"""The header of a safetensors file: 8 bytes with its length (little-endian), JSON, then the data of the tensors."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_merge.checkpoints.files import InputFile
from lightning_merge.checkpoints.weights import Weights, plain_names
from lightning_merge.utilities.errors import MergeError
from lightning_merge.utilities.schemas import MOST_TENSORS, load_json

TIED = "tied:"
"""In the metadata, ``tied:<alias>`` -> the name under which the shared tensor is stored."""
TASK_VECTOR = "task_vector"
"""In the metadata, what a task vector is the difference of; its file is called ``NAME.task_vector.safetensors``."""
SAFETENSORS_DTYPES = {
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
"""The types of tensors that can be read and written, by the names that they have in a header."""
LENGTH = 8
"""Bytes of the header's length."""


@dataclass(frozen=True)
class Entry:
    """Entry of a header: type, shape and position of one tensor.

    Args:
        dtype: The name of its type, see :data:`SAFETENSORS_DTYPES`.
        shape: Its shape.
        begin: Position of its first byte, in bytes from the start of the data.
        end: Position after its last byte.
    """

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(path: str | os.PathLike[str]) -> tuple[dict[str, str], dict[str, Entry], int]:
    """Read the header of a safetensors file; the safetensors library decides whether it is a valid one.

    Returns:
        The metadata, an entry for every tensor, and the position in the file where the data starts.

    Raises:
        MergeError: If it is no safetensors file, or a damaged one: tensors that overlap, leave holes, do not fill the
            file or have the wrong size, keys that stand there twice.
    """
    file = InputFile(path)
    length = int.from_bytes(_bytes(file, 0, min(LENGTH, file.size)), "little")
    text = _bytes(file, LENGTH, min(length, max(file.size - LENGTH, 0)))
    if (count := text.count(b"data_offsets")) > MOST_TENSORS:
        raise MergeError(f"{path} holds {count:,} tensors, and no more than {MOST_TENSORS:,} are read.")
    _validate(path)
    try:
        header = load_json(text)
    except ValueError as error:
        raise MergeError(f"{path} is damaged: {error}.") from error
    metadata = header.pop("__metadata__", None) or {}
    entries = {
        key: Entry(entry["dtype"], tuple(entry["shape"]), *entry["data_offsets"]) for key, entry in header.items()
    }
    return metadata, entries, LENGTH + length


def _validate(path: str | os.PathLike[str]) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu"):
            pass
    except (SafetensorError, OSError, ValueError) as error:
        raise MergeError(f"{path} is damaged or no safetensors file: {error}.") from error


def _bytes(file: InputFile, begin: int, size: int) -> bytes:
    return file.read(begin, size).numpy().tobytes()


def open_safetensors(name: str, path: Path) -> Weights:
    """Open a safetensors file as weights, see :func:`lightning_merge.checkpoints.open_weights`."""
    file = InputFile(path)
    metadata, entries, start = read_header(path)
    file.check_unchanged()
    for key, entry in entries.items():
        if entry.dtype not in SAFETENSORS_DTYPES:
            raise MergeError(f"{key!r} in {path} is of type {entry.dtype}, which cannot be merged; leave it out.")
    stored = {plain: entries[key] for plain, key in plain_names(str(path), entries).items()}
    tied = {key.removeprefix(TIED): owner for key, owner in metadata.items() if key.startswith(TIED)}
    for alias, owner in tied.items():
        if owner not in stored or alias in stored:
            raise MergeError(
                f"{path} is damaged: {alias!r} is said to be {owner!r}, "
                + ("which is not there." if owner not in stored else "and is stored itself, too.")
            )
    stored |= {alias: stored[owner] for alias, owner in tied.items()}
    return Weights(
        name,
        readers={key: partial(_read, file, entry, start) for key, entry in stored.items()},
        meta={
            key: torch.empty(entry.shape, dtype=SAFETENSORS_DTYPES[entry.dtype], device="meta")
            for key, entry in stored.items()
        },
        path=path,
        header=_own_metadata(metadata),
        tied=tied,
        inputs=[file],
    )


def _read(file: InputFile, entry: Entry, start: int) -> Tensor:
    dtype = SAFETENSORS_DTYPES[entry.dtype]
    values = file.read(start + entry.begin, entry.end - entry.begin)
    if sys.byteorder == "big" and dtype.itemsize > 1:  # the file is always little-endian
        values = values.view(-1, dtype.itemsize).flip(1).reshape(-1)
    return values.view(dtype).reshape(entry.shape)


def _own_metadata(metadata: Mapping[str, str]) -> dict[str, Any]:
    """Read what this package has written into a header; leave out what another program wrote under its keys."""
    header = {}
    for key in ("merge", "statistics", TASK_VECTOR):
        try:
            content = load_json(metadata.get(key, "null"))
        except ValueError:
            continue
        if isinstance(content, dict):
            header[key] = content
    return header
