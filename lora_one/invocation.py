"""How this program was started, and how the other programs of this project are called."""

import argparse
import sys
from pathlib import Path
from shlex import quote
from typing import NoReturn


def command_name() -> str:
    """Return the command that started this program: ``python run_exp.py``, ``python -m lora_one`` or ``lora-one``."""
    program = Path(sys.argv[0])
    if program.name == "__main__.py":
        return f"python -m {program.parent.name}"
    return f"python {quote(str(program))}" if program.suffix == ".py" else program.name


def other_command(script: str, installed: str) -> str:
    """Return how another program is called: ``python <script>`` in a checkout, else its installed command.

    script: its path in a checkout.  installed: its command, which a program started as ``lora-one...`` names too.
    """
    place = Path(__file__).resolve().parents[1] / script
    if not place.exists() or command_name().startswith("lora-one"):
        return installed
    here = Path(script).exists() and Path(script).samefile(place)
    return f"python {script if here else quote(str(place))}"


class Parser(argparse.ArgumentParser):
    """A parser of options that prints a mistake as one line, without the usage of all options; exit code 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; {self.prog} --help lists the options\n")
