"""The verb ``statistics``."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

import lightning_merge as lm
from lightning_merge.trainer.cli import main


def test_statistics_and_what_they_are_for(experts, capsys):
    more = ["--method=RegMean", f"--experts={json.dumps(experts)}", "--base=experts/upright"]
    with pytest.raises(SystemExit):
        main(["merge", *more])
    said = capsys.readouterr().err
    commands = [line.split("`")[1] for line in said.splitlines() if "`" in line]
    assert len(commands) == 2
    for command in commands:  # what the error says works
        main(shlex.split(command)[1:] + ["--batches=2"])
        assert re.search(
            r"gram of 12\d examples; wrote experts/\w+/\S*\.statistics\.safetensors", capsys.readouterr().out
        )
    main(["merge", *more])
    main(["merge", *more, f"--config={experts['noisy']}/config.yaml", "--data.test_domains=[thick]"])
    beside = Path(lm.open_weights(experts["noisy"]).path).with_suffix(".statistics.safetensors")
    found = {"rotated": beside.as_posix(), "noisy": beside.as_posix()}
    with pytest.raises(SystemExit):
        main(["merge", *more, f"--statistics={json.dumps(found)}"])
    assert "statistics of other weights than those of expert rotated" in capsys.readouterr().err
