"""What loggers get, read back from their files."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import pytest
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from matplotlib.figure import Figure

from lightning_merge.evaluation import Table
from lightning_merge.evaluation.benchmark.foundations_table import FoundationsTable
from lightning_merge.methods import DARE, SCORE, TIES
from lightning_merge.report.loggers import log_to_loggers, safe_names
from lightning_merge.trainer import MergeTrainer
from tests.toys import quiet_trainer

ODD = '<script>alert("1")</script> / ../..'
ROWS = {
    "base": (None, (0.2, 0.3)),
    "SCORE": (SCORE(scale=1.5), (0.6, 0.63)),
    "score": (DARE(drop=0.9, method=TIES(density=0.25)), (0.4, 0.72)),
    ODD: (SCORE(), (0.5, math.nan)),
    "x" * 300: (SCORE(), (0.1, 0.1)),
    "own expert": (None, (0.8, 0.9)),
}


@pytest.fixture
def table() -> Table:
    def record(row, method, domain, value):
        return {"row": row, "domain": domain, "accuracy": value, "method": method and method.describe()}

    domains = ("art / clip", "photo")
    return Table([record(row, m, d, v) for row, (m, both) in ROWS.items() for d, v in zip(domains, both, strict=True)])


@pytest.fixture
def figures() -> dict[str, Figure]:
    found = {"Accuracy": Figure(), "accuracy": Figure(), "Σ_score of <b>": Figure()}
    for figure in found.values():
        figure.subplots().plot([1, 2])
    return found


def read(folder):
    loading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="no tensorboard")
    events = loading.EventAccumulator(str(folder))
    events.Reload()
    return events


def scalars(events) -> dict[str, float]:
    return {tag: events.Scalars(tag)[0].value for tag in events.Tags()["scalars"]}


def hparams(events) -> dict:
    """The hyper-parameters of a run, as the HParams tab reads them."""
    from tensorboard.plugins.hparams import metadata, plugin_data_pb2

    content = events.summary_metadata[metadata.SESSION_START_INFO_TAG].plugin_data.content
    started = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
    return {key: getattr(value, value.WhichOneof("kind")) for key, value in started.items()}


def test_tensorboard_gets_a_run_for_each_row_and_the_figures(table, figures):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    logger = TensorBoardLogger("logs", name="benchmark", version="v")
    log_to_loggers([logger], table, figures)
    main = read("logs/benchmark/v")
    assert main.Tags()["images"] == ["Accuracy", "accuracy-2", "Σ_score_of_b"]
    assert main.Images("Accuracy")[0].width > 100
    runs = sorted(path.name for path in Path("logs/benchmark/v/rows").iterdir())
    names = safe_names(table.row_names)
    assert runs == sorted(names.values())
    columns = ["accuracy_by_domain/art_clip", "accuracy_by_domain/photo", "accuracy/mean", "accuracy/worst"]
    for row, name in names.items():
        events = read(f"logs/benchmark/v/rows/{name}")
        expected = dict(zip([*columns, "accuracy/normalized"], table.line(row), strict=True))
        assert scalars(events) == pytest.approx(expected, nan_ok=True)
        assert hparams(events)["row"] == row
    assert scalars(read(f"logs/benchmark/v/rows/{names['SCORE']}"))["accuracy/normalized"] == pytest.approx(
        (0.6 / 0.8 + 0.63 / 0.9) / 2
    )
    inside = hparams(read(f"logs/benchmark/v/rows/{names['score']}"))
    assert (inside["class"], inside["drop"], inside["method"], inside["method.density"]) == ("DARE", 0.9, "TIES", 0.25)
    assert hparams(read(f"logs/benchmark/v/rows/{names['SCORE']}"))["scale"] == 1.5


def test_a_table_of_foundations_in_tensorboard():
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    record = {"merged": 2, "arm": "naive + TACT", "method": "TIES", "expert": 0.8}
    accuracies = [(0, "mnist", 0.4), (0, "usps", 0.6), (1, "mnist", 0.8), (1, "usps", 0.2)]
    table = FoundationsTable([record | {"seed": s, "task": t, "accuracy": a} for s, t, a in accuracies])
    log_to_loggers([TensorBoardLogger("logs", name="", version="v")], table, {})
    events = read("logs/v/rows/2_tasks_naive_TACT_TIES")
    assert scalars(events) == pytest.approx(
        {
            "normalized/mean": (0.5 + 0.75 + 1.0 + 0.25) / 4,
            "normalized/worst": (0.5 + 0.25) / 2,
            "accuracy_by_task/mnist": 0.6,
            "accuracy_by_task/usps": 0.4,
        }
    )
    assert hparams(events)["arm"] == "naive + TACT"


def test_other_loggers_get_metrics_and_images_where_they_take_them(table, figures):
    class TakesImages(CSVLogger):
        images = ()

        def log_image(self, key, images):
            self.images = [*self.images, (key, *images)]

    plain, rich = CSVLogger("plain", name="", version="v"), TakesImages("rich", name="", version="v")
    log_to_loggers([plain, rich], table, figures)
    with Path("plain/v/metrics.csv").open() as file:
        (line,) = csv.DictReader(file)
    assert float(line["SCORE/accuracy/mean"]) == table.mean("SCORE")
    assert float(line["score-2/accuracy_by_domain/photo"]) == 0.72
    assert [image for _, image in rich.images] == list(figures.values())


def test_the_second_process_writes_nothing(table, figures, monkeypatch):
    from lightning.pytorch.utilities import rank_zero_only

    monkeypatch.setattr(rank_zero_only, "rank", 1)
    log_to_loggers([CSVLogger("logs")], table, figures)
    assert not Path("logs").exists()


def test_names_that_are_alike_or_no_names_get_different_tags():
    assert safe_names(["a b", "a/b", "A_B", "..", "", "Σ"]) == {
        "a b": "a_b",
        "a/b": "a_b-2",
        "A_B": "A_B-3",
        "..": "unnamed",
        "": "unnamed-2",
        "Σ": "Σ",
    }
    assert len(safe_names(["x" * 300])["x" * 300]) <= 80


@pytest.mark.parametrize("asked", [False, True, None])
def test_a_default_logger_was_not_asked_for(asked):
    assert quiet_trainer(logger=asked).given_loggers == []


def test_loggers_that_were_asked_for():
    logger: Logger = CSVLogger("logs")
    assert quiet_trainer(logger=logger).given_loggers == [logger]
    assert quiet_trainer(logger=[logger]).given_loggers == [logger]
    assert MergeTrainer(accelerator="cpu", devices=1, enable_progress_bar=False).given_loggers == []
    assert not Path("logs").exists()
