"""The lab: a real data center of namespaces on one machine, for the demo and the tests."""

from deploy.lab.lab import LOCAL, SRV, Lab, default_root, free_net

__all__ = ["LOCAL", "SRV", "Lab", "default_root", "free_net"]
