"""A base and its experts, for all tests of this folder that need no others."""

from __future__ import annotations

import pytest

from tests.toys import base_weights, expert_weights


@pytest.fixture
def base():
    return base_weights()


@pytest.fixture
def experts(base):
    return {name: expert_weights(base, i) for i, name in enumerate("abc")}
