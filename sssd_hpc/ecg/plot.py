"""ECGs on paper, true to scale: 25 mm a second, 10 mm a millivolt, in PNG, SVG or PDF.

Draws what it is given; it filters nothing, measures nothing and hides nothing that leaves its row.
Pages are drawn in millimetres, so a print at full size is paper to be measured with a ruler.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sssd_hpc.ecg import ptbxl, wfdb_io
from sssd_hpc.ecg.leads import LEADS
from sssd_hpc.errors import UserError
from sssd_hpc.files import atomic_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ENDINGS = (".png", ".svg", ".pdf")
MM_PER_S = 25.0
MM_PER_MV = 10.0
DURATION_S = 10.0
# Rows of the usual page: four leads of 2.5 s side by side, then ten seconds of the rhythm lead.
ROWS = (("I", "AVR", "V1", "V4"), ("II", "AVL", "V2", "V5"), ("III", "AVF", "V3", "V6"), ("II",))
SPELLING = {"AVR": "aVR", "AVL": "aVL", "AVF": "aVF"}

# One page is A4 across: paper with the grid, a heading above and the scale below.
PAGE_MM = (297.0, 210.0)
PAPER_MM = (285.0, 180.0)
PAPER_CORNER_MM = (6.0, 12.0)
TRACE_LEFT_MM = 26.0
PULSE_LEFT_MM = 11.0
ROW_MM = 40.0
FIRST_ROW_MM = 42.0
INK, FINE_GRID, BOLD_GRID = "#101820", "#f7d9d6", "#e9a8a2"


def plot_record(
    signals_mv: NDArray[np.floating[Any]],
    rate_hz: float,
    out: Path,
    title: str = "",
    note: str = "",
) -> None:
    """Draw one 12-lead ECG (12, L) in mV, leads in `LEADS` order, on an A4 page.

    At most the first ten seconds are drawn. `note` stands opposite the title.

    Raises:
        UserError: the ending of `out` is not .png, .svg or .pdf, or its folder does not exist.
        ValueError: the array is not (12, L) or holds no finite sample.
    """
    _check_out(out)
    figure, axes = _figure(1, 1)
    _page(axes, _checked(signals_mv), rate_hz, (0.0, 0.0), "ecg", title, note)
    _save(figure, out, dots_per_inch=150)


def plot_pair(
    real_mv: Sequence[NDArray[np.floating[Any]]],
    synthetic_mv: Sequence[NDArray[np.floating[Any]]],
    rate_hz: float,
    out: Path,
    notes: Sequence[str] = (),
) -> None:
    """Draw real ECGs, each (12, L) in mV, on the left and synthetic ones on the right, row by row.

    `notes` are one line a row, such as the statements that both share.

    Raises:
        UserError: as `plot_record`.
        ValueError: no records, different numbers of both, or as `plot_record`.
    """
    _check_out(out)
    if not real_mv or len(real_mv) != len(synthetic_mv):
        raise ValueError(
            f"a pair picture needs as many real as synthetic records, at least one of each, "
            f"not {len(real_mv)} and {len(synthetic_mv)}"
        )
    figure, axes = _figure(len(real_mv), 2)
    for row, pair in enumerate(zip(real_mv, synthetic_mv, strict=True)):
        note = notes[row] if row < len(notes) else ""
        for column, (name, signals_mv) in enumerate(zip(("Real", "Synthetic"), pair, strict=True)):
            corner = (column * PAGE_MM[0], row * PAGE_MM[1])
            page = f"{name.lower()}-{row + 1}"
            _page(axes, _checked(signals_mv), rate_hz, corner, page, name, note)
    _save(figure, out, dots_per_inch=90)


def plot_file(record: Path, out: Path) -> None:
    """Draw a WFDB record, named by its path with or without .hea or .dat.

    In a root of PTB-XL's layout the statements of the record stand on the page.

    Raises:
        UserError: there is no such record, it is not a readable 12-lead ECG, or as `plot_record`.
    """
    _check_out(out)
    stem = record.with_suffix("") if record.suffix in (".hea", ".dat") else record
    header = stem.parent / f"{stem.name}.hea"
    if not header.is_file():
        raise UserError(f"there is no record {record}: {header} is missing; name an existing one")
    try:
        ecg = wfdb_io.read_record(stem.parent, stem.name)
    except wfdb_io.RecordError as error:
        raise UserError(f"{record} cannot be plotted: {error.reason}") from error
    note = "  ".join((*_statements(stem), *ecg.flags))
    plot_record(ecg.adc / wfdb_io.GAIN_PER_MV, ecg.rate_hz, out, title=stem.name, note=note)


def _statements(stem: Path) -> tuple[str, ...]:
    """Return the codes of this record in the table two folders up; none if that cannot be read."""
    folders = stem.absolute().parents
    if len(folders) < 3 or not (folders[2] / ptbxl.FILE).is_file():
        return ()
    relative = stem.absolute().relative_to(folders[2]).as_posix()
    with contextlib.suppress(UserError):
        for row in ptbxl.read_table(folders[2], allow_leakage=True).rows:
            if relative in (row.filename_lr, row.filename_hr):
                return tuple(row.scp_codes)
    return ()


def _check_out(out: Path) -> None:
    if out.suffix.lower() not in ENDINGS:
        raise UserError(
            f"a picture cannot be written to {out}: it ends in {out.suffix or 'nothing'!r}, "
            f"use one of {', '.join(ENDINGS)}"
        )
    if not out.parent.is_dir():
        raise UserError(f"a picture cannot be written to {out}: there is no folder {out.parent}")
    if out.is_dir():
        raise UserError(f"a picture cannot be written to {out}: it is a folder; name a file")


def _checked(signals_mv: NDArray[np.floating[Any]]) -> NDArray[np.floating[Any]]:
    if signals_mv.ndim != 2 or len(signals_mv) != len(LEADS) or not np.isfinite(signals_mv).any():
        raise ValueError(
            f"a page shows 12 leads in mV with finite samples, not an array {signals_mv.shape}"
        )
    return signals_mv


def _figure(rows: int, columns: int) -> tuple[Figure, Axes]:
    """Return a figure of pages, without pyplot, and axes in millimetres, y downwards."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    width_mm, height_mm = columns * PAGE_MM[0], rows * PAGE_MM[1]
    figure = Figure(figsize=(width_mm / 25.4, height_mm / 25.4), facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.set_xlim(0.0, width_mm)
    axes.set_ylim(height_mm, 0.0)
    axes.set_axis_off()
    return figure, axes


def _page(
    axes: Axes,
    signals_mv: NDArray[np.floating[Any]],
    rate_hz: float,
    corner: tuple[float, float],
    page: str,
    title: str,
    note: str,
) -> None:
    """Draw heading, paper, calibration pulses and traces of one record at `corner` (mm).

    In SVG the parts are called `page`-grid-1, -calibration-1, -I, -II, .., -rhythm-II.
    """
    x0, y0 = corner
    plain: dict[str, Any] = {"color": INK, "parse_math": False}
    axes.text(x0 + 6, y0 + 6.5, title, fontsize=12, weight="bold", **plain)
    axes.text(x0 + PAGE_MM[0] - 6, y0 + 6.5, note, fontsize=9, ha="right", **plain)
    scale = f"{MM_PER_S:g} mm/s   {MM_PER_MV:g} mm/mV   {rate_hz:g} Hz"
    axes.text(x0 + 6, y0 + PAGE_MM[1] - 8, scale, fontsize=9, color=INK)
    _grid(axes, (x0 + PAPER_CORNER_MM[0], y0 + PAPER_CORNER_MM[1]), page)
    for row, names in enumerate(ROWS):
        baseline = y0 + FIRST_ROW_MM + row * ROW_MM
        pulse = np.array([[0, 0], [2, 0], [2, -MM_PER_MV], [7, -MM_PER_MV], [7, 0], [9, 0]])
        _line(
            axes, pulse + np.array([x0 + PULSE_LEFT_MM, baseline]), f"{page}-calibration-{row + 1}"
        )
        seconds = DURATION_S / len(names)
        for column, name in enumerate(names):
            left = x0 + TRACE_LEFT_MM + column * seconds * MM_PER_S
            start, stop = (round(k * seconds * rate_hz) for k in (column, column + 1))
            # One sample more than the column holds joins it to the next without a gap.
            trace = signals_mv[LEADS.index(name), start : stop + 1]
            x = left + np.arange(len(trace)) / rate_hz * MM_PER_S
            _line(
                axes,
                np.column_stack([x, baseline - trace * MM_PER_MV]),
                f"{page}-{name}" if len(names) > 1 else f"{page}-rhythm-{name}",
            )
            label = SPELLING.get(name, name)
            axes.text(
                left + 1, baseline - 13, label, fontsize=10, weight="bold", color=INK, zorder=1,
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 1.0},
            )  # fmt: skip
            if column:
                tick = np.array([[left, baseline - 8], [left, baseline - 5]])
                _line(axes, tick, f"{page}-mark-{name}")


