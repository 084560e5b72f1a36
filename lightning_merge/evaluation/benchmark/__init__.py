"""The benchmarks: one domain left out at a time, and experts of several foundations."""
