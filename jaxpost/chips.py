"""The chips that a run may be on or planned for: what they have and reach, and how the compiler is asked for them.

Rates are those that their makers publish, for bfloat16 without sparsity; of a network, what a chip receives over all
of its links one way.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

from jaxpost.errors import ConfigError
from jaxpost.options import nearest

_TPU = "https://cloud.google.com/tpu/docs/"
_SCALING = "; links: Austin et al., 2025, How to Scale Your Model, https://jax-ml.github.io/scaling-book/tpus"


class Chip(NamedTuple):
    """A kind of accelerator.

    Attributes:
        platform: JAX's name for it, tpu or cuda.
        memory: bytes.
        flops: a second.
        bandwidth: of the memory, bytes a second.
        network: bytes a second, of a torus's direction for TPUs, of all links for GPUs.
        source: of these numbers.
        target: of a GPU, what the compiler has to be told of it.
    """

    platform: str
    memory: float
    flops: float
    bandwidth: float
    network: float
    source: str
    target: str = ""


def _gpu(name: str, major: int, cores: int, memory: float, bandwidth: float, shared: int, clock: float, l2: int) -> str:
    """The text of a GpuTargetConfigProto."""
    return f"""gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: {shared + 1024} threads_per_core_limit: 2048 core_count: {cores} fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth:.0f} l2_cache_size: {l2} clock_rate_ghz: {clock} device_memory_size: {memory:.0f}
  shared_memory_per_block_optin: {shared} registers_per_core_limit: 65536 registers_per_block_limit: 65536
  cuda_compute_capability {{ major: {major} minor: 0 }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 }}
runtime_version {{ major: 12 minor: 9 }}
device_description_str: "{name}"
"""


_H100 = _gpu("NVIDIA H100 80GB HBM3", 9, 132, 84_942_979_072, 3.35e12, 232_448, 1.98, 50 * 2**20)
_H200 = _gpu("NVIDIA H200", 9, 132, 150_100_000_000, 4.8e12, 232_448, 1.98, 50 * 2**20)
_A100 = _gpu("NVIDIA A100-SXM4-80GB", 8, 108, 84_900_000_000, 2.039e12, 166_912, 1.41, 40 * 2**20)

CHIPS: dict[str, Chip] = {
    "v4": Chip("tpu", 32 * 2**30, 275e12, 1.2e12, 2 * 4.5e10, _TPU + "v4" + _SCALING),
    "v5e": Chip("tpu", 16 * 2**30, 197e12, 8.1e11, 2 * 4.5e10, _TPU + "v5e" + _SCALING),
    "v5p": Chip("tpu", 95 * 2**30, 459e12, 2.765e12, 2 * 9e10, _TPU + "v5p" + _SCALING),
    "v6e": Chip("tpu", 32 * 2**30, 918e12, 1.64e12, 2 * 9e10, _TPU + "v6e" + _SCALING),
    "tpu7x": Chip("tpu", 192 * 2**30, 2307e12, 7.38e12, 2 * 9e10, _TPU + "tpu7x"),
    "a100": Chip("cuda", 80e9, 312e12, 2.039e12, 3e11, "https://www.nvidia.com/en-us/data-center/a100/", _A100),
    "h100": Chip("cuda", 80e9, 989e12, 3.35e12, 4.5e11, "https://www.nvidia.com/en-us/data-center/h100/", _H100),
    "h200": Chip("cuda", 141e9, 989e12, 4.8e12, 4.5e11, "https://www.nvidia.com/en-us/data-center/h200/", _H200),
}
KINDS = {  # JAX's device_kind -> chip
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5": "v5p",
    "TPU v6 lite": "v6e",
    "TPU7x": "tpu7x",
    "NVIDIA A100-SXM4-40GB": "a100",
    "NVIDIA A100-SXM4-80GB": "a100",
    "NVIDIA A100-PCIE-40GB": "a100",
    "NVIDIA A100 80GB PCIe": "a100",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
}
KNOWN = "v4:4x4x4, v5e:16x16, v5p:4x4x4, v6e:16x16, tpu7x:2x2x1, a100:8, h100:8, h200:8"


def peak_flops(devices: Iterable[Any]) -> float | None:
    """What devices come to at their published rate, a second; None where that is not known, as of CPUs."""
    devices = list(devices)
    kinds = {device.device_kind for device in devices}
    if len(kinds) != 1 or (kind := KINDS.get(kinds.pop())) is None:
        return None
    chip = CHIPS[kind]
    # A chip of some TPUs is two devices, with the same coordinates.
    chips = {(device.process_index, *device.coords) for device in devices} if chip.platform == "tpu" else devices
    return chip.flops * len(chips)


class Topology(NamedTuple):
    """Chips that are connected.

    Attributes:
        name: as it was given, e.g. `v5e:16x16`.
        chip: of which kind.
        dims: chips along each direction of the torus; of GPUs, how many there are.
    """

    name: str
    chip: Chip
    dims: tuple[int, ...]

    def network(self, group: int) -> float:
        """Bytes a second that a chip of a group of so many that work together receives.

        A group on a torus takes the links of as many of its directions as it needs to have room; this is what is
        expected of a good assignment of mesh axes, not what the compiler says.
        """
        if self.chip.platform != "tpu":
            return self.chip.network
        room, directions = 1, 0
        for size in sorted((size for size in self.dims if size > 1), reverse=True):
            if room >= group:
                break
            room, directions = room * size, directions + 1
        return self.chip.network * max(1, directions)


def parse_topology(name: str) -> Topology:
    """`v5e:16x16` or `h100:8`.

    Raises:
        ConfigError: no such chip, or no such arrangement; what there is is listed.
    """
    kind, _, shape = name.partition(":")
    if kind not in CHIPS:
        raise ConfigError(
            f"--topology {name}: unknown chip {kind!r}{nearest(kind, CHIPS)}; there are {KNOWN} and alike"
        )
    sizes, chip = shape.split("x"), CHIPS[kind]
    if not all(size.isdigit() and int(size) for size in sizes) or (chip.platform == "cuda" and len(sizes) > 1):
        raise ConfigError(f"--topology {name}: {shape!r} says not how many chips there are; examples: {KNOWN}")
    return Topology(name, chip, tuple(map(int, sizes)))
