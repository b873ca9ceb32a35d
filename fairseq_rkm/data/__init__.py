"""What fairseq's data folder lacks."""
