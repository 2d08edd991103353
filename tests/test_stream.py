"""Sets that are read from disk: the same samples as from memory, by any number of workers."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, read_params, tiny, write_params
from PIL import Image
from suites import slow

from pipelines import config
from pipelines.config import ConfigError, Recipe, Sliding, Training
from pipelines.datasets import folder, transforms
from pipelines.datasets.folder import Meta, Split, Stream
from pipelines.engine import pack as pack_module
from pipelines.engine import train as train_module
from pipelines.engine.evaluate import evaluate, slide
from pipelines.engine.pack import run_cell
from pipelines.engine.train import Trainee, optimizers
from pipelines.method import Distiller, MethodConfig
from pipelines.methods import checked
from pipelines.networks import SegmentationNetwork
from pipelines.runs import records
from pipelines.runs.fingerprint import outdated
from pipelines.runs.records import Cell, teacher_cell

META = Meta("mixed", ("a", "b", "c"), ((0, 0, 0), (255, 0, 0), (0, 255, 0)), 255)
COUNTS = {"train": 7, "val": 3, "test": 3}
LIVELY = {"scale": (0.5, 2.0), "flip": 0.5, "brightness": 0.4, "contrast": 0.4, "saturation": 0.3, "hue": 0.1}


def build(root: Path, sizes: list[tuple[int, int]], counts: dict[str, int] = COUNTS) -> Path:
    """A set of images that look like their labels; every third image is a JPEG."""
    draw, number = np.random.default_rng(0), 0
    for split, count in counts.items():
        for kind in ("", "annot"):
            (root / f"{split}{kind}").mkdir(parents=True)
        lines = []
        for index in range(count):
            height, width = sizes[number % len(sizes)]
            label = np.kron(draw.integers(0, 3, (4, 4)), np.ones((height // 4, width // 4))).astype(np.uint8)
            noise = draw.normal(0, 20, (height, width, 3))
            pixels = np.clip(np.asarray(META.palette)[label] * 0.6 + 50 + noise, 0, 255).astype(np.uint8)
            label[:2] = 255
            end = "jpg" if number % 3 == 2 else "png"
            Image.fromarray(pixels).save(root / split / f"{index}.{end}")
            Image.fromarray(label).save(root / f"{split}annot" / f"{index}.png")
            lines.append(f"{split}/{index}.{end} {split}annot/{index}.png\n")
            number += 1
        (root / f"{split}.txt").write_text("".join(lines))
    folder.write_description(root, META)
    return root


def training(steps: int = 4, crop: tuple[int, int] = (32, 48), **more: Any) -> Training:
    values = read_params()["benchmarks"]["streets"]["training"]
    return Training.model_validate(
        values | {"steps": steps, "batch_size": 3, "crop": crop, "augmentation": LIVELY} | more
    )


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of three sizes, some larger and some smaller than the crop. Do not change it."""
    return build(tmp_path_factory.mktemp("data") / "mixed", [(40, 64), (64, 48), (24, 32)])


@pytest.fixture
def streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Split, Path]:
    """A set of one size as it is in memory, and its folder, which is now too large for it."""
    root = build(tmp_path / "data" / "even", [(40, 64)])
    split = folder.load(root, "train")
    assert isinstance(split, Split)
    monkeypatch.setattr(folder, "IN_MEMORY", 1)
    return split, root


