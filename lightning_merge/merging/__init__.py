"""Plan, align, merge, repair, sweep: from a base and experts to one model."""
