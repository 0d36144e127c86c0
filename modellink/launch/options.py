"""Flags of `modellink launch`, and the split of its command line into own flags, script and the script's arguments."""

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass

from modellink.config.errors import ConfigError
from modellink.config.fields import flag
from modellink.config.parser import option_names, parse_sections

PROG = "modellink launch"
USAGE = ("Run SCRIPT on every rank of this node: modellink launch [flags] SCRIPT [arguments of SCRIPT]. "
         "Every problem that can be found before a rank starts is shown at once, with exit code 2.")


@dataclass(frozen=True)
class LaunchOptions:
    """Ranks and nodes."""

    nproc_per_node: int | None = flag(None, "ranks on this node (default: its accelerators, 1 on cpu)",
                                      names=["--nproc_per_node"], type=int)
    nnodes: int = flag(1, "number of nodes")
    node_rank: int = flag(0, "number of this node, from 0", names=["--node_rank"])
    master_addr: str = flag("127.0.0.1", "address of node 0", names=["--master_addr"])
    master_port: int | None = flag(None, "a free port of node 0 (default: one is chosen when there is one node)",
                                   names=["--master_port"], type=int)
    log_dir: str = flag("logs", "folder of the log files, rank_0.log and so on; rank 0 also prints to the terminal",
                        names=["--log_dir"])
    grace_period: float = flag(60.0, "seconds that ranks get to save and exit after SIGTERM or SIGINT")
    check: bool = flag(
        False, "start nothing: print the plan (ranks, layers and parameters of each stage, bytes per rank), then every "
               "problem; exit 0 or 2. Also understood among the script's arguments. Memory and disk are checked only "
               "where the job's device is: on a machine without an accelerator they are reported, unless --device cpu "
               "asks for this host")


@dataclass(frozen=True)
class Job:
    """A parsed `modellink launch` command line."""

    options: LaunchOptions
    given: frozenset[str]
    script: str
    arguments: tuple[str, ...]
    check: bool

    def nproc(self, accelerators: int) -> int:
        """Ranks on each node."""
        return self.options.nproc_per_node if self.options.nproc_per_node is not None else accelerators

    def problems(self) -> list[str]:
        """What is wrong with the launcher's own flags."""
        options = self.options
        found = []
        for name, value, least in (("--nproc-per-node", options.nproc_per_node, 1), ("--nnodes", options.nnodes, 1),
                                   ("--grace-period", options.grace_period, 0)):
            if value is not None and value < least:
                found.append(f"{name} {value}: must be at least {least}; correct it.")
        if options.nnodes >= 1 and not 0 <= options.node_rank < options.nnodes:
            found.append(f"--node-rank {options.node_rank}: must be between 0 and {options.nnodes - 1} with --nnodes "
                         f"{options.nnodes}; correct it.")
        if options.nnodes > 1 and not self.check:
            missing = [name for field, name in (("master_addr", "--master-addr"), ("master_port", "--master-port"))
                       if field not in self.given]
            if missing:
                found.append(f"--nnodes {options.nnodes} needs {' and '.join(missing)}: the same address and free port "
                             "of node 0 on every node.")
        if options.master_port is not None and not 1 <= options.master_port <= 65535:
            found.append(f"--master-port {options.master_port}: must be between 1 and 65535; correct it.")
        if not os.path.isfile(self.script):
            found.append(f"{self.script}: no such script; give the path of pretrain_gpt.py or another Python file.")
        return found


def parse_job(argv: Sequence[str]) -> Job:
    """Split and parse a command line.

    Raises:
        ConfigError: an unknown flag, or no script.
    """
    own, rest = _split(list(argv))
    (options,), given = parse_sections(PROG, USAGE, (LaunchOptions,), own)
    if not rest:
        raise ConfigError(f"{PROG}: the script is missing; for example: {PROG} --nproc-per-node 8 pretrain_gpt.py ...")
    arguments = [word for word in rest[1:] if word != "--check"]
    return Job(options, given, rest[0], tuple(arguments), options.check or len(arguments) < len(rest) - 1)


def _split(words: list[str]) -> tuple[list[str], list[str]]:
    """The launcher's own words end at the first word that is neither a flag nor a flag's value."""
    switches = {"-h", "--help"}
    for field in dataclasses.fields(LaunchOptions):
        if isinstance(field.default, bool):
            switches.update(name for names in option_names(field) for name in names)
    at = 0
    while at < len(words) and words[at].startswith("-"):
        at += 1 if words[at] in switches or "=" in words[at] else 2
    return words[:at], words[at:]
