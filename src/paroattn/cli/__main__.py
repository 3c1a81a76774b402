"""`python -m paroattn.cli` is `paro`."""

import sys

from . import main

sys.exit(main())
