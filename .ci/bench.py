# SPDX-License-Identifier: MIT
"""Measure pgmanager, as one table: ``make bench``, or with ARGS='free_pool ephemeral' a part of it.

Machines differ and are noisy, so what counts is a ratio: two things measured in turns within one
run, the median of the turns. A row's target is a promise of the project; a missed one is shown
and not an error, because no other program on the machine has promised anything.

With BEFORE=/path/to/an/older/pgmanager.py in the environment, what is measured of ours is measured
of that file too. With PEER='command that serves on {socket}', the same clients also measure that
server of the same protocol. It should serve 4 names, as ours does then.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import resource
import select
import shlex
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import pgmanager

NAMES = 4
CLIENTS = 16
HOLD = 0.005
FAIR, FAIR_WAIT = "hold x clients / names", HOLD * CLIENTS / NAMES

OURS, BEFORE, PEER, BARE = "ours", "BEFORE", "PEER", "bare accept and send"
# How each is started. Ours as pip's script starts it: with the byte code cached.
COMMANDS: dict[str, list[str]] = {}
STARTER = "import sys; import pgmanager; sys.exit(pgmanager.main())"

# The least that can be done to be granted a name: against it our own part is measured.
BARE_SERVER = """
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
    notes.append(f"{name.decode()} {asked} {got} {left}\\n")
sys.stdout.writelines(notes)
"""

# Many clients in one process, to be killed with it.
VICTIMS = """
import socket, sys, time
clients = [socket.socket(socket.AF_UNIX) for _ in range(int(sys.argv[2]))]
for client in clients:
    client.connect(sys.argv[1])
print(flush=True)
time.sleep(1000)
"""

Key = TypeVar("Key", bound=Hashable)
Unit = tuple[float, int, str]  # what seconds, say, are multiplied by; digits after the point; name
MICRO: Unit = (1e6, 0, "us")
MILLI: Unit = (1e3, 1, "ms")
ONE: Unit = (1, 0, "")


# ---------------------------------------------------------------------------------- The table


def row(
    figure: str,
    measured: str,
    value: float | None = None,
    unit: str = "x",
    most: float | None = None,
) -> None:
    """Print a row, with its target if it has one."""
    amount = "" if value is None else f"{value:.2f}{unit}"
    target = met = ""
    if value is not None and most is not None:
        target, met = f"<= {most:g}{unit}", "met" if value <= most else "MISSED"
    print(f"{figure:<56} {measured:>20} {amount:>8} {target:>10}  {met}".rstrip(), flush=True)


def compare(
    figure: str, values: Mapping[str, Sequence[float]], unit: Unit, most: float | None = None
) -> None:
    """Print ours against each of the others; the target is for the first of them."""
    scale, digits, name = unit
    ours = values[OURS]
    if len(values) == 1:
        row(figure, f"{statistics.median(ours) * scale:.{digits}f} {name}")
    for label, others in values.items():
        if label != OURS:
            medians = [statistics.median(column) * scale for column in (ours, others)]
            measured = " : ".join(f"{median:.{digits}f}" for median in medians)
            # Of the ratios within each turn, for then both met the same noise.
            ratio = statistics.median(a / b if b else 1 for a, b in zip(ours, others))
            row(f"{figure} : {label}", f"{measured} {name}", ratio, most=most)
            most = None


def in_turns(turns: int, measures: Mapping[Key, Callable[[], float]]) -> dict[Key, list[float]]:
    """Return each measure's values, taken in turns so that all meet the same noise."""
    values: dict[Key, list[float]] = {key: [] for key in measures}
    for _ in range(turns):
        for key, measure in measures.items():
            values[key].append(measure())
    return values


# -------------------------------------------------------------------- Servers and their clients


