"""TACT: the numbers of the official code, one process and two, what it is for, and what it refuses."""

from __future__ import annotations

import copy
import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.func import functional_call

from lightning_merge.repair import Correction, Moments, corrected_weights, find_sites, fold, insert, tact
from lightning_merge.repair.calibration import Calibration, Goals, correct_in_turn, observe
from lightning_merge.utilities.errors import MergeError
from lightning_merge.utilities.sites import Site
from tests.repair.models import VGG, expert_of, images, mean_of, resnet18, upsampled, vit
from tests.toys import golden
from tests.utilities.test_processes import on_processes

OFFICIAL_SITES = {
    "encoder/BatchNorm_0": "features.1",
    "encoder/BatchNorm_1": "features.5",
    "encoder/BatchNorm_2": "features.9",
    "encoder/BatchNorm_3": "hidden.0",
    "encoder/BatchNorm_4": "hidden.2",
    "BatchNorm_0": "unit",
}


def from_flax(flat: dict[str, torch.Tensor], head: torch.Tensor) -> dict[str, torch.Tensor]:
    """The weights of the official model as those of the VGG of the tests, in float64."""
    found = {"logit_scale": flat["logit_scale"], "head.weight": head.T}
    for i, place in enumerate((0, 4, 8)):
        found[f"features.{place}.weight"] = flat[f"encoder/Conv_{i}/kernel"].permute(3, 2, 0, 1)
        found[f"features.{place + 1}.weight"] = flat[f"encoder/LayerNorm_{i}/scale"]
        found[f"features.{place + 1}.bias"] = flat[f"encoder/LayerNorm_{i}/bias"]
    for i, place in enumerate((0, 2)):
        found[f"hidden.{place}.weight"] = flat[f"encoder/Dense_{i}/kernel"].T
        found[f"hidden.{place}.bias"] = flat[f"encoder/Dense_{i}/bias"]
    found["projection.weight"] = flat["visual_projection/kernel"].T
    return {name: tensor.double() for name, tensor in found.items()}


def test_the_official_run_is_met():
    groups = golden("nonlocal_tact_official_T4")
    model = VGG((16, "m", 32, "m", 32), 64, 32, 10).eval().double()
    head = groups["expert_perm0"]["classifier/Dense_0/kernel"]
    expert, merged = (from_flax(groups[name], head) for name in ("expert_perm0", "merged_perm"))
    train, test = (upsampled(groups[name][""] / 8 - 1).double() for name in ("x_train0", "x_test0"))
    batches = [train[index] for index in groups["batch_idx0"][""].long()]
    with torch.no_grad():
        before = functional_call(model, merged, (test,))
    torch.testing.assert_close(before, groups["logits_merged0"][""].double(), rtol=0, atol=2e-5)

    sites = find_sites(model, test)
    assert [site.name for site in sites] == list(OFFICIAL_SITES.values())
    theirs = official_statistics(groups["expert_stats0"], "")
    reached = official_statistics(groups["tact0"], "batch_stats/")
    data, statistics = Calibration("rot90", batches), partial(Moments, momentum=0.99)
    goal = observe(model, expert, sites, data, statistics)
    affine = Goals({s: m.mean for s, m in goal.items()}, {s: m.std for s, m in goal.items()}, math.inf).affine
    now = correct_in_turn(model, merged, sites, affine, data, statistics)
    for found, wanted in ((goal, theirs), (now, reached)):
        for site in sites:
            torch.testing.assert_close(found[site].mean, wanted[site.name][0], rtol=0, atol=1e-5)
            torch.testing.assert_close(found[site].variance, wanted[site.name][1], rtol=1e-5, atol=1e-5)

    # the official statistics are kept in float32; with them the logits agree as closely as before
    scale = {s: (theirs[s.name][1] / (reached[s.name][1] + 1e-5)).sqrt() for s in sites}
    shift = {s: theirs[s.name][0] - scale[s] * reached[s.name][0] for s in sites}
    own = {s: affine(s, now[s]) for s in sites}
    ours = Correction({s: own[s][0] for s in sites}, {s: own[s][1] for s in sites})
    for correction, tolerance in ((Correction(scale, shift), 2e-5), (ours, 5e-5)):
        with torch.no_grad(), correction.applied(model):
            after = functional_call(model, merged, (test,))
        torch.testing.assert_close(after, groups["logits_tact0"][""].double(), rtol=0, atol=tolerance)


