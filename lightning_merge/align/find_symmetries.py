"""Find the permutation groups of any module that ``torch.export`` can trace.

Every axis of every parameter gets a dimension, and the operators of the graph say which dimensions must be ordered
alike (:mod:`lightning_merge.align.rules`): what a layer writes and the next one reads, the two sides of a residual sum,
queries and keys. What remains free is a permutation group. Nothing is known about architectures.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn
from torch.export import ExportedProgram

from lightning_merge.align.axes import Axis, Fixed
from lightning_merge.align.dimensions import Dim, leaves
from lightning_merge.align.nesting import has_group, outer_groups, outermost
from lightning_merge.align.propagation import Propagation
from lightning_merge.align.rules import Dims
from lightning_merge.align.symmetries import Group, Symmetries
from lightning_merge.align.tracing import batch_of_two, copied, decomposed, exported, marks, run
from lightning_merge.align.trees import Dependent, tree
from lightning_merge.align.verification import verified
from lightning_merge.utilities.errors import raise_all


def find_symmetries(
    module: nn.Module, example_inputs: Tensor | tuple[Any, ...], *, fixed: Sequence[str] = (), verify: bool = True
) -> Symmetries:
    """Find which channels of a module may be permuted without changing what it computes.

    Args:
        module: Any module; it is copied, and left as it is.
        example_inputs: The tensor ``(N, …)`` that its ``forward`` is called with, or a tuple of all arguments; a batch
            of one is repeated.
        fixed: Shell patterns of parameters whose channels must not move, such as ``head.*``.
        verify: Whether random permutations are tried on a copy of the module with random parameters. Groups that change
            what it computes, which would be a bug, are then fixed and reported.

    Returns:
        The groups, where they occur in parameters and activations, and why other channels are fixed. Parameters have
        the names of the module's ``state_dict``.

    Raises:
        MergeError: If the module cannot be run on the inputs or traced, or a pattern matches no parameter.
    """
    inputs = batch_of_two(example_inputs)
    owners = module.state_dict(keep_vars=True)
    immovable = frozenset(name for name in owners if any(fnmatchcase(name, pattern) for pattern in fixed))
    raise_all(
        [f"{pattern!r} matches no parameter." for pattern in fixed if not any(fnmatchcase(n, pattern) for n in owners)]
    )
    copy = copied(module)
    run(copy, inputs)
    program = exported(copy, inputs)
    symmetries = propagated(copy, program, immovable)
    return verified(symmetries, copy, inputs) if verify else symmetries


def propagated(module: nn.Module, program: ExportedProgram, immovable: frozenset[str] = frozenset()) -> Symmetries:
    """Find the groups in a graph; where it has operators without a rule, also in the simpler ones they consist of.

    Args:
        module: What was traced.
        program: Its graph.
        immovable: The parameters whose channels must not move.
    """
    owners = module.state_dict(keep_vars=True)
    traced = Propagation(owners, immovable).run(program)
    simpler = decomposed(program) if traced.unknown else None
    if simpler is not None:
        again = Propagation(owners, immovable).run(simpler)
        traced = max(traced, again, key=lambda traced: len(traced.free_leaves()))
    return _assembled(traced, marks(program))


def _assembled(traced: Propagation, sites: set[str]) -> Symmetries:
    names = _named(traced)
    sizes = {name: leaf.size for leaf, name in names.items()}
    within = outermost(outer_groups(*traced.trees(names)), sizes)
    axes = {name: tuple(tree(dim, names) for dim in dims) for name, dims in traced.stored.items()}
    axes = {name: along for name, along in axes.items() if has_group(along)}
    return Symmetries(
        {name: Group(name, size, within.get(name)) for name, size in sizes.items()},
        axes,
        _features(traced, sites, names, within),
        frozenset(traced.statistics & set(axes)),
        _reasons(traced),
    )


def _named(traced: Propagation) -> dict[Dim, str]:
    """Name each group after the first parameter and axis in which it occurs."""
    names: dict[Dim, str] = {}
    taken: Counter[str] = Counter()
    free = dict.fromkeys(traced.free_leaves())
    for parameter, dims in traced.stored.items():
        for axis, dim in enumerate(dims):
            for leaf in leaves(dim):
                if leaf in free and leaf not in names:
                    place = f"{parameter}:{axis}"
                    taken[place] += 1
                    names[leaf] = place if taken[place] == 1 else f"{place}.{taken[place]}"
    return names


def _features(
    traced: Propagation, sites: set[str], names: Mapping[Dim, str], within: Mapping[str, str]
) -> dict[str, tuple[Axis, ...]]:
    """Collect the axes of the activations that groups order, in the order in which these are computed."""
    features = {}
    for site in (site for site in traced.sites if site in sites):
        axes = _representable(traced.sites[site], names, within)
        if axes and has_group(axes) and not has_group(axes[:1]):
            features[site] = (Fixed(-1), *axes[1:])
    return features


def _representable(dims: Dims, names: Mapping[Dim, str], within: Mapping[str, str]) -> tuple[Axis, ...]:
    """Express an activation by axes; by none if the order along one depends on the place along another one."""
    try:
        axes = tuple(tree(dim, names) for dim in dims)
    except Dependent:
        return ()
    alone = outer_groups([axes], [])
    return () if any(within[group] not in alone[group] for group in alone if group in within) else axes


def _reasons(traced: Propagation) -> dict[str, int]:
    """Count the axes of parameters that are fixed, by the reason."""
    count: Counter[str] = Counter()
    for dims in traced.stored.values():
        for dim in dims:
            count.update({leaf.fixed for leaf in leaves(dim) if leaf.fixed and leaf.size > 1})
    return dict(count)


def describe(symmetries: Symmetries, module: nn.Module) -> str:
    """Describe how many groups a module has, how much of it they order, and why the rest is fixed."""
    sizes = {id(tensor): tensor.numel() for tensor in module.parameters()}
    names = {name: id(tensor) for name, tensor in module.named_parameters(remove_duplicate=False)}
    moving = sum(sizes[key] for key in {names[name] for name in symmetries.axes if name in names})
    lines = [
        f"{len(symmetries.groups)} permutation groups, {len(symmetries.within)} of them within others, "
        f"order {moving / max(sum(sizes.values()), 1):.1%} of {sum(sizes.values()):,} parameters."
    ]
    lines += [f"Fixed axes, {reason}: {count}." for reason, count in sorted(symmetries.fixed.items())]
    return "\n".join(lines)
