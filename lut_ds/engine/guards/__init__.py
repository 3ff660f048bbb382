"""What keeps a run honest without anybody watching: bad steps, spikes, diverging or hanging ranks, slow nodes, leaks."""
