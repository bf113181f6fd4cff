"""``python -m pybigmodel`` is the ``pybigmodel`` command."""

import sys

from pybigmodel.cli import main

sys.exit(main())
