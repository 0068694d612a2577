"""Strict settings for every test: promotions are errors, 8 CPU devices, reproducible examples."""

import gc
import os
import tempfile

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import hypothesis
import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# A program that several tests need is compiled once. The directory is this process's own, so that no test depends on
# what another run left.
PROGRAMS = tempfile.TemporaryDirectory(prefix="qjax-programs-")
jax.config.update("jax_compilation_cache_dir", PROGRAMS.name)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)

# Tracing makes millions of objects that live on: looking through them so often is a twentieth of the time.
gc.set_threshold(100_000, 50, 100)

hypothesis.settings.register_profile("qjax", deadline=None, derandomize=True, max_examples=50)
hypothesis.settings.load_profile("qjax")


def pytest_configure(config):
    """Tests are of the CPU, but for ``pytest -m gpu``: other platforms may be there for their compilers alone."""
    if config.option.markexpr != "gpu":
        platforms = os.environ.setdefault("JAX_PLATFORMS", "cpu")  # for processes that tests start
        jax.config.update("jax_platforms", platforms)


def pytest_unconfigure():
    PROGRAMS.cleanup()


@pytest.fixture(autouse=True, scope="module")
def empty_caches():
    """JAX remembers some thousand calls of jit in a process; once they are many, ``_cache_size`` of new ones is 0."""
    jax.clear_caches()
