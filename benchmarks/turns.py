"""Programs that make one step in turn, so that a slow minute of the machine slows all of them."""

import subprocess
import sys
import tempfile

from sides import failure

READY = "ready"


def wait_for_turn() -> None:
    """In the program, before each step: say that the last one has ended, and wait."""
    print(READY, flush=True)
    sys.stdin.readline()


def run_in_turn(commands: dict[str, list[str]], environment: dict[str, str], steps: int) -> dict[str, str]:
    """Run all programs at once, one step of each in turn.

    Args:
        commands: by name; each calls `wait_for_turn` before every step.
        environment: of all.
        steps: of each.

    Returns:
        What each printed after its last step.

    Raises:
        ConfigError: a program refused what the user asked for.
        RuntimeError: a program failed, or made another number of steps.
    """
    last: dict[str, str] = {}
    with tempfile.TemporaryFile("w+") as errors:
        programs = {name: subprocess.Popen(command, env=environment, text=True, stdin=subprocess.PIPE,
                                           stdout=subprocess.PIPE, stderr=errors)
                    for name, command in commands.items()}
        try:
            for step in range(steps + 1):
                for name, program in programs.items():
                    assert program.stdin is not None and program.stdout is not None
                    if step:
                        program.stdin.write("\n")
                        program.stdin.flush()
                    last[name] = ""
                    while (line := program.stdout.readline()) and line != READY + "\n":
                        last[name] += line
                    if line and step == steps:
                        raise RuntimeError(f"{name} wants to make more than {steps} steps")
                    if not line and (program.wait() or step < steps):
                        errors.seek(0)
                        raise failure(f"{name}, {step} of {steps} steps begun,", program.returncode, errors.read())
        finally:
            for program in programs.values():
                program.kill()
                program.communicate()
    return last
