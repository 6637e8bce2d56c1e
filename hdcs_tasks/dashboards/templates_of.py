"""Templates of two folders, ours before Flower's, and our tabs in Flower's own navigation bar."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import flower.urls
from tornado import template

from hdcs_tasks.errors import HdcsError

HERE = Path(__file__).parent / "templates"
NAVBAR = "navbar.html"
FIRST_LIST = '<ul class="app-nav navbar-nav">'
TABS = (("data-center", "Data center"), ("desktops", "Desktops"), ("operations", "Operations"))


class TwoFolders(template.BaseLoader):
    """A template of ours where there is one, else Flower's."""

    def __init__(self, flowers: Path) -> None:
        super().__init__()
        self._folders = (HERE, flowers)

    def resolve_path(self, name: str, parent_path: str | None = None) -> str:
        return name

    def _create_template(self, name: str) -> template.Template:
        file = next((folder / name for folder in self._folders if (folder / name).exists()), None)
        if file is None:
            raise HdcsError(f"there is no template {name}")
        text = file.read_text()
        return template.Template(with_tabs(text) if name == NAVBAR else text, name=name, loader=self)


def with_tabs(navbar: str) -> str:
    """Flower's navigation bar with our tabs before its own. Raises HdcsError where its shape has changed."""
    if navbar.count(FIRST_LIST) != 1:
        raise HdcsError("Flower's navigation bar is not as it was", next="Install the version of Flower that is locked")
    return navbar.replace(FIRST_LIST, FIRST_LIST + "".join(_tab(name, title) for name, title in TABS))


def _tab(name: str, title: str) -> str:
    active = f"{{% if active_tab == '{name}' %}}"
    return (
        f'<li class="nav-item"><a class="nav-link{active} active{{% end %}}" href="{{{{ reverse_url(\'{name}\') }}}}"'
        f'{active} aria-current="page"{{% end %}}>{title}</a></li>'
    )


def install() -> None:
    settings: dict[str, Any] = flower.urls.settings
    loader = TwoFolders(Path(settings["template_path"]))
    loader.load(NAVBAR)  # a Flower of another shape is refused now, not at the first visit
    settings["template_loader"] = loader
