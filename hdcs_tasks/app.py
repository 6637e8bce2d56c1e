"""The Celery app and its base task.

Messages are wake-ups, SQL owns the operation: early acknowledgement, no prefetch, no result for work, and recovery by a
sweep over the ledger. Redis as a broker loses and duplicates; nothing here leans on it not to.
"""

from __future__ import annotations

from typing import Any

from celery import Celery, Task
from celery.signals import setup_logging

from hdcs_tasks import broker
from hdcs_tasks.config import Settings, settings
from hdcs_tasks.logs import bound_contextvars, configure_logging, context_of


class HdcsTask(Task):  # type: ignore[type-arg]  # generic only in the type stubs
    """Base of every HDCS task: what Flower shows is set by ``describe``; work keeps no result, requests do.

    ``reads`` names the keyword arguments shown in Flower, key facts first.
    """

    abstract = True
    ignore_result = True
    reads: tuple[str, ...] = ()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run it; whatever is logged meanwhile tells what it is about."""
        request = self.request
        with bound_contextvars(**context_of(self.name, request.id, kwargs)):
            if request.called_directly:
                return super().__call__(*args, **kwargs)
            return self.run(*args, **kwargs)  # not super: it would hide the request, and with it the task's id

    def apply_async(
        self, args: Any = None, kwargs: Any = None, task_id: Any = None, producer: Any = None, link: Any = None,
        link_error: Any = None, shadow: Any = None, **options: Any,
    ) -> Any:  # fmt: skip
        options.setdefault("kwargsrepr", describe(kwargs or {}))
        options.setdefault("argsrepr", "")
        return super().apply_async(args, kwargs, task_id, producer, link, link_error, shadow, **options)


DESCRIBED_MOST = 200


def describe(kwargs: dict[str, Any]) -> str:
    """What Flower shows of a message and Celery's own log lines are read by: the key facts, one line, never a secret or
    a whole spec. The operation's id stands last and is never cut."""
    if isinstance(report := kwargs.get("report"), dict):
        kwargs = {key: report[key] for key in ("vm", "node", "operation") if report.get(key)}
    spec = kwargs.get("spec") or {}
    shown = spec.get("shown") or {k: v for k, v in kwargs.items() if isinstance(v, str | int | float) and k != "proof"}
    shown = dict(shown)
    moves = f" {shown.pop('from')} → {shown.pop('to')}" if "from" in shown and "to" in shown else ""
    operation = kwargs.get("operation")
    about = f" op={operation}" if isinstance(operation, str) else ""
    text = " ".join(f"{k}={v}" for k, v in shown.items() if k != "operation") + moves
    most = DESCRIBED_MOST - len(about)
    return ((text if len(text) <= most else text[: most - 1] + "…") + about).strip()


def celery_config(config: Settings) -> dict[str, Any]:
    """Celery's settings; the same in every client, worker, beat and Flower (measured: see docs/architecture.md)."""
    prefix = config.key_prefix
    transport = {
        "visibility_timeout": 300,
        "unacked_restore_interval": 5,
        "unacked_restore_throttle": 1,
        "socket_timeout": 10,
        "socket_connect_timeout": 5,
        "socket_keepalive": True,
        "health_check_interval": 10,
        "global_keyprefix": prefix,
        "queue_order_strategy": "priority",
    }
    return {
        "broker_url": config.redis_url,
        "result_backend": config.redis_url,
        "broker_transport_options": transport,
        "result_backend_transport_options": {"global_keyprefix": prefix},
        "result_expires": 86_400,
        "task_acks_late": False,
        "worker_disable_prefetch": True,
        "worker_prefetch_multiplier": 1,
        "task_ignore_result": True,
        "task_serializer": "json",
        "result_serializer": "json",
        "accept_content": ["json"],
        "task_track_started": True,
        "worker_send_task_events": True,
        "task_send_sent_event": True,
        "broker_connection_retry_on_startup": True,
        "broker_connection_max_retries": None,
        "worker_direct": True,
        "worker_soft_shutdown_timeout": 30,
        "worker_hijack_root_logger": False,
        "worker_cancel_long_running_tasks_on_connection_loss": False,
        "beat_sync_every": 1,
        "task_create_missing_queues": True,
        "task_default_queue": "control",
        "timezone": "UTC",
    }


def make_app(config: Settings) -> Celery:
    """A Celery app for these settings; feature tasks are registered by the worker that imports them."""
    broker.register()
    app: Celery = Celery("hdcs", task_cls=HdcsTask)
    app.conf.update(celery_config(config))
    from beat_schedule import schedule

    app.conf.beat_schedule = schedule(config)
    return app


app = make_app(settings())


@setup_logging.connect
def _logging(**_: Any) -> None:
    configure_logging(settings())
