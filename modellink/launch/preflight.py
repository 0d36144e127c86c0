"""Every check of a job before its ranks start, in a process of its own.

A process of its own, because asking an accelerator for its free memory takes some of it until the process ends.
"""

import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from modellink.config.errors import ConfigError, ProblemList, run_command
from modellink.config.settings import Settings, parse_settings
from modellink.evaluation.command import split_backend
from modellink.evaluation.lm_eval import parse_words
from modellink.launch.options import Job, parse_job
from modellink.models.run import Run
from modellink.planner.plan import Place, Plan
from modellink.runtime import TITLES, Program, prepare_run

PROGRAMS: dict[str, Program] = {"pretrain_gpt.py": "train", "posttrain_gpt.py": "train", "inference.py": "generate",
                              "evaluation.py": "evaluate"}


def program_of(script: str) -> Program | None:
    """Which of our programs a script is; None for a script of the user's, which is started without checks."""
    path = Path(script)
    program = PROGRAMS.get(path.name)
    if program is None or not path.is_file() or "modellink" not in path.read_text(encoding="utf-8", errors="replace"):
        return None
    return program


def check_job(job: Job) -> list[str]:
    """Run every check of a job.

    Returns:
        The lines of the plan, empty when the script is not one of ours.

    Raises:
        ConfigError: every problem found.
    """
    problems = ProblemList()
    for problem in job.problems():
        problems.add(problem)
    if not job.check and job.options.node_rank == 0 and not problems.problems and job.options.master_port is not None:
        _check_port(job.options.master_port, problems)
    program = program_of(job.script)
    if program is None:
        problems.raise_if_any()
        return ["the script is not one of modellink's: nothing to check"] if job.check else []
    plan: list[str] = []
    try:
        backend, words = split_backend(job.arguments) if program == "evaluate" else ("", [])
        if backend == "lm-eval":  # its tasks are its own to check
            program, settings = "generate", parse_words(words)[0]
        else:
            settings = parse_settings(Path(job.script).name, TITLES[program], job.arguments)
    except ConfigError as error:
        raise ConfigError([*problems.problems, *error.problems]) from error
    if program == "generate" and job.options.node_rank == 0:
        _check_asks(settings, problems)
    if job.options.nnodes >= 1:
        plan = _check_program(job, settings, program, problems)
    if job.check:  # the plan first, then the problems
        print("\n".join(plan), flush=True)
    problems.raise_if_any()
    return plan


def _check_asks(settings: Settings, problems: ProblemList) -> None:
    """What inference.py is asked, as far as that is known before its first rank reads standard input."""
    from modellink.inference.complete import find_prompts
    from modellink.inference.frontend import named_template
    from modellink.inference.prompt_files import STDIN
    from modellink.inference.tasks import find_tasks

    problems.catch(lambda: find_tasks(settings, is_terminal=True))
    problems.catch(lambda: named_template(settings))
    if settings.generation.prompts_file != STDIN:
        problems.catch(lambda: find_prompts(settings))


def _check_port(port: int, problems: ProblemList) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except (OSError, OverflowError) as error:
            problems.add(f"--master-port {port}: cannot be used on this node ({error}); choose another port, "
                         "the same on every node.")


def _check_program(job: Job, settings: Settings, program: Program, problems: ProblemList) -> list[str]:
    place, accelerators = _place(settings)
    nproc = job.nproc(accelerators)
    if nproc < 1:
        return []
    # a plan for other machines: this one has not got the device, or not as many
    elsewhere = job.check and (place is None or (place.shared and settings.device.device == "auto")
                               or (not place.shared and nproc > accelerators))
    if place is not None and not place.shared and nproc > accelerators and not elsewhere:
        problems.add(f"--nproc-per-node {nproc}: this node has {accelerators} {place.device} devices; every rank needs "
                     "one of its own.")
    if program == "evaluate":
        from modellink.evaluation.plan import make_plans

        problems.catch(lambda: make_plans(settings))
    try:
        run = prepare_run(settings, job.options.nnodes * nproc, program, elsewhere=elsewhere)
    except ConfigError as error:
        for problem in error.problems:
            problems.add(problem)
        return []
    if program != "train":
        return list(run.notices)
    return _check_plan(run, job, nproc, None if elsewhere else place, problems)


def _check_plan(run: Run, job: Job, nproc: int, place: Place | None, problems: ProblemList) -> list[str]:
    plan = Plan.of(run)
    lines = [*plan.lines(), *run.notices]
    if place is None:
        lines.append("memory and disk are reported, not checked: this machine has not got the devices of the job "
                     "(--device cpu checks against this host)")
        return lines
    node = range(job.options.node_rank * nproc, (job.options.node_rank + 1) * nproc)
    plan.check_memory(place, node, problems)
    plan.check_disk(node, problems)
    return lines


def _place(settings: Settings) -> tuple[Place | None, int]:
    """The device of this machine that the job would use (None: not here), and how many there are."""
    from modellink.device.select import select_device  # imports torch
    from modellink.device.starting import reporting_device

    try:
        device = select_device(settings.device.device)
    except ConfigError:
        return None, 1
    with reporting_device(device.name):
        return Place(device.name, device.free_memory(), shared=device.name == "cpu"), device.count()


def main(argv: Sequence[str] | None = None) -> int:
    check_job(parse_job(sys.argv[1:] if argv is None else argv))
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
