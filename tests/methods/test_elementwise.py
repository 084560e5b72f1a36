"""What holds for the elementwise methods whatever the models: edge cases, invariants, and formulas stated anew."""

import re

import pytest
import torch

from lightning_merge.checkpoints import open_weights
from lightning_merge.merging.merge import merge
from lightning_merge.methods.base import Context
from lightning_merge.methods.base.task_vectors import ExpertTaskVectors
from lightning_merge.methods.breadcrumbs import Breadcrumbs
from lightning_merge.methods.consensus_ta import ConsensusTA
from lightning_merge.methods.dare import DARE
from lightning_merge.methods.della import DELLA
from lightning_merge.methods.emr import EMR
from lightning_merge.methods.magnitude import Magnitude, magnitude
from lightning_merge.methods.pcb import PCB
from lightning_merge.methods.randmix import RandMix
from lightning_merge.methods.sce import SCE, sce
from lightning_merge.methods.tall_masks import TALLMask
from lightning_merge.methods.task_arithmetic import TaskArithmetic
from lightning_merge.methods.ties import TIES, disjoint_merge, elect, joint_merge, vote
from lightning_merge.utilities.errors import MergeError
from lightning_merge.utilities.order_statistics import kth_magnitude, kth_value, moments, norm_fraction_magnitude

METHODS = [
    TIES(trim="normfrac", elect="normfrac"),
    TIES(trim="std", elect="normmass"),
    TIES(trim="none", elect="none", merge="median", disjoint=False),
    PCB(),
    PCB(variant="vision"),
    PCB(variant="readme"),
    TALLMask(),
    ConsensusTA(),
    ConsensusTA(TIES(merge="sum"), k=1),
    EMR(),
    DARE(),
    DARE(TIES(), drop=0.5),
    DARE(strategy="magnitude"),
    Breadcrumbs(),
    Breadcrumbs(per="layer", beta=0.85, gamma=0.01),
    Magnitude(rescale=True),
    Magnitude(TIES(trim="none"), density=0.2),
    DELLA(),
    DELLA(TaskArithmetic(), rescale="l1"),
    SCE(),
    SCE(select_topk=0.1),
    RandMix(),
]
SHAPES = {"matrix": (6, 4), "conv": (3, 2, 3, 3), "bias": (7,), "scalar": (), "thin": (5, 1), "empty": (0, 4)}


def models(num_experts, step=0.01, seed=0):
    generator = torch.Generator().manual_seed(seed)
    base = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    experts = [
        {name: w + step * torch.randn(w.shape, generator=generator) for name, w in base.items()}
        for _ in range(num_experts)
    ]
    return base, experts


def task_vectors(base, experts, dtype=torch.float32):
    opened = [open_weights(expert, str(i)) for i, expert in enumerate(experts)]
    return ExpertTaskVectors(open_weights(base, "base"), opened, list(base), dtype)


def updates(method, base, experts, expert=None):
    deltas = task_vectors(base, experts)
    survey = method.survey(deltas)
    rule = method.update if expert is None else lambda d, c: method.task_update(d, expert, c)
    return {name: rule(deltas[name], deltas.context(name, survey)) for name in deltas}


