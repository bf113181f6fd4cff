"""Data parallel training: two processes step as one would, and see each step."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import copy, sys
import torch, torch.distributed as dist
from torch import nn
import pybigmodel as pbm
from pybigmodel._measure import difference

def train(model):
    model = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
    outputs = []
    for _ in range(3):
        with torch.no_grad():
            outputs.append(model(torch.ones(3, 40)))
        optimizer.zero_grad()
        model(torch.full((3, 40), float(rank))).square().mean().backward()
        optimizer.step()
    return torch.stack(outputs)

rank = int(sys.argv[2])
dist.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=rank, world_size=2)
torch.manual_seed(0)
theirs = nn.Sequential(nn.Linear(40, 24), nn.ReLU(), nn.Linear(24, 8))
ours = pbm.optimize(copy.deepcopy(theirs))
got, expected = train(ours), train(theirs)
assert difference(got[2], got[0])[0] > 1e-3
assert difference(got, expected)[0] < 1e-5
dist.destroy_process_group()
"""


def test_two_processes(tmp_path) -> None:
    arguments = [sys.executable, "-c", CODE, str(tmp_path / "rendezvous")]
    workers = [subprocess.Popen([*arguments, str(rank)]) for rank in range(2)]
    assert [worker.wait(timeout=120) for worker in workers] == [0, 0]
