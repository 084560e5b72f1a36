"""Folders as Hugging Face writes them: what is merged loads back with ``transformers``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lightning_merge import merge, open_weights
from lightning_merge.checkpoints.folders import weights_name
from lightning_merge.methods import TIES, IsoC, TaskArithmetic, WeightAverage
from lightning_merge.utilities.errors import MergeError
from tests.toys import base_weights, expert_weights, register_tiny_clip


def write_folder(folder: Path, state, **files: str) -> Path:
    folder.mkdir()
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    for name, text in ({"config.json": '{"model_type": "toy"}'} | files).items():
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def toy(tmp_path):
    base = base_weights()
    more = {"tokenizer.json": "{}", "README.md": "of the base", "trainer_state.json": "{}", "LICENSE": "mine"}
    write_folder(tmp_path / "base", base, **more)
    for i in range(2):
        write_folder(tmp_path / f"expert{i}", expert_weights(base, i))
    return tmp_path / "base", [tmp_path / "expert0", tmp_path / "expert1"]


class TestFolder:
    def test_what_lies_beside_the_base_is_carried_over(self, toy):
        base, experts = toy
        merged = merge(base, experts, TIES(), output="Toy-3.2-1B")
        files = sorted(file.name for file in Path("Toy-3.2-1B").iterdir())
        assert files == ["LICENSE", "README.md", "config.json", "model.safetensors", "tokenizer.json"]
        assert Path("Toy-3.2-1B/LICENSE").read_text() == "mine"
        assert "# Toy-3.2-1B" in Path("Toy-3.2-1B/README.md").read_text()  # its own, not the base's
        found = open_weights("Toy-3.2-1B")
        assert all(torch.equal(found[name], weight) for name, weight in merged.weights.items())
        assert found.header["merge"]["method"]["class_path"] == "TIES"
        assert sorted(path.name for path in Path().iterdir()) == ["Toy-3.2-1B", "base", "expert0", "expert1"]

    def test_our_own_is_replaced_and_what_is_not_is_refused(self, toy):
        base, experts = toy
        Path("out").mkdir()  # an empty folder is nobody's
        merge(base, experts, WeightAverage(), output="out")
        merged = merge(base, experts, TIES(), output="out")
        assert torch.equal(open_weights("out")["mlp.weight"], merged.weights["mlp.weight"])
        before = load_file(base / "model.safetensors")
        with pytest.raises(
            MergeError, match=r"base holds LICENSE, README\.md, config\.json, model\.safetensors, .*Give another na"
        ):
            merge(base, experts, TIES(), output=base)
        assert all(torch.equal(before[name], w) for name, w in load_file(base / "model.safetensors").items())

    def test_a_base_without_a_configuration_is_refused_before_any_work(self, toy, monkeypatch):
        monkeypatch.setattr(TIES, "survey", lambda *_: pytest.fail("it began to work"))
        base, experts = toy
        with pytest.raises(MergeError, match=r"out names a folder.*a state dict.*no config.json.*\.safetensors"):
            merge(base_weights(), experts, TIES(), output="out")
        (base / "config.json").unlink()
        with pytest.raises(MergeError, match=r"no config\.json or open_clip_config\.json beside it"):
            merge(base, experts, TIES(), output="out")
        assert not Path("out").exists()

    def test_tied_names_may_be_left_out_by_some_files(self, toy):
        """A pickle holds both names of a tied tensor; a safetensors file of Hugging Face one of them."""
        base, experts = toy
        state = {"lm_head.weight": expert_weights(base_weights(), 0)["mlp.weight"]}
        state |= expert_weights(base_weights(), 0) | {"mlp.weight": state["lm_head.weight"]}
        torch.save(state, "tied.bin")
        expected = merge(base, experts, TaskArithmetic()).weights
        merged = merge(base, ["tied.bin", experts[1]], TaskArithmetic()).weights
        assert all(torch.equal(merged[name], weight) for name, weight in expected.items())


class TestWhatIsCarriedOver:
    """Files of the base's folder itself, and none that can run code."""

    @pytest.fixture
    def outside(self, tmp_path):
        (tmp_path / "outside").mkdir()
        (tmp_path / "outside/key").write_text("secret")
        return tmp_path / "outside/key"

    @pytest.mark.parametrize("name", ["LICENSE", "tokenizer.json", "generation_config.json"])
    def test_a_link_out_of_the_folder_is_refused_before_any_work(self, toy, outside, name, monkeypatch):
        base, experts = toy
        (base / name).unlink(missing_ok=True)
        (base / name).symlink_to(outside)
        (base / "NOTICE").symlink_to("../outside/key")
        model = merge(base, experts, TIES())
        monkeypatch.setattr(TIES, "survey", lambda *_: pytest.fail("it began to work"))
        for write in (lambda: merge(base, experts, TIES(), output="out"), lambda: model.save("out")):
            with pytest.raises(MergeError, match="is a link that leads out of the model's folder") as refused:
                write()
            assert [any(f"base/{link} is" in text for text in refused.value.problems) for link in (name, "NOTICE")]
        assert not Path("out").exists()
        merge(base, experts, TaskArithmetic(), output="out.safetensors")  # which carries nothing over
        for link in (name, "NOTICE"):
            (base / link).unlink()
        (base / name).write_text("{}")
        merge(base, experts, TaskArithmetic(), output="out")

    def test_a_link_that_is_planted_meanwhile_is_not_followed(self, toy, outside):
        base, experts = toy

        class Plants(TaskArithmetic):
            def update(self, deltas, context):
                (base / "LICENSE").unlink(missing_ok=True)
                (base / "LICENSE").symlink_to(outside)
                return super().update(deltas, context)

        with pytest.raises(MergeError, match="LICENSE is a link that leads out"):
            merge(base, experts, Plants(), output="out")
        assert not Path("out").exists()

    def test_a_link_within_the_folder_becomes_a_file(self, toy):
        base, experts = toy
        (base / "more").mkdir()
        (base / "more/NOTICE.txt").write_text("of others")
        (base / "NOTICE").symlink_to("more/NOTICE.txt")
        merge(base, experts, TIES(), output="out")
        assert Path("out/NOTICE").read_text() == "of others"
        assert not Path("out/NOTICE").is_symlink()

    def test_the_cache_of_the_hub_has_links_to_its_blobs(self, toy, tmp_path, outside):
        base, experts = toy
        model = tmp_path / "cache/models--me--toy"
        (model / "blobs").mkdir(parents=True)
        snapshot = model / "snapshots/0123"
        snapshot.mkdir(parents=True)
        for file in base.iterdir():
            file.rename(model / "blobs" / f"hash-of-{file.name}")
            (snapshot / file.name).symlink_to(f"../../blobs/hash-of-{file.name}")
        merge(snapshot, experts, TIES(), output="out")
        assert Path("out/LICENSE").read_text() == "mine"
        (model / "blobs/hash-of-LICENSE").unlink()
        (model / "blobs/hash-of-LICENSE").symlink_to(outside)
        with pytest.raises(MergeError, match="LICENSE is a link that leads out"):
            merge(snapshot, experts, TIES(), output="another")
        for file in (model / "blobs").glob("*.*"):
            file.rename(outside.parent / file.name)
        (model / "blobs").rename(model / "moved")
        (model / "blobs").symlink_to(outside.parent)
        (snapshot / "LICENSE").unlink()
        (snapshot / "LICENSE").symlink_to("../../blobs/key")
        with pytest.raises(MergeError, match="LICENSE is a link that leads out"):
            merge(snapshot, experts, TIES(), output="another")

    def test_code_is_left_out_unless_it_is_asked_for(self, toy):
        base, experts = toy
        for name in ("modeling_toy.py", "tokenizer_toy.py", "tokenizer.pkl", "vocab.so"):
            (base / name).write_text("import os")
        with pytest.warns(UserWarning, match=r"modeling_toy\.py, tokenizer\.pkl, tokenizer_toy\.py, vocab\.so beside"):
            merge(base, experts, TIES(), output="out")
        kept = ["LICENSE", "README.md", "config.json", "model.safetensors", "tokenizer.json"]
        assert sorted(file.name for file in Path("out").iterdir()) == kept
        merge(base, experts, TIES(), output="out", carry_code=True)
        assert Path("out/modeling_toy.py").read_text() == "import os"
        with pytest.warns(UserWarning, match="was not carried over"):
            merge(base, experts, TIES()).save("out")
        assert sorted(file.name for file in Path("out").iterdir()) == kept
        merge(base, experts, TIES()).save("out", carry_code=True)
        assert Path("out/vocab.so").exists()


