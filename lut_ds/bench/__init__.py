"""What it costs: the loader, the step, and what a run will need."""
