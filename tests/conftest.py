"""Eight virtual CPU devices for every test; meshes of 1, 2, 4 and 8 are cut from them."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
# Collectives block threads of XLA:CPU. With the scheduler that lets a device do several at once, eight devices on few
# cores can all block in different ones; without it they come in one order.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8 --xla_cpu_enable_concurrency_optimized_scheduler=false"
)

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of small real data sets (`SSLJAX_DATA`); tests that need it are skipped without it."""
    folder = os.environ.get("SSLJAX_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("set SSLJAX_DATA to the folder of real data sets to run this test")
    return Path(folder)
