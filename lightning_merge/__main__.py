"""``python -m lightning_merge`` is ``lightning-merge``."""

from __future__ import annotations

import sys


def main(args: list[str] | None = None) -> None:
    """Run ``lightning-merge``; ``methods`` needs neither Lightning nor a model, and does not wait for their import."""
    args = sys.argv[1:] if args is None else args
    if args[:1] == ["methods"]:
        from lightning_merge.catalog import main as show_methods

        show_methods(args[1:])
    else:
        from lightning_merge.cli import main as run

        run(args)


if __name__ == "__main__":
    main()
