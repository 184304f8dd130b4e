"""`python -m genseg`: the command line, for launchers that start a module, such as torchrun."""

import sys

from genseg.cli import main

sys.exit(main())
