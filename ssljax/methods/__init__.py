"""The methods, one file each. A method of your own needs no entry here: a config may name the class itself."""

from ssljax.methods.image.simclr import SimCLR
from ssljax.methods.language.clip import CLIP

__all__ = ["CLIP", "SimCLR"]
