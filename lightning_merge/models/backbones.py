"""Pretrained backbones from timm and open_clip, and the preprocessing that each was trained with."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lightning_merge.errors import MergeError

if TYPE_CHECKING:
    from open_clip import CLIP


@dataclass(frozen=True)
class Preprocessing:
    """How images are prepared for a backbone.

    Args:
        size: Height and width, in pixels.
        mean: Mean per channel, of images scaled to [0, 1].
        std: Standard deviation per channel.
        interpolation: ``bicubic``, ``bilinear`` or ``nearest``.
        crop: Share of the resized image's shorter side that the central crop keeps, in (0, 1].
    """

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    crop: float = 1.0


def split_name(backbone: str) -> tuple[str, str]:
    """Split ``library/model`` into its parts.

    Raises:
        MergeError: If the library is neither ``timm`` nor ``open_clip``.
    """
    library, _, name = backbone.partition("/")
    if library not in ("timm", "open_clip") or not name:
        raise MergeError(
            f"The backbone {backbone!r} names no library; write timm/MODEL or open_clip/MODEL, "
            "such as timm/vit_base_patch16_224 or open_clip/ViT-B-32."
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

    overlay: Mapping[str, Any] | None = None
    if isinstance(pretrained, str):
        overlay = {"file": require_file(pretrained)}
    try:
        model = timm.create_model(
            name, pretrained=bool(pretrained), pretrained_cfg_overlay=overlay, num_classes=0, **arguments
        )
    except RuntimeError as error:
        if "Unknown model" not in str(error):
            raise
        raise MergeError(f"timm has no model {name!r}; `timm.list_models()` lists those it has.") from error
    config = timm.data.resolve_data_config(
        {key: value for key, value in arguments.items() if key in ("img_size", "in_chans")}, model=model
    )
    preprocessing = Preprocessing(
        size=tuple(config["input_size"][1:]),
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        interpolation=config["interpolation"],
        crop=config["crop_pct"],
    )
    return model, model.num_features, preprocessing


def load_clip(name: str, pretrained: bool | str, **arguments: Any) -> CLIP:
    """Build an open_clip model, both towers.

    Args:
        name: Any name that ``open_clip.create_model`` takes (``ViT-B-32``, ``hf-hub:…``, ``local-dir:…``).
        pretrained: A tag (``openai``, ``laion2b_s34b_b79k``, …) or a file of weights; False for random weights.
        arguments: Any keyword that ``open_clip.create_model`` takes.
    """
    import open_clip

    if pretrained is True:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
        raise MergeError(f"Say which weights open_clip should load for {name}: pretrained={tags}, or a file.")
    return open_clip.create_model(name, pretrained=pretrained or None, require_pretrained=bool(pretrained), **arguments)


def image_tower(clip: CLIP) -> tuple[nn.Module, int, Preprocessing]:
    """The image tower of an open_clip model, as :func:`timm_backbone` returns a backbone. The text tower is let go."""
    config = clip.visual.preprocess_cfg
    size = config["size"]
    preprocessing = Preprocessing(
        size=(size, size) if isinstance(size, int) else tuple(size),
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        interpolation=config["interpolation"],
    )
    return clip.visual, clip.visual.output_dim if hasattr(clip.visual, "output_dim") else _width(clip), preprocessing


def _width(clip: CLIP) -> int:
    """The embedding width of a CLIP whose image tower does not say it (those built by timm)."""
    projection: Tensor | None = getattr(clip, "text_projection", None)
    return projection.shape[1] if projection is not None else clip.text.output_dim


def require_file(path: str) -> str:
    """Return the path, or raise a :class:`MergeError` if there is no such file."""
    if not os.path.isfile(path):
        raise MergeError(f"There is no weight file {path}; check pretrained=…, or use True for the hub's weights.")
    return path