class Server:
    """What serves at a path, started as one of COMMANDS, until the stack ends."""

    numbers = itertools.count()

    def __init__(
        self, stack: contextlib.ExitStack, count: int, label: str = OURS, *options: str
    ) -> None:
        number = next(self.numbers)
        self.path = os.path.abspath(f"{number}.sock")
        if label in (OURS, BEFORE):
            # A prefix for each: they are up at once.
            words = ["serve", "-s", self.path, "--count", str(count), "--prefix", f"b{number}_"]
        else:
            words = [self.path]
        # A group of its own, so that what a shell command starts ends with it.
        self.process = subprocess.Popen(
            [*COMMANDS[label], *words, *options], stderr=subprocess.DEVNULL, start_new_session=True
        )
        self.pid = self.process.pid
        stack.callback(self._end)
        while True:
            with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
                connect(self.path).close()
                return
            if self.process.poll() is not None:
                sys.exit(f"bench: server did not start: {self.process.args!r}")
            time.sleep(0.01)

    def _end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGTERM)
        self.process.wait()

    def processor(self) -> float:
        """Return the processor time spent until now, in seconds."""
        if sys.platform == "linux":  # clock_getcpuclockid(3): finer than the ticks of ps
            return time.clock_gettime(~self.pid << 3 | 2)
        spent = subprocess.check_output(["ps", "-o", "time=", "-p", str(self.pid)], text=True)
        minutes, _, seconds = spent.rpartition(":")
        return int(minutes or 0) * 60 + float(seconds)

    def memory(self) -> int:
        """Return the resident memory, in bytes."""
        resident = subprocess.check_output(["ps", "-o", "rss=", "-p", str(self.pid)])
        return int(resident) * 1024

    def settle(self) -> None:
        """Wait until it has done what it had to do."""
        before, now = -1.0, self.processor()
        while now > before + 0.001:
            time.sleep(0.3)
            before, now = now, self.processor()


def versions() -> list[str]:
    return [label for label in (OURS, BEFORE) if label in COMMANDS]


def servers(stack: contextlib.ExitStack, *more: str) -> dict[str, Server]:
    """Start each that there is, with NAMES names."""
    labels = [OURS, *more, BEFORE, PEER]
    return {label: Server(stack, NAMES, label) for label in labels if label in COMMANDS}


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
        if pause:  # a sleep of 0 still takes 50 us
            time.sleep(pause)
    return statistics.median(spent)


def rate(path: str, repeat: int = 1000) -> float:
    """Return how many leases a second one client takes, one after the other."""
    begin = time.perf_counter()
    latency(path, repeat, pause=0)
    return repeat / (time.perf_counter() - begin)


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


def crowd(*paths: str, seconds: float = 2.0) -> tuple[float, float, list[int]]:
    """Return the part of the time in which the names were in use, the longest wait, and how many
    leases each path gave.

    Many client processes share few names, each of them holding one, again and again.
    """
    begin = time.monotonic() + 0.5  # until then all have started
    end = begin + seconds
    words = [sys.executable, "-I", "-S", "-c", CLIENT]
    times = [str(HOLD), str(begin), str(end)]
    clients = [
        (path, subprocess.Popen([*words, path, *times], stdout=subprocess.PIPE, text=True))
        for path in paths * (CLIENTS // len(paths))
    ]
    uses: dict[str, list[tuple[float, float]]] = {}
    longest, leases = 0.0, dict.fromkeys(paths, 0)
    for path, client in clients:
        for line in client.communicate()[0].splitlines():
            name, asked, got, left = line.split()
            uses.setdefault(name, []).append((float(got), float(left)))
            leases[path] += 1
            if float(got) < end:  # after that, clients that exit take the processors
                longest = max(longest, float(got) - float(asked))
    used = 0.0
    for spans in uses.values():
        spans.sort()
        for (_, left_before), (got_next, _) in zip(spans, spans[1:]):
            assert left_before < got_next, "two clients had one name at one time"
        used += sum(min(left_, end) - min(got_, end) for got_, left_ in spans)
    return used / (NAMES * seconds), longest, list(leases.values())


# --------------------------------------------------------------------------------- The figures


def free_pool() -> None:
    """One client: what a name costs."""
    with contextlib.ExitStack() as stack:
        up = servers(stack, BARE)
        # A millisecond after the lease before, as between tests; and at once, where the server
        # has the end of that lease on its hands as well, which the bare one does not.
        for figure, pause in (("connect to name, free pool", 0.001), ("  back to back", 0)):
            measures = {key: partial(latency, up[key].path, pause=pause) for key in up}
            compare(figure, in_turns(40, measures), MICRO, 1.5 if pause else None)
        del up[BARE]
        spent = {key: up[key].processor() for key in versions()}  # of PEER we know a shell only
        rates = in_turns(20, {key: partial(rate, up[key].path) for key in up})
        thousand = {key: [(up[key].processor() - spent[key]) / 20] for key in spent}
        compare("one client in a loop: leases a second", rates, ONE)
        compare("  the server's processor time for 1,000", thousand, MILLI)


def full_pool() -> None:
    """Many clients: what is lost between one's lease and the next one's."""
    pipe = "a pipe for a pool"  # what this machine allows: only the kernel is between the clients
    os.mkfifo("pipe")
    names = os.open("pipe", os.O_RDWR)
    os.write(names, bytes(range(65, 65 + NAMES)))
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, names)
        up = servers(stack)
        paths = {OURS: up[OURS].path, pipe: "pipe", **{key: up[key].path for key in up}}
        use: dict[str, list[float]] = {key: [] for key in paths}
        wait: dict[str, list[float]] = {key: [] for key in paths}
        spent: dict[str, list[float]] = {key: [] for key in versions()}
        for _, (key, path) in itertools.product(range(4), paths.items()):
            before = up[key].processor() if key in spent else 0
            used, longest, (leases,) = crowd(path)
            use[key].append(used)
            wait[key].append(longest)
            if key in spent:
                spent[key].append((up[key].processor() - before) / leases * 1000)
    figure = f"{CLIENTS} processes, {NAMES} names, {HOLD * 1e3:g} ms: "
    row(f"{figure}names not in use", "", 100 - statistics.median(use[OURS]) * 100, " %", 4)
    compare("  names in use", use, (100, 1, "%"))
    compare("  longest wait", {OURS: wait[OURS], FAIR: [FAIR_WAIT] * 4, **wait}, MILLI, 1.5)
    compare("  the server's processor time for 1,000", spent, MILLI)


