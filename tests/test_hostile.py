"""Hostile input: every door answers with a value or with one short sentence; nothing in a file is executed,
nothing is written outside, nothing needs a network.

A few inputs run with the other tests; with ACFD_TORTURE thousands.
"""

from __future__ import annotations

import copy
import hashlib
import io
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import OFFLINE, ROOT, TALLY, read_params, tiny, write_params
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from PIL import ExifTags, Image
from suites import TORTURE, slow, varied

from pipelines import config, files
from pipelines.config import ConfigError, Params
from pipelines.datasets import camvid, folder, pixels, writer
from pipelines.engine import checkpoint
from pipelines.methods import checked
from pipelines.networks import read_state
from pipelines.reports import table
from pipelines.runs import counts, records
from pipelines.runs.records import Cell
from pipelines.stages import report
from pipelines.stages.fetch import fetch

pytestmark = varied
COMMON: dict[str, Any] = {
    "deadline": None,
    "derandomize": not TORTURE,
    "database": None,
    "suppress_health_check": list(HealthCheck),
}


def tried(many: int) -> settings:
    return settings(max_examples=many if TORTURE else max(30, many // 100), **COMMON)


def short(error: ConfigError) -> str:
    text = str(error)
    assert "\n" not in text and 20 < len(text) < 1500, text
    return text


# ---- params.yaml

WORDS = st.text(max_size=20) | st.sampled_from(["teacher", "../x", "a" * 500, "1e-3", "\x00", "-"])
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | WORDS
    | st.dates()
    | st.sampled_from([0, -1, 2**31, 2**63, 10**400, float("nan"), float("inf")])
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(WORDS | st.integers(), inner, max_size=4),
)
PARAMS = read_params()


def places(value: Any, above: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [above, *(place for key, item in inner for place in places(item, (*above, key)))]


PLACES = places(PARAMS)[1:]


@st.composite
def changed_params(draw: Any) -> Any:
    """params.yaml with values replaced, removed, renamed or added at random places."""
    raw = copy.deepcopy(PARAMS)
    for _ in range(draw(st.integers(1, 3))):
        place, kind = draw(st.sampled_from(PLACES)), draw(st.sampled_from(["replace", "remove", "add"]))
        owner = raw
        try:
            for key in place[:-1]:
                owner = owner[key]
            if kind == "replace":
                owner[place[-1]] = draw(VALUES)
            elif kind == "remove":
                del owner[place[-1]]
            else:
                owner[draw(WORDS)] = owner[place[-1]]
        except (KeyError, IndexError, TypeError):  # an earlier change has taken it away
            continue
    return raw


def loads(path: Path) -> bool:
    try:
        found = checked(config.load(path))
    except ConfigError as error:
        short(error)
        return False
    assert isinstance(found, Params)
    return True


def test_params_with_hostile_values(tmp_path: Path) -> None:
    path, count = tmp_path / "params.yaml", [0, 0]

    @tried(600)
    @given(changed_params())
    def fuzz(raw: Any) -> None:
        path.write_text(yaml.safe_dump(raw, sort_keys=False, allow_unicode=True), encoding="utf-8")
        count[loads(path)] += 1

    fuzz()
    assert count[0]
    TALLY.append(f"hostile, values in params.yaml: {sum(count)} inputs: {count[0]} refused by one sentence")


def test_params_with_hostile_text(tmp_path: Path) -> None:
    path, count = tmp_path / "params.yaml", [0, 0]
    whole = (ROOT / "params.yaml").read_bytes()

    @tried(1000)
    @given(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 9), st.binary(max_size=12)), max_size=3))
    def fuzz(changes: list[tuple[float, int, bytes]]) -> None:
        content = whole
        for share, removed, added in changes:
            at = int(share * len(content))
            content = content[:at] + added + content[at + removed :]
        path.write_bytes(content)
        count[loads(path)] += 1

    fuzz()
    assert all(count)
    TALLY.append(f"hostile, text of params.yaml: {sum(count)} inputs: {count[0]} refused by one sentence")


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [*a]",
        "&a {suite: *a}",
        "[" * 20_000,
        "{suite: {benchmarks: " + "[" * 500 + "]" * 500 + "}}",
        "a: &a [x,x,x,x,x,x,x,x,x]\n"
        + "".join(
            f"b{i}: &b{i} [{','.join([f'*{p}'] * 9)}]\n"
            for i, p in enumerate(["a", *(f"b{k}" for k in range(8))])
        ),
        "suite: !!python/object/apply:os.system ['touch executed']",
        "suite: 2001-99-99",
        "suite: " + "9" * 5000,
        "\x00",
        "suite: {}\nsuite: {}",
        "- " * 3000,
        "",
    ],
)
def test_yaml_that_breaks_readers(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_text(text)
    assert not loads(tmp_path / "params.yaml")
    assert not (tmp_path / "executed").exists()


# ---- images and labels


def png(array: np.ndarray, **options: Any) -> bytes:
    output = io.BytesIO()
    Image.fromarray(array).save(output, options.pop("format", "PNG"), **options)
    return output.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def claimed(width: int, height: int, depth: int = 8, colour: int = 2, data: bytes = b"") -> bytes:
    """A PNG of right sums whose header says anything."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")
    return pixels.PNG_START + body


RGB = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)
GRAY = RGB[:, :, 0] % 3
IMAGE, LABEL = png(RGB), png(GRAY)


def converted(mode: str, array: np.ndarray = RGB, **options: Any) -> bytes:
    output = io.BytesIO()
    Image.fromarray(array).convert(mode).save(output, options.pop("format", "PNG"), **options)
    return output.getvalue()


HOSTILE = {
    "zero bytes": b"",
    "signature alone": pixels.PNG_START,
    "header alone": IMAGE[:33],
    "half": IMAGE[: len(IMAGE) // 2],
    "without its end": IMAGE[:-12],
    "trailing garbage": IMAGE + b"garbage",
    "twice": IMAGE + IMAGE,
    "text": b"<svg onload=alert(1)>",
    "palette": converted("P"),
    "alpha": converted("RGBA"),
    "gray and alpha": converted("LA"),
    "one bit": converted("1"),
    "four bits": claimed(8, 6, 4, 0, b"\0\x12\x34\x56\x78" * 6),
    "16 bit gray": png(RGB[:, :, 0].astype(np.uint16) * 257),
    "16 bit colour": claimed(2, 2, 16, 2, b"\0" * 26),
    "a palette that is missing": claimed(8, 6, 8, 3, b"\0" * 54),
    "zero width": claimed(0, 6),
    "huge": claimed(2**31 - 1, 2**31 - 1),
    "large beyond the limit": claimed(2**13, 2**13 + 1),
    "long and thin": claimed(2**26 + 1, 1),
    "larger than its data": claimed(4000, 4000, data=b"\0" * 100),
    "no pixels": claimed(8, 6),
    "unknown colour type": claimed(8, 6, 8, 5, b"\0" * 54),
    "a chunk that claims 4 GB": pixels.PNG_START + b"\xff\xff\xff\xffIHDR" + IMAGE[16:],
    "a decompression bomb in its text": IMAGE[:33]
    + chunk(b"zTXt", b"a\0\0" + zlib.compress(b"a" * 2**27, 9))
    + IMAGE[33:],
    **{name: png(RGB, format=name) for name in ("JPEG", "GIF", "BMP", "TIFF", "PPM", "WEBP")},
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("kind", ["train/x.png", "trainannot/x.png", "train/x.jpg"])
def test_hostile_images_are_one_sentence(name: str, kind: str) -> None:
    if (name, kind) == ("JPEG", "train/x.jpg"):
        pytest.skip("is what it says")
    with pytest.raises(ConfigError) as error:
        folder.decode(HOSTILE[name], kind, "L" if "annot" in kind else "RGB")
    said = short(error.value)
    assert kind in said
    if name in ("huge", "large beyond the limit", "long and thin") and kind.endswith(".png"):
        assert "has more than 67,108,864 pixels" in said
    if name in ("JPEG", "GIF", "BMP", "TIFF", "PPM", "WEBP"):
        assert f"is a {name} by its content: save it as {'PNG' if kind.endswith('.png') else 'JPEG'}." in said


def test_the_smallest_image_is_an_image() -> None:
    assert folder.decode(png(RGB[:1, :1]), "train/x.png", "RGB").shape == (1, 1, 3)
    assert folder.decode(png(GRAY[:1, :1]), "trainannot/x.png", "L").shape == (1, 1)


def test_a_jpeg_of_absurd_size_is_one_sentence() -> None:
    content = bytearray(png(RGB, format="JPEG"))
    at = content.index(b"\xff\xc0") + 5  # height and width in the frame header
    for size in (struct.pack(">HH", 65535, 65535), struct.pack(">HH", 8192, 8193)):
        content[at : at + 4] = size
        with pytest.raises(ConfigError, match=r"train/x.jpg has more than 67,108,864 pixels"):
            folder.decode(bytes(content), "train/x.jpg", "RGB")


def decoded(content: bytes, path: str, mode: str) -> bool:
    try:
        found = folder.decode(content, path, mode)
    except ConfigError as error:
        short(error)
        return False
    assert found.dtype == np.uint8 and found.ndim == (3 if mode == "RGB" else 2)
    return True


PARTS = (b"PLTE", b"tRNS", b"IDAT")


def resummed(content: bytes, without: bytes | None = None) -> bytes:
    """A PNG whose chunks have right sums again, perhaps without those of one name."""
    at, parts = 8, [content[:8]]
    while at + 12 <= len(content):
        length = int.from_bytes(content[at : at + 4], "big")
        if (name := content[at + 4 : at + 8]) != without:
            parts.append(chunk(name, content[at + 8 : at + 8 + length]))
        at += 12 + length
    return b"".join(parts)


@pytest.mark.parametrize("path", ["train/x.png", "trainannot/x.png", "train/x.jpg"])
def test_images_with_hostile_bytes(path: str) -> None:
    """Bytes changed as they come, or inside the chunks of a PNG whose sums are then right again."""
    mode = "L" if "annot" in path else "RGB"
    whole = png(RGB, format="JPEG") if path.endswith("jpg") else IMAGE if mode == "RGB" else LABEL
    count = [0, 0]

    @tried(2000)
    @given(
        st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=4),
        st.floats(0, 1),
        st.sampled_from(["bytes", "chunks", "cut"]),
    )
    def fuzz(flips: list[tuple[float, int]], share: float, how: str) -> None:
        content = bytearray(whole)
        for place, value in flips:
            content[int(place * len(content))] = value
        if how == "cut":
            del content[int(share * len(content)) :]
        made = resummed(bytes(content)) if how == "chunks" and path.endswith("png") else bytes(content)
        count[decoded(made, path, mode)] += 1

    fuzz()
    assert count[0]
    TALLY.append(f"hostile, bytes of {path}: {sum(count)} inputs: {count[0]} refused by one sentence")


def oriented() -> bytes:
    """A JPEG that says how it was held."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    exif[ExifTags.Base.Make] = "a camera"
    buffer = io.BytesIO()
    Image.fromarray(RGB).save(buffer, "JPEG", exif=exif)
    return buffer.getvalue()


def paletted() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(RGB).quantize(16).save(buffer, "PNG", transparency=3)
    return buffer.getvalue()


def test_images_of_users_with_hostile_bytes(tmp_path: Path) -> None:
    """What fetch takes in, before it is a file of ours: any mode, palettes, EXIF."""
    taken = writer.Writer(tmp_path / "taken", (4, 4), upright=True)
    sources, count = [oriented(), paletted(), IMAGE, LABEL], [0, 0]

    @tried(2000)
    @given(
        st.sampled_from(range(len(sources))),
        st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=4),
        st.sampled_from([*PARTS, None]),
    )
    def fuzz(which: int, flips: list[tuple[float, int]], without: bytes | None) -> None:
        content = bytearray(sources[which])
        for place, value in flips:
            content[int(place * len(content))] = value
        made = resummed(bytes(content), without) if which else bytes(content)
        for take in (
            lambda: taken.image("train", f"x{sum(count)}", made, "train/x"),
            lambda: writer.indices(made, "trainannot/x"),
        ):
            try:
                take()
                count[0] += 1
            except ConfigError as error:
                count[1] += 1
                assert re.search(
                    r"x (has (the mode|transp|more)|is (damaged|no image|a [JP])|holds \d+ p)",
                    short(error),
                )

    fuzz()
    assert min(count)
    TALLY.append(f"hostile, images of users: {sum(count)} inputs: {count[1]} refused by one sentence")


