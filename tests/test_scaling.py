"""The cost model of many processes: it keeps its laws, the page says what the results do."""

from __future__ import annotations

import json

import pytest

from bench import cluster, scaling, scaling_page, scaling_rank
from bench.cluster import Cluster, Device, Disk, Link
from sssd_hpc.ops import counts
from sssd_hpc.train.describe import held

FLAT = Cluster(4, Link(0.0, 100.0), Link(0.0, 100.0))


@pytest.fixture(scope="module")
def results() -> dict:
    return json.loads((scaling.RESULTS / "scaling.json").read_text())


def test_the_page_is_what_the_results_say(results):
    assert scaling.PAGE.read_text() == scaling_page.page(results)


def test_the_results_follow_from_what_was_measured(results):
    assert json.loads(json.dumps(scaling.derive(results["measured"]))) == results["model"]


def test_bytes_sent_and_held_were_predicted(results):
    rows = results["model"]["check"]
    assert {(r["ranks"], r["stage"]) for r in rows} == {
        (1, 0),
        *((n, stage) for n in (2, 4) for stage in range(4)),
    }
    for row in rows:
        if row["ranks"] > 1:
            assert row["predicted_bytes"] == pytest.approx(row["bytes"], rel=0.01)
            assert row["predicted_held"] == pytest.approx(row["held"], rel=0.05)


def test_the_page_says_how_far_off_sending_was_predicted(results):
    rows = [row for row in results["model"]["check"] if row["ranks"] > 1]
    late = sorted(row["sending_s"] / row["predicted_sending_s"] for row in rows)
    said = " ".join(scaling.PAGE.read_text().split())
    assert f"takes {late[0]:.1f} to {late[-1]:.1f} times what is predicted" in said
    # Beyond that the model would say little.
    assert all(0.25 < ratio < 4 for ratio in late)


def test_a_collective_is_waiting_until_the_last_rank_comes_and_sending_from_then():
    first = [(0.0, 5.0), (10.0, 11.0)]
    second = [(3.0, 6.0), (9.0, 12.0)]
    assert scaling_rank.split([first, second]) == (3.0, 3.0)
    assert scaling_rank.split([second, first]) == (1.0, 5.0)


def test_the_advice_on_the_page_follows(results):
    model = results["model"]
    memory = {(r["model"], r["stage"]): r for r in model["memory"]}
    assert all(memory[name, 0]["records_80gb"] >= 16 for name in scaling.NETWORKS)
    assert all(memory[name, 1]["held_8"] < memory[name, 0]["held_8"] for name in scaling.NETWORKS)
    for row in model["checkpoint"]:
        assert row["share"] < 0.01
        assert (row["due_s"] < row["save_s"]) is (row["gpus"] > 1)
    assert model["here"]["share"] < 0.01
    assert model["here"]["heartbeat_share"] < 0.01
    several = [row for row in model["efficiency"] if row["gpu"] == "H100 tf32"]
    assert all(row["8"] for row in several)


def test_parts_of_a_block_are_the_training_step_that_is_counted():
    parts = cluster.parts(4, 256, 32, 1000)
    whole = counts.training_step(1, 4, 256, 32, 1000)
    assert sum(part.cost.flops for part in parts) == pytest.approx(whole.flops)
    assert sum(part.cost.bytes for part in parts) == pytest.approx(whole.bytes)


def test_a_step_takes_the_slower_of_arithmetic_memory_and_launches():
    fast = Device(1e30, 1e30, 1e30, 0.0, 0.0)
    whole = counts.training_step(1, 4, 8, 4, 64)
    memory = fast._replace(bytes_per_s=2.0)
    assert cluster.compute_s(3, 4, 8, 4, 64, memory) == pytest.approx(1.5 * whole.bytes)
    arithmetic = fast._replace(matrix_flops_per_s=2.0, vector_flops_per_s=2.0)
    assert cluster.compute_s(3, 4, 8, 4, 64, arithmetic) == pytest.approx(1.5 * whole.flops)
    assert cluster.compute_s(3, 4, 8, 4, 64, fast._replace(launch_s=1.0)) == 3


@pytest.mark.parametrize("n", [2, 4, 8, 64])
def test_an_all_reduce_sends_what_a_ring_must(n):
    """On equal links it is 2 (n - 1) / n of the bytes, however many nodes there are."""
    found = cluster.collective_s("all_reduce", 400, n, FLAT)
    assert found == pytest.approx(2 * (n - 1) / n * 400 / 100)
    halves = ("all_gather", "reduce_scatter")
    assert found == sum(cluster.collective_s(half, 400, n, FLAT) for half in halves)


def test_latency_counts_hops_in_a_node_and_doublings_between():
    slow = Cluster(4, Link(1.0, 1e30), Link(10.0, 1e30))
    assert cluster.collective_s("all_gather", 1.0, 4, slow) == pytest.approx(3)
    assert cluster.collective_s("all_gather", 1.0, 16, slow) == pytest.approx(3 + 20)
    assert cluster.collective_s("all_gather", 1.0, 16, slow, 5) == pytest.approx(5 * (3 + 20))
    assert [cluster.messages(50_000_000, stage) for stage in range(4)] == [1, 3, 3, 3]


def test_one_process_sends_nothing_and_holds_what_adamw_needs():
    assert cluster.communication_s(10, 0, 1, FLAT) == 0
    assert held(10, 0, 1) == (160, 40)


def test_every_stage_holds_less_than_the_one_before_but_for_the_bucket():
    all_held = [sum(held(1000, stage, 64, bucket=0.0)) for stage in range(4)]
    assert all_held[0] > all_held[1] > all_held[2]
    assert all_held[3] < all_held[0]
    assert held(1000, 3, 64, bucket=0.0).rest < held(1000, 2, 64, bucket=0.0).rest


def test_waiting_for_checkpoints_ends_where_they_fit_between():
    disk = Disk(1e3, 1e2, 1e2, 1e2)
    busy = cluster.save_s(100, 0, 4, disk)
    copy = 1600 / 4 / 1e3
    assert cluster.waited_s(100, 0, 4, disk, busy - 1) == pytest.approx(copy + 1)
    assert cluster.waited_s(100, 0, 4, disk, busy + 1) == pytest.approx(copy)
    # One rank need not read back what others wrote.
    assert cluster.save_s(100, 0, 1, disk) == pytest.approx(16 + 16 + 8)
    assert busy == pytest.approx(16 + 4 + 16 + 16 + 8)


def test_checkpoints_that_come_too_soon_are_passed_over():
    assert cluster.interval_s(10.0, 60.0) == 60
    assert cluster.interval_s(25.0, 60.0) == 75
    assert cluster.interval_s(90.0, 60.0) == 90
    assert cluster.interval_s(1.0, 0.0) == 1


def test_efficiency_grows_with_the_batch_and_falls_with_ranks():
    size = {"parameters": 50_000_000, "blocks": 36, "channels": 256, "states": 32}

    def efficiency(B: int, n: int) -> float:
        step = scaling.gpu_step(size, 0, n, B, "H100 tf32", "100 Gb/s a node")
        return step["efficiency"]

    assert efficiency(1, 64) < efficiency(8, 64) < efficiency(64, 64) < 1
    assert efficiency(8, 8) > efficiency(8, 64) > efficiency(8, 512)


def test_a_line_goes_through_what_was_measured():
    rows = [{"op": "x", "bytes": b, "times_s": [9.0, 1 + b, 0.0, 1 + b, 1 + b]} for b in (1, 2, 5)]
    assert scaling.line(rows, "x") == pytest.approx((1.0, 1.0))
