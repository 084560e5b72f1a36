"""``python -m lightning_merge`` is ``lightning-merge``."""

from lightning_merge.cli import main

if __name__ == "__main__":
    main()
