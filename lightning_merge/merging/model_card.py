"""The model card: ``README.md`` beside a merged model, with the metadata that the Hugging Face Hub reads."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from lightning_merge.checkpoints import check_parent
from lightning_merge.checkpoints.folders import CARD, is_folder, weights_name
from lightning_merge.checkpoints.hub import HUB
from lightning_merge.checkpoints.paths import local_path
from lightning_merge.merging.recipe import (
    SYMBOLS,
    layers,
    method_class,
    models_grid,
    obstacles,
    recipe_text,
    source_of,
    summary_of,
)
from lightning_merge.utilities.errors import MergeError
from lightning_merge.utilities.grid import Cell, Grid, as_markdown, one_line
from lightning_merge.utilities.schemas import load_json, load_yaml

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCard, ModelCardData


_ROW = "merged"
"""The row of a table that is about the merged model."""


class Scores(Protocol):
    """Scores of a merged model, such as :class:`lightning_merge.evaluation.Table`."""

    @property
    def records(self) -> Sequence[Mapping[str, Any]]:
        """One record for each row and domain."""

    def grid(self) -> Grid:
        """Tabulate the scores."""


def model_card(manifest: Mapping[str, Any], output: str | os.PathLike[str], scores: Scores | None = None) -> ModelCard:
    """Describe a merged model: method, experts, scores, and how to make it again.

    Args:
        manifest: How it was made, see :class:`lightning_merge.merging.merged.Merged`.
        output: The file or folder that it is written to.
        scores: What was measured; the row ``merged`` becomes the model index.
    """
    from huggingface_hub import ModelCard

    name = one_line(Path(output).name)
    experts = [one_line(expert) for expert in manifest["experts"]]
    what = " around ".join(method["class_path"] for method in layers(manifest["method"]))
    count = f"{len(experts)} fine-tuned model{'' if len(experts) == 1 else 's'}"
    parts = [
        f"# {as_markdown(name)}",
        f"{count} ({as_markdown(', '.join(experts))}) of one base, merged by {as_markdown(what)} into one model, "
        f"without further training, by lightning_merge {manifest['versions']['lightning_merge']}.",
        "## Method",
        *_method(manifest),
        "## Models",
        models_grid(manifest).markdown(),
        *(["## Scores", scores.grid().markdown()] if scores is not None else []),
        "## How to make it again",
        *_recipe(manifest, name),
        "## Versions",
        ", ".join(f"{package} {version}" for package, version in manifest["versions"].items()),
    ]
    data = _metadata(manifest, output, name, scores)
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n")


def check_card(path: str | os.PathLike[str]) -> None:
    """Raise a :class:`MergeError` if no model card can be written to ``path``: to be called before any work."""
    path = local_path(path)
    if path.suffix != ".md" or path.is_dir():
        raise MergeError(f"A model card is a Markdown file, and {path} is not the name of one; end it in .md.")
    check_parent(path)


def _method(manifest: Mapping[str, Any]) -> Iterator[str]:
    """Yield every method, the outer one first: its paper, what it does, its formula and arguments."""
    has_formula = False
    for method in layers(manifest["method"]):
        cls = method_class(method)
        text = f"**{as_markdown(method['class_path'])}**"
        if cls is not None and cls.paper is not None:
            link = f"https://arxiv.org/abs/{cls.paper.arxiv}"
            text += f" ([{cls.paper}]({link}))" if cls.paper.arxiv else f" ({cls.paper})"
        if cls is not None:
            text += f": {summary_of(cls)}"
        yield text
        if cls is not None and cls.formula is not None:
            has_formula = True
            yield _fenced(cls.formula, "text")
        rows = [
            [Cell(key), Cell(f"{value['class_path']}, see below" if isinstance(value, Mapping) else _value(value))]
            for key, value in method["init_args"].items()
        ]
        yield Grid(["argument", "value"], rows).markdown()
    if has_formula:
        yield SYMBOLS
    if "repair" in manifest:
        yield "The merged model was then repaired: " + as_markdown(_value(manifest["repair"])) + "."


def _recipe(manifest: Mapping[str, Any], name: str) -> Iterator[str]:
    """Yield the YAML and how to run it; or why there is none."""
    reasons = obstacles(manifest)
    if reasons:
        yield f"No configuration alone makes this model again, because {as_markdown('; '.join(reasons))}."
        return
    yield (
        "With this as `recipe.yaml`, in the folder that the paths start from, `lightning-merge merge --config "
        "recipe.yaml` makes it again:"
    )
    yield _fenced(recipe_text(manifest, name).rstrip(), "yaml")
    if manifest["device"] != "cpu":
        yield f"It was computed on {manifest['device']}; on another kind of device the last bits may differ."


def _metadata(
    manifest: Mapping[str, Any], output: str | os.PathLike[str], name: str, scores: Scores | None
) -> ModelCardData:
    from huggingface_hub import ModelCardData

    models = [manifest["base"], *manifest["experts"].values()]
    sources = [source_of(model) for model in models]
    on_hub = [source.removeprefix(HUB).partition("@")[0] for source in sources if source and source.startswith(HUB)]
    results = _results(scores) if scores is not None else []
    return ModelCardData(
        library_name=_library(manifest["base"]) if is_folder(output) else None,
        license=_license(models),
        base_model=list(dict.fromkeys(on_hub)) or None,
        base_model_relation="merge" if on_hub else None,
        tags=["merge", "lightning_merge", *(method["class_path"] for method in layers(manifest["method"]))],
        model_name=name if results else None,
        eval_results=results or None,
    )


def _results(scores: Scores) -> list[EvalResult]:
    """List the accuracy on every domain where there is one."""
    from huggingface_hub import EvalResult

    results = []
    for record in scores.records:
        accuracy, domain = record.get("accuracy"), one_line(record["domain"])
        if record["row"] != _ROW or accuracy is None or not math.isfinite(accuracy):
            continue
        results.append(
            EvalResult(
                task_type="image-classification",
                dataset_type=re.sub(r"\W+", "-", domain.lower()).strip("-") or "unknown",
                dataset_name=domain,
                dataset_config=domain,
                dataset_split=record.get("test_on"),
                metric_type="accuracy",
                metric_value=accuracy,
            )
        )
    return results


def _library(base: Mapping[str, Any]) -> str | None:
    """Find which library reads a folder like the base's; None where its configuration does not say."""
    if base.get("path") is None:
        return None
    path = local_path(base["path"])
    if weights_name(path).startswith("open_clip"):
        return "open_clip"
    try:
        config = load_json((path.parent / "config.json").read_bytes())
    except (OSError, ValueError):
        return "open_clip" if (path.parent / "open_clip_config.json").is_file() else None
    libraries = {"pretrained_cfg": "timm", "model_type": "transformers"}
    return next((library for key, library in libraries.items() if isinstance(config, dict) and key in config), None)


def _license(models: list[Mapping[str, Any]]) -> str | None:
    """Find the licence that the cards of the base and of all experts name; None if they name several, or none."""
    licences = {_license_beside(local_path(model["path"])) if model.get("path") else None for model in models}
    licence = licences.pop()
    return licence if not licences and licence != "other" else None


def _license_beside(path: Path) -> str | None:
    try:
        text = (path.parent / CARD).read_text(encoding="utf-8-sig")
        data = load_yaml(text.removeprefix("---").partition("\n---")[0]) if text.startswith("---") else None
    except (OSError, ValueError):  # no card, or none that can be read
        return None
    named = data.get("license") if isinstance(data, dict) else None
    return named if isinstance(named, str) else None


def _value(value: Any) -> str:
    """Write a value as YAML in one line."""
    import yaml

    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, allow_unicode=True, width=math.inf)
    return text.removesuffix("\n").removesuffix("\n...")


def _fenced(text: str, language: str) -> str:
    """Put text between fences that do not occur in it."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"
