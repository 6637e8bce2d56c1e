"""Fixtures of the lab tests."""

pytest_plugins = ["tests.lab.hypervisor_node"]
