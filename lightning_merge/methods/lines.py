"""LiNeS (Wang et al., "LiNeS: Post-training Layer Scaling Prevents Forgetting …", ICLR 2025, arXiv 2410.17146)."""

from __future__ import annotations

import re
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from lightning_merge.methods.base import Context, MergeMethod, Paper, check_range
from lightning_merge.methods.base.task_vectors import TaskVectors
from lightning_merge.methods.base.wrapper import Wrapper
from lightning_merge.methods.task_arithmetic import TaskArithmetic


class Survey(NamedTuple):
    """The statistics of the whole model that LiNeS needs.

    Args:
        inner: The survey of the method inside.
        alpha: The coefficient of the first block.
        num_blocks: The number of blocks.
    """

    inner: Any
    alpha: float
    num_blocks: int


def block_index(name: str) -> int | None:
    """Find the block a parameter belongs to, the first number in its name; None if there is none."""
    match = re.search(r"\.(\d+)\.", f".{name}")
    return int(match[1]) if match else None


def lines_coefficient(block: int | None, num_blocks: int, alpha: float, beta: float) -> float:
    """Compute a block's coefficient: ``alpha`` for the first to ``alpha + beta`` for the last; ``alpha`` outside."""
    return alpha + beta * (block or 0) / max(num_blocks - 1, 1)


@dataclass(frozen=True)
class LiNeS(Wrapper):
    """Layer scaling of another method's update: shallow blocks, which hold general features, move less than deep ones.

    Args:
        method: The method whose update is scaled; its own ``scale`` is not used.
        alpha: Coefficient of the first block and of all that is in no block, not negative. By default the paper's for
            several tasks: 1/T times the L1 norm of the task vectors' sum over that of the method's update. (For one
            task the paper takes ``1 - beta``.)
        beta: What the last block gets more than the first, not negative. The paper chooses it on validation data.
        num_blocks: Number of blocks; by default counted in the parameters' names (``resblocks.11.mlp…``).
        scale: Scaling coefficient of the scaled update.
    """

    paper: ClassVar[Paper] = Paper("Wang et al.", "ICLR", 2025, "2410.17146")
    formula: ClassVar[str] = "τ becomes (α + β l / (L - 1)) τ in block l of L"
    reads_twice: ClassVar[bool] = True
    default_method: ClassVar[MergeMethod] = TaskArithmetic()

    alpha: float | None = None
    beta: float = 0.5
    num_blocks: int | None = None
    _: KW_ONLY
    scale: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "beta", 0, float("inf"), open_high=True)
        if self.alpha is not None:
            check_range(self, "alpha", 0, float("inf"), open_high=True)
        if self.num_blocks is not None:
            check_range(self, "num_blocks", 1, float("inf"), open_high=True)

    def survey(self, task_vectors: TaskVectors) -> Survey:
        """Count the blocks and, where ``alpha`` is not given, compare the norms of the update and of the sum."""
        inner = self.inside.survey(task_vectors)
        blocks = [block for name in task_vectors if (block := block_index(name)) is not None]
        num_blocks = self.num_blocks or max(blocks, default=0) + 1
        if self.alpha is not None:
            return Survey(inner, self.alpha, num_blocks)
        summed = merged = 0.0
        for name, deltas in task_vectors.items():
            num_experts = len(deltas)
            summed += float(deltas.sum(dim=0).abs().sum())
            merged += float(self.inside.update(deltas, task_vectors.context(name, inner)).abs().sum())
        return Survey(inner, (summed / merged if merged else 1.0) / num_experts, num_blocks)

    def update(self, deltas: Tensor, context: Context) -> Tensor:
        """Scale the update of the method inside by block: ``(T, …) -> (…)``."""
        return self._coefficient(context) * self.inside.update(deltas, self._inner(context))

    def task_update(self, deltas: Tensor, expert: int, context: Context) -> Tensor:
        """Scale the update for one expert's task by block: ``(T, …) -> (…)``."""
        return self._coefficient(context) * self.inside.task_update(deltas, expert, self._inner(context))

    def _coefficient(self, context: Context) -> float:
        survey: Survey = context.survey
        return lines_coefficient(block_index(context.name), survey.num_blocks, survey.alpha, self.beta)

    @staticmethod
    def _inner(context: Context) -> Context:
        return context.with_survey(context.survey.inner)
