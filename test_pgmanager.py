# SPDX-License-Identifier: MIT
"""The tests of pgmanager, in the order of the module.

Sockets, signals, processes and PostgreSQL are real. No test sleeps to let something happen:
``wait_until`` waits for a condition, and fails if the condition does not come true.
"""

from __future__ import annotations

import asyncio
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
import multiprocessing
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
DEADLINE = 30  # seconds; all that we wait for takes milliseconds, unless the machine is busy
# In memory, if there is enough of it, PostgreSQL starts up to five times as fast.
HAS_MEMORY = os.path.isdir("/dev/shm") and shutil.disk_usage("/dev/shm").free > 4_000_000_000
PLACE = "/dev/shm" if HAS_MEMORY else "/tmp"

# nohup and jobs in the background start the suite with signals ignored. The programs under test
# would inherit that.
for _number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGQUIT):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, signal.SIG_DFL)

linux = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and prlimit(2)")


def wait_until(condition: Callable[[], Any], what: str) -> Any:
    """Return the condition's first true value; fail if there is none before the deadline."""
    deadline = time.monotonic() + DEADLINE
    while not (value := condition()):
        assert time.monotonic() < deadline, f"never came: {what}"
        time.sleep(0.002)
    return value


@pytest.fixture
def folder() -> Iterator[Path]:
    """Provide an empty folder whose path is short enough for sockets."""
    path = tempfile.mkdtemp(dir=PLACE, prefix="pgm-")
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
    """Remove the caller's configuration, and give each test a folder of lock files by its port."""
    monkeypatch.setenv("PGPORT", str(random.randrange(1024, 65536)))
    for name in list(os.environ):
        if name.startswith(("PGM_", "PGMANAGER_")) or name in ("PGDATABASE", "DATABASE_URL"):
            monkeypatch.delenv(name)
    locks = lock_file("")
    yield
    shutil.rmtree(locks, ignore_errors=True)


