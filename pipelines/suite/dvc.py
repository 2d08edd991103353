"""The only file that talks to DVC: which stages changed, and one commit for all that is whole."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import time
from collections.abc import Callable, Collection, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from pipelines import config, files
from pipelines.config import PAPER, ROOT, ConfigError, Params
from pipelines.place import git, in_git
from pipelines.runs.records import Cell

log = logging.getLogger(__name__)

LOCK = "schema: '2.0'\nstages:\n"  # the first lines of dvc.lock
PATIENCE = 600  # seconds to wait for another DVC


class Pipeline:
    """The stages of dvc.yaml as DVC sees them. Raises :class:`ConfigError` for what DVC refuses."""

    def __init__(self, root: Path = ROOT) -> None:
        self.root = root

    @cached_property
    def _repo(self) -> Any:
        from dvc.repo import Repo

        logging.getLogger("dvc").setLevel(logging.ERROR)
        try:
            alone = {} if in_git(self.root) else {"core": {"no_scm": True}}
            repo = Repo(str(self.root), config=alone)
            _ = repo.index.stages
        except Exception as error:  # of DVC's own family, and of its parsers
            raise _refused(error) from None
        return repo

    @cached_property
    def stages(self) -> dict[str, Any]:
        """DVC's stages by name."""
        return {stage.addressing: stage for stage in self._repo.index.stages}

    def changed(self) -> tuple[set[str], set[str]]:
        """The stages whose dependencies, settings or outputs are not those of dvc.lock; and those of which
        only DVC's cache, which may have been moved or emptied, lacks something."""
        found = self._locked(lambda: self._repo.status())
        names = found.keys() & self.stages.keys()
        uncached = self._locked(lambda: {name for name in names if self._is_uncached(name, found[name])})
        return names - uncached, uncached

    def _is_uncached(self, name: str, reasons: list[Any]) -> bool:
        outs = [reason.get("changed outs") for reason in reasons if isinstance(reason, dict)]
        return (
            len(reasons) == len(outs) == 1
            and {*(outs[0] or {"": ""}).values()} == {"not in cache"}
            and not any(out.workspace_status() for out in self.stages[name].outs)
        )

    def commit(self, names: Collection[str], more: Callable[[], Collection[str]] = list) -> None:
        """Note in dvc.lock, in one go, what the stages ``names`` read and made, those that lack a file left
        out; their weights and data go into DVC's cache. After them it is asked which ``more`` there are."""
        self._locked(lambda: self._save(names, more))

    def _save(self, names: Collection[str], more: Callable[[], Collection[str]]) -> None:
        with self._repo.lock:
            self._repo._reset()
            vars(self).pop("stages", None)
            # Of links to the cache; a copy stays as it is: DVC would remove it and copy it back.
            linked = self._repo.cache.local.cache_types[0] in ("hardlink", "symlink")
            whole: list[Any] = []

            def save(asked: Collection[str]) -> None:
                for name in asked:
                    stage = self.stages.get(name)
                    if stage is not None and all(item.exists for item in (*stage.deps, *stage.outs)):
                        stage.save(run_cache=False)
                        stage.commit(relink=linked)
                        whole.append(stage)

            save(names)
            save(more())
            if whole:
                self._note(whole)

    def _note(self, stages: list[Any]) -> None:
        """Write the entries of ``stages`` in dvc.lock, where the others keep their bytes.

        DVC parses and prints all of it, which takes longer than anything else at the end of a run: it does so
        only where the file is not as it prints it itself.
        """
        from dvc.stage.serialize import to_lockfile
        from dvc.utils.serialize import dumps_yaml

        lock = self.root / "dvc.lock"
        old = _entries(lock.read_text("utf-8") if lock.exists() else LOCK)
        made = {name: entry for stage in stages for name, entry in to_lockfile(stage).items()}
        new = _entries("schema: '2.0'\n" + dumps_yaml({"stages": _apart(made)}))
        if old is None or new is None:
            stages[0].dvcfile.dump_stages(stages, update_pipeline=False)
        else:
            files.write_bytes(lock, (LOCK + "".join((old | new).values())).encode())

    def _locked(self, act: Any) -> Any:
        """Do something for which DVC locks the checkout; wait while another DVC has it."""
        from dvc.lock import LockError

        start, told = time.monotonic(), False
        while not told or time.monotonic() - start < PATIENCE:  # each try takes seconds, too
            try:
                with _settings_read_once():
                    return act()
            except LockError as error:
                if not told:
                    log.warning(
                        "another dvc is at work here: waiting until it ends. %s", _words(error)[-200:]
                    )
                    told = True
                time.sleep(1)
            except Exception as error:
                if type(error).__module__.partition(".")[0] not in ("dvc", "dvc_data", "dvc_objects"):
                    raise
                raise _refused(error) from None
        raise ConfigError(
            "Another dvc has been at work here for ten minutes: end it, then run this again. If there is "
            "none, remove .dvc/tmp/lock."
        )


