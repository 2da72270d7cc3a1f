"""All drills in one table: `python -m tests.drills [--out FILE.json] [NAME ...]`."""

import argparse
import json
import sys
import tempfile
import time
import traceback
from pathlib import Path

from tests.drills import drills
from tests.drills.field import Field


def main() -> int:
    """Run them; 1 where one of them did not end as it should."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="of drills; all otherwise")
    parser.add_argument("--out", type=Path, help="also write JSON")
    said = parser.parse_args()
    found, failed = [], 0
    print(
        "| drill | executor | rows | lost | repeated | wrong | quarantined | same file | seconds | |\n"
        + "|---" * 10
        + "|"
    )
    with tempfile.TemporaryDirectory() as folder:
        field = Field(Path(folder))
        for name, drill in [*drills.quick(), *drills.long()]:
            if said.names and name not in said.names:
                continue
            try:
                one = drill(field, time.monotonic())
            except Exception:
                failed += 1
                print(name, file=sys.stderr, flush=True)
                traceback.print_exc()
                continue
            failed += not one.good
            found.append(one.plain())
            print("| " + " | ".join(map(str, one.plain().values())) + " |", flush=True)
            if said.out:
                said.out.write_text(json.dumps(found, indent=1) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
