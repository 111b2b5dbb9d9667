"""The worker: claims jobs, runs an engine, stores results."""
