"""Files of ``torch.save``, read tensor by tensor or, where that cannot be relied on, as a whole."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_merge.checkpoints import open_weights, torch_format
from lightning_merge.checkpoints.files import InputFile
from lightning_merge.utilities.errors import MergeError


def views() -> dict[str, torch.Tensor]:
    """Tensors that are laid out in all kinds of ways, most of them over the same storage."""
    whole = torch.randn(6, 8)
    return {
        "whole": whole,
        "transposed": whole.T,
        "part": whole[1:4, 2:7],
        "steps": whole[::2, ::3],
        "expanded": whole[0, :1].expand(3, 4),
        "reversed": whole.permute(1, 0)[2:],
        "row": whole[5],
        "corner": whole[5, 7],
        "empty": whole[:0],
        "other": torch.randn(6, 8),
        "half": torch.randn(5).bfloat16(),
        "flags": torch.tensor([True, False]),
        "number": torch.tensor(3),
        "parameter": torch.nn.Parameter(torch.randn(2)),
    }


def assert_same(path: str, state: dict[str, torch.Tensor]) -> None:
    opened = open_weights(path)
    assert list(opened) == list(state)
    for name, tensor in state.items():
        found = opened[name]
        assert torch.equal(found, tensor), name
        assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
        assert (opened.meta[name].dtype, opened.meta[name].shape) == (tensor.dtype, tensor.shape)
        assert not found.requires_grad


@pytest.fixture
def lazy_only(monkeypatch):
    """No file can be loaded as a whole."""
    load = torch.load

    def load_lazily(*args: Any, **kwargs: Any) -> Any:
        assert kwargs["map_location"] == "meta"
        return load(*args, **kwargs)

    monkeypatch.setattr(torch, "load", load_lazily)


@pytest.fixture
def whole_only(monkeypatch):
    """No part of a file can be read later: that is what this PyTorch is said not to tell."""
    monkeypatch.setattr(torch_format, "_tells_positions", lambda: False)

    def refuse(*_: Any) -> None:
        raise AssertionError("read from its place")

    monkeypatch.setattr(InputFile, "read", refuse)


needs_positions = pytest.mark.skipif(not torch_format._tells_positions(), reason="this PyTorch tells no positions")


@needs_positions
@pytest.mark.parametrize("checksums", [True, False])
def test_tensors_are_read_from_their_place(lazy_only, checksums):
    state = views()
    torch.serialization.set_crc32_options(checksums)
    try:
        torch.save(state, "a.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert_same("a.pt", state)


@needs_positions
def test_no_more_is_read_than_a_tensor_spans(lazy_only, monkeypatch):
    whole = torch.randn(100, 10)
    torch.save({"w": whole[50:52]}, "a.pt")
    opened = open_weights("a.pt")
    asked = []
    read = InputFile.read
    monkeypatch.setattr(InputFile, "read", lambda self, begin, size: asked.append(size) or read(self, begin, size))
    assert torch.equal(opened["w"], whole[50:52])
    assert sum(asked) == 2 * 10 * 4 + whole.nbytes  # once, to compare the checksum of the record
    asked.clear()
    assert torch.equal(opened["w"], whole[50:52])
    assert asked == [2 * 10 * 4]


def test_a_torch_that_tells_no_positions(whole_only):
    state = views()
    torch.save(state, "a.pt")
    assert_same("a.pt", state)


def test_a_file_of_an_old_torch(whole_only):
    state = views()
    torch.save(state, "a.pt", _use_new_zipfile_serialization=False)
    assert_same("a.pt", state)


@pytest.mark.parametrize("old", [False, True])
def test_tensors_that_share_everything_are_tied(old):
    weights = torch.randn(4, 3)
    state = {"a": weights, "b": weights, "c": weights.T, "d": weights.clone(), "e": weights[:0], "f": weights[:0]}
    torch.save(state, "a.pt", _use_new_zipfile_serialization=not old)
    assert open_weights("a.pt").tied == {"b": "a"}


def test_tensors_in_the_header_are_read():
    hyper_parameters = {"classes": {"weights": [torch.arange(3.0)]}, "lr": 0.1}
    torch.save({"state_dict": {"w": torch.ones(2)}, "hyper_parameters": hyper_parameters}, "a.ckpt")
    found = open_weights("a.ckpt").header["hyper_parameters"]
    assert torch.equal(found["classes"]["weights"][0], torch.arange(3.0))
    assert found["lr"] == 0.1


def rezip(compression: int, change: Callable[[list[tuple[str, bytes]]], list[tuple[str, bytes]]]) -> None:
    """Write ``a.pt`` anew as any other program would, with other records."""
    with zipfile.ZipFile("a.pt") as archive:
        records = change([(info.filename, archive.read(info)) for info in archive.infolist()])
    with zipfile.ZipFile("a.pt", "w", compression) as archive:
        for name, content in records:
            archive.writestr(name, content)


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("change", [list, lambda records: records[:1] + records[:0:-1]], ids=["same", "reversed"])
def test_an_archive_that_another_program_wrote(compression, change):
    state = {f"w{i}": torch.randn(3) for i in range(12)}
    torch.save(state, "a.pt")
    rezip(compression, change)
    assert_same("a.pt", state)


def test_records_in_another_order_at_the_places_where_torch_looks_for_them():
    """The positions that PyTorch derives are then those of other tensors."""
    state = {f"w{i}": torch.full((3,), i) for i in range(10)}
    torch.save(state, "a.pt")
    content = Path("a.pt").read_bytes()
    for old, new in ((b"data/3", b"data/X"), (b"data/4", b"data/3"), (b"data/X", b"data/4")):
        content = content.replace(old, new)
    Path("a.pt").write_bytes(content)
    assert_same("a.pt", torch.load("a.pt", weights_only=True))
    assert open_weights("a.pt")["w3"].tolist() == [4, 4, 4]


def test_a_file_of_a_machine_of_the_other_byte_order():
    state = {"w": torch.arange(5.0), "half": torch.arange(5).bfloat16()}
    torch.save(state, "a.pt")
    swapped = {name: tensor.view(torch.uint8).view(5, -1).flip(1).numpy().tobytes() for name, tensor in state.items()}
    contents = {"a/byteorder": b"big", "a/data/0": swapped["w"], "a/data/1": swapped["half"]}
    rezip(zipfile.ZIP_STORED, lambda records: [(name, contents.get(name, content)) for name, content in records])
    assert_same("a.pt", state)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: torch.eye(3).to_sparse(), "'w' in a.pt is sparse, quantized or nested"),
        (lambda: torch.eye(3).to_sparse_csr(), "'w' in a.pt is sparse, quantized or nested"),
        (lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), "is sparse, quantized or nested"),
        (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "is sparse, quantized or nested"),
        (lambda: torch.ones(3, device="meta"), "'w' in a.pt has no values"),
    ],
    ids=["sparse", "csr", "quantized", "nested", "meta"],
)
def test_what_is_no_plain_tensor_is_named(make, message):
    torch.save({"w": make(), "v": torch.ones(1)}, "a.pt")
    with pytest.raises(MergeError, match=message):
        open_weights("a.pt")


def test_negated_views_keep_their_sign():
    state = {"w": torch.complex(torch.ones(3), torch.arange(3.0)).conj().imag}
    assert state["w"].is_neg()
    torch.save(state, "a.pt")
    assert_same("a.pt", state)


def test_two_records_of_one_name():
    torch.save({"v": torch.zeros(3), "w": torch.ones(3)}, "a.pt")
    Path("a.pt").write_bytes(Path("a.pt").read_bytes().replace(b"data/1", b"data/0"))
    with pytest.raises(MergeError, match="two of its records have the same name"):
        open_weights("a.pt")


def test_a_pickle_that_does_not_match_its_checksum():
    torch.save({"weight": torch.ones(3)}, "a.pt")
    Path("a.pt").write_bytes(Path("a.pt").read_bytes().replace(b"weight", b"weighs"))
    assert list(torch.load("a.pt", weights_only=True)) == ["weighs"]
    with pytest.raises(MergeError, match=r"a\.pt is damaged .*CRC"):
        open_weights("a.pt")
