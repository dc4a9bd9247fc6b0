# SPDX-License-Identifier: MIT
"""Measure pgmanager, as one table: ``make bench``.

Machines differ and are noisy, so what counts is a ratio: two things measured in turns within one
run, the median of the turns. A row's target is a promise of the project; a missed one is shown
and not an error, because no other program on the machine has promised anything.

With PEER='command that serves on {socket}' in the environment, the same clients also measure that
server of the same protocol. It should serve 4 names, as ours does then.
"""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import pgmanager

PGMANAGER = [sys.executable, "-m", "pgmanager"]
NAMES = 4
CLIENTS = 16
HOLD = 0.005

# The least that can be done to be granted a name: against it our own part is measured.
BARE = """
import socket, sys
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1])
listener.listen(socket.SOMAXCONN)
while True:
    connection, _ = listener.accept()
    connection.send(b"OK:bench_0")
    connection.close()
"""

# A test process as the server sees it. What it notes is certain: the name was ours from before
# `got` until after `left`. Where the path is a FIFO, the kernel is the pool: a name is a byte.
CLIENT = """
import os, socket, stat, sys, time
path, hold, begin, end = sys.argv[1], *map(float, sys.argv[2:])
fifo = os.open(path, os.O_RDWR) if stat.S_ISFIFO(os.stat(path).st_mode) else None
notes = []
time.sleep(max(0, begin - time.monotonic()))
while (asked := time.monotonic()) < end:
    if fifo:
        name = os.read(fifo, 1)
    else:
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(path)
        name = connection.recv(1024)
    got = time.monotonic()
    time.sleep(hold)
    left = time.monotonic()
    if fifo:
        os.write(fifo, name)
    else:
        connection.close()
    notes.append(f"{name.decode()} {asked} {got} {left}")
print("\\n".join(notes))
"""


# ---------------------------------------------------------------------------------- The table


def row(figure: str, measured: str = "", ratio: str = "", target: str = "", met: str = "") -> None:
    print(f"{figure:<50} {measured:>20} {ratio:>8} {target:>10}  {met}".rstrip(), flush=True)


def limited(figure: str, measured: str, value: float, most: float, unit: str = "x") -> None:
    """Print a row whose ratio or amount has an upper limit."""
    met = "met" if value <= most else "MISSED"
    row(figure, measured, f"{value:.2f}{unit}", f"<= {most:g}{unit}", met)


def times(ratio: float) -> str:
    return f"{ratio:.2f}x"


def micro(*seconds: float) -> str:
    return " : ".join(f"{value * 1e6:.0f}" for value in seconds) + " us"


def milli(*seconds: float) -> str:
    return " : ".join(f"{value * 1e3:.1f}" for value in seconds) + " ms"


def in_turns(turns: int, *measures: Callable[[], float]) -> list[list[float]]:
    """Return each measure's values, taken in turns so that all meet the same noise."""
    values = [[measure() for measure in measures] for _ in range(turns)]
    return [list(column) for column in zip(*values)]


def median_ratio(values: Sequence[float], others: Sequence[float]) -> float:
    """Return the median over the turns of the ratio within each turn."""
    return statistics.median(value / other for value, other in zip(values, others))


# -------------------------------------------------------------------- Servers and their clients