@pytest.mark.parametrize("method", METHODS, ids=repr)
@pytest.mark.parametrize("num_experts", [1, 3, 9], ids=["one expert", "three", "more than the rank"])
def test_updates_are_finite_and_inputs_untouched(method, num_experts):
    base, experts = models(max(num_experts, method.min_experts))
    before = [{name: w.clone() for name, w in model.items()} for model in (base, *experts)]
    merged = merge(base, {str(i): expert for i, expert in enumerate(experts)}, method)
    for weights in (merged.weights, merged.for_task("0")):
        assert all(weights[name].shape == w.shape and weights[name].isfinite().all() for name, w in base.items())
    assert all(
        torch.equal(w, old[name])
        for model, old in zip((base, *experts), before, strict=True)
        for name, w in model.items()
    )


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_rules_do_not_change_their_arguments(method):
    deltas = task_vectors(*models(3))
    survey = method.survey(deltas)
    for name in deltas:
        given = deltas[name]
        method.update(given, deltas.context(name, survey))
        method.task_update(given, 1, deltas.context(name, survey))
        assert torch.equal(given, deltas[name])


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_nothing_changes_where_no_expert_did(method):
    base, _ = models(0)
    for expert in (None, 1):
        assert not any(update.any() for update in updates(method, base, [base, base], expert).values())


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_duplicate_and_unchanged_experts_are_no_trouble(method):
    base, experts = models(1)
    found = updates(method, base, [*experts, *experts, base])
    assert all(update.isfinite().all() for update in found.values())
    assert any(update.any() for update in found.values())


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_the_order_of_parameters_does_not_matter(method):
    base, experts = models(3)
    found = updates(method, base, experts)
    turned = updates(method, dict(reversed(base.items())), experts)
    for name, update in found.items():
        torch.testing.assert_close(turned[name], update, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("create", "message"),
    [
        (lambda: TIES(norm_fraction=0), r"norm_fraction must lie in \(0, 1\]"),
        (lambda: TIES(deviations=-1), r"deviations must lie in \[0, inf\)"),
        (lambda: TIES(trim="top"), "trim must be one of topk, normfrac, std, none"),
        (lambda: TIES(elect="majority"), "elect must be one of mass, normmass, normfrac, none"),
        (lambda: TIES(merge="median"), "merge must be one of mean, sum, max, got"),
        (lambda: TIES(merge="max", elect="none"), "merge must be one of mean, sum, got"),
        (lambda: TIES(merge="max", disjoint=False), "merge must be one of mean, sum, median, magnitude"),
        (lambda: PCB(ratio=0), r"ratio must lie in \(0, 1\]"),
        (lambda: PCB(clamp=0.5), r"clamp must lie in \[0, 0.5\)"),
        (lambda: PCB(variant="best"), "variant must be one of es, vision, readme"),
        (lambda: TALLMask(mask_threshold=-0.1), r"mask_threshold must lie in \[0, inf\)"),
        (lambda: ConsensusTA(mask_threshold=-0.1), r"mask_threshold must lie in \[0, inf\)"),
        (lambda: ConsensusTA(k=-1), r"k must lie in \[0, inf\)"),
        (lambda: DARE(drop=1), r"drop must lie in \[0, 1\)"),
        (lambda: DARE(strategy="smallest"), "strategy must be one of random, magnitude"),
        (lambda: Breadcrumbs(beta=0), r"beta must lie in \(0, 1\]"),
        (lambda: Breadcrumbs(gamma=1), r"gamma must lie in \[0, 1\)"),
        (lambda: Breadcrumbs(per="model"), "per must be one of row, layer"),
        (lambda: Magnitude(density=0), r"density must lie in \(0, 1\]"),
        (lambda: DELLA(density=0), r"density must lie in \(0, 1\]"),
        (lambda: DELLA(density=0.9, epsilon=0.2), r"epsilon must lie in \[0, 0.1\)"),
        (lambda: DELLA(rescale="l2"), "rescale must be one of probability, l1, none"),
        (lambda: SCE(select_topk=0), r"select_topk must lie in \(0, 1\]"),
    ],
)
def test_bad_hyper_parameters_fail_at_once_and_name_what_is_allowed(create, message):
    with pytest.raises(ValueError, match=message):
        create()


@pytest.mark.parametrize("method", [TALLMask(), EMR()])
def test_one_expert_is_recovered_by_methods_that_keep_a_model_per_task(method):
    base, experts = models(1)
    merged = merge(base, {"a": experts[0]}, method).for_task("a")
    for name, weight in experts[0].items():
        torch.testing.assert_close(merged[name], weight, rtol=1e-6, atol=1e-6)


