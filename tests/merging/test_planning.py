"""A plan says what a merge does, and all that stands in its way, without reading more than a few tensors."""

from __future__ import annotations

import inspect
import json
import shutil
from collections import namedtuple
from dataclasses import fields
from pathlib import Path

import pytest
import torch

import lightning_merge as lm
from lightning_merge.checkpoints import Weights, open_weights, save_weights
from lightning_merge.checkpoints.statistics_files import save_statistics
from lightning_merge.merging import origins
from lightning_merge.merging.options import MergeOptions
from lightning_merge.methods import (
    DARE,
    EMR,
    SCORE,
    SLERP,
    TIES,
    AdaMerging,
    Fisher,
    IsoC,
    MultiSLERP,
    RegMean,
    WeightAverage,
)
from lightning_merge.methods.base.matrices import Matrices
from tests.toys import expert_weights


@pytest.fixture
def experts(base):
    return {name: expert_weights(base, i) for i, name in enumerate(("photo", "art", "sketch"))}


@pytest.fixture
def files(base, experts):
    save_weights("base.safetensors", base)
    save_weights("photo.safetensors", experts["photo"])
    save_weights("art.ckpt", {f"model.{name}": tensor for name, tensor in experts["art"].items()})
    save_weights("sketch.pt", experts["sketch"])
    for name, ending in (("photo", ".safetensors"), ("art", ".ckpt"), ("sketch", ".pt")):
        source = open_weights(name + ending)
        fisher = {f"fisher.{key}": torch.ones(tensor.shape) for key, tensor in source.items()}
        save_statistics(f"{name}.statistics.safetensors", fisher, source, {})
    return {"photo": "photo.safetensors", "art": "art.ckpt", "sketch": "sketch.pt"}


def nbytes(state) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in state.values())


def test_it_takes_what_merge_takes():
    taken = inspect.signature(lm.merge).parameters.values()
    named = {argument.name: argument.default for argument in taken if argument.kind is argument.KEYWORD_ONLY}
    assert named == {field.name: field.default for field in fields(MergeOptions)}
    with pytest.raises(TypeError, match="densty"):
        lm.plan({}, [], TIES(), densty=0.1)


@pytest.mark.parametrize("method", [SCORE(), TIES(), Fisher(), DARE(method=EMR())], ids=lambda m: type(m).__name__)
def test_no_more_than_a_sample_is_read_and_nothing_is_written(files, method, monkeypatch):
    read, get = set(), Weights.__getitem__
    monkeypatch.setattr(origins, "_ENOUGH", 90)
    monkeypatch.setattr(Weights, "__getitem__", lambda weights, name: read.add(name) or get(weights, name))
    before = sorted(Path().rglob("*"))
    plan = lm.plan("base.safetensors", files, method, exclude=["head.*"], output="merged.safetensors")
    assert plan.problems == ()
    assert plan.costs.seconds > 0
    assert len({name.removeprefix("model.") for name in read}) == 1
    assert sorted(Path().rglob("*")) == before


class TestWhatIsMerged:
    def test_the_inventory_is_that_of_the_merge(self, files):
        arguments = ("base.safetensors", files, WeightAverage())
        plan = lm.plan(*arguments, exclude=["head.*"], output="merged.safetensors")
        merged = lm.merge(*arguments, exclude=["head.*"], output="merged.safetensors")
        assert plan.inventory == merged.inventory
        assert plan.renamed == {"art": "model.* -> *"}
        assert plan.values == {"merged": 309, "averaged": 16, "copied": 25, "matrices": 192}
        header = int.from_bytes(Path("merged.safetensors").read_bytes()[:8], "little")
        assert plan.costs.write == Path("merged.safetensors").stat().st_size - 8 - header

    def test_tied_names_are_counted_once(self, base, experts):
        for model in (base, *experts.values()):
            model["decoder.weight"] = model["head.weight"]
        plan = lm.plan(base, experts, WeightAverage())
        assert plan.inventory.tied == {"decoder.weight": "head.weight"}
        assert plan.values["merged"] == 333

    def test_matrices_by_their_shape(self):
        base = {f"{i}.weight": torch.zeros(30, 10) for i in range(3)} | {"out.weight": torch.zeros(50, 10)}
        base |= {"conv.weight": torch.zeros(5, 2, 3, 3), "text_projection": torch.zeros(4, 4), "x.bias": torch.zeros(9)}
        assert lm.plan(base, [base], WeightAverage()).matrices == ((3, 30, 10), (1, 50, 10))
        rule = Matrices(split=["0.*", "1.*"], flatten_convolutions=True)
        found = lm.plan(base, [base], WeightAverage(), matrices=rule).matrices
        assert found == ((6, 10, 10), (1, 50, 10), (1, 30, 10), (1, 5, 18))


