"""Which definitions libvirt is to check against its schema. It reads and compiles that anew each time, 20 ms of a
start: so it checks each shape of a definition once per process, not each guest of that shape.

What tells two guests of one shape apart (ids, addresses, paths, amounts) libvirt's own parser looks at in any case.
"""

from __future__ import annotations

import re

import libvirt

_KEPT = 256
_VALUE = re.compile(r"[\w:./-]*\d[\w:./-]*")

_checked: set[str] = set()


def shape_of(definition: str) -> str:
    """The definition without every word that holds a digit: elements, attributes and their plain words stay."""
    return _VALUE.sub("#", definition)


def define_flags(definition: str) -> int:
    """Flags for ``defineXMLFlags``: to be checked, unless one of its shape was."""
    return 0 if shape_of(definition) in _checked else libvirt.VIR_DOMAIN_DEFINE_VALIDATE


def was_defined(definition: str) -> None:
    """libvirt took it."""
    if len(_checked) >= _KEPT:
        _checked.clear()  # names without a digit make shapes of their own
    _checked.add(shape_of(definition))
