"""The sections ``align`` and ``repair`` of a merge: experts of two foundations, from files to one model."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import lightning_merge as lm
from lightning_merge.align import Symmetries, find_symmetries
from lightning_merge.checkpoints.statistics_files import save_statistics
from lightning_merge.evaluation.statistics.collect import Recipe, collect_statistics
from lightning_merge.evaluation.task_models import model_of_task
from lightning_merge.merging.aligning import Align, align, example_images
from lightning_merge.merging.repairing import Repair, repair
from lightning_merge.methods import TALLMask, TaskArithmetic
from lightning_merge.repair import corrected_weights, load_corrections
from lightning_merge.trainer.cli import main
from lightning_merge.utilities.errors import MergeError
from tests.conftest import ROOT
from tests.toys import digit_tasks, tiny_vgg

ORIGIN = {"inverted": "a", "parity": "b"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two foundations, and an expert of each with a head of its own: random weights do."""
    folder = tmp_path_factory.mktemp("experts")
    digit_tasks(folder / "tasks")
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        lm.save_weights(folder / f"{name}.ckpt", tiny_vgg().state_dict())
    for seed, (name, foundation) in enumerate(ORIGIN.items()):
        torch.manual_seed(10 + seed)
        model = tiny_vgg(num_classes=2 if name == "parity" else 10)
        start = lm.open_weights(folder / f"{foundation}.ckpt")
        moved = {
            key: torch.randn_like(tensor) if key.startswith("head") else start[key] + 0.02 * torch.randn_like(tensor)
            for key, tensor in model.state_dict().items()
        }
        lm.save_weights(folder / f"{name}.ckpt", moved, hyper_parameters=model.hparams)
    return folder


@pytest.fixture
def experts(folder) -> dict[str, str]:
    return {name: str(folder / f"{name}.ckpt") for name in ORIGIN}


@pytest.fixture
def options(folder) -> Align:
    return Align({name: str(folder / f"{name}.ckpt") for name in "ab"}, ORIGIN)


def images(folder: Path) -> dict[str, list]:
    data = lm.TaskArrays(str(folder / "tasks"), image_size=8, channels=1)
    return {name: list(loader)[:4] for name, loader in data.training_images(list(ORIGIN), tiny_vgg(), 32).items()}


def merged_of(options, experts, method=None):
    found = align(options, experts, tiny_vgg(), private=["head.*"])
    return lm.merge(found.base, found.experts, method or TaskArithmetic(scale=0.4), exclude=["head.*"])


def command(folder: Path, experts: dict[str, str], *more: str) -> list[str]:
    foundations = {name: str(folder / f"{name}.ckpt") for name in "ab"}
    return [
        "merge",
        f"--config={ROOT / 'configs/merge/foundations.yaml'}",
        "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false",
        "--model=Expert",
        "--model.backbone=python/lightning_merge.models.vgg.VGG",
        "--model.backbone_args={stages: [[8], [12]], hidden: [16], in_chans: 1, img_size: 8}",
        "--model.pretrained=false",
        "--model.num_classes=10",
        "--data=TaskArrays",
        f"--data.root={folder / 'tasks'}",
        "--data.image_size=8",
        "--data.channels=1",
        "--data.test_domains=[inverted, parity]",
        f"--experts={json.dumps(experts)}",
        f"--align.foundations={json.dumps(foundations)}",
        f"--align.foundation_of={json.dumps(ORIGIN)}",
        *more,
    ]


