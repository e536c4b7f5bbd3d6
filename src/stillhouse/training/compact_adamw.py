"""AdamW with 8-bit moments, or for bfloat16 weights.

AdamW is by Loshchilov and Hutter, Decoupled Weight Decay Regularization (arXiv:1711.05101). 8-bit
moments follow Dettmers et al., 8-bit Optimizers via Block-wise Quantization (arXiv:2110.02861),
with the codes of torchao.optim.AdamW8bit: a code of the dynamic map for each value, and a float32
scale for each block.

Every update is computed in float32. A block never crosses a row of a weight, and the noise of
stochastic rounding depends on the position in the complete weight, so the result does not depend on
how weights are sharded.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from stillhouse.processes import first_row, local_part

BLOCK = 256
"""Maximum number of values that share a scale."""
SMALLEST_BLOCK = 16
"""Weights whose rows cannot be divided into blocks of at least this size have float32 moments."""
CHUNK = {"cpu": 1 << 18, "cuda": 1 << 23}
"""Number of values that are updated at once, to avoid float32 copies of a whole weight."""
MOMENTS = ("exp_avg", "exp_avg_sq")
SCALE = "_scale"
_32_BITS = 0xFFFFFFFF


class CompactAdamW(Optimizer):
    """AdamW with moments of `bits` bits, for float32 or bfloat16 weights.

    bfloat16 weights are rounded stochastically: a weight's expected value is the result of the
    float32 update, which rounding to nearest would often lose. seed: for stochastic rounding.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        bits: Literal[8, 32] = 32,
        seed: int = 0,
    ) -> None:
        options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**options, "bits": bits, "seed": seed, "matrices": False})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for number, group, weight in self.numbered(matrices=False):
            state = self.state[weight]
            if not state:
                state.update(_first_state(weight, group["bits"]))
            state["step"] += 1
            _update(weight, state, group, number)
        return loss

    def numbered(self, *, matrices: bool) -> Iterator[tuple[int, dict[str, Any], Any]]:
        """Yield the number, group, and weight of each weight with a gradient.

        matrices: whether to yield weights of groups whose key `matrices` is set, or the others.
        """
        everything = [(group, each) for group in self.param_groups for each in group["params"]]
        for number, (group, weight) in enumerate(everything):
            if weight.grad is not None and group.get("matrices", False) == matrices:
                yield number, group, weight

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state. Raises ValueError if its moments have a different number of bits."""
        saved = state_dict["param_groups"]
        if any(group.get("bits") != self.defaults["bits"] for group in saved):
            raise ValueError(f"the state's moments do not have {self.defaults['bits']} bits")
        # torch would convert every tensor, including the codes, to its weight's dtype.
        super().load_state_dict({**state_dict, "state": {}})
        for group, old in zip(self.param_groups, saved, strict=True):
            for weight, number in zip(group["params"], old["params"], strict=True):
                if number in state_dict["state"]:  # an empty entry would count as a state
                    self.state[weight] = {
                        name: value.to("cpu" if name == "step" else weight.device)
                        for name, value in state_dict["state"][number].items()
                    }


def block_of(width: int, dimensions: int) -> int | None:
    """The number of a row's values that share a scale: the largest divisor of its width up to
    BLOCK.

    None, for float32 moments, if the weight is a vector or the divisor is below SMALLEST_BLOCK.
    """
    if dimensions < 2:
        return None
    largest = max(size for size in range(1, BLOCK + 1) if width % size == 0)
    return largest if largest >= SMALLEST_BLOCK else None


def _first_state(weight: Tensor, bits: int) -> dict[str, Tensor]:
    like: Any = {"memory_format": torch.contiguous_format}
    state = {"step": torch.zeros((), dtype=torch.float32)}
    block = block_of(weight.shape[-1], weight.dim()) if bits == 8 and weight.dim() else None
    for name in MOMENTS:
        if block is None:
            state[name] = torch.zeros_like(weight, dtype=torch.float32, **like)
            continue
        state[name] = torch.zeros_like(weight, dtype=torch.uint8, **like)  # the scale is 0
        scales = (*weight.shape[:-1], weight.shape[-1] // block)
        state[name + SCALE] = _zeros_divided_alike(scales, weight)
    return state


def _zeros_divided_alike(shape: tuple[int, ...], weight: Tensor) -> Tensor:
    """Float32 zeros of a shape, with rows sharded like the weight's."""
    if not isinstance(weight, DTensor):
        return torch.zeros(shape, device=weight.device)
    return torch.distributed.tensor.zeros(
        *shape, device_mesh=weight.device_mesh, placements=weight.placements
    )


