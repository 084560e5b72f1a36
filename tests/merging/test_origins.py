"""Experts that do not come from the base."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lightning_merge as lm
from lightning_merge.analysis import Comparison, compare_experts
from lightning_merge.checkpoints import open_weights
from lightning_merge.merging import origins
from lightning_merge.merging.greedy_soup import greedy_soup
from lightning_merge.merging.origins import Origins, measure_origins
from lightning_merge.methods import TIES, WeightAverage
from lightning_merge.report.experts import experts_in_words, suspicions
from lightning_merge.trainer.cli import main


def make(seed: int, width: int = 40) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    layers = nn.Linear(16, width), nn.LayerNorm(width), nn.ReLU(), nn.Linear(width, width), nn.Linear(width, 3)
    return nn.Sequential(*layers).state_dict()


def tuned(state: dict[str, Tensor], seed: int, size: float = 0.01) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {name: tensor + size * torch.randn(tensor.shape, generator=draw) for name, tensor in state.items()}


def measure(base: dict[str, Tensor], *experts: dict[str, Tensor]) -> Origins:
    opened = {str(i): open_weights(expert) for i, expert in enumerate(experts)}
    return measure_origins(open_weights(base), opened, list(base))


def test_the_numbers_are_those_of_the_matrices():
    base, experts = make(0), [tuned(make(0), 1), tuned(make(0), 2, 0.3)]
    flat = [torch.cat([s[name].flatten().double() for name in s if s[name].ndim > 1]) for s in (base, *experts)]
    deltas = torch.stack([one - flat[0] for one in flat[1:]])
    found = measure(base, *experts)
    torch.testing.assert_close(found.lengths, deltas.norm(dim=1) / flat[0].norm(), rtol=1e-6, atol=0)
    torch.testing.assert_close(found.left, torch.stack(flat[1:]) @ flat[0] / flat[0].square().sum(), rtol=1e-6, atol=0)
    torch.testing.assert_close(found.cosines[0, 1], F.cosine_similarity(*deltas, dim=0), rtol=1e-5, atol=1e-6)
    assert found.entries == len(flat[0])
    compared = compare_experts(base, experts, subspaces=False).origins()
    torch.testing.assert_close(compared.products, found.products, rtol=1e-5, atol=1e-6)


def test_a_sample_of_a_large_model_says_the_same(monkeypatch):
    base, experts = make(0, 150), [tuned(make(0, 150), 1), make(2, 150)]
    whole = compare_experts(base, experts, subspaces=False).origins()
    monkeypatch.setattr(origins, "_PLACES", 1500)
    monkeypatch.setattr(origins, "_ENOUGH", 1900)
    sample = measure(base, *experts)
    assert sample.entries < 4000 < whole.entries
    torch.testing.assert_close(sample.lengths, whole.lengths, rtol=0, atol=0.1)
    torch.testing.assert_close(sample.left, whole.left, rtol=0, atol=0.1)
    assert sample.problem() is not None
    assert torch.equal(sample.products, measure(base, *experts).products)  # the same sample again


OTHER = {"one": tuned(make(1), 1), "two": tuned(make(1), 2)}
SEVERAL = {"one": make(1), "two": tuned(make(2), 2)}
MIXED = {"one": tuned(make(0), 1), "two": tuned(make(2), 2)}


class TestStrangers:
    @pytest.mark.parametrize(
        ("experts", "message"),
        [
            (OTHER, r"one \(task vector 1\.\d\d times .* two \(.* cosines of \d\.\d\d: they come from one other base"),
            (SEVERAL, r"cosines of 0\.[45]\d; give the base .* one order first with `align`"),
            (MIXED, r"base: two \(.* Give the base that it was fine-tuned from, put its channels"),
        ],
    )
    def test_they_are_refused_before_any_work(self, experts, message):
        with pytest.raises(lm.MergeError, match=message):
            lm.merge(make(0), experts, WeightAverage(), output="m.pt")
        (problem,) = lm.plan(make(0), experts, WeightAverage(), output="m.pt").problems
        with pytest.raises(lm.MergeError) as refused:
            lm.merge(make(0), experts, WeightAverage())
        assert str(refused.value) == problem

    def test_the_remedies_help(self):
        lm.merge(make(1), OTHER, WeightAverage())
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            lm.merge(make(0), OTHER, WeightAverage(), allow_strangers=True)
        assert not lm.plan(make(0), OTHER, WeightAverage(), allow_strangers=True).problems

    def test_reports_say_so(self):
        compared = compare_experts(make(0), MIXED, subspaces=False)
        assert next(suspicions(compared)).startswith("These experts hardly look as if they came from this base: two (")
        assert "times as long as the base; the cosines between them are" in next(experts_in_words(compared))
        stored = Comparison.from_dict(json.loads(json.dumps(compared.to_dict())))
        torch.testing.assert_close(stored.origins().products, compared.origins().products)
        assert not list(suspicions(compare_experts(make(1), OTHER, subspaces=False)))

    def test_on_the_command_line(self, capsys):
        lm.save_weights("base.pt", make(0))
        lm.save_weights("one.pt", make(1))
        command = ["merge", "--base=base.pt", "--experts={one: one.pt}", "--method=WeightAverage", "--output=m.pt"]
        with pytest.raises(SystemExit):
            main(command)
        assert "do not come from this base: one" in capsys.readouterr().err
        main([*command, "--allow_strangers=true"])
        assert lm.open_weights("m.pt").keys() == make(0).keys()

    def test_a_soup_is_not_begun(self):
        tasted = []
        with pytest.raises(lm.MergeError, match="do not come from this base: two"):
            greedy_soup(make(0), MIXED, lambda weights: tasted.append(1) or 0.0)
        assert not tasted

    def test_what_may_be_one_is_warned_of(self):
        """An expert in which a third of the base is left; and a model too small to be sure of anything."""
        base, other = make(0), make(1)
        expert = {name: base[name] / 3 + other[name] for name in base}
        with pytest.warns(UserWarning, match="hardly look as if they came from this base"):
            lm.merge(base, [expert], WeightAverage())
        assert any("hardly look" in note for note in lm.plan(base, [expert], WeightAverage()).notes)
        small = {"w": torch.eye(4)}
        with pytest.warns(UserWarning, match="hardly look"):
            lm.merge(small, [{"w": torch.eye(4).flip(0)}], WeightAverage())


class TestHonestWork:
    @pytest.fixture(autouse=True)
    def silent(self):
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            yield

    def test_a_long_fit_from_a_random_base(self):
        draw = torch.Generator().manual_seed(0)
        inputs = torch.randn(256, 16, generator=draw)
        labels = (inputs[:, :3] * inputs[:, 3:6]).argmax(1)
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 40), nn.ReLU(), nn.Linear(40, 3))
        base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        optimizer = torch.optim.SGD(model.parameters(), 0.2, 0.9)
        for _ in range(300):
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), labels).backward()
            optimizer.step()
        merged = lm.merge(base, [model.state_dict()], WeightAverage())
        assert float(merged.origins.lengths) > 1
        assert "times as long as the base" in merged.origins.summary()

    def test_the_mean_of_foundations_that_share_nothing(self):
        foundations = [make(seed) for seed in range(3)]
        mean = {name: sum(state[name] for state in foundations) / 3 for name in foundations[0]}
        lm.merge(mean, [tuned(state, 1) for state in foundations], TIES())

    def test_heads_that_are_zero_in_the_base(self):
        base = make(0) | {"head.weight": torch.zeros(10, 40)}
        experts = [tuned(make(0), i) | {"head.weight": torch.randn(10, 40)} for i in range(2)]
        lm.merge(base, experts, WeightAverage())

    @pytest.mark.parametrize("base", [torch.zeros(50, 50), torch.ones(50)])
    def test_a_base_that_says_nothing(self, base):
        merged = lm.merge({"w": base}, [{"w": torch.randn(base.shape)}], WeightAverage())
        assert merged.origins.summary() is None

    def test_an_expert_that_is_the_base(self):
        merged = lm.merge(make(0), [make(0), tuned(make(0), 1), make(0)], WeightAverage())
        assert "nan" not in merged.origins.summary()