class TestCommandLine:
    def test_merge_align_and_correct(self, folder, experts, options, capsys):
        main(command(folder, experts, "--output=merged.ckpt"))
        shown = capsys.readouterr().out
        assert "TaskArithmetic of 2 experts (inverted, parity)" in shown
        assert "wrote merged.ckpt, and the tasks' corrections beside it" in shown
        assert "merged, task known" in shown
        by_hand = merged_of(options, experts)
        written = lm.open_weights("merged.ckpt")
        assert all(torch.equal(written[name], tensor) for name, tensor in by_hand.weights.items())
        manifest = written.header["merge"]
        assert list(manifest["base"]["mean_of"]) == ["a", "b"]
        assert manifest["repair"]["by"] == "tact"
        corrections = load_corrections("merged.corrections.safetensors")
        assert list(corrections) == ["inverted", "parity"]
        module = tiny_vgg(num_classes=2)
        module.load_state_dict(corrected_weights(module, by_hand.for_task("parity"), corrections["parity"]))

    def test_a_plan_compares_nothing_and_writes_nothing(self, folder, experts, capsys):
        with pytest.raises(SystemExit) as exit:
            main(command(folder, experts, "--output=merged.ckpt", "--plan"))
        assert exit.value.code == 0
        assert "TaskArithmetic" in capsys.readouterr().out
        assert not Path("merged.ckpt").exists()

    def test_two_processes_write_what_one_does(self, folder, experts):
        ddp = ["--trainer.strategy=ddp", "--trainer.devices=2", "--align.by=activations"]
        arguments = command(folder, experts, "--output=two.safetensors", *ddp)
        launched = subprocess.run([sys.executable, "-m", "lightning_merge", *arguments], capture_output=True, text=True)
        assert launched.returncode == 0, launched.stderr
        main(command(folder, experts, "--output=one.safetensors", "--align.by=activations"))
        for name in ("{}.safetensors", "{}.corrections.safetensors"):
            one, two = (load_file(name.format(count)) for count in ("one", "two"))
            assert one.keys() == two.keys()
            for key, tensor in one.items():
                torch.testing.assert_close(two[key], tensor, rtol=1e-4, atol=1e-6)

    @pytest.mark.parametrize("by", ["repair", "probe"])
    def test_other_repairs(self, folder, experts, by, capsys):
        main(command(folder, experts, "--output=merged.safetensors", f"--repair.by={by}", "--align.by=activations"))
        assert "merged, task known" in capsys.readouterr().out
        assert Path("merged.heads.safetensors").exists() == (by == "probe")
        assert not Path("merged.corrections.safetensors").exists()  # all of REPAIR's are in the weights

    @pytest.mark.parametrize(
        ("more", "message"),
        [
            (["--base=x.ckpt"], "leave --base out"),
            (["--method=Fisher", "--method.scale=null"], "know nothing of a new order of channels"),
            (["--resume=true"], "there is no resume"),
            (["--repair.by=batch_norm"], "no BatchNorm with running statistics"),
            (["--align.foundation_of={inverted: a}"], "foundation of the expert 'parity' is not told"),
            (["--align.symmetries=none.json"], "cannot be read from none.json"),
            (["--experts=[a.ckpt]"], "need names"),
            (["--repair.batches=-1"], "repair.batches must be at least 1, got -1"),
        ],
    )
    def test_what_cannot_work_ends_in_one_sentence(self, folder, experts, more, message, capsys):
        with pytest.raises(SystemExit) as exit:
            main(command(folder, experts, "--output=merged.ckpt", *more))
        assert exit.value.code == 1
        error = capsys.readouterr().err
        assert message in error
        assert "Traceback" not in error
        assert not list(Path().glob("merged*"))

    def test_nothing_of_an_earlier_merge_stays_beside_a_model(self, folder, experts):
        for more in (["--repair.by=repair"], ["--repair=null"]):
            main(command(folder, experts, "--output=merged.ckpt"))
            assert Path("merged.corrections.safetensors").exists()
            main(command(folder, experts, "--output=merged.ckpt", *more))
            assert [path.name for path in Path().glob("*merged*")] == ["merged.ckpt"]

    def test_what_only_has_the_name_of_corrections_is_neither_replaced_nor_removed(self, folder, experts, capsys):
        lm.checkpoints.save_weights("merged.corrections.safetensors", {"another": torch.ones(2)})
        before = Path("merged.corrections.safetensors").read_bytes()
        with pytest.raises(SystemExit):
            main(command(folder, experts, "--output=merged.ckpt"))
        assert "merged.corrections.safetensors is none of the corrections that belong to a" in capsys.readouterr().err
        assert not Path("merged.ckpt").exists()
        main(command(folder, experts, "--output=merged.ckpt", "--repair=null"))
        assert Path("merged.corrections.safetensors").read_bytes() == before

    def test_a_repaired_merge_that_cannot_be_written_changes_nothing(self, folder, experts, monkeypatch):
        main(command(folder, experts, "--output=merged.ckpt"))
        before = {path: path.read_bytes() for path in Path().glob("*merged*")}

        def fail(*_):
            raise MergeError("disk full")

        monkeypatch.setattr(lm.Merged, "save", fail)
        with pytest.raises(SystemExit):
            main(command(folder, experts, "--output=merged.ckpt", "--method.scale=0.1"))
        assert {path: path.read_bytes() for path in Path().glob("*merged*")} == before

    def test_what_cannot_be_written_is_said_before_any_work(self, folder, experts, monkeypatch, capsys):
        monkeypatch.setattr(
            "lightning_merge.trainer.verbs.align_and_repair.repair", lambda *_, **__: pytest.fail("late")
        )
        with pytest.raises(SystemExit):
            main(command(folder, experts, "--output=merged.txt"))
        assert "merged.txt" in capsys.readouterr().err


