"""The methods compute what the official implementations computed, on every parameter of a small CLIP-like model."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lightning_merge.checkpoints import open_weights
from lightning_merge.methods.magmax import MagMax
from lightning_merge.methods.ties import TIES
from lightning_merge.task_vectors import TaskVectors

GOLDEN = Path(__file__).parents[1] / "golden"


def groups(name):
    """The tensors of a golden file, by group and parameter; groups of one tensor have no parameter names."""
    tensors: dict = {}
    for key, value in load_file(GOLDEN / f"{name}.safetensors").items():
        group, _, parameter = key.partition(".")
        tensors.setdefault(group, {})[parameter] = value
    return tensors


def task_vectors(golden, method):
    experts = [golden[f"expert{i}"] for i in range(sum(group.startswith("expert") for group in golden))]
    return TaskVectors(
        open_weights(golden["pretrained"], "base"),
        [open_weights(expert, str(i)) for i, expert in enumerate(experts)],
        list(golden["pretrained"]),
        method.dtype,
    )


def merged(golden, method, expert=None):
    """The update of every parameter, or the one for an expert's task."""
    deltas = task_vectors(golden, method)
    survey = method.survey(deltas)
    contexts = {name: deltas.context(name, survey) for name in deltas}
    if expert is None:
        return {name: method.update(deltas[name], context) for name, context in contexts.items()}
    return {name: method.task_update(deltas[name], expert, context) for name, context in contexts.items()}


def compare(golden, method, found, expected, scaled, tolerance):
    assert found.keys() == expected.keys()
    for name, update in found.items():
        value = golden["pretrained"][name] + method.scale * update if scaled else update
        torch.testing.assert_close(value.to(expected[name].dtype), expected[name], rtol=tolerance, atol=tolerance)


# golden file, method, group of tensors, whether these are base + scale * update, tolerance (relative and absolute)
CASES = [
    ("ties", TIES(), "merged_tv", False, 0),
    ("ties", TIES(), "merged", True, 0),
    ("ties", TIES(density=0.1), "ties_topk10_mass_dis-mean", False, 0),
    ("ties", TIES(merge="sum"), "ties_topk20_mass_dis-sum", False, 0),
    ("ties", TIES(merge="max"), "ties_topk20_mass_dis-max", False, 0),
    ("ties", TIES(elect="none"), "ties_topk20_none_dis-mean", False, 0),
    ("ties", TIES(elect="none", disjoint=False), "ties_topk20_none_mean", False, 0),
    ("ties", TIES(elect="normfrac"), "ties_topk20_normfrac_dis-mean", False, 0),
    ("ties", TIES(elect="normmass"), "ties_topk20_normmass_dis-mean", False, 0),
    ("ties", TIES(trim="none"), "ties_none_mass_dis-mean", False, 0),
    ("ties", TIES(trim="none", elect="none", merge="magnitude", disjoint=False), "ties_none_none_magnitude", False, 0),
    ("ties", TIES(trim="std", deviations=1), "ties_std1_mass_dis-mean", False, 0),
    # MergeLM drops int(0.8 d) entries and keeps one more than the official d - int(0.2 d)
    ("ties", TIES(density=1690.5 / 8449), "mergelm_ties_080", False, 0),
    ("magmax", MagMax(), "merged", True, 0),
    ("magmax", MagMax(), "merged_tv", False, 0),
    ("magmax", MagMax(scale=1), "merged_lambda1", True, 0),
]


@pytest.mark.parametrize(("name", "method", "group", "scaled", "tolerance"), CASES, ids=lambda value: str(value)[:60])
def test_method_computes_what_the_official_code_computed(name, method, group, scaled, tolerance):
    golden = groups(name)
    compare(golden, method, merged(golden, method), golden[group], scaled, tolerance)


def test_ties_by_norm_fraction_but_for_the_last_entry():
    """The official scatter always keeps the very last entry of the flattened model; there is no reason to."""
    golden, method = groups("ties"), TIES(trim="normfrac", norm_fraction=0.9)
    found, expected = merged(golden, method), golden["ties_nf09_mass_dis-mean"]
    last = max(expected)
    assert found[last][-1, -1] != expected[last][-1, -1]
    found[last][-1, -1] = expected[last][-1, -1]
    compare(golden, method, found, expected, scaled=False, tolerance=0)
