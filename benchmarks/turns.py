"""Programs that make one step in turn, so that a slow minute of the machine slows all of them."""

import subprocess
import sys
import tempfile

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
        RuntimeError: a program ended early; the text is the end of what all of them wrote to standard error.
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
                    if (not line) != (step == steps):
                        errors.seek(0)
                        raise RuntimeError(f"{name}: {errors.read()[-3000:]}")
        finally:
            for program in programs.values():
                program.kill()
                program.communicate()
    return last
