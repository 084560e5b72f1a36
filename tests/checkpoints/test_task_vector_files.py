"""Task vectors as files, and as experts."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import lightning_merge as lm
from lightning_merge.checkpoints import match_names, open_expert, statistics_file
from lightning_merge.checkpoints.statistics_files import save_statistics
from lightning_merge.checkpoints.task_vector_files import is_task_vector
from lightning_merge.methods import DARE, SCORE, TIES, CoreSpace, Fisher, IsoC, KnOTS, TaskArithmetic, WeightAverage
from tests.toys import base_weights, expert_weights

NAMES = ("a", "b", "c")
NO_MATRICES = ("bn.weight", "mlp.bias", "logit_scale")


@pytest.fixture
def files():
    """A base, three experts, and the task vectors of these: ``base.ckpt``, ``a.safetensors``, ``a.task_vector…``."""
    base = base_weights()
    lm.save_weights("base.ckpt", base)
    for i, name in enumerate(NAMES):
        save_file(expert_weights(base, i), f"{name}.safetensors")
        lm.save_task_vector(f"{name}.task_vector.safetensors", "base.ckpt", f"{name}.safetensors")
    return base


def both() -> tuple[dict[str, str], dict[str, str]]:
    return {n: f"{n}.safetensors" for n in NAMES}, {n: f"{n}.task_vector.safetensors" for n in NAMES}


def about(path: str) -> dict:
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["task_vector"])


METHODS = [WeightAverage(), TaskArithmetic(), TIES(), DARE(method=TIES()), SCORE(), IsoC(), KnOTS(), CoreSpace()]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_merges_to_the_same_bits_as_the_experts(method, dtype):
    base = base_weights(dtype)
    for i, name in enumerate(NAMES):
        save_file(expert_weights(base, i), f"{name}.safetensors")
        lm.save_task_vector(f"{name}.task_vector.safetensors", base, f"{name}.safetensors")
    expected, merged = (lm.merge(base, experts, method) for experts in both())
    for name, weight in expected.weights.items():
        assert torch.equal(merged.weights[name], weight), name
    assert merged.inventory == expected.inventory


def test_holds_what_differs_and_nothing_else(files):
    expert = {name: tensor.clone() for name, tensor in files.items()}
    expert["mlp.weight"] += 0.5
    expert["bn.running_mean"] += 1
    expert["bn.num_batches_tracked"] += 1
    expert["head.weight"] = torch.ones(5, 8)
    del expert["logit_scale"]
    path = lm.save_task_vector("x.task_vector.safetensors", "base.ckpt", expert)
    stored = load_file(path)
    own = {"own.bn.running_mean", "own.bn.num_batches_tracked", "own.head.weight"}
    assert set(stored) == own | {"delta.mlp.weight"}
    assert torch.equal(stored["delta.mlp.weight"], expert["mlp.weight"] - files["mlp.weight"])
    opened = lm.open_task_vector(path, files)
    assert set(opened) == set(expert)
    for name, tensor in expert.items():
        torch.testing.assert_close(opened[name], tensor)
        assert opened.meta[name].shape == tensor.shape
    assert opened.digest() == lm.open_weights(expert).digest()


def test_says_of_which_base_and_expert_it_is(files):
    digest = hashlib.sha256()
    for name, tensor in sorted(files.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode() + tensor.numpy().tobytes())
    said = about("a.task_vector.safetensors")
    assert said["base"] == {"path": "base.ckpt", "digest": digest.hexdigest()}
    assert said["expert"] == {"path": "a.safetensors", "digest": lm.open_weights("a.safetensors").digest()}
    assert (said["rank"], said["dtype"], said["relative_error"]) == (None, None, 0.0)
    assert said["lightning_merge"] == lm.__version__


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_truncated_to_a_rank(files, dtype):
    lm.save_task_vector("x.safetensors", files, "a.safetensors", rank=2, dtype=dtype)
    assert Path("x.safetensors").stat().st_size < Path("a.task_vector.safetensors").stat().st_size
    opened, expert = lm.open_task_vector("x.safetensors", files), lm.open_weights("a.safetensors")
    stored = load_file("x.safetensors")
    assert {k for k in stored if k.endswith("conv.weight")} == {"left.conv.weight", "right.conv.weight"}
    assert {k for k in stored if k.startswith("delta")} == {f"delta.{k}" for k in NO_MATRICES}
    lost = whole = 0.0
    for name in ("conv.weight", "mlp.weight", "proj.weight", "mlp.bias", "head.weight", "bn.weight", "logit_scale"):
        delta = (expert[name] - files[name]).double()
        found = opened.delta(name, files[name])
        best = delta
        if f"left.{name}" in stored:
            U, s, Vt = torch.linalg.svd(delta.flatten(1), full_matrices=False)
            best = (U[:, :2] * s[:2] @ Vt[:2]).reshape(delta.shape)
            assert torch.linalg.matrix_rank(found.flatten(1)) == 2
        torch.testing.assert_close(found.double(), best, rtol=0, atol=2e-6 if dtype is None else 2e-3)
        lost, whole = lost + (delta - found).square().sum(), whole + delta.square().sum()
    assert about("x.safetensors")["relative_error"] == pytest.approx(float((lost / whole).sqrt()), rel=1e-6)
    assert opened.digest() != expert.digest()


def test_methods_that_know_factors_use_them(files):
    for name in NAMES:
        lm.save_task_vector(f"{name}.low.safetensors", files, f"{name}.safetensors", rank=1)
    low = [f"{name}.low.safetensors" for name in NAMES]
    total = sum(lm.open_task_vector(path, files).delta("mlp.weight", files["mlp.weight"]) for path in low)
    U, s, Vt = torch.linalg.svd(total, full_matrices=False)
    assert int((s > 1e-9 * s[0]).sum()) == 3
    merged = lm.merge(files, low, IsoC()).weights["mlp.weight"]
    expected = files["mlp.weight"] + (s.mean() * U[:, :3] @ Vt[:3]).float()
    torch.testing.assert_close(merged, expected, rtol=0, atol=1e-6)  # float32 differences would have full rank
    for method in (KnOTS(layers="matrices"), CoreSpace(IsoC())):
        dense = [dict(lm.open_task_vector(path, files)) for path in low]
        one, other = lm.merge(files, low, method).weights, lm.merge(files, dense, method).weights
        torch.testing.assert_close(one["mlp.weight"], other["mlp.weight"], rtol=1e-4, atol=1e-5)


def test_another_base_is_refused_and_the_right_one_named(files):
    other = files | {"mlp.bias": files["mlp.bias"] + 1e-3}
    with pytest.raises(
        lm.MergeError, match=r"task vector a is the difference to base\.ckpt \(content sha256 .*give that"
    ):
        lm.merge(other, both()[1], WeightAverage())
    lacking = {name: tensor for name, tensor in files.items() if name != "mlp.bias"}
    plan = lm.plan(lacking, both()[1], WeightAverage())
    assert len(plan.problems) == 3
    assert "lacks 'mlp.bias'" in plan.problems[0]
    plan = lm.plan(files | {"mlp.bias": torch.ones(5)}, ["a.task_vector.safetensors"], WeightAverage())
    assert "difference of 'mlp.bias' is (12,)" in plan.problems[0]


def test_a_plan_reads_no_values_and_a_merge_hashes_the_base_once(files, monkeypatch):
    hashed = []
    hash_all = lm.checkpoints.Weights._hash
    monkeypatch.setattr(lm.checkpoints.Weights, "_hash", lambda self: hashed.append(self.name) or hash_all(self))
    plan = lm.plan("base.ckpt", both()[1], WeightAverage())
    assert (plan.problems, hashed) == ((), [])
    assert "whether the task vectors are differences to this very base" in plan.text()
    lm.merge("base.ckpt", both()[1], WeightAverage())
    assert hashed == ["base"]


def test_names_that_differ_by_a_prefix(files):
    """The module keeps its network as ``self.model``; the file has the base's names, whichever way the base is seen."""
    inside = {f"model.{name}": tensor for name, tensor in expert_weights(files, 0).items()} | {"extra": torch.ones(2)}
    lm.save_task_vector("x.task_vector.safetensors", "base.ckpt", inside)
    merged = lm.merge("base.ckpt", ["x.task_vector.safetensors"], TaskArithmetic(scale=1.0), exclude=["extra"])
    expected = lm.merge("base.ckpt", [inside], TaskArithmetic(scale=1.0), exclude=["extra"])
    assert all(torch.equal(merged.weights[name], tensor) for name, tensor in expected.weights.items())
    assert torch.equal(merged.for_task("x.task_vector.safetensors")["extra"], torch.ones(2))
    seen = match_names(lm.open_weights(inside), lm.open_weights("base.ckpt"))
    again = open_expert("x.task_vector.safetensors", seen)
    assert set(again) == set(inside)
    delta = again.delta("model.mlp.weight", files["mlp.weight"])
    assert torch.equal(delta, inside["model.mlp.weight"] - files["mlp.weight"])


