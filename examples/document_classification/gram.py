"""Classify documents by Gram matrices of untrained machines: ``--help`` explains."""

from fairseq_rkm.experiments.gram_baseline import main

if __name__ == "__main__":
    main()