@contextlib.contextmanager
def serving(command: Sequence[str] | str, path: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run a server until the block ends; blocks until it grants."""
    # A group of its own, so that what a shell command starts ends with it.
    process = subprocess.Popen(
        command, shell=isinstance(command, str), stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        while process.poll() is None:
            with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
                connect(path).close()
                break
            time.sleep(0.01)
        else:
            sys.exit(f"bench: server did not start: {command}")
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        process.wait()


def serve(path: str, count: int) -> contextlib.AbstractContextManager[subprocess.Popen[bytes]]:
    # A claim is on a prefix, and several servers are up at once.
    prefix = f"{os.path.basename(path)}_"
    words = ["serve", "-s", path, "--prefix", prefix, "--count", str(count)]
    return serving([*PGMANAGER, *words], path)


def connect(path: str, *, granted: bool = True) -> socket.socket:
    """Connect as a client; blocks for its grant unless it is to wait in the queue."""
    client = socket.socket(socket.AF_UNIX)
    client.connect(path)
    if granted:
        grant(client)
    return client


def grant(client: socket.socket) -> None:
    answer = client.recv(1024)
    assert answer.startswith(b"OK:"), answer


def latency(path: str, repeat: int = 30, pause: float = 0.001) -> float:
    """Return the median time from connect to a name, with a pause after each lease."""
    spent = []
    for _ in range(repeat):
        client = socket.socket(socket.AF_UNIX)
        begin = time.perf_counter()
        client.connect(path)
        client.recv(1024)
        spent.append(time.perf_counter() - begin)
        client.close()
        time.sleep(pause)
    return statistics.median(spent)


def hand_off(clients: list[socket.socket], path: str, repeat: int = 5) -> float:
    """Return the median time from the end of a lease to the grant of the next.

    The first of the clients has the pool's only name, the others wait; their number stays.
    """
    spent = []
    for _ in range(repeat):
        holder = clients.pop(0)
        begin = time.perf_counter()
        holder.close()
        grant(clients[0])
        spent.append(time.perf_counter() - begin)
        clients.append(connect(path, granted=False))
        time.sleep(0.001)  # for the newcomer to be queued outside the time measured
    return statistics.median(spent)


def crowd(path: str, seconds: float = 2.0) -> tuple[float, float]:
    """Return the part of the time in which the names were in use, and the longest wait.

    Many client processes share few names, each of them holding one, again and again.
    """
    begin = time.monotonic() + 0.5  # until then all have started
    end = begin + seconds
    words = [sys.executable, "-I", "-S", "-c", CLIENT, path, str(HOLD), str(begin), str(end)]
    clients = [subprocess.Popen(words, stdout=subprocess.PIPE, text=True) for _ in range(CLIENTS)]
    uses: dict[str, list[tuple[float, float]]] = {}
    longest = 0.0
    for client in clients:
        for line in client.communicate()[0].splitlines():
            name, asked, got, left = line.split()
            uses.setdefault(name, []).append((float(got), float(left)))
            if float(got) < end:  # after that, clients that exit take the processors
                longest = max(longest, float(got) - float(asked))
    used = 0.0
    for leases in uses.values():
        leases.sort()
        for (_, left_before), (got_next, _) in zip(leases, leases[1:]):
            assert left_before < got_next, "two clients had one name at one time"
        used += sum(min(left_, end) - min(got_, end) for got_, left_ in leases)
    return used / (NAMES * seconds), longest


def processor_and_memory(pid: int) -> tuple[float, int]:
    """Return a process's processor time in seconds and its resident memory in bytes."""
    if os.path.exists(f"/proc/{pid}/stat"):
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
        ticks = int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK"), int(fields[21]) * resource.getpagesize()
    listing = ["ps", "-o", "time=,rss=", "-p", str(pid)]
    spent, kilobytes = subprocess.check_output(listing, text=True).split()
    minutes, _, seconds = spent.rpartition(":")
    return int(minutes or 0) * 60 + float(seconds), int(kilobytes) * 1024


def settled(pid: int) -> tuple[float, int]:
    """Return the same once a process has done what it had to do."""
    before, now = -1.0, processor_and_memory(pid)
    while now[0] > before:
        before = now[0]
        time.sleep(0.5)
        now = processor_and_memory(pid)
    return now


# --------------------------------------------------------------------------------- The figures


def free_pool(folder: str, peer: str | None) -> None:
    ours, bare, theirs = (f"{folder}/{name}" for name in ("ours", "bare", "theirs"))
    with contextlib.ExitStack() as stack:
        stack.enter_context(serve(ours, NAMES))
        stack.enter_context(serving([sys.executable, "-S", "-c", BARE, bare], bare))
        paths = [ours, bare]
        if peer:
            stack.enter_context(serving(peer.format(socket=theirs), theirs))
            paths.append(theirs)
        # A millisecond after the lease before, as between tests; and at once, where the server
        # has the end of that lease on its hands as well, which the bare one does not.
        for figure, pause in (("connect to name, free pool", 0.001), ("  back to back", 0)):
            values = in_turns(40, *(partial(latency, path, pause=pause) for path in paths))
            medians = [statistics.median(column) for column in values]
            ratio = median_ratio(values[0], values[1])
            if pause:
                limited(f"{figure} : bare accept and send", micro(*medians[:2]), ratio, 1.5)
            else:
                row(f"{figure} : bare", micro(*medians[:2]), times(ratio))
            if peer:
                ratio = median_ratio(values[0], values[2])
                row("  the same : PEER", micro(medians[0], medians[2]), times(ratio))


def full_pool(folder: str, peer: str | None) -> None:
    ours, kernel, theirs = (f"{folder}/{name}" for name in ("ours", "kernel", "theirs"))
    paths = [ours, kernel]
    os.mkfifo(kernel)
    names = os.open(kernel, os.O_RDWR)
    os.write(names, bytes(range(65, 65 + NAMES)))
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, names)
        stack.enter_context(serve(ours, NAMES))
        if peer:
            stack.enter_context(serving(peer.format(socket=theirs), theirs))
            paths.append(theirs)
        turns = [[crowd(path) for path in paths] for _ in range(4)]
    columns = list(zip(*turns))
    use = [statistics.median(used for used, _ in column) for column in columns]
    wait = [statistics.median(longest for _, longest in column) for column in columns]
    fair = HOLD * CLIENTS / NAMES
    figure = f"{CLIENTS} processes, {NAMES} names, {HOLD * 1e3:g} ms: names in use"
    row(figure, f"{use[0]:.1%}", "", ">= 96%", "met" if use[0] >= 0.96 else "MISSED")
    # What this machine allows just now: nothing stands between the clients but the kernel.
    row(
        "  names in use : a pipe for a pool", f"{use[0]:.1%} : {use[1]:.1%}", times(use[0] / use[1])
    )
    limited("  longest wait : hold x clients / names", milli(wait[0], fair), wait[0] / fair, 1.5)
    row("  longest wait : a pipe for a pool", milli(*wait[:2]), times(wait[0] / wait[1]))
    if peer:
        row("  names in use : PEER", f"{use[0]:.1%} : {use[2]:.1%}", times(use[0] / use[2]))
        row("  longest wait : PEER", milli(wait[0], wait[2]), times(wait[0] / wait[2]))