def _update(weight: Tensor, state: dict[str, Tensor], group: dict[str, Any], number: int) -> None:
    stored = local_part(weight)
    own = stored.contiguous()
    gradient = local_part(weight.grad).contiguous()  # type: ignore[arg-type]
    moments = {name: local_part(value) for name, value in state.items() if name != "step"}
    step = int(state["step"])
    start = first_row(weight) * weight.shape[1:].numel()
    key = rounding_key(group["seed"], number, step)
    codes, scale = moments[MOMENTS[0]], moments.get(MOMENTS[0] + SCALE)
    block = 1 if scale is None else codes.shape[-1] // scale.shape[-1]
    size = CHUNK.get(own.device.type, CHUNK["cpu"]) // block * block
    for begin in range(0, own.numel(), size):
        part = slice(begin, begin + size)
        scales = slice(begin // block, -(-(begin + size) // block))
        values = own.view(-1)[part]
        found = {
            name: value.view(-1)[scales if name.endswith(SCALE) else part]
            for name, value in moments.items()
        }
        new = _step(values.float(), gradient.view(-1)[part].float(), found, group, step)
        if own.dtype == torch.bfloat16:
            new = rounded(new, start + begin, key)
        values.copy_(new)
    if own is not stored:
        stored.copy_(own)


def _step(
    weight_N: Tensor,
    gradient_N: Tensor,
    moments: dict[str, Tensor],
    group: dict[str, Any],
    step: int,
) -> Tensor:
    """Return the weights after a step, and update the moments in place.

    Products and sums are separate operations, since the rounding of fused ones would depend on the
    position.
    """
    (beta1, beta2), rate = group["betas"], float(group["lr"])
    mean_N = _read(moments, MOMENTS[0]).mul_(beta1).add_(gradient_N * (1 - beta1))
    square_N = _read(moments, MOMENTS[1]).mul_(beta2).add_(gradient_N.square() * (1 - beta2))
    _write(moments, MOMENTS[0], mean_N)
    _write(moments, MOMENTS[1], square_N)
    size_N = square_N.sqrt_().div_((1 - beta2**step) ** 0.5).add_(group["eps"])
    change_N = mean_N.div(size_N).mul_(rate / (1 - beta1**step))
    return weight_N.mul(1 - rate * group["weight_decay"]).sub_(change_N)


def _read(moments: dict[str, Tensor], name: str) -> Tensor:
    """A float32 copy of a moment."""
    if name + SCALE not in moments:
        return moments[name].clone()
    values = _map(name == MOMENTS[0], moments[name].device)[moments[name].int()]
    scales = moments[name + SCALE]
    return values.view(len(scales), -1).mul_(scales[:, None]).view(-1)


def _write(moments: dict[str, Tensor], name: str, value_N: Tensor) -> None:
    if name + SCALE not in moments:
        moments[name].copy_(value_N)
        return
    scales = moments[name + SCALE]
    blocks = value_N.view(len(scales), -1)
    scales.copy_(blocks.abs().amax(-1).clamp_(min=1e-12))
    borders = _borders(name == MOMENTS[0], value_N.device)
    codes = torch.bucketize(blocks / scales[:, None], borders, out_int32=True, right=True)
    moments[name].copy_(codes.view(-1))


@cache
def _map(signed: bool, device: torch.device) -> Tensor:
    """The 256 values of the dynamic map, which has fewer digits for smaller powers of ten."""
    values = [torch.tensor([0.0, 1.0])]
    for power in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (power if signed else power + 1) + 1)
        means = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (power - 6)
        values += [means, -means] if signed else [means]
    return torch.cat(values).sort().values.to(device)


@cache
def _borders(signed: bool, device: torch.device) -> Tensor:
    """The midpoints between neighboring values of the map."""
    values = _map(signed, device)
    return (values[1:] + values[:-1]) / 2


def rounded(values_N: Tensor, start: int, key: int) -> Tensor:
    """Round float32 values to bfloat16 stochastically.

    The probability of rounding away from zero is the fraction for which bfloat16 has no digits.
    start: position of the first value in the whole weight. key: determines the noise.
    """
    noise_N = torch.arange(start, start + len(values_N), device=values_N.device) ^ key
    noise_N = _mixed(noise_N & _32_BITS) & 0xFFFF
    bits_N = values_N.view(torch.int32) + noise_N.int()
    return (bits_N & -0x10000).view(torch.float32).bfloat16()


def _mixed(number_N: Tensor) -> Tensor:
    """Hash 32-bit integers with lowbias32 (https://nullprogram.com/blog/2018/07/31/)."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        number_N = ((number_N ^ (number_N >> shift)) * factor) & _32_BITS
    return number_N ^ (number_N >> 16)


def rounding_key(*parts: int) -> int:
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little")


@torch.no_grad()
def clip_gradients(parameters: Iterable[Tensor], limit: float) -> Tensor:
    """Clip the gradients' total norm to `limit`, and return the norm before clipping.

    Like torch.nn.utils.clip_grad_norm_, but with float32 sums even for bfloat16 gradients.
    """
    gradients = [each.grad for each in parameters if each.grad is not None]
    parts = [local_part(each) for each in gradients]
    norms = [torch.linalg.vector_norm(each, dtype=torch.float32) for each in parts]
    total = torch.stack(norms).square().sum()
    meshes = {each.device_mesh for each in gradients if isinstance(each, DTensor)}
    for mesh in meshes:
        dist.all_reduce(total, group=mesh.get_group(mesh.mesh_dim_names[-1]))  # type: ignore[index]
    norm = total.sqrt()
    factor = (limit / (norm + 1e-6)).clamp(max=1.0)
    for part in parts:
        part.mul_(factor)
    return norm
