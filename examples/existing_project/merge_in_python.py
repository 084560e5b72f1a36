"""The same with Lightning's Trainer and callbacks alone, after the runs of the README."""

from data import ScannedDigits
from lightning.pytorch import Trainer
from lightning_merge.callbacks import MergeAfterFit
from model import SmallNet

from lightning_merge.methods import TIES

if __name__ == "__main__":
    base = "runs/base/best.ckpt"
    merge = MergeAfterFit(base, ["runs/grey/best.ckpt"], method=TIES(), output="runs/python.ckpt")
    model, data = SmallNet(start=base), ScannedDigits("shifted")
    trainer = Trainer(max_epochs=1, callbacks=[merge], logger=False, enable_checkpointing=False)
    trainer.fit(model, datamodule=data)
    trainer.test(model, datamodule=ScannedDigits("all"), ckpt_path="runs/python.ckpt")
