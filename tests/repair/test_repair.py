"""REPAIR: the statistics and weights of the official code, several tasks, and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lightning_merge.repair import Moments, find_sites, fold, repair
from lightning_merge.repair.calibration import Calibration, Goals, correct_in_turn, observe
from lightning_merge.repair.repair import Pool
from lightning_merge.utilities.errors import MergeError
from tests.repair.models import VGG, expert_of, images, mean_of, upsampled
from tests.toys import golden

_GOALS = ("goal_mean", "goal_std")


class MeansOfBatches(Moments):
    """As ``nn.BatchNorm2d(momentum=None)``: the mean over batches of their means and of their unbiased variances."""

    def __init__(self) -> None:
        super().__init__()
        self._batches = 0

    def merge(self, other: Moments) -> None:
        self._batches += 1
        self.count += other.count
        self._mean = self._mean + (other.mean - self._mean) / self._batches
        unbiased = other.variance * other.count / (other.count - 1)
        self._variance = self._variance + (unbiased - self._variance) / self._batches


class Features(nn.Module):
    """The convolutions of the official run's network, without the last one."""

    def __init__(self) -> None:
        super().__init__()
        first, second, third = (nn.Conv2d(*widths, 3, padding=1) for widths in ((1, 16), (16, 32), (32, 48)))
        pool = nn.MaxPool2d(2)
        self.features = nn.Sequential(first, nn.ReLU(), pool, second, nn.ReLU(), pool, third, nn.ReLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.features(x)


def test_the_official_run_is_met():
    groups = golden("nonlocal_repair_cnn")
    module, experts = Features(), {"A": groups["A"], "B": groups["Bperm"]}
    merged = mean_of(*experts.values())
    batches = list(upsampled(groups["x_train"][""] / 16).split(128))
    assert [site.name for site in find_sites(module, batches[0])] == ["features.0", "features.3", "features.6"]

    def close(found: torch.Tensor, group: str, name: str) -> None:
        torch.testing.assert_close(found.float(), groups[group][name], rtol=1e-5, atol=1e-5)

    correction = repair(module, merged, experts, batches, max_gain=math.inf, statistics=MeansOfBatches)
    folded, rest = fold(module, merged, correction)
    assert len(rest) == 0
    for name in groups["repaired_fused"]:
        close(folded[name], "repaired_fused", name)

    data = Calibration("all", batches)
    mean, std = ({site: groups[goal][site.path].double() for site in correction.sites} for goal in _GOALS)
    goals = Goals(mean, std, math.inf)
    for site, moments in correct_in_turn(module, merged, correction.sites, goals.affine, data, MeansOfBatches).items():
        close(moments.mean, "merged_mean", site.path)
        close(moments.variance, "merged_var", site.path)
    stats = [observe(module, expert, correction.sites, data, MeansOfBatches) for expert in experts.values()]
    for site in correction.sites:
        close(sum(found[site].mean for found in stats) / 2, "goal_mean", site.path)
        close(sum(found[site].std for found in stats) / 2, "goal_std", site.path)


def test_the_goals_are_interpolated_on_pooled_data():
    module = VGG().double()
    experts = {name: expert_of(module, seed) for seed, name in enumerate("abc")}
    merged = mean_of(*experts.values())
    data = {"a": [images(10, seed=1)], "b": [(images(14, seed=2), torch.zeros(14))]}
    pooled = [torch.cat([images(10, seed=1), images(14, seed=2)])]
    assert [len(batch) for batch in Pool(data)] == [24]
    alpha = [0.5, 0.3, 0.2]
    correction = repair(module, merged, experts, data, alpha=alpha, sites=["features.1"], max_gain=1e6, eps=1e-12)
    (site,) = correction.sites
    calibration = Calibration("all", pooled)
    seen = [observe(module, weights, [site], calibration)[site] for weights in (*experts.values(), merged)]
    with_it = fold(module, merged, correction)[0]
    found = observe(module, with_it, [site], calibration)[site]
    torch.testing.assert_close(found.mean, sum(a * m.mean for a, m in zip(alpha, seen, strict=False)))
    torch.testing.assert_close(found.std, sum(a * m.std for a, m in zip(alpha, seen, strict=False)))
    assert (found.std - seen[-1].std).abs().max() > 1e-2


def test_what_does_not_fit_is_refused():
    module, state = VGG(), VGG().state_dict()
    with pytest.raises(MergeError, match="alpha has 1 weights for 2 experts"):
        repair(module, state, {"a": state, "b": state}, [images(4)], alpha=[1.0])
    with pytest.raises(MergeError, match="alpha must be at least 0 and add up to 1"):
        repair(module, state, {"a": state, "b": state}, [images(4)], alpha=[1.5, 0.5])
    with pytest.raises(MergeError, match="at least one expert"):
        repair(module, state, {}, [images(4)])
    with pytest.raises(MergeError, match="images of the tasks have different shapes"):
        repair(module, state, {"a": state}, {"a": [images(4)], "b": [images(4, 16)]})
    with pytest.raises(MergeError, match="data of task b can be read only once"):
        repair(module, state, {"a": state}, {"b": iter([images(4)])})
    with pytest.raises(MergeError, match="hold no batch"):
        repair(module, state, {"a": state}, [])
