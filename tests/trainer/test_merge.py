"""The verb ``merge``."""

from __future__ import annotations

import pytest

import lightning_merge as lm
from lightning_merge.merging.aligning import Align
from lightning_merge.methods import TIES
from tests.toys import base_weights, expert_weights, quiet_trainer


@pytest.fixture
def files():
    base = base_weights()
    lm.save_weights("base.safetensors", base)
    for name, seed in (("photo", 1), ("sketch", 2)):
        lm.save_weights(f"{name}.safetensors", expert_weights(base, seed))
    return {name: f"{name}.safetensors" for name in ("photo", "sketch")}


INPUTS = {"base.safetensors": 1, "photo.safetensors": 1, "sketch.safetensors": 1}


def test_base_and_experts_are_opened_once(files, opened):
    quiet_trainer().merge(experts=files, base="base.safetensors", method=TIES(), output="merged.safetensors")
    assert dict(opened) == INPUTS | {"merged.safetensors": 1}


def test_so_are_those_of_several_foundations(files, opened):
    align = Align(
        foundations={"one": "base.safetensors"}, foundation_of={"photo": "one", "sketch": "one"}, by="nothing"
    )
    quiet_trainer().merge(experts=files, align=align, method=TIES(), output="merged.safetensors")
    assert dict(opened) == INPUTS | {"merged.safetensors": 1}
