"""KnOTS (Stoica et al., "Model merging with SVD to tie the KnOTS", ICLR 2025, arXiv 2410.19735)."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from lightning_merge.methods.base import Context, MergeMethod, Paper, check_choice, check_range
from lightning_merge.methods.base.blocks import Blocks
from lightning_merge.methods.base.coordinate_wrapper import CoordinateWrapper, Rule
from lightning_merge.methods.base.task_vectors import TaskVectors
from lightning_merge.methods.ties import TIES
from lightning_merge.utilities.linalg import above, sign_of_largest, svd


class Layer(NamedTuple):
    """A weight and, as one more column, its bias, which are seen as one matrix."""

    weight: str
    bias: str | None


class Survey(NamedTuple):
    """The layers of a model, their common bases, and the task vectors in them.

    Args:
        layers: The layer of every parameter that belongs to one.
        bases: Every layer's common basis ``U (m, k)``.
        blocks: Every layer's task vectors in that basis.
        inner: The survey of the method inside over all of them.
    """

    layers: dict[str, Layer]
    bases: dict[str, Tensor]
    blocks: Blocks
    inner: Any


def common_basis(matrices: Tensor, threshold: float = 1e-5, span: Tensor | None = None) -> Tensor:
    """Compute the left singular vectors of ``[Δ_1 | … | Δ_T]`` whose singular value is above the threshold.

    Args:
        matrices: ``(T, m, n)``.
        threshold: An absolute number, see :func:`lightning_merge.utilities.linalg.above`.
        span: ``(m, R)``, columns that span all others, if they are known: then R rows are decomposed instead of m.

    Returns:
        ``U (m, k)``. ``Uᵀ Δ_i (k, n)`` is expert i's block of ``diag(s) Vt``, which is what is merged.
    """
    if span is not None and span.shape[1] < len(span):
        Q = torch.linalg.qr(span).Q  # (m, R)
        U = Q @ common_basis(Q.mT @ matrices, threshold)
        return U * sign_of_largest(U)
    U, s, _ = svd(torch.cat(list(matrices), dim=1))
    return U[:, above(s, threshold)]


def join(weight: Tensor, bias: Tensor | None) -> Tensor:
    """Join the parameters of a layer, ``(T, m, …)`` and ``(T, m)``, into matrices ``(T, m, n)``.

    The scale of a normalization is a diagonal matrix, a convolution ``(out, in · height · width)``, a bias a column.
    """
    matrices = weight.reshape(len(weight), -1).diag_embed() if weight.ndim <= 2 else weight.flatten(2)
    return matrices if bias is None else torch.cat([matrices, bias.unsqueeze(-1)], dim=-1)


def find_layers(shapes: Mapping[str, torch.Size]) -> dict[str, Layer]:
    """Group weights and their biases into layers, by name: ``{parameter: layer}``. Others belong to no layer."""
    stems: dict[str, dict[str, str]] = {}
    for name in shapes:
        if match := re.fullmatch(r"(?:(.*)[._])?(weight|bias)", name):
            stems.setdefault(match[1] or "", {})[match[2]] = name
    layers: dict[str, Layer] = {}
    for parts in stems.values():
        if weight := parts.get("weight"):
            bias = parts.get("bias")
            if bias and shapes[bias] != shapes[weight][:1]:
                bias = None  # not one entry per row
            layers |= {name: Layer(weight, bias) for name in (weight, bias) if name}
    return layers


@dataclass(frozen=True)
class KnOTS(CoordinateWrapper):
    """Knowledge orientation through SVD: merge in a basis that the experts share, layer by layer.

    ``KnOTS(TIES())`` is KnOTS-TIES; KnOTS-DARE-TIES is KnOTS around DARE around ``TIES(density=1)``. The method inside
    sees the experts' coordinates in the common bases as its parameters, all layers together.

    Args:
        method: The method that merges the coordinates. The authors' ``scale`` for TIES is 0.5 to 0.6.
        layers: ``official`` follows the authors' code: a weight and its bias are one matrix, the scale of a
            normalization is a diagonal one, and parameters without a weight (class token, positional embeddings,
            projections) stay the base's. ``matrices`` sees every matrix by itself and averages the rest.
        sv_threshold: Singular values up to this one (an absolute number) are dropped, or, where that would be all of a
            layer, up to this share of the largest; not negative.
        concat_across_output: Put the experts' matrices side by side, so that they share a basis of their outputs;
            otherwise one above the other, and a basis of their inputs.
        scale: Scaling coefficient of the update; by default that of the method inside.
    """

    paper: ClassVar[Paper] = Paper("Stoica et al.", "ICLR", 2025, "2410.19735")
    formula: ClassVar[str] = "τ = U M; M merges the M_t; [Δ_1 | … | Δ_T] = U [M_1 | … | M_T], U its singular vectors"
    factorizes: ClassVar[bool] = True
    factorizations: ClassVar[tuple[int, int]] = (1, 0)
    reads_twice: ClassVar[bool] = True
    default_method: ClassVar[MergeMethod] = TIES()

    layers: Literal["official", "matrices"] = "official"
    sv_threshold: float = 1e-5
    concat_across_output: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, "layers", ("official", "matrices"))
        check_range(self, "sv_threshold", 0, float("inf"), open_high=True)

    def survey(self, task_vectors: TaskVectors) -> Survey:
        """Find the layers and their bases, and have the method inside survey the coordinates."""
        layers = self._find_layers(task_vectors)
        bases, sizes = {}, {}
        for key in {layer.weight: None for layer in layers.values()}:
            deltas = self._matrices(layers[key], task_vectors.__getitem__)  # (T, m, n)
            U = common_basis(deltas, self.sv_threshold, self._span(layers[key], task_vectors, deltas))  # (m, k)
            if U.shape[1]:  # otherwise no expert has changed this layer
                bases[key], sizes[key] = U, (U.shape[1], deltas.shape[2])

        def coordinates(key: str, read: Callable[[str], Tensor]) -> Tensor:
            return bases[key].mT @ self._matrices(layers[key], read)  # (T, k, n)

        blocks = Blocks(
            task_vectors,
            sizes,
            read=lambda key: coordinates(key, task_vectors.__getitem__),
            read_base=lambda key: coordinates(key, lambda name: task_vectors.context(name).finite_base[None])[0],
        )
        return Survey(layers, bases, blocks, self.inside.survey(blocks) if sizes else None)

    def _find_layers(self, task_vectors: TaskVectors) -> dict[str, Layer]:
        if self.layers == "official":
            return find_layers({name: task_vectors.shape(name) for name in task_vectors})
        return {name: Layer(name, None) for name in task_vectors if task_vectors.is_matrix(name)}

    def _matrices(self, layer: Layer, read: Callable[[str], Tensor]) -> Tensor:
        """Read a layer as matrices ``(T, m, n)`` whose columns are to share a basis."""
        joined = join(read(layer.weight), None if layer.bias is None else read(layer.bias))
        return joined if self.concat_across_output else joined.mT

    def _span(self, layer: Layer, task_vectors: TaskVectors, like: Tensor) -> Tensor | None:
        """Find columns ``(m, R)`` that span those of a layer's matrices; None if none are known."""
        factors = task_vectors.factors(layer.weight)
        if not factors or not self.concat_across_output or (layer.bias and task_vectors.factors(layer.bias) != []):
            return None
        return torch.cat([B.to(like) for B, _ in factors], dim=1)

    def merge_coordinates(self, deltas: Tensor, context: Context, rule: Rule) -> Tensor:
        """Merge a layer in its common basis, and take the parameter out of it: ``(T, …) -> (…)``."""
        survey: Survey = context.survey
        layer = survey.layers.get(context.name)
        if layer is None and self.layers == "matrices":
            return self.tensor(deltas, context)
        if layer is None or layer.weight not in survey.bases:
            return torch.zeros_like(deltas[0])
        key = layer.weight
        merged = survey.bases[key] @ rule(survey.blocks[key], survey.blocks.context(key, survey.inner))  # (m, n)
        merged = merged if self.concat_across_output else merged.mT
        if context.name == layer.bias:
            return merged[:, -1]
        weight = merged if layer.bias is None else merged[:, :-1]
        return weight.diagonal() if deltas.ndim == 2 else weight.reshape(deltas.shape[1:])
