"""What a deep memory is made of, and what it pays for an error: the choices of `deep_memory`.

Each is a few functions of tensors with their derivatives by hand, up to the second where the memory's own
gradient is differentiated once more. Letters as in `deep_memory`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


def feature_scale(width: int) -> float:
    """kappa for so many hidden features: they then have about unit norm."""
    return math.sqrt(2 / width)


Shaped = tuple[Tensor, Tensor | None]


@dataclass(frozen=True)
class Maker:
    """Weights from what is held: `shape` of it times `factor`, a number or (R, 1, 1).

    shape: from (..., n, m) to numbers of this shape, and what each output is divided by, (..., m) or None;
    True as well where what is held may be overwritten.
    """

    shape: Callable[[Tensor, bool], Shaped]
    factor: Tensor | float = 1.0

    def __call__(self, held: Tensor) -> Tensor:
        """The weights of what is held, (R, n, m)."""
        shaped, divisor = self.shape(held, False)
        return self.factor * (shaped if divisor is None else shaped / divisor.unsqueeze(-2))


def unshaped(held: Tensor, spare: bool) -> Shaped:
    """Weights that are what is held."""
    return held, None


def shares(held: Tensor, spare: bool) -> Shaped:
    """The softmax over inputs, not divided yet: an output can be divided for less than its weights."""
    # Not by torch's own, which along this dimension takes twice as long. No gradient goes through the
    # largest: it changes no share.
    most = held.detach().amax(dim=-2, keepdim=True)
    shifted = held.sub_(most) if spare else held - most
    shaped = shifted.exp() if shifted.requires_grad else shifted.exp_()
    return shaped, shaped.sum(dim=-2)


class Activation(Protocol):
    """What stands between two layers: from z, what leaves a layer, to features h.

    fold: how many columns of z make a feature. What is kept of z is as wide as z.
    """

    fold: int

    def of(self, z: Tensor) -> Tensor:
        """The features of z, under plain autograd."""
        ...

    def pull(self, z: Tensor, grad: Tensor) -> Tensor:
        """The gradient by z from that by the features, under plain autograd."""
        ...

    def features(self, z: Tensor, kept: Tensor, out: Tensor) -> None:
        """Fill `kept` and the features `out`."""
        ...

    def read(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """What is kept of z, and the features; z may be overwritten."""
        ...

    def back(self, kept: Tensor, features: Tensor, grad: Tensor, out: Tensor) -> Tensor:
        """The gradient by z from that by the features, into `out`."""
        ...

    def curves(self, kept: Tensor, features: Tensor, returned: Tensor) -> tuple[Tensor, ...]:
        """What `twice` and `add_back` need. returned: the gradient that `back` was given."""
        ...

    def twice(self, curves: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor, Tensor]:
        """Back through `back`: from the gradient by its result, those by `returned` and by z."""
        ...

    def add_back(self, curves: tuple[Tensor, ...], grad: Tensor, into: Tensor) -> None:
        """Add to `into` what `back` makes of `grad`."""
        ...


class Silu:
    """h = kappa silu(z). Kept: sigmoid(z)."""

    fold = 1

    def of(self, z: Tensor) -> Tensor:
        return F.silu(z) * feature_scale(z.shape[-1])

    def pull(self, z: Tensor, grad: Tensor) -> Tensor:
        gate = torch.sigmoid(z)
        return grad * feature_scale(z.shape[-1]) * gate * (1 + z * (1 - gate))

    def features(self, z: Tensor, kept: Tensor, out: Tensor) -> None:
        torch.sigmoid(z, out=kept)
        torch.mul(z, kept, out=out).mul_(feature_scale(z.shape[-1]))

    def read(self, z: Tensor) -> tuple[Tensor, Tensor]:
        kept = torch.sigmoid(z)
        return kept, z.mul_(kept).mul_(feature_scale(z.shape[-1]))

    def back(self, kept: Tensor, features: Tensor, grad: Tensor, out: Tensor) -> Tensor:
        return torch.mul(grad, _slope(features, kept), out=out)

    def curves(self, kept: Tensor, features: Tensor, returned: Tensor) -> tuple[Tensor, ...]:
        slope = _slope(features, kept)
        # kappa silu''(z) = (1 - gate) (2 slope - h)
        return slope, (2 * slope).sub_(features).mul_(1 - kept).mul_(returned)

    def twice(self, curves: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor, Tensor]:
        slope, bend = curves
        return slope * grad, bend * grad

    def add_back(self, curves: tuple[Tensor, ...], grad: Tensor, into: Tensor) -> None:
        into.addcmul_(grad, curves[0])


class Gated:
    """h = kappa silu(a) b from z = [a; b]. Kept: z."""

    fold = 2

    def of(self, z: Tensor) -> Tensor:
        a, b = z.chunk(2, dim=-1)
        return F.silu(a) * b * feature_scale(a.shape[-1])

    def pull(self, z: Tensor, grad: Tensor) -> Tensor:
        return torch.cat([grad * slope for slope in self._slopes(z)[:2]], dim=-1)

    def features(self, z: Tensor, kept: Tensor, out: Tensor) -> None:
        kept.copy_(z)
        out.copy_(self.of(z))

    def read(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return z, self.of(z)

    def back(self, kept: Tensor, features: Tensor, grad: Tensor, out: Tensor) -> Tensor:
        return out.copy_(self.pull(kept, grad))

    def curves(self, kept: Tensor, features: Tensor, returned: Tensor) -> tuple[Tensor, ...]:
        by_a, by_b, twice_a, by_both = self._slopes(kept)
        return by_a, by_b, twice_a * returned, by_both * returned

    def twice(self, curves: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor, Tensor]:
        by_a, by_b, twice_a, by_both = curves
        a, b = grad.chunk(2, dim=-1)
        return by_a * a + by_b * b, torch.cat([twice_a * a + by_both * b, by_both * a], dim=-1)

    def add_back(self, curves: tuple[Tensor, ...], grad: Tensor, into: Tensor) -> None:
        for part, slope in zip(into.chunk(2, dim=-1), curves[:2], strict=True):
            part.addcmul_(grad, slope)

    @staticmethod
    def _slopes(z: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Derivatives of h: by a, by b, twice by a, by both."""
        a, b = z.chunk(2, dim=-1)
        scale, gate = feature_scale(a.shape[-1]), torch.sigmoid(a)
        shut = 1 - gate
        slope = scale * gate * (1 + a * shut)
        bend = scale * gate * shut * (2 + a * (shut - gate))
        return slope * b, scale * a * gate, bend * b, slope


