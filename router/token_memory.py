"""Tokens of texts seen before, so that a text that begins like one of them costs only what differs.

Texts are cut at safe boundaries (``router.boundaries``) and kept as a tree of prefixes. A prefix is found by a sample of
its text, and used only after every character of it has been compared: the table may miss, never mislead. Looking starts
at the end of the text, where a conversation that grew by a turn parts from what is known, and costs about a microsecond
per boundary tried. Memory is bounded: prefixes that nothing grows from leave first, the longest unused before others.
"""

from collections.abc import Callable, Hashable, Iterator
from threading import Lock
from time import perf_counter
from typing import NamedTuple

from router.boundaries import Boundaries
from router.prompt_ids import Prefix, PromptIds

_Key = tuple[bool, int, str, str]
_WINDOW = 64
_SAMPLES = 32
_MAX_PROBES = 256
# The end of a chat, behind its last special token, is the opening of the answer: short.
_SHORT_TAIL = 1024


class Affixes(NamedTuple):
    """Tokens a tokenizer puts around a whole text when special tokens are asked for."""

    before: bytes
    after: bytes


class Found(NamedTuple):
    """A text, and the longest beginning of it that is known."""

    text: str
    special: bool
    chain: list[Prefix]

    @property
    def missing(self) -> int:
        """Characters still to be encoded."""
        return len(self.text) - (self.chain[-1].end if self.chain else 0)


