"""The service interface: everything HDCS does, for Python callers on the control plane.

    from hdcs_tasks import Cloud
    cloud = Cloud.from_env()
    cloud.vms.clone("mini", name="desk-{:03d}", count=30, start=True).result(timeout_s=600)

A call returns at once with an ``Operation``; the work is done by the server nodes' workers.
"""

from __future__ import annotations

import getpass
import socket
from collections.abc import Mapping, Sequence
from typing import Any

from hdcs_tasks.app import make_app
from hdcs_tasks.config import Settings, settings
from hdcs_tasks.handles.alarms import Alarms
from hdcs_tasks.handles.backups import Backups, Policies
from hdcs_tasks.handles.idle import Idle
from hdcs_tasks.handles.images import Images
from hdcs_tasks.handles.operation import ENDED as ENDED
from hdcs_tasks.handles.operation import Operation as Operation
from hdcs_tasks.handles.operation import Operations, View
from hdcs_tasks.handles.operation import Plan as Plan
from hdcs_tasks.handles.overview import Overview
from hdcs_tasks.handles.pools import DomainNodes, Profiles, ServerNodes
from hdcs_tasks.handles.quotas import Quotas
from hdcs_tasks.handles.storms import Storms, WarmPools
from hdcs_tasks.handles.vms import Vm as Vm
from hdcs_tasks.handles.vms import Vms
from hdcs_tasks.monitor import control as monitor_control
from hdcs_tasks.monitor import control_doctor, control_usage
from hdcs_tasks.operations.control import Asked, Control
from hdcs_tasks.operations.line import line
from hdcs_tasks.pool import capacity as pool_capacity
from hdcs_tasks.store.migrate import upgrade
from hdcs_tasks.vm import control_rebalance
from hdcs_tasks.vm import control_replan as control_replan  # registers how a refused clone is planned again


class Cloud:
    """The data center, from the control plane."""

    def __init__(self, control: Control, by: str = "") -> None:
        self.control = control
        self.by = by = by or f"{getpass.getuser()}@{socket.gethostname()}"
        self.vms = Vms(control, by)
        self.images = Images(control, by)
        self.backups = Backups(control, by)
        self.policies = Policies(control, by)
        self.profiles = Profiles(control, by)
        self.domain_nodes = DomainNodes(control, by)
        self.server_nodes = ServerNodes(control, by)
        self.storms = Storms(control, by)
        self.warm_pools = WarmPools(control, by)
        self.operations = Operations(control, by)
        self.alarms = Alarms(control, by)
        self.quotas = Quotas(control, by)
        self.overview = Overview(control, by)
        self.idle = Idle(control, by)

    @classmethod
    def from_env(cls) -> Cloud:
        """A cloud by the ``HDCS_*`` environment variables."""
        return cls.from_settings(settings())

    @classmethod
    def from_settings(cls, config: Settings) -> Cloud:
        """A cloud by these settings; brings the database's schema up to date."""
        upgrade(config.database_url)
        return cls(Control.from_settings(config, make_app(config)))

    def capacity(
        self, profile: str | None = None, *, without: Sequence[str] = (), with_nodes: Sequence[Mapping[str, Any]] = (),
        mix: Mapping[str, int] | None = None, image: str | None = None,
    ) -> View:  # fmt: skip
        """How many more VMs of a profile fit: per server node, per domain node and in all, also with one server node
        kept free (``n_plus_one``); as things are, or as ``pool.capacity`` tells the what-ifs. ``image``: whose disk
        counts (None: the largest)."""
        return pool_capacity.capacity(
            self.control, profile, without=without, with_nodes=with_nodes, mix=mix, image=image
        )  # fmt: skip

    def rebalance(
        self, domain_node: str, *, max_moves: int = control_rebalance.MOVES,
        concurrency: int = control_rebalance.AT_ONCE, dry_run: bool = False, idempotency_key: str | None = None,
        reason: str = "",
    ) -> Any:  # fmt: skip
        """Even a pool's load by live migrations, ``concurrency`` at once; an Operation, or a Plan with ``dry_run``."""
        if dry_run:
            return Plan(control_rebalance.plan(self.control, domain_node, max_moves=max_moves))
        asked = Asked(by=self.by, reason=reason, idempotency_key=idempotency_key)
        opened = control_rebalance.rebalance(
            self.control, domain_node, asked, max_moves=max_moves, concurrency=concurrency
        )
        return Operation(self.control, opened.id)

    def line(self, domain_node: str | None = None) -> list[View]:
        """Who waits to start, in order: ``{domain_node, place, of, subject, kind, waits_for, why, since_at, eta_s,
        operation}``."""
        return line(self.control, domain_node)

    def events(self, limit: int = 50) -> list[View]:
        return monitor_control.list_events(self.control, limit)

    def usage(self, **filters: Any) -> View:
        """What was used and what it costs: ``{start, end, by, rows}``; filters: owner, tag, vm, start, end (datetimes),
        month ("2026-11"), by ("vm", "owner", "tag"). Default: every VM, this month until now."""
        return control_usage.usage(self.control, **filters)

    def doctor(self, repair: bool = False) -> list[View]:
        """Checks of the control plane, each ``{check, ok, message, next, repaired}``; with ``repair`` what can be
        mended is mended, and ``repaired`` says how."""
        return control_doctor.doctor(self.control, repair=repair)
