"""`python -m fallline` is the command `fallline`."""

import sys

from .cli import main

sys.exit(main())