class TokenMemory:
    """``encode`` turns a piece of text into its tokens, without special ones around it. Safe to share by threads.

    ``step`` is the least text a prefix holds where there is a choice, and ``limit`` the bytes kept in all.
    """

    def __init__(
        self, encode: Callable[[str], bytes], boundaries: Boundaries, affixes: Affixes, *, limit: int, step: int
    ) -> None:
        self._encode = encode
        self._boundaries = boundaries
        self._affixes = affixes
        self._step = step
        self._limit = limit
        self._nodes: dict[Hashable, Prefix] = {}
        self._lock = Lock()
        self.used = 0
        self.evicted = 0
        self.tokens_remembered = 0
        self.tokens_encoded = 0
        self.seconds = 0.0

    def __len__(self) -> int:
        return len(self._nodes)

    def find(self, text: str, *, special: bool = False) -> Found:
        """The longest known beginning of ``text``. Encodes nothing."""
        if len(text) < self._step:
            return Found(text, special, [])
        return Found(text, special, self._from_end(text, special) or self._from_start(text, special))

    def finish(self, found: Found) -> PromptIds:
        """The tokens of the text; remembers what is worth it."""
        started = perf_counter()
        text, special, chain = found
        self.tokens_remembered += (remembered := chain[-1].count if chain else 0)
        before, after = self._affixes if special else (b"", b"")
        at = chain[-1].end if chain else 0
        if len(text) >= self._step:
            stop = self._last_cut(text, at)
            while at < stop:
                cut = self._boundaries.first(text, at + self._step, stop)
                parent = chain[-1] if chain else None
                ids = self._encode(text[at:cut])
                prefix = Prefix(parent, text[at:cut], ids if parent else before + ids, self._charge)
                self._keep(_key(text, cut, special), prefix)
                chain.append(prefix)
                at = cut
        tail = self._encode(text[at:]) if at < len(text) else b""
        prompt = PromptIds(chain, (tail if chain else before + tail) + after)
        self.tokens_encoded += len(prompt) - remembered
        self.seconds += perf_counter() - started
        return prompt

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            for prefix in self._nodes.values():
                prefix.alive = False
            self._nodes.clear()
            self.used = 0

    def check(self) -> None:
        """Verify every invariant. O(prefixes)."""
        with self._lock:
            nodes = list(self._nodes.values())
        branches = dict.fromkeys(map(id, nodes), 0)
        for prefix in nodes:
            if prefix.parent is not None:
                assert prefix.parent.alive
                branches[id(prefix.parent)] += 1
        assert all(prefix.alive and prefix.branches == branches[id(prefix)] for prefix in nodes)
        assert self.used == sum(prefix.cost for prefix in nodes) <= self._limit

    def _from_end(self, text: str, special: bool) -> list[Prefix]:
        for cut in self._cuts_backwards(text):
            if chain := self._known(text, cut, special):
                return chain
        return []

    def _cuts_backwards(self, text: str) -> Iterator[int]:
        end = len(text)
        floor = max(0, end - _SHORT_TAIL)
        at = self._boundaries.last_mark(text, end, floor)
        if at == floor:
            if self._boundaries.lines:
                yield from self._lines_backwards(text)
            at = self._boundaries.last_mark(text, end)
        for _ in range(_MAX_PROBES):
            if at <= 0:
                return
            yield at
            at = self._boundaries.last_mark(text, at)

    def _lines_backwards(self, text: str) -> Iterator[int]:
        line = len(text)
        for _ in range(_MAX_PROBES):
            line = self._boundaries.last_line(text, 0, line)
            if line <= 0:
                return
            yield line

    def _from_start(self, text: str, special: bool) -> list[Prefix]:
        """Texts encoded from their start are cut by their own content only, so equal beginnings have equal cuts."""
        chain: list[Prefix] = []
        at, end = 0, len(text)
        while (at := self._boundaries.first(text, at + self._step, end)) < end:
            if not (longer := self._known(text, at, special)):
                break
            chain = longer
        return chain

    def _known(self, text: str, cut: int, special: bool) -> list[Prefix]:
        key = _key(text, cut, special)
        prefix = self._nodes.get(key)
        if prefix is None:
            return []
        chain = []
        node: Prefix | None = prefix
        while node is not None:
            if not text.startswith(node.text, node.start):
                return []
            chain.append(node)
            node = node.parent
        with self._lock:
            if prefix.alive:
                self._nodes[key] = self._nodes.pop(key)
        chain.reverse()
        return chain

    def _last_cut(self, text: str, start: int) -> int:
        end = len(text)
        floor = max(start, end - _SHORT_TAIL)
        mark = self._boundaries.last_mark(text, end, floor)
        if mark > floor:
            return mark
        line = self._boundaries.last_line(text, start, end) if self._boundaries.lines else start
        return line if line > start else self._boundaries.last_mark(text, end, start)

    def _keep(self, key: _Key, prefix: Prefix) -> None:
        with self._lock:
            parent = prefix.parent
            if key in self._nodes or prefix.cost > self._limit // 4 or (parent is not None and not parent.alive):
                return
            prefix.alive, prefix.key = True, key
            if parent is not None:
                parent.branches += 1
            self._nodes[key] = prefix
            self.used += prefix.cost
            self._evict()

    def _charge(self, prefix: Prefix, added: int) -> None:
        with self._lock:
            if prefix.alive:
                prefix.cost += added
                self.used += added
                self._evict()

    def _evict(self) -> None:
        while self.used > self._limit:
            key = next(iter(self._nodes))
            prefix: Prefix | None = self._nodes[key]
            if prefix is not None and prefix.branches:
                self._nodes[key] = self._nodes.pop(key)
                continue
            # What only this one grew from goes with it: nobody asked for it either.
            while prefix is not None and not prefix.branches and self.used > self._limit:
                prefix = self._drop(prefix)

    def _drop(self, prefix: Prefix) -> Prefix | None:
        del self._nodes[prefix.key]
        prefix.alive = False
        self.used -= prefix.cost
        self.evicted += 1
        if prefix.parent is not None:
            prefix.parent.branches -= 1
        return prefix.parent


def _key(text: str, cut: int, special: bool) -> _Key:
    return special, cut, text[cut - _WINDOW : cut] if cut > _WINDOW else text[:cut], text[: cut : cut // _SAMPLES + 1]
