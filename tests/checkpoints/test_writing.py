"""Writing weights: completely or not at all."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from lightning_merge.checkpoints import replacing, save_weights
from lightning_merge.utilities.errors import MergeError
from tests.toys import base_weights


def test_a_name_that_says_no_type_is_refused():
    with pytest.raises(MergeError, match="Cannot tell how to write"):
        save_weights("a.txt", {})


class TestReplacing:
    def test_a_failure_leaves_the_old_file_and_no_other(self):
        Path("a.pt").write_text("old")

        def fail() -> None:
            with replacing(Path("a.pt")) as file:
                file.write_text("half")
                raise RuntimeError("stop")

        with pytest.raises(RuntimeError, match="stop"):
            fail()
        assert Path("a.pt").read_text() == "old"
        assert os.listdir() == ["a.pt"]

    def test_a_target_that_is_a_folder_is_said(self):
        Path("a.safetensors").mkdir()
        with pytest.raises(MergeError, match=r"Cannot write a\.safetensors: it is a folder"):
            save_weights("a.safetensors", base_weights())
        assert os.listdir() == ["a.safetensors"]

    def test_a_target_below_a_file_is_said(self):
        Path("file").write_text("")
        with pytest.raises(MergeError, match=r"Cannot write file/a\.ckpt"):
            save_weights("file/a.ckpt", base_weights())

    def test_the_file_has_the_user_s_rights(self):
        mask = os.umask(0o022)
        try:
            save_weights("a.safetensors", base_weights())
        finally:
            os.umask(mask)
        assert stat.S_IMODE(os.stat("a.safetensors").st_mode) == 0o644
