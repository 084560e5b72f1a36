"""Fit with MergeAfterFit and evaluate what it has written: the script that test_many_processes.py launches."""

from __future__ import annotations

import json
import sys

import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_merge.callbacks import MergeAfterFit

import lightning_merge as lm
from lightning_merge.methods import TIES
from tests.toys import quiet_trainer, tiny_expert


def main(**arguments) -> None:
    data = lm.Digits(train_domains=["noisy"], test_domains=["thick"])
    callbacks = [ModelCheckpoint("run", filename="last"), MergeAfterFit("base.pt", ["old.pt"], TIES())]
    limits = {"enable_checkpointing": True, "max_epochs": 1, "limit_train_batches": 2, "limit_val_batches": 0}
    trainer = quiet_trainer(callbacks=callbacks, **limits, **arguments)
    trainer.fit(tiny_expert(weights="base.pt"), datamodule=data)
    trainer.evaluate(tiny_expert(), data, {"merged": "merged.ckpt"}, output="table")
    dist.destroy_process_group()  # a process that ends with the group's threads still running is aborted now and then


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
