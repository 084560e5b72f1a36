"""What the authors' code computed: RegMean's and MaTS' repositories, on made-up Fishers and Gram matrices."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lightning_merge.checkpoints import open_weights
from lightning_merge.merging.merge import merge
from lightning_merge.methods.base.task_vectors import ExpertTaskVectors
from lightning_merge.methods.fisher import Fisher
from lightning_merge.methods.mats import MaTS
from lightning_merge.methods.regmean import RegMean

GOLDEN = Path(__file__).parent.parent / "golden"
NAME = "fisher_regmean_mats"
ULPS = 3e-7  # of weights between 1 and 2: the authors average in float32
STOPPED = 5e-6  # the authors iterate in float32: one step of the exact iteration is as close as that, the next are not

# golden name, method, tensor group, is the group base + update, dtype (None: the method's own), tolerance
CASES = [
    (NAME, Fisher(), "fisher_plain", True, None, ULPS),
    (NAME, Fisher(normalize="param"), "fisher_param", True, None, ULPS),
    (NAME, Fisher(normalize="model"), "fisher_model", True, None, ULPS),
    (NAME, Fisher(smooth=0.0, floor=1e-8), "mats_fisher", True, None, ULPS),
    (NAME, RegMean(), "merged", True, None, ULPS),
    (NAME, RegMean(), "merged_tv", False, None, ULPS),
    (NAME, RegMean(reduce_off_diagonal=0.9), "regmean_a09", True, None, ULPS),
    (NAME, RegMean(reduce_off_diagonal=0.9), "mats_regmean_l09", True, None, ULPS),
    (NAME, RegMean(reduce_off_diagonal=1.0), "regmean_a10", True, None, ULPS),
    (NAME, RegMean(reduce_off_diagonal=0.0), "regmean_diag", True, None, ULPS),
    (NAME, MaTS(iterations=10, backward=False, initialization="average"), "mats_cg_regmean_it10", True, None, ULPS),
]
ITERATED = {
    "mats_cg_regmean_it200": MaTS(iterations=200, backward=False, initialization="average"),
    "mats_cg_block_it100": MaTS(iterations=100, initialization="average"),
}


def load(name):
    groups = {}
    for key, tensor in load_file(GOLDEN / f"{name}.safetensors").items():
        group, _, parameter = key.partition(".")
        groups.setdefault(group, {})[parameter] = tensor
    count = sum(group.startswith("expert") for group in groups)
    statistics = [
        {f"fisher.{k}": v for k, v in groups[f"fisher{i}"].items()}
        | {f"gram.{k}.weight": v for k, v in groups[f"gram{i}"].items()}
        | {f"gram_out.{k}.weight": v for k, v in groups[f"outgram{i}"].items()}
        for i in range(count)
    ]
    return groups, [groups[f"expert{i}"] for i in range(count)], statistics


def open_task_vectors(name, dtype):
    groups, experts, statistics = load(name)
    base = open_weights(groups["pretrained"], "base")
    return groups, ExpertTaskVectors(
        base,
        [open_weights(expert, f"expert {i}") for i, expert in enumerate(experts)],
        list(base),
        dtype,
        statistics=[open_weights(source, f"statistics {i}") for i, source in enumerate(statistics)],
    )


@pytest.mark.parametrize(
    ("name", "method", "group", "scaled", "dtype", "tolerance"), CASES, ids=[case[2] for case in CASES]
)
def test_golden(name, method, group, scaled, dtype, tolerance):
    groups, task_vectors = open_task_vectors(name, dtype or method.dtype)
    survey = method.survey(task_vectors)
    assert set(groups[group]) == set(groups["pretrained"])
    for parameter in groups["pretrained"]:
        context = task_vectors.context(parameter, survey)
        found = method.update(task_vectors[parameter], context)
        if scaled:
            found = context.base + method.scale * found
        expected = groups[group][parameter].to(found)
        torch.testing.assert_close(found, expected, rtol=0, atol=tolerance, msg=lambda m, p=parameter: f"{p}: {m}")


@pytest.mark.parametrize("group", ITERATED)
def test_an_iteration_ends_where_the_authors_s_does(group):
    """Or one step beside it: in float32, the processor decides at which of two steps a residual is small enough."""
    groups, task_vectors = open_task_vectors(NAME, torch.float64)
    method = ITERATED[group]
    survey = method.survey(task_vectors)
    assert set(groups[group]) == set(groups["pretrained"])
    for parameter, expected in groups[group].items():
        deltas, context = task_vectors[parameter], task_vectors.context(parameter, survey)

        def after(steps, rtol=0.0, deltas=deltas, context=context):
            return context.base + method.scale * replace(method, iterations=steps, rtol=rtol).update(deltas, context)

        ended = after(method.iterations, method.rtol)
        steps = next(i for i in range(1, method.iterations + 1) if torch.equal(after(i), ended))
        near = [ended, after(steps + 1), after(max(steps - 1, 1))]
        assert min(float((found - expected).abs().max()) for found in near) <= STOPPED, parameter


def test_every_output_of_the_golden_file_is_covered():
    groups, _, _ = load(NAME)
    inputs = ("pretrained", "expert", "fisher0", "fisher1", "fisher2", "fisher3", "gram", "outgram")
    assert {group for group in groups if not group.startswith(inputs)} == {case[2] for case in CASES} | set(ITERATED)


def test_a_whole_merge_gives_the_same():
    groups, experts, statistics = load(NAME)
    merged = merge(groups["pretrained"], experts, RegMean(), statistics={str(i): s for i, s in enumerate(statistics)})
    for parameter, expected in groups["merged"].items():
        torch.testing.assert_close(merged.weights[parameter], expected, rtol=0, atol=ULPS)
