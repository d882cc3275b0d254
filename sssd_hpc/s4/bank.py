"""The kernels of many S4 layers from one grouped call of the op.

It holds no parameter and nothing that is saved; layers stay the owners of C and the buffers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sssd_hpc.ops import FrozenNplr, frozen_kernel
from sssd_hpc.s4.layer import S4Layer, is_stale


class KernelBank(nn.Module):
    """Generate the kernels of all `layers`, which share their sizes, at once.

    One launch in place of one a layer is what small batches on a GPU need. The constants of all
    layers are kept until a layer's buffers move, load or are written to.
    """

    def __init__(self, layers: Sequence[S4Layer]) -> None:
        super().__init__()
        # A tuple, so that the layers are not registered a second time.
        self.layers = tuple(layers)
        self._revision = (0, 0)
        self._constants: FrozenNplr | None = None

    def forward(self, length: int) -> list[Tensor | None]:
        """Return each layer's `kernel(length)`, or None for the layers that are frozen.

        Raises:
            UserError: as `S4Layer.kernel`.
        """
        if self.layers[0].spectrum is not None:
            return [None] * len(self.layers)
        if not self.layers[0].trains_c_alone:
            return [layer.kernel(length) for layer in self.layers]
        self.layers[0].check(length)
        moves, writes = zip(*(layer.revision for layer in self.layers), strict=True)
        revision = sum(moves), sum(writes)
        if self._constants is None or is_stale(self._revision, revision):
            self._constants, self._revision = self._gather(), revision
        C = torch.cat([layer.C for layer in self.layers], dim=1)
        kernels = frozen_kernel(C, self._constants)[..., :length]
        return list(kernels.chunk(len(self.layers), dim=1))

    # As in S4Layer.constants.
    @torch.inference_mode(False)
    def _gather(self) -> FrozenNplr:
        return FrozenNplr.group([layer.constants() for layer in self.layers])
