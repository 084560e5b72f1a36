"""AdaMerging against a loop written by hand, and what the paper says of it."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lightning_merge as lm
from lightning_merge.methods.adamerging import AdaMerging, entropy

TASKS = ("photo", "sketch")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.norm = nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 3)

    def forward(self, images):
        return self.head(F.relu(self.norm(self.first(images))))


@pytest.fixture
def draw():
    return torch.Generator().manual_seed(5)


@pytest.fixture
def models(draw):
    """A base, experts with heads of their own, and images, all in float64."""

    def moved(state, size):
        noise = {k: size * torch.randn(v.shape, generator=draw, dtype=torch.float64) for k, v in state.items()}
        return {k: (v + noise[k]).abs() if "running_var" in k else v + noise[k] for k, v in state.items()}

    base = {k: v.double() if v.is_floating_point() else v for k, v in Net().state_dict().items()}
    floating = {k: v for k, v in base.items() if v.is_floating_point()}
    experts = {task: base | moved(floating, 0.3) for task in TASKS}
    images = {t: [torch.randn(5, 4, generator=draw, dtype=torch.float64) for _ in range(2)] for t in TASKS}
    return base, experts, images


def adamerge(models, exclude=("head.*",), module=None, **arguments):
    base, experts, images = models
    settings = {"lr": 0.05, "steps": 3, **arguments}
    return lm.merge(
        base,
        experts,
        AdaMerging(**settings),
        module=module or Net(),
        data=images,
        exclude=exclude,
        dtype=torch.float64,
    ).weights


def by_hand(base, experts, images, init, lr, steps, deltas=None, rows=4):
    """AdaMerging on the function of :class:`Net`, written out, with Adam written out, too."""
    names = ["first.weight", "first.bias", "norm.weight", "norm.bias"]
    deltas = deltas or {n: torch.stack([experts[t][n] - base[n] for t in TASKS]) for n in names}
    mean, var = (sum(experts[t][f"norm.running_{k}"] for t in TASKS) / 2 for k in ("mean", "var"))
    lambdas = torch.full((rows, 2), init, dtype=torch.float64, requires_grad=True)
    m = v = torch.zeros(rows, 2, dtype=torch.float64)
    for step in range(steps):
        c = lambdas.clamp(0, 1).expand(4, 2)
        w, b, g, s = (base[n] + c[i, 0] * deltas[n][0] + c[i, 1] * deltas[n][1] for i, n in enumerate(names))
        loss = 0
        for t in TASKS:
            x = (images[t][step % 2] @ w.T + b - mean) / (var + 1e-5).sqrt() * g + s
            p = (x.clamp(min=0) @ experts[t]["head.weight"].T + experts[t]["head.bias"]).softmax(1)
            loss = loss - (p * p.log()).sum() / len(p)
        (gradient,) = torch.autograd.grad(loss, lambdas)
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        change = lr * (m / (1 - 0.9 ** (step + 1))) / ((v / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
        lambdas = (lambdas - change).detach().requires_grad_()
    c = lambdas.detach().clamp(0, 1).expand(4, 2)
    return {n: base[n] + c[i, 0] * deltas[n][0] + c[i, 1] * deltas[n][1] for i, n in enumerate(names)}, c


def test_three_steps_are_those_of_a_loop_by_hand(models):
    expected, coefficients = by_hand(*models, init=0.3, lr=0.05, steps=3)
    assert (coefficients - 0.3).abs().min() > 0.01
    merged = adamerge(models)
    for name, tensor in expected.items():
        torch.testing.assert_close(merged[name], tensor, rtol=1e-9, atol=1e-12)
    assert torch.equal(merged["head.weight"], models[0]["head.weight"])


def test_coefficients_stay_between_zero_and_one(models):
    expected, coefficients = by_hand(*models, init=0.9, lr=0.5, steps=4)
    assert {0.0, 1.0} <= set(coefficients.flatten().tolist())
    merged = adamerge(models, init=0.9, lr=0.5, steps=4)
    for name, tensor in expected.items():
        torch.testing.assert_close(merged[name], tensor, rtol=1e-9, atol=1e-12)


def test_no_step_is_task_arithmetic(models):
    base, experts, _ = models
    merged = adamerge(models, steps=0)
    expected = lm.merge(base, experts, lm.methods.TaskArithmetic(scale=0.3), exclude=["head.*"], dtype=torch.float64)
    for name, tensor in expected.weights.items():
        torch.testing.assert_close(merged[name], tensor)


def test_task_wise_shares_one_coefficient_between_all_layers(models):
    expected, coefficients = by_hand(*models, init=0.3, lr=0.1, steps=3, rows=1)
    assert (coefficients[0, 0] - coefficients[0, 1]).abs() > 1e-3
    merged = adamerge(models, granularity="task", lr=0.1)
    for name, tensor in expected.items():
        torch.testing.assert_close(merged[name], tensor, rtol=1e-9, atol=1e-12)


def test_task_wise_equals_layer_wise_where_there_is_one_layer(models):
    rest = ("head.*", "norm.*", "first.bias")
    layer, task = (adamerge(models, exclude=rest, granularity=g) for g in ("layer", "task"))
    assert all(torch.equal(layer[name], task[name]) for name in layer)


def test_entropy_falls(models):
    _, experts, images = models

    def total(weights):
        net = Net().double().eval()
        loss = 0.0
        for t in TASKS:
            net.load_state_dict(weights | {k: v for k, v in experts[t].items() if k.startswith("head")})
            loss += entropy(net(torch.cat(images[t]))).mean().item()
        return loss

    before, after = (total(adamerge(models, lr=0.02, steps=steps)) for steps in (0, 40))
    assert after < before - 0.02


def test_entropy_is_that_of_the_softmax():
    from scipy.stats import entropy as reference

    logits = torch.randn(7, 5, dtype=torch.float64)
    expected = torch.tensor(reference(logits.softmax(1).numpy(), axis=1))
    torch.testing.assert_close(entropy(logits), expected)


def test_plus_plus_learns_on_what_ties_keeps(models):
    """Trim to the largest 40 % of each expert's whole vector, elect signs, drop what disagrees: by sorting, by hand."""
    base, experts, images = models
    names = ["first.weight", "first.bias", "norm.weight", "norm.bias"]
    flat = torch.stack([torch.cat([(experts[t][n] - base[n]).flatten() for n in names]) for t in TASKS])
    kept = torch.zeros_like(flat)
    count = int(flat.shape[1] * 0.4)
    for row, full in zip(kept, flat, strict=True):
        largest = full.abs().argsort()[-count - 1 :]  # the official code keeps one more
        row[largest] = full[largest]
    sign = kept.sum(dim=0).sign()
    sign[sign == 0] = sign.sum().sign()
    kept *= (kept > 0) == (sign > 0)
    assert 0 < (kept != 0).float().mean() < 0.45
    sizes = [base[n].numel() for n in names]
    deltas = {n: part.reshape(2, *base[n].shape) for n, part in zip(names, kept.split(sizes, dim=1), strict=True)}
    expected, _ = by_hand(base, experts, images, init=0.3, lr=0.05, steps=3, deltas=deltas)
    merged = adamerge(models, trimmed=True, density=0.4)
    for name, tensor in expected.items():
        torch.testing.assert_close(merged[name], tensor, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"granularity": "block"}, "granularity must be one of layer, task"),
        ({"init": 1.5}, r"init must lie in \[0, 1\]"),
        ({"lr": 0.0}, r"lr must lie in \(0, inf\]"),
        ({"steps": -1}, r"steps must lie in \[0, inf\)"),
        ({"density": 0.0}, r"density must lie in \(0, 1\]"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=f"AdaMerging: {message}"):
        AdaMerging(**arguments)
