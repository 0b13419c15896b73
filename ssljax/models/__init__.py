"""Backbones and heads: Linen modules that know nothing of losses."""

from ssljax.models.attention import Attention
from ssljax.models.conv import Conv, conv
from ssljax.models.heads import Projector, Prototypes
from ssljax.models.resnet import ResNet
from ssljax.models.text import TextTransformer
from ssljax.models.transformer import MLP, Block, Transformer
from ssljax.models.vit import AttentionPool, ViT

__all__ = [
    "MLP",
    "Attention",
    "AttentionPool",
    "Block",
    "Conv",
    "Projector",
    "Prototypes",
    "ResNet",
    "TextTransformer",
    "Transformer",
    "ViT",
    "conv",
]
