"""Self-supervised, vision-language, audio-visual, 3D and graph pretraining in JAX: one loop, one file per method."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["__version__", "load"]

if TYPE_CHECKING:
    from ssljax.api import load


def __getattr__(name: str) -> Any:
    # `import ssljax.losses` should not pay for the trainer.
    if name == "load":
        from ssljax.api import load

        return load
    raise AttributeError(f"module 'ssljax' has no attribute {name!r}")
