"""Collect what an expert's data say about its parameters, batch by batch, on any number of processes.

See :mod:`lightning_merge.checkpoints.statistics_files` for the kinds and their names, and
:mod:`lightning_merge.evaluation.statistics.fisher_and_gram` for how each is computed.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lightning_merge.checkpoints import open_weights
from lightning_merge.checkpoints.names import is_running_statistic
from lightning_merge.evaluation.statistics.fisher_and_gram import (
    Labelled,
    State,
    example_fisher,
    gradient,
    gram,
    label,
    pick_log_likelihood,
)
from lightning_merge.repair.find_sites import find_sites
from lightning_merge.repair.moments import Moments, gather_moments, to_tensors
from lightning_merge.utilities.errors import MergeError, raise_all
from lightning_merge.utilities.layer_inputs import watch_inputs, watchable
from lightning_merge.utilities.modules import distinct_names, evaluating
from lightning_merge.utilities.processes import Processes
from lightning_merge.utilities.sites import Site, at_sites
from lightning_merge.utilities.tensors import wide

Kind = Literal["fisher", "gram", "gram_out", "moments"]


@dataclass(frozen=True)
class Recipe:
    """Settings of the collection: what is collected, and how.

    Args:
        kinds: ``fisher``: the diagonal Fisher information of every floating-point parameter. ``gram``: the Gram matrix
            of the inputs of every ``nn.Linear``, without the bias, the mean over all tokens. ``gram_out``: that of the
            gradients of log p(y | x) at its outputs. Layers that are never called (the output projection inside
            ``nn.MultiheadAttention``) have no Gram matrices. ``moments``: the mean and the variance of every channel
            of the activations that TACT corrects, over all samples and places, in float64.
        fisher: ``example``: the mean over examples of the squared gradient, exactly. ``batch``: the mean over batches
            of the squared gradient of the batch's mean, as RegMean's and MergeLM's codes do: as many backward passes
            for a batch as ``example`` needs for an example, but an estimate that depends on the batch size.
        labels: The label whose log-probability is differentiated: ``expected`` (every class, weighted by its
            probability), ``true`` (the data's), or ``argmax`` (the predicted one).
        batches: Number of batches; by default all.
    """

    kinds: tuple[Kind, ...] = ("fisher", "gram")
    fisher: Literal["example", "batch"] = "example"
    labels: Literal["expected", "true", "argmax"] = "expected"
    batches: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "kinds", tuple(self.kinds))
        for name, values, allowed in (
            ("kinds", self.kinds or ("",), get_args(Kind)),
            ("fisher", (self.fisher,), ("example", "batch")),
            ("labels", (self.labels,), ("expected", "true", "argmax")),
        ):
            if not set(values) <= set(allowed):
                raise MergeError(f"Statistics: {name} must be of {', '.join(allowed)}, got {getattr(self, name)!r}.")
        if self.batches is not None and self.batches < 1:
            raise MergeError(f"Statistics: batches must be at least 1, got {self.batches}.")


class StatisticsCollector:
    """Sums of the statistics of one expert over batches.

    The module is put into evaluation mode for each batch and back; its weights, gradients and hooks stay as they are.

    Args:
        module: A module that maps inputs ``(N, …)`` to logits ``(N, C)``.
        weights: The weights ``(…)`` of the expert by name; by default those of the module.
        recipe: What to collect.
        processes: The processes that add batches. With ``fisher="batch"`` each must add its part of every batch.
    """

    def __init__(
        self,
        module: nn.Module,
        weights: Mapping[str, Tensor] | None = None,
        recipe: Recipe = Recipe(),
        processes: Processes = Processes(),  # noqa: B008, this one alone: never changed
    ) -> None:
        default = open_weights(module.state_dict(), "the module")
        state = {name: (weights or default)[name].to(default[name]) for name in default if name not in default.tied}
        self.recipe = recipe
        self._module, self._processes = module, processes
        self._parameters = {name: tensor for name, tensor in state.items() if _is_parameter(name, tensor)}
        self._buffers = {name: tensor for name, tensor in state.items() if name not in self._parameters}
        self._tied = {alias: default.tied[alias] for alias in distinct_names(module) if alias in default.tied}
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
        self._sites: list[Site] = []
        self._moments: dict[Hashable, Moments] = {}  # by site

    def _logits(self, parameters: State, inputs: Tensor) -> Tensor:
        """Compute the logits of inputs: ``(N, …) -> (N, C)``."""
        state = parameters | self._buffers
        state |= {alias: state[owner] for alias, owner in self._tied.items()}
        return functional_call(self._module, state, (inputs,), tie_weights=False)

    def update_all(self, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Add all batches of inputs ``(N, …)`` and labels ``(N,)`` (of this process, if there are several).

        Raises:
            MergeError: On every process, if one of them fails.
        """
        if self._in_step:
            for inputs, targets in self._processes.in_step(batches, "batches"):
                self.update(inputs, targets)
            return
        with self._processes.together():
            for inputs, targets in batches:
                self.update(inputs, targets)

    @property
    def _in_step(self) -> bool:
        """Whether every batch is a step that all processes take together."""
        return "fisher" in self.recipe.kinds and self.recipe.fisher == "batch"

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Run what a process does by itself within a step of all processes, so that an error stops all of them."""
        with self._processes.together() if self._in_step else nullcontext():
            yield

    def update(self, inputs: Tensor, targets: Tensor) -> None:
        """Add one batch of inputs ``(N, …)`` and labels ``(N,)`` (of this process, if there are several)."""
        with evaluating(self._module), torch.autocast(inputs.device.type, enabled=False), torch.enable_grad():
            with self._alone():
                if "moments" in self.recipe.kinds:
                    self._add_moments(inputs)
                if self._inputs:
                    self._add_grams(inputs, targets)
                if self._fisher:
                    with torch.no_grad():
                        ys = label(_check(self._logits(self._parameters, inputs)), targets, self.recipe.labels)
            if self._fisher:
                add = self._add_example_fisher if self.recipe.fisher == "example" else self._add_batch_fisher
                add(inputs, ys)
        self._counts += torch.tensor([len(inputs), 1], device=self._counts.device)

    def _add_example_fisher(self, inputs: Tensor, ys: Labelled) -> None:
        for name, total in example_fisher(self._logits, self._parameters, inputs, ys).items():
            self._fisher[name] += total

    def _add_batch_fisher(self, inputs: Tensor, ys: Labelled) -> None:
        """Add ``Σ_y (mean_x √p(y | x) ∂ log p(y | x) / ∂θ)²``; for one example that is what ``example`` adds."""
        count = self._processes.sum(torch.tensor(len(inputs), device=inputs.device))
        for labels, weights in ys:

            def score(parameters: State, labels: Tensor = labels, weights: Tensor = weights) -> Tensor:
                return (weights.sqrt() * pick_log_likelihood(self._logits(parameters, inputs), labels)).sum()

            with self._alone():
                gradients = gradient(score, self._parameters)
            for name, tensor in gradients.items():
                self._fisher[name] += (self._processes.sum(wide(tensor)) / count).square()

    def _add_moments(self, inputs: Tensor) -> None:
        def add(site: Site, activation: Tensor) -> None:
            self._moments.setdefault(site, Moments()).update(site.channels_last(activation))

        self._sites = self._sites or find_sites(self._module, torch.cat([inputs[:2], inputs[:2]]))
        with torch.no_grad(), at_sites(self._module, self._sites, add):
            self._logits(self._parameters, inputs)

    def _add_grams(self, inputs: Tensor, targets: Tensor) -> None:
        def add_input(name: str, rows: Tensor) -> None:
            self._inputs[name] += gram(rows)
            self._tokens[name] += len(rows)

        def add_output(name: str, gradients: Tensor) -> None:
            self._outputs[name] += gram(gradients)

        def hook(layer: nn.Module, args: tuple[Any, ...], output: Tensor, name: str) -> Tensor:
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
        """The number of examples that all processes have added; every process must ask for it."""
        return int(self._processes.sum(self._counts)[0])

    def compute(self) -> State:
        """Compute the means over everything that all processes have added; every process must call it.

        Returns:
            On every process: ``fisher.<parameter>``, of the parameter's shape, and of weights ``(out, in)``
            ``gram.<parameter>`` ``(in, in)`` and ``gram_out.<parameter>`` ``(out, out)``, in float32 (float64 of double
            weights); of every site that TACT corrects ``mean.<site>`` and ``var.<site>`` ``(channels,)``,
            ``count.<site>`` and ``axis.<site>`` ``()``.

        Raises:
            MergeError: If nothing was added, or if an activation was not finite.
        """
        examples = self.num_examples
        if not examples:
            raise MergeError("There are no batches to collect statistics of; check the training data.")
        means = {}
        for name, total in self._fisher.items():
            if self.recipe.fisher == "example":
                means[f"fisher.{name}"] = self._processes.sum(total) / examples
            else:
                means[f"fisher.{name}"] = total / int(self._counts[1])  # the same on every process
        for name in self._inputs:
            tokens = self._processes.sum(self._tokens[name])
            for kind, sums in (("gram", self._inputs), ("gram_out", self._outputs)):
                if kind in self.recipe.kinds and name in sums and tokens > 0:
                    means[f"{kind}.{name}"] = self._processes.sum(sums[name]) / tokens
        return means | self._all_moments()

    def _all_moments(self) -> State:
        by_site = cast(dict[Site, Moments], gather_moments(self._moments, self._processes))
        raise_all(
            [
                f"The activations at {site.name} are not finite; look for NaN and infinity in data and weights."
                for site, moments in by_site.items()
                if not moments.is_finite
            ]
        )
        return to_tensors(by_site)


def collect_statistics(
    module: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    recipe: Recipe = Recipe(),
) -> State:
    """Collect the statistics of a module over batches of inputs ``(N, …)`` and labels ``(N,)``, on one process.

    Returns:
        The means, with the shapes that :meth:`StatisticsCollector.compute` says.
    """
    collector = StatisticsCollector(module, recipe=recipe)
    collector.update_all(islice(batches, recipe.batches))
    return collector.compute()


def _is_parameter(name: str, tensor: Tensor) -> bool:
    """Tell whether a tensor is merged as a task vector: BatchNorm's running statistics and integers are not."""
    return tensor.is_floating_point() and not is_running_statistic(name)


def _matrices(module: nn.Module, parameters: State) -> list[str]:
    """List the weights of linear layers and of attention, whose inputs can be seen; no kernels of convolutions."""
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
