"""A small but real cluster on this machine: python -m jobs.cluster up | down | status.

HDFS (a NameNode, two DataNodes) and Spark standalone (a Master, two Workers) as processes on loopback. All that it
knows and writes is in one folder: cluster.json (settings, pids), conf/ (HADOOP_CONF_DIR of clients), logs/, and HDFS's
data, which outlives `down`. Tests use the class Cluster, and its methods that break things.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import psutil

from jobs.daemons import (
    DAEMONS,
    DATANODES,
    HOST,
    WORKERS,
    Settings,
    configure,
    end,
    free_ports,
    get_json,
    lives,
    refuse_taken_ports,
    spark_daemon,
)
from jobs.hadoop import CACHE, hadoop_command, run
from kanyun.cli.parser import Parser
from kanyun.errors import UserError, run_cli

_PATIENCE = 120  # seconds for daemons to come up: 10 s on two idle cores, more when they are busy


class Cluster:
    """The daemons of one state folder, each found by its pid, and only if its command line names this folder.

    `settings`: those of a cluster that is to start; None takes the ones it was started with.
    `tied`: the daemons end with the process that started them, however it ends. Linux takes the thread for it, so they
    are to be started by the main one.
    """

    def __init__(self, state: Path, settings: Settings | None = None, tied: bool = False):
        self.state = state.expanduser().resolve()
        self._file = self.state / "cluster.json"
        saved = json.loads(self._file.read_text()) if self._file.exists() else {"settings": {}, "pids": {}}
        self._pids: dict[str, int] = saved["pids"]
        self._started_with = Settings(**saved["settings"])
        self.settings = settings or self._started_with
        self._tied = tied

    @property
    def hdfs(self) -> str:
        return f"hdfs://{HOST}:{self.settings.hdfs_port}"

    @property
    def spark(self) -> str:
        return f"spark://{HOST}:{self.settings.spark_port}"

    @property
    def env(self) -> dict[str, str]:
        """Return what clients should have in their environment."""
        conf = str(self.state / "conf")
        return {"SPARK_MASTER": self.spark, "HADOOP_CONF_DIR": conf, "SPARK_LOCAL_IP": HOST}

    def up(self) -> None:
        """Start what is not running, and wait until all of it is ready. If that fails, nothing is left running.

        Raises UserError: Java or Maven missing, a port taken, running already with other settings, or a daemon died
        (with the end of its log).
        """
        running = self.running()
        if not running:
            refuse_taken_ports(self.settings)
        elif self._started_with != self.settings:
            raise UserError(
                f"{self.state} is running with {self._started_with}, not {self.settings}: take it down first"
            )
        self._pids = {name: process.pid for name, process in running.items()}
        try:
            self._start_all(set(DAEMONS) - running.keys())
        except BaseException:
            self.down()
            raise

    def down(self) -> None:
        """End every daemon, and the executors below the workers, by pid."""
        end([*self.running().values(), *self.executors()])
        self._pids = {}
        if self._file.exists():
            self._save()

    def running(self) -> dict[str, psutil.Process]:
        """Name -> process of the daemons that are alive; a pid that is another program's by now is not one."""
        found = {}
        for name, pid in self._pids.items():
            with suppress(psutil.NoSuchProcess):
                process = psutil.Process(pid)
                if lives(process) and f"{self.state}/" in " ".join(process.cmdline()):
                    found[name] = process
        return found

    def executors(self) -> list[psutil.Process]:
        """JVMs of Spark applications, on all workers."""
        found: list[psutil.Process] = []
        for name, process in self.running().items():
            with suppress(psutil.NoSuchProcess):
                found += filter(lives, process.children() if name in WORKERS else [])
        return found

    def status(self) -> dict[str, str]:
        """Return the state of each daemon and service in words, by its name."""
        running = self.running()
        lines = {name: f"running, pid {running[name].pid}" if name in running else "down" for name in DAEMONS}
        hdfs, spark = self._hdfs_state(), self._spark_state()
        if hdfs and "namenode" in running:
            live, used = hdfs["NumLiveDataNodes"], hdfs["CapacityUsed"] / 1e6
            lines["HDFS"] = f"{self.hdfs}, {hdfs['FSState']}, {live} DataNodes, {used:,.1f} MB used"
        if spark and "master" in running:
            lines["Spark"] = f"{self.spark}, {spark['aliveworkers']} workers, {spark['coresused']} cores busy"
        return lines

    # --- for those who want to break things

    def kill(self, name: str) -> None:
        """kill -9 of one of DAEMONS; `start` brings it back."""
        self._end_one(name, signal.SIGKILL)

    def stop(self, name: str) -> None:
        """An orderly end of one of DAEMONS; `start` brings it back."""
        self._end_one(name, signal.SIGTERM)

    def start(self, name: str) -> None:
        """Start one of DAEMONS, with the data it had; see wait_for_hdfs and wait_for_spark."""
        settings = self.settings
        if name == "master":
            self._start_spark(name, "--port", settings.spark_port, "--webui-port", settings.spark_web_port)
        elif name in WORKERS:
            options = ("-c", settings.worker_cores, "-m", settings.worker_memory, "--webui-port", 0)
            self._start_spark(name, self.spark, *options)
        else:
            kind = "namenode.NameNode" if name == "namenode" else "datanode.DataNode"
            self._start(name, self._java(f"conf-{name}", f"hdfs.server.{kind}"), {})

    def wait_for_hdfs(self, datanodes: int = len(DATANODES)) -> None:
        """Wait for `datanodes` live DataNodes (a dead one is missed after 12 s) and for the end of safe mode."""

        def ready() -> bool:
            state = self._hdfs_state()
            return bool(state and state["NumLiveDataNodes"] == datanodes and state["FSState"] == "Operational")

        self._wait(f"HDFS with {datanodes} DataNodes", ready)

    def wait_for_spark(self, workers: int = len(WORKERS)) -> None:
        """Wait until the Master counts `workers` live workers."""
        self._wait(
            f"{workers} Spark workers", lambda: bool((s := self._spark_state()) and s["aliveworkers"] == workers)
        )

    def dfsadmin(self, *args: str) -> str:
        """Hadoop's admin command: ("-safemode", "enter"), ("-setSpaceQuota", "10m", "/x") ... Takes 1 s."""
        return self._hadoop("hdfs.tools.DFSAdmin", *args)

    def shell(self, *args: str) -> str:
        """Hadoop's file shell: ("-chmod", "700", "/x"), ("-ls", "-R", "/") ... Takes 1 s."""
        return self._hadoop("fs.FsShell", *args)

    # --- how

    def _start_all(self, missing: set[str]) -> None:
        if "master" in missing:
            configure(self.state, self.settings, self.hdfs)
            self.start("master")
        if not (self.state / "namenode" / "current").exists():
            format = self._java("conf-namenode", "hdfs.server.namenode.NameNode", "-format", "-force")
            run(format, "HDFS could not be formatted")
        for name in ("namenode", *DATANODES):
            if name in missing:
                self.start(name)
        # A worker that finds no master tries again only after 5 to 15 s.
        self._wait("Spark master", lambda: self._spark_state() is not None)
        for name in WORKERS:
            if name in missing:
                self.start(name)
        self.wait_for_hdfs()
        self.wait_for_spark()

    def _start_spark(self, name: str, *args: str | int) -> None:
        self._start(name, *spark_daemon(self.state, name, *args))

    def _start(self, name: str, command: list[str], env: dict[str, str]) -> None:
        if self._tied and shutil.which("setpriv"):
            command = ["setpriv", "--pdeathsig", "TERM", *command]
        with self._log(name).open("wb") as log:
            process = subprocess.Popen(
                command,
                env=os.environ | self.env | env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C in the terminal is not for the daemons
            )
        self._pids[name] = process.pid
        self._save()

    def _end_one(self, name: str, number: signal.Signals) -> None:
        end([self.running()[name]], number)
        del self._pids[name]
        self._save()

    def _hadoop(self, main: str, *args: str) -> str:
        return run(self._java("conf", main, *args), f"hadoop {' '.join(args)} failed")

    def _java(self, conf: str, main: str, *args: str) -> list[str]:
        return hadoop_command(self.state / conf, self.state / "tmp", main, *args)

    def _log(self, name: str) -> Path:
        return self.state / "logs" / f"{name}.log"

    def _save(self) -> None:
        self._file.write_text(json.dumps({"settings": asdict(self.settings), "pids": self._pids}, indent=2))

    def _wait(self, what: str, ready: Callable[[], bool]) -> None:
        deadline = time.monotonic() + _PATIENCE
        while not ready():
            for name in self._pids.keys() - self.running().keys():
                last = "\n".join(self._log(name).read_text(errors="replace").splitlines()[-15:])
                raise UserError(f"{name} died; the end of {self._log(name)}:\n{last}")
            if time.monotonic() > deadline:
                raise UserError(f"no {what} after {_PATIENCE} s: see the logs in {self.state / 'logs'}")
            time.sleep(0.1)

    def _hdfs_state(self) -> dict[str, Any] | None:
        query = "/jmx?qry=Hadoop:service=NameNode,name=FSNamesystemState"
        answer = get_json(self.settings.hdfs_web_port, query)
        return answer["beans"][0] if answer and answer["beans"] else None

    def _spark_state(self) -> dict[str, Any] | None:
        return get_json(self.settings.spark_web_port, "/json/")


