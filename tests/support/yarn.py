"""YARN on this machine, beside the HDFS of a cluster: ResourceManager and NodeManager, from the jar that has HDFS's."""

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from jobs.cluster import Cluster
from jobs.daemons import HOST, end, free_ports, get_json
from jobs.hadoop import CACHE, hadoop_command, run

_QUEUE = "yarn.scheduler.capacity.root"
_PORTS = ("", "scheduler.", "resource-tracker.", "admin.", "webapp.")  # each of them has an address


class Yarn:
    """`conf`: HADOOP_CONF_DIR of clients, for HDFS too."""

    def __init__(self, cluster: Cluster, folder: Path, queue: str):
        self.conf = folder / "conf"
        self._folder = folder
        self._port = _configure(self.conf, folder, cluster.state / "conf", queue)

    def applications(self) -> list[dict[str, Any]]:
        """Return what the ResourceManager says of each application: its queue, its finalStatus ..."""
        answer = get_json(self._port, "/ws/v1/cluster/apps")
        assert answer is not None
        return (answer["apps"] or {"app": []})["app"]

    def start(self, kind: str) -> psutil.Process:
        """Start "resourcemanager.ResourceManager" or "nodemanager.NodeManager"."""
        command = hadoop_command(self.conf, self._folder, f"yarn.server.{kind}")
        command[command.index("-cp") + 1] += "".join(f":{jar}" for jar in bouncycastle())
        if shutil.which("setpriv"):  # it ends with this process, however that ends
            command = ["setpriv", "--pdeathsig", "TERM", *command]
        java = Path(shutil.which("java") or "").resolve().parents[1]
        env = os.environ | {"HADOOP_CONF_DIR": str(self.conf), "JAVA_HOME": os.environ.get("JAVA_HOME", str(java))}
        with (self._folder / f"{kind}.log").open("wb") as log:
            return psutil.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)

    def is_ready(self) -> bool:
        answer = get_json(self._port, "/ws/v1/cluster/metrics")
        return bool(answer and answer["clusterMetrics"]["activeNodes"])


def bouncycastle() -> list[Path]:
    """The cryptography that a ResourceManager wants and the jar of HDFS's daemons lacks: fetched once, by Maven."""
    jars = []
    for name in ("bcprov", "bcpkix", "bcutil"):
        artifact = f"{name}-jdk18on"
        jars.append(CACHE / f"{artifact}-1.82.jar")
        if not jars[-1].exists():
            fetch = f"mvn -q -B dependency:copy -Dartifact=org.bouncycastle:{artifact}:1.82 -DoutputDirectory={CACHE}"
            run(fetch.split(), f"Maven could not fetch {artifact}")
    return jars


@contextmanager
def yarn_on(cluster: Cluster, folder: Path, queue: str) -> Iterator[Yarn]:
    """YARN with one node of 8 GB and 4 cores, and one queue. It ends with the `with` block."""
    yarn = Yarn(cluster, folder, queue)
    daemons = [yarn.start("resourcemanager.ResourceManager"), yarn.start("nodemanager.NodeManager")]
    try:
        deadline = time.monotonic() + 120
        while not yarn.is_ready():
            assert all(daemon.poll() is None for daemon in daemons), f"see the logs in {folder}"
            assert time.monotonic() < deadline, f"see the logs in {folder}"
            time.sleep(0.2)
        yield yarn
    finally:
        end([process for daemon in daemons for process in (daemon, *daemon.children(recursive=True))])


def _configure(conf: Path, folder: Path, hdfs: Path, queue: str) -> int:
    """Write the conf folder of daemons and clients; return the port of the ResourceManager's pages."""
    shutil.copytree(hdfs, conf)
    ports = free_ports(_PORTS)
    site = {
        **{f"yarn.resourcemanager.{name}address": f"{HOST}:{port}" for name, port in ports.items()},
        **{f"yarn.nodemanager.{name}address": f"{HOST}:0" for name in ("", "localizer.", "webapp.")},
        "yarn.nodemanager.local-dirs": folder / "local",
        "yarn.nodemanager.log-dirs": folder / "containers",
        "yarn.nodemanager.resource.memory-mb": 8192,
        "yarn.nodemanager.resource.cpu-vcores": 4,
        # Java reserves far more addresses than it uses.
        "yarn.nodemanager.vmem-check-enabled": "false",
    }
    queues = {f"{_QUEUE}.queues": queue, f"{_QUEUE}.{queue}.capacity": 100}
    for name, values in (("yarn-site.xml", site), ("capacity-scheduler.xml", queues)):
        rows = [f"<property><name>{key}</name><value>{value}</value></property>" for key, value in values.items()]
        (conf / name).write_text("\n".join(["<configuration>", *rows, "</configuration>\n"]))
    return ports["webapp."]
