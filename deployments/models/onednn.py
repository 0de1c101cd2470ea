"""Whether a weight may be packed for oneDNN, which fuses bias, activation and residual on CPUs.

Owns: that one question. Must not know: any network. Source: torch.ops.mkldnn, as TorchInductor uses it.
"""

import torch


def can_pack(weight: torch.Tensor) -> bool:
    """True on a CPU where this torch was built with oneDNN."""
    return weight.device.type == "cpu" and bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]
