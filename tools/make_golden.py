"""Write the stored loss traces of tests/golden anew: `python tools/make_golden.py`."""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))


def main() -> None:
    from tests.golden.trace import OBJECTIVES, trace

    traces = {name: trace(name) for name in OBJECTIVES}
    (ROOT / "tests" / "golden" / "traces.json").write_text(json.dumps(traces, indent=1) + "\n")


if __name__ == "__main__":
    main()
