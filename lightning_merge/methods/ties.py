"""TIES (Yadav et al., "TIES-Merging: Resolving Interference When Merging Models", NeurIPS 2023, arXiv 2306.01708)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from threading import Lock
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from lightning_merge.methods.base import Context, MergeMethod, Paper, check_choice, check_range
from lightning_merge.methods.base.task_vectors import TaskVectors
from lightning_merge.utilities.errors import MergeError
from lightning_merge.utilities.order_statistics import kth_magnitude, moments, norm_fraction_magnitude
from lightning_merge.utilities.tensors import mean
from lightning_merge.utilities.tiling import indicator, pieces

Majority = Callable[[], Tensor]


def trim(deltas: Tensor, thresholds: Tensor, centers: Tensor | None = None) -> Tensor:
    """Reset the entries nearer to their expert's center (0) than its threshold: ``(T, …), (T,), (T,) -> (T, …)``."""
    distances = deltas if centers is None else deltas - per_expert(centers, deltas)
    return deltas * indicator(torch.ge, distances.abs(), per_expert(thresholds, deltas))


def elect(trimmed: Tensor, majority: Majority, rule: str = "mass", norms: Tensor | None = None) -> Tensor:
    """Elect a sign per entry: ``(T, …) -> (…)``; where nobody wins, the sign of the whole model (or 0, of zeros only).

    Args:
        trimmed: ``(T, …)``.
        majority: Gives the sign that most entries of the model elect, ``()``; called only where it matters.
        rule: ``mass`` sums the entries; ``normmass`` sums their signed shares of their expert's squared norm;
            ``normfrac`` takes the sign of the largest such share.
        norms: ``(T,)``, the norms of the trimmed experts, for the latter two.

    Returns:
        ``(…)``.

    Raises:
        MergeError: If there is no such rule, or if it lacks its norms.
    """
    sign = vote(trimmed, rule, norms)
    undecided = indicator(torch.eq, sign, 0) * trimmed.abs().amax(dim=0)
    return torch.where(undecided != 0, majority(), sign) if undecided.sum() != 0 else sign


def vote(trimmed: Tensor, rule: str = "mass", norms: Tensor | None = None) -> Tensor:
    """Elect a sign per entry, 0 where nobody wins, see :func:`elect`: ``(T, …) -> (…)``."""
    _check_rule("election", rule, ("mass", "normmass", "normfrac"))
    if rule == "mass":
        return trimmed.sum(dim=0).sign_()
    if norms is None or norms.shape != trimmed.shape[:1]:
        given = "none" if norms is None else f"shape {tuple(norms.shape)}"
        raise MergeError(f"The election {rule!r} needs the norms ({len(trimmed)},) of the experts, got {given}.")
    norms = norms.double()  # where squares stay in range
    shares = trimmed.double().square() / per_expert(norms.where(norms > 0, 1).square(), trimmed)
    votes = shares * trimmed.sign()
    if rule == "normfrac":
        votes = votes.gather(0, shares.argmax(dim=0, keepdim=True))
    return votes.sum(dim=0).sign_().to(trimmed)


def _check_rule(what: str, rule: str, rules: Sequence[str]) -> None:
    """Raise a MergeError unless a rule is one of those that there are."""
    if rule not in rules:
        raise MergeError(f"There is no {what} {rule!r}; give one of {', '.join(rules)}.")


def agreeing_entries(trimmed: Tensor, sign: Tensor) -> Tensor:
    """Keep the entries that agree with the elected sign (where that is 0, negative ones): ``(T, …), (…) -> (T, …)``."""
    positive, elected = indicator(torch.gt, trimmed, 0), indicator(torch.gt, sign, 0)
    return trimmed * positive.eq_(elected)