def test_a_palette_image_without_its_palette_is_one_sentence(tmp_path: Path) -> None:
    content = claimed(8, 6, 8, 3, b"\0" * 54)
    content = content[:33] + chunk(b"tRNS", b"\0") + content[33:]
    with pytest.raises(ConfigError, match=r"^mine\.png is damaged or cut off: it has no palette"):
        writer.Writer(tmp_path / "taken", (4, 4)).image("train", "x", content, "mine.png")


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A benchmark folder of one sample a split, whose description is still to be written."""
    root = tmp_path / "data" / "small"
    for number, split in enumerate(folder.SPLITS):
        (root / split).mkdir(parents=True)
        (root / f"{split}annot").mkdir()
        (root / split / "0.png").write_bytes(png(np.roll(RGB, number, 0)))
        (root / f"{split}annot" / "0.png").write_bytes(LABEL)
        (root / f"{split}.txt").write_text(f"{split}/0.png {split}annot/0.png\n")
    return root


META = folder.Meta("small", ("a", "b", "c"), ((0, 0, 0), (1, 1, 1), (2, 2, 2)), 255)


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("which", ["val/0.png", "valannot/0.png"])
def test_no_hostile_file_gets_into_a_benchmark(name: str, which: str, small: Path) -> None:
    (small / which).write_bytes(HOSTILE[name])
    with pytest.raises(ConfigError) as error:
        folder.write_description(small, META)
        folder.check(small)
    assert which in short(error.value)


# ---- lists

LINES = [
    "",
    " ",
    "../x.png trainannot/0.png",
    "train/../../x.png trainannot/0.png",
    "/etc/passwd trainannot/0.png",
    "train//etc/passwd trainannot/0.png",
    "train/0.png /etc/passwd",
    "train/0.png train/0.png",
    "train/0.png trainannot/0.png extra",
    "train/0.png",
    "train/.png trainannot/0.png",
    "train/.hidden.png trainannot/0.png",
    "train/0.png\x00 trainannot/0.png",
    "train/0.PNG trainannot/0.png",
    "train/0.png trainannot/0.jpg",
    "train\\0.png trainannot/0.png",
    "train/$(id).png trainannot/0.png",
    "\ufefftrain/0.png trainannot/0.png",
    "<script>alert(1)</script>",
    "x" * 100_000,
]


@pytest.mark.parametrize("line", LINES, ids=range(len(LINES)))
def test_hostile_lines_of_a_split_list(line: str, small: Path) -> None:
    (small / "train.txt").write_text(f"train/0.png trainannot/0.png\n{line}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"Line 2 of data/small/train\.txt") as error:
        folder.write_description(small, META)
    assert len(short(error.value)) < 400
    assert not (small / folder.DESCRIPTION).exists()


@pytest.mark.parametrize("content", [b"\xff\xfe\x00t", b"train/\xe4.png trainannot/0.png\n", b"", b"\n"])
def test_a_split_list_of_another_encoding(content: bytes, small: Path) -> None:
    (small / "train.txt").write_bytes(content)
    with pytest.raises(ConfigError, match=r"data/small/train\.txt") as error:
        folder.write_description(small, META)
    short(error.value)


def test_a_sample_that_stands_twice(small: Path) -> None:
    (small / "train.txt").write_text("train/0.png trainannot/0.png\n" * 2)
    folder.write_description(small, META)
    with pytest.raises(ConfigError, match="is named twice"):
        folder.check(small)


def test_split_lists_of_any_text(small: Path) -> None:
    count = [0, 0]
    names = st.lists(
        st.sampled_from(["..", ".", "/", "0", "a-b", "_c", "\\", " ", "\n", "\0", "é", "$"])
        | st.text(max_size=1),
        max_size=4,
    ).map("".join)
    lines = st.builds(
        "{}{}.{} {}{}.png\n".format,
        st.sampled_from(["train/"] * 4 + ["val/", "/", ""]),
        names,
        st.sampled_from(["png", "jpg", "gif"]),
        st.sampled_from(["trainannot/"] * 4 + [""]),
        names,
    )

    @tried(2000)
    @given(st.lists(lines, max_size=2).map("".join))
    def fuzz(text: str) -> None:
        (small / "train.txt").write_bytes(text.encode("utf-8", "surrogatepass"))
        try:
            pairs = folder.read_list(small, "train")
        except ConfigError as error:
            short(error)
            count[0] += 1
            return
        count[1] += 1
        for path in (path for pair in pairs for path in pair):
            assert (small / path).resolve().is_relative_to(small) and ".." not in path.split("/")

    fuzz()
    assert count[0] and (count[1] or not TORTURE)
    TALLY.append(f"hostile, split lists: {sum(count)} inputs: {count[0]} refused by one sentence")


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.update(classes=[]),
        lambda d: d.update(classes=["a"] * 300),
        lambda d: d.update(classes="abc"),
        lambda d: d.update(ignore_index=-1),
        lambda d: d.update(ignore_index=256),
        lambda d: d.update(ignore_index=1e300),
        lambda d: d.update(palette=[[0, 0]]),
        lambda d: d.update(palette=[[0, 0, 999]]),
        lambda d: d.update(size=[0, 5]),
        lambda d: d.update(size=[5]),
        lambda d: d.update(size={"a": 1}),
        lambda d: d.update(splits={"train": 1}),
        lambda d: d.update(splits={"train": -1, "val": 1, "test": 1}),
        lambda d: d.update(splits={"train": 1, "val": 1, "tset": 1}),
        lambda d: d.update(files=[]),
        lambda d: d.update(files={"a": "b"}),
        lambda d: d.update(files={"a": None}),
        lambda d: d.pop("name"),
        lambda d: d.clear(),
    ],
    ids=range(19),
)
def test_hostile_descriptions(change: Callable[[dict[str, Any]], Any], small: Path) -> None:
    folder.write_description(small, META)
    place = small / folder.DESCRIPTION
    raw = json.loads(place.read_text())
    change(raw)
    place.write_text(json.dumps(raw))
    with pytest.raises(ConfigError, match=r"data/small/dataset\.json is damaged"):
        folder.describe(small)
    place.write_text("[" * 100_000)
    with pytest.raises(ConfigError, match=r"data/small/dataset\.json is damaged"):
        folder.describe(small)


# ---- CamVid


def camvid_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lists: str) -> Path:
    """A mirror whose sums are right: 3 samples, and the given train list."""
    source = tmp_path / "mirror" / "CamVid"
    for number, split in enumerate(folder.SPLITS):
        every = png((np.arange(48, dtype=np.uint8) % 12).reshape(6, 8))
        for name, content in ((split, png(np.roll(RGB, number, 0))), (f"{split}annot", every)):
            (source / name).mkdir(parents=True)
            (source / name / "0.png").write_bytes(content)
        line = f"/SegNet/CamVid/{split}/0.png /SegNet/CamVid/{split}annot/0.png\n"
        (source / f"{split}.txt").write_text(lists if split == "train" else line)
    manifest = tmp_path / "camvid.sha256"
    shipped = sorted(path for path in source.rglob("*") if path.is_file())
    manifest.write_text(
        "".join(f"{files.sha256(p.read_bytes())}  {p.relative_to(source).as_posix()}\n" for p in shipped)
    )
    monkeypatch.setattr(camvid, "MANIFEST", manifest)
    monkeypatch.setenv("ACFD_MIRROR", str(source))
    return source


@pytest.mark.parametrize(
    "lists",
    [
        "",
        "\n",
        "/SegNet/CamVid/train/0.png\n",
        "/SegNet/CamVid/train/0.png /SegNet/CamVid/trainannot/0.png /x/y\n",
        "a/../../0.png a/../../1.png\n",
        "../../evil.png ../../evil.png\n",
        "x/../0.png trainannot/0.png\n",
        "train/.. trainannot/..\n",
        "<script>\n",
    ],
)
def test_damaged_lists_of_camvid(lists: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    camvid_of(tmp_path, monkeypatch, lists)
    before = sorted(tmp_path.rglob("*"))
    settings_ = (
        checked(config.load())
        .benchmark("camvid-half")
        .model_copy(update={"data": {"dataset": "camvid", "size": None, "mirror": None}})
    )
    with pytest.raises(ConfigError, match=r"train\.txt") as error:
        fetch(tmp_path / "data", "c", settings_)
    short(error.value)
    own = {tmp_path / "data", tmp_path / ".scratch"}  # of the empty folder, and of the lock
    assert [path for path in sorted(tmp_path.rglob("*")) if not own & {path, *path.parents}] == before
    assert not list((tmp_path / "data").iterdir())


# ---- weights


class Evil:
    """A pickle that makes a file when it is read."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.marker,))


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".safetensors"])
def test_weights_are_never_executed(suffix: str, tmp_path: Path) -> None:
    marker, file = tmp_path / "executed", tmp_path / f"weights{suffix}"
    for legacy in (True, False):
        torch.save({"w": Evil(marker)}, file, _use_new_zipfile_serialization=not legacy)
        with pytest.raises(ConfigError, match="cannot be read") as error:
            read_state(file)
        short(error.value)
    assert not marker.exists()
    torch.save(Evil(marker), file)
    if suffix != ".safetensors":
        torch.load(file, weights_only=False)  # as it would have been
        assert marker.exists()


