"""How this program was started, and how the other programs of this project are called."""

import sys
from pathlib import Path


def command_name() -> str:
    """Return the command that started this program: ``python run_exp.py``, ``python -m lora_one`` or ``lora-one``."""
    program = Path(sys.argv[0])
    if program.name == "__main__.py":
        return f"python -m {program.parent.name}"
    return f"python {program}" if program.suffix == ".py" else program.name


def other_command(script: str, installed: str) -> str:
    """Return how another program is called: ``python <script>`` in a checkout, else its installed command.

    script: its path in a checkout.  installed: its command, which a program started as ``lora-one...`` names too.
    """
    in_checkout = (Path(__file__).parents[1] / script).exists()
    return f"python {script}" if in_checkout and not command_name().startswith("lora-one") else installed