@contextmanager
def temporary_cluster(state: Path, **settings: Any) -> Iterator[Cluster]:
    """A cluster on free ports for a `with` block. It ends with the block, and with this process however that ends;
    its folder is removed, unless the process was killed."""
    cluster = Cluster(state, Settings(**free_ports() | settings), tied=True)
    cluster.up()
    try:
        yield cluster
    finally:
        cluster.down()
        shutil.rmtree(cluster.state)


def main() -> int:
    prog = "python -m jobs.cluster"
    parser = Parser(prog=prog, description="HDFS and Spark on this machine.", example=f"{prog} up --spark-port 7078")
    parser.add_argument("command", choices=["up", "down", "status"])
    parser.add_argument("--state", type=Path, default=CACHE / "cluster", help="folder of the cluster (%(default)s)")
    for f in fields(Settings):
        parser.add_argument(f"--{f.name.replace('_', '-')}", type=type(f.default), help=f"for up; default {f.default}")
    args = parser.parse_args()
    given = {f.name: value for f in fields(Settings) if (value := getattr(args, f.name)) is not None}
    if args.command == "up":
        cluster = Cluster(args.state, Settings(**given))
        print("starting HDFS (1 NameNode, 2 DataNodes) and Spark (1 Master, 2 Workers) ...", file=sys.stderr)
        cluster.up()
        print(f"{cluster.hdfs} and {cluster.spark} are up; for clients:")
        print("export " + " ".join(f"{name}={value}" for name, value in cluster.env.items()))
        return 0
    cluster = Cluster(args.state)
    if args.command == "down":
        cluster.down()
    for name, value in cluster.status().items():
        print(f"{name:12} {value}")
    return 0 if args.command == "down" or cluster.running().keys() == set(DAEMONS) else 1


if __name__ == "__main__":
    run_cli(main)
