"""The header of safetensors files."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lightning_merge.checkpoints import open_weights
from lightning_merge.checkpoints.safetensors_format import SAFETENSORS_DTYPES, Entry, read_header
from lightning_merge.utilities.errors import MergeError


def write(header: object, data: bytes = bytes(64), length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    Path("a.safetensors").write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def entry(begin: int, end: int, dtype: str = "F32", shape: list[int] | None = None) -> dict[str, object]:
    return {"dtype": dtype, "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}


def test_header():
    save_file({"b": torch.ones(2, 3), "a": torch.zeros(5, dtype=torch.float64)}, "a.safetensors", {"x": "y"})
    metadata, entries, start = read_header("a.safetensors")
    assert metadata == {"x": "y"}
    assert entries == {"a": Entry("F64", (5,), 0, 40), "b": Entry("F32", (2, 3), 40, 64)}
    assert Path("a.safetensors").stat().st_size == start + 64


@pytest.mark.parametrize("dtype", SAFETENSORS_DTYPES.values(), ids=str)
def test_every_type_comes_back(dtype):
    weights = {"w": torch.randn(3, 4).mul(3).to(dtype), "scalar": torch.ones(()).to(dtype), "empty": torch.ones(0, 2)}
    save_file(weights, "a.safetensors")
    opened = open_weights("a.safetensors")
    for name, tensor in weights.items():
        found = opened[name]
        assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
        assert found.dtype == opened.meta[name].dtype
        assert found.reshape(-1).view(torch.uint8).equal(tensor.reshape(-1).view(torch.uint8))


def test_a_machine_of_the_other_byte_order(monkeypatch):
    weights = {"w": torch.randn(3, 4), "b": torch.arange(3, dtype=torch.int8)}
    save_file(weights, "a.safetensors")
    opened = open_weights("a.safetensors")
    monkeypatch.setattr("sys.byteorder", "big")
    assert opened["w"].numpy().view(">f4").tolist() == weights["w"].tolist()
    assert torch.equal(opened["b"], weights["b"])


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"w": entry(0, 64, shape=[15])}, "invalid shape, data type, or offset"),
        ({"v": entry(0, 40), "w": entry(24, 64)}, "offset for tensor `w`"),
        ({"v": entry(0, 16), "w": entry(32, 64)}, "offset for tensor `w`"),
        ({"w": entry(0, 32)}, "not fully covered"),
        ({"w": entry(0, 128)}, "not fully covered"),
        ({"w": entry(64, 0, shape=[16])}, "`w`"),
        ({"w": entry(0, 64, shape=[1 << 62, 1 << 62])}, "overflow"),
        ({"w": entry(0, 64, dtype="F33")}, "F33"),
        ({"w": entry(0, 64, dtype="F4", shape=[128])}, "is of type F4"),
        (b'{"w":%b,"w":%b}' % ((json.dumps(entry(0, 64)).encode(),) * 2), "the key 'w' stands there twice"),
        (b"[" * 5000, "JSON"),
        (b"\xff" * 10, "header"),
        ({"w": entry(0, 64), "__metadata__": {"tied:v": "u"}}, "'v' is said to be 'u', which is not there"),
        ({"w": entry(0, 64), "__metadata__": {"tied:w": "w"}}, "is stored itself, too"),
    ],
)
def test_a_header_that_cannot_be_true(header, message):
    write(header)
    with pytest.raises(MergeError, match=rf"a\.safetensors.*{message}"):
        open_weights("a.safetensors")


@pytest.mark.parametrize("length", [0, 1, 1 << 20, 1 << 40, (1 << 64) - 1])
def test_a_length_that_cannot_be_true(length):
    write({"w": entry(0, 64)}, length=length)
    with pytest.raises(MergeError, match=re.escape("a.safetensors is damaged")):
        open_weights("a.safetensors")
