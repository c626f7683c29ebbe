"""Files that are written whole or not at all, and folders that belong to one process at a time."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from filelock import FileLock, Timeout

from vmpo.errors import UserError


def write_file(path: Path, content: bytes, advice: str = "") -> None:
    """Writes a file so that it is the old one or the new one, whenever the process or the machine ends.

    Args:
        advice: what the user may do about a disk that cannot be written, for the error.

    Raises:
        UserError: if the disk is full or the folder cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise UserError("; ".join(filter(None, [f"cannot write '{path}': {error.strerror}", advice]))) from error


def write_text(path: Path, text: str) -> None:
    """`write_file` with text, in UTF-8."""
    write_file(path, text.encode("utf-8"))


def lock_folder(folder: Path, lock: FileLock, what: str) -> None:
    """Makes the folder and keeps other living processes out; the system lets go of the lock when the process ends.

    Args:
        what: the folder's name for the user, e.g. "run folder 'runs/a'".

    Raises:
        UserError: if another process holds it, or it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise UserError(f"{what} is in use by a process that is still running") from error
    except OSError as error:
        raise UserError(f"{what} cannot be made: {error.strerror}") from error
