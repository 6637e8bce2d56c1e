"""A lab of real libvirt hosts for the tests that ask for one. What is missing skips on a laptop and fails in CI."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.lab import Lab, free_net
from deploy.lab.golden_image import build
from hdcs_tasks.errors import Invalid
from tests.lab.data_center import center  # noqa: F401 - fixture
from tests.lab.hypervisor_node import hypervisor_lab, hypervisor_session, node  # noqa: F401 - fixtures


@pytest.fixture(scope="session")
def lab_possible() -> None:
    try:
        Lab.check()
    except Invalid as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def lab(lab_possible: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """One lab for the whole session: east (node1, node2), west (node3, node4)."""
    made = Lab("tests", tmp_path_factory.mktemp("lab") / "tests", net=free_net())
    try:
        made.up()
        yield made
    finally:
        made.down()


@pytest.fixture(scope="session")
def golden_image(lab_possible: None) -> Path:
    """The tiny bootable image (qcow2), built once per version and kept in the cache."""
    return build().path
