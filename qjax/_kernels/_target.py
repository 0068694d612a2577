"""What a program is compiled for."""

from typing import NamedTuple

import jax


class Target(NamedTuple):
    """A platform ("cpu", "gpu", "tpu") and the kind of its devices, as JAX calls them.

    That of the current abstract mesh if it names a device, which cross-compilation sets; else the default device's.
    """

    platform: str
    kind: str

    @classmethod
    def current(cls) -> "Target":
        device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
        device = device or getattr(jax.config, "jax_default_device")  # noqa: B009
        if device is None or isinstance(device, str):
            device = jax.devices(device)[0]
        return cls("gpu" if device.platform == "cuda" else device.platform, device.device_kind)

    @property
    def is_hopper(self) -> bool:
        """Whether it has the warpgroup products of compute capability 9.0, which no other GPU has."""
        return self.platform == "gpu" and any(name in self.kind for name in ("H100", "H200", "H800", "H20", "GH200"))


def is_alone() -> bool:
    """Returns whether a kernel meets whole arrays: on one device, or within a ``shard_map`` over all axes."""
    mesh = jax.sharding.get_abstract_mesh()
    manual = len(mesh.axis_names) > 0 and set(mesh.manual_axes) == set(mesh.axis_names)
    return manual or jax.device_count() == 1
