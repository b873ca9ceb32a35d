"""Prepare recordings of several channels: ``--help`` explains."""

from fairseq_rkm.experiments.signal_data import main

if __name__ == "__main__":
    main()
