"""Published data sets as their authors ship them: archives or extracted folders, downloaded where allowed.

Members are read one at a time by names that the data set expects, and written under names of our own, so no
archive can write outside of the benchmark's folder and none is in memory whole.
"""

from __future__ import annotations

import http.client
import logging
import lzma
import os
import re
import ssl
import tarfile
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Collection, Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Literal, Protocol

from tqdm import tqdm

from pipelines import files
from pipelines.config import ROOT, ConfigError

DOWNLOADS = ROOT / "downloads"
LARGEST = 2**27  # bytes of one member; the largest real ones (annotations, images) have a few million
TIMEOUT = 60  # seconds without a byte
TRIES = 5
CHUNK = 2**20
FAILURES = (  # of a connection
    urllib.error.URLError,
    http.client.HTTPException,
    TimeoutError,
    ConnectionError,
    ssl.SSLError,
)
BROKEN = (zlib.error, lzma.LZMAError, EOFError)  # what damaged compression raises

log = logging.getLogger(__name__)


class Source(Protocol):
    """An archive, or the folder that it was extracted to."""

    path: Path

    def names(self) -> list[str]:
        """The regular files in it, as POSIX paths."""

    def files(self, wanted: Collection[str]) -> Iterator[tuple[str, bytes]]:
        """Name and content of every wanted file, in the order that is quickest to read."""


class Folder:
    """An extracted folder; ``name`` is the one that it has in the archive, before those of its files."""

    def __init__(self, path: Path, name: str = "") -> None:
        self.path, self.prefix = path, f"{name}/" if name else ""

    def names(self) -> list[str]:
        found = self._walk(self.path, ())
        return sorted(self.prefix + path.relative_to(self.path).as_posix() for path in found)

    def _walk(self, folder: Path, above: tuple[Path, ...]) -> Iterator[Path]:
        """Also through links, unless they lead back to a folder that they lie in."""
        real = folder.resolve()
        if real in above:
            return
        with os.scandir(folder) as found:
            entries = list(found)
        for entry in entries:
            if entry.is_dir():
                yield from self._walk(folder / entry.name, (*above, real))
            elif entry.is_file():  # a pipe or a device would never end
                yield folder / entry.name

    def files(self, wanted: Collection[str]) -> Iterator[tuple[str, bytes]]:
        for name in sorted(wanted):
            file = self.path / name.removeprefix(self.prefix)
            if file.stat().st_size > LARGEST:
                raise _too_large(self.path, name)
            yield name, file.read_bytes()


class Zip:
    def __init__(self, path: Path) -> None:
        self.path = path

    def names(self) -> list[str]:
        try:
            with zipfile.ZipFile(self.path) as archive:
                return [_safe(self.path, info.filename) for info in archive.infolist() if not info.is_dir()]
        except ConfigError:
            raise
        except (zipfile.BadZipFile, EOFError, ValueError, NotImplementedError) as error:
            raise _damaged(self.path, error) from None

    def files(self, wanted: Collection[str]) -> Iterator[tuple[str, bytes]]:
        wanted = set(wanted)
        try:
            with zipfile.ZipFile(self.path) as archive:
                for info in archive.infolist():
                    if info.filename in wanted:
                        with archive.open(info) as member:
                            yield info.filename, _content(self.path, info.filename, member)
        except (zipfile.BadZipFile, *BROKEN, RuntimeError, NotImplementedError) as error:
            raise _damaged(self.path, error) from None


class Tar:
    """Plain or compressed; read from beginning to end, as a compressed one cannot be entered later."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def names(self) -> list[str]:
        return [_safe(self.path, member.name) for member, _ in self._members()]

    def files(self, wanted: Collection[str]) -> Iterator[tuple[str, bytes]]:
        left = set(wanted)
        for member, archive in self._members():
            if member.name in left and (opened := archive.extractfile(member)) is not None:
                try:
                    yield member.name, _content(self.path, member.name, opened)
                except (tarfile.TarError, *BROKEN) as error:
                    raise _damaged(self.path, error) from None
                left.remove(member.name)
                if not left:
                    return

    def _members(self) -> Iterator[tuple[tarfile.TarInfo, tarfile.TarFile]]:
        """Regular files alone: links and devices are passed over."""
        try:
            with tarfile.open(self.path) as archive:
                for member in archive:
                    if member.isreg():
                        yield member, archive
        except ConfigError:
            raise
        except (tarfile.TarError, *BROKEN, OSError, ValueError, OverflowError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise _damaged(self.path, error) from None


def locate(places: Collection[Path], archive: str, folder: str) -> Source | None:
    """The archive, or the folder that it extracts to, in the first of ``places`` that has either.

    The folder is the top one in the archive: its files keep the same names in both.
    """
    for place in places:
        if (place / archive).is_file():
            return Zip(place / archive) if archive.endswith(".zip") else Tar(place / archive)
        if (place / folder).is_dir():
            return Folder(place / folder, folder)
    return None


def obtain(
    mirror: Path | None, configured: Path | None, dataset: str, archive: tuple[str, str], url: str, md5: str
) -> Source:
    """A published archive (its file, its top folder), from where it lies or else from ``url``; the folder
    that it extracts to will do. ConfigError when the archive has another sum."""
    if (source := locate(places(mirror, configured, dataset), *archive)) is not None:
        if source.path.is_file() and (found := files.digest(source.path, "md5")) != md5:
            raise ConfigError(
                f"{source.path} has the md5 {found} instead of {md5}: it is truncated, damaged or another "
                f"version. Fetch {url} again, or put the folder {archive[1]} that it extracts to in its "
                f"place."
            )
        return source
    place = DOWNLOADS / dataset
    download(url, place / archive[0], "md5", md5)
    if (source := locate([place], *archive)) is None:
        raise ConfigError(f"{place / archive[0]} vanished: run the same command again.")
    return source


def mirror() -> Path | None:
    """The folder that ``ACFD_MIRROR`` names."""
    named = os.environ.get("ACFD_MIRROR")
    return Path(named).expanduser() if named else None


def in_checkout(configured: Path | None) -> Path | None:
    """A `mirror` of params.yaml, which may be relative to the checkout."""
    return configured and ROOT / configured.expanduser()


def places(mirror: Path | None, configured: Path | None, dataset: str) -> list[Path]:
    """Where the files of a data set may lie: ``ACFD_MIRROR``, `mirror` of params.yaml, ``downloads/``, each
    with or without a folder of the data set's name."""
    roots = [root for root in (mirror, in_checkout(configured), DOWNLOADS) if root is not None]
    return [place for root in roots for place in (root / dataset, root)]