def batches(
    split: Any, seed: int = 3, start: int = 0, **more: Any
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return list(transforms.training_batches(split, training(**more), 255, seed, start))


def equal(first: list[tuple[torch.Tensor, ...]], second: list[tuple[torch.Tensor, ...]]) -> bool:
    pairs = zip(sum(first, ()), sum(second, ()), strict=True)
    return all(torch.equal(one, two) for one, two in pairs)


def test_sizes_decide_what_is_streamed(mixed: Path) -> None:
    description = folder.check(mixed)
    assert description.size is None and description.streamed
    stream = folder.load(mixed, "val")
    assert isinstance(stream, Stream) and stream.names == ["val/0.png", "val/1.jpg", "val/2.png"]
    for index, (image, label) in enumerate(stream.batches(16)):
        path = mixed / stream.names[index]
        assert np.array_equal(image[0].permute(1, 2, 0), np.asarray(Image.open(path)))
        assert np.array_equal(label[0], np.asarray(Image.open(mixed / "valannot" / f"{path.stem}.png")))


def test_a_stream_gives_the_batches_of_memory(streamed: tuple[Split, Path]) -> None:
    split, root = streamed
    stream = folder.load(root, "train")
    assert isinstance(stream, Stream)
    for augmentation in (LIVELY, LIVELY | {"scale": (1.0, 1.0)}, LIVELY | {"scale": (0.1, 0.3)}):
        for (a, b), (c, d) in zip(
            batches(split, augmentation=augmentation),
            batches(stream, augmentation=augmentation),
            strict=True,
        ):
            assert torch.equal(b, d)
            torch.testing.assert_close(a, c, rtol=1e-5, atol=2e-5)


def test_workers_and_a_later_start_change_no_bit(mixed: Path) -> None:
    whole = batches(folder.load(mixed, "train", 0))
    assert [labels.shape for _, labels in whole] == [(3, 32, 48)] * 4
    for workers in (1, 3):
        again = batches(folder.load(mixed, "train", workers))
        assert equal(whole, again)
    late = batches(folder.load(mixed, "train", 2), start=2)
    assert equal(whole[2:], late)
    assert not torch.equal(whole[0][0], batches(folder.load(mixed, "train"), seed=4)[0][0])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("how", ["missing", "altered", "truncated"])
def test_damage_is_one_sentence(mixed: Path, tmp_path: Path, workers: int, how: str) -> None:
    root = Path(shutil.copytree(mixed, tmp_path / "data" / "mixed"))
    stream = folder.load(root, "train", workers)
    file = root / "train/3.png"
    content = bytearray(file.read_bytes())
    content[60] ^= 1
    file.write_bytes({"altered": bytes(content), "truncated": bytes(content[:-9]), "missing": b""}[how])
    if how == "missing":
        file.unlink()
        with pytest.raises(ConfigError, match=r"data/mixed is not what was fetched \(missing: train/3.png\)"):
            folder.load(root, "train")
    with pytest.raises(ConfigError) as caught:
        batches(stream)
    assert str(caught.value).startswith(
        f"The data in data/mixed is not what was fetched ({how}: train/3.png)."
    )
    assert "\n" not in str(caught.value) and "Traceback" not in str(caught.value)


def run_script(script: str, root: Path) -> str:
    """What a process of its own prints about the set in ``root``."""
    command = [sys.executable, "-c", script, str(root)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@slow
def test_memory_does_not_grow_with_the_set(tmp_path: Path) -> None:
    root = build(tmp_path / "data" / "large", [(512, 640), (640, 512)], {"train": 90, "val": 1, "test": 1})
    script = (
        "import resource, sys; from pathlib import Path; import torch; torch.set_num_threads(1)\n"
        "from pipelines.datasets import folder\n"
        "stream = folder.load(Path(sys.argv[1]), 'train')\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "for index, batch in enumerate(stream.batches(16)):\n"
        "    if index == 5: before = peak()\n"
        "print(index + 1, peak() - before)\n"
    )
    count, grown = map(int, run_script(script, root).split())
    assert count == 90
    assert grown / (2**20 if sys.platform == "darwin" else 2**10) < 40  # MB; all pixels are 112


def test_a_daemon_reads_with_processes(tmp_path: Path) -> None:
    """As the workers of Dask are, which Python lets start no process."""
    root = build(tmp_path / "data" / "large", [(32, 48), (48, 32)], {"train": 6, "val": 1, "test": 1})
    script = (
        "import multiprocessing, sys; from pathlib import Path; from pipelines.datasets import folder\n"
        "def read(): print(len(list(folder.load(Path(sys.argv[1]), 'train', 2).batches(2))), flush=True)\n"
        "process = multiprocessing.get_context('fork').Process(target=read, daemon=True)\n"
        "process.start(); process.join(); sys.exit(process.exitcode)"
    )
    assert run_script(script, root) == "6\n"


# ---- evaluation


def network(classes: int = 3) -> SegmentationNetwork:
    torch.manual_seed(0)
    entry = config.load().student("pspnet-resnet18")
    return SegmentationNetwork(entry, classes)


def test_counts_are_those_of_memory(streamed: tuple[Split, Path]) -> None:
    split, root = streamed
    student = network()
    counts = evaluate(student, split, 3, 255, training())
    assert counts.sum() == (split.labels != 255).sum()
    for workers in (0, 2):
        assert np.array_equal(
            evaluate(student, folder.load(root, "train", workers), 3, 255, training()), counts
        )


class Local(torch.nn.Module):
    """Its logits are the image: what a window shows is what the whole image shows there."""

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": images}


class Counting(torch.nn.Module):
    """Class 1 wins where the mean of the window numbers is above 0.5: windows are numbered 0, 1, 2, …"""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, ...]] = []

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        number = float(len(self.seen))
        self.seen.append(tuple(images.shape))
        return {"logits": torch.stack([0.5 * torch.ones_like(images[:, 0]), number + 0 * images[:, 0]], 1)}


@pytest.mark.parametrize(
    ("window", "stride"), [((8, 8), (8, 8)), ((8, 12), (5, 7)), ((99, 8), (3, 3)), ((99, 99), (1, 1))]
)
def test_windows_cover_every_pixel(window: tuple[int, int], stride: tuple[int, int]) -> None:
    images = torch.randn(2, 5, 21, 30)
    sliding = Sliding(window=window, stride=stride)
    assert torch.equal(slide(Local(), images, sliding), images.argmax(1))  # type: ignore[arg-type]


