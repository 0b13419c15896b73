"""The small encoders of `configs/simclr.py` in plain PyTorch: names, parameters and mathematics of `ssljax.models`.

`load` fills a module from ssljax's parameters, so both sides of a comparison start from the same weights.
"""

import numpy as np
import torch
from torch import nn
from torch.nn import functional


class BasicBlock(nn.Module):
    def __init__(self, channels_in: int, channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.projects = stride != 1 or channels_in != channels
        if self.projects:
            self.shortcut_conv = nn.Conv2d(channels_in, channels, 1, stride, bias=False)
            self.shortcut_norm = nn.BatchNorm2d(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = functional.relu(self.norm1(self.conv1(x)), inplace=True)
        y = self.norm2(self.conv2(y))
        if self.projects:
            x = self.shortcut_norm(self.shortcut_conv(x))
        return functional.relu(y + x, inplace=True)


class ResNet(nn.Module):
    """ResNet of basic blocks with a 3x3 stem; images [b, 3, h, w] -> features [b, out_dim]."""

    def __init__(self, blocks: tuple[int, ...], channels: tuple[int, ...]):
        super().__init__()
        self.stem_conv = nn.Conv2d(3, channels[0], 3, 1, 1, bias=False)
        self.stem_norm = nn.BatchNorm2d(channels[0])
        self.out_dim, self.names = channels[0], []
        for i, (count, width) in enumerate(zip(blocks, channels, strict=True)):
            for j in range(count):
                self.names.append(f"stage{i}_block{j}")
                block = BasicBlock(self.out_dim, width, 2 if i > 0 and j == 0 else 1)
                self.add_module(self.names[-1], block)
                self.out_dim = width

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = functional.relu(self.stem_norm(self.stem_conv(images)), inplace=True)
        for name in self.names:
            x = getattr(self, name)(x)
        return x.mean((2, 3))


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, d = x.shape
        query, key, value = self.qkv(x).view(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        y = functional.scaled_dot_product_attention(query, key, value)
        return self.out(y.transpose(1, 2).reshape(b, n, d))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, eps: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps)
        self.mlp = nn.Sequential()
        self.mlp.add_module("fc1", nn.Linear(width, 4 * width))
        self.mlp.add_module("gelu", nn.GELU())
        self.mlp.add_module("fc2", nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """Pre-norm ViT without class token; images [b, 3, h, w] -> mean of the last tokens [b, width]."""

    def __init__(self, image_size: int, patch: int, width: int, depth: int, heads: int, eps: float = 1e-6):
        super().__init__()
        self.patch, self.out_dim = patch, width
        self.patch_embed = nn.Linear(3 * patch**2, width)
        self.positions = nn.Parameter(torch.zeros((image_size // patch) ** 2, width))
        self.transformer = nn.Sequential()
        for i in range(depth):
            self.transformer.add_module(f"block_{i}", Block(width, heads, eps))
        self.norm = nn.LayerNorm(width, eps)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        b, c, h, w = images.shape
        p = self.patch
        patches = images.view(b, c, h // p, p, w // p, p).permute(0, 2, 4, 3, 5, 1).reshape(b, -1, p * p * c)
        x = self.transformer(self.patch_embed(patches) + self.positions)
        return self.norm(x).mean(1)


def load(module: nn.Module, arrays: dict[str, np.ndarray]) -> None:
    """Fills `module` from ssljax's parameters ("a/b/kernel"); each array must be used and each parameter filled."""
    left = dict(arrays)

    def take(name: str) -> np.ndarray:
        prefix, _, leaf = name.rpartition("/")
        if leaf == "weight":
            leaf = "kernel" if f"{prefix}/kernel" in left else "scale"
        value = left.pop(f"{prefix}/{leaf}" if prefix else leaf)
        if leaf == "kernel" and value.ndim == 4:
            return value.transpose(3, 2, 0, 1)  # [h, w, in, out] -> [out, in, h, w]
        if prefix.endswith(("query", "key", "value")):
            return value.reshape(len(value), -1).T if leaf == "kernel" else value.reshape(-1)
        if prefix.endswith("attn/out") and leaf == "kernel":
            return value.reshape(-1, value.shape[-1]).T
        return value.T if leaf == "kernel" else value

    for dotted, parameter in module.named_parameters():
        name = dotted.replace(".", "/")
        if "/qkv/" in name:
            value = np.concatenate([take(name.replace("qkv", part)) for part in ("query", "key", "value")])
        else:
            value = take(name)
        if value.shape != tuple(parameter.shape):
            raise ValueError(f"{dotted}: {tuple(parameter.shape)} here, but ssljax's parameter is {value.shape}")
        with torch.no_grad():
            parameter.copy_(torch.from_numpy(np.ascontiguousarray(value)))
    if left:
        raise ValueError(f"ssljax has parameters that this network lacks: {sorted(left)}")