def test_tied_parameters(files):
    base = {"emb": torch.randn(4, 3), "w": torch.randn(3)}
    base["out"] = base["emb"]
    tied = {"emb": base["emb"] + 1, "w": base["w"]}
    tied["out"] = tied["emb"]
    loose = {**tied, "out": base["out"] + 2}
    for expert, keys in ((tied, {"delta.emb"}), (loose, {"delta.emb", "delta.out"})):
        path = lm.save_task_vector("t.safetensors", base, expert)
        assert set(load_file(path)) == keys
        opened = lm.open_task_vector(path, base)
        assert opened.tied == lm.open_weights(expert).tied
        one, other = (lm.merge(base, [e], TaskArithmetic(scale=1.0)) for e in (path, expert))
        assert one.inventory.tied == other.inventory.tied
        assert all(torch.equal(one.weights[name], other.weights[name]) for name in base)


@pytest.mark.parametrize(("exclude", "kept"), [("embedding.*", "head.weight"), ("head.*", "embedding.weight")])
def test_one_name_of_a_tied_parameter_is_left_out(exclude, kept):
    shared, moved = torch.randn(5, 3), torch.randn(5, 3)
    rest = {f"layer{i}.weight": torch.randn(3, 3) for i in range(3)}
    base = {"embedding.weight": shared, "head.weight": shared, **rest}
    expert = {"embedding.weight": moved, "head.weight": moved, **rest}
    lm.save_task_vector("one.task_vector.safetensors", base, expert, exclude=[exclude])
    found = lm.open_task_vector("one.task_vector.safetensors", base)
    for name in ("embedding.weight", "head.weight"):
        torch.testing.assert_close(found[name], moved if name == kept else shared)