class TestAlign:
    def test_groups_from_a_file_need_no_module(self, options, experts, tmp_path):
        module = tiny_vgg()
        groups = find_symmetries(module, example_images(module))
        (tmp_path / "groups.json").write_text(groups.to_json())
        found = align(replace(options, symmetries=str(tmp_path / "groups.json")), experts, private=["head.*"])
        again = align(options, experts, module, private=["head.*"])
        for name in found.permutations:
            assert found.permutations[name].digest() == again.permutations[name].digest()

    def test_aligned_experts_compute_what_they_did(self, options, experts):
        module, x = tiny_vgg(num_classes=2).eval(), torch.randn(4, 1, 8, 8)
        module.load_state_dict(dict(lm.open_weights(experts["parity"])))
        before = module(x)
        found = align(options, experts, tiny_vgg(), private=["head.*"])
        assert found.permutations["b"].moved() > 0.3
        module.load_state_dict(dict(found.experts["parity"]))
        torch.testing.assert_close(module(x), before, rtol=1e-4, atol=1e-5)

    def test_alignment_brings_the_foundations_closer(self, options, experts):
        module = tiny_vgg()
        groups = find_symmetries(module, example_images(module)).ignoring(["head.*"])
        naive = align(replace(options, by="nothing"), experts, module)
        aligned = align(options, experts, module, private=["head.*"])

        def distance(found) -> float:
            return lm.align.distance(found.foundations["a"], found.foundations["b"], groups)

        assert distance(aligned) < 0.97 * distance(naive)

    def test_three_foundations_at_once(self, folder, options, experts):
        torch.manual_seed(2)
        lm.save_weights(folder / "c.ckpt", tiny_vgg().state_dict())
        groups, three = find_symmetries(tiny_vgg(), torch.randn(2, 1, 8, 8)), {"c": str(folder / "c.ckpt")}
        for together in ("reference", "mean", "frank_wolfe"):
            chosen = replace(options, foundations=options.foundations | three, together=together)
            found = align(chosen, experts, tiny_vgg(), private=["head.*"], symmetries=groups)
            assert set(found.permutations) == {"a", "b", "c"}
            assert isinstance(found.permutations["c"].symmetries, Symmetries)

    @pytest.mark.parametrize(
        ("changes", "module", "message"),
        [
            ({}, None, "aligned by the permutation groups of their module"),
            ({"by": "activations"}, tiny_vgg(), "compared on the experts' images"),
            ({}, torch.nn.Linear(3, 2), "what inputs Linear takes"),
        ],
    )
    def test_what_is_missing_is_said(self, options, experts, changes, module, message):
        with pytest.raises(MergeError, match=message):
            align(replace(options, **changes), experts, module)


