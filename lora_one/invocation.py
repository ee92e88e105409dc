"""How this program was started."""

import sys
from pathlib import Path


def command_name() -> str:
    """Return the command that started this program: ``python run_exp.py``, ``python -m lora_one`` or ``lora-one``."""
    program = Path(sys.argv[0])
    if program.name == "__main__.py":
        return f"python -m {program.parent.name}"
    return f"python {program}" if program.suffix == ".py" else program.name
