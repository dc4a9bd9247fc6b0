# SPDX-License-Identifier: MIT
"""The tests of pgmanager, in the order of the module.

Sockets, signals, processes and PostgreSQL are real. Nothing sleeps to let something happen:
``wait_until`` waits for the thing itself, and fails loudly when it does not come.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

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
    """Keep the environment of whoever runs the suite out of the tests."""
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
    process = subprocess.Popen([*PGMANAGER, *words], text=True, **options)
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


# -------------------------------------------------------------------------------------- Pool
