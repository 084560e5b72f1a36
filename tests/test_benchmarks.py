"""The scripts of ``benchmarks/`` still run, at toy size; what they measure is not looked at."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import re
from argparse import Namespace

import pytest
import torch
import yaml
from safetensors.torch import load_file

import lightning_merge as lm
from benchmarks import (
    candidates,
    contenders,
    errors,
    formulas,
    kills,
    linalg,
    measure,
    memory,
    models,
    report,
    scaling,
    speed,
    startup,
)
from tests.conftest import ROOT
from tests.toys import tiny_vgg


def in_process(command: list[str]) -> measure.Cost:
    """Run what would be measured as a process in this one, where torch is imported already."""
    assert command[1] == "-m", command
    out, name = io.StringIO(), command[2]
    with contextlib.redirect_stdout(out):
        importlib.import_module(f"{name}.__main__" if name == "lightning_merge" else name).main(command[3:])
    lines = out.getvalue().splitlines()
    said = json.loads(lines[-1]) if lines and lines[-1].startswith("{") else {}
    return measure.Cost(1.0, 1.0, 2e6, 1e6, said)


@pytest.fixture
def _in_process(monkeypatch):
    for script in (measure, speed, memory, report):
        monkeypatch.setattr(script, "measure", in_process)


def rows(text: str) -> list[list[str]]:
    """The cells of a Markdown table, its head first."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in (lines[0], *lines[2:])]


@pytest.mark.parametrize("method", contenders.METHODS)
@pytest.mark.parametrize("like", models.LIKE)
def test_formulas_are_the_merging_methods(tmp_path, method, like):
    """The formula that a method is measured against is the method, in float64 to the last digits."""
    base, *experts = models.make(tmp_path, "toy", 3, like, "float64")
    formulas.merge(method, str(base), list(map(str, experts)), str(tmp_path / "merged.safetensors"), torch.float64)
    merged = lm.merge(base, experts, getattr(lm.methods, method)(), dtype=torch.float64).weights
    for name, tensor in load_file(tmp_path / "merged.safetensors").items():
        torch.testing.assert_close(tensor, merged[name], rtol=0, atol=1e-10)


def test_errors_are_shares_of_the_norm(tmp_path):
    base, expert = models.make(tmp_path, "toy", 1)
    zeros, delta = models.make_task_vectors(tmp_path, base, [expert])
    assert errors.relative_error(str(delta), str(zeros)) == 1
    assert errors.relative_error(str(base), str(expert)) == pytest.approx(0.05, rel=0.2)


def test_a_process_is_measured():
    cost = measure.measure(measure.python("-c", "sum(range(3_000_000)); print('{\"answer\": 42}')"))
    assert cost.said == {"answer": 42}
    assert 0 < cost.cpu < 60
    assert cost.peak > 1e6
    with pytest.raises(measure.Failed, match="out of luck"):
        measure.measure(measure.python("-c", "raise SystemExit('out of luck')"))
    with pytest.raises(measure.Failed, match="killed by signal 9"):
        measure.measure(measure.python("-c", "import os; os.kill(os.getpid(), 9)"))


@pytest.mark.usefixtures("_in_process")
def test_speed(capsys):
    speed.main(["--shape", "toy", "--experts", "2", "--repeat", "1", "--methods", "IsoC"])
    out = capsys.readouterr().out
    head, *lines = rows(out)
    assert [line[:2] for line in lines] == [["IsoC", "ours"], ["IsoC", "formula"], ["IsoC", "least"]]
    assert [float(line[head.index("error")]) < 1e-6 for line in lines[:2]] == [True, True]


def test_a_package_that_is_not_there_is_told():
    cost = measure.measure_all({"mergekit": ["/no/such/python", "-c", "pass"]})["mergekit"]
    assert isinstance(cost, measure.Failed)
    assert "No such file" in str(cost)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("script", [speed, linalg])
def test_no_cuda_device(capsys, monkeypatch, script):
    monkeypatch.setattr(speed, "has_cuda", torch.cuda.is_available)
    script.main(["--device", "cuda"])
    assert capsys.readouterr().out.startswith("There is no CUDA device at hand")


def test_linalg(capsys):
    linalg.main(["--shapes", "24x16", "16x24", "--repeat", "1"])
    head, *lines = rows(capsys.readouterr().out)
    assert len(lines) == 2 * len(linalg.KINDS) * 3
    assert all(float(line[head.index("svd error")]) < 1e-4 for line in lines)


