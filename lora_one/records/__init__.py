"""What a run writes to disk and to W&B: its folder, run.json, metrics and provenance."""
