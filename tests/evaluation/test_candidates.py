"""Many candidates in one pass give the numbers of one `trainer.test` each, on any number of processes."""

from __future__ import annotations

import sys

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn

import lightning_merge as lm
from lightning_merge.evaluation import evaluate_candidates, evaluate_domain
from lightning_merge.models.metrics import METRICS
from tests.toys import quiet_trainer, tiny_expert


@pytest.fixture
def model():
    return tiny_expert()


@pytest.fixture
def candidates(model):
    draw = torch.Generator().manual_seed(0)
    return {
        name: {k: v + 0.3 * torch.randn(v.shape, generator=draw) for k, v in model.state_dict().items()}
        for name in ("one", "two/with|odd <name>")
    }


def test_one_pass_equals_one_test_each(model, candidates):
    data = lm.Digits(test_domains=["noisy", "thick"], batch_size=100)
    found = evaluate_candidates(quiet_trainer(), model, data, candidates)
    assert [(r["row"], r["domain"]) for r in found] == [(row, d) for row in candidates for d in ("noisy", "thick")]
    for row, weights in candidates.items():
        model.load_state_dict(weights)
        expected = {}
        for results in quiet_trainer().test(model, datamodule=data, verbose=False):
            expected |= results
        for record in (r for r in found if r["row"] == row):
            for metric in METRICS:
                assert record[metric] == pytest.approx(expected[f"test/{record['domain']}/{metric}"], abs=1e-7)


def test_an_ensemble_averages_logits(model, candidates):
    data = lm.Digits(test_domains=["noisy"])
    found = evaluate_candidates(quiet_trainer(), model, data, candidates, {"both": list(candidates)})
    images, labels = data.dataset("noisy", data.split("noisy", "test"), augment=False)[:]
    logits = []
    with torch.no_grad():
        for weights in candidates.values():
            model.load_state_dict(weights)
            logits.append(model.eval()(images))
    expected = (torch.stack(logits).mean(dim=0).argmax(dim=1) == labels).float().mean().item()
    assert found[-1]["row"] == "both"
    assert found[-1]["accuracy"] == pytest.approx(expected, abs=1e-7)


def test_a_layer_under_two_names_keeps_its_own_weights(model):
    model.twin = model.head
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    other = {name: torch.ones_like(tensor) for name, tensor in before.items()}
    evaluate_candidates(quiet_trainer(limit_test_batches=1), model, lm.Digits(test_domains=["noisy"]), {"ones": other})
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_model_keeps_its_own_weights_and_may_be_a_candidate(model, candidates):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    one, two = ({"other": candidates["one"], "own": state} for state in (model.state_dict(), before))
    data = lm.Digits(test_domains=["noisy"])
    found = [evaluate_candidates(quiet_trainer(), model, data, rows) for rows in (one, two)]
    assert found[0] == found[1]
    assert found[0][0]["accuracy"] != found[0][1]["accuracy"]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_module_that_reaches_its_weights_in_another_way(candidates):
    plain, bound, data = tiny_expert(), tiny_expert(), lm.Digits(test_domains=["noisy"])
    weight, bias = bound.head.weight, bound.head.bias
    bound.head.forward = lambda x: nn.functional.linear(x, weight, bias)
    found = [evaluate_candidates(quiet_trainer(), model, data, candidates) for model in (plain, bound)]
    assert found[0] == found[1]


def test_running_statistics_of_a_candidate_are_used():
    model = lm.Expert("timm/resnet10t", 10, pretrained=False, backbone_args={"in_chans": 1})
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    weights["backbone.bn1.running_mean"] += 1
    changed = {k: v.clone() for k, v in weights.items()}
    changed["head.weight"] = torch.randn_like(changed["head.weight"])
    data = lm.Digits(test_domains=["noisy"])
    found = evaluate_candidates(quiet_trainer(), model, data, {"changed": changed})
    model.load_state_dict(changed)
    images, labels = data.dataset("noisy", data.split("noisy", "test"), augment=False)[:]
    with torch.no_grad():
        expected = (model.eval()(images).argmax(dim=1) == labels).float().mean().item()
    assert found[0]["accuracy"] == pytest.approx(expected, abs=1e-7)


@pytest.mark.skipif(sys.platform == "win32", reason="there is no fork")
@pytest.mark.parametrize("processes", [2, 3])
def test_the_numbers_are_those_of_one_process(model, candidates, processes):
    data = lm.Digits(test_domains=["noisy"], batch_size=50)  # 360 images: 8 batches of 45, which 2 does not divide
    alone = evaluate_candidates(quiet_trainer(), model, data, candidates)
    trainer = quiet_trainer(devices=processes, strategy="ddp_fork")
    together = evaluate_candidates(trainer, model, data, candidates)
    for one, many in zip(alone, together, strict=True):
        assert one["accuracy"] == many["accuracy"]
        for metric in METRICS:
            assert one[metric] == pytest.approx(many[metric], abs=1e-6)


def test_a_candidate_of_another_model_is_refused(model, candidates):
    candidates["one"]["head.weight"] = torch.zeros(3, 8)
    del candidates["one"]["head.bias"]
    candidates["one"]["extra"] = torch.zeros(1)
    with pytest.raises(lm.MergeError, match="3 problems") as caught:
        evaluate_candidates(quiet_trainer(), model, lm.Digits(), candidates)
    assert "'head.weight' has shape (3, 8) in the candidate 'one'" in str(caught.value)


def test_calibration_does_not_depend_on_batches_where_logits_look_like_probabilities(model):
    """All logits of the start lie in [0, 1]: every class has probability 0.1, which is the share of each."""
    start = {"start": model.state_dict()}
    found = [
        evaluate_candidates(quiet_trainer(), model, lm.Digits(test_domains=["noisy"], batch_size=size), start)[0]
        for size in (1, 7, 360)
    ]
    assert found[0] == found[1] == found[2]
    assert found[0]["calibration_error"] == pytest.approx(abs(found[0]["accuracy"] - 0.1), abs=1e-6)


def test_tied_weights_can_be_evaluated():
    class Tied(LightningModule):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(64, 10), nn.Linear(64, 10)
            self.two.weight = self.one.weight

        def forward(self, images):
            return self.one(images.flatten(1)) + self.two(images.flatten(1))

    model = Tied()
    (record,) = evaluate_candidates(
        quiet_trainer(), model, lm.Digits(test_domains=["noisy"]), {"a": model.state_dict()}
    )
    assert 0 <= record["accuracy"] <= 1


def test_the_order_of_the_classes_is_checked():
    model = tiny_expert(num_classes=None, class_names=[str(digit) for digit in reversed(range(10))])
    with pytest.raises(lm.MergeError, match="in the order of the data's labels"):
        evaluate_candidates(quiet_trainer(), model, lm.Digits(), {"a": model.state_dict()})


def test_an_expert_named_after_no_domain_could_leak():
    model = tiny_expert()
    weights = model.state_dict()
    with pytest.raises(lm.MergeError, match="'noise' has the name of no domain"):
        evaluate_domain(quiet_trainer(), model, lm.Digits(), "noisy", {}, {"noise": weights, "thick": weights})
