"""Stand-ins in the formats of the published files, small enough to serve from this machine."""

import io
import json
import pickle
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

EDM = Path(__file__).parent / "data/edm"


class Inception(torch.nn.Module):
    """Has the face of the published Inception file: images in 0..255 of any size, 2,048 features."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Linear(27, 2048)

    def forward(self, x: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        small = torch.nn.functional.interpolate((x - 128) / 128, size=[3, 3], mode="bilinear")
        return self.layers(small.flatten(1)).tanh()


def save_inception(file: Path) -> Path:
    """Under the published name, in TorchScript as the published file."""
    torch.manual_seed(0)
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.jit.script(Inception()).save(str(file))
    return file


def pictures(count: int, side: int, seed: int = 0) -> np.ndarray:
    """Smooth coloured images, uint8 `[N, side, side, 3]`."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 4, 4, generator=generator) * 255
    smooth = torch.nn.functional.interpolate(coarse, (side, side), mode="bicubic")
    return smooth.clip(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()


def save_cifar(file: Path, count: int) -> Path:
    """CIFAR-10's archive for Python: five pickled batches, planar rows of 3,072 bytes."""
    file.parent.mkdir(parents=True, exist_ok=True)
    images = pictures(count, 32).transpose(0, 3, 1, 2).reshape(count, -1)
    with tarfile.open(file, "w:gz") as archive:
        for index, rows in enumerate(np.array_split(np.arange(count), 5), 1):
            batch = {
                b"batch_label": b"training batch", b"labels": [int(row) % 10 for row in rows],
                b"data": images[rows], b"filenames": [b"x.png"] * len(rows),
            }  # fmt: skip
            content = pickle.dumps(batch, protocol=2)
            member = tarfile.TarInfo(f"cifar-10-batches-py/data_batch_{index}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return file


def save_zip(file: Path, count: int, side: int, labels: bool) -> Path:
    """EDM's dataset zip."""
    file.parent.mkdir(parents=True, exist_ok=True)
    names = [f"00000/img{index:08d}.png" for index in range(count)]
    with zipfile.ZipFile(file, "w") as archive:
        for name, image in zip(names, pictures(count, side, 1), strict=True):
            content = io.BytesIO()
            Image.fromarray(image).save(content, "png", compress_level=0)
            archive.writestr(name, content.getvalue())
        listed = [[name, index % 10] for index, name in enumerate(names)] if labels else None
        archive.writestr("dataset.json", json.dumps({"labels": listed}))
    return file


def save_statistics(file: Path) -> Path:
    """Reference statistics as EDM publishes them."""
    file.parent.mkdir(parents=True, exist_ok=True)
    np.savez(file, mu=np.zeros(2048), sigma=0.01 * np.eye(2048))
    return file


def publish(folder: Path) -> None:
    """Everything that the paper's configuration fetches, laid out as on the servers."""
    edm = folder / "edm"
    networks = {
        "cifar10-32x32-cond-vp": "ncsnpp-cond-16", "afhqv2-64x64-uncond-vp": "ddpmpp-uncond-16",
        "ffhq-64x64-uncond-vp": "ddpmpp-uncond-16", "imagenet-64x64-cond-adm": "adm-cond-16",
    }  # fmt: skip
    (edm / "pretrained").mkdir(parents=True)
    for name, ours in networks.items():
        (edm / f"pretrained/edm-{name}.pkl").write_bytes((EDM / f"{ours}.pkl").read_bytes())
    for name in ("cifar10-32x32", "afhqv2-64x64", "ffhq-64x64", "imagenet-64x64"):
        save_statistics(edm / f"fid-refs/{name}.npz")
    save_inception(folder / "stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt")
    save_cifar(folder / "~kriz/cifar-10-python.tar.gz", 200)
