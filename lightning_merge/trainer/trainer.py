"""Lightning's Trainer with more verbs: those that merge, and those that tell what came out."""

from __future__ import annotations

from lightning_merge.trainer.verbs.analyze import AnalyzeVerb
from lightning_merge.trainer.verbs.benchmark import BenchmarkVerb
from lightning_merge.trainer.verbs.evaluate import EvaluateVerb
from lightning_merge.trainer.verbs.merge import MergeVerb
from lightning_merge.trainer.verbs.search import SearchVerb
from lightning_merge.trainer.verbs.statistics import StatisticsVerb


class MergeTrainer(MergeVerb, SearchVerb, StatisticsVerb, EvaluateVerb, BenchmarkVerb, AnalyzeVerb):
    """A ``Trainer`` that can also merge experts, search coefficients, evaluate merged models, and benchmark methods.

    A project with a Trainer of its own writes ``class Ours(MergeTrainer, Theirs): pass``.
    """
