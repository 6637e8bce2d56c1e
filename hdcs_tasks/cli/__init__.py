"""``hdcs``: a face on ``hdcs_tasks.cloud`` and nothing more."""
