"""A linear probe: how well a linear classifier separates the classes by a model's features."""

from __future__ import annotations

from torch import Tensor

from lightning_merge.utilities.errors import raise_all

Features = tuple[Tensor, Tensor]
"""Features ``(N, channels)`` and labels ``(N,)``, as :func:`~lightning_merge.analysis.embed` returns them."""


def linear_probe(train: Features, test: Features, decay: float = 1e-4, steps: int = 1000) -> float:
    """Fit a linear classifier to the features of a model, and measure it on others (Alain and Bengio, 2016).

    The classifier is scikit-learn's multinomial logistic regression on standardized features. It never becomes a part
    of the model: :func:`lightning_merge.repair.probe_head` is what makes a new head for one.

    Args:
        train: The samples that it is fitted to.
        test: The samples that it is measured on; they are refused if most of them are in ``train``, too.
        decay: How much large weights cost: the mean cross-entropy plus ``decay/2 · ‖W‖²``.
        steps: The maximum number of iterations of L-BFGS.

    Returns:
        The accuracy on ``test``, in [0, 1]; a class that is not in ``train`` counts as wrong.

    Raises:
        MergeError: If features and labels do not fit together, are not finite, or are mostly the same in both.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    raise_all(_problems(train, test, decay, steps))
    (x, y), (x_test, y_test) = (
        (features.double().cpu().numpy(), labels.cpu().numpy()) for features, labels in (train, test)
    )
    classifier = LogisticRegression(C=1 / (len(x) * decay), max_iter=steps)
    return float(make_pipeline(StandardScaler(), classifier).fit(x, y).score(x_test, y_test))


def _problems(train: Features, test: Features, decay: float, steps: int) -> list[str]:
    problems = []
    if decay <= 0 or steps < 1:
        problems.append(f"A linear probe needs a decay above 0 and at least one step, got {decay} and {steps}.")
    for name, (features, labels) in (("train", train), ("test", test)):
        if labels is None:
            problems.append(f"The features to {name} on have no labels; embed batches of (images, labels).")
        elif features.ndim != 2 or labels.shape != features.shape[:1] or not len(features):
            problems.append(
                f"The features to {name} on must be (N, channels) with N labels, got {tuple(features.shape)} and "
                f"{tuple(labels.shape)}."
            )
        elif not bool(features.isfinite().all()):
            problems.append(f"The features to {name} on hold values that are not finite; did the model diverge?")
    if problems:
        return problems
    if train[0].shape[1] != test[0].shape[1]:
        problems.append(
            f"Features of {train[0].shape[1]} and of {test[0].shape[1]} channels are not of one model's site."
        )
    elif len(train[1].unique()) < 2:
        problems.append("A linear probe needs at least two classes to tell apart.")
    else:
        problems += _shared(train[0], test[0])
    return problems


def _shared(train: Tensor, test: Tensor) -> list[str]:
    """Report if most of the test samples are training samples, too; a few may be duplicates in the data."""
    seen = {row.numpy().tobytes() for row in train.detach().cpu()}
    count = sum(row.numpy().tobytes() in seen for row in test.detach().cpu())
    if 2 * count <= len(test):
        return []
    return [
        f"{count} of the {len(test)} features to test on are among those to train on; a probe is measured on other "
        "samples than it was fitted to."
    ]
