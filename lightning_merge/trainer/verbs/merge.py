"""The verb ``merge``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule

from lightning_merge.checkpoints import write_text
from lightning_merge.checkpoints.folders import CARD, is_folder
from lightning_merge.checkpoints.paths import local_path, path_here
from lightning_merge.checkpoints.streaming import SHARD_SIZE
from lightning_merge.data import DomainDataModule
from lightning_merge.evaluation import Table
from lightning_merge.evaluation.merge_data import module_and_data
from lightning_merge.evaluation.task_models import evaluate_merged
from lightning_merge.merging.aligning import Align
from lightning_merge.merging.checks import check_arguments
from lightning_merge.merging.merge import merge
from lightning_merge.merging.merged import Merged
from lightning_merge.merging.model_card import check_card
from lightning_merge.merging.options import MergeOptions
from lightning_merge.merging.plan import Plan
from lightning_merge.merging.planning import plan as make_plan
from lightning_merge.merging.repairing import Repair
from lightning_merge.methods import SCORE, MergeMethod
from lightning_merge.methods.base.matrices import Matrices
from lightning_merge.report.loggers import log_to_loggers
from lightning_merge.report.writing import check_report, report_merge
from lightning_merge.trainer.verbs.align_and_repair import AlignAndRepair
from lightning_merge.trainer.verbs.reporting import ReportingTrainer
from lightning_merge.utilities.errors import MergeError, problems_of
from lightning_merge.utilities.processes import Processes


class MergeVerb(ReportingTrainer):
    """The verb ``merge``."""

    def merge(
        self,
        model: LightningModule | None = None,
        datamodule: DomainDataModule | None = None,
        experts: dict[str, str] | list[str] | None = None,
        method: MergeMethod | None = None,
        base: str | None = None,
        statistics: dict[str, str] | None = None,
        output: str = "merged.ckpt",
        scale: float | None = None,
        include: list[str] | None = None,
        exclude: list[str] | None = None,
        matrices: Matrices = Matrices(),  # noqa: B008, a frozen dataclass
        seed: int = 0,
        workers: int | None = None,
        allow_non_finite: bool = False,
        allow_strangers: bool = False,
        resume: bool = False,
        shard_size: int = SHARD_SIZE,
        carry_code: bool = False,
        plan: bool = False,
        align: Align | None = None,
        repair: Repair | None = None,
        report: str | None = None,
        card: str | None = None,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
    ) -> Merged | Plan:
        """Merge experts' checkpoints into one.

        Args:
            model: The experts' module, as it is before any fit: the base, unless a file is given as base.
            datamodule: If it is a :class:`DomainDataModule` and there is a model, the merged model is evaluated on its
                test domains. Methods that run the model while they merge (AdaMerging, RegMean++) do so on the training
                images of the domains that the experts are named after, without their labels.
            experts: The experts' checkpoints, run folders, LoRA adapters or task vectors: a list, or a mapping from a
                name (domain) to a path. Of several sets of weights in one file another than ``state_dict`` is named
                behind it: file.ckpt#state_dict_ema.
            method: The merging method; SCORE by default.
            base: The checkpoint that the experts started from; by default the model as it is configured.
            statistics: Where the statistics of each expert's data are, by its name, for methods that need them; by
                default beside the experts' checkpoints, where the verb ``statistics`` writes them.
            output: The file to write: .ckpt, .safetensors or .pt; without a suffix, a folder as Hugging Face, timm and
                open_clip write them, with what lies beside the base's weights and a model card.
            scale: Scaling coefficient; by default the method's own.
            include: Merge only the parameters whose name matches one of these shell patterns.
            exclude: Do not merge the parameters that match one of these shell patterns.
            matrices: Which parameters count as matrices.
            seed: Seed of methods that draw random numbers.
            workers: Parameters that are merged at the same time, each on one core; by default one for each core, at
                most eight. With several processes (``--trainer.devices``, torchrun) each has its part of them.
            allow_non_finite: Merge weights that hold NaN or infinite values instead of refusing them.
            allow_strangers: Merge experts that do not come from this base, without a word about it.
            resume: Go on where an earlier run of the same merge into the same output was interrupted, and keep what is
                finished if this one is; all inputs must be files.
            shard_size: The most bytes of one file where the output is a folder.
            carry_code: Whether an output that is a folder gets the code (*.py) beside the base's weights, too.
            plan: Only say what would be merged, what stands in the way, and about what it costs, from the files'
                headers and a sample of their weights; nothing is merged or written. The exit status is 1 if anything
                stands in the way.
            align: For experts of several foundations: put their channels into one order first. The base is the mean of
                the foundations then.
            repair: What is corrected once the model is merged, on training images of the domains that the experts are
                named after: REPAIR, TACT, BatchNorm's statistics, or the experts' heads.
            report: An HTML file to write: where the experts agree, what the merge did to each layer, the scores, and
                what went in, see the verb ``analyze``.
            card: Also write a model card to this file (.md): method, experts, scores, and how to make the model again.
                An output that is a folder has one in any case, README.md.
            ckpt_path: Not used; here so that the config.yaml of a fit can be read.
            weights_only: Not used; checkpoints are never unpickled beyond weights.

        Returns:
            The merged model; its ``manifest`` says how it was made. Or the plan.
        """
        if not experts:
            raise MergeError("There is nothing to merge: give the experts' checkpoints with --experts.")
        if base is None and model is None and align is None:
            raise MergeError(
                "The experts are merged as differences to a base; give it with --base, or give the --model."
            )
        check_report(report)
        if card is not None:
            check_card(card)
        method = method or SCORE()
        domains = datamodule if isinstance(datamodule, DomainDataModule) else None
        several = AlignAndRepair(self, model, domains, align, repair, tuple(exclude or ()), seed)
        several.check(experts, base, method, resume, output)
        source: Any = base if base is not None or model is None else model.state_dict()
        options: dict[str, Any] = {
            "statistics": statistics,
            "scale": scale,
            "include": include,
            "exclude": exclude or (),
            "matrices": matrices,
            "seed": seed,
            "workers": workers,
            "allow_non_finite": allow_non_finite,
            "allow_strangers": allow_strangers,
            "output": output,
            "resume": resume,
            "shard_size": shard_size,
            "carry_code": carry_code,
        }
        if plan:
            source, sources = several.unaligned(source, experts)
            unnamed = problems_of(module_and_data, self, model, domains, method, map(str, sources))
            if unnamed:  # all else is planned as if they had data
                options |= {"module": model, "data": {str(name): [] for name in sources}}
            else:
                options |= module_and_data(self, model, domains, method, sources)
            planned = make_plan(source, sources, method, **options)
            self.plan = replace(planned, problems=(*unnamed, *planned.problems)) if unnamed else planned
            return self.plan
        self.plan = None
        processes = Processes(self.join_processes())
        weights, opened = several.open(source, experts, processes)
        options |= module_and_data(self, model, domains, method, opened)
        if repair is not None:
            path_here(output, "A repaired model, with what belongs to its tasks,")
            with processes.together():
                check_arguments(
                    method, weights, opened, MergeOptions(output=output, shard_size=shard_size, carry_code=carry_code)
                )
            options["output"] = None
        with self.progress_shown():
            merged = merge(weights, opened, method, distributed=processes.count > 1, **options)
        if repair is not None:
            merged = several.repair(merged, processes)
        with processes.together():
            if self.is_global_zero:
                several.save(merged, output, shard_size, carry_code)
        self.merged, self.table = merged, None
        if model is not None and domains is not None:
            self.table = Table(evaluate_merged(self, model, domains, weights, merged))
        with processes.together():
            if self.is_global_zero:
                self._describe(merged, output, report, card, workers)
        return merged

    def _describe(self, merged: Merged, output: str, report: str | None, card: str | None, workers: int | None) -> None:
        """Write model card and report of a merged model, and log table and figures."""
        cards = [local_path(card)] if card is not None else []
        if self.table is not None and is_folder(output):
            cards.append(local_path(output) / CARD)  # the one there knows no scores
        for path in cards:
            write_text(path, str(merged.card(self.table, output)))
        figures = {}
        if report is not None:
            with self.progress_shown():
                figures = report_merge(merged, report, self.table, self.configuration, workers).figures
            self.report = Path(report)
        log_to_loggers(self.given_loggers, self.table, figures)
