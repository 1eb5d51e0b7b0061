"""A small transformer with random weights, in float64: enough to see what moving cached keys does to every layer.

Rotary embedding as vLLM applies it: element pairs ``(m, m + r/2)`` (neox) or ``(2 m, 2 m + 1)`` (interleaved) of the ``r``
rotary elements, which begin at ``first``, are turned by position times ``base ** (-2 m / r)``. Bases may differ by layer.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Rope:
    rotary: int
    first: int = 0
    interleaved: bool = False
    bases: tuple[float, ...] = (10000.0,)

    def frequencies(self, layer: int) -> Array:
        pairs = np.arange(self.rotary // 2)
        return np.asarray(self.bases[layer % len(self.bases)] ** (-2 * pairs / self.rotary))

    def apply(self, x: Array, positions: Array, layer: int) -> Array:
        """``x`` is ``[token, head, element]``; turned as complex numbers."""
        half = self.rotary // 2
        rotary = x[..., self.first : self.first + self.rotary]
        pairs = (rotary[..., 0::2], rotary[..., 1::2]) if self.interleaved else (rotary[..., :half], rotary[..., half:])
        angles = np.multiply.outer(positions, self.frequencies(layer))[:, None, :]
        turned = (pairs[0] + 1j * pairs[1]) * np.exp(1j * angles)
        result = x.copy()
        if self.interleaved:
            result[..., self.first : self.first + self.rotary : 2] = turned.real
            result[..., self.first + 1 : self.first + self.rotary : 2] = turned.imag
        else:
            result[..., self.first : self.first + half] = turned.real
            result[..., self.first + half : self.first + self.rotary] = turned.imag
        return result


@dataclass(frozen=True)
class Run:
    """Keys (rotated) and values of each layer, ``[layer, token, head, element]``, and the last hidden states."""

    keys: Array
    values: Array
    hidden: Array


class Model:
    """Pre-norm attention with grouped queries and a nonlinear layer, ``layers`` times."""

    def __init__(
        self, rope: Rope, *, layers: int = 4, heads: int = 4, kv_heads: int = 2, head_size: int = 16, seed: int = 0
    ) -> None:
        rng = np.random.default_rng(seed)
        self.rope, self.layers, self.heads, self.kv_heads, self.head_size = rope, layers, heads, kv_heads, head_size
        width = heads * head_size
        self._embedding = rng.standard_normal((50, width))

        def weights(inputs: int, outputs: int) -> list[Array]:
            return [rng.standard_normal((inputs, outputs)) / np.sqrt(inputs) for _ in range(layers)]

        self._q, self._o = weights(width, width), weights(width, width)
        self._k, self._v = weights(width, kv_heads * head_size), weights(width, kv_heads * head_size)
        self._up, self._down = weights(width, 2 * width), weights(2 * width, width)

    def run(self, tokens: Sequence[int], positions: Array, mask: Array, past: Run | None = None) -> Run:
        """Compute tokens at these positions; ``mask[i, j]`` says that token i sees key j, those of ``past`` first."""
        x, keys, values = self._embedding[list(tokens)], [], []
        for layer in range(self.layers):
            normed = x / np.sqrt((x * x).mean(-1, keepdims=True))
            q = (normed @ self._q[layer]).reshape(len(tokens), self.heads, self.head_size)
            k = (normed @ self._k[layer]).reshape(len(tokens), self.kv_heads, self.head_size)
            v = (normed @ self._v[layer]).reshape(len(tokens), self.kv_heads, self.head_size)
            q, k = self.rope.apply(q, positions, layer), self.rope.apply(k, positions, layer)
            keys.append(k)
            values.append(v)
            if past is not None:
                k, v = np.concatenate([past.keys[layer], k]), np.concatenate([past.values[layer], v])
            x += self._attend(q, k, v, mask) @ self._o[layer]
            x += np.tanh(x @ self._up[layer]) @ self._down[layer]
        return Run(np.array(keys), np.array(values), x)

    def _attend(self, q: Array, k: Array, v: Array, mask: Array) -> Array:
        group = self.heads // self.kv_heads
        k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
        scores = np.einsum("ihd,jhd->hij", q, k) / np.sqrt(self.head_size)
        scores = np.where(mask, scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        return np.asarray(np.einsum("hij,jhd->ihd", weights, v)).reshape(len(q), -1)


def causal(count: int) -> Array:
    return np.tril(np.ones((count, count), bool))
