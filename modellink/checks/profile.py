"""`--profile` and its range of steps and ranks."""

from dataclasses import fields

from modellink.checks.values import flag_name
from modellink.config.errors import ProblemList
from modellink.config.settings import ProfileSettings, Settings


def check_profile(settings: Settings, world_size: int, problems: ProblemList) -> None:
    """The steps must be steps of the run, and the ranks ranks of the job."""
    options, steps = settings.profiling, settings.train.train_iters
    if not options.profile:
        given = [flag_name(field.name) for field in fields(ProfileSettings)
                 if field.name in settings.given and field.name != "profile"]
        if given:
            problems.add(f"{', '.join(given)} without --profile: nothing would be recorded; add --profile, or leave "
                         f"{'it' if len(given) == 1 else 'them'} out.")
        return
    start, end = options.profile_step_start, options.profile_step_end
    if start < 0:
        problems.add(f"--profile-step-start {start}: must be at least 0, which records from the first step; correct "
                     "it.")
    elif end <= start:
        problems.add(f"--profile-step-end {end}: is not above --profile-step-start {start}, and the steps after that "
                     "one are recorded; raise it.")
    elif steps is not None and end > steps:
        wrong = f"--profile-step-start {start}" if start >= steps else f"--profile-step-end {end}"
        problems.add(f"{wrong}: is beyond the last step to record, --train-iters {steps}; lower it.")
    ranks = [rank for rank in options.profile_ranks or [0] if not 0 <= rank < world_size]
    if ranks:
        problems.add(f"--profile-ranks {' '.join(map(str, ranks))}: the job has the ranks 0 to {world_size - 1}; "
                     "choose among them.")
