"""The methods compute what the official implementations computed, on every parameter of a small CLIP-like model."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lightning_merge.checkpoints import open_weights
from lightning_merge.methods.base.task_vectors import ExpertTaskVectors
from lightning_merge.methods.breadcrumbs import Breadcrumbs
from lightning_merge.methods.consensus_ta import ConsensusTA
from lightning_merge.methods.dare import dare, keep_largest
from lightning_merge.methods.emr import EMR, emr
from lightning_merge.methods.magmax import MagMax
from lightning_merge.methods.pcb import PCB, competition
from lightning_merge.methods.randmix import randmix
from lightning_merge.methods.tall_masks import TALLMask, tall_masks
from lightning_merge.methods.task_arithmetic import TaskArithmetic
from lightning_merge.methods.ties import TIES

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
    return ExpertTaskVectors(
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


def compare(golden, method, found, expected, holds="update", tolerance=0.0):
    assert found.keys() == expected.keys()
    for name, update in found.items():
        value = update if holds == "update" else method.scale * update
        value = golden["pretrained"][name] + value if holds == "weights" else value
        torch.testing.assert_close(value.to(expected[name].dtype), expected[name], rtol=tolerance, atol=tolerance)


# golden file, method, group of tensors, what the group holds (the update, the scaled one, or the weights, which are
# base + scale * update), tolerance (relative and absolute; PCB's exp and tanh round by their place in the vector)
CASES = [
    ("ties", TIES(), "merged_tv", "update", 0),
    ("ties", TIES(), "merged", "weights", 0),
    ("ties", TIES(density=0.1), "ties_topk10_mass_dis-mean", "update", 0),
    ("ties", TIES(merge="sum"), "ties_topk20_mass_dis-sum", "update", 0),
    ("ties", TIES(merge="max"), "ties_topk20_mass_dis-max", "update", 0),
    ("ties", TIES(elect="none"), "ties_topk20_none_dis-mean", "update", 0),
    ("ties", TIES(elect="none", disjoint=False), "ties_topk20_none_mean", "update", 0),
    ("ties", TIES(elect="normfrac"), "ties_topk20_normfrac_dis-mean", "update", 0),
    ("ties", TIES(elect="normmass"), "ties_topk20_normmass_dis-mean", "update", 0),
    ("ties", TIES(trim="none"), "ties_none_mass_dis-mean", "update", 0),
    (
        "ties",
        TIES(trim="none", elect="none", merge="magnitude", disjoint=False),
        "ties_none_none_magnitude",
        "update",
        0,
    ),
    ("ties", TIES(trim="std", deviations=1), "ties_std1_mass_dis-mean", "update", 0),
    # MergeLM drops int(0.8 d) entries and keeps one more than the official d - int(0.2 d)
    ("ties", TIES(density=1690.5 / 8449), "mergelm_ties_080", "update", 0),
    ("magmax", MagMax(), "merged", "weights", 0),
    ("magmax", MagMax(), "merged_tv", "update", 0),
    ("magmax", MagMax(scale=1), "merged_lambda1", "weights", 0),
    ("pcb", PCB(), "merged_tv", "update", 1e-7),
    ("pcb", PCB(), "merged", "weights", 1e-7),
    ("pcb", PCB(), "pcb_es_r005_lam10", "update", 1e-7),
    ("pcb", PCB(scale=1.2), "pcb_es_r005_lam12", "scaled", 1e-7),
    ("pcb", PCB(variant="vision", scale=1.2), "pcb_vision_r005_lam12", "scaled", 1e-7),
    ("pcb", PCB(variant="readme", ratio=0.1, clamp=0.0001), "pcb_doc_r010_lam10", "update", 1e-7),
    ("tall_consensus", ConsensusTA(), "merged_tv", "update", 0),
    ("tall_consensus", ConsensusTA(), "merged", "weights", 0),
    ("tall_consensus", ConsensusTA(k=1), "consensus_ta_k1", "update", 0),
    ("tall_consensus", ConsensusTA(k=2), "consensus_ta_k2", "update", 0),
    ("tall_consensus", ConsensusTA(k=3), "consensus_ta_k3", "update", 0),
    ("tall_consensus", ConsensusTA(TIES(merge="sum"), k=1), "consensus_ties_k1", "update", 0),
    ("tall_consensus", ConsensusTA(TIES(merge="sum"), k=2), "consensus_ties_k2", "update", 0),
    ("tall_consensus", ConsensusTA(TIES(merge="sum"), k=3), "consensus_ties_k3", "update", 0),
    ("emr", EMR(), "merged_tv", "update", 0),
    ("emr", EMR(), "merged", "weights", 0),
    ("breadcrumbs", Breadcrumbs(), "merged_tv", "update", 0),
    ("breadcrumbs", Breadcrumbs(), "merged", "weights", 0),
    ("breadcrumbs", Breadcrumbs(), "breadcrumbs_b02_g01", "update", 0),
    ("breadcrumbs", Breadcrumbs(remove_first=False), "breadcrumbs_b02_g01_keepfirst", "update", 0),
    ("breadcrumbs", Breadcrumbs(beta=0.85, gamma=0.01), "breadcrumbs_b085_g001", "update", 0),
]


@pytest.mark.parametrize(("name", "method", "group", "holds", "tolerance"), CASES)
def test_method_computes_what_the_official_code_computed(name, method, group, holds, tolerance):
    golden = groups(name)
    compare(golden, method, merged(golden, method), golden[group], holds, tolerance)


# golden file, method, the expert's group of tensors ({i} is the expert)
TASK_CASES = [
    ("tall_consensus", TALLMask(), "recon_ta_lam04_t{i}", "update", 0),
    ("tall_consensus", TALLMask(TIES(merge="sum")), "recon_ties_lam04_t{i}", "update", 0),
    ("emr", EMR(), "recon_tv{i}", "update", 1e-7),
]


@pytest.mark.parametrize("i", range(4))
@pytest.mark.parametrize(("name", "method", "group", "holds", "tolerance"), TASK_CASES)
def test_task_model_is_what_the_official_code_computed(name, method, group, holds, tolerance, i):
    golden = groups(name)
    compare(golden, method, merged(golden, method, expert=i), golden[group.format(i=i)], holds, tolerance)


@pytest.mark.parametrize(("inner", "group"), [(TaskArithmetic(), "ta"), (TIES(merge="sum"), "ties")])
def test_tall_masks_are_the_official_ones(inner, group):
    golden = groups("tall_consensus")
    deltas = task_vectors(golden, inner)
    for name, update in merged(golden, inner).items():
        masks = tall_masks(deltas[name], update, 0.4).bool()
        assert torch.equal(masks, torch.stack([golden[f"mask_{group}_lam04_t{i}"][name] for i in range(4)]).bool())


def test_emr_masks_and_rescalers_are_the_official_ones():
    golden = groups("emr")
    deltas = task_vectors(golden, EMR())
    for name, delta in deltas.items():
        assert torch.equal(emr(delta)[1].bool(), torch.stack([golden[f"mask{i}"][name] for i in range(4)]).bool())
    torch.testing.assert_close(EMR().survey(deltas), golden["rescalers"][""], rtol=1e-6, atol=0)  # float32 sums


def test_pcb_weights_are_the_official_ones():
    golden, method = groups("pcb"), PCB()
    deltas = task_vectors(golden, method)
    survey = method.survey(deltas)
    for name, delta in deltas.items():
        weights = survey.scores.normalize(competition(delta, survey.magnitudes))
        expected = torch.stack([golden[f"scale_es{i}"][name] for i in range(4)])
        torch.testing.assert_close(weights, expected, rtol=1e-6, atol=1e-6)


def test_dare_given_the_official_masks():
    """The official masks come from one random stream over experts and parameters; here every parameter has its own."""
    golden, inner = groups("dare"), TaskArithmetic(scale=0.3)
    for name, deltas in task_vectors(golden, inner).items():
        expected = torch.stack([golden[f"dare_expert{i}"][name] for i in range(4)])
        sparse = dare(deltas, expected != 0, drop=0.9)
        assert torch.equal(sparse, expected)
        update = inner.tensor(sparse, None)
        torch.testing.assert_close(update, golden["merged_tv"][name], rtol=1e-7, atol=1e-7)
        torch.testing.assert_close(
            golden["pretrained"][name] + inner.scale * update, golden["merged"][name], rtol=1e-7, atol=1e-7
        )


def test_dare_by_magnitude():
    golden = groups("dare")
    names = golden["magdrop_expert0"].keys()
    assert golden["pretrained"].keys() - names == {"model.logit_scale"}  # the official code fails on a scalar
    deltas = task_vectors(golden, TaskArithmetic())
    for name in names:
        expected = torch.stack([golden[f"magdrop_expert{i}"][name] for i in range(4)])
        assert torch.equal(dare(deltas[name], keep_largest(deltas[name], 0.9), drop=0.9), expected)


def test_randmix_given_the_official_choice():
    golden = groups("magmax")
    for name, deltas in task_vectors(golden, MagMax()).items():
        choice = (deltas == golden["randmix_seed0"][name]).int().argmax(dim=0)
        assert torch.equal(randmix(deltas, choice), golden["randmix_seed0"][name])


def test_ties_by_norm_fraction_but_for_the_last_entry():
    """The official scatter always keeps the very last entry of the flattened model; there is no reason to."""
    golden, method = groups("ties"), TIES(trim="normfrac", norm_fraction=0.9)
    found, expected = merged(golden, method), golden["ties_nf09_mass_dis-mean"]
    last = max(expected)
    assert found[last][-1, -1] != expected[last][-1, -1]
    found[last][-1, -1] = expected[last][-1, -1]
    compare(golden, method, found, expected)