def two_servers() -> None:
    """Half of the clients at each of two servers with the same names."""
    with contextlib.ExitStack() as stack:
        up = [Server(stack, NAMES, OURS, "--prefix", "same_") for _ in range(2)]
        turns = [crowd(*(server.path for server in up), seconds=4) for _ in range(3)]
    use, wait, leases = zip(*turns)
    first, second = (sum(column) for column in zip(*leases))
    more = max(first, second) / min(first, second)
    row("two servers, the same names: leases each", f"{first} : {second}", more, most=1.1)
    compare("  longest wait", {OURS: wait, FAIR: [FAIR_WAIT] * 3}, MILLI, 4)
    compare("  names in use", {OURS: use}, (100, 1, "%"))


def long_queue(waiters: int = 2000) -> None:
    """Waiting costs memory, and nothing else."""
    memory: dict[str, list[float]] = {}
    for label in versions():
        with contextlib.ExitStack() as stack:
            server = Server(stack, 1, label)
            holder = connect(server.path)
            before = server.memory()
            clients = [connect(server.path, granted=False) for _ in range(waiters)]
            server.settle()
            memory[label] = [(server.memory() - before) / waiters]
            spent = server.processor()
            time.sleep(3)
            spent = server.processor() - spent
            holder.close()
            served = 0
            for client in clients:  # one name: if any other had it, this one would wait for ever
                client.settimeout(10)
                with contextlib.suppress(socket.timeout):
                    grant(client)
                    served += 1
                client.close()
        if label == OURS:
            row(f"{waiters} waiting at once: not served in order", "", waiters - served, "", 0)
            row("  processor, while all wait for 3 s", "", spent / 3 * 100, " %", 0.1)
            row("  resident memory for each", "", memory[OURS][0] / 1000, " KB", 30)
    compare("  resident memory", memory, (1e-3, 1, "KB"))


def burst(waiters: int = 1000) -> None:
    """As many names as waiters, and all are released at once: in which order are they answered?"""
    early: dict[str, list[float]] = {}
    for label in versions():
        with contextlib.ExitStack() as stack:
            server = Server(stack, waiters, label)
            clients = [connect(server.path) for _ in range(waiters)]
            queue = [connect(server.path, granted=False) for _ in range(waiters)]
            server.settle()
            # epoll(7) lists, each once, in the order in which they became readable.
            watch = select.epoll()
            places = {client.fileno(): place for place, client in enumerate(queue)}
            for number in places:
                watch.register(number, select.EPOLLIN | select.EPOLLET)
            for client in clients:
                client.close()
            order: list[int] = []
            while len(order) < waiters:
                order += [places[number] for number, _ in watch.poll(10)]
            latest = list(itertools.accumulate(order, max))
            early[label] = [sum(place < before for place, before in zip(order, latest))]
            for client in queue:
                client.close()
    row(f"{waiters} names for as many waiters: not in order", "", early[OURS][0], "", 0)
    compare("  not in order", early, ONE)