def read(source: Source, name: str) -> bytes:
    """The content of one file."""
    for _, content in source.files([name]):
        return content
    raise ConfigError(f"{source.path} holds no {name}: it is another version, or incomplete. Fetch it again.")


def download(url: str, target: Path, kind: Literal["md5", "sha256"], digest: str) -> Path:
    """Fetch ``url`` to ``target`` unless it is there; ``digest`` is the sum of the file or how it begins.

    A transfer that was cut goes on where it stopped, also in another process (``<target>.part``). While
    another process fetches the file, this one waits. The file takes its name when its sum is right.
    ConfigError when it cannot be had.
    """
    if target.is_file():
        return target
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"{url} is no address of a download: it must begin with http:// or https://.")
    lock = target.with_name(f".{target.name}.lock")
    with files.hold(lock, f"The download of {target.name}"):
        if not target.is_file():
            _download(url, target, kind, digest)
        lock.unlink(missing_ok=True)  # whoever waits for it finds the file
    return target


def _download(url: str, target: Path, kind: Literal["md5", "sha256"], digest: str) -> None:
    part = target.with_name(f"{target.name}.part")
    problem = ""
    for _ in range(TRIES):
        try:
            _transfer(url, part)
            break
        except urllib.error.HTTPError as error:
            problem = f"the server answered {error.code} {error.reason}"
            if error.code < 500:
                raise ConfigError(_failed(url, target, problem)) from None
        except FAILURES as error:
            problem = " ".join(str(getattr(error, "reason", error)).split()) or type(error).__name__
    else:
        raise ConfigError(_failed(url, target, problem))
    found = files.digest(part, kind)
    if not found.startswith(digest):
        part.unlink()
        raise ConfigError(
            f"{url} gave a file with {kind} {found} instead of {digest}: it was altered on the way or has a "
            f"new version. Put the right file at {target}."
        )
    with part.open("rb") as file:
        os.fsync(file.fileno())  # before it takes its name
    part.replace(target)


def _transfer(url: str, part: Path) -> None:
    """Fetch what is missing of ``part``. A transfer that ends too early raises IncompleteRead."""
    have = part.stat().st_size if part.is_file() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        answer = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416 and have:  # nothing is missing; the sum says whether it is right
            return
        raise
    with answer:
        if answer.status != 206:  # the server begins at the beginning
            have = 0
        missing = int(answer.headers.get("Content-Length", 0))
        with (
            part.open("ab" if have else "wb") as file,
            tqdm(
                total=have + missing or None, initial=have, unit="B", unit_scale=True, desc=part.stem
            ) as bar,
        ):
            got = 0
            while chunk := answer.read(CHUNK):
                file.write(chunk)
                got += len(chunk)
                bar.update(len(chunk))
        if got < missing:
            raise http.client.IncompleteRead(b"", missing - got)


def _failed(url: str, target: Path, problem: str) -> str:
    return (
        f"{url} could not be fetched ({problem}). Check the network and run the same command again, it goes "
        f"on where it stopped; or put the file at {target} by hand."
    )


def _content(archive: Path, name: str, member: IO[bytes]) -> bytes:
    content = member.read(LARGEST + 1)
    if len(content) > LARGEST:
        raise _too_large(archive, name)
    return content


def _safe(archive: Path, name: str) -> str:
    """``name``, unless it points outside of the folder that an archive is extracted to."""
    parts = PurePosixPath(name.replace("\\", "/")).parts
    if ".." in parts or name.startswith(("/", "\\")) or re.match(r"[A-Za-z]:", name):
        raise ConfigError(
            f"{archive} holds {name!r}, a path outside of the archive: this is not the published file. Fetch "
            f"it again from its source."
        )
    return name


def _too_large(archive: Path, name: str) -> ConfigError:
    return ConfigError(f"{name} in {archive} has more than {LARGEST} bytes: it is no file of this data set.")


def _damaged(archive: Path, error: Exception) -> ConfigError:
    text = " ".join(str(error).split()) or type(error).__name__
    return ConfigError(f"{archive} is truncated or damaged ({text}): fetch it again from its source.")