def long_queue(folder: str, waiters: int = 2000) -> None:
    path = f"{folder}/queue"
    with serve(path, 1) as server:
        holder = connect(path)
        before = processor_and_memory(server.pid)[1]
        clients = [connect(path, granted=False) for _ in range(waiters)]
        spent, memory = settled(server.pid)
        time.sleep(3)
        spent = processor_and_memory(server.pid)[0] - spent
        holder.close()
        served = 0
        for client in clients:  # one name: if any other had it, this one would wait for ever
            client.settimeout(10)
            with contextlib.suppress(socket.timeout):
                grant(client)
                served += 1
            client.close()
    each = (memory - before) / waiters / 1000
    in_order = f"{served} of {waiters}"
    verdict = "met" if served == waiters else "MISSED"
    row(f"{waiters} waiting at once: served in order", in_order, "", "all", verdict)
    limited("  resident memory for each", "", each, 30, " KB")
    limited("  processor, while all wait for 3 s", milli(spent), spent / 3 * 100, 0.1, " %")


def growth(folder: str) -> None:
    """How cost grows with the queue and with the pool."""
    queues, pools = (1, 10, 100, 1000), (4, 64, 512)
    with contextlib.ExitStack() as stack:
        measures: list[Callable[[], float]] = []
        servers = []
        for waiters in queues:
            path = f"{folder}/q{waiters}"
            servers.append(stack.enter_context(serve(path, 1)))
            clients = [connect(path)]
            clients += [connect(path, granted=False) for _ in range(waiters)]
            measures.append(partial(hand_off, clients, path))
        for names in pools:
            path = f"{folder}/p{names}"
            stack.enter_context(serve(path, names))
            for _ in range(names - 1):
                stack.enter_context(connect(path))
            measures.append(partial(latency, path, 10))
        for server in servers:
            settled(server.pid)
        values = in_turns(30, *measures)
    for kind, sizes, columns in (
        ("hand-off, {} waiting : {}", queues, values[: len(queues)]),
        ("connect to name, the last of {} : of {}", pools, values[len(queues) :]),
    ):
        for size, column in list(zip(sizes, columns))[1:]:
            medians = micro(statistics.median(column), statistics.median(columns[0]))
            row(kind.format(size, sizes[0]), medians, times(median_ratio(column, columns[0])))


def whole_process(folder: str) -> None:
    path = f"{folder}/exec"

    def run(*words: str) -> float:
        begin = time.perf_counter()
        subprocess.run(words, check=True)
        return time.perf_counter() - begin

    with serve(path, NAMES):
        os.environ["PGM_SOCKET"] = path
        ours, python = in_turns(
            40, lambda: run(*PGMANAGER, "exec", "--", "true"), lambda: run(sys.executable, "-c", "")
        )
        del os.environ["PGM_SOCKET"]
    medians = milli(statistics.median(ours), statistics.median(python))
    limited("exec -- true : python -c pass", medians, median_ratio(ours, python), 3)


