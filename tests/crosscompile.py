"""Compiles kernels for accelerators that are not there: lowering needs jax alone, compiling the plugin of the target.

A compiler may crash, and two processes fight for libtpu, so ``compiled`` works in a process of its own:
``compiled("h100", "test_kernels_gpu:cases")`` imports the module, calls the function, which returns a dict of
``name: (function, shapes)``, these in any trees, and returns ``name: report``.
"""

import importlib
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from typing import NamedTuple

import jax
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, SingleDeviceSharding, use_abstract_mesh

# Adapted from the target configurations that XLA's tests use; device-less compiles read no device.
H100_CONFIG = """
gpu_device_info { threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 3352320000000
  l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 84929347584 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 } registers_per_core_limit: 65536 registers_per_block_limit: 65536 }
platform_name: "CUDA" dnn_version_info { major: 9 minor: 12 } runtime_version { major: 13 minor: 0 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


class Target(NamedTuple):
    """A device to compile for: the plugin's package, the arguments of its topology, and its environment."""

    platform: str
    package: str
    topology: dict
    device: AbstractDevice
    environment: dict = {}


def _tpu(kind: str) -> AbstractDevice:
    return AbstractDevice(device_kind=kind, num_cores=1, platform="tpu")


H100 = Target(
    "cuda",
    "jax_cuda13_plugin",
    {"topology_name": "h100", "topology": "1x1x1", "target_config": H100_CONFIG},
    AbstractDevice(device_kind="NVIDIA H100", num_cores=132, platform="gpu"),
    {"MOSAIC_GPU_DUMP_PTX": "1", "MOSAIC_GPU_DUMP_PTXAS": "1"},
)
TARGETS = {
    "h100": H100,
    # Products by cuBLAS: without a device there is none to try others on.
    "h100-libraries": H100._replace(
        environment={"XLA_FLAGS": "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"}
    ),
    "v5e": Target("tpu", "libtpu", {"topology_name": "v5e:2x2"}, _tpu("TPU v5 lite")),
    "v6e": Target("tpu", "libtpu", {"topology_name": "v6e:2x2"}, _tpu("TPU v6 lite")),
    "tpu7x": Target("tpu", "libtpu", {"topology_name": "tpu7x:2x2x1"}, _tpu("TPU7x")),
}


def lowered(target: str, function, *shapes):
    """Returns the function lowered for a target."""
    platform, _, _, device, _ = TARGETS[target]
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        return jax.jit(function).trace(*shapes).lower(lowering_platforms=(platform,))


def is_installed(target: str) -> bool:
    """Returns whether the compiler of a target is there."""
    return importlib.util.find_spec(TARGETS[target].package) is not None


def compiled(target: str, cases: str, timeout: float = 600) -> dict[str, dict]:
    """Returns the reports of compiled cases: ``error``, or the optimised ``hlo`` and the files that were ``dumped``."""
    with tempfile.TemporaryDirectory() as directory:
        here = str(pathlib.Path(__file__).parent)
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "TPU_SKIP_MDS_QUERY": "1",
            "TPU_ACCELERATOR_TYPE": "v6e-4",
            "TPU_WORKER_HOSTNAMES": "localhost",
            "TPU_WORKER_ID": "0",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
            "PYTHONPATH": os.pathsep.join([here, str(pathlib.Path(here).parent), os.environ.get("PYTHONPATH", "")]),
        }
        command = [sys.executable, __file__, target, cases, directory]
        environment |= TARGETS[target].environment
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout, check=False)
        report = pathlib.Path(directory, "report.json")
        if done.returncode or not report.exists():
            raise RuntimeError(f"compiled: {command} failed with {done.returncode}:\n{done.stderr[-5000:]}")
        return json.loads(report.read_text())


def main(target: str, cases: str, directory: str) -> None:
    """Compiles the cases and writes ``report.json`` into the directory."""
    platform, _, topology, _, _ = TARGETS[target]
    device = topologies.get_topology_desc(platform=platform, **topology).devices[0]
    sharding = SingleDeviceSharding(device)
    module, name = cases.split(":")
    reports: dict[str, dict] = {}
    for case, (function, shapes) in getattr(importlib.import_module(module), name)().items():
        dump = pathlib.Path(directory, re.sub(r"\W", "_", case))
        dump.mkdir()
        os.environ["MOSAIC_GPU_DUMP_TO"] = str(dump)
        placed = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), shapes)
        try:
            hlo = lowered(target, function, *placed).compile().as_text()
            reports[case] = {"hlo": hlo, "dumped": {f.name: f.read_text() for f in sorted(dump.iterdir())}}
        except Exception as error:
            reports[case] = {"error": f"{type(error).__name__}: {error}"}
    pathlib.Path(directory, "report.json").write_text(json.dumps(reports))


if __name__ == "__main__":
    main(*sys.argv[1:])
