"""What becomes of damaged and hostile files of every kind that the package reads: a sentence, or a result?

    python -m benchmarks.fuzz --count 2000

Every input is a good file in which bytes, or values of its JSON, YAML, header or archive, have been changed, by a seed.
It is read in a forked process that may take 5 seconds of CPU time and 500 MB. Anything but a result or a
`MergeError` is listed with the number of the input, which ``--only`` runs again.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import os
import random
import resource
import shutil
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

import lightning_merge as lm
from lightning_merge.utilities.errors import MergeError

SECONDS, BYTES = 5, 500_000_000
GOOD = ("result", "sentence")
CHUNK = 100  # inputs that one process reads, unless it dies
ODD: tuple[Any, ...] = (
    None, True, -1, 0, 1, 10**30, 1e308, math.nan, math.inf, "", "x" * 5000, "\0", "../../etc/passwd", "\ud800", [], {},
    [[]], {"": None}, "float64", "F32", [2**40, 2**40], {"a": {"b": [1]}}, "\x1b[2J\u202e",
)  # fmt: skip
DEEP = "[" * 3000 + "]" * 3000


@dataclass(frozen=True)
class Kind:
    """A kind of file.

    Args:
        make: Writes good files into the current folder.
        read: Reads them.
        files: Patterns of those that are damaged.
    """

    make: Callable[[], None]
    read: Callable[[], Any]
    files: tuple[str, ...]


def weights(shift: float = 0.0) -> dict[str, Tensor]:
    """Weights of a small model."""
    draw = torch.Generator().manual_seed(0)
    shapes = {"block.proj.weight": (4, 3), "block.proj.bias": (4,), "norm.running_mean": (4,), "head.weight": (2, 4)}
    return {name: torch.randn(shape, generator=draw) + shift for name, shape in shapes.items()}


def base_and_expert(suffix: str = ".safetensors") -> None:
    """Write a base, and an expert, under the name that is damaged."""
    save_file(weights(), "base.safetensors")
    lm.save_weights(f"expert{suffix}", weights(0.1))


def merge(expert: str, method: Any = None, **options: Any) -> None:
    """Merge one expert and read all values."""
    merged = lm.merge("base.safetensors", {"e": expert}, method or lm.methods.TaskArithmetic(), **options)
    dict(merged.weights)


def make_checkpoint() -> None:
    """Write a checkpoint of Lightning."""
    base_and_expert()
    hyper_parameters = {"backbone": "timm/vit_tiny_patch16_224", "num_classes": 2, "backbone_args": {"depth": 1}}
    content = {"state_dict": weights(0.1), "hyper_parameters": hyper_parameters, "epoch": 3, "optimizer": [{"lr": 0.1}]}
    torch.save(content, "expert.ckpt")


def read_checkpoint() -> None:
    """Read a checkpoint of Lightning."""
    from lightning.pytorch import LightningModule

    from lightning_merge.trainer.model_of_checkpoint import model_of_checkpoint

    merge("expert.ckpt")
    model_of_checkpoint("expert.ckpt", {}, LightningModule, True)


def make_old() -> None:
    """Write a file of torch.save as it was before it wrote archives."""
    base_and_expert()
    torch.save(weights(0.1), "expert.pt", _use_new_zipfile_serialization=False)


def make_shards() -> None:
    """Write an expert in shards, with an index."""
    base_and_expert()
    Path("expert").mkdir()
    names = list(weights())
    index = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(names)}
    for shard in set(index.values()):
        save_file({name: weights(0.1)[name] for name in names if index[name] == shard}, f"expert/{shard}")
    Path("expert/model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def make_hub() -> None:
    """Write a base as it comes from the Hub; the card of the merged folder reads its configuration."""
    base_and_expert()
    Path("hub").mkdir()
    save_file(weights(), "hub/model.safetensors", {"format": "pt"})
    config = {"architectures": ["Bert"], "model_type": "bert", "tie_word_embeddings": False, "hidden_size": 4}
    Path("hub/config.json").write_text(json.dumps(config))


def read_hub() -> None:
    """Read a folder of the Hub."""
    merged = lm.merge("hub", {"e": "expert.safetensors"}, lm.methods.TaskArithmetic(), output="out")
    str(merged.card(None, "out"))


def make_adapter() -> None:
    """Write a LoRA adapter."""
    base_and_expert()
    Path("adapter").mkdir()
    draw = torch.Generator().manual_seed(1)
    factors = {
        f"base_model.model.block.proj.lora_{factor}.weight": torch.randn(shape, generator=draw)
        for factor, shape in (("A", (2, 3)), ("B", (4, 2)))
    }
    save_file(factors, "adapter/adapter_model.safetensors")
    config = {
        "peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["proj"], "rank_pattern": {"block.*": 2},
        "alpha_pattern": {}, "bias": "none", "fan_in_fan_out": False, "use_rslora": False, "task_type": None,
    }  # fmt: skip
    Path("adapter/adapter_config.json").write_text(json.dumps(config))


def make_statistics() -> None:
    """Write statistics of an expert."""
    from lightning_merge.checkpoints.statistics_files import save_statistics

    base_and_expert()
    expert = lm.open_weights("expert.safetensors")
    fisher = {f"fisher.{name}": torch.ones_like(tensor) for name, tensor in expert.items()}
    save_statistics("s.safetensors", fisher, expert, {"kinds": ["fisher"], "examples": 8, "batches": 2})


def make_task_vector() -> None:
    """Write a task vector."""
    base_and_expert()
    lm.save_task_vector("tv.safetensors", "base.safetensors", "expert.safetensors", rank=1)


def make_corrections() -> None:
    """Write corrections."""
    from lightning_merge.repair.corrections import Correction, save_corrections
    from lightning_merge.utilities.sites import Site

    site = Site("block.proj", 1)
    save_corrections("c.safetensors", {"a": Correction({site: torch.ones(4)}, {site: torch.zeros(4)})})


def read_corrections() -> None:
    """Read corrections."""
    from lightning_merge.repair.corrections import load_corrections

    for correction in load_corrections("c.safetensors").values():
        dict(correction.state)


@cache
def tiny_parts() -> tuple[Any, Any, Any]:
    """A trainer, a model and data of a benchmark."""
    tiny = {"in_chans": 1, "depths": [1, 1, 1, 0], "dims": [8, 8, 8, 8], "patch_size": 1, "kernel_sizes": 3}
    model = lm.Expert("timm/convnext_tiny", num_classes=10, pretrained=False, backbone_args=tiny)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    return lm.MergeTrainer(accelerator="cpu", devices=1, **quiet), model, lm.Digits()


def benchmark() -> Any:
    """Make the jobs of a benchmark of two domains."""
    from lightning_merge.evaluation.benchmark.leave_one_out import Benchmark

    trainer, model, data = tiny_parts()
    return Benchmark(trainer, model, data, {"a": lm.methods.TaskArithmetic()}, Path("out"), ["noisy", "thick"])


def make_benchmark() -> None:
    """Write what a benchmark leaves behind."""
    from lightning_merge.analysis import compare_experts
    from lightning_merge.analysis.comparison_files import save_comparison
    from lightning_merge.evaluation.jobs import claim_output, mark_done
    from lightning_merge.models.metrics import METRICS

    for domain in ("noisy", "thick"):
        rows = {"base": None, "a": lm.methods.TaskArithmetic().describe(), "own expert": None}
        records = [
            {"row": row, "domain": domain, "test_on": "test", "method": method, "merge_seconds": 0.1}
            | dict.fromkeys(METRICS, 0.5)
            for row, method in rows.items()
        ]
        mark_done(Path("out/held_out") / domain, {"records": records, "updates": {"a": {"block": 0.1}}})
    base, expert = weights(), weights(0.1)
    save_comparison(compare_experts(base, {"noisy": expert, "thick": weights(0.2)}), Path("out"))
    claim_output(Path("out"), {"model": {"depth": 1}, "seed": 0}, write=True)


def read_benchmark() -> None:
    """Read what a benchmark leaves behind."""
    from lightning_merge.evaluation.jobs import claim_output
    from lightning_merge.report.writing import report_benchmark

    jobs = benchmark()
    for job in jobs.jobs():
        job.done()
    table = jobs.write_results()
    claim_output(Path("out"), {"model": {"depth": 1}, "seed": 0}, write=False)
    if random.random() < 0.1:  # figures take a second
        report_benchmark(table, Path("out"), updates=jobs.updates())


def make_symmetries() -> None:
    """Write permutation groups."""
    from lightning_merge.align.find_symmetries import find_symmetries

    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    Path("symmetries.json").write_text(find_symmetries(model, torch.zeros(1, 3)).to_json())


def read_symmetries() -> None:
    """Read permutation groups."""
    from lightning_merge.align.symmetries import Symmetries

    for name in (symmetries := Symmetries.from_json(Path("symmetries.json").read_text(errors="replace"))).groups:
        symmetries.order_shape(name)


def make_hparams() -> None:
    """Write hyper-parameters in YAML."""
    arguments = {"backbone": "timm/vit_tiny_patch16_224", "num_classes": 2, "backbone_args": {"depth": 1}, "lr": 0.1}
    Path("hparams.yaml").write_text(yaml.safe_dump(arguments))


def read_hparams() -> None:
    """Read hyper-parameters in YAML."""
    from lightning_merge.models.from_file import expert_arguments, read_hyper_parameters

    expert_arguments("hparams.yaml", read_hyper_parameters("hparams.yaml"), {}, lm.Expert)


def make_config() -> None:
    """Write the config of a command."""
    base_and_expert()
    method = {"class_path": "TIES", "init_args": {"density": 0.3}}
    experts = {"a": "expert.safetensors"}
    merging = {"base": "base.safetensors", "experts": experts, "method": method, "output": "m.safetensors"}
    Path("config.yaml").write_text(yaml.safe_dump(merging))


def read_config() -> None:
    """Read the config of a command."""
    from lightning_merge.trainer.cli import main

    try:
        main(["merge", "--config=config.yaml", "--plan"])
    except SystemExit as end:
        if end.code:
            raise MergeError("The command line has said it.") from end


def make_arrays() -> None:
    """Write the arrays of a task."""
    draw = np.random.default_rng(0)
    parts = {}
    for split in ("train", "test"):
        parts[f"{split}_images"] = draw.integers(0, 255, (6, 8, 8)).astype(np.uint8)
        parts[f"{split}_labels"] = np.arange(6) % 2
    np.savez("task.npz", **parts, classes=np.array(["a", "b"]))


def read_arrays() -> None:
    """Read the arrays of a task."""
    from lightning_merge.data.task_files import read_task, resized

    resized(read_task(Path("task.npz")).train[0], 8, 1)


def make_images() -> None:
    """Write images of every format."""
    from PIL import Image

    draw = np.random.default_rng(0)
    for suffix in ("png", "jpg", "bmp", "gif", "tiff", "webp"):
        for name in ("cat", "dog"):
            Path(f"images/photo/{name}").mkdir(parents=True, exist_ok=True)
            pixels = draw.integers(0, 255, (9, 7, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(f"images/photo/{name}/a.{suffix}")


def read_images() -> None:
    """Read images of every format."""
    data = lm.DomainFolders(root="images", test_domains=["photo"], size=(8, 8), mean=(0.5,) * 3, std=(0.5,) * 3)
    dataset = data.dataset("photo", np.arange(len(data.labels("photo"))), augment=False)
    for index in range(len(dataset)):
        dataset[index]
    data.check(["photo"])


KINDS = {
    "safetensors": Kind(base_and_expert, lambda: merge("expert.safetensors"), ("expert.safetensors",)),
    "ckpt": Kind(make_checkpoint, read_checkpoint, ("expert.ckpt",)),
    "old pt": Kind(make_old, lambda: merge("expert.pt"), ("expert.pt",)),
    "shards": Kind(make_shards, lambda: merge("expert"), ("expert/*.json", "expert/*0.safetensors")),
    "Hub folder": Kind(make_hub, read_hub, ("hub/config.json", "hub/model.safetensors")),
    "adapter": Kind(make_adapter, lambda: merge("adapter"), ("adapter/*.json", "adapter/*.safetensors")),
    "statistics": Kind(
        make_statistics,
        lambda: merge("expert.safetensors", lm.methods.Fisher(), statistics={"e": "s.safetensors"}),
        ("s.safetensors",),
    ),
    "task vector": Kind(make_task_vector, lambda: merge("tv.safetensors"), ("tv.safetensors",)),
    "corrections": Kind(make_corrections, read_corrections, ("c.safetensors",)),
    "benchmark": Kind(
        make_benchmark, read_benchmark, ("out/held_out/noisy/done", "out/settings.json", "out/comparison.json")
    ),
    "symmetries": Kind(make_symmetries, read_symmetries, ("symmetries.json",)),
    "hparams.yaml": Kind(make_hparams, read_hparams, ("hparams.yaml",)),
    "config": Kind(make_config, read_config, ("config.yaml",)),
    "npz": Kind(make_arrays, read_arrays, ("task.npz",)),
    "images": Kind(make_images, read_images, ("images/photo/cat/*",)),
}
DEAR = ("config",)
"""Kinds that take a second; of these there are fewer."""


def kind_of(number: int) -> str:
    """The kind of an input."""
    names = list(KINDS)
    name = names[number % len(names)]
    return "npz" if name in DEAR and number // len(names) % 5 else name


def damaged_bytes(content: bytes, draw: random.Random) -> bytes:
    """Cut, flip, overwrite, repeat, move or inflate."""
    at, end, to = sorted(draw.randrange(len(content) + 1) for _ in range(3))
    how = draw.randrange(6)
    if how == 0:
        return content[:at]
    if how == 1:
        flipped = bytearray(content)
        for _ in range(draw.choice([1, 1, 4, 30])):
            flipped[draw.randrange(min(len(flipped), draw.choice([200, 10**9])))] ^= 1 << draw.randrange(8)
        return bytes(flipped)
    if how == 2:
        return content[: draw.choice([0, 4, 8, 200])] + draw.randbytes(draw.randrange(600))
    if how == 3:
        return content[:at] + content[end:]
    if how == 4:
        return content[:to] + content[at:end] + content[to:]
    return content[:at] + bytes(draw.choice([1, 100, 100_000])) + content[at:]


def damaged_value(value: Any, draw: random.Random) -> Any:
    """Change one part of plain values to something odd, drop it, or add to it."""
    places: list[tuple[Any, Any]] = []

    def visit(part: Any) -> None:
        for key in list(part) if isinstance(part, dict) else range(len(part)) if isinstance(part, list) else ():
            places.append((part, key))
            visit(part[key])

    visit(value)
    if not places or draw.random() < 0.05:
        return draw.choice(ODD)
    holder, key = draw.choice(places)
    how = draw.randrange(4)
    if how == 0:
        del holder[key]
    elif how == 1 and isinstance(holder, dict):
        holder[str(draw.choice(ODD))] = holder.pop(key)
    elif how == 2 and isinstance(holder[key], (int, float)):
        holder[key] = draw.choice([-holder[key], holder[key] + 1, holder[key] * 2**40])
    else:
        holder[key] = draw.choice(ODD)
    return value


def damaged_text(content: bytes, load: Callable, dump: Callable[[Any], str], draw: random.Random) -> bytes:
    """Change one value of a text; rarely, nest it deeply."""
    text = dump(damaged_value(load(content.decode()), draw))
    if draw.random() < 0.03:
        text = DEEP
    return text.encode("utf-8", "surrogatepass")


def damaged_header(content: bytes, draw: random.Random) -> bytes:
    """Change one value of the header of a safetensors file, or of the JSON within it."""
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    notes = header.get("__metadata__", {})
    inner = [key for key, text in notes.items() if text[:1] == "{"]
    if inner and draw.random() < 0.6:
        key = draw.choice(inner)
        notes[key] = damaged_text(notes[key].encode(), json.loads, json.dumps, draw).decode("utf-8", "replace")
    else:
        header = damaged_value(header, draw)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + content[8 + size :]


def damaged_archive(content: bytes, draw: random.Random) -> bytes:
    """Change a record of a zip archive, which then has the checksum of what it holds; drop it, or compress it."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as archive, zipfile.ZipFile(out, "w") as damaged:
        records = [(info.filename, archive.read(info)) for info in archive.infolist()]
        weights = [5 if name.endswith(".pkl") else 1 for name, _ in records]
        target = draw.choices(range(len(records)), weights)[0]
        for i, (name, record) in enumerate(records):
            if i == target:
                if draw.random() < 0.1:
                    continue
                record = damaged_bytes(record, draw) if record else draw.randbytes(9)
                record += bytes(draw.choice([0, 0, 0, 10**8]))
            compressed = zipfile.ZIP_DEFLATED if len(record) > 10**6 or draw.random() < 0.05 else zipfile.ZIP_STORED
            damaged.writestr(name, record, compressed)
    return out.getvalue()


