"""A PyTorch module to ONNX and back: one graph, the same bounds."""

import math
import tempfile
from pathlib import Path

import torch
from torch import nn

import calipers as cp

torch.manual_seed(0)
model = nn.Sequential(
    nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10)
)
net = cp.capture(model.eval(), torch.zeros(1, 1, 8, 8))

with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "net.onnx"
    cp.save_onnx(net, path)
    print(f"{path.name}: {path.stat().st_size:,} bytes")
    again = cp.load_onnx(path)

x, y = torch.rand(4, 1, 8, 8), torch.arange(4)
print(f"largest difference of the outputs: {(net(x) - again(x)).abs().max():.1e}")
threat = cp.ThreatModel(p=math.inf, eps=0.02)
for source, network in (("module", net), ("ONNX file", again)):
    print(f"{source}: certified margins {cp.bound(network, x, y, threat).amin(1).tolist()}")
