"""`python -m selfimprove`, where the command is not on the PATH."""

from selfimprove.cli import main

main()
