"""A torch that has renamed what is private: the import works, and the layers are right."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from pybigmodel import _torch_private

# The module sees a torch without these names; everything else sees the real one.
CODE = """
import importlib.util, sys, torch

hidden = set(sys.argv[2].split(","))

class Renamed:
    def __init__(self, real):
        self.real = real
    def __getattr__(self, name):
        if name in hidden:
            raise AttributeError(name)
        return Renamed(torch._C) if name == "_C" else getattr(self.real, name)

name = "pybigmodel._torch_private"
spec = importlib.util.spec_from_file_location(name, sys.argv[1])
sys.modules[name] = module = importlib.util.module_from_spec(spec)
sys.modules["torch"] = Renamed(torch)
spec.loader.exec_module(module)
sys.modules["torch"] = torch
import pybigmodel as pbm
assert pbm.ops.linear.__globals__["register_function"] is module.register_function

theirs = torch.nn.Linear(40, 24)
ours, int8 = pbm.nn.Linear.from_linear(theirs), pbm.nn.Int8Linear.from_linear(theirs)
x = torch.randn(5, 40)
for dtype in (torch.float32, torch.bfloat16):
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                assert ours(x).dtype == int8(x).dtype == dtype
                torch.testing.assert_close(ours(x), theirs(x), rtol=2e-2, atol=2e-2)
expected = torch.autograd.grad(theirs(x).sum(), theirs.weight)
torch.testing.assert_close(torch.autograd.grad(ours(x).sum(), ours.weight), expected)
assert type(pbm.optimize(theirs)) is pbm.nn.Linear

sdpa = torch.nn.functional.scaled_dot_product_attention
for q in (torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8).double()):
    expected = sdpa(q, q, q)
    with pbm.sdpa():
        torch.testing.assert_close(sdpa(q, q, q), expected)
"""

SOURCE = Path(_torch_private.__file__)
FOUND = re.findall(r"torch\._C\.(\w+)|_private\(\s*\"(\w+)\"", SOURCE.read_text())
NAMES = sorted({name for pair in FOUND for name in pair if name})


def test_renamed() -> None:
    assert {"_len_torch_dispatch_stack", "_any_requires_grad"} <= set(NAMES)
    subprocess.run([sys.executable, "-c", CODE, SOURCE, ",".join(NAMES)], check=True)
