"""`python -m leakjax.cli`."""

from leakjax.cli import main

main()
