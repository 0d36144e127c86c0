"""The loss curve as a picture and in the terminal, and the check that the loss has fallen.

`python -m modellink.quickstart.curve --metrics-file RUN/metrics.jsonl --picture loss.png`
"""

import json
import math
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from modellink.config.errors import ConfigError, run_command
from modellink.config.fields import flag
from modellink.config.files import check_real, write_beside
from modellink.config.parser import parse_sections

LAST_STEPS = 5  # one step's loss jumps with its samples, their mean hardly does


@dataclass(frozen=True)
class CurveFlags:
    """What to draw."""

    metrics_file: str = flag("metrics.jsonl", "metrics of a training run", metavar="FILE")
    picture: str = flag("loss.png", "picture to write", metavar="FILE")
    least_fall: float = flag(0.0, "stop with an error when the mean loss of the last 5 steps is not this much below "
                                  "that of the first step")


def main(argv: Sequence[str] | None = None) -> int:
    """Draw the curve and judge it; exit code 1 when the loss has not fallen."""
    (flags,), _ = parse_sections("curve.py", "Draw the loss of a training run.", (CurveFlags,), argv)
    steps, losses = read_losses(Path(flags.metrics_file))
    draw_picture(steps, losses, Path(flags.picture))
    print(terminal_curve(steps, losses, colors=sys.stdout.isatty()))
    last = mean_of_last(losses)
    print(f"loss: {losses[0]:.3f} at the first step, {last:.3f} on average over the last {LAST_STEPS}; "
          f"picture: {flags.picture}")
    if losses[0] - last < flags.least_fall:
        print(f"the loss fell by {losses[0] - last:.3f}, expected was {flags.least_fall:g} or more: the training run "
              f"did not learn; see {flags.metrics_file}", file=sys.stderr)
        return 1
    return 0


def read_losses(path: Path) -> tuple[list[int], list[float]]:
    """Steps and training losses of a metrics file.

    Raises:
        ConfigError: the file is missing, holds no step, or a loss that is not finite.
    """
    records = [json.loads(line) for line in check_real(path).read_text(encoding="utf-8").splitlines()]
    train = [record for record in records if record["kind"] == "train"]
    if not train:
        raise ConfigError(f"{path}: no training step is in it; let the training run finish a step first.")
    steps, losses = [record["step"] for record in train], [record["loss"] for record in train]
    for step, loss in zip(steps, losses):
        if not math.isfinite(loss):  # plotext would end the process
            raise ConfigError(f"{path}: the loss of step {step} is {loss}: the run diverged; lower its --lr.")
    return steps, losses


def mean_of_last(losses: Sequence[float]) -> float:
    """Mean of the last steps."""
    last = losses[-LAST_STEPS:]
    return sum(last) / len(last)


def draw_picture(steps: Sequence[int], losses: Sequence[float], target: Path) -> None:
    """Save the curve as a PNG."""
    import matplotlib

    matplotlib.use("Agg")  # no display needed
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    axes.plot(steps, losses, linewidth=1.2)
    axes.set(title="Quickstart: training loss (TP2 x PP2, interleaved, 4 processes)", xlabel="step",
             ylabel="loss (nats per token)", xlim=(0, steps[-1] * 1.07))
    axes.grid(alpha=0.3)
    axes.annotate(f"{losses[0]:.2f}", (steps[0], losses[0]), xytext=(8, -4), textcoords="offset points")
    axes.annotate(f"{mean_of_last(losses):.2f}", (steps[-1], mean_of_last(losses)), xytext=(6, -4),
                  textcoords="offset points")
    with write_beside(target) as beside:
        figure.savefig(beside, format="png", dpi=120)
    pyplot.close(figure)


def terminal_curve(steps: Sequence[int], losses: Sequence[float], *, colors: bool) -> str:
    """The curve as text; without a terminal it is plain and 78 columns wide."""
    import plotext

    figure = plotext.figure
    figure.clear()
    figure.theme("default" if colors else "colorless")
    figure.plot_size(min(100, shutil.get_terminal_size().columns) if colors else 78, 18)
    figure.title("training loss")
    figure.label("step")
    figure.draw(figure.signal(list(steps), list(losses)).lines())
    text: str = figure.build().string(colorless=not colors)
    return text


if __name__ == "__main__":
    sys.exit(run_command(main))
