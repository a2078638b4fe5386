"""`python -m dllm_jax.testing replay FOLDER...`: does this library answer as published code did?"""

import argparse
import json
import sys
from pathlib import Path

from dllm_jax.testing.replay import replay


def main() -> int:
    """Prints a JSON line for each check and case; 1 where one of them fails."""
    parser = argparse.ArgumentParser(prog="python -m dllm_jax.testing", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("replay", help="replay folders of recorded answers")
    one.add_argument("folders", nargs="+", metavar="FOLDER", type=Path)
    one.add_argument("--case", help="only the checks and cases whose name contains this")
    arguments = parser.parse_args()
    right = True
    for folder in arguments.folders:
        for line in replay(folder, only=arguments.case):
            print(json.dumps(line), flush=True)
            right &= line["ok"]
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
