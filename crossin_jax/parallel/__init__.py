"""The device mesh, and several processes as one run."""
