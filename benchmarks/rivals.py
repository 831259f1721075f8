"""`python -m benchmarks.rivals`: our server and its rivals under the same load on this machine, and which bars are met.

`loadtest.compare` with the same options, and in the place of its report the project's bars (`bars`): tables on standard
output, everything in benchmarks/results/NAME.json. benchmarks/README.md has the recipes.
"""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import asdict
from pathlib import Path

from benchmarks.bars import judge, markdown
from loadtest.compare import begin, make_contenders, measure, parser
from loadtest.discover import NoServer
from loadtest.equal import check_turns
from loadtest.servers import OURS
from loadtest.turns import compact, summarize

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Measure, print Markdown, write JSON. Raises UnequalWork."""
    command = parser()
    command.prog, command.description = "python -m benchmarks.rivals", __doc__.split("\n")[0]
    command.set_defaults(servers="ours,llama.cpp-q8_0", rounds=5)
    command.add_argument("--name", default="rivals", help="of the file in benchmarks/results (default: rivals)")
    options = command.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    options.out.mkdir(parents=True, exist_ok=True)
    try:
        contenders = make_contenders(options)
        found = begin(options, contenders, None)
    except (KeyError, ValueError, NoServer) as error:
        command.error(f"no server or path of the name {error}: see --help")
    measure(options, contenders, found)
    check_turns(found.turns)
    cells, verdicts = summarize(found.turns), judge(OURS, found.bits, found.turns, found.memory)
    print(markdown(cells, found.memory, verdicts, OURS))
    results = {
        "figures": list(map(asdict, cells)),
        "memory": {name: asdict(figures) for name, figures in found.memory.items()},
        "verdicts": list(map(asdict, verdicts)),
        "turns": list(map(compact, found.turns)),
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{options.name}.json"
    path.write_text(json.dumps(found.facts | results, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
