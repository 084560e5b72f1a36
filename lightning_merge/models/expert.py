"""The LightningModule that is fine-tuned on one domain."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import IO, TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_merge.checkpoints.hyper_parameters import SAFE, unsafe_arguments
from lightning_merge.models.backbones import (
    Preprocessing,
    image_tower,
    load_clip,
    load_exactly,
    python_backbone,
    split_name,
    timm_backbone,
)
from lightning_merge.models.from_file import class_problem, expert_arguments, load_checkpoint, read_hyper_parameters
from lightning_merge.models.heads import LinearHead, ZeroShotHead, zero_shot_head
from lightning_merge.models.metrics import classification_metrics
from lightning_merge.utilities.errors import MergeError, raise_all

if TYPE_CHECKING:
    from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
    from typing_extensions import Self


class Expert(LightningModule):
    """A pretrained backbone and a head, fine-tuned on one domain by the recipe of SCORE's paper.

    AdamW on all weights, a linear warm-up, then a cosine to zero; the loss is cross-entropy. The paper clips gradients
    at norm 1 (``trainer.gradient_clip_val: 1.0``) and uses batches of 128 (``data.batch_size``).

    Args:
        backbone: ``timm/MODEL``, ``open_clip/MODEL`` (its image tower), or ``python/PACKAGE.MODULE.CLASS``: any class
            of modules, or function annotated to return one, with an attribute ``num_features``, such as
            ``python/lightning_merge.models.vgg.VGG``.
        num_classes: Number of classes; may be left out where ``class_names`` are given.
        class_names: The classes in the order of the labels; the zero-shot head is built from them.
        pretrained: For timm: True for its own weights, False for none. For open_clip: a tag such as ``openai``.
            For python: False. For all: a file of weights for this backbone.
        backbone_args: Further keywords for ``timm.create_model``, ``open_clip.create_model`` or the class, such as
            ``img_size``.
        head: ``linear`` starts from zero; ``zero_shot`` is made of open_clip's text embeddings and is never trained.
        templates: Prompts for the zero-shot head, each with one ``{}``; by default CLIP's 80 for ImageNet.
        freeze_head: Train the backbone only. The zero-shot head is always frozen.
        weights: Start from these weights (a checkpoint of another ``fit``), backbone and head.
        learning_rate: Peak learning rate.
        head_learning_rate: Peak learning rate of a linear head; by default that of the backbone.
        weight_decay: Weight decay.
        warmup_steps: Steps over which the learning rate rises.
        label_smoothing: Label smoothing of the loss.
    """

    def __init__(
        self,
        backbone: str,
        num_classes: int | None = None,
        class_names: Sequence[str] | None = None,
        pretrained: bool | str = True,
        backbone_args: dict[str, Any] | None = None,
        head: Literal["linear", "zero_shot"] = "linear",
        templates: Sequence[str] = (),
        freeze_head: bool = False,
        weights: str | None = None,
        learning_rate: float = 1e-5,
        head_learning_rate: float | None = None,
        weight_decay: float = 0.1,
        warmup_steps: int = 500,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.class_names = list(class_names) if class_names else None
        self.num_classes = _count_classes(num_classes, self.class_names)
        self.backbone, self.head, self.preprocessing = self._build(backbone, pretrained, head, templates)
        if freeze_head or head == "zero_shot":
            self.head.requires_grad_(False)
        if weights is not None:
            self.load_weights(weights)
        self.metrics = classification_metrics(self.num_classes)

    @classmethod
    def load_from_checkpoint(
        cls,
        checkpoint_path: str | os.PathLike[str] | IO[bytes],
        map_location: Any = None,
        hparams_file: str | os.PathLike[str] | None = None,
        strict: bool | None = None,
        weights_only: bool | None = None,
        **said: Any,
    ) -> Self:
        """Build the expert that a checkpoint describes, with its weights. No other weights are loaded or downloaded.

        The checkpoint chooses no code: it may name backbones of timm, open_clip and this package. A backbone of your
        own (``python/…``) is named here: ``load_from_checkpoint("a.ckpt", backbone="python/my.Net")``.

        Args:
            checkpoint_path: A file of ``fit`` or ``merge``, or an open one.
            map_location: Where the weights are loaded to, as for ``torch.load``; by default the CPU.
            hparams_file: Hyper-parameters in YAML in place of those of the checkpoint.
            strict: Whether the parameters must be exactly those of the model; by default they must.
            weights_only: True, or None, which is the same here.
            said: Hyper-parameters that count more than those of the checkpoint.

        Raises:
            MergeError: If the checkpoint names code, a place to load from, or less safety, or cannot be read.
        """
        if weights_only is False:
            raise MergeError(
                "weights_only=False would run code that is stored in a file; leave it out, and save the state_dict "
                "alone where a file holds more than weights and plain values."
            )
        content = load_checkpoint(checkpoint_path, map_location or "cpu")
        stated = content.get("hyper_parameters") or {} if hparams_file is None else read_hyper_parameters(hparams_file)
        raise_all(class_problem(checkpoint_path, stated.get("_class_path"), cls))
        model = cls(**{**expert_arguments(checkpoint_path, stated, said, cls), **said})
        model.on_load_checkpoint(content)
        model.load_state_dict(content["state_dict"], strict=model.strict_loading if strict is None else strict)
        device = next((tensor.device for tensor in content["state_dict"].values()), model.device)
        return model.to(device)

    def _build(
        self, backbone: str, pretrained: bool | str, head: str, templates: Sequence[str]
    ) -> tuple[nn.Module, LinearHead | ZeroShotHead, Preprocessing]:
        """Build backbone and head; return them and the preprocessing of the images."""
        library, name = split_name(backbone)
        arguments = self.hparams["backbone_args"] or {}
        raise_all([f"backbone_args has {argument}; {SAFE}" for argument in unsafe_arguments(arguments)])
        if library != "open_clip":
            if head == "zero_shot":
                raise MergeError(f"{backbone} has no text tower to build a zero-shot head from; use open_clip/….")
            build = timm_backbone if library == "timm" else python_backbone
            model, num_features, preprocessing = build(name, pretrained, **arguments)
            return model, LinearHead(num_features, self.num_classes), preprocessing
        clip = load_clip(name, pretrained, **arguments)
        model, num_features, preprocessing = image_tower(clip)
        if head == "zero_shot":
            if self.class_names is None:
                raise MergeError("A zero-shot head is built from the names of the classes; give class_names.")
            return model, zero_shot_head(clip, name, self.class_names, templates), preprocessing
        return model, LinearHead(num_features, self.num_classes), preprocessing

    def load_weights(self, path: str) -> None:
        """Load all weights from a checkpoint.

        Raises:
            MergeError: If it does not hold exactly the parameters of this model.
        """
        load_exactly(self, path)

    def forward(self, images: Tensor) -> Tensor:
        """Map images ``(N, C, H, W)`` to logits ``(N, classes)``."""
        return self.head(self.backbone(images))

    def setup(self, stage: str) -> None:
        """Check that the data have the classes that the head has."""
        class_names = getattr(getattr(self.trainer, "datamodule", None), "class_names", None)
        if class_names is not None:
            self.check_classes(class_names)

    def check_classes(self, theirs: Sequence[str]) -> None:
        """Raise a :class:`MergeError` unless the head's classes are these, the data's, in their order."""
        if len(theirs) != self.num_classes:
            raise MergeError(
                f"The data have {len(theirs)} classes ({', '.join(theirs[:8])}…) and the head has {self.num_classes}; "
                f"set model.num_classes to {len(theirs)}."
            )
        if self.class_names and [_words(name) for name in self.class_names] != [_words(name) for name in theirs]:
            raise MergeError(
                f"The data's classes are {list(theirs)} and the head's {self.class_names}; give class_names in the "
                "order of the data's labels."
            )

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Compute the loss ``()`` of a batch of images ``(N, C, H, W)`` and labels ``(N,)``."""
        images, labels = batch
        logits = self(images)
        loss = F.cross_entropy(logits, labels, label_smoothing=self.hparams["label_smoothing"])
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Update the metrics with a batch of the validation split: images ``(N, C, H, W)`` and labels ``(N,)``."""
        self.metrics.update(self(batch[0]).float().softmax(dim=-1), batch[1])

    def on_validation_epoch_end(self) -> None:
        """Log the metrics of the validation split."""
        self._log_metrics("val")

    def on_test_start(self) -> None:
        """Set up one set of metrics for each test domain."""
        loaders = self.trainer.test_dataloaders
        count = len(loaders) if isinstance(loaders, Sequence) else 1
        datamodule = getattr(self.trainer, "datamodule", None)
        names = getattr(datamodule, "test_domains", None) or [str(i) for i in range(count)]
        self._test_metrics = {name: self.metrics.clone().to(self.device) for name in names}

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Update the metrics of a test domain with a batch of images ``(N, C, H, W)`` and labels ``(N,)``."""
        probabilities = self(batch[0]).float().softmax(dim=-1)
        list(self._test_metrics.values())[dataloader_idx].update(probabilities, batch[1])

    def on_test_epoch_end(self) -> None:
        """Log the metrics of every test domain."""
        for name, metrics in self._test_metrics.items():
            self.log_dict({f"test/{name}/{key}": value for key, value in metrics.compute().items()})

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Compute class probabilities ``(N, classes)`` of images ``(N, C, H, W)``, alone or first in a batch."""
        images = batch[0] if isinstance(batch, (tuple, list)) else batch
        return self(images).float().softmax(dim=-1)

    def _log_metrics(self, split: str) -> None:
        self.log_dict({f"{split}/{name}": value for name, value in self.metrics.compute().items()}, prog_bar=True)
        self.metrics.reset()

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Build AdamW with a linear warm-up and a cosine decay to zero, step by step."""
        hparams = self.hparams
        rate, head_rate = hparams["learning_rate"], hparams["head_learning_rate"]
        warmup = hparams["warmup_steps"]
        groups = [
            {"params": _trainable(self.backbone), "lr": rate},
            {"params": _trainable(self.head), "lr": rate if head_rate is None else head_rate},
        ]
        optimizer = torch.optim.AdamW([g for g in groups if g["params"]], weight_decay=hparams["weight_decay"])
        steps = self.trainer.estimated_stepping_batches
        if math.isinf(steps):
            raise MergeError("The learning rate falls until the end of the fit; set trainer.max_epochs or max_steps.")
        steps = int(steps)
        if warmup >= steps:
            rank_zero_warn(
                f"The learning rate rises over {warmup} steps but the whole fit has {steps}; lower model.warmup_steps."
            )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warmup_cosine(step, warmup, steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def warmup_cosine(step: int, warmup: int, total: int) -> float:
    """Compute the share of the peak learning rate at a step: linear to ``warmup``, half a cosine to ``total``."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1)))


def _trainable(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def _count_classes(num_classes: int | None, class_names: Sequence[str] | None) -> int:
    if num_classes is None and not class_names:
        raise MergeError("An expert needs num_classes or class_names.")
    if class_names and num_classes not in (None, len(class_names)):
        raise MergeError(f"num_classes is {num_classes}, but class_names has {len(class_names)} names.")
    return num_classes or len(class_names or ())


def _words(name: str) -> str:
    return name.replace("_", " ").lower()
