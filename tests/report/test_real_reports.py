"""Reports of real benchmarks in a browser: the digits, made here, and PACS, from the records of a whole run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lightning_merge.evaluation import Table
from lightning_merge.evaluation.held_out import is_method
from lightning_merge.report.writing import report_benchmark
from lightning_merge.trainer.cli import main
from tests.conftest import ROOT, isolated
from tests.report.browser import console_errors, open_page, outside_requests, screenshot
from tests.report.test_browser import WIDTHS, copied, sort, texts_of

MEASURED = Path(__file__).parent / "measured"
FEW = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=4", "--pretrain.max_epochs=1"]


def read(folder: Path) -> Table:
    return Table([json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()])


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The benchmark of the README, with few steps, from the command line."""
    folder = tmp_path_factory.mktemp("digits")
    with isolated(folder):
        config = ROOT / "configs" / "benchmark" / "digits.yaml"
        logger = ["--trainer.logger=TensorBoardLogger", "--trainer.logger.save_dir=tensorboard"]
        main(["benchmark", f"--config={config}", *FEW, *logger, "--domains=[noisy, thick, slanted]", "--output=out"])
    return folder / "out"


@pytest.fixture(scope="module")
def pacs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``configs/benchmark/pacs.yaml`` measured on PACS with timm's ``tf_efficientnet_lite0`` at 96 pixels."""
    folder = tmp_path_factory.mktemp("pacs")
    table = read(MEASURED / "pacs")
    table.save(folder)
    (folder / "comparison.json").write_text((MEASURED / "pacs" / "comparison.json").read_text())
    updates = json.loads((MEASURED / "pacs" / "updates.json").read_text())
    report_benchmark(table, folder, updates)
    return folder


@pytest.fixture(params=["digits", "pacs"])
def benchmark(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


def test_in_a_browser(browser: Any, benchmark: Path, tmp_path: Path) -> None:
    """No error, no request, no sideways scrolling; a click sorts; what is copied is what the files hold."""
    report, table = benchmark / "report.html", read(benchmark)
    for width in WIDTHS:
        open_page(browser, report, width=width)
        assert console_errors(browser) == []
        assert outside_requests(browser) == []
        scroll, inner = browser.execute_script("return [document.scrollingElement.scrollWidth, innerWidth]")
        assert scroll <= inner == width
        assert screenshot(browser, tmp_path / f"{width}.png").stat().st_size > 50_000

    scores = [i for i, header in enumerate(texts_of(browser, "table thead")) if header.startswith("method")]
    together = [copied(browser, "Markdown", i) for i in scores]
    assert "\n\n".join(together) + "\n" == (benchmark / "table.md").read_text()
    assert copied(browser, "CSV", scores[0]) == (benchmark / "table.csv").read_text()

    assert sort(browser, table.header.index("mean"), table=scores[0]) == "descending"
    shown = texts_of(browser, "tbody th", scores[0])
    by_mean = [table.mean(row) for row in shown]
    assert by_mean == sorted(by_mean, reverse=True)
    best = max((row for row in table.row_names if is_method(row)), key=table.mean)
    assert f"{100 * table.mean(best):.1f} % accuracy, the best mean" in texts_of(browser, "main p")[0]


def test_figures_hold_the_numbers_of_the_records(browser: Any, benchmark: Path) -> None:
    """The heat map is text: each number of the table stands in it."""
    open_page(browser, benchmark / "report.html")
    table = read(benchmark)
    figure = browser.find_element("css selector", "figure svg")
    written = browser.execute_script(
        "return [...arguments[0].querySelectorAll('text')].map(t => t.textContent)", figure
    )
    for row in table.row_names:
        assert row in written
        for domain in table.domains:
            assert f"{100 * table.value(row, domain):.1f}" in written


def test_the_data_behind_the_page(benchmark: Path) -> None:
    text = (benchmark / "report.html").read_text()
    data = json.loads(text.partition('id="data">')[2].partition("</script>")[0])
    assert data["records"] == list(read(benchmark).records)
    stored = json.loads((benchmark / "comparison.json").read_text())
    kept = stored.pop("parameters")  # one that was written earlier has fewer numbers of each
    shown = data["comparison"].pop("parameters")
    assert shown == [{**record, **before} for record, before in zip(shown, kept, strict=True)]
    assert data["comparison"] == stored
    assert len(text) < 10_000_000


def test_tensorboard_has_the_figures_and_every_row(digits: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    (run,) = (digits.parent / "tensorboard").glob("*/version_0")
    whole = events.EventAccumulator(str(run)).Reload()
    assert "Domains_and_methods" in whole.Tags()["images"]
    table = read(digits)
    row = events.EventAccumulator(str(run / "rows" / "TSV-M")).Reload()
    assert row.Scalars("accuracy/mean")[0].value == pytest.approx(table.mean("TSV-M"))