def mass_death(victims: int = 8000) -> None:
    """Clients that die at one moment keep a newcomer waiting."""
    victims = min(victims, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - 100)
    delays: dict[str, list[float]] = {}
    for label in versions():
        delays[label] = []
        for _ in range(3):
            with contextlib.ExitStack() as stack:
                server = Server(stack, NAMES, label)
                words = [sys.executable, "-S", "-c", VICTIMS, server.path, str(victims)]
                process = stack.enter_context(subprocess.Popen(words, stdout=subprocess.PIPE))
                assert process.stdout is not None
                process.stdout.readline()
                server.settle()
                last = stack.enter_context(connect(server.path, granted=False))
                process.kill()
                begin = time.perf_counter()
                grant(last)
                delays[label].append(time.perf_counter() - begin)
    figure = f"{victims} clients die at one moment: the next grant"
    row(figure, "", statistics.median(delays[OURS]), " s", 2)
    compare("  its delay", delays, MILLI)


def growth() -> None:
    """How cost grows with the queue and with the pool."""
    for figure, sizes in (
        ("hand-off, {} waiting", (1, 10, 100, 1000)),
        ("connect to name, the last of {}", (4, 64, 512)),
    ):
        measures: dict[tuple[str, int], Callable[[], float]] = {}
        with contextlib.ExitStack() as stack:
            for label, size in itertools.product(versions(), sizes):
                server = Server(stack, size if sizes[0] > 1 else 1, label)
                if sizes[0] > 1:
                    for _ in range(size - 1):
                        stack.enter_context(connect(server.path))
                    measures[label, size] = partial(latency, server.path, 10)
                else:
                    clients = [connect(server.path)]
                    clients += [connect(server.path, granted=False) for _ in range(size)]
                    measures[label, size] = partial(hand_off, clients, server.path)
                server.settle()
            values = in_turns(30, measures)
        for size in sizes:
            columns = {label: values[label, size] for label in versions()}
            if size != sizes[0]:
                columns = {OURS: columns[OURS], f"of {sizes[0]}": values[OURS, sizes[0]], **columns}
            compare(figure.format(size), columns, MICRO)


def run(*words: str, **options: Any) -> float:
    """Run a command; return how long it takes."""
    begin = time.perf_counter()
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL, **options)
    return time.perf_counter() - begin


def whole_process() -> None:
    with contextlib.ExitStack() as stack:
        measures = {OURS: partial(run), "python -c pass": partial(run, sys.executable, "-c", "")}
        for label in versions():
            env = {**os.environ, "PGM_SOCKET": Server(stack, NAMES, label).path}
            measures[label] = partial(run, *COMMANDS[label], "exec", "--", "true", env=env)
        compare("exec -- true", in_turns(40, measures), MILLI, 3)


def ephemeral() -> None:
    """A throw-away PostgreSQL, against initdb on the same file system, which matters most here."""
    nothing: Any = None
    server = pgmanager._Postgres((), nothing)
    programs, user = server._programs, server._user
    with tempfile.TemporaryDirectory(prefix="pgm-bench-") as place:
        if user:
            os.chown(place, user["user"], user["group"])
            programs = pgmanager._within_reach(programs, place)

        def initdb() -> float:
            spent = run(f"{programs}/initdb", *pgmanager.INITDB.split(), cwd=place, **user)
            shutil.rmtree(f"{place}/data")
            return spent

        words = ["wrap", "--ephemeral", "--prefix", "bench_", "--count", "4", "--", "true"]
        measures = {OURS: initdb, "initdb alone": initdb}
        for label in versions():
            measures[label] = partial(run, *COMMANDS[label], *words, stderr=subprocess.DEVNULL)
            measures[label]()  # initdb's work is kept from the first time on
        values = in_turns(9, measures)
    compare("wrap --ephemeral --count 4 -- true", values, MILLI, 0.6)


