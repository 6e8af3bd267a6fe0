"""Entry point of `python -m pixel_lb` and of the zipapp."""

import sys

from pixel_lb.cli import main

if __name__ == "__main__":
    sys.exit(main())