def test_a_resume_file_is_never_executed(tmp_path: Path) -> None:
    marker, file = tmp_path / "executed", tmp_path / "state.pt"
    checkpoint.save(file, "mark", {"rows": Evil(marker)})  # with a right sum
    assert checkpoint.load(file, "mark") is None
    assert not marker.exists()


def test_counts_are_never_executed(place: Path) -> None:
    marker, cell = place / "executed", Cell("streets", "pspnet-resnet18", "none", 0)
    teacher = records.read(
        records.teacher_cell(checked(config.load(place / "params.yaml")), "streets"), place
    )
    assert teacher is not None
    output = io.BytesIO()
    evil = np.array([Evil(marker)], dtype=object)
    np.savez_compressed(output, test=evil, val=evil, test_names=evil)
    others = {name: (teacher.folder / name).read_bytes() for name in ("metrics.json", "history.csv")}
    records.write(cell.folder(place), teacher.run, others | {"confusion.npz": output.getvalue()})
    record = records.read(cell, place)
    assert record is not None
    for read in (lambda: record.confusion("test"), record.test_names):
        with pytest.raises(ConfigError, match=r"confusion\.npz is damaged") as error:
            read()
        short(error.value)
    assert not marker.exists()


def test_truncated_weights(tmp_path: Path) -> None:
    from safetensors.torch import save

    whole = save({"a": torch.arange(100.0), "b": torch.zeros(3, dtype=torch.int64)})
    file, count = tmp_path / "weights.safetensors", 0
    for length in range(0, len(whole), 7 if TORTURE else 61):
        file.write_bytes(whole[:length])
        with pytest.raises(ConfigError, match="truncated or damaged"):
            read_state(file)
        count += 1
    for size in (2**63 - 1, 10**9, 0):  # of the header, as it claims
        file.write_bytes(struct.pack("<Q", size) + whole[8:])
        with pytest.raises(ConfigError, match="truncated or damaged"):
            read_state(file)
        count += 1
    TALLY.append(f"hostile, weights: {count} inputs: refused by one sentence, no pickle executed")


