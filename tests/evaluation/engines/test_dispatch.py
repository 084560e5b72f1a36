"""In which order jobs are handed out, and what happens when one of them ends badly."""

from __future__ import annotations

from itertools import chain

import pytest

from lightning_merge.evaluation.engines.dispatch import Dispatch, Workers
from lightning_merge.evaluation.engines.parcels import Outcome
from lightning_merge.evaluation.jobs import Job
from lightning_merge.utilities.errors import MergeError

LOST = Outcome(lost=True, error="gone")
GRAPH = {"base": [], "a": ["base"], "b": ["base"], "of a": ["a"], "all": ["a", "b", "of a"]}


class Scripted(Workers):
    """Workers who end jobs one by one, with outcomes that were agreed on."""

    def __init__(self, outcomes=None, order=min):
        self.outcomes, self.order = {name: list(those) for name, those in (outcomes or {}).items()}, order
        self.handed, self.stopped, self.begun, self.seen = [], [], (), []

    def hand_out(self, parcels):
        self.handed.append(list(parcels))
        return [(name, len(self.handed)) for name in parcels]

    def wait(self, handles):
        handle = self.order(handles)
        outcome = (self.outcomes.get(handle[0]) or [Outcome()]).pop(0)
        if isinstance(outcome, BaseException):
            raise outcome
        self.note(handle[0], outcome)
        return [(handle, outcome)]

    def note(self, name, outcome):
        """What has ended well leaves something to be seen."""
        self.seen += [name] if outcome.error is None else []

    def take_back(self, handles):
        return [handle for handle in handles if handle[0] not in self.begun]

    def stop(self, handles):
        self.stopped = [name for name, _ in handles]


def dispatch(workers, done=(), retries=1, withdrawn=None):
    jobs = [
        Job(name, pytest.fail, lambda n=name: n in done or n in workers.seen, after) for name, after in GRAPH.items()
    ]
    Dispatch(jobs, workers, lambda name: name, retries, lambda: (withdrawn or []).append("now")).run()
    return workers.handed


def test_a_job_is_handed_out_once_all_that_it_waits_for_is_done():
    assert dispatch(Scripted()) == [["base"], ["a", "b"], ["of a"], ["all"]]
    assert dispatch(Scripted(order=max)) == [["base"], ["a", "b"], ["of a"], ["all"]]


def test_what_is_done_is_not_handed_out():
    assert dispatch(Scripted(), done=("base", "a")) == [["b", "of a"], ["all"]]
    assert dispatch(Scripted(), done=GRAPH) == []


def test_a_lost_job_is_handed_out_again_as_often_as_allowed():
    assert dispatch(Scripted({"b": [LOST]}))[:3] == [["base"], ["a", "b"], ["of a"]]
    assert [*chain(*dispatch(Scripted({"b": [LOST], "a": [LOST]})))].count("b") == 2
    with pytest.raises(MergeError, match=r"'b' has lost its worker 3 times.*: gone; give it more memory"):
        dispatch(Scripted({"b": [LOST] * 3}), retries=2)


@pytest.mark.parametrize(
    ("outcome", "kind", "message"),
    [
        (Outcome(error="too loud", known=True), MergeError, "The job 'a' has failed: too loud"),
        (Outcome(error="Traceback", host="there"), RuntimeError, "The job 'a' has failed on there:\nTraceback"),
    ],
)
def test_a_failure_lets_finish_what_runs_and_begins_nothing(outcome, kind, message):
    workers = Scripted({"a": [outcome]})
    withdrawn = ["before"]
    with pytest.raises(kind, match=message):
        dispatch(workers, withdrawn=withdrawn)
    assert workers.handed == [["base"], ["a", "b"]]
    assert withdrawn == ["before", "now"]

    waited = Scripted({"a": [outcome], "b": [LOST]})  # b runs, and is not handed out again
    waited.begun = ("b",)
    with pytest.raises(kind, match=message):
        dispatch(waited)
    assert waited.outcomes["b"] == []
    assert waited.handed == [["base"], ["a", "b"]]


def test_what_ends_well_elsewhere_and_is_not_to_be_seen_here_is_an_error(monkeypatch):
    class OnItsOwnDisk(Scripted):
        def note(self, name, outcome):
            pass

    monkeypatch.setattr(Dispatch, "patience", 0.0)
    workers = OnItsOwnDisk({"base": [Outcome(host="node7")]})
    with pytest.raises(MergeError, match=r"'base' has failed: it has ended well on node7.*do not see the same output"):
        dispatch(workers)
    assert workers.handed == [["base"]]


def test_what_is_seen_late_is_waited_for(monkeypatch):
    class Slow(Scripted):
        def note(self, name, outcome):
            self.looks = 0

        @property
        def seen(self):
            self.looks += 1
            return list(GRAPH) if self.looks > 2 and self.handed else []

        @seen.setter
        def seen(self, value):
            self.looks = 0

    naps = []
    monkeypatch.setattr("time.sleep", naps.append)
    dispatch(Slow())
    assert naps[:2] == [1.0, 1.0]


def test_two_that_end_at_once_of_which_one_has_failed():
    class AtOnce(Scripted):
        def wait(self, handles):
            failed = Outcome(error="too loud", known=True)
            self.seen += [name for name, _ in handles if name != "a"]
            return [(handle, failed if handle[0] == "a" else Outcome()) for handle in handles]

    with pytest.raises(MergeError, match="The job 'a' has failed: too loud"):
        dispatch(AtOnce())


def test_an_interrupt_ends_what_runs(caplog):
    workers = Scripted({"a": [KeyboardInterrupt()]})
    with caplog.at_level("INFO", logger="lightning.pytorch"), pytest.raises(KeyboardInterrupt):
        dispatch(workers)
    assert workers.stopped == ["a", "b"]
    assert "interrupted; the same command goes on" in caplog.text
