"""The report of a merge, of an analysis and of a search."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import pytest
import torch

import lightning_merge as lm
from lightning_merge.analysis import compare_experts
from lightning_merge.analysis.comparison_files import read_comparison
from lightning_merge.checkpoints import save_weights
from lightning_merge.evaluation import Table
from lightning_merge.merging.recipe import models_grid
from lightning_merge.models.metrics import METRICS
from lightning_merge.report import Grid, render
from lightning_merge.report.analysis_report import analysis_page
from lightning_merge.report.experts import experts_grid, merged_grid
from lightning_merge.report.merge_report import merge_page, parameters_grid
from lightning_merge.report.search_report import search_page
from lightning_merge.report.writing import report_merge
from tests.report.pages import NASTY
from tests.toys import base_weights, expert_weights, merged_files, quiet_trainer, tiny_expert


@pytest.fixture
def merged() -> lm.Merged:
    return merged_files()


def vector(weights) -> torch.Tensor:
    """All parameters that are merged, flat."""
    base, buffers = base_weights(), ("running_mean", "running_var", "num_batches_tracked")
    return torch.cat([(weights[n].double() - base[n].double()).flatten() for n in base if not n.endswith(buffers)])


def test_numbers_by_hand(merged):
    """Norm, cosine, distance and length of the update: on the page as on whole vectors."""
    photo, sketch = (vector(lm.open_weights(f"{name}.safetensors")) for name in ("photo", "sketch"))
    update = vector(lm.open_weights("merged.safetensors"))
    comparison = compare_experts(merged.base, merged.experts, {"Ours": merged.weights})
    norm, cosine = experts_grid(comparison).rows[0][1:3]
    assert norm.value == pytest.approx(float(photo.norm()), rel=1e-6)
    assert cosine.value == pytest.approx(float(torch.cosine_similarity(photo, sketch, dim=0)), abs=1e-6)
    row = merged_grid(comparison).rows[1]
    assert [cell.text for cell in row[:2]] == ["Ours", "sketch"]
    expected = [update.norm() / sketch.norm(), torch.cosine_similarity(update, sketch, dim=0)]
    expected.append((update - sketch).norm() / sketch.norm())
    assert [cell.value for cell in row[2:5]] == pytest.approx([float(value) for value in expected], rel=1e-5)
    page = merge_page(merged, compare_experts(merged.base, merged.experts, {"TaskArithmetic": merged.weights}))
    ratio = float(update.norm() / (photo.norm() + sketch.norm()) * 2)
    assert f"lies {ratio:.2f} times as far from the base" in " ".join(page.summary)


def test_what_went_in_and_what_happened_to_it(merged):
    digests = {row[1].text or "base": row[3].text for row in models_grid(merged.manifest).rows}
    for name in ("base", "photo", "sketch"):
        assert digests[name] == hashlib.sha256(Path(f"{name}.safetensors").read_bytes()).hexdigest()
    happened = {row[0].text: row[1].value for row in parameters_grid(merged).rows}
    assert happened == {
        "merged by the method": 7,
        "averaged (running statistics)": 2,
        "copied from the base": 1,
    }
    heads = {name: {"head": torch.zeros(size, 2)} for name, size in (("a", 3), ("b", 5))}
    ours = lm.merge({"w": torch.zeros(2, 2)}, {n: {"w": torch.ones(2, 2), **own} for n, own in heads.items()},
                    lm.methods.TIES(), exclude=["head"])  # fmt: skip
    assert [cell.text for cell in parameters_grid(ours).rows[-1]] == ["kept by the experts (heads)", "2", "16"]


def test_the_page_of_a_merge(merged):
    records = [
        {"row": row, "domain": "photo", **dict.fromkeys(METRICS, value)}
        for row, value in (("base", 0.25), ("merged", 0.75))
    ]
    page = report_merge(merged, "report.html", Table(records), "seed: 0")
    assert [section.title for section in page.sections][:2] == ["Scores", "Method"]
    assert "Arguments: scale = 0.5." in page.sections[1].parts
    assert "Accuracy on photo: base 25.0 % and merged 75.0 %." in page.summary
    text = Path("report.html").read_text()
    assert all(found in text for found in ("TaskArithmetic of 2 experts", "seed: 0", *page.summary[:1]))
    data = json.loads(text.partition('id="data">')[2].partition("</script>")[0])
    assert data["records"] == records
    assert data["manifest"]["method"] == merged.manifest["method"]


def test_what_a_reader_must_know(merged):
    save_weights("still.safetensors", base_weights())
    still = lm.merge("base.safetensors", {"still": "still.safetensors"}, lm.methods.TIES())
    comparison = compare_experts(still.base, still.experts, {"TIES": still.weights})
    warnings = " ".join(merge_page(still, comparison).warnings)
    assert "The base itself is among the experts: still" in warnings
    assert "was not evaluated" in warnings
    assert render(merge_page(still, comparison))


def test_experts_that_are_the_same():
    one = expert_weights(base_weights(), 0)
    page = analysis_page(compare_experts(base_weights(), {"a": one, "b": dict(one), "base": base_weights()}))
    assert "a and b have the same weights." in page.warnings
    assert any(sentence.startswith("The base itself is among the experts: base") for sentence in page.warnings)
    assert any("The subspaces of two experts have an alignment of about" in sentence for sentence in page.summary)
    assert "base least far (0)" in " ".join(page.summary)


def test_what_would_be_by_chance():
    """Independent Gaussian task matrices have the alignment sqrt(k / m), and signs that differ in 1 - 2^(1 - T)."""
    draw = torch.Generator().manual_seed(0)
    base = {"w": torch.zeros(40, 60)}
    found = compare_experts(base, {name: {"w": torch.randn(40, 60, generator=draw)} for name in "abc"})
    (matrix,) = found.matrices
    assert matrix.chance == pytest.approx(math.sqrt(matrix.ranks[0] / 40), abs=0.02)
    assert float(found.mean_alignment()[0, 1]) == pytest.approx(found.chance_alignment(), abs=0.03)
    assert found.sign_conflict() == pytest.approx(0.75, abs=0.03)
    assert "of random signs it would be 75 %." in " ".join(analysis_page(found).summary)


def test_odd_names(merged):
    experts = {name: expert_weights(base_weights(), i) for i, name in enumerate(NASTY)}
    found = compare_experts(base_weights(), experts, {name: experts[name] for name in NASTY[:1]})
    assert "<script>document.title" not in render(analysis_page(found))


def test_one_expert_alone():
    page = analysis_page(compare_experts(base_weights(), {"photo": expert_weights(base_weights(), 0)}))
    assert page.title == "1 expert"
    assert render(page)


def test_matrices_are_those_of_the_merge_whatever_their_names(tmp_path):
    base = {"m[0].weight": torch.randn(6, 4), "m*": torch.randn(4, 4)}
    experts = {name: {key: torch.randn_like(own) for key, own in base.items()} for name in "ab"}
    merged = lm.merge(base, experts, lm.methods.TIES(), matrices=lm.Matrices(exclude=["m[*]"]))
    page = report_merge(merged, "report.html")
    compared = next(g for s in page.sections for g in s.parts if isinstance(g, Grid) and g.header[0] == "matrix")
    assert [row[0].text for row in compared.rows] == ["m[0].weight"]


def test_what_came_out_is_not_finite():
    experts = {name: expert_weights(base_weights(), i) for i, name in enumerate("ab")}
    merged = lm.merge(base_weights(), experts, lm.methods.TaskArithmetic(), include=["mlp*"])
    merged.weights["mlp.bias"].fill_(float("inf"))
    page = report_merge(merged, "report.html")
    assert "not finite" in " ".join(page.warnings)


def test_a_comparison_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "comparison.json").write_text('{"experts": ["a"]')
    with pytest.raises(lm.MergeError, match=r"comparison.json is no comparison of experts: .*; delete it"):
        read_comparison(tmp_path)


def test_a_benchmark_without_a_report(tmp_path):
    trainer, model = quiet_trainer(max_epochs=1, limit_train_batches=1), tiny_expert()
    methods = {"average": lm.methods.WeightAverage()}
    given = {"methods": methods, "domains": ["noisy", "thick"], "output": str(tmp_path / "out")}
    for report in (False, True):  # and with one, later on
        trainer.benchmark(model, lm.Digits(), report=report, **given)
        assert (tmp_path / "out" / "report.html").exists() == report
        assert (trainer.report is not None) == report


def test_the_page_of_a_search():
    values = {"own expert": 0.8, "scale 0.5": 0.4, "scale 1.0": 0.6, "scale 1.5": math.nan}
    records = [
        {"row": row, "domain": "photo", **dict.fromkeys(METRICS, value)}
        | ({} if row == "own expert" else {"setting": {"scale": float(row[6:])}})
        for row, value in values.items()
    ]
    page = search_page(Table(records), "scale 1.0", "TIES")
    assert page.title == "TIES: 3 settings on 1 domain"
    assert page.summary == [
        "scale 1.0: 75.0 % of the own experts' accuracy, the best of 2 settings.",
        "The worst, scale 0.5, reaches 50.0 %.",
        "Merged was scale 1.0.",
    ]
    assert render(page)