def disjoint_merge(trimmed: Tensor, sign: Tensor | None, merge: str = "mean") -> Tensor:
    """Merge the entries that agree with the elected sign.

    Args:
        trimmed: ``(T, …)``.
        sign: ``(…)``, the elected signs; where it is 0, negative entries count (as in the official code). None: all do.
        merge: ``mean`` over the agreeing non-zero entries, their ``sum``, or the ``max`` in magnitude, which gets the
            elected sign.

    Returns:
        ``(…)``.

    Raises:
        MergeError: If there is no such merge, or no sign for the ``max``.
    """
    _check_rule("disjoint merge", merge, ("mean", "sum", "max"))
    agreeing = trimmed if sign is None else agreeing_entries(trimmed, sign)
    if merge == "mean":
        return agreeing.sum(dim=0) / indicator(torch.ne, agreeing, 0).sum(dim=0).clamp_(min=1)
    if merge == "sum":
        return agreeing.sum(dim=0)
    if sign is None:
        raise MergeError("The largest magnitude gets the elected sign: give the signs, or merge by mean or sum.")
    return agreeing.abs().amax(dim=0) * sign


def joint_merge(trimmed: Tensor, sign: Tensor | None, merge: str = "mean") -> Tensor:
    """Merge all entries, zeros and disagreeing ones too, and give the result the elected sign, if there is one.

    Args:
        trimmed: ``(T, …)``.
        sign: ``(…)``, the elected signs, or None.
        merge: ``mean``, ``sum``, ``median`` (of an even number the lower one) or ``magnitude`` (the largest entry).

    Returns:
        ``(…)``.

    Raises:
        MergeError: If there is no such merge.
    """
    _check_rule("joint merge", merge, ("mean", "sum", "median", "magnitude"))
    if merge == "magnitude":
        merged = trimmed.gather(0, trimmed.abs().argmax(dim=0, keepdim=True)).squeeze(0)
    elif merge == "median":
        merged = trimmed.median(dim=0).values
    else:
        merged = mean(trimmed) if merge == "mean" else trimmed.sum(dim=0)
    return merged if sign is None else merged.abs() * sign


def per_expert(values: Tensor, deltas: Tensor) -> Tensor:
    """Shape one value per expert to meet the stacked task tensors: ``(T,), (T, …) -> (T, 1, …)``."""
    return values.view(-1, *[1] * (deltas.ndim - 1))


