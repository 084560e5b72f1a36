"""The project with merging: `MergeCLI` for `LightningCLI`, and its Trainer with the verbs of `MergeTrainer`."""

from data import ScannedDigits
from model import SmallNet
from trainer import ProjectTrainer

from callbacks import CountSamples
from lightning_merge import MergeCLI, MergeTrainer


class MergingTrainer(MergeTrainer, ProjectTrainer):
    """The project's Trainer, which can merge."""


if __name__ == "__main__":
    MergeCLI(
        SmallNet,
        ScannedDigits,
        trainer_class=MergingTrainer,
        trainer_defaults={"callbacks": [CountSamples()], "max_epochs": 4},
        seed_everything_default=0,
        save_config_kwargs={"overwrite": True},
    )
