"""The exporter: /metrics for Prometheus, and the watch over the watchers. Holds the database.

    hdcs-metrics        (or: python -m workers.metrics)

Listens on HDCS_METRICS_ADDRESS:HDCS_METRICS_PORT, which nothing guards: loopback unless said otherwise. When the sweep
that judges alarms is late itself (no beat, no control worker), this process raises that alarm and sends its notices.
"""

from __future__ import annotations

import signal
import sys
import threading
import time

import click
from prometheus_client import CollectorRegistry, GCCollector, ProcessCollector, start_http_server

from hdcs_tasks.app import app
from hdcs_tasks.config import settings
from hdcs_tasks.errors import HdcsError
from hdcs_tasks.logs import configure_logging, logger
from hdcs_tasks.monitor import control_alarms, control_notices, control_signals
from hdcs_tasks.monitor.control_metrics import HdcsCollector
from hdcs_tasks.operations.control import Control

log = logger(__name__)


def registry_of(control: Control) -> CollectorRegistry:
    registry = CollectorRegistry(auto_describe=False)
    registry.register(HdcsCollector(control))
    ProcessCollector(registry=registry)
    GCCollector(registry=registry)
    return registry


class Watchdog:
    """Looks whether the sweeps run, as long as the sweep that would say so does not."""

    def __init__(self, control: Control) -> None:
        self._control = control
        self._began_s = time.monotonic()

    def look(self) -> bool:
        """Whether the alarm sweep is late; then its alarm is raised and told."""
        config = self._control.settings
        wanted = {"alarms": config.alarm.period_s}
        known = self._control.reservations.samples.sweeps()
        periods = wanted | {name: told["period_s"] for name, told in known.items()}
        found = list(control_signals.sweeps(self._control, periods, time.monotonic() - self._began_s))
        if not any(signal.subject == "alarms" and signal.value for signal in found):
            return False
        control_alarms.settle(self._control, ["sweep_late"], found)
        control_notices.notice_sweep(self._control)
        return True


@click.command(help=__doc__)
def main() -> None:
    config = settings()
    configure_logging(config)
    control = Control.from_settings(config, app)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    try:
        server, _ = start_http_server(config.metrics.port, config.metrics.address, registry_of(control))
    except OSError as error:
        click.echo(f"cannot listen on {config.metrics.address}:{config.metrics.port}: {error.strerror}", err=True)
        sys.exit(1)
    log.info("metrics", address=config.metrics.address, port=server.server_port)
    watchdog = Watchdog(control)
    while not stop.wait(config.alarm.period_s):
        try:
            if watchdog.look():
                log.error("sweeps are late: do beat and a control worker run?")
        except HdcsError as error:
            log.warning("sweeps not looked at", error=str(error))
    server.shutdown()
    control.store.dispose()


if __name__ == "__main__":
    main()
