"""The jobs of a benchmark; each leaves a marker when it is done, so that an interrupted benchmark goes on there."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import os
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, seed_everything
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.warnings import PossibleUserWarning

from lightning_merge.checkpoints import open_weights, save_weights, write_text
from lightning_merge.data import DomainDataModule
from lightning_merge.evaluation.repeatable_trainer import RepeatableTrainer
from lightning_merge.models.fitted import best_checkpoint
from lightning_merge.utilities.errors import MergeError
from lightning_merge.utilities.locking import locked
from lightning_merge.utilities.modules import stored_tensors
from lightning_merge.utilities.processes import processes_of_run
from lightning_merge.utilities.schemas import read_json
from lightning_merge.utilities.terminal import visible

_DONE = "done"
_ELSEWHERE = (
    "accelerator",
    "devices",
    "num_nodes",
    "strategy",
    "logger",
    "default_root_dir",
    "callbacks",
    "profiler",
    "plugins",
    "log_every_n_steps",
    "barebones",
    "enable_progress_bar",
    "enable_model_summary",
    "enable_checkpointing",
    "num_sanity_val_steps",
)
"""Arguments of the trainer that say where it runs and what it shows, and do not change the results."""


@dataclass(frozen=True)
class Job:
    """A part of a benchmark that any process can do by itself, as it reads and writes nothing but files.

    Args:
        name: The name of the job.
        work: The function that does it.
        done: The function that tells whether it is done.
        after: The names of the jobs that must be done before it.
    """

    name: str
    work: Callable[[], None]
    done: Callable[[], bool]
    after: Sequence[str] = ()


class JobList(ABC):
    """A benchmark as the jobs that it consists of.

    It can be sent to another process, where its trainer is built again from the same arguments.
    """

    trainer: RepeatableTrainer
    output: Path

    @abstractmethod
    def jobs(self) -> list[Job]:
        """List all jobs, each after those that it waits for."""

    def __getstate__(self) -> dict[str, Any]:
        arguments = self.trainer.arguments | {"callbacks": self.trainer.given_callbacks, "logger": False}
        return self.__dict__ | {"trainer": (type(self.trainer), self.trainer.positional, arguments)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        trainer, positional, arguments = state["trainer"]
        self.__dict__.update(state | {"trainer": trainer(*positional, **arguments)})


def do_job(job: Job, seed: int) -> float:
    """Do a job that is not done, from a seed, so that it does not depend on those that ran before it in this process.

    Returns:
        The time that it took, in seconds.
    """
    seed_everything(seed, workers=True, verbose=False)
    started = time.perf_counter()
    try:
        with quiet_lightning():
            if not job.done():
                job.work()
    finally:
        os.environ["PL_GLOBAL_SEED"] = str(seed)  # a job may have seeded with another number
    return time.perf_counter() - started


def tell(line: str) -> None:
    """Log a line of the first process, which may hold names."""
    rank_zero_info(visible(line))


def names_of(*jobs: Iterable[Job]) -> list[str]:
    """List the names of jobs."""
    return [job.name for job in chain(*jobs)]


def fit_expert(
    trainer: RepeatableTrainer,
    model: LightningModule,
    datamodule: DomainDataModule,
    domains: Sequence[str],
    folder: Path,
    **arguments: Any,
) -> None:
    """Fit a model on domains and write ``expert.ckpt`` into a folder: the best checkpoint if one is monitored.

    Args:
        trainer: The trainer whose settings and callbacks are used.
        model: The model to fit; it is changed.
        datamodule: The data module that holds the domains.
        domains: The domains to fit on.
        folder: The folder of the expert and its logs.
        arguments: Arguments of the trainer that differ.
    """
    trainer = trainer.again(
        default_root_dir=str(folder),
        logger=CSVLogger(folder, name="", version="logs"),
        callbacks=copy.deepcopy(trainer.given_callbacks),
        **arguments,
    )
    started = time.perf_counter()
    trainer.fit(model, datamodule=datamodule.only(train=domains, test=domains))
    if trainer.interrupted:
        raise KeyboardInterrupt
    best = best_checkpoint(trainer)
    weights = model.state_dict() if best is None else open_weights(best)
    with processes_of_run().together():
        if trainer.is_global_zero:
            save_weights(folder / "expert.ckpt", weights, hyper_parameters=model.hparams)
            mark_done(folder, {"domains": list(domains), "seconds": time.perf_counter() - started})


def is_done(folder: Path) -> bool:
    """Tell whether the job of this folder is done."""
    return (folder / _DONE).exists()


def mark_done(folder: Path, content: Mapping[str, Any]) -> None:
    """Mark the job of this folder as done, and store its results."""
    write_text(folder / _DONE, json.dumps(content) + "\n")


def read_done(folder: Path, schema: Any = dict[str, Any]) -> dict[str, Any]:
    """Read the results of the job of this folder, which must look as a schema says; none if it is not done."""
    if not is_done(folder):
        return {}
    remedy = "delete it, and the benchmark does this part again"
    return read_json(folder / _DONE, schema, "record of what a benchmark has done", remedy)


def settings_of(trainer: RepeatableTrainer, model: LightningModule, datamodule: DomainDataModule) -> dict[str, Any]:
    """Collect what results depend on: the model and its weights, the data, the trainer and its callbacks."""
    positional = {"positional": list(trainer.positional)} if trainer.positional else {}
    return {
        "model": {"class": type(model).__name__, **dict(model.hparams)},
        "data": datamodule.description() | {"test_on": datamodule.test_on},
        "trainer": {k: v for k, v in trainer.arguments.items() if v is not None and k not in _ELSEWHERE} | positional,
        "callbacks": [_describe_callback(callback) for callback in trainer.given_callbacks],
        "weights": _fingerprint(model),
    }


@contextmanager
def claimed(trainer: RepeatableTrainer, output: Path, settings: Mapping[str, Any]) -> Iterator[None]:
    """Have the output folder of a benchmark to this run alone within the block, for results of these settings.

    Workers of an engine belong to the run that has handed them their jobs.

    Raises:
        MergeError: On every process, if another run works there, or if what is there is of other settings.
    """
    trainer.join_processes()
    with ExitStack() as stack:
        with processes_of_run().together():
            if trainer.is_global_zero:
                stack.enter_context(locked(output))
                claim_output(output, settings, write=True)
        yield


def claim_output(output: Path, settings: Mapping[str, Any], write: bool) -> None:
    """Write the settings to the output folder, or check that what is there was made with the same ones.

    Raises:
        MergeError: If the settings differ.
    """
    settings = json.loads(json.dumps(settings, default=str))
    file = output / "settings.json"
    if file.exists():
        remedy = "choose another output folder, or delete this one"
        made_with = read_json(file, dict[str, Any], "record of a benchmark's settings", remedy)
        before, now = _flat(made_with), _flat(settings)
        changed = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
        if changed:
            differences = "; ".join(f"{key} was {before.get(key)!r}, is {now.get(key)!r}" for key in changed[:5])
            raise MergeError(
                f"{output} holds results of other settings ({differences}); choose another output folder, "
                "or delete this one."
            )
    elif write:
        write_text(file, json.dumps(settings, indent=2) + "\n")


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Keep Lightning from introducing itself and giving the same advice in every job; other warnings are shown."""
    loggers = [logging.getLogger(f"lightning.{part}") for part in ("pytorch", "fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PossibleUserWarning)
            warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
            warnings.filterwarnings("ignore", message=".*smaller than the logging interval.*")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _fingerprint(model: LightningModule) -> str:
    """Compute the SHA-256 digest of a model's weights, in hexadecimal."""
    digest = hashlib.sha256()
    for name, tensor in stored_tensors(model).items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _describe_callback(callback: Callback) -> dict[str, Any]:
    """Describe a callback by its class and its plain settings."""
    plain = {k: v for k, v in vars(callback).items() if isinstance(v, (bool, int, float, str)) and k[0] != "_"}
    return {"class": type(callback).__name__, **plain}


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested settings, with dots between the keys."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
