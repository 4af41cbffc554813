"""Devices that are not here, to compile for: libtpu and the CUDA plugin of JAX can do so on any machine."""

import os
import re
from importlib import metadata, util
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jaxpost.chips import Topology
from jaxpost.errors import ConfigError, one_line

# A machine with a TPU would be asked which it has, and one without warns that it cannot be; plans may run side by side.
TPU_SETTINGS = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
# How libtpu says that a program is too large: of all that it needs, or of what it needs beside its arguments.
ALL = r"Used ([\d.]+)([GM]) of [\d.]+[GM] hbm"
TEMPORARIES = r"HLO temporaries \(([\d.]+)([GM])\) exceeds available HBM"


class Refused(NamedTuple):
    """That a compiler finds a program too large.

    Attributes:
        bytes: that a device would need.
        with_arguments: whether the program's arguments are among them.
    """

    bytes: float
    with_arguments: bool


def devices_of(topology: Topology) -> list[Any]:
    """Stand-ins for the devices of a topology, which programs can be compiled for.

    Raises:
        ConfigError: what compiles for them is not installed (the command that does so is named), or it knows no such
            arrangement.
    """
    from jax.experimental import topologies

    if not jax.config.jax_platforms:  # or its plugins look for the chips
        jax.config.update("jax_platforms", "cpu")
    if topology.chip.platform == "tpu":
        os.environ["TPU_LIBRARY_PATH"] = str(_libtpu(topology.name))
        for name, value in TPU_SETTINGS.items():
            os.environ.setdefault(name, value)
        options = {"platform": "tpu", "topology_name": topology.name}
    else:
        _find_ptxas(topology.name)
        shape = f"1x1x{topology.dims[0]}"  # slices, hosts, devices
        options = {"platform": "cuda", "topology_name": topology.name, "topology": shape}
        options["target_config"] = topology.chip.target
    try:
        return list(topologies.get_topology_desc(**options).devices)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        raise ConfigError(f"--topology {topology.name}: the compiler does not know it ({one_line(error)})") from error


def _libtpu(name: str) -> Path:
    """The library that compiles for TPUs."""
    if "TPU_LIBRARY_PATH" in os.environ:
        return Path(os.environ["TPU_LIBRARY_PATH"])
    found = util.find_spec("libtpu")
    if found is None or not found.submodule_search_locations:
        wanted = next(need.split(";")[0] for need in metadata.requires("jax") or () if need.startswith("libtpu"))
        raise ConfigError(f"--topology {name} needs libtpu, which also runs without a TPU: pip install '{wanted}'")
    return Path(found.submodule_search_locations[0]) / "libtpu.so"


def _find_ptxas(name: str) -> None:
    """Let XLA find the assembler, and check that the plugin is there."""
    version = metadata.version("jax")
    if util.find_spec("jax_plugins") is None or util.find_spec("jax_plugins.xla_cuda12") is None:
        raise ConfigError(
            f"--topology {name} needs JAX's CUDA plugin, which also runs without a GPU: pip install --no-deps "
            f"jax-cuda12-plugin=={version} jax-cuda12-pjrt=={version} nvidia-cuda-nvcc-cu12"
        )
    package = util.find_spec("nvidia.cuda_nvcc") if util.find_spec("nvidia") else None
    if package is not None and package.submodule_search_locations:
        home = package.submodule_search_locations[0]
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_cuda_data_dir={home}".strip()


def compiled(lowered: Any) -> Any:
    """Compile; returns the executable, or that it is `Refused`."""
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        found = {pattern: re.search(pattern, str(error)) for pattern in (ALL, TEMPORARIES)}
        pattern, match = next(((pattern, match) for pattern, match in found.items() if match), (ALL, None))
        if "RESOURCE_EXHAUSTED" not in str(error) or match is None:
            raise
        return Refused(float(match[1]) * (2**30 if match[2] == "G" else 2**20), pattern == ALL)
