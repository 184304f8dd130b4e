"""`python -m genseg`: the command line, for launchers that start modules."""

import sys

from genseg.cli import main

sys.exit(main())
