"""``python -m lightning_merge`` is ``lightning-merge``."""

from __future__ import annotations

import sys


def main(args: list[str] | None = None) -> None:
    """Run ``lightning-merge``; ``methods`` needs neither Lightning nor a model, and does not wait for their import."""
    given = sys.argv[1:] if args is None else args
    if given[:1] == ["methods"]:
        from lightning_merge.methods.catalog import main as show_methods

        show_methods(given[1:])
    else:
        from lightning_merge.trainer.cli import main as run

        run(args)


if __name__ == "__main__":
    main()
