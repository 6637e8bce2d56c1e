"""How to use a data center that was left running: said once, and kept as a small script."""

from __future__ import annotations

import shlex

from rich.console import Console

from deploy.lab.center import CHECKOUT, Center


def print_how_to_use(center: Center, console: Console) -> None:
    """Write ``hdcs-env`` beside the lab's logs and print how to look, use and stop."""
    env = center.lab.env() | center.env
    script = center.lab.root / "hdcs-env"
    lines = [f"export {key}={shlex.quote(value)}" for key, value in sorted(env.items()) if key.startswith("HDCS_")]
    script.write_text("\n".join(lines) + "\n")
    script.chmod(0o600)
    user, _, password = center.flower_auth.partition(":")
    relative = script.relative_to(CHECKOUT) if script.is_relative_to(CHECKOUT) else script
    console.print(f"""
The data center runs on. In this checkout:

  [bold]. {relative}[/]                         # the settings of this data center
  [bold]./deploy/run hdcs vm list[/]            # then any hdcs command, for example
  [bold]./deploy/run hdcs node list[/]
  [bold]./deploy/run hdcs vm clone mini --name lab-{{:02d}} --count 2 --profile tiny --start[/]

  Flower:  http://127.0.0.1:{center.flower_port}   user {user}, password {password}
  Logs:    {center.lab.root / "logs"}

Stop it and remove everything:  [bold]./deploy/run python -m deploy.lab --name {center.lab.name} down[/]
""", soft_wrap=True)  # fmt: skip
