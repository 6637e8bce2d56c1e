"""The pages say what is there: links lead somewhere, commands and settings they name exist."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest

from hdcs_tasks.cli.main import cli
from hdcs_tasks.config import AlarmSettings, CapacitySettings, KeepSettings, MetricsSettings, RateSettings, Settings

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
UNITS = [*sorted((ROOT / "deploy" / "systemd").glob("*")), ROOT / "deploy" / "docker-compose.yaml"]
CODE = "".join(
    path.read_text()
    for folder in ("hdcs_tasks", "workers", "deploy")
    for path in (ROOT / folder).rglob("*")
    if path.is_file() and path.suffix in ("", ".py") and path not in UNITS and "__pycache__" not in path.parts
)
SETTINGS = {f"HDCS_{name.upper()}" for name in Settings.model_fields} | {
    f"{part.model_config['env_prefix']}{name.upper()}"
    for part in (AlarmSettings, CapacitySettings, KeepSettings, MetricsSettings, RateSettings)
    for name in part.model_fields
}


def anchors(page: Path) -> set[str]:
    """The fragments a page's headings give, as they are made for Markdown."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        path, _, fragment = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.is_file(), link
        assert not fragment or fragment in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_exist(page: Path) -> None:
    context = click.Context(cli)
    for noun, verb in re.findall(r"(?:^\$ |`|run |^)hdcs ([a-z]+)(?: ([a-z]+))?", page.read_text(), re.MULTILINE):
        command = cli.get_command(context, noun)
        assert command is not None, f"hdcs {noun}"
        if isinstance(command, click.Group) and verb:
            assert command.get_command(context, verb) is not None, f"hdcs {noun} {verb}"


@pytest.mark.parametrize("page", [*PAGES, *UNITS], ids=lambda page: page.name)
def test_settings_exist(page: Path) -> None:
    """A variable that only the compose file itself reads is one too: it stands there as ``${NAME``."""
    text = page.read_text()
    for name in set(re.findall(r"\b(?:HDCS|FLOWER)_[A-Z_]*[A-Z]\b(?!_)", text)):
        known = name in SETTINGS or re.search(rf"\b{name}\b", CODE) or f"${{{name}" in text
        assert known, f"{page.name} names {name}, which nothing reads"
