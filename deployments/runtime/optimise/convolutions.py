"""Variants of convolutional nets: BatchNorm and activations folded in, channels innermost.

Owns: these two. Must not know: what else is applied. Which layer follows which is read from torch.fx's trace
of the model; the traced module itself is thrown away: threads can't share one (pytorch issue 112775).
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from deployments.runtime.optimise.found import CantOptimise, layers, outermost, replace

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class FusedConv(nn.Module):
    """nn.Conv2d packed for oneDNN with ReLU or ReLU6 in the same pass; CPU."""

    def __init__(self, conv: nn.Conv2d, activation: nn.Module | None) -> None:
        super().__init__()
        self.bias = conv.bias
        self._padding, self._stride = list(conv.padding), list(conv.stride)
        self._dilation, self._groups = list(conv.dilation), conv.groups
        self._after: tuple[Any, ...] = ("none", [], "")
        if activation is not None:
            self._after = ("relu", [], "") if type(activation) is nn.ReLU else ("hardtanh", [0.0, 6.0], "")
        shape = (self._padding, self._stride, self._dilation, self._groups)
        self._packed = torch.ops.mkldnn._reorder_convolution_weight(conv.weight.detach(), *shape, None)

    @staticmethod
    def fits(conv: nn.Module, activation: nn.Module | None) -> bool:
        return (
            type(conv) is nn.Conv2d
            and type(activation) in (nn.ReLU, nn.ReLU6, type(None))
            and (conv.weight.device.type, conv.weight.dtype) == ("cpu", torch.float32)
            and conv.padding_mode == "zeros"
            and not isinstance(conv.padding, str)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shape = (self._padding, self._stride, self._dilation, self._groups)
        y: torch.Tensor = torch.ops.mkldnn._convolution_pointwise(
            x, self._packed, self.bias, *shape, *self._after
        )
        return y


def fuse(instance: Any, calls: Sequence[Callable[[], Any]]) -> None:
    """Fold each BatchNorm into the layer before it, and on a CPU ReLU and ReLU6 into the convolution."""
    put: dict[int, nn.Module] = {}
    for root in outermost(instance):
        _fold(list(_chains(root)), put)
    if not put:
        raise CantOptimise(
            "no BatchNorm, ReLU or ReLU6 directly follows a convolution, as far as can be traced"
        )
    replace(instance, lambda module: put.get(id(module)))


def _fold(chains: list[tuple[nn.Module, nn.Module]], put: dict[int, nn.Module]) -> None:
    following = {id(first): second for first, second in chains}
    for first, _ in chains:
        if not isinstance(first, (*_CONVOLUTIONS, nn.Linear)):
            continue
        product: nn.Module = first
        norm: nn.Module | None = following[id(first)]
        after = norm
        if isinstance(norm, _NORMS):
            if norm.training or norm.running_mean is None:
                raise CantOptimise("its BatchNorm is in training or has no running statistics: call .eval()")
            fused: Any = fuse_linear_bn_eval if isinstance(first, nn.Linear) else fuse_conv_bn_eval
            product = fused(first, norm)
            put[id(first)], put[id(norm)] = product, nn.Identity()
            after = following.get(id(norm))
        if type(after) in (nn.ReLU, nn.ReLU6) and FusedConv.fits(product, after):
            assert after is not None
            put[id(first)], put[id(after)] = FusedConv(product, after), nn.Identity()  # type: ignore[arg-type]
        elif id(first) in put and FusedConv.fits(product, None):
            put[id(first)] = FusedConv(product, None)  # type: ignore[arg-type]


def _chains(root: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    """(layer, the only one that reads its output), both called once in a forward."""
    try:
        graph = torch.fx.Tracer().trace(root)
    except Exception:  # control flow by values: then only what stands in a row in an nn.Sequential is sure
        for part in root.modules():
            if type(part) is nn.Sequential:
                yield from zip(list(part)[:-1], list(part)[1:], strict=True)
        return
    named = dict(root.named_modules())
    targets = [str(node.target) for node in graph.nodes if node.op == "call_module"]
    modules = [id(named[target]) for target in targets]
    for node in graph.nodes:
        if node.op != "call_module" or len(node.users) != 1:
            continue
        user = next(iter(node.users))
        if user.op == "call_module":
            first, second = named[str(node.target)], named[str(user.target)]
            if modules.count(id(first)) == modules.count(id(second)) == 1:
                yield first, second


def to_channels_last(instance: Any, calls: Sequence[Callable[[], Any]]) -> None:
    """Weights of convolutions and images with channels innermost; images are converted where they enter."""

    def enter(module: Any, args: Any) -> Any:
        return tuple(
            part.contiguous(memory_format=torch.channels_last)
            if isinstance(part, torch.Tensor) and part.dim() == 4
            else part
            for part in args
        )

    if not any(type(module) is FusedConv for root in outermost(instance) for module in root.modules()):
        layers(instance, nn.Conv2d)
    for root in outermost(instance):
        root.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        root.register_forward_pre_hook(enter)
