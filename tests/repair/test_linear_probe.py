"""A head fitted to frozen features, against scikit-learn's logistic regression."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import nn

from lightning_merge.repair import probe_head
from lightning_merge.utilities.errors import MergeError
from tests.repair.models import VGG, expert_of, images


def make(bias: bool):
    module = VGG()
    module.head = nn.Linear(5, 3, bias=bias)
    weights = expert_of(module, 1)
    x = images(60)
    y = torch.randint(3, (60,), generator=torch.Generator().manual_seed(1))
    x = x + y.view(-1, 1, 1, 1)
    module.load_state_dict(weights)
    with torch.no_grad():
        features = module.unit(module.projection(module.hidden(module.features(x).mean((2, 3)))))
    return module, weights, list(zip(x.split(25), y.split(25), strict=True)), features.numpy(), y.numpy()


@pytest.mark.parametrize("bias", [True, False])
def test_the_head_is_that_of_logistic_regression(bias):
    module, weights, data, x, y = make(bias)
    x = x.astype(np.float64)
    theirs = LogisticRegression(C=1 / (60 * 1e-3), fit_intercept=bias, solver="newton-cg", tol=1e-12, max_iter=2000)
    expected = theirs.fit(x, y).decision_function(x)
    found = probe_head(module, weights, data, decay=1e-3)
    assert set(found) == ({"head.weight", "head.bias"} if bias else {"head.weight"})
    logits = x @ found["head.weight"].numpy().T + (found["head.bias"].numpy() if bias else 0)
    np.testing.assert_allclose(_centred(logits), _centred(expected), rtol=0, atol=1e-5)
    again = probe_head(module, weights, data, decay=1e-3, head="head")
    assert all(torch.equal(again[name], found[name]) for name in found)


def _centred(logits: np.ndarray) -> np.ndarray:
    """Without what is the same for all classes, which does not matter."""
    return logits - logits.mean(axis=1, keepdims=True)


def test_a_class_without_images_is_never_predicted():
    module, weights, data, x, _ = make(True)
    found = probe_head(module, weights, [(images, labels.clamp(max=1)) for images, labels in data])
    logits = torch.from_numpy(x) @ found["head.weight"].T + found["head.bias"]
    assert logits.isfinite().all()
    assert logits.argmax(1).max() <= 1


def test_what_does_not_fit_is_refused():
    module, weights, data, _, _ = make(True)
    with pytest.raises(MergeError, match="fitted to batches of \\(images, labels\\)"):
        probe_head(module, weights, [images(4)])
    with pytest.raises(MergeError, match="two tensors; the data give Tensor, list"):
        probe_head(module, weights, [(images(2), ["cat", "dog"])])
    with pytest.raises(MergeError, match=r"integers, one for each image; the data give torch.float32"):
        probe_head(module, weights, [(images(2), torch.eye(2))])
    with pytest.raises(MergeError, match="labels go from 0 to 9, but the head has 3 classes"):
        probe_head(module, weights, [(images(4), torch.tensor([0, 1, 2, 9]))])
    with pytest.raises(MergeError, match="'hidden' is no linear layer"):
        probe_head(module, weights, data, head="hidden")
    with pytest.raises(MergeError, match="read only once"):
        probe_head(module, weights, iter(data))
    with pytest.raises(MergeError, match="hold no batch"):
        probe_head(module, weights, [])
    with pytest.raises(MergeError, match="must be finite"):
        probe_head(module, weights, [(images(4) * float("nan"), torch.zeros(4).long())])