def ephemeral(folder: str) -> None:
    try:
        programs, user = pgmanager._find_programs(), pgmanager._unprivileged_user()
        if user:
            programs = pgmanager._within_reach(programs, folder, user)
    except pgmanager.PostgresError as error:
        row("wrap --ephemeral -- true - initdb", str(error))
        return
    # On the file system that --ephemeral uses: it matters more than anything else here.
    place = tempfile.mkdtemp(prefix="pgm-bench-")
    if user:
        os.chown(place, user["user"], user["group"])
        os.chmod(folder, 0o755)
    options: dict[str, Any] = {"stdout": subprocess.DEVNULL, "check": True}

    def initdb() -> float:
        cluster = os.path.join(place, "data")
        switches = ["-U", "postgres", "-A", "trust", "-N", "-E", "UTF8", "--locale=C"]
        begin = time.perf_counter()
        program = os.path.join(programs, "initdb")
        subprocess.run([program, "-D", cluster, *switches], cwd=place, **options, **user)
        spent = time.perf_counter() - begin
        shutil.rmtree(cluster)
        return spent

    def wrap() -> float:
        words = ["wrap", "-s", f"{folder}/wrap", "--prefix", "bench_", "--count", str(NAMES)]
        begin = time.perf_counter()
        subprocess.run([*PGMANAGER, *words, "--ephemeral", "--", "true"], **options)
        return time.perf_counter() - begin

    try:
        ours, theirs = in_turns(7, wrap, initdb)
    finally:
        shutil.rmtree(place)
    medians = milli(statistics.median(ours), statistics.median(theirs))
    more = statistics.median(our - their for our, their in zip(ours, theirs))
    limited("wrap --ephemeral -- true - initdb alone", medians, more, 0.5, " s")


PRISTINE = 'dropdb --if-exists --force "$PGDATABASE" && createdb "$PGDATABASE"'


def with_postgres(folder: str) -> None:
    """Print the rows that need databases: this program once more, under wrap --ephemeral."""
    try:
        programs = pgmanager._find_programs()
    except pgmanager.PostgresError:
        return
    words = ["wrap", "-s", f"{folder}/pg", "--ephemeral", "--prefix", "bench_", "--count", "8"]
    command = [*PGMANAGER, *words, "--prepare", PRISTINE, "--", sys.executable, __file__, INSIDE]
    subprocess.run(command, env={**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"})


INSIDE = "inside"


def inside() -> None:
    """Measure with the pool of --prepare around us: 8 names, of which we want 4 at a time."""
    path = os.environ["PGM_SOCKET"]
    prepared = time.perf_counter()
    while {row["state"] for row in (pgmanager._observe(path) or {})["databases"]} != {"free"}:
        time.sleep(0.05)  # the first preparations are not what is measured
    prepared = (time.perf_counter() - prepared) / 8 * (os.cpu_count() or 1)
    waits: list[float] = []

    def tests() -> None:
        for _ in range(8):
            begin = time.perf_counter()
            with pgmanager.acquire():
                waits.append(time.perf_counter() - begin)
                time.sleep(max(1, 4 * prepared))

    clients = [threading.Thread(target=tests) for _ in range(4)]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    waited = statistics.median(waits) * 1e3
    limited("median wait for a pristine database, 8 names", "4 clients", waited, 1, " ms")

    def create(jobs: int) -> float:
        each = [*PGMANAGER, "wrap-each", "--prefix", "each_", "--count", "16"]
        begin = time.perf_counter()
        subprocess.run([*each, "-j", str(jobs), "-x", "createdb"], check=True)
        spent = time.perf_counter() - begin
        subprocess.run([*each, "-x", "dropdb"], check=True)
        return spent

    four, one = in_turns(5, partial(create, 4), partial(create, 1))
    medians = milli(statistics.median(four), statistics.median(one))
    limited("16 createdb, wrap-each -j 4 : -j 1", medians, median_ratio(four, one), 0.7)


def main() -> None:
    # Started as a user starts it: with pgmanager's byte code cached, and no pool of somebody's.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    if sys.argv[1:] == [INSIDE]:
        return inside()
    for name in list(os.environ):
        if name.startswith(("PGM_", "PGMANAGER_")):
            del os.environ[name]
    subprocess.run([*PGMANAGER, "--version"], stdout=subprocess.DEVNULL, check=True)
    # Some thousand clients have their ends in this process.
    least, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if least != resource.RLIM_INFINITY and least < 8192:
        enough = 8192 if most == resource.RLIM_INFINITY else min(most, 8192)
        resource.setrlimit(resource.RLIMIT_NOFILE, (enough, most))
    peer = os.environ.get("PEER")
    folder = tempfile.mkdtemp(dir="/tmp", prefix="pgm-bench-")
    try:
        row("figure", "measured", "ratio", "target")
        free_pool(folder, peer)
        full_pool(folder, peer)
        long_queue(folder)
        whole_process(folder)
        growth(folder)
        ephemeral(folder)
        with_postgres(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