def _line(axes: Axes, points: NDArray[np.floating[Any]], gid: str) -> None:
    axes.plot(
        points[:, 0], points[:, 1], color=INK, linewidth=0.7, gid=gid, solid_joinstyle="round"
    )


def _grid(axes: Axes, corner: tuple[float, float], page: str) -> None:
    """Draw millimetre paper: a fine line every 1 mm, a bold one every 5 mm."""
    from matplotlib.collections import LineCollection

    (x0, y0), (width, height) = corner, PAPER_MM
    for step_mm, colour, line_width in ((1, FINE_GRID, 0.35), (5, BOLD_GRID, 0.6)):
        columns = [[(x0 + x, y0), (x0 + x, y0 + height)] for x in np.arange(0, width + 1, step_mm)]
        rows = [[(x0, y0 + y), (x0 + width, y0 + y)] for y in np.arange(0, height + 1, step_mm)]
        grid = LineCollection(
            columns + rows,
            colors=colour,
            linewidths=line_width,
            zorder=0,
            gid=f"{page}-grid-{step_mm}",
        )
        axes.add_collection(grid, autolim=False)


def _save(figure: Figure, out: Path, dots_per_inch: int) -> None:
    """Write the picture whole or not at all, the same bytes for the same signals."""
    import matplotlib as mpl

    kind = out.suffix.lower()[1:]
    metadata = {"png": {"Software": None}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}
    # Text stays text in SVG, so that lead names can be searched and read aloud.
    style = mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "ecg"})
    with atomic_file(out, durable=False) as temp, style:
        figure.savefig(temp, format=kind, dpi=dots_per_inch, metadata=metadata[kind])
