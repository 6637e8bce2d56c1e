"""Pages and their data: each page asks ``…/data`` every few seconds, so it never reloads as a whole."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flower.urls
from flower.views import BaseHandler
from tornado.ioloop import IOLoop
from tornado.web import StaticFileHandler, authenticated, url

from hdcs_tasks.cloud import Cloud
from hdcs_tasks.errors import HdcsError, Invalid, NotFound
from hdcs_tasks.logs import logger

log = logger(__name__)

STATIC = Path(__file__).parent / "static"
ROWS_MAX = 100

_cloud: Cloud | None = None
_lock = threading.Lock()


def cloud() -> Cloud:
    """This process's Cloud, opened at the first visit: Flower starts also while the database is away."""
    global _cloud
    with _lock:
        if _cloud is None:
            _cloud = Cloud.from_env()
        return _cloud


class Page(BaseHandler):  # type: ignore[misc]  # Flower has no types
    """One of our pages; ``subject`` is what follows its name in the address."""

    def initialize(self, template: str) -> None:
        self._template = template

    @authenticated
    def get(self, subject: str = "") -> None:
        self.render(self._template, subject=subject)


class Data(BaseHandler):  # type: ignore[misc]
    """What a page shows, as JSON; the record is asked in a thread, Flower goes on meanwhile."""

    def initialize(self, look: Callable[[Data, str], Callable[[], Any]]) -> None:
        self._look = look

    @authenticated
    async def get(self, subject: str = "") -> None:
        self.set_header("Cache-Control", "no-store")
        try:
            self.write(await IOLoop.current().run_in_executor(None, self._look(self, subject)))
        except HdcsError as error:
            log.info("not shown", path=self.request.path, error=str(error))
            self.set_status({NotFound.code: 404, Invalid.code: 400}.get(error.code, 503))
            self.write({"error": str(error)})

    def text(self, name: str, default: str = "") -> str:
        return str(self.get_argument(name, default, escape=False) or default)

    def number(self, name: str, default: int) -> int:
        text = self.text(name, str(default))
        if not text.isascii() or not text.isdigit():
            raise Invalid(f"{name} is not a number")
        return int(text)

    def page(self) -> dict[str, Any]:
        """Which rows DataTables asks for."""
        column = self.number("order[0][column]", 0)
        return {
            "offset": self.number("start", 0), "limit": min(ROWS_MAX, max(1, self.number("length", 15))),
            "search": self.text("search[value]"), "order": self.text(f"columns[{column}][name]"),
            "descending": self.text("order[0][dir]") == "desc",
        }  # fmt: skip

    def table(self, found: dict[str, Any]) -> dict[str, Any]:
        """A page of rows as DataTables takes it."""
        return {
            "draw": self.number("draw", 0), "recordsTotal": found["total"], "recordsFiltered": found["found"],
            "data": found["rows"],
        }  # fmt: skip


def _desktops(data: Data, _subject: str) -> Callable[[], Any]:
    asked = data.page() | {"state": data.text("show")}
    return lambda: data.table(cloud().overview.desktops(**asked))


def _operations(data: Data, _subject: str) -> Callable[[], Any]:
    asked = data.page() | {"show": data.text("show", "all")}
    return lambda: data.table(cloud().overview.operations(**asked))


def _operation(_data: Data, subject: str) -> Callable[[], Any]:
    return lambda: cloud().operations[subject].show()


def _data_center(data: Data, _subject: str) -> Callable[[], Any]:
    profile = data.text("profile") or None
    return lambda: cloud().overview.data_center(profile)


def install() -> None:
    """Our addresses, before Flower's."""
    pages = [
        ("data-center", "", "hdcs_data_center.html", _data_center), ("desktops", "", "hdcs_desktops.html", _desktops),
        ("operations", "", "hdcs_operations.html", _operations),
        ("operation", "/([0-9a-f-]{6,36})", "hdcs_operation.html", _operation),
    ]  # fmt: skip
    ours = [url(r"/hdcs/(.*)", StaticFileHandler, {"path": str(STATIC)}, name="hdcs-static")]
    for name, subject, template, look in pages:
        ours.append(url(f"/{name}{subject}", Page, {"template": template}, name=name))
        ours.append(url(f"/{name}{subject}/data", Data, {"look": look}))
    flower.urls.handlers[:0] = ours