def damage(path: Path, draw: random.Random) -> None:
    """Damage a file as its format invites it, or any bytes of it."""
    content = path.read_bytes()
    if draw.random() < 0.4:
        path.write_bytes(damaged_bytes(content, draw))
    elif path.suffix == ".safetensors":
        path.write_bytes(damaged_header(content, draw))
    elif content[:2] == b"PK":
        path.write_bytes(damaged_archive(content, draw))
    elif path.suffix == ".yaml":
        path.write_bytes(damaged_text(content, yaml.safe_load, yaml.safe_dump, draw))
    elif content[:1] in (b"{", b"["):
        path.write_bytes(damaged_text(content, json.loads, json.dumps, draw))
    else:
        path.write_bytes(damaged_bytes(content, draw))


def outcome(number: int, seed: int, folder: Path) -> str:
    """Make and read an input: ``result``, ``sentence``, or what else became of it."""
    kind = KINDS[kind_of(number)]
    draw = random.Random(f"{seed} {number}")
    random.seed(number)
    shutil.copytree(folder / kind_of(number), here := Path(tempfile.mkdtemp(dir=folder)), dirs_exist_ok=True)
    os.chdir(here)
    try:
        damage(draw.choice(sorted(path for pattern in kind.files for path in Path().glob(pattern))), draw)
        _limit()
        kind.read()
    except MergeError as error:
        return "sentence" if all(problem.isprintable() for problem in error.problems) else f"not printable: {error}"
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)
        ours = next((frame for frame in reversed(where) if "lightning_merge" in frame.filename), where[-1])
        said = (str(error).splitlines() or [""])[0][:100]
        return f"{type(error).__name__}: {said} ({Path(ours.filename).name}:{ours.lineno})"
    finally:
        os.chdir(folder)
        shutil.rmtree(here)
    return "result"


