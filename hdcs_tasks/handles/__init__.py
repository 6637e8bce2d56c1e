"""What Python callers hold: the parts of ``Cloud``, one file per kind of record."""
