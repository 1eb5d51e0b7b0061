"""Cache salts of tenants: which part of a worker's cache a request may hit.

A worker shares KV cache only between prompts of equal ``cache_salt``, and so do its chunk hashes. A tenant with a salt
of its own gets one that is derived from it, and from the salt its client sent, if any: by SHA-256 over both, each with
its length before it. So no client can name a salt that another tenant's requests have, and one client can still keep
its own users apart. Of tenants without a salt, what a client sends is derived the same way, with an empty first part.
"""

from hashlib import sha256
from typing import Any

import msgspec

from router.errors import InvalidRequest

_TAG = b"warmroute cache salt\0"
_MEMBERS = dict[str, msgspec.Raw]


def derive_salt(own: str, given: str) -> str:
    """34 characters that vLLM takes as a salt."""
    parts = [text.encode("utf-8", "surrogatepass") for text in (own, given)]
    framed = b"".join(len(part).to_bytes(8, "little") + part for part in parts)
    return "wr" + sha256(_TAG + framed).hexdigest()[:32]


def with_salt(raw: bytes, body: dict[str, Any], salt: str) -> bytes:
    """``raw``, of which ``body`` is the content, with this ``cache_salt`` and nothing else changed.

    Where the client sent none it is put in front of the first member, in constant time; else the top-level object is
    written anew around the raw bytes of its other members, so that none of several salts is left.

    Raises:
        InvalidRequest: ``raw`` is not a JSON object.
    """
    member = b'"cache_salt":"' + salt.encode() + b'"'
    if "cache_salt" not in body:
        at = raw.index(b"{") + 1
        return b"".join((raw[:at], member, b"," if body else b"", raw[at:]))
    try:
        members = msgspec.json.decode(raw, type=_MEMBERS)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"the body must be a JSON object: {error}") from error
    members["cache_salt"] = msgspec.Raw(b'"' + salt.encode() + b'"')
    return msgspec.json.encode(members)
