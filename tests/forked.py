"""Processes forked from the test's: nothing to import again, and what they print in a file."""

import multiprocessing
import os
import sys

FORK = multiprocessing.get_context("fork")


def print_to(file):
    """In a forked process: sends all that it prints, by whatever way, to a file."""
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1, closefd=False) for n in (1, 2))
