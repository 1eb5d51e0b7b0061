from typing import Any

import msgspec
import pytest

from kv_protocol.identity import GroupGeometry, Identity

GROUP = GroupGeometry("full_attention", 16, 8192, 4)
BASE = Identity("revision", "bfloat16", "LBNHC", (GROUP,))


@pytest.mark.parametrize(
    "change",
    [
        {"weights": "other"},
        {"kv_dtype": "fp8"},
        {"layout": "BLHNC"},
        {"tensor_parallel": 2},
        {"pipeline_parallel": 2},
        {"groups": ()},
        {"groups": (GROUP, GROUP)},
        *(
            {"groups": (msgspec.structs.replace(GROUP, **{name: value}),)}
            for name, value in [
                ("kind", "sliding_window"),
                ("block_size", 32),
                ("block_bytes", 4096),
                ("layers", 5),
            ]
        ),
    ],
    ids=str,
)
def test_every_field_changes_the_digest(change: dict[str, Any]) -> None:
    assert msgspec.structs.replace(BASE, **change).digest() != BASE.digest()


def test_equal_identities_have_one_digest_on_both_ends_of_a_wire() -> None:
    copy = msgspec.msgpack.decode(msgspec.msgpack.encode(BASE), type=Identity)
    assert copy == BASE
    assert copy.digest() == BASE.digest()
    assert len(BASE.digest()) == 16


def test_the_digest_is_the_same_everywhere() -> None:
    assert BASE.digest().hex() == "c60257b4132b913e5da3cb90663f849b"
