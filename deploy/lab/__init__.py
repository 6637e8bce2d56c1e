"""The lab: a real data center of namespaces on one machine, for the demo and the tests."""