def test_tall_masks_of_threshold_zero_leave_the_merged_model():
    base, experts = models(3)
    merged = merge(base, {str(i): e for i, e in enumerate(experts)}, TALLMask(mask_threshold=0))
    assert all(torch.equal(weight, merged.weights[name]) for name, weight in merged.for_task("1").items())


def test_consensus_of_nobody_is_the_method_inside_and_of_too_many_the_base():
    base, experts = models(3)
    inside = updates(TaskArithmetic(), base, experts)
    assert all(torch.equal(u, inside[name]) for name, u in updates(ConsensusTA(k=0), base, experts).items())
    assert not any(update.any() for update in updates(ConsensusTA(k=4), base, experts).values())


def test_consensus_around_a_method_per_task_is_per_task():
    base, experts = models(3)
    assert ConsensusTA(EMR()).per_task
    assert not ConsensusTA().per_task
    own = [updates(ConsensusTA(EMR(), k=1), base, experts, i)["matrix"] for i in range(2)]
    assert not torch.equal(*own)


def test_pcb_by_its_formula_on_the_model_in_one_piece():
    base, experts = models(3)
    deltas = task_vectors(base, experts)
    flat = torch.cat([d.reshape(3, -1) for _, d in deltas.items()], dim=1)
    d = flat.shape[1]

    def clamp(x, low, high):
        ordered = x.sort(dim=1).values
        return x.clamp(ordered[:, int(d * low)].view(3, 1), ordered[:, int(d * (1 - high) - 1)].view(3, 1))

    def normalize(x):
        low, high = x.amin(dim=1, keepdim=True), x.amax(dim=1, keepdim=True)
        return (x - low) / (high - low)

    magnitudes = clamp(flat.abs(), 0.1, 0.1)
    signed = flat.sign() * normalize(magnitudes)
    inter = (signed.unsqueeze(1) * signed.unsqueeze(0)).tanh().sum(dim=1)
    weights = normalize(clamp((3 * signed.square()).exp() * inter, 0.7, 0))
    expected = (flat.sign() * magnitudes * weights).sum(dim=0) / weights.sum(dim=0).clamp(min=1e-12)
    found = updates(PCB(ratio=0.3, clamp=0.1), base, experts)
    torch.testing.assert_close(torch.cat([u.flatten() for u in found.values()]), expected, rtol=1e-5, atol=1e-8)


def test_dare_keeps_the_expectation():
    base, experts = {"w": torch.zeros(200, 200)}, [{"w": torch.ones(200, 200)}]
    found = updates(DARE(drop=0.9), base, experts)["w"]
    assert found.unique().tolist() == pytest.approx([0, 10])
    assert found.mean() == pytest.approx(1, abs=0.06)  # four standard deviations
    assert updates(DARE(drop=0.9, rescale=False), base, experts)["w"].max() == 1


def test_dare_surveys_what_it_merges():
    base, experts = models(3)
    wrapper = DARE(TIES(density=0.3), drop=0.4)
    deltas = task_vectors(base, experts)
    sparse = {name: wrapper.transform(deltas[name], deltas.context(name)) for name in deltas}
    dropped = [{name: base[name] + sparse[name][i] for name in base} for i in range(3)]
    expected = updates(TIES(density=0.3), base, dropped)
    for name, update in updates(wrapper, base, experts).items():
        torch.testing.assert_close(update, expected[name], rtol=0, atol=1e-6)


def test_draws_of_nested_methods_are_independent():
    """With one stream for both, DARE would drop exactly what DELLA keeps."""
    base, experts = {"w": torch.zeros(100, 100)}, [{"w": torch.ones(100, 100)}]
    method = DARE(DELLA(TaskArithmetic(), epsilon=0, rescale="none"), drop=0.5, rescale=False)
    assert updates(method, base, experts)["w"].mean() == pytest.approx(0.25, abs=0.02)


