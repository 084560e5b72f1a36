"""Collect what an expert's data say about its parameters, batch by batch, on any number of processes.

See :mod:`lightning_merge.statistics` for the kinds and their names. In all of them, ``log p(y | x)`` is the log-softmax
of the module's logits, and the label y is, by choice,

* ``expected``: every class in turn, weighted by p(y | x) — the Fisher information itself (Matena and Raffel,
  arXiv 2111.09832, eq. 3),
* ``true``: the data's label — the empirical Fisher,
* ``argmax``: the class that the module predicts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from lightning_merge.checkpoints import open_weights
from lightning_merge.errors import MergeError
from lightning_merge.layer_inputs import watch_inputs, watchable
from lightning_merge.running import distinct_names, evaluating
from lightning_merge.task_vectors import wide

Kind = Literal["fisher", "gram", "gram_out"]
State = dict[str, Tensor]
Labelled = list[tuple[Tensor, Tensor]]
"""Ways to label a batch: for each the labels ``(N,)`` and the weights ``(N,)`` of the examples under them."""

_MOST_GRADIENTS = 1 << 27  # entries of per-example gradients at a time, 512 MiB in float32
_RUNNING_STATISTICS = ("running_mean", "running_var")


@dataclass(frozen=True)
class Recipe:
    """What is collected, and how.

    Args:
        kinds: ``fisher``: the diagonal Fisher information of every floating-point parameter. ``gram``: the Gram matrix
            of the inputs of every ``nn.Linear``, without the bias, the mean over all tokens. ``gram_out``: that of the
            gradients of log p(y | x) at its outputs. Layers that are never called (the output projection inside
            ``nn.MultiheadAttention``) have no Gram matrices.
        fisher: ``example``: the mean over examples of the squared gradient, exactly. ``batch``: the mean over batches
            of the squared gradient of the batch's mean, as RegMean's and MergeLM's codes do: as many backward passes
            for a batch as ``example`` needs for an example, but an estimate that depends on the batch size.
        labels: The label whose log-probability is differentiated: ``expected`` (every class, weighted by its
            probability), ``true`` (the data's), or ``argmax`` (the predicted one).
        batches: How many batches; by default all.
    """

    kinds: tuple[Kind, ...] = ("fisher", "gram")
    fisher: Literal["example", "batch"] = "example"
    labels: Literal["expected", "true", "argmax"] = "expected"
    batches: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "kinds", tuple(self.kinds))
        for name, given, allowed in (
            ("kinds", self.kinds or ("",), ("fisher", "gram", "gram_out")),
            ("fisher", (self.fisher,), ("example", "batch")),
            ("labels", (self.labels,), ("expected", "true", "argmax")),
        ):
            if not set(given) <= set(allowed):
                raise MergeError(f"Statistics: {name} must be of {', '.join(allowed)}, got {getattr(self, name)!r}.")
        if self.batches is not None and self.batches < 1:
            raise MergeError(f"Statistics: batches must be at least 1, got {self.batches}.")


# The formulas


def label(logits: Tensor, targets: Tensor, labels: str) -> Labelled:
    """Label a batch so that ``Σ weight · f(label)`` is the expectation of f: ``(N, C), (N,) -> [((N,), (N,)), …]``."""
    if labels == "expected":
        p = logits.softmax(dim=1)
        return [(torch.full_like(targets, y), p[:, y]) for y in range(logits.shape[1])]
    chosen = targets if labels == "true" else logits.argmax(dim=1)
    return [(chosen, logits.new_ones(len(logits)))]


def pick_log_likelihood(logits: Tensor, labels: Tensor) -> Tensor:
    """``log p(y | x)`` of every example: ``(N, C), (N,) -> (N,)``."""
    return logits.log_softmax(dim=1).gather(1, labels.unsqueeze(1)).squeeze(1)


def example_fisher(logits_of: Callable[[State, Tensor], Tensor], parameters: State, x: Tensor, ys: Labelled) -> State:
    """``Σ_x Σ_y p(y | x) (∂ log p(y | x) / ∂θ)²`` over the examples x of a batch ``(N, …)``; a tensor like each θ."""

    def log_likelihood(parameters: State, x: Tensor, y: Tensor) -> Tensor:  # of one example
        return pick_log_likelihood(logits_of(parameters, x.unsqueeze(0)), y.unsqueeze(0)).squeeze(0)

    size = max(1, _MOST_GRADIENTS // sum(tensor.numel() for tensor in parameters.values()))
    total = {name: torch.zeros_like(wide(tensor)) for name, tensor in parameters.items()}
    for labels, weights in ys:
        for some in zip(x.split(size), labels.split(size), weights.split(size), strict=True):
            for name, gradients in example_gradients(log_likelihood, parameters, *some[:2]).items():
                total[name] += torch.einsum("n,n...->...", wide(some[2]), wide(gradients).square())
    return total


def example_gradients(
    function: Callable[[State, Tensor, Tensor], Tensor], parameters: State, x: Tensor, y: Tensor
) -> State:
    """The gradient of ``function(parameters, x, y)`` for every example: ``(N, …)`` for each parameter ``(…)``."""
    try:
        return vmap(grad(function), in_dims=(None, 0, 0))(parameters, x, y)
    except RuntimeError:  # the module does what vmap cannot follow
        each = [gradient(partial(function, x=a, y=b), parameters) for a, b in zip(x, y, strict=True)]
        return {name: torch.stack([gradients[name] for gradients in each]) for name in parameters}


def gradient(function: Callable[[State], Tensor], parameters: State) -> State:
    """The gradient of ``function(parameters)``, of zeros for parameters that it does not depend on."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in parameters.items()}
    found = torch.autograd.grad(function(leaves), list(leaves.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(leaves, found, strict=True))


def gram(rows: Tensor) -> Tensor:
    """``Σ x xᵀ`` over all tokens x: ``(…, n) -> (n, n)``."""
    rows = wide(rows.detach()).reshape(-1, rows.shape[-1])
    return rows.mT @ rows


# The sums over batches and processes


class StatisticsCollector:
    """Add up the statistics of one expert over batches.

    The module is put into evaluation mode for each batch and back; its weights, gradients and hooks stay as they are.

    Args:
        module: Maps inputs ``(N, …)`` to logits ``(N, C)``.
        weights: The weights of the expert; by default those of the module.
        recipe: What to collect.
        reduce: Adds up a tensor over the processes. With ``fisher="batch"`` it is called for each batch, of which
            every process has its part, so that all must have the same number of batches.
    """

    def __init__(
        self,
        module: nn.Module,
        weights: Mapping[str, Tensor] | None = None,
        recipe: Recipe = Recipe(),
        reduce: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    ) -> None:
        own = open_weights(module.state_dict(), "the module")
        state = {name: (weights or own)[name].to(own[name]) for name in own if name not in own.tied}
        self.recipe = recipe
        self._module, self._reduce = module, reduce
        self._parameters = {name: tensor for name, tensor in state.items() if _is_parameter(name, tensor)}
        self._buffers = {name: tensor for name, tensor in state.items() if name not in self._parameters}
        self._tied = {alias: own.tied[alias] for alias in distinct_names(module) if alias in own.tied}
        device = next(iter(state.values())).device
        self._counts = torch.zeros(2, dtype=torch.int64, device=device)  # examples, batches
        zeros = {name: torch.zeros_like(wide(tensor)) for name, tensor in self._parameters.items()}
        self._fisher = zeros if "fisher" in recipe.kinds else {}
        grams = {"gram", "gram_out"} & {*recipe.kinds}
        matrices = {name: wide(self._parameters[name]) for name in _matrices(module, self._parameters) if grams}
        self._layers = _linear_layers(module, matrices) if "gram_out" in recipe.kinds else {}
        self._tokens = {name: torch.zeros((), dtype=torch.int64, device=device) for name in matrices}
        self._inputs = {name: weight.new_zeros(2 * weight.shape[1:]) for name, weight in matrices.items()}
        self._outputs = {name: matrices[name].new_zeros(2 * matrices[name].shape[:1]) for name in self._layers}

    def _logits(self, parameters: State, inputs: Tensor) -> Tensor:
        state = parameters | self._buffers
        state |= {alias: state[owner] for alias, owner in self._tied.items()}
        return functional_call(self._module, state, (inputs,), tie_weights=False)

    def update(self, inputs: Tensor, targets: Tensor) -> None:
        """Add one batch of inputs ``(N, …)`` and labels ``(N,)`` (of this process, if there are several)."""
        with evaluating(self._module), torch.autocast(inputs.device.type, enabled=False), torch.enable_grad():
            if self._inputs:
                self._add_grams(inputs, targets)
            if self._fisher:
                with torch.no_grad():
                    ys = label(_check(self._logits(self._parameters, inputs)), targets, self.recipe.labels)
                add = self._add_example_fisher if self.recipe.fisher == "example" else self._add_batch_fisher
                add(inputs, ys)
        self._counts += torch.tensor([len(inputs), 1], device=self._counts.device)

    def _add_example_fisher(self, inputs: Tensor, ys: Labelled) -> None:
        for name, total in example_fisher(self._logits, self._parameters, inputs, ys).items():
            self._fisher[name] += total

    def _add_batch_fisher(self, inputs: Tensor, ys: Labelled) -> None:
        """``Σ_y (mean_x √p(y | x) ∂ log p(y | x) / ∂θ)²``: of a batch of one example, what ``example`` gives."""
        count = self._reduce(torch.tensor(len(inputs), device=inputs.device))
        for labels, weights in ys:

            def score(parameters: State, labels: Tensor = labels, weights: Tensor = weights) -> Tensor:
                return (weights.sqrt() * pick_log_likelihood(self._logits(parameters, inputs), labels)).sum()

            for name, gradients in gradient(score, self._parameters).items():
                self._fisher[name] += (self._reduce(wide(gradients)) / count).square()

    def _add_grams(self, inputs: Tensor, targets: Tensor) -> None:
        def add_input(name: str, rows: Tensor) -> None:
            self._inputs[name] += gram(rows)
            self._tokens[name] += len(rows)

        def add_output(name: str, gradients: Tensor) -> None:
            self._outputs[name] += gram(gradients)

        def hook(layer: nn.Module, args: tuple, output: Tensor, name: str) -> Tensor:
            output.register_hook(partial(add_output, name))
            return output.clone()  # what follows may work in place

        hooks = [layer.register_forward_hook(partial(hook, name=name)) for name, layer in self._layers.items()]
        leaves = {name: tensor.detach().requires_grad_(bool(hooks)) for name, tensor in self._parameters.items()}
        try:
            with watch_inputs(self._module, self._inputs.keys(), add_input):
                logits = self._logits(leaves, inputs)
        finally:
            for handle in hooks:
                handle.remove()
        if not hooks:
            return
        layers = [leaves[name] for name in self._layers]
        for labels, weights in label(_check(logits).detach(), targets, self.recipe.labels):
            score = (weights.sqrt() * pick_log_likelihood(logits, labels)).sum()  # so that g gᵀ is weighted by p
            torch.autograd.grad(score, layers, retain_graph=True, allow_unused=True)

    @property
    def num_examples(self) -> int:
        """How many examples were added by all processes; every process must ask."""
        return int(self._reduce(self._counts.clone())[0])

    def compute(self) -> State:
        """The means over everything that all processes added; every process must ask.

        Returns:
            A tensor for every ``kind.<parameter>``, in float32 (float64 of double weights), on every process.

        Raises:
            MergeError: If nothing was added.
        """
        examples = self.num_examples
        if not examples:
            raise MergeError("There are no batches to collect statistics of; check the training data.")
        found = {}
        for name, total in self._fisher.items():
            if self.recipe.fisher == "example":
                found[f"fisher.{name}"] = self._reduce(total.clone()) / examples
            else:
                found[f"fisher.{name}"] = total / int(self._counts[1])  # the same on every process
        for name in self._inputs:
            tokens = self._reduce(self._tokens[name].clone())
            for kind, sums in (("gram", self._inputs), ("gram_out", self._outputs)):
                if kind in self.recipe.kinds and name in sums and tokens > 0:
                    found[f"{kind}.{name}"] = self._reduce(sums[name].clone()) / tokens
        return found


def collect_statistics(
    module: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    recipe: Recipe = Recipe(),
) -> State:
    """Collect the statistics of a module over batches of inputs ``(N, …)`` and labels ``(N,)``, on one process."""
    collector = StatisticsCollector(module, recipe=recipe)
    for number, (inputs, targets) in enumerate(batches):
        if number == recipe.batches:
            break
        collector.update(inputs, targets)
    return collector.compute()


def _is_parameter(name: str, tensor: Tensor) -> bool:
    """Whether it is merged as a task vector: BatchNorm's running statistics and integers are not."""
    return tensor.is_floating_point() and name.rpartition(".")[2] not in _RUNNING_STATISTICS


def _matrices(module: nn.Module, parameters: State) -> list[str]:
    """The weights of linear layers and of attention, whose inputs can be seen. Kernels of convolutions are left out."""
    return [name for name in watchable(module) if name in parameters and parameters[name].ndim == 2]


def _linear_layers(module: nn.Module, parameters: State) -> dict[str, nn.Linear]:
    named = {f"{name}.weight".lstrip("."): layer for name, layer in module.named_modules()}
    return {name: layer for name, layer in named.items() if isinstance(layer, nn.Linear) and name in parameters}


def _check(logits: Tensor) -> Tensor:
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        what = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise MergeError(
            f"Fisher and gradients need a module that maps inputs to logits (N, classes); this one returns {what}."
        )
    return logits