PRISTINE = 'dropdb --if-exists --force "$PGDATABASE" && createdb -T template1 "$PGDATABASE"'
FIFTY_TABLES = """
do $$ begin for n in 1..50 loop
    execute format('create table t%s (id serial primary key, word text unique)', n);
end loop; end $$
"""


def databases() -> None:
    """Work on a real PostgreSQL: this program once more, under wrap --ephemeral --template."""
    init = f"psql -Xqv ON_ERROR_STOP=1 -c {shlex.quote(FIFTY_TABLES)}"
    words = ["wrap", "--ephemeral", "--init", init, "--template", "template1"]
    command = [*COMMANDS[OURS], *words, "--count", "1", "--", sys.executable, __file__, INSIDE]
    subprocess.run(command, check=True)


INSIDE = "inside"


def inside() -> None:
    # The programs of the server's own folder: Debian's on PATH are slower, in Perl.
    os.environ["PATH"] = f"{pgmanager._find_programs()}:{os.environ['PATH']}"
    with contextlib.ExitStack() as stack:
        paths = {OURS: os.environ["PGM_SOCKET"]}
        paths["dropdb && createdb"] = Server(stack, 1, OURS, "--prepare", PRISTINE).path
        holders = {key: connect(path) for key, path in paths.items()}

        def renew(key: str) -> float:
            begin = time.perf_counter()
            holders[key].close()
            holders[key] = connect(paths[key])
            return time.perf_counter() - begin

        values = in_turns(15, {key: partial(renew, key) for key in paths})
        compare("a fresh copy of 50 tables, --template", values, MILLI, 0.9)

    def create(label: str, jobs: str) -> float:
        each = [*COMMANDS[label], "wrap-each", "--prefix", "each_", "--count", "16"]
        spent = run(*each, "-j", jobs, "-x", "createdb")
        run(*each, "-x", "dropdb")
        return spent

    measures = {OURS: partial(create, OURS, "4"), "-j 1": partial(create, OURS, "1")}
    measures.update((label, partial(create, label, "4")) for label in versions())
    compare("16 createdb, wrap-each -j 4", in_turns(5, measures), MILLI, 0.7)


GROUPS = (
    *(free_pool, full_pool, two_servers, long_queue, burst, mass_death, growth),
    *(whole_process, ephemeral, databases),
)


def find_commands() -> None:
    """Fill COMMANDS; the copies of ours and of BEFORE are in the current folder."""
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    for label, source in ((OURS, pgmanager.__file__), (BEFORE, os.environ.get("BEFORE"))):
        if source:
            os.makedirs(label, exist_ok=True)
            shutil.copy(source, f"{label}/pgmanager.py")
            with open(f"{label}/__main__.py", "w") as file:
                file.write(STARTER)
            COMMANDS[label] = [sys.executable, os.path.abspath(label)]
            subprocess.run([*COMMANDS[label], "--version"], stdout=subprocess.DEVNULL, check=True)
    COMMANDS[BARE] = [sys.executable, "-S", "-c", BARE_SERVER]
    if peer := os.environ.get("PEER"):
        COMMANDS[PEER] = ["/bin/sh", "-c", peer.replace("{socket}", '"$0"')]


def main() -> None:
    groups = {group.__name__: group for group in GROUPS}
    if sys.argv[1:] == [INSIDE]:
        find_commands()
        inside()
        return
    if not groups.keys() >= {*sys.argv[1:]}:
        sys.exit(f"bench: unknown group: {' '.join(sys.argv[1:])}; there are {', '.join(groups)}")
    # Started as a user starts it: with byte code cached, and no pool of somebody's.
    for name in list(os.environ):
        if name.startswith(("PGM_", "PGMANAGER_")) or name == "PYTHONDONTWRITEBYTECODE":
            del os.environ[name]
    if before := os.environ.get(BEFORE):
        os.environ[BEFORE] = os.path.abspath(before)
    # Some thousand clients have their ends in one process.
    pgmanager._raise_limit()
    # Where the names of sockets are short, and relative to which each group has its files.
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="pgm-bench-") as folder:
        os.chdir(folder)
        find_commands()
        print(f"{'figure':<56} {'measured':>20} {'ratio':>8} {'target':>10}")
        for name in sys.argv[1:] or groups:
            groups[name]()


if __name__ == "__main__":
    main()