def official_statistics(group: dict[str, torch.Tensor], prefix: str) -> dict[str, tuple[torch.Tensor, ...]]:
    """The mean and the variance of every site."""
    return {
        site: tuple(group[f"{prefix}{name}/{kind}"].double() for kind in ("mean", "var"))
        for name, site in OFFICIAL_SITES.items()
    }


def make(module: nn.Module, size: int = 8):
    experts = {"a": expert_of(module, 1), "b": expert_of(module, 2)}
    data = {
        "a": [(x, torch.zeros(len(x))) for x in images(40, size, 1).split(20)],
        "b": list(images(40, size, 2).split(20)),
    }
    return experts, mean_of(*experts.values()), data


@pytest.mark.parametrize("build", [VGG, vit, resnet18])
def test_every_site_gets_the_statistics_of_the_task_s_expert(build):
    module = build().double()
    experts, merged, data = make(module)
    corrections = tact(module, merged, experts, data, max_gain=1e6, eps=1e-20)
    for task, correction in corrections.items():
        # one batch, where correcting in turn is exact: later sites see the corrected outputs of the earlier ones
        batch = torch.cat([item[0] if isinstance(item, tuple) else item for item in data[task]])
        one = tact(module, merged, {task: experts[task]}, {task: [batch]}, max_gain=1e6, eps=1e-20)[task]
        calibration = Calibration(task, [batch])
        goal = observe(module, experts[task], one.sites, calibration)
        now = observe(insert(module, one), merged | one.state, [_behind(site) for site in one.sites], calibration)
        for site, moments in goal.items():
            found = now[_behind(site)]
            torch.testing.assert_close(found.mean, moments.mean, rtol=1e-6, atol=1e-8)
            alive = moments.variance > 1e-9
            torch.testing.assert_close(found.variance[alive], moments.variance[alive], rtol=1e-6, atol=1e-8)
        assert correction.sites == one.sites
    first = correction.sites[0]
    assert not torch.equal(corrections["a"].scale[first], corrections["b"].scale[first])


def _behind(site: Site) -> Site:
    """What comes out of the inserted module of a site."""
    return Site(f"{site.path}.{'input_' if site.input else ''}correction", site.axis)


def test_the_pass_corrects_in_turn():
    """Correcting each site on the uncorrected model gives something else: the spread that has vanished is in both."""
    module = VGG().double()
    experts, merged, _ = make(module)
    batch = images(40, seed=2)
    (correction,) = tact(module, merged, {"b": experts["b"]}, {"b": [batch]}).values()
    apart = observe(module, merged, correction.sites, Calibration("b", [batch]))
    last = correction.sites[-2]
    goal = observe(module, experts["b"], [last], Calibration("b", [batch]))[last]
    independent = (goal.variance / (apart[last].variance + 1e-5)).sqrt()
    assert (independent - correction.scale[last]).abs().max() > 1e-2


