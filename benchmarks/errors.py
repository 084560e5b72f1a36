"""How far files are from a reference, over all its matrices; what ``speed.py`` runs as a process of its own.

python -m benchmarks.errors reference.safetensors merged.safetensors …
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence


def relative_error(reference: str, merged: str) -> float:
    """The Frobenius norm of the difference over all matrices, as a share of that of the reference."""
    from safetensors import safe_open

    difference = norm = 0.0
    with safe_open(reference, "pt") as exact, safe_open(merged, "pt") as other:
        for name in exact.keys():  # noqa: SIM118, no mapping
            tensor = exact.get_tensor(name).double()
            if tensor.ndim == 2:
                difference += (other.get_tensor(name).double() - tensor).square().sum().item()
                norm += tensor.square().sum().item()
    return (difference / norm) ** 0.5


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the errors of files as a JSON object."""
    reference, *files = sys.argv[1:] if arguments is None else arguments
    sys.stdout.write(json.dumps({file: relative_error(reference, file) for file in files}) + "\n")


if __name__ == "__main__":
    main()