def run(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run pgmanager and wait until it ends."""
    return subprocess.run(
        [*PGMANAGER, *words], capture_output=True, text=True, timeout=DEADLINE * 2, **options
    )


def is_one_line(text: str) -> bool:
    """Tell whether a text is one line of pgmanager's, as its errors are."""
    return text.startswith("pgmanager: ") and text.count("\n") == 1 and text.endswith("\n")


def is_refused(done: subprocess.CompletedProcess[str], *texts: str) -> bool:
    """Assert that a command ended with status 2 and one line that contains these texts."""
    assert (done.returncode, done.stdout) == (2, ""), done
    assert is_one_line(done.stderr), done.stderr
    assert all(text in done.stderr for text in texts), done.stderr
    return True


@contextlib.contextmanager
def started(*words: str, **options: Any) -> Iterator[Process]:
    """Start pgmanager, or another program; kill it at the end of the block."""
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
    """Start ``pgmanager serve`` and wait until it says that it is ready."""
    with started("serve", "-s", path, "--prefix", prefix, *words, **options) as process:
        assert process.stderr is not None
        while "serving" not in (said := process.stderr.readline()):
            assert said  # lines about a failed preparation may come first
        yield process


@contextlib.contextmanager
def serving(path: str, count: int = 1, prepare: Any = None) -> Iterator[pgmanager.Server]:
    """Serve names from this process, by a thread of it."""
    with contextlib.ExitStack() as stack:
        listener = pgmanager.bind_socket(path, stack)
        locks = pgmanager.Locks(lock_file(""))
        stack.callback(locks.unlock_folder)
        names = [f"db{shard}" for shard in range(count)]
        server = pgmanager.Server("serve", path, listener, names, locks, prepare)
        stack.callback(server.server_close)
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        stack.callback(thread.join)
        stack.callback(server.shutdown)
        yield server


def coded(code: str, *words: str, **options: Any) -> contextlib.AbstractContextManager[Process]:
    """Start Python code that imports pgmanager; warnings about fork() with threads are off."""
    program = [sys.executable, "-Wignore", "-c", code]
    pipes = {"stdin": subprocess.PIPE, "cwd": MODULE.parent}
    return started(*words, program=program, **{**pipes, **options})


def next_line(process: Process, line: str | None = None) -> str:
    """Send a line to a process if one is given; return the next line that it prints."""
    if line is not None and process.stdin:
        print(line, file=process.stdin, flush=True)
    assert process.stdout is not None
    return process.stdout.readline().rstrip("\n")


def ended(process: Process, number: int = signal.SIGTERM) -> str:
    """End a server by a signal; assert that it ends with status 0; return its stderr."""
    process.send_signal(number)
    process.wait(DEADLINE)
    assert process.stderr is not None
    said = process.stderr.read()  # communicate() would lose what readline() has buffered
    assert process.returncode == 0, said
    assert "Traceback" not in said
    return said


def processor_seconds(process: Process) -> float:
    """Return the processor time that a process has used."""
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def connect(path: str) -> socket.socket:
    """Connect to a server as a client; the caller closes the connection."""
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(DEADLINE)
    client.connect(path)
    return client


def name_of(client: socket.socket) -> str:
    """Wait for a client's grant and return the name."""
    answer = client.recv(1024).decode()
    assert answer.startswith("OK:"), answer
    return answer[3:]


@contextlib.contextmanager
def connected(path: str, number: int) -> Iterator[list[socket.socket]]:
    """Connect clients, one after the other; close them at the end of the block."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(connect(path)) for _ in range(number)]


def silent(client: Any, seconds: float = 0.1) -> bool:
    """Tell whether nothing arrives at a client for some seconds; blocks that long."""
    return not select.select([client], [], [], seconds)[0]


def observe(path: str) -> dict[str, Any]:
    """Read a server's status as an observer: a client that is bound to a path."""
    with tempfile.TemporaryDirectory(dir="/tmp") as own, socket.socket(socket.AF_UNIX) as observer:
        observer.settimeout(DEADLINE)
        observer.bind(f"{own}/pgmanager-observer")
        observer.connect(path)
        document: dict[str, Any] = json.loads(b"".join(iter(lambda: observer.recv(65536), b"")))
        return document


def states(path: str) -> list[str]:
    """Return the state of each of a server's names."""
    return [row["state"] for row in observe(path)["databases"]]


def wait_for_waiters(path: str, number: int) -> None:
    """Wait until a server has this number of waiters."""
    wait_until(lambda: len(observe(path)["waiting"]) == number, f"{number} waiters")


def wait_for_free(path: str) -> None:
    """Wait until all names of a server are free and nobody waits."""
    wait_for_waiters(path, 0)
    wait_until(lambda: set(states(path)) == {"free"}, "all names free")


def lock_file(name: str) -> str:
    """Return the path of a name's lock file, in the folder for this test's port."""
    return f"/tmp/pgmanager-{os.geteuid()}/{os.environ['PGPORT']}/{name}"


def socket_lock_file(path: str) -> str:
    """Return the path of the lock file for a socket's path."""
    return f"/tmp/pgmanager-{os.geteuid()}/sockets/{os.path.realpath(path).replace('/', '%2F')}"


def is_locked(path: str | Path) -> bool:
    """Tell whether a process holds the lock of a file or folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


# ----------------------------------------------------------------------------- Configuration

LIMIT = 107 if sys.platform == "linux" else 103  # bytes of a socket's path


@pytest.mark.parametrize(
    ("words", "env", "error"),
    [
        ("", {}, "no prefix"),
        ("--prefix 'a\nb'", {}, r"bad prefix: 'a\nb'; "),
        (f"--prefix {'x' * 62} --count 11", {}, "64 bytes"),
        *(
            (f"--prefix db --count '{bad}'", {}, f"bad count: '{bad}';")
            for bad in (0, -1, "", "1.5", "\u0663")
        ),
        ("--prefix db", {"PGM_DATABASE_COUNT": "many"}, "'many' from PGM_DATABASE_COUNT"),
        ("--prefix db -s ''", {}, "bad socket path: ''"),
        (
            f"--prefix db -s /tmp/{'x' * (LIMIT - 4)}",
            {},
            f"{LIMIT + 1} bytes, {LIMIT} allowed",
        ),
        ("--prefix db --template ''", {}, "bad template: ''"),
        ("--prefix db --template db0", {}, "the template is a database of the pool: db0; "),
        ("--prefix db --template t --prepare true", {}, "both template and prepare"),
        (
            "--prefix db",
            {"PGM_TEMPLATE": "t", "PGM_PREPARE": "true"},
            "both template and prepare",
        ),
        ("--prefix db", {"PGM_PREPARE": " "}, "' ' from PGM_PREPARE"),
        ("--prefix db", {"PGPORT": "1,,0"}, "bad port of PostgreSQL: '0'"),
        ("--prefix db", {"PGSERVICE": "mine"}, "PGSERVICE is set, "),
    ],
)
def test_serve_refuses_a_bad_value_before_it_starts_anything(
    words: str, env: dict[str, str], error: str, folder: Path, monkeypatch: Patch
) -> None:
    for variable, value in env.items():
        monkeypatch.setenv(variable, value)
    assert is_refused(run("serve", *shlex.split(words), cwd=folder), error)
    assert not list(folder.iterdir())


@pytest.mark.parametrize("value", ["-0.001", "nan", "inf", "1e9", "soon", "", "1,5"])
def test_acquire_refuses_a_bad_timeout(value: str, path: str, monkeypatch: Patch) -> None:
    monkeypatch.setenv("PGM_TIMEOUT", value)
    with pytest.raises(pgmanager.UsageError, match=f"bad timeout: '{value}' from PGM_TIMEOUT"):
        pgmanager.acquire(socket_path=path)


def test_arguments_win_over_the_environment_and_the_environment_over_defaults(
    folder: Path, monkeypatch: Patch
) -> None:
    monkeypatch.chdir(folder)
    longest = "s" * (LIMIT - len(str(folder.resolve())) - 1)
    # Each row adds a variable to those above it.
    rows = [
        ("PGM_DATABASE_PREFIX", "env", (), "tmp/pgmanager.sock", "env", 8),
        ("PGM_DATABASE_COUNT", "7", (), "tmp/pgmanager.sock", "env", 7),
        ("PGMANAGER_SOCKET", "second", (), "second", "env", 7),
        ("PGM_SOCKET", "first", ("--prefix", "db"), "first", "db", 7),
        (
            *("PGM_UNUSED", ""),
            ("--prefix", "\u00e9" * 31, "--count", "2", "-s", longest),
            *(longest, "\u00e9" * 31, 2),
        ),
    ]
    for variable, value, words, path, prefix, count in rows:
        monkeypatch.setenv(variable, value)
        with started("serve", *words, cwd=folder) as process:
            assert process.stderr is not None
            span = f"{prefix}0 ... {prefix}{count - 1} (count {count})"
            assert process.stderr.readline() == (
                f"pgmanager: serving {span} at {folder.resolve() / path}\n"
            )
            ended(process)
    assert not list(folder.iterdir())  # the server removes the folder that it made for its socket


# ------------------------------------------------------------------------ Where PostgreSQL is

THERE = {"PGUSER": "u", "PGPASSWORD": "p", "PGHOST": "h", "PGPORT": "5433"}


# Another test compares env_for() with libpq. These rows are about everything else.
@pytest.mark.parametrize(
    ("url", "env", "variables"),
    [
        ("postgresql://u:p@h:5433/{}", {}, THERE),
        # Other programs accept these schemes as PostgreSQL's.
        ("POSTGRES://h/{}", {}, {"PGHOST": "h"}),
        ("PostGIS+a1://h/{}", {}, {"PGHOST": "h"}),
        # libpq does not know these parameters.
        ("postgres:///{}?schema=a&pgbouncer=true&keepalives=1&ssl=false", {}, {}),
        # The last of repeated parameters wins.
        ("postgres:///{}?sslmode=allow&ssl=true", {}, {"PGSSLMODE": "require"}),
        ("postgres:///{}?ssl=true&sslmode=allow", {}, {"PGSSLMODE": "allow"}),
        ("postgres://h:1/{}?host=h&port=1&host=h", {}, {"PGHOST": "h", "PGPORT": "1"}),
        # In a list of hosts a missing port is 5432.
        ("postgres://h,i:2/{}", {"PGPORT": "6"}, {"PGHOST": "h,i", "PGPORT": "5432,2"}),
        # The caller's PGHOSTADDR would win over the URL's host.
        ("postgres://h/{}", {"PGHOSTADDR": "::2"}, {"PGHOST": "h"}),
        ("postgres://h/{}?hostaddr=::2", {}, {"PGHOST": "h", "PGHOSTADDR": "::2"}),
        ("postgres://u@/{}", {"PGHOSTADDR": "::2"}, {"PGHOSTADDR": "::2", "PGUSER": "u"}),
        # The caller's variables stay for what the URL does not give.
        ("postgres://u:p@h/{}", {"PGPORT": "5433", "PGHOST": "x", "PGUSER": "y"}, THERE),
        ("postgres://h/{}", {"PGCLUSTER": "15/main"}, {"PGHOST": "h", "PGCLUSTER": "15/main"}),
        ("", {"PGHOST": "h,h", "PGPORT": "1,55431"}, {"PGHOST": "h,h", "PGPORT": "1,55431"}),
    ],
)
def test_env_for_follows_the_url_and_makes_the_variables_agree(
    url: str, env: dict[str, str], variables: dict[str, str]
) -> None:
    caller = {**env, "PGDATABASE": "dev", "DATABASE_URL": url.format("dev")}
    expected = {**variables, "PGDATABASE": "db0", "DATABASE_URL": url.format("db0")}
    assert pgmanager.env_for("db0", caller) == expected


def test_env_for_leaves_out_what_some_driver_takes_for_the_database() -> None:
    for keyword in ("dbname", "database", "DataBase", "d%62name", "dbname%20", "+%2Bdbname%09+"):
        env = {"DATABASE_URL": f"postgresql+asyncpg://h/dev?a=database&{keyword}=x&db=dbname"}
        found = pgmanager.env_for("db0", env)["DATABASE_URL"]
        assert found == "postgresql+asyncpg://h/db0?a=database&db=dbname", keyword


@pytest.mark.parametrize(
    ("url", "place"),
    [
        ("postgresql:///{1}?host=%2Ftmp%2Fx&port=5432&user={0}", {"PGHOST": "/tmp/x"}),
        ("postgis:///{1}?user={0}&host=%2Ftmp%2Fx&port=5432", {"PGHOST": "/tmp/x"}),
        ("postgresql+a://{0}:s%40@127.0.0.1:5432/{1}", {"PGHOST": "127.0.0.1", "PGPASSWORD": "s@"}),
    ],
)
def test_pguser_wins_over_the_url_of_the_throw_away_server_and_over_no_other(
    url: str, place: dict[str, str]
) -> None:
    made_by_wrap = url.format("postgres", "postgres")
    for user, expected, code in (
        ("", "postgres", "postgres"),
        ("a b:/\\1@\u00e9", "a b:/\\1@\u00e9", "a%20b%3A%2F%5C1%40%C3%A9"),
    ):
        caller = {"DATABASE_URL": made_by_wrap, "PGM_EPHEMERAL_URL": made_by_wrap, "PGUSER": user}
        env = pgmanager.env_for("db0", caller)
        assert env.items() >= {**place, "PGPORT": "5432", "PGUSER": expected}.items()
        assert env["DATABASE_URL"] == env["PGM_EPHEMERAL_URL"] == url.format(code, "db0")
        env = pgmanager.env_for("db1", {**env, "PGUSER": "app"})  # as a worker does under exec
        assert env["DATABASE_URL"] == env["PGM_EPHEMERAL_URL"] == url.format("app", "db1")
    env = pgmanager.env_for("db0", {**caller, "DATABASE_URL": url.format("me", "dev")})
    assert (env["PGUSER"], env["DATABASE_URL"]) == ("me", url.format("me", "db0"))
    assert env["PGM_EPHEMERAL_URL"] == made_by_wrap


def get_libpq_options(env: dict[str, str], url: str | None = None) -> dict[str, bytes | None]:
    """Return the options that libpq connects with, of those that have a variable."""
    with pytest.MonkeyPatch.context() as patch:
        for variable in [name for name in os.environ if name.startswith("PG")]:
            patch.delenv(variable)
        for variable, value in env.items():
            patch.setenv(variable, value)
        options = psycopg.pq.Conninfo.get_defaults()
    known = {option.keyword for option in options if option.envvar}
    if url is not None:
        parsed = psycopg.pq.Conninfo.parse(os.fsencode(url))
        options += [option for option in parsed if option.val is not None]
    values = {each.keyword.decode(): each.val for each in options if each.keyword in known}
    # An empty port means 5432.
    values["port"] = b",".join(port or b"5432" for port in (values["port"] or b"").split(b","))
    return values


LOGINS = " u@ u:p@ :p@ @ u:@ a+b:c+d@ u%40:%2F%25@ u:a?b:c@ %e9@"
HOSTS = " h h:1 h: h,i h:1,i h,i:2 , [::1]:5,h %2Ftmp:7 h%2Ci"
PARAMETERS = """host=x host= host=%2Ftmp host=a,b port=7 port=7,8 port=, %70ort=9 hostaddr=::1
    user=v password=a+b%2B password= options=-c%20role%3Dx passfile=x sslmode=allow ssl=true
    %73sl=true dbname=z d%62name=z connect_timeout=3 application_name=x%20y sslcert=c"""
URL_PARTS = st.tuples(
    st.sampled_from(LOGINS.split(" ")),
    st.sampled_from(HOSTS.split(" ")),
    st.sampled_from(["", "/", "/dev", "/d%2F"]),
    st.lists(st.sampled_from(PARAMETERS.split()), max_size=3),
)
ODD_NAME = "a%/\u00e9 ?b&c=d#"
CALLERS: list[dict[str, str]] = [
    {"PGHOST": "c"}, {"PGPORT": "6"}, {"PGHOST": "c,d", "PGPORT": "6,7"}, {"PGUSER": "x"},
    {"PGSSLMODE": "prefer", "PGOPTIONS": "-c a=b", "PGDATABASE": "dev"}, {},
]  # fmt: skip


def has_two_values(hosts: str, parameters: list[str]) -> bool:
    """Tell whether a URL has two different hosts or ports."""
    values = set()
    for part in (hosts, *(f"?{parameter}" for parameter in parameters)):
        for option in psycopg.pq.Conninfo.parse(os.fsencode(f"postgres://{part}")):
            if option.keyword in (b"host", b"port") and option.val is not None:
                value = option.val.split(b",")
                if part == hosts and option.keyword == b"port":
                    value = [port or b"5432" for port in value]
                values.add((option.keyword, tuple(value)))
    return len(values) > len({keyword for keyword, _ in values})


@settings(deadline=None)
@given(URL_PARTS, st.sampled_from(CALLERS), st.sampled_from(["db0", ODD_NAME]))
def test_libpq_finds_the_same_server_by_the_url_and_by_the_variables(
    parts: tuple[str, str, str, list[str]], caller: dict[str, str], database: str
) -> None:
    login, hosts, path, parameters = parts
    url = f"postgres://{login}{hosts}{path}?{'&'.join(parameters)}"
    if has_two_values(hosts, parameters):
        with pytest.raises(pgmanager.UsageError, match=r"two values for the (host|port); "):
            pgmanager.env_for(database, {**caller, "DATABASE_URL": url})
        return
    expected = {**get_libpq_options(caller, url), "dbname": os.fsencode(database)}
    env = pgmanager.env_for(database, {**caller, "DATABASE_URL": url})
    assert get_libpq_options(env) == expected
    assert get_libpq_options(env, env["DATABASE_URL"]) == expected


def test_env_for_knows_every_variable_of_libpq() -> None:
    options = psycopg.pq.Conninfo.get_defaults()
    variables = {each.keyword.decode(): each.envvar.decode() for each in options if each.envvar}
    del variables["dbname"], variables["service"]
    assert variables.items() <= pgmanager.VARIABLES.items()


LOGIN = "postgresql://u:secret@"


@pytest.mark.parametrize(
    ("env", "error"),
    [
        ({"PGSERVICE": "mine"}, "PGSERVICE is set, "),
        ({"PGSERVICE": "", "DATABASE_URL": LOGIN + "h/"}, "PGSERVICE is set, "),
        ({"DATABASE_URL": LOGIN + "h/?ser%76ice="}, "DATABASE_URL has a service"),
        ({"DATABASE_URL": LOGIN + "h/?service+=x"}, "DATABASE_URL has a service"),
        ({"DATABASE_URL": LOGIN + "h:5433/?port=5434"}, "two values for the port; remove one"),
        ({"DATABASE_URL": LOGIN + "h/?%68ost=/tmp"}, "two values for the host; remove one"),
        ({"DATABASE_URL": LOGIN + "/?host=h&host="}, "two values for the host; remove one"),
        ({"PGCLUSTER": "15/main", "DATABASE_URL": LOGIN + "/"}, "PGCLUSTER is set"),
        ({"PGCLUSTER": "15/main", "PGHOSTADDR": "::1"}, "PGCLUSTER is set"),
        ({"DATABASE_URL": "sqlite:///secret"}, "its scheme is 'sqlite'; correct it to "),
        ({"DATABASE_URL": "jdbc:postgresql://h/?password=secret"}, "is 'jdbc:postgresql'; "),
        ({"DATABASE_URL": "postgresqlx://u:secret@h/"}, "is 'postgresqlx'; "),
        ({"DATABASE_URL": "u:secret@h/"}, "cannot read DATABASE_URL: it is no URL; "),
        ({"DATABASE_URL": LOGIN + "h:secret/"}, "its host or its port is wrong; "),
        ({"DATABASE_URL": "postgresql://u:sec/ret@h/"}, "its host or its port is wrong; "),
        ({"DATABASE_URL": "postgresql://u:73637265/t@h/"}, "its host or its port is wrong; "),
        ({"DATABASE_URL": "postgresql://u:sec%ret@h/"}, "without two hex digits; "),
        ({"DATABASE_URL": LOGIN + "h/?password=sec%00ret"}, "without two hex digits; "),
        ({"DATABASE_URL": LOGIN + "h:0/"}, "bad port of PostgreSQL: '0'"),
    ],
)
def test_env_for_refuses_unusable_settings_and_shows_no_password(
    env: dict[str, str], error: str
) -> None:
    with pytest.raises(pgmanager.UsageError) as caught:
        pgmanager.env_for("db0", env)
    assert error in str(caught.value)
    assert not re.search("sec|ret|7363|\n", str(caught.value))


@pytest.mark.parametrize(
    "words",
    ["serve", "serve --template t", "wrap touch ran", "wrap-each touch ran", "exec touch ran"],
)
def test_commands_refuse_pgservice_before_they_run_anything(
    words: str, folder: Path, monkeypatch: Patch
) -> None:
    monkeypatch.setenv("PGSERVICE", "mine")
    monkeypatch.setenv("PGM_DATABASE_PREFIX", "db")
    assert is_refused(run(*words.split(), cwd=folder), "PGSERVICE is set, ", "set PGHOST")
    assert not list(folder.iterdir())


def test_commands_and_preparations_get_variables_that_agree_with_the_url(
    folder: Path, path: str, monkeypatch: Patch
) -> None:
    show = 'echo "$PGDATABASE $PGUSER $PGPASSWORD $PGHOST $PGPORT $PGSSLMODE $DATABASE_URL"'
    monkeypatch.setenv("PGPORT", "1")
    monkeypatch.setenv("PGHOST", "elsewhere")
    monkeypatch.setenv("DATABASE_URL", "postgres://u:p%40@h:2/old?schema=a&sslmode=allow")
    expected = "{0} u p@ h 2 allow postgres://u:p%40@h:2/{0}?schema=a&sslmode=allow\n"
    with served(path, "--count", "1", "--prepare", f"{show} > shown", cwd=folder):
        assert run("exec", "-s", path, "sh", "-c", show).stdout == expected.format("db0")
        assert Path(observe(path)["locks"]).name == "2"
    assert (folder / "shown").read_text() == expected.format("db0")
    each = ("wrap-each", "--prefix", os.fsdecode(b"caf\xe9_"), "--count", "1")
    assert run(*each, "sh", "-c", 'echo "${DATABASE_URL#*@h:2/}"').stdout.startswith("caf%E9_0?")


# ------------------------------------------------------------------------------------- Locks

TwoLocks = tuple[pgmanager.Locks, pgmanager.Locks]


@pytest.fixture
def two_locks() -> Iterator[TwoLocks]:
    """Provide the locks of two servers that share their names."""
    both = pgmanager.Locks(lock_file("")), pgmanager.Locks(lock_file(""))
    yield both
    for locks in both:
        locks.unlock_folder()


def test_closing_a_copy_keeps_a_name_locked_and_unlocking_a_copy_frees_it(
    two_locks: TwoLocks,
) -> None:
    ours, others = two_locks
    lock, _ = ours.take("db0")
    second, third = os.dup(lock), os.dup(lock)
    ours.close_lock(lock)
    with pytest.raises(BlockingIOError):
        others.take("db0")
    pgmanager.unlock(second)
    others.close_lock(others.take("db0")[0])
    os.close(third)


def test_the_owner_token_shows_whether_another_server_has_used_a_name(two_locks: TwoLocks) -> None:
    ours, others = two_locks
    file = ours.path("db0")

    def take(locks: pgmanager.Locks) -> bool:
        lock, has_our_token = locks.take("db0")
        locks.close_lock(lock)
        return has_our_token

    assert not take(ours)
    for change in (lambda: take(others), lambda: os.truncate(file, 0), lambda: os.unlink(file)):
        assert take(ours)
        change()
        assert not take(ours)


@linux
def test_a_lock_whose_file_is_removed_while_we_wait_is_taken_on_the_new_file() -> None:
    file = lock_file("db0")
    first = pgmanager.take_lock(file)
    with concurrent.futures.ThreadPoolExecutor() as threads:
        waiting = threads.submit(pgmanager.take_lock, file, wait=True)
        links = Path("/proc/self/fd")
        wait_until(
            lambda: [os.path.realpath(each) for each in links.iterdir()].count(file) > 1,
            "the second descriptor",
        )
        os.unlink(file)
        pgmanager.close_lock(first)
        second = waiting.result(10)
    assert os.path.samestat(os.fstat(second), os.stat(file))
    pgmanager.close_lock(second)


def test_every_name_has_its_own_lock_file_in_the_same_folder(two_locks: TwoLocks) -> None:
    ours, _ = two_locks
    names = ["a", "a/b", "a%2Fb", "a%b", "a%25b", "../a", "%2Fa", ".hidden", "\u00e9", "x" * 63]
    for name in names:
        ours.close_lock(ours.take(name)[0])
    files = set(Path(lock_file("")).iterdir())  # closing has not removed them
    assert files == {Path(ours.path(name)) for name in names}
    assert len(files) == len(names)


def test_a_message_is_said_once_and_not_more_than_some_hundred_different_ones() -> None:
    code = "import pgmanager; [pgmanager.say_once(f'error {n % 999}') for n in range(9999)]"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr
    assert said == "".join(f"pgmanager: error {n}\n" for n in range(pgmanager.MAX_SAID))


@linux
def test_databases_are_prepared_on_no_more_processors_than_we_may_use() -> None:
    code = "import os, pgmanager; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])"
    code += "; print(pgmanager.count_processors())"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "1\n"


def test_the_ports_of_postgresql_name_the_folder_of_the_lock_files(monkeypatch: Patch) -> None:
    for url, variable, ports in (
        ("postgres://h:6543/x", "1", "6543"),
        ("postgres://h/x", "05433, ,1", "5433,5432,1"),
    ):
        monkeypatch.setenv("DATABASE_URL", url)
        monkeypatch.setenv("PGPORT", variable)
        locks = f"/tmp/pgmanager-{os.geteuid()}/{ports}"
        assert pgmanager.Postgres(os.environ).locks_folder == locks


# All servers of a user share one folder, so each of these tests runs as a user of its own. That
# user may not be allowed to read the modules, so they are imported first.
AS_USER = """
import contextlib, glob, hashlib, io, json, os, queue, resource, shlex, socket, subprocess, sys
import tempfile, urllib.parse, pgmanager
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
    """Provide options that run pgmanager as a new user, the user's id, and its private folder."""
    if os.geteuid() != 0:
        pytest.skip("only root can run a program as another user")
    uid = random.randrange(20_000, 60_000)
    folder.chmod(0o777)
    private = Path(f"/tmp/pgmanager-{uid}")
    program = [sys.executable, "-c", AS_USER, str(uid)]
    yield {"program": program, "cwd": MODULE.parent}, uid, private
    subprocess.run(["rm", "-rf", private])  # rmtree() refuses a link


@pytest.mark.parametrize("kind", ["a link", "open to others", "another user's"])
def test_a_server_refuses_a_private_folder_that_others_control(
    kind: str, user: User, folder: Path, path: str
) -> None:
    options, uid, private = user
    if kind == "a link":
        folder.chmod(0o700)
        private.symlink_to(folder)
    else:
        private.mkdir(0o750 if kind == "open to others" else 0o700)
    os.chown(private, 0 if kind == "another user's" else uid, -1)
    with started("serve", "-s", path, "--prefix", "db", **options) as process:
        stdout, stderr = process.communicate(timeout=DEADLINE)
    assert (process.returncode, stdout, is_one_line(stderr)) == (125, "", True)
    assert f"cannot lock: {private} is no folder of user {uid} alone; " in stderr
    assert not os.path.lexists(path)


def test_a_server_locks_its_private_folder_and_makes_it_again_if_it_is_removed(
    user: User, path: str
) -> None:
    options, _, private = user
    with served(path, "--count", "2", **options) as process:
        assert is_locked(private)
        for _ in range(2):
            with connected(path, 2) as clients:
                assert sorted(map(name_of, clients)) == ["db0", "db1"]
                assert private.stat().st_mode & 0o7777 == 0o700
                assert is_locked(private / os.environ["PGPORT"] / "db0")
            wait_for_free(path)
            shutil.rmtree(private)
        ended(process)


def test_a_name_is_not_lost_while_the_private_folder_cannot_be_used(user: User, path: str) -> None:
    options, uid, private = user
    with served(path, "--count", "2", **options) as process:
        shutil.rmtree(private)
        private.mkdir(0o755)
        os.chown(private, uid, -1)
        with connected(path, 2) as clients:
            wait_for_waiters(path, 2)
            private.chmod(0o700)
            assert sorted(map(name_of, clients)) == ["db0", "db1"]
        ended(process)


def test_a_server_removes_the_sockets_of_killed_servers_when_it_starts(path: str) -> None:
    living, inner = f"{path}-living", f"{path}-folder/a/b"
    with served(path) as one, served(inner) as two, served(living, prefix="living") as alive:
        for killed in (one, two):
            killed.kill()
            killed.wait()
        with served(f"{path}-next"):
            assert [os.path.lexists(each) for each in (path, living)] == [False, True]
            assert not os.path.lexists(f"{path}-folder")  # made for the socket
            assert all(os.path.exists(socket_lock_file(each)) for each in (path, living))
        ended(alive)


# -------------------------------------------------------------------------------------- Pool


class PoolMachine(RuleBasedStateMachine):
    """A real pool with pretended locks and worker threads, and a model of what it must do.

    Another process, such as a second server, may at any time lock a name that we have not locked.
    A lock is the name itself. A client is a number.
    """

    @initialize(
        count=st.integers(1, 4),
        prepares=st.booleans(),
        spares=st.integers(0, 2),
        locked=st.sets(st.sampled_from(["db0", "db1", "db2", "db3"])),
    )
    def start_pool(self, count: int, prepares: bool, spares: int, locked: set[str]) -> None:
        self.now = 0
        self.clients = itertools.count(1)
        self.names = [f"db{shard}" for shard in range(count)]
        self.prepares, self.spares = prepares, spares
        self.preparations_succeed = True
        self.is_short_of_descriptors = False
        self.our_locks: set[str] = set()
        self.other_locks = locked
        self.our_tokens: set[str] = set()  # lock files in which the last token is ours
        self.fresh: set[str] = set()  # databases that we have prepared, and nobody has used since
        self.free = [] if prepares else [*self.names]  # in the order of release
        self.unprepared = [*self.names] if prepares else []
        self.holders: dict[int, str] = {}
        self.waiters: dict[int, int] = {}  # in the order of arrival, with the time of arrival
        self.workers: dict[str, Iterator[None]] = {}  # the names that worker threads have
        self.states: dict[str, str] = {}  # of these names
        self.last_failure: str | None = None
        locks: Any = self
        calls = (self.grant, self.refuse, self.enqueue)
        clock = lambda: float(self.now)  # noqa: E731
        self.pool = pgmanager.Pool(self.names, locks, *calls, prepares, spares, clock)
        self.pool.start()
        assert not locked.intersection(self.free)

    # The pool calls these methods.

    def take(self, name: str) -> tuple[Any, bool]:
        assert name not in self.our_locks
        if name in self.other_locks:
            raise BlockingIOError
        if self.is_short_of_descriptors:
            raise OSError(errno.EMFILE, "too many open files")
        has_our_token = name in self.our_tokens
        self.our_locks.add(name)
        self.our_tokens.add(name)
        return name, has_our_token

    def close_lock(self, lock: str) -> None:
        self.our_locks.remove(lock)

    def path(self, name: str) -> str:
        return f"the file of {name}"

    def grant(self, client: int, name: str, lock: Any) -> None:
        assert client == next(iter(self.waiters)), "not first come, first served"
        assert name in self.workers or name == self.free.pop(0), "not round robin"
        assert lock == name
        assert name in self.our_locks
        assert name not in self.holders.values(), "two holders"
        assert not self.prepares or name in self.fresh, "not prepared"
        self.fresh.discard(name)
        del self.waiters[client]
        self.holders[client] = name

    def refuse(self, client: int, reason: str | None) -> None:
        assert self.are_all_broken()
        assert reason == self.last_failure
        del self.waiters[client]

    def enqueue(self, name: str) -> None:
        assert name not in self.workers
        if name in self.unprepared:
            assert self.count_coming() < len(self.waiters) + self.spares, "prepared too early"
            assert name == self.unprepared.pop(0)
        self.states[name] = "preparing"
        if name in self.free:
            self.free.remove(name)
            if not self.can_lock(name):
                self.states[name] = "elsewhere"
        self.workers[name] = self.run_worker(name)

    # What a server does with the pool.

    def run_worker(self, name: str) -> Iterator[None]:
        """Do what a worker thread does for a name; yield where it blocks."""
        failures, is_prepared = 0, False
        while True:
            while self.is_short_of_descriptors:
                yield
            if name in self.other_locks:
                self.states[name] = "elsewhere"
                self.pool.mark_elsewhere(name)
            while not self.can_lock(name):
                yield
            lock, has_our_token = self.take(name)
            if self.pool.offer(name, lock, is_prepared and has_our_token):
                break
            assert self.prepares
            assert name not in self.holders.values(), "prepared under a holder"
            self.states[name] = "preparing"
            self.fresh.discard(name)
            yield
            self.our_locks.remove(name)
            is_prepared = self.preparations_succeed
            if is_prepared:
                self.fresh.add(name)
                failures = 0
                yield  # another process may lock the name now
            else:
                self.states[name] = "broken"
                self.last_failure = f"{name} failed at {self.now}"
                pause = self.pool.mark_broken(name, self.last_failure)
                assert pause == min(2**failures, 30)
                failures += 1
                end = self.now + pause
                while self.now < end:
                    yield
        del self.workers[name], self.states[name]
        if name not in self.holders.values():
            self.free.append(name)

    def can_lock(self, name: str) -> bool:
        return name not in self.other_locks and not self.is_short_of_descriptors

    def count_coming(self) -> int:
        """Count the names that are free or being prepared."""
        return len(self.free) + [*self.states.values()].count("preparing")

    def are_all_broken(self) -> bool:
        return [*self.states.values()] == ["broken"] * len(self.names)

    @rule()
    def acquire(self) -> None:
        client = next(self.clients)
        self.waiters[client] = self.now
        self.pool.acquire(client)

    @precondition(lambda self: self.holders or self.waiters)
    @rule(data=st.data(), keeps_lock=st.booleans())
    def release(self, data: st.DataObject, keeps_lock: bool) -> None:
        clients = [*self.holders, *self.waiters]
        self.end_client(data.draw(st.sampled_from(clients)), keeps_lock)

    def end_client(self, client: int, keeps_lock: bool = False) -> None:
        self.waiters.pop(client, None)
        if name := self.holders.pop(client, None):
            if keeps_lock:
                self.other_locks.add(name)
            if not self.prepares:
                self.free.append(name)
        self.pool.release(client)

    @rule(data=st.data(), keeps_lock=st.booleans())
    def another_process_uses_a_name(self, data: st.DataObject, keeps_lock: bool) -> None:
        name = data.draw(st.sampled_from(self.names))
        if name not in self.our_locks:
            self.other_locks.add(name)
            self.our_tokens.discard(name)
            self.fresh.discard(name)
            if not keeps_lock:
                self.other_locks.remove(name)

    @rule(is_short=st.booleans())
    def descriptors_run_out_or_come_back(self, is_short: bool) -> None:
        self.is_short_of_descriptors = is_short

    @precondition(lambda self: self.workers)
    @rule(data=st.data(), succeeds=st.sampled_from([True, True, False]))
    def a_worker_runs(self, data: st.DataObject, succeeds: bool) -> None:
        self.preparations_succeed = succeeds
        next(self.workers[data.draw(st.sampled_from(sorted(self.workers)))], None)

    @precondition(lambda self: self.workers)
    @rule(succeed=st.booleans(), seconds=st.sampled_from([0, 1, 31]), rounds=st.integers(1, 7))
    def all_workers_run(self, succeed: bool, seconds: int, rounds: int) -> None:
        self.preparations_succeed = succeed
        for _ in range(rounds):
            self.now += seconds
            for worker in [*self.workers.values()] * 3:
                next(worker, None)

    @invariant()
    def check(self) -> None:
        places = [*self.holders.values(), *self.free, *self.unprepared, *self.workers]
        assert sorted(places) == self.names, "a name is lost, or is in two places"
        assert self.our_locks.issuperset(self.holders.values())
        databases, waiters, _ = self.pool.snapshot()
        assert {row["name"]: row["state"] for row in databases} == {
            **dict.fromkeys(self.holders.values(), "leased"),
            **dict.fromkeys(self.free, "free"),
            **dict.fromkeys(self.unprepared, "unprepared"),
            **self.states,
        }
        assert {row["holder"]: row["name"] for row in databases if row["holder"]} == self.holders
        assert waiters == list(self.waiters.items())
        assert not (self.waiters and (self.free or self.are_all_broken()))
        if self.unprepared:
            assert self.count_coming() >= len(self.waiters) + self.spares, "prepared too late"

    def teardown(self) -> None:
        """End all other processes and all clients: then every name must be free again."""
        self.is_short_of_descriptors = False
        self.other_locks.clear()
        for client in [*self.waiters, *self.holders]:
            self.end_client(client)
        self.all_workers_run(True, 31, 4)
        assert not self.our_locks
        assert sorted([*self.free, *self.unprepared]) == self.names


PoolMachine.TestCase.settings = settings(
    max_examples=int(os.environ.get("POOL_EXAMPLES", "150")),
    stateful_step_count=50,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
TestPool = PoolMachine.TestCase


@pytest.mark.parametrize("count", [1, 3], ids=["a client waits", "a name is free"])
def test_a_closed_pool_refuses_every_client_and_keeps_no_lock(
    count: int, two_locks: TwoLocks
) -> None:
    ours, others = two_locks
    names = [f"db{shard}" for shard in range(count)]
    refused: list[tuple[str, str | None]] = []
    pool = pgmanager.Pool(names, ours, lambda *_: None, lambda *each: refused.append(each), print)
    pool.start()
    pool.acquire("first")
    pool.acquire("second")
    pool.close()
    pool.acquire("third")
    assert sorted(refused) == [("first", None), ("second", None), ("third", None)]
    assert pool.offer("db0", *ours.take("db0"))  # by a worker thread that waited for the lock
    for name in names:
        others.close_lock(others.take(name)[0])


# ------------------------------------------------------------------------------------ Server


@pytest.fixture
def server(path: str) -> Iterator[Process]:
    """Serve two names; afterwards both must be free, and the server must end well."""
    with served(path, "--count", "2") as process:
        yield process
        wait_for_free(path)
        ended(process)
        assert not os.path.lexists(path)


def test_a_grant_is_ok_and_the_name_and_on_linux_carries_the_lock(
    server: Process, path: str
) -> None:
    with connected(path, 3) as clients:
        for client, name in zip(clients, ("db0", "db1", "db0")):
            if client is clients[2]:
                assert silent(client)
                clients[0].close()
            answer, rights, *_ = client.recvmsg(1024, socket.CMSG_SPACE(64))
            assert answer == f"OK:{name}".encode()
            assert len(rights) == (1 if sys.platform == "linux" else 0)
            for *_, packed in rights:
                lock = int.from_bytes(packed, sys.byteorder)
                assert os.path.samestat(os.fstat(lock), os.stat(lock_file(name)))
                assert is_locked(lock_file(name))
                os.close(lock)


@pytest.mark.parametrize("end", ["closes", "is reset", "closes half"])
def test_a_client_may_send_anything_and_keeps_its_name_or_place_until_it_ends(
    end: str, server: Process, path: str
) -> None:
    with connected(path, 4) as (holder, _, leaver, waiter):
        for client in (holder, leaver, waiter):
            client.sendall(b"x" * 4_000_000)
        wait_for_waiters(path, 2)
        # A client that closes with its grant unread resets the connection.
        assert end == "is reset" or name_of(holder) == "db0"
        for client, left in ((leaver, 1), (holder, 0)):
            assert silent(waiter)
            if end == "closes half":  # OpenSSH forwards only this when a client ends
                client.shutdown(socket.SHUT_WR)
            else:
                client.close()
            wait_for_waiters(path, left)
        assert name_of(waiter) == "db0"


def test_a_client_is_an_observer_only_if_its_own_address_begins_with_pgmanager_observer(
    server: Process, folder: Path, path: str
) -> None:
    (folder / "pgmanager-observers").mkdir()
    for own in ("my-pgmanager-observer", "pgmanager-observers/me"):
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(DEADLINE)
            client.bind(str(folder / own))
            client.connect(path)
            assert name_of(client) == f"db{observe(path)['leases'] - 1}"


def make_stale(path: str) -> None:
    """Leave a socket that nobody listens on."""
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(path)


def is_listening(path: str) -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        return client.connect_ex(path) == 0


@pytest.fixture
def idle_server(path: str) -> Iterator[pgmanager.Server]:
    """Provide a server in this process that does not accept clients yet."""
    with contextlib.ExitStack() as stack:
        listener = pgmanager.bind_socket(path, stack)
        locks = pgmanager.Locks(lock_file(""))
        stack.callback(locks.unlock_folder)
        server = pgmanager.Server("serve", path, listener, ["db0"], locks)
        stack.callback(server.server_close)
        yield server


def test_nobody_else_can_ever_connect_to_the_socket_whatever_the_umask(path: str) -> None:
    modes = []

    def look(*_event: object) -> None:  # after each call in this thread, such as bind(2)
        os.umask(0)  # so the server cannot rely on it; another thread may set it as well
        with contextlib.suppress(FileNotFoundError):
            modes.append(oct(os.lstat(path).st_mode))

    before = os.umask(0)
    with contextlib.ExitStack() as stack:
        sys.setprofile(look)
        try:
            pgmanager.bind_socket(path, stack)
        finally:
            sys.setprofile(None)
            os.umask(before)
    assert modes[-1] == "0o140600"
    assert sys.platform != "linux" or set(modes) == {"0o140600"}


def test_a_server_never_replaces_anything_but_a_dead_socket(folder: Path) -> None:
    (folder / "file").write_text("precious")
    (folder / "folder").mkdir()
    (folder / "link").symlink_to("nowhere")
    with socket.socket(socket.AF_UNIX) as foreign:
        foreign.bind(str(folder / "socket"))
        foreign.listen(0)
        with connected(str(folder / "socket"), 1):  # now its backlog is full
            for path in list(folder.iterdir()):
                before = path.lstat()
                problem = "socket is in use" if path.name == "socket" else "cannot serve"
                with pytest.raises(pgmanager.SocketError, match=f"^{problem}: {path}"):
                    pgmanager.bind_socket(str(path), contextlib.ExitStack())
                assert os.path.samestat(path.lstat(), before)
    assert (folder / "file").read_text() == "precious"


def test_the_real_path_of_a_socket_may_be_longer_than_the_name_of_a_file(folder: Path) -> None:
    real = folder / ("x" * 150) / ("x" * 150)
    real.mkdir(parents=True)
    (folder / "link").symlink_to(real)
    path = str(folder / "link" / "s")
    with served(path) as process:
        busy = run("serve", "-s", path, "--prefix", "db")
        assert (busy.returncode, is_one_line(busy.stderr)) == (125, True)
        assert f"socket is in use: {path}; end what serves there" in busy.stderr
        process.kill()
        process.wait()
    with served(path) as process:
        ended(process)
    assert not os.path.lexists(path)


def test_a_killed_server_starts_again_while_another_removes_what_it_left(
    folder: Path, monkeypatch: Patch
) -> None:
    left, other = str(folder / "left"), str(folder / "other")
    with socket.socket(socket.AF_UNIX) as killed:
        killed.bind(left)
    # The lock files are where the servers of other tests do not look for them.
    monkeypatch.setattr(pgmanager, "SOCKET_LOCKS", os.environ["PGPORT"])
    file = Path(lock_file(os.path.realpath(left).replace("/", "%2F")))
    file.parent.mkdir()
    file.write_text(left)
    removing, remove = threading.Event(), pgmanager.remove_dead_socket

    def remove_slowly(path: str, lock: int) -> None:
        if path == left and not removing.is_set():
            removing.set()
            time.sleep(0.5)
        remove(path, lock)

    def bind(path: str) -> str:
        with contextlib.ExitStack() as stack:
            return str(pgmanager.bind_socket(path, stack).getsockname())

    monkeypatch.setattr(pgmanager, "remove_dead_socket", remove_slowly)
    with concurrent.futures.ThreadPoolExecutor() as threads:
        first = threads.submit(bind, other)
        assert removing.wait(10)
        second = threads.submit(bind, left)
        assert (first.result(10), second.result(10)) == (other, left)


def test_a_socket_in_use_is_found_out_before_anything_is_made(folder: Path, path: str) -> None:
    init = ("--init", f"touch {folder}/began")
    with served(path):
        for words in (("serve",), ("wrap", "--ephemeral")):
            end = ("--", "true") if words[0] == "wrap" else ()
            done = run(*words, "-s", path, "--prefix", "db", *init, *end)
            assert (done.returncode, done.stdout) == (125, "")
            assert f"socket is in use: {path}; " in done.stderr
    assert not (folder / "began").exists()


def test_a_client_to_which_no_grant_can_be_sent_loses_the_name(server: Process, path: str) -> None:
    with connected(path, 4) as clients:
        deaf = clients[2]
        deaf.shutdown(socket.SHUT_RD)  # now the server cannot send, and the client does not end
        wait_for_waiters(path, 2)
        clients[0].close()
        assert name_of(clients[3]) == "db0"
        assert deaf.recv(1) == b""


@pytest.mark.parametrize("problem", [KeyError("PGPORT"), AssertionError()])
def test_a_preparation_that_raises_makes_the_name_broken_and_is_tried_again(
    problem: Exception, path: str
) -> None:
    problems = [problem]

    def prepare(name: str, lock: int) -> None:
        if problems:
            raise problems.pop()

    with serving(path, 1, prepare):
        with connect(path) as client:
            answer = client.recv(1024).decode()
            assert answer == f"EMPTY:cannot prepare db0: {problem!r}"
        wait_until(lambda: states(path) == ["free"], "the second try")


def test_exactly_one_of_several_servers_that_start_at_once_serves(folder: Path) -> None:
    barrier = threading.Barrier(8)

    def serves(path: str) -> bool:
        with contextlib.ExitStack() as stack:
            barrier.wait(DEADLINE)
            try:
                stack.enter_context(serving(path))
                return True
            except pgmanager.SocketInUse:
                return False
            finally:
                barrier.wait(DEADLINE)  # the one that serves does so until all have tried

    with concurrent.futures.ThreadPoolExecutor(8) as racers:
        for number in range(20):
            path = str(folder / f"{number}")
            if number % 2:
                make_stale(path)
            assert sum(racers.map(serves, [path] * 8)) == 1
            assert not os.path.lexists(path)


def test_a_server_that_ends_leaves_no_thread_no_descriptor_and_no_client(path: str) -> None:
    gc.collect()
    threads, descriptors = {*threading.enumerate()}, len(os.listdir("/dev/fd"))
    for _ in range(10):
        with serving(path, 2):
            with connected(path, 20):
                wait_for_waiters(path, 18)
            wait_for_free(path)  # now the threads of 20 clients are idle
            clients = [connect(path) for _ in range(3)]
            assert {name_of(client) for client in clients[:2]} == {"db0", "db1"}
            wait_for_waiters(path, 1)
        assert [client.recv(1024) for client in clients] == [b"", b"", b""]
        for client in clients:
            client.close()
        assert not os.path.lexists(path)
    wait_until(lambda: {*threading.enumerate()} <= threads, "the end of all threads")
    wait_until(lambda: len(os.listdir("/dev/fd")) == descriptors, "the end of all descriptors")


def test_a_default_timeout_of_sockets_ends_neither_leases_nor_the_server(path: str) -> None:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(0.05)
    try:
        with serving(path), connected(path, 2) as clients:
            assert name_of(clients[0]) == "db0"
            assert silent(clients[1], 0.3)
            clients[0].close()
            assert name_of(clients[1]) == "db0"
    finally:
        socket.setdefaulttimeout(before)


@pytest.mark.parametrize("line", range(9))
def test_shutdown_ends_serve_forever_at_whatever_line_of_it_the_call_comes(
    line: int, idle_server: pgmanager.Server
) -> None:
    is_at_line, may_continue = threading.Event(), threading.Event()
    lines = itertools.count()

    def pause(frame: Any, event: str, _: object) -> Any:
        if frame.f_code.co_name == "serve_forever" and event == "line" and next(lines) == line:
            is_at_line.set()
            may_continue.wait(DEADLINE)
        return pause

    def serve() -> None:
        sys.settrace(pause)
        idle_server.serve_forever()

    calls = (serve, idle_server.shutdown)
    threads = [threading.Thread(target=call, daemon=True) for call in calls]
    threads[0].start()
    assert is_at_line.wait(DEADLINE)
    threads[1].start()
    threads[1].join(0.1)  # it returns at once, or waits for the loop
    may_continue.set()
    for thread in threads:
        thread.join(DEADLINE)
        assert not thread.is_alive()


def test_clients_wait_while_the_backlog_is_full_and_are_then_served(
    idle_server: pgmanager.Server, path: str, monkeypatch: Patch
) -> None:
    monkeypatch.setenv("PGM_SOCKET", path)
    idle_server.socket.listen(1)
    with concurrent.futures.ThreadPoolExecutor(9) as threads, contextlib.ExitStack() as stack:
        error = 0
        while not error:
            client = stack.enter_context(socket.socket(socket.AF_UNIX))
            client.setblocking(False)
            error = client.connect_ex(path)
        assert error in (errno.EAGAIN, errno.ECONNREFUSED)  # Linux, macOS
        ways = (acquire_and_release, acquire_and_release_async) * 4
        leases = [threads.submit(acquires, DEADLINE) for acquires in ways]
        threads.submit(idle_server.serve_forever)
        stack.close()
        try:
            assert [lease.result() for lease in leases] == ["db0"] * 8
        finally:
            idle_server.shutdown()


RAISING = """
import sys, pgmanager
class Handler(pgmanager.Handler):
    def handle(self):
        if problem := self.request.recv(1024):
            raise ValueError(problem.decode() * 3000)
pgmanager.Handler = Handler
pgmanager.main(["serve", "-s", sys.argv[1], "--prefix", "db", "--count", "1"])
"""


@pytest.mark.parametrize("stderr", ["not read", "closed"])
def test_a_handler_that_raises_ends_only_its_own_lease_and_writes_one_line(
    stderr: str, path: str
) -> None:
    options = {"preexec_fn": lambda: os.close(2)} if stderr == "closed" else {}
    with coded(RAISING, path, **options) as process:
        wait_until(lambda: is_listening(path), "the server")
        for _ in range(40):  # these lines are more than a pipe holds
            with connect(path) as client:
                assert name_of(client) == "db0"
                client.send(b"x")
                assert client.recv(1024) == b""
        process.terminate()
        lines = process.communicate(timeout=DEADLINE)[1].splitlines()
    assert process.returncode == 0
    assert bool(lines) == (stderr == "not read")
    problem = "pgmanager: a client's connection failed: ValueError('xxx"
    others = ("pgmanager: serving", "pgmanager: leases")
    assert all(line.startswith((problem, *others)) for line in lines)


@linux
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_name_whose_holder_outlives_the_server_stays_locked_until_its_release(
    number: int, path: str
) -> None:
    with served(path, "--count", "2") as first:
        lease = pgmanager.acquire(socket_path=path)
        first.send_signal(number)
        first.wait(DEADLINE)
    with served(path, "--count", "2") as second, connected(path, 2) as clients:
        assert name_of(clients[0]) == "db1"
        assert silent(clients[1])
        row = observe(path)["databases"][0]
        assert (row["state"], row["reason"], row["pid"]) == ("elsewhere", lock_file("db0"), None)
        lease.release()  # does not warn: nobody else can have used the name
        assert not silent(clients[1], 1)
        assert name_of(clients[1]) == "db0"
        ended(second)


# ------------------------------------------------------------------------------------ Client


@pytest.fixture
def one_name(path: str, monkeypatch: Patch) -> Iterator[None]:
    """Serve one name from another process, at the path that PGM_SOCKET then has."""
    monkeypatch.setenv("PGM_SOCKET", path)
    with served(path, "--count", "1") as process:
        yield
        wait_for_free(path)
        ended(process)


def acquire_and_release(timeout: Any = None, path: str | None = None) -> str:
    with pgmanager.acquire(timeout, socket_path=path) as lease:
        return lease


def acquire_and_release_async(timeout: Any = None) -> str:
    async def main() -> str:
        async with pgmanager.acquire_async(timeout) as lease:
            return lease

    return asyncio.run(main())


sync_and_async = pytest.mark.parametrize(
    "acquires", [acquire_and_release, acquire_and_release_async]
)


def test_a_lease_is_a_str_and_a_second_release_does_nothing(one_name: None, path: str) -> None:
    lease = pgmanager.acquire()
    assert isinstance(lease, str)
    assert (lease, f"{lease}", {"db0": 1}[lease]) == ("db0", "db0", 1)
    for plain in (copy.copy(lease), copy.deepcopy(lease), pickle.loads(pickle.dumps(lease))):
        assert (type(plain), plain) == (str, "db0")
    lease.release()
    with contextlib.suppress(KeyError), pgmanager.acquire() as following:
        lease.release()
        assert states(path) == ["leased"]
        raise KeyError(following)  # a block releases its lease then, too


KEEPING = """
import gc, os, pgmanager
lease = pgmanager.acquire()
if not os.fork():
    lease.release()
    os._exit(0)
os.wait()
lease = str(lease)
gc.collect()
print(lease, flush=True)
input()
"""


def test_neither_a_forked_child_nor_the_garbage_collector_ends_a_lease(
    one_name: None, path: str
) -> None:
    with coded(KEEPING) as process:
        assert next_line(process) == "db0"
        with connect(path) as waiter:
            assert silent(waiter)
            assert states(path) == ["leased"]
            assert next_line(process, "") == ""
            assert name_of(waiter) == "db0"


@linux
def test_release_closes_the_lock_before_the_connection(one_name: None, monkeypatch: Patch) -> None:
    """Otherwise the server would find the name still locked."""
    closed: list[str] = []

    def close(number: int, close: Callable[[int], None] = os.close) -> None:
        closed.append(os.path.realpath(f"/proc/self/fd/{number}"))
        close(number)

    with pgmanager.acquire():
        monkeypatch.setattr(os, "close", close)
    assert [file == lock_file("db0") for file in closed] == [True, False]


@contextlib.contextmanager
def answering(path: str, answer: bytes) -> Iterator[None]:
    """Send an answer to one client and close the connection, as another server may."""

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


def test_release_warns_once_if_the_server_ended_during_a_lease_without_a_lock(path: str) -> None:
    with answering(path, b"OK:db0"):  # without a lock, as on macOS
        lease = pgmanager.acquire(socket_path=path)
    with pytest.warns(RuntimeWarning, match="server ended while db0 was leased"):
        lease.release()
    lease.release()  # a second warning would be an error here


@sync_and_async
def test_acquire_with_a_timeout_takes_a_free_name_or_says_who_holds_which(
    acquires: Callable[..., str], one_name: None, path: str, monkeypatch: Patch
) -> None:
    for _ in range(20):
        assert acquires(0) == "db0"
        wait_for_free(path)
    with pgmanager.acquire(30), connected(path, 2):
        wait_for_waiters(path, 2)
        # The client finds its own place by its time of waiting: the others wait for longer.
        wait_until(lambda: observe(path)["waiting"][1]["seconds"] > 0.3, "a longer wait")
        for given, variable in ((0, "nonsense"), (0.05, "nonsense"), (None, "0.05")):
            monkeypatch.setenv("PGM_TIMEOUT", variable)
            with pytest.raises(pgmanager.AcquireTimeout) as caught:
                acquires(given)
            assert re.match(
                rf"no database came free: \S+ s waited at {re.escape(path)}, 2 ahead; "
                rf"[^;]*raise --count [^;]*; db0 leased for \d+\.\d s {os.getpid()} \S",
                str(caught.value),
            ), caught.value
            wait_for_waiters(path, 2)  # it has left the queue


# What is at the socket, or what it answers; and what the error says.
NO_GRANTS: dict[str, tuple[bytes | Callable[[str], object], str]] = {
    "closes": (b"", "the server closed the connection: {}"),
    "another program": (b"HTTP/1.1 400", "not a pgmanager server: {} says "),
    "all broken": (b"EMPTY:db0 is so", "no database can be leased: db0 is so"),
    "nothing": (lambda path: None, "no server at the socket: {}; start one with"),
    "dead socket": (make_stale, "no server at the socket: {}; start one with"),
    "file": (lambda path: Path(path).touch(), "not a socket: {}; set PGM_SOCKET"),
}


@sync_and_async
@pytest.mark.parametrize("kind", NO_GRANTS)
def test_acquire_raises_an_error_that_says_what_to_do_if_no_lease_can_come(
    kind: str, acquires: Callable[..., str], path: str, monkeypatch: Patch
) -> None:
    monkeypatch.setenv("PGM_SOCKET", path)
    there, text = NO_GRANTS[kind]
    with contextlib.ExitStack() as stack:
        if isinstance(there, bytes):
            stack.enter_context(answering(path, there))
        else:
            there(path)
        with pytest.raises(pgmanager.ServerError) as caught:
            acquires()
    assert isinstance(caught.value, pgmanager.PoolBroken) == (kind == "all broken")
    assert str(caught.value).startswith(text.format(path))
    assert "\n" not in str(caught.value)


def test_acquire_says_if_no_server_is_at_the_default_path_and_pgm_socket_is_not_set(
    folder: Path, monkeypatch: Patch
) -> None:
    monkeypatch.chdir(folder)
    for variable, is_told in (("PGM_UNUSED", True), ("PGMANAGER_SOCKET", False)):
        monkeypatch.setenv(variable, pgmanager.DEFAULT_SOCKET)
        with pytest.raises(pgmanager.ServerError) as caught:
            pgmanager.acquire()
        assert ("PGM_SOCKET is not set" in str(caught.value)) == is_told


FOREIGN = "cannot connect: {}: it belongs to user {}, and all may write to its folder; set "


@pytest.mark.parametrize(
    ("mode", "client", "sudo", "is_refused"),
    [
        (0o1777, "another", False, True),
        (0o777, "another", True, True),
        (0o777, "root", False, True),
        (0o777, "root", True, False),  # the server is that of the user who called sudo
        (0o777, "the same", False, False),
        (0o775, "another", False, False),
    ],
)
def test_clients_refuse_the_socket_of_another_user_if_all_may_write_to_its_folder(
    mode: int, client: str, sudo: bool, is_refused: bool, user: User, folder: Path, path: str
) -> None:
    options, uid, _ = user
    clients = {"root": 0, "another": uid - 1, "the same": uid}
    own = {**options, "program": [sys.executable, "-c", AS_USER, str(clients[client])]}
    env = {**os.environ, **({"SUDO_UID": str(uid if client == "root" else 33)} if sudo else {})}
    (folder / "safe").mkdir()
    link = str(folder / "safe/link")
    os.symlink(path, link)
    with served(path, **options):
        os.chmod(path, 0o777)
        folder.chmod(mode)
        for words in (
            ("exec", "-s", path, "true"),
            ("exec", "-s", link, "true"),
            ("status", "-s", path),
        ):
            with started(*words, env=env, **own) as process:
                stderr = process.communicate(timeout=DEADLINE)[1]
            assert process.returncode == (125 if is_refused else 0), stderr
            assert (FOREIGN.format(words[2], uid) in stderr) == is_one_line(stderr) == is_refused
        assert observe(path)["leases"] == (0 if is_refused else 2)


def test_clients_refuse_a_link_of_another_user_if_all_may_write_to_its_folder(
    user: User, folder: Path, path: str
) -> None:
    _, uid, _ = user
    (folder / "safe").mkdir()
    with served(str(folder / "safe/s")):
        os.symlink(folder / "safe/s", path)
        acquire_and_release(0, path)
        os.chown(path, uid, -1, follow_symlinks=False)
        with pytest.raises(pgmanager.ServerError, match=re.escape(FOREIGN.format(path, uid))):
            acquire_and_release(0, path)


def test_clients_use_the_socket_of_root_wherever_it_is(user: User, folder: Path, path: str) -> None:
    options, _, _ = user
    with served(path):
        os.chmod(path, 0o777)
        folder.chmod(0o777)
        with started("exec", "-s", path, "true", **options) as process:
            assert process.communicate(timeout=DEADLINE) == ("", "")
            assert process.returncode == 0


def test_every_error_derives_from_one_base_and_from_the_builtin_that_callers_expect() -> None:
    for error, base in {
        pgmanager.UsageError: ValueError,
        pgmanager.ServerError: ConnectionError,
        pgmanager.PoolBroken: pgmanager.ServerError,
        pgmanager.AcquireTimeout: TimeoutError,
        pgmanager.SocketError: Exception,
        pgmanager.LockError: Exception,
    }.items():
        assert issubclass(error, pgmanager.Error)
        assert issubclass(error, base)
        assert issubclass(error, OSError) == issubclass(base, OSError)


# Acquires as many leases as there are words: "sync" with acquire(), "async" with acquire_async().
ACQUIRING = """
import asyncio, pgmanager, sys
async def acquire_all(how, *more):
    if how == "sync":
        print(pgmanager.acquire(), flush=True)
    else:
        lease = pgmanager.acquire_async()
        print(await lease.__aenter__(), flush=True)
    if more:
        input()
        await acquire_all(*more)
asyncio.run(acquire_all(*sys.argv[1:]))
"""
WAITING = "pgmanager: waiting for a database: "  # how the line of a client that waits begins


def test_a_client_that_waits_says_once_after_ten_seconds_who_has_the_databases(
    one_name: None, path: str
) -> None:
    begun = time.monotonic()
    with connect(path) as holder, coded(ACQUIRING, "sync") as first, contextlib.ExitStack() as more:
        assert name_of(holder) == "db0"
        wait_for_waiters(path, 1)
        second = more.enter_context(coded(ACQUIRING, "async"))
        for ahead, process in enumerate((first, second)):
            assert process.stderr
            line = process.stderr.readline()
            assert line.startswith(WAITING)
            assert f" at {path}, {ahead} ahead; raise --count on the server, or the " in line
            assert "; db0 leased for " in line
            assert 9 < time.monotonic() - begun < DEADLINE
        holder.close()
        for process in (first, second):
            assert process.communicate(timeout=DEADLINE) == ("db0\n", "")


@pytest.mark.parametrize("how", ["sync", "async"])
def test_clients_say_after_one_second_that_all_holders_wait_for_each_other(
    how: str, path: str
) -> None:
    env = {**os.environ, "PGM_SOCKET": path}
    with served(path, "--count", "2"), contextlib.ExitStack() as stack:
        words = (ACQUIRING, "sync", how)
        first, second = (stack.enter_context(coded(*words, env=env)) for _ in range(2))
        names = [next_line(process) for process in (first, second)]
        for number, process in enumerate((first, second)):
            with pytest.raises(pgmanager.AcquireTimeout, match="ahead; raise --count on"):
                pgmanager.acquire(0, socket_path=path)  # one does not wait yet
            print(file=process.stdin, flush=True)
            wait_for_waiters(path, number + 1)
        begun = time.monotonic()
        assert second.stderr
        line = second.stderr.readline()
        assert line.startswith(WAITING)
        assert f" at {path}, 1 ahead; every process that has one waits for " in line
        assert f"{names[0]} leased for " in line
        assert time.monotonic() - begun < 8
        second.kill()
        assert first.communicate(timeout=DEADLINE)[0] == f"{names[1]}\n"


@pytest.mark.parametrize("rounds", [None, 0, 1, 2, 3, 4])
def test_a_cancelled_task_leaves_no_waiter_and_no_lease(
    rounds: int | None, one_name: None, path: str
) -> None:
    """It is cancelled while it waits, or so many rounds of the event loop after its grant."""

    async def hold() -> None:
        async with pgmanager.acquire_async():
            await asyncio.get_running_loop().create_future()

    async def main() -> None:
        holder = pgmanager.acquire()
        task = asyncio.create_task(hold())
        await asyncio.to_thread(wait_for_waiters, path, 1)
        if rounds is not None:
            holder.release()
            wait_for_waiters(path, 0)  # blocks the loop: the task does not know of its grant yet
            for _ in range(rounds):
                await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task], timeout=DEADLINE)
        assert task.cancelled()
        holder.release()

    asyncio.run(main())


