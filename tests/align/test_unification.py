"""The algebra of dimensions: structures that meet are refined, or all is fixed."""

from __future__ import annotations

import pytest

from lightning_merge.align.axes import Axis, Fixed, Free, Product, Sum
from lightning_merge.align.dimensions import Dim, family, find, fixed, free, freeze, leaves, member, product, total
from lightning_merge.align.nesting import outer_groups, outermost
from lightning_merge.align.rules.shapes import regroup
from lightning_merge.align.trees import Dependent, tree
from lightning_merge.align.unification import cut, factor, tie, unify


def sizes(dim: Dim) -> list[int]:
    return [leaf.size for leaf in leaves(dim)]


def is_fixed(dim: Dim) -> bool:
    return all(leaf.fixed for leaf in leaves(dim))


def same(first: Dim, second: Dim) -> bool:
    return [*leaves(first)] == [*leaves(second)]


def test_products_that_meet_are_refined_until_they_agree():
    one, other = Dim(24), Dim(24)
    factor(one, [4, 6])
    factor(other, [2, 12])
    unify(one, other)
    assert sizes(one) == sizes(other) == [2, 2, 6]
    assert same(one, other)
    assert not is_fixed(one)


def test_sums_that_meet_are_refined_until_they_agree():
    one, other = Dim(10), Dim(10)
    cut(one, [7, 3])
    cut(other, [2, 8])
    unify(one, other)
    assert sizes(one) == [2, 5, 3]
    assert same(one, other)


def test_a_sum_meets_a_product_where_whole_blocks_are_cut():
    blocks, parts = Dim(12), Dim(12)
    factor(blocks, [4, 3])
    cut(parts, [9, 3])
    unify(blocks, parts)
    assert sizes(parts) == [3, 3, 3]  # three blocks and one, with the same inner channels
    first, second = parts.children
    assert find(find(first).children[1]) is find(second)


@pytest.mark.parametrize(
    ("one", "other"), [((factor, [4, 6]), (factor, [6, 4])), ((factor, [4, 6]), (cut, [5, 19]))], ids=["factors", "cut"]
)
def test_what_cannot_agree_is_fixed(one, other):
    first, second = Dim(24), Dim(24)
    one[0](first, one[1])
    other[0](second, other[1])
    unify(first, second)
    assert is_fixed(first)
    assert is_fixed(second)


def test_what_is_fixed_fixes_what_it_meets():
    fast, (still,) = Dim(6), fixed([6], "the inputs")
    parts = cut(fast, [2, 4])
    unify(fast, still)
    assert [find(part).fixed for part in parts] == ["the inputs", "the inputs"]
    short, long = free([3, 4])
    unify(short, long)
    assert is_fixed(short)
    assert is_fixed(long)


def test_reshapes_join_and_split():
    batch, channels, height, width = *fixed([2], "the inputs"), Dim(6), *fixed([5, 7], "places")
    joined = regroup([batch, channels, height, width], [2, 1, 6 * 5 * 7])
    assert sizes(joined[2]) == [6, 5, 7]
    back = regroup(joined, [2, 6, 35])
    assert find(back[1]) is find(channels)
    (heads,) = regroup([channels], [6])
    assert heads is channels
    two, three = regroup([channels], [2, 3])
    assert sizes(channels) == [2, 3] == [two.size, three.size]


def test_equal_parts_can_be_seen_as_a_stack():
    one, other = Dim(6), Dim(6)
    index, inner = factor(total([one, other]), [2, 6])
    assert inner.kind == "family"
    assert (find(member(inner, index, 0)), find(member(inner, index, 1))) == (find(one), find(other))
    heads, channels = factor(inner, [2, 3])
    assert sizes(one) == sizes(other) == [2, 3]
    assert not same(one, other)
    unify(channels, Dim(3))  # something without the stack's axis: the members become one
    assert find(find(one).children[1]) is find(find(other).children[1])
    assert find(find(one).children[0]) is not find(find(other).children[0])
    tie(heads)
    assert same(one, other)


def test_members_are_kept_beside_their_index():
    (index,) = fixed([2], "a stack")
    members = free([4, 4])
    stacked = family(index, members)
    tie(stacked, [index])
    assert stacked.kind == "family"
    closed = product([index, stacked])
    tie(closed)
    assert find(stacked).kind == "family"
    names = {leaf: f"g{number}" for number, leaf in enumerate(members)}
    assert tree(closed, names) == Sum((Free("g0", 4), Free("g1", 4)))
    with pytest.raises(Dependent):
        tree(stacked, names)
    assert cut(closed, [4, 4]) == members
    assert family(index, [members[0], members[0]]) is members[0]


def test_trees_join_what_is_fixed():
    channels = Dim(3)
    names = {channels: "c"}
    dim = product([channels, *fixed([2], "places"), *fixed([5], "places")])
    assert tree(dim, names) == Product((Free("c", 3), Fixed(10)))
    dim = total([*fixed([2], "places"), channels, total([*fixed([1], ""), Dim(4, "places")])])
    freeze(dim.children[2], "places")
    assert tree(dim, names) == Sum((Fixed(2), Free("c", 3), Fixed(5)))


HEADS, INNER, OTHER = Free("heads", 2), Free("inner", 3), Free("other", 4)


@pytest.mark.parametrize(
    ("stored", "computed", "expected"),
    [
        ([(Product((HEADS, INNER)), OTHER)], [(HEADS, INNER)], {"inner": "heads"}),
        ([(Product((INNER, HEADS)),)], [], {"heads": "inner"}),
        ([(Product((HEADS, INNER)),), (INNER,)], [], {}),  # channels that all heads share
        ([(Product((HEADS, INNER)),)], [(Fixed(2), INNER)], {}),  # a sum over heads
        ([(Product((HEADS, INNER)),)], [(HEADS, HEADS, INNER)], {}),  # which of the two?
        ([(HEADS, INNER)], [], {}),  # true, but the axes of a parameter cannot say so
        ([(Product((HEADS, Sum((INNER, Fixed(1))))),)], [], {"inner": "heads"}),
        ([(Product((Sum((HEADS, Fixed(1))), INNER)),)], [], {}),
        ([(Product((OTHER, HEADS, INNER)),)], [], {"heads": "other", "inner": "other"}),  # one level
    ],
)
def test_which_groups_are_within_others(stored: list[tuple[Axis, ...]], computed: list[tuple[Axis, ...]], expected):
    candidates = outer_groups(stored, computed)
    assert outermost(candidates, {"heads": 2, "inner": 3, "other": 4}) == expected