# ---- tables

NAMES = [
    "<script>alert(1)</script>",
    "a|b",
    "a_b_c",
    "*a* **b**",
    "\\",
    "\\input{/etc/passwd}",
    "$x$ $$y$$",
    "50%",
    "%",
    "# not a heading",
    "&lt;b&gt; & c",
    "`code`",
    "[link](http://example.org)",
    "![image](x.png)",
    "line\nbreak\r\n| new | row |",
    "~~gone~~ ^ {group}",
    "\\\\ \\end{tabular} \\|",
    "<!-- results:end -->",
    "https://example.org/<x>",
]


def rendered(names: list[str], folder_: Path) -> tuple[str, str]:
    data = [{"name": name} for name in names]
    rows = [{names[0]: name, "another": name} for name in names]
    table.render(
        table.Table("t", "title", data, rows, names),
        folder_,
        names[0],
        [(name, name) for name in names],
        names,
    )
    return (folder_ / "t.md").read_text(encoding="utf-8"), (folder_ / "t.tex").read_text(encoding="utf-8")


def check_tables(names: list[str], target: Path) -> None:
    markdown, tex = rendered(names, target)
    (links,) = (line for line in markdown.splitlines() if line.startswith("- [What the columns mean]("))
    markdown = markdown.replace(f"{links}\n", "")  # which has nothing of these names
    wanted = [" ".join(name.split()) for name in names]
    tokens = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(markdown)
    inline = [child for token in tokens for child in token.children or ()]
    kinds = {child.type for child in inline} | {token.type for token in tokens}
    allowed = {"text", "strong_open", "strong_close", "softbreak", "text_special"}
    assert {child.type for child in inline} <= allowed, kinds
    assert "html_block" not in kinds
    opened, cells = False, []
    for token in tokens:
        opened = token.type == "td_open" or (opened and token.type != "td_close")
        if opened and token.type == "inline":
            cells.append("".join(child.content for child in token.children or ()))
    assert cells == [name for name in wanted for _ in "ab"]
    # TeX: what is left without the commands that escaping makes has no special character
    body = tex.split("\\midrule\n")[1].split("\n\\bottomrule")[0]
    lines = body.split(" \\\\\n")
    lines[-1] = lines[-1].removesuffix(" \\\\")
    assert len(lines) == len(names)
    known = r"\\text(?:backslash|asciitilde|asciicircum|less|greater|bar)\{\}|\\[&%$#_{}]"
    for line in lines:
        left = re.sub(known, "", line)
        assert left.count("&") == 1 and not re.search(r"[\\%$#_{}~^<>|]", left), line
    assert all(line.startswith("%") for line in tex.split("\\begingroup")[0].splitlines())


