import random
from functools import reduce

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv_protocol.digests import PARTITIONS, RunningDigest, SetDigest, partition_of, xor_of

hashes = st.sets(st.binary(min_size=16, max_size=16), max_size=40)


def _literal(chunks: set[bytes]) -> tuple[list[int], list[bytes]]:
    counts, xors = [0] * 16, [bytes(16)] * 16
    for chunk in chunks:
        part = chunk[0] // 16
        counts[part] += 1
        xors[part] = bytes(one ^ two for one, two in zip(xors[part], chunk, strict=True))
    return counts, xors


@given(hashes, hashes)
def test_running_equals_recomputed_after_any_changes(first: set[bytes], second: set[bytes]) -> None:
    digest = RunningDigest()
    for chunk in first:
        digest.add(chunk)
    for chunk in first - second:
        digest.discard(chunk)
    for chunk in second - first:
        digest.add(chunk)
    taken, (counts, xors) = digest.take(), _literal(second)
    assert (list(taken.counts), list(taken.xors)) == (counts, xors)
    assert taken.count == len(second)


def test_order_does_not_matter_and_clearing_leaves_nothing() -> None:
    chunks = [random.Random(1).randbytes(16) for _ in range(200)]
    one, two = RunningDigest(), RunningDigest()
    for chunk in chunks:
        one.add(chunk)
    for chunk in reversed(chunks):
        two.add(chunk)
    assert one.take() == two.take()
    one.clear()
    assert one.take() == RunningDigest().take()


@given(hashes.filter(bool), st.data())
def test_one_flipped_bit_changes_one_partition(chunks: set[bytes], data: st.DataObject) -> None:
    digest = RunningDigest()
    for chunk in chunks:
        digest.add(chunk)
    victim = data.draw(st.sampled_from(sorted(chunks)))
    bit = data.draw(st.integers(0, 123))
    flipped = (int.from_bytes(victim, "big") ^ 1 << bit).to_bytes(16, "big")
    before = digest.take()
    digest.discard(victim)
    digest.add(flipped)
    after = digest.take()
    different = [at for at in range(PARTITIONS) if before.xors[at] != after.xors[at]]
    assert different == [partition_of(victim)]


@given(hashes)
def test_xor_of(chunks: set[bytes]) -> None:
    expected = reduce(lambda a, b: a ^ b, (int.from_bytes(chunk, "big") for chunk in chunks), 0)
    assert xor_of(chunks) == expected.to_bytes(16, "big")


def test_a_digest_of_the_wrong_shape_is_refused_on_the_wire() -> None:
    bad = msgspec.msgpack.encode({"counts": [0] * 16, "xors": [b""] * 16})
    with pytest.raises(msgspec.ValidationError, match="16 XORs of 16 bytes"):
        msgspec.msgpack.decode(bad, type=SetDigest)
