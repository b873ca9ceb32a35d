"""The backends faster than the reference, each in a file or folder of its own; none imports another."""
