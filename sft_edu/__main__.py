"""`python -m sft_edu` is `sft-edu`."""

import sys

from sft_edu.cli import main

if __name__ == "__main__":
    sys.exit(main())
