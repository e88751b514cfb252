"""Count sketches of an update's terms, as the optimizers report them."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from funcsgmcmc import sketch as functional


@dataclass
class CountSketch:
    """A random projection S of vectors with n entries to k numbers.

        S(v)ⱼ = Σ_{i: h(i) = j} s(i) vᵢ,    E⟨S(v), S(w)⟩ = ⟨v, w⟩

    `create` draws h and s from a seed; vectors are comparable under the same sketch only. Sources:
    Weinberger et al., ICML 2009; Charikar et al., ICALP 2002; see `funcsgmcmc.sketch`.

    Attributes:
        hash_indices: h, int64 `[n]`.
        hash_signs: s, float32 `[n]`.
    """

    hash_indices: Tensor
    hash_signs: Tensor
    _output_dim: int

    @property
    def device(self) -> torch.device:
        """Where the hash functions live.

        Raises:
            RuntimeError: They live on two devices.
        """
        if self.hash_indices.device != self.hash_signs.device:
            raise RuntimeError(
                "hash_indices and hash_signs must be on one device, got "
                f"{self.hash_indices.device} and {self.hash_signs.device}"
            )
        return self.hash_indices.device

    @property
    def input_dim(self) -> int:
        """Number n of entries of a vector."""
        return self.hash_indices.shape[0]

    @property
    def output_dim(self) -> int:
        """Number k of entries of a sketch."""
        return self._output_dim

    @classmethod
    def create(cls, input_dim: int, output_dim: int, seed: int = 0) -> "CountSketch":
        """Draw the hash functions for n = `input_dim` and k = `output_dim`, on the CPU."""
        return cls(*functional.count_sketch(input_dim, output_dim, seed))

    def to(self, device: torch.device | str | int) -> "CountSketch":
        """The sketch on another device; itself, if it is there already."""
        if self.device == torch.device(device):
            return self
        return CountSketch(
            self.hash_indices.to(device), self.hash_signs.to(device), self._output_dim
        )

    def part(self, offset: int, size: int) -> functional.CountSketch:
        """The sketch of entries `offset` to `offset + size`, zero elsewhere."""
        entries = slice(offset, offset + size)
        return functional.CountSketch(
            self.hash_indices[entries], self.hash_signs[entries], self._output_dim
        )

    def sketch(self, v: Tensor) -> Tensor:
        """S(v), float32 `[k]`, of a vector with n entries."""
        # Detached: a sketch is a report, and must not keep a graph alive.
        return functional.project(v.detach(), self.part(0, self.input_dim)).float()

    def scatter_into_(self, result: Tensor, v: Tensor, offset: int) -> None:
        """Add to `result` the sketch of a vector that holds `v` from `offset` on, else zeros."""
        # Linear, so that the parameters of a model can be added one at a time.
        result.add_(functional.project(v.detach(), self.part(offset, v.numel())))


@dataclass
class SketchBuffer:
    """Sketches of one step's terms, as applied, each float32 `[k]`."""

    QUANTITIES: ClassVar[tuple[str, ...]] = functional.Sketches._fields

    scaled_grad: Tensor
    unscaled_grad: Tensor
    localization: Tensor
    weight_decay: Tensor
    noise: Tensor

    @classmethod
    def create(cls, output_dim: int, device: torch.device | str = "cpu") -> "SketchBuffer":
        """Zeros."""
        return cls(
            *(torch.zeros(output_dim, dtype=torch.float32, device=device) for _ in cls.QUANTITIES)
        )

    @property
    def device(self) -> torch.device:
        """Where the buffers live.

        Raises:
            RuntimeError: They live on several devices.
        """
        devices = {getattr(self, name).device for name in self.QUANTITIES}
        if len(devices) != 1:
            raise RuntimeError(f"all buffers must be on one device, got {devices}")
        return devices.pop()

    def tensors(self) -> list[Tensor]:
        """The buffers, in the order of their names."""
        return [getattr(self, name) for name in self.QUANTITIES]

    def zero_(self) -> None:
        """Set everything to zero."""
        for name in self.QUANTITIES:
            getattr(self, name).zero_()

    def add_(self, sketches: "functional.Sketches | SketchBuffer") -> None:
        """Add the sketches of another part of the parameters."""
        for name in self.QUANTITIES:
            # `get_sketches` adds up, on the CPU, groups of several devices.
            getattr(self, name).add_(getattr(sketches, name).to(self.device))

    def to(self, device: torch.device | str | int) -> "SketchBuffer":
        """The buffers on another device; itself, if they are there already."""
        if self.device == torch.device(device):
            return self
        return SketchBuffer(*(getattr(self, name).to(device) for name in self.QUANTITIES))
