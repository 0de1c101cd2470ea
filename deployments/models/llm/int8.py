"""A network with 8-bit weights on a CPU: what replaces its layers and its head after they were loaded.

Owns: which products share a pass, and where RMSNorm goes (into the scale of the quantised rows). Must not
know: the kernels, where keys and values lie. Source: DESIGN decision 12; runtime/optimise/int8_linear.py.
"""

import torch

from deployments.models.llm.network import Attention, Head, Layer, Network, rotate_
from deployments.runtime.optimise.int8_linear import End, Int8Linear


def quantise(network: Network) -> None:
    """8-bit weights from here on, in place, a layer at a time, so that no more than one is there twice.

    Before the network runs. Raises CantOptimise where the kernels can't be built: nothing has changed then.
    """
    with torch.inference_mode():
        # The head first: it is built whole or not at all, and with it the kernels.
        network.head = Int8Head(network.head) if isinstance(network.head, Head) else network.head
        for index, layer in enumerate(network.layers):
            if isinstance(layer, Layer):
                network.layers[index] = Int8Layer(layer)


class Int8Layer:
    """A Layer of the same weights: four products, each quantising its own input."""

    def __init__(self, layer: Layer) -> None:
        self._index, self._shape, self._head_norm = layer.index, layer.shape, layer.head_norm
        self._qkv = Int8Linear(layer.qkv.dense(), layer.qkv.bias, floor=layer.norm.floor)
        self._out = Int8Linear(layer.out.dense(), layer.out.bias, end=End.PLUS)
        gate, up = layer.gate, layer.up
        bias = None if gate.bias is None or up.bias is None else torch.cat([gate.bias, up.bias])
        both = torch.cat([gate.dense(), up.dense()])
        self._gated = Int8Linear(both, bias, end=End.GATED, floor=layer.ffn_norm.floor)
        self._down = Int8Linear(layer.down.dense(), layer.down.bias, end=End.PLUS)

    def __call__(self, x: torch.Tensor, rotations: torch.Tensor, attend: Attention) -> torch.Tensor:
        shape = self._shape
        heads = self._qkv(x).view(len(x), -1, shape.head_dim)  # [T, heads + 2 * kv_heads, D]
        rotated = heads[:, : shape.heads + shape.kv_heads]
        if self._head_norm is not None:
            rotated.copy_(self._head_norm(rotated))
        rotate_(rotated, rotations)
        x = self._out(attend(self._index, heads), x)
        return self._down(self._gated(x), x)


class Int8Head:
    """A Head of the same weights."""

    def __init__(self, head: Head) -> None:
        self._linear = Int8Linear(head.linear.dense(), floor=head.norm.floor)

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._linear(hidden)
