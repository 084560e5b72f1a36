"""The benchmark on a SLURM that a few scripts play."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

import lightning_merge as lm
from lightning_merge.evaluation.engines import Slurm
from lightning_merge.evaluation.engines.slurm_arrays import _SlurmWorkers
from tests.evaluation.engines.toys import results, run

submitit = pytest.importorskip("submitit")

SCRIPTS = {
    # Runs each task of an array in the background, and notes how it ends.
    "sbatch": r"""
        id=$(($(cat "$SLURM_PLAYED/last" 2>/dev/null || echo 0) + 1)); echo $id > "$SLURM_PLAYED/last"
        cp "$1" "$SLURM_PLAYED/$id.sh"
        last=$(sed -n 's/^#SBATCH --array=0-\([0-9]*\)%.*/\1/p' "$1")
        tasks=${last:+$(seq 0 "$last")}
        export SLURM_JOB_NAME=benchmark SLURM_NTASKS=1 SLURM_JOB_NUM_NODES=1 SLURM_PROCID=0
        export SLURM_LOCALID=0 SLURM_NODEID=0 SLURM_JOB_NODELIST=node1
        for task in ${tasks:-alone}; do
            export SLURM_JOB_ID=$id; name=$id
            if [ "$task" != alone ]; then
                export SLURM_JOB_ID=10$id$task SLURM_ARRAY_JOB_ID=$id SLURM_ARRAY_TASK_ID=$task; name=${id}_$task
            fi
            echo RUNNING > "$SLURM_PLAYED/$name"
            (bash "$SLURM_PLAYED/$id.sh"; [ $? = 0 ] && state=COMPLETED || state=NODE_FAIL
             echo $state > "$SLURM_PLAYED/$name") > /dev/null 2>&1 < /dev/null &
        done
        echo "Submitted batch job $id"
    """,
    # The machine of the second task of the first array fails.
    "srun": r"""
        [ "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID" = 1_1 ] && exit 1
        while [ "${1#--}" != "$1" ]; do case $1 in --output | --error) shift 2;; *) shift;; esac; done
        exec "$@"
    """,
    "sacct": r"""
        echo "JobID|State|NodeList"
        cd "$SLURM_PLAYED" && for name in $(ls | grep -v -e last -e sh); do echo "$name|$(cat "$name")|node1"; done
    """,
    "scancel": "exit 0",
}


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """The commands of a SLURM in the PATH; the folder with the scripts that it was given."""
    played, commands = tmp_path / "played", tmp_path / "commands"
    played.mkdir()
    commands.mkdir()
    for name, script in SCRIPTS.items():
        (commands / name).write_text(f"#!/bin/bash\n{script}")
        (commands / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_PLAYED", str(played))
    monkeypatch.setattr(submitit.core.core.Job, "_results_timeout_s", 0)
    monkeypatch.setattr(_SlurmWorkers, "poll", 0.1)
    return played


def test_an_array_whose_machine_fails_gives_the_table_of_one_process(alone, slurm, caplog):
    before, table = alone
    shutil.copytree(before, "out", ignore=shutil.ignore_patterns("held_out", "results.jsonl", "table.*"))
    engine = Slurm(partition="cpu", account="me", time=7, memory=2, more={"qos": "high"})
    with caplog.at_level("INFO", logger="lightning.pytorch"):
        on_slurm = run(engine)
    assert on_slurm.markdown() == table.markdown()
    assert results("out") == results(before)
    assert "held out noisy has lost its worker and is handed out again (1 of 3)" in caplog.text
    array, again = [path.read_text() for path in sorted(slurm.glob("*.sh"))]
    given = set(re.findall(r"#SBATCH --(\S+)", array))
    wanted = {"partition=cpu", "account=me", "time=7", "mem=2GB", "qos=high", "cpus-per-task=1"}
    assert wanted | {"array=0-1%2"} <= given
    assert "--array" not in again
    assert not Path("fits.txt").exists()  # the experts were there
    assert not Path("out/engine").exists()


def test_only_pending_jobs_are_taken_back():
    cancelled = []
    jobs = [
        SimpleNamespace(get_info=lambda s=state: {"State": s}, cancel=lambda check, s=state: cancelled.append(s))
        for state in ("RUNNING", "PENDING")
    ]
    assert _SlurmWorkers(None).take_back(jobs) == jobs[1:]
    assert cancelled == ["PENDING"]


def test_where_there_is_no_slurm(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(lm.MergeError, match=r"no SLURM here \(no command sbatch\)"):
        run("slurm")
    assert not Path("out").exists()