@linux
def test_a_client_without_a_descriptor_for_the_lock_raises_and_keeps_nothing(
    one_name: None,
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with open(os.devnull) as lowest:
        number = lowest.fileno()
    resource.setrlimit(resource.RLIMIT_NOFILE, (number + 1, hard))  # enough for the connection
    try:
        with pytest.raises(pgmanager.ServerError, match="no descriptor is left for the lock"):
            pgmanager.acquire()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert acquire_and_release(30) == "db0"


IMPORTING = """
import os, sys, threading
sys.path.insert(0, sys.argv[1])
os.environ = os.environb = os.getenv = None
import pgmanager
assert threading.active_count() == 1
costly = "argparse asyncio dataclasses json logging pytest _pytest subprocess tempfile typing"
assert not set(costly.split()) & set(sys.modules), set(costly.split()) & set(sys.modules)
"""


def test_import_reads_no_environment_starts_no_thread_and_loads_no_costly_module() -> None:
    command = [sys.executable, "-ISc", IMPORTING, str(MODULE.parent)]
    done = subprocess.run(command, capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


# ---------------------------------------------------------------------------------- Scarcity


def run_with_ulimit(limit: str) -> list[str]:
    """Return the words that run pgmanager with a limit of its shell."""
    return ["sh", "-c", f'ulimit {limit}; exec "$@"', "sh", *PGMANAGER]


def is_idle(process: Process, seconds: float) -> bool:
    """Tell whether a process uses next to no processor time. Blocks for so many seconds."""
    before = processor_seconds(process)
    time.sleep(seconds)
    return processor_seconds(process) - before < 0.1 * seconds


@linux
@pytest.mark.parametrize(
    ("words", "limit", "warning"),
    [
        (("--prepare", "true"), 64, "too many clients for the limit on descriptors: some wait; "),
        ((), 1000, "cannot accept clients for now: Too many open files; they wait"),
    ],
    ids=["expected", "accept fails"],
)
def test_clients_are_served_in_order_when_descriptors_run_out(
    words: tuple[str, ...], limit: int, warning: str, path: str
) -> None:
    program = run_with_ulimit(f"-n {limit}")
    with served(path, "--count", "2", *words, program=program) as process:
        if not words:  # lower the limit after the server has counted what it may use
            few = len(os.listdir(f"/proc/{process.pid}/fd")) + 8
            resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (few, limit))
        with connected(path, 150) as clients:
            assert warning in process.stderr.readline()
            assert is_idle(process, 0.5 if words else 1.5)
            assert silent(clients[2], 0)
            if not words:
                resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (limit, limit))
            clients.pop(3).close()  # another client takes the descriptor
            names = [name_of(client) for client in clients[:2]]
            for index, client in enumerate(clients[2:]):
                assert silent(client, 0)
                clients[index].close()
                names.append(name_of(client))
                assert names[-1] == names[-3]
        wait_for_free(path)
        with connected(path, 150):
            assert "clients" not in ended(process)  # the warning came once


@linux
def test_a_server_without_descriptors_for_any_client_is_refused(path: str) -> None:
    words = ("serve", "-s", path, "--prefix", "db", "--count", "50")
    done = run(*words, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64)))
    assert is_refused(done, "too few descriptors for 50 names; lower --count")
    assert not os.path.lexists(path)


@linux
def test_a_name_is_sent_without_its_lock_if_the_kernel_refuses_to_send_descriptors(
    user: User, path: str
) -> None:
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
def test_a_server_that_can_start_no_thread_refuses_clients_and_loses_no_name(path: str) -> None:
    program = run_with_ulimit("-s 131072")  # KiB for the stack of each thread
    with served(path, "--count", "2", program=program) as process:

        def forbid_threads() -> None:  # leave too little memory for one more stack
            used = int(Path(f"/proc/{process.pid}/statm").read_text().split()[0])
            most = used * resource.getpagesize() + (64 << 20)
            resource.prlimit(process.pid, resource.RLIMIT_AS, (most, -1))

        forbid_threads()
        for _ in range(50):
            with pytest.raises(pgmanager.PoolBroken, match="the server has no thread left: "):
                pgmanager.acquire(socket_path=path)
        assert "no thread for a client" in process.stderr.readline()
        assert is_idle(process, 0.5)
        resource.prlimit(process.pid, resource.RLIMIT_AS, (-1, -1))
        with connected(path, 3) as clients:
            assert [name_of(client) for client in clients[:2]] == ["db0", "db1"]
            wait_for_waiters(path, 1)
        wait_for_free(path)  # now three threads are idle
        forbid_threads()
        lock = pgmanager.take_lock(lock_file("db0"))
        with connected(path, 2) as clients:
            assert name_of(clients[0]) == "db1"
            assert silent(clients[1])
            pgmanager.close_lock(lock)  # the thread that waits for it started with the server
            assert name_of(clients[1]) == "db0"
        wait_for_free(path)
        assert "no thread" not in ended(process)  # the warning came once


@linux
def test_a_name_that_no_descriptor_is_left_to_lock_is_granted_later(path: str) -> None:
    with served(path, "--count", "1") as process, connected(path, 2) as clients:
        assert name_of(clients[0]) == "db0"
        wait_for_waiters(path, 1)
        before = resource.prlimit(process.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (3, before[1]))
        clients[0].close()
        assert "cannot lock db0 for now: " in process.stderr.readline()
        assert is_idle(process, 1.5)
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, before)
        assert name_of(clients[1]) == "db0"
        clients[1].close()
        wait_for_free(path)
        assert "cannot lock" not in ended(process)  # the warning came once


@linux
def test_a_server_with_two_hundred_waiters_does_not_wake_up_while_nothing_happens(
    path: str,
) -> None:
    with served(path, "--count", "1") as process, connected(path, 201) as clients:
        wait_for_waiters(path, 200)

        def read_switches() -> list[str]:
            files = glob.glob(f"/proc/{process.pid}/task/*/status")
            return [Path(file).read_text().partition("voluntary_")[2] for file in files]

        def is_asleep() -> bool:
            before = read_switches()
            return silent(clients[-1], 0.5) and read_switches() == before

        wait_until(is_asleep, "the end of what 200 clients have begun")


# ------------------------------------------------------------------------- Preparing databases

# A command that waits at a FIFO until the test ends it with a status. At its start it records how
# many such commands run, itself included.
GATED = (
    "exec > /dev/null 2>&1; "  # one that a failed test left must not keep started() from ending
    'touch "run.$PGDATABASE"; ls run.* | wc -l >> counts; '
    'read -r verdict < "$PGDATABASE"; rm "run.$PGDATABASE"; exit "$verdict"'
)


@contextlib.contextmanager
def gates(folder: Path, count: int) -> Iterator[None]:
    """Make the FIFOs for a pool with the prefix db; open them all at the end."""
    for shard in range(count):
        os.mkfifo(folder / f"db{shard}")
    try:
        yield
    finally:
        for shard in range(count):
            os.close(os.open(folder / f"db{shard}", os.O_RDWR | os.O_NONBLOCK))


def open_gate(gate: Path, verdict: int = 0) -> None:
    """Wait until a command is at the gate, and end it with a status."""

    def open_fifo() -> int | None:
        with contextlib.suppress(OSError):  # ENXIO: nobody reads
            return os.open(gate, os.O_WRONLY | os.O_NONBLOCK)
        return None

    descriptor = wait_until(open_fifo, f"a command at the gate {gate.name}")
    os.write(descriptor, b"%d\n" % verdict)
    os.close(descriptor)


def at_work(folder: Path) -> list[int]:
    """Return, for each gated command so far, how many ran when it started."""
    file = folder / "counts"
    return [int(line) for line in file.read_text().split()] if file.exists() else []


def test_every_database_is_prepared_before_its_first_lease_and_after_each_release(
    folder: Path, path: str
) -> None:
    env = {**os.environ, "PGM_PREPARE": GATED}
    with gates(folder, 1), served(path, "--count", "1", cwd=folder, env=env):
        for _ in range(3):
            with connect(path) as client:
                wait_for_waiters(path, 1)
                wait_until(lambda: states(path) == ["preparing"], "the preparation")
                open_gate(folder / "db0")
                assert name_of(client) == "db0"
                assert states(path) == ["leased"]


def test_as_many_databases_are_prepared_at_once_as_there_are_processors(
    folder: Path, path: str
) -> None:
    processors = pgmanager.count_processors()
    count = processors + 2
    words = ("--count", f"{count}", "--prepare", GATED)
    with gates(folder, count), served(path, *words, cwd=folder), connected(path, count):
        wait_until(lambda: len(at_work(folder)) == processors, "a command for each processor")
        for _ in range(count):
            running = wait_until(lambda: list(folder.glob("run.*")), "a running command")[0]
            open_gate(folder / running.suffix[1:])
            wait_until(lambda file=running: not file.exists(), "its end")  # type: ignore[misc]
        wait_until(lambda: set(states(path)) == {"leased"}, "a lease for each client")
    assert max(at_work(folder)) == processors


def test_only_as_many_databases_are_prepared_as_clients_need_and_one_for_each_processor(
    folder: Path, path: str
) -> None:
    processors = pgmanager.count_processors()
    words = ("--count", "64", "--prepare", 'echo >> "$PGDATABASE"')
    with served(path, *words, cwd=folder):
        for number, most in ((0, processors), (3, processors + 3), (1, processors + 3)):
            with connected(path, number) as clients:
                assert len({name_of(client) for client in clients}) == number
                wait_until(lambda: states(path).count("free") >= processors, "spare databases")
                assert len(os.listdir(folder)) == most + 1  # and the socket
                assert states(path).count("unprepared") >= 64 - most
            wait_until(lambda: "leased" not in states(path), "the releases")


def test_a_database_that_cannot_be_prepared_is_broken_and_its_reason_is_shown(path: str) -> None:
    fails = 'test "$PGDATABASE" != db1 || { seq 9999; echo the reason >&2; exit 3; }'
    with served(path, "--count", "3", "--prepare", fails) as server:
        wait_until(lambda: states(path) == ["free", "broken", "free"], "preparation")
        reason = "cannot prepare db1: exit status 3: the reason"
        assert [row["reason"] for row in observe(path)["databases"]] == [None, reason, None]
        with connected(path, 3) as clients:
            assert {name_of(client) for client in clients[:2]} == {"db0", "db2"}
            assert silent(clients[2])
        assert reason in ended(server)


def test_clients_get_the_first_error_while_all_databases_are_broken_and_leases_after_repair(
    folder: Path, path: str
) -> None:
    # The error has a byte that is not UTF-8 and is longer than an answer. A line follows it.
    fails = "printf 'NOTICE: \\303\\251\\n\\351 ERROR: %02000d\\nerror: %050000d\\n'; exit 1"
    command = f'test -e ok && exit; read -r x < "$PGDATABASE"; {fails}'
    words = ("--count", "1", "--prepare", command)
    with gates(folder, 1), served(path, *words, cwd=folder, errors="replace"):
        with connected(path, 2) as waiters:
            wait_for_waiters(path, 2)
            open_gate(folder / "db0")
            begun = time.monotonic()
            for client in [*waiters, connect(path)]:
                answer = client.recv(4096)
                assert answer.startswith(b"EMPTY:cannot prepare db0: exit status 1: \xe9 ERROR: 00")
                assert (len(answer), client.recv(1)) == (1024, b"")
                client.close()
        (folder / "ok").touch()
        wait_for_free(path)
        assert time.monotonic() - begun > 0.9  # it is tried again after a second
        with connect(path) as client:
            assert name_of(client) == "db0"


@pytest.mark.parametrize(
    ("command", "number"), [(["serve"], signal.SIGTERM), (["wrap", "cat"], signal.SIGHUP)]
)
def test_a_server_that_ends_ends_its_prepare_commands_and_their_children(
    folder: Path, path: str, command: list[str], number: int
) -> None:
    prepare = "trap 'touch interrupted; exit' INT; sleep 1000 & echo $! >> child; wait"
    words = ("-s", path, "--prefix", "db", "--prepare", prepare, *command[1:])
    with started(command[0], *words, cwd=folder, stdin=subprocess.PIPE) as process:
        wait_until((folder / "child").exists, "the preparation")
        process.send_signal(number)
        assert process.wait(DEADLINE) == (0 if command == ["serve"] else -number)
        ps = ("ps", "-ostat=", "-p", ",".join((folder / "child").read_text().split()))
        wait_until(lambda: not subprocess.run(ps, capture_output=True).stdout.strip(b"Z\n"), "end")
        assert (folder / "interrupted").exists()  # at SIGINT psql cancels its query
        assert "cannot prepare" not in process.communicate()[1]


def test_a_prepare_command_that_outlives_its_server_keeps_the_name_until_it_ends(
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


def test_a_background_process_of_a_prepare_command_does_not_keep_the_name(
    folder: Path, path: str
) -> None:
    daemon = "sleep 1000 & echo $! > daemon"
    with served(path, "--count", "1", "--prepare", daemon, cwd=folder) as server:
        wait_for_free(path)
        try:
            server.kill()
            with served(path, "--count", "1"):
                assert states(path) == ["free"]
        finally:
            os.kill(int((folder / "daemon").read_text()), signal.SIGKILL)  # it still runs


def has_postgres() -> bool:
    with contextlib.suppress(pgmanager.PostgresError):
        return bool(pgmanager.find_programs())
    return False


def needs_postgres(test: Any) -> Any:
    """Mark a test as one that needs PostgreSQL: -m 'not postgres' leaves it out."""
    is_missing = not has_postgres() and "CI" not in os.environ
    skip = pytest.mark.skipif(is_missing, reason="no PostgreSQL programs here")
    return pytest.mark.postgres(skip(test))


@pytest.fixture
def admin(monkeypatch: Patch) -> Iterator[psycopg.Connection[Any]]:
    """Run a PostgreSQL server that the environment leads to; provide a superuser's connection."""
    wrap = ("wrap", "--ephemeral", "--count", "1", "sh", "-c", 'echo "$PGHOST"; read x')
    with started(*wrap, stdin=subprocess.PIPE) as process:
        monkeypatch.setenv("PGHOST", next_line(process))
        monkeypatch.setenv("PGUSER", "postgres")
        monkeypatch.setenv("PGPORT", "5432")
        with psycopg.connect(dbname="postgres", autocommit=True) as connection:
            yield connection


ODD = 'It\'s "q" \\n :x :"y" %s %% ; drop é-'


@needs_postgres
def test_each_lease_gets_a_fresh_copy_of_the_template(
    admin: psycopg.Connection[Any], path: str
) -> None:
    template = f"{ODD} template"
    options = ("--prefix", ODD, "--template", template)
    refused = run("serve", "-s", path, *options)
    assert is_refused(refused, f"no such template: {template}; create it first")
    admin.execute("CREATE DATABASE made")
    with psycopg.connect(dbname="made") as connection:
        connection.execute("CREATE TABLE kept AS SELECT 'seed'")
    quoted = pgmanager.quote_identifier(template)
    admin.execute(f"ALTER DATABASE made RENAME TO {quoted}".encode())
    with served(path, "--count", "1", "--template", template, prefix=ODD) as server:
        for _ in range(2):
            wait_for_free(path)
            with connect(path) as client:
                assert name_of(client) == f"{ODD}0"
                leftover = psycopg.connect(dbname=f"{ODD}0", autocommit=True)
                assert leftover.execute("SELECT * FROM kept").fetchall() == [("seed",)]
                leftover.execute("INSERT INTO kept VALUES ('garbage')")
            wait_for_free(path)
            with pytest.raises(psycopg.OperationalError), leftover:  # the session was ended
                leftover.execute("SELECT 1")
        assert "NOTICE" not in ended(server)  # such as that of DROP DATABASE IF EXISTS


FAILS = "psql -Xc 'DROP TABLE IF EXISTS t' -c 'SELECT no_such()'"
GRANT = "pgmanager connects to the database postgres to create others: GRANT CONNECT ON DATABASE "


@needs_postgres
def test_the_reason_is_the_first_error_of_postgresql_with_its_hint_or_what_to_do(
    admin: psycopg.Connection[Any], path: str, monkeypatch: Patch
) -> None:
    admin.execute("CREATE ROLE poor LOGIN CREATEDB")
    admin.execute("REVOKE CONNECT ON DATABASE postgres FROM public")
    monkeypatch.setenv("PGUSER", "poor")
    denied = f'FATAL:  permission denied for database "postgres"; {GRANT}postgres TO this role'
    for words, reason in (
        (("--prepare", FAILS), "ERROR:  function no_such() does not exist; HINT:  No function"),
        (("--template", "template1"), denied),
    ):
        with served(path, "--count", "1", *words, prefix="test_"), connect(path) as client:
            assert reason in client.recv(1024).decode().replace(" error: ", "")
    done = run("wrap", "--prefix", "db", "--init", "true", "echo", "ran")
    assert (done.returncode, done.stdout, is_one_line(done.stderr)) == (125, "", True)
    assert GRANT in done.stderr


# ----------------------------------------------------------------------------------- Templates
#
# These tests share two PostgreSQL servers. Each test has a random prefix for its databases,
# with a space and a quote in it.

CREATE = "psql -qXc 'CREATE TABLE made()'"
KEPT = ("--depends", "source", "--init")
TABLES = "SELECT relname FROM pg_class WHERE relnamespace = 'public'::regnamespace ORDER BY 1"


class Cluster:
    """A PostgreSQL server, and the databases of one test on it."""

    def __init__(self, host: str) -> None:
        self.host, self.prefix = host, f'p{random.randrange(2**32):08x} "'
        self.env = {"PGHOST": host, "PGPORT": "5432", "PGUSER": "postgres"}

    def sql(self, *queries: str, database: str = "postgres", user: str = "postgres") -> list[Any]:
        """Run queries; return the rows of the last one."""
        place = {"host": self.host, "port": 5432, "user": user, "dbname": database}
        with psycopg.connect(**place, autocommit=True) as connection:  # type: ignore[arg-type]
            for query in queries:
                cursor = connection.execute(query.encode())
            return cursor.fetchall() if cursor.description else []

    def create(self, name: str, *queries: str, user: str = "postgres") -> str:
        """Create a database that pgmanager did not make; return its name with the prefix."""
        self.sql(f"CREATE DATABASE {pgmanager.quote_identifier(self.prefix + name)}", user=user)
        self.sql("SELECT 1", *queries, database=self.prefix + name, user=user)
        return self.prefix + name

    def drop(self, name: str) -> None:
        identifier = pgmanager.quote_identifier(self.prefix + name)
        self.detach(self.prefix + name)
        if "template_" in name:
            self.sql(f"ALTER DATABASE {identifier} IS_TEMPLATE false")
        self.sql(f"DROP DATABASE IF EXISTS {identifier} (FORCE)")

    def detach(self, database: str) -> None:
        """Remove what a test may have left that DROP DATABASE stops at."""
        where = f"WHERE datname = '{database}'"
        for (gid,) in self.sql(f"SELECT gid FROM pg_prepared_xacts WHERE database = '{database}'"):
            self.sql(f"ROLLBACK PREPARED '{gid}'", database=database)
        query = "SELECT subname FROM pg_subscription JOIN pg_database d ON d.oid = subdbid"
        for (subscription,) in self.sql(f"{query} {where}"):
            alter = f"ALTER SUBSCRIPTION {subscription}"
            ends = [f"{alter} DISABLE", f"{alter} SET (slot_name = NONE)"]
            self.sql(*ends, f"DROP SUBSCRIPTION {subscription}", database=database)

    def names(self) -> set[str]:
        """Return the names of the test's databases, without the prefix."""
        query = f"SELECT datname FROM pg_database WHERE starts_with(datname, '{self.prefix}')"
        return {name[len(self.prefix) :] for (name,) in self.sql(query)}

    def templates(self) -> set[str]:
        return {name for name in self.names() if name.startswith("template_")}

    def content(self) -> dict[str, Any]:
        """Return the tables of every database but other tests' databases and our templates."""
        query = "SELECT datname FROM pg_database WHERE datallowconn AND datconnlimit <> -2 AND "
        query += f"(datname !~ '^p[0-9a-f]{{8}}' OR starts_with(datname, '{self.prefix}'))"
        names = [name for (name,) in self.sql(query)]  # -2: DROP DATABASE was interrupted
        return {name: self.sql(TABLES, database=name) for name in names}

    def clean(self) -> None:
        """Drop the test's databases and remove their lock files."""
        for name in self.names():
            self.drop(name)
        for file in glob.glob(f"/tmp/pgmanager-{os.geteuid()}/5432/{self.prefix}*"):
            os.remove(file)


@pytest.fixture(scope="module")
def hosts() -> Iterator[list[str]]:
    """Run two PostgreSQL servers for all tests; provide their folders."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("PGM")}
    options = "-c wal_level=logical -c max_wal_senders=4 -c max_prepared_transactions=4"
    words = ["wrap", "--ephemeral", "--count", "1", "--server-options", options]
    words += ["sh", "-c", 'echo "$PGHOST"; read x']
    with contextlib.ExitStack() as stack:
        pipe = subprocess.PIPE
        wraps = [stack.enter_context(started(*words, stdin=pipe, env=env)) for _ in range(2)]
        yield [next_line(process) for process in wraps]
        for process in wraps:
            process.communicate("\n", timeout=DEADLINE)


@pytest.fixture
def cluster(hosts: list[str], folder: Path, monkeypatch: Patch) -> Iterator[Cluster]:
    """Provide a server, and set the environment so that every command uses it."""
    cluster = Cluster(hosts[0])
    variables = {"PGM_DATABASE_PREFIX": cluster.prefix, "PGM_DATABASE_COUNT": "1"}
    for name, value in {**cluster.env, **variables, "PGM_SOCKET": str(folder / "s")}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PATH", pgmanager.find_programs(), prepend=":")  # Debian's psql is slow
    monkeypatch.chdir(folder)
    Path("source").touch()
    yield cluster
    cluster.clean()


def get_template(stderr: str) -> tuple[str, str]:
    """Return whether a run has made or found its template, and the template's name."""
    ((name, verb),) = re.findall(r": template .*(template_\w+) was (made|found)", stderr)
    return verb, name


def run_with_template(*words: str) -> tuple[str, str]:
    """Run wrap, check that its database has the table of CREATE, and return get_template()."""
    done = run("wrap", *words, "--", *query_lease(TABLES))
    assert (done.returncode, done.stdout) == (0, "made\n"), done.stderr
    return get_template(done.stderr)


def query_lease(query: str) -> list[str]:
    """Return the command that runs a query in a leased database."""
    return [*PGMANAGER, "exec", "--", "psql", "-XAt", "-vON_ERROR_STOP=1", "-c", query]


@contextlib.contextmanager
def running_wrap(*words: str) -> Iterator[Process]:
    """Run wrap with a command that lasts as long as the block."""
    command = ("-s", "running", *words, "--", "sh", "-c", "echo up; read x")
    with started("wrap", *command, stdin=subprocess.PIPE) as process:
        assert next_line(process) == "up"
        yield process
        process.communicate("\n", timeout=DEADLINE)


def wait_for_reason(path: str) -> str:
    """Wait until a server's only name is broken, and return the reason."""
    wait_until(lambda: states(path) == ["broken"], "a name that is broken")
    return str(observe(path)["databases"][0]["reason"])


@needs_postgres
def test_wrap_makes_a_template_again_only_if_its_init_or_files_have_changed(
    cluster: Cluster, folder: Path, monkeypatch: Patch
) -> None:
    files = {"schema.sql": r"\ir parts/1.sql", "parts/1.sql": "CREATE TABLE made();"}
    for name, text in {**files, "notes.txt": "", "parts/a/2.sql": "", "parts/a/3.sql": ""}.items():
        (folder / "0" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "0" / name).write_text(f"{text}\n")
    monkeypatch.setenv("PGM_INIT", "schema.sql")
    monkeypatch.setenv("PGM_DEPENDS", "parts:*.txt:**/2.sql")
    changes = [  # Each is made in another copy of the files.
        (":", "made"),
        ("pwd", "found"),
        ("touch -t 203001010000 schema.sql parts/*", "found"),
        ("export PGM_DEPENDS='**/2.sql:*.txt:parts'", "found"),
        ("cd parts; mkdir __pycache__; touch __pycache__/x x.pyc x~ .x; cd ..", "found"),
        ("echo 'SELECT 1;' >> schema.sql", "made"),
        ("echo 'SELECT 1;' >> parts/1.sql", "made"),
        ("mv parts/a/3.sql parts/a/4.sql", "made"),
        ("rm parts/a/3.sql", "made"),
        ("touch more.txt", "made"),
        ("mv schema.sql other.sql; export PGM_INIT=other.sql", "made"),
        ("export PGM_INIT='psql -qXf schema.sql'", "made"),
        ("export PGM_INIT='psql -qX -f schema.sql'", "made"),
    ]  # fmt: skip
    names = set()
    for number, (change, expected) in enumerate(changes, 1):
        shutil.copytree("0", str(number))
        command = shlex.join([*PGMANAGER, "wrap", "--", *query_lease(TABLES)])
        words = ["sh", "-ec", f"cd {number}; {{ {change}; }} >&2; {command}"]
        done = subprocess.run(words, capture_output=True, text=True, timeout=DEADLINE)
        assert (done.returncode, done.stdout) == (0, "made\n"), done.stderr
        verb, name = get_template(done.stderr)
        assert (verb, name in names) == (expected, expected == "found"), change
        names.add(name)


@pytest.mark.parametrize("command", [["serve"], ["wrap", "echo", "ran"]], ids=" ".join)
@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--init", "no.sql"], "no such file: no.sql"),
        (["--init", "true", "--init", "no/"], "no such file: no/"),
        (["--init", "hidden"], "no *.sql in the folder: hidden"),
        (["--init", "true", "--depends", "no/**/*.sql"], "no file matches: 'no/**/*.sql'"),
        (["--init", "true", "--depends", "hidden"], "no file matches: 'hidden'"),
        (["--init", "true", "--prefix", "p" * 50], "63 allowed; choose a shorter prefix"),
        (["--init", "true", "--template", "t"], "both init and template"),
        (["--depends", "hidden"], "--depends without --init"),
        (["--rebuild", "--template", "t"], "--rebuild without --init"),
        (["--template", "tp_0"], "the template is a database of the pool: tp_0"),
        (["--template", "postgres"], "to which pgmanager itself is connected; copy it once"),
    ],
)
def test_serve_and_wrap_refuse_bad_template_options_before_they_connect_to_a_server(
    command: list[str], options: list[str], reason: str, folder: Path, monkeypatch: Patch
) -> None:
    (folder / "hidden").mkdir()
    (folder / "hidden" / ".x").touch()
    monkeypatch.setenv("PGHOST", "/nowhere")
    monkeypatch.setenv("PGM_DATABASE_PREFIX", "tp_")
    name, *words = command
    assert is_refused(run(name, *options, *words, cwd=folder), reason)


@pytest.mark.parametrize("text", ["\\connect x", "select 1; drop database if exists x;"])
def test_wrap_refuses_an_init_file_that_changes_or_connects_to_a_database(
    text: str, folder: Path, monkeypatch: Patch
) -> None:
    (folder / "x.sql").write_text(text)
    monkeypatch.setenv("PGHOST", "/nowhere")
    done = run("wrap", "--prefix", "db", "--init", "x.sql", "echo", "ran", cwd=folder)
    assert is_refused(done, f"x.sql would leave its database: {text.split('; ')[-1]!r}; leave it")


LEAVES, READS, STAYS = "leaves its database", "may read other files", "does neither"
SCRIPTS = [
    (LEAVES, "\\c x"),
    (LEAVES, "\ufeff\\c x"),
    (LEAVES, " \\connect\tx"),
    (LEAVES, "select (1 \\c x"),
    (LEAVES, "\\echo x \\c x"),
    (LEAVES, "\\echo it's\ndrop database x;"),
    (LEAVES, "\\echo x \\\\ drop database x;"),
    (LEAVES, "\\restrict x\n\\unrestrict x\nselect 1 \\g\ndrop database x \\g"),
    (LEAVES, "select 1 \\; alter database x set a = b;"),
    (LEAVES, "\ufeffCREATE DATABASE x"),
    (LEAVES, "select 1;\n\tdrop  database x"),
    (LEAVES, "-- a\rAlter-- b\n/* c /* d */ */DATABASE\n\nx"),
    (LEAVES, '/*/ /***/ * -- */drop/**/database"x"'),
    (LEAVES, "select 1 +/* ' */ 1 -- '\n; drop database x;"),
    (LEAVES, "select 'it''s', '\\', type'\\', E'\\'''', \"'\"; drop database x;"),
    (LEAVES, "select a$$b$; select $b$ $$ $a$ $b$; drop database x;"),
    (LEAVES, "copy t from stdin;\n1\n\\.\n\\c x"),
    (LEAVES, "copy t from stdin;\r\nit's\r\n\\.\r\ndrop database x;"),
    (LEAVES, "\\copy t from stdin null '\\N'\nit's\n\\.\ndrop database x;"),
    (LEAVES, "copy (select 1 from stdin) to stdout; drop database x;"),
    (LEAVES, "copy t to '/x from stdin';\ndrop database x;"),
    (LEAVES, 'copy t("x from stdin") to stdout;\ndrop database x;'),
    (READS, "\\i x.sql"),
    (READS, "select 1 \\gexec"),
    (READS, "\\echo drop database x;"),
    (READS, "\\C x"),
    (READS, "\\cd x"),
    (READS, "\\copy t from stdin\n\\c x\n\\.\n"),
    (STAYS, "\\restrict x\n\\unrestrict x"),
    (STAYS, "/* Drop\ndrop database x; /* */\n\\c x */"),
    (STAYS, "/*" * 100_000),
    (STAYS, "select 1; --; \\c x\r\n"),
    (STAYS, "select '; drop database x;"),
    (STAYS, "select '\ncreate database x;\n\\c x';"),
    (STAYS, "select E'\\'; drop database x; --', e'''\\'; drop database x;';"),
    (STAYS, 'select "\\c x; drop database x;";'),
    (STAYS, "do $$ begin\ncreate database x;\n\\c x\nend $$;"),
    (STAYS, "do $_a1$ $$; drop database x; $_a1$;"),
    (STAYS, "copy t from stdin;\r\ndrop database x;\r\n\\i x\r\n\\.\r\n"),
    (STAYS, "copy t from stdin;\n\\.x\n \\.\n\\c x\n"),
    (STAYS, "\tCopy/**/t (a, b)\nFROM -- ;\nSTDIN\nwith (delimiter ';');\n\\c x\n\\.\n"),
    (STAYS, "comment on database x is 'alter'; create table database(); drop table database;"),
    (STAYS, "select (create database x);"),
    (STAYS, "copy \"t\" from stdin null 'x';\ndrop database x;\n\\.\n"),
]


def test_an_init_file_leaves_its_database_only_by_what_psql_would_run(tmp_path: Path) -> None:
    for expected, text in SCRIPTS:
        (tmp_path / "x.sql").write_bytes(text.encode())
        try:
            outcome = READS if pgmanager.reads_other_files(str(tmp_path / "x.sql")) else STAYS
        except pgmanager.UsageError:
            outcome = LEAVES
        assert outcome == expected, text[:99]


@needs_postgres
def test_wrap_drops_a_template_at_its_end_if_init_may_read_files_that_are_not_named(
    cluster: Cluster, folder: Path
) -> None:
    (folder / "a.sql").write_text("CREATE TABLE made();\n")
    (folder / "x.sql").write_text("\\ir a.sql\n")
    for init in ("x.sql", CREATE):
        verb, name = run_with_template("--init", init)
        assert verb == "made"
        assert re.fullmatch("template_once_[0-9a-f]{8}", name)
        assert not cluster.templates()
    with running_wrap("--init", "x.sql") as process:
        process.kill()
    assert len(cluster.templates()) == 1
    run_with_template("--init", CREATE)  # the next start drops it
    assert not cluster.templates()


@needs_postgres
def test_a_plain_pg_dump_makes_a_kept_template_and_one_with_create_is_refused(
    cluster: Cluster,
) -> None:
    lines = [r"\connect postgres", "DROP DATABASE postgres;", r"\N", r"\ir x", r"\\."]
    values = ", ".join(f"('{line}')" for line in lines)
    insert = f"INSERT INTO lines VALUES {values}, (NULL)"
    env = {**os.environ, "PGDATABASE": cluster.create("real", "CREATE TABLE lines(x text)", insert)}
    query = query_lease("SELECT count(*), count(x) FROM public.lines")
    subprocess.run(["pg_dump", "--create", "-fx.sql"], env=env, check=True)
    done = run("wrap", "--init", "x.sql", "--", *query)
    assert is_refused(done, "x.sql would leave its database")
    assert cluster.names() == {"real"}
    subprocess.run(["pg_dump", "--no-owner", "-fx.sql"], env=env, check=True)
    for verb in ("made", "found"):
        done = run("wrap", "--init", "x.sql", "--", *query)
        assert (get_template(done.stderr)[0], done.stdout) == (verb, "6|5\n")