@pytest.mark.parametrize("seed", [0, 1])
def test_random_methods_depend_on_the_seed_alone(seed):
    base, experts = models(3)
    for method in (DARE(drop=0.5), DELLA(), RandMix()):
        first, again, other = (merge(base, experts, method, seed=s).weights for s in (seed, seed, seed + 1))
        assert all(torch.equal(first[name], again[name]) for name in base)
        assert not torch.equal(first["matrix"], other["matrix"])


def test_magnitude_keeps_exactly_the_largest():
    deltas = torch.tensor([[[1.0, -5.0, 2.0], [0.5, 4.0, -3.0]]])
    assert magnitude(deltas, 0.6).tolist() == [[[0, -5, 0], [0, 4, -3]]]
    ties = torch.ones(2, 4, 5)
    assert magnitude(ties, 0.33).count_nonzero(dim=(1, 2)).tolist() == [6, 6]  # int(0.33 · 20), equal or not
    rescaled = magnitude(deltas, 0.6, rescale=True)
    assert rescaled.abs().sum() == pytest.approx(15.5)
    assert magnitude(torch.tensor([3.0]), 0.1).tolist() == [3]  # a scalar stays


def test_della_spares_the_large_and_keeps_the_expectation():
    base, experts = {"w": torch.zeros(4000, 3)}, [{"w": torch.tensor([1.0, -3.0, 2.0]).repeat(4000, 1)}]
    kept = updates(DELLA(TaskArithmetic(), density=0.5, epsilon=0.3, rescale="none"), base, experts)["w"] != 0
    assert kept.double().mean(dim=0).tolist() == pytest.approx([0.2, 0.8, 0.5], abs=0.04)
    mean = updates(DELLA(TaskArithmetic(), density=0.5, epsilon=0.3), base, experts)["w"].mean(dim=0)
    assert mean.tolist() == pytest.approx([1, -3, 2], abs=0.15)
    dense = updates(DELLA(TaskArithmetic(), density=1), base, experts)["w"]
    assert torch.equal(dense, experts[0]["w"])


def test_breadcrumbs_per_layer():
    base, experts = {"w": torch.zeros(2, 5)}, [{"w": torch.tensor([[9.0, 1, 2, 3, 4], [-8, -7, 5, 6, 0]])}]
    method = Breadcrumbs(beta=0.3, gamma=0.2, per="layer")
    assert updates(method, base, experts)["w"].tolist() == [[0, 0, 0, 0, 0], [0, -7, 5, 6, 0]]


def test_sce_by_its_formula():
    deltas = torch.tensor([[1.0, 2.0, 0.5], [3.0, -4.0, 0.5]])
    # the third entry does not vary; of the other two, half is kept: the second, whose sum is negative
    assert sce(deltas, 0.5).tolist() == [0, -4, 0]
    w = torch.tensor([5.25, 25.25]) / 30.5
    expected = [w[0] * 1 + w[1] * 3, -4, 0.5]
    assert sce(deltas).tolist() == pytest.approx([float(x) for x in expected])
    torch.testing.assert_close(sce(1e-6 * deltas), 1e-6 * sce(deltas))  # no floor


def test_ties_elects_by_share_of_the_norm():
    trimmed, norms = torch.tensor([[1.0], [-2.0], [1.0]]), torch.tensor([1.0, 4.0, 1.0])

    def majority():
        return torch.tensor(-1.0)

    assert elect(trimmed, majority).item() == -1  # the masses cancel out
    assert elect(trimmed, majority, "normmass", norms).item() == 1  # 1 - 1/4 + 1
    assert elect(trimmed[:2], majority, "normfrac", torch.tensor([4.0, 2.0])).item() == -1
    unchanged = torch.tensor([[1.0], [0.0]]), majority, "normmass", torch.tensor([1.0, 0.0])
    assert elect(*unchanged).item() == 1


