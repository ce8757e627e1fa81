"""Tokens at places, and short convolutions: their derivative by hand against torch's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from memlm.memory.parts.tokens import short_convolution, tokens_at


def plain(z: Tensor, kernel: Tensor, before: Tensor) -> Tensor:
    return F.conv1d(torch.cat([before, z], dim=1).mT, kernel, groups=z.shape[2]).mT


def inputs(length: int, size: int, rows: int = 2, width: int = 3) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = (rows, length, width), (width, 1, size), (rows, size - 1, width)
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("length", [1, 3, 9])
def test_a_short_convolution_has_the_gradients_of_torchs(length: int, size: int) -> None:
    given = inputs(length, size)
    found, rest = short_convolution(*given, real=None)
    expected = plain(*given)
    torch.testing.assert_close(found, expected)
    assert torch.equal(rest, torch.cat([given[2], given[0]], dim=1)[:, length:])
    weights = torch.randn_like(expected)
    torch.testing.assert_close(
        torch.autograd.grad(found, given, weights), torch.autograd.grad(expected, given, weights)
    )


def test_it_may_be_differentiated_twice_and_mapped_over() -> None:
    given = inputs(5, 4)
    assert torch.autograd.gradgradcheck(lambda *g: short_convolution(*g, real=None)[0], given)
    kernels = torch.randn(7, *given[1].shape, dtype=torch.float64)

    def gradients(kernel: Tensor, call: object) -> tuple[Tensor, ...]:
        return torch.func.grad(lambda z, k: call(z, k).square().sum(), argnums=(0, 1))(  # type: ignore[operator]
            given[0].detach(), kernel
        )

    before = given[2].detach()
    found = torch.vmap(
        lambda k: gradients(k, lambda z, k: short_convolution(z, k, before, None)[0])
    )(kernels)
    expected = torch.vmap(lambda k: gradients(k, lambda z, k: plain(z, k, before)))(kernels)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_autocast_gradients_have_the_dtype_of_their_inputs(dtype: torch.dtype) -> None:
    z, kernel, before = (x.detach().float() for x in inputs(9, 4))
    z = z.to(dtype)
    given = [x.requires_grad_() for x in (z, kernel, before)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, _ = short_convolution(z, kernel, before, None)
    assert found.dtype == dtype
    expected = plain(*(x.float() for x in given))
    torch.testing.assert_close(found.float(), expected, rtol=2e-2, atol=2e-2)
    found.float().square().sum().backward()
    for x in given:
        assert x.grad is not None
        assert x.grad.dtype == x.dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_comes_out_has_the_channels_of_a_token_side_by_side(dtype: torch.dtype) -> None:
    """What follows takes norms and products over channels: slow where tokens lie side by side."""
    z, kernel, before = (x.detach().to(dtype) for x in inputs(9, 4))
    assert short_convolution(z, kernel, before, None)[0].is_contiguous()


def test_in_half_precision_a_sum_is_rounded_once() -> None:
    given = [x.detach().bfloat16() for x in inputs(200, 4)]
    exact = plain(*(x.float() for x in given))
    assert torch.equal(short_convolution(*given, real=None)[0], exact.bfloat16())


@pytest.mark.parametrize("length", [0, 1, 5])
def test_tokens_are_those_at_their_row_s_places(length: int) -> None:
    x = torch.arange(3.0 * length * 2).view(3, length, 2)
    places = torch.randint(max(length, 1), (3, 4 if length else 0))
    found = tokens_at(x, places)
    assert found.shape == (*places.shape, 2)
    for row, own in enumerate(places.tolist()):
        for at, place in enumerate(own):
            assert torch.equal(found[row, at], x[row, place])
