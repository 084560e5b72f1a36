"""Heads that make experts comparable: all start from the same weights, or are never trained at all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from open_clip import CLIP


class LinearHead(nn.Linear):
    """A linear classifier that starts from zero, so that every expert's head starts from the same point.

    Args:
        num_features: Width of the backbone's features.
        num_classes: Number of classes.
    """

    def __init__(self, num_features: int, num_classes: int) -> None:
        super().__init__(num_features, num_classes)
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)


class ZeroShotHead(nn.Module):
    """A frozen classifier made of text embeddings: ``logit_scale * normalize(features) @ weight.T``.

    Args:
        weight: ``(C, D)``, one normalised embedding a class.
        logit_scale: What cosine similarities are multiplied by.
    """

    weight: Tensor
    logit_scale: Tensor

    def __init__(self, weight: Tensor, logit_scale: float) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("logit_scale", torch.tensor(float(logit_scale)))

    def forward(self, features: Tensor) -> Tensor:
        """Map features ``(N, D)`` to logits ``(N, C)``."""
        return self.logit_scale * F.normalize(features, dim=-1) @ self.weight.T


def zero_shot_head(clip: CLIP, name: str, class_names: Sequence[str], templates: Sequence[str]) -> ZeroShotHead:
    """Build the zero-shot head of an open_clip model: templates averaged and normalised, as CLIP's paper does.

    Args:
        clip: The model, with its text tower.
        name: Its name, which tells the tokenizer.
        class_names: The classes; underscores are read as blanks.
        templates: Prompts with one ``{}`` each, such as ``a photo of a {}.``; none for CLIP's 80 for ImageNet.
    """
    import open_clip

    weight = open_clip.build_zero_shot_classifier(
        clip,
        tokenizer=open_clip.get_tokenizer(name),
        classnames=[class_name.replace("_", " ") for class_name in class_names],
        templates=list(templates) or open_clip.OPENAI_IMAGENET_TEMPLATES,
    )  # (D, C)
    return ZeroShotHead(weight.T.contiguous().detach(), clip.logit_scale.exp().item())
