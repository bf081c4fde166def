"""What scoring documents costs, method by method, and which one is the cheapest: the choice behind `ops.influence`.

    stream  each document's weight gradient is made (a tile at a time, in a buffer that is used again) and multiplied with the
            probes: 2 T din dout FLOP whatever the number of probes, and per document a pass over din * dout elements
    rows    sum over tokens of <b_t, G a_t>: 2 K T din dout FLOP and no pass; the weight gradient, when it is wanted, is a product
            of its own (one for all documents)
    fused   stream inside one GPU kernel (sm_90a): the pass works on accumulators that are in registers

So `stream` is for long documents or several probes, `rows` for short documents and few probes. On a CPU the choice is made
document by document: those of fewer than `Plan.rows_below` tokens go by rows. On a GPU it is made for the whole call.
The pairwise trick (A_i A_p^T) . (B_i B_p^T) needs a probe's samples where these methods need its gradient; from about
din dout / (din + dout) tokens on it costs more than either, and it is not here.

The choice is made from the fixed numbers below, not from a measurement in this process: it changes the last bits of the result,
and two runs must not differ because one machine was busy. `measure_cpu` is for finding out whether the numbers fit a machine.

Legend: T tokens, n documents, K probes, din/dout width of the layer's input/output.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from megatron_r1.utils.errors import DataError

# More than any document has.
ALL = 2**31 - 1


@dataclass(frozen=True)
class Machine:
    """Speeds of one thread of a CPU, or of one GPU. FLOP/s of large products by dtype; bytes/s.

    near: of what stays in the nearest caches during a pass (a document's block, its part of the weight gradient);
    far: of what is read from further away (probes that do not fit there; on a GPU everything).
    tile_loss: extra time of a product cut by documents and tiles over the same product in one piece.
    launch: seconds per kernel. epilogue: tokens' worth of product per probe and document in the fused kernel, `fused_loss`: as
    tile_loss.
    """

    name: str
    flops: dict[torch.dtype, float]
    near: float
    far: float
    tile_loss: float
    launch: float = 0.0
    epilogue: float = 0.0
    fused_loss: float = 0.0
    source: str = ""

    def product(self, flops: float, dtype: torch.dtype) -> float:
        """Seconds for a large matrix product."""
        return flops / self.flops[dtype]


_F32, _BF16, _F16, _F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
CPU = Machine(
    name="cpu", flops={_F32: 1.0e11, _BF16: 4.0e11, _F16: 1.0e11, _F64: 0.5e11}, near=1.0e11, far=6.0e10, tile_loss=0.06,
    source="rough measurements of one thread of a server core with AVX-512 and bf16 instructions",
)  # fmt: skip
GPU = Machine(
    name="cuda", flops={_F32: 5.0e13, _BF16: 6.5e14, _F16: 6.5e14, _F64: 5.0e13}, near=4.3e12, far=4.3e12, tile_loss=0.05,
    launch=5e-6, epilogue=64.0, fused_loss=0.25,
    source="estimates for an H200 (copy bandwidth 4.3 TB/s; fused kernel at 80 % of cuBLAS), not measured with these kernels",
)  # fmt: skip
_MACHINES = {"cpu": CPU, "cuda": GPU}
# Probes whose tile stays in the nearest cache beside the block.
_NEAR_PROBES = 1


@dataclass(frozen=True)
class Estimate:
    """Cost of one method: FLOP of all products, bytes moved by the passes, seconds."""

    method: str
    flops: float
    bytes: float
    seconds: float


@dataclass(frozen=True)
class Plan:
    """The method, what it costs, what the others would (`estimates`, the cheapest first), and why, in one sentence.

    method: `stream`, `rows`, `fused` or `mixed` (CPU: some documents by rows, some by stream). rows_below: documents of fewer
    tokens go by rows; 0: none; ALL: every one.
    """

    method: str
    rows_below: int
    estimates: tuple[Estimate, ...]
    why: str

    @property
    def flops(self) -> float:
        return self.estimates[0].flops

    @property
    def bytes(self) -> float:
        return self.estimates[0].bytes

    @property
    def seconds(self) -> float:
        return self.estimates[0].seconds


@dataclass(frozen=True)
class _Layer:
    """A layer and its probes on a machine: cost per token and per document."""

    machine: Machine
    din: int
    dout: int
    probes: int
    dtype: torch.dtype
    probe_dtype: torch.dtype
    gradient: bool  # whether the weight gradient is wanted

    @property
    def flop(self) -> float:
        """One token's share of a product with the layer's size."""
        return 2.0 * self.din * self.dout

    @property
    def product(self) -> float:
        """Seconds of one token in the weight gradient's product."""
        return self.machine.product(self.flop, self.dtype)

    @property
    def row(self) -> float:
        """Seconds of one token by rows, all probes; without the weight gradient. Mixed dtypes are multiplied in the wider one."""
        return self.probes * self.machine.product(self.flop, self.dtype if self.dtype == self.probe_dtype else self.probe_dtype)

    @property
    def document(self) -> tuple[float, float]:
        """(bytes, seconds) of one document's pass: its block is written and read, the gradient read and written, probes read."""
        block = self.dtype.itemsize if self.machine.name == "cpu" and self.dtype != _F16 else self.wide
        at_hand = self.din * self.dout * (2 * block + (2 * self.wide if self.gradient else 0))
        probes = self.din * self.dout * self.probes * self.probe_dtype.itemsize
        speed = self.machine.near if self.probes <= _NEAR_PROBES else self.machine.far
        return at_hand + probes, at_hand / self.machine.near + probes / speed + 3 * self.machine.launch

    @property
    def wide(self) -> int:
        """Bytes of what sums are made in."""
        return 8 if self.dtype == _F64 else 4

    def stream(self, tokens: int, documents: int) -> Estimate:
        moved, seconds = self.document
        total = tokens * self.product * (1 + self.machine.tile_loss) + documents * seconds
        return Estimate("stream", tokens * self.flop + 2.0 * documents * self.probes * self.din * self.dout, documents * moved, total)

    def rows(self, tokens: int, documents: int) -> Estimate:
        flops = tokens * self.flop * (self.probes + self.gradient)
        moved = tokens * self.probes * min(self.din, self.dout) * (self.wide * 2 + self.dtype.itemsize)
        seconds = tokens * (self.row + self.gradient * self.product) + moved / self.machine.near
        return Estimate("rows", flops, moved, seconds + self.machine.launch * (3 * self.probes + 2 * self.gradient))

    def fused(self, tokens: int, documents: int) -> Estimate:
        spent = tokens * (1 + self.machine.fused_loss) + documents * self.probes * self.machine.epilogue
        moved = self.din * self.dout * (self.probes * self.probe_dtype.itemsize + 8 * self.gradient)
        flops = tokens * self.flop + 2.0 * documents * self.probes * self.din * self.dout
        return Estimate("fused", flops, moved, max(spent * self.product, moved / self.machine.far) + 2 * self.machine.launch)

    def border(self) -> int:
        """The length from which on a document is cheaper by its own gradient than by rows; ALL when none is."""
        moved = self.probes * min(self.din, self.dout) * (self.wide * 2 + self.dtype.itemsize) / self.machine.near
        gain = self.row + moved - (1 + self.machine.tile_loss - self.gradient) * self.product  # per token, of not going by rows
        if gain <= 0:
            return ALL
        return min(int(self.document[1] / gain) + 1, ALL)


def _layer(
    din: int, dout: int, probes: int, device: str, dtype: torch.dtype, probe_dtype: torch.dtype | None, gradient: bool, machine: Machine | None
) -> _Layer:
    for name, number, least in (("din", din, 1), ("dout", dout, 1), ("probes", probes, 0)):
        if number < least:
            raise DataError(expected=f"{name}: at least {least}", found=str(number), fix="pass the layer's sizes")
    machine = machine or _MACHINES.get(device)
    if machine is None:
        raise DataError(expected=f"device: one of {', '.join(_MACHINES)}", found=repr(device), fix="pass machine=Machine(...) with its speeds")
    if dtype not in machine.flops:
        raise DataError(expected="dtype: float32, bfloat16, float16 or float64", found=str(dtype), fix="convert a and b first")
    return _Layer(machine, din, dout, probes, dtype, probe_dtype or dtype, gradient)


@lru_cache(maxsize=1024)
def rows_below(
    din: int, dout: int, probes: int, device: str, dtype: torch.dtype, probe_dtype: torch.dtype | None = None, want_weight_gradient: bool = True
) -> int:
    """The length below which a document is cheaper by rows on a CPU: what the ops use, whatever the documents are."""
    return _layer(din, dout, probes, device, dtype, probe_dtype, want_weight_gradient, None).border()


def _for_whole_call(layer: _Layer, tokens: int, documents: int, fused: bool) -> list[Estimate]:
    """Estimates of the methods that treat all documents alike."""
    estimates = [layer.stream(tokens, documents), layer.rows(tokens, documents)]
    if fused and layer.dtype in (_BF16, _F16):
        estimates.append(layer.fused(tokens, documents))
    return estimates


@lru_cache(maxsize=4096)
def gpu_method(
    tokens: int, documents: int, din: int, dout: int, probes: int, dtype: torch.dtype, probe_dtype: torch.dtype, want_weight_gradient: bool, fused: bool
) -> str:
    """`stream`, `rows` or `fused`: what the ops use on a GPU for so many documents that are not empty."""
    layer = _layer(din, dout, probes, "cuda", dtype, probe_dtype, want_weight_gradient, None)
    return min(_for_whole_call(layer, tokens, documents, fused), key=lambda e: e.seconds).method


def plan(
    lengths: Sequence[int],
    din: int,
    dout: int,
    probes: int,
    device: str = "cpu",
    want_weight_gradient: bool = True,
    *,
    dtype: torch.dtype = torch.float32,
    probe_dtype: torch.dtype | None = None,
    fused: bool = False,
    machine: Machine | None = None,
) -> Plan:
    """How to score documents of these lengths in a linear layer [dout, din] against `probes` gradients.

    dtype: of the layer's inputs and output gradients; probe_dtype: of the probes (the same when None). `fused`: the one-pass
    kernel is there. machine: other speeds than the device's usual ones (`measure_cpu()`).
    Raises DataError naming the argument.
    """
    if any(length < 0 for length in lengths):
        raise DataError(expected="lengths: numbers of tokens", found=str(min(lengths)), fix="pass the differences of cu_seqlens")
    layer = _layer(din, dout, probes, device, dtype, probe_dtype, want_weight_gradient, machine)
    lengths = [length for length in lengths if length]
    tokens, documents = sum(lengths), len(lengths)
    estimates = _for_whole_call(layer, tokens, documents, fused and device != "cpu")
    border = layer.border()
    if device == "cpu":
        short = [length for length in lengths if length < border]
        if 0 < len(short) < documents:
            long = layer.stream(tokens - sum(short), documents - len(short))
            rest = layer.rows(sum(short), len(short))
            estimates.append(Estimate("mixed", long.flops + rest.flops, long.bytes + rest.bytes, long.seconds + rest.seconds))
    # Stable: of two that cost the same, the first above.
    ordered = tuple(sorted(estimates, key=lambda e: e.seconds))
    best = ordered[0].method
    chosen = {"stream": 0, "fused": 0, "rows": ALL, "mixed": border}[best]
    return Plan(best, chosen, ordered, _why(layer, ordered, tokens, documents, border))


def _why(layer: _Layer, ordered: tuple[Estimate, ...], tokens: int, documents: int, border: int) -> str:
    costs = ", ".join(f"{e.method} {e.seconds:.2e} s" for e in ordered)
    edge = "rows at any length" if border == ALL else f"a document's own gradient pays from {border} tokens on"
    wanted = "with" if layer.gradient else "without"
    return (
        f"{ordered[0].method}: {costs}; {documents} documents of {tokens / max(documents, 1):.0f} tokens on average, {layer.probes} probes, "
        f"[{layer.dout}, {layer.din}] {wanted} the weight gradient; {edge} ({layer.machine.name}: {layer.machine.source})"
    )


def _best_of(run: Callable[[], object], times: int = 3) -> float:
    run()
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


@lru_cache(maxsize=1)
def measure_cpu() -> Machine:
    """Speeds of this CPU with torch's present number of threads: products of 512 x 512 x 1024, additions in and out of the caches.

    Takes some tenths of a second, once per process. What it finds is noisy on a busy machine.
    """
    rows, inner = 512, 1024
    flops = {}
    for dtype in (_F32, _BF16, _F64):
        a, b = (torch.ones(inner, rows, dtype=dtype) for _ in range(2))
        out = torch.empty(rows, rows, dtype=dtype)
        flops[dtype] = 2.0 * rows * rows * inner / _best_of(lambda a=a, b=b, out=out: torch.mm(a.t(), b, out=out))
    flops[_F16] = flops[_F32]  # widened before it is multiplied
    speeds = []
    for elements in (1 << 16, 1 << 23):
        x, y = torch.zeros(elements), torch.ones(elements)
        again = max((1 << 22) // elements, 1)

        def add(x: torch.Tensor = x, y: torch.Tensor = y, again: int = again) -> None:
            for _ in range(again):
                x.add_(y)

        speeds.append(3 * 4 * elements * again / _best_of(add))
    return replace(CPU, flops=flops, near=speeds[0], far=speeds[1], source=f"measured here, {torch.get_num_threads()} threads")
