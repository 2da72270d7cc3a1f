"""Fault drills: what happens to a run when a worker, a node, a driver, a disk or a network fails."""