def test_the_statistics_of_the_expert_are_those_of_its_task_vector(files):
    for name in ("a", "b"):
        expert = lm.open_weights(f"{name}.safetensors")
        fisher = {f"fisher.{k}": torch.rand(t.shape) for k, t in expert.items() if t.is_floating_point()}
        save_statistics(statistics_file(expert), {k: v for k, v in fisher.items() if "running" not in k}, expert, {})
    found = [lm.merge(files, [experts["a"], experts["b"]], Fisher()).weights for experts in both()]
    assert all(torch.equal(found[1][name], tensor) for name, tensor in found[0].items())


def test_left_out(files):
    path = lm.save_task_vector("x.safetensors", "base.ckpt", "a.safetensors", exclude=["head.*"])
    assert "delta.head.weight" not in load_file(path)
    opened = lm.open_task_vector(path, files)
    assert torch.equal(opened["head.weight"], files["head.weight"])
    assert opened.digest() == lm.open_weights(dict(opened)).digest()


def test_the_expert_comes_back_as_a_checkpoint(files):
    from lightning_merge.trainer.cli import main

    expert = lm.open_weights("a.safetensors")
    lm.save_weights("again.ckpt", lm.open_task_vector("a.task_vector.safetensors", "base.ckpt"))
    again = lm.open_weights("again.ckpt")
    assert all(torch.allclose(again[name], expert[name]) for name in expert)
    main(
        ["merge", "--base=base.ckpt", "--experts=[a.task_vector.safetensors]", "--output=cli.safetensors"]
        + ["--method=TaskArithmetic", "--method.scale=1.0"]
    )
    merged = lm.open_weights("cli.safetensors")
    assert torch.equal(merged["mlp.weight"], again["mlp.weight"])
    assert merged.header["merge"]["experts"]["a.task_vector.safetensors"]["sha256"] == (
        hashlib.sha256(Path("a.task_vector.safetensors").read_bytes()).hexdigest()
    )


