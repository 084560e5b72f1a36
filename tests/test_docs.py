"""The code in the documents runs."""

from __future__ import annotations

import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_merge import open_weights
from lightning_merge.__main__ import main
from lightning_merge.methods import DARE
from tests.conftest import ROOT
from tests.toys import base_weights, expert_weights

BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", (ROOT / "docs/adding_a_method.md").read_text(), re.M | re.S)


@pytest.fixture
def written(tmp_path, monkeypatch):
    """The files of the document in an empty folder, which is the current one."""
    monkeypatch.syspath_prepend(tmp_path)
    for language, code in BLOCKS:
        if language == "python":
            Path(re.match(r"# (\w+\.py)\n", code)[1]).write_text(code)
    yield
    sys.modules.pop("trimmed_mean", None)


def test_adding_a_method(written):
    assert len(Path("trimmed_mean.py").read_text().splitlines()) < 50
    runpy.run_path("make_golden.py")
    tests = [test for name, test in runpy.run_path("test_trimmed_mean.py").items() if name.startswith("test_")]
    assert len(tests) == 3
    for test in tests:
        test()


def test_the_method_on_the_command_line(written):
    from trimmed_mean import TrimmedMean

    base = base_weights()
    experts = [expert_weights(base, i) for i in range(3)]
    for name, state in zip(("base", "a", "b", "c"), (base, *experts), strict=True):
        save_file(state, f"{name}.safetensors")
    (command,) = [code for language, code in BLOCKS if language == "bash"]
    python, module, package, *args = shlex.split(command)
    assert (python, module, package) == ("python", "-m", "lightning_merge")
    main(args)
    merged = load_file("merged.safetensors")
    median = torch.stack([expert["mlp.weight"] for expert in experts]).median(dim=0).values  # one of three is left
    torch.testing.assert_close(merged["mlp.weight"], median)

    (config,) = [code for language, code in BLOCKS if language == "yaml"]
    Path("dare.yaml").write_text(config)
    main(["merge", "--config=dare.yaml", *args[args.index("--base") :]])
    expected = DARE(drop=0.5, method=TrimmedMean(beta=0.4)).describe()
    assert open_weights("merged.safetensors").header["merge"]["method"] == expected
