"""The formulas of the statistics, against plain autograd loops and hooks written by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import lightning_merge as lm
from lightning_merge.evaluation.statistics.collect import Recipe, StatisticsCollector, collect_statistics
from tests.toys import tiny_expert

EVERYTHING = ("fisher", "gram", "gram_out")


class Net(nn.Module):
    """Tokens, BatchNorm, dropout, a frozen layer, an in-place activation, a floating-point buffer.

    One layer is called twice under two names, and one shares its weights.
    """

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4)
        self.act = nn.ReLU(inplace=True)
        self.drop = nn.Dropout(0.5)
        self.again = nn.Linear(4, 4)
        self.tied = self.again
        self.shared = nn.Linear(4, 4)
        self.shared.weight = self.again.weight
        self.head = nn.Linear(4, 3)
        self.unused = nn.Linear(2, 2)
        self.register_buffer("scale", torch.tensor(2.0))
        self.head.requires_grad_(False)
        self.norm.running_mean += 0.3

    def forward(self, x: Tensor) -> Tensor:  # (N, tokens, 3)
        x = self.drop(self.act(self.embed(x)))
        x = self.norm(x.mT).mT
        return self.head(self.shared(self.tied(self.again(x))).mean(dim=1)) * self.scale


class Branching(Net):
    """Asks for a value, which vmap cannot follow."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.isfinite().all().item() else x.nan_to_num())


@pytest.fixture
def batches() -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(n, 5, 3), torch.randint(3, (n,))) for n in (4, 3)]


def parameters_of(net: nn.Module) -> dict[str, Tensor]:
    return {**dict(net.named_parameters()), "scale": net.scale}


def labels_by_hand(kind: str, p: Tensor, target: Tensor) -> list[tuple[int, float]]:
    if kind == "expected":
        return [(y, p[y].item()) for y in range(len(p))]
    return [(int(target if kind == "true" else p.argmax()), 1.0)]


@pytest.mark.parametrize("kind", ["expected", "true", "argmax"])
@pytest.mark.parametrize("make", [Net, Branching])
def test_fisher_of_examples_is_that_of_a_plain_loop(make, kind, batches):
    net = make()
    found = collect_statistics(net, batches, Recipe(("fisher",), labels=kind))
    net.eval().requires_grad_(True)
    parameters = parameters_of(net)
    net.scale.requires_grad_(True)
    expected = {name: torch.zeros_like(tensor) for name, tensor in parameters.items()}
    examples = [(x, y) for xs, ys in batches for x, y in zip(xs, ys, strict=True)]
    for x, target in examples:
        log_p = net(x[None])[0].log_softmax(0)
        for y, weight in labels_by_hand(kind, log_p.exp(), target):
            gradients = torch.autograd.grad(
                log_p[y], list(parameters.values()), retain_graph=True, materialize_grads=True, allow_unused=True
            )
            for name, g in zip(parameters, gradients, strict=True):
                expected[name] += weight * g**2 / len(examples)
    assert {f"fisher.{name}" for name in expected} == set(found)
    assert expected["embed.weight"].abs().max() > 1e-4
    for name, tensor in expected.items():
        torch.testing.assert_close(found[f"fisher.{name}"], tensor, rtol=1e-5, atol=1e-9)


def test_the_expected_fisher_is_a_curvature():
    """For a linear softmax model it is the diagonal of the loss's Hessian, whatever the labels."""
    net, x, y = nn.Linear(3, 4).double(), torch.randn(6, 3).double(), torch.randint(4, (6,))
    found = collect_statistics(net, [(x, y)], Recipe(("fisher",)))["fisher.weight"]

    def loss(weight: Tensor) -> Tensor:
        return nn.functional.cross_entropy(x @ weight.T + net.bias, y)

    hessian = torch.autograd.functional.hessian(loss, net.weight.detach()).reshape(12, 12)
    torch.testing.assert_close(found, hessian.diagonal().reshape(4, 3))


@pytest.mark.parametrize("kind", ["true", "argmax"])
def test_fisher_of_batches_squares_the_gradient_of_the_mean(kind, batches):
    net = Net()
    found = collect_statistics(net, batches, Recipe(("fisher",), "batch", kind))
    net.eval().requires_grad_(True)
    expected = torch.zeros_like(net.embed.weight)
    for x, y in batches:
        logits = net(x)
        loss = nn.functional.cross_entropy(logits, y if kind == "true" else logits.argmax(1))
        expected += torch.autograd.grad(loss, net.embed.weight)[0] ** 2 / len(batches)
    torch.testing.assert_close(found["fisher.embed.weight"], expected)


@pytest.mark.parametrize("kind", ["expected", "true", "argmax"])
def test_batches_of_one_example_give_the_fisher_of_examples(kind, batches):
    single = [(x[i : i + 1], y[i : i + 1]) for x, y in batches for i in range(len(x))]
    net = Net()
    found = collect_statistics(net, single, Recipe(("fisher",), "batch", kind))
    expected = collect_statistics(net, batches, Recipe(("fisher",), "example", kind))
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("kind", ["expected", "true"])
def test_gram_matrices_are_those_of_hooks_by_hand(kind, batches):
    net = Net()
    found = collect_statistics(net, batches, Recipe(("gram", "gram_out"), labels=kind))
    net.eval().requires_grad_(True)
    inputs, outputs, gradients = [], [], torch.zeros(4, 4)

    def keep(layer, args, output):
        inputs.append(args[0].detach().reshape(-1, 3))
        outputs.append(output)
        return output.clone()  # ReLU works in place

    net.embed.register_forward_hook(keep)
    for x, targets in batches:
        for row, target in zip(x, targets, strict=True):
            log_p = net(row[None])[0].log_softmax(0)
            for y, weight in labels_by_hand(kind, log_p.exp(), target):
                g = torch.autograd.grad(log_p[y], outputs[-1], retain_graph=True)[0].reshape(-1, 4)
                gradients += weight * g.T @ g
    rows = torch.cat(inputs)
    assert len(rows) == 7 * 5
    torch.testing.assert_close(found["gram.embed.weight"], rows.T @ rows / len(rows))
    torch.testing.assert_close(found["gram_out.embed.weight"], gradients / len(rows))
    assert set(found) == {f"{g}.{n}.weight" for g in ("gram", "gram_out") for n in ("embed", "again", "head")}
    assert found["gram.again.weight"].shape == (4, 4)  # a layer that is called twice sees twice the tokens


