"""What does the command line cost before it does anything, beside the import of Lightning that it stands on?

python -m benchmarks.startup
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from benchmarks.measure import Cost, machine, measure_all, python, say, table

IMPORT = "import lightning.pytorch"
COMMANDS = {
    IMPORT: python("-c", IMPORT),
    "import torch": python("-c", "import torch"),
    "import lightning_merge": python("-c", "import lightning_merge"),
    "lightning-merge --help": python("-m", "lightning_merge", "--help"),
    "lightning-merge merge --help": python("-m", "lightning_merge", "merge", "--help"),
    "lightning-merge methods": python("-m", "lightning_merge", "methods"),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=5, help="The median is shown, after one run that warms the disk.")
    parser.add_argument("--commands", nargs="+", choices=tuple(COMMANDS), default=tuple(COMMANDS))
    given = parser.parse_args(arguments)
    commands = {name: COMMANDS[name] for name in {IMPORT: None, **dict.fromkeys(given.commands)}}
    measure_all(commands)
    costs = measure_all(commands, given.repeat)
    base = costs[IMPORT]
    rows = [
        {
            "command": f"`{name}`",
            "CPU s": cost.cpu,
            "wall s": cost.wall,
            f"CPU, `{IMPORT}` = 1": cost.cpu / base.cpu,
        }
        if isinstance(cost, Cost) and isinstance(base, Cost)
        else {"command": f"`{name}`", "CPU s": str(cost)}
        for name, cost in costs.items()
    ]
    say(f"\n{machine(f'median of {given.repeat}')}\n\n{table(rows)}")


if __name__ == "__main__":
    main()
