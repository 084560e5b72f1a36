"""Speed, memory and exactness, measured: one script a question, run by hand. See ``README.md``; never installed."""
