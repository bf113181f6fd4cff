"""What reports of convolutions share: the kinds of layers, and who is compared with whom."""

from __future__ import annotations

from results import Result

FORWARD, FORWARD_BACKWARD, INT8 = "conv2d", "conv2d_forward_backward", "int8_conv2d"
TRANSPOSED, TRANSPOSED_FORWARD_BACKWARD = "conv_transpose2d", "conv_transpose2d_forward_backward"
SQUARE, POINTWISE, FIRST, STRIDED, DEPTHWISE = KINDS = (
    "3×3",
    "1×1",
    "first layer",
    "3×3, stride 2",
    "depthwise",
)
TORCH = ("torch_eager", "torch_channels_last")
PEERS = (*TORCH, "onednn_prepacked", "torch_compile", "onnxruntime", "openvino")
INT8_PEERS = ("onnxruntime_static", "openvino_static")
FROZEN = "pybigmodel_frozen"
VISION_PEERS = {
    "fp32": (*TORCH, "torch_compile", "onnxruntime_fp32", "openvino_fp32"),
    "bf16": ("torch_eager_bf16", "openvino_bf16"),
    "int8": ("onnxruntime_int8", "openvino_int8"),
}


def kind(r: Result) -> str:
    """Of a forward pass."""
    if r.has("depthwise"):
        return DEPTHWISE
    if r.size("C") == 3:
        return FIRST
    if r.size("K") == 1:
        return POINTWISE
    return SQUARE if r.size("S") == 1 else STRIDED
