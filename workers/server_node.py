"""One per server node: joins its domain node's pool and does the work. Holds no database credentials.

    \b
    python -m workers.server_node --domain-node east --name node1 --ip 10.0.0.11 --token-file /etc/hdcs/token

It runs two Celery workers: ``east@node1`` (prefork: long work of the domain node's queue and of its own) and
``east.quick@node1`` (threads: short commands, so that a stop never waits behind a backup).
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import click

from hdcs_tasks.config import settings
from hdcs_tasks.errors import HdcsError
from hdcs_tasks.logs import configure_logging, logger
from hdcs_tasks.pool.identity import joined_file
from hdcs_tasks.routing import check_name

log = logger(__name__)

ROLES = ("long", "quick")
RESTART_AFTER_S = 1.0
HAND_BACK_S = 20.0
"""How long handing back may take: a libvirt job is aborted, a child process ended, what is half made removed."""
REFUSED = 78
"""Exit code of a worker that was refused: EX_CONFIG of sysexits.h. Restarting it would not help."""


@click.command(help=__doc__)
@click.option("--domain-node", envvar="HDCS_DOMAIN_NODE", required=True, help="Domain node to join.")
@click.option("--name", envvar="HDCS_SERVER_NODE", required=True, help="This server's name.")
@click.option("--ip", envvar="HDCS_SERVER_NODE_IP", required=True, help="Address the other server nodes reach it by.")
@click.option("--token-file", envvar="HDCS_JOIN_TOKEN_FILE", type=click.Path(path_type=Path), required=True,
              help="File that holds the domain node's join token.")  # fmt: skip
@click.option("--role", type=click.Choice(ROLES), hidden=True, help="Run one of the two workers in this process.")
def main(domain_node: str, name: str, ip: str, token_file: Path, role: str | None) -> None:
    os.environ.update(
        HDCS_DOMAIN_NODE=domain_node, HDCS_SERVER_NODE=name, HDCS_SERVER_NODE_IP=ip,
        HDCS_JOIN_TOKEN_FILE=str(token_file),
    )  # fmt: skip
    settings.cache_clear()
    configure_logging(settings())
    try:
        check_name("domain node", domain_node)
        check_name("server node", name)
    except HdcsError as error:
        click.echo(str(error), err=True)
        sys.exit(error.exit_code)
    if role is None:
        sys.exit(Supervisor().run())
    from workers.node_worker import run_long, run_quick

    (run_long if role == "long" else run_quick)()


class Supervisor:
    """Keeps both workers running; ends with them. A refused join ends everything with exit code 78.

    The quick one joins, the long one takes no work before that. The process of the long one must never open libvirt:
    its pool's children are forked from it, also later, when one has died.
    """

    def __init__(self) -> None:
        self._joined = joined_file(settings())
        self._hand_back = settings().stopping_file
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self._stop_began: float | None = None

    def run(self) -> int:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self._stop())
        self._joined.unlink(missing_ok=True)
        self._hand_back.unlink(missing_ok=True)
        for role in ROLES:
            self._start(role)
        while True:
            time.sleep(0.1)
            code = self._look()
            if code is not None:
                return code

    def _start(self, role: str) -> None:
        argv = [sys.executable, "-m", "workers.server_node", "--role", role]
        self._children[role] = subprocess.Popen(argv, preexec_fn=_die_with_parent)

    def _look(self) -> int | None:
        """Restart what died; the exit code once all has ended."""
        for role, child in list(self._children.items()):
            code = child.poll()
            if code is None:
                continue
            del self._children[role]
            if code == REFUSED:
                self._stop()
                self._wait()
                return REFUSED
            if self._stop_began is None:
                log.error("worker ended; starting it again", role=role, code=code)
                time.sleep(RESTART_AFTER_S)
                self._start(role)
        if self._stop_began is None:
            return None
        self._press(time.monotonic() - self._stop_began)
        return None if self._children else 0

    def _stop(self) -> None:
        """Both take no more work; what runs has ``stop_timeout_s`` to end by itself."""
        if self._stop_began is None:
            self._stop_began = time.monotonic()
            for child in self._children.values():
                child.terminate()

    def _press(self, waited_s: float) -> None:
        """What still runs after its time is handed back; what does not even do that dies, and its lease runs out."""
        patience_s = settings().stop_timeout_s
        if waited_s > patience_s and self._children and not self._hand_back.exists():
            log.warning("work is handed back", after_s=patience_s, workers=sorted(self._children))
            self._hand_back.parent.mkdir(parents=True, exist_ok=True)
            self._hand_back.touch()
        if waited_s > patience_s + HAND_BACK_S:
            for role, child in self._children.items():
                log.error("worker does not end; killing it", role=role)
                child.kill()

    def _wait(self) -> None:
        for child in self._children.values():
            child.wait()


def _die_with_parent() -> None:
    """Both workers get SIGTERM when the supervisor dies, however it dies (prctl(2), PR_SET_PDEATHSIG = 1)."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)


if __name__ == "__main__":
    main()