def t5(**config):
    transformers = pytest.importorskip("transformers")
    shape = {
        "vocab_size": 40,
        "d_model": 16,
        "d_kv": 4,
        "d_ff": 24,
        "num_layers": 2,
        "num_heads": 4,
        "decoder_start_token_id": 0,
    }
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**shape, **config))


def llama(**config):
    transformers = pytest.importorskip("transformers")
    shape = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, **heads, **config))


def write_models(make, dtype, shard_size):
    """A base and two experts, as ``save_pretrained`` writes them, and their complete state dicts."""
    torch.manual_seed(0)
    model = make().to(dtype)
    states = []
    for name in ("base", "expert0", "expert1"):
        if name != "base":
            model.load_state_dict(states[0])
            for parameter in model.parameters():  # every tied tensor once
                parameter.data += (0.05 * torch.randn(parameter.shape)).to(dtype)
        model.save_pretrained(name, max_shard_size=shard_size)
        states.append({key: value.clone() for key, value in model.state_dict().items()})
    return states


@pytest.mark.parametrize("shard_size", ["1GB", "4KB"], ids=["one file", "sharded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("make", "tied"),
    [
        (t5, ["shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"]),
        (lambda: llama(tie_word_embeddings=True), ["model.embed_tokens.weight", "lm_head.weight"]),
        (llama, []),
    ],
    ids=["T5", "tied Llama", "Llama"],
)
def test_language_models_load_back(make, tied, dtype, shard_size):
    base, *experts = write_models(make, dtype, shard_size)
    assert (len(list(Path("base").glob("*.safetensors"))) > 1) == (shard_size == "4KB")
    merged = merge("base", ["expert0", "expert1"], TaskArithmetic(scale=0.5), output="merged")
    assert sum(name in tied for name in merged.inventory.merged) == bool(tied)  # merged and counted once
    with safe_open("merged/model.safetensors", framework="pt") as file:
        assert sum(name in tied for name in file.keys()) == bool(tied)  # noqa: SIM118

    model, loading = type(make()).from_pretrained("merged", output_loading_info=True)
    assert not any(loading.values())
    assert model.generation_config is not None
    found = model.state_dict()
    assert found.keys() == base.keys()
    for name, weight in base.items():
        deltas = [expert[name].float() - weight.float() for expert in experts]
        expected = (weight.float() + 0.5 * sum(deltas)).to(dtype)
        assert found[name].dtype == dtype
        torch.testing.assert_close(found[name], expected, rtol=0, atol=1e-6 if dtype == torch.float32 else 0)
    assert len({found[name].data_ptr() for name in tied}) == bool(tied)
    tokens = torch.arange(5)[None]
    model(input_ids=tokens, labels=tokens).loss.backward()


def test_a_pickle_with_every_tied_name_gives_a_file_with_one(tmp_path):
    write_models(t5, torch.float32, "1GB")
    torch.save(t5().from_pretrained("base").state_dict(), "base/pytorch_model.bin")
    expected = merge("base", ["expert0"], TaskArithmetic()).weights
    Path("base/model.safetensors").unlink()
    merged = merge("base", ["expert0"], TaskArithmetic(), output="merged")
    assert len(merged.inventory.tied) == 3
    model, loading = type(t5()).from_pretrained("merged", output_loading_info=True)
    assert not any(loading.values())
    assert all(torch.equal(model.state_dict()[name], weight) for name, weight in expected.items())
    assert load_file("merged/model.safetensors").keys() == expected.keys()


def test_language_models_on_the_command_line():
    from lightning_merge.trainer.cli import main

    write_models(t5, torch.float32, "1GB")
    experts = json.dumps({"a": "expert0", "b": "expert1"})
    main(["merge", "--base=base", f"--experts={experts}", "--method=IsoC", "--output=merged"])
    expected = merge("base", {"a": "expert0", "b": "expert1"}, IsoC()).weights
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained("merged")
    assert all(torch.equal(model.state_dict()[name], weight) for name, weight in expected.items())
    transformers.AutoModel.from_pretrained("merged")


def test_adapters_as_peft_writes_them():
    peft = pytest.importorskip("peft")
    write_models(llama, torch.float32, "1GB")
    model = type(llama()).from_pretrained("base")
    config = peft.LoraConfig(r=3, lora_alpha=7, init_lora_weights=False, target_modules=["q_proj", "embed_tokens"])
    adapted = peft.get_peft_model(model, config)
    adapted.save_pretrained("adapter")
    merged = merge("base", {"adapter": "adapter"}, TaskArithmetic(scale=1.0)).weights
    for name, weight in adapted.merge_and_unload().state_dict().items():
        torch.testing.assert_close(merged[name], weight, rtol=0, atol=1e-5)


def moved(model, seed: int):
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=draw)
    return model


