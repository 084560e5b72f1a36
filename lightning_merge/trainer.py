"""Lightning's Trainer with three more verbs: ``merge``, ``evaluate`` and ``benchmark``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback

from lightning_merge.checkpoints import open_weights
from lightning_merge.data import DomainDataModule
from lightning_merge.errors import MergeError
from lightning_merge.evaluation import Table, evaluate_domain
from lightning_merge.evaluation.benchmark import Benchmark, Pretrain
from lightning_merge.evaluation.held_out import BASE, check_names
from lightning_merge.evaluation.merge_data import module_and_data
from lightning_merge.matrices import Matrices
from lightning_merge.merging import Merged, merge
from lightning_merge.methods import SCORE, MergeMethod


class MergeTrainer(Trainer):
    """A ``Trainer`` that can also merge experts, evaluate merged models, and run the leave-one-domain-out benchmark."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        arguments = dict(kwargs)
        if isinstance(arguments.get("callbacks"), list):
            arguments["callbacks"] = list(arguments["callbacks"])  # Lightning adds its own to the list it is given
        super().__init__(*args, **kwargs)
        self.arguments = arguments

    @property
    def given_callbacks(self) -> list[Callback]:
        """The callbacks that were given, without those that Lightning or its command line added."""
        given = self.arguments.get("callbacks") or []
        given = given if isinstance(given, list) else [given]
        return [callback for callback in given if not isinstance(callback, SaveConfigCallback)]

    def again(self, callbacks: Sequence[Callback] = (), **changes: Any) -> MergeTrainer:
        """A new trainer with the same arguments, for one job among many: no progress bar, no logger, no checkpoints.

        Args:
            callbacks: Its callbacks. Checkpoints are written only if a ``ModelCheckpoint`` is among them.
            changes: Arguments that differ.
        """
        from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar

        callbacks = [callback for callback in callbacks if not isinstance(callback, ProgressBar)]
        quiet = {
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        }
        return type(self)(**{**self.arguments, **quiet, "callbacks": callbacks, **changes})

    def merge(
        self,
        model: LightningModule | None = None,
        datamodule: DomainDataModule | None = None,
        experts: dict[str, str] | list[str] | None = None,
        method: MergeMethod | None = None,
        base: str | None = None,
        output: str = "merged.ckpt",
        scale: float | None = None,
        include: list[str] | None = None,
        exclude: list[str] | None = None,
        matrices: Matrices = Matrices(),  # noqa: B008, a frozen dataclass
        seed: int = 0,
        workers: int = 1,
        allow_non_finite: bool = False,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
    ) -> Merged:
        """Merge experts' checkpoints into one.

        Args:
            model: The experts' module, as it is before any fit: the base, unless a file is given as base.
            datamodule: If given with a model, the merged model is evaluated on its test domains. Methods that run the
                model while they merge (AdaMerging, RegMean++) do so on the training images of the domains that the
                experts are named after, without their labels.
            experts: The experts' checkpoints or run folders: a list, or a mapping from a name (domain) to a path.
            method: The merging method; SCORE by default.
            base: The checkpoint that the experts started from; by default the model as it is configured.
            output: The file to write: .ckpt, .safetensors or .pt.
            scale: Scaling coefficient; by default the method's own.
            include: Merge only the parameters whose name matches one of these shell patterns.
            exclude: Do not merge the parameters that match one of these shell patterns.
            matrices: Which parameters count as matrices.
            seed: Seed of methods that draw random numbers.
            workers: Parameters that are merged at the same time.
            allow_non_finite: Merge weights that hold NaN or infinite values instead of refusing them.
            ckpt_path: Not used; here so that the config.yaml of a fit can be read.
            weights_only: Not used; checkpoints are never unpickled beyond weights.

        Returns:
            The merged model; its ``manifest`` says how it was made.
        """
        if not experts:
            raise MergeError("There is nothing to merge: give the experts' checkpoints with --experts.")
        if base is None and model is None:
            raise MergeError(
                "The experts are merged as differences to a base; give it with --base, or give the --model."
            )
        method = method or SCORE()
        merged = merge(
            base if base is not None else model.state_dict(),
            experts,
            method,
            scale=scale,
            include=include,
            exclude=exclude or (),
            matrices=matrices,
            seed=seed,
            workers=workers,
            allow_non_finite=allow_non_finite,
            **module_and_data(self, model, datamodule, method, experts),
        )
        if self.is_global_zero:
            merged.save(output)
        self.merged, self.table = merged, None
        if model is not None and datamodule is not None:
            rows = {BASE: open_weights(base) if base is not None else model.state_dict(), "merged": merged.weights}
            self.table = self._evaluate(model, datamodule, rows, {})
        return merged

    def evaluate(
        self,
        model: LightningModule | None = None,
        datamodule: DomainDataModule | None = None,
        candidates: dict[str, str] | None = None,
        experts: dict[str, str] | None = None,
        base: str | None = None,
        output: str | None = None,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
    ) -> Table:
        """Evaluate several checkpoints side by side, in one pass over each test domain.

        Args:
            model: The module that the checkpoints belong to; as it is configured, it is the row "base".
            datamodule: The data; its test domains are the columns.
            candidates: Checkpoints to compare, by the name of their row.
            experts: Experts' checkpoints by domain, for the rows "own expert" and "logit ensemble" (of the others).
            base: Weights of the row "base", if they are not those of the model as configured.
            output: A folder for table.md and table.csv.
            ckpt_path: Not used; here so that the config.yaml of a fit can be read.
            weights_only: Not used; checkpoints are never unpickled beyond weights.

        Returns:
            The table.
        """
        if model is None or datamodule is None:
            raise MergeError("Evaluating needs a model and data; give --model and --data, or the config.yaml of a fit.")
        check_names(candidates or {})
        rows = {BASE: open_weights(base) if base is not None else model.state_dict()}
        rows |= {name: open_weights(path, name) for name, path in (candidates or {}).items()}
        named = {domain: open_weights(path, f"expert {domain}") for domain, path in (experts or {}).items()}
        self.table = self._evaluate(model, datamodule, rows, named)
        if output is not None and self.is_global_zero:
            self.table.save(output)
        return self.table

    def _evaluate(self, model, datamodule, rows, experts) -> Table:
        records = []
        for domain in datamodule.test_domains:
            records += evaluate_domain(self, model, datamodule, domain, rows, experts)
        return Table(records)

    def benchmark(
        self,
        model: LightningModule | None = None,
        datamodule: DomainDataModule | None = None,
        methods: dict[str, MergeMethod] | None = None,
        output: str = "results/benchmark",
        domains: list[str] | None = None,
        pretrain: Pretrain | None = None,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
    ) -> Table:
        """Leave each domain out in turn: merge the other domains' experts by every method and evaluate on it.

        Experts that are missing are fitted with this trainer's settings; what is done already is not done again.
        Methods that run the model while they merge see the training images of the domains that are merged, without
        labels, and never the domain that is left out (AdaMerging's paper adapts on the images it is tested on).

        Args:
            model: The module of every expert, as it is before any fit.
            datamodule: The data of all domains. With ``test_on: all`` a held-out domain is evaluated as a whole.
            methods: The methods to compare, by the name of their row.
            output: The folder for experts, results.jsonl, table.md and table.csv.
            domains: The domains to leave out in turn; by default all but those of the base.
            pretrain: Fit the base first, on domains of its own; by default the model as it is configured is the base.
            ckpt_path: Not used; here so that the config.yaml of a fit can be read.
            weights_only: Not used; checkpoints are never unpickled beyond weights.

        Returns:
            The table of accuracies.
        """
        if model is None or datamodule is None:
            raise MergeError("A benchmark needs a model and data; give --model and --data.")
        base_domains = pretrain.domains if pretrain else ()
        self.table = Benchmark(
            trainer=self,
            model=model,
            datamodule=datamodule,
            methods=methods or {},
            output=Path(output),
            domains=domains or [domain for domain in datamodule.domains if domain not in base_domains],
            pretrain=pretrain,
        ).run()
        return self.table
