"""What a run leaves on disk and on W&B: its folder, run.json, metrics, and where its numbers come from."""
