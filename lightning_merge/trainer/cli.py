"""The command line: ``LightningCLI`` with merging verbs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_type_hints

import torch.distributed as dist
import yaml
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from torch.multiprocessing import ProcessRaisedException

from lightning_merge.checkpoints import open_weights
from lightning_merge.checkpoints.hyper_parameters import SAFE, unsafe_arguments
from lightning_merge.methods.catalog import name_problem
from lightning_merge.trainer.model_of_checkpoint import model_of_checkpoint
from lightning_merge.trainer.trainer import MergeTrainer
from lightning_merge.utilities.errors import MergeError, raise_all
from lightning_merge.utilities.processes import connected
from lightning_merge.utilities.signals import asked_end, end_children, ended_by_sigterm
from lightning_merge.utilities.terminal import visible

_VERBS = ("merge", "search", "statistics", "evaluate", "benchmark", "analyze")
"""The verbs that Lightning lacks; none of them reads ``--ckpt_path``."""
_REPORTING = ("merge", "search", "benchmark", "analyze")
"""The verbs that write reports, with the YAML that they were given."""


class SaveFitConfig(SaveConfigCallback):
    """Callback that saves ``config.yaml`` beside the checkpoints of a ``fit``, and does nothing in every other verb."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Save the config at the start of a fit."""
        if stage == "fit":
            super().setup(trainer, pl_module, stage)


