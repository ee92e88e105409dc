"""Several processes must have the same code, libraries, settings and local files, or their results mix."""

import platform

from lora_one.distributed import Processes
from lora_one.errors import UsageError
from lora_one.records.folder import LocatedRun
from lora_one.records.provenance import source_fingerprint, versions

NOT_OF_THE_HASH = ("seed", "results_dir", "overwrite", "dry_run")  # which decide what a process does, and where


def refuse_differences(located: LocatedRun) -> None:
    """Raise UsageError, on every process, if the processes of a run do not agree; name the first difference."""
    processes = Processes.current()
    if processes.count == 1:
        return
    facts = {f"the version of {package}": version for package, version in versions().items()}
    facts["the source code"] = source_fingerprint()[:12]
    facts |= {f"the content of {key}": digest[:12] for key, digest in located.fingerprints.items()}
    settings = located.run.to_dict()
    facts |= {f"the setting {key}": settings[key] for key in NOT_OF_THE_HASH}
    facts["the configuration"] = located.config_hash[:12]
    everywhere = processes.gathered((facts, platform.node()))
    first, machine = everywhere[0]
    for rank, (others, other_machine) in enumerate(everywhere):
        for name in first | others:
            if first.get(name) != others.get(name):
                raise UsageError(
                    f"the processes differ in {name}: {first.get(name)} in process 0 on {machine}, "
                    f"{others.get(name)} in process {rank} on {other_machine}: give all machines the same software, "
                    "files and command; all tasks of one srun, like the processes of a launcher, are one run"
                )
