"""Reading a merge's manifest: its inputs, its method, and the YAML that makes it again."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import PurePath
from typing import Any

from lightning_merge import methods
from lightning_merge.checkpoints.hub import HUB
from lightning_merge.checkpoints.paths import is_url
from lightning_merge.methods import MergeMethod
from lightning_merge.methods.base.matrices import Matrices
from lightning_merge.utilities.grid import Cell, Grid

SYMBOLS = (
    "`Δ_t` is what expert t of T changes of the base, with the singular vectors `U_t`, `V_t` and values `σ_t`; `τ` is "
    "the update, `θ` and `W` are weights; `∘` multiplies entry by entry. The merged model is the base + scale · `τ`."
)
"""What stands in the formulas of methods, in Markdown."""
_ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")


def recipe(manifest: Mapping[str, Any], output: str) -> dict[str, Any]:
    """Build the configuration of ``lightning-merge merge`` that makes a merge again, without arguments by default.

    Args:
        manifest: The manifest of the merge; nothing in it stands in the way, see :func:`obstacles`.
        output: The file or folder to write.
    """
    arguments = {
        "base": source_of(manifest["base"]),
        "experts": {name: source_of(expert) for name, expert in manifest["experts"].items()},
        "method": manifest["method"],
        "statistics": {name: source_of(source) for name, source in manifest["statistics"].items()},
        "include": manifest["include"],
        "exclude": manifest["exclude"],
        "matrices": manifest["matrices"] if manifest["matrices"] != _plain(asdict(Matrices())) else None,
        "allow_non_finite": manifest["allow_non_finite"],
        "seed": manifest["seed"],
        "output": output,
    }
    always = {"base", "experts", "method", "seed", "output", *(["include"] if manifest["include"] is not None else [])}
    return _plain({name: value for name, value in arguments.items() if value or name in always})


def recipe_text(manifest: Mapping[str, Any], output: str) -> str:
    """Write the recipe as YAML, see :func:`recipe`."""
    import yaml

    return yaml.safe_dump(recipe(manifest, output), sort_keys=False, allow_unicode=True)


def obstacles(manifest: Mapping[str, Any]) -> list[str]:
    """List why no YAML makes a merge again: clauses that follow "because"."""
    clauses = []
    if "mean_of" in manifest["base"] or any("permutation" in expert for expert in manifest["experts"].values()):
        clauses.append("the experts' channels were aligned before")
    elif manifest["base"]["path"] is None:
        clauses.append("the base came from memory")
    for what, models in (("expert", manifest["experts"]), ("statistics of the expert", manifest["statistics"])):
        clauses += [f"the {what} {name} came from memory" for name, model in models.items() if model["path"] is None]
    if "repair" in manifest:
        clauses.append("the merged model was repaired on images")
    for method in layers(manifest["method"]):
        cls = method_class(method)
        if cls is None:
            clauses.append(f"{method['class_path']} is no method of lightning_merge itself")
        elif cls.needs_data is True:
            clauses.append(f"{method['class_path']} ran the model on images")
    if manifest["dtype"] is not None:
        clauses.append(
            f"it was computed in {manifest['dtype'].removeprefix('torch.')}, which only Python's `merge` takes"
        )
    return clauses


def source_of(provenance: Mapping[str, Any]) -> str | None:
    """Name a model as an input: by its file, the folder of an adapter, or its name and commit on the Hub."""
    if provenance.get("path") is None:
        return None
    path = PurePath(provenance["path"])
    if is_url(provenance["path"]):
        return provenance["path"].removesuffix(f"/{path.name}" if path.name in _ADAPTERS else "")
    for i, part in enumerate(path.parts[:-2]):  # as huggingface_hub lays out its cache
        if part.startswith("models--") and path.parts[i + 1] == "snapshots":
            return f"{HUB}{part.removeprefix('models--').replace('--', '/', 1)}@{path.parts[i + 2]}"
    return str(path.parent if path.name in _ADAPTERS else path)


def models_grid(manifest: Mapping[str, Any]) -> Grid:
    """Tabulate the base, the experts, and the statistics of their data, with the hashes of all files."""
    models = [("base", "", manifest["base"])]
    models += [("expert", name, expert) for name, expert in manifest["experts"].items()]
    models += [("statistics", name, source) for name, source in manifest["statistics"].items()]
    rows = []
    for kind, name, provenance in models:
        source = source_of(provenance) or ("the mean of the foundations" if "mean_of" in provenance else "in memory")
        digests = provenance.get("sha256")
        several = digests if isinstance(digests, Mapping) else {"": digests or ""}
        for file, digest in several.items():
            rows.append([Cell(kind), Cell(name), Cell(f"{source}: {file}" if file else source), Cell(digest)])
    return Grid(["", "name", "from", "sha256"], rows)


def summary_of(cls: type[MergeMethod]) -> str:
    """Take the summary of a method from the first paragraph of its docstring."""
    return re.sub(r":[a-z]+:`", "`", " ".join((cls.__doc__ or "").split("\n\n")[0].split()))


def layers(method: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield a method, as :meth:`MergeMethod.describe` gives it, and those inside it, from the outside in."""
    yield method
    for value in method["init_args"].values():
        if isinstance(value, Mapping) and "class_path" in value:
            yield from layers(value)


def method_class(method: Mapping[str, Any]) -> type[MergeMethod] | None:
    """Find the class of a method that is described; None if it is not one of this package."""
    cls = getattr(methods, method["class_path"], None) if method["class_path"] in methods.__all__ else None
    return cls if isinstance(cls, type) and issubclass(cls, MergeMethod) else None


def _plain(value: Any) -> Any:
    """Convert tuples to lists, and mappings to dictionaries, at every depth."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