def test_two_processes_give_the_correction_of_one():
    module = VGG().double()
    experts, merged, _ = make(module)
    batches = [images(12, seed=1), images(12, seed=2), images(4, seed=3)]  # the last one joins the second
    alone = tact(module, merged, {"a": experts["a"]}, {"a": batches})["a"]

    def work(rank: int):
        mine = [batch[rank::2] for batch in batches]
        found = tact(module, merged, {"a": experts["a"]}, {"a": mine}, distributed=True)["a"]
        return [(found.scale[site].tolist(), found.shift[site].tolist()) for site in found.sites]

    found, errors = on_processes(2, work)
    assert errors == [None, None]
    assert found[0] == found[1]
    for site, (scale, shift) in zip(alone.sites, found[0], strict=True):
        torch.testing.assert_close(alone.scale[site], torch.tensor(scale).double(), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(alone.shift[site], torch.tensor(shift).double(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        ([images(4), images(4)], "different numbers of batches of expert a"),
        ([images(4) * float("inf")], "not finite on the data of expert a"),
        ([None], "holds a NoneType"),
    ],
)
def test_what_one_process_cannot_do_stops_all(theirs, message):
    module = VGG()
    experts, merged, _ = make(module)

    def work(rank: int) -> None:
        tact(
            module,
            merged,
            {"a": experts["a"]},
            {"a": theirs if rank else [images(4)]},
            sites=["unit"],
            distributed=True,
        )

    _, errors = on_processes(2, work)
    assert all(message in error for error in errors)


def test_a_last_batch_that_is_too_small_joins_the_one_before():
    sizes = [len(batch) for batch in Calibration("expert a", images(23).split(10)).read()]
    assert sizes == [10, 13]
    assert [len(batch) for batch in Calibration("expert a", images(15).split(10)).read()] == [10, 5]
    assert [len(batch) for batch in Calibration("expert a", images(23).split(10), limit=2, passes=2).read()] == [10] * 4


def test_the_caller_s_module_and_tensors_stay_as_they_were():
    module = VGG().train()
    module.features[1].eval()
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    experts, merged, data = make(module)
    before = copy.deepcopy((module.state_dict(), experts, merged, [part.training for part in module.modules()]))
    state = torch.get_rng_state()
    found = tact(module, merged, experts, data)
    corrected_weights(module, merged, found["a"])
    insert(module, fold(module, merged, found["a"])[1])
    after = (module.state_dict(), experts, merged, [part.training for part in module.modules()])
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(not (part._forward_hooks or part._forward_pre_hooks) for part in module.modules())
    assert all(parameter.requires_grad and parameter.grad.eq(1).all() for parameter in module.parameters())


def test_merged_weights_may_depend_on_the_task_and_lack_the_head():
    module = VGG()
    experts, merged, data = make(module)
    headless = {name: tensor for name, tensor in merged.items() if not name.startswith("head")}
    found = tact(module, lambda task: headless, experts, data)
    for task, correction in tact(module, merged, experts, data).items():
        assert correction.state.keys() == found[task].state.keys()
        torch.testing.assert_close(correction.state, found[task].state)


def test_dead_channels_and_gains_stay_finite():
    module = VGG()
    experts, merged, data = make(module)
    merged["features.1.weight"][0] = 0.0  # has lost all it had
    experts["a"]["features.1.weight"][1] = 0.0  # never had any
    merged["features.1.weight"][2] *= 1e-2  # far too little
    correction = tact(module, merged, {"a": experts["a"]}, {"a": data["a"]})["a"]
    scale, shift = correction.scale[correction.sites[0]], correction.shift[correction.sites[0]]
    assert scale[:3].tolist() == [1.0, 0.0, 10.0]
    assert shift[1] == experts["a"]["features.1.bias"][1]
    assert all(tensor.isfinite().all() for tensor in correction.state.values())


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "data of expert a hold no batch"),
        ([images(1)], "A batch of the data of expert a holds 1 image, which has no variance"),
        (list(images(3).split(1)), "holds 1 image, which has no variance"),
        ([images(4) * float("nan")], r"activations at features\.1 are not finite on the data of expert a"),
        (iter([images(4)]), "data of expert a can be read only once"),
        ([{"images": images(4)}], "holds a dict"),
    ],
    ids=["empty", "one image", "batches of one", "NaN", "read once", "no tensors"],
)
def test_data_that_cannot_be_used_are_refused(data, message):
    module = VGG()
    with pytest.raises(MergeError, match=message):
        tact(module, module.state_dict(), {"a": module.state_dict()}, {"a": data})


def test_arguments_that_do_not_fit_are_refused():
    module, state = VGG(), VGG().state_dict()
    data = [images(4)]
    with pytest.raises(MergeError, match=r"2 problems:\s+- There are no data of expert a.*\s+- There are data for 'b'"):
        tact(module, state, {"a": state}, {"b": data})
    with pytest.raises(MergeError, match="batches must be at least 1, got 0"):
        tact(module, state, {"a": state}, {"a": data}, batches=0)
    with pytest.raises(MergeError, match="max_gain and eps must be positive"):
        tact(module, state, {"a": state}, {"a": data}, max_gain=0)
    with pytest.raises(MergeError, match=r"'hidden\.0\.weight' of the module is missing in expert a"):
        tact(module, {}, {"a": {k: v for k, v in state.items() if k != "hidden.0.weight"}}, {"a": data})
    with pytest.raises(MergeError, match="there is none"):
        tact(module, state, {"a": state}, {"a": data}, distributed=True)
    module.extra = nn.Linear(2, 2)
    with pytest.raises(MergeError, match="extra was not reached"):
        tact(module, module.state_dict(), {"a": module.state_dict()}, {"a": data}, sites=["features.1", "extra"])
