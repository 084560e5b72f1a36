"""What is seen of progress: one bar on a terminal, whole lines in a log, and nothing unless asked."""

from __future__ import annotations

import fcntl
import logging
import os
import pty
import re
import struct
import sys
import termios
import time
import tty
import warnings
from contextlib import contextmanager
from threading import Thread
from types import SimpleNamespace

import pytest
from lightning_merge.callbacks import MergeAfterFit

import lightning_merge as lm
from lightning_merge.methods import TIES
from lightning_merge.utilities import progress
from lightning_merge.utilities.progress import counted, show_progress
from lightning_merge.utilities.workers import run_each
from tests.callbacks.project import Data, make_trainer, write_models
from tests.toys import base_weights, expert_weights, quiet_trainer
from tests.utilities.test_processes import on_processes

NAMES = [f"layer{i}" for i in range(40)]
MERGING = re.compile(r"merging: +\d+%\|.*\| \d\d:\d\d<[\d:?]+, \d+ of 40 parameters")


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    for name in ("CI", "TQDM_DISABLE", "SLURM_PROCID", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(progress, "_DELAY", 0.0)
    monkeypatch.setattr(progress, "_PATIENCE", 0.0)


class Screen:
    """A terminal that is read in the background; what it shows is worked out afterwards, after every change."""

    def __init__(self, columns: int) -> None:
        self.master, slave = pty.openpty()
        tty.setraw(slave)
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        self.stream = os.fdopen(slave, "w", buffering=1)
        self.text = ""
        self._reader = Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        while data := self._some():
            self.text += data.decode()

    def _some(self) -> bytes:
        try:
            return os.read(self.master, 4096)
        except OSError:  # the other end was closed
            return b""

    def close(self) -> None:
        self.stream.close()
        self._reader.join(60)
        os.close(self.master)

    def states(self) -> list[list[str]]:
        """The lines on the screen each time a bar or a line has been drawn."""
        lines, row, column, found = [""], 0, 0, []
        for part in re.split(r"(\r|\n|\x1b\[A)", self.text):
            if part == "\r":
                column = 0
            elif part == "\n":
                row += 1
                column = 0
                lines += [""] * (row + 1 - len(lines))
            elif part == "\x1b[A":
                row -= 1
            elif part:
                assert "\x1b" not in part
                assert column + len(part) <= 80
                lines[row] = lines[row][:column].ljust(column) + part + lines[row][column + len(part) :]
                column += len(part)
                found.append([line.rstrip() for line in lines])
        return found


@contextmanager
def on_terminal(monkeypatch, columns=80):
    screen = Screen(columns)
    handler = logging.StreamHandler(screen.stream)
    logger = logging.getLogger("spoken")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", screen.stream)
        try:
            yield screen
        finally:
            logger.removeHandler(handler)
            assert handler.stream is screen.stream  # as it was
    screen.close()


def work(name: str) -> None:
    time.sleep(0.03)
    if name == "layer20":
        logging.getLogger("spoken").info("half of it is done, and this is a line")


@pytest.mark.parametrize("workers", [1, 3])
def test_on_a_terminal_there_is_one_bar_with_whole_lines_above_it(monkeypatch, workers):
    with on_terminal(monkeypatch) as screen, show_progress(), warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda *about: sys.stderr.write(warnings.formatwarning(*about[:4]))  # not pytest's
        with counted("benchmark", "jobs", [1.0, 1.0], each_logged=True) as count:
            count.note("expert noisy")
            run_each(work, NAMES, workers, "merging")
            warnings.warn("mind the gap", UserWarning, stacklevel=1)
            count.step()
    states = screen.states()
    assert len(states) > 10
    bars = [[line for line in state if "%|" in line] for state in states]
    assert {len(shown) for shown in bars} == {0, 1, 2}
    assert all(sum("merging" in line for line in shown) <= 1 for shown in bars)
    assert any(MERGING.fullmatch(line) for shown in bars for line in shown)
    assert "benchmark:   0%|" in screen.text
    assert "0 of 2 jobs, expert noisy" in screen.text
    left = [line for line in states[-1] if line]
    assert left[0] == "half of it is done, and this is a line"  # nothing else has ever stood on its line
    assert "UserWarning: mind the gap" in left[1]
    assert not any("%|" in line for line in left)


def test_a_handler_keeps_its_level_above_the_bars(monkeypatch):
    with on_terminal(monkeypatch) as screen:
        handler = logging.StreamHandler(sys.stderr)
        handler.setLevel(logging.WARNING)
        log = logging.getLogger("somebody")
        monkeypatch.setattr(log, "handlers", [handler])
        monkeypatch.setattr(log, "propagate", False)
        log.setLevel(logging.INFO)
        with show_progress(), counted("benchmark", "jobs", [1.0]):
            log.info("a detail")
            log.warning("a warning")
    left = [line for line in screen.states()[-1] if line]
    assert left == ["a warning"]


@pytest.mark.parametrize("columns", [80, 0], ids=["wide", "of unknown width"])
def test_the_bar_counts_what_the_pieces_cost(monkeypatch, columns):
    with on_terminal(monkeypatch, columns) as screen, show_progress():
        run_each(lambda name: time.sleep(0.15), ["large", "small"], 1, "merging", {"large": 3e9, "small": 1e9}.get)
    assert re.search(r"merging:  75%\|.*1 of 2 parameters", screen.text)


@pytest.mark.parametrize(("variable", "value"), [("CI", "1"), ("TQDM_DISABLE", "1"), ("TERM", "dumb"), ("pipe", "")])
def test_elsewhere_there_are_plain_lines_at_every_quarter(monkeypatch, capsys, variable, value):
    monkeypatch.setenv(variable, value)
    logger = logging.getLogger("lightning_merge")
    logger.propagate = False  # pytest listens at the root
    try:
        if variable == "pipe":
            with show_progress():
                run_each(lambda name: None, NAMES, 3, "merging")
            shown = capsys.readouterr().err
        else:
            with on_terminal(monkeypatch) as screen, show_progress():
                run_each(lambda name: None, NAMES, 3, "merging")
            shown = screen.text
    finally:
        logger.propagate = True
    assert not re.search(r"[\r\x1b]", shown)
    expected = [f"merging: {p} %, {p * 40 // 100} of 40 parameters" for p in (25, 50, 75, 100)]
    assert [line.partition(" after ")[0] for line in shown.splitlines()] == expected
    assert (logger.level, logger.handlers) == (logging.NOTSET, [])


@pytest.mark.parametrize(("seconds", "quarters"), [(0.1, []), (0.4, [75, 100]), (1.0, [25, 50, 75, 100])])
def test_work_of_less_than_ten_seconds_leaves_no_line(monkeypatch, caplog, seconds, quarters):
    """By a clock on which every one of 40 pieces takes so long."""
    now = [0.0]
    monkeypatch.setattr(progress, "_PATIENCE", 10.0)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def work(name: str) -> None:
        now[0] += seconds

    with caplog.at_level("INFO"), show_progress():
        run_each(work, NAMES, 1, "merging")
    assert [record.getMessage().partition(" %")[0] for record in caplog.records] == [f"merging: {q}" for q in quarters]


def test_a_merge_is_silent_unless_asked_and_what_it_gives_is_the_same(caplog):
    base = base_weights()
    experts = [expert_weights(base, i) for i in range(2)]
    with caplog.at_level("INFO"):
        silent = lm.merge(base, experts, TIES()).weights
        with show_progress(), show_progress(False):
            lm.merge(base, experts, TIES())
        assert not caplog.records
        with lm.show_progress():
            shown = lm.merge(base, experts, TIES(), workers=2).weights
    said = caplog.text
    assert "checking: 100 %" in said
    assert "merging: 100 %" in said
    assert all(shown[name].equal(silent[name]) for name in silent)


def test_of_two_processes_the_first_one_speaks(monkeypatch):
    def speak(rank: int) -> list[str]:
        lines: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda record: lines.append(record.getMessage())
        logging.getLogger("lightning_merge").addHandler(handler)
        with show_progress():
            run_each(lambda name: None, NAMES, 1, "merging")
        return lines

    (first, second), errors = on_processes(2, speak)
    assert errors == [None, None]
    assert len(first) == 4
    assert second == []


@pytest.mark.parametrize("variable", ["RANK", "LOCAL_RANK", "SLURM_PROCID"])
def test_nor_does_one_that_was_launched_as_the_second(monkeypatch, caplog, variable):
    monkeypatch.setenv(variable, "1")
    with caplog.at_level("INFO"), show_progress():
        run_each(lambda name: None, NAMES, 1)
    assert not caplog.records


def test_a_third_bar_is_not_shown(monkeypatch, caplog):
    with caplog.at_level("INFO"), show_progress(), counted("benchmark", "jobs", [1.0]), counted("search", "s", [1.0]):
        run_each(lambda name: None, NAMES, 1)
    assert not caplog.records


def test_an_error_takes_the_bar_away(monkeypatch):
    def fail(name: str) -> None:
        time.sleep(0.05)
        if name == "layer5":
            raise KeyError(name)

    with on_terminal(monkeypatch) as screen, pytest.raises(KeyError), show_progress():
        run_each(fail, NAMES, 2, "merging")
    assert "merging" in screen.text
    assert not any(screen.states()[-1])


def test_a_trainer_without_a_bar_shows_none_and_callbacks_leave_the_terminal_to_lightning(caplog):
    project = write_models()
    with caplog.at_level("INFO", logger="lightning_merge"):
        for wanted in (False, True):
            with quiet_trainer(enable_progress_bar=wanted).progress_shown():
                run_each(lambda name: None, NAMES, 1, "merging")
            assert any(record.name == "lightning_merge" for record in caplog.records) is wanted
        caplog.clear()
        merging = MergeAfterFit("base.ckpt", ["expert0.ckpt", "expert1.ckpt"], TIES())
        with show_progress():
            make_trainer(merging, max_epochs=1).fit(project, Data())
    assert all(record.name != "lightning_merge" for record in caplog.records)
