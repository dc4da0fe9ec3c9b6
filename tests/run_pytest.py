"""Runs the tests named on the command line, slow ones too: what BUILD's py_tests start."""

import sys

import pytest

if __name__ == "__main__":
    # The cache would be written into bazel's read-only tree.
    sys.exit(pytest.main(["-m", "", "-p", "no:cacheprovider", *sys.argv[1:]]))
