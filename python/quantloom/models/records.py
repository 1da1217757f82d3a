"""The work folder of a run: what lets a killed run go on where it was.

``OUTPUT/.work/`` holds ``manifest.json`` (the fingerprint of all that decides the result), a lock, one
record for each finished module (``records/NAME.safetensors`` with the packed tensor, then
``records/NAME.json`` with its report), the hidden states between two blocks, and at the end the files of
the checkpoint until they are complete. Every file appears under its name only when it is whole and synced.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import quantloom as ql
from quantloom.models.report import DistillationReport, ModuleReport
from quantloom.models.source import file_metadata, mapped_tensors
from quantloom.tensors import stored_transforms

__all__ = ["WorkFolder", "file_hash", "write_json"]

WORK = ".work"
_CHUNK = 8 << 20
_DISTILLED = ".distilled"  # ends the names of a block's records, before their suffixes
_VECTORS = "vector."  # begins the names of a distilled block's other parameters


def file_hash(path: Path, tick: Callable[[int], None] | None = None) -> str:
    """SHA-256 of a file, read in chunks; `tick` is told the bytes of each."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            if tick is not None:
                tick(len(chunk))
    return digest.hexdigest()


def sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, value: Any) -> None:
    """Writes JSON through a temporary file, fsync and rename."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(value, file, indent=2, ensure_ascii=False, allow_nan=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


class WorkFolder:
    """The work folder of one run, locked against other processes while it is open."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self.path = output / WORK
        self.records = self.path / "records"
        self.staging = self.path / "final"
        self._lock: int | None = None

    def __enter__(self) -> WorkFolder:
        """Takes the lock. Raises RuntimeError naming the process that holds it."""
        self.records.mkdir(parents=True, exist_ok=True)
        handle = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            # The system drops the lock of a process that dies, so a lock left by a killed run is free.
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(handle, 32).decode(errors="replace").strip()
            os.close(handle)
            raise RuntimeError(f"output: {self.output} is in use by process {holder or 'unknown'}") from None
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
        self._lock = handle
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    # -- manifest ------------------------------------------------------------------------------------

    def begin(self, fingerprint: dict[str, Any], resume: bool) -> bool:
        """Starts or resumes the work; True if there is work of an earlier run to take over.

        Raises ValueError saying what differs if that run was another one. `resume=False` drops its work.
        """
        manifest = self.path / "manifest.json"
        if not manifest.is_file() or not resume:
            self.clear()
            write_json(manifest, fingerprint)
            return False
        try:
            known = json.loads(manifest.read_text(encoding="utf-8"))
        except ValueError:
            known = None
        if not isinstance(known, dict):
            raise ValueError(
                f"{manifest}: damaged; pass resume=False to drop the unfinished work and start over"
            )
        differences = _differences("", known, fingerprint)
        if differences:
            raise ValueError(
                f"output: {self.output} holds unfinished work of another run, which differs in "
                f"{'; '.join(differences)}. Repeat that run's arguments to finish it, choose another folder, "
                "or pass resume=False to drop it"
            )
        return True

    def clear(self) -> None:
        """Drops all work, but keeps the lock."""
        (self.path / "manifest.json").unlink(missing_ok=True)  # first: without it, the rest means nothing
        for entry in self.path.iterdir():
            if entry.name == "lock":
                continue
            if entry.is_dir():
                shutil.rmtree(entry)
            else:
                entry.unlink()
        self.records.mkdir()

    def remove(self) -> None:
        """Removes the work folder, once the checkpoint is in place."""
        self.clear()
        shutil.rmtree(self.path)

    # -- records -------------------------------------------------------------------------------------

    def record_file(self, module: str) -> Path:
        return self.records / f"{module}.safetensors"

    def save(self, module: str, packed: Any, report: ModuleReport) -> None:
        file = self.record_file(module)
        ql.save_tensors(str(file), {module: packed})
        entry = {"sha256": file_hash(file), "report": report.to_json(), "seconds": report.seconds}
        write_json(self._entry_file(module), entry)

    def has(self, module: str) -> bool:
        return self._entry_file(module).is_file()

    def _entry_file(self, module: str) -> Path:
        # Not with_suffix(): module names hold dots.
        return self.records / f"{module}.json"

    def report(self, module: str) -> ModuleReport:
        entry = self._entry(module)
        return ModuleReport.from_json(entry["report"], entry["seconds"])

    def packed(self, module: str, form: Any) -> Any:
        """The packed tensor of a finished module, its planes views of the mapped record.

        Raises ValueError if the file is damaged.
        """
        file, entry = self.record_file(module), self._entry(module)
        distilled = self._distilled_file(module)
        if distilled is not None:
            file, entry = distilled, {**entry, "sha256": self._read(self._json_of(distilled))["sha256"]}
        if not file.is_file() or file_hash(file) != entry["sha256"]:
            raise ValueError(f"{file}: the record of {module} is damaged; pass resume=False to start over")
        planes = {
            name.removeprefix(f"{module}."): view
            for name, view in mapped_tensors(file).items()
            if name.startswith(f"{module}.")
        }
        transform = stored_transforms(file_metadata(file)).get(module)
        form = self.stored_format(module, form)
        return ql.PackedTensor(form, tuple(entry["report"]["shape"]), planes, None, transform)

    def stored_format(self, module: str, form: Any) -> Any:
        """What a finished module is stored in that was to be rounded to `form`: with outliers, if a search
        found them."""
        report = self._entry(module)["report"]
        if isinstance(form, ql.Outliers) or not report["format"].startswith("outliers:"):
            return form
        return ql.Outliers(form, count=report["outliers"])

    # -- distilled blocks ----------------------------------------------------------------------------

    def save_distilled(
        self, block: str, packed: dict[str, Any], vectors: dict[str, Any], report: DistillationReport,
        seconds: float,
    ) -> None:  # fmt: skip
        """Keeps what became of a block: its modules, which from now on stand for their own records, and
        other parameters by name."""
        file = self.records / f"{block}{_DISTILLED}.safetensors"
        ql.save_tensors(str(file), packed | {f"{_VECTORS}{name}": value for name, value in vectors.items()})
        entry = {"sha256": file_hash(file), "report": report.to_json(), "seconds": seconds}
        write_json(self._json_of(file), entry)

    def distilled(self, block: str) -> DistillationReport | None:
        """The report of a block that was distilled; None if it was not."""
        file = self.records / f"{block}{_DISTILLED}.json"
        if not file.is_file():
            return None
        entry = self._read(file)
        return DistillationReport(**entry["report"], seconds=entry["seconds"])

    def distilled_vectors(self, block: str) -> dict[str, Any]:
        """The other parameters of a distilled block, by name."""
        file = self.records / f"{block}{_DISTILLED}.safetensors"
        found = {name: value for name, value in mapped_tensors(file).items() if name.startswith(_VECTORS)}
        return {name.removeprefix(_VECTORS): value for name, value in found.items()}

    def _distilled_file(self, module: str) -> Path | None:
        """Where a module of a distilled block is."""
        for entry in self.records.glob(f"*{_DISTILLED}.json"):
            if module.startswith(f"{entry.name.removesuffix(f'{_DISTILLED}.json')}."):
                return entry.with_name(f"{entry.name.removesuffix('.json')}.safetensors")
        return None

    @staticmethod
    def _json_of(file: Path) -> Path:
        return file.with_name(f"{file.name.removesuffix('.safetensors')}.json")

    # -- scales of channels --------------------------------------------------------------------------

    def save_scaling(self, block: str, tensors: dict[str, Any], description: str) -> None:
        ql.save_tensors(str(self._scaling_file(block)), tensors, {"scaling": description})

    def scaling(self, block: str) -> tuple[dict[str, Any], str] | None:
        """What ``save_scaling`` kept for a block, or None. Raises ValueError if the file is damaged."""
        file = self._scaling_file(block)
        if not file.is_file():
            return None
        return ql.load_tensors(str(file), kind="torch"), ql.load_metadata(str(file))["scaling"]

    def _scaling_file(self, block: str) -> Path:
        return self.records / f"{block}.scaling.safetensors"

    def _entry(self, module: str) -> dict[str, Any]:
        return self._read(self._entry_file(module))

    def _read(self, file: Path) -> dict[str, Any]:
        """An entry beside a record. Raises ValueError if it is damaged."""
        try:
            entry = json.loads(file.read_text(encoding="utf-8"))
            if set(entry) != {"sha256", "report", "seconds"}:
                raise ValueError("unexpected keys")
        except (ValueError, TypeError) as error:
            raise ValueError(f"{file}: damaged ({error}); pass resume=False to start over") from None
        return entry


def _differences(path: str, known: Any, asked: Any) -> list[str]:
    if isinstance(known, dict) and isinstance(asked, dict):
        found = []
        for key in sorted(known.keys() | asked.keys()):
            inner = f"{path}.{key}" if path else key
            found += _differences(inner, known.get(key), asked.get(key))
        return found
    return [] if known == asked else [f"{path} (then {_short(known)}, now {_short(asked)})"]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
