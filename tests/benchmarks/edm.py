"""Our U-Net against NVlabs/edm's with the same weights: `python tests/benchmarks/edm.py CLONE [--device cuda]`.

The clone is imported from where it lies; nothing of it is here. Prints times and ratios, asserts nothing about speed.
"""

import argparse
import functools
import importlib
import sys
import time
from collections.abc import Callable

import torch

from anisodiff.compute import DTYPES
from anisodiff.networks.unets import SongUNet

CIFAR10 = {  # EDM's 55.7M-parameter network for CIFAR-10, class-conditional, DDPM++
    "img_resolution": 32, "in_channels": 3, "out_channels": 3, "label_dim": 10, "augment_dim": 9,
    "model_channels": 128, "channel_mult": [2, 2, 2], "dropout": 0.13,
}  # fmt: skip


def seconds(work: Callable[[], None], repeats: int, device: str) -> float:
    """The best of some repeats, after one that warms up."""
    best = float("inf")
    for repeat in range(repeats + 1):
        began = time.perf_counter()
        work()
        if device != "cpu":
            torch.cuda.synchronize()
        if repeat:
            best = min(best, time.perf_counter() - began)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("clone", help="folder of a clone of NVlabs/edm")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.backends.cudnn.allow_tf32 = False
    sys.path.insert(0, arguments.clone)
    theirs = importlib.import_module("training.networks").SongUNet(**CIFAR10)
    ours = SongUNet(**CIFAR10)
    ours.load_state_dict(theirs.state_dict())
    device, batch = arguments.device, arguments.batch
    theirs, ours = theirs.to(device).eval(), ours.to(device).eval()
    x = torch.randn(batch, 3, 32, 32, device=device)
    noise, labels = torch.rand(batch, device=device), torch.eye(10, device=device)[torch.arange(batch) % 10]
    with torch.no_grad():
        edm = theirs(x, noise, labels)
        difference = ((edm - ours(x, noise, labels)).abs().max() / edm.abs().max()).item()
    count = sum(each.numel() for each in ours.parameters()) / 1e6
    print(f"{count:.1f}M parameters, batch {batch}, {device}; largest difference over largest output {difference:.1e}")

    def forward(network: torch.nn.Module) -> None:
        with torch.no_grad():
            network(x, noise, labels)

    def both(network: torch.nn.Module) -> None:
        network(x, noise, labels).square().mean().backward()

    for name, work in (("forward", forward), ("forward and backward", both)):
        # in turns, so that a change of the machine's pace meets both
        pairs = [
            [seconds(functools.partial(work, network), 1, device) for network in (theirs, ours)]
            for _ in range(arguments.repeats)
        ]
        edm, own = (min(times) for times in zip(*pairs, strict=True))
        print(f"{name}, float32: EDM {edm:.3f} s, ours {own:.3f} s, EDM over ours {edm / own:.2f} (target 1.0)")
    if device != "cpu":
        edm = seconds(lambda: forward(theirs), 10, device)
        ours = ours.to(memory_format=torch.channels_last)
        ours.compile()

        def sampling() -> None:
            with torch.autocast(device, DTYPES["bfloat16"]):
                forward(ours)

        own = seconds(sampling, 10, device)
        print(f"sampling, bfloat16, channels_last, compiled, over EDM's float32: {edm / own:.2f} (target 1.5)")


if __name__ == "__main__":
    main()