def averaged(*states):
    return {
        name: sum(state[name].float() for state in states).div(len(states)).to(states[0][name]) for name in states[0]
    }


class TestTimm:
    """A folder that ``timm.create_model("local-dir:…", pretrained=True)`` takes."""

    @pytest.fixture
    def models(self):
        timm = pytest.importorskip("timm", minversion="1.0.16")  # the first that knows local-dir
        hub = pytest.importorskip("timm.models")
        arguments = {"img_size": 32, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 3}
        models = [timm.create_model("vit_tiny_patch16_224", **arguments) for _ in range(3)]
        for i, (model, name) in enumerate(zip(models, ("base", "one", "two"), strict=True)):
            model.load_state_dict(models[0].state_dict())
            hub.save_for_hf(moved(model, i), name, model_args=arguments, safe_serialization=True)
        return models

    def check(self, folder: str, *experts):
        timm = pytest.importorskip("timm")
        loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        by_hand = experts[0].eval()
        by_hand.load_state_dict(averaged(*(expert.state_dict() for expert in experts)))
        images = torch.randn(2, 3, 32, 32)
        torch.testing.assert_close(loaded(images), by_hand(images))
        return loaded

    def test_folders(self, models):
        merge("base", ["one", "two"], WeightAverage(), output="merged")
        assert sorted(path.name for path in Path("merged").iterdir()) == [
            "README.md",
            "config.json",
            "model.safetensors",
        ]
        assert self.check("merged", *models[1:]).pretrained_cfg["num_classes"] == 3

    def test_lightning_checkpoints_that_hold_the_network(self, models):
        for i, model in enumerate(models[1:]):
            torch.save({"state_dict": {f"net.{name}": w for name, w in model.state_dict().items()}}, f"{i}.ckpt")
        merge("base", ["0.ckpt", "1.ckpt"], WeightAverage(), output="merged")
        self.check("merged", *models[1:])

    def test_of_a_safetensors_file_and_a_pickle_the_first_is_read(self, models):
        torch.save({name: w + 1 for name, w in models[0].state_dict().items()}, "base/pytorch_model.bin")
        assert open_weights("base").path == Path("base/model.safetensors")
        merge("base", ["one", "two"], WeightAverage(), output="merged")
        self.check("merged", *models[1:])
        assert not Path("merged/pytorch_model.bin").exists()

    def test_a_pickle_becomes_a_safetensors_file(self, models):
        torch.save(models[0].state_dict(), "base/pytorch_model.bin")
        Path("base/model.safetensors").unlink()
        merge("base", ["one", "two"], WeightAverage(), output="merged")
        assert Path("merged/model.safetensors").is_file()
        self.check("merged", *models[1:])

    def test_an_input_is_not_replaced(self, models):
        merge("base", ["one", "two"], WeightAverage(), output="merged")
        before = Path("merged/model.safetensors").read_bytes()
        for base, experts in (("merged", ["one"]), ("base", ["one", "merged"])):
            with pytest.raises(MergeError, match="merged holds one of the models to merge; give the merged model anot"):
                merge(base, experts, WeightAverage(), output="merged")
        assert Path("merged/model.safetensors").read_bytes() == before


