"""The verbs of the trainer, one file each."""
