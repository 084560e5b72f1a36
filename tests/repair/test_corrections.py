"""Corrections: inserted into a module they are copied, pickled, saved and loaded."""

from __future__ import annotations

import copy
import io
import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.func import functional_call

from lightning_merge.repair import Correction, insert, load_corrections, save_corrections
from lightning_merge.utilities.errors import MergeError
from lightning_merge.utilities.sites import Site
from tests.repair.models import VGG, images, random_correction, vit


def test_inserted_corrections_go_along_with_copies_and_pickles():
    module, x = vit(), images(3)
    inserted = insert(module, random_correction(module, x)).eval()
    assert {"blocks.0.input_correction.scale", "blocks.0.correction.shift"} < inserted.state_dict().keys()
    file = io.BytesIO()
    torch.save(inserted, file)
    file.seek(0)
    with torch.no_grad():
        expected = inserted(x)
        for other in (copy.deepcopy(inserted), torch.load(file, weights_only=False)):
            torch.testing.assert_close(other(x), expected, rtol=0, atol=0)
            other.blocks[0].correction.scale.zero_()  # is its own
            assert not torch.allclose(other(x), expected)
            torch.testing.assert_close(inserted(x), expected, rtol=0, atol=0)
        doubled = {name: 2 * tensor for name, tensor in inserted.state_dict().items() if "correction" in name}
        assert not torch.allclose(functional_call(inserted, doubled, (x,)), expected)


def test_corrections_are_read_as_they_were_written():
    vgg, transformer = random_correction(VGG(), images(2)), random_correction(vit(), images(2))
    given = {"a/b": vgg, "a": transformer, "none": Correction()}
    save_corrections("corrections.safetensors", given)
    found = load_corrections("corrections.safetensors")
    assert list(found) == list(given)
    for task, correction in given.items():
        assert found[task].sites == correction.sites
        torch.testing.assert_close(found[task].state, correction.state, rtol=0, atol=0)


def test_what_is_no_correction_is_refused():
    site = Site("0", -1)
    with pytest.raises(MergeError, match="correction of 0 needs a scale and a shift of the same shape"):
        Correction({site: torch.ones(3)}, {})
    module = nn.Sequential(nn.Linear(2, 2))
    one = {site: torch.ones(2)}
    with pytest.raises(MergeError, match="has a 'correction' already"):
        insert(insert(module, Correction(one, one)), Correction(one, one))
    for path, message in (("7", "no part '7'"), ("", "is a Sequential, which would run a correction")):
        other = {Site(path, -1): torch.ones(2)}
        with pytest.raises(MergeError, match=message):
            insert(module, Correction(other, other))
    with pytest.raises(MergeError, match="There is no file"):
        load_corrections("nowhere.safetensors")
    save_file({"w": torch.ones(1)}, "weights.safetensors")
    with pytest.raises(MergeError, match="holds no corrections"):
        load_corrections("weights.safetensors")


@pytest.mark.parametrize(
    ("noted", "message"),
    [
        ([], "it is a list of 0 values where an object belongs"),
        (
            {"tasks": ["a"], "sites": {"a/0": {"task": "a", "path": 0, "axis": 1, "input": False}}},
            "path is 0 where text",
        ),
        (
            {"tasks": ["b"], "sites": {"a/0": {"task": "a", "path": "0", "axis": 1, "input": False}}},
            "of 'a/0' it holds",
        ),
        (
            {"tasks": ["a"], "sites": {"a/1": {"task": "a", "path": "0", "axis": 1, "input": False}}},
            "of 'a/1' it holds",
        ),
    ],
)
def test_a_record_of_another_shape_is_refused(noted, message):
    tensors = {"a/0.scale": torch.ones(2), "a/0.shift": torch.ones(2)}
    save_file(tensors, "c.safetensors", {"corrections": json.dumps(noted)})
    with pytest.raises(MergeError, match=rf"c\.safetensors .*{message}.*; give a file that save_corrections wrote\.$"):
        load_corrections("c.safetensors")
