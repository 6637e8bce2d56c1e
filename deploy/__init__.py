"""Deployment: set-up scripts, the lab, units. Nothing in the product imports it."""
