"""The daemons of a cluster on this machine: their names, settings and ports, and how their processes are ended."""

import http.client
import json
import random
import shutil
import signal
import socket
import sys
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, cast

import psutil

from jobs.hadoop import HEAP, JAVA_OPTIONS, SPARK_HOME, write_conf
from kanyun.errors import UserError

HOST = "127.0.0.1"
DATANODES = ("datanode-1", "datanode-2")
# Names of one address: Spark speculates only where a second copy of a task gets another host.
WORKERS = {"worker-1": HOST, "worker-2": "localhost"}
DAEMONS = ("namenode", *DATANODES, "master", *WORKERS)


@dataclass(frozen=True)
class Settings:
    hdfs_port: int = 9820
    hdfs_web_port: int = 9870
    spark_port: int = 7077
    spark_web_port: int = 8081
    worker_cores: int = 1
    worker_memory: str = "2g"
    block_mib: int = 128  # HDFS block; while a block is written, a space quota counts all of it

    @property
    def ports(self) -> dict[str, int]:
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name.endswith("_port")}


def refuse_taken_ports(settings: Settings) -> None:
    """Raises UserError, which names the process that listens there."""
    for name, port in settings.ports.items():
        if not _is_free(port):
            option = f"--{name.replace('_', '-')} N, or {name.upper()}=N of make"
            raise UserError(f"port {port} is taken{_holder(port)}: choose another by {option}")


def free_ports(names: Iterable[str] = tuple(Settings().ports)) -> dict[str, int]:
    """Return a free port for each name, below those that Linux gives to connections (by default from 32768 on).

    One of these may be another program's before its daemon binds it, or while a killed daemon is away.
    """
    candidates = random.SystemRandom().sample(range(20_000, 30_000), 100)
    return dict(zip(names, filter(_is_free, candidates), strict=False))


def _is_free(port: int) -> bool:
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind((HOST, port))
        except OSError:
            return False
    return True


def configure(state: Path, settings: Settings, hdfs: str) -> None:
    """Write the conf folders of the daemons and of clients below `state`, and remove what killed JVMs left there."""
    core = {"fs.defaultFS": hdfs}
    client = {"dfs.replication": len(DATANODES)}
    server = client | {
        "dfs.blocksize": settings.block_mib << 20,
        "dfs.namenode.name.dir": (state / "namenode").as_uri(),
        "dfs.namenode.rpc-address": f"{HOST}:{settings.hdfs_port}",
        "dfs.namenode.http-address": f"{HOST}:{settings.hdfs_web_port}",
        "dfs.namenode.safemode.extension": 0,
        # A dead DataNode gets no more blocks after 3 s, and is missed after 12 s (10 heartbeats + 2 rechecks), not
        # after 10.5 minutes.
        "dfs.namenode.avoid.write.stale.datanode": "true",
        "dfs.namenode.avoid.read.stale.datanode": "true",
        "dfs.namenode.stale.datanode.interval": 3000,
        "dfs.heartbeat.interval": 1,
        "dfs.namenode.heartbeat.recheck-interval": 1000,
        **{f"dfs.datanode.{part}address": f"{HOST}:0" for part in ("", "http.", "ipc.")},
    }
    write_conf(state / "conf", core, client)
    write_conf(state / "conf-namenode", core, server)
    for name in DATANODES:  # -D is no option of a daemon, and each has its own folder
        write_conf(state / f"conf-{name}", core, server | {"dfs.datanode.data.dir": (state / name).as_uri()})
    (state / "conf" / "spark-daemons.conf").write_text("spark.worker.cleanup.enabled true\n")
    (state / "logs").mkdir(exist_ok=True)
    for name in ("tmp", "spark-local", *WORKERS):  # of the time before: killed JVMs leave files
        shutil.rmtree(state / name, ignore_errors=True)
    (state / "tmp").mkdir()


def spark_daemon(state: Path, name: str, *args: str | int) -> tuple[list[str], dict[str, str]]:
    """Return the command line of "master" or of one of WORKERS, and what its environment has beside the clients'."""
    kind = "master.Master" if name == "master" else "worker.Worker"
    conf = state / "conf" / "spark-daemons.conf"  # its path also marks the process as ours
    options = ["--host", WORKERS.get(name, HOST), "--properties-file", conf, *args]
    command = [SPARK_HOME / "bin" / "spark-class", f"org.apache.spark.deploy.{kind}", *options]
    env = {
        "SPARK_HOME": str(SPARK_HOME),
        "SPARK_DAEMON_JAVA_OPTS": " ".join([*JAVA_OPTIONS, f"-Djava.io.tmpdir={state / 'tmp'}"]),
        "SPARK_DAEMON_MEMORY": HEAP,
        "SPARK_WORKER_DIR": str(state / name),
        "SPARK_LOCAL_DIRS": str(state / "spark-local"),
        # Executors are the worker's children: the same Python and libraries as here, our own code by the job.
        "PYSPARK_PYTHON": sys.executable,
        "PYTHONPATH": "",
    }
    return [str(part) for part in command], env


def get_json(port: int, path: str) -> dict[str, Any] | None:
    connection = http.client.HTTPConnection(HOST, port, timeout=5)
    try:
        connection.request("GET", path)
        return cast(dict[str, Any], json.loads(connection.getresponse().read()))
    except (OSError, http.client.HTTPException, ValueError):  # not up yet
        return None
    finally:
        connection.close()


def _holder(port: int) -> str:
    with suppress(psutil.Error):  # other people's connections may be secret
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port and connection.pid:
                return f" by pid {connection.pid} ({psutil.Process(connection.pid).name()})"
    return ""


def lives(process: psutil.Process) -> bool:
    """False for one that ended and whose parent has not asked how, too: a worker keeps some of its executors so."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:  # it ended between the two
        return False


def end(processes: list[psutil.Process], number: signal.Signals = signal.SIGTERM) -> None:
    """Signal them all, wait 10 s, then kill."""
    alive = processes
    for step in (number, signal.SIGKILL):
        for process in alive:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(step)
        _, alive = psutil.wait_procs(alive, timeout=10)
