"""The existing project of `examples/`, by the commands of its README, from a checkout and installed."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lightning_merge as lm
from lightning_merge.methods import TIES, WeightAverage
from tests.conftest import ROOT

EXAMPLE = ROOT / "examples" / "existing_project"
QUIET = ["--trainer.logger=false", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
DRIVER = """
import json, runpy, shlex, sys
for command in sys.stdin.read().splitlines():
    python, script, *arguments = shlex.split(command)
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")
import callbacks, lightning_merge, lightning_merge.callbacks
print(json.dumps([module.__file__ for module in (callbacks, lightning_merge, lightning_merge.callbacks)]))
"""


def commands() -> list[str]:
    """The commands of the README, with fewer epochs and in silence."""
    blocks = re.findall(r"```bash\n(.*?)```", (EXAMPLE / "README.md").read_text(), re.DOTALL)
    found = "".join(blocks).replace("\\\n", "").splitlines()
    more = {True: "--trainer.max_epochs=1", False: ""}
    return [" ".join([line, *QUIET, more[" fit " in line]]) if "train.py" in line else line for line in found]


def installed(folder: Path) -> Path:
    """The layout that a wheel has: `callbacks/` inside the package, and nothing of that bare name."""
    shutil.copytree(ROOT / "lightning_merge", folder / "lightning_merge", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "callbacks", folder / "lightning_merge" / "callbacks")
    return folder


@pytest.fixture(params=["checkout", "installed"])
def run(request, tmp_path):
    """Run commands in a copy of the project; returns what they print, and its folder."""
    site = ROOT if request.param == "checkout" else installed(tmp_path / "site")
    project = tmp_path / "project"
    shutil.copytree(EXAMPLE, project, ignore=shutil.ignore_patterns("runs", "__pycache__"))
    (project / "driver.py").write_text(DRIVER)

    def go(lines: list[str]) -> str:
        environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
        result = subprocess.run(
            [sys.executable, "-W", "ignore", "driver.py"],
            cwd=project,
            env=environment,
            input="\n".join(lines),
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert result.returncode == 0, result.stderr
        own, package, callbacks = json.loads(result.stdout.splitlines()[-1])
        assert Path(own).parent == project / "callbacks"  # the project's `callbacks` stays the project's
        assert Path(package).parent == site / "lightning_merge"
        home = ROOT if request.param == "checkout" else site / "lightning_merge"
        assert Path(callbacks).parent == home / "callbacks"
        return result.stdout

    return go, project / "runs"


def test_every_command_of_the_readme_works(run):
    go, runs = run
    before = "python train_before.py fit --trainer.name before --data.scanner plain --trainer.max_epochs=1 " + " ".join(
        QUIET
    )
    shown = go([before, *commands()])
    base, was = lm.open_weights(runs / "base/best.ckpt"), lm.open_weights(runs / "before/best.ckpt")
    assert all(torch.equal(base[name], was[name]) for name in base)  # merging has changed nothing of their fit
    experts = [str(runs / name / "best.ckpt") for name in ("grey", "shifted")]
    for output, method in {"merged.ckpt": WeightAverage(), "ties.ckpt": TIES()}.items():
        merged, by_hand = lm.open_weights(runs / output), lm.merge(base, experts, method).weights
        assert all(torch.equal(merged[name], by_hand[name]) for name in by_hand)
    assert (runs / "python.ckpt").is_file()
    assert re.findall(r"^\| (\w+) +\|", shown, re.MULTILINE) == [
        "candidate",
        "current",
        "average",
        "grey",
        "shifted",
    ]


def test_the_readme_shows_what_differs():
    """The lines with a minus are those of the script before, the lines with a plus those of the one after."""
    before, after = ((EXAMPLE / name).read_text() for name in ("train_before.py", "train.py"))
    for sign, line in re.findall(r"^([-+ ])(.*\S)$", (EXAMPLE / "README.md").read_text().split("```")[1], re.MULTILINE):
        assert sign == "+" or line in before
        assert sign == "-" or line in after
