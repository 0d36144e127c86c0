"""The one exception for a user's mistake, and the wrapper that turns it into exit code 2."""

import sys
from collections.abc import Callable, Sequence


class ConfigError(Exception):
    """What the user asked for cannot be done.

    Each problem is one sentence that names the flag or file, its value, the rule and the fix.
    Any other exception that leaves a command is a bug of ours and keeps its traceback.

    Args:
        problems: one sentence, or several that were all found in one pass.
    """

    def __init__(self, problems: str | Sequence[str]):
        found = [problems] if isinstance(problems, str) else problems
        # a sentence that ends in a hint ("did you mean x?") needs no full stop after it
        self.problems = [problem[:-1] if problem.endswith("?.") else problem for problem in found]
        super().__init__("\n".join(self.problems))


class ProblemList:
    """Collects sentences so that one run shows every problem instead of the first."""

    def __init__(self) -> None:
        self.problems: list[str] = []

    def add(self, problem: str) -> None:
        if problem not in self.problems:
            self.problems.append(problem)

    def catch(self, check: Callable[[], object]) -> object:
        """Run `check`; keep the problems of its ConfigError and return None in that case."""
        try:
            return check()
        except ConfigError as error:
            for problem in error.problems:
                self.add(problem)
            return None

    def raise_if_any(self) -> None:
        if self.problems:
            raise ConfigError(self.problems)


def run_command(main: Callable[[Sequence[str] | None], int | None], argv: Sequence[str] | None = None) -> int:
    """Run `main(argv)`; a ConfigError is printed to stderr without a traceback and becomes exit code 2."""
    try:
        return main(argv) or 0
    except ConfigError as error:
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr, flush=True)
        return 2