def test_tables_print_hostile_names_as_they_stand(tmp_path: Path) -> None:
    check_tables(NAMES, tmp_path)


def test_tables_of_any_text(tmp_path: Path) -> None:
    count = [0]
    hostile = st.text(st.sampled_from(list("<>|_*\\$%&#~^{}[]()`!-ab1 \n.")), min_size=1, max_size=12)

    @tried(1200)
    @given(st.lists(hostile.filter(str.strip), min_size=2, max_size=4))
    def fuzz(names: list[str]) -> None:
        check_tables(names, tmp_path)
        count[0] += 1

    fuzz()
    TALLY.append(f"hostile, names in tables: {count[0]} inputs: Markdown and TeX print them as they stand")


def test_a_hostile_note_of_a_failure_stays_in_its_cell(place: Path) -> None:
    cell = Cell("streets", "pspnet-resnet18", "kd", 0)
    note = "RuntimeError: <script>alert(1)</script> | a_b | \\input{x} $y$ 50% <!-- results:end -->"
    files.write_bytes(cell.scratch(place) / "failure.txt", note.encode())
    (place / "README.md").write_text("<!-- results:begin -->\n<!-- results:end -->\nafter\n")
    params = config.load(place / "params.yaml")
    found = report.finished(params, place)
    for _ in range(2):
        report.write_texts(params, report.gather_all(params, place, found), place, place)
    text = (place / "reports/streets/comparison.md").read_text()
    row = next(line for line in text.splitlines() if "RuntimeError" in line)
    html = MarkdownIt("commonmark").enable("table").render(text)
    assert (
        "&lt;script&gt;alert(1)&lt;/script&gt; | a_b | \\input{x} $y$ 50%" in html and "<script" not in html
    )
    assert row.count(" | ") >= 7
    assert (place / "README.md").read_text().count("<!-- results:end -->\nafter\n") == 1
    assert r"\textbackslash{}input\{x\} \$y\$ 50\%" in (place / "reports/streets/comparison.tex").read_text()