def test_ties_looks_for_the_majority_once_and_only_where_votes_cancel():
    cancel = torch.tensor([[1.0, 5.0, -4.0, 2.0], [-1.0, 3.0, -4.0, 2.0]])

    class Counting:
        def __init__(self, deltas):
            self.deltas, self.looks = deltas, 0

        def __iter__(self):
            return iter(["w"])

        def numel(self, name):
            return self.deltas[0].numel()

        def stream(self):
            self.looks += 1
            yield "w", self.deltas

    for deltas, looks in ((cancel, 1), (cancel[:, 1:], 0)):
        counting = Counting(deltas)
        survey = TIES(density=1).survey(counting)
        before = counting.looks
        for _ in range(2):
            found = TIES(density=1).update(deltas, Context("w", survey=survey)).tolist()
        assert counting.looks - before == looks
        assert found == [1, 4, -4, 2][-len(found) :]  # two entries of three elect +


def test_randmix_takes_every_entry_from_one_expert():
    base, experts = {"w": torch.zeros(60, 50)}, [{"w": torch.full((60, 50), float(i))} for i in range(1, 4)]
    shares = updates(RandMix(), base, experts)["w"].flatten().int().bincount(minlength=4) / 3000
    assert shares.tolist() == pytest.approx([0, 1 / 3, 1 / 3, 1 / 3], abs=0.04)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_order_statistics_of_a_model_in_chunks(dtype):
    rows = torch.randn(3, 1001, generator=torch.Generator().manual_seed(0), dtype=dtype)
    rows[1] *= 1e-6
    rows[0, :50] = 0
    rows[2, :50] = rows[2, 50]

    def chunks():
        return rows.split(130, dim=1)

    for k in (1, 2, 20, 500, 1001):
        assert torch.equal(kth_value(chunks, k), rows.kthvalue(k, dim=1).values)
        assert torch.equal(kth_magnitude(chunks, k), rows.abs().kthvalue(k, dim=1).values)
    for fraction in (0.2, 0.9, 0.99):
        threshold = norm_fraction_magnitude(chunks, fraction)
        squares = rows.double().square()
        for held, least in ((rows.abs() >= threshold.view(3, 1), True), (rows.abs() > threshold.view(3, 1), False)):
            assert (((squares * held).sum(dim=1) >= fraction * squares.sum(dim=1)) == least).all()
    mean, deviation = moments(chunks)
    torch.testing.assert_close(mean, rows.double().mean(dim=1))
    torch.testing.assert_close(deviation, rows.double().std(dim=1))
    assert not norm_fraction_magnitude(lambda: [torch.zeros(2, 5, dtype=dtype)], 0.9).any()


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda x, sign: vote(x, "most"), "There is no election 'most'; give one of mass, normmass, normfrac."),
        (lambda x, sign: vote(x, "normmass"), "needs the norms (2,) of the experts, got none."),
        (lambda x, sign: elect(x, sign.sum, "normfrac", sign), "needs the norms (2,) of the experts, got shape (3,)."),
        (lambda x, sign: disjoint_merge(x, sign, "median"), "no disjoint merge 'median'; give one of mean, sum, max."),
        (lambda x, sign: disjoint_merge(x, None, "max"), "The largest magnitude gets the elected sign: give the signs"),
        (lambda x, sign: joint_merge(x, sign, "max"), "There is no joint merge 'max'"),
    ],
)
def test_arguments_that_do_not_fit(call, sentence):
    with pytest.raises(MergeError, match=re.escape(sentence)):
        call(torch.ones(2, 3), torch.ones(3))


@pytest.mark.parametrize("rule", ["normmass", "normfrac"])
def test_shares_of_small_and_large_norms_are_not_lost(rule):
    trimmed = torch.tensor([[1.0, -2.0, 3.0], [-4.0, 1.0, 2.0]])
    norms = torch.tensor([4.0, 5.0])
    expected = vote(trimmed, rule, norms)
    for size in (1e-30, 1e30):
        assert torch.equal(vote(trimmed * size, rule, norms * size), expected)