class TestOpenClip:
    """A folder that ``open_clip.create_model_and_transforms("local-dir:…")`` takes."""

    @pytest.fixture(params=["open_clip_model.safetensors", "open_clip_pytorch_model.bin"])
    def models(self, request):
        open_clip = pytest.importorskip("open_clip")
        if not hasattr(open_clip.factory, "LOCAL_DIR_PREFIX"):
            pytest.skip("this open_clip does not know local-dir")
        from open_clip.push_to_hf_hub import save_config_for_hf

        name = register_tiny_clip(Path())
        models = [open_clip.create_model(name) for _ in range(3)]
        for i, (model, folder) in enumerate(zip(models, ("base", "one", "two"), strict=True)):
            model.load_state_dict(models[0].state_dict())
            Path(folder).mkdir()
            save_config_for_hf(moved(model, i), Path(folder, "open_clip_config.json"), open_clip.get_model_config(name))
            if request.param.endswith(".bin"):
                torch.save(model.state_dict(), f"{folder}/{request.param}")
            else:
                save_file(model.state_dict(), f"{folder}/{request.param}")
        Path("base/merges.txt").write_text("a b")
        Path("base/tokenizer_config.json").write_text("{}")
        return models

    def test_folders(self, models):
        open_clip = pytest.importorskip("open_clip")
        merge("base", ["one", "two"], WeightAverage(), output="merged")
        files = [
            "README.md",
            "merges.txt",
            "open_clip_config.json",
            "open_clip_model.safetensors",
            "tokenizer_config.json",
        ]
        assert sorted(path.name for path in Path("merged").iterdir()) == files
        loaded, _, preprocess = open_clip.create_model_and_transforms("local-dir:merged")
        assert preprocess is not None
        by_hand = models[1].eval()
        by_hand.load_state_dict(averaged(*(model.state_dict() for model in models[1:])))
        images, text = torch.randn(2, 3, 32, 32), torch.randint(0, 49408, (2, 77))
        for found, expected in zip(loaded.eval()(images, text), by_hand(images, text), strict=True):
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("base", "name"),
    [
        ("model.safetensors.index.json", "model.safetensors"),
        ("pytorch_model.bin.index.json", "model.safetensors"),
        ("open_clip_pytorch_model.bin", "open_clip_model.safetensors"),
        ("model.fp16.safetensors", "model.fp16.safetensors"),
    ],
)
def test_the_weights_are_called_what_the_library_looks_for(base, name):
    assert weights_name(Path("folder") / base) == name