class TestWhatStandsInTheWay:
    def test_everything_at_once(self, base, experts):
        experts["photo"]["extra"] = torch.zeros(1)
        experts["art"] = {name.upper(): tensor for name, tensor in experts["art"].items()}
        del experts["sketch"]["mlp.weight"]
        experts["sketch"]["head.weight"] = torch.zeros(4, 8)
        experts["sketch"]["proj.weight"] = experts["sketch"]["proj.weight"].to(torch.int8)
        plan = lm.plan(
            base,
            experts | {"none": "none.ckpt"},
            RegMean(),
            exclude=["hed.*"],
            workers=0,
            dtype=torch.int8,
            device="nonsense",
            output="x.onnx",
        )
        said = "\n".join(plan.problems)
        for words in (
            "no file or folder none.ckpt",
            "'hed.*' matches no parameter",
            "photo has 'extra'",
            "art is no fine-tuned form",
            "sketch lacks 'mlp.weight'",
            "'head.weight' has shape (4, 8) in the expert sketch",
            "'proj.weight' is torch.int8 in the expert sketch",
            "statistics of the data of expert photo",
            "workers must be at least 1",
            "not torch.int8",
            "device nonsense cannot be used",
            "Cannot tell how to write x.onnx",
        ):
            assert words in said, words
        assert plan.costs is None

    @pytest.mark.parametrize(
        ("method", "arguments"),
        [
            (SLERP(), {}),
            (MultiSLERP(weights=(1, 2)), {}),
            (DARE(method=Fisher(weights=(1, 2))), {"statistics": {}}),
            (RegMean(), {"statistics": {"nobody": {}}}),
            (AdaMerging(), {}),
            (WeightAverage(), {"exclude": ["*"]}),
            (WeightAverage(), {"include": ["nothing"]}),
            (WeightAverage(), {"output": "folder"}),
            (WeightAverage(), {"output": "text/file.pt"}),
            (WeightAverage(), {"output": "base.pt"}),
            (WeightAverage(), {"output": "."}),
        ],
        ids=repr,
    )
    def test_what_merge_refuses(self, base, experts, method, arguments):
        Path("text").write_text("")
        save_weights("base.pt", base)
        with pytest.raises(lm.MergeError) as refused:
            lm.merge("base.pt", experts, method, **arguments)
        plan = lm.plan("base.pt", experts, method, **arguments)
        assert set(refused.value.problems) <= set(plan.problems)

    def test_a_base_that_cannot_be_opened(self):
        Path("text.pt").write_text("text")
        plan = lm.plan("none.ckpt", {"a": "text.pt", "b": "none.pt"}, SCORE())
        assert len(plan.problems) == 3
        assert all(name in " ".join(plan.problems) for name in ("none.ckpt", "text.pt", "none.pt"))
        assert "SCORE of 2 experts (a, b)" in plan.text()
        json.dumps(plan.as_dict())

    def test_experts_that_cannot_be_opened_are_counted_all_the_same(self, base, experts):
        plan = lm.plan(base, [experts["photo"], "none.pt"], SLERP())
        assert len(plan.problems) == 1

    def test_a_disk_that_is_full(self, base, experts, monkeypatch):
        usage = namedtuple("usage", "total used free")
        for output, needed in (("new/merged.safetensors", nbytes(base)), ("new/merged.pt", 2 * nbytes(base))):
            for free, problems in ((needed - 1, 1), (needed, 0)):
                monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: usage(0, 0, free))
                plan = lm.plan(base, experts, SCORE(), output=output)
                assert len(plan.problems) == problems
                assert all("make room, or write elsewhere" in problem for problem in plan.problems)


