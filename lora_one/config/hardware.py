"""Hardware profiles: the figures of a device and its links, from which a dry run estimates memory and time."""

import math
from dataclasses import dataclass, fields
from pathlib import Path

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from lora_one.config import refuse_unknown, typed
from lora_one.config.checked import Ranges, check_values
from lora_one.config.defaults import configuration_folder
from lora_one.errors import UsageError, nearest

HEADROOM = 0.9  # share of a device's memory that is planned for; the rest is for the driver and unused gaps


@dataclass(frozen=True)
class Hardware:
    """One kind of device, with its node and its links; bytes, bytes/s and flop/s.

    Every figure is that of one device, except ``host_memory``, which is that of one node.
    link_within_node, link_between_nodes: what a device sends to a device of the same node, or of another one.
    training_efficiency, initialisation_efficiency: share of the peak that is reached.
    """

    bf16_flops: float
    fp32_flops: float
    memory: float
    memory_bandwidth: float
    host_memory: float
    devices_per_node: int
    link_within_node: float
    link_between_nodes: float
    training_efficiency: float
    initialisation_efficiency: float

    @property
    def room(self) -> float:
        """Return the bytes of a device that a plan may use."""
        return HEADROOM * self.memory

    def link(self, processes: int) -> float:
        """Return the bytes/s that each of some processes sends in a ring: those of its slowest link."""
        if processes <= self.devices_per_node:
            return self.link_within_node
        return min(self.link_within_node, self.link_between_nodes)


SHARES = ("training_efficiency", "initialisation_efficiency")
RANGES: Ranges = {field.name: ("positive", lambda v: v > 0 and math.isfinite(v)) for field in fields(Hardware)}
RANGES |= dict.fromkeys(SHARES, ("in (0, 1]", lambda v: 0 < v <= 1))


def read_hardware(name: str) -> Hardware:
    """Read a profile: a name in conf/hardware, or the path of a YAML file.

    Raises UsageError, which names the file: it does not exist or is not YAML, or a field is missing, unknown, of the
    wrong type or not positive.
    """
    file = profile(name)
    try:
        given = OmegaConf.to_container(OmegaConf.load(file))
        refuse_unknown("", given, Hardware)
        found = OmegaConf.to_object(typed("", given, Hardware))
        check_values(vars(found), {}, RANGES)
    except (OSError, YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise UsageError(f"plan.hardware={name}: {file} is not valid YAML ({' '.join(str(error).split())})") from error
    except UsageError as error:
        raise UsageError(f"plan.hardware={name}: {file}: {error}") from error
    return found


def profile(name: str) -> Path:
    """Return the file of a profile. Raises UsageError: there is none."""
    folder = configuration_folder() / "hardware"
    for file in (folder / f"{name}.yaml", Path(name).expanduser()):
        if file.is_file():
            return file
    known = [file.stem for file in folder.glob("*.yaml")]
    raise UsageError(f"plan.hardware={name} is neither a file nor a profile in {folder}; {nearest(name, known)}")
