"""Statistics of the experts' data: read like weights, and refused before any work where they do not fit."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

import lightning_merge as lm
from lightning_merge.checkpoints import open_statistics, open_weights, statistics_file
from lightning_merge.checkpoints.statistics_files import HOW_TO_MAKE, save_statistics
from lightning_merge.merging.merge import merge
from lightning_merge.merging.toy_models import make_models, make_statistics
from lightning_merge.methods import TaskArithmetic, Wrapper
from lightning_merge.methods.base.statistics import ParameterStatistics
from lightning_merge.methods.fisher import Fisher
from lightning_merge.methods.mats import MaTS
from lightning_merge.methods.regmean import RegMean
from lightning_merge.utilities.errors import MergeError

PROJ = "text_projection"


@pytest.fixture
def models():
    base, experts = make_models(2)
    return base, experts, make_statistics(base, experts)


def refused(models, method, match):
    base, experts, statistics = models
    with pytest.raises(MergeError, match=match) as caught:
        merge(base, experts, method, statistics=statistics)
    return str(caught.value)


def test_files_give_what_state_dicts_give(models, tmp_path):
    base, experts, statistics = models
    for name, state in statistics.items():
        save_file(state, tmp_path / f"{name}.safetensors")
    files = {name: tmp_path / f"{name}.safetensors" for name in statistics}
    for method in (Fisher(normalize="model"), RegMean(), MaTS(iterations=3), Wrapper(RegMean())):
        found, again = (merge(base, experts, method, statistics=source) for source in (statistics, files))
        assert all(torch.equal(found.weights[name], again.weights[name]) for name in base)
    assert again.manifest["statistics"]["expert 1"]["path"].endswith("expert 1.safetensors")
    assert len(again.manifest["statistics"]["expert 1"]["sha256"]) == 64


def test_methods_that_need_none_take_none(models):
    base, experts, _ = models
    merged = merge(base, experts, TaskArithmetic())
    assert not merged.manifest["statistics"]
    merge(base, experts, TaskArithmetic(), statistics={"expert 0": "/nowhere"})  # not even opened


def test_statistics_are_read_by_the_expert_and_not_by_the_order(models):
    base, experts, statistics = models
    found = merge(base, experts, Fisher(), statistics=statistics).weights
    again = merge(base, experts, Fisher(), statistics=dict(reversed(statistics.items()))).weights
    assert all(torch.equal(found[name], again[name]) for name in base)


def test_the_statistics_of_a_parameter_are_read_when_asked_for(models):
    _, _, statistics = models
    sources = [open_weights(state) for state in statistics.values()]
    like = torch.zeros((), dtype=torch.float64)
    found = ParameterStatistics(PROJ, sources, like)
    assert list(found) == ["fisher", "gram", "gram_out"]
    assert len(found) == 3
    assert found["gram"].shape == (2, 6, 6)
    assert found["gram"].dtype == torch.float64
    assert torch.equal(found["fisher"][1].float(), statistics["expert 1"][f"fisher.{PROJ}"])
    assert list(ParameterStatistics("visual.class_embedding", sources, like)) == ["fisher"]
    assert not ParameterStatistics(PROJ, [], like)
    with pytest.raises(KeyError):
        ParameterStatistics("visual.class_embedding", sources, like)["gram"]


def test_nothing_at_all(models):
    base, experts, _ = models
    with pytest.raises(MergeError) as caught:
        merge(base, experts, Fisher())
    message = str(caught.value)
    assert "needs statistics of the data of expert expert 0, and there are none beside its file" in message
    assert "`lightning-merge statistics --config CONFIG.yaml --expert EXPERT.ckpt --kinds '[fisher]'`" in message
    assert "or give merge(…, statistics={'expert 0': file})" in message
    assert f"fisher.<parameter> holds {HOW_TO_MAKE['fisher']}" in message
    assert "expert 1" in message


def test_an_expert_without(models):
    models[2].pop("expert 1")
    assert "expert 0" not in refused(models, RegMean(), "statistics of the data of expert expert 1")


def test_a_name_that_is_no_expert(models):
    models[2]["photo"] = models[2]["expert 0"]
    refused(models, Fisher(), "statistics for 'photo', which is no expert; the experts are expert 0, expert 1")


def test_a_missing_fisher(models):
    del models[2]["expert 1"]["fisher.logit_scale"]
    message = refused(models, Fisher(), r"the statistics of expert 1 lacks 'fisher\.logit_scale'")
    assert HOW_TO_MAKE["fisher"] in message


def test_fishers_are_needed_for_merged_parameters_only(models):
    base, experts, statistics = models
    del statistics["expert 1"]["fisher.logit_scale"]
    merge(base, experts, Fisher(), statistics=statistics, exclude=["logit_scale"])


@pytest.mark.parametrize(("method", "kind"), [(RegMean(), "gram"), (MaTS(), "gram"), (MaTS(), "gram_out")])
def test_a_gram_matrix_that_only_one_expert_has(models, method, kind):
    del models[2]["expert 0"][f"{kind}.{PROJ}"]
    message = refused(models, method, rf"the statistics of expert 0 lacks '{kind}\.{PROJ}'")
    assert "of shape (6, 6)" in message


def test_a_layer_without_gram_matrices_is_averaged(models):
    base, experts, statistics = models
    for state in statistics.values():
        del state[f"gram.{PROJ}"], state[f"gram_out.{PROJ}"]
    mean = torch.stack([expert[PROJ] for expert in experts.values()]).mean(dim=0)
    for method in (RegMean(), MaTS(iterations=2)):
        merged = merge(base, experts, method, statistics=statistics).weights
        torch.testing.assert_close(merged[PROJ], mean)
        fc = "visual.transformer.resblocks.0.mlp.c_fc.weight"
        assert (merged[fc] - torch.stack([e[fc] for e in experts.values()]).mean(dim=0)).abs().max() > 1e-4


def test_no_gram_matrix_at_all(models):
    for name, state in models[2].items():
        models[2][name] = {k: v for k, v in state.items() if k.startswith("fisher.")}
    refused(models, RegMean(), r"holds no gram\.<parameter> for any merged parameter; it must hold the mean of x xᵀ")


def test_gradients_are_needed_of_some_layer_and_then_of_every_expert(models):
    base, experts, statistics = models
    key = f"gram_out.{PROJ}"
    first, *others = statistics
    for name in others:
        del statistics[name][key]
    refused(models, MaTS(), rf"lacks 'gram_out\.{PROJ}'")
    del statistics[first][key]  # in no expert: this layer is merged without
    weights = merge(base, experts, MaTS(), statistics=statistics).weights
    alone = merge(base, experts, MaTS(backward=False), statistics=statistics).weights
    assert torch.equal(weights[PROJ], alone[PROJ])
    assert any(not torch.equal(weights[name], alone[name]) for name in weights)
    for state in statistics.values():
        for name in [name for name in state if name.startswith("gram_out.")]:
            del state[name]
    refused(models, MaTS(), r"holds no gram_out\.<parameter> for any merged parameter")
    merge(base, experts, MaTS(backward=False, iterations=2), statistics=statistics)


@pytest.mark.parametrize(
    ("method", "key", "expected"),
    [
        (Fisher(), "fisher.visual.conv1.weight", r"\(12, 3, 2, 2\)"),
        (RegMean(), "gram.visual.conv1.weight", r"\(12, 12\)"),
        (MaTS(), "gram_out.visual.transformer.resblocks.0.mlp.c_fc.weight", r"\(16, 16\)"),
    ],
)
def test_the_shape_of_another_model(models, method, key, expected):
    models[2]["expert 1"][key] = torch.ones(3, 3)
    refused(models, method, rf"'{key}' of the statistics of expert 1 has shape \(3, 3\), but .* asks for {expected}")


def test_the_names_of_another_model(models):
    models[2]["expert 1"]["fisher.encoder.weight"] = torch.ones(3, 3)
    refused(models, Fisher(), "holds 'fisher.encoder.weight', but the model has no such parameter; are these")


def test_an_experts_own_head_may_be_among_them(models):
    base, experts, statistics = models
    for name in experts:
        experts[name]["head.weight"] = torch.ones(2, 2)
        statistics[name]["fisher.head.weight"] = torch.ones(2, 2)
    merge(base, experts, Fisher(), statistics=statistics, exclude=["head.*"])


def test_values_that_are_not_finite(models):
    models[2]["expert 1"][f"fisher.{PROJ}"][0] = float("nan")
    refused(models, Fisher(), rf"'fisher\.{PROJ}' of the statistics of expert 1 holds values that are not finite")


def test_problems_are_found_before_any_tensor_is_read(models):
    base, experts, _ = models
    experts["expert 0"][PROJ][0] = float("nan")
    with pytest.raises(MergeError, match="needs statistics"):
        merge(base, experts, Fisher())
    with pytest.raises(MergeError, match="There is no file"):
        merge(base, experts, Fisher(), statistics={name: "/nowhere.safetensors" for name in experts})


def test_nothing_is_opened_where_nothing_is_needed(models):
    base, experts, _ = models
    opened = {name: open_weights(state, name) for name, state in experts.items()}
    assert open_statistics({"expert 0": "/nowhere"}, (), open_weights(base), opened, list(base)) == []


class TestBesideTheExpert:
    @pytest.fixture
    def files(self, models, tmp_path):
        _, experts, statistics = models
        files = {}
        for name, state in experts.items():
            files[name] = lm.save_weights(tmp_path / name / "expert.ckpt", state)
            expert = open_weights(files[name])
            save_statistics(statistics_file(expert), statistics[name], expert, {"examples": 3})
        return files

    def test_found(self, models, files):
        base, experts, statistics = models
        for sources in (files, {name: file.parent for name, file in files.items()}):  # a folder is still its weights
            found = merge(base, sources, RegMean())
            again = merge(base, experts, RegMean(), statistics=statistics)
            assert all(torch.equal(found.weights[name], again.weights[name]) for name in base)
        assert found.manifest["statistics"]["expert 0"]["path"].endswith("expert.statistics.safetensors")

    def test_missing(self, models, files):
        statistics_file(open_weights(files["expert 1"])).unlink()
        folder = files["expert 1"].parent
        (folder / "config.yaml").write_text("")
        with pytest.raises(MergeError) as caught:
            merge(models[0], files, MaTS())
        command = f"lightning-merge statistics --config '{folder}/config.yaml' --expert '{folder}/expert.ckpt'"
        assert f"`{command} --kinds '[gram, gram_out]'`" in str(caught.value)
        assert "expert 0" not in str(caught.value)

    def test_of_other_weights(self, models, files):
        base, experts, _ = models
        lm.save_weights(files["expert 1"], experts["expert 0"])
        message = "holds the statistics of other weights than those of expert expert 1; make them anew with `lightning"
        with pytest.raises(MergeError, match=message):
            merge(base, files, RegMean())

    def test_the_same_weights_in_another_file_are_no_others(self, models, files, tmp_path):
        base, experts, _ = models
        own = {name: statistics_file(open_weights(file)) for name, file in files.items()}
        moved = {name: lm.save_weights(tmp_path / f"{name}.safetensors", state) for name, state in experts.items()}
        merge(base, moved, RegMean(), statistics=own)
        merge(base, experts, RegMean(), statistics=own)
        with pytest.raises(MergeError, match="other weights"):
            merge(base, experts, RegMean(), statistics=dict(zip(own, reversed(own.values()), strict=True)))

    def test_of_another_kind(self, models, files):
        for name, file in files.items():
            expert = open_weights(file)
            state = {k: v for k, v in models[2][name].items() if k.startswith("fisher.")}
            save_statistics(statistics_file(expert), state, expert, {})
        with pytest.raises(MergeError, match=r"holds no gram\.<parameter>.*: `lightning-merge statistics .*\[gram\]"):
            merge(models[0], files, RegMean())


@pytest.mark.parametrize("noted", [{}, {"expert": []}, {"expert": {"path": 1, "digest": None}}])
def test_a_header_that_does_not_say_of_which_expert(noted):
    torch.save({"w": torch.ones(2, 2)}, "base.pt")
    save_file({"w": torch.full((2, 2), 2.0)}, "e.safetensors")
    save_file({"fisher.w": torch.ones(2, 2)}, "e.statistics.safetensors", {"statistics": json.dumps(noted)})
    with pytest.raises(lm.MergeError, match=r"header of e\.statistics\.safetensors is no record of statistics: expert"):
        lm.merge("base.pt", ["e.safetensors"], lm.methods.Fisher())
