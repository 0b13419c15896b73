"""Eight virtual CPU devices for every test; meshes of 1, 2, 4 and 8 are cut from them."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of small real data sets (`SSLJAX_DATA`); tests that need it are skipped without it."""
    folder = os.environ.get("SSLJAX_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("set SSLJAX_DATA to the folder of real data sets to run this test")
    return Path(folder)
