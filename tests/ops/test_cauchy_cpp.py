"""The compiled Cauchy sum at every level of vector instructions, against the reference."""

from __future__ import annotations

import pytest
import torch

from sssd_hpc.ops.cauchy import cpp, reference

SIZES = [(1, 1, 1), (3, 2, 17), (2, 33, 300), (70, 3, 129)]  # R, N2, L
sizes = pytest.mark.parametrize("size", SIZES, ids=lambda size: "R{}-N{}-L{}".format(*size))
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
nodes = pytest.mark.parametrize("shared", [True, False], ids=["shared", "own"])


def draw(size: tuple[int, int, int], shared: bool) -> list[torch.Tensor]:
    """Nodes near the imaginary axis, poles well to its left."""
    R, N2, L = size
    v, w = torch.randn(2, R, N2, 2, dtype=torch.float64)
    w[..., 0] = -0.5 - w[..., 0].abs()
    z = torch.randn(1 if shared else R, L, 2, dtype=torch.float64)
    z[..., 0] *= 0.1
    return [v, z, w]


@sizes
@dtypes
@nodes
def test_the_sum_and_its_gradients_equal_the_reference(level, size, dtype, shared):
    leaves = [torch.view_as_complex(t).requires_grad_() for t in draw(size, shared)]
    v, z, w = leaves
    r = reference.run(v, z, w)
    G = torch.randn_like(r)
    truth = [r.detach(), *torch.autograd.grad(r, leaves, G)]
    planes = [torch.view_as_real(t.detach()).to(dtype) for t in leaves]
    ours = [cpp.forward(*planes), *cpp.backward(torch.view_as_real(G).to(dtype), *planes, True)]
    limit = 1e-5 if dtype == torch.float32 else 1e-12
    for got, expected in zip(ours, truth, strict=True):
        expected = torch.view_as_real(expected)
        assert got.shape == expected.shape
        assert float((got.double() - expected).norm() / expected.norm()) < limit


def test_the_gradient_of_the_nodes_comes_only_when_asked_for(level):
    v, z, w = draw((3, 4, 20), True)
    g = torch.randn(3, 20, 2, dtype=torch.float64)
    dv, dz, dw = cpp.backward(g, v, z, w, False)
    assert dz.shape == (0,)
    every = cpp.backward(g, v, z, w, True)
    assert torch.equal(dv, every[0])
    assert torch.equal(dw, every[2])


@nodes
def test_results_have_the_same_bits_with_one_and_two_threads(level, shared):
    for size in ((3, 32, 1000), (70, 3, 300)):
        v, z, w = (t.float() for t in draw(size, shared))
        g = torch.randn(size[0], size[2], 2)
        runs = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            try:
                runs.append([cpp.forward(v, z, w), *cpp.backward(g, v, z, w, True)])
            finally:
                torch.set_num_threads(1)
        assert all(torch.equal(one, two) for one, two in zip(*runs, strict=True))


def test_single_precision_stays_finite_where_the_node_is_nearly_infinite(level):
    v, _, w = (t.float() for t in draw((2, 3, 1), True))
    z = torch.tensor([[[0.0, 1e16], [-3e15, 2e15]]])
    g = torch.ones(2, 2, 2)
    for result in (cpp.forward(v, z, w), *cpp.backward(g, v, z, w, True)):
        assert result.isfinite().all()


def test_what_is_not_finite_stays_so_and_in_its_row(level):
    v, z, w = (t.float() for t in draw((3, 5, 40), True))
    w[1, 2, 1] = float("nan")
    finite = cpp.forward(v, z, w).isfinite().all(-1).all(-1)
    assert finite.tolist() == [True, False, True]
    dv, dz, dw = cpp.backward(torch.ones(3, 40, 2), v, z, w, True)
    assert dv.isfinite().all(-1).all(-1).tolist() == [True, False, True]
    assert dw.isfinite().all(-1).all(-1).tolist() == [True, False, True]
    assert not dz.isfinite().any()


def test_shapes_that_do_not_fit_are_refused_at_the_door():
    v, z, w = draw((3, 4, 20), True)
    with pytest.raises(RuntimeError, match="cauchy: w is Double"):
        cpp.forward(v, z, w[:, :3])
    with pytest.raises(RuntimeError, match="cauchy: z is Double"):
        cpp.forward(v, z.expand(2, -1, -1), w)
    with pytest.raises(RuntimeError, match="cauchy: g is Double"):
        cpp.backward(z, v, z, w, False)
    with pytest.raises(RuntimeError, match="not empty"):
        cpp.forward(v[:0], z, w[:0])
