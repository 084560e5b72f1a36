from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict

import pytest
import torch

from lightning_merge.utilities import schemas
from lightning_merge.utilities.errors import MergeError
from lightning_merge.utilities.schemas import Count, Positive, Where, check_schema, load_json, mismatches, read_json


class Inner(TypedDict):
    size: Count


class Config(Inner, total=False):
    inner: Inner | None
    kinds: dict[str, list[Positive]]
    mode: Literal["fast", "slow"]
    pair: tuple[int, str]
    numbers: torch.Tensor


@dataclass
class Record:
    name: str
    shape: tuple[int, ...] = ()
    rest: dict[str, Any] = field(default_factory=dict)


def wrong(content: Any, schema: Any = Config) -> list[str]:
    return list(mismatches(content, schema))


def test_what_fits_a_schema_passes():
    content = {"size": 3, "inner": {"size": 1}, "kinds": {"a": [0.5, 2]}, "mode": "slow", "pair": [1, "x"]}
    assert not wrong(content | {"numbers": [[1, None], [2.5, 3]], "unknown": object()})
    assert not wrong({"size": 1, "inner": None})
    assert not wrong({"name": "a", "shape": [1, 2, 3]}, Record)
    assert not wrong("anything", Any)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ([], "it is a list of 0 values where an object belongs"),
        ({}, "size is missing"),
        ({"size": True}, "size is true where a whole number of at least 1 belongs"),
        ({"size": 1.5}, "size is 1.5 where a whole number of at least 1 belongs"),
        ({"size": 0}, "size is 0 where a whole number of at least 1 belongs"),
        ({"size": 1, "inner": {"size": "x\x1b[0m"}}, "inner.size is 'x\\x1b[0m' where a whole number"),
        ({"size": 1, "inner": 5}, "inner is 5 where an object or null belongs"),
        ({"size": 1, "kinds": {"a": [1, 0]}}, "kinds['a'][1] is 0 where a number above 0 belongs"),
        ({"size": 1, "kinds": {"a": [float("nan")]}}, "kinds['a'][0] is nan where a number above 0 belongs"),
        ({"size": 1, "kinds": {"a": [10**400]}}, "kinds['a'][0] is a number of very many digits where"),
        ({"size": 1, "mode": "x"}, "mode is 'x' where 'fast' or 'slow' belongs"),
        ({"size": 1, "pair": [1]}, "pair is a list of 1 values where a list of 2 values belongs"),
        ({"size": 1, "numbers": [[1], "x"]}, "numbers is a list of 2 values where numbers belongs"),
    ],
)
def test_what_does_not_fit_is_named_with_its_place(content: Any, says: str):
    assert any(text.startswith(says) for text in wrong(content)), wrong(content)


def test_a_dataclass_takes_no_other_keys():
    assert wrong({"name": "a", "other": 1}, Record) == ["it has an unknown 'other'"]


def test_the_sentence_is_one_and_short():
    content = {"size": 1, "kinds": {str(i): ["x" * 1000] for i in range(100)}}
    with pytest.raises(MergeError, match=r"^a.json is no config: .*, and more; write it anew\.$") as raised:
        check_schema(content, Config, "a.json is no config", "write it anew")
    assert len(str(raised.value)) < 500


def test_a_condition_is_put_into_words():
    even = Annotated[int, Where("that is even", lambda value: value % 2 == 0)]
    assert wrong(3, even) == ["it is 3 where a whole number that is even belongs"]


@pytest.mark.parametrize("text", ["[" * 100_000, "{", '{"a": 1, "b": 2, "a": 3}', b"\xff\xfe", "1" * 5000])
def test_what_is_no_json_is_a_value_error(text: str | bytes):
    with pytest.raises(ValueError, match=r"."):
        load_json(text)


def test_a_key_that_stands_twice_among_many_is_found_in_no_time():
    many = ", ".join(f'"{i}": 0' for i in range(50_000))  # to compare each with all others would take hours
    with pytest.raises(ValueError, match="'49999' stands there twice"):
        load_json(f'{{{many}, "49999": 1}}')


def test_the_size_of_json_is_limited(monkeypatch):
    monkeypatch.setattr(schemas, "_COMMAS", 10)
    assert len(load_json(json.dumps([0] * 11))) == 11
    with pytest.raises(ValueError, match="400,000 tensors"):
        load_json(json.dumps([0] * 12))


@pytest.mark.parametrize("content", [b"[]", b"\x00\x01", b"{", b'{"size": null}'])
def test_a_file_of_another_content_is_named(tmp_path: Path, content: bytes):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(MergeError, match=r"a\.json is no size: .*; write it again\.$"):
        read_json(path, Config, "size", "write it again")


def test_a_folder_is_no_file_of_json(tmp_path: Path):
    with pytest.raises(MergeError, match=r"cannot be read: Is a directory; write it again\.$"):
        read_json(tmp_path, Config, "size", "write it again")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a0: &a0 [x, x]\n" + "".join(f"a{i + 1}: &a{i + 1} [*a{i}, *a{i}]\n" for i in range(40)), "1,000,000 values"),
        ("&a [*a]", "holds itself"),
        ("[" * 20_000, "."),
        ("a: [", "."),
        ("? [a]\n: b", "."),
        ("a: !!python/object/apply:os.system [true]", "."),
    ],
)
def test_yaml_is_limited_and_plain(tmp_path: Path, text: str, says: str):
    path = tmp_path / "a.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=says):
        schemas.read_yaml(path)
