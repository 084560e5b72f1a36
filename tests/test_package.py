"""The package as a stranger meets it."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_merge as lm
from tests.conftest import ROOT


def run(code: str, cwd: Path = ROOT, **environment: str) -> str:
    command, environment = [sys.executable, "-c", code], {**os.environ, **environment}
    result = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_every_public_name_is_there():
    for name in lm.__all__:
        assert getattr(lm, name) is not None
    with pytest.raises(AttributeError, match="nonsense"):
        _ = lm.nonsense


def test_type_checkers_see_every_public_name():
    """What stands under ``TYPE_CHECKING`` is what the lazy names give."""
    tree = ast.parse(Path(lm.__file__).read_text(encoding="utf-8"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    seen = {}
    for node in block.body:
        scope = {}
        exec(ast.unparse(node), scope)
        seen |= {alias.name: scope[alias.name] for alias in node.names}
    assert seen == {name: getattr(lm, name) for name in lm.__all__}


def test_importing_the_package_imports_nothing_heavy():
    out = run("import sys, lightning_merge; print([m for m in ('torch', 'lightning', 'timm') if m in sys.modules])")
    assert out.strip() == "[]"


def test_merging_needs_neither_lightning_nor_the_model_libraries():
    """The wall: methods, linear algebra and the executor import torch and nothing above it."""
    out = run(
        "import sys, torch, lightning_merge.analysis, lightning_merge as lm\n"
        "lm.merge({'w': torch.zeros(4, 4)}, [{'w': torch.eye(4)}], lm.methods.SCORE())\n"
        "names = ('lightning', 'timm', 'open_clip', 'torchmetrics', 'sklearn', 'torchvision', 'huggingface_hub')\n"
        "print([m for m in names if m in sys.modules])"
    )
    assert out.strip() == "[]"


def test_the_callbacks_folder_is_lightning_merge_callbacks(tmp_path):
    """In an uninstalled checkout, too, and without taking the bare name `callbacks`."""
    code = "import lightning_merge.callbacks as c; print(c.__name__, c.FreezeBatchNorm.__module__)"
    out = run(code, cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert out.split() == ["lightning_merge.callbacks", "lightning_merge.callbacks.freeze_batchnorm"]


def test_every_package_is_listed_for_installation():
    listed = set(re.findall(r'"(lightning_merge[\w.]*)",', (ROOT / "pyproject.toml").read_text()))
    folders = {
        p.parent.relative_to(ROOT).as_posix().replace("/", ".") for p in ROOT.glob("lightning_merge/**/__init__.py")
    }
    assert listed == folders | {"lightning_merge.callbacks"}
    assert (ROOT / "lightning_merge" / "py.typed").is_file()


def test_python_dash_m_says_its_version_of_help():
    result = subprocess.run(
        [sys.executable, "-m", "lightning_merge", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    text = " ".join(result.stdout.split())
    assert all(verb in text for verb in ("fit", "merge", "evaluate", "benchmark", "lightning-merge methods"))