class MergeCLI(LightningCLI):
    """``LightningCLI`` with more verbs. In an existing project: ``MergeCLI(MyModel, MyData)``.

    This package's callbacks and merging methods are known by their short names, its models and data where the project
    names none of its own. What cannot work ends in one sentence and exit status 1.

    Args:
        model_class: As for ``LightningCLI``.
        datamodule_class: As for ``LightningCLI``.
        save_config_callback: As for ``LightningCLI``; by default one that saves the config of a ``fit`` only.
        save_config_kwargs: As for ``LightningCLI``.
        trainer_class: A :class:`lightning_merge.MergeTrainer`. A project with a Trainer of its own writes
            ``class Ours(MergeTrainer, Theirs): pass`` and gives ``Ours``.
        args: What else ``LightningCLI`` takes.
        kwargs: What else ``LightningCLI`` takes.
    """

    def __init__(
        self,
        model_class: type[LightningModule] | Callable[..., LightningModule] | None = None,
        datamodule_class: type[LightningDataModule] | Callable[..., LightningDataModule] | None = None,
        save_config_callback: type[SaveConfigCallback] | None = SaveFitConfig,
        save_config_kwargs: dict[str, Any] | None = None,
        trainer_class: type[Trainer] | Callable[..., Trainer] = MergeTrainer,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        classes = (model_class, datamodule_class, save_config_callback, save_config_kwargs, trainer_class)
        try:
            _check_trainer_class(trainer_class)
            _make_known(model_class is None, datamodule_class is None)
            with ended_by_sigterm(), connected():
                super().__init__(*classes, *args, **kwargs)
        except (ValueError, ProcessRaisedException) as error:
            sentence = _merge_error(error)
            if sentence is None:
                raise
            sys.stderr.write(f"lightning-merge: {sentence}\n")
            sys.exit(1)
        except (KeyboardInterrupt, SystemExit) as error:
            end = asked_end(error)
            if end is None:
                raise
            status, how = end
            end_children()
            sys.stderr.write(f"lightning-merge: {how}; no file is half-written, and the same command begins again.\n")
            sys.exit(status)

    trainer: MergeTrainer

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """List Lightning's verbs and those of :class:`lightning_merge.trainer.MergeTrainer`."""
        more = {verb: {"model", "datamodule"} for verb in _VERBS}
        return {**LightningCLI.subcommands(), **more}

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add trainer, model and data; files can be merged without a model, so it is not required here."""
        parser.add_lightning_class_args(self.trainer_class, "trainer")
        parser.set_defaults({f"trainer.{k}": v for k, v in self.trainer_defaults.items() if k != "callbacks"})
        for key, kind, subclasses in (
            ("model", self._model_class, self.subclass_mode_model),
            ("data", self._datamodule_class, self.subclass_mode_data),
        ):
            parser.add_lightning_class_args(kind, key, subclass_mode=subclasses, required=False)

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse the arguments; ``--plan`` may stand by itself."""
        if args is not None and not isinstance(args, list):
            super().parse_arguments(parser, args)
            return
        words = sys.argv[1:] if args is None else args
        following = [*words, "-"][1:]
        named = [after for word, after in zip(words, following, strict=True) if word == "--method"]
        named += [word.removeprefix("--method=") for word in words if word.startswith("--method=")]
        if words[:1] in (["merge"], ["search"]):
            raise_all([problem for name in named if (problem := name_problem(name))])
        words = [
            "--plan=true" if argument == "--plan" and after.startswith("-") else argument
            for argument, after in zip(words, following, strict=True)
        ]
        try:
            self.config = parser.parse_args(words)
        except UnicodeDecodeError as error:
            raise MergeError("A file given by --config is no text in UTF-8; save it as such.") from error

    def _parse_ckpt_path(self) -> None:
        """Take the model's hyper-parameters from ``--ckpt_path`` as Lightning does, but let the file choose no code."""
        verb = self.config.get("subcommand")
        path = self.config[verb].get("ckpt_path") if verb and verb not in _VERBS else None
        if not path or not Path(path).is_file():
            return
        config = yaml.safe_load(self.parser.dump(self.config, skip_none=False, skip_validation=True))
        said = config[verb].get("model") or {}
        model = model_of_checkpoint(path, said, self._model_class, self.subclass_mode_model)
        if model:
            self.config = self.parser.parse_object({verb: {"model": model}}, self.config)

    def before_instantiate_classes(self) -> None:
        """Check that there is a model where the verb needs one, and that no loader's safety is switched off."""
        config = self.config[self.subcommand] if self.subcommand else self.config
        raise_all([f"The configuration has {argument}; {SAFE}" for argument in unsafe_arguments(config.as_dict())])
        has_model = self.model_class is not None or self._get(self.config, "model") is not None
        if not has_model and self.subcommand not in (None, "merge", "analyze"):
            raise MergeError(f"`{self.subcommand}` needs a model; give --model, or a --config that names one.")

    def instantiate_classes(self) -> None:
        """Build trainer, model and data, and give the trainer the YAML that it was configured by."""
        super().instantiate_classes()
        if self.subcommand in _REPORTING:
            parser, config = self._parser(self.subcommand), self.config[self.subcommand]
            self.trainer.configuration = parser.dump(config, skip_validation=True)

    def after_merge(self) -> None:
        """Say what was merged, and show the evaluation of the merged model if there was one; or show the plan."""
        if self.trainer.plan is not None:
            if self.trainer.is_global_zero:
                _say(self.trainer.plan.text())
            sys.exit(1 if self.trainer.plan.problems else 0)
        merged, output = self.trainer.merged, self._get(self.config, "output")
        if self.trainer.is_global_zero and merged is not None:
            beside = [name for name in ("corrections", "heads") if getattr(merged, name)]
            more = f", and the tasks' {beside[0]} beside it" if beside else ""
            card = self._get(self.config, "card")
            more += f", and its card {card}" if card is not None else ""
            _say("\n".join([f"{merged.summary()}; wrote {output}{more}", *merged.notes]))
        self._show_table()
        self._show_report()

    def after_statistics(self) -> None:
        """Say what was collected."""
        recorded = self.trainer.recorded
        if self.trainer.is_global_zero and recorded is not None:
            about = open_weights(recorded).header["statistics"]
            kinds = ", ".join(about["kinds"])
            _say(f"{kinds} of {about['examples']} examples; wrote {recorded}")

    def after_search(self) -> None:
        """Show the settings that were tried, and say which was chosen and merged."""
        self._show_table()
        result, output = self.trainer.found, self._get(self.config, "output")
        if self.trainer.is_global_zero and result is not None:
            _say(f"\n{result.summary()}\n{result.merged.summary()}; wrote {output}")

    def after_evaluate(self) -> None:
        """Show the table."""
        self._show_table()

    def after_benchmark(self) -> None:
        """Show the table, and say where the report is."""
        self._show_table()
        self._show_report()

    def after_analyze(self) -> None:
        """Show what was found for every expert, and say where the report is."""
        self._show_table()
        self._show_report()

    def _show_table(self) -> None:
        if self.trainer.is_global_zero and self.trainer.table is not None:
            _say(f"\n{self.trainer.table}")

    def _show_report(self) -> None:
        if self.trainer.is_global_zero and self.trainer.report is not None:
            _say(f"\nThe report is {self.trainer.report}")


def _say(text: str) -> None:
    """Write lines to the terminal."""
    sys.stdout.write(visible(f"{text}\n", keep="\n"))


def _merge_error(error: BaseException | None) -> MergeError | None:
    """Find the MergeError that an error is, that the parser wrapped, or that a forked process wrote as it ended."""
    while error is not None and not isinstance(error, MergeError):
        if isinstance(error, ProcessRaisedException):
            _, name, sentence = str(error).rpartition(f"{MergeError.__module__}.{MergeError.__name__}: ")
            return MergeError(sentence.strip(), sentence.strip().splitlines()) if name else None
        error = error.__cause__ or error.__context__
    return error


def _check_trainer_class(trainer_class: type[Trainer] | Callable[..., Trainer]) -> None:
    """Raise a :class:`MergeError` if what makes the trainer does not make one that can merge."""
    made: Any = trainer_class
    if isinstance(trainer_class, type):
        wanted = f"class Ours(MergeTrainer, {trainer_class.__name__}): pass` and give trainer_class=Ours"
    else:
        made = get_type_hints(trainer_class).get("return")
        wanted = f"def {trainer_class.__name__}(…) -> MergeTrainer:` and return one"
    if not (isinstance(made, type) and issubclass(made, MergeTrainer)):
        raise MergeError(
            f"trainer_class={trainer_class.__name__} makes no MergeTrainer, which has the verbs; write `{wanted}."
        )


def _make_known(models: bool, data: bool) -> None:
    """Import the classes that can be chosen by their short names."""
    import lightning_merge.callbacks

    if models:
        import lightning_merge.models
    if data:
        import lightning_merge.data  # noqa: F401


def main(args: list[str] | None = None) -> None:
    """Run ``lightning-merge``.

    A process group that the command has joined is left when it ends well: a process that ends with the group's threads
    still running is aborted now and then, which torchrun and SLURM take for a failure. One that fails does not wait for
    the others.
    """
    joined_before = _has_group()
    MergeCLI(
        args=args,
        seed_everything_default=0,
        save_config_kwargs={"overwrite": True},
        parser_kwargs={
            "description": "Fit experts, merge their weights, evaluate the merged model. "
            "`lightning-merge methods` lists every merging method.",
        },
    )
    if _has_group() and not joined_before:
        dist.destroy_process_group()


def _has_group() -> bool:
    """Tell whether this process is in a process group."""
    return dist.is_available() and dist.is_initialized()
