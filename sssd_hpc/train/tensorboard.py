"""The lines of metrics.jsonl as TensorBoard curves, in RUN/tensorboard; an optional extra."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from sssd_hpc.errors import UserError


def check() -> None:
    """Check that TensorBoard is installed.

    Raises:
        UserError: it is not.
    """
    if importlib.util.find_spec("tensorboard") is None:
        raise UserError(
            "train.tensorboard is set but tensorboard is not installed; "
            "pip install 'sssd_hpc[tensorboard]', or leave it out: metrics.jsonl has the same"
        )


class Board:
    """Write rows of numbers; what an earlier attempt wrote beyond `samples` is hidden."""

    def __init__(self, run: Path, samples: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._folder = run / "tensorboard"
        try:
            self._writer = SummaryWriter(str(self._folder), purge_step=samples + 1)
        except OSError as error:
            raise self._refusal(error) from error

    def __enter__(self) -> Board:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._writer.close()

    def add(self, row: Mapping[str, float]) -> None:
        """Add a line of metrics.jsonl.

        Raises:
            UserError: the disk is full or not writable.
        """
        try:
            for name, value in row.items():
                if name != "samples":
                    self._writer.add_scalar(f"train/{name}", value, int(row["samples"]))
        except OSError as error:
            raise self._refusal(error) from error

    def _refusal(self, error: OSError) -> UserError:
        return UserError(
            f"{self._folder} cannot be written: {error}; make room and give the same command again"
        )