# ---- no network

EVERYTHING = """
import os, sys
from pathlib import Path
from pipelines import config
from pipelines.stages import count, export, fetch_weights, report
from pipelines.tools import predict, readme, speed, spread, tune, verify
from pipelines.config import ConfigError
from pipelines.datasets import camvid
from pipelines.engine.pack import run_cell
from pipelines.methods import checked
from pipelines.reports import spread_table
from pipelines.stages.fetch import fetch
from pipelines.runs.records import Cell, teacher_cell
root = Path(sys.argv[1])
params = checked(config.load(root / "params.yaml"))
camvid.MANIFEST = root / "camvid.sha256"
small = params.benchmark("camvid-half")
fetch(root / "data", "camvid-half", small)
fetch(root / "data", "streets", params.benchmark("streets"))
run_cell(teacher_cell(params, "streets"), params, root)
tune.tune(params, root)
params = checked(config.load(root / "params.yaml"))
for method in ("none", "kd"):
    run_cell(Cell("streets", "pspnet-resnet18", method, 0), params, root)
export.check("streets", "pspnet-resnet18", params, root)
speed.write_images(params.benchmark("streets"), "streets", root / "random", 4)
speed.row(params, "streets", "none", 2, 2, root / "random")
spread._link(Cell("streets", "pspnet-resnet18", "none", 0), params, root / "again", root)
spread.repeat(params, "streets", "none", spread_table.FAST, root / "again")
count.count(params, root)
report.report(params, root)
readme.write(params, root, root)
weights = root / "runs" / "streets" / "pspnet-resnet18" / "kd" / "0" / "weights.safetensors"
predict.predict(weights, root / "data" / "streets" / "test", root / "out", None, root)
fetch_weights.fetch("resnet18", params.encoder_weights("resnet18"), root)
print(verify.problems(params, root))
del os.environ["ACFD_MIRROR"]
try:
    fetch(root / "data", "camvid", params.benchmark("camvid"))
except ConfigError as error:
    print(error)
"""


