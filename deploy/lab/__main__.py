"""``python -m deploy.lab``: start, look at, break and end a lab by hand."""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys

from deploy.lab.lab import SRV, Lab, default_root
from deploy.lab.space import start_time, wait_until
from hdcs_tasks.errors import HdcsError


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m deploy.lab", description="A real data center of namespaces")
    parser.add_argument("--name", default="lab", help="name of the lab (default: lab); its folder is .lab/NAME")
    commands = parser.add_subparsers(dest="command", required=True)
    up = commands.add_parser("up", help="start it (an earlier one of this name is ended first)")
    up.add_argument("--net", default="10.99.0", help="first three numbers of its /24 (default: 10.99.0)")
    commands.add_parser("down", help="end it; nothing is left")
    commands.add_parser("status", help="what runs")
    env = commands.add_parser("env", help="settings for a shell: eval $(python -m deploy.lab env)")
    env.add_argument("node", nargs="?")
    execute = commands.add_parser("exec", help="run a command on a server node")
    execute.add_argument("node")
    execute.add_argument("argv", nargs=argparse.REMAINDER)
    for name, text in (
        ("cut", "pull a server node's network cable"), ("mend", "put it back"), ("power-off", "cut its power"),
        ("power-on", "start it again"), ("freeze", "hang it"), ("thaw", "let it go on"),
    ):  # fmt: skip
        commands.add_parser(name, help=text).add_argument("node")
    worker = commands.add_parser(
        "worker", help="stop, start or restart a server node's node program; its guests run on"
    )
    worker.add_argument("node")
    worker.add_argument("what", choices=["stop", "start", "restart"])
    return parser


def _status(lab: Lab) -> None:
    print(f"lab {lab.name} in {lab.root}, Redis {'answers' if lab.redis.answers() else 'does not answer'}")
    for node in lab.nodes:
        space = lab.space(node)
        what = f"on, pid {space.pid}, {len(space.processes())} processes" if space.on else "off"
        print(f"{lab.domain_node(node)}  {node}  {lab.ip(node)}  {what}")


def _worker(lab: Lab, node: str, what: str) -> None:
    """What systemd does on a real server. It is started with this shell's ``HDCS_*`` settings beside the lab's own."""
    space = lab.space(node)
    if what != "start":
        found = [pid for pid, line in space.processes() if line.endswith("-m workers.server_node")]
        for pid in found:
            os.kill(pid, signal.SIGTERM)
        wait_until(lambda: not any(map(start_time, found)), 60, f"the node program of {node} does not end", space.tail)
    if what != "stop":
        own = {key: value for key, value in os.environ.items() if key.startswith("HDCS_") and key not in lab.env(None)}
        lab.spawn(node, [str(SRV / "agent" / "hdcs-node")], own, lab.log(f"{node}-worker"))


def _act(args: argparse.Namespace) -> int:
    root = default_root(args.name)
    if args.command == "up":
        lab = Lab(args.name, root, args.net)
        print(f"lab {lab.name} up in {lab.up():.1f} s; end it with: python -m deploy.lab --name {lab.name} down")
        return 0
    if args.command == "down":
        Lab(args.name, root).down()
        return 0
    lab = Lab.load(root)
    if args.command == "status":
        _status(lab)
    elif args.command == "env":
        for key, value in lab.env(args.node).items():
            print(f"export {key}={shlex.quote(value)}")
    elif args.command == "exec":
        argv = lab.space(args.node).enter(args.argv or ["sh"])
        os.execvpe(argv[0], argv, dict(os.environ) | lab.env(args.node))
    elif args.command == "worker":
        _worker(lab, args.node, args.what)
    else:
        getattr(lab, args.command.replace("-", "_"))(args.node)
    return 0


def main() -> int:
    try:
        return _act(_parser().parse_args())
    except HdcsError as error:
        print(f"lab: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
