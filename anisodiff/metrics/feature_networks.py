"""Feature networks: images in, features out."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn import functional

from anisodiff.errors import StageError, one_line
from anisodiff.metrics.registry import FEATURES
from anisodiff.pixels import to_unit
from anisodiff.storage import checkpoints

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
VIT_L14 = "vit_large_patch14_dinov2"
Features = Callable[[UInt8[Tensor, "b c h w"] | Float[Tensor, "b c h w"]], Float[Tensor, "b d"]]


class DigitsCNN(nn.Module):
    """A small classifier of 8x8 digits; its features are the inputs of the last layer.

    Args:
        width: channels of the first convolution.
        features: dimension of the features.
    """

    def __init__(self, width: int = 32, features: int = 64):
        super().__init__()
        self.config = {"width": width, "features": features}
        self.conv0 = nn.Conv2d(1, width, 3, padding=1)
        self.conv1 = nn.Conv2d(width, 2 * width, 3, padding=1)
        self.hidden = nn.Linear(2 * width * 16, features)
        self.classes = nn.Linear(features, 10)

    def features(self, x: Float[Tensor, "b 1 8 8"]) -> Float[Tensor, "b d"]:
        x = functional.silu(self.conv0(x))
        x = functional.silu(self.conv1(functional.avg_pool2d(x, 2)))
        return functional.silu(self.hidden(x.flatten(1)))

    def forward(self, x: Float[Tensor, "b 1 8 8"]) -> Float[Tensor, "b 10"]:
        return self.classes(self.features(x))


def digits_cnn(file: Path, device: str) -> Features:
    """Features of a `DigitsCNN`."""
    tensors, metadata = checkpoints.read(file)
    try:
        with torch.device("meta"):  # sizes first, without memory
            DigitsCNN(**metadata["config"]).load_state_dict(tensors, assign=True)
        network = DigitsCNN(**metadata["config"])
        network.load_state_dict(tensors)
    except (KeyError, TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise StageError(f"{file}: holds no digits-cnn ({one_line(error)}): give the file of one") from error
    network = network.to(device).eval().requires_grad_(False)

    def features(images: Tensor) -> Tensor:
        if images.shape[1:] != (1, 8, 8):
            raise StageError(f"features: digits-cnn takes grey 8x8 images, not {_described(images)}: take another kind")
        return network.features(to_unit(images.to(device)))

    return features


def inception(file: Path, device: str) -> Features:
    """Features of the Inception network that published FIDs use."""
    from cleanfid.inception_torchscript import InceptionV3W

    if file.name != "inception-2015-12-05.pt":
        raise StageError(f"{file}: clean-fid asks for the name inception-2015-12-05.pt: rename it")
    try:
        network = InceptionV3W(str(file.parent), download=False, resize_inside=True).to(device).eval()
    except (RuntimeError, ValueError) as error:
        raise StageError(f"{file}: holds no Inception network ({one_line(error)}): fetch it again") from error
    return lambda images: network(_rgb(images).to(device, torch.float32))


def efficientnet_lite0(file: Path, device: str) -> Features:
    """Average-pooled last features (1,280) of the ImageNet classifier; images resized to 128x128, `(x - 127) / 128`."""
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_name("efficientnet-lite0")
    try:
        network.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    except (pickle.UnpicklingError, RuntimeError, EOFError, TypeError, ValueError, LookupError) as error:
        raise StageError(f"{file}: holds no EfficientNet-Lite0 ({one_line(error)}): fetch it again") from error
    network = network.to(device).to(memory_format=torch.channels_last).eval().requires_grad_(False)

    def features(images: Tensor) -> Tensor:
        x = _rgb(images).to(device, torch.float32, memory_format=torch.channels_last)
        x = functional.interpolate(x, (128, 128), mode="bilinear", antialias=True)
        return network.extract_features((x - 127) / 128).mean((2, 3))

    return features


def dinov2_vit_l14(file: Path, device: str) -> Features:
    """Class token (1,024) of DINOv2's ViT-L/14, the features of FD-DINOv2 (Stein et al., arXiv:2306.04675).

    Images are resized to 224x224 (bicubic, antialiased), and centred and scaled as ImageNet's, as EDM2 does.

    Args:
        file: `dinov2_vitl14_pretrain.pth` as its authors publish it; only its tensors are read.
        device: torch's name of where to compute.
    """
    try:
        import timm
        from timm.models.vision_transformer import checkpoint_filter_fn
    except ImportError as error:
        raise StageError("features: dinov2-vit-l14 needs timm: install anisodiff[dinov2]") from error
    network: Any = timm.create_model(VIT_L14, img_size=224, num_classes=0)
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        state["pos_embed"] = _resized_positions(state["pos_embed"], network.pos_embed.shape[1] - 1)
        network.load_state_dict(checkpoint_filter_fn(state, network))
    except (pickle.UnpicklingError, RuntimeError, EOFError, TypeError, ValueError, LookupError) as error:
        raise StageError(f"{file}: holds no DINOv2 ViT-L/14 ({one_line(error)}): fetch it again") from error
    network = network.to(device).eval().requires_grad_(False)
    mean, std = (torch.tensor(each, device=device)[:, None, None] for each in (IMAGENET_MEAN, IMAGENET_STD))

    def features(images: Tensor) -> Tensor:
        x = _rgb(images).to(device, torch.float32) / 255
        x = functional.interpolate(x, (224, 224), mode="bicubic", antialias=True)
        return network((x - mean) / std)

    return features


def _resized_positions(embedding: Float[Tensor, "1 n d"], patches: int) -> Float[Tensor, "1 m d"]:
    """Embeddings of the class token and of fewer patches, as DINOv2's own code resizes them: bicubic, offset by 0.1.

    Args:
        embedding: vectors of the class token and of the patches of a square.
        patches: wanted, of a square.
    """
    token, places = embedding[:, :1], embedding[:, 1:]
    old, new = round(places.shape[1] ** 0.5), round(patches**0.5)
    if old == new:
        return embedding
    square = places.transpose(1, 2).unflatten(2, (old, old))
    resized = functional.interpolate(square, scale_factor=(new + 0.1) / old, mode="bicubic")
    return torch.cat([token, resized.flatten(2).transpose(1, 2)], dim=1)


def _described(images: Tensor) -> str:
    channels, height, width = images.shape[1:]
    return f"{channels}-channel {height}x{width} ones"


def _rgb(images: Tensor) -> Tensor:
    if images.shape[1] not in (1, 3):
        raise StageError(f"features: take grey or RGB images, not {_described(images)}: convert them first")
    return images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images


def extractor(kind: str, file: Path, device: str) -> Features:
    """The features of a network.

    Args:
        kind: one of `FEATURES`.
        file: weights of the network.
        device: torch's name of where to compute.

    Raises:
        StageError: an unknown kind, no file, or a file of another kind.
    """
    if kind not in FEATURES:
        raise StageError(f"features: kind {kind!r} is unknown: use one of {', '.join(FEATURES)}")
    if not Path(file).is_file():
        raise StageError(f"{file}: no such file: give the file of {kind}")
    return FEATURES[kind].load()(file, device)


def train_digits_cnn(
    folder: Path, seed: int, steps: int, batch: int, learning_rate: float, heldout: int
) -> tuple[DigitsCNN, float]:
    """Train the digits classifier; returns it and its accuracy on held-out images.

    Args:
        folder: images of the digits.
        seed: number that every draw follows from.
        steps: steps of AdamW.
        batch: images a step.
        learning_rate: peak rate.
        heldout: images for the accuracy, never trained on.
    """
    from anisodiff.data.image_sets import load

    torch.manual_seed(seed)
    images, unseen = load(folder).split(heldout)
    network = DigitsCNN()
    optimizer = torch.optim.AdamW(network.parameters(), lr=learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
    for step in range(steps):
        generator = torch.Generator().manual_seed((seed * 0x9E3779B1 + step) % 2**32)
        index = torch.randint(len(images), (batch,), generator=generator)
        shift = torch.randint(-1, 2, (2,), generator=generator).tolist()
        pixels, labels = images.take(index)
        x = torch.roll(to_unit(pixels), shift, dims=(2, 3))
        value = functional.cross_entropy(network(x), labels.argmax(1), label_smoothing=0.1)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        pixels, labels = unseen.take(torch.arange(len(unseen)))
        right = network(to_unit(pixels)).argmax(1) == labels.argmax(1)
    return network.eval(), float(right.float().mean())