@needs_postgres
def test_of_runs_that_start_together_one_makes_the_template_and_the_others_wait(
    cluster: Cluster, folder: Path, monkeypatch: Patch
) -> None:
    """They wait until the template is made, not until the run that made it ends."""
    monkeypatch.delenv("PGM_SOCKET")
    os.mkfifo(folder / "gate")
    init = f"echo made >> count; read x < gate; {CREATE}"
    words = ("wrap", *KEPT, init, "--", "sh", "-c", "echo up; read x")
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with contextlib.ExitStack() as stack:
        runs = [stack.enter_context(started(*words, **pipes)) for _ in range(3)]
        stack.callback(lambda: os.close(os.open("gate", os.O_RDWR | os.O_NONBLOCK)))
        silent_runs = list(runs)
        for _ in range(2):
            waiter = wait_until(
                lambda: next((each for each in silent_runs if not silent(each.stdout, 0)), None),
                "a run that waits",
            )
            template = f"which makes or uses the template {cluster.prefix}template_"
            assert f"waiting for another run, {template}" in next_line(waiter)
            silent_runs.remove(waiter)
        (name,) = wait_until(cluster.templates, "the template")
        (folder / "gate").write_text("\n")
        templates = sorted(get_template(next_line(process)) for process in runs)
        assert templates == [("found", name), ("found", name), ("made", name)]
        assert [next_line(process) for process in runs] == ["up"] * 3
        for process in runs:
            process.communicate("\n", timeout=DEADLINE)
    assert (folder / "count").read_text() == "made\n"


@needs_postgres
@pytest.mark.parametrize("end", ["fails", "SIGTERM", "SIGINT", "SIGKILL", "SIGKILL of all"])
def test_a_template_whose_init_did_not_finish_is_made_again(
    end: str, cluster: Cluster, folder: Path
) -> None:
    os.mkfifo(folder / "gate")
    middle = "exit 3" if end == "fails" else "read x < gate"
    finish = "psql -qXc 'ALTER TABLE half RENAME TO made'"
    init = f"psql -qXc 'CREATE TABLE half()'; test -e go || {{ touch up; {middle}; }}; {finish}"
    options = (*KEPT, init)
    nowhere = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    ran = ("wrap", *options, "--", "touch", "ran")
    with started(*ran, start_new_session=True, **nowhere) as process:
        wait_until((folder / "up").exists, "the middle of init")
        number = 0 if end == "fails" else getattr(signal, end.split()[0])
        if end in ("SIGINT", "SIGKILL of all"):
            os.killpg(process.pid, number)
        elif number:
            process.send_signal(number)
        assert process.wait(DEADLINE) == (-number if number else 125)
    assert not (folder / "ran").exists()
    assert len(cluster.names()) == ("SIGKILL" in end)
    (folder / "go").touch()
    again = ("wrap", *options, "--", *query_lease(TABLES))
    with started(*again, stderr=subprocess.STDOUT) as process:
        if end == "SIGKILL":  # init still runs and keeps the template locked
            assert "waiting for another run, which makes" in next_line(process)
            (folder / "gate").write_text("\n")
        assert get_template(next_line(process))[0] == "made"
        assert next_line(process) == "made"
        assert process.wait(DEADLINE) == 0
    assert run_with_template(*options)[0] == "found"


@needs_postgres
@pytest.mark.parametrize(
    ("init", "tables", "warning"),
    [
        ("true", "", "warning: --init made no table"),
        ("psql -qXc 'BEGIN; CREATE TABLE a()'", "", "warning: --init made no table"),
        ("psql -qXc 'CREATE SCHEMA a'", "", ""),
        (f'dropdb "$PGDATABASE"; createdb "$PGDATABASE"; {CREATE}', "made\n", ""),
    ],
)
def test_wrap_warns_if_init_makes_nothing(
    cluster: Cluster, init: str, tables: str, warning: str
) -> None:
    done = run("wrap", *KEPT, init, "--", *query_lease(TABLES))
    assert (done.returncode, done.stdout) == (0, tables), done.stderr
    assert warning in done.stderr
    assert done.stderr.count("\n") == (2 if warning else 1)
    assert len(cluster.templates()) == 1


@needs_postgres
def test_each_of_runs_that_start_together_makes_a_template_that_is_not_kept_once(
    cluster: Cluster,
) -> None:
    words = ("wrap", "--init", f"echo >> inits; {CREATE}", "--", *query_lease(TABLES))
    with contextlib.ExitStack() as stack:
        runs = [stack.enter_context(started(*words)) for _ in range(6)]
        assert [run.communicate(timeout=DEADLINE * 2)[0] for run in runs] == ["made\n"] * 6
    assert Path("inits").read_text() == "\n" * 6
    assert not cluster.templates()


@needs_postgres
def test_an_init_whose_files_change_meanwhile_is_an_error_and_leaves_no_template(
    cluster: Cluster,
) -> None:
    done = run("wrap", *KEPT, f"echo >> source; {CREATE}", "--", "echo", "ran")
    assert (done.returncode, done.stdout) == (125, "")
    assert "was changed while the template was made; start again" in done.stderr
    assert not cluster.templates()


@needs_postgres
def test_wrap_ends_the_sessions_of_a_finished_template_and_allows_no_new_ones(
    cluster: Cluster,
) -> None:
    """Nor does a background process of init keep the lock of the template."""
    sessions = "select count(*) from pg_stat_activity where query like 'select pg_sleep%'"
    init = f"""
        sleep 1000 > /dev/null 2>&1 & echo $! > daemon
        psql -qXc 'select pg_sleep(1000)' > /dev/null 2>&1 &
        until [ "$(psql -XAtc "{sessions} and datname = current_database()")" = 1 ]; do :; done
        {CREATE}
    """
    with contextlib.ExitStack() as stack:
        stack.callback(lambda: os.kill(int(Path("daemon").read_text()), signal.SIGKILL))
        stack.enter_context(running_wrap("--init", init))
        (name,) = cluster.templates()
        assert cluster.sql(f"{sessions} and datname = '{cluster.prefix}{name}'") == [(0,)]
        with pytest.raises(psycopg.OperationalError, match="not currently accepting connections"):
            cluster.sql("SELECT 1", database=cluster.prefix + name)
        env = {**os.environ, "PGM_SOCKET": "running"}
        assert subprocess.check_output(query_lease(TABLES), text=True, env=env) == "made\n"


@pytest.fixture
def role(cluster: Cluster, monkeypatch: Patch) -> Iterator[str]:
    """Let every command connect as a role that may create databases and is no superuser."""
    role = f"{cluster.prefix}role"
    cluster.sql(f"CREATE ROLE {pgmanager.quote_identifier(role)} LOGIN CREATEDB")
    monkeypatch.setenv("PGUSER", role)
    yield role
    cluster.clean()
    cluster.sql(f"DROP ROLE {pgmanager.quote_identifier(role)}")


@needs_postgres
def test_wrap_keeps_three_templates_and_drops_none_that_is_in_use_or_not_ours(
    cluster: Cluster, role: str, monkeypatch: Patch
) -> None:
    others = {"template_0badcafe", "template_once_0badcafe", "template_", "template_1"}
    for name in others:
        cluster.create(name, user=role)
    with monkeypatch.context() as patch:  # a template of another role
        patch.setenv("PGUSER", "postgres")
        others.add(run_with_template(*KEPT, CREATE)[1])
    cluster.drop("0")  # the copy belongs to the other role, too
    with running_wrap(*KEPT, CREATE):
        (used,) = cluster.templates() - others
        made = [run_with_template(*KEPT, f"{CREATE} # {number}")[1] for number in range(4)]
    assert cluster.templates() == others | {used, *made[1:]}  # four, because one was in use
    assert run_with_template(*KEPT, f"{CREATE} # 1") == ("found", made[1])
    assert cluster.templates() == others | {*made[1:]}
    _, last = run_with_template(*KEPT, f"{CREATE} # 4")
    assert cluster.templates() == others | {made[1], made[3], last}


@needs_postgres
def test_rebuild_makes_a_template_again_unless_a_server_uses_it(cluster: Cluster) -> None:
    query = f"SELECT oid FROM pg_database WHERE datname LIKE '{cluster.prefix}template%'"
    _, name = run_with_template(*KEPT, CREATE)
    before = cluster.sql(query)
    assert run_with_template("--rebuild", *KEPT, CREATE) == ("made", name)
    after = cluster.sql(query)
    assert before != after
    with running_wrap(*KEPT, CREATE):
        done = run("wrap", "--rebuild", *KEPT, CREATE, "--", "echo", "ran")
        assert is_refused(done, f"cannot rebuild a template in use: {cluster.prefix}{name}")
    assert cluster.sql(query) == after


@needs_postgres
def test_init_may_be_repeated_and_a_folder_means_its_sql_files_in_the_order_of_their_names(
    cluster: Cluster, folder: Path
) -> None:
    make = "CREATE TABLE IF NOT EXISTS public.made();"
    files = {
        "parts/10.sql": f"{make} ALTER TABLE made ADD ten int; SET search_path = ''; BEGIN;",
        "parts/2.sql": "ALTER TABLE made ADD two int;",  # each file has a session of its own
        "parts/notes.txt": "no SQL",
        "x.sql": f"{make} ALTER TABLE made ADD x int;",
    }
    (folder / "parts").mkdir()
    for name, text in files.items():
        (folder / name).write_text(text)
    columns = "SELECT string_agg(attname, ' ' ORDER BY attnum) FROM pg_attribute"
    columns += " WHERE attrelid = 'made'::regclass AND attnum > 0"
    command = "psql -qXc 'ALTER TABLE made ADD by_command int'"
    for change, inits, verb, expected in (
        ("", ["parts"], "made", "ten two"),
        ("", ["parts", "x.sql"], "made", "ten two x"),
        ("", ["x.sql", "parts"], "made", "x ten two"),
        ("", ["parts/", "./x.sql"], "found", "ten two x"),
        ("echo >> parts/notes.txt", ["parts", "x.sql"], "found", "ten two x"),
        ("echo >> parts/2.sql", ["parts", "x.sql"], "made", "ten two x"),
        ("cp x.sql parts/3.sql", ["parts"], "made", "ten two x"),
        ("mv parts/3.sql parts/1.sql", ["parts"], "made", "x ten two"),
        ("", ["parts", command], "made", "x ten two by_command"),
        ("", ["parts", command], "found", "x ten two by_command"),
    ):
        subprocess.run(["sh", "-ec", change], check=True)
        options = [word for init in inits for word in ("--init", init)]
        options += ["--depends", "source"] if command in inits else []
        done = run("wrap", *options, "--", *query_lease(columns))
        assert done.stdout == f"{expected}\n", (change, inits, done.stderr)
        assert get_template(done.stderr)[0] == verb, (change, inits)


@needs_postgres
@pytest.mark.parametrize(
    ("init", "shown"),
    [
        ("SELECT set_config('work_mem', '1MB', false); SELECT count(*) FROM made;", ""),
        ("COPY made TO stdout;", ""),
        ("DO $$ BEGIN RAISE WARNING 'look'; END $$;", "psql:x.sql:1: WARNING:  look\n"),
        ("psql -XAtc 'SELECT 42'", "42\n"),
    ],
)
def test_rows_that_an_init_file_selects_are_not_shown_but_warnings_and_output_of_commands_are(
    init: str, shown: str, cluster: Cluster, folder: Path
) -> None:
    (folder / "made.sql").write_text("CREATE TABLE made AS SELECT 42;")
    (folder / "x.sql").write_text(init)
    step = init if init.startswith("psql") else "x.sql"
    done = run("wrap", "--init", "made.sql", "--init", step, "--", *query_lease(TABLES))
    assert (done.returncode, done.stdout) == (0, "made\n"), done.stderr
    assert re.fullmatch(rf"{re.escape(shown)}pgmanager: template .* was made in .*\n", done.stderr)


@needs_postgres
def test_a_template_whose_rules_for_sorting_text_have_changed_is_made_again(
    cluster: Cluster,
) -> None:
    if not cluster.sql("SELECT 1 FROM pg_attribute WHERE attname = 'datcollversion'"):
        pytest.skip("PostgreSQL notes them from 15 on")
    _, name = run_with_template(*KEPT, CREATE)
    where = f"WHERE datname = '{cluster.prefix}{name}'"
    cluster.sql(f"UPDATE pg_database SET datcollversion = 'older' {where}")
    assert run_with_template(*KEPT, CREATE) == ("made", name)
    assert run_with_template(*KEPT, CREATE) == ("found", name)


@needs_postgres
def test_the_next_start_makes_a_template_that_somebody_dropped_and_running_servers_use_it(
    cluster: Cluster,
) -> None:
    with running_wrap(*KEPT, CREATE):
        (name,) = cluster.templates()
        with connect("running") as client:
            assert name_of(client) == f"{cluster.prefix}0"
            cluster.drop(name)
        advice = "create it again; start pgmanager again if --init made it"
        error = f'ERROR:  template "{cluster.prefix}{name}" does not exist; HINT:  {advice}'
        assert wait_for_reason("running") == f"cannot prepare {cluster.prefix}0: {error}"
        assert run_with_template(*KEPT, CREATE) == ("made", name)
        wait_for_free("running")


def leave_in(kind: str, cluster: Cluster, database: str, user: str) -> Any:
    """Leave something in a database that DROP DATABASE stops at; return what keeps it in use."""
    name = cluster.prefix[:9]  # of one word, and used by no other test
    queries = {
        "transaction": ["BEGIN", "SELECT txid_current()", f"PREPARE TRANSACTION '{name}'"],
        "subscription": [
            f"CREATE SUBSCRIPTION {name} CONNECTION 'port=1' PUBLICATION x WITH (connect = false)",
            f"ALTER SUBSCRIPTION {name} ENABLE",
        ],
        "slot": [f"SELECT pg_create_logical_replication_slot('{name}', 'pgoutput')"],
    }
    cluster.sql(*queries[kind], database=database, user=user)
    place: dict[str, Any] = {"host": cluster.host, "user": user, "dbname": database}
    connection = psycopg.connect(**place, replication="database", autocommit=True)
    if kind == "slot":
        options = "proto_version '1', publication_names 'x'"
        start = f"START_REPLICATION SLOT {name} LOGICAL 0/0 ({options})"
        assert connection.pgconn.exec_(start.encode()).status == psycopg.pq.ExecStatus.COPY_BOTH
    return connection


SLOT = (
    "is used by an active replication slot; HINT:  end what uses it, or drop the slot: p[0-9a-f]+$"
)


@needs_postgres
@pytest.mark.parametrize(
    ("kind", "server", "holder", "reason"),
    [
        *((kind, "postgres", "postgres", "") for kind in ("transaction", "subscription", "slot")),
        ("transaction", "role", "role", ""),
        ("transaction", "role", "other", ""),  # of which role is a member
        ("transaction", "role", "postgres", "; end the prepared transactions and subscriptions of"),
        ("subscription", "role", "postgres", "; end the prepared transactions and subscripti"),
        ("slot", "role", "role", ""),
        ("slot", "role", "postgres", SLOT),
    ],
)
def test_what_drop_database_stops_at_is_removed_or_the_reason_says_how(
    kind: str,
    server: str,
    holder: str,
    reason: str,
    cluster: Cluster,
    role: str,
    monkeypatch: Patch,
) -> None:
    other, ours = (pgmanager.quote_identifier(name) for name in (f"{role}2", role))
    cluster.sql(f"ALTER ROLE {ours} REPLICATION", f"CREATE ROLE {other} LOGIN REPLICATION")
    cluster.sql(f"GRANT {other} TO {ours}")
    users = {"postgres": "postgres", "role": role, "other": f"{role}2"}
    monkeypatch.setenv("PGUSER", users[server])
    with running_wrap(*KEPT, CREATE):
        with connect("running") as client:
            name = name_of(client)
            used = leave_in(kind, cluster, name, users[holder])
        with contextlib.closing(used):
            if reason:
                assert re.search(reason, wait_for_reason("running"))
                used.close()
                cluster.detach(name)
                wait_for_free("running")  # it is tried again
            with connect("running") as client:
                assert name_of(client) == name
                assert cluster.sql(TABLES, database=name) == [("made",)]
                assert cluster.sql("SELECT gid FROM pg_prepared_xacts") == []
                assert cluster.sql("SELECT subname FROM pg_subscription") == []
    cluster.sql(f"DROP ROLE {other}")


@needs_postgres
@pytest.mark.parametrize(
    "query",
    [
        "CREATE SUBSCRIPTION $x CONNECTION $$port=1$$ PUBLICATION x WITH (connect = false)",
        "BEGIN' -c 'CREATE TABLE half()' -c 'PREPARE TRANSACTION $$$x$$",
    ],
)
def test_no_subscription_and_no_prepared_transaction_of_init_stays_in_the_way(
    query: str, cluster: Cluster
) -> None:
    init = f"{CREATE} -c '{query}'".replace("$x", cluster.prefix[:9])
    _, name = run_with_template(*KEPT, init)
    assert run_with_template(*KEPT, init) == ("found", name)
    assert run_with_template("--rebuild", *KEPT, init) == ("made", name)


@needs_postgres
def test_a_database_that_its_holder_has_made_again_is_kept_and_the_reason_says_so(
    cluster: Cluster,
) -> None:
    with running_wrap(*KEPT, CREATE):
        with connect("running") as client:
            name = name_of(client)
            cluster.drop("0")
            cluster.create("0", "CREATE TABLE precious()")
        advice = "if the last holder has made it again, drop it; else choose another prefix"
        assert wait_for_reason("running").endswith(advice)
        assert cluster.sql(TABLES, database=name) == [("precious",)]
        cluster.drop("0")
        wait_for_free("running")
        assert cluster.sql(TABLES, database=name) == [("made",)]


@needs_postgres
@pytest.mark.parametrize(("owner", "output"), [("role", "made\n"), ("postgres", "")])
def test_an_invalid_database_with_a_name_of_the_pool_is_dropped_if_our_role_owns_it(
    owner: str, output: str, cluster: Cluster, role: str
) -> None:
    """PostgreSQL leaves such a one if DROP DATABASE is interrupted."""
    name = cluster.create("0", user=role if owner == "role" else owner)
    cluster.sql(f"UPDATE pg_database SET datconnlimit = -2 WHERE datname = '{name}'")
    done = run("wrap", *KEPT, CREATE, "--", *query_lease(TABLES))
    assert done.stdout == output
    assert ("was not made by pgmanager" in done.stderr) == (not output)


@needs_postgres
@linux
def test_reasons_and_warnings_are_errors_of_postgresql_if_it_speaks_german(
    folder: Path, path: str, monkeypatch: Patch, request: pytest.FixtureRequest
) -> None:
    """A superuser makes it speak English. For other roles psql shows the SQLSTATE."""
    if not shutil.which("localedef"):
        pytest.skip("no localedef(1)")
    subprocess.run(["localedef", "-i", "de_DE", "-f", "UTF-8", folder / "de_DE.UTF-8"], check=False)
    folder.chmod(0o755)
    monkeypatch.setenv("LOCPATH", str(folder))
    admin = request.getfixturevalue("admin")
    admin.execute("CREATE ROLE poor LOGIN; CREATE ROLE rich LOGIN CREATEDB")
    admin.execute("CREATE DATABASE real OWNER rich")
    admin.execute("ALTER DATABASE real SET log_statement = 'all'")
    admin.execute("CREATE DATABASE foreign0")
    try:
        admin.execute("ALTER ROLE ALL SET lc_messages = 'de_DE.UTF-8'")
        with psycopg.connect(dbname="real") as connection:
            connection.execute("SELECT 1/0")
    except psycopg.Error as failure:
        if "Division durch Null" not in str(failure):
            pytest.skip("no German messages here")
    for user, prefix, reason in (
        ("postgres", "foreign", 'ERROR:  database "foreign0" was not made by pgmanager; HINT:  pg'),
        (
            "rich",
            "foreign",
            'FEHLER:  P0001: database "foreign0" was not made by pgmanager; HINT: ',
        ),
        ("poor", "copy", "FEHLER:  42501: keine Berechtigung, um Datenbank zu erzeugen"),
    ):
        monkeypatch.setenv("PGUSER", user)
        words = ("--count", "1", "--template", "real")
        with served(path, *words, prefix=prefix), connect(path) as client:
            answer = client.recv(1024).decode()
        assert answer.startswith(f"EMPTY:cannot prepare {prefix}0: {reason}")
    monkeypatch.setenv("PGUSER", "rich")
    done = run("wrap", "--prefix", "copy", "--template", "real", "--", *PGMANAGER, "exec", "true")
    problem = "FEHLER:  42501: keine Berechtigung, um Parameter »log_statement« zu setzen"
    warning = f"the template's settings log_statement are not copied: {problem}"
    assert done.stderr == f"pgmanager: {warning}\n"


LIMITS = {
    "statement_timeout": "300ms",
    "lock_timeout": "100ms",
    "idle_in_transaction_session_timeout": "100ms",
    "idle_session_timeout": "100ms",
    "transaction_timeout": "300ms",
    "default_transaction_read_only": "on",
}


@needs_postgres
@pytest.mark.parametrize("place", ["the role", "PGOPTIONS"])
def test_no_limit_of_the_role_or_of_pgoptions_ends_our_own_sql(
    place: str, cluster: Cluster, role: str, monkeypatch: Patch
) -> None:
    # Our own session is idle while init runs.
    init = "sleep 0.3; psql -qXc 'BEGIN READ WRITE; CREATE TABLE made(); COMMIT'"
    known = {name for (name,) in cluster.sql("SELECT name FROM pg_settings")}
    limits = {name: value for name, value in LIMITS.items() if name in known}
    options = " ".join(f"-c {name}={value}" for name, value in limits.items())
    if place == "the role":
        options = ""
        for name, value in limits.items():
            alter = f"ALTER ROLE {pgmanager.quote_identifier(role)} SET {name} = '{value}'"
            cluster.sql(alter)
    waits = "SELECT pid FROM pg_locks JOIN pg_stat_activity USING (pid) WHERE NOT granted"
    waits += " AND clock_timestamp() - query_start > '1 s'"
    admin: dict[str, Any] = {"host": cluster.host, "user": "postgres", "dbname": "postgres"}
    with contextlib.ExitStack() as stack:
        with monkeypatch.context() as patch:
            patch.setenv("PGOPTIONS", options)
            stack.enter_context(running_wrap(*KEPT, init))
        with psycopg.connect(**admin) as other:
            with connect("running") as client:
                name = name_of(client)
                other.execute("LOCK TABLE pg_database IN EXCLUSIVE MODE")  # DROP DATABASE waits
            wait_until(lambda: cluster.sql(waits), "a session that waits for a second")
        assert name_of(stack.enter_context(connect("running"))) == name


@needs_postgres
@pytest.mark.parametrize("user", ["postgres", "role"])
def test_copies_have_the_settings_of_the_template_that_the_role_may_set(
    user: str, cluster: Cluster, role: str, monkeypatch: Patch
) -> None:
    name = cluster.create("real", user=role)
    database, owner = pgmanager.quote_identifier(name), pgmanager.quote_identifier(role)
    cluster.sql(
        f"""ALTER DATABASE {database} SET search_path = 'a b', "C""x", "$user", public, ''""",
        f"ALTER DATABASE {database} SET DateStyle = 'ISO, DMY'",
        f"""ALTER DATABASE {database} SET application_name = 'x=''y'', "z" '""",
        f"ALTER ROLE {owner} IN DATABASE {database} SET search_path = ''",
        f"ALTER ROLE {owner} IN DATABASE {database} SET statement_timeout = '7s'",
        # The role may not set these two:
        f"ALTER DATABASE {database} SET log_statement = 'all'",
        f"ALTER ROLE postgres IN DATABASE {database} SET work_mem = '3MB'",
    )
    query = "SELECT setrole, unnest(setconfig) FROM pg_db_role_setting JOIN pg_database d"
    query += " ON d.oid = setdatabase WHERE datname = "
    expected = [f"{oid}|{setting}" for oid, setting in cluster.sql(f"{query}'{name}'")]
    assert len(expected) == 7
    if user == "role":
        expected = [row for row in expected if not re.search("log_statement|work_mem", row)]
    else:
        monkeypatch.setenv("PGUSER", "postgres")
    ask = shlex.join(query_lease(f"{query} current_database()"))
    done = run("wrap", "--template", name, "--", "sh", "-c", f"{ask}; {ask}")
    assert sorted(done.stdout.splitlines()) == sorted(2 * expected), done.stderr
    warning = "the template's settings log_statement, work_mem are not copied: ERROR:  "
    assert done.stderr.count(warning) == (user == "role")


@needs_postgres
@pytest.mark.parametrize("user", ["postgres", "role"])
def test_keep_saves_a_database_with_its_content_and_the_next_holder_gets_a_fresh_copy(
    user: str, cluster: Cluster, role: str, monkeypatch: Patch
) -> None:
    monkeypatch.setenv("PGUSER", role if user == "role" else user)
    with running_wrap(*KEPT, CREATE):
        with pgmanager.acquire(DEADLINE, socket_path="running") as db:
            other = psycopg.connect(dbname=str(db), autocommit=True)
            other.execute("CREATE TABLE evidence()")
            kept = db.keep()
            assert re.fullmatch(re.escape(db) + "_kept_[0-9a-f]{8}", kept)
            with pytest.raises(psycopg.OperationalError), other:  # the session was ended
                other.execute("SELECT 1")
            with pytest.raises(pgmanager.UsageError, match="or is kept already; "):
                db.keep()
        with pytest.raises(pgmanager.UsageError, match="the lease has ended"):
            db.keep()
        with pgmanager.acquire(DEADLINE, socket_path="running") as again:
            assert again == db
            assert cluster.sql(TABLES, database=again) == [("made",)]
    assert cluster.sql(TABLES, database=kept) == [("evidence",), ("made",)]
    marks = "SELECT datconnlimit, shobj_description(oid, 'pg_database') FROM pg_database"
    assert cluster.sql(f"{marks} WHERE datname = '{kept}'") == [(-1, None)]


@needs_postgres
def test_a_database_that_pgmanager_did_not_make_cannot_be_kept(cluster: Cluster) -> None:
    cluster.create("0")
    error = r"^cannot keep p.*0: it is no copy .*; serve fresh copies, with --init or --template"
    refused = pytest.raises(pgmanager.UsageError, match=error)
    with running_wrap(), pgmanager.acquire(DEADLINE, socket_path="running") as db, refused:
        db.keep()
    assert cluster.names() == {"0"}


@needs_postgres
def test_the_name_of_a_kept_database_has_at_most_63_bytes(cluster: Cluster) -> None:
    template = cluster.create("real")
    prefix = cluster.prefix + "é" * 25 + "x"
    options = ("--template", template, "--prefix", prefix)
    with running_wrap(*options), pgmanager.acquire(DEADLINE, socket_path="running") as db:
        assert len(db.encode()) == 63
        kept = db.keep()
    assert kept.startswith(cluster.prefix + "é" * 19 + "_kept_")
    assert kept[len(cluster.prefix) :] in cluster.names()


@needs_postgres
def test_wrap_tells_its_command_the_template_of_the_pool(
    cluster: Cluster, monkeypatch: Patch
) -> None:
    monkeypatch.setenv("PGM_TEMPLATE_DATABASE", "stale")
    show = ["sh", "-c", 'echo "$PGM_TEMPLATE_DATABASE"']
    template = ("--template", "template1")
    for options, command, expected in (
        ((), show, ""),
        (("--prepare", "true"), show, ""),
        (template, show, "template1"),
        (template, [*PGMANAGER, "wrap", "--", *show], "template1"),
        (template, [*PGMANAGER, "wrap", "-s", "other", "--", *show], ""),
    ):
        assert run("wrap", *options, "--", *command).stdout == f"{expected}\n"


@needs_postgres
def test_wrap_ephemeral_keeps_its_template_for_the_next_run(
    workplace: Callable[..., list[str]], own: list[str]
) -> None:
    init = ("--init", CREATE, "--depends", "a.sql")
    query = [*own, "exec", "--", "psql", "-XAtc", TABLES]
    for option, expected in ((), "made"), ((), "found"), (("--rebuild",), "made"):
        words = [*own, *workplace(*init, *option, "--", *query)]
        done = subprocess.run(words, capture_output=True, text=True, timeout=DEADLINE * 2)
        assert (done.returncode, done.stdout) == (0, "made\n"), done.stderr
        assert get_template(done.stderr)[0] == expected


