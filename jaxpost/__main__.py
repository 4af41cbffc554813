"""`python -m jaxpost`."""

import sys

from jaxpost.cli import main

sys.exit(main())