def test_overlapping_windows_are_averaged() -> None:
    net = Counting()
    found = slide(net, torch.zeros(1, 3, 4, 10), Sliding(window=(4, 6), stride=(4, 4)))  # type: ignore[arg-type]
    assert net.seen == [(1, 3, 4, 6)] * 2  # columns 0–5 and 4–9
    # window 0 alone: 0 < 0.5; both: 0.5 ties with 0.5, and the lower class wins; window 1 alone: 1 > 0.5
    assert found[0, 0].tolist() == [0] * 6 + [1] * 4


def test_a_window_as_large_as_the_image_is_the_whole_image(streamed: tuple[Split, Path]) -> None:
    split, _ = streamed
    student = network()
    whole = evaluate(student, split, 3, 255, training())
    windows = [{"window": [40, 64], "stride": [8, 8]}, {"window": [32, 32], "stride": [16, 16]}]
    same, other = (evaluate(student, split, 3, 255, training(sliding=sliding)) for sliding in windows)
    assert np.array_equal(same, whole) and not np.array_equal(other, whole)


def test_a_stride_beyond_the_window_is_refused() -> None:
    with pytest.raises(ValueError, match="leaves pixels out"):
        Sliding(window=(8, 8), stride=(9, 8))


# ---- a cell


def test_a_recipe_replaces_the_optimiser_of_the_protocol() -> None:
    recipe = Recipe(optimizer="adamw", lr=6e-5, weight_decay=0.01, auxiliary_weight=0.0)
    student, method = network(), Distiller(MethodConfig(), {}, {})
    main = optimizers(student, method, training(), recipe)["main"]
    assert isinstance(main, torch.optim.AdamW)
    assert (main.param_groups[0]["lr"], main.param_groups[0]["weight_decay"]) == (6e-5, 0.01)
    assert isinstance(optimizers(student, method, training(), None)["main"], torch.optim.SGD)


def test_a_cell_of_a_streamed_set(mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Teacher and student, two workers and none, killed and resumed: the same weights."""
    monkeypatch.setattr(train_module, "LOG_EVERY", 1)
    monkeypatch.setattr(train_module, "SAVE_EVERY", 0.0)
    monkeypatch.setattr(train_module, "SAVE_SHARE", 0.0)
    raw = tiny(read_params())
    raw["students"]["pspnet-resnet18"]["recipe"] = {
        "optimizer": "adamw", "lr": 1e-4, "weight_decay": 0.01, "auxiliary_weight": 0.4
    }  # fmt: skip
    cell, sums, steps = Cell("streets", "pspnet-resnet18", "cwd", 0), [], list[int]()
    real = Trainee.advance

    def killed(self: Trainee, *args: Any) -> float:
        steps.append(self.step)
        if steps == [0, 1, 2]:
            raise KeyboardInterrupt
        return real(self, *args)

    for workers in (0, 2):
        root = tmp_path / str(workers)
        shutil.copytree(mixed, root / "data" / "streets")
        raw["suite"]["workers"] = workers
        write_params(root, raw)
        params = checked(config.load(root / "params.yaml"))
        run_cell(teacher_cell(params, "streets"), params, root)
        if workers:
            monkeypatch.setattr(Trainee, "advance", killed)
            with pytest.raises(KeyboardInterrupt):
                run_cell(cell, params, root)
        run_cell(cell, params, root)
        record = records.read(cell, root)
        assert record is not None
        assert record.run["student"]["input"] == list(params.benchmark("streets").training.crop)
        assert record.run["config"]["network"]["recipe"]["optimizer"] == "adamw"
        assert outdated([record], params) == {}
        sums.append((record.run["weights_sha256"], record.metrics))
    assert sums[0] == sums[1]
    assert steps == [0, 1, 2, 2, 3, 4, 5]  # it went on from there


def test_the_memory_of_the_workers_is_said_and_must_be_there(
    mixed: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Each holds two batches, of float32 images and int64 labels, and the training one."""
    params = checked(config.load())
    training = params.benchmark("streets").training
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    stream = folder.load(mixed, "train", 2)
    assert isinstance(stream, Stream)
    height, width = training.crop
    batch = training.batch_size * height * width * 20 / 2**20
    wanted, free = (2 * stream.processes + 1) * batch, [2**40]
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(pack_module, "SHARED", Path("/"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=free[0]))
    caplog.set_level("INFO")
    pack_module._check_memory(stream, training, "streets")
    assert f"up to {2 * stream.processes + 1} batches of {batch:.1f} MB are in memory" in caplog.text
    free[0] = int(3.5 * batch * 2**20)  # as a container might have it
    with pytest.raises(ConfigError, match=rf"need {wanted:,.0f} MB of shared memory .* to 1 in params"):
        pack_module._check_memory(stream, training, "streets")


def test_sixteen_bit_or_gray_jpegs_are_refused(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(buffer, "JPEG")
    with pytest.raises(ConfigError, match="has the mode L"):
        folder.decode(buffer.getvalue(), "train/x.jpg", "RGB")
    with pytest.raises(ConfigError, match="damaged or cut off"):
        folder.decode(buffer.getvalue()[:-30], "train/x.jpg", "L")