def stage_of(params: Params, cell: Cell) -> str:
    """The stage of dvc.yaml that trains a cell."""
    if cell.is_teacher:
        return f"train_teacher@{cell.benchmark}"
    place, method = f"{cell.benchmark}-{cell.student}", cell.method
    if method in params.controls:
        return f"control@{place}-{params.controls[method]}-{cell.seed}"
    if method.endswith(config.OFFICIAL):
        return f"official@{place}-{params.module_key(method)}-{cell.seed}"
    if method.startswith(f"{PAPER}-"):
        return f"{PAPER}@{place}-{method.removeprefix(f'{PAPER}-')}-{cell.seed}"
    return f"distill@{place}-{method}-{cell.seed}"


class LockedFile(BaseModel):
    """A file or folder in dvc.lock."""

    path: str
    md5: str


class LockedStage(BaseModel):
    """A stage in dvc.lock."""

    deps: list[LockedFile] = []
    outs: list[LockedFile] = []
    params: dict[str, dict[str, Any]] = {}


class _Lock(BaseModel):
    """dvc.lock, as far as it is read here."""

    stages: dict[str, LockedStage] = {}


def locked(root: Path) -> dict[str, LockedStage]:
    """The stages of dvc.lock, {} where there is none. ConfigError when it is damaged."""
    path = root / "dvc.lock"
    content = config.read_yaml(path) if path.is_file() else None
    try:
        return _Lock.model_validate(content or {}).stages
    except ValidationError as error:
        raise ConfigError(config.explain("", error, path.name) + " Restore it with git.") from None


def heal(root: Path = ROOT) -> None:
    """Put aside what DVC, which does not write it whole, may have left damaged when it was killed.

    dvc.lock is derived: it is made anew from that of the commit and from the records that are whole.
    """
    from dvc.schema import COMPILED_LOCKFILE_SCHEMA
    from dvc.utils.serialize import parse_yaml

    busy, lock = root / ".dvc" / "tmp" / "rwlock", root / "dvc.lock"
    if busy.is_file() and not _works(lambda: json.loads(busy.read_bytes()).items()):
        busy.unlink(missing_ok=True)
    if not lock.is_file():
        return
    text, committed = lock.read_bytes(), (git(root, "show", "HEAD:./dvc.lock") or "").encode()
    whole = text == committed or _works(
        lambda: COMPILED_LOCKFILE_SCHEMA(parse_yaml(text.decode(), "dvc.lock"))
    )
    if text.endswith(b"\n") and whole:
        return
    aside = lock.with_name("dvc.lock.damaged")
    files.write_bytes(aside, text)
    if committed:
        files.write_bytes(lock, committed)
    else:
        lock.unlink()
    log.warning("dvc.lock is damaged: it is kept as %s and made anew from the records.", aside.name)


def _entries(text: str) -> dict[str, str] | None:
    """The text of each stage in a dvc.lock by its first line, None where it is not as DVC prints it."""
    head, *entries = re.split(r"^(?=  \S)", text, flags=re.M)
    found = {entry.partition("\n")[0]: entry for entry in entries}
    plain = all(re.fullmatch(r"  [^\s?#].*:", name) for name in found) and len(found) == len(entries)
    return found if head == LOCK and plain and not re.search(r"^ ?\S", "".join(entries), re.M) else None


@contextlib.contextmanager
def _settings_read_once() -> Iterator[None]:
    """DVC parses params.yaml anew for every stage, which is half of the time of ``dvc status``."""
    from dvc.utils.serialize import LOADERS

    before, read = LOADERS[".yaml"], dict[str, Any]()

    def load(path: str, **options: Any) -> Any:
        if path not in read:
            read[path] = before(path, **options)
        return read[path]

    LOADERS[".yaml"] = load
    try:
        yield
    finally:
        LOADERS[".yaml"] = before


def _apart(value: Any) -> Any:
    """The same with no part twice: what is shared would be printed as an anchor, which other entries have
    too."""
    if isinstance(value, dict):
        return {key: _apart(part) for key, part in value.items()}
    return [_apart(part) for part in value] if isinstance(value, list) else value


def _works(act: Callable[[], Any]) -> bool:
    try:
        act()
    except Exception:  # each of its parsers has a family of errors
        return False
    return True


def _words(error: BaseException) -> str:
    return " ".join(str(error).split())


def _refused(error: BaseException) -> ConfigError:
    cause = error.__cause__ or error.__context__
    because = f" ({_words(cause)[:200]})" if cause else ""
    return ConfigError(f"DVC refused: {_words(error)[:400]}{because}.")
