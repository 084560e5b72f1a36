"""What every merging method says of itself."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from lightning_merge import methods
from lightning_merge.methods import DARE, SVC, TIES, IsoC, KnOTS, MergeMethod, Wrapper

CLASSES = [cls for cls in map(methods.__getattribute__, methods.__all__) if issubclass(cls, MergeMethod)]


@dataclass(frozen=True)
class TwoInside(MergeMethod):
    matrices: MergeMethod
    vectors: MergeMethod


class TestNested:
    def test_a_method_alone(self):
        method = TIES()
        assert method.nested() == [method]

    def test_from_the_outside_in(self):
        inner = TIES()
        middle = DARE(method=inner)
        outer = SVC(method=middle)
        found = outer.nested()
        assert [id(method) for method in found] == [id(outer), id(middle), id(inner)]

    def test_a_default_method_inside_counts(self):
        assert [type(method) for method in KnOTS().nested()] == [KnOTS, TIES]

    def test_a_method_need_not_be_called_so(self):
        method = TwoInside(IsoC(), DARE())
        assert [type(layer) for layer in method.nested()] == [TwoInside, IsoC, DARE, type(DARE.default_method)]


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_a_method_with_a_survey_of_its_own_says_that_it_reads_twice(cls):
    assert cls.reads_twice == (cls.survey not in (MergeMethod.survey, Wrapper.survey))
