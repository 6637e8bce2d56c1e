"""Settings: every ``HDCS_*`` environment variable, its default and its unit. One object, read once."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field
from pydantic_settings import BaseSettings, SettingsConfigDict


class CapacitySettings(BaseSettings):
    """How many VMs a server node takes (formula: ``pool/rules.py``)."""

    model_config = SettingsConfigDict(env_prefix="HDCS_CAPACITY_", extra="ignore")

    memory_overcommit: float = Field(1.0, gt=0, description="Guest memory promised per MiB of host memory")
    host_reserve_mib: int = Field(2048, ge=0, description="Host memory never given to guests")
    vcpu_overcommit: float = Field(8.0, gt=0, description="vCPUs promised per effective core (Horizon plans 8 to 10)")
    ht_credit: float = Field(0.25, ge=0, le=1, description="What a second hardware thread is worth, in cores")
    target_utilisation: float = Field(0.8, gt=0, le=1, description="Share of the host's MHz to plan with")
    mhz_per_vcpu: int = Field(250, ge=1, description="Average MHz a desktop's vCPU draws")
    overhead_mib: int = Field(218, ge=0, description="Host memory per VM beside the guest's own")
    overhead_per_vcpu_mib: int = Field(8, ge=0, description="More of it for each vCPU")
    overhead_graphics_mib: int = Field(16, ge=0, description="More of it for each graphics device")
    overhead_ratio: float = Field(0.002, ge=0, description="Page tables and the like, as a share of guest memory")
    disk_overcommit: float = Field(2.0, gt=0, description="Virtual disk bytes promised per byte of storage")


class AlarmSettings(BaseSettings):
    """When an alarm is raised and whom it reaches (``docs/monitoring.md``)."""

    model_config = SettingsConfigDict(env_prefix="HDCS_ALARM_", extra="ignore")

    urls_file: Path | None = Field(None, description="File of apprise URLs alarms are sent to, one per line")
    period_s: float = Field(15, gt=0, description="Period of the sweeps that judge alarms and send notices")
    for_s: float = Field(120, ge=0, description="How long load, queues and lost spare room must last before an alarm")
    clear_for_s: float = Field(120, ge=0, description="How long it must be well before an alarm is cleared")
    hysteresis_percent: float = Field(5, ge=0, description="An alarm at a share of P is cleared below P less this")
    patience_s: float = Field(30, ge=0, description="A sweep or sample is late after three periods and this")
    cpu_percent: float = Field(90, gt=0, description="Busy CPU of a server node")
    memory_percent: float = Field(92, gt=0, description="Memory in use of a server node")
    storage_percent: float = Field(85, gt=0, description="Storage in use of a domain node")
    capacity_percent: float = Field(90, gt=0, description="Memory or vCPUs promised of a domain node")
    ports_percent: float = Field(90, gt=0, description="Console ports in use of a domain node")
    ips_percent: float = Field(90, gt=0, description="IPs in use of a server node")
    queue_length: float = Field(500, gt=0, description="Messages that wait in one queue")
    clock_skew_s: float = Field(5, gt=0, description="Difference of a clock from that of Redis")
    backup_overdue_s: float = Field(14400, gt=0, description="A policy's run that VMs wait for still, after its moment")
    unproven_days: int = Field(30, ge=0, description="Backups this old, none of them ever proven; 0: never an alarm")


class EarlierRates(BaseModel):
    """Prices that held before ``until``; the fields as ``RateSettings`` has them."""

    model_config = ConfigDict(extra="forbid")

    until: AwareDatetime
    vcpu_hour: float = Field(0, ge=0)
    memory_gib_hour: float = Field(0, ge=0)
    disk_gib_month: float = Field(0, ge=0)
    backup_gib_month: float = Field(0, ge=0)
    console_hour: float = Field(0, ge=0)


class RateSettings(BaseSettings):
    """What use costs, for statements (``hdcs usage``). A month is 30 days here."""

    model_config = SettingsConfigDict(env_prefix="HDCS_RATES_", extra="ignore")

    currency: str = Field("", description="Printed beside each amount")
    vcpu_hour: float = Field(0, ge=0, description="One vCPU of a running VM for an hour")
    memory_gib_hour: float = Field(0, ge=0, description="One GiB of memory of a running or suspended VM for an hour")
    disk_gib_month: float = Field(0, ge=0, description="One GiB of virtual disk for 30 days")
    backup_gib_month: float = Field(0, ge=0, description="One GiB of backups for 30 days")
    console_hour: float = Field(0, ge=0, description="One hour with a console client connected")
    earlier: tuple[EarlierRates, ...] = Field(
        (), description='Prices before a change, as JSON: [{"until": "2026-11-15T00:00:00Z", "vcpu_hour": 0.02}]'
    )


class MetricsSettings(BaseSettings):
    """What the exporter serves, and where (``workers.metrics``)."""

    model_config = SettingsConfigDict(env_prefix="HDCS_METRICS_", extra="ignore")

    address: str = Field("127.0.0.1", description="Address the exporter listens on; nothing guards /metrics")
    port: int = Field(9740, ge=0, le=65535, description="Its port")
    vms_most: int = Field(200, ge=0, description="Metrics of single VMs, with this many VMs or fewer; 0: never")
    cache_s: float = Field(5, ge=0, description="Asked again within this time, it answers with what it last read")


class KeepSettings(BaseSettings):
    """How long what has ended stays in the record; 0: for ever."""

    model_config = SettingsConfigDict(env_prefix="HDCS_KEEP_", extra="ignore")

    period_s: float = Field(3600, gt=0, description="Period of the sweep that forgets")
    operations_days: int = Field(90, ge=0, description="Ended operations, deleted VMs and deleted backups, as records")
    events_days: int = Field(90, ge=0, description="Events")
    alarms_days: int = Field(400, ge=0, description="Cleared alarms and their notices")
    usage_days: int = Field(1100, ge=0, description="Use that statements are made of; 3 years")


class Settings(BaseSettings):
    """All settings of HDCS. A server node reads the same class and needs no database_url."""

    model_config = SettingsConfigDict(env_prefix="HDCS_", extra="ignore")

    # services
    redis_url: str = Field("redis://127.0.0.1:6379/0", description="Broker, reservations and leases")
    database_url: str = Field("sqlite:///hdcs.sqlite", description="SQLAlchemy URL; control plane only")
    key_prefix: str = Field("hdcs:", description="Prefix of every Redis key")

    # timing
    lease_ttl_s: float = Field(30, gt=0, description="Life of a server node's or executor's lease without renewal")
    sweep_s: float = Field(5, gt=0, description="Period of the recovery and lease sweeps")
    step_deadline_s: float = Field(7200, gt=0, description="Longest time one attempt of a step may hold its lease")
    attempts_max: int = Field(5, ge=1, description="Attempts before a step ends as failed (needs operator)")
    park_deadline_s: float = Field(3600, gt=0, description="How long an operation waits for capacity before it fails")

    # network
    supernet: str = Field("10.128.0.0/12", description="Server nodes' virtual subnets are cut out of this")
    subnet_prefix: int = Field(22, ge=16, le=29, description="Prefix length of one server node's subnet, in bits")
    network_name: str = Field("hdcs", description="The libvirt network's name on every server node")
    network_forward: Literal["open", "nat", "isolated"] = Field(
        "open", description="How guests reach the outside; open leaves NAT and firewalling to the host"
    )
    dhcp_lease_s: int = Field(3600, ge=120, description="DHCP lease time; an IP cools this long before it is reused")
    mac_prefix: str = Field(
        "52:54:00", pattern=r"^[0-9a-f]{2}(:[0-9a-f]{2}){2}$", description="First half of VMs' MACs"
    )

    # console ports
    port_first: int = Field(20000, ge=1024, le=65535, description="Domain nodes' port ranges are cut out of these")
    port_last: int = Field(59999, ge=1024, le=65535, description="The last of them")
    ports_per_domain_node: int = Field(4000, ge=1, description="Size of each domain node's range")
    port_cooling_s: float = Field(120, ge=0, description="Time between a VM's stop and the reuse of its port")

    # server node
    domain_node: str = Field("", description="This server's domain node (server node program)")
    server_node: str = Field("", description="This server's name (server node program)")
    stop_timeout_s: float = Field(
        30, gt=0, description="Time running work has when a server node is told to stop, before it is handed back"
    )
    server_node_ip: str = Field("", description="Address the other nodes reach this server by")
    join_token_file: Path | None = Field(None, description="File that holds the domain node's join token")
    libvirt_uri: str = Field("qemu:///system", description="This server's libvirt")
    storage_root: Path = Field(Path("/srv/hdcs"), description="Mount point of the domain node's shared storage")
    import_paths: str = Field(
        "", description="Folders of this server, beside the storage's import/, that images may come from; ':' between"
    )
    export_paths: str = Field(
        "", description="Folders of this server, beside the storage's export/, that images may go to; ':' between"
    )
    image_max_gib: int = Field(4096, ge=1, description="The largest virtual disk an imported image may have")
    state_dir: Path = Field(Path("/var/lib/hdcs"), description="Local: outcome spool, locks")
    virt_type: Literal["auto", "kvm", "qemu"] = Field("auto", description="auto probes KVM by booting on it")
    console_listen: str = Field("0.0.0.0", description="Address the guests' consoles listen on")
    migrate_unsafe: bool = Field(
        False, description="The storage is one file system that libvirt takes for local (bind mount)"
    )
    migrate_tls: bool = Field(
        False, description="Server nodes reach each other's libvirt, memory and disks over TLS (certificates: moves.md)"
    )
    migrate_tls_pki: str = Field(
        "",
        description="Folder of the certificates for that: cacert.pem, clientcert.pem, clientkey.pem (empty: libvirt's)",
    )
    node_concurrency: int = Field(2, ge=1, description="Long steps at once on one server node")
    quick_concurrency: int = Field(4, ge=1, description="Short commands at once on one server node")
    host_memory_mib: int = Field(0, ge=0, description="Overrides the memory libvirt reports (many nodes on one host)")

    # placement
    placement: Literal["spread", "pack"] = Field(
        "spread", description="Layer two: spread for even load and fast starts, pack to keep room for big VMs"
    )

    boot_slot_s: float = Field(
        90, gt=0, description="How long a boot counts as a start under way if its guest agent does not answer earlier"
    )

    starts_max: int = Field(
        64, ge=0, description="Starts under way at once on a server node while it is calm (0: any); or: hdcs node set"
    )
    starts_min: int = Field(8, ge=0, description="As few as measured load may lower that to (0: it stays)")

    # monitoring
    sample_s: float = Field(10, gt=0, description="Period of the monitoring sweep")
    samples_kept: int = Field(
        30, ge=2, le=1000, description="Samples kept of each VM and server node, for so many periods"
    )

    # by the calendar
    keys_dir: Path = Field(
        Path("/etc/hdcs/keys"),
        description="Keys of disks and backups, one file each, mode 0600 (server node)",
    )
    key_command: str = Field(
        "",
        description="Program that prints the key it is asked for, instead of keys_dir: a secret store",
    )
    backup_key: str = Field("", description="Name of the key that new backup points are encrypted with (server node)")
    policy_sweep_s: float = Field(
        30, gt=0, description="Period of the sweeps that begin what backup policies, storms and warm pools ask for"
    )

    # logs
    log_format: Literal["auto", "json", "console"] = Field("auto", description="auto: console on a terminal, else json")
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field("INFO", description="The least that is logged")

    capacity: CapacitySettings = Field(default_factory=CapacitySettings)
    alarm: AlarmSettings = Field(default_factory=AlarmSettings)
    rates: RateSettings = Field(default_factory=RateSettings)
    metrics: MetricsSettings = Field(default_factory=MetricsSettings)
    keep: KeepSettings = Field(default_factory=KeepSettings)

    @property
    def stopping_file(self) -> Path:
        """Is there while this server node wants its work handed back: made and removed by its supervisor."""
        return self.state_dir / "stopping"


@lru_cache(maxsize=1)
def settings() -> Settings:
    """The process's settings, read from the environment once."""
    return Settings()
