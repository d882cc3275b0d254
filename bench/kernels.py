"""Suite `kernels`: the S4 kernel, general and frozen, one layer and many, and the Cauchy sum.

The baseline is the textbook in complex64 under autograd. "keops textbook" is the same with the
Cauchy sums by KeOps, as the public S4 code has it without its CUDA extension; "keops" is this
project's pole-free formula in KeOps. Errors are taken on some features: they are independent.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from bench import textbook
from bench.cases import BOUNDS, Candidate, Comparison, Outcome
from sssd_hpc.ops import FrozenNplr, backends, cauchy, counts, freeze, frozen_kernel, nplr_kernel
from sssd_hpc.ops.cauchy import reference as cauchy_reference
from sssd_hpc.s4 import S4Layer

CHANNELS = 2
# Features on which errors are taken.
PROBES = 16
NAMES = ("w", "P", "Q", "B", "C", "log_dt")


def comparisons(device: str, quick: bool) -> Iterator[Comparison]:
    """Yield the sweep over H, N and L in float32, the model's shape first; then float64, layers."""
    sizes = (
        [(8, 16, 64)]
        if quick
        else [(H, N, L) for H in (512, 256) for N in (64, 16) for L in (1000, 250, 2048)]
    )
    for H, N, L in sizes:
        yield from _one_shape(device, H, N, L, torch.float32)
    H, N, L = sizes[0]
    yield from _one_shape(device, H, N, L, torch.float64)
    layers = 2 if quick else (72 if device == "cuda" else 4)
    yield from _grouped(device, layers, H, N, L)


