"""Quantise once, save, and load the int8 checkpoint where the float weights are not wanted."""

import tempfile
from pathlib import Path

import torch
from torch import nn

import pybigmodel as pbm


def build(linear: type[nn.Module]) -> nn.Sequential:
    return nn.Sequential(linear(512, 2048), nn.GELU(), linear(2048, 512)).eval()


trained = build(nn.Linear)  # stands for a model that you trained
x = torch.randn(32, 512)

with tempfile.TemporaryDirectory() as folder:
    checkpoint = Path(folder) / "int8.pt"
    torch.save(pbm.optimize(trained, precision="int8").state_dict(), checkpoint)

    # In the process that serves: int8 layers from the start, no float weights in memory.
    served = build(pbm.nn.Int8Linear)
    served.load_state_dict(torch.load(checkpoint))
    size = checkpoint.stat().st_size

with torch.no_grad():
    exact, y = trained(x), served(x)
floats = sum(p.numel() * p.element_size() for p in trained.parameters())
print(f"checkpoint {size / 1e6:.1f} MB instead of {floats / 1e6:.1f} MB")
print(f"relative error {(y - exact).norm() / exact.norm():.1e}")