class TestRepair:
    def test_every_task_has_its_own_model(self, folder, options, experts):
        merged, data, module = merged_of(options, experts), images(folder), tiny_vgg()
        before = {name: tensor.clone() for name, tensor in merged.weights.items()}
        for by in ("tact", "probe"):
            repaired = repair(Repair(by=by), merged, module, data)
            assert all(torch.equal(repaired.weights[name], tensor) for name, tensor in before.items())
            own = repaired.for_task("parity")
            changed = {name for name, tensor in own.items() if not torch.equal(tensor, merged.for_task("parity")[name])}
            assert changed
            assert changed <= {"head.weight", "head.bias"} if by == "probe" else "head.weight" not in changed

    def test_repair_serves_all_tasks(self, folder, options, experts):
        merged, data = merged_of(options, experts), images(folder)
        repaired = repair(Repair(by="repair"), merged, tiny_vgg(), data)
        body = [name for name in repaired.weights if not name.startswith("head")]
        one, two = (repaired.for_task(task) for task in ORIGIN)
        assert all(torch.equal(one[name], two[name]) for name in body)
        assert all(torch.equal(one[name], repaired.weights[name]) for name in body)
        assert any(not torch.equal(one[name], merged.weights[name]) for name in body)
        with pytest.raises(MergeError, match="repaired already"):
            repair(Repair(), repaired, tiny_vgg(), data)
        with pytest.raises(MergeError, match="rescale first"):
            repaired.rescaled(0.3)

    def test_methods_that_know_the_task_are_corrected_for_it(self, folder, options, experts):
        merged = merged_of(options, experts, TALLMask())
        repaired = repair(Repair(), merged, tiny_vgg(), images(folder))
        own, core = repaired.for_task("inverted"), merged.for_task("inverted")
        assert torch.equal(own["backbone.stages.0.weight"], core["backbone.stages.0.weight"])
        assert not torch.equal(own["backbone.stages.1.weight"], core["backbone.stages.1.weight"])

    @pytest.mark.parametrize("by", ["repair", "batch_norm"])
    def test_one_correction_does_not_fit_a_model_for_each_task(self, folder, options, experts, by):
        with pytest.raises(MergeError, match="TALLMask keeps a model for each task"):
            repair(Repair(by=by), merged_of(options, experts, TALLMask()), tiny_vgg(), images(folder))

    def test_missing_data_are_named(self, folder, options, experts):
        data = images(folder)
        del data["parity"]
        with pytest.raises(MergeError, match="no data of expert parity"):
            repair(Repair(), merged_of(options, experts), tiny_vgg(), data)

    def test_data_of_others_are_refused(self, folder, options, experts):
        data = images(folder)
        data["held out"] = data["parity"]
        with pytest.raises(MergeError, match="data for 'held out', which is no expert"):
            repair(Repair(by="repair"), merged_of(options, experts), tiny_vgg(), data)
        with pytest.raises(MergeError, match=r"repair.by must be one of tact, repair"):
            repair(Repair(by="magic"), merged_of(options, experts), tiny_vgg(), images(folder))

    def test_the_model_of_a_task_is_not_what_the_model_was_configured_as(self, folder):
        data = lm.TaskArrays(str(folder / "tasks"), image_size=8, channels=1)
        model = tiny_vgg(weights=str(folder / "a.ckpt"), class_names=[f"digit {i}" for i in range(10)])
        assert model_of_task(model, data, "parity").num_classes == 2


