"""`python -m jaxpost`."""

import sys

from jaxpost.cli import entry

sys.exit(entry())
