"""Compares the tensors a file holds with those the rule table expects."""

from modellink.config.errors import ConfigError


def compare_shapes(origin: str, wanted: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]]) -> None:
    """Raise a ConfigError that names missing, unknown and misshapen tensors, one sentence for each kind."""
    problems = []
    missing = [name for name in wanted if name not in found]
    unknown = [name for name in found if name not in wanted]
    wrong = [f"{name} {list(found[name])} instead of {list(wanted[name])}"
             for name in wanted if name in found and found[name] != wanted[name]]
    for kind, names, fix in (("missing tensors", missing, "the files are not whole, fetch them again"),
                             ("unknown tensors", unknown, "Qwen1.5 has none of that name"),
                             ("tensors of the wrong shape", wrong, "the weights belong to another architecture")):
        if names:
            more = f" and {len(names) - 4} more" if len(names) > 4 else ""
            problems.append(f"{origin}: {kind}: {', '.join(names[:4])}{more}; {fix}.")
    if problems:
        raise ConfigError(problems)