@pytest.mark.usefixtures("_in_process")
def test_memory(capsys):
    memory.main(["--shape", "toy", "--experts", "2", "--methods", "IsoC", "--inputs", ".ckpt", "--outputs", ".ckpt"])
    head, line = rows(capsys.readouterr().out)
    assert line[:4] == ["IsoC", ".ckpt", ".ckpt", "2"]
    float(line[head.index("peak, models")])


@pytest.mark.usefixtures("_in_process")
def test_report(capsys):
    report.main(["--shape", "toy", "--experts", "2"])
    head, line = rows(capsys.readouterr().out)
    assert line[:2] == ["2", "2"]
    assert 0 < float(line[head.index("report MB")]) < 10


def test_scaling(capsys, monkeypatch):
    monkeypatch.setattr(scaling, "measure", in_process)  # makes the models; the merge is measured as two processes
    toy = ["--shape", "toy", "--shapes", "toy", "--experts", "2", "--repeat", "1", "--method", "IsoC"]
    scaling.main([*toy, "--questions", "ranks", "--counts", "2"])
    head, line = rows(capsys.readouterr().out)
    assert line[0] == "ranks: 2"
    assert float(line[head.index("wall s")]) > 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_kills(capsys):
    kills.main(["--count", "1", "--steps", "2", "--layers", "2", "--width", "8", "--most", "0.1"])
    _, *lines = rows(capsys.readouterr().out)
    assert [line[2:] for line in lines] == [["3", line[3], "0", "0", "0"] for line in lines]
    assert len(lines) == 6


def test_startup(capsys, monkeypatch):
    monkeypatch.setitem(startup.COMMANDS, startup.IMPORT, measure.python("-c", "import json"))
    startup.main(["--repeat", "1", "--commands", "import lightning_merge"])
    _, *lines = rows(capsys.readouterr().out)
    assert [line[0] for line in lines] == ["`import lightning.pytorch`", "`import lightning_merge`"]


def test_candidates(capsys):
    toy = ["--backbone", "timm/resnet10t", "--candidates", "2", "--images", "5", "--size", "16", "--batch-size", "4"]
    candidates.main([*toy, "--repeat", "1"])
    head, *lines = rows(capsys.readouterr().out)
    counted = [[line[head.index(name)] for name in ("forward passes", "samples read")] for line in lines]
    assert counted == [["4", "0"], ["6", "15"], ["4", "10"]] * 2


def test_every_script_stands_in_the_readme():
    told = re.findall(r"python -m benchmarks\.(\w+)", (ROOT / "benchmarks" / "README.md").read_text())
    first = ["speed", "linalg", "memory", "scaling", "kills", "startup", "report", "candidates"]
    assert told == [*first, "fuzz", "benchmark_kills", "foundations"]


def test_peers_are_imported_when_asked_for():
    """Importing the scripts needs neither package; asking for one that is not there fails by its name."""
    given = Namespace(method="TIES", files=[], output=None, device="cpu")
    for name in ("fusion_bench", "mergekit"):
        try:
            __import__(name)
        except ImportError:
            with pytest.raises(ImportError, match=name):
                contenders.CONTENDERS[name](given)


def test_contenders_say_what_they_took(tmp_path, capsys):
    base, *experts = models.make(tmp_path, "toy", 2)
    contenders.main(["least", "SCORE", str(tmp_path / "out.safetensors"), str(base), *map(str, experts)])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["cpu"] > 0


def test_foundations_draws_its_figures(tmp_path):
    pytest.importorskip("matplotlib")
    from benchmarks import foundations
    from tests.evaluation.benchmark.test_foundations import run

    run(tmp_path, merged=[2])
    model = {"init_args": dict(tiny_vgg().hparams)}
    data = {"init_args": {"root": "", "image_size": 8, "channels": 1}}
    config = {"model": model, "data": data, "foundations": {"domains": ["upright"], "merged": [2]}}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    where = [f"--config={tmp_path / 'c.yaml'}", f"--root={tmp_path / 'tasks'}", f"--results={tmp_path / 'out'}"]
    foundations.main([*where, f"--output={tmp_path}", "--method=TA", "--points=2", "--images=40"])
    for name in ("tasks", "layers", "landscape", "embeddings"):
        assert (tmp_path / f"{name}.svg").read_text().rstrip().endswith("</svg>")
