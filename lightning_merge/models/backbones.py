"""Backbones from timm, open_clip and any Python package, and the preprocessing that each was trained with."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast, get_type_hints

import torch
from torch import Tensor, nn

from lightning_merge.checkpoints import open_weights
from lightning_merge.checkpoints.files import first_line
from lightning_merge.utilities.errors import MergeError, raise_all

if TYPE_CHECKING:
    from open_clip import CLIP


@dataclass(frozen=True)
class Preprocessing:
    """Preparation of images for a backbone.

    Args:
        size: Height and width, in pixels.
        mean: Mean per channel, of images scaled to [0, 1].
        std: Standard deviation per channel.
        interpolation: ``bicubic``, ``bilinear`` or ``nearest``.
        crop: Share of the resized image's sides that the central crop keeps, in (0, 1].
        resize: ``shortest`` side to the size and crop the rest, ``longest`` side and fill the rest, or ``squash``.
    """

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    crop: float = 1.0
    resize: str = "shortest"


def split_name(backbone: str) -> tuple[str, str]:
    """Split ``library/model`` into its parts.

    Raises:
        MergeError: If the library is neither ``timm`` nor ``open_clip`` nor ``python``.
    """
    library, _, name = backbone.partition("/")
    if library not in ("timm", "open_clip", "python") or not name:
        raise MergeError(
            f"The backbone {backbone!r} names no library; write timm/MODEL or open_clip/MODEL, such as "
            "timm/vit_base_patch16_224 or open_clip/ViT-B-32, or python/PACKAGE.MODULE.CLASS for one of your own."
        )
    return library, name


def timm_backbone(name: str, pretrained: bool | str, **arguments: Any) -> tuple[nn.Module, int, Preprocessing]:
    """Build a timm model without its classifier.

    Args:
        name: Any name that ``timm.create_model`` takes.
        pretrained: True for timm's own weights, False for none, or a file of weights for this architecture.
        arguments: Any keyword that ``timm.create_model`` takes.

    Returns:
        The model, which maps images to features; the number of features; the preprocessing.
    """
    import timm

    overlay: dict[str, Any] | None = None
    if isinstance(pretrained, str):
        overlay = {"file": require_file(pretrained)}

    def build(pretrained: bool) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            return timm.create_model(
                name, pretrained=pretrained, pretrained_cfg_overlay=overlay, num_classes=0, **arguments
            )

    try:
        model = build(bool(pretrained))
    except Exception as error:  # timm, the hub, and the model's own constructor raise many kinds
        hint = "; `timm.list_models()` lists those it has" if "Unknown model" in str(error) else ""
        raise MergeError(f"timm has no model {name!r} that could be built: {first_line(error)}{hint}.") from error
    if isinstance(pretrained, str):
        _check_loaded(model, build(False), pretrained)
    config = timm.data.resolve_data_config(
        {key: value for key, value in arguments.items() if key in ("img_size", "in_chans")}, model=model
    )
    preprocessing = Preprocessing(
        size=tuple(config["input_size"][1:]),
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        interpolation=config["interpolation"],
        crop=config["crop_pct"],
        resize={"center": "shortest", "border": "longest"}.get(config["crop_mode"], config["crop_mode"]),
    )
    return model, cast(int, model.num_features), preprocessing


def _check_loaded(model: nn.Module, random: nn.Module, path: str) -> None:
    """Raise a :class:`MergeError` if a file left parameters at their random initialisation; timm itself only logs it.

    Args:
        model: The model after loading.
        random: The same model with the same random numbers, without loading.
        path: The file.
    """
    start = dict(random.named_parameters())
    same = [
        key
        for key, parameter in model.named_parameters()
        if torch.equal(parameter, start[key]) and parameter.numel() > 1 and parameter.detach().float().std() > 0
    ]
    if same:
        raise MergeError(
            f"{path} holds no weights for {len(same)} parameters of this backbone ({', '.join(same[:3])}…), which "
            "would stay random; is it of another architecture? The checkpoint of an expert goes to weights=…"
        )


def load_clip(name: str, pretrained: bool | str, **arguments: Any) -> CLIP:
    """Build an open_clip model, both towers.

    Args:
        name: Any name that ``open_clip.create_model`` takes (``ViT-B-32``, ``hf-hub:…``, ``local-dir:…``).
        pretrained: A tag (``openai``, ``laion2b_s34b_b79k``, …) or a file of weights; False for random weights. True
            where the name says where the weights are (``hf-hub:``, ``local-dir:``).
        arguments: Any keyword that ``open_clip.create_model`` takes.
    """
    import open_clip

    if pretrained is True and ":" not in name:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
        raise MergeError(f"Say which weights open_clip should load for {name}: pretrained={tags}, or a file.")
    weights: dict[str, Any]
    if ":" in name:  # hf-hub: and local-dir: bring their own weights
        weights = {"load_weights": bool(pretrained)}
    else:
        weights = {"pretrained": pretrained or None, "require_pretrained": bool(pretrained)}
    if isinstance(pretrained, str) and os.path.isfile(pretrained):
        require_file(pretrained)
    try:
        return open_clip.create_model(name, **weights, **arguments)
    except Exception as error:  # open_clip and the hub raise many kinds
        reason = first_line(error)
        raise MergeError(f"open_clip could not build {name!r} with weights {pretrained!r}: {reason}.") from error


def image_tower(clip: CLIP) -> tuple[nn.Module, int, Preprocessing]:
    """Return the image tower of an open_clip model, without the text tower, as :func:`timm_backbone` does."""
    config = clip.visual.preprocess_cfg
    size = config["size"]
    preprocessing = Preprocessing(
        size=(size, size) if isinstance(size, int) else tuple(size),
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        interpolation=config["interpolation"],
        resize=config.get("resize_mode", "shortest"),
    )
    return clip.visual, clip.visual.output_dim if hasattr(clip.visual, "output_dim") else _width(clip), preprocessing


def _width(clip: CLIP) -> int:
    """Return the embedding width of a CLIP whose image tower does not say it (those built by timm)."""
    projection: Tensor | None = getattr(clip, "text_projection", None)
    return projection.shape[1] if projection is not None else clip.text.output_dim


def python_backbone(path: str, pretrained: bool | str, **arguments: Any) -> tuple[nn.Module, int, Preprocessing]:
    """Build a backbone of the user's own, as :func:`timm_backbone` returns one.

    Args:
        path: ``package.module.Callable``: a class of modules, or a function that is annotated to return one; nothing
            else is called, since the name may stand in a checkpoint of somebody else's. The module maps images to
            features ``(N, num_features)``; it has an attribute ``num_features`` and may have one ``preprocessing``.
            Without it images are resized to the argument ``img_size`` or else to 224, with mean and std 0.5.
        pretrained: False for what the callable returns, or a file of weights for it.
        arguments: Keywords of the callable.
    """
    try:
        model = _attribute(path)(**arguments)
    except MergeError:
        raise
    except Exception as error:  # the callable is the user's own
        raise MergeError(f"{path} could not be called with {arguments or 'no arguments'}: {error!r}.") from error
    features = getattr(model, "num_features", None)
    if not isinstance(model, nn.Module) or not isinstance(features, int):
        raise MergeError(
            f"{path} returned a {type(model).__name__} without num_features; a backbone is an nn.Module with an "
            "attribute num_features, the width of what it returns."
        )
    if pretrained is True:
        raise MergeError(f"{path} has no pretrained weights to download; set pretrained to false or to a file.")
    if pretrained:
        load_exactly(model, pretrained)
    size, channels = arguments.get("img_size", 224), arguments.get("in_chans", 3)
    default = Preprocessing(
        (size, size) if isinstance(size, int) else tuple(size), (0.5,) * channels, (0.5,) * channels
    )
    return model, features, getattr(model, "preprocessing", default)


def _attribute(path: str) -> Callable[..., Any]:
    """Import what ``package.module.Callable`` names."""
    module, _, name = path.rpartition(".")
    if not module:
        raise MergeError(f"The backbone python/{path} names no module; write python/PACKAGE.MODULE.CLASS.")
    try:
        attribute = getattr(importlib.import_module(module), name, None)
    except ImportError as error:
        raise MergeError(
            f"The module of the backbone python/{path} cannot be imported: {error}; is its folder on PYTHONPATH?"
        ) from error
    if not callable(attribute):
        raise MergeError(f"The module {module} has no class or function {name!r} for the backbone python/{path}.")
    if not _makes_modules(attribute):
        raise MergeError(
            f"python/{path} is neither a class of modules nor a function that is annotated to return one, and is not "
            "called; write `-> nn.Module` behind its arguments if it is a backbone of yours."
        )
    return attribute


def _makes_modules(maker: Any) -> bool:
    """Tell whether something is a class of modules, or a function that says it returns one."""
    try:
        kind = maker if isinstance(maker, type) else get_type_hints(maker).get("return")
    except (NameError, TypeError):
        return False
    return isinstance(kind, type) and issubclass(kind, nn.Module)


def load_exactly(model: nn.Module, path: str) -> None:
    """Load the weights of a file into a model.

    Raises:
        MergeError: If it does not hold exactly the parameters of this model.
    """
    weights = open_weights(path)
    state = model.state_dict()
    raise_all(
        [f"{path} lacks {name!r} of this model; is it of another backbone or head?" for name in state.keys() - weights]
        + [f"{path} has {name!r}, which this model lacks." for name in weights.keys() - state.keys()]
        + [
            f"{name!r} has shape {tuple(weights.meta[name].shape)} in {path} and {tuple(state[name].shape)} here."
            for name in state
            if name in weights and weights.meta[name].shape != state[name].shape
        ]
    )
    model.load_state_dict(dict(weights))


def require_file(path: str) -> str:
    """Return the path, or raise a :class:`MergeError` if there is no such file, or if it holds more than weights."""
    if not os.path.isfile(path):
        raise MergeError(f"There is no weight file {path}; check pretrained=…, or use True for the hub's weights.")
    if not path.endswith((".npz", ".npy")):  # timm and open_clip read these without pickle, and others with it
        open_weights(path)
    return path