def _slope(features: Tensor, gates: Tensor) -> Tensor:
    """kappa silu'(z) from h = kappa silu(z) and sigmoid(z): h + gate (kappa - h)."""
    return torch.lerp(features, features.new_full((), feature_scale(features.shape[-1])), gates)


class Objective(Protocol):
    """What a token pays for its error e = M(k) - v (..., m).

    bound (...): a number of the token's own, None where the objective is not `bounded`.
    """

    bounded: bool

    def gradient(self, e: Tensor, bound: Tensor | None) -> Tensor:
        """Gradient of the loss by e."""
        ...

    def twice(self, e: Tensor, bound: Tensor | None, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        """Back through `gradient`: from the gradient by its result, those by e and by the bound."""
        ...


class Square:
    """|e|^2."""

    bounded = False

    def gradient(self, e: Tensor, bound: Tensor | None) -> Tensor:
        return 2 * e

    def twice(self, e: Tensor, bound: Tensor | None, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        return 2 * grad, None


class Huber:
    """|e|^2 up to the bound, 2 bound |e| - bound^2 beyond: an outlier pulls no harder than the bound."""

    bounded = True

    def gradient(self, e: Tensor, bound: Tensor | None) -> Tensor:
        assert bound is not None
        norm, bound = torch.linalg.vector_norm(e, dim=-1, keepdim=True), bound.unsqueeze(-1)
        return 2 * e * (torch.minimum(norm, bound) / norm.clamp(min=torch.finfo(norm.dtype).tiny))

    def twice(self, e: Tensor, bound: Tensor | None, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        assert bound is not None
        norm, bound = torch.linalg.vector_norm(e, dim=-1, keepdim=True), bound.unsqueeze(-1)
        beyond = norm > bound
        # Beyond it the gradient is 2 bound u with u = e / |e|; within, u is left at zero.
        u = torch.where(beyond, e / norm, 0.0)
        along = torch.linalg.vecdot(u, grad).unsqueeze(-1)
        return 2 * torch.where(beyond, bound / norm, 1.0) * (grad - u * along), 2 * along.squeeze(
            -1
        )


@dataclass(frozen=True)
class Power:
    """The sum of |e|^p over the numbers of e. Sign and size in its gradient are smooth:

    p tanh(a e) (e^2 + epsilon)^((p - 1) / 2).
    """

    p: float
    a: float = 10.0
    epsilon: float = 1e-6

    bounded = False

    def gradient(self, e: Tensor, bound: Tensor | None) -> Tensor:
        size = (e.square() + self.epsilon).pow((self.p - 1) / 2)
        return self.p * torch.tanh(self.a * e) * size

    def twice(self, e: Tensor, bound: Tensor | None, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        sign, square = torch.tanh(self.a * e), e.square() + self.epsilon
        slope = self.a * (1 - sign.square()) * square + (self.p - 1) * sign * e
        return grad * self.p * slope * square.pow((self.p - 3) / 2), None


@dataclass(frozen=True)
class Normed:
    """W = A / (|A|_q / unit)^(q - 2) for what is held, A (R, n, m), by its q-norm in units (R,) of its own.

    What is held may fade below `floor` units without that W grows any further.
    """

    q: float
    floor: float = 0.1
    linear = True

    def norm(self, held: Tensor) -> Tensor:
        """|A|_q, (...)."""
        # By squares where that does it: torch's pow takes ten times as long.
        powers = held.square().square() if self.q == 4 else held.abs().pow(self.q)
        return powers.sum(dim=(-2, -1)).pow(1 / self.q)

    def scale(self, held: Tensor, unit: Tensor) -> Tensor:
        """W / A, (R, 1, 1)."""
        times = (self.norm(held) / unit).clamp(min=self.floor).pow(2 - self.q)
        return times[:, None, None]

    def back(
        self, held: Tensor, unit: Tensor, scale: Tensor, grad: Tensor
    ) -> tuple[Tensor, Tensor]:
        """From the gradient by the scale (R,) those by A and by the unit."""
        norm = self.norm(held)
        grad = torch.where(norm > self.floor * unit, grad * (self.q - 2) * scale[:, 0, 0], 0.0)
        along = held * held.abs().pow(self.q - 2)
        return along * (-grad / norm.pow(self.q))[:, None, None], grad / unit

    def maker(self, held: Tensor, unit: Tensor) -> Maker:
        return Maker(unshaped, self.scale(held, unit))


@dataclass(frozen=True)
class Softmax:
    """W = c n softmax(A) over the n inputs of each output: weights above zero, of a constant sum."""

    c: float
    linear = False

    def norm(self, held: Tensor) -> Tensor:
        """No unit is needed."""
        return held.new_ones(held.shape[:-2])

    def maker(self, held: Tensor, unit: Tensor) -> Maker:
        return Maker(shares, self.c * held.shape[-2])


class Retention(Protocol):
    """What weights are made of what is held, A.

    linear: whether they are A times a number that stays in a chunk.
    """

    @property
    def linear(self) -> bool: ...

    def norm(self, held: Tensor) -> Tensor:
        """The unit of a layer that starts with `held` (..., n, m): (...)."""
        ...

    def maker(self, held: Tensor, unit: Tensor) -> Maker:
        """What makes weights of A in a chunk that starts with `held` (R, n, m)."""
        ...


SILU, GATED = Silu(), Gated()
SQUARE = Square()
# Added to the variance of what is normed.
EPSILON = 1e-6


@dataclass(frozen=True)
class Rule:
    """How a memory learns, apart from its gates.

    activation: what its hidden layers do. objective: what an error costs. window: how many tokens, the last
    of them its own, each step minimises the error of. retention: what weights are made of what is held,
    where each chunk starts; None: they are it. normed: whether an error is that of LN(M(k)), without
    parameters, in place of M(k). muon: whether momentum is made orthogonal before it is added.
    """

    activation: Activation = SILU
    objective: Objective = SQUARE
    window: int = 1
    retention: Retention | None = None
    normed: bool = False
    muon: bool = False

    @property
    def plain(self) -> bool:
        """Whether an error's gradient is 2 (M(k) - v)."""
        return self.objective is SQUARE and not self.normed

    @property
    def linear(self) -> bool:
        """Whether a token's weights are linear in the gradients of its chunk."""
        return not self.muon and (self.retention is None or self.retention.linear)

    @property
    def scaling(self) -> Normed | None:
        """The retention that is a factor which stays in a chunk."""
        return self.retention if isinstance(self.retention, Normed) else None

    def makers(self, held: Sequence[Tensor], units: Sequence[Tensor]) -> list[Maker]:
        """What makes each layer's weights of what is held in a chunk that starts with `held` (R, n, m)."""
        if self.retention is None:
            return [Maker(unshaped) for _ in held]
        return [self.retention.maker(w, unit) for w, unit in zip(held, units, strict=True)]

    def answer(self, z: Tensor) -> Tensor:
        """What the memory says, from what its last layer says, (..., m)."""
        return _layer_norm(z)[0] if self.normed else z

    def gradient(self, z: Tensor, v: Tensor, bound: Tensor | None) -> Tensor:
        """Gradient of what an error costs by z = M(k), (..., m)."""
        if not self.normed:
            return self.objective.gradient(z - v, bound)
        answer, spread = _layer_norm(z)
        return _back_norm(answer, spread, self.objective.gradient(answer - v, bound))

    def twice(
        self, z: Tensor, v: Tensor, bound: Tensor | None, grad: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Back through `gradient`: from the gradient by its result, those by z, v and the bound."""
        if not self.normed:
            by_z, by_bound = self.objective.twice(z - v, bound, grad)
            return by_z, -by_z, by_bound
        answer, spread = _layer_norm(z)
        cost = self.objective.gradient(answer - v, bound)
        # The norm's Jacobian J is symmetric: <grad, J cost> by the cost, and by z through J.
        by_cost = _back_norm(answer, spread, grad)
        by_answer, by_bound = self.objective.twice(answer - v, bound, by_cost)
        along, against = ((x * answer).mean(dim=-1, keepdim=True) for x in (grad, cost))
        product = (by_cost * cost).mean(dim=-1, keepdim=True)
        by_z = _back_norm(answer, spread, by_answer)
        by_z = by_z - (answer * product + against * by_cost) / spread
        by_z = by_z - along * _back_norm(answer, spread, cost) / spread
        return by_z, -by_answer, by_bound


def _layer_norm(z: Tensor) -> tuple[Tensor, Tensor]:
    """(z - mean) / spread over the last dimension, and the spread (..., 1)."""
    centred = z - z.mean(dim=-1, keepdim=True)
    spread = (centred.square().mean(dim=-1, keepdim=True) + EPSILON).sqrt()
    return centred / spread, spread


def _back_norm(answer: Tensor, spread: Tensor, grad: Tensor) -> Tensor:
    """The gradient by z from that by `answer`, its norm."""
    along = (grad * answer).mean(dim=-1, keepdim=True)
    return (grad - grad.mean(dim=-1, keepdim=True) - answer * along) / spread


TITANS = Rule()
