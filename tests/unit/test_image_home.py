"""Layer one for an import: which domain node takes a new image."""

from __future__ import annotations

import pytest

from hdcs_tasks.errors import NoCapacity
from hdcs_tasks.image.rules import Pool, homes, judge_pools


def test_the_storage_with_most_room_first_and_none_without_a_server_node() -> None:
    pools = [Pool("a", 10, 1), Pool("b", None, 2), Pool("c", 30, 1), Pool("d", 99, 0), Pool("e", 30, 3)]
    judged = judge_pools(pools)
    assert homes(judged) == ["c", "e", "a", "b"]
    assert [(v.domain_node, v.why) for v in judged if v.why] == [("d", "no server node is up")]


def test_where_none_can_take_it_each_says_why() -> None:
    with pytest.raises(NoCapacity, match="a: no server node is up; b: no server node is up"):
        homes(judge_pools([Pool("b", 1, 0), Pool("a", 5, 0)]))