class TestRecordedMoments:
    """TACT from what was recorded beside the experts, which nobody has to run again."""

    @pytest.fixture
    def experts(self, folder) -> dict[str, str]:
        """The experts, each with the moments of its own images: the ones that the repair sees."""
        found = {}
        for name, batches in images(folder).items():
            shutil.copy(folder / f"{name}.ckpt", f"{name}.ckpt")
            expert = lm.open_weights(f"{name}.ckpt")
            model = tiny_vgg(num_classes=len(expert["head.bias"]))
            model.load_state_dict(dict(expert))
            statistics = collect_statistics(model, batches, Recipe(("moments",)))
            save_statistics(f"{name}.statistics.safetensors", statistics, expert, {})
            found[name] = f"{name}.ckpt"
        return found

    def corrections(self, folder, merged, recorded):
        options = Repair("tact", recorded=recorded)
        return repair(options, merged, tiny_vgg(), images(folder)).corrections

    @pytest.mark.parametrize("by", ["nothing", "weights"])
    def test_they_give_the_corrections_that_the_data_give(self, folder, experts, options, by):
        merged = merged_of(replace(options, by=by), experts)
        moved = [getattr(expert, "permutation", None) for expert in merged.experts.values()]
        assert (by == "weights") == any(permutation is not None and permutation.moved() for permutation in moved)
        found, expected = (self.corrections(folder, merged, recorded) for recorded in (True, False))
        assert list(found) == list(expected) == list(ORIGIN)
        for task, correction in expected.items():
            assert correction.sites == found[task].sites
            for site in correction.sites:
                torch.testing.assert_close(found[task].scale[site], correction.scale[site], rtol=1e-6, atol=1e-6)
                torch.testing.assert_close(found[task].shift[site], correction.shift[site], rtol=1e-6, atol=1e-6)

    def test_the_experts_are_not_run(self, folder, experts, options, monkeypatch):
        from lightning_merge.repair import calibration

        merged = merged_of(options, experts)
        monkeypatch.setattr(calibration, "observe", None)
        self.corrections(folder, merged, recorded=True)
        with pytest.raises(TypeError):
            self.corrections(folder, merged, recorded=False)

    def test_what_does_not_fit_is_refused(self, folder, experts, options):
        merged = merged_of(options, experts)
        with pytest.raises(MergeError, match=r"repair\.recorded: recorded moments are of each expert's own data"):
            repair(Repair("repair", recorded=True), merged, tiny_vgg(), images(folder))
        path, expert = "parity.statistics.safetensors", lm.open_weights("parity.ckpt")
        whole = dict(lm.open_weights(path))
        site = "backbone.hidden.0"
        fewer = {f"{kind}.{site}": whole[f"{kind}.{site}"][:3] for kind in ("mean", "var")}
        for change, sentence in (
            (fewer, "have 3 channels at the site 'backbone.hidden.0', where the"),
            ({f"axis.{site}": None}, "is not complete: .* has no parameter 'axis.backbone.hidden.0'"),
            ({f"mean.{site}": None}, "recorded of expert parity lack the site 'backbone.hidden.0'"),
            (dict.fromkeys(whole) | {"gram.x": torch.zeros(1)}, "holds no moments of activations"),
        ):
            changed = {name: tensor for name, tensor in {**whole, **change}.items() if tensor is not None}
            save_statistics(path, changed, expert, {})
            with pytest.raises(MergeError, match=sentence):
                self.corrections(folder, merged_of(replace(options, by="nothing"), experts), recorded=True)
        save_statistics(path, whole, lm.open_weights("inverted.ckpt"), {})
        with pytest.raises(MergeError, match=r"other weights than those of expert parity.*--kinds '\[moments\]'"):
            self.corrections(folder, merged, recorded=True)
        Path(path).unlink()
        with pytest.raises(MergeError, match="The activations of expert parity were not recorded beside its file"):
            self.corrections(folder, merged, recorded=True)

    def test_the_command_line(self, folder, experts, capsys, opened):
        main(command(folder, experts, "--output=merged.ckpt", "--repair.recorded=true"))
        assert {opened[path] for path in experts.values()} == {1}
        assert "the tasks' corrections beside it" in capsys.readouterr().out
        noted = lm.open_weights("merged.ckpt").header["merge"]["repair"]
        assert noted["recorded"]
        assert len(noted["moments"]["parity"]["sha256"]) == 64
        Path("parity.statistics.safetensors").unlink()
        with pytest.raises(SystemExit):
            main(command(folder, experts, "--output=other.ckpt", "--repair.recorded=true"))
        assert "The activations of expert parity were not recorded beside its file" in capsys.readouterr().err
