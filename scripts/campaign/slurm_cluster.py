"""A real SLURM of two nodes, both on this machine, in a scratch folder; root starts it, as its daemons want."""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
CryptoType=crypto/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
ReturnToService=2
NodeName={host} NodeHostname={host} NodeAddr=127.0.0.1 Port={first} CPUs=2 RealMemory=4000 State=UNKNOWN
NodeName=localhost NodeHostname={host} NodeAddr=127.0.0.1 Port={second} CPUs=2 RealMemory=4000 State=UNKNOWN
PartitionName=all Nodes={host},localhost Default=YES MaxTime=INFINITE State=UP
"""


def why_not() -> str | None:
    """What keeps a SLURM from being started here, or None."""
    missing = [name for name in ("slurmctld", "slurmd", "srun", "sbatch", "munged") if not shutil.which(name)]
    if missing:
        return f"no {missing[0]} here: apt-get install slurm-wlm munge"
    return None if os.getuid() == 0 else "SLURM's daemons are started by root"


@dataclass
class Cluster:
    """The daemons of a SLURM. folder: of their files.  environment: in it, srun and sbatch reach them."""

    folder: Path
    environment: dict[str, str]
    daemons: list[subprocess.Popen] = field(default_factory=list)

    def start(self, *command: str) -> subprocess.Popen:
        """Start a daemon in the foreground, with its output in a file."""
        with (self.folder / f"{command[0]}.out").open("a") as out:
            self.daemons.append(subprocess.Popen(command, env=self.environment, stdout=out, stderr=out))
        return self.daemons[-1]

    def ask(self, *command: str) -> str:
        """Return what a command of SLURM prints."""
        return subprocess.run(command, env=self.environment, capture_output=True, text=True).stdout

    def restart_controller(self) -> None:
        """Stop slurmctld and start it again, with the state that it has saved."""
        (controller,) = (daemon for daemon in self.daemons if daemon.args[0] == "slurmctld")
        controller.terminate()
        controller.wait(60)
        self.daemons.remove(controller)
        self.start("slurmctld", "-D")

    def wait_for_nodes(self) -> None:
        """Wait until both nodes are idle. Raises RuntimeError: they do not come up within a minute."""
        for _ in range(120):
            if self.ask("sinfo", "-h", "-N", "-o", "%T").split() == ["idle", "idle"]:
                return
            time.sleep(0.5)
        logs = "\n".join(log.read_text()[-2000:] for log in (*self.folder.glob("*.out"), *self.folder.glob("*.log")))
        raise RuntimeError(f"SLURM did not come up:\n{logs}")

    def end_jobs(self) -> None:
        """Cancel all jobs, and wait for their end."""
        self.ask("scancel", "--me")
        for _ in range(60):
            if not self.ask("squeue", "--noheader"):
                return
            time.sleep(0.5)

    def stop(self) -> None:
        """Stop the daemons, the last one first."""
        for daemon in reversed(self.daemons):
            daemon.terminate()
        for daemon in self.daemons:
            daemon.wait(20)


@contextmanager
def cluster(folder: Path) -> Iterator[Cluster]:
    """A SLURM of two nodes; everything is stopped at the end."""
    for name in ("state", "spool", "munge"):
        (folder / name).mkdir(parents=True)
    key = folder / "munge/key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    (folder / "munge").chmod(0o755)
    ports = dict(zip(("controller", "first", "second"), (free_port() for _ in range(3)), strict=True))
    file = folder / "slurm.conf"
    host = socket.gethostname().partition(".")[0]
    file.write_text(CONFIGURATION.format(host=host, folder=folder, **ports))
    started = Cluster(folder, os.environ | {"SLURM_CONF": str(file)})
    munge = ["munged", "--force", "--foreground", f"--key-file={key}", f"--socket={folder}/munge/socket"]
    munge += [f"--pid-file={folder}/munge/pid", f"--seed-file={folder}/munge/seed", f"--log-file={folder}/munge/log"]
    try:
        for command in (munge, ["slurmctld", "-D"], *(["slurmd", "-D", "-N", node] for node in (host, "localhost"))):
            started.start(*command)
            time.sleep(0.5)
        started.wait_for_nodes()
        yield started
        started.end_jobs()  # of a test that failed
    finally:
        started.stop()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
