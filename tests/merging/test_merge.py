"""The executor: what fits together, what is refused, what comes out."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import lightning_merge as lm
from lightning_merge.checkpoints import save_weights
from lightning_merge.methods import (
    SCORE,
    TIES,
    TSVM,
    ConsensusTA,
    IsoC,
    IsoCTS,
    MergeMethod,
    TaskArithmetic,
    WeightAverage,
)
from tests.toys import base_weights, expert_weights


@pytest.fixture
def experts(base):
    return [expert_weights(base, i) for i in range(3)]


def test_weight_average_against_the_mean(base, experts):
    merged = lm.merge(base, experts, WeightAverage()).weights
    for name in base:
        if base[name].is_floating_point():
            torch.testing.assert_close(merged[name], torch.stack([e[name] for e in experts]).mean(dim=0))


def test_task_arithmetic_against_its_formula(base, experts):
    merged = lm.merge(base, experts, TaskArithmetic(scale=0.4)).weights
    for name in ("mlp.weight", "conv.weight", "logit_scale"):
        torch.testing.assert_close(merged[name], base[name] + 0.4 * sum(e[name] - base[name] for e in experts))


class TestBuffers:
    def test_running_statistics_are_averaged_and_never_scaled(self, base, experts):
        merged = lm.merge(base, experts, TaskArithmetic(scale=5.0)).weights
        for name in ("bn.running_mean", "bn.running_var"):
            torch.testing.assert_close(merged[name], torch.stack([e[name] for e in experts]).mean(dim=0))
        assert bool((merged["bn.running_var"] > 0).all())

    def test_integers_are_copied_from_the_base(self, base, experts):
        assert lm.merge(base, experts, SCORE()).weights["bn.num_batches_tracked"] == base["bn.num_batches_tracked"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", [WeightAverage(), TIES(), SCORE()], ids=repr)
def test_half_precision_is_rounded_once(dtype, method):
    base = base_weights(dtype)
    experts = [expert_weights(base, i) for i in range(3)]
    merged = lm.merge(base, experts, method).weights
    exact = lm.merge(_wide(base), [_wide(e) for e in experts], method).weights
    for name in base:
        assert merged[name].dtype == base[name].dtype
        assert torch.equal(merged[name], exact[name].to(base[name].dtype))


def _wide(weights):
    return {k: v.float() if v.is_floating_point() else v for k, v in weights.items()}


class TestTiedWeights:
    def test_they_are_merged_once_and_stay_tied(self, base, experts):
        for model in (base, *experts):
            model["decoder.weight"] = model["head.weight"]
        merged = lm.merge(base, experts, TIES())
        assert merged.weights["decoder.weight"] is merged.weights["head.weight"]
        assert merged.inventory.tied == {"decoder.weight": "head.weight"}

    def test_they_do_not_count_twice_in_a_global_threshold(self, base, experts):
        plain = lm.merge(base, experts, TIES()).weights
        for model in (base, *experts):
            model["decoder.weight"] = model["head.weight"]
        tied = lm.merge(base, experts, TIES()).weights
        assert all(torch.equal(plain[name], tied[name]) for name in plain)

    def test_an_expert_s_file_may_leave_the_second_name_out(self, base, experts):
        base["decoder.weight"] = base["head.weight"]
        assert "decoder.weight" in lm.merge(base, experts, TIES()).weights

    def test_an_expert_that_untied_them_is_merged_name_by_name(self, base, experts):
        base["decoder.weight"] = base["head.weight"]
        for expert in experts:
            expert["decoder.weight"] = expert["head.weight"].clone() + 1
        merged = lm.merge(base, experts, WeightAverage()).weights
        torch.testing.assert_close(merged["decoder.weight"], merged["head.weight"] + 1)


class TestConflicts:
    def refusal(self, base, experts, **arguments) -> str:
        class Never(MergeMethod):
            def survey(self, task_vectors):
                raise AssertionError("work began before the conflicts were found")

        with pytest.raises(lm.MergeError) as caught:
            lm.merge(base, dict(zip(("photo", "art", "sketch"), experts, strict=True)), Never(), **arguments)
        return str(caught.value)

    def test_nan_names_parameter_expert_and_remedy(self, base, experts):
        experts[1]["mlp.bias"][3] = float("nan")
        message = self.refusal(base, experts)
        assert "'mlp.bias' of the expert art" in message
        assert "1 of 12" in message
        assert "allow_non_finite" in message

    def test_infinity_in_the_base(self, base, experts):
        base["bn.running_var"][0] = float("inf")
        assert "'bn.running_var' of the base" in self.refusal(base, experts)

    def test_nan_in_what_is_copied(self, base, experts):
        base["mlp.bias"][3] = float("nan")
        assert "'mlp.bias' of the base" in self.refusal(base, experts, exclude=["mlp.bias"])

    def test_nan_can_be_allowed(self, base, experts):
        experts[1]["mlp.bias"][3] = float("nan")
        merged = lm.merge(base, experts, WeightAverage(), allow_non_finite=True).weights
        assert int(merged["mlp.bias"].isnan().sum()) == 1

    def test_shape(self, base, experts):
        experts[2]["head.weight"] = torch.zeros(4, 8)
        message = self.refusal(base, experts)
        assert "'head.weight' has shape (4, 8) in the expert sketch and (3, 8) in the base" in message
        assert "exclude: [head.*]" in message

    def test_missing(self, base, experts):
        del experts[0]["mlp.weight"]
        assert "The expert photo lacks 'mlp.weight'" in self.refusal(base, experts)

    def test_extra(self, base, experts):
        experts[0]["adapter.weight"] = torch.zeros(2)
        message = self.refusal(base, experts)
        assert "The expert photo has 'adapter.weight', which the base lacks" in message
        assert "exclude: [adapter.*]" in message

    def test_quantized(self, base, experts):
        experts[0]["mlp.weight"] = experts[0]["mlp.weight"].to(torch.int8)
        assert "torch.int8 in the expert photo" in self.refusal(base, experts)

    def test_all_conflicts_are_listed_at_once(self, base, experts):
        experts[2]["head.weight"] = torch.zeros(4, 8)
        del experts[0]["mlp.weight"]
        experts[1]["extra"] = torch.zeros(1)
        message = self.refusal(base, experts)
        assert message.startswith("3 problems")
        assert all(name in message for name in ("head.weight", "mlp.weight", "extra"))

    def test_a_pattern_that_matches_nothing(self, base, experts):
        assert "'heads.*' matches no parameter" in self.refusal(base, experts, exclude=["heads.*"])

    def test_nothing_left(self, base, experts):
        assert "Nothing is left" in self.refusal(base, experts, exclude=["*"])

    def test_no_experts(self, base):
        with pytest.raises(lm.MergeError, match="no experts"):
            lm.merge(base, [], SCORE())

    def test_an_expert_of_another_model_gets_one_sentence(self, base, experts):
        experts[1] = {f"net.{name.upper()}": tensor for name, tensor in experts[1].items()}
        message = self.refusal(base, experts)
        assert "The expert art is no fine-tuned form of the base" in message
        assert "'net.CONV.WEIGHT' in the expert" in message
        assert "problems" not in message

    def test_what_is_wrong_with_the_others_is_said_beside_it(self, base, experts):
        experts[1] = {f"net.{name.upper()}": tensor for name, tensor in experts[1].items()}
        del experts[0]["mlp.weight"]
        message = self.refusal(base, experts, exclude=["heads.*"])
        assert message.startswith("3 problems")
        assert all(text in message for text in ("art is no fine-tuned form", "photo lacks 'mlp.weight'", "'heads.*'"))

    def test_all_files_that_cannot_be_opened_are_named(self, base, experts):
        Path("text.pt").write_text("text")
        with pytest.raises(lm.MergeError, match=r"(?s)2 problems.*missing\.pt.*text\.pt is damaged"):
            lm.merge(base, ["missing.pt", experts[0], "text.pt"], SCORE())

    def test_wrong_arguments_are_listed_together(self, base, experts):
        with pytest.raises(lm.MergeError, match=r"(?s)3 problems.*workers.*bfloat16.*a\.onnx"):
            lm.merge(base, experts, SCORE(), workers=0, dtype=torch.bfloat16, output="a.onnx")

    def test_complex_parameters(self, base, experts):
        for model in (base, *experts):
            model["spectrum"] = torch.zeros(3, dtype=torch.complex64)
        assert "'spectrum' is complex" in self.refusal(base, experts)

    @pytest.mark.parametrize("method", [SCORE(), TSVM(), IsoC(), IsoCTS()], ids=repr)
    def test_nan_can_be_allowed_where_matrices_are_factorized(self, base, experts, method):
        experts[1]["mlp.weight"][3, 3] = float("nan")
        merged = lm.merge(base, experts, method, allow_non_finite=True).weights
        assert bool(merged["mlp.weight"].isnan().any())
        assert bool(merged["proj.weight"].isfinite().all())

    @pytest.mark.parametrize("output", ["a.onnx", "folder", "base.pt", "one.pt"])
    def test_an_output_that_cannot_be_written_or_is_an_input(self, base, experts, output):
        Path("folder").mkdir()
        save_weights("base.pt", base)
        save_weights("one.pt", experts[0])
        files = dict.fromkeys(("photo", "art", "sketch"), "one.pt")
        with pytest.raises(lm.MergeError, match=output):
            lm.merge("base.pt", files, SCORE(), output=output)
        assert torch.equal(lm.open_weights("one.pt")["mlp.weight"], experts[0]["mlp.weight"])


class TestLeavingOut:
    def test_excluded_parameters_are_the_base_s(self, base, experts):
        merged = lm.merge(base, experts, SCORE(), exclude=["mlp.*"]).weights
        assert torch.equal(merged["mlp.weight"], base["mlp.weight"])
        assert not torch.equal(merged["proj.weight"], base["proj.weight"])

    @pytest.mark.parametrize("pattern", ["decoder.*", "head.*"])
    def test_one_of_two_tied_names(self, base, experts, pattern):
        for model in (base, *experts):
            model["decoder.weight"] = model["head.weight"]
        merged = lm.merge(base, experts, WeightAverage(), exclude=[pattern]).weights
        left, other = sorted(["decoder.weight", "head.weight"], key=lambda name: not name.startswith(pattern[:4]))
        assert torch.equal(merged[left], base[left])
        assert not torch.equal(merged[other], base[other])

    def test_include(self, base, experts):
        merged = lm.merge(base, experts, SCORE(), include=["mlp.*"]).weights
        changed = {name for name in base if not torch.equal(merged[name], base[name])}
        assert changed == {"mlp.weight", "mlp.bias"}


class TestFiles:
    @pytest.mark.parametrize("suffix", [".safetensors", ".ckpt", ".pt"])
    def test_files_give_what_state_dicts_give(self, base, experts, suffix):
        for i, model in enumerate((base, *experts)):
            save_weights(f"{i}{suffix}", model)
        merged = lm.merge(f"0{suffix}", [f"{i}{suffix}" for i in (1, 2, 3)], SCORE(), output="merged.safetensors")
        memory = lm.merge(base, experts, SCORE()).weights
        written = lm.open_weights("merged.safetensors")
        assert all(
            torch.equal(written[name], memory[name]) and torch.equal(merged.weights[name], memory[name])
            for name in memory
        )

    def test_the_manifest_says_how_it_was_made(self, base, experts):
        import hashlib

        save_weights("base.ckpt", base, hyper_parameters={"num_classes": 3})
        save_weights("a.ckpt", experts[0])
        merged = lm.merge("base.ckpt", {"a": "a.ckpt", "b": experts[1]}, TIES(density=0.3))
        merged.save("merged.ckpt")
        header = lm.open_weights("merged.ckpt").header
        manifest = header["merge"]
        assert manifest["method"] == TIES(density=0.3).describe()
        assert manifest["method"]["init_args"]["density"] == 0.3
        assert manifest["experts"]["a"]["sha256"] == hashlib.sha256(Path("a.ckpt").read_bytes()).hexdigest()
        assert manifest["experts"]["b"] == {"path": None, "sha256": None}
        assert header["hyper_parameters"] == {"num_classes": 3}
        json.dumps(manifest)

    def test_an_expert_given_twice(self, base, experts):
        save_weights("a.pt", experts[0])
        with pytest.raises(lm.MergeError, match=r"a\.pt is given twice"):
            lm.merge(base, ["a.pt", "a.pt"], SCORE())


@pytest.mark.parametrize("method", [WeightAverage(), TIES(density=1.0)], ids=repr)
def test_float64_is_not_rounded(method):
    base = {"w": torch.randn(5, 4, dtype=torch.float64)}
    assert torch.equal(lm.merge(base, [base], method).weights["w"], base["w"])
    with pytest.raises(lm.MergeError, match=r"float32 or float64, not torch\.bfloat16"):
        lm.merge(base, [base], method, dtype=torch.bfloat16)


def test_scale_replaces_the_method_s_own(base, experts):
    assert lm.merge(base, experts, TaskArithmetic(), scale=1.0).manifest["method"]["init_args"]["scale"] == 1.0


def test_more_experts_are_asked_for_than_there_are(base, experts):
    with pytest.raises(lm.MergeError, match=r"k=4.* needs at least 4 experts, and 3 are given"):
        lm.merge(base, experts, ConsensusTA(k=4))
    lm.merge(base, experts, ConsensusTA(k=3))


def test_merges_in_several_threads_leave_the_number_of_threads_alone(base, experts):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda _: lm.merge(base, experts, SCORE(), workers=1).weights, range(8)))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(weights[name], found[0][name]) for weights in found for name in base)


@pytest.mark.parametrize("workers", [1, 3])
def test_it_is_told_how_matrices_were_decomposed(base, experts, workers):
    assert lm.merge(base, experts, IsoC(), workers=workers).paths == {"gram": 3}
    assert lm.merge(base, experts, TIES(), workers=workers).paths == {}
