"""The metrics that every expert and every merged model is measured by."""

from __future__ import annotations

from torchmetrics import MetricCollection
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassCalibrationError,
    MulticlassF1Score,
    MulticlassRecall,
)

METRICS = ("accuracy", "balanced_accuracy", "f1", "calibration_error")


def classification_metrics(num_classes: int) -> MetricCollection:
    """Build accuracy, balanced accuracy (mean recall), macro F1 and expected calibration error (15 bins), in [0, 1].

    Update them with probabilities ``(N, classes)`` and labels ``(N,)``: torchmetrics takes logits for probabilities
    where all of a batch happen to lie in [0, 1].
    """
    return MetricCollection(
        {
            "accuracy": MulticlassAccuracy(num_classes, average="micro"),
            "balanced_accuracy": MulticlassRecall(num_classes, average="macro"),
            "f1": MulticlassF1Score(num_classes, average="macro"),
            "calibration_error": MulticlassCalibrationError(num_classes, n_bins=15),
        }
    )
