"""LoRA experts as peft writes them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from lightning_merge import merge, open_weights
from lightning_merge.checkpoints import open_adapter
from lightning_merge.checkpoints.adapters import is_adapter
from lightning_merge.merging.greedy_soup import greedy_soup
from lightning_merge.methods import SCORE, TIES, CoreSpace, IsoC, KnOTS, TaskArithmetic
from lightning_merge.methods.knots import common_basis
from lightning_merge.utilities.errors import MergeError

PREFIX = "base_model.model."


def tensor(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


@pytest.fixture
def base():
    return {
        "q_proj.weight": tensor(6, 4),
        "q_proj.bias": tensor(6),
        "mlp.fc.weight": tensor(5, 4),
        "conv.weight": tensor(3, 2, 3, 3),
        "emb.weight": tensor(7, 4),
        "head.weight": tensor(2, 4),
        "steps": torch.tensor(3),
    }


def write(folder: Path, tensors, **config):
    folder.mkdir(exist_ok=True)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 6} | config
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file({PREFIX + name: t.contiguous() for name, t in tensors.items()}, folder / "adapter_model.safetensors")
    return folder


def linear(name, shape, r=2, seed=1):
    A, B = tensor(r, shape[1], seed=seed), tensor(shape[0], r, seed=seed + 1)
    return {f"{name}.lora_A.weight": A, f"{name}.lora_B.weight": B}


def rows(name, count):
    return {f"{name}.token_adapter.trainable_tokens_delta": tensor(count, 4)}


Q = linear("q_proj", (6, 4))


def test_adds_the_scaled_product(tmp_path, base):
    expert = open_adapter(write(tmp_path / "a", Q), base)
    expected = base["q_proj.weight"] + 3 * Q["q_proj.lora_B.weight"] @ Q["q_proj.lora_A.weight"]
    torch.testing.assert_close(expert["q_proj.weight"], expected)
    assert list(expert) == list(base)
    assert all(torch.equal(expert[name], base[name]) for name in base if name != "q_proj.weight")
    assert all(expert.meta[name].shape == expert[name].shape for name in base)
    assert expert.fingerprint() is not None


@pytest.mark.parametrize(
    ("config", "scaling"),
    [
        ({}, 3.0),
        ({"use_rslora": True}, 6 / 2**0.5),
        ({"lora_alpha": 2}, 1.0),
        ({"r": 8, "rank_pattern": {"q_proj": 2}}, 3.0),
        ({"alpha_pattern": {"q_proj": 8}}, 4.0),
        ({"alpha_pattern": {"proj": 8}}, 3.0),  # a pattern matches whole components of a name
        ({"alpha_pattern": {"[qv]_proj": 8, "q_proj": 16}}, 4.0),  # the first that matches
        ({"r": 8, "rank_pattern": {"q_proj": 2}, "use_rslora": True}, 6 / 2**0.5),
    ],
)
def test_scaling(tmp_path, base, config, scaling):
    expert = open_adapter(write(tmp_path / "a", Q, **config), base)
    product = Q["q_proj.lora_B.weight"] @ Q["q_proj.lora_A.weight"]
    torch.testing.assert_close(expert["q_proj.weight"] - base["q_proj.weight"], scaling * product)


def test_fan_in_fan_out(tmp_path, base):
    tensors = linear("q_proj", (4, 6))
    expert = open_adapter(write(tmp_path / "a", tensors, fan_in_fan_out=True), base)
    expected = base["q_proj.weight"] + 3 * (tensors["q_proj.lora_B.weight"] @ tensors["q_proj.lora_A.weight"]).T
    torch.testing.assert_close(expert["q_proj.weight"], expected)


def test_convolutions_and_embeddings(tmp_path, base):
    A, B = tensor(2, 2, 3, 3, seed=1), tensor(3, 2, 1, 1, seed=2)
    E, F = tensor(2, 7, seed=3), tensor(4, 2, seed=4)
    tensors = {"conv.lora_A.weight": A, "conv.lora_B.weight": B, "emb.lora_embedding_A": E, "emb.lora_embedding_B": F}
    expert = open_adapter(write(tmp_path / "a", tensors), base)
    product = torch.einsum("or,rihw->oihw", B[:, :, 0, 0], A)
    torch.testing.assert_close(expert["conv.weight"], base["conv.weight"] + 3 * product)
    torch.testing.assert_close(expert["emb.weight"], base["emb.weight"] + 3 * (F @ E).T)


def test_what_was_trained_as_a_whole_replaces_the_base(tmp_path, base):
    tensors = Q | {"head.modules_to_save.weight": tensor(2, 4, seed=5), "q_proj.base_layer.bias": tensor(6, seed=5)}
    expert = open_adapter(write(tmp_path / "a", tensors), base)
    assert torch.equal(expert["head.weight"], tensors["head.modules_to_save.weight"])
    assert torch.equal(expert["q_proj.bias"], tensors["q_proj.base_layer.bias"])


@pytest.mark.parametrize("moved", [0.0, 0.5])
def test_an_adapted_embedding_is_saved_with_the_embedding_below_it(tmp_path, base, moved):
    tensors = {"emb.lora_embedding_A": tensor(2, 7, seed=3), "emb.lora_embedding_B": tensor(4, 2, seed=4)}
    below = base["emb.weight"] + moved
    expert = open_adapter(write(tmp_path / "a", tensors | {"emb.base_layer.weight": below}), base)
    product = 3 * (tensors["emb.lora_embedding_B"] @ tensors["emb.lora_embedding_A"]).T
    torch.testing.assert_close(expert["emb.weight"], below + product)
    assert (expert.factors("emb.weight", base["emb.weight"]) is None) == (moved > 0)
    merged = merge(base, [tmp_path / "a"], TaskArithmetic(scale=1.0)).weights["emb.weight"]
    torch.testing.assert_close(merged, below + product)


def test_a_half_precision_base_does_not_round_the_change_away(tmp_path, base):
    base = {name: w.bfloat16() if w.is_floating_point() else w for name, w in base.items()}
    small = {name: 1e-2 * w for name, w in Q.items()}
    expert = open_adapter(write(tmp_path / "a", small), base)
    product = small["q_proj.lora_B.weight"] @ small["q_proj.lora_A.weight"]
    assert expert["q_proj.weight"].dtype == expert.meta["q_proj.weight"].dtype == torch.float32
    torch.testing.assert_close(
        expert["q_proj.weight"] - base["q_proj.weight"].float(), 3 * product, rtol=1e-2, atol=1e-6
    )


def test_merging(tmp_path, base):
    experts = [
        open_adapter(write(tmp_path / "a", Q), base),
        open_adapter(write(tmp_path / "b", linear("mlp.fc", (5, 4))), base),
    ]
    merged = merge(base, experts, TaskArithmetic(scale=1.0)).weights
    torch.testing.assert_close(merged["q_proj.weight"], experts[0]["q_proj.weight"])
    torch.testing.assert_close(merged["mlp.fc.weight"], experts[1]["mlp.fc.weight"])
    assert torch.equal(merged["head.weight"], base["head.weight"])


FC = linear("mlp.fc", (5, 4))
METHODS = [TaskArithmetic(scale=1.0), TIES(), SCORE(), KnOTS(layers="matrices"), CoreSpace()]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
def test_adapter_folders_are_experts_like_any_other(tmp_path, base, method):
    """Alone and beside a dense expert, they merge as the dense weights that they make of the base."""
    folders = {"a": write(tmp_path / "a", Q), "b": write(tmp_path / "b", FC | Q)}
    dense = {name: dict(open_adapter(folder, base)) for name, folder in folders.items()}
    for with_dense in (False, True):
        if with_dense:
            full = {"c": {name: w + 0.1 if w.is_floating_point() else w for name, w in base.items()}}
            folders, dense = folders | full, dense | full
        if isinstance(method, CoreSpace) and not with_dense:
            method = CoreSpace(IsoC())  # which does not see in which basis the core matrices are written
        merged, expected = (merge(base, experts, method).weights for experts in (folders, dense))
        for name, weight in expected.items():
            torch.testing.assert_close(merged[name], weight, rtol=1e-4, atol=1e-5)


def test_adapter_folders_on_the_command_line(tmp_path, base):
    from lightning_merge.trainer.cli import main

    folders = {"a": str(write(tmp_path / "a", Q)), "b": str(write(tmp_path / "b", FC))}
    save_file(base, "base.safetensors")
    more = ["--method=TaskArithmetic", "--method.scale=1.0", "--output=merged.safetensors"]
    main(["merge", "--base=base.safetensors", f"--experts={json.dumps(folders)}", *more])
    expected = merge(base, folders, TaskArithmetic(scale=1.0)).weights
    merged = open_weights("merged.safetensors")
    assert all(torch.equal(merged[name], weight) for name, weight in expected.items())
    assert merged.header["merge"]["experts"]["a"]["path"] == str(tmp_path / "a" / "adapter_model.safetensors")


def test_a_greedy_soup_of_adapters(tmp_path, base):
    folders = [write(tmp_path / "a", Q), write(tmp_path / "b", FC)]
    soup = greedy_soup(base, folders, score=lambda weights: float(weights["q_proj.weight"].sum()))
    assert len(soup.experts) in (1, 2)


def numpy_iso_c(delta):
    """mean(s) U Vt over the singular vectors with a singular value; the mean is over all of them."""
    U, s, Vt = np.linalg.svd(delta, full_matrices=False)
    there = s > 1e-9 * s[0]
    return s.mean() * U[:, there] @ Vt[there]


def test_iso_c_leaves_the_null_space_of_adapters_alone(tmp_path, base):
    """A difference of float32 weights has full rank by rounding errors, which a flat spectrum would blow up."""
    base["q_proj.weight"] = tensor(40, 30)
    tensors = [linear("q_proj", (40, 30)), linear("q_proj", (40, 30), seed=7)]
    folders = [write(tmp_path / name, t) for name, t in zip("ab", tensors, strict=True)]
    merged = merge(base, folders, IsoC()).weights["q_proj.weight"]
    B, A = (torch.stack([t[f"q_proj.lora_{k}.weight"] for t in tensors]).double() for k in "BA")
    total = 3 * (B @ A).sum(dim=0)
    assert int(torch.linalg.matrix_rank(total)) == 4
    expected = base["q_proj.weight"] + torch.from_numpy(numpy_iso_c(total.numpy()))
    torch.testing.assert_close(merged, expected.float(), rtol=0, atol=1e-6)

    again = merge(base, folders, IsoC(), workers=2).weights["q_proj.weight"]
    assert torch.equal(merged, again)
    turned = merge(base, folders[::-1], IsoC()).weights["q_proj.weight"]
    torch.testing.assert_close(merged, turned, rtol=0, atol=1e-6)


def test_factors_of_another_base_are_not_used(tmp_path, base):
    other = {name: w + 0.5 if w.is_floating_point() else w for name, w in base.items()}
    experts = [open_adapter(write(tmp_path / "a", Q), other)]
    merged = merge(base, experts, CoreSpace(TaskArithmetic(scale=1.0))).weights
    torch.testing.assert_close(merged["q_proj.weight"], experts[0]["q_proj.weight"])


@pytest.mark.parametrize("rank", [2, 9])
def test_knots_takes_its_basis_from_the_factors(rank):
    B, A = tensor(3, 8, rank).double(), tensor(3, rank, 5).double()
    found = common_basis(B @ A, span=torch.cat([*B], dim=1))
    torch.testing.assert_close(found, common_basis(B @ A))


def test_tied_parameters_stay_tied_unless_one_of_them_is_adapted(tmp_path, base):
    base["lm_head.weight"] = base["emb.weight"]
    assert open_adapter(write(tmp_path / "a", Q), base).tied == {"lm_head.weight": "emb.weight"}
    expert = open_adapter(write(tmp_path / "b", linear("lm_head", (7, 4))), base)
    assert expert.tied == {}
    assert torch.equal(expert["emb.weight"], base["emb.weight"])
    merged = merge(base, [expert], TaskArithmetic(scale=1.0)).weights
    torch.testing.assert_close(merged["lm_head.weight"], expert["lm_head.weight"])
    assert torch.equal(merged["emb.weight"], base["emb.weight"])


def test_prefix(tmp_path, base):
    base = {f"model.{name}": w for name, w in base.items()}
    folder = write(tmp_path / "a", Q)
    with pytest.raises(MergeError, match=r"'q_proj.weight'.*lacks.*prefix.*model\.q_proj"):
        open_adapter(folder, base)
    expert = open_adapter(folder, base, prefix="model.")
    assert not torch.equal(expert["model.q_proj.weight"], base["model.q_proj.weight"])


@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        (Q, {"peft_type": "IA3"}, "of type IA3"),
        (Q, {"init_lora_weights": "pissa_niter_16"}, "changes the base"),
        (Q, {"r": None}, "does not say r; add what the adapter was trained with"),
        (Q, {"r": 0}, "gives r as .0., which is not a rank r of at least 1"),
        (Q, {"r": 4}, r"not the rank 4"),
        (Q, {"r": True}, "gives r as 'True', which is not a rank"),
        (Q, {"r": 2.0}, "gives r as '2.0', which is not a rank"),
        (Q, {"lora_alpha": "six"}, "gives lora_alpha as 'six', which is not a number"),
        (Q, {"lora_alpha": float("nan")}, "gives lora_alpha as 'nan', which is not a number"),
        (Q, {"rank_pattern": ["q_proj"]}, "which is not a mapping from patterns to ranks"),
        (Q, {"rank_pattern": {"q_proj": 0}}, "which is not a mapping from patterns to ranks"),
        (Q, {"rank_pattern": {"(": 2}}, r"'\(' in the rank_pattern of the adapter .*no regular expression"),
        (Q, {"alpha_pattern": {"q_proj": None}}, "which is not a mapping from patterns to numbers"),
        (Q, {"use_rslora": "yes"}, "gives use_rslora as 'yes', which is not true or false"),
        (Q, {"init_lora_weights": "tomorrow"}, "initialised by tomorrow, of which this version"),
        (Q, {"trainable_token_indices": "0"}, "which is not a list of rows"),
        (
            {"emb.token_adapter.trainable_tokens_delta": tensor(2, 4)},
            {"trainable_token_indices": [1]},
            "not the 1 that",
        ),
        (
            {"emb.token_adapter.trainable_tokens_delta": tensor(1, 4)},
            {"trainable_token_indices": [7]},
            "not the 1 that",
        ),
        (
            {"emb.token_adapter.trainable_tokens_delta": tensor(2, 4)},
            {"trainable_token_indices": [1, 1]},
            "not the 2 that",
        ),
        (Q | {"q_proj.token_adapter.trainable_tokens_delta": tensor(2, 4)}, {}, "both factors and single rows"),
        (Q, {"use_dora": True}, "no magnitudes, which a DoRA has"),
        (
            Q | {"q_proj.lora_magnitude_vector": tensor(5)},
            {"use_dora": True},
            "do not fit the outputs of 'q_proj.weight'",
        ),
        (Q | {"q_proj.lora_diag": tensor(2)}, {}, "'base_model.model.q_proj.lora_diag', which a LoRA"),
        (Q | {"q_proj.lora_magnitude_vector": tensor(6)}, {}, "'base_model.model.q_proj.lora_magnitude_vector'"),
        ({"q_proj.lora_A.weight": tensor(2, 4)}, {}, "only one of the two factors"),
        (linear("q_proj", (6, 5)), {}, r"\(2, 5\) and \(6, 2\).*does not fit.*\(6, 4\)"),
        (linear("k_proj", (6, 4)), {}, "'k_proj.weight', which the base"),
        (Q | {"head.weight": tensor(3, 4)}, {}, r"shape \(3, 4\) in the adapter.*\(2, 4\) in the base"),
    ],
)
def test_what_does_not_fit_is_said(tmp_path, base, tensors, config, message):
    with pytest.raises(MergeError, match=message):
        open_adapter(write(tmp_path / "a", tensors, **config), base)


def test_missing_files(tmp_path, base):
    assert not is_adapter(tmp_path)
    with pytest.raises(MergeError, match=r"There is no .*adapter_config\.json"):
        open_adapter(tmp_path, base)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(MergeError, match="no readable JSON"):
        open_adapter(tmp_path, base)
    for content in ("[]", "3", "null"):
        (tmp_path / "adapter_config.json").write_text(content)
        with pytest.raises(MergeError, match="no configuration of peft"):
            open_adapter(tmp_path, base)
    write(tmp_path, Q)
    assert is_adapter(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(MergeError, match="has no weights"):
        open_adapter(tmp_path, base)
    torch.save({PREFIX + name: t for name, t in Q.items()}, tmp_path / "adapter_model.bin")
    assert not torch.equal(open_adapter(tmp_path, base)["q_proj.weight"], base["q_proj.weight"])
