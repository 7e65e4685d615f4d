"""`python -m scope_lens.cli`, for launchers that start a module, such as torchrun."""

import sys

from scope_lens.cli import main

if __name__ == "__main__":
    sys.exit(main())
