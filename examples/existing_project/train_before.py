"""The project as it was: Lightning's own command line."""

from data import ScannedDigits
from lightning.pytorch.cli import LightningCLI
from model import SmallNet
from trainer import ProjectTrainer

from callbacks import CountSamples

if __name__ == "__main__":
    LightningCLI(
        SmallNet,
        ScannedDigits,
        trainer_class=ProjectTrainer,
        trainer_defaults={"callbacks": [CountSamples()], "max_epochs": 4},
        seed_everything_default=0,
        save_config_kwargs={"overwrite": True},
    )