def test_the_module_stays_as_it_is(batches):
    net = Net()
    net.drop.eval()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    modes, draws = [part.training for part in net.modules()], torch.get_rng_state()
    collect_statistics(net, batches, Recipe(EVERYTHING))
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert [part.training for part in net.modules()] == modes
    assert torch.equal(torch.get_rng_state(), draws)
    assert net.tied is net.again
    assert net.shared.weight is net.again.weight
    assert all(isinstance(parameter, nn.Parameter) for parameter in net.parameters())
    assert all(parameter.grad is None for parameter in net.parameters())
    assert not net.head.weight.requires_grad
    assert not any(part._forward_hooks for part in net.modules())


def test_other_weights_than_the_module_s(batches):
    one, two = Net(), Net()
    collector = StatisticsCollector(one, two.state_dict(), Recipe(EVERYTHING, labels="true"))
    for batch in batches:
        collector.update(*batch)
    expected = collect_statistics(two, batches, Recipe(EVERYTHING, labels="true"))
    for name, tensor in collector.compute().items():
        torch.testing.assert_close(tensor, expected[name])


def test_the_number_of_batches(batches):
    net, only = Net(), Recipe(("gram",), batches=1)
    assert torch.equal(
        collect_statistics(net, batches, only)["gram.embed.weight"],
        collect_statistics(net, batches[:1])["gram.embed.weight"],
    )


def test_half_precision_is_squared_in_full(batches):
    net = Net().bfloat16()
    found = collect_statistics(net, [(x.bfloat16(), y) for x, y in batches], Recipe(EVERYTHING))
    assert all(tensor.dtype == torch.float32 for tensor in found.values())


def test_a_real_backbone():
    model = tiny_expert()
    nn.init.normal_(model.head.weight)
    batch = torch.randn(4, 1, 8, 8), torch.arange(4)
    found = collect_statistics(model, [batch], Recipe(EVERYTHING, labels="true"))
    by_loop = torch.zeros_like(model.head.weight)
    for x, y in zip(*batch, strict=True):
        loss = nn.functional.cross_entropy(model.eval()(x[None]), y[None])
        by_loop += torch.autograd.grad(loss, model.head.weight)[0] ** 2 / 4
    torch.testing.assert_close(found["fisher.head.weight"], by_loop)
    names = {name for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    assert {key.removeprefix("fisher.") for key in found if key.startswith("fisher.")} == names


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kinds": ("hessian",)}, "kinds must be of fisher, gram, gram_out, moments, got .'hessian'"),
        ({"kinds": ()}, "kinds must be of"),
        ({"fisher": "exact"}, "fisher must be of example, batch"),
        ({"labels": "none"}, "labels must be of expected, true, argmax"),
        ({"batches": 0}, "batches must be at least 1, got 0"),
    ],
)
def test_recipes_that_cannot_be(arguments, message):
    with pytest.raises(lm.MergeError, match=message):
        Recipe(**arguments)


def test_modules_and_data_that_cannot_work(batches):
    with pytest.raises(lm.MergeError, match=r"maps inputs to logits \(N, classes\); this one returns \(4, 5, 2\)"):
        collect_statistics(nn.Linear(3, 2), batches)
    collect_statistics(nn.Linear(3, 2), batches, Recipe(("gram",)))  # needs no logits
    with pytest.raises(lm.MergeError, match="no batches"):
        collect_statistics(nn.Linear(3, 2), [])


def test_attention_as_open_clip_has_it_gets_gram_matrices_of_its_inputs():
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, batch_first=True)

    class Tower(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn, self.head = attention, nn.Linear(8, 3)

        def forward(self, tokens):
            return self.head(self.attn(tokens, tokens, tokens, need_weights=False)[0].mean(dim=1))

    tokens, labels = torch.randn(6, 5, 8), torch.randint(0, 3, (6,))
    found = collect_statistics(Tower(), [(tokens, labels)], Recipe(("gram", "gram_out")))
    rows = tokens.flatten(0, 1)
    torch.testing.assert_close(found["gram.attn.in_proj_weight"], rows.mT @ rows / len(rows))
    query, key, value = (rows @ attention.in_proj_weight.mT + attention.in_proj_bias).view(6, 5, 3, 2, 4).unbind(dim=2)
    scores = torch.einsum("nqhd,nkhd->nhqk", query, key) / 2
    context = torch.einsum("nhqk,nkhd->nqhd", scores.softmax(dim=-1), value).reshape(-1, 8).detach()
    torch.testing.assert_close(found["gram.attn.out_proj.weight"], context.mT @ context / len(context))
    assert "gram_out.head.weight" in found
    assert "gram_out.attn.in_proj_weight" not in found
