"""The verb ``analyze``, and the report that ``merge`` writes when it is asked to."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import lightning_merge as lm
from lightning_merge.analysis import compare_experts
from lightning_merge.report.experts import experts_grid
from lightning_merge.trainer.cli import main
from tests.toys import merged_files


@pytest.fixture
def merged() -> lm.Merged:
    return merged_files()


def test_files_in_report_out(merged, capsys):
    command = [
        "analyze",
        "--base=base.safetensors",
        "--experts={photo: photo.safetensors, sketch: sketch.safetensors}",
    ]
    main([*command, "--merged={ours: merged.safetensors}", "--output=out", "--matrices.exclude=[proj*]"])
    shown = capsys.readouterr().out
    assert "The report is out/report.html" in shown
    assert Path("out/table.md").read_text().strip() in shown
    grid = experts_grid(
        compare_experts(
            "base.safetensors",
            {name: f"{name}.safetensors" for name in ("photo", "sketch")},
            matrices=lm.Matrices(exclude=["proj*"]),
        )
    )
    assert Path("out/table.csv").read_text() == grid.csv()
    assert Path("out/table.tex").read_text() == grid.latex() + "\n"
    stored = json.loads(Path("out/comparison.json").read_text())
    assert stored["experts"] == ["photo", "sketch"]
    assert "matrices:" in Path("out/report.html").read_text()  # the YAML that makes it again


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--base=base.safetensors"], "give the experts' checkpoints with --experts"),
        (["--experts=[photo.safetensors]"], "give it with --base, or give the --model"),
        (["--base=base.safetensors", "--experts=[gone.safetensors]"], "gone.safetensors"),
        (["--base=base.safetensors", "--experts=[photo.safetensors]", "--output=photo.safetensors"], "no folder"),
    ],
)
def test_what_cannot_work_is_one_sentence(merged, arguments, sentence, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["analyze", *arguments])
    assert ended.value.code == 1
    assert sentence in capsys.readouterr().err
    assert not Path("results").exists()


def test_a_report_of_a_merge_has_the_ending_of_a_page(merged, capsys):
    command = ["merge", "--base=base.safetensors", "--experts=[photo.safetensors]", "--output=new.safetensors"]
    for path, sentence in (("report.pdf", "end it in .html"), ("base.safetensors/r.html", "is no folder")):
        with pytest.raises(SystemExit):
            main([*command, f"--report={path}"])
        assert sentence in capsys.readouterr().err
        assert not Path("new.safetensors").exists()
    main([*command, "--report=report.html"])
    assert "The report is report.html" in capsys.readouterr().out
    assert "SCORE of 1 expert" in Path("report.html").read_text()
