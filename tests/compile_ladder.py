"""The worker of `ladder.py` that also counts graphs: `python compile_ladder.py CASES.json`, one case.

CASES.graphs receives {"graphs": compiled graphs, "breaks": reasons why a graph ended early}.
"""

import json
import sys
from pathlib import Path

import ladder


def main(cases_path: str) -> None:
    ladder.main(cases_path)
    from torch._dynamo.utils import counters

    Path(cases_path).with_suffix(".graphs").write_text(json.dumps(
        {"graphs": counters["stats"]["unique_graphs"], "breaks": sorted(counters["graph_break"])}))


if __name__ == "__main__":
    main(sys.argv[1])
