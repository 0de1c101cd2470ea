"""The shipped models as a user would write them first: plain eager layers, nothing fused, nothing packed.

Owns: what variants are measured against. MiniLM's plain form is the model's own (`packed=False`).
"""

import torch
from torch import nn

from deployments.models.efficientnet import STAGES, packaged

State = dict[str, torch.Tensor]


class ConvNorm(nn.Module):
    """Convolution with TF's SAME padding, BatchNorm, and ReLU6 where asked: [B, C, H, W] -> same."""

    def __init__(self, state: State, conv: str, norm: str, *, stride: int = 1, relu6: bool = True) -> None:
        super().__init__()
        weight = state[f"{conv}.weight"]
        outputs, inputs, kernel, _ = weight.shape
        groups = outputs if inputs == 1 else 1
        # At stride 2 SAME pads one more at the end than at the beginning.
        few, more = (kernel - 2) // 2, (kernel - 1) // 2
        self.pad = nn.ZeroPad2d((few, more, few, more)) if stride == 2 else nn.Identity()
        padding = 0 if stride == 2 else kernel // 2
        self.conv = nn.Conv2d(inputs * groups, outputs, kernel, stride, padding, groups=groups, bias=False)
        self.conv.weight.data = weight
        self.norm = nn.BatchNorm2d(outputs, eps=1e-3)
        self.norm.load_state_dict({k: state[f"{norm}.{k}"] for k in self.norm.state_dict()})
        self.act = nn.ReLU6() if relu6 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.act(self.norm(self.conv(self.pad(x))))
        return y


class Block(nn.Module):
    """MBConv without squeeze and excitation."""

    def __init__(self, state: State, prefix: str, stride: int) -> None:
        super().__init__()
        expand, project = f"{prefix}_expand_conv", f"{prefix}_project_conv"
        has_expand = f"{expand}.weight" in state
        self.expand = ConvNorm(state, expand, f"{prefix}_bn0") if has_expand else nn.Identity()
        self.depthwise = ConvNorm(state, f"{prefix}_depthwise_conv", f"{prefix}_bn1", stride=stride)
        self.project = ConvNorm(state, project, f"{prefix}_bn2", relu6=False)
        inputs = state[f"{expand if has_expand else project}.weight"].shape[1]
        self.has_residual = stride == 1 and inputs == len(state[f"{project}.weight"])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.project(self.depthwise(self.expand(x)))
        return y + x if self.has_residual else y


class PlainEfficientNet(nn.Module):
    """float32 [B, 3, 224, 224], normalised -> logits [B, 1000]."""

    def __init__(self) -> None:
        super().__init__()
        state = torch.load(packaged(), weights_only=True)
        strides = [s if i == 0 else 1 for n, _, s in STAGES for i in range(n)]
        self.stem = ConvNorm(state, "_conv_stem", "_bn0", stride=2)
        self.blocks = nn.Sequential(*[Block(state, f"_blocks.{i}.", s) for i, s in enumerate(strides)])
        self.head = ConvNorm(state, "_conv_head", "_bn1")
        self.fc = nn.Linear(1280, 1000)
        self.fc.load_state_dict({k: state[f"_fc.{k}"] for k in ("weight", "bias")})
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.fc(self.head(self.blocks(self.stem(x))).mean((2, 3)))
        return y
