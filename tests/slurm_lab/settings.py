"""slurm.conf and its neighbours: a small cluster whose scheduler and time-outs are quick."""

from __future__ import annotations

from pathlib import Path

SETTINGS = {
    "ClusterName": "lab",
    "SlurmctldHost": "ctl",
    "SlurmUser": "root",
    "SlurmdUser": "root",
    "AuthType": "auth/munge",
    "CredType": "cred/munge",
    "SlurmctldPidFile": "/run/slurmctld.pid",
    "SlurmdPidFile": "/run/slurmd.%n.pid",
    # On the lab's own /run: a socket's path may have 107 characters, a test's folder has more.
    "SlurmdSpoolDir": "/run/slurmd.%n",
    "StateSaveLocation": "/run/slurmctld",
    "SlurmctldLogFile": "{folder}/log/slurmctld.log",
    "SlurmdLogFile": "{folder}/log/%n.log",
    "JobCompType": "jobcomp/filetxt",
    "JobCompLoc": "{folder}/log/jobcomp.txt",
    "AccountingStorageType": "accounting_storage/none",
    # No cgroup is needed, so a container that may make namespaces is enough.
    "ProctrackType": "proctrack/linuxproc",
    "TaskPlugin": "task/none",
    "JobAcctGatherType": "jobacct_gather/linux",
    "MpiDefault": "none",
    "SelectType": "select/cons_tres",
    "SelectTypeParameters": "CR_CPU_Memory",
    # Real clusters schedule every half minute; here a job starts in a fraction of a second.
    "SchedulerParameters": "sched_interval=1,sched_min_interval=0,bf_interval=1"
    ",batch_sched_delay=0",
    "PriorityType": "priority/basic",
    "PreemptType": "preempt/partition_prio",
    "PreemptMode": "REQUEUE",
    # 22.05's name; later it moved to PreemptParameters. An unknown key stops every new process.
    "SlurmctldParameters": "preempt_send_user_signal",
    "JobRequeue": "1",
    "ReturnToService": "2",
    "SlurmdTimeout": "5",
    "MessageTimeout": "3",
    "TCPTimeout": "2",
    "KillWait": "3",
    "MinJobAge": "3600",
    "GresTypes": "gpu",
    # Lets the nodes claim more processors and memory together than the machine has.
    "SlurmdParameters": "config_overrides",
}

PARTITIONS = ("main", "high")
NODES_AND_PARTITIONS = """\
NodeName=node[1-{nodes}] CPUs={cpus} RealMemory=6000 Gres=gpu:2 State=UNKNOWN
PartitionName=DEFAULT Nodes=ALL MaxTime=60 DefaultTime=10 DefMemPerCPU=500 State=UP
PartitionName=main Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=15
PartitionName=high PriorityTier=10 PreemptMode=OFF
"""

ACCOUNTING = {
    "AccountingStorageType": "accounting_storage/slurmdbd",
    "AccountingStorageHost": "ctl",
}

SLURMDBD = """\
AuthType=auth/munge
DbdHost=ctl
SlurmUser=root
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=lab
PidFile=/run/slurmdbd.pid
LogFile={folder}/log/slurmdbd.log
"""


def write_settings(
    folder: Path, nodes: int, cpus: int, accounting: bool, changes: dict[str, str | None]
) -> None:
    """Write folder/etc, with `changes` to slurm.conf (None takes a line out)."""
    settings = SETTINGS | (ACCOUNTING if accounting else {}) | changes
    lines = "".join(f"{key}={value}\n" for key, value in settings.items() if value)
    lines += NODES_AND_PARTITIONS.format(nodes=nodes, cpus=cpus)
    etc = folder / "etc"
    (etc / "slurm.conf").write_text(lines.replace("{folder}", str(folder)))
    (etc / "gres.conf").write_text(f"Name=gpu File={folder}/dev/nvidia[0-1]\n")
    # slurmdbd insists that nobody else can read its file.
    (etc / "slurmdbd.conf").touch(mode=0o600)
    (etc / "slurmdbd.conf").write_text(SLURMDBD.format(folder=folder))