def test_is_no_model_by_itself(files):
    assert is_task_vector("a.task_vector.safetensors")
    assert not any(map(is_task_vector, ["a.safetensors", "gone.safetensors", files]))
    with pytest.raises(lm.MergeError, match=r"a\.task_vector\.safetensors is a task vector.*expert, over its base"):
        lm.open_weights("a.task_vector.safetensors")
    with pytest.raises(lm.MergeError, match=r"a\.safetensors is no task vector"):
        lm.open_task_vector("a.safetensors", files)
    Path("run").mkdir()
    Path("a.safetensors").rename("run/a.safetensors")
    Path("a.task_vector.safetensors").rename("run/a.task_vector.safetensors")
    assert lm.open_weights("run").path.name == "a.safetensors"


@pytest.mark.parametrize(
    ("arguments", "changes", "message"),
    [
        ({"rank": 0}, {}, "must be a whole number of at least 1, got 0"),
        ({"dtype": torch.int8}, {}, "not in torch.int8"),
        ({"exclude": ["heads.*"]}, {}, "pattern 'heads.*' matches no parameter"),
        (
            {},
            {"mlp.bias": torch.full((12,), float("nan"))},
            "'mlp.bias' differs .* not finite; did the training",
        ),
        ({"dtype": torch.float16}, {"mlp.bias": torch.full((12,), 1e6)}, "'mlp.bias'.*too large for torch.float16"),
        ({"path": "x.ckpt"}, {}, r"end x\.ckpt in \.task_vector\.safetensors"),
        ({"path": "base.safetensors"}, {}, r"base\.safetensors is one of the models"),
        ({"path": "base.ckpt/x.safetensors"}, {}, "Cannot write"),
    ],
)
def test_what_cannot_be_saved(arguments, changes, message):
    base = base_weights()
    save_file(base, "base.safetensors")
    lm.save_weights("base.ckpt", base)
    settings = {"path": "x.task_vector.safetensors", **arguments}
    with pytest.raises(lm.MergeError, match=message):
        lm.save_task_vector(base="base.safetensors", expert=expert_weights(base, 0) | changes, **settings)
    assert not Path("x.task_vector.safetensors").exists()


def test_another_model_is_no_expert_of_this_base(files):
    with pytest.raises(lm.MergeError, match="no fine-tuned form of the base: of the base's 10 parameters it has 0"):
        lm.save_task_vector("x.safetensors", files, {"other.weight": torch.ones(2)})


@pytest.mark.parametrize(
    ("metadata", "drop", "message"),
    [({"format": 2}, None, "of format 2.*reads format 1"), ({}, "left.mlp.weight", "is damaged: of 'mlp.weight' it")],
)
def test_files_that_cannot_be_read(files, metadata, drop, message):
    lm.save_task_vector("x.safetensors", files, "a.safetensors", rank=2)
    said, tensors = about("x.safetensors") | metadata, load_file("x.safetensors")
    tensors.pop(drop, None)
    save_file(tensors, "x.safetensors", {"task_vector": json.dumps(said)})
    with pytest.raises(lm.MergeError, match=message):
        lm.open_task_vector("x.safetensors", files)


@pytest.mark.parametrize(
    ("keep", "changes", "lacking"),
    [
        (("format",), {}, "base is missing, expert is missing, relative_error is missing, and more"),
        (None, {"base": {"path": None}}, "base.digest is missing"),
        (
            None,
            {"expert": {"digest": "0"}, "tied": []},
            "expert.path is missing, tied is a list of 0 values where",
        ),
    ],
)
def test_headers_that_do_not_say_all(files, keep, changes, lacking):
    lm.save_task_vector("x.safetensors", files, "a.safetensors")
    said = about("x.safetensors")
    said = {key: said[key] for key in keep or said} | changes
    save_file(load_file("x.safetensors"), "x.safetensors", {"task_vector": json.dumps(said)})
    for given in ({"a": "x.safetensors"}, ["x.safetensors"]):
        with pytest.raises(lm.MergeError, match=f"x.safetensors is damaged, .* not that of a task vector: {lacking}"):
            lm.merge(files, given, TaskArithmetic())
