"""`python -m omni.cli`: the `omni` command where it is not on the path."""

import sys

from omni.cli.main import main

sys.exit(main())
