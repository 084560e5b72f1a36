"""What JSON from a file must look like, stated as a type: ``dict[str, int]``, a ``TypedDict``, a dataclass.

Every file of JSON is read by :func:`read_json`, and every text by :func:`load_json`, so that a file of the wrong shape
ends in one sentence that says which value is wrong, wherever it is read.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints, is_typeddict

import torch

from lightning_merge.utilities.errors import MergeError
from lightning_merge.utilities.nested import check_expanded

MOST_TENSORS = 400_000
"""The most tensors of one file; the largest public models have about 200,000."""
MOST_YAML = 1_000_000
"""The most bytes of YAML in one file."""
_MOST_BYTES = 100_000_000  # of JSON, as the safetensors library has it
_QUOTES, _COMMAS = 10 * MOST_TENSORS, 16 * MOST_TENSORS  # an entry of a header has 8 quotation marks


class Where(NamedTuple):
    """Condition on a value, for ``Annotated[int, Where("at least 1", lambda value: value >= 1)]``.

    Args:
        words: What follows the kind of the value in a sentence.
        holds: Tells whether a value of the right type satisfies it.
    """

    words: str
    holds: Callable[[Any], bool]


Positive = Annotated[float, Where("above 0", lambda value: value > 0)]
"""A number above 0."""
Count = Annotated[int, Where("of at least 1", lambda value: value >= 1)]
"""A whole number of at least 1."""


def load_json(text: str | bytes) -> Any:
    """Parse JSON.

    Raises:
        ValueError: If it is none, if a key stands twice in the same object, or if it has more parts than a description
            of 400,000 tensors.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if len(content) < len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise ValueError(f"the key {shown(twice)} stands there twice")
        return content

    quote, comma = ('"', ",") if isinstance(text, str) else (b'"', b",")
    if len(text) > _MOST_BYTES or text.count(quote) > _QUOTES or text.count(comma) > _COMMAS:  # type: ignore[arg-type]
        raise ValueError(f"it says more than a description of {MOST_TENSORS:,} tensors does, the most that is read")
    try:
        return json.loads(text, object_pairs_hook=unique)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def read_json(path: Path, schema: Any, what: str, remedy: str) -> Any:
    """Read a file of JSON.

    Args:
        path: The file.
        schema: What it must look like, see :func:`mismatches`.
        what: What the file is to be, after "is no".
        remedy: What to do if it is not.

    Raises:
        MergeError: If it cannot be read, is no JSON, or looks otherwise.
    """
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise MergeError(f"{path} is no {what}: it has more than {_MOST_BYTES:,} bytes; {remedy}.")
        content = load_json(path.read_bytes())
    except OSError as error:
        raise MergeError(f"{path} cannot be read: {error.strerror or error}; {remedy}.") from error
    except ValueError as error:
        raise MergeError(f"{path} is no {what}: it is no readable JSON ({error}); {remedy}.") from error
    check_schema(content, schema, f"{path} is no {what}", remedy)
    return content


def read_yaml(path: Path) -> Any:
    """Read a file of YAML, see :func:`load_yaml`; a file that cannot be read is a ValueError, too."""
    try:
        if path.stat().st_size > MOST_YAML:
            raise ValueError(f"it has more than {MOST_YAML:,} bytes")
        return load_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(error.strerror or str(error)) from error


def load_yaml(text: str) -> Any:
    """Parse YAML, without anything but plain values.

    Raises:
        ValueError: If it is none, or is too large, also once its aliases are written out.
    """
    import yaml

    if len(text) > MOST_YAML:
        raise ValueError(f"it has more than {MOST_YAML:,} characters")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the one in Python takes half a minute for 20,000 brackets
    try:
        content = yaml.load(text, Loader=loader)
    except (yaml.YAMLError, RecursionError, TypeError) as error:  # TypeError: a list as a key
        raise ValueError(" ".join((str(error).splitlines() or ["it is no YAML"])[:3])) from error
    check_expanded("it", content)
    return content


def check_schema(content: Any, schema: Any, start: str, remedy: str) -> None:
    """Raise a :class:`MergeError`, ``start: what is wrong; remedy.``, unless content looks as a schema says."""
    wrong = [text for text, _ in zip(mismatches(content, schema), range(4), strict=False)]
    if wrong:
        more = ", and more" if len(wrong) == 4 else ""
        raise MergeError(f"{start}: {', '.join(wrong[:3])}{more}; {remedy}.")


def mismatches(content: Any, schema: Any, place: str = "") -> Iterator[str]:
    """Yield what does not look as a schema says: "``r`` is 'x' where a whole number of at least 1 belongs".

    Args:
        content: What JSON holds.
        schema: A type: a plain one, a union, ``list[…]``, ``dict[str, …]``, ``tuple[…]`` (a list), a ``TypedDict``, a
            dataclass, a tensor (lists of numbers), ``Annotated`` with a :class:`Where`. A number is finite.
        place: Where the content is, in a sentence; by default it is the whole.
    """
    origin, arguments = get_origin(schema), get_args(schema)
    if schema is Any:
        return
    if origin in (Union, types.UnionType):
        if all(any(mismatches(content, option, place)) for option in arguments):
            nearest = [option for option in arguments if _is_nested(option, content)]
            yield from (
                mismatches(content, nearest[0], place) if len(nearest) == 1 else [_mismatch(content, schema, place)]
            )
    elif origin is Annotated:
        base, *conditions = arguments
        if _is_nested(base, content) and any(mismatches(content, base, place)):
            yield from mismatches(content, base, place)
        elif any(mismatches(content, base, place)) or not all(condition.holds(content) for condition in conditions):
            yield _mismatch(content, schema, place)
    elif _is_record(schema):
        yield from _record_mismatches(content, schema, place)
    elif origin in _KINDS_OF_LISTS or origin in _KINDS_OF_OBJECTS:
        yield from _inner_mismatches(content, schema, place)
    elif not _is_plain(content, schema):
        yield _mismatch(content, schema, place)


