"""Classify signals by Gram matrices of untrained machines: ``--help`` explains."""

from fairseq_rkm.experiments.signal_gram import main

if __name__ == "__main__":
    main()
