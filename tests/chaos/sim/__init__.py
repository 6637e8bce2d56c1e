"""The simulated half of the chaos tests: one process, a virtual clock, one seed per history."""
