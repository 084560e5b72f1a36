"""The formulas of the statistics that are collected from an expert's data: sums over the examples of a batch.

In all of them, ``log p(y | x)`` is the log-softmax of the module's logits, and the label y is, by choice,

* ``expected``: every class in turn, weighted by p(y | x) — the Fisher information itself (Matena and Raffel,
  arXiv 2111.09832, eq. 3),
* ``true``: the data's label — the empirical Fisher,
* ``argmax``: the class that the module predicts.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import grad, vmap

from lightning_merge.utilities.tensors import wide

State = dict[str, Tensor]
Labelled = list[tuple[Tensor, Tensor]]
"""Ways to label a batch: for each the labels ``(N,)`` and the weights ``(N,)`` of the examples under them."""

_MOST_GRADIENTS = 1 << 27  # entries of per-example gradients at a time, 512 MiB in float32


def label(logits: Tensor, targets: Tensor, labels: str) -> Labelled:
    """Label a batch so that ``Σ weight · f(label)`` is the expectation of f: ``(N, C), (N,) -> [((N,), (N,)), …]``."""
    if labels == "expected":
        p = logits.softmax(dim=1)
        return [(torch.full_like(targets, y), p[:, y]) for y in range(logits.shape[1])]
    chosen = targets if labels == "true" else logits.argmax(dim=1)
    return [(chosen, logits.new_ones(len(logits)))]


def pick_log_likelihood(logits: Tensor, labels: Tensor) -> Tensor:
    """Pick ``log p(y | x)`` for the label of every example: ``(N, C), (N,) -> (N,)``."""
    return logits.log_softmax(dim=1).gather(1, labels.unsqueeze(1)).squeeze(1)


def example_fisher(logits_of: Callable[[State, Tensor], Tensor], parameters: State, x: Tensor, ys: Labelled) -> State:
    """Compute ``Σ_x Σ_y p(y | x) (∂ log p(y | x) / ∂θ)²`` over the x of a batch ``(N, …)``, for each θ ``(…)``."""

    def log_likelihood(parameters: State, x: Tensor, y: Tensor) -> Tensor:  # of one example
        return pick_log_likelihood(logits_of(parameters, x.unsqueeze(0)), y.unsqueeze(0)).squeeze(0)

    size = max(1, _MOST_GRADIENTS // sum(tensor.numel() for tensor in parameters.values()))
    total = {name: torch.zeros_like(wide(tensor)) for name, tensor in parameters.items()}
    for labels, weights in ys:
        for xs, ls, ws in zip(x.split(size), labels.split(size), weights.split(size), strict=True):
            for name, gradients in example_gradients(log_likelihood, parameters, xs, ls).items():
                total[name] += torch.einsum("n,n...->...", wide(ws), wide(gradients).square())
    return total


def example_gradients(
    function: Callable[[State, Tensor, Tensor], Tensor], parameters: State, x: Tensor, y: Tensor
) -> State:
    """Compute the gradient of ``function(parameters, x, y)`` of every example: ``(N, …)`` for a parameter ``(…)``.

    Args:
        function: A function of the parameters, one input ``(…)`` and one label ``()``, with a scalar ``()``.
        parameters: The parameters ``(…)`` by name.
        x: Inputs ``(N, …)``.
        y: Labels ``(N,)``.
    """
    try:
        return vmap(grad(function), in_dims=(None, 0, 0))(parameters, x, y)
    except RuntimeError:  # the module does what vmap cannot follow

        def of_example(x: Tensor, y: Tensor) -> State:
            return gradient(lambda parameters: function(parameters, x, y), parameters)

        each = [of_example(*example) for example in zip(x, y, strict=True)]
        return {name: torch.stack([gradients[name] for gradients in each]) for name in parameters}


def gradient(function: Callable[[State], Tensor], parameters: State) -> State:
    """Compute the gradient ``(…)`` of ``function(parameters)`` for each parameter ``(…)``; zeros where it has none."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in parameters.items()}
    gradients = torch.autograd.grad(function(leaves), list(leaves.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(leaves, gradients, strict=True))


def gram(rows: Tensor) -> Tensor:
    """Compute the Gram matrix ``Σ x xᵀ`` over all tokens x: ``(…, n) -> (n, n)``."""
    rows = wide(rows.detach()).reshape(-1, rows.shape[-1])
    return rows.mT @ rows
