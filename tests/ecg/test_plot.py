from __future__ import annotations

import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from sssd_hpc.ecg import plot, ptbxl, simulate, wfdb_io
from sssd_hpc.ecg.leads import LEADS
from sssd_hpc.errors import UserError

Array = NDArray[np.float64]
MM_PER_POINT = 25.4 / 72
SVG = "{http://www.w3.org/2000/svg}"
PRINTED = ("I", "II", "III", "aVR", "aVL", "aVF", "V1", "V2", "V3", "V4", "V5", "V6")


def spikes(rate_hz: int = 100, length_s: float = 10.0) -> Array:
    """Lead number n is n/10 mV high at each whole second and half a second later -0.5 mV."""
    signals = np.zeros((12, round(length_s * rate_hz)))
    signals[:, ::rate_hz] = 0.1 * np.arange(1, 13)[:, None]
    signals[:, rate_hz // 2 :: rate_hz] = -0.5
    return signals


def lines_mm(picture: Path) -> dict[str, Array]:
    """Read the points (n, 2) in mm of every named line of an SVG."""
    found = {}
    for group in ET.parse(picture).getroot().iter(f"{SVG}g"):
        path = group.find(f"{SVG}path")
        if path is not None:
            numbers = re.findall(r"-?\d+\.?\d*", path.get("d", ""))
            points = np.array([float(number) for number in numbers]).reshape(-1, 2)
            found[group.get("id", "")] = points * MM_PER_POINT
    return found


def grid_mm(picture: Path, step: int) -> tuple[Array, Array]:
    """Return where vertical and horizontal lines of a grid stand."""
    root = ET.parse(picture).getroot()
    group = next(g for g in root.iter(f"{SVG}g") if g.get("id") == f"ecg-grid-{step}")
    text = [path.get("d", "") for path in group.iter(f"{SVG}path")]
    points = [
        np.array([float(x) for x in re.findall(r"-?\d+\.?\d*", d)]).reshape(-1, 2) for d in text
    ]
    vertical = [p[0, 0] for p in points if len(p) == 2 and p[0, 0] == p[1, 0]]
    horizontal = [p[0, 1] for p in points if len(p) == 2 and p[0, 1] == p[1, 1]]
    return (np.sort(np.array(part)) * MM_PER_POINT for part in (vertical, horizontal))  # type: ignore[return-value]


@pytest.fixture(scope="module")
def svg(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("plot") / "ecg.svg"
    plot.plot_record(spikes(), 100, out, title="a <title> & more", note="NORM, SR")
    return out


@pytest.mark.parametrize(
    ("ending", "magic"), [(".png", b"\x89PNG"), (".PNG", b"\x89PNG"), (".svg", b"<?xml"),
                          (".pdf", b"%PDF")],
)  # fmt: skip
def test_the_ending_chooses_the_format(tmp_path: Path, ending: str, magic: bytes) -> None:
    out = tmp_path / f"ecg{ending}"
    plot.plot_record(spikes(), 100, out)
    assert out.read_bytes().startswith(magic)
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


def test_a_page_is_a4_across(svg: Path) -> None:
    root = ET.parse(svg).getroot()
    width, height = (float(root.get(name, "0pt")[:-2]) for name in ("width", "height"))
    assert width * MM_PER_POINT == pytest.approx(297, abs=0.01)
    assert height * MM_PER_POINT == pytest.approx(210, abs=0.01)


def test_a_second_is_25_mm_and_a_millivolt_10_mm(svg: Path) -> None:
    rhythm = lines_mm(svg)["ecg-rhythm-II"]
    baseline = np.median(rhythm[:, 1])
    low = rhythm[rhythm[:, 1] > baseline + 4]
    assert len(low) == 10
    assert np.diff(low[:, 0]) == pytest.approx(25.0, abs=0.02)
    assert low[:, 1] - baseline == pytest.approx(5.0, abs=0.02)
    assert np.ptp(rhythm[:, 0]) == pytest.approx(25 * 9.99, abs=0.05)


def test_every_lead_is_drawn_at_its_own_time_and_height(svg: Path) -> None:
    lines = lines_mm(svg)
    left = lines["ecg-rhythm-II"][:, 0].min()
    for names in plot.ROWS[:3]:
        for column, name in enumerate(names):
            trace = lines[f"ecg-{name}"]
            assert trace[:, 0].min() == pytest.approx(left + 62.5 * column, abs=0.05)
            assert np.ptp(trace[:, 0]) == pytest.approx(62.5, abs=0.3)
            height = np.median(trace[:, 1]) - trace[:, 1].min()
            assert height == pytest.approx(LEADS.index(name) + 1, abs=0.05)


def test_the_calibration_pulse_is_1_mv_high_and_200_ms_wide(svg: Path) -> None:
    pulses = [line for name, line in lines_mm(svg).items() if "calibration" in name]
    assert len(pulses) == 4
    for pulse in pulses:
        top = pulse[pulse[:, 1] < pulse[:, 1].min() + 0.01]
        assert np.ptp(pulse[:, 1]) == pytest.approx(10.0, abs=0.02)
        assert np.ptp(top[:, 0]) == pytest.approx(5.0, abs=0.02)


@pytest.mark.parametrize("step", [1, 5])
def test_the_grid_has_a_line_every_step_both_ways(svg: Path, step: int) -> None:
    vertical, horizontal = grid_mm(svg, step)
    assert len(vertical) == 285 // step + 1
    assert len(horizontal) == 180 // step + 1
    assert np.diff(vertical) == pytest.approx(step, abs=0.01)
    assert np.diff(horizontal) == pytest.approx(step, abs=0.01)


def test_traces_begin_and_rest_on_bold_lines(svg: Path) -> None:
    vertical, horizontal = grid_mm(svg, 5)
    rhythm = lines_mm(svg)["ecg-rhythm-II"]
    assert np.abs(vertical - rhythm[:, 0].min()).min() < 0.02
    assert np.abs(horizontal - np.median(rhythm[:, 1])).min() < 0.02


def test_names_title_note_and_scale_stand_as_text_in_svg(svg: Path) -> None:
    texts = [text.text for text in ET.parse(svg).getroot().iter(f"{SVG}text")]
    for name in PRINTED:
        assert texts.count(name) == (2 if name == "II" else 1)
    assert "a <title> & more" in texts
    assert "NORM, SR" in texts
    assert "25 mm/s   10 mm/mV   100 Hz" in texts


def test_titles_are_plain_text_not_mathematics(tmp_path: Path) -> None:
    out = tmp_path / "ecg.svg"
    plot.plot_record(spikes(), 100, out, title="$x^2$", note="$\\broken$")
    assert "$x^2$" in out.read_text()
    assert "$\\broken$" in out.read_text()


@pytest.mark.parametrize(("rate_hz", "length_s"), [(500, 10.0), (100, 4.0), (100, 30.0)])
def test_other_rates_and_lengths_keep_the_scale(
    tmp_path: Path, rate_hz: int, length_s: float
) -> None:
    out = tmp_path / "ecg.svg"
    plot.plot_record(spikes(rate_hz, length_s), rate_hz, out)
    rhythm = lines_mm(out)["ecg-rhythm-II"]
    assert np.ptp(rhythm[:, 0]) == pytest.approx(25 * min(length_s, 10.0), abs=0.3)


def test_the_same_signals_give_the_same_bytes(tmp_path: Path) -> None:
    for ending in plot.ENDINGS:
        one, two = tmp_path / f"one{ending}", tmp_path / f"two{ending}"
        for out in (one, two):
            plot.plot_record(spikes(), 100, out, title="t")
        assert one.read_bytes() == two.read_bytes()


def test_a_missing_sample_leaves_a_gap_instead_of_an_error(tmp_path: Path) -> None:
    signals = spikes()
    signals[1, 300:400] = np.nan
    plot.plot_record(signals, 100, tmp_path / "ecg.png")


def test_plotting_needs_no_display_and_leaves_pyplot_alone(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib, numpy as np\n"
        "from sssd_hpc.ecg import plot\n"
        "assert 'matplotlib' not in sys.modules\n"
        "plot.plot_record(np.ones((12, 1000)), 100, pathlib.Path(sys.argv[1]))\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    environment = {"PATH": "/usr/bin:/bin", "MPLCONFIGDIR": str(tmp_path / "mpl")}
    root = Path(plot.__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "ecg.png")],
        cwd=root, env={**environment, "PYTHONPATH": str(root)}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_a_pair_picture_holds_real_left_and_synthetic_right(tmp_path: Path) -> None:
    out = tmp_path / "pair.svg"
    plot.plot_pair([spikes()] * 2, [0.5 * spikes()] * 2, 100, out, notes=["NORM", "AFIB"])
    root = ET.parse(out).getroot()
    texts = [text.text for text in root.iter(f"{SVG}text")]
    assert texts.count("Real") == texts.count("Synthetic") == 2
    assert texts.count("NORM") == texts.count("AFIB") == 2
    assert float(root.get("width", "0pt")[:-2]) * MM_PER_POINT == pytest.approx(594, abs=0.1)
    lines = lines_mm(out)
    for row in (1, 2):
        real, synthetic = lines[f"real-{row}-V6"], lines[f"synthetic-{row}-V6"]
        assert synthetic[:, 0].min() - real[:, 0].min() == pytest.approx(297, abs=0.05)
        heights = [np.median(line[:, 1]) - line[:, 1].min() for line in (real, synthetic)]
        assert heights == pytest.approx([12.0, 6.0], abs=0.05)
    ids = [element.get("id") for element in root.iter() if element.get("id")]
    assert len(ids) == len(set(ids))


def test_unequal_numbers_of_records_make_no_pair(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="as many real as synthetic"):
        plot.plot_pair([spikes()], [], 100, tmp_path / "pair.png")


@pytest.mark.parametrize(
    "signals", [np.zeros((8, 1000)), np.zeros(1000), np.full((12, 1000), np.nan)]
)
def test_other_arrays_are_refused(tmp_path: Path, signals: Array) -> None:
    with pytest.raises(ValueError, match="12 leads"):
        plot.plot_record(signals, 100, tmp_path / "ecg.png")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["ecg.bmp", "ecg", "ecg.jpeg", "nowhere/ecg.png", "folder.png"])
def test_a_wrong_ending_or_folder_is_a_user_error(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(UserError, match="cannot be written"):
        plot.plot_record(spikes(), 100, tmp_path / name)


@pytest.mark.parametrize("ending", ["", ".hea", ".dat"])
def test_a_record_is_named_with_or_without_ending(tmp_path: Path, ending: str) -> None:
    wfdb_io.write_record(tmp_path, "0_5-mV", spikes(), 100)
    out = tmp_path / "ecg.svg"
    plot.plot_file(tmp_path / f"0_5-mV{ending}", out)
    trace = lines_mm(out)["ecg-V6"]
    assert np.median(trace[:, 1]) - trace[:, 1].min() == pytest.approx(12.0, abs=0.05)
    assert "0_5-mV" in out.read_text()


def test_a_record_of_a_root_shows_its_statements(tmp_path: Path) -> None:
    simulate.simulate(tmp_path / "root", num_records=1, seed=0)
    row = ptbxl.read_table(tmp_path / "root").rows[0]
    out = tmp_path / "ecg.svg"
    plot.plot_file(tmp_path / "root" / row.filename_hr, out)
    text = out.read_text()
    assert all(code in text for code in row.scp_codes)
    assert "500 Hz" in text


def test_a_broken_table_does_not_keep_a_record_from_being_drawn(tmp_path: Path) -> None:
    folder = tmp_path / "records100" / "00000"
    folder.mkdir(parents=True)
    wfdb_io.write_record(folder, "00001_lr", spikes(), 100)
    (tmp_path / "ptbxl_database.csv").write_text("nonsense")
    plot.plot_file(folder / "00001_lr", tmp_path / "ecg.png")
    assert (tmp_path / "ecg.png").is_file()


def test_a_missing_or_broken_record_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no record"):
        plot.plot_file(tmp_path / "absent", tmp_path / "ecg.png")
    with pytest.raises(UserError, match="there is no record"):
        plot.plot_file(Path(), tmp_path / "ecg.png")
    wfdb_io.write_record(tmp_path, "cut", spikes(), 100)
    data = tmp_path / "cut.dat"
    data.write_bytes(data.read_bytes()[:-5])
    with pytest.raises(UserError, match="cannot be plotted"):
        plot.plot_file(tmp_path / "cut", tmp_path / "ecg.png")
    assert not (tmp_path / "ecg.png").exists()


def test_a_real_record_is_drawn(ptbxl_root: Path, tmp_path: Path) -> None:
    out = tmp_path / "ecg.svg"
    plot.plot_file(ptbxl_root / "records100" / "00000" / "00001_lr", out)
    assert "NORM" in out.read_text()
