"""How a server node proves that it holds its domain node's join token without sending it.

Both sides keep ``token_key = sha256(token)``; the proof is HMAC-SHA256 with that key over every field of the request.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from dataclasses import asdict, dataclass, replace
from typing import Any


@dataclass(frozen=True)
class JoinRequest:
    """What a server node sends to join.

    ``facts``: the fields of ``rules.NodeFacts``; ``storage``: ``total_bytes`` and ``free_bytes`` of the domain node's
    storage as mounted there; ``at``: Unix time in seconds.
    """

    domain_node: str
    server_node: str
    ip: str
    instance: str
    facts: dict[str, Any]
    storage: dict[str, int]
    at: float
    proof: str = ""

    def signed(self, token: str) -> JoinRequest:
        return replace(self, proof=proof_of(token_key(token), self))


def token_key(token: str) -> str:
    """What control keeps of a token, in hex."""
    return hashlib.sha256(token.strip().encode()).hexdigest()


def proof_of(key: str, request: JoinRequest) -> str:
    """The request's proof under this key, in hex."""
    fields = asdict(replace(request, proof=""))
    return hmac.new(key.encode(), json.dumps(fields, sort_keys=True).encode(), hashlib.sha256).hexdigest()