class TestCosts:
    def costs(self, *args, **kwargs):
        return lm.plan(*args, **kwargs).costs

    def test_bytes(self, base, experts, files):
        once = nbytes(base) + sum(map(nbytes, experts.values()))
        assert self.costs(base, experts, SCORE()).read == 2 * once  # to look for what is not finite, and to merge
        assert self.costs(base, experts, SCORE(), allow_non_finite=True).read == once
        found = self.costs("base.safetensors", files, SCORE())
        assert (found.read, found.passes) == (3 * once, 3)  # and for the sha256
        assert found.write == 0
        statistics = sum(nbytes(open_weights(f"{name}.statistics.safetensors")) for name in files)
        assert self.costs("base.safetensors", files, Fisher()).read == 3 * (once + statistics)

    def test_memory(self):
        base = {"a": torch.zeros(30, 10), "b": torch.zeros(20, 10), "c": torch.zeros(7)}
        found = {}
        for count in (1, 4):
            for workers in (1, 2):
                arguments = (base, {str(i): base for i in range(count)}, WeightAverage())
                found[count, workers] = self.costs(*arguments, workers=workers, output="x.pt").memory
        least = {(1, 1): 3 * 300, (4, 1): 6 * 300, (1, 2): 3 * 500, (4, 2): 6 * 500}
        room = {1: 2 * 300 + 3 * 100, 2: 2 * 500 + 6 * 100}
        assert found == {key: 4 * value for key, value in least.items()}
        factorized = self.costs(base, [base], IsoC(), workers=2, output="x.pt").memory
        assert factorized == 4 * least[1, 2] + 8 * room[2]  # a stack in float32, factorized in float64
        assert self.costs(base, [base], WeightAverage(), workers=1).memory == found[1, 1] + 4 * 507
        kept = self.costs(base, [base], WeightAverage(), workers=1, output="x.pt", keep_update=True)
        assert kept.memory == found[1, 1] + 4 * 507

    @pytest.mark.parametrize(
        ("method", "open_ended"), [(SCORE(), False), (TIES(), True), (DARE(method=TIES()), True), (DARE(), False)]
    )
    def test_methods_that_look_at_the_whole_model_take_more(self, base, experts, method, open_ended):
        plan = lm.plan(base, experts, method)
        assert plan.costs.open_ended == open_ended
        assert ("at least" in plan.text()) == open_ended


class TestWords:
    def test_text(self, base, experts):
        experts = {name: {f"net.{key}": tensor for key, tensor in e.items()} for name, e in experts.items()}
        text = lm.plan(base, experts, SCORE(), exclude=["head.*"], output="merged.pt").text()
        assert text.startswith("# Plan: SCORE of 3 experts (photo, art, sketch)\n\nNothing stands in its way.\n\n")
        table = [line for line in text.splitlines() if line.startswith("|")]
        assert table[2] == "| merged                       |       6 |    309 |"
        assert table[3] == "| of these, matrices           |       2 |    192 |"
        assert len({len(line) for line in table[:7]}) == 1
        assert "Matrices: 1 x (8, 12), 1 x (12, 8)." in text
        assert "Names of art, matched by their prefix: `net.* -> *`." in text
        assert "Left out, and only in what `for_task` gives for photo or art or sketch: head.weight." in text
        assert "| to write       | 1.4 kB to merged.pt  " in text
        assert "Whether all values are finite is seen when the merge reads them." in text

    def test_a_name_for_every_problem(self, base, experts):
        for i in range(30):
            experts["art"][f"extra{i}"] = torch.zeros(1)
        text = lm.plan(base, experts, SCORE()).text()
        assert "30 things stand in its way" in text
        assert all(f"'extra{i}'" in text for i in range(30))

    def test_values(self, base, experts):
        found = lm.plan(base, experts, SCORE(), exclude=["head.*"]).as_dict()
        assert found["inventory"]["copied"] == ("bn.num_batches_tracked", "head.weight")
        assert found["costs"]["write"] == 0
        json.dumps(found)

    def test_another_precision_is_said(self, base, experts):
        experts["art"] = {k: v.half() if v.is_floating_point() else v for k, v in experts["art"].items()}
        text = lm.plan(base, experts, SCORE()).text()
        assert "7 of the merged parameters are float16 in art and float32 in the base" in text