def _limit() -> None:
    """Give this process 5 more seconds of CPU time and 500 more MB."""
    page = resource.getpagesize()
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * page
    resource.setrlimit(resource.RLIMIT_AS, (mapped + BYTES, resource.RLIM_INFINITY))
    used = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
    resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(used) + SECONDS, resource.RLIM_INFINITY))


def run(numbers: Sequence[int], seed: int = 0) -> Iterator[tuple[int, str]]:
    """Read inputs in forked processes; yields the outcome of each."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name, _within(Path(name)) as folder:
        for kind in sorted({kind_of(number) for number in numbers}):
            (folder / kind).mkdir()
            os.chdir(folder / kind)
            KINDS[kind].make()
            KINDS[kind].read()  # what is good is read, and what it takes is imported
        os.chdir(folder)
        waiting = list(numbers)
        while waiting:
            done = 0
            for number, said in _forked(waiting[:CHUNK], seed, folder):
                yield number, said
                done += 1
            if done < len(waiting[:CHUNK]):
                yield waiting[done], f"killed: more than {SECONDS} s of CPU time, or a crash"
                done += 1
            waiting = waiting[done:]


def _forked(numbers: Iterable[int], seed: int, folder: Path) -> Iterator[tuple[int, str]]:
    """Yield the outcomes of inputs until the process that reads them ends."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.close(read)
        silent = os.open(os.devnull, os.O_WRONLY)
        for stream in (1, 2):
            os.dup2(silent, stream)
        warnings.simplefilter("ignore")
        with open(write, "w") as out, contextlib.suppress(BaseException):
            sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
            for number in numbers:
                out.write(json.dumps([number, outcome(number, seed, folder)]) + "\n")
                out.flush()
        os._exit(0)
    os.close(write)
    with open(read) as lines:
        yield from (tuple(json.loads(line)) for line in lines)
    os.waitpid(child, 0)


@contextlib.contextmanager
def _within(folder: Path) -> Iterator[Path]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield folder
    finally:
        os.chdir(before)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the study."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, nargs="*", help="numbers of inputs to run again")
    options = parser.parse_args(arguments)
    numbers = options.only if options.only is not None else range(options.count)
    started, counts, faults = time.perf_counter(), {kind: Counter() for kind in KINDS}, 0
    for number, said in run(numbers, options.seed):
        counts[kind_of(number)][said if said in GOOD else "fault"] += 1
        if said not in GOOD:
            faults += 1
            print(f"- {kind_of(number)}, input {number}: {said}", flush=True)  # noqa: T201
    columns = ("sentence", "result", "fault")
    print("| kind | " + " | ".join(columns) + " |\n|---|" + "--:|" * len(columns))  # noqa: T201
    for kind, count in counts.items():
        print(f"| {kind} | " + " | ".join(str(count[column]) for column in columns) + " |")  # noqa: T201
    print(f"\n{len(numbers)} inputs in {time.perf_counter() - started:.0f} s, {faults} faults")  # noqa: T201


if __name__ == "__main__":
    main()
