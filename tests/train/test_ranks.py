from __future__ import annotations

import pytest
import torch

from sssd_hpc.errors import UserError
from sssd_hpc.train.ranks import Group, Ranks, discover, first_host
from sssd_hpc.train.state import owners

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "29500",
}
SLURM = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "2",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_NODELIST": "node[2-3]",
    "SLURM_NTASKS": "4",
}


def test_alone_is_rank_0_of_1() -> None:
    assert discover({"HOME": "/"}) == Ranks(0, 1, 0, "127.0.0.1", 0, "single")


def test_torchruns_variables_are_taken_as_they_are() -> None:
    expected = Ranks(3, 4, 1, "node1", 29500, "torchrun")
    assert discover(TORCHRUN) == expected
    # torchrun started by srun: its own variables count.
    assert discover(SLURM | TORCHRUN) == expected


def test_a_step_of_srun_meets_at_its_first_node() -> None:
    found = discover(SLURM)
    assert (found.rank, found.world_size, found.local_rank) == (2, 4, 0)
    assert (found.master_addr, found.launcher) == ("node2", "slurm")
    assert all(
        discover(SLURM | {"SLURM_PROCID": str(rank)}).master_port == found.master_port
        for rank in range(4)
    )
    assert discover(SLURM | {"SLURM_RESTART_COUNT": "1"}).master_port != found.master_port
    assert found.environment()["MASTER_PORT"] == str(found.master_port)


def test_where_to_meet_may_be_said() -> None:
    found = discover(SLURM | {"MASTER_ADDR": "head", "MASTER_PORT": "1234"})
    assert (found.master_addr, found.master_port, found.rank) == ("head", 1234, 2)


@pytest.mark.parametrize("name", TORCHRUN)
def test_half_of_torchruns_variables_is_refused(name: str) -> None:
    half = {key: value for key, value in TORCHRUN.items() if key != name}
    with pytest.raises(UserError, match=f"but {name} are not"):
        discover(half)


@pytest.mark.parametrize("name", ["SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NODELIST"])
def test_half_of_sruns_variables_is_refused(name: str) -> None:
    half = {key: value for key, value in SLURM.items() if key != name}
    with pytest.raises(UserError, match=f"but {name} are not"):
        discover(half)


def test_a_job_of_several_tasks_without_srun_is_refused() -> None:
    batch = {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "2", "SLURM_PROCID": "0"}
    with pytest.raises(UserError, match="no srun step"):
        discover(batch)
    assert discover(batch | {"SLURM_NTASKS": "1"}).launcher == "single"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"RANK": "x"}, "RANK is 'x'"),
        ({"RANK": "-1"}, "RANK is '-1'"),
        ({"RANK": "4"}, "ranks are 0"),
        ({"MASTER_PORT": ""}, "MASTER_PORT is ''"),
    ],
)
def test_values_that_cannot_be_are_named(change: dict[str, str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        discover(TORCHRUN | change)


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("node[03-05,9],login1", "node03"),
        ("a-b.c[7]x,z", "a-b.c7x"),
        ("gpu[12,14-16]", "gpu12"),
    ],
)
def test_the_first_host_of_a_list(nodes: str, host: str) -> None:
    assert first_host(nodes) == host


@pytest.mark.parametrize("nodes", ["", "[", "node 1"])
def test_a_list_that_names_no_host_is_refused(nodes: str) -> None:
    with pytest.raises(UserError, match="names no host"):
        first_host(nodes)


def test_one_process_talks_to_itself() -> None:
    group = Group()
    assert group.gather("x") == ["x"]
    assert group.total([1.5, 2.0], torch.device("cpu")) == [1.5, 2.0]
    assert group.first(lambda: 7) == 7
    assert group.everywhere(lambda: 8) == [8]


def test_every_tensor_has_one_owner_and_the_loads_are_even() -> None:
    sizes = {f"p{i}": i for i in range(1, 30)}
    owner = owners(sizes, 4)
    assert owner.keys() == sizes.keys()
    loads = [sum(sizes[name] for name in sizes if owner[name] == rank) for rank in range(4)]
    assert max(loads) - min(loads) <= max(sizes.values())
    assert set(owners(sizes, 1).values()) == {0}