def once(compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Compute at the first call, and only then, whichever thread it comes from."""
    lock = Lock()
    results: list[Tensor] = []

    def get() -> Tensor:
        with lock:
            if not results:
                results.append(compute())
        return results[0]

    return get


class Survey(NamedTuple):
    """Statistics of the whole model, ``(T,)`` each: one value for every expert."""

    thresholds: Tensor | None = None
    centers: Tensor | None = None
    norms: Tensor | None = None
    """Of what is left after trimming."""
    majority: Majority | None = None
    """The sign that most entries elect; it takes a look at the whole model, which is taken only if it is called."""


@dataclass(frozen=True)
class TIES(MergeMethod):
    """Trim, elect sign, merge. Statistics are those of the expert's whole model, as in the official code.

    The paper's method is the default; the other choices are the official code's.

    Args:
        density: Share of each task vector that is kept, by magnitude; in (0, 1]. The paper keeps 0.2.
        trim: What is kept: the largest entries up to ``density`` (``topk``) or up to ``norm_fraction``
            (``normfrac``), those farther than ``deviations`` from the mean (``std``), or everything (``none``).
        norm_fraction: Share of each task vector's squared norm that ``normfrac`` keeps; in (0, 1].
        deviations: In standard deviations of the task vector, for ``std``; must not be negative.
        elect: Who decides on the sign of an entry: the sum (``mass``), the sum or the largest of the experts' shares of
            their squared norms (``normmass``, ``normfrac``), or nobody (``none``).
        merge: How agreeing entries are merged: ``mean`` (the paper's disjoint mean), ``sum`` or ``max``; if not
            disjoint, ``mean``, ``sum``, ``median`` or ``magnitude``.
        disjoint: Leave out zeros and the entries that do not agree with the sign; otherwise everything is merged and
            gets the sign afterwards.
        scale: Scaling coefficient; 1 is the paper's choice where there is no validation data.
    """

    paper: ClassVar[Paper] = Paper("Yadav et al.", "NeurIPS", 2023, "2306.01708")
    formula: ClassVar[str] = "τ = mean of the Δ'_t with sign(Δ'_t) = sign(Σ_j Δ'_j); Δ'_t = trim(Δ_t)"
    entrywise: ClassVar[bool] = True
    reads_twice: ClassVar[bool] = True

    density: float = 0.2
    trim: Literal["topk", "normfrac", "std", "none"] = "topk"
    norm_fraction: float = 0.9
    deviations: float = 1.0
    elect: Literal["mass", "normmass", "normfrac", "none"] = "mass"
    merge: Literal["mean", "sum", "max", "median", "magnitude"] = "mean"
    disjoint: bool = True

    def __post_init__(self) -> None:
        check_range(self, "density", 0, 1, open_low=True)
        check_range(self, "norm_fraction", 0, 1, open_low=True)
        check_range(self, "deviations", 0, float("inf"), open_high=True)
        check_choice(self, "trim", ("topk", "normfrac", "std", "none"))
        check_choice(self, "elect", ("mass", "normmass", "normfrac", "none"))
        signed_max = ("max",) if self.elect != "none" else ()  # the largest magnitude gets its sign from the election
        check_choice(
            self, "merge", ("mean", "sum", *signed_max) if self.disjoint else ("mean", "sum", "median", "magnitude")
        )

    def survey(self, task_vectors: TaskVectors) -> Survey:
        """Find the experts' thresholds, then the norms of what is left; and, if asked, the sign most entries elect."""

        def chunks() -> Iterator[Tensor]:
            return (deltas for _, deltas in task_vectors.stream())

        def trimmed() -> Iterator[Tensor]:
            return (self._trim(piece, survey) for deltas in chunks() for piece in pieces(deltas))

        first = next(chunks())
        survey = Survey()
        if self.trim == "topk":
            total = sum(task_vectors.numel(name) for name in task_vectors)
            survey = Survey(kth_magnitude(chunks, max(total - int(total * self.density), 1)))
        elif self.trim == "normfrac":
            survey = Survey(norm_fraction_magnitude(chunks, self.norm_fraction))
        elif self.trim == "std":
            centers, deviations = moments(chunks)
            thresholds = (self.deviations * deviations).to(first).nextafter(first.new_tensor(torch.inf))  # beyond it
            survey = Survey(thresholds, centers.to(first))
        if self.elect in ("normmass", "normfrac"):
            squares = reduce(torch.add, (deltas.double().square().sum(dim=1) for deltas in trimmed()))
            survey = survey._replace(norms=squares.sqrt().to(first))
        if self.elect != "none":

            def majority() -> Tensor:
                signs = (vote(piece, self.elect, survey.norms) for piece in trimmed())
                return reduce(torch.add, (sign.sum(dtype=torch.float64) for sign in signs)).sign().to(first)

            survey = survey._replace(majority=once(majority))
        return survey

    def kept(self, deltas: Tensor, survey: Survey) -> Tensor:
        """Keep what trimming and the election leave of every expert: ``(T, …) -> (T, …)``."""
        trimmed = self._trim(deltas, survey)
        sign = self._elect(trimmed, survey)
        return trimmed if sign is None else agreeing_entries(trimmed, sign)

    def _elect(self, trimmed: Tensor, survey: Survey) -> Tensor | None:
        return None if survey.majority is None else elect(trimmed, survey.majority, self.elect, survey.norms)

    def _trim(self, deltas: Tensor, survey: Survey) -> Tensor:
        return deltas if survey.thresholds is None else trim(deltas, survey.thresholds, survey.centers)

    def tensor(self, deltas: Tensor, context: Context) -> Tensor:
        """Merge a parameter, ``(T, …) -> (…)``: trim, elect, merge."""
        survey: Survey = context.survey
        trimmed = self._trim(deltas, survey)
        sign = self._elect(trimmed, survey)
        merge = disjoint_merge if self.disjoint else joint_merge
        return merge(trimmed, sign, self.merge)
