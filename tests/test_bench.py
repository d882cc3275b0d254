"""The bench refuses what is wrong, keeps what is right, and the pages quote what it has kept."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path

import pytest
import torch

from bench import __main__ as bench
from bench import cases, compare, report, targets, timing
from bench.cases import Candidate, Comparison, Refusal
from bench.timing import Effort
from sssd_hpc.ops import counts

ROOT = Path(__file__).parents[1]
CEILINGS = {"copy_bytes_per_s": 1e9, "fp32_flops_per_s": 1e9}
TRUTH = torch.ones(4, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
EFFORT = Effort(0.0, 2, 2)


def comparison(*candidates: Candidate) -> Comparison:
    cost = counts.Cost(1.0, 1.0)
    return Comparison("sum", {"H": 4}, "float32", cost, lambda: TRUTH, list(candidates))


def outcome(value: float = 1.0, gradient: float = 1.0) -> cases.Outcome:
    return torch.full((4,), value), torch.full((2,), gradient)


@pytest.mark.parametrize(
    ("value", "gradient", "words"),
    [
        (1.0 + 1e-4, 1.0, "value is 1.00e-04"),
        (1.0, 1.0 + 1e-4, "gradient is 1.00e-04"),
        (float("nan"), 1.0, "value is nan"),
    ],
)
def test_a_candidate_that_is_wrong_is_refused_and_never_timed(value, gradient, words):
    wrong = Candidate("cpp", lambda: outcome(value, gradient), bound=1e-5)
    with pytest.raises(Refusal, match=words):
        cases.compare(comparison(Candidate("textbook", outcome), wrong), "cpu", EFFORT, CEILINGS)


def test_a_baseline_has_no_bound_but_its_error_is_kept():
    rough = Candidate("textbook", lambda: outcome(1.01))
    exact = Candidate("cpp", outcome, bound=1e-5)
    first, second = cases.compare(comparison(rough, exact), "cpu", EFFORT, CEILINGS)
    assert first["error"] == pytest.approx(0.01, rel=1e-4)
    assert second["error"] == 0
    assert first["speedup"] == 1
    assert second["speedup"] == first["median_s"] / second["median_s"]


def test_a_refused_suite_writes_nothing_and_the_exit_code_says_so(tmp_path, monkeypatch, capsys):
    def refuse(*_: object) -> list[cases.Record]:
        raise Refusal("red")

    monkeypatch.setitem(bench.SUITES, "block", refuse)
    out = tmp_path / "cpu.json"
    assert bench.main(["block", "--device", "cpu", "--quick", "--out", str(out)]) == 1
    assert not out.exists()
    out.write_text('{"device": "cpu", "suites": {"block": {}, "kernels": {}}}')
    assert bench.main(["block", "--device", "cpu", "--quick", "--out", str(out)]) == 1
    assert list(json.loads(out.read_text())["suites"]) == ["kernels"]
    assert "refused: red" in capsys.readouterr().err


def test_suites_are_kept_one_by_one_and_make_page_and_picture(tmp_path):
    out = tmp_path / "cpu.json"
    for suite in ("block", "convolution"):
        assert bench.main([suite, "--device", "cpu", "--quick", "--out", str(out)]) == 0
    suites = json.loads(out.read_text())["suites"]
    assert list(suites) == ["block", "convolution"]
    for suite in suites.values():
        for entry in suite["records"]:
            assert entry["low_s"] <= entry["median_s"] <= entry["high_s"]
            assert entry["flops"] > 0 or entry["op"].startswith("gate")
            assert entry["bytes"] > 0
    docs = tmp_path / "docs"
    assert report.main(["--results", str(tmp_path), "--docs", str(docs)]) == 0
    page = (docs / "performance.md").read_text()
    assert "quick: tiny sizes" in page
    assert "not measured" in page
    picture = (docs / "roofline.png").read_bytes()
    width, height = struct.unpack(">II", picture[16:24])
    assert width > 500
    assert height > 300


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["kernel"], "no suite 'kernel'"),
        pytest.param(
            ["block", "--device", "cuda"],
            "no GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_a_run_that_cannot_be_is_one_line(arguments, words, capsys):
    with pytest.raises(SystemExit, match="2"):
        bench.main(arguments)
    assert words in capsys.readouterr().err


def test_a_version_that_does_not_exist_is_one_line(capsys):
    assert compare.compare("no-such-version", ["block"], "cpu", True) == 2
    assert capsys.readouterr().err.startswith("--base no-such-version: ")


def test_two_versions_are_compared_case_by_case():
    def entry(backend: str, median_s: float) -> cases.Record:
        shape, op = {"B": 2}, "gate"
        return {
            "op": op,
            "shape": shape,
            "dtype": "float32",
            "backend": backend,
            "median_s": median_s,
        }

    base = [entry("public form", 0.004), entry("cpp", 0.004), entry("gone", 1.0)]
    here = [entry("public form", 0.004), entry("cpp", 0.001), entry("new", 0.001)]
    assert compare.table("block", "v1", base, here).splitlines() == [
        "block: v1 ms, here ms, ratio",
        "  gate B2 float32 public form (baseline): 4, 4, 1.00",
        "  gate B2 float32 cpp: 4, 1, 4.00",
        "  gate B2 float32 new: new, 1",
        "  gate B2 float32 gone: only in v1",
    ]


def test_a_target_takes_the_quickest_that_its_key_names():
    records = [
        {"op": "kernel", "shape": {"H": 512}, "dtype": "float32", "backend": name, "median_s": time}
        for name, time in (("textbook", 8.0), ("torch", 2.0), ("cpp", 1.0))
    ]
    results = {"device": "cpu", "suites": {"kernels": {"records": records}}}
    textbook = targets.Key("kernels", "kernel", "textbook")
    ratio = targets.Target("cpu", "", targets.Key("kernels", "kernel"), 9, textbook)
    assert ratio.value(results) == 8
    assert not ratio.met(8)
    limit = targets.Target("cpu", "", targets.Key("kernels", "kernel", "torch"), 3)
    assert limit.value(results) == 2
    assert limit.met(2)
    absent = targets.Target("cpu", "", targets.Key("block", "gate"), 3, textbook)
    assert absent.value(results) is None


def test_quantiles_of_times_do_not_follow_an_outlier():
    spread = timing.quantiles([1.0, 1.1, 1.2, 1.3, 90.0])
    assert (spread["median_s"], spread["low_s"], spread["high_s"]) == (1.2, 1.1, 1.3)


def test_the_page_is_what_the_results_say():
    assert (ROOT / "docs" / "performance.md").read_text() == report.page(
        report.load(ROOT / "bench" / "results")
    )


@pytest.mark.parametrize("page", ["README.md", "docs/ops.md"])
def test_numbers_quoted_from_the_bench_stand_on_its_page(page):
    """A quoted number is bold and followed by the link to the page: **160x** ([bench](...))."""
    text = (ROOT / page).read_text()
    bench_page = (ROOT / "docs" / "performance.md").read_text()
    paragraphs = [p for p in re.split(r"\n\n|\n(?=[-|])", text) if "performance.md" in p]
    quoted = [n for p in paragraphs for n in re.findall(r"\*\*(\d[\d.,]* ?(?:x|ms|s|GB))\*\*", p)]
    assert quoted
    cells = {cell.strip() for line in bench_page.splitlines() for cell in line.split("|")}
    for number in quoted:
        assert number in cells or number.removesuffix("x") in cells, number