@needs_postgres
@pytest.mark.parametrize("ways", ["DATABASE_URL", "PGHOST", "DATABASE_URL and PGHOST"])
def test_commands_change_only_databases_of_the_pool_on_the_chosen_server(
    ways: str, hosts: list[str], folder: Path
) -> None:
    """DATABASE_URL and PGHOST each choose another server. The URL wins."""
    url_cluster, host_cluster = clusters = [Cluster(host) for host in hosts]
    prefix = url_cluster.prefix[:-2]
    for cluster in clusters:
        cluster.prefix = prefix
        for name in ("dev", "0", "1"):  # two have names of the pool, but somebody else made them
            cluster.create(name, f'CREATE TABLE "{name} {cluster.host}"()')
    env = {key: value for key, value in os.environ.items() if not key.startswith("PG")}
    env.update({"PGM_DATABASE_PREFIX": prefix, "PGM_DATABASE_COUNT": "3"})
    env["PATH"] = f"{pgmanager.find_programs()}:{env['PATH']}"
    env.update({"PYTHONPATH": str(MODULE.parent), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"})
    if "PGHOST" in ways:
        env.update({**host_cluster.env, "PGDATABASE": f"{prefix}dev"})
    if "DATABASE_URL" in ways:
        query = f"host={url_cluster.host.replace('/', '%2F')}&port=5432"
        env["DATABASE_URL"] = f"postgresql://postgres@/{prefix}dev?{query}"
    # A client that reads the URL and a client that does not must use the same database.
    touch = "psql -qXc 'DROP SCHEMA public CASCADE; CREATE SCHEMA public; CREATE TABLE touched()'"
    clients = f'{touch} && psql -qX ${{DATABASE_URL:+"$DATABASE_URL"}} -c "TABLE touched"'
    test = f"    subprocess.run(['sh', '-c', {clients!r}], check=True)"
    (folder / "test_it.py").write_text(f"import subprocess\ndef test_it():\n{test}\n")
    tests = [sys.executable, "-m", "pytest", "-q", "-p", "pgmanager", "-p", "no:cacheprovider"]
    lease = [*PGMANAGER, "exec", "--", "sh", "-c", clients]
    chosen = url_cluster if "DATABASE_URL" in ways else host_cluster
    try:
        for command, filled in (
            (["wrap", "--template", f"{prefix}dev", "--", *lease], 0),
            (["wrap", "--template", f"{prefix}dev", "--", *tests], 0),
            (["wrap", "--init", touch, "--depends", "test_it.py", "--", *lease], 0),
            (["wrap", "--prepare", touch, "--", *lease], 1),  # or more; as the caller asks for
            (["wrap-each", "--", "sh", "-c", clients], 3),
        ):
            if filled:
                chosen.drop("2")
                chosen.create("2")
            before = {cluster: cluster.content() for cluster in clusters}
            done = run(*command, env=env, cwd=folder)
            assert done.returncode == 0, done.stdout + done.stderr
            cure = "wrap-each --prefix PREFIX --count N -x -- dropdb --if-exists\n"
            assert done.stderr.count(cure) == (not filled)  # once for both databases
            after = {cluster: cluster.content() for cluster in clusters}
            names = [f"{prefix}{number}" for number in ((0, 1, 2) if filled else (2,))]
            for name in names:
                before[chosen].pop(name, None)
            tables = [after[chosen].pop(name, None) for name in names]
            assert tables.count([("touched",)]) >= filled
            assert before == after, command
    finally:
        for cluster in clusters:
            cluster.clean()


# -------------------------------------------------------------------------------------- Claims
#
# Two users are two domains, because each has a folder of lock files. That folder has one for each
# port, so two ports that lead to one PostgreSQL are two domains as well.

GATED_INIT = f'read x < "$GATE"; {CREATE}'  # it waits if the gate is a FIFO
QUICK = "import sys, pgmanager as p; p.CHECK_SECONDS = 0.1; sys.exit(p.main(sys.argv[1:]))"


class Domain:
    """Starts servers of one domain, which have the test's prefix and one name."""

    def __init__(self, cluster: Cluster, uid: int | None) -> None:
        self.cluster, self.port = cluster, str(random.randrange(10_000, 65_536))
        self.program = [sys.executable, "-c", *([AS_USER, str(uid)] if uid else [QUICK])]
        self.env = {**os.environ, "GATE": os.devnull}
        self.locks = f"/tmp/pgmanager-{uid or os.geteuid()}/{'5432' if uid else self.port}"
        if uid is None:
            os.symlink(f"{cluster.host}/.s.PGSQL.5432", f".s.PGSQL.{self.port}")
            self.env.update(PGHOST=os.getcwd(), PGPORT=self.port)

    def path(self, server: str) -> str:
        return os.path.abspath(f"s-{self.port}{server}")

    def start(self, *words: str, server: str = "", **env: str) -> Any:
        """Start a server for a ``with``. The block begins before it serves."""
        words = ("serve", "-s", self.path(server), *(words or ("--init", GATED_INIT)))
        env = {**self.env, **env}
        return started(*words, program=self.program, env=env, cwd=MODULE.parent)

    @contextlib.contextmanager
    def lease(self, process: Process | None = None, server: str = "") -> Iterator[tuple[str, str]]:
        """Wait until a server serves if one is given; lease a database until the block ends.

        Provide its name without the prefix, and what the server has said. The database is fresh,
        and at the end as its holder left it, with the holder's session.
        """
        said = read_start(process) if process else ""
        with connect(self.path(server)) as client:
            name = name_of(client)
            place: Any = {"host": self.cluster.host, "port": 5432, "user": "postgres"}
            with psycopg.connect(**place, dbname=name, autocommit=True) as session:
                session.execute("INSERT INTO made DEFAULT VALUES")
                yield name[len(self.cluster.prefix) :], said
                assert session.execute("SELECT * FROM made").fetchall() == [()]


def read_start(process: Process) -> str:
    """Return what a server says until it serves; fail if it ends."""
    said = ""
    while "serving" not in said and process.stderr is not None:
        said += (line := process.stderr.readline())
        assert line, said
    return said


@pytest.fixture
def domains(request: pytest.FixtureRequest, cluster: Cluster) -> Iterator[list[Domain]]:
    """Provide three domains: ports, or users if the test says so."""
    is_users = getattr(request, "param", "ports") == "users"
    if is_users and os.geteuid() != 0:
        pytest.skip("only root can run a program as another user")
    os.chmod(".", 0o777)
    os.chmod(cluster.host, 0o755)
    uids = random.sample(range(20_000, 60_000), 3) if is_users else [None] * 3
    domains = [Domain(cluster, uid) for uid in uids]
    yield domains
    for domain in domains:
        shutil.rmtree(os.path.dirname(domain.locks) if is_users else domain.locks, True)


def claims(cluster: Cluster) -> set[int]:
    """Return the process ids of the sessions that have claimed the test's prefix."""
    key = pgmanager.hash_to_number(cluster.prefix)
    query = f"SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND classid = {key}"
    return {pid for (pid,) in cluster.sql(query)}


def lose_claim(cluster: Cluster) -> None:
    """End the sessions that have claimed the test's prefix."""
    before = claims(cluster)
    cluster.sql(*(f"SELECT pg_terminate_backend({pid})" for pid in before))
    wait_until(lambda: not claims(cluster) & before, "the end of the sessions")


@needs_postgres
@pytest.mark.parametrize("moment", ["at once", "after the claim", "after the start"])
@pytest.mark.parametrize("domains", ["users", "ports"], indirect=True)
def test_domains_that_use_one_prefix_at_the_same_time_have_databases_of_their_own(
    moment: str, cluster: Cluster, role: str, domains: list[Domain]
) -> None:
    one, two, three = domains
    os.mkfifo("gate")
    os.chmod("gate", 0o666)
    gate = {"GATE": os.path.abspath("gate")} if moment == "after the claim" else {}
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(one.start(**gate))]
        if moment == "after the claim":
            wait_until(cluster.templates, "the init of the first server")
        elif moment == "after the start":
            wait_until(lambda: is_listening(one.path("")), "the first server")
        servers.append(stack.enter_context(two.start()))
        with two.lease(servers[1]) as second:
            if gate:
                Path("gate").write_text("\n")
            with one.lease(servers[0]) as first:
                (plain, said), (other, other_said) = sorted([first, second])
                assert (plain, other, "is used by" in said) == ("0", "host2_0", False)
                assert moment == "at once" or plain == first[0]
                holder = servers[plain == second[0]]
                used = f"the prefix {cluster.prefix} is used by pgmanager {holder.pid} on "
                used += f"{os.uname().nodename}; the databases here are {cluster.prefix}host"
                assert other_said.count(f"pgmanager: {used}2_0 ...\n") == 1
                with three.start() as server, three.lease(server) as (name, said):
                    assert (name, said.count(f"{used}3_0 ...\n")) == ("host3_0", 1)
        holder.terminate()
        wait_until(lambda: not claims(cluster), "the end of the first claim")
        with three.start() as server, three.lease(server) as (name, said):
            assert (name, "is used by" in said) == ("0", False)


@needs_postgres
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_servers_of_a_domain_share_a_prefix_until_the_last_one_has_ended(
    number: int, cluster: Cluster, domains: list[Domain]
) -> None:
    one, two, _ = domains
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(one.start())
        with one.lease(server) as (name, _):
            assert name == "0"
            last = stack.enter_context(one.start(server="b"))
            read_start(last)
            wait_until(lambda: states(one.path("b")) == ["elsewhere"], "the name in use")
        server.send_signal(number)
        server.wait(DEADLINE)
        wait_until(lambda: len(claims(cluster)) == 1, "the end of one claim")
        with two.start() as other, two.lease(other) as (name, said):
            assert (name, f"by pgmanager {last.pid} on" in said) == ("host2_0", True)
            last.send_signal(number)
            wait_until(lambda: not claims(cluster), "the end of the other")
            with two.start(server="b") as other_last, two.lease(other_last, "b") as (name, _):
                assert name == "0"


@needs_postgres
def test_a_prefix_of_the_users_choice_and_one_that_goes_on_with_host2_share_no_database(
    cluster: Cluster, domains: list[Domain]
) -> None:
    one, two, three = domains
    chosen = {"PGM_DATABASE_PREFIX": f"{cluster.prefix}host2_"}
    with one.start(**chosen) as server, one.lease(server) as (name, _):
        assert name == "host2_0"
        with two.start() as second, two.lease(second) as (name, _):
            assert name == "0"
            with three.start() as third, three.lease(third) as (name, _):
                assert name == "host3_0"
            with three.start(**chosen) as third, three.lease(third) as (name, _):
                assert name == "host2_host2_0"


@needs_postgres
def test_prefixes_that_differ_only_in_digits_at_the_end_share_no_database(
    cluster: Cluster, domains: list[Domain]
) -> None:
    one, two, _ = domains
    prefix = f"{cluster.prefix}a"  # of which a10 is a name, as it is of a1
    chosen = {"PGM_DATABASE_PREFIX": prefix, "PGM_DATABASE_COUNT": "11"}
    with one.start(**chosen) as server, one.lease(server) as (name, _):
        assert name in ("a0", "a1")
        with two.start(PGM_DATABASE_PREFIX=f"{prefix}1") as other, two.lease(other) as (name, _):
            assert name.startswith("a1host2_")


@needs_postgres
@pytest.mark.parametrize(
    ("kind", "size", "name"),
    [
        ("template", 56, "host2_0"),
        ("template", 57, ""),
        ("init", 35, "host2_0"),  # of which the template's name has 63 bytes: template_once_...
        ("init", 36, ""),
    ],
)
def test_a_prefix_that_is_too_long_for_host2_is_an_error_if_another_domain_has_it(
    kind: str, size: int, name: str, cluster: Cluster, domains: list[Domain]
) -> None:
    one, two, _ = domains
    value = {"init": CREATE, "template": cluster.create("made", "CREATE TABLE made()")}[kind]
    cluster.prefix = prefix = cluster.prefix.ljust(size, "x")
    words = (f"--{kind}", value, "--prefix", prefix)
    with one.start(*words) as server, one.lease(server), two.start(*words) as other:
        if name:
            with two.lease(other) as (found, _):
                assert found == name
        else:
            assert other.wait(DEADLINE) == 2
            said = other.communicate()[1]
            assert re.match(r"pgmanager: database name too long: .*host2_\w+: 64 bytes", said)
            assert f"; choose a shorter prefix: {prefix} is used by pgmanager" in said
    cluster.clean()
    cluster.prefix = prefix[:11]


@needs_postgres
@pytest.mark.parametrize("loss", ["the session is ended", "PostgreSQL starts again"])
def test_a_claim_that_was_lost_is_made_again_and_no_database_is_leased_without_a_fresh_copy(
    loss: str, cluster: Cluster, domains: list[Domain]
) -> None:
    one, two, _ = domains
    ready = f"SELECT oid FROM pg_database WHERE datname = '{cluster.prefix}0'"
    with one.start() as server:
        read_start(server)
        wait_for_free(one.path(""))
        before, copy = claims(cluster), cluster.sql(ready)
        if loss == "the session is ended":
            lose_claim(cluster)
        else:  # if one backend is killed, all end
            (backend,) = before
            os.kill(backend, signal.SIGKILL)

            def find_claim() -> bool:
                with contextlib.suppress(psycopg.OperationalError):
                    return bool(claims(cluster) - before)
                return False

            wait_until(find_claim, "the next claim")
        wait_until(lambda: len(claims(cluster) - before) == 1, "the next claim")
        with two.start() as other, two.lease(other) as (name, _):
            assert name == "host2_0"
        with one.lease() as (name, _):
            assert (name, cluster.sql(ready) != copy) == ("0", True)


@needs_postgres
def test_a_pool_is_broken_as_long_as_another_domain_has_taken_its_prefix(
    cluster: Cluster, domains: list[Domain]
) -> None:
    one, two, _ = domains
    words = ("--template", cluster.create("made", "CREATE TABLE made()"))
    with one.start(*words) as server:
        read_start(server)
        wait_for_free(one.path(""))
        server.send_signal(signal.SIGSTOP)
        lose_claim(cluster)
        with two.start(*words) as other, two.lease(other) as (name, _):
            assert name == "0"
            server.send_signal(signal.SIGCONT)
            wait_until(lambda: not os.path.getsize(f"{one.locks}/{cluster.prefix}0"), "the loss")
            with connect(one.path("")) as client:
                answer = client.recv(1024).decode()
            taken = f"the prefix {cluster.prefix} is now used by pgmanager {other.pid} on"
            assert answer.startswith("EMPTY:"), answer
            assert taken in answer
        wait_until(lambda: states(one.path("")) != ["broken"], "a new copy")
        with one.lease() as (name, _):
            assert name == "0"


@needs_postgres
def test_closing_a_claim_ends_a_check_that_postgresql_does_not_answer(cluster: Cluster) -> None:
    claim = pgmanager.Claim(pgmanager.Postgres(os.environ), cluster.prefix)
    claim.choose_prefix("0", pgmanager.wait_readable)
    (backend,) = claims(cluster)
    os.kill(backend, signal.SIGSTOP)
    try:
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            check = pool.submit(claim.check)
            wait_until(claim._lock.locked, "the check")
            claim.close()
            check.result(DEADLINE)
    finally:
        os.kill(backend, signal.SIGCONT)
    wait_until(lambda: not claims(cluster), "the end of all sessions")


@needs_postgres
def test_a_pool_with_a_template_starts_without_postgresql_and_claims_its_prefix_later(
    cluster: Cluster, domains: list[Domain]
) -> None:
    one, two, _ = domains
    template = cluster.create("made", "CREATE TABLE made()")
    later = os.path.abspath("later")
    with one.start("--template", template, PGHOST=later) as server:
        read_start(server)
        with connect(one.path("")) as client:
            assert b"No such file or directory" in client.recv(1024)
        os.symlink(os.getcwd(), later)
        wait_until(lambda: claims(cluster), "the claim")
        with two.start("--template", template) as other, two.lease(other) as (name, _):
            assert name == "host2_0"
        wait_until(lambda: states(one.path("")) == ["free"], "a copy")
        with one.lease() as (name, _):
            assert name == "0"


@needs_postgres
def test_an_init_runs_with_a_password_from_the_environment_and_without_a_server_is_an_error(
    folder: Path, monkeypatch: Patch
) -> None:
    show = ("sh", "-c", 'echo "$PGPORT $PGPASSWORD"; read x')
    words = ("wrap", "--prefix", "x", "--count", "1", "--init", CREATE, "--", *query_lease(TABLES))
    monkeypatch.setenv("PATH", pgmanager.find_programs(), prepend=":")
    options = ("-s", str(folder / "other"), "--count", "1")
    with started(
        "wrap", "--ephemeral", "--tcp", *options, "--", *show, stdin=subprocess.PIPE
    ) as process:
        port, password = next_line(process).split()
        for name, value in {"HOST": "127.0.0.1", "PORT": port, "USER": "postgres"}.items():
            monkeypatch.setenv(f"PG{name}", value)
        for given, status, stdout, problem in (
            (password, 0, "made\n", "was made in"),
            ("wrong", 125, "", "password authentication failed"),
            ("", 125, "", "no password supplied"),
        ):
            monkeypatch.setenv("PGPASSWORD", given)
            done = run(*words, cwd=folder)
            assert (done.returncode, done.stdout) == (status, stdout), done.stderr
            assert problem in done.stderr
            assert is_one_line(done.stderr)
    done = run(*words, cwd=folder)  # now nobody listens there
    assert (done.returncode, done.stdout, is_one_line(done.stderr)) == (125, "", True)
    assert "Connection refused" in done.stderr


@needs_postgres
@pytest.mark.parametrize("option", ["--init", "--template"])
def test_ctrl_c_ends_a_start_that_connects_to_a_server_that_does_not_answer(
    option: str, folder: Path, monkeypatch: Patch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent_server:
        monkeypatch.setenv("PGHOST", "127.0.0.1")
        monkeypatch.setenv("PGPORT", str(silent_server.getsockname()[1]))
        with started("wrap", "--prefix", "x", option, "true", "--", "true", cwd=folder) as process:
            connection, _ = silent_server.accept()
            process.send_signal(signal.SIGINT)
            assert process.communicate(timeout=DEADLINE) == ("", "")
            assert process.returncode == -signal.SIGINT
        with connection:
            assert len(b"".join(iter(lambda: connection.recv(4096), b""))) < 4096  # psql has ended


@needs_postgres
def test_a_session_takes_any_text_as_a_value_and_ends_with_the_reason_if_postgresql_ends_it(
    cluster: Cluster,
) -> None:
    values = [
        "",
        " ",
        "'",
        "\\",
        "\\'",
        "\\n",
        "a\r\nb\t",
        ":'x' :x",
        "`id`",
        "$$",
        ODD,
        "\x01é\u20ac",
    ]
    descriptors = os.listdir("/dev/fd")
    session = pgmanager.Session(os.environ)
    for value in [*values, "".join(values), 100_000 * "x"]:
        script = "DO $$ BEGIN RAISE WARNING 'between'; END $$;\nSELECT :'v', 7;"
        if "\n" in value:
            script = script.replace(":'v'", "replace(:'v', chr(10), '')")
        assert session.run(script, v=value) == [[value.replace("\n", ""), "7"]]
        assert session.messages == "WARNING:  between"
    assert session.is_alive()
    with pytest.raises(pgmanager.PostgresError, match="FATAL:  terminating"):
        session.run("SELECT pg_terminate_backend(pg_backend_pid()), pg_sleep(1000);")
    assert not session.is_alive()
    session.close()
    assert os.listdir("/dev/fd") == descriptors


@needs_postgres
def test_a_throw_away_server_goes_on_after_a_test_has_ended_all_sessions(path: str) -> None:
    end_all = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
    end_all += "WHERE pid <> pg_backend_pid() AND backend_type = 'client backend'"
    words = ("wrap", "--ephemeral", "-s", path, "--count", "1", "--init", CREATE)
    with started(*words, "--", *SHOW_URL, stdin=subprocess.PIPE) as process:
        url = next_line(process)
        for _ in range(2):
            with connect(path) as client:
                assert name_of(client) == "test_0"
            wait_for_free(path)
            with psycopg.connect(url, autocommit=True) as connection:
                assert connection.execute(end_all).fetchall()
                wait_until(lambda: not connection.execute(end_all).fetchall(), "their end")
        assert "cannot prepare" not in process.communicate("\n", timeout=DEADLINE)[1]


# -------------------------------------------------------------------------------------- Status


def test_the_json_of_status_has_the_fields_of_the_contract(folder: Path, path: str) -> None:
    with served(path, "--count", "2") as server, contextlib.ExitStack() as stack:
        for row in observe(path)["databases"]:
            assert (row["pid"], row["process"], row["reason"]) == (None, None, None)
        holder, _ = stack.enter_context(connected(path, 2))
        pids = []
        for number in (1, 2):
            waiter = started("exec", "-s", path, "cat", stdin=subprocess.PIPE)
            pids.append(stack.enter_context(waiter).pid)
            wait_for_waiters(path, number)
        for number in range(100):  # observers that read no answer must not change anything
            with socket.socket(socket.AF_UNIX) as observer:
                observer.bind(str(folder / f"pgmanager-observer{number}"))
                observer.connect(path)
        before = observe(path)
        done = run("status", "--json", "-s", path)
        assert (done.returncode, done.stderr) == (0, "")
        status = json.loads(done.stdout)
        for total in ("wait_seconds_max", "wait_seconds_total"):
            assert 0 < before[total] < status[total]  # clients that still wait count, too
        assert status.pop("wait_seconds_max") < status.pop("wait_seconds_total")
        for row in [*status["databases"], *status["waiting"]]:
            assert type(row["seconds"]) is float
            assert 0 <= row.pop("seconds") < DEADLINE * 2
            assert type(row.pop("process")) is str
        row = {"state": "leased", "reason": None, "pid": os.getpid()}
        assert status == {
            "pid": server.pid,
            "command": "serve",
            "socket": path,
            "locks": os.path.dirname(lock_file("db0")),
            "databases": [{"name": "db0", **row}, {"name": "db1", **row}],
            "waiting": [{"pid": pid} for pid in pids],  # the one that has waited longest is first
            "leases": 2,
            "peak": 2,
            "waited": 2,
        }
        holder.close()
        wait_for_waiters(path, 1)
        assert (observe(path)["leases"], observe(path)["peak"]) == (3, 2)


def test_status_prints_a_line_for_each_database_and_waiter_and_the_totals(path: str) -> None:
    """It replaces control characters in command lines, and works in every locale."""
    script = os.fsdecode(b"echo up\nread x # caf\xc3\xa9 \xe9 \x1b[31m")
    job = started("exec", "-s", path, "sh", "-c", script, stdin=subprocess.PIPE)
    with served(path, "--count", "2") as server, job as holder:
        assert next_line(holder) == "up"
        with connected(path, 2):
            wait_for_waiters(path, 1)
            env = {**os.environ, "LC_ALL": "C", "PYTHONIOENCODING": "ascii"}
            done = run("status", "-s", path, env=env)
    assert (done.returncode, done.stderr) == (0, "")
    head, *rows, totals = done.stdout.splitlines()
    assert head.split() == ["DATABASE", "STATE", "FOR", "PROCESS"]
    for row, expected in zip(
        rows,
        (
            f"db0 leased N s {holder.pid} sh -c echo up read x # caf\u00e9 [31m",
            f"db1 leased N s {os.getpid()} ",
            f"waiter 1 waiting N s {os.getpid()} ",
        ),
    ):
        assert re.sub(r" +\d+\.\d s", " N s", re.sub(" +", " ", row)).startswith(expected), row
    assert len(rows) == 3
    assert totals.startswith(f"serve, process {server.pid}, at {path}: leases 2, peak 2")


# A server that is not pgmanager. It sends its second argument and keeps or closes the connection.
FOREIGN_SERVER = """
import socketserver, sys
class Handler(socketserver.StreamRequestHandler):
    def handle(self):
        self.wfile.write(sys.argv[2].encode())
        if sys.argv[3] == "keeps":
            self.rfile.read()
with socketserver.ThreadingUnixStreamServer(sys.argv[1], Handler) as server:
    print(flush=True)
    server.serve_forever()
"""


@contextlib.contextmanager
def foreign_server(path: str, answer: str = "OK:x", end: str = "keeps") -> Iterator[None]:
    with started(path, answer, end, program=[sys.executable, "-c", FOREIGN_SERVER]) as process:
        next_line(process)
        yield


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("nothing", "no server at"),
        ("dead socket", "no server at"),
        ("file", "not a socket"),
        ("stopped server", "stopped"),
        ("full server", "too many clients"),
        ("OK:x keeps", "no status to be had from the server"),
        ("{ keeps", "no status to be had from the server"),
        ('{"a":1} closes', "no status to be had from the server"),
        ('{"databases closes', "no status to be had from the server"),
    ],
)
def test_status_fails_in_one_line_that_says_why_there_is_no_status(
    kind: str, reason: str, folder: Path, path: str
) -> None:
    with contextlib.ExitStack() as stack:
        if kind == "dead socket":
            stack.enter_context(socket.socket(socket.AF_UNIX)).bind(path)
        elif kind == "file":
            Path(path).touch()
        elif kind.endswith("server"):
            limited = ("sh", "-c", 'ulimit -n 40; exec "$@"', "sh", *PGMANAGER)
            server = stack.enter_context(served(path, "--count", "1", program=limited))
            if kind == "stopped server":
                server.send_signal(signal.SIGSTOP)
            else:
                stack.enter_context(connected(path, 40))
        elif kind != "nothing":
            stack.enter_context(foreign_server(path, *kind.split()))
        done = run("status", "-s", "s", cwd=folder)
        assert (done.returncode, done.stdout, is_one_line(done.stderr)) == (125, "", True)
        assert reason in done.stderr
        assert path in done.stderr  # absolute


@needs_postgres
def test_status_without_a_socket_shows_every_server_of_the_user(folder: Path, path: str) -> None:
    """If a server serves at the default path, status shows only that one."""
    (folder / "elsewhere").mkdir()
    with served(path, "--count", "1", prefix="served"), contextlib.ExitStack() as stack:
        for words in (["--prefix", "first"], ["--prefix", "second"], ["--ephemeral"]):
            command = ("wrap", *words, "--count", "1", "sh", "-c", STAYING)
            wrap = started(*command, stdin=subprocess.PIPE, cwd=folder)
            next_line(stack.enter_context(wrap))
        text = run("status", cwd=folder / "elsewhere").stdout
        documents = json.loads(run("status", "--json", cwd=folder / "elsewhere").stdout)
        names = [document["databases"][0]["name"] for document in documents]
        for found in (text.split(), names):
            assert {*found} >= {"served0", "first0", "second0", "test_0"}
        document = json.loads(run("status", "--json", cwd=folder).stdout)
        assert document["databases"][0]["name"] == "first0"


# ------------------------------------------------------------------------------------- Sharing

# A command that prints its socket, waits for a line, and fails if PGMANAGER_SOCKET differs.
STAYING = 'echo "$PGM_SOCKET"; read x; test "$PGM_SOCKET" = "$PGMANAGER_SOCKET"'
# A command that prints the name of a leased database.
ASKING = shlex.join([*PGMANAGER, "exec", "--timeout", "20", "sh", "-c", 'echo "$PGDATABASE"'])


