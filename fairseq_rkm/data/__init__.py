"""Readers and checks that fairseq's data folder lacks."""