_KINDS_OF_LISTS, _KINDS_OF_OBJECTS = (list, tuple, Sequence), (dict, Mapping)


def _is_record(schema: Any) -> bool:
    return is_typeddict(schema) or dataclasses.is_dataclass(schema)


def _is_nested(schema: Any, content: Any) -> bool:
    """Tell whether a schema is one of objects, for an object, or one of lists, for a list."""
    if isinstance(content, Mapping):
        return _is_record(schema) or get_origin(schema) in _KINDS_OF_OBJECTS
    return isinstance(content, list) and get_origin(schema) in _KINDS_OF_LISTS


def _record_mismatches(content: Any, schema: Any, place: str) -> Iterator[str]:
    """Compare an object with a ``TypedDict``, which may have other keys, too, or a dataclass, which may not."""
    if not isinstance(content, Mapping):
        yield _mismatch(content, schema, place)
        return
    hints = get_type_hints(schema, include_extras=True)
    if is_typeddict(schema):
        required, known = schema.__required_keys__, None
    else:
        fields, absent = dataclasses.fields(schema), dataclasses.MISSING
        required = {f.name for f in fields if f.default is absent and f.default_factory is absent}
        known = {f.name for f in fields}
    for key, hint in hints.items():
        inner = f"{place}.{key}" if place else key
        if key in content:
            yield from mismatches(content[key], hint, inner)
        elif key in required:
            yield f"{inner} is missing"
    if known is not None:
        yield from (f"{place or 'it'} has an unknown {shown(key)}" for key in content if key not in known)


def _inner_mismatches(content: Any, schema: Any, place: str) -> Iterator[str]:
    """Compare a list, or an object that is used as a mapping."""
    origin, arguments = get_origin(schema), get_args(schema)
    if origin in _KINDS_OF_OBJECTS:
        if not isinstance(content, Mapping):
            yield _mismatch(content, schema, place)
            return
        for key, value in content.items():
            yield from mismatches(value, arguments[1], f"{place}[{shown(key)}]")
        return
    fixed = origin is tuple and Ellipsis not in arguments
    if not isinstance(content, (list, tuple)) or (fixed and len(content) != len(arguments)):
        yield _mismatch(content, schema, place)
        return
    for i, value in enumerate(content):
        yield from mismatches(value, arguments[i] if fixed else arguments[0], f"{place}[{i}]")


def _is_plain(content: Any, schema: Any) -> bool:
    """Tell whether a value is of a plain type."""
    if schema is None or schema is types.NoneType:
        return content is None
    if get_origin(schema) is Literal:
        return any(type(content) is type(option) and content == option for option in get_args(schema))
    if schema is torch.Tensor:
        return isinstance(content, list) and all(
            item is None or _is_plain(item, float) or _is_plain(item, torch.Tensor) for item in content
        )
    if schema in (int, float):
        kinds = (int,) if schema is int else (int, float)
        return isinstance(content, kinds) and not isinstance(content, bool) and abs(content) <= sys.float_info.max
    return isinstance(content, schema)


def _mismatch(content: Any, schema: Any, place: str) -> str:
    return f"{place or 'it'} is {shown(content)} where {_words(schema)} belongs"


def _words(schema: Any) -> str:
    """Say what belongs there: "a whole number of at least 1 or null"."""
    origin, arguments = get_origin(schema), get_args(schema)
    if origin in (Union, types.UnionType):
        return " or ".join(map(_words, arguments))
    if origin is Annotated:
        return " ".join([_words(arguments[0]), *(condition.words for condition in arguments[1:])])
    if origin is Literal:
        return " or ".join(repr(option) for option in arguments)
    if origin is tuple and Ellipsis not in arguments:
        return f"a list of {len(arguments)} values"
    if _is_record(schema) or schema in _KINDS_OF_OBJECTS or origin in _KINDS_OF_OBJECTS:
        return "an object"
    if schema in _KINDS_OF_LISTS or origin in _KINDS_OF_LISTS:
        return "a list"
    named = {int: "a whole number", float: "a number", str: "text", bool: "true or false", torch.Tensor: "numbers"}
    return named.get(schema, "null")


def shown(value: Any, most: int = 40) -> str:
    """Show a value from a file in a sentence: no longer than that, and without its control characters."""
    if isinstance(value, str):  # of a long one, no more than that is looked at
        return ascii(value) if len(value) <= most else f"{value[:most]!a}…"
    if isinstance(value, (Mapping, list, tuple)):
        return f"{'an object' if isinstance(value, Mapping) else 'a list'} of {len(value)} values"
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return "a number of very many digits" if isinstance(value, int) and abs(value) > 10**most else repr(value)