def test_wrap_uses_the_pool_of_a_running_serve_and_names_the_options_that_it_ignores(
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
        assert server.poll() is None
        assert observe(path)["leases"] == 2


@pytest.mark.parametrize(
    ("options", "prefix", "count", "unused"),
    [
        ("--prefix inner", "inner", 4, "--prefix, PGM_DATABASE_COUNT"),
        ("", "inner", 3, "PGM_DATABASE_PREFIX"),
        ("", "inner", 4, "PGM_DATABASE_PREFIX, PGM_DATABASE_COUNT"),
        ("", "outer", 3, ""),
    ],
)
def test_wrap_inside_wrap_uses_the_outer_pool_and_names_the_settings_that_it_ignores(
    folder: Path, options: str, prefix: str, count: int, unused: str
) -> None:
    inner = f"PGM_DATABASE_PREFIX={prefix} PGM_DATABASE_COUNT={count} {shlex.join(PGMANAGER)}"
    inner += f" wrap {options} sh -c {shlex.quote(f'{ASKING}; {STAYING}')}"
    words = ("wrap", "--prefix", "outer", "--count", "3", "sh", "-c", inner)
    done = run(*words, cwd=folder, input="\n")
    assert done.stdout == f"outer0\n{folder}/tmp/pgmanager.sock\n"
    assert done.returncode == 0
    assert is_one_line(done.stderr) == bool(unused)
    if unused:
        assert f"not used: {unused}; " in done.stderr
        assert "for a second pool give -s" in done.stderr
    assert os.listdir(folder) == []


def test_wraps_that_start_and_end_at_the_same_time_all_run(folder: Path) -> None:
    command = f'test -S "$PGM_SOCKET" && {ASKING}'
    loop = 'for n in 1 2 3 4 5 6; do "$@" || exit; done'
    words = ("-c", loop, "sh", *PGMANAGER, "wrap", "--prefix", "db", "--count", "2")
    with contextlib.ExitStack() as stack:
        loops = [
            stack.enter_context(started(*words, "sh", "-c", command, program=["sh"], cwd=folder))
            for _ in range(6)
        ]
        for process in loops:
            output, errors = process.communicate(timeout=DEADLINE * 3)
            assert (process.returncode, errors) == (0, "")
            assert re.fullmatch("(db[01]\n){6}", output)
    assert os.listdir(folder) == []


@pytest.mark.parametrize("way", ["-s", "PGM_SOCKET", "PGMANAGER_SOCKET", "default"])
@pytest.mark.parametrize(
    ("kind", "error"),
    [("file", "is not a socket"), ("folder", "is not a socket"), ("server", "in use")],
)
def test_wrap_fails_if_something_else_than_pgmanager_is_at_its_socket(
    folder: Path, kind: str, error: str, way: str
) -> None:
    path = folder / "tmp" / "pgmanager.sock"
    path.parent.mkdir()
    if kind == "file":
        path.touch()
    elif kind == "folder":
        path.mkdir()
    with foreign_server(str(path)) if kind == "server" else contextlib.nullcontext():
        env = {**os.environ, way: str(path)} if way.startswith("PGM") else None
        words = ("-s", str(path)) if way == "-s" else ()
        done = run("wrap", *words, "--prefix", "db", "echo", "ran", cwd=folder, env=env)
        assert (done.returncode, done.stdout, is_one_line(done.stderr)) == (125, "", True)
        assert f"{path}" in done.stderr
        assert error in done.stderr
        assert path.exists()


def test_wrap_beside_another_wrap_uses_a_private_socket_unless_s_names_the_socket(
    folder: Path,
) -> None:
    """The two share the databases."""
    words = ("wrap", "--prefix", "db", "--count", "1", "sh", "-c", f"{STAYING}; {ASKING}")
    options: dict[str, Any] = {"cwd": folder, "stdin": subprocess.PIPE}
    with started(*words, **options) as first:
        first_path = next_line(first)
        with started(*words, **options) as second, connect(first_path) as holder:
            assert name_of(holder) == "db0"
            path = next_line(second)
            assert path.startswith(f"/tmp/pgmanager-{os.geteuid()}/")
            done = run("wrap", "-s", first_path, "--prefix", "other", "echo", "ran")
            assert (done.returncode, done.stdout, is_one_line(done.stderr)) == (125, "", True)
            assert f"socket is in use: {first_path}" in done.stderr
            with connect(path) as waiter:
                assert silent(waiter)
                holder.close()
                assert name_of(waiter) == "db0"
            assert second.communicate("\n", timeout=DEADLINE) == ("db0\n", "")
        assert not os.path.exists(path)
        assert first.communicate("\n", timeout=DEADLINE) == ("db0\n", "")
    assert os.listdir(folder) == []


@needs_postgres
def test_wrap_ephemeral_shares_no_pool_no_socket_and_no_lock(folder: Path) -> None:
    inner = [*PGMANAGER, "wrap", "--ephemeral", "--prefix", "db", "--count", "1", "sh", "-c"]
    words = ("wrap", "--prefix", "db", "--count", "1", *inner, f"{STAYING}; {ASKING}")
    env = {**os.environ, "PGPORT": "5432"}
    with started(*words, cwd=folder, stdin=subprocess.PIPE, env=env) as process:
        assert next_line(process).startswith(f"/tmp/pgmanager-{os.geteuid()}/wrap-")
        outer = f"{folder}/tmp/pgmanager.sock"
        done = run("wrap", "--ephemeral", "-s", outer, "echo", "ran")
        assert (done.returncode, done.stdout) == (125, "")
        assert f"socket is in use: {outer}" in done.stderr
        with connect(outer) as holder:
            assert name_of(holder) == "db0"
            output, errors = process.communicate("\n", timeout=DEADLINE)
        assert (process.returncode, output) == (0, "db0\n"), errors
    assert os.listdir(folder) == []


# --------------------------------------------------------------------- Processes and commands

# A COMMAND that receives a signal twice, and then waits for a line. It exits with 6 if the signal
# has come once more. (Python would run a handler only after readline() has returned.)
RECEIVE_TWICE = """
import signal, sys
number = int(sys.argv[1])
signal.pthread_sigmask(signal.SIG_BLOCK, {number})
signal.alarm(30)  # a signal that does not come must fail the test
for line in ("ready", "once", "twice"):
    print(line, flush=True)
    if line != "twice":
        signal.sigwait({number})
sys.stdin.readline()
sys.exit(5 + (number in signal.sigpending()))
"""
# Prints what a process can see of how it was started.
SHOW_PROCESS = """
grep -E '^(Sig(Ign|Blk)|NS(pgid|sid)):' /proc/self/status
ulimit -a; umask; pwd; env | grep -v '^PG\\|^PWD\\|^_='
cd /proc/$$/fd; for n in *; do echo $n $(readlink $n); done | grep ' /'
"""
NO_LEASE = "pgmanager: no lease was taken: "  # wrap's warning


def quick_python(code: str, *words: str) -> list[str]:
    """Return the command that runs a piece of Python without site-packages."""
    return [sys.executable, "-I", "-S", "-c", code, *words]


@contextlib.contextmanager
def in_terminal(*words: str, **options: Any) -> Iterator[tuple[Any, Callable[[bytes], Any]]]:
    """Run a program in the foreground of a new terminal; yield it and a function that types."""
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
    try:
        yield process, lambda keys: os.write(ours, keys)
    finally:
        os.close(ours)  # sends SIGHUP to the rest of the session
        process.kill()
        process.communicate()


def running_once(name: str, path: str) -> list[str]:
    """Return the words that make a subcommand run COMMAND once."""
    return {
        "wrap": ["wrap", "-s", f"{path}-wrap", "--prefix", "wrapped", "--"],
        "wrap-each": ["wrap-each", "--prefix", "db", "--count", "1", "--"],
        "exec": ["exec", "-s", path, "--"],
    }[name]


@pytest.mark.parametrize(
    ("command", "status", "error"),
    [
        ("true", 0, ""),
        ("sh -c 'exit 7'", 7, ""),
        ("sh -c 'kill -KILL $$'", -signal.SIGKILL, ""),
        ("sh -c 'ulimit -c 0; kill -QUIT $$'", -signal.SIGQUIT, ""),
        ("no-such-program", 127, "no-such-program"),
        ("'echo hi there'", 127, "put sh -c before it"),
        ("./file", 126, "make it executable"),
        ("./script", 126, "with a line #!"),
        ("/", 126, "'/'"),
        ("", 2, "nothing to run"),
    ],
)
@pytest.mark.parametrize("name", ["wrap", "wrap-each", "exec"])
@pytest.mark.usefixtures("server")
def test_the_exit_status_is_that_of_command_or_the_one_that_a_shell_would_give(
    folder: Path, path: str, name: str, command: str, status: int, error: str
) -> None:
    (folder / "file").touch()
    (folder / "script").write_text("echo a shell would run this\n")
    (folder / "script").chmod(0o755)
    # Core files are allowed: wrap dies of COMMAND's signal, and must not write one itself.
    shell = ["sh", "-c", 'ulimit -c "$(ulimit -Hc)"; exec "$@"', "sh", *PGMANAGER]
    words = [*shell, *running_once(name, path), *shlex.split(command)]
    done = subprocess.run(words, cwd=folder, stderr=subprocess.PIPE, text=True, timeout=DEADLINE)
    assert done.returncode == (128 - status if name == "wrap-each" and status < 0 else status)
    assert (NO_LEASE in done.stderr) == (name == "wrap" and not error)
    assert error in done.stderr
    assert is_one_line(done.stderr) or not error
    assert sorted(os.listdir(folder)) == ["file", "s", "script"]


@linux
@pytest.mark.parametrize("caller", ["", "trap '' HUP INT QUIT TERM USR1; ulimit -n 200;"])
@pytest.mark.parametrize("name", ["wrap", "wrap-each", "exec"])
@pytest.mark.usefixtures("server")
def test_command_starts_in_the_same_state_as_without_pgmanager(
    folder: Path, path: str, name: str, caller: str, monkeypatch: Patch
) -> None:
    """Compare descriptors, signals, limits, environment, process group and session."""
    monkeypatch.setenv("LC_ALL", "C.UTF-8")  # otherwise Python sets LC_CTYPE (PEP 538)

    def show_process(*prefix: str) -> list[str]:
        words = ["sh", "-c", f'{caller} "$@"; exit', "sh", *prefix, "sh", "-c", SHOW_PROCESS]
        with open(folder / "seen", "w") as output:
            files: dict[str, Any] = {"stdin": file, "stdout": output, "stderr": output}
            subprocess.run(words, **files, pass_fds=[91, 93], timeout=DEADLINE)
        lines = (folder / "seen").read_text().splitlines()
        # COMMAND also has a descriptor of the name's lock.
        added = (NO_LEASE, "/tmp/pgmanager-")
        return [line for line in lines if not any(text in line for text in added)]

    (folder / "file").touch()
    with open(folder / "file") as file:
        for number in (91, 93):  # make's job server also passes descriptors
            os.dup2(file.fileno(), number)
        directly = show_process()
        through_pgmanager = show_process(*PGMANAGER, *running_once(name, path))
        os.closerange(91, 94)
    assert through_pgmanager == directly
    assert f"93 {folder}/file" in directly


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGINT", "SIGQUIT"])
def test_wrap_forwards_signals_sent_by_kill(path: str, name: str) -> None:
    number = signal.Signals[name]
    words = [*running_once("wrap", path), *quick_python(RECEIVE_TWICE, str(int(number)))]
    with started(*words, stdin=subprocess.PIPE, start_new_session=True) as process:
        for line in ("ready", "once"):
            assert next_line(process) == line
            process.send_signal(number)
        assert next_line(process) == "twice"
        process.communicate("\n", timeout=DEADLINE)
        assert process.returncode == 5
    assert not os.path.exists(f"{path}-wrap")


def test_wrap_waits_for_a_command_that_it_may_not_signal(user: User) -> None:
    options, _, _ = user
    first = "signals = pgmanager.Signals(); signals.receivers.add(os.getppid())"
    first += "; os.kill(os.getpid(), 15); assert signals.get_next() == 15; sys.exit(7)"
    options["env"] = {**os.environ, "FIRST": first}
    with started(**options) as process:
        assert process.wait(DEADLINE) == 7


@pytest.mark.parametrize(("key", "number"), [(b"\x03", signal.SIGINT), (b"\x1c", signal.SIGQUIT)])
def test_wrap_does_not_forward_signals_that_the_terminal_sends_to_command(
    path: str, key: bytes, number: int
) -> None:
    words = [*running_once("wrap", path), *quick_python(RECEIVE_TWICE, str(int(number)))]
    with in_terminal(*PGMANAGER, *words) as (process, type_in):
        for line in ("ready", "once"):
            assert next_line(process) == line
            type_in(key)
        assert next_line(process) == "twice"
        type_in(b"\n")
        assert process.wait(DEADLINE) == 5


@pytest.mark.parametrize(("name", "status"), [("wrap", -2), ("wrap-each", 130)])
def test_ctrl_c_ends_a_command_that_does_not_handle_it(
    folder: Path, path: str, name: str, status: int
) -> None:
    command = ["-s", path, "--prefix", "db", "--", "sh", "-c", "echo $$; exec sleep 60"]
    with in_terminal(*PGMANAGER, name, *command) as (process, type_in):
        assert next_line(process).isdigit()
        type_in(b"\x03")
        output, errors = process.communicate(timeout=DEADLINE)
        assert (process.returncode, output) == (status, "")  # no command for a second database
        assert "Traceback" not in errors
    assert os.listdir(folder) == []


@linux
@pytest.mark.skipif(not shutil.which("bash"), reason="no bash")
def test_a_command_that_stops_itself_returns_to_the_prompt_and_continues_with_fg(path: str) -> None:
    command = ["sh", "-c", "kill -STOP $$; echo on"]
    wrap = shlex.join([*PGMANAGER, *running_once("wrap", path), *command])
    shell = ("bash", "--norc", "--noprofile", "-i")
    with in_terminal(*shell, stderr=subprocess.STDOUT) as (bash, type_in):
        type_in(f"{wrap}; echo stopped $?\n".encode())
        while (line := next_line(bash)) and "stopped 1" not in line:
            pass
        assert f"stopped {128 + signal.SIGSTOP}" in line
        type_in(b"fg > /dev/null; echo ended $?; exit\n")
        rest = bash.communicate(timeout=DEADLINE)[0].splitlines()
        assert any(line.endswith("ended 0") for line in rest), rest
        assert "on" in rest


def test_wrap_names_the_leases_that_are_still_held_after_command_has_ended(path: str) -> None:
    job = shlex.join([*PGMANAGER, "exec", "sh", "-c", "echo >ready; exec cat"])
    script = f"exec 3<&0; mkfifo ready; {job} <&3 >/dev/null 2>&1 & read x <ready"
    words = [*running_once("wrap", path), "sh", "-c", script]
    with started(*words, stdin=subprocess.PIPE, cwd=os.path.dirname(path)) as process:
        assert process.stderr is not None
        assert re.search("still leased.*: wrapped0\n$", process.stderr.readline())
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


@pytest.mark.parametrize("option", ["-i", "--ignore-exit-code"])
def test_wrap_each_ignores_failures_if_told_to_and_still_names_them(option: str) -> None:
    words = ("--prefix", "db", "--count", "3", option, "--", "sh", "-c", "exit $((PGM_SHARD + 3))")
    done = run("wrap-each", *words)
    assert done.returncode == 0
    failures = [f"pgmanager: failed: db{n}: exit status {n + 3}" for n in range(3)]
    assert done.stderr.splitlines() == failures


def test_wrap_each_runs_jobs_at_once_and_starts_no_command_after_a_failure(folder: Path) -> None:
    words = ("wrap-each", "--prefix", "db", "--count", "5", "-vj", "3", "sh", "-c", GATED)
    with gates(folder, 5), started(*words, cwd=folder) as process:
        wait_until(lambda: len(at_work(folder)) == 3, "three commands")
        assert process.stderr
        for shard, status in ((2, 0), (1, 5), (3, 7), (0, 0)):
            open_gate(folder / f"db{shard}", status)
            assert process.stderr.readline() == f"pgmanager: db{shard}: exit status {status}\n"
        assert process.wait(DEADLINE) == 5
        failed = "pgmanager: failed: db1: exit status 5\npgmanager: failed: db3: exit status 7\n"
        assert process.stderr.read() == failed
    assert (len(at_work(folder)), max(at_work(folder))) == (4, 3)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_wrap_each_forwards_signals_to_all_commands_and_stops(folder: Path, number: int) -> None:
    job = ': > "$PGDATABASE"; exec sleep 60'
    words = ("wrap-each", "--prefix", "db", "-i", "-j", "2", "sh", "-c", job)
    with started(*words, cwd=folder, start_new_session=True) as process:
        wait_until(lambda: len(os.listdir(folder)) == 2, "two commands")
        process.send_signal(number)
        _, errors = process.communicate(timeout=DEADLINE)
        assert process.returncode == -number
    for shard in (0, 1):
        assert f"failed: db{shard}: exit status {128 + number}\n" in errors
    assert len(os.listdir(folder)) == 2


# exec


def test_exec_becomes_command_and_a_child_of_command_keeps_the_lease(
    server: Process, folder: Path, path: str
) -> None:
    """No redirection in a shell script ends the lease either: these have only one digit."""
    redirect = f'for n in 3 4 5 6 7 8 9; do eval "exec $n<{folder}/fifo"; done'
    show = "echo $$ $PGDATABASE $(cd /proc/$$/fd && readlink 10 11)"
    script = f"{redirect}; {show}; cat <&3 >/dev/null 2>&1 & read x; exit 7"
    os.mkfifo(folder / "fifo")
    gate = os.open(folder / "fifo", os.O_RDWR)
    with started("exec", "-s", path, "sh", "-c", script, stdin=subprocess.PIPE) as process:
        pid, name, *descriptors = next_line(process).split()
        assert (int(pid), name) == (process.pid, "db0")
        if sys.platform == "linux":
            # The kernel closes the highest number first: the lock, then the connection.
            connection, lock = descriptors
            assert (connection[:7], lock) == ("socket:", lock_file("db0"))
        assert states(path) == ["leased", "free"]
        process.communicate("\n", timeout=DEADLINE)
        assert process.returncode == 7
    with connected(path, 2) as (first, second):
        assert name_of(first) == "db1"
        assert silent(second)
        os.close(gate)  # ends cat
        assert name_of(second) == "db0"


def test_ctrl_c_ends_an_exec_that_waits_without_a_message(path: str) -> None:
    with served(path, "--count", "1"), connect(path) as holder:
        assert name_of(holder) == "db0"
        with in_terminal(*PGMANAGER, "exec", "-s", path, "--", "echo", "ran") as (process, type_in):
            wait_for_waiters(path, 1)
            type_in(b"\x03")
            assert process.communicate(timeout=DEADLINE) == ("", "")
            assert process.returncode == -signal.SIGINT
        wait_for_waiters(path, 0)


# ------------------------------------------------------------------------------------ Parser

ODD_WORDS = ["-v", "--prefix", "--", "-s", "wrap", "-x", "--socket=x", "--help", "-h", "--count"]
ODD_WORDS += ["", " ", "\n", "$HOME", "*", "'", '"', "\\", "é", "\udcff"]


@pytest.mark.parametrize(
    "words",
    [
        "wrap -s PATH --prefix db COMMAND",
        "-s PATH wrap --prefix=db -- COMMAND",
        "--socket=PATH -v wrap --count=2 --prefix db -- COMMAND",
        "-vs PATH wrap --prefix db COMMAND",
        "wrap --prefix db -vsPATH COMMAND",
        "-s PATH wrap --prefix wrap -- COMMAND",
        "wrap --prefix db -s PATH -- PGMANAGER exec -v COMMAND",
        "wrap --prefix db -s PATH PGMANAGER -v exec --timeout=9 -- COMMAND",
        "wrap --prefix db -s PATH PGMANAGER wrap-each -i -xj 2 --prefix db --count 1 -v COMMAND",
        "wrap --prefix db -s PATH PGMANAGER wrap-each --prefix db --count=1 --xargs -- COMMAND",
    ],
)
def test_command_receives_every_word_after_its_name_unchanged(path: str, words: str) -> None:
    code = "import os, sys; print(os.path.samefile(os.environ['PGM_SOCKET'], sys.argv[1]))"
    command = quick_python(f"{code}; print(ascii(sys.argv[2:]))", path, *ODD_WORDS)
    ours = words.replace("PGMANAGER", shlex.join(PGMANAGER)).replace("PATH", path)
    done = run(*shlex.split(ours)[:-1], *command)
    expected = [*ODD_WORDS, *["db0"] * ("-x" in words)]
    assert done.stdout == f"True\n{expected!a}\n", done.stderr


@pytest.mark.parametrize("words", ["", "serve", "wrap", "wrap-each", "exec", "status"])
def test_every_subcommand_has_help_and_pgmanager_alone_prints_its_help(words: str) -> None:
    done = run(*words.split(), "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"usage: pgmanager {words}".rstrip())
    assert "--socket PATH" in done.stdout
    again = run(*words.split(), "-h") if words else run()
    assert again.stdout == done.stdout


@pytest.mark.parametrize(
    ("words", "status", "named"),
    [
        ("nonsense", 2, "nonsense"),
        ("nonsense exec", 2, "wrap-each"),
        ("wrap --prefix a --count 3 --count=4 -- true", 2, "option given twice: --count; "),
        ("serve extra", 2, "extra; see 'pgmanager serve --help'"),
        ("exec --prefix db true", 2, "--prefix; see 'pgmanager exec --help'"),
        ("wrap --pref db -- true", 2, "--pref"),
        ("wrap -- true", 2, "no prefix"),
        ("wrap --prefix db --depends x -- true", 2, "--depends without --init"),
        ("serve --prefix db --rebuild", 2, "--rebuild without --init"),
        ("wrap --prefix db --server-options x -- true", 2, "--ephemeral"),
        ("wrap --ephemeral --prefix= --init ./none -- true", 2, "no prefix"),
        ("wrap --ephemeral --server-options=-c' -- true", 2, "server options"),
        ("wrap-each --prefix db -j0 true", 2, "jobs: '0'"),
        ("exec --timeout soon -- true", 2, "soon"),
        ("exec -- true", 125, "FOLDER/tmp/pgmanager.sock"),
        ("serve --prefix db -s .", 125, "FOLDER is not a socket"),
    ],
)
def test_an_error_is_one_line_and_nothing_is_started(
    folder: Path, words: str, status: int, named: str
) -> None:
    done = run(*words.split(), cwd=folder)
    assert (done.stdout, done.returncode) == ("", status)
    assert is_one_line(done.stderr), done.stderr
    assert named.replace("FOLDER", str(folder)) in done.stderr
    assert os.listdir(folder) == []
    assert not glob.glob(f"{socket_lock_file(str(folder))}*")


@pytest.mark.parametrize(
    "words",
    [
        "-s a serve --socket b",
        "serve --prefix a --prefix a",
        "serve --count=2 --count 3",
        "serve --template a --template b",
        "wrap --prepare a --prepare b -- true",
        "wrap --ephemeral --server-options= --server-options= true",
        "wrap-each -j1 --jobs 1 true",
        "exec --timeout 1 --timeout 2 true",
    ],
)
def test_an_option_with_one_value_is_refused_when_it_is_given_twice(words: str) -> None:
    with pytest.raises(pgmanager.UsageError, match=r"^option given twice: -[-a-z]+; give it once$"):
        pgmanager.parse_arguments(words.split())


def test_flags_and_depends_may_be_given_twice_and_so_may_options_of_the_command() -> None:
    words = "-vv wrap --rebuild --rebuild --depends a --depends b run -s a -s b"
    args = pgmanager.parse_arguments(words.split())
    assert (args.verbose, args.rebuild, args.depends) == (True, True, ["a", "b"])
    assert args.words == ["run", "-s", "a", "-s", "b"]


def test_exec_loads_no_module_that_it_can_do_without(path: str, monkeypatch: Patch) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgresql://u%40:p@h/x?sslmode=allow")
    python = [sys.executable, "-SX", "importtime", str(MODULE)]
    with served(path):
        done = run_program(*python, "exec", "-s", path, "true")
    loaded = set(re.findall(r"(?m)\| +([\w.]+)$", done.stderr))
    assert {"argparse", "socket"} <= loaded
    assert not loaded & {"bz2", "glob", "json", "queue", "shutil", "subprocess", "urllib.parse"}


@pytest.mark.parametrize("way", ["module", "file", "function"])
def test_pgmanager_works_as_a_module_as_a_copied_file_and_as_a_function(
    folder: Path, path: str, way: str
) -> None:
    shutil.copy(MODULE, folder)
    program = {
        "module": [sys.executable, "-W", "error", "-m", "pgmanager"],
        "file": [sys.executable, "-W", "error", "-I", str(folder / MODULE.name)],
        "function": [sys.executable, "-c", "import sys, pgmanager; sys.exit(pgmanager.main())"],
    }[way]
    inner = [*program, "exec", "-v", "--", "sh", "-c", "echo $PGDATABASE; exit 7"]
    words = [*program, "-s", path, "wrap", "--prefix", "db", *inner]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=DEADLINE)
    assert (done.stdout, done.stderr) == ("db0\n", "pgmanager: db0 is leased\n")
    assert done.returncode == 7


OLD_PYTHONS = glob.glob(
    os.path.expanduser(f"{os.environ.get('PYENV_ROOT', '~/.pyenv')}/versions/3.8.*/bin/python3")
)


@pytest.mark.parametrize(
    ("python", "change", "problem"),
    [
        (sys.executable, "del socket.AF_UNIX", "no UNIX sockets"),
        (sys.executable, "sys.version_info = 3, 8", "this Python is too old: 3.8"),
        *((python, "", "this Python is too old: 3.8") for python in OLD_PYTHONS),
    ],
)
def test_a_python_that_is_too_old_or_has_no_unix_sockets_is_an_error_in_one_line(
    python: str, change: str, problem: str
) -> None:
    code = f"import runpy, socket, sys; {change}\nrunpy.run_path(sys.argv[1], None, sys.argv[2])"
    for name, status, error in (("__main__", 125, ""), ("pgmanager", 1, "ImportError: ")):
        words = [python, "-I", "-c", code, str(MODULE), name]
        done = subprocess.run(words, capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (status, "")
        assert done.stderr.splitlines()[-1].startswith(f"{error}pgmanager: {problem}")
        assert is_one_line(done.stderr) == (name == "__main__")


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
TESTS = """
import conftest, contextlib, early, fcntl, os, pytest
from pathlib import Path

assert "PGMANAGER_PYTEST_PLUGINS" not in os.environ

def crash_once(file):
    with contextlib.suppress(FileNotFoundError):  # only one of two workers can remove it
        Path(file).unlink()
        os._exit(1)

if "PYTEST_XDIST_WORKER" in os.environ:
    crash_once("crash-in-collection")

@pytest.mark.parametrize("number", range(8))
def test(number):
    who = os.environ.get("PYTEST_XDIST_WORKER", "main")
    variables = ("PGDATABASE", "DATABASE_URL", "PGHOST", "PYTEST_PLUGINS")
    now = [os.environ.get(name) for name in variables]
    with open("report", "a") as file:
        print(who, early.SEEN, conftest.AT_IMPORT, *now, file=file)
    crash_once("crash-in-test")
    if "GATHER" in os.environ:
        with open(os.environ["GATHER"]) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # fails if the controller has it
"""
URL = "postgres://u@h/old?a=b"
NO_DATABASE = "pgmanager_no_database_in_the_xdist_controller"


def pytest_options(folder: Path, path: str, words: str, **more: str) -> dict[str, Any]:
    """Write the tests; return the arguments with which subprocess runs pytest on them."""
    (folder / "conftest.py").write_text(CONFTEST)
    (folder / "early.py").write_text(EARLY)  # pytest calls the hooks of the last plugin first
    (folder / "test_app.py").write_text(TESTS)
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    env.update(PYTHONPATH=f"{folder}:{MODULE.parent}", PGM_SOCKET=path)
    env.update({"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_PLUGINS": "early", **more})
    plugins = ["-p", "xdist"] * ("no:xdist" not in words)
    command = [sys.executable, "-m", "pytest", *plugins, "-p", "no:cacheprovider", *words.split()]
    return {"args": command, "cwd": folder, "env": env, "stdin": subprocess.DEVNULL}


def run_pytest(folder: Path, path: str, words: str, *before: str, **more: str) -> Any:
    """Run pytest to its end, with words such as ``pgmanager exec`` before it."""
    options = pytest_options(folder, path, words, **more)
    options["args"] = [*before, *options["args"]]
    return subprocess.run(**options, capture_output=True, text=True, timeout=DEADLINE * 3)


def read_report(folder: Path) -> list[list[str]]:
    """Return a row for each test: which process ran it, and the databases that it saw."""
    return [line.split() for line in (folder / "report").read_text().splitlines()]


@pytest.mark.parametrize(
    ("words", "more", "main_sees", "leases"),
    [
        ("-p pgmanager -p no:xdist -p no:capture", {}, "db0", 1),
        ("-p pgmanager -n 0", {"DATABASE_URL": URL}, "db0", 1),
        ("-p pgmanager -n auto --pdb", {}, "db0", 1),
        ("-p pgmanager -n auto", {"DATABASE_URL": URL}, NO_DATABASE, 2),
        ("-p pgmanager -n auto", {"DATABASE_URL": URL, "PGDATABASE": "mine"}, "mine", 2),
        ("-p pgmanager --tx 2*popen --dist each", {}, NO_DATABASE, 2),
        ("-p pgmanager -p no:debugging -n 2", {}, NO_DATABASE, 2),  # then there is no --pdb
        ("-p tools.pgmanager -n 2", {}, NO_DATABASE, 2),  # a vendored copy
        ("-n 2", {"PYTEST_PLUGINS": ""}, NO_DATABASE, 2),  # the plugins are in pytest.ini
        # Below, pytest looks like a controller at first, and then runs the tests itself.
        ("-p pgmanager --tx popen", {"DATABASE_URL": URL}, NO_DATABASE, 1),
        ("-p pgmanager -n auto", {"PYTEST_XDIST_AUTO_NUM_WORKERS": "0"}, NO_DATABASE, 1),
    ],
)
def test_each_process_that_runs_tests_leases_one_database_before_conftests_are_read(
    folder: Path, path: str, words: str, more: dict[str, str], main_sees: str, leases: int
) -> None:
    """The controller of xdist sees no database, unless the caller has set one.

    The workers load the caller's plugins. A pytest that a test starts does not load ours, because
    the test's PYTEST_PLUGINS does not name it.
    """
    if words == "-n 2":
        (folder / "pytest.ini").write_text("[pytest]\naddopts = -p pgmanager -p early\n")
    (folder / "tools").mkdir()
    shutil.copy(MODULE, folder / "tools")
    with served(path, "--count", "3"):
        done = run_pytest(folder, path, words, **{"PYTEST_XDIST_AUTO_NUM_WORKERS": "2", **more})
        assert done.returncode == 0, done.stdout + done.stderr
        assert observe(path)["leases"] == leases
        wait_for_free(path)
    url = more.get("DATABASE_URL", "None")
    main_url = url if main_sees == "mine" else url.replace("old", main_sees)
    assert (folder / "main").read_text() == f"{main_sees} {main_url}"
    names: dict[str, str] = {}
    for process, early, at_import, name, *others in read_report(folder):
        assert early == at_import == (main_sees if process == "main" else name)
        assert name == names.setdefault(process, name)
        host = "h" if "DATABASE_URL" in more else "None"
        plugins = more.get("PYTEST_PLUGINS", "early") or "None"
        assert others == [url.replace("old", name), host, plugins]
    assert ("main" in names) == (leases == 1)
    assert len({*names.values()} & {"db0", "db1", "db2"}) == len(names)


WITHOUT_TESTS = ["--help", "--version", "--markers", "--fixtures", "--fixtures-per-test"]
WITHOUT_TESTS += ["--cache-show", "--collect-only", "--setup-plan"]


@pytest.mark.parametrize("word", WITHOUT_TESTS)
def test_pytest_needs_no_server_where_it_runs_no_test(word: str, folder: Path, path: str) -> None:
    """It does not start one either, if an ini option says how."""
    (folder / "pytest.ini").write_text("[pytest]\npgmanager = --prefix db\n")
    for more in ("", "-n 2"):
        done = run_pytest(folder, path, f"-p pgmanager -p cacheprovider {word} {more}")
        assert done.returncode == 0, done.stdout + done.stderr
        assert "pgmanager: " not in done.stdout + done.stderr
        if word not in ("--help", "--version"):
            assert (folder / "main").read_text() == f"{NO_DATABASE} None"


@pytest.mark.parametrize(
    ("crash", "result"),
    [("crash-in-test", "1 failed, 7 passed"), ("crash-in-collection", "8 passed")],
)
def test_a_worker_that_crashes_passes_its_database_to_its_replacement(
    crash: str, result: str, folder: Path, path: str
) -> None:
    """The tests also fail if the controller still holds the lock for starting workers."""
    (folder / crash).touch()
    with served(path, "--count", "2"):
        done = run_pytest(folder, path, "-p pgmanager -n 2", GATHER=lock_file("db0.gather"))
        assert "replacing crashed worker" in done.stdout, done.stdout + done.stderr
        assert result in done.stdout
        assert observe(path)["leases"] == 3
    report = read_report(folder)
    assert len(report) == 8
    assert {row[3] for row in report} <= {"db0", "db1"}


@contextlib.contextmanager
def other_holders(path: str, number: int) -> Iterator[list[Process]]:
    """Lease names to other processes. Leases of this process would count as the controller's."""
    with contextlib.ExitStack() as stack:
        words = ("exec", "-s", path, "--", "sh", "-c", 'echo "$PGDATABASE"; exec sleep 60')
        processes = [stack.enter_context(started(*words)) for _ in range(number)]
        assert all(next_line(process) for process in processes)
        yield processes


@pytest.mark.parametrize("why", ["held", "broken", "stopped"])
def test_a_worker_that_gets_no_database_ends_the_run_with_a_short_error(
    why: str, folder: Path, path: str
) -> None:
    words = ("--prepare", "echo oops >&2; false") if why == "broken" else ()
    error = "no database came"
    with served(path, "--count", "3", *words) as process, contextlib.ExitStack() as stack:
        if why == "held":
            stack.enter_context(other_holders(path, 2))
        elif why == "stopped":
            process.send_signal(signal.SIGSTOP)
        else:
            error = "no database can be leased: cannot prepare db"
            wait_until(lambda: set(states(path)) == {"broken"}, "the end of all preparations")
        done = run_pytest(folder, path, "-p pgmanager -n 2", PGM_TIMEOUT="1")
        process.send_signal(signal.SIGCONT)
    output = done.stdout + done.stderr
    assert done.returncode in (1, 2), output
    assert output.count("\n") <= 30, output
    assert re.search(f"^pgmanager: {error}", output, re.MULTILINE), output
    if why == "held":
        assert {row[3] for row in read_report(folder)} <= {"db2"}
    else:
        assert not (folder / "report").exists()


def test_only_one_pytest_run_at_a_time_starts_its_workers(folder: Path, path: str) -> None:
    folders = [folder / name for name in ("first", "second", "third")]
    for each in folders:
        each.mkdir()
    with served(path, "--count", "2"), contextlib.ExitStack() as stack:
        holders = stack.enter_context(other_holders(path, 2))
        processes = []
        for each in folders[:2]:
            options = pytest_options(each, path, "-p pgmanager -n 2")
            processes.append(stack.enter_context(started(program=options.pop("args"), **options)))
            wait_for_waiters(path, 2)
        done = run_pytest(folders[2], path, "-p pgmanager -n 2", PGM_TIMEOUT="0.5")
        assert done.returncode == 4
        assert "s for another pytest run to start its workers" in done.stderr
        assert processes[1].stderr
        assert not silent(processes[1].stderr, DEADLINE)
        line = processes[1].stderr.readline()
        assert line.startswith("pgmanager: waiting for another pytest run to start its workers: ")
        assert line.endswith("/db0.gather\n")
        wait_for_waiters(path, 2)  # the workers of the first run
        for holder in holders:
            holder.kill()
        for process in processes:
            output = "".join(process.communicate(timeout=DEADLINE * 2))
            assert process.returncode == 0, output
        assert observe(path)["leases"] == 6
        assert not is_locked(lock_file("db0.gather"))


@pytest.mark.parametrize(
    ("words", "more", "error"),
    [
        ("-n 0", {}, "no server at the socket: PATH; "),
        ("-n 2", {}, "no server at the socket: PATH; "),
        ("-n 0", {"DATABASE_URL": "mysql://h/x"}, "cannot read DATABASE_URL: "),
        ("-n 2", {"PGSERVICE": "mine"}, "PGSERVICE is set, "),
        ("-n 3", {}, "too few databases: 2 for 3 workers; give pgmanager --count 3"),
        ("exec -n 2", {}, "too few databases: 1 for 2 workers; give pgmanager --count 3"),
    ],
)
def test_pytest_stops_with_one_line_if_it_cannot_get_its_databases(
    folder: Path, path: str, words: str, more: dict[str, str], error: str
) -> None:
    before = [*PGMANAGER, "exec", "--"] * words.startswith("exec")
    words = f"-p pgmanager {words.replace('exec', '')}"
    with contextlib.nullcontext() if "PATH" in error else served(path, "--count", "2"):
        done = run_pytest(folder, path, words, *before, **more)
    output = done.stdout + done.stderr
    assert done.returncode == 4, output
    (line,) = (line for line in output.splitlines() if "pgmanager: " in line)
    assert line.startswith(f"ERROR: pgmanager: {error.replace('PATH', path)}")
    assert "Traceback" not in output
    assert not (folder / "report").exists()


FORKING_CONTROLLER = """
import contextlib, os, pytest, signal, stat
@pytest.hookimpl(trylast=True)
def pytest_xdist_setupnodes():
    if not (child := os.fork()):
        for number in map(int, os.listdir("/dev/fd")):
            with contextlib.suppress(OSError):
                if stat.S_ISFIFO(os.fstat(number).st_mode):
                    os.close(number)  # or our caller would wait for the end of the output
        signal.pause()
    with open("child", "w") as file:
        print(child, file=file)
"""


def test_a_child_that_the_controller_forks_keeps_no_other_run_waiting(
    folder: Path, path: str
) -> None:
    (folder / "forking.py").write_text(FORKING_CONTROLLER)
    with served(path, "--count", "2"):
        done = run_pytest(folder, path, "-p pgmanager -p forking -n 2")
        child = int((folder / "child").read_text())
        try:
            assert done.returncode == 0, done.stdout + done.stderr
            assert not is_locked(lock_file("db0.gather"))
        finally:
            os.kill(child, signal.SIGKILL)


# Tests that take a name while the only one, or both, are taken by the same process.
TAKING = """
import asyncio, pgmanager
def test_sync():
    held = [pgmanager.acquire() for _ in range(2)]
def test_sync_with_capfd(capfd):
    test_sync()
async def acquire_twice():
    async with pgmanager.acquire_async(), pgmanager.acquire_async():
        pass
def test_async():
    asyncio.run(acquire_twice())
"""


@pytest.mark.parametrize(
    "words",
    [
        "-k test_sync",
        "-k test_async",
        "-k capfd",
        "-s",
        "-p no:capture",
        "-n 1",
        "-p pgmanager",  # the plugin has the name
        "-p pgmanager -n 1",
    ],
)
def test_a_test_that_waits_for_itself_says_so_though_pytest_captures_its_output(
    words: str, folder: Path, path: str
) -> None:
    options = pytest_options(folder, path, f"{words} taking.py")
    (folder / "conftest.py").unlink()
    (folder / "taking.py").write_text(TAKING)
    program = options.pop("args")
    with served(path, "--count", "1"), started(program=program, **options) as process:
        assert process.stderr
        assert not silent(process.stderr, DEADLINE)
        line = process.stderr.readline()
        assert line.startswith(WAITING), line
        assert "; every process that has one waits for another itself: raise --count" in line


# Plain pytest: the ini option starts the pool.

PLAIN = """
import os, sys
def test():
    with open(os.environ["REPORT"], "a") as file:
        wraps = os.environ.get("PGMANAGER_WRAPS_PYTEST")
        print(os.environ["PGDATABASE"], wraps, os.environ.get("PGM_SOCKET"), os.getcwd(), file=file)
    if "ASK" in os.environ:
        print("asked:", sys.stdin.readline())
    assert "FAIL" not in os.environ
def test_more():
    test()
"""
# As editors do it.
SCRIPT = """
import sys, pytest
class Plugin:
    def pytest_sessionfinish(self, exitstatus):
        print("status", int(exitstatus))
sys.exit(pytest.main(sys.argv[1:], plugins=[Plugin()]))
"""
MAIN = "import pytest, sys; sys.exit(pytest.main(['-p', 'pgmanager', 'test_plain.py']))"


@pytest.fixture
def plain(folder: Path, monkeypatch: Patch) -> Callable[..., Any]:
    """Write a project whose ini file has our option; return a function that runs a program in it.

    It takes the words, what is typed, the folder to be in, and variables. It returns what the
    program did, and the rows of the tests' report.
    """
    for name in [name for name in os.environ if name.startswith("PYTEST_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.setenv("PYTHONPATH", str(MODULE.parent))
    monkeypatch.setenv("REPORT", str(folder / "report"))
    ini = (
        "[pytest]\naddopts = -p pgmanager -p no:cacheprovider\npgmanager = --prefix db --count 2\n"
    )
    files = {"pytest.ini": ini, "test_plain.py": PLAIN, "script.py": SCRIPT, "sub/empty": ""}
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    (folder / "tools").mkdir()
    shutil.copy(MODULE, folder / "tools")

    def run_plain(words: list[str], typed: str = "", where: str = "", **more: str) -> Any:
        options: dict[str, Any] = {"cwd": folder / where, "env": {**os.environ, **more}}
        options.update(capture_output=True, text=True, timeout=DEADLINE * 4, input=typed)
        (folder / "report").unlink(missing_ok=True)
        done = subprocess.run(words, **options)
        rows = []
        with contextlib.suppress(FileNotFoundError):
            rows = [line.split() for line in (folder / "report").read_text().splitlines()]
        return done, rows

    return run_plain


PYTEST = [sys.executable, "-m", "pytest"]


@pytest.mark.parametrize(
    ("words", "names", "status"),
    [
        (PYTEST, {"db0"}, 1),
        ([*PYTEST, "-p", "xdist", "-n", "2"], {"db0", "db1"}, 0),
        ([*PYTEST, "-p", "no:pgmanager", "-p", "tools.pgmanager"], {"db0"}, 0),  # a vendored copy
        ([*PYTEST, "-p", "no:capture"], {"db0"}, 0),
        ([str(Path(sys.executable).with_name("pytest"))], {"db0"}, 0),
        ([sys.executable, "script.py"], {"db0"}, 0),
        ([sys.executable, "-Wignore", "script.py", "-p", "xdist", "-n", "2"], {"db0", "db1"}, 1),
    ],
)
def test_plain_pytest_runs_under_a_wrap_with_the_options_of_its_ini_file(
    words: list[str], names: set[str], status: int, plain: Any, folder: Path
) -> None:
    done, rows = plain(words, **({"FAIL": "1"} if status else {}))
    assert done.returncode == status, done.stdout + done.stderr
    assert {row[0] for row in rows} <= names
    assert [row[1:3] for row in rows] == [["1", str(folder / "tmp/pgmanager.sock")]] * 2
    assert done.stderr == ""
    assert done.stdout.count("test session starts") == 1
    assert (f"status {status}" in done.stdout) == ("script.py" in words)
    assert not (folder / "tmp").exists()


@needs_postgres
def test_plain_pytest_with_a_throw_away_server_needs_no_short_path(
    plain: Any, folder: Path
) -> None:
    deep = folder / ("x" * LIMIT)
    deep.mkdir()
    (deep / "pytest.ini").write_text("[pytest]\naddopts = -p pgmanager\npgmanager = --ephemeral\n")
    shutil.copy(folder / "test_plain.py", deep)
    done, rows = plain(PYTEST, where=deep.name)
    assert done.returncode == 0, done.stdout + done.stderr
    assert rows[0][0] == "test_0"


def test_plain_pytest_has_the_streams_and_the_folder_of_its_caller(
    plain: Any, folder: Path
) -> None:
    done, rows = plain([*PYTEST, "-s", "../test_plain.py"], "yes\nno\n", "sub", ASK="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.findall("asked: (.*)", done.stdout) == ["yes", "no"]
    # The options of wrap are those of the ini file's folder.
    assert [row[2:] for row in rows] == [[str(folder / "tmp/pgmanager.sock"), f"{folder}/sub"]] * 2


def test_ctrl_c_ends_plain_pytest_as_it_ends_pytest(
    plain: Any, folder: Path, monkeypatch: Patch
) -> None:
    monkeypatch.setenv("ASK", "1")
    with in_terminal(*PYTEST, "-s", cwd=folder) as (process, write):
        wait_until(lambda: (folder / "report").exists(), "the first test")
        write(b"\x03")
        stdout, stderr = process.communicate(timeout=DEADLINE)
    assert (process.returncode, stderr) == (2, "")
    assert "KeyboardInterrupt" in stdout
    assert not (folder / "tmp").exists()


def test_plain_pytest_uses_the_pool_of_a_serve_or_of_the_wrap_around_it(
    plain: Any, folder: Path
) -> None:
    socket = str(folder / "tmp/pgmanager.sock")
    wrap, become = [*PGMANAGER, "wrap", "--prefix", "outer", "--"], [*PGMANAGER, "exec", "--"]
    with served(socket, prefix="served"):
        for before, name in ((become, "served1"), ([], "served2")):
            done, rows = plain([*before, *PYTEST])
            assert done.returncode == 0, done.stdout + done.stderr
            assert [row[:2] for row in rows] == [[name, "None"]] * 2
    for before, name in ((wrap, "outer0"), ([*wrap, *become], "outer1")):
        done, rows = plain([*before, *PYTEST])
        assert done.returncode == 0, done.stdout + done.stderr
        assert [row[:2] for row in rows] == [[name, "None"]] * 2
    # The pool of another wrap ends when that ends, so a private one is started.
    words = ("wrap", "--prefix", "other", "sleep", "60")
    with started(*words, cwd=folder) as other:
        wait_until(lambda: os.path.exists(socket), "the other wrap")
        done, rows = plain(PYTEST)
        assert done.returncode == 0, done.stdout + done.stderr
        assert [row[:2] for row in rows] == [["db0", "1"]] * 2
        assert rows[0][2] != socket
        other.terminate()
        other.wait(DEADLINE)


@pytest.mark.parametrize(
    ("words", "typed", "more", "error"),
    [
        ([*PYTEST, "-o", "pgmanager=--nosuch"], "", {}, "unknown option: --nosuch; see "),
        ([*PYTEST, "-o", "pgmanager=exec --prefix x"], "", {}, "not an option: exec"),
        ([*PYTEST, "-o", "pgmanager="], "", {}, "no server at the socket: "),
        # A variable keeps it from starting itself again and again.
        (PYTEST, "", {"PGMANAGER_WRAPS_PYTEST": "1"}, "no server at the socket: "),
        # A program from stdin cannot be started again, and a notebook would lose its variables.
        ([sys.executable, "-"], MAIN, {}, "no server at the socket: "),
        ([sys.executable, "-i"], f"import sys; sys.argv = ['x']\n{MAIN}", {}, "no server at the "),
    ],
)
def test_plain_pytest_stops_with_one_line_if_it_cannot_start_a_pool(
    words: list[str], typed: str, more: dict[str, str], error: str, plain: Any
) -> None:
    done, rows = plain(words, typed, **more)
    assert done.returncode == 4, done.stdout + done.stderr
    (line,) = (line for line in done.stderr.splitlines() if "pgmanager" in line)
    assert line.startswith("ERROR: pgmanager: ")
    assert error in line
    assert not rows


def test_a_worker_never_becomes_a_wrap(plain: Any) -> None:
    done, rows = plain(PYTEST, PGMANAGER_PYTEST_PLUGINS="")  # as its controller sets it
    assert done.returncode in (1, 2)
    assert "pgmanager: no server at the socket: " in done.stdout
    assert not rows


DJANGO_TEST = """
import os, pytest
@pytest.mark.django_db
@pytest.mark.parametrize("number", range(8))
def test(number):
    from django.db import connection
    with connection.cursor() as cursor:
        cursor.execute("select current_database()")
        print("used", *cursor.fetchone())
"""
DJANGO_FIXTURE = """
import pytest
@pytest.fixture(scope="session")
def django_db_modify_db_settings_parallel_suffix():
    pass
"""


@needs_postgres
@pytest.mark.parametrize(
    ("name", "conftest", "used", "is_told"),
    [
        ("os.environ['PGDATABASE']", "", r"db\d_gw\d", True),
        ("os.environ['PGDATABASE']", DJANGO_FIXTURE, r"db\d", False),
        ("None", "", r"test_db\d_gw\d", False),  # Django makes a database, as README shows
    ],
)
def test_pytest_says_if_pytest_django_has_used_another_database_than_the_leased_one(
    name: str, conftest: str, used: str, is_told: bool, workplace: Words, folder: Path
) -> None:
    settings = f"""
import os
DATABASES = {{"default": {{"ENGINE": "django.db.backends.postgresql", "TEST": {{"NAME": {name}}}}}}}
DATABASES["default"]["NAME"] = os.environ["PGDATABASE"]
DATABASES["more"] = {{**DATABASES["default"], "TEST": {{"NAME": {name} and {name} + "_more"}}}}
"""
    files = {"settings.py": settings, "conftest.py": conftest, "test_django.py": DJANGO_TEST}
    for file, text in files.items():
        (folder / file).write_text(text)
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    env.update(PYTHONPATH=f"{folder}:{MODULE.parent}", DJANGO_SETTINGS_MODULE="settings")
    env["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    plugins = "-p pgmanager -p xdist -p pytest_django.plugin -p no:cacheprovider"
    words = [*PYTEST, *plugins.split(), "-n", "2", "--reuse-db", "-rP"]
    done = run(*workplace(*words), env=env, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    databases = re.findall("^used (.*)", done.stdout, re.M)
    assert len(databases) == 8
    assert all(re.fullmatch(used, each) for each in databases), databases
    lines = [line for line in done.stderr.splitlines() if "pytest-django" in line]
    assert len(lines) == is_told
    for line in lines:
        assert re.match(r"pgmanager: pytest-django used (db\d)_gw0 and not \1, which was ", line)
        assert "django_db_modify_db_settings_parallel_suffix in conftest.py" in line


# ------------------------------------------------------------------ The throw-away PostgreSQL

Words = Callable[..., list[str]]


@pytest.fixture
def workplace(folder: Path, path: str) -> Iterator[Words]:
    """Use the test's folder for temporary files, and check that nothing is left there at the end.

    Provides a function that returns the words for wrap.
    """
    folder.chmod(0o1777)  # if we are root, another user makes and removes PostgreSQL's folder

    def words(*more: str, prefix: str = "db") -> list[str]:
        return ["wrap", "--ephemeral", "-s", path, "--prefix", prefix, "--count", "2", *more]

    before = unused_shared_memory()
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("TMPDIR", str(folder))
        environment.chdir(folder)
        yield words
    wait_until(lambda: not processes_in(folder), f"the end of {processes_in(folder)}")
    wait_until(lambda: not postgres_folders(folder), "the removal of PostgreSQL's folder")
    wait_until(lambda: not unused_shared_memory() - before, "the end of shared memory")
    assert not os.path.exists(path)


def unused_shared_memory() -> set[str]:
    """Return the segments of PostgreSQL that no server uses any more, whoever started it."""
    files, used = glob.glob("/dev/shm/PostgreSQL.*"), ""
    for maps in glob.glob("/proc/[0-9]*/maps") if files else ():
        with contextlib.suppress(OSError):  # the process has ended, or is another user's
            used += Path(maps).read_text(errors="replace")
    return {file for file in files if file not in used}


def postgres_folders(folder: Path) -> list[str]:
    return glob.glob(str(folder / "pgmanager-postgres-*"))


def processes_in(folder: Path) -> dict[int, str]:
    """Return the other processes whose command line or working directory names a folder."""
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


def run_program(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, capture_output=True, text=True, timeout=DEADLINE, **options)


def copy_module(folder: Path, changes: dict[str, str]) -> list[str]:
    """Write a copy of pgmanager.py with some texts replaced; return the command that runs it."""
    text = MODULE.read_text()
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    (folder / "copy.py").write_text(text)
    return [sys.executable, str(folder / "copy.py")]


@contextlib.contextmanager
def busy_backend(url: str) -> Iterator[None]:
    """Keep a backend busy with a query that never ends."""
    with contextlib.closing(psycopg.connect(url)) as connection:
        connection.pgconn.send_query(b"DO $$ BEGIN RAISE NOTICE 'begun'; LOOP END LOOP; END $$")
        assert not silent(connection, DEADLINE)  # the notice has come
        yield


SHOW_URL = ["sh", "-c", 'echo "$DATABASE_URL"; read x; exit 7']


@needs_postgres
def test_wrap_ephemeral_gives_command_a_private_server_with_fresh_databases(
    workplace: Words,
) -> None:
    others = ("PGHOST", "PGHOSTADDR", "PGPORT", "PGSERVICE", "PGOPTIONS", "PGCLIENTENCODING")
    env = {**os.environ, **dict.fromkeys(others, "other"), "DATABASE_URL": "postgis+x://u@h/db"}
    init = 'psql -qXc "CREATE TABLE seed AS SELECT 42 AS answer"'
    lease = [*PGMANAGER, "exec", "psql", "-XAtc", "SELECT current_database(), answer FROM seed"]
    script = 'echo "$DATABASE_URL"; echo "$PGHOST"; echo "${PATH##*:}"; "$@"; "$@"; read x; exit 7'
    words = workplace("--init", init, "--", "sh", "-c", script, "sh", *lease, prefix=ODD)
    with started(*words, stdin=subprocess.PIPE, env=env) as process:
        url, host, programs = (next_line(process) for _ in range(3))
        assert url.startswith(f"postgis+x:///postgres?host={PLACE.replace('/', '%2F')}%2Fpgm-")
        assert all(os.path.exists(f"{programs}/{name}") for name in ("postgres", "psql"))
        assert {next_line(process) for _ in range(2)} == {f"{ODD}{n}|42" for n in range(2)}
        assert os.stat(f"{host}/data").st_uid != 0
        assert oct(os.stat(host).st_mode & 0o777) == "0o700"
        with psycopg.connect(url.replace("postgis+x", "postgresql")) as database:
            assert database.execute("SELECT current_database()").fetchone() == ("postgres",)
        output, errors = process.communicate("\n", timeout=DEADLINE)
        assert (output, process.returncode) == ("", 7)
        assert is_one_line(errors)
        assert f"pgmanager: template {ODD}template_once_" in errors


@needs_postgres
def test_server_options_win_over_the_variable_and_our_settings(workplace: Words) -> None:
    options = "-c wal_level=logical -c 'search_path=a, b'"
    command = ["psql", "-XAtd", "db0", "-c", "SHOW wal_level", "-c", "SHOW search_path"]
    env = {**os.environ, "PGM_SERVER_OPTIONS": "-c no_such=1"}
    done = run(*workplace("--server-options", options, "--", *command), env=env)
    assert (done.returncode, done.stdout) == (0, "logical\na, b\n"), done.stderr


@pytest.mark.parametrize(
    "options",
    [
        *(
            "-c port=1",
            "-cPort=1",
            "--port=1",
            "-p 1",
            "-p1",
            "-c listen_addresses=*",
            "-h x",
            "-i",
        ),
        *("--listen-addresses=*", "-c unix_socket_directories=/x", "-k /x", "-c hba_file=/x"),
        *("-c data_directory=/x", "-D /x", "-c work_mem=1MB -c port=1"),
    ],
)
def test_server_options_that_say_where_the_server_is_are_refused(options: str) -> None:
    done = run("wrap", "--ephemeral", f"--server-options={options}", "--", "echo", "ran")
    assert is_refused(done, "bad server options: ", "pgmanager chooses that")


@needs_postgres
def test_tests_of_row_security_run_as_the_role_that_command_sets(
    workplace: Words, folder: Path, own: list[str]
) -> None:
    """Each prefix has a cluster of its own, because roles belong to the whole cluster."""
    (folder / "roles.sql").write_text("CREATE ROLE app LOGIN;")
    (folder / "schema.sql").write_text(
        """CREATE TABLE made AS SELECT unnest('{app,other}'::text[]) AS owner;
        ALTER TABLE made ENABLE ROW LEVEL SECURITY; GRANT SELECT ON made TO app;
        CREATE POLICY own ON made USING (owner = current_user);"""
    )
    query = "-XAtc 'SELECT current_user, count(*) FROM made'"
    clients = f'psql {query} && psql "$DATABASE_URL" {query}'
    lease = [*own, "exec", "--", "sh", "-c", clients]
    options = ("--init", "roles.sql", "--init", "schema.sql", "--")
    for prefix, verb, env, expected in (
        ("db", "made", [], "postgres|2"),
        ("db", "found", ["env", "PGUSER=app"], "app|1"),
        ("other", "made", ["env", "PGUSER=app"], "app|1"),
        ("other", "found", [], "postgres|2"),
    ):
        done = run_program(*own, *workplace(*options, *env, *lease, prefix=prefix))
        assert done.stdout == f"{expected}\n" * 2, done.stderr
        assert get_template(done.stderr)[0] == verb


@needs_postgres
def test_on_a_throw_away_server_a_database_that_a_holder_made_again_is_dropped(
    workplace: Words,
) -> None:
    lease = shlex.join([*PGMANAGER, "exec", "--"])
    again = """sh -c 'dropdb "$PGDATABASE"; createdb "$PGDATABASE"'"""
    script = f'{lease} {again}; {lease} {again}; {lease} "$@"; {lease} "$@"'  # of two names
    words = workplace("--init", CREATE, "--", "sh", "-ec", script, "sh", "psql", "-XAtc", TABLES)
    assert run(*words).stdout == "made\nmade\n"


@needs_postgres
@pytest.mark.parametrize(
    ("variable", "value", "reason"),
    [
        ("TMPDIR", "relative", "TMPDIR is 'relative'"),
        ("TMPDIR", "/" + "long/" * 20, "TMPDIR is '/long/"),
        ("TMPDIR", "/dev/null", "TMPDIR is '/dev/null'"),
        ("PGM_SERVER_OPTIONS", "-c no_such=1", 'FATAL:  unrecognized configuration parameter "no_'),
    ],
)
def test_wrap_reports_in_one_line_why_it_cannot_start_postgres(
    workplace: Words, variable: str, value: str, reason: str
) -> None:
    done = run(*workplace("--", "echo", "ran"), env={**os.environ, variable: value})
    assert (done.stdout, done.returncode, is_one_line(done.stderr)) == ("", 125, True)
    assert reason in done.stderr


def test_wrap_ephemeral_names_the_programs_that_are_missing(
    workplace: Words, tmp_path: Path
) -> None:
    # An empty PATH does not hide the folders that packages of the system install in.
    code = "import glob, runpy, sys; glob.glob = lambda pattern: []; del sys.argv[0];"
    code += "runpy.run_path(sys.argv[0], None, '__main__')"
    words = quick_python(code, str(MODULE), *workplace("--", "/bin/echo", "ran"))
    done = run_program(*words, env={**os.environ, "PATH": str(tmp_path)})
    assert (done.stdout, done.returncode, is_one_line(done.stderr)) == ("", 125, True)
    assert "initdb, postgres, psql; install" in done.stderr


@needs_postgres
@pytest.mark.parametrize(
    ("init", "output"),
    [
        ("echo $PGDATABASE $DATABASE_URL; exit 3", r"(dbtemplate_once_\w+) postgresql:///\1\?.*\n"),
        ("x.sql", ".*division by zero\n"),
    ],
)
def test_wrap_shows_the_output_of_a_failing_init_and_does_not_run_command(
    workplace: Words, folder: Path, init: str, output: str
) -> None:
    (folder / "x.sql").write_text("select 1/0;\n\\! touch went-on\n")
    done = run(*workplace("--init", init, "--", "echo", "ran"))
    assert (done.stdout, done.returncode) == ("", 125)
    error = re.escape(f"pgmanager: --init failed: {init}: exit status 3")
    assert re.match(output + error, done.stderr)
    assert not (folder / "went-on").exists()


@needs_postgres
@pytest.mark.parametrize(
    ("shell", "number"),
    [
        ("sh", signal.SIGTERM),
        *((shell, signal.SIGKILL) for shell in ("sh", "dash", "bash", "busybox")),
    ],
)
def test_no_postgres_outlives_wrap_even_if_it_is_busy_or_stopped(
    workplace: Words, folder: Path, path: str, shell: str, number: int
) -> None:
    """The watchdog runs in each shell that may be a system's /bin/sh."""
    found = shutil.which(shell) or pytest.skip(f"no {shell}")
    if shell != "sh" and os.path.samefile(found, "/bin/sh"):
        pytest.skip("this is /bin/sh")
    (folder / "sh").symlink_to(found)
    program = copy_module(folder, {'"/bin/sh"': f'"{folder}/sh"'})
    wrap = started(*workplace("--", *SHOW_URL), program=program, stdin=subprocess.PIPE)
    with wrap as process, busy_backend(next_line(process)):
        (place,) = postgres_folders(folder)
        if number == signal.SIGKILL:
            pid = Path(place, "data", "postmaster.pid").read_text().split()[0]
            os.kill(int(pid), signal.SIGSTOP)
        process.send_signal(number)
        assert process.wait(DEADLINE) == -number
        assert number == signal.SIGKILL or not postgres_folders(folder)
    Path(path).unlink(missing_ok=True)  # SIGKILL leaves it, until the next start removes it


@needs_postgres
@pytest.mark.parametrize("stage", ["data/PG_VERSION", ".s.PGSQL.*", "../began"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_wrap_killed_during_its_start_leaves_nothing(
    workplace: Words, folder: Path, path: str, stage: str, number: int
) -> None:
    """The signal goes to the process group, as a terminal sends it."""
    words = workplace("--init", "touch began; exec sleep 60", "echo", "ran")
    with started(*words, start_new_session=True) as process:
        wait_until(lambda: glob.glob(f"{folder}/pgmanager-postgres-*/{stage}"), stage)
        os.killpg(process.pid, number)
        assert process.communicate(timeout=DEADLINE) == ("", "")
        assert process.returncode == -number
        assert number == signal.SIGKILL or not postgres_folders(folder)
    Path(path).unlink(missing_ok=True)  # SIGKILL leaves it, until the next start removes it


@needs_postgres
def test_wrap_removes_no_folder_that_it_has_not_made(workplace: Words, folder: Path) -> None:
    own = folder / "pgmanager-postgres-of-mine"
    own.mkdir()
    done = run(*workplace("--", "echo", "ran"))
    assert done.stdout == "ran\n", done.stderr
    own.rmdir()


@needs_postgres
def test_a_server_whose_socket_another_domain_has_replaced_does_not_run_command(
    workplace: Words, folder: Path, path: str
) -> None:
    os.mkfifo(folder / "gate")
    with started(*workplace("--init", "touch began; read x <gate", "echo", "ran")) as process:
        wait_until((folder / "began").exists, "the init")
        os.unlink(path)  # another domain has other locks, so it takes the socket for a dead one
        with socket.socket(socket.AF_UNIX) as other:
            other.bind(path)
            other.listen()
            (folder / "gate").write_text("go\n")
            stdout, stderr = process.communicate(timeout=DEADLINE)
            assert (process.returncode, stdout) == (125, "")
            assert f"pgmanager: socket is in use: {path}; " in stderr
            os.unlink(path)  # it is still there


@needs_postgres
def test_a_server_whose_socket_was_removed_during_its_start_says_so(
    workplace: Words, path: str
) -> None:
    done = run(*workplace("--init", f"rm {path}", "echo", "ran"))
    error = f"pgmanager: the socket was removed during the start: {path}; start again\n"
    assert (done.returncode, done.stdout) == (125, "")
    assert done.stderr.endswith(error)


@needs_postgres
def test_ctrl_c_ends_the_making_of_many_empty_databases(workplace: Words, folder: Path) -> None:
    databases = f"{folder}/pgmanager-postgres-*/data/base/*"
    words = workplace("echo", "ran")
    words[words.index("--count") + 1] = "100"
    with started(*words) as process:
        wait_until(lambda: len(glob.glob(databases)) > 10, "the first databases")
        process.send_signal(signal.SIGINT)
        most = 0
        while process.poll() is None:
            most = max(most, len(glob.glob(databases)))
        assert (process.communicate()[0], process.returncode) == ("", -signal.SIGINT)
    assert most < 90


@needs_postgres
@linux
def test_the_next_start_removes_what_a_killed_watchdog_left(workplace: Words, folder: Path) -> None:
    with started(*workplace("--", *SHOW_URL), stdin=subprocess.PIPE) as process:
        url = next_line(process)
        (left,) = postgres_folders(folder)
        found = processes_in(folder).items()
        (watchdog,) = (pid for pid, command in found if "while read" in command)
        os.kill(watchdog, signal.SIGKILL)  # first, or it would notice the end of wrap
        process.kill()
        process.wait()
        psycopg.connect(url).close()  # PostgreSQL is still alive
        postgres = int(Path(left, "data", "postmaster.pid").read_text().split()[0])
        done = run(*workplace("--", "sh", "-c", 'ls -d "$TMPDIR"/pgmanager-postgres-*'))
        assert done.returncode == 0
        assert len(done.stdout.splitlines()) == 1
        assert left not in done.stdout
        os.kill(postgres, signal.SIGQUIT)  # it would end by itself within a minute


@needs_postgres
def test_ctrl_c_leaves_postgres_to_a_command_that_handles_it(workplace: Words) -> None:
    script = """trap 'psql -XAtd postgres -c "SELECT 42"; exit 7' INT; echo; read x"""
    with in_terminal(*PGMANAGER, *workplace("--", "sh", "-c", script)) as (process, type_in):
        next_line(process)
        type_in(b"\x03")
        answers, _ = process.communicate(timeout=DEADLINE)
        assert set(answers.split()) == {"42"}
        assert process.returncode == 7


@pytest.fixture
def own(folder: Path) -> list[str]:
    """Provide the command for a copy of the module that saves its clusters in the test's folder.

    At most three are kept for a user, so tests would remove each other's.
    """
    folder.chmod(0o1777)
    for name in "ab":
        (folder / f"{name}.sql").write_text(f"CREATE TABLE {name} ();")
    return copy_module(folder, {"/tmp/pgmanager-": f"{folder}/kept-"})


def saved_clusters(folder: Path) -> list[str]:
    """Return the files of saved clusters; the one without a template comes last."""
    return sorted(glob.glob(f"{folder}/kept-*/cluster-*"))


@needs_postgres
def test_two_first_starts_at_once_both_run_and_save_one_cluster(
    own: list[str], folder: Path
) -> None:
    ask = ("psql", "-XAtd", "db0", "-c", "SELECT system_identifier FROM pg_control_system()")
    words = ("wrap", "--ephemeral", "--prefix", "db", "--count", "1", *ask)
    with started(*words, program=own) as one, started(*words, program=own) as other:
        identifiers = []
        for process in (one, other):
            output, errors = process.communicate(timeout=DEADLINE)
            assert process.returncode == 0, errors
            identifiers.append(output)
    assert run_program(*own, *words).stdout in identifiers
    (cluster,) = saved_clusters(folder)
    assert os.stat(os.path.dirname(cluster)).st_mode & 0o777 == 0o700


@needs_postgres
def test_wrap_makes_damaged_saved_clusters_again(
    workplace: Words, folder: Path, own: list[str]
) -> None:
    def run_wrap() -> str:
        return run_program(*own, *workplace("--init", "a.sql", "--", "true")).stderr

    assert " was made" in run_wrap()
    assert " was found" in run_wrap()
    clusters = saved_clusters(folder)
    assert len(clusters) == 2
    unfinished = Path(f"{clusters[0]}.{2**22 + 1}")  # no process has that number: proc(5), pid_max
    growing = Path(f"{clusters[0]}.{os.getpid()}")
    unfinished.touch()
    growing.touch()
    for cluster in clusters:
        os.truncate(cluster, 2**20)
    assert " was made" in run_wrap()
    assert (unfinished.exists(), growing.exists()) == (False, True)
    (folder / "data").mkdir()
    for cluster in clusters:
        with tarfile.open(cluster, "w") as tar:
            tar.add(folder / "data", "data")
    for _ in clusters:  # each start removes one
        assert "PostgreSQL did not start" in run_wrap()
    assert " was made" in run_wrap()
    assert " was found" in run_wrap()


@needs_postgres
def test_wrap_keeps_empty_clusters_apart_from_the_eight_templates_used_last(
    workplace: Words, folder: Path, own: list[str]
) -> None:
    def run_with(init: str, verb: str, *more: str) -> None:
        done = run_program(*own, *workplace("--init", f"{init}.sql", *more, "--", "true"))
        assert f" was {verb}" in done.stderr, (init, more, done.stderr)

    options = ("--server-options", "-c work_mem=1MB")
    run_with("a", "made")
    run_with("b", "made")
    run_with("a", "made", *options)
    run_with("a", "made", "--locale", "POSIX")
    run_with("a", "found")
    run_with("b", "found")
    clusters = saved_clusters(folder)
    assert len(clusters) == 6  # four with a template, and an empty one of each locale
    # Make it look as if there were more, used earlier and later.
    used = next(file for file in clusters if file.count("-") > clusters[0].count("cluster-") + 2)
    for number in range(8):
        copied = shutil.copy(used, f"{used[:-12]}{number:08x}.tar")
        os.utime(copied, (number, number) if number < 4 else None)
    run_with("b", "found")
    assert len(saved_clusters(folder)) == 8 + 2


@needs_postgres
def test_wrap_keeps_the_templates_that_fit_into_the_limit_together(
    workplace: Words, folder: Path, own: list[str]
) -> None:
    def run_with(program: list[str], init: str) -> list[str]:
        assert run_program(*program, *workplace("--init", init, "--", "true")).returncode == 0
        return saved_clusters(folder)

    run_with(own, "a.sql")
    clusters = run_with(own, "b.sql")
    size = sum(os.stat(file).st_size for file in clusters[:-1])
    for limit, number in ((size, 3), (size - 1, 2)):
        changes = {
            "/tmp/pgmanager-": f"{folder}/kept-",
            "BYTES = 1_000_000_000": f"BYTES = {limit}",
        }
        assert len(run_with(copy_module(folder, changes), "b.sql")) == number


@needs_postgres
@pytest.mark.parametrize("limit", ["MAX_KILOBYTES = 500_000", "MAX_PACKED_BYTES = 1_000_000_000"])
def test_wrap_keeps_no_clusters_that_are_too_large(
    workplace: Words, folder: Path, own: list[str], limit: str
) -> None:
    small = {limit: f"{limit.split()[0]} = 1_000"}
    limited = copy_module(folder, {"/tmp/pgmanager-": f"{folder}/kept-", **small})
    for init in ("a", "b"):
        words = workplace("--init", f"{init}.sql", "--", "true")
        assert run_program(*limited, *words).returncode == 0
    assert len(saved_clusters(folder)) == (0 if "KILO" in limit else 2)


def stop_packing(folder: Path) -> dict[str, str]:
    """Return the environment in which packing makes the file "packing" and waits at a gate."""
    tar = folder / "bin" / "tar"
    tar.parent.mkdir()
    os.mkfifo(folder / "gate")
    pause = f"case $2 in *cluster-*-*) touch {folder}/packing; read x <{folder}/gate;; esac"
    tar.write_text(f'#!/bin/sh\n{pause}\nexec {shutil.which("tar")} "$@"\n')
    tar.chmod(0o755)
    return {**os.environ, "PATH": f"{tar.parent}:{os.environ['PATH']}"}


@needs_postgres
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_wrap_killed_while_it_saves_a_cluster_leaves_a_whole_one(
    workplace: Words, folder: Path, own: list[str], number: int
) -> None:
    words = workplace("--init", "a.sql", "--", "true")
    gate = stop_packing(folder)
    with started(*words, program=own, env=gate, start_new_session=True) as process:
        wait_until((folder / "packing").exists, "the packing")
        os.killpg(process.pid, number)
        open_gate(folder / "gate")
        process.communicate(timeout=DEADLINE)
        assert process.returncode == -number
    wait_until(lambda: not processes_in(folder), "the end of all processes")
    assert " was found" in run_program(*own, *words).stderr
    assert len(saved_clusters(folder)) == 2


@needs_postgres
@linux
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk")
def test_a_full_disk_is_an_error_and_saved_clusters_stay(
    workplace: Words, folder: Path, own: list[str]
) -> None:
    words = [*own, *workplace("--init", "a.sql", "--", "echo", "ran")]
    assert run_program(*words).returncode == 0
    sizes = {file: os.stat(file).st_size for file in saved_clusters(folder)}
    (folder / "disk").mkdir()
    mount = 'mount -t tmpfs -o size=$0,mode=1777 none disk && TMPDIR=$PWD/disk exec "$@"'
    for size in (2**20, 2**24, max(sizes.values()) - 2**22):
        done = run_program("unshare", "-m", "sh", "-c", mount, str(size), *words)
        if "mount" in done.stderr or "unshare" in done.stderr:
            pytest.skip("no mounts here")
        assert (done.stdout, done.returncode) == ("", 125)
        assert "No space left on device" in done.stderr
        assert {file: os.stat(file).st_size for file in saved_clusters(folder)} == sizes


@needs_postgres
def test_saved_clusters_have_the_time_zone_utc_whatever_the_zone_of_the_first_caller(
    workplace: Words, own: list[str]
) -> None:
    show = "SELECT current_setting('timezone'), current_setting('log_timezone')"
    words = [*own, *workplace("--init", "a.sql", "--", *own, "exec", "--", "psql", "-XAtc", show)]
    for zone, verb in (("Asia/Tokyo", "made"), ("America/Lima", "found")):
        done = run_program(*words, env={**os.environ, "TZ": zone})
        assert (done.stdout, get_template(done.stderr)[0]) == ("UTC|UTC\n", verb), done.stderr


@needs_postgres
def test_the_locale_is_c_or_the_one_given_and_belongs_to_what_is_saved(
    workplace: Words, folder: Path, own: list[str]
) -> None:
    query = "SELECT 'É' ILIKE 'é', datcollate FROM pg_database WHERE datname = current_database()"
    lease = ["--init", "a.sql", "--", *own, "exec", "--", "psql", "-XAtc", query]
    for options, variables, verb, expected in (
        ([], {}, "made", "f|C"),
        (["--locale", "C.UTF-8"], {}, "made", "t|C.UTF-8"),
        ([], {"PGM_LOCALE": "C.UTF-8", "LC_ALL": "C"}, "found", "t|C.UTF-8"),
        (["--locale", "C"], {"PGM_LOCALE": "C.UTF-8"}, "found", "f|C"),
    ):
        words = [*own, *workplace(*options, *lease)]
        done = run_program(*words, env={**os.environ, **variables})
        if "invalid locale name" in done.stderr:
            pytest.skip("this system has no C.UTF-8")
        assert done.stdout == f"{expected}\n", done.stderr
        assert get_template(done.stderr)[0] == verb
    done = run_program(*own, *workplace("--locale", "no_such", "--", "echo", "ran"))
    assert (done.stdout, done.returncode, is_one_line(done.stderr)) == ("", 125, True)
    assert 'invalid locale name "no_such"' in done.stderr
    # A new libc may sort text in another order, so it gets clusters of its own.
    changes = {"/tmp/pgmanager-": f"{folder}/kept-", "'CS_GNU_LIBC_VERSION'": "'CS_PATH'"}
    other = copy_module(folder, changes)
    assert get_template(run_program(*other, *workplace(*lease)).stderr)[0] == "made"


@needs_postgres
def test_a_cluster_whose_init_made_a_tablespace_is_not_saved(
    workplace: Words, folder: Path, own: list[str]
) -> None:
    text = (
        "SET allow_in_place_tablespaces = on; CREATE TABLESPACE t LOCATION ''; CREATE TABLE a ();"
    )
    (folder / "t.sql").write_text(text)
    for _ in range(2):
        done = run_program(*own, *workplace("--init", "t.sql", "--", "echo", "ran"))
        if "unrecognized configuration parameter" in done.stderr:
            pytest.skip("PostgreSQL has no tablespaces in its own folder before 15")
        assert done.stdout == "ran\n", done.stderr
        assert get_template(done.stderr)[0] == "made"
        assert "the template is not kept, because --init made a tablespace" in done.stderr
    assert len(saved_clusters(folder)) == 1  # the empty one


@needs_postgres
@pytest.mark.skipif(os.geteuid() != 0, reason="only root has PostgreSQL run by another user")
def test_wrap_saves_no_cluster_in_a_folder_of_another_user(
    workplace: Words, folder: Path, own: list[str]
) -> None:
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            (folder / f"kept-{pwd.getpwnam(name).pw_uid}").mkdir()
    done = run_program(*own, *workplace("--", "echo", "ran"))
    assert (done.stdout, done.returncode) == ("ran\n", 0)
    assert saved_clusters(folder) == []


@needs_postgres
@pytest.mark.parametrize("fsync", ["on", "off"])
def test_a_server_of_the_users_own_copies_files_if_it_has_no_fsync(
    workplace: Words, fsync: str
) -> None:
    """From PostgreSQL 15 on, a copy that is not of files writes every page into the WAL."""
    wal = """psql -XAtc "SELECT pg_current_wal_insert_lsn() - '0/0'" """
    copy = [*PGMANAGER, "wrap", "-s", "inner", "--prefix", "own", "--template", "template1"]
    lease = [*PGMANAGER, "exec", "-s", "inner", "true"]
    script = f"{wal}; {shlex.join([*copy, '--count', '1', '--', *lease])}; {wal}"
    options = ("--server-options", f"-c fsync={fsync} -c wal_level=replica")
    done = run(*workplace(*options, "--", "sh", "-ec", script))
    before, after = map(int, done.stdout.split())
    version = subprocess.check_output([f"{pgmanager.find_programs()}/postgres", "--version"])
    is_by_files = fsync == "off" or int(re.findall(rb"\d+", version)[0]) < 15
    assert (after - before < 1_000_000) == is_by_files


@needs_postgres
def test_a_test_that_ends_all_sessions_of_the_server_breaks_no_database(
    workplace: Words, path: str
) -> None:
    end = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()"
    words = workplace("--init", "true", "--", *SHOW_URL)
    with started(*words, stdin=subprocess.PIPE) as process:
        url = next_line(process)
        for _ in range(2):
            wait_for_free(path)
            with connect(path) as client, psycopg.connect(url) as connection:
                name_of(client)
                connection.execute(f"{end} AND backend_type = 'client backend'")
        wait_for_free(path)
        _, errors = process.communicate("\n", timeout=DEADLINE)
        assert re.findall("pgmanager: ([a-z]+)", errors) == ["warning", "template"], errors


ROLES = "CREATE ROLE app LOGIN; CREATE ROLE own LOGIN PASSWORD 'own'; CREATE ROLE nologin;"
# It writes a line: what the variables say, and where psql gets by them and by the URL.
SEE_TCP = """
ask="psql -wXAtc 'SELECT current_database(), host(inet_server_addr()), inet_server_port()'"
url="$PGUSER:$PGPASSWORD@$PGHOST:$PGPORT $DATABASE_URL"
echo "$url $(eval "$ask") $(eval "$ask" '"$DATABASE_URL"')" >>seen
"""
SEEN = r"(postgres:(\w{32})@127\.0\.0\.1:(\d+)) postgresql://\1/(\w+) (\4\|127\.0\.0\.1\|\3) \5"
# It prints which roles have that password, and which has one of its own.
LOG_IN = """
for user in postgres app own nologin; do psql -wXAtc 'SELECT current_user' -U $user; done
PGPASSWORD=own psql -wXAtc "SELECT 'of its own'" -U own
"""


@needs_postgres
def test_tcp_gives_init_command_and_exec_a_url_with_a_random_password_for_all_roles_without_one(
    workplace: Words, folder: Path, own: list[str]
) -> None:
    (folder / "roles.sql").write_text(ROLES)
    init = ("--init", "roles.sql", "--init", SEE_TCP, "--depends", "roles.sql")
    command = ("sh", "-c", f'{SEE_TCP} "$@"', "sh", *own, "exec", "sh", "-c", SEE_TCP + LOG_IN)
    passwords = set()
    for variable, *options in ("0", "--tcp"), ("1",), ("", "--tcp", "--rebuild"):
        words = [*own, *workplace(*options, *init, "--", *command)]
        done = run_program(*words, env={**os.environ, "PGM_TCP": variable})
        assert (done.returncode, done.stdout) == (0, "postgres\napp\nof its own\n"), done.stderr
        verb, template = get_template(done.stderr)
        assert verb == ("found" if variable == "1" else "made")
        lines = (folder / "seen").read_text().splitlines()
        (folder / "seen").unlink()
        seen = [re.fullmatch(SEEN, line) or pytest.fail(line) for line in lines]
        expected = [f"db{template}", "postgres", "db0"][variable == "1" :]
        assert [match[4].replace("db1", "db0") for match in seen] == expected
        assert len({match[1] for match in seen}) == 1
        passwords.add(seen[0][2])
    assert len(passwords) == 3


@needs_postgres
def test_tcp_lets_nobody_in_without_the_password_and_shows_it_nowhere(
    workplace: Words, path: str
) -> None:
    words = workplace("-v", "--tcp", "--init", "true", "--", *SHOW_URL)
    with started(*words, stdin=subprocess.PIPE) as process:
        url = next_line(process)
        _, _, password, _, port, _ = re.split("[/:@]+", url)
        psycopg.connect(url).close()
        for place, reason in (
            ("postgres@127.0.0.1", "no password supplied"),
            ("postgres:wrong@127.0.0.1", "password authentication failed"),
            (f"postgres:{password}@127.0.0.2", "Connection refused|Can't assign"),
        ):
            with pytest.raises(psycopg.OperationalError, match=reason):
                psycopg.connect(f"postgresql://{place}:{port}/postgres", passfile="/dev/null")
        wait_for_free(path)
        seen = subprocess.check_output(["ps", "-axww", "-o", "command="], text=True)
        assert "psql" in seen  # those that have made the copies
        seen += run("status", "-s", path).stdout + run("status", "--json", "-s", path).stdout
        seen += process.communicate("\n", timeout=DEADLINE)[1]
        assert password not in seen


@needs_postgres
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize(
    ("place", "reason"), [("127.0.0.1", "no password supplied"), ("{}", "Permission denied")]
)
def test_another_user_without_the_password_is_refused_by_tcp_and_by_the_socket(
    workplace: Words, folder: Path, place: str, reason: str
) -> None:
    psql = f"{pgmanager.find_programs()}/psql"
    if not pgmanager.is_open_to_all(psql):
        pytest.skip("only root may run psql")
    with started(*workplace("--tcp", "--", *SHOW_URL), stdin=subprocess.PIPE) as process:
        port = next_line(process).rpartition(":")[2].partition("/")[0]
        (private,) = postgres_folders(folder)
        words = (psql, "-wXh", place.format(private), "-p", port, "-U", "postgres", "postgres")
        done = run_program(*words, env={}, user=54321, group=54321, cwd="/")
        assert (done.returncode, done.stdout) == (2, "")
        assert reason in done.stderr
        process.communicate("\n", timeout=DEADLINE)


@needs_postgres
def test_nobody_else_gets_the_port_of_tcp_while_postgres_is_down_to_be_packed(
    workplace: Words, folder: Path, own: list[str]
) -> None:
    words = workplace("--tcp", "--init", "a.sql", "--", "sh", "-c", 'echo "$PGPORT"; psql -wXc ""')
    with started(*words, program=own, env=stop_packing(folder)) as process:
        wait_until((folder / "packing").exists, "the packing")
        (port,) = {*re.findall(r"-cport=(\d+)", " ".join(processes_in(folder).values()))}
        for address in "127.0.0.1", "":
            with socket.socket() as other, pytest.raises(OSError, match="in use"):
                other.bind((address, int(port)))
        open_gate(folder / "gate")
        output, errors = process.communicate(timeout=DEADLINE)
        assert (process.returncode, output) == (0, f"{port}\n"), errors


# ---------------------------------------------------------------------------------- Messages
#
# What a beginner meets. Each case has its real cause. The line about it says what failed, and what
# to do.

Env = dict[str, str]
NO_SERVER = "no PostgreSQL answers there: start it, or set "
NO_HOST = 'could not translate host name "nosuch.invalid" to address: '


@needs_postgres
@pytest.mark.parametrize(
    ("env", "problem", "cure"),
    [
        ({"PGHOST": "/x"}, '"/x/.s.PGSQL.', f"{NO_SERVER}PGHOST and PGPORT to"),
        ({"PGHOST": "127.0.0.1", "PGPORT": "1"}, "port 1 failed: ", "let wrap --ephemeral start"),
        ({"DATABASE_URL": "postgres://127.0.0.1:1"}, "port 1 failed: ", f"{NO_SERVER}DATABASE_URL"),
        ({"DATABASE_URL": "postgres:///?host=/x"}, '"/x/.s.PGSQL.', f"{NO_SERVER}DATABASE_URL to"),
        ({"PGHOST": "nosuch.invalid"}, NO_HOST, "this host comes from PGHOST: correct it"),
        ({"DATABASE_URL": "postgres://nosuch.invalid/x"}, NO_HOST, "comes from DATABASE_URL: "),
        ({"DATABASE_URL": "postgres://u@/x", "PGHOST": "nosuch.invalid"}, NO_HOST, "from PGHOST: "),
    ],
)
def test_a_failed_connection_names_the_variable_that_says_where_postgresql_is(
    env: Env, problem: str, cure: str, folder: Path
) -> None:
    words = ("--prefix", "db", "--init", "touch made", "echo", "ran")
    done = run("wrap", *words, cwd=folder, env={**os.environ, **env})
    assert (done.returncode, done.stdout, is_one_line(done.stderr)) == (125, "", True)
    assert problem in done.stderr
    assert cure in done.stderr
    assert not (folder / "made").exists()


@needs_postgres
def test_a_refusal_of_postgresql_names_the_role_or_the_session_and_a_cure_that_works(
    cluster: Cluster, role: str
) -> None:
    others = cluster.create("template_others")
    quoted_role, quoted_others = map(pgmanager.quote_identifier, (role, others))
    cluster.sql(f"ALTER ROLE {quoted_role} NOCREATEDB")
    init = ("--init", "true", "--", "true")
    copy = ("--template", others, "--", *PGMANAGER, "exec", "true")
    for words, problem, who, cure in (
        (init, "create database", "a superuser", f"ALTER ROLE {quoted_role} CREATEDB"),
        (copy, "copy database", "its owner", f"ALTER DATABASE {quoted_others} IS_TEMPLATE true"),
    ):
        done = run("wrap", *words)
        assert (done.returncode, done.stdout) == (125, "")
        assert f"permission denied to {problem}" in done.stderr
        assert f"; let {who} run {cure}" in done.stderr
        cluster.sql(cure)
        assert run("wrap", *words).returncode == 0
    used = {"dbname": "template1", "user": "postgres", "application_name": "pgAdmin"}
    with psycopg.connect(**used) as session:  # type: ignore[arg-type]
        cure = f"end what is connected to it: pgAdmin (process {session.info.backend_pid}, role pos"
        done = run("wrap", *init)
    assert f'"template1" is being accessed by other users; {cure}tgres)\n' in done.stderr
    assert is_one_line(done.stderr)


@needs_postgres
def test_a_role_that_may_not_connect_is_told_where_roles_and_passwords_are_set(
    admin: psycopg.Connection[Any], folder: Path, monkeypatch: Patch
) -> None:
    monkeypatch.setenv("PGUSER", "keyed")
    words = ("wrap", "--prefix", "db", "--init", "true", "true")
    cure = "; set PGUSER and PGPASSWORD, or the user and the password in DATABASE_URL\n"
    assert f'role "keyed" does not exist{cure}' in run(*words, cwd=folder).stderr
    rules = Path(os.environ["PGHOST"], "data/pg_hba.conf")
    rules.write_text(f"local all keyed scram-sha-256\n{rules.read_text()}")
    admin.execute("CREATE ROLE keyed LOGIN; SELECT pg_reload_conf()")
    error = f"no password supplied{cure}"  # PostgreSQL may need a moment to read the rules
    wait_until(lambda: error in run(*words, cwd=folder).stderr, error)


@needs_postgres
def test_a_database_that_another_program_makes_at_the_same_time_is_an_error_with_a_cure(
    cluster: Cluster, path: str
) -> None:
    other, copy = map(pgmanager.quote_identifier, (cluster.create("other"), f"{cluster.prefix}0"))
    waits = "SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query ~ '^CREATE'"
    words = ("--template", "template1")
    with psycopg.connect(dbname="postgres") as renaming:
        renaming.execute(f"ALTER DATABASE {other} RENAME TO {copy}".encode())
        with served(path, *words, prefix=cluster.prefix), connect(path) as client:
            wait_until(lambda: cluster.sql(waits), "CREATE DATABASE")
            renaming.commit()
            answer = client.recv(1024).decode()
    assert 'pg_database_datname_index"; another program uses this prefix, ' in answer


@pytest.mark.parametrize(
    ("words", "status", "error"),
    [
        ("wrap --init x.sql echo ran", 125, "psql is missing, or cannot run: No such file"),
        ("wrap-each psql", 127, "cannot run: 'psql': not found"),
        ("wrap-each -x createdb", 127, "cannot run: 'createdb': not found"),
        ("wrap --prepare psql PGMANAGER exec true", 125, "exit status 127: .*psql: .*not found"),
    ],
)
def test_without_psql_a_command_says_what_to_install(
    words: str, status: int, error: str, folder: Path, monkeypatch: Patch
) -> None:
    """An empty PATH does not hide the folders that packages of the system install in."""
    (folder / "x.sql").touch()
    for name, value in {
        "PATH": folder,
        "PGM_DATABASE_PREFIX": "db",
        "PGM_DATABASE_COUNT": 1,
    }.items():
        monkeypatch.setenv(name, str(value))
    code = "import glob, runpy, sys; glob.glob = lambda pattern: []; del sys.argv[0];"
    code += "runpy.run_path(sys.argv[0], None, '__main__')"
    command = shlex.split(words.replace("PGMANAGER", shlex.join(PGMANAGER)))
    done = run_program(*quick_python(code, str(MODULE), *command), cwd=folder)
    assert (done.returncode, done.stdout) == (status, "")
    assert re.search(f"{error}.*; install PostgreSQL's client package", done.stderr)


@pytest.mark.parametrize(
    ("words", "env", "error"),
    [
        (
            "wrap --prefix db --init 'touch FOLDER/made' echo ran",
            {},
            "cannot make the socket: FOLDER/shut/tmp/pgmanager.sock: Permission denied; choose "
            "another path, such as -s /tmp/pgm.sock",
        ),
        (
            "wrap -s FOLDER/s --ephemeral echo ran",
            {"TMPDIR": "FOLDER/shut"},
            "no place for PostgreSQL: TMPDIR is 'FOLDER/shut'; set TMPDIR to ",
        ),
        (
            "wrap -s FOLDER/s --ephemeral echo ran",
            {},
            "initdb: could not look up effective user ID UID: user does not exist; give the user a "
            "name (useradd -u UID NAME), or run as another user\n",
        ),
        (
            "wrap -s FOLDER/s --prefix db --init true echo ran",
            {"PGHOST": "/x"},
            "local user with ID UID does not exist; set PGUSER and ",
        ),
    ],
)
@needs_postgres
def test_a_user_without_rights_or_without_a_name_is_told_the_cause(
    words: str, env: Env, error: str, user: User, folder: Path, monkeypatch: Patch
) -> None:
    options, uid, _ = user
    if not pgmanager.is_open_to_all(pgmanager.find_programs()):
        pytest.skip("only root can run PostgreSQL's programs here")
    options["program"][2] = f"import hashlib, pwd, shutil, subprocess, tempfile, zlib\n{AS_USER}"
    (folder / "shut").mkdir(0o755)
    monkeypatch.setenv("FIRST", f"os.chdir('{folder}/shut')")
    monkeypatch.delenv("PGUSER", raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value.replace("FOLDER", str(folder)))
    with started(*shlex.split(words.replace("FOLDER", str(folder))), **options) as process:
        stdout, stderr = process.communicate(timeout=DEADLINE)
    assert (process.returncode, stdout, is_one_line(stderr)) == (125, "", True), stderr
    assert error.replace("FOLDER", str(folder)).replace("UID", str(uid)) in stderr
    assert os.listdir(folder) == ["shut"]


@linux
def test_a_tmp_that_cannot_be_written_is_named(user: User) -> None:
    options, _, private = user
    mount = 'mount -t tmpfs -o mode=0755 none /tmp && exec "$@"'
    options["program"] = ["unshare", "-m", "sh", "-c", mount, "sh", *options["program"]]
    with started("wrap", "-s", "/nowhere/s", "--prefix", "db", "true", **options) as process:
        stdout, stderr = process.communicate(timeout=DEADLINE)
    if "mount" in stderr or "unshare" in stderr:
        pytest.skip("no mounts here")
    assert (process.returncode, stdout, is_one_line(stderr)) == (125, "", True), stderr
    problem = f"cannot make the folder for lock files: {private}: Permission denied"
    assert f"{problem}; make /tmp a folder that every user may write to" in stderr


@pytest.mark.parametrize("words", ["wrap --prefix db echo ran", "exec echo ran", "status"])
def test_a_current_folder_that_was_deleted_is_named(words: str, folder: Path) -> None:
    script = 'mkdir gone; cd gone; rmdir ../gone; exec "$@"'
    program = ["sh", "-c", script, "sh", *PGMANAGER, *words.split()]
    done = run_program(*program, cwd=folder)
    assert is_refused(done, f"the current folder was deleted: {folder}/gone; change to")


@needs_postgres
def test_wrap_names_missing_databases_and_how_to_make_them_if_command_fails(
    cluster: Cluster,
) -> None:
    wrap = ("wrap", "--count", "3", "--", "sh", "-c")
    assert "not exist" not in run(*wrap, "exit 0").stderr
    done = run(*wrap, "exit 3")
    assert done.returncode == 3
    line, _, words = done.stderr.splitlines()[-1].partition(": pgmanager wrap-each ")
    assert line.startswith(f"pgmanager: 3 of 3 databases do not exist: {cluster.prefix}0 ...; give")
    assert run("wrap-each", *shlex.split(words)).returncode == 0
    assert cluster.names() == {"0", "1", "2"}
    assert "not exist" not in run(*wrap, "exit 3").stderr


@needs_postgres
def test_a_template_that_does_not_exist_is_refused_before_anything_starts(
    cluster: Cluster, folder: Path
) -> None:
    before = os.listdir(folder)
    done = run("wrap", "--template", "nosuch", "echo", "ran")
    assert is_refused(done, "no such template: nosuch; create it first, or use --init")
    assert (os.listdir(folder), cluster.names()) == (before, set())


# ----------------------------------------------------------------------------------- Recipes
#
# Every sh block of README runs here, in a folder that has all of README's files. Numbers of tests
# and workers are lowered, because starting workers takes most of the time. These blocks do not run:

NOT_RUN = {
    "git clone": "installs",
    "npm install": "installs; after it, jest, mocha and vitest were run by hand",
    "here=$(mktemp -d)\nssh ": "needs another machine",
}
README = Path(__file__).with_name("README.md").read_text()
# The kind of a block, the file's name if its first line is a comment that names one, and the text.
BLOCK = re.compile(r"^```(\w+)\n(?:(?:#|//|--) (\S*\.\w+|Makefile)\n)?(.*?)^```$", re.M | re.S)
BLOCKS = BLOCK.findall(README)
COMMANDS = [text for kind, name, text in BLOCKS if (kind, name) == ("sh", "")]
MISSING = (
    r"No module named '(?!pgmanager)\w+'|cannot run: '(node|cargo|go)'|rustup could not choose"
    r"|npm: not found|npm error network"
)
# What a user of Django, of cargo and of go has already.
PROJECT = {
    "shop/migrations/__init__.py": "",
    "Cargo.toml": '[package]\nname = "app"\nversion = "0.1.0"\nedition = "2021"\n',
    "src/lib.rs": '#[test] fn has_one() { std::env::var("PGDATABASE").unwrap(); }',
    "go.mod": "module app\n",
    "app_test.go": """package app
import ("os"; "testing")
func TestHasOne(t *testing.T) { if os.Getenv("PGDATABASE") == "" { t.Fatal("none") } }
""",
}


@pytest.fixture
def recipes(folder: Path, monkeypatch: Patch) -> Iterator[Path]:
    """Provide README's files, a running server, and the programs under test by their names."""
    python = shlex.quote(sys.executable)
    scripts = {
        "python": python,
        "pytest": python + " -m pytest ${DJANGO_SETTINGS_MODULE:+-p pytest_django.plugin}",
        "pgmanager": f"{python} {shlex.quote(str(MODULE))}",
    }
    files = {**PROJECT, **{name: text for _, name, text in BLOCKS if name}}
    files["../pgmanager/pgmanager.py"] = MODULE.read_text()
    for name, text in scripts.items():
        files[f"bin/{name}"] = f'#!/bin/sh\nexec {text} "$@"\n'
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
        # The test's own port gives it lock files of its own.
        (folder / f".s.PGSQL.{os.environ['PGPORT']}").symlink_to(f"{host}/.s.PGSQL.5432")
        monkeypatch.setenv("PGHOST", str(folder))
        monkeypatch.setenv("PGUSER", "postgres")
        yield folder / "app"


def run_block(recipes: Path, code: str) -> str:
    """Run a block of README and return its output; skip the test if a program is missing."""
    code = re.sub(r"(pytest.* -n) \d+", r"\1 2", code.replace("=localhost PGPORT=6432", "=$PGHOST"))
    words = ["sh", "-ec", f"exec 2>&1 </dev/null\n{code}"]
    done = subprocess.run(words, cwd=recipes, capture_output=True, text=True, timeout=120)
    missing = re.search(MISSING, done.stdout)
    is_module = missing and missing[0].startswith("No module")  # which our own set-up installs
    if done.returncode and missing and not (is_module and "CI" in os.environ):
        pytest.skip(missing[0])
    assert done.returncode == 0, done.stdout
    return done.stdout


@needs_postgres
@pytest.mark.parametrize(
    "code",
    [code for code in COMMANDS if not code.startswith(tuple(NOT_RUN))],
    ids=lambda code: re.sub(r"\W+", " ", code)[:60].strip(),
)
def test_every_command_of_readme_works(code: str, recipes: Path) -> None:
    output = run_block(recipes, code)
    if "jobs/*.sh" in code:  # by make and by xargs; test_ is the default prefix
        assert len(re.findall(r"^ test_[0-3]$", output, re.M)) == 2 * 2


@needs_postgres
def test_the_fixture_of_readme_keeps_the_databases_of_failed_tests(
    recipes: Path,
) -> None:
    (leftovers,) = [code for code in COMMANDS if "is_template" in code]
    (recipes / "fails.py").write_text("def test_that_fails(db):\n    assert db is None\n")
    tests = "pytest -p no:pgmanager fails.py || true"
    output = run_block(recipes, f"pgmanager wrap --prefix app_test_ --init schema.sql -- {tests}")
    assert "1 failed" in output
    (kept,) = re.findall("^the database is kept: (app_test_[01]_kept_[0-9a-f]{8})$", output, re.M)
    names = "psql -XAtd postgres -c 'select datname from pg_database'"
    assert kept in run_block(recipes, f"{leftovers} {names}")
    run_block(recipes, f"dropdb {kept}")


@needs_postgres
def test_the_command_of_readme_for_leftovers_drops_only_what_pgmanager_made(recipes: Path) -> None:
    (command,) = [code for code in COMMANDS if "is_template" in code]
    names = "select datname from pg_database where datname ~ '^app_test|^other' order by 1"
    show = f'psql -XAt -d postgres -c "{names}"'
    make = """
        for name in app_test_9 app_test_template_mine other; do createdb $name; done
        for prefix in app_test_ app_tests_ app_test_host2_; do
            pgmanager wrap --count 1 --prefix $prefix --init schema.sql -- \\
                sh -c 'until pgmanager status | grep -q "_0 *free"; do :; done'
        done
    """
    created = run_block(recipes, f"{make} {show}")
    assert re.search("^app_test_0\n(.*\n)*app_test_template_[0-9a-f]{8}$", created, re.M)
    run_block(recipes, command)
    left = run_block(recipes, show).split()
    expected = "app_test_9 app_test_template_mine app_tests_0 app_tests_template_[0-9a-f]{8} other"
    assert re.fullmatch(expected, " ".join(left))


WITHOUT_VARIABLES = "env -u PGHOST -u PGPORT -u PGUSER -u PGPASSWORD -u PGDATABASE"
PG8000 = """import os, sqlalchemy
with sqlalchemy.create_engine(os.environ["DATABASE_URL"]).connect() as connection:
    print(connection.scalar(sqlalchemy.text("select current_database()")))"""
POSTGRES_JS = """const sql = require("postgres")(process.env.DATABASE_URL);
sql`select current_database() as n`.then(([row]) => { console.log(row.n); sql.end(); });"""


@needs_postgres
@pytest.mark.parametrize(
    ("before", "command"),
    [
        ("export DATABASE_URL=postgresql+pg8000://", f"python -c '{PG8000}'"),
        ("npm install --prefix . --no-audit --no-fund postgres", f"node -e '{POSTGRES_JS}'"),
    ],
    ids=["pg8000", "postgres.js"],
)
def test_drivers_whose_urls_cannot_name_a_socket_connect_with_tcp(
    before: str, command: str, recipes: Path
) -> None:
    wrap = "pgmanager wrap --ephemeral --tcp --count 1 -- pgmanager exec --"
    output = run_block(recipes, f"{before}\n{wrap} {WITHOUT_VARIABLES} {command}")
    assert output.splitlines()[-1] == "test_0"


def test_all_blocks_of_readme_that_are_not_run_are_listed() -> None:
    for start in NOT_RUN:
        assert len([code for code in COMMANDS if code.startswith(start)]) == 1, start
    assert not re.search(r"^```(console|bash|shell|py)$", README, re.M)  # they would not be run


# ----------------------------------------------------------------------------------- The storm
#
# Real servers, and clients that are processes; both are killed at random. By hand, for longer:
#
#     python test_pgmanager.py servers 600  # or plain, or prepare
#
# Each holder locks a file of the storm (flock(2)) for its database, and never waits for that lock:
# if it is taken, the database has two holders. A holder unlocks the file before it releases the
# lease. If a holder is killed, the kernel keeps this order: it closes the descriptors of a dying
# process from the highest down (task_work_run(), Linux 4.4), and the file has the highest.

MODES = {  # number of servers, whether they are killed, whether they prepare
    "servers": (3, True, False),
    "plain": (1, False, False),
    "prepare": (2, True, True),
}


def hold_lease(folder: str, server: str, seconds: str) -> None:
    """Hold a lease for a while and check that nobody else does. This is also a program's text."""
    import fcntl
    import os
    import time
    from pathlib import Path

    storm, name = Path(folder), os.environ["PGDATABASE"]
    prepared_by = storm / f"{name}.by"

    def append(file: str, text: str) -> None:
        with open(storm / file, "a") as opened:
            opened.write(text)

    def check_prepared(expected: str) -> None:
        if (storm / "prepares").exists() and (found := prepared_by.read_text()) != expected:
            append("failures", f"{name} of server {server}: {found!r}, not {expected!r}\n")

    opened = os.open(storm / name, os.O_RDWR | os.O_CREAT)
    lock = fcntl.fcntl(opened, fcntl.F_DUPFD_CLOEXEC, 300)
    os.close(opened)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        append("failures", f"two holders: {name} of server {server}\n")
    check_prepared(f"{server}\n")
    prepared_by.write_text("dirty")
    append("leases", server)
    time.sleep(float(seconds))
    check_prepared("dirty")
    os.close(lock)


HOLD = f"import sys\n{inspect.getsource(hold_lease)}\nhold_lease(*sys.argv[1:])"
# It fails if another server prepares the database meanwhile. Sometimes it outlives its server.
PREPARE = """by="$STORM/$PGDATABASE.by"; echo "$SERVER" >"$by"; case $$ in *7) sleep 0.3;; esac
test "$(cat "$by")" = "$SERVER" || echo "prepared by two: $PGDATABASE" >>"$STORM/failures\""""


class Storm:
    """Servers that share names, and their clients."""

    def __init__(self, folder: Path, mode: str) -> None:
        self.folder, self.mode = folder, mode
        self.number, self.kills, self.prepares = MODES[mode]
        self.servers: dict[int, Process] = {}
        self.clients: dict[multiprocessing.process.BaseProcess, float] = {}  # when to kill it
        self.stack = contextlib.ExitStack()
        for name in ("failures", "leases", *["prepares"] * self.prepares):
            (folder / name).touch()
        self.port = str(random.randrange(1024, 65536))

    def path(self, server: object) -> str:
        return str(self.folder / f"s{server}")

    def start(self, server: int) -> None:
        words = ["--count", "4", *(["--prepare", PREPARE] if self.prepares else [])]
        variables = {"STORM": str(self.folder), "PGPORT": self.port, "SERVER": str(server)}
        process = served(self.path(server), *words, env={**os.environ, **variables})
        self.servers[server] = self.stack.enter_context(process)

    def run_clients(self) -> None:
        """Be eight clients, one after the other, because a fork is expensive."""
        for _ in range(8):
            server = random.randrange(len(self.servers))
            path, seconds = self.path(server), random.choice((0, 0.005, 0.05)) * random.random()
            arguments = (str(self.folder), str(server), str(seconds))
            try:
                if self.mode == "plain":
                    self.run_plain_client(path, arguments)
                elif random.random() < 0.1:
                    words = ["exec", "-s", path, "--timeout", str(DEADLINE), "--"]
                    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
                    os.execv(PGMANAGER[0], [*PGMANAGER, *words, *quick_python(HOLD, *arguments)])
                else:
                    with pgmanager.acquire(DEADLINE, socket_path=path) as lease:
                        os.environ["PGDATABASE"] = lease
                        hold_lease(*arguments)
            except (pgmanager.ServerError, ConnectionError):
                assert self.kills
                time.sleep(0.05)  # the server is being started again

    def run_plain_client(self, path: str, arguments: tuple[str, str, str]) -> None:
        kind = random.choice(("holds",) * 6 + ("vanishes", "closes half", "does not read", "talks"))
        with connect(path) as client:
            if kind == "closes half":
                client.shutdown(socket.SHUT_WR)
                client.makefile().read()  # the grant may have come before the end of file
            elif kind == "does not read":
                select.select([client], [], [], DEADLINE)
            elif kind != "vanishes":
                if kind == "talks":
                    client.sendall(b"!" * random.randrange(1, 200_000))
                os.environ["PGDATABASE"] = name_of(client)
                hold_lease(*arguments)

    def fork_client(self) -> None:
        client = multiprocessing.get_context("fork").Process(target=self.run_clients)
        client.start()
        is_killed = random.random() < 0.5
        self.clients[client] = time.monotonic() + random.random() / 3 if is_killed else float("inf")

    def kill_and_reap_clients(self) -> bool:
        """Kill the clients that are due; return True if no client is left."""
        for client, due in list(self.clients.items()):
            if time.monotonic() >= due:
                client.kill()
            if client.exitcode is not None:
                del self.clients[client]
                assert client.exitcode in (0, -signal.SIGKILL, *[125] * self.kills)
        failures = (self.folder / "failures").read_text()
        assert not failures, failures
        time.sleep(0.002)
        return not self.clients

    def kill_a_server(self) -> None:
        server, process = random.choice(list(self.servers.items()))
        if random.random() < 0.7:
            process.kill()
            process.wait(DEADLINE)
        else:
            ended(process)
        self.start(server)

    def run(self, seconds: float) -> None:
        """Run clients and kill servers for so many seconds; then check that no name was lost."""
        for server in range(self.number):
            self.start(server)
        due, end = time.monotonic(), time.monotonic() + seconds
        leases = self.folder / "leases"  # a digit for each lease: the number of its server
        while time.monotonic() < end or len(set(leases.read_text())) < len(self.servers):
            if len(self.clients) < 12:
                self.fork_client()
            if self.kills and due < time.monotonic() < end:
                self.kill_a_server()
                due = time.monotonic() + random.uniform(0.1, 0.6)
            self.kill_and_reap_clients()
        wait_until(self.kill_and_reap_clients, "the end of all clients")
        for server in self.servers:
            wait_for_waiters(self.path(server), 0)
            with connected(self.path(server), 4) as clients:
                assert sorted(map(name_of, clients)) == ["db0", "db1", "db2", "db3"]
            wait_for_free(self.path(server))
            print(leases.read_text().count(str(server)), "leases of server", server)
        for process in self.servers.values():
            ended(process)
        assert not glob.glob(self.path("*"))
        self.kill_and_reap_clients()  # it reads the failures

    def close(self) -> None:
        for client in self.clients:
            client.kill()
            client.join()
        self.stack.close()
        shutil.rmtree(f"/tmp/pgmanager-{os.geteuid()}/{self.port}", ignore_errors=True)
        for file in glob.glob(f"{socket_lock_file(str(self.folder))}*"):
            os.unlink(file)


@linux
@pytest.mark.parametrize("mode", MODES)
def test_a_storm_of_killed_processes_loses_no_name_and_grants_none_twice(mode: str) -> None:
    words = [sys.executable, os.path.abspath(__file__), mode, "3"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=DEADLINE * 4)
    assert done.returncode == 0, done.stdout + done.stderr


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="pgm-") as place:  # noqa: SIM117
        with contextlib.closing(Storm(Path(place), sys.argv[1])) as storm:
            storm.run(float(sys.argv[2]))
