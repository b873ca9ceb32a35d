"""Prepare labelled documents: ``--help`` explains."""

from fairseq_rkm.experiments.classification_data import main

if __name__ == "__main__":
    main()
