"""`python -m fastpo`."""

from fastpo.cli import main

main()
