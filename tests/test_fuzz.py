"""Damaged files of every kind, a few of the study in ``benchmarks/fuzz.py``: sentences or results, and nothing else."""

from __future__ import annotations

import os

import pytest

from benchmarks import fuzz


@pytest.mark.skipif(os.name != "posix", reason="no fork, and no limits")
@pytest.mark.filterwarnings("ignore")
def test_two_hundred_damaged_files():
    numbers = [number for number in range(10_000, 10_230) if fuzz.kind_of(number) != "config"]
    outcomes = dict(fuzz.run(numbers[:200]))
    assert list(outcomes) == numbers[:200]
    faults = {(number, fuzz.kind_of(number)): said for number, said in outcomes.items() if said not in fuzz.GOOD}
    assert not faults
    assert {fuzz.kind_of(number) for number in outcomes} == set(fuzz.KINDS) - {"config"}
    sentences = sum(said == "sentence" for said in outcomes.values())
    assert 100 < sentences < 200


@pytest.mark.skipif(os.name != "posix", reason="no fork, and no limits")
@pytest.mark.parametrize("read", ["time", "memory", "exception"])
def test_what_is_not_good_is_found(read, monkeypatch):
    """The study sees what it is for: an endless loop, too much memory, another exception."""

    def endless() -> None:
        while fuzz.os.getppid():
            pass

    def hungry() -> None:
        bytearray(2 * fuzz.BYTES)

    does = {"time": endless, "memory": hungry, "exception": lambda: {}["a"]}[read]
    before = fuzz.KINDS["corrections"]
    reads = iter([before.read, does])  # the good file is read first
    monkeypatch.setattr(fuzz, "SECONDS", 1)
    monkeypatch.setitem(fuzz.KINDS, "corrections", fuzz.Kind(before.make, lambda: next(reads)(), before.files))
    number = list(fuzz.KINDS).index("corrections")
    ((_, said),) = fuzz.run([number])
    assert said.startswith({"time": "killed", "memory": "MemoryError", "exception": "KeyError"}[read])
