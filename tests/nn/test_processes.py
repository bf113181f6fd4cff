"""Layers in shared memory, sent to another process."""

from __future__ import annotations

import subprocess
import sys

# A program of its own: spawn imports the main module again.
PROGRAM = """
import torch, pybigmodel as pbm

def change(layer):
    with torch.no_grad():
        for tensor in (*layer.parameters(), *layer.buffers()):
            tensor.zero_()

if __name__ == "__main__":
    x = torch.ones(2, 40)
    conv = pbm.nn.Int8Conv1d.from_conv(torch.nn.Conv1d(2, 8, 3))
    layers = [pbm.nn.Linear(40, 8), pbm.nn.Int8Linear.from_linear(torch.nn.Linear(40, 8)), conv]
    for layer in layers:
        with torch.no_grad():
            assert layer(x).abs().sum() > 0
        layer.share_memory()
        child = torch.multiprocessing.get_context("spawn").Process(target=change, args=(layer,))
        child.start()
        child.join()
        assert child.exitcode == 0
        with torch.no_grad():
            assert layer(x).abs().sum() == 0, layer
"""


def test_what_another_process_writes_is_seen(tmp_path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    subprocess.run([sys.executable, program], check=True, timeout=120)
