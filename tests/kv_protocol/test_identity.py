from typing import Any

import msgspec
import pytest

from kv_protocol.identity import GroupGeometry, Identity, generation_name, in_generation

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
        {"compute": "float16"},
        {"groups": ()},
        {"groups": (GROUP, GROUP)},
        *(
            {"groups": (msgspec.structs.replace(GROUP, **{name: value}),)}
            for name, value in [
                ("kind", "sliding_window"),
                ("block_size", 32),
                ("block_bytes", 4096),
                ("layers", 5),
                ("heads", 8),
                ("head_size", 64),
                ("dtype", "float16"),
                ("reach", 4096),
                ("members", "0-3"),
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


def test_adapters_are_told_apart_by_content() -> None:
    digests = [BASE.digest(), BASE.digest(b"a" * 32), BASE.digest(b"b" * 32)]
    digests += [msgspec.structs.replace(BASE, weights="other").digest(b"a" * 32)]
    assert len(set(digests)) == 4
    assert all(len(digest) == 16 for digest in digests)


def test_the_digest_is_the_same_everywhere() -> None:
    assert BASE.digest().hex() == "3d1e6fb98645f50dc9dc68547d47b117"
    assert BASE.digest(b"adapter").hex() == "15840c616d37bfac30d7eae4f51d2812"


def test_generations_of_weights_have_digests_of_their_own() -> None:
    start = BASE.digest()
    assert in_generation(start, "") == start
    digests = {in_generation(start, name) for name in ("", "1", "2", "lora")}
    assert len(digests) == 4
    assert all(len(digest) == 16 for digest in digests)
    assert in_generation(start, "lora") != BASE.digest(b"lora")


@pytest.mark.parametrize("name", ["", " a", "a\n", "a" * 129])
def test_a_generation_has_a_name_that_prints(name: str) -> None:
    with pytest.raises(ValueError, match="printable"):
        generation_name(name)
    assert generation_name("step 12, run é") == "step 12, run é"
