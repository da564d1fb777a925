"""OUT: what may be written there, the lock that keeps other runs away, and how a finished checkpoint gets there."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import socket
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any

from offline_prune.checkpoint import model_card
from offline_prune.checkpoint.journal import FILE, REPLACES, Ending, Journal, Say
from offline_prune.checkpoint.merge import merge
from offline_prune.model.safetensors_reader import INDEX_NAME, SINGLE_NAME
from vllm_spense.errors import SpenseError
from vllm_spense.format import KEY, PERMUTATION, SIDECAR

#: In OUT, while a checkpoint is in the making. There, and not beside OUT: OUT may be a mount point.
PARTIAL = ".spense-partial"
#: The journal's name in a finished checkpoint. It proves which files Spense wrote.
RECORD = "report.jsonl"
_LOCK = "lock"
#: What Spense writes in any case, for a checkpoint whose journal was deleted.
_KNOWN = ("config.json", SIDECAR, PERMUTATION, SINGLE_NAME, INDEX_NAME, "report.json", "report.png")
#: What file systems put into their own root.
_NOT_CONTENT = (PARTIAL, "lost+found")


class OutputFolder:
    """A context in which this process alone writes to OUT; it holds the lock and tidies up.

    A checkpoint grows in a hidden folder inside OUT. Once it is finished its files are moved up, config.json last.
    Files in OUT that Spense did not write stay where they are.

    Args:
        out: a folder, a symbolic link to one, or nothing yet.
        overwrite: replace a checkpoint, or an unfinished one, that is there.
        resume: go on with an unfinished one, if there is one, and replace what that was begun to replace.

    Attributes:
        path: OUT without symbolic links.
        partial: the hidden folder.

    Raises:
        SpenseError: on entering, where OUT cannot be written, another run writes to it, or there is something that may
            not be replaced.
    """

    def __init__(self, out: Path, overwrite: bool, resume: bool, say: Say = lambda _: None) -> None:
        self.path = Path(os.path.realpath(out))
        self.partial = self.path / PARTIAL
        self._overwrite, self._resume, self._say = overwrite, resume, say
        self._made: list[Path] = []
        self._lock = -1
        self._found: Journal | None = None

    def __enter__(self) -> OutputFolder:
        self._refuse_filled()
        self._acquire()
        try:
            self._found = self._unfinished()
        except BaseException:
            self._release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._release()

    def start(self, run: Mapping[str, Any]) -> Journal:
        """The journal of the run that is resumed, or a new one; everything that no journal counts is removed.

        Raises:
            SpenseError: the run that would be resumed is another one.
        """
        journal = self._found
        if journal:
            journal.require(run)
            if journal.ending:
                return journal
            journal.drop_damaged(self._say)
        else:
            journal = Journal(self.partial, {**run, REPLACES: True} if self._overwrite else run)
        kept = {_LOCK, FILE, *(file for part in journal.parts for file in part.files)}
        kept |= {*journal.state.state_files} if journal.state else set()
        with self.writing(self.partial):
            for entry in self.partial.iterdir():
                if entry.name not in kept:
                    _remove(entry)
            journal.start()
        return journal

    def publish(self, journal: Journal, files: Mapping[str, str], merged: str | None) -> None:
        """Moves a finished checkpoint to OUT. After an interruption at any point `publish` can be called again.

        Args:
            journal: of all parts.
            files: name in OUT → name in the hidden folder, for each file of the checkpoint.
            merged: the name in OUT of the one file that all parts become; None where each becomes a shard.

        Raises:
            SpenseError: something was put into OUT meanwhile that may not be replaced, or the disk fails. What is
                finished is kept.
        """
        with self.writing(self.path):
            if not journal.ending:
                journal.end(Ending(dict(files), merged, self._replaced(files)))
            self._move(journal)

    @contextmanager
    def writing(self, path: Path) -> Iterator[None]:
        """Inside, what the file system refuses is an error that a user can act on."""
        try:
            yield
        except OSError as error:
            file = error.filename or path
            raise SpenseError(f"{file}: cannot be written: {error.strerror or error}") from None

    def _refuse_filled(self) -> None:
        """Raises SpenseError when OUT holds something that may not be replaced."""
        with self.writing(self.path):
            if not self.path.exists():
                return
            if not self.path.is_dir():
                raise SpenseError(f"{self.path}: found a file, expected a folder or nothing")
            # What journals say is looked at under the lock.
            finished = self._resume and not self._overwrite and (self.path / RECORD).exists()
            if not finished and not (self.partial / FILE).exists():
                self._refuse_content()

    def _refuse_unless_replaced(self) -> None:
        if not self._overwrite:
            raise SpenseError(f"{self.path}: the folder is not empty; --overwrite replaces a Spense checkpoint")
        written = written_files(self.path)
        if written is None:
            raise SpenseError(f"{self.path}: the folder holds no Spense checkpoint, so --overwrite does not touch it")
        card = self.path / model_card.FILE
        if os.path.lexists(card) and card.name not in written and (self.path / RECORD).exists():
            raise SpenseError(f"{card}: found one that Spense did not write; move it away, a model card goes there")

    def _replaced(self, files: Mapping[str, str]) -> list[str]:
        """The files in OUT that make room; OUT is looked at again, because others may have written there meanwhile."""
        replaced = (written_files(self.path) if self._overwrite else None) or []
        if replaced and RECORD not in os.listdir(self.path):
            # Nothing tells which companions are Spense's; those of the same name belong to the checkpoint in any case.
            replaced += [name for name in files if name not in replaced]
        for name in files:
            if os.path.lexists(self.path / name) and name not in replaced:
                raise SpenseError(
                    f"{self.path / name}: is there, though the folder was empty or held another checkpoint when this "
                    "run began; move it away, then --resume ends the run"
                )
        return replaced

    def _unfinished(self) -> Journal | None:
        """The journal to go on from."""
        found = None
        try:
            found = Journal.read(self.partial, self._say)
        except SpenseError:
            if not self._overwrite or self._resume:
                raise
        if found and found.begun and self._resume and found.run.get(REPLACES):
            self._overwrite = True
        if found and found.ending and self._overwrite and not self._resume:
            # It may have begun to move files, which are then neither its nor an older checkpoint's.
            with self.writing(self.path):
                self._move(found)
            found = None
        if found and found.begun:
            if self._resume:
                if not found.ending:
                    self._refuse_content(_KNOWN)
                return found
            if not self._overwrite:
                raise SpenseError(
                    f"{self.partial}: an unfinished run ({len(found.parts)} parts done); "
                    "--resume goes on, --overwrite starts anew"
                )
            self._refuse_content(_KNOWN)
            return None
        if self._resume and not self._overwrite and (ended := Journal.read(self.path, file=RECORD)):
            if not ended.ending:
                raise SpenseError(f"{self.path / RECORD}: not of a finished run; --overwrite replaces the checkpoint")
            return ended
        self._refuse_content()
        return None

    def _refuse_content(self, names: Collection[str] | None = None) -> None:
        """Raises SpenseError where OUT holds one of these names, or anything, that may not be replaced."""
        present = set(os.listdir(self.path)).difference(_NOT_CONTENT)
        if present if names is None else present.intersection(names):
            self._refuse_unless_replaced()

    def _move(self, journal: Journal) -> None:
        """Every step may have been done already."""
        ending = journal.ending
        assert ending is not None
        if journal.folder == self.path:
            return
        if ending.merged:
            try:
                parts = [self.partial / part.file for part in journal.parts]
                merge(parts, self.partial / ending.files[ending.merged])
            except ValueError as error:
                raise SpenseError(f"{self.partial}: a damaged part: {error}; --overwrite starts anew") from None
        staged = {name: self.partial / file for name, file in ending.files.items()}
        # Without it nobody takes a mixture of two checkpoints for one; and it comes last for the same reason.
        first = "config.json"
        for name in sorted(ending.replaced, key=lambda name: name != first):
            if name not in staged or (name == first and staged[name].exists()):
                with suppress(FileNotFoundError):
                    os.unlink(self.path / name)
        for name in sorted(staged, key=lambda name: name == first):
            if staged[name].exists():
                (self.path / name).parent.mkdir(exist_ok=True)
                if name == first:
                    _sync(self.path)
                os.replace(staged[name], self.path / name)
        _sync(self.path)
        # The run is over with this.
        os.replace(self.partial / FILE, self.path / RECORD)

    def _acquire(self) -> None:
        """Takes the lock, which the kernel gives back when this process ends in whatever way.

        It holds between containers and, through NFS, between machines, where process ids mean nothing.
        """
        path = self.partial / _LOCK
        with self.writing(self.path):
            while True:
                self._make()
                try:
                    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
                except FileNotFoundError:
                    continue  # Another run has just ended and tidied up.
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    # A file that was unlinked since it was opened keeps nobody away.
                    current = path.exists() and os.path.samestat(os.fstat(lock), path.stat())
                except OSError as error:
                    holder = os.read(lock, 200).decode(errors="replace")
                    os.close(lock)
                    if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                        raise SpenseError(f"{self.path}: another run is writing there ({holder})") from None
                    raise SpenseError(f"{path}: the file system does not lock files: {error.strerror}") from None
                if current:
                    break
                os.close(lock)
        self._lock = lock
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)

    def _release(self) -> None:
        """Gives the lock back; removes the hidden folder where nothing is finished, and OUT if it was made for it."""
        with suppress(OSError, SpenseError):
            journal = Journal.read(self.partial)
            if not (journal and journal.begun):
                for entry in self.partial.iterdir():
                    if entry.name != _LOCK:
                        _remove(entry)
                os.unlink(self.partial / _LOCK)
                for folder in dict.fromkeys((self.partial, *self._made)):
                    os.rmdir(folder)
        os.close(self._lock)

    def _make(self) -> None:
        """Creates the hidden folder, and notes which folders were not there, innermost first."""
        missing = [folder for folder in (self.partial, *self.partial.parents) if not folder.exists()]
        self.partial.mkdir(parents=True, exist_ok=True)
        self._made = missing or self._made


def written_files(folder: Path) -> list[str] | None:
    """Names of the files that Spense wrote into a folder, as far as it can be told.

    Returns:
        None where neither config.json nor spense.json says that this is a Spense checkpoint.
    """
    quantization = _read(folder / "config.json").get("quantization_config")
    annotation = quantization.get(KEY) if isinstance(quantization, dict) else None
    if not isinstance(annotation, dict) and "regions" not in _read(folder / SIDECAR):
        return None
    record = None
    with suppress(SpenseError):
        record = Journal.read(folder, file=RECORD)
    if record and record.ending:
        names = [*record.ending.files, RECORD]
    else:
        shards = _read(folder / INDEX_NAME).get("weight_map")
        names = [*_KNOWN, RECORD, *(shards.values() if isinstance(shards, dict) else ())]
    return [name for name in dict.fromkeys(names) if isinstance(name, str) and _inside(name)]


def require_apart(model: Path, out: Path, argument: str) -> None:
    """Raises SpenseError where one of MODEL and OUT is, or lies in, the other, under whatever names.

    Args:
        argument: what the command calls MODEL.
    """
    out = Path(os.path.realpath(out))
    model = Path(os.path.realpath(model))
    for inner, outer in ((model, out), (out, model)):
        if outer.exists() and any(each.exists() and each.samefile(outer) for each in (inner, *inner.parents)):
            raise SpenseError(f"OUT is {out} and {argument} {model}: expected folders of which neither holds the other")
    for name in os.listdir(model) if os.access(model, os.R_OK) else ():
        if out in Path(os.path.realpath(model / name)).parents:
            raise SpenseError(f"{model / name}: a link into OUT, {out}; {argument}'s files must lie elsewhere")


def _inside(name: str) -> bool:
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts


def _read(file: Path) -> dict[str, Any]:
    """A JSON object; an empty one where there is none."""
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return data if isinstance(data, dict) else {}


def _remove(entry: Path) -> None:
    if entry.is_dir() and not entry.is_symlink():
        shutil.rmtree(entry)
    else:
        entry.unlink()


def _sync(folder: Path) -> None:
    """Names in a folder outlive a loss of power after this."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
