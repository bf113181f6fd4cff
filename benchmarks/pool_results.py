"""What reports of poolings share."""

from __future__ import annotations

MAX, MEAN, WHOLE = OPS = ("max_pool2d", "avg_pool2d", "adaptive_avg_pool2d")
TORCH = ("torch_eager", "torch_channels_last")
OTHERS = ("torch_compile", "onnxruntime", "openvino")
