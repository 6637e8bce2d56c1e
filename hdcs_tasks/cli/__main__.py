"""``python -m hdcs_tasks.cli``."""

from hdcs_tasks.cli.main import main

main()
