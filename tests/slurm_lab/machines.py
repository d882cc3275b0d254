"""The scripts that make namespaces into machines, run by the first process in each."""

from __future__ import annotations

CONTROLLER_IP = "10.77.0.1"
NODE_IP = "10.77.0.1{}"  # node1 is 10.77.0.11: nine nodes at most

# bash stays as the first process because it reaps whatever daemons leave behind.
CONTROLLER = f"""
set -e
folder=$1 nodes=$2
mount -t tmpfs tmpfs /run
mkdir -p /run/munge /run/mysqld /run/netns /run/slurmctld
mount --bind "$folder/hosts" /etc/hosts
mount --bind "$folder/etc" /etc/slurm
hostname ctl
ip link set lo up
ip link add br0 type bridge
ip addr add {CONTROLLER_IP}/24 dev br0
ip link set br0 up
for i in $(seq "$nodes"); do
  ip netns add "node$i"
  ip link add "v$i" type veth peer name eth0 netns "node$i"
  ip link set "v$i" master br0 up
  ip -n "node$i" link set lo up
  ip -n "node$i" addr add "{NODE_IP.format("$i")}/24" dev eth0
  ip -n "node$i" link set eth0 up
done
echo ready
exec >/dev/null
sleep infinity & wait
"""

NODE = """
mount -t tmpfs tmpfs /dev/shm
hostname "$1"
slurmd -D -N "$1" & wait $!
"""

DATABASE = """
set -e
mariadb-install-db --no-defaults --user=root --datadir=/run/mysqld/data \
  --auth-root-authentication-method=socket --skip-test-db
mariadbd --no-defaults --user=root --datadir=/run/mysqld/data --socket=/run/mysqld/mysqld.sock \
  --skip-networking --innodb-buffer-pool-size=64M --innodb-lock-wait-timeout=900 &
"""


def hosts(nodes: list[str]) -> str:
    """Return /etc/hosts."""
    lines = [f"{NODE_IP.format(node[4:])} {node}" for node in nodes]
    return "\n".join(["127.0.0.1 localhost", f"{CONTROLLER_IP} ctl", *lines, ""])
