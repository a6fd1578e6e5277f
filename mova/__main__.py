"""``python -m mova``: the command line."""

from .cli import main

main()
