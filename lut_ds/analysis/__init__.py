"""What a run looks like: curves, reconstructions and the report, from a run folder to pictures and one HTML page."""
