"""Which way a VM goes, and where one that does not run goes when its domain node is emptied."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import libvirt
import pytest

from hdcs_tasks.config import Settings
from hdcs_tasks.errors import Invalid
from hdcs_tasks.hypervisor.connection import peer_of, peer_uri
from hdcs_tasks.hypervisor.migration import _flags
from hdcs_tasks.hypervisor.whereabouts import Presence, Whereabouts
from hdcs_tasks.states import VmState
from hdcs_tasks.vm import node_migrate
from hdcs_tasks.vm.move_rules import MoveOptions, Shelf, Way, choose_shelf, may_begin, way_of

A, R, P, S, U = Presence.ABSENT, Presence.RUNNING, Presence.PAUSED, Presence.SHUTOFF, Presence.UNKNOWN


@pytest.mark.parametrize(
    ("state", "same_home", "live", "way"),
    [
        (VmState.RUNNING, True, True, Way.LIVE),
        (VmState.SUSPENDED, True, True, Way.LIVE),
        (VmState.RUNNING, True, False, Way.SAVED),
        (VmState.RUNNING, False, True, Way.MOVE),
        (VmState.RUNNING, False, False, Way.CARRY),
        (VmState.STOPPED, False, True, Way.CARRY),
        (VmState.SAVED, False, False, Way.CARRY),
        (VmState.STOPPED, True, False, Way.NOTHING),
        (VmState.SAVED, True, True, Way.NOTHING),
    ],
)
def test_the_way(state: VmState, same_home: bool, live: bool, way: Way) -> None:
    assert way_of(state, same_home=same_home, live=live) is way


def test_options_that_make_no_sense_are_refused() -> None:
    assert MoveOptions(**MoveOptions(bandwidth_mib_s=5).to_dict()).bandwidth_mib_s == 5
    with pytest.raises(Invalid, match="bandwidth of 0"):
        MoveOptions(bandwidth_mib_s=0)
    with pytest.raises(Invalid, match="post-copy is a way of moving live"):
        MoveOptions(live=False, postcopy=True)


def test_a_disk_goes_where_its_image_is_then_where_most_room_is() -> None:
    shelves = [Shelf("north", 50, False), Shelf("south", 20, True), Shelf("west", 90, False)]
    assert choose_shelf(shelves, 10) == "south"
    assert choose_shelf(shelves, 30) == "west"
    assert choose_shelf(shelves, 30, exclude=["west"]) == "north"
    assert choose_shelf(shelves, 91) is None


def test_how_many_moves_begin() -> None:
    assert [may_begin(2, running, 5) for running in (0, 1, 2, 3)] == [2, 1, 0, 0]
    assert may_begin(4, 0, 1) == 1


@pytest.mark.parametrize(
    ("source", "target", "held_by"),
    [
        (R, A, "source"), (R, P, "source"), (P, A, "source"), (A, R, "target"), (P, R, "target"), (A, P, "target"),
        (S, R, "target"), (A, A, "source"), (R, R, "source"), (P, P, "unknown"), (U, R, "target"), (U, A, "source"),
        (A, S, "target"), (S, A, "source"), (S, S, "unknown"), (R, S, "source"),
        (U, S, "unknown"), (U, P, "unknown"), (U, U, "unknown"), (R, U, "unknown"), (A, U, "unknown"),
    ],
)  # fmt: skip
def test_who_holds_the_guest(source: Presence, target: Presence, held_by: str) -> None:
    assert Whereabouts(source, target).held_by == held_by


@pytest.mark.parametrize("tls", [False, True])
def test_where_tls_is_set_up_everything_goes_by_it(tls: bool) -> None:
    run: Any = SimpleNamespace(
        ctx=SimpleNamespace(settings=Settings(migrate_tls=tls)), progress=None, cancelled=None
    )  # fmt: skip
    spec = {"target": {"address": "fd00::7"}, "options": MoveOptions(bandwidth_mib_s=9).to_dict()}
    told = node_migrate.terms(run, spec)
    assert told["target_uri"] == f"qemu+{'tls' if tls else 'tcp'}://[fd00::7]/system" == peer_uri("fd00::7", tls=tls)
    own = Settings(migrate_tls=tls, migrate_tls_pki="/etc/hdcs/pki")
    assert peer_of(own, "n1") == ("qemu+tls://n1/system?pkipath=/etc/hdcs/pki" if tls else "qemu+tcp://n1/system")
    assert (told["tls"], told["bandwidth_mib_s"], told["auto_converge"]) == (tls, 9, True)
    assert bool(_flags(True, False, told["tls"]) & libvirt.VIR_MIGRATE_TLS) is tls
