"""What CI makes of the outcome of the commands that it runs."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from ladder import REPO

MAKE = '#!/bin/sh\necho "make $*" >> "$DONE"\n'
TIMEOUT = '#!/bin/sh\necho "timeout" >> "$DONE"\n[ "$CODE" = 0 ] && shift 2 && exec "$@"\nexit "$CODE"\n'


@pytest.mark.parametrize("code", [0, 1, 124, 137])
def test_only_the_tests_of_the_npu_have_a_limit_and_reaching_it_fails(code: int, tmp_path: Path) -> None:
    """124 and 137 are how `timeout` ends a command; the programs that CI starts are put in its way here."""
    for name, text in (("make", MAKE), ("timeout", TIMEOUT), ("gcc", "#!/bin/sh\n")):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    environment = dict(os.environ, PATH=f"{tmp_path}:{os.environ['PATH']}", DONE=str(tmp_path / "done"), CODE=str(code))
    done = subprocess.run([REPO / ".ci" / "run"], env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode == 0) == (code == 0), done.stdout + done.stderr
    lines = (tmp_path / "done").read_text().splitlines()
    assert lines == ["make test", "make npu-venv", "timeout", "make test-npu"][:None if code == 0 else 3]


def test_every_target_of_ci_exists() -> None:
    for target in ("test", "npu-venv", "test-npu"):
        done = subprocess.run([str(shutil.which("make")), "-n", target], cwd=REPO, capture_output=True, text=True,
                              timeout=60)
        assert done.returncode == 0, done.stderr
