"""`quantlab serve` as a process of its own, for benchmarks."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ADDRESS = re.compile(r"http://127\.0\.0\.1:(\d+)")


@dataclass(frozen=True)
class Served:
    """A server that listens."""

    process: subprocess.Popen[str]
    port: int

    def ask(self, path: str, body: Any) -> tuple[int, bytes]:
        """Status and content of a POST on a connection of its own; bytes are sent as they are."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)
        try:
            content = body if isinstance(body, bytes) else json.dumps(body).encode("utf-8")
            connection.request("POST", path, content)
            reply = connection.getresponse()
            return reply.status, reply.read()
        finally:
            connection.close()

    def json(self, path: str, body: Any) -> Any:
        """What a request that must succeed is answered."""
        status, content = self.ask(path, body)
        if status != 200:
            raise SystemExit(f"{path}: {status} {content.decode()[:500]}")
        return json.loads(content)

    def resident_bytes(self) -> int:
        """Memory that the process has (Linux)."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")


@contextlib.contextmanager
def served(model: Path, *options: str) -> Iterator[Served]:
    """A server while the block runs; it must end by Ctrl-C with status 0."""
    command = [sys.executable, "-m", "quantlab.cli", "serve", str(model), "--port", "0", *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if match := ADDRESS.search(line):
                break
            print(line, end="", file=sys.stderr)
        else:
            raise SystemExit("the server does not start")
        log = subprocess.Popen(["cat"], stdin=process.stderr, stdout=subprocess.DEVNULL)  # a full pipe would stop it
        try:
            yield Served(process, int(match[1]))
            end(process)
        finally:
            process.kill()
            log.wait()


def end(process: subprocess.Popen[str]) -> None:
    """Ctrl-C."""
    process.send_signal(signal.SIGINT)
    if process.wait(60) != 0:
        raise SystemExit(f"the server ended with {process.returncode}")