def _one_shape(device: str, H: int, N: int, L: int, dtype: torch.dtype) -> Iterator[Comparison]:
    given = parameters(H, N, L, dtype, device)
    shape, N2, width = {"H": H, "N": N, "L": L}, N // 2, dtype.itemsize
    name = str(dtype).removeprefix("torch.")
    bound = BOUNDS["kernel"][name]
    rows = slice(None, None, max(H // PROBES, 1))
    cotangent = torch.randn(CHANNELS, H, L, dtype=dtype, device=device)
    double = probed(given, rows)
    constants = frozen_of(given, L)
    usable = usable_backends("nplr", device, dtype)

    def ours(backend: str) -> Callable[..., Tensor]:
        return lambda **p: nplr_kernel(**p, L=L, backend=backend)

    def frozen(backend: str) -> Callable[..., Tensor]:
        return lambda **p: frozen_kernel(torch.view_as_real(p["C"]), constants, backend)

    general: dict[str, Callable[..., Tensor]] = {
        "textbook": functools.partial(textbook.kernel, L=L)
    }
    if "keops" in usable_backends("cauchy", device, dtype):
        sums = functools.partial(cauchy, backend="keops")
        general["keops textbook"] = functools.partial(textbook.kernel, L=L, cauchy_sum=sums)
    baselines = len(general)
    general |= {backend: ours(backend) for backend in usable}
    kept = dict(list(general.items())[:baselines]) | {
        backend: frozen(backend) for backend in usable
    }

    def candidates(
        ways: dict[str, Callable[..., Tensor]], wanted: tuple[str, ...]
    ) -> list[Candidate]:
        return [
            Candidate(
                backend,
                functools.partial(differentiated, way, given, wanted, cotangent),
                bound if number >= baselines else None,
            )
            for number, (backend, way) in enumerate(ways.items())
        ]

    def pick(outcome: Outcome) -> Outcome:
        # The gradient of log_dt alone has one dimension. It is a sum of the others in which most
        # digits cancel, in the textbook (1e-4) as elsewhere: it is timed and not compared.
        return tuple(part[..., rows, :] for part in outcome if part.dim() > 1)

    for op, ways, wanted, cost in (
        ("kernel", general, (), counts.general(H, N2, L, CHANNELS, width)),
        (
            "kernel with gradients",
            general,
            NAMES,
            counts.general(H, N2, L, CHANNELS, width)
            + counts.general_backward(H, N2, L, CHANNELS, width),
        ),
        ("frozen kernel", kept, (), counts.frozen(H, N2, L, CHANNELS, width)),
        (
            "frozen kernel with gradients",
            kept,
            ("C",),
            counts.frozen(H, N2, L, CHANNELS, width)
            + counts.frozen_backward(H, N2, L, CHANNELS, width),
        ),
    ):
        yield Comparison(
            op,
            shape,
            name,
            cost,
            functools.partial(
                differentiated,
                functools.partial(textbook_oracle, L=L),
                double,
                tuple(name for name in wanted if name != "log_dt"),
                cotangent[:, rows].double(),
            ),
            candidates(ways, wanted),
            pick,
        )
    yield from _cauchy(device, H, N, L, dtype, given)


def _cauchy(
    device: str, H: int, N: int, L: int, dtype: torch.dtype, given: dict[str, Any]
) -> Iterator[Comparison]:
    """Yield the sum of one product per feature on shared nodes, all but the infinite one."""
    _, z = textbook.nodes(L, given["w"].dtype, given["w"].device)
    dt = given["log_dt"].exp()[:, None]
    inputs = {"v": given["B"] * given["C"][0] * dt, "w": given["w"] * dt}
    cotangent = torch.randn(H, z.shape[0], dtype=z.dtype, device=device)
    rows = slice(None, None, max(H // PROBES, 1))
    double = {key: value[rows].to(torch.complex128) for key, value in inputs.items()}
    name = str(dtype).removeprefix("torch.")
    ways: dict[str, Callable[..., Tensor]] = {"textbook": lambda v, w: textbook.cauchy(v, z, w)}
    ways |= {
        backend: (lambda v, w, backend=backend: cauchy(v, z, w, backend))
        for backend in usable_backends("cauchy", device, dtype)
    }
    shape, F, width = {"H": H, "N": N, "L": L}, z.shape[0], dtype.itemsize
    once = counts.cauchy(H, N // 2, F, width)
    both = once + counts.cauchy_backward(H, N // 2, F, width)
    for op, wanted, cost in (("cauchy", (), once), ("cauchy with gradients", ("v", "w"), both)):
        yield Comparison(
            op,
            shape,
            name,
            cost,
            functools.partial(
                differentiated,
                lambda v, w: cauchy_reference.run(v, z.to(torch.complex128), w),
                double,
                wanted,
                cotangent[rows].to(torch.complex128),
            ),
            [
                Candidate(
                    backend,
                    functools.partial(differentiated, way, inputs, wanted, cotangent),
                    None if backend == "textbook" else BOUNDS["kernel"][name],
                )
                for backend, way in ways.items()
            ],
            lambda outcome: tuple(part[rows] for part in outcome),
        )


def _grouped(device: str, layers: int, H: int, N: int, L: int) -> Iterator[Comparison]:
    """Yield the frozen kernels of many layers: one call a layer, then one call for all."""
    # A few layers again and again: making them costs more than the kernels.
    few = [parameters(H, N, L, torch.float32, device) for _ in range(min(layers, 4))]
    each = [few[i % len(few)] for i in range(layers)]
    frozen = [frozen_of(given, L) for given in few]
    constants = [frozen[i % len(frozen)] for i in range(layers)]
    together = FrozenNplr.group(constants)
    planes = torch.cat([torch.view_as_real(given["C"]) for given in each], dim=1)
    cotangent = torch.randn(CHANNELS, layers * H, L, device=device)
    rows = slice(None, None, max(layers * H // PROBES, 1))

    def looped(way: Callable[[int, Tensor], Tensor]) -> Callable[..., Tensor]:
        return lambda C: torch.cat([way(i, part) for i, part in enumerate(C.split(H, 1))], 1)

    def textbook_layer(i: int, part: Tensor) -> Tensor:
        return textbook.kernel(**(each[i] | {"C": torch.view_as_complex(part)}), L=L)

    ways = {"textbook": looped(textbook_layer)}
    for backend in usable_backends("nplr", device, torch.float32):
        if backend == "keops":
            continue
        ways[f"{backend}, one by one"] = looped(
            lambda i, part, backend=backend: frozen_kernel(part, constants[i], backend)  # type: ignore[misc]
        )
        ways[backend] = lambda C, backend=backend: frozen_kernel(C, together, backend)

    whole = {key: torch.cat([given[key] for given in each], int(key == "C")) for key in NAMES}
    double = probed(whole, rows)

    def oracle(C: Tensor) -> Tensor:
        return textbook_oracle(**(double | {"C": torch.view_as_complex(C)}), L=L)

    shape = {"layers": layers, "H": H, "N": N, "L": L}
    once = counts.frozen(H, N // 2, L).times(layers)
    both = once + counts.frozen_backward(H, N // 2, L).times(layers)
    for op, wanted, cost in (
        ("grouped kernels", (), once),
        ("grouped kernels with gradients", ("C",), both),
    ):
        yield Comparison(
            op,
            shape,
            "float32",
            cost,
            functools.partial(
                differentiated,
                oracle,
                {"C": torch.view_as_real(double["C"])},
                wanted,
                cotangent[:, rows].double(),
            ),
            [
                Candidate(
                    backend,
                    functools.partial(differentiated, way, {"C": planes}, wanted, cotangent),
                    None if backend == "textbook" else BOUNDS["kernel"]["float32"],
                )
                for backend, way in ways.items()
            ],
            lambda outcome: tuple(part[:, rows] for part in outcome),
        )


def frozen_of(given: dict[str, Any], L: int) -> FrozenNplr:
    """Return the constants of a layer's kernels."""
    w, P, Q, B, log_dt = (given[key] for key in ("w", "P", "Q", "B", "log_dt"))
    return freeze(w, P, Q, B, log_dt, L, log_dt.dtype)


def probed(given: dict[str, Any], rows: slice) -> dict[str, Any]:
    """Return some features of the parameters in double precision."""
    few = {
        key: value[rows] if value.dim() == 1 else value[..., rows, :]
        for key, value in given.items()
    }
    return {
        key: value.to(torch.complex128 if value.is_complex() else torch.float64)
        for key, value in few.items()
    }


def parameters(H: int, N: int, L: int, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Return fresh complex parameters of a layer, and log_dt."""
    layer = S4Layer(d_model=H, d_state=N, lmax=L)
    found = {
        key: torch.view_as_complex(getattr(layer, key).detach().to(device, dtype))
        for key in NAMES[:-1]
    }
    return found | {"log_dt": layer.log_dt.to(device, dtype)}


def textbook_oracle(**given: Tensor | int) -> Tensor:
    """Generate kernels by the tested reference."""
    return textbook.oracle_kernel(
        {key: value for key, value in given.items() if isinstance(value, Tensor)}, int(given["L"])
    )


def usable_backends(op: str, device: str, dtype: torch.dtype) -> list[str]:
    """Return our backends that run `op` here, the reference and interpreted Triton left out."""
    found = []
    for backend in ("torch", "cpp", "keops", "triton"):
        if device == "cpu" and backend == "triton":
            continue
        if backends.probe(op, backend, device):
            continue
        if dtype in getattr(backends.module(op, backend), "DTYPES", backends.WIDE):
            found.append(backend)
    return found


def differentiated(
    way: Callable[..., Tensor | Outcome],
    inputs: dict[str, Tensor],
    wanted: tuple[str, ...],
    cotangent: Tensor | Outcome,
) -> Outcome:
    """Return what way(**inputs) returns, then its gradients with respect to the wanted inputs."""
    if not wanted:
        with torch.no_grad():
            value = way(**inputs)
            return (value,) if isinstance(value, Tensor) else tuple(value)
    leaves = {key: value.detach().requires_grad_(key in wanted) for key, value in inputs.items()}
    value = way(**leaves)
    values = (value,) if isinstance(value, Tensor) else tuple(value)
    cotangents = (cotangent,) if isinstance(cotangent, Tensor) else cotangent
    gradients = torch.autograd.grad(values, [leaves[key] for key in wanted], cotangents)
    return *(value.detach() for value in values), *gradients
