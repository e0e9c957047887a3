"""``python -m hubmerge``."""

from hubmerge.cli import main

main()
