"""The ways to compute a recurrence that are faster than the reference, a file or folder each; none knows another."""
