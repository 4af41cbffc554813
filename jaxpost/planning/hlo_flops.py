"""FLOPs of one HLO instruction."""

import math
import re
from functools import lru_cache

import numpy as np

from jaxpost.models.flash import TILE
from jaxpost.models.splash import tile
from jaxpost.planning.hlo_text import ArrayType, Computation, Instruction

_KERNELS = ("tpu_custom_call", "__gpu$xla.gpu.triton", "mosaic_gpu", "mosaic_gpu_v2", "triton_kernel_call")
# Products of tokens with tokens that attention kernels compute for each head; the backward passes compute scores again.
_ATTENTION_PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4}
_CUDNN_PRODUCTS = {"forward": 2, "backward": 5}


def flops(computation: Computation, it: Instruction) -> float | None:
    """Of a matrix product, a convolution or a kernel; 0 of any other; None of a kernel that does not tell."""
    if it.opcode == "dot":
        return _product(computation, it, r"lhs_contracting_dims=\{([\d,]*)\}")
    if it.opcode == "ragged-dot":
        # Each row meets one group's matrix; where the rows are summed over, each belongs to one group's result.
        summed = set(it.numbers(r"lhs_ragged_dims=\{([\d,]*)\}")) <= set(
            it.numbers(r"lhs_contracting_dims=\{([\d,]*)\}")
        )
        groups = it.results[0].dims[0] if summed else 1
        return _product(computation, it, r"lhs_contracting_dims=\{([\d,]*)\}") / groups
    if it.opcode == "convolution":
        return _convolution(computation, it)
    return _custom_call(computation, it) if it.opcode == "custom-call" else 0.0


def _product(computation: Computation, it: Instruction, contracting: str) -> float:
    dims = computation.type_of(it.operands[0]).dims
    return 2.0 * math.prod(it.results[0].dims) * math.prod(dims[dim] for dim in it.numbers(contracting))


def _convolution(computation: Computation, it: Instruction) -> float:
    """On TPU every matrix product is one; a dimension of batches is a spatial one, of which most places are empty."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", it.attributes)
    assert labels, it
    arrays = (*(computation.type_of(name) for name in it.operands), it.results[0])
    given, kernel, out = (
        dict(zip(label, array.dims, strict=True)) for label, array in zip(labels.groups(), arrays, strict=True)
    )
    window = dict(re.findall(r"(\w+)=([-\w]+)", it.attribute(r"window=\{([^}]*)\}")))
    pairs = 1
    for dim in range(len(out) - 2):
        stride, given_dilation, kernel_dilation = (
            int(window[key].split("x")[dim]) if key in window else 1 for key in ("stride", "lhs_dilate", "rhs_dilate")
        )
        low = int(window["pad"].split("x")[dim].split("_")[0]) if "pad" in window else 0
        sizes = (given[str(dim)], kernel[str(dim)], out[str(dim)])
        pairs *= _window_pairs(*sizes, stride, low, given_dilation, kernel_dilation)
    return 2.0 * out["b"] * out["f"] * kernel["i"] * pairs


@lru_cache
def _window_pairs(
    given: int, kernel: int, out: int, stride: int, low: int, given_dilation: int, kernel_dilation: int
) -> int:
    """How many (place of the output, place of the kernel) along a dimension meet an element of the input."""
    starts = np.arange(out) * stride - low
    count = 0
    for place in range(0, kernel * kernel_dilation, kernel_dilation):
        element, between = np.divmod(starts + place, given_dilation)
        count += int(np.sum((between == 0) & (element >= 0) & (element < given)))
    return count


def _custom_call(computation: Computation, it: Instruction) -> float | None:
    target = it.attribute(r'custom_call_target="([^"]*)"')
    if estimate := it.attribute(r'"cost_estimate":\{[^}]*"flops":"?(\d+)'):
        return float(estimate)
    if target.startswith("__cublas$"):
        return _product(computation, it, r'"lhs_contracting_dimensions":\[([^\]]*)\]')
    if target.startswith("__cudnn$fmha"):
        products = _CUDNN_PRODUCTS["backward" if "Backward" in target else "forward"]
        scores = it.numbers(r'"intermediate_tensor_shape":\{[^}]*?"dimensions":\[([^\]]*)\]')
        return 2.0 * products * math.prod(scores) * computation.type_of(it.operands[0]).dims[-1]
    if kernel := re.search(r"(splash_m[hq]a|flash)_(fwd|dq|dkv)", it.attributes):
        query, key, *_ = filter(_is_float, computation.types(it))
        length = key.dims[-2]
        tiles = max(1, length // (TILE if kernel[1] == "flash" else tile(length)))
        share = (tiles + 1) / (2 * tiles)  # those above the diagonal are skipped
        return share * 2.0 * _ATTENTION_PRODUCTS[kernel[2]] * math.prod(query.dims) * length
    if grouped := it.attribute("grouped_(rows|kernels)"):
        rows, other = filter(_is_float, computation.types(it))
        return 2.0 * math.prod(rows.dims) * (other if grouped == "kernels" else it.results[0]).dims[-1]
    # Kernels that only give integers prepare others.
    return None if target in _KERNELS and any(_is_float(array) for array in it.results) else 0.0


def _is_float(array: ArrayType) -> bool:
    return array.dtype.startswith(("f", "bf"))
