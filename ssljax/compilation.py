"""Compiled programs outlive the process, so that a job that is started again does not compile again."""

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
from etils import epath
from jax.experimental.compilation_cache import compilation_cache as jax_cache

_UNREADABLE = "Error reading persistent compilation cache entry for '(.*?)'"
_WORTH = 0.05  # seconds of compilation from which on a program is kept; jax's own 1.0 leaves out too many small ones


@contextmanager
def compilation_cache(folder: epath.PathLike) -> Iterator[None]:
    """Inside, jax keeps compiled programs in `folder`, unless the user has named one (`JAX_COMPILATION_CACHE_DIR`).

    Programs are found by what they compute, the versions of jax and XLA, the flags and the kind of the chips (of CPUs,
    their instruction sets), so another machine never gets a program that it cannot run. An entry that cannot be read,
    as a kill in the middle of writing leaves it, costs a warning and a compilation, and is replaced.

    jax lets process 0 write only. On CPUs the programs of the other processes go by other names, so those processes
    compile at every start. What lies in `folder` is machine code: use no folder that others can write to.
    """
    settings = {"jax_compilation_cache_dir": str(folder), "jax_persistent_cache_min_compile_time_secs": _WORTH}
    before = {name: jax.config.values[name] for name in settings}
    if before["jax_compilation_cache_dir"]:
        yield
        return
    for name, value in settings.items():
        jax.config.update(name, value)
    jax_cache.reset_cache()  # jax goes on with a folder that it has opened before
    show = warnings.showwarning

    def forget_unreadable(message: Warning | str, *rest: Any, **more: Any) -> None:
        # Or jax would keep the entry, and compile at every start.
        if found := re.match(_UNREADABLE, str(message)):
            for entry in epath.Path(folder).glob(f"{found[1]}-*"):
                entry.unlink(missing_ok=True)
        show(message, *rest, **more)

    warnings.showwarning = forget_unreadable
    try:
        yield
    finally:
        warnings.showwarning = show
        for name, value in before.items():
            jax.config.update(name, value)
        jax_cache.reset_cache()
