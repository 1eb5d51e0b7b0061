"""Reading vLLM's block tables: one list of block ids per KV-cache group, in the order of the prompt."""

from collections.abc import Iterable, Iterator, Sequence

from worker_connector.geometry import Group

Tables = Sequence[Sequence[int]]

NULL_BLOCK = 0
"""The block id that stands for no block."""


def blocks_from(groups: Iterable[Group], tables: Tables, computed: int) -> list[int]:
    """The blocks of every table from the one on that holds token ``computed``."""
    return [block for group in groups for block in tables[group.index][computed // group.block_size :]]


def is_fuller(missing: tuple[int, ...], than: tuple[int, ...]) -> bool:
    return missing != than and all(here <= there for here, there in zip(missing, than, strict=True))


def missing_blocks(blocks: Sequence[int]) -> int:
    """How many blocks from the first on must be left out so that none of the rest is the null block."""
    return next((at for at in range(len(blocks), 0, -1) if blocks[at - 1] == NULL_BLOCK), 0)


def present_runs(blocks: Sequence[int]) -> Iterator[tuple[int, list[int]]]:
    """Runs of real blocks: the position of the first, and their ids."""
    run: list[int] = []
    for at, block in enumerate(blocks):
        if block != NULL_BLOCK:
            run.append(block)
        elif run:
            yield at - len(run), run
            run = []
    if run:
        yield len(blocks) - len(run), run
