"""Every way a command can end badly, as one HdcsError: its sentence and its exit code.

Errors of libraries are told apart by name, so that ``hdcs --help`` need not import them.
"""

from __future__ import annotations

from collections.abc import Callable

from hdcs_tasks.errors import HdcsError, Invalid, Unreachable


class Detached(HdcsError):
    """The user stopped watching (Ctrl-C); the operation goes on."""

    code = "detached"
    exit_code = 130


class Declined(HdcsError):
    """The user answered no."""

    code = "declined"


def _redis_away(error: BaseException) -> HdcsError:
    return Unreachable(
        f"Redis does not answer: {first_line(error)}", next="Is redis-server running? Check HDCS_REDIS_URL"
    )


def _database_away(error: BaseException) -> HdcsError:
    told = getattr(error, "orig", None) or error
    return Unreachable(f"the database does not answer: {first_line(told)}", next="Check HDCS_DATABASE_URL")


def _database_url_wrong(error: BaseException) -> HdcsError:
    return Invalid(
        f"HDCS_DATABASE_URL is not the URL of a database HDCS can use: {first_line(error)}",
        next="As in sqlite:////var/lib/hdcs/hdcs.sqlite or postgresql://hdcs@127.0.0.1/hdcs",
    )


def _setting_wrong(error: BaseException) -> HdcsError:
    """Pydantic's validation error: which HDCS_* variable, and why."""
    part = str(getattr(error, "title", "")).removesuffix("Settings").upper().replace("RATE", "RATES")
    prefix = f"HDCS_{part}_" if part else "HDCS_"
    listed = error.errors() if hasattr(error, "errors") else []
    told = [f"{prefix}{'_'.join(map(str, item['loc'])).upper()}: {item['msg']}" for item in listed]
    return Invalid(
        f"the settings are wrong: {'; '.join(told) or first_line(error)}",
        next="Every setting, its unit and its default: docs/configuration.md",
    )


_FOREIGN: dict[str, Callable[[BaseException], HdcsError]] = {
    "redis.exceptions.ConnectionError": _redis_away,
    "redis.exceptions.TimeoutError": _redis_away,
    "kombu.exceptions.OperationalError": _redis_away,
    "sqlalchemy.exc.OperationalError": _database_away,
    "sqlalchemy.exc.InterfaceError": _database_away,
    "sqlalchemy.exc.ArgumentError": _database_url_wrong,
    "sqlalchemy.exc.NoSuchModuleError": _database_url_wrong,
    "pydantic_core._pydantic_core.ValidationError": _setting_wrong,
}


def first_line(error: object) -> str:
    """The first line of what an error says, or its type's name."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def as_hdcs_error(error: Exception) -> HdcsError:
    """``error`` itself if it is ours; else what it means for the user."""
    if isinstance(error, HdcsError):
        return error
    for cls in type(error).__mro__:
        meaning = _FOREIGN.get(f"{cls.__module__}.{cls.__qualname__}")
        if meaning is not None:
            return meaning(error)
    return HdcsError(
        f"hdcs itself failed: {type(error).__name__}: {first_line(error)}",
        next="Run it again with HDCS_DEBUG=1 to see where",
    )


def several(errors: list[tuple[str, HdcsError]], of: int) -> HdcsError:
    """One error for what failed of a bulk: of their common class, so that the exit code still tells why."""
    if of == 1:
        return errors[0][1]
    shown = "; ".join(f"{name}: {error.message}" for name, error in errors[:3])
    more = f"; and {len(errors) - 3} more" if len(errors) > 3 else ""
    kinds = {type(error) for _, error in errors}
    cls = kinds.pop() if len(kinds) == 1 else HdcsError
    return cls(f"{len(errors)} of {of} failed: {shown}{more}", next=errors[0][1].next)
