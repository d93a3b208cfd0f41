"""How a pipeline makes its network's arguments of the latents, and the latents' shape of its outputs.

A *form* is one of the ways in use: the latents as they are, copied for guidance, joined with
constant channels or tokens, permuted, reshaped, or split into one tensor per sample. Forms are found
by comparing values, never assumed from a pipeline's name.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Packing:
    """The latents inside another tensor.

    Attributes:
        copies: how often they are repeated along the batch.
        interleaved: ``repeat_interleave`` (sample by sample) rather than ``cat`` (copy by copy).
        permutation: of the latents' dimensions; None leaves them.
        shape: of one copy after a reshape, -1 for its samples; None leaves it.
        sample: the one sample that is taken; None takes all.
        dim, offset: where they lie in the longer dimension; ``dim`` is None where nothing is joined.
    """

    copies: int = 1
    interleaved: bool = False
    permutation: Shape | None = None
    shape: Shape | None = None
    sample: int | None = None
    dim: int | None = None
    offset: int = 0

    def piece(self, x: Tensor) -> Tensor:
        """What ``x`` ``[B, ...]`` contributes, without the joined rest."""
        if self.sample is not None:
            x = x[self.sample]
        if self.permutation is not None:
            x = x.permute(self.permutation)
        if self.shape is not None:
            x = x.reshape(self.shape)
        if self.copies == 1:
            return x
        if self.interleaved:
            return x.repeat_interleave(self.copies, dim=0)
        return torch.cat([x] * self.copies)

    def part(self, whole: Tensor, size: int) -> Tensor:
        """The region of ``whole`` where ``piece`` lies; ``size`` is its length along ``dim``."""
        return whole if self.dim is None else whole.narrow(self.dim, self.offset, size)

    def build(self, x: Tensor, whole: Tensor) -> Tensor:
        """``whole`` with its region replaced by ``x``'s piece, in ``whole``'s dtype."""
        piece = self.piece(x).to(whole.dtype)
        if self.dim is None:
            return piece
        size, end = piece.shape[self.dim], self.offset + piece.shape[self.dim]
        before = whole.narrow(self.dim, 0, self.offset)
        after = whole.narrow(self.dim, end, whole.shape[self.dim] - self.offset - size)
        return torch.cat([before, piece, after], dim=self.dim)

    def rest(self, whole: Tensor, size: int) -> list[Tensor]:
        """The joined parts before and after the region."""
        if self.dim is None:
            return []
        end = self.offset + size
        tail = whole.shape[self.dim] - end
        return [whole.narrow(self.dim, 0, self.offset), whole.narrow(self.dim, end, tail)]

    def branches(self, output: Tensor, like: Shape) -> list[Tensor]:
        """The copies in a network's ``output``, each in the latents' shape ``like``."""
        part = output
        if self.dim is not None:
            part = self.part(output, (like if self.shape is None else self.shape)[self.dim])
        if self.copies == 1:
            return [self._restore(part, like)]
        if self.interleaved:
            return [self._restore(part[k :: self.copies], like) for k in range(self.copies)]
        return [self._restore(chunk, like) for chunk in part.chunk(self.copies)]

    def _restore(self, part: Tensor, like: Shape) -> Tensor:
        if self.permutation is None:
            return part.reshape(like)
        permuted = tuple(like[d] for d in self.permutation)
        inverse = [self.permutation.index(d) for d in range(len(like))]
        return part.reshape(permuted).permute(inverse)


def match(whole: Tensor, x: Tensor) -> Packing | None:
    """The form by which ``whole`` holds the latents ``x`` exactly; None if it does not."""
    if not whole.is_floating_point() or not x.numel():
        return None
    for form in possible_forms(tuple(whole.shape), tuple(x.shape)):
        piece = form.piece(x).to(whole.dtype)
        size = piece.shape[form.dim] if form.dim is not None else 0
        part = form.part(whole, size)
        if part.shape == piece.shape and torch.equal(part, piece):
            return form
    return None


def possible_forms(whole: Shape, x: Shape) -> Iterator[Packing]:
    """Every form that could lie in shape ``whole``, the simplest first."""
    if len(whole) == len(x) and x and x[0] and whole[0] % x[0] == 0:
        copies = whole[0] // x[0]
        differing = [d for d in range(1, len(x)) if whole[d] != x[d]]
        for interleaved in (False, True) if copies > 1 and x[0] > 1 else (False,):
            if not differing:
                yield Packing(copies, interleaved)
            elif len(differing) == 1 and whole[differing[0]] > x[differing[0]] > 0:
                dim = differing[0]
                yield from _joined(copies, interleaved, dim, whole[dim], x[dim])
    yield from _rearranged(whole, x)
    yield from _tokens(whole, x)
    if x and x[0] and _count(whole) * x[0] == _count(x) and len(whole) <= len(x) + 1:
        for sample in range(x[0]):
            yield Packing(sample=sample, shape=whole)


def _joined(copies: int, interleaved: bool, dim: int, length: int, size: int) -> Iterator[Packing]:
    last = length - size
    for offset in dict.fromkeys((0, last, *range(0, last, size))):
        yield Packing(copies, interleaved, dim=dim, offset=offset)


def _rearranged(whole: Shape, x: Shape) -> Iterator[Packing]:
    """The same numbers in other dimensions, once or copied along the batch."""
    total = _count(x)
    if not total or _count(whole) % total:
        return
    copies = _count(whole) // total
    if copies > 1 and (not whole or whole[0] % copies):
        return
    one = (whole[0] // copies, *whole[1:]) if whole else whole
    if len(x) <= 5:
        for order in itertools.permutations(range(len(x))):
            if order != tuple(range(len(x))) and tuple(x[d] for d in order) == one:
                yield Packing(copies, permutation=order)
    if one != x:
        yield Packing(copies, shape=(-1, *one[1:]) if one[:1] == x[:1] else one)


def _tokens(whole: Shape, x: Shape) -> Iterator[Packing]:
    """Every place a token of its channels, among others: ``[B, C, ...]`` in ``[copies * B, S, C]``."""
    if len(whole) != 3 or len(x) < 4 or not _count(x) or whole[2] != x[1] or whole[0] % x[0]:
        return
    size, copies = _count(x[2:]), whole[0] // x[0]
    order = (0, *range(2, len(x)), 1)
    plain = Packing(copies, permutation=order, shape=(-1, size, x[1]))
    if whole[1] == size:
        yield plain
    elif whole[1] > size:
        for joined in _joined(copies, False, 1, whole[1], size):
            yield replace(plain, dim=1, offset=joined.offset)


def _count(shape: Shape) -> int:
    count = 1
    for length in shape:
        count *= length
    return count


def output_columns(outputs: Sequence[Tensor], like: Shape) -> Iterator[tuple[Packing, bool]]:
    """Ways to read a call's ``outputs`` as branches of shape ``like``: (form, one tensor a sample)."""
    if not outputs:
        return
    batch = like[0] if like else 0
    if len(outputs) > 1 and batch and len(outputs) % batch == 0:
        one, same = _count(like) // batch, {tuple(o.shape) for o in outputs}
        if len(same) == 1 and _count(next(iter(same))) == one:
            yield Packing(len(outputs) // batch), True
    for form in possible_forms(tuple(outputs[0].shape), like):
        if form.sample is None:
            yield form, False


def read_columns(
    outputs: Sequence[Tensor], like: Shape, form: Packing, per_sample: bool
) -> list[Tensor]:
    """The branches of a call's ``outputs``, as ``output_columns`` describes them."""
    if not per_sample:
        return form.branches(outputs[0], like)
    batch = like[0]
    groups = [outputs[k * batch : (k + 1) * batch] for k in range(form.copies)]
    return [torch.stack([o.reshape(like[1:]) for o in group]) for group in groups]