@slow
def test_everything_works_with_sockets_blocked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = camvid_of(tmp_path, monkeypatch, "x/train/0.png x/trainannot/0.png\n")
    raw = tiny(read_params())
    raw["benchmarks"]["camvid-half"]["data"]["size"] = None
    raw["tuning"].update(benchmark="streets", student="pspnet-resnet18", methods=["kd"], trials=1, steps=2)
    raw["methods"], raw["official"] = {key: raw["methods"][key] for key in ("none", "kd")}, {}
    raw["suite"] |= {"methods": ["none", "kd"], "variants": []}
    own = tmp_path / raw["weights"]["resnet18"]["file"]
    own.parent.mkdir()
    own.write_bytes(b"weights that are there")
    raw["weights"]["resnet18"]["sha256"] = hashlib.sha256(own.read_bytes()).hexdigest()
    write_params(tmp_path, raw)
    (tmp_path / "README.md").write_text("<!-- results:begin -->\n<!-- results:end -->\n")
    (tmp_path / "runs").mkdir()
    shutil.copy(ROOT / counts.COUNTS, tmp_path / "runs")  # only what is new is counted
    environment = {
        key: value for key, value in os.environ.items() if key not in ("HF_HUB_OFFLINE", "DO_NOT_TRACK")
    }
    environment |= {
        "PYTHONPATH": f"{OFFLINE}{os.pathsep}{ROOT}",
        "ATTEMPTS": str(tmp_path / "attempts"),
        "ACFD_MIRROR": str(source),
        "https_proxy": "http://127.0.0.1:9",  # git is another process
    }
    done = subprocess.run(
        [sys.executable, "-c", EVERYTHING, str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found, said = done.stdout.splitlines()[-2:]
    assert found == "['dvc.lock is missing or empty: restore it with git, or run `dvc commit`.']"
    assert said.startswith("CamVid could not be fetched") and "set ACFD_MIRROR to a folder" in said
    assert not (tmp_path / "attempts").exists(), (tmp_path / "attempts").read_text()
    TALLY.append(
        "sockets blocked: fetch, fetch_weights, train_teacher, distill, tune, export, speed, spread, report, "
        "count, predict, verify: all work, no attempt"
    )
