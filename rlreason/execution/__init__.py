"""Where it runs: jobs, and executors that carry them out."""
