"""A real SLURM of two nodes, both on this machine, in a scratch folder; root starts it, as its daemons want."""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
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


@contextmanager
def cluster(folder: Path) -> Iterator[dict[str, str]]:
    """The environment in which srun and sbatch reach it; everything is stopped at the end."""
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
    environment = os.environ | {"SLURM_CONF": str(file)}
    munge = ["munged", "--force", "--foreground", f"--key-file={key}", f"--socket={folder}/munge/socket"]
    munge += [f"--pid-file={folder}/munge/pid", f"--seed-file={folder}/munge/seed", f"--log-file={folder}/munge/log"]
    commands = [munge, ["slurmctld", "-D"], *(["slurmd", "-D", "-N", node] for node in (host, "localhost"))]
    running = []
    try:
        for command in commands:
            with (folder / f"{command[0]}.out").open("a") as out:
                running.append(subprocess.Popen(command, env=environment, stdout=out, stderr=out))
            time.sleep(0.5)
        for _ in range(120):
            state = subprocess.run(["sinfo", "-h", "-N", "-o", "%T"], env=environment, capture_output=True, text=True)
            if state.stdout.split() == ["idle", "idle"]:
                break
            time.sleep(0.5)
        else:
            logs = "\n".join(log.read_text()[-2000:] for log in (*folder.glob("*.out"), *folder.glob("*.log")))
            raise RuntimeError(f"SLURM did not come up: {state}\n{logs}")
        yield environment
        subprocess.run(["scancel", "--me"], env=environment)  # of a test that failed
        for _ in range(60):
            left = subprocess.run(["squeue", "--noheader"], env=environment, capture_output=True, text=True)
            if not left.stdout:
                break
            time.sleep(0.5)
    finally:
        for process in reversed(running):
            process.terminate()
        for process in running:
            process.wait(20)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
