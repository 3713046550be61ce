"""The keeper's file: whether it may be used, and that what was done stays done."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import stat
from collections.abc import Iterator
from typing import Any

from secure_mqtt.errors import ProgramError

APPLICATION_ID = 0x534D5154  # "SMQT": tells our files from other programs'
VERSION = 1  # of the tables
MAGIC = b"SQLite format 3\0"  # what its files begin with
SIDE_FILES = "-wal", "-journal", "-shm"  # SQLite's, beside the file: it takes in what they say
PROBLEMS = {  # parts of what SQLite says, each with what it means, and what to do
    "locked": ("is in use by another process", "only one keeper can use it: stop the other"),
    "not a database": ("is no keeper's file", "name another one; it is made if it does not exist"),
    "is full": ("cannot be written: the disk is full", "make room on its disk"),
    "readonly": ("cannot be written", "its disk may be mounted read-only"),
    "malformed": ("is damaged", "put a copy in its place, or name a new one"),
}


class StoreError(ProgramError):
    """The keeper's file cannot be used, or not be written."""


class Database:
    """The keeper's file, open, and locked for as long as it is. One thread at a time may use it."""

    def __init__(self, path: str, tables: str) -> None:
        """Open the file, or make it.

        :param tables: what makes its tables, in SQL
        :raises StoreError: it can't be used, or others could use it, too
        """
        self.path = os.path.realpath(path)
        self.has_deleted_keys = False  # whether SQLite's log may still hold some
        self._check_files()
        with self._explained():
            self._connection = sqlite3.connect(
                self.path, timeout=0, isolation_level=None, check_same_thread=False
            )
        try:
            with self._explained():
                self._prepare(tables)
        except BaseException:
            self._connection.close()
            raise

    def _check_files(self) -> None:
        """Make the file if it does not exist; see to it that it is ours alone."""
        folder = os.path.dirname(self.path)
        try:
            if not os.path.lexists(self.path):
                make_file(self.path)
            check_private(self.path)
            is_other = read_start(self.path) not in (b"", MAGIC)
            for end in SIDE_FILES:
                if os.path.lexists(self.path + end):
                    check_private(self.path + end)
            mode = os.stat(folder).st_mode
        except OSError as error:
            raise self._error(f"cannot be used: {error.strerror}") from None
        if is_other:  # SQLite would take a very short one as empty
            raise self._error(*PROBLEMS["not a database"])
        if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
            raise self._error("is where every user can replace it", f"run chmod o-w {folder}")

    def _prepare(self, tables: str) -> None:
        """Lock the file, and make the tables if it is new."""
        self._pragma("locking_mode = EXCLUSIVE")
        application, version = self._pragma("application_id"), self._pragma("user_version")
        is_new = not self.value("SELECT count(*) FROM sqlite_master")
        if application != APPLICATION_ID and not (is_new and application == version == 0):
            raise self._error(*PROBLEMS["not a database"])
        if version > VERSION:
            raise self._error("was written by a newer version of the program", "use that one")
        self._pragma("journal_mode = WAL")
        self._pragma("synchronous = FULL")  # else a power cut would take what was acknowledged
        self._pragma("secure_delete = ON")
        self._pragma("foreign_keys = ON")
        self._pragma("temp_store = MEMORY")
        with self.batch():  # which locks it
            if is_new:
                for statement in tables.split(";"):
                    self._connection.execute(statement)
                self._pragma(f"application_id = {APPLICATION_ID}")
                self._pragma(f"user_version = {VERSION}")
        self._forget_keys()  # which a process that was killed may have left

    def _pragma(self, text: str) -> Any:
        return self.value(f"PRAGMA {text}")

    @contextlib.contextmanager
    def batch(self) -> Iterator[None]:
        """Take what is executed inside as one change: at the end all of it is on the disk.

        :raises StoreError: none of it is
        """
        with self._explained():
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._connection.execute("COMMIT")
            finally:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
        if self.has_deleted_keys:
            self._forget_keys()

    def _forget_keys(self) -> None:
        """Empty SQLite's log, in which what was deleted lives on; later, if that can't be done."""
        with contextlib.suppress(sqlite3.Error):
            self.has_deleted_keys = bool(self._pragma("wal_checkpoint(TRUNCATE)"))

    def execute(self, statement: str, *values: Any) -> sqlite3.Cursor:
        """Execute a statement; changes belong into a batch()."""
        return self._connection.execute(statement, values)

    def value(self, statement: str, *values: Any) -> Any:
        """Return the first value of the first row that a statement finds; None if there is none."""
        row = self._connection.execute(statement, values).fetchone()
        return row and row[0]

    def close(self) -> None:
        """Unlock the file."""
        self._connection.close()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn SQLite's errors into ours."""
        try:
            yield
        except sqlite3.Error as error:
            for part, problem in PROBLEMS.items():
                if part in str(error):
                    raise self._error(*problem) from None
            raise self._error(f"cannot be used: {error}") from None

    def _error(self, problem: str, hint: str = "") -> StoreError:
        return StoreError(f"the keeper's file {self.path} {problem}", hint)


def make_file(path: str) -> None:
    """Make an empty file that only we can use, so that a power cut does not take it away again."""
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
    if hasattr(os, "O_DIRECTORY"):  # else there are no folders to open (Windows)
        folder = os.open(os.path.dirname(path), os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def read_start(path: str) -> bytes:
    """Return what a file begins with."""
    with open(path, "rb") as file:
        return file.read(len(MAGIC))


def check_private(path: str) -> None:
    """Check that something is a file of our own that nobody else can read or write.

    To be done before SQLite opens it: to close it here would break SQLite's lock on it.

    :raises OSError: it is anything else, or can't be written
    """
    file = os.open(path, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    try:
        status = os.fstat(file)
    finally:
        os.close(file)
    if not stat.S_ISREG(status.st_mode):
        raise OSError(0, "it is not a file")
    if hasattr(os, "geteuid"):  # else modes tell nothing (Windows)
        if status.st_uid != os.geteuid():
            raise OSError(0, "it belongs to another user")
        if status.st_mode & 0o077:
            raise OSError(0, "other users can read or write it; run chmod 600 on it")
