"""Flower's settings: read-only, behind a login, on loopback, with columns that tell what a task is about, and the tabs
Data center, Desktops and Operations.

HDCS_FLOWER_AUTH=admin:secret celery -A hdcs_tasks.app flower --conf=deploy/flowerconfig.py
"""

import os
import sys

from hdcs_tasks import dashboards

if not os.environ.get("HDCS_FLOWER_AUTH"):
    sys.exit("Flower needs a login: set HDCS_FLOWER_AUTH=user:password")

address = os.environ.get("HDCS_FLOWER_ADDRESS", "127.0.0.1")
port = int(os.environ.get("HDCS_FLOWER_PORT", "5555"))
basic_auth = [os.environ["HDCS_FLOWER_AUTH"]]
# Terminating a task in the middle of a migration is dangerous: operations are cancelled with hdcs op cancel.
read_only = os.environ.get("HDCS_FLOWER_READ_ONLY", "1") != "0"
tasks_columns = "name,kwargs,state,result,received,runtime,worker"
natural_time = False
max_tasks = 20_000
purge_offline_workers = 300
dashboards.install()
