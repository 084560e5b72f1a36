"""The model card: what the Hub reads of it, and that its recipe makes the same model again."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import save_file

import lightning_merge as lm
from lightning_merge import methods
from lightning_merge.__main__ import main
from lightning_merge.merging.model_card import _library, _license, check_card, model_card
from lightning_merge.merging.recipe import obstacles, source_of
from lightning_merge.methods import DARE, SCORE, TIES, KnOTS, MergeMethod, TaskArithmetic, Wrapper
from lightning_merge.utilities.errors import MergeError
from lightning_merge.utilities.grid import one_line
from tests.toys import base_weights, expert_weights, quiet_trainer, tiny_expert
from tests.utilities.test_grid import ODD

CLASSES = [getattr(methods, name) for name in methods.__all__]
METHODS = [cls for cls in CLASSES if issubclass(cls, MergeMethod) and cls not in (MergeMethod, Wrapper)]


@pytest.fixture
def folders(tmp_path):
    """A base and two experts as folders of transformers."""
    states = {"base": base_weights()} | {f"expert{i}": expert_weights(base_weights(), i) for i in range(2)}
    for name, state in states.items():
        Path(name).mkdir()
        save_file(state, f"{name}/model.safetensors", {"format": "pt"})
        Path(name, "config.json").write_text('{"model_type": "toy"}')
    return tmp_path


def recipe_in(text: str) -> str:
    return re.search(r"^(`{3,})yaml\n(.*?)\n\1$", text, re.M | re.S)[2]


def record(row, domain, accuracy):
    metrics = dict.fromkeys(("accuracy", "balanced_accuracy", "f1", "calibration_error"), accuracy)
    return {"row": row, "domain": domain, "test_on": "test", **metrics}


def scores(*values: float, row: str = "merged"):
    rows = [("base", 0.1), *((row, value) for value in values)]
    return lm.evaluation.Table([record(name, domain, value) for name, value in rows for domain in ODD])


@pytest.mark.parametrize("cls", METHODS, ids=lambda cls: cls.__name__)
def test_every_method_has_its_own_formula_in_a_line(cls):
    assert "formula" in vars(cls)
    assert re.fullmatch(r"[^\n`]{10,110}", cls.formula)
    assert re.search(r"[τθW] |Δ_t|task", cls.formula)


def test_there_are_38_methods():
    assert len(METHODS) == 38


@pytest.mark.parametrize(
    ("method", "options"),
    [
        (SCORE(z=math.inf, mode="diagonal"), {}),
        (KnOTS(DARE(TIES(density=0.5), drop=0.25), layers="matrices"), {"seed": 3, "scale": 0.7}),
        (
            methods.MultiSLERP(weights=(1, 3)),
            {"include": ["mlp.*", "conv.*"], "exclude": ["*.bias"], "allow_non_finite": True},
        ),
        (methods.TSVM(), {"matrices": lm.Matrices(exclude=(), flatten_convolutions=True)}),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, MergeMethod) else "",
)
def test_the_recipe_makes_the_same_model_again(folders, method, options):
    experts = {ODD[5]: "expert0", f"{ODD[2]}\n---\nnull": "expert1"}
    merged = lm.merge("base", experts, method, output="merged", **options)
    Path("recipe.yaml").write_text(recipe_in(Path("merged/README.md").read_text()))
    first = lm.open_weights("merged").digest()
    Path("merged").rename("first")
    main(["merge", "--config=recipe.yaml"])
    again = lm.open_weights("merged")
    assert again.digest() == first
    assert again.header["merge"] == json.loads(json.dumps(merged.manifest))
    assert Path("merged/README.md").read_text() == Path("first/README.md").read_text()


def test_experts_of_every_kind_and_statistics(folders):
    lm.save_task_vector("t.safetensors", "base", "expert0")
    fisher = {f"fisher.{name}": torch.rand_like(w) for name, w in base_weights().items() if w.is_floating_point()}
    for i, expert in enumerate(("t", "expert1")):
        save_file({name: w + i for name, w in fisher.items()}, f"{expert}.statistics.safetensors")
    Path("expert1.statistics.safetensors").rename("expert1/model.statistics.safetensors")
    merged = lm.merge("base", ["t.safetensors", "expert1"], methods.Fisher(), output="merged.safetensors")
    text = str(merged.card(output="again.safetensors"))
    Path("recipe.yaml").write_text(recipe_in(text))
    assert set(yaml.safe_load(Path("recipe.yaml").read_text())["statistics"]) == {"t.safetensors", "expert1"}
    main(["merge", "--config=recipe.yaml"])
    assert lm.open_weights("again.safetensors").digest() == lm.open_weights("merged.safetensors").digest()


def test_what_the_hub_reads(folders):
    lm.merge("base", ["expert0", "expert1"], DARE(TaskArithmetic())).save("merged")
    card = ModelCard.load("merged/README.md")
    assert card.data.to_dict() == {
        "library_name": "transformers",
        "tags": ["merge", "lightning_merge", "DARE", "TaskArithmetic"],
    }
    assert "https://arxiv.org/abs/2311.03099)): Drop and rescale: a random" in card.text
    assert DARE.formula in card.text
    assert TaskArithmetic.formula in card.text
    for weights in map(lm.open_weights, ("base", "expert0", "expert1")):
        assert weights.fingerprint() in card.text


def test_scores_become_the_model_index(folders):
    merged = lm.merge("base", ["expert0", "expert1"], SCORE())
    table = scores(0.1 + 0.2)
    card = ModelCard(str(merged.card(table, output="odd: [name\n---\n.ckpt")))
    assert card.data.model_name == "odd: [name --- .ckpt"
    assert [result.dataset_name for result in card.data.eval_results] == [one_line(domain) for domain in ODD]
    assert {result.metric_value for result in card.data.eval_results} == {0.1 + 0.2}
    assert {result.dataset_split for result in card.data.eval_results} == {"test"}
    assert table.grid().markdown() in card.text
    assert card.data.library_name is None  # of a file
    assert ModelCard(str(merged.card(scores(math.nan)))).data.eval_results is None
    assert ModelCard(str(merged.card(scores(0.5, row="merged, task known")))).data.eval_results is None


def test_a_reader_of_markdown_finds_odd_names_as_they_are(folders):
    reader = pytest.importorskip("markdown_it").MarkdownIt("commonmark").enable(["table", "strikethrough"])
    merged = lm.merge("base", {ODD[3]: "expert0", ODD[6]: "expert1"}, SCORE())
    body = ModelCard(str(merged.card(scores(0.5), output=ODD[3].replace("/", "")))).text
    tokens = reader.parse(body)
    assert "html_block" not in {token.type for token in tokens}
    inline = [child for token in tokens if token.type == "inline" for child in token.children]
    assert not {"html_inline", "image", "s_open"} & {child.type for child in inline}
    links = [child.attrs["href"] for child in inline if child.type == "link_open"]
    assert links == ["https://arxiv.org/abs/2603.05768"]


def test_what_no_configuration_can_say_is_said_instead(folders):
    base, experts = base_weights(), {"a": "expert0", "b": expert_weights(base_weights(), 1)}
    merged = lm.merge(base, experts, TaskArithmetic(), dtype=torch.float64)
    card = str(merged.card())
    assert (
        "No configuration alone makes this model again, because the base came from memory; the expert b came from "
        "memory; it was computed in float64, which only Python's \\`merge\\` takes." in card
    )
    assert "yaml" not in card
    assert "| base   |      | in memory" in card


def test_the_trainer_writes_scores_into_the_card(tmp_path):
    model, data = tiny_expert(), lm.Digits(test_domains=["thick", "noisy"], batch_size=512)
    for i, name in enumerate(("base", "a", "b")):
        Path(name).mkdir()
        state = expert_weights(model.state_dict(), i) if i else model.state_dict()
        lm.save_weights(f"{name}/model.safetensors", state)
        Path(name, "config.json").write_text("{}")
    trainer = quiet_trainer()
    merging = {"experts": {"rotated": "a", "slanted": "b"}, "base": "base"}
    trainer.merge(model, data, **merging, output="merged", card="cards/card.md")
    card = ModelCard.load("merged/README.md")
    found = {result.dataset_name: result.metric_value for result in card.data.eval_results}
    measured = {r["domain"]: r["accuracy"] for r in trainer.table.records if r["row"] == "merged"}
    assert found == pytest.approx(measured)
    assert set(found) == {"thick", "noisy"}
    assert trainer.table.markdown() in card.text
    assert Path("cards/card.md").read_text() == Path("merged/README.md").read_text()
    with pytest.raises(MergeError, match=r"end it in \.md"):
        trainer.merge(model, data, **merging, output="other", card="merged")
    assert not Path("other").exists()


def test_the_command_line_writes_a_card_beside_a_file(folders, capsys):
    files = ["--base=base", "--experts={a: expert0, b: expert1}", "--output=m.safetensors"]
    main(["merge", "--method=TIES", *files, "--card=m.md"])
    assert "wrote m.safetensors, and its card m.md" in capsys.readouterr().out
    text = Path("m.md").read_text()
    assert text == str(lm.merge("base", {"a": "expert0", "b": "expert1"}, TIES()).card(output="m.safetensors"))


class OwnMethod(TaskArithmetic):
    """A method of somebody else."""


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"repair": {"by": "tact"}}, "the merged model was repaired on images"),
        ({"base": {"mean_of": {"a": {}}}}, "the experts' channels were aligned before"),
        ({"method": methods.AdaMerging().describe()}, "AdaMerging ran the model on images"),
        ({"method": methods.LiNeS(methods.RegMeanPlusPlus()).describe()}, "RegMeanPlusPlus ran the model on images"),
        ({"method": OwnMethod().describe()}, "OwnMethod is no method of lightning_merge itself"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_obstacles(folders, changes, reason):
    manifest = lm.merge("base", ["expert0", "expert1"], TaskArithmetic()).manifest
    assert obstacles(manifest) == []
    assert obstacles(manifest | changes) == [reason]
    assert reason in str(model_card(manifest | changes, "merged.ckpt"))


def test_a_recipe_of_a_gpu_says_so(folders):
    manifest = lm.merge("base", ["expert0", "expert1"], TaskArithmetic()).manifest
    assert "last bits may differ" not in str(model_card(manifest, "merged.ckpt"))
    assert "It was computed on cuda; on another kind of device the last bits" in str(
        model_card(manifest | {"device": "cuda"}, "merged.ckpt")
    )


def test_models_of_the_hub_are_named_by_their_commit(folders):
    cache = "/home/me/.cache/huggingface/hub/models--own-er--na.me/snapshots/0123abc/model.safetensors"
    assert source_of({"path": cache}) == "hf-hub:own-er/na.me@0123abc"
    assert source_of({"path": "a/adapter_model.safetensors"}) == "a"
    assert source_of({"path": "a/model.safetensors"}) == "a/model.safetensors"
    assert source_of({"path": None}) is None
    manifest = lm.merge("base", ["expert0", "expert1"], TaskArithmetic()).manifest
    data = model_card(manifest | {"base": {"path": cache, "sha256": "0"}}, "merged.ckpt").data
    assert data.base_model == ["own-er/na.me"]
    assert data.base_model_relation == "merge"


def test_shards_have_a_hash_each(folders):
    manifest = lm.merge("base", ["expert0", "expert1"], TaskArithmetic()).manifest
    shards = {"path": "base/model.safetensors.index.json", "sha256": {"1.safetensors": "aa", "2.safetensors": "bb"}}
    text = str(model_card(manifest | {"base": shards}, "merged.ckpt"))
    assert re.search(r"\| base +\| +\| base/model.safetensors.index.json: 1.safetensors \| aa +\|", text)
    assert re.search(r"\| base +\| +\| base/model.safetensors.index.json: 2.safetensors \| bb +\|", text)


@pytest.mark.parametrize(
    ("files", "weights", "library"),
    [
        ({"config.json": {"model_type": "clip"}}, "model.safetensors", "transformers"),
        ({"config.json": {"pretrained_cfg": {}, "architecture": "vit"}}, "model.safetensors", "timm"),
        ({"open_clip_config.json": {}}, "open_clip_pytorch_model.bin", "open_clip"),
        ({"open_clip_config.json": {}}, "model.safetensors", "open_clip"),
        (
            {"config.json": {"model_type": "clip"}, "open_clip_config.json": {}},
            "open_clip_model.safetensors",
            "open_clip",
        ),
        ({"config.json": {}}, "model.safetensors", None),
        ({"config.json": [1]}, "model.safetensors", None),
    ],
)
def test_library(tmp_path, files, weights, library):
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    assert _library({"path": str(tmp_path / weights)}) == library
    assert _library({"path": None}) is None


@pytest.mark.parametrize(
    ("cards", "found"),
    [
        (["---\nlicense: mit\n---\n"] * 2, "mit"),
        (["---\nlicense: mit\n---\n", "---\nlicense: apache-2.0\n---\n"], None),
        (["---\nlicense: mit\n---\n", None], None),
        (["---\nlicense: other\n---\n"] * 2, None),
        (["---\nlicense: [\n---\n"] * 2, None),
        (["no metadata"] * 2, None),
    ],
)
def test_a_licence_is_named_where_all_agree(tmp_path, cards, found):
    models = []
    for i, card in enumerate(cards):
        folder = tmp_path / str(i)
        folder.mkdir()
        models.append({"path": str(folder / "model.safetensors")})
        if card is not None:
            (folder / "README.md").write_text(card)
    assert _license(models) == found
    assert _license([*models, {"path": None}]) is None


@pytest.mark.parametrize(
    ("path", "message"), [("card.ckpt", r"end it in \.md"), ("file/card.md", "no folder that can be")]
)
def test_where_no_card_can_be_written(path, message):
    Path("file").touch()
    with pytest.raises(MergeError, match=message):
        check_card(path)
    check_card("new/folder/card.md")
