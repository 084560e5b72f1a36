"""Damaged files: a clear error, or the weights as they were; never a crash, and never anything else."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightning_merge.checkpoints import open_weights
from lightning_merge.utilities.errors import MergeError
from tests.toys import base_weights

CASES = 60  # for every kind of file and of damage
INDEX = "model.safetensors.index.json"


def state() -> dict[str, Tensor]:
    weights = base_weights()
    return weights | {"tied": weights["mlp.weight"], "part": weights["mlp.weight"].T[2:5, 1:]}


def save_shards(folder: str, suffix: str, save: Callable[[dict[str, Tensor], str], None]) -> None:
    Path(folder).mkdir()
    names = list(base_weights())
    index = {name: f"model-{i % 3}.{suffix}" for i, name in enumerate(names)}
    for shard in set(index.values()):
        save({name: base_weights()[name] for name in names if index[name] == shard}, f"{folder}/{shard}")
    text = json.dumps({"metadata": {"total_size": 1}, "weight_map": index})
    (Path(folder) / f"model.{suffix}.index.json").write_text(text)


def make(kind: str) -> Path:
    """Write an undamaged file and return what is to be opened."""
    if kind == "model.safetensors":
        save_file(base_weights(), kind)
    elif kind == "model.ckpt":
        torch.save({"state_dict": state(), "hyper_parameters": {"lr": 0.1}, "optimizer": [torch.ones(9)]}, kind)
    elif kind in ("model.pt", "old.pt"):
        torch.save(state(), kind, _use_new_zipfile_serialization=kind != "old.pt")
    elif kind == "shards":
        save_shards(kind, "safetensors", save_file)
    else:
        save_shards(kind, "bin", torch.save)
    return Path(kind)


def cut(content: bytes, draw: random.Random) -> bytes:
    """Keep anything from nothing to all but one byte, most often little."""
    return content[: draw.choice([draw.randrange(len(content)), draw.randrange(12), len(content) - 1])]


def flip(content: bytes, draw: random.Random) -> bytes:
    """Change some bits near the start (a header, a pickle), near the end (the directory of an archive), or anywhere."""
    damaged = bytearray(content)
    for _ in range(draw.choice([1, 1, 1, 4])):
        within = draw.choice([len(damaged), min(len(damaged), 1500)])
        damaged[draw.choice([1, -1]) * draw.randrange(within)] ^= 1 << draw.randrange(8)
    return bytes(damaged)


def scramble(content: bytes, draw: random.Random) -> bytes:
    """Random bytes, with or without the true start."""
    return content[: draw.choice([0, 4, 8, 200])] + draw.randbytes(draw.randrange(600))


def rearrange(content: bytes, draw: random.Random) -> bytes:
    """Leave out, repeat or move a block."""
    begin, end, to = sorted(draw.randrange(len(content)) for _ in range(3))
    block = content[begin:end]
    return draw.choice(
        [content[:begin] + content[end:], content[:to] + block + content[to:], content[:begin] + content[end:] + block]
    )


def layout(weights: Mapping[str, Tensor]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in weights.items()}


def outcome(path: Path, damaged: Path) -> dict[str, Tensor] | None:
    """The weights, or None where an error names the file in one sentence."""
    try:
        return dict(open_weights(path))
    except MergeError as error:
        message = str(error)
    assert damaged.name in message
    assert "\n" not in message
    return None


def has_checksum(file: Path) -> bool:
    """Whether names and shapes are under a checksum, as they are in a zip archive."""
    return file.suffix != ".safetensors" and file.name not in ("old.pt", INDEX)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["model.safetensors", "model.ckpt", "model.pt", "old.pt", "shards", "bins"])
@pytest.mark.parametrize("damage", [cut, flip, scramble, rearrange])
def test_damage(kind, damage):
    path = make(kind)
    whole = layout(open_weights(path))
    draw = random.Random(f"{kind} {damage.__name__}")
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    contents = {file: file.read_bytes() for file in files}
    noticed = 0
    for _ in range(CASES):
        damaged = draw.choice(files)
        content = damage(contents[damaged], draw)
        damaged.unlink()  # or else the file would be the same, for all that its inode and a coarse clock tell
        damaged.write_bytes(content)
        found = outcome(path, damaged)
        noticed += found is None
        if found is not None and layout(found) != whole:
            assert not has_checksum(damaged)
            assert damage in (flip, rearrange)
            if damaged.suffix == ".safetensors":  # a name or a type has become another one: a valid file, then
                reference = load_file(damaged)
                assert layout(reference).items() <= layout(found).items()
        damaged.write_bytes(contents[damaged])
    assert noticed >= CASES // (4 if damage is flip else 2)
    assert layout(open_weights(path)) == whole


def test_wrong_offsets():
    save_file(base_weights(), "model.safetensors")
    content = Path("model.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    draw = random.Random(0)
    for _ in range(CASES):
        header = json.loads(content[8 : 8 + length])
        entry = header[draw.choice(sorted(header))]
        i = draw.randrange(2)
        change = draw.choice([-(1 << 40), -8, -4, 4, 8, 1 << 40, 1 << 63])
        entry["data_offsets"][i] += change
        if draw.random() < 0.5:
            entry["data_offsets"][1 - i] += change
        text = json.dumps(header).encode()
        Path("model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
        assert outcome(Path("model.safetensors"), Path("model.safetensors")) is None


def test_swapped_offsets_are_other_values_only():
    save_file({"a": torch.zeros(4), "b": torch.ones(4)}, "model.safetensors")
    content = Path("model.safetensors").read_bytes()
    swapped = content.replace(b"[0,16]", b"[X]").replace(b"[16,32]", b"[0,16]").replace(b"[X]", b"[16,32]")
    Path("model.safetensors").write_bytes(swapped)
    found = outcome(Path("model.safetensors"), Path("model.safetensors"))
    assert found is not None
    assert found["a"].tolist() == [1] * 4


@pytest.mark.parametrize(
    "target", ["../secret.safetensors", "/secret.safetensors", "a/../../secret.safetensors", "./secret.safetensors",
               "..", ".", "", "\0", "sub/secret.safetensors", "sub", INDEX, "~", "x" * 5000]
)  # fmt: skip
def test_an_index_that_points_elsewhere(target):
    save_file({"w": torch.ones(1)}, "secret.safetensors")
    make("shards")
    Path("shards/sub").mkdir()
    shutil.copy("secret.safetensors", "shards/sub")
    index = Path("shards") / INDEX
    content = json.loads(index.read_text())
    for name in ("conv.weight", "w"):
        index.write_text(json.dumps({"weight_map": content["weight_map"] | {name: target}}))
        assert outcome(Path("shards"), index) is None


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt", ".pt", ".pth", ".bin"])
def test_an_empty_file(suffix):
    path = Path(f"model{suffix}")
    path.write_bytes(b"")
    assert outcome(path, path) is None
