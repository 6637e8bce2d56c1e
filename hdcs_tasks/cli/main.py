"""The ``hdcs`` command: its nouns, and the one place where an error becomes a message and an exit code.

Exit codes: 0 done, 1 failed, 2 usage, 3 not found, 4 conflict, 5 no capacity, 6 unreachable, 7 wait timed out (the
operation goes on), 130 detached.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from hdcs_tasks.cli import (
    admin,
    alarm,
    backup,
    domain,
    idle,
    image,
    node,
    op,
    policy,
    pool,
    profile,
    storm,
    usage,
    vm,
    warm,
)
from hdcs_tasks.cli.failures import as_hdcs_error
from hdcs_tasks.cli.options import Face
from hdcs_tasks.cli.output import message
from hdcs_tasks.errors import NotFound

if TYPE_CHECKING:
    from hdcs_tasks.cloud import Cloud
    from hdcs_tasks.config import Settings

DETACHED = 130


def version() -> str:
    """The installed version; in a checkout that is not installed, the one pyproject.toml says."""
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed

    try:
        return installed("hdcs-tasks")
    except PackageNotFoundError:
        import tomllib
        from pathlib import Path

        text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
        return str(tomllib.loads(text)["project"]["version"])


def _print_version(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted and not ctx.resilient_parsing:
        click.echo(f"hdcs {version()}")
        ctx.exit()


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_print_version,
              help="Print the version and exit.")  # fmt: skip
def cli() -> None:
    """HDCS runs virtual desktops on a fleet of KVM/QEMU servers.

    Data goes to stdout, messages to stderr. A command that opens an operation waits for its end unless --no-wait is
    given; Ctrl-C detaches, and the operation goes on.

    \b
    Examples:
      hdcs vm clone mini --name 'desk-{:03d}' --count 30 --start
      hdcs vm list -f json
      hdcs op watch 1f3a9c04
      hdcs node drain node2
      hdcs pool capacity small

    \b
    Exit codes: 0 done, 1 failed, 2 usage, 3 not found, 4 conflict, 5 no capacity, 6 unreachable,
    7 wait timed out (the operation goes on), 130 detached.
    """


for _noun in (node.node, domain.domain, vm.vm, image.image, profile.profile, backup.backup, policy.policy, idle.idle,
              op.op, pool.pool, alarm.alarm, usage.usage, usage.quota, storm.storm, warm.warm,
              admin.db, admin.doctor, admin.dashboard):  # fmt: skip
    cli.add_command(_noun)


def connect() -> Cloud:
    """The cloud by the environment. Only warnings are logged, unless HDCS_LOG_LEVEL says otherwise."""
    from hdcs_tasks.config import settings

    config = settings()
    from hdcs_tasks.logs import configure_logging

    quiet = {} if "HDCS_LOG_LEVEL" in os.environ or debugging() else {"log_level": "WARNING"}
    configure_logging(config.model_copy(update=quiet))
    _is_record_there(config)
    from hdcs_tasks.cloud import Cloud

    return Cloud.from_settings(config)


def _is_record_there(config: Settings) -> None:
    """Where nothing says which record is meant, none is made in whatever folder this is: NotFound."""
    scheme, _, path = config.database_url.partition(":///")
    if "database_url" in config.model_fields_set or scheme != "sqlite" or Path(path).exists():
        return
    raise NotFound(
        f"there is no record here ({Path(path).absolute()}), and HDCS_DATABASE_URL does not say where it is",
        next="Set HDCS_DATABASE_URL and HDCS_REDIS_URL as the control worker has them (/etc/hdcs/control.env); for a "
        "new record name its file: HDCS_DATABASE_URL=sqlite:////var/lib/hdcs/hdcs.sqlite",
    )


def debugging() -> bool:
    return os.environ.get("HDCS_DEBUG", "") not in ("", "0")


def run(args: Sequence[str], connect: Callable[[], Cloud] = connect) -> int:
    """Run one command and return its exit code; prints every error on stderr, a traceback only with HDCS_DEBUG=1."""
    try:
        code = cli.main(list(args), prog_name="hdcs", standalone_mode=False, obj=Face(connect))
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        message("stopped; what was asked for before goes on (see: hdcs op list --live)")
        return DETACHED
    except Exception as error:  # noqa: BLE001 - the one place where an error ends: as a sentence and an exit code
        if debugging():
            traceback.print_exc()
        known = as_hdcs_error(error)
        # One error, one line: a driver's message may have several, and scripts read lines.
        message(" ".join(str(known).split()).replace("?. ", "? "))
        return known.exit_code


def main() -> None:
    """The console script."""
    sys.exit(run(sys.argv[1:]))
